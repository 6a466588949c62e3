"""Extracting: base and adapter compute what the tuned model does, and nothing is dropped without a word."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import veneer
from tests.tolerances import OPS_SPECTRUM, assert_close
from veneer import CheckpointError, CombineError, ConfigError, LoraConfig, TrainingError, VeneerError
from veneer.base_files import BaseFiles
from veneer.tools import extract_adapter, tuned_model

WEIGHTS = "model.safetensors"
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(12).reshape(2, 6)


def llama(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=12, tie_word_embeddings=tied))


def biased() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {**SMALL, "intermediate_size": 12, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=False))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=2, n_head=2))


def classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(**SMALL, intermediate_size=12, max_position_embeddings=16)
    )


def head_of_two_layers() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {**SMALL, "intermediate_size": 12, "max_position_embeddings": 16, "pad_token_id": 1}
    return RobertaForSequenceClassification(RobertaConfig(**sizes))


def images() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**SMALL, "intermediate_size": 12, "num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes))


def qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**SMALL, "intermediate_size": 12, "moe_intermediate_size": 8, "num_key_value_heads": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=4, num_experts=3, num_experts_per_tok=2))


def gpt_oss() -> Any:
    """Its stacks lie in the files as they are in the model, the other way round than others'."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**SMALL, "intermediate_size": 12, "num_key_value_heads": 1, "head_dim": 4}
    return GptOssForCausalLM(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1))


#: What of gpt-oss has no place.
OF_GPT_OSS = {
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        *("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias", "mlp.router.weight"),
        *("mlp.router.bias", "self_attn.sinks"),
        *(f"self_attn.{letter}_proj.bias" for letter in "qkvo"),
    )
}


TEXT: dict[str, Any] = {"input_ids": IDS}
#: Name -> (how the model is made, what it is called with, parameters that no adapter holds).
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], set[str]]] = {
    "plain": (llama, TEXT, set()),
    "tied": (lambda: llama(True), TEXT, set()),
    "biased": (biased, TEXT, set()),
    "transposed and tied": (gpt2, TEXT, set()),
    "classifier": (classifier, TEXT, set()),
    "head of two layers": (head_of_two_layers, TEXT, set()),
    "convolution": (
        images,
        {"pixel_values": torch.rand(2, 3, 8, 8)},
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
    ),
    "experts": (mixtral, TEXT, set()),
    "other experts": (qwen3_moe, TEXT, set()),
    "transposed experts": (gpt_oss, TEXT, OF_GPT_OSS),
    "encoder and decoder": (t5, {**TEXT, "decoder_input_ids": IDS}, set()),
}


