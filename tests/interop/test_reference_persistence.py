"""Directories on disk, and everything around the tensors, read by the reference and by us."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import veneer
from tests.interop.reference import (
    both,
    expect_same_model,
    expect_same_tensors,
    from_reference,
    output,
    peft,
    quiet,
    randomise,
    stored,
)
from tests.interop.reference_models import TINY, llama_config, one_text
from tests.interop.test_reference_files import KINDS, OPTIONS, config
from tests.tolerances import assert_close
from veneer import PeftModel
from veneer.errors import ConfigError, VeneerWarning
from veneer.files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME


def filled(kind: str = "linear", **options: Any) -> tuple[PeftModel, Any, Any, nn.Module]:
    """Both libraries with the same random adapter: ours, theirs, an input, the base."""
    case = KINDS[kind]
    base, inputs = case.build().eval(), case.inputs()
    ours, theirs = both(lambda: base, config(kind, "plain") | options)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, inputs, base


# -- configuration files -----------------------------------------------------------------------------------

#: Keys that may differ between a configuration that the reference reads from our file and its own.
OURS_ALONE = {
    "peft_version",  # ours claims none
    "target_modules",  # a pattern that only we understand is written as the names it stands for
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_reads_our_configuration(option: str, tmp_path: Path) -> None:
    """Without a word (warnings are errors here), and as the same values."""
    ours, theirs = both(KINDS["linear"].build, config("linear", option))
    ours.save_pretrained(tmp_path)
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is peft.LoraConfig
    expected = theirs.peft_config["default"].to_dict() | {"inference_mode": True}
    found = read.to_dict()
    different = {k for k in expected if found[k] != expected[k]}
    assert different <= OURS_ALONE
    assert read.target_modules == ours.peft_config["default"].target_modules


@pytest.mark.parametrize("option", OPTIONS)
def test_we_read_the_configuration_of_the_reference(option: str, tmp_path: Path) -> None:
    with quiet():
        theirs = peft.get_peft_model(KINDS["linear"].build(), peft.LoraConfig(**config("linear", option)))
        theirs.save_pretrained(tmp_path)
    read = veneer.PeftConfig.from_pretrained(tmp_path)
    expected = theirs.peft_config["default"].to_dict() | {"inference_mode": True}
    found = read.to_dict()
    assert {k for k in expected if found[k] != expected[k]} <= {"auto_mapping"}
    if isinstance(expected["target_modules"], set):
        assert read.target_modules == expected["target_modules"]


PORTABLE: dict[str, Any] = {
    "expressions_in_a_list": {"target_modules": [r"body\.layers\.\d\.first", "second"]},
    "a_lone_name": {"target_modules": "first"},
    "all_linear": {"target_modules": "all-linear"},
    "expression_with_layers": {"target_modules": r".*\.first", "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", PORTABLE)
def test_targets_that_only_we_understand_are_written_as_names(name: str, tmp_path: Path) -> None:
    case = KINDS["linear"]
    base, inputs = case.build().eval(), case.inputs()
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(r=4, lora_alpha=6, **PORTABLE[name]))
    randomise(ours.eval()).save_pretrained(tmp_path)
    there = from_reference(base, tmp_path)
    expect_same_model(ours, there)
    assert_close(output(ours, inputs), output(there, inputs))


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_configurations_saved_by_themselves(writer: str, tmp_path: Path) -> None:
    given = config("linear", "both_patterns_rslora") | {"task_type": "CAUSAL_LM", "revision": "main"}
    (veneer if writer == "ours" else peft).LoraConfig(**given).save_pretrained(tmp_path)
    reader = peft if writer == "ours" else veneer
    read = reader.LoraConfig.from_pretrained(str(tmp_path))
    assert type(read) is reader.LoraConfig
    for name, value in given.items():
        found = getattr(read, name)
        assert (set(found) == set(value)) if name == "target_modules" else (found == value), name
    assert read.inference_mode is False


# -- directories -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_default_lies_at_the_root_and_others_below(writer: str, tmp_path: Path) -> None:
    ours, theirs, inputs, base = filled()
    second = config("linear", "plain") | {"r": 2, "target_modules": ["first"]}
    ours.add_adapter("other", veneer.LoraConfig(**second))
    theirs.add_adapter("other", peft.LoraConfig(**second))
    theirs.base_model.set_adapter(["default", "other"])
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    with quiet():
        (ours if writer == "ours" else theirs).save_pretrained(tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        CONFIG_NAME,
        SAFETENSORS_NAME,
        "README.md",
        f"other/{CONFIG_NAME}",
        f"other/{SAFETENSORS_NAME}",
    } | ({"other/README.md"} if writer == "ours" else set())
    for name, subfolder in (("default", ""), ("other", "other")):
        expected = veneer.get_peft_model_state_dict(ours, adapter_name=name)
        expect_same_tensors(stored(tmp_path / subfolder), expected)
    mine = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    mine.load_adapter(tmp_path / "other", "other")
    its = from_reference(base, tmp_path)
    its.load_adapter(str(tmp_path), "other", subfolder="other")
    for names in ("default", "other", ["default", "other"]):
        ours.set_adapter(names)
        mine.set_adapter(names, inference_mode=True)
        its.base_model.set_adapter(names, inference_mode=True)
        assert_close(output(mine, inputs), output(ours, inputs))
        assert_close(output(its, inputs), output(ours, inputs))


def test_subfolder(tmp_path: Path) -> None:
    ours, theirs, inputs, base = filled()
    ours.save_pretrained(tmp_path / "ours" / "below")
    theirs.save_pretrained(tmp_path / "theirs" / "below")
    for place in ("ours", "theirs"):
        mine = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / place, subfolder="below").eval()
        its = from_reference(base, tmp_path / place, subfolder="below")
        assert_close(output(mine, inputs), output(theirs, inputs))
        assert_close(output(its, inputs), output(theirs, inputs))
        assert veneer.PeftConfig.from_pretrained(tmp_path / place, subfolder="below").r == 4


def test_saving_leaves_the_model_in_training(tmp_path: Path) -> None:
    ours, theirs, _, _ = filled(modules_to_save=["head"])
    for model in (ours, theirs):
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        model.save_pretrained(tmp_path)
        assert model.peft_config["default"].inference_mode is False
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_an_adapter_called_like_a_module(tmp_path: Path) -> None:
    """The reference then drops that module's tensors from the file of every other adapter, without a word."""
    ours, theirs, _, base = filled()
    for model, library in ((ours, veneer), (theirs, peft)):
        model.add_adapter("second", library.LoraConfig(**config("linear", "plain")))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    lost = set(stored(tmp_path / "ours")) - set(stored(tmp_path / "theirs"))
    assert len(lost) == 4 and all(".second." in key for key in lost)
    for name in ("default", "second"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", name)
        assert set(stored(tmp_path / "ours")) == set(
            veneer.get_peft_model_state_dict(loaded, adapter_name=name)
        )


def test_selected_adapters(tmp_path: Path) -> None:
    ours, theirs, _, _ = filled()
    for model, library in ((ours, veneer), (theirs, peft)):
        model.add_adapter("second", library.LoraConfig(**config("linear", "plain")))
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["second"])
    theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["second"])
    for name in ("ours", "theirs"):
        assert not (tmp_path / name / SAFETENSORS_NAME).exists()
        assert (tmp_path / name / "second" / SAFETENSORS_NAME).exists()