def made(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build().eval()


@torch.no_grad()
def trained(model: Any, without: set[str] | None = None, size: float = 0.05) -> Any:
    """Another value for every parameter."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        change = torch.randn_like(parameter) * size
        if name not in (without or ()):
            parameter += change
    return model


def saved(place: Path, build: Callable[[], Any], without: set[str] | None = None) -> tuple[Path, Path]:
    """(base, tuned), the first in shards."""
    made(build).save_pretrained(place / "base", max_shard_size="3KB")
    trained(made(build), without).save_pretrained(place / "tuned")
    return place / "base", place / "tuned"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return saved(tmp_path_factory.mktemp("pair"), llama)


@pytest.fixture
def copies(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    base, tuned = (Path(shutil.copytree(place, tmp_path / place.name)) for place in pair)
    return base, tuned


def change(place: Path, **tensors: Callable[[Tensor], Tensor | None]) -> None:
    """Change tensors in the file of a model; None takes one away. A dot is written as two underscores."""
    found = load_file(place / WEIGHTS)
    for name, changed in tensors.items():
        key = name.replace("__", ".")
        value = changed(found.pop(key, torch.ones(2)))
        if value is not None:
            found[key] = value.contiguous()
    save_file(found, place / WEIGHTS, metadata={"format": "pt"})


def configure(place: Path, **values: Any) -> None:
    file = place / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_base_and_adapter_are_the_tuned_model(case: str, tmp_path: Path) -> None:
    """In both libraries, which read exactly the modules that differ; no file is read but the adapter's."""
    build, inputs, left_out = CASES[case]
    base, tuned = saved(tmp_path, build, left_out)
    report = extract_adapter(base, tuned, tmp_path / "out", rank=99)
    assert not report.left_out and report.error < OPS_SPECTRUM.atol
    wanted = trained(made(build), left_out)(**inputs).logits
    found = [veneer.PeftModel.from_pretrained(made(build), tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a linear head beside transposed layers
        found.append(peft.PeftModel.from_pretrained(made(build), tmp_path / "out"))
    for model in found:
        assert_close(model.eval()(**inputs).logits, wanted, OPS_SPECTRUM)
    assert float((made(build)(**inputs).logits - wanted).abs().max()) > 0.01


def adapted(place: Path, base: Path, rank: int) -> veneer.PeftModel:
    """A model of the base with an adapter, not trained, which is saved there."""
    config = LoraConfig(
        r=rank, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = veneer.get_peft_model(made(llama), config)
    model.save_pretrained(place)
    return model


def deltas(model: Any) -> dict[str, Tensor]:
    layers = dict(model.get_base_model().named_modules())
    return {p: m.get_delta_weight("default").detach() for p, m in layers.items() if hasattr(m, "lora_A")}


def test_a_merged_adapter_is_found_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    before = adapted(tmp_path / "adapter", pair[0], rank=3)
    updates = deltas(before)
    before.merge_and_unload().save_pretrained(tmp_path / "merged")
    report = extract_adapter(pair[0], tmp_path / "merged", tmp_path / "out", rank=3)
    assert {module.rank for module in report.modules.values()} == {3} and not report.whole
    found = veneer.PeftModel.from_pretrained(made(llama), tmp_path / "out")
    assert set(found.peft_config["default"].target_modules) == {"q_proj", "down_proj"}
    after = deltas(found)
    assert after.keys() == updates.keys()
    for path, update in updates.items():
        assert_close(after[path], update, OPS_SPECTRUM)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.7}])
def test_the_best_updates_and_their_errors(
    size: dict[str, Any], dtype: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    report = extract_adapter(*pair, tmp_path / "out", **size, dtype=dtype)
    tensors, base = load_file(tmp_path / "out" / "adapter_model.safetensors"), made(llama).state_dict()
    tuned, missed = trained(made(llama)).state_dict(), {}
    for path, module in report.modules.items():
        name, embedding = f"base_model.model.{path}.lora_", path.endswith("embed_tokens")
        delta = (tuned[f"{path}.weight"] - base[f"{path}.weight"]).double()
        a, b = (
            tensors[f"{name}embedding_{factor}" if embedding else f"{name}{factor}.weight"] for factor in "AB"
        )
        assert str(a.dtype) == f"torch.{dtype}" and len(a) == module.rank
        product = b.double() @ a.double()
        missed[path] = float((delta - (product.T if embedding else product)).norm())
        assert module.error == pytest.approx(missed[path] / float(delta.norm()), abs=OPS_SPECTRUM.atol)
        best = torch.linalg.svdvals(delta)[module.rank :].norm() / delta.norm()
        assert module.error == pytest.approx(
            float(best), abs=OPS_SPECTRUM.atol if dtype == "float32" else 0.01
        )
        if "energy" in size:
            assert module.error <= 0.3**0.5 + 0.01
    total = float(torch.tensor(list(missed.values())).norm())
    assert report.error == pytest.approx(total / report.norm, abs=OPS_SPECTRUM.atol)
    assert report.error <= report.modules[report.worst].error


def test_only_what_differs_is_adapted(copies: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = copies
    shutil.copytree(base, tmp_path / "other")
    for file in (tmp_path / "other").glob("model-*"):
        tensors = load_file(file)
        changed = {n: t + 1 for n, t in tensors.items() if "layers.1.mlp.up_proj" in n}
        save_file({**tensors, **changed}, file, metadata={"format": "pt"})
    report = extract_adapter(base, tmp_path / "other", tmp_path / "out", rank=2)
    assert list(report.modules) == ["model.layers.1.mlp.up_proj"] and report.unchanged == 20
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["1.mlp.up_proj"] and config["modules_to_save"] is None


def test_what_an_adapter_cannot_hold_is_listed(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path, gpt_oss)
    report = extract_adapter(base, tuned, tmp_path / "out", rank=2)
    assert report.left_out.keys() == OF_GPT_OSS
    bias = report.left_out["model.layers.0.mlp.experts.down_proj_bias"]
    assert bias.size == 2 * 8 * 4 and "a parameter of GptOssExperts" in bias.reason
    assert "biases beside adapted experts" in report.left_out["model.layers.0.self_attn.q_proj.bias"].reason
    assert "what is left out counts as missed" in str(report)


def stacked(place: Path, build: Callable[[], Any]) -> Path:
    """A model in whose files the experts lie as the model has them."""
    place.mkdir()
    model = build()
    model.config.save_pretrained(place)
    save_file(dict(model.state_dict()), place / WEIGHTS, metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.7}])
def test_experts_are_the_same_however_the_files_hold_them(size: dict[str, Any], tmp_path: Path) -> None:
    base, tuned = saved(tmp_path, mixtral)
    report = extract_adapter(base, tuned, tmp_path / "out", **size)
    tuned = stacked(tmp_path / "stacked", lambda: trained(made(mixtral)))
    assert extract_adapter(base, tuned, tmp_path / "other", **size).modules == report.modules
    tensors, others = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("out", "other"))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[n], others[n]) for n in tensors)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    delta = (trained(made(mixtral)).state_dict()[name] - made(mixtral).state_dict()[name]).double()
    values = torch.linalg.svdvals(delta).square()
    rank = report.modules[name].rank
    assert report.modules[name].error == pytest.approx(
        float((values[:, rank:].sum() / values.sum()).sqrt()), abs=OPS_SPECTRUM.atol
    )
    if "energy" in size:
        kept = values[:, : rank - 1].sum(1) / values.sum(1)
        assert (
            float((1 - values[:, rank:].sum(1) / values.sum(1)).min() - 0.7) >= 0 and float(kept.min()) < 0.7
        )


def test_only_experts(tmp_path: Path) -> None:
    """PEFT takes a configuration without target modules for that of the model's kind."""
    experts = {name for name, _ in made(mixtral).named_parameters() if ".experts." not in name}
    base, tuned = saved(tmp_path, mixtral, experts)
    report = extract_adapter(base, tuned, tmp_path / "out", rank=99)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
    model = peft.PeftModel.from_pretrained(made(mixtral), tmp_path / "out")
    wanted = trained(made(mixtral), experts)(**TEXT).logits
    assert_close(model.eval()(**TEXT).logits.detach(), wanted.detach(), OPS_SPECTRUM)
    assert len(report.modules) == 4


def test_experts_that_are_not_all_there(tmp_path: Path) -> None:
    """What transformers would make of them is not known, so they are listed one by one."""
    base, tuned = saved(tmp_path, mixtral)
    made(mixtral).save_pretrained(base)
    for place in (base, tuned):
        change(place, model__layers__0__block_sparse_moe__experts__1__w2__weight=lambda t: None)
    report = extract_adapter(base, tuned, tmp_path / "out", rank=2)
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    assert list(report.left_out) == [name]
    assert "transformers makes another tensor" in report.left_out[name].reason


def test_only_factors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = extract_adapter(*pair, tmp_path / "out", rank=2, whole=False)
    assert len(report.left_out) == 5 and not report.whole
    assert all("norm" in name for name in report.left_out)
    assert all(".lora_" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    whole = extract_adapter(*pair, tmp_path / "all", rank=2)
    assert whole.error < report.error and whole.whole.keys() == report.left_out.keys()


def test_names_are_those_of_the_modules(copies: tuple[Path, Path], tmp_path: Path) -> None:
    """The files of a model may lack its outermost name."""
    base, tuned = copies
    tensors = load_file(tuned / WEIGHTS)
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, tuned / WEIGHTS)
    report = extract_adapter(base, tuned, tmp_path / "out", rank=99)
    assert "model.layers.0.mlp.up_proj" in report.modules and report.error < OPS_SPECTRUM.atol