def test_metadata_of_the_tensors(tmp_path: Path) -> None:
    ours, theirs, _, _ = filled()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / SAFETENSORS_NAME, "pt") as file:
        its = file.metadata()
    with safe_open(tmp_path / "ours" / SAFETENSORS_NAME, "pt") as file:
        assert its.items() <= file.metadata().items()
    assert its["format"] == "pt"


def test_pickled_adapters_both_ways(tmp_path: Path) -> None:
    ours, theirs, inputs, base = filled(modules_to_save=["head"])
    expected = output(theirs, inputs)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=False)
    ours.save_pretrained(tmp_path / "ours", safe_serialization=False)
    for name in ("ours", "theirs"):
        assert (tmp_path / name / BIN_NAME).is_file() and not (tmp_path / name / SAFETENSORS_NAME).exists()
    expect_same_tensors(
        *(torch.load(tmp_path / name / BIN_NAME, weights_only=True) for name in ("ours", "theirs"))
    )
    with pytest.warns(VeneerWarning, match="pickle") as said:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert len(said) == 1
    assert_close(output(loaded, inputs), expected)
    assert_close(output(from_reference(base, tmp_path / "ours"), inputs), expected)


def test_load_peft_weights(tmp_path: Path) -> None:
    ours, theirs, _, _ = filled(modules_to_save=["head"])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        mine = veneer.load_peft_weights(tmp_path / name)
        its = peft.load_peft_weights(str(tmp_path / name), device="cpu")
        expect_same_tensors(mine, its)
        mapping = {r"^body\.layers": "elsewhere"}
        expect_same_tensors(
            veneer.load_peft_weights(str(tmp_path / name), key_mapping=mapping),
            peft.load_peft_weights(str(tmp_path / name), device="cpu", key_mapping=mapping),
        )