def test_the_base_is_recognised_and_the_tokenizer_copied(copies: tuple[Path, Path], tmp_path: Path) -> None:
    (copies[1] / "tokenizer_config.json").write_text("{}")
    configure(copies[1], rope_parameters={"rope_type": "default", "rope_theta": 7.0}, pad_token_id=3)
    report = extract_adapter(*copies, tmp_path / "out", rank=2)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    (note,) = report.notes
    assert "rope" in note and "pad_token" not in note
    other = made(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    with pytest.raises(VeneerError, match="another base model"):
        veneer.PeftModel.from_pretrained(other, tmp_path / "out")


def test_some_rows_of_each_model_are_in_memory(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, alive, most = BaseFiles.read_rows, weakref.WeakSet[Tensor](), 0

    def counted(files: BaseFiles, name: str, rows: slice) -> Tensor:
        nonlocal most
        tensor = read(files, name, rows)
        alive.add(tensor)
        most = max(most, sum(tensor.numel() for tensor in alive))
        return tensor

    whole = extract_adapter(*pair, tmp_path / "whole", rank=2)
    monkeypatch.setattr(BaseFiles, "read_rows", counted)
    monkeypatch.setattr(tuned_model, "CHUNK_ELEMENTS", 24)
    assert extract_adapter(*pair, tmp_path / "out", rank=2).modules == whole.modules
    assert most == 2 * 24


#: What is done to the tuned model, and what is said of it.
UNLIKE: dict[str, tuple[Callable[[Path], object], str]] = {
    "everything at once": (
        lambda p: (
            change(
                p,
                model__norm__weight=lambda t: None,
                extra__weight=lambda t: t,
                lm_head__weight=lambda t: torch.cat([t, t[:3]]),
            ),
            configure(p, architectures=["MistralForCausalLM"], model_type="mistral"),
        ),
        r"(?s)LlamaForCausalLM and is MistralForCausalLM\n.*missing: 1 tensor \(model.norm.weight\)\n.*"
        r"new: 1 tensor \(extra.weight\)\n.*\(20, 8\) and has \(23, 8\) \(a resized vocabulary\?\)",
    ),
    "not finite": (lambda p: change(p, model__norm__weight=lambda t: t * torch.nan), "NaN or infinity: m"),
    "codes": (
        lambda p: change(p, lm_head__weight=lambda t: t.to(torch.float8_e4m3fn)), "lm_head: .*8-bit floats"
    ),
    "truncated": (lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:3000]), "cannot be read"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "holds neither"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNLIKE)
def test_models_that_are_not_one_are_one_error(kind: str, copies: tuple[Path, Path], tmp_path: Path) -> None:
    UNLIKE[kind][0](copies[1])
    with pytest.raises(CheckpointError, match=UNLIKE[kind][1]):
        extract_adapter(*copies, tmp_path / "out", rank=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_two_tensors_for_one_shared_weight(tmp_path: Path) -> None:
    base, tuned = saved(tmp_path, lambda: llama(True))
    change(tuned, lm_head__weight=lambda t: torch.zeros(20, 8))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        extract_adapter(base, tuned, tmp_path / "out", rank=2)
    change(tuned, lm_head__weight=lambda t: load_file(tuned / WEIGHTS)["model.embed_tokens.weight"].clone())
    assert extract_adapter(base, tuned, tmp_path / "out", rank=99).error < OPS_SPECTRUM.atol


def test_what_leaves_nothing_to_extract(copies: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = copies
    with pytest.raises(CheckpointError, match=r"are equal: there is nothing to extract"):
        extract_adapter(base, shutil.copytree(base, tmp_path / "same"), tmp_path / "out", rank=2)
    made(llama).save_pretrained(tmp_path / "norms")
    change(tmp_path / "norms", model__norm__weight=lambda t: t + 1)
    with pytest.raises(CheckpointError, match=r"1 tensor, none of which LoRA adapts: model.norm.weight"):
        extract_adapter(base, tmp_path / "norms", tmp_path / "out", rank=2)


def test_refusals(copies: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = copies
    with pytest.raises(ConfigError, match="dtype is one of float32, bfloat16, float16, not 'int8'"):
        extract_adapter(base, tuned, tmp_path / "out", rank=2, dtype="int8")
    with pytest.raises(VeneerError, match="contains the model itself"):
        extract_adapter(base, tuned, tuned, rank=2, overwrite=True)
    with pytest.raises(TrainingError, match="no model at"):
        extract_adapter(base, tmp_path / "nowhere", tmp_path / "out", rank=2)
    change(tuned, lm_head__weight=lambda t: t * 1e12)
    with pytest.raises(CombineError, match=r"lm_head: the factors leave the range of torch.float16"):
        extract_adapter(base, tuned, tmp_path / "out", rank=2, dtype="float16")
    configure(tuned, quantization_config={"quant_method": "fp8"})
    with pytest.raises(TrainingError, match="is stored quantised"):
        extract_adapter(base, tuned, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