def front_matter(place: Path) -> dict[str, Any]:
    text = (place / "README.md").read_text(encoding="utf-8")
    found = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert found is not None
    values: dict[str, Any] = yaml.safe_load(found[1])
    return values


def test_model_cards(tmp_path: Path) -> None:
    """The same front matter, but for the base's name where it is only a path of this machine."""
    tiny = TINY["llama"]
    base = tiny.build()
    base.name_or_path = base.config._name_or_path = "org/model"
    ours, theirs = both(lambda: base, {"task_type": tiny.task})
    ours.save_pretrained(tmp_path / "ours")
    # The reference asks the hub about the base, here in vain; ours never does.
    with pytest.warns(UserWarning, match="Could not find a config file in org/model"):
        theirs.save_pretrained(tmp_path / "theirs")
    mine, its = front_matter(tmp_path / "ours"), front_matter(tmp_path / "theirs")
    for name in ("base_model", "library_name", "pipeline_tag", "tags"):
        assert mine[name] == its[name], name
    # Each keeps what people write into the other's card.
    for place, model in (("ours", theirs), ("theirs", ours)):
        card = tmp_path / place / "README.md"
        card.write_text(card.read_text(encoding="utf-8") + "\nTrained with care.\n", encoding="utf-8")
        model.create_or_update_model_card(str(tmp_path / place))
        assert "Trained with care." in card.read_text(encoding="utf-8")
        assert front_matter(tmp_path / place)["library_name"] == "peft"


def test_saved_on_the_side_of_the_main_process_only(tmp_path: Path) -> None:
    ours, theirs, _, _ = filled()
    ours.save_pretrained(tmp_path / "ours", is_main_process=False)
    theirs.save_pretrained(tmp_path / "theirs", is_main_process=False)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# -- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable_after_loading(trainable: bool, tmp_path: Path) -> None:
    _, theirs, _, base = filled(modules_to_save=["head"], bias="lora_only")
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trainable)
    its = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=trainable)
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in its.named_parameters() if p.requires_grad
    }
    assert ours.peft_config["default"].inference_mode is its.peft_config["default"].inference_mode
    assert ours.active_adapters == its.active_adapters


def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    _, theirs, inputs, base = filled("embedding")
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True).eval()
    its = from_reference(base, tmp_path, low_cpu_mem_usage=True)
    expect_same_model(ours, its)
    assert_close(output(ours, inputs), output(its, inputs))


@pytest.mark.parametrize("autocast", [True, False])
def test_types_of_factors_on_a_half_precision_base(autocast: bool, tmp_path: Path) -> None:
    case = KINDS["linear"]
    base = case.build().to(torch.bfloat16).eval()
    inputs = case.inputs().to(torch.bfloat16)
    given = config("linear", "modules_to_save")
    ours = veneer.get_peft_model(
        copy.deepcopy(base), veneer.LoraConfig(**given), autocast_adapter_dtype=autocast
    ).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**given), autocast_adapter_dtype=autocast
    ).eval()
    assert {n: p.dtype for n, p in ours.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "theirs", autocast_adapter_dtype=autocast
    ).eval()
    expect_same_model(loaded, theirs)
    if autocast:
        # A head trained in fp32 beside a bf16 body: the reference casts its input, as autocast would.
        return
    assert_close(output(loaded, inputs), output(theirs, inputs))


@pytest.mark.parametrize("autocast", [True, False], ids=["fp32_factors", "factors_as_base"])
@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_file", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_types_of_loaded_factors(
    of_file: torch.dtype, of_base: torch.dtype, autocast: bool, tmp_path: Path
) -> None:
    ours, _, _, base = filled()
    tensors = {k: t.to(of_file) for k, t in veneer.get_peft_model_state_dict(ours).items()}
    ours.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / SAFETENSORS_NAME, metadata={"format": "pt"})
    base = base.to(of_base)
    mine = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast)
    expect_same_model(mine, from_reference(base, tmp_path, autocast_adapter_dtype=autocast))


def test_key_mapping(tmp_path: Path) -> None:
    """A base whose modules have been renamed since."""
    ours, theirs, inputs, base = filled(modules_to_save=["head"])
    ours.save_pretrained(tmp_path)
    renamed = copy.deepcopy(base)
    renamed.body = nn.Module()
    renamed.body.blocks = base.body.layers
    renamed.body.__dict__["layers"] = renamed.body.blocks  # what forward looks up; no name of a module
    mapping = {r"^body\.layers": "body.blocks"}
    mine = PeftModel.from_pretrained(copy.deepcopy(renamed), tmp_path, key_mapping=mapping).eval()
    its = from_reference(renamed, tmp_path, key_mapping=mapping)
    assert any(".blocks." in n for n, _ in mine.named_parameters())
    assert {n: tuple(p.shape) for n, p in mine.named_parameters()} == {
        n: tuple(p.shape) for n, p in its.named_parameters()
    }
    assert_close(output(mine, inputs), output(theirs, inputs))
    assert_close(output(its, inputs), output(theirs, inputs))


def test_inference_mode_from_the_start() -> None:
    ours, theirs = both(KINDS["linear"].build, config("linear", "modules_to_save") | {"inference_mode": True})
    for model in (ours, theirs):
        assert not any(p.requires_grad for p in model.parameters())


# -- transformers ------------------------------------------------------------------------------------------

AUTO = {
    "llama": "AutoPeftModelForCausalLM",
    "gpt2": "AutoPeftModelForCausalLM",
    "t5": "AutoPeftModelForSeq2SeqLM",
    "bert_classifier": "AutoPeftModelForSequenceClassification",
    "llama_score": "AutoPeftModelForSequenceClassification",
    "bert_tokens": "AutoPeftModelForTokenClassification",
    "bert_answers": "AutoPeftModelForQuestionAnswering",
    "bert_features": "AutoPeftModelForFeatureExtraction",
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    tiny.build().save_pretrained(tmp_path / "base")
    base = getattr(
        transformers,
        f"Auto{AUTO[name].removeprefix('AutoPeft')}".replace("ModelForFeatureExtraction", "Model"),
    )
    base = base.from_pretrained(tmp_path / "base").eval()
    ours, theirs = both(lambda: base, {"task_type": tiny.task})
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = tiny.inputs()
    expected = output(theirs, inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    options = {"num_labels": base.config.num_labels} if "num_labels" in type(base.config)().to_dict() else {}
    for place in ("ours", "theirs"):
        for library in (veneer, peft):
            kind = getattr(library, AUTO[name])
            loaded = kind.from_pretrained(str(tmp_path / place), **options).eval()
            assert type(loaded) is getattr(library, AUTO[name].removeprefix("Auto"))
            assert_close(output(loaded, inputs), expected)
    for place in ("ours", "theirs"):
        assert_close(output(veneer.AutoPeftModel.from_pretrained(tmp_path / place).eval(), inputs), expected)


def test_auto_class_without_a_task(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    tiny.build().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    ours, theirs = both(lambda: base, {})
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, its = (json.loads((tmp_path / n / CONFIG_NAME).read_text()) for n in ("ours", "theirs"))
    assert mine["auto_mapping"] == its["auto_mapping"]
    inputs = tiny.inputs()
    for place in ("ours", "theirs"):
        for library in (veneer, peft):
            loaded = library.AutoPeftModel.from_pretrained(str(tmp_path / place)).eval()
            assert_close(output(loaded, inputs), output(theirs, inputs))


def test_auto_class_imports_no_library_for_a_file_s_sake(tmp_path: Path) -> None:
    ours, _ = both(TINY["llama"].build, {})
    ours.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    values["auto_mapping"] = {"base_model_class": "Thing", "parent_library": "antigravity"}
    values["base_model_name_or_path"] = str(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    for library in (veneer, peft):
        with pytest.raises(ValueError, match="import_allowlist"):
            library.AutoPeftModel.from_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="does not have"):
        values["auto_mapping"]["parent_library"] = "collections.abc"
        (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
        veneer.AutoPeftModel.from_pretrained(tmp_path, import_allowlist=["collections"])


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resized_vocabulary(targets: list[str], tied: bool, tmp_path: Path) -> None:
    """Saved with its embeddings, and loaded on a base that was resized to the same size.

    Where one embedding is targeted, the reference saves that one and not the other, which was resized as well
    and whose new rows are lost then, unless the two are tied. Ours saves both.
    """
    transformers.LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).save_pretrained(tmp_path / "base")

    def resized() -> nn.Module:
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
        model.resize_token_embeddings(31, mean_resizing=False)
        return model

    base = resized()
    with quiet():
        ours, theirs = both(lambda: base, {"task_type": "CAUSAL_LM", "target_modules": targets})
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    inputs = {"input_ids": torch.randint(23, 31, (2, 6))}
    expected = output(theirs, inputs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    lost = set(stored(tmp_path / "ours")) - set(stored(tmp_path / "theirs"))
    assert bool(lost) is (len(targets) > 1)
    for place in ("ours", "theirs"):
        if place == "theirs" and lost and not tied:
            continue
        with pytest.warns(VeneerWarning, match="the base's values are replaced"):
            mine = PeftModel.from_pretrained(resized(), tmp_path / place).eval()
        assert_close(output(mine, inputs), expected)
        assert_close(output(from_reference(resized(), tmp_path / place), inputs), expected)


# -- bases that are replaced or spread ---------------------------------------------------------------------


def test_loftq_adapters(tmp_path: Path) -> None:
    """LoftQ replaces the base. Its file says nothing of it: the reference would round the base once more.

    Its own LoftQ needs a CUDA device for 4 bits, so that nothing of it can be compared here.
    """
    base = nn.Sequential(nn.Linear(64, 64)).eval()
    given = {"r": 8, "lora_alpha": 16, "target_modules": ["0"], "init_lora_weights": "loftq"}
    with pytest.raises(AssertionError, match="CUDA"):
        peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(**given, loftq_config=peft.LoftQConfig(loftq_bits=4))
        )
    ours = veneer.get_peft_model(
        copy.deepcopy(base), veneer.LoraConfig(**given, loftq_config=veneer.LoftQConfig(loftq_bits=4))
    ).eval()
    x = torch.randn(3, 64)
    rounded = nn.Sequential(copy.deepcopy(ours.get_base_model()[0].base_layer)).eval()
    assert (output(ours, x) - output(base, x)).norm() < (output(rounded, x) - output(base, x)).norm()
    with pytest.warns(VeneerWarning, match="base too"):
        ours.save_pretrained(tmp_path)
    there = from_reference(rounded, tmp_path)
    expect_same_model(ours, there)
    assert_close(output(ours, x), output(there, x))
    again = PeftModel.from_pretrained(rounded, tmp_path).eval()
    assert_close(output(again, x), output(ours, x))


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_offloaded_bases(where: str, tmp_path: Path) -> None:
    """A base whose weights are on disk or held back, with an adapter of the reference: run and merged."""
    tiny = TINY["llama"]
    base = tiny.build().eval()
    _, theirs = both(lambda: base, {"task_type": tiny.task, "target_modules": ["q_proj", "down_proj"]})
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    inputs = one_text()
    expected = output(theirs, inputs)
    spread = copy.deepcopy(base)
    if where == "cpu_offload":
        accelerate.cpu_offload(spread, execution_device="cpu")
    else:
        accelerate.disk_offload(spread, tmp_path / "weights", execution_device="cpu")
    assert any(p.is_meta for p in spread.parameters())
    ours = PeftModel.from_pretrained(spread, tmp_path / "theirs").eval()
    assert_close(output(ours, inputs), expected)
    ours.save_pretrained(tmp_path / "ours")
    expect_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    ours.merge_adapter()
    assert_close(output(ours, inputs), expected)
    ours.unmerge_adapter()
    assert_close(output(ours, inputs), expected)
    assert_close(output(ours.merge_and_unload(), inputs), expected)


def test_device_map(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    tiny.build().save_pretrained(tmp_path / "base")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }

    def spread() -> nn.Module:
        return transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "base", device_map=dict(device_map), offload_folder=tmp_path / "offloaded"
        ).eval()

    _, theirs = both(
        lambda: transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        {"task_type": tiny.task, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    )
    randomise(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    inputs = one_text()
    expected = output(theirs, inputs)
    ours = PeftModel.from_pretrained(spread(), tmp_path / "theirs").eval()
    assert_close(output(ours, inputs), expected)
    assert_close(output(ours.merge_and_unload(), inputs), expected)
