"""diffusers reads what is exported for it, and what it and sd-scripts write is imported as it reads it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.golden.make import DATA
from tests.golden.models import CASES, output
from tests.processes import run_python
from tests.tolerances import assert_close
from veneer import PeftModel, VeneerWarning, export_adapter
from veneer.errors import ExportError

ROOT = Path(__file__).resolve().parents[2]

HEAD = """
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
from pathlib import Path
place = Path(sys.argv[2])
from veneer.as_peft import register_as_peft
register_as_peft()
import torch
from safetensors.torch import load_file, save_file
from tests.interop.pipelines import drawn, encoded, pipeline, text_encoder, unet
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, export_adapter, get_peft_model, import_adapter
torch.set_num_threads(1)
"""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changed_the_base_becomes_plain_by_the_way_that_is_named(
    init: str, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    theirs = peft.get_peft_model(net(), config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(5, 16)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ExportError, match="save it again, which writes a plain adapter"):
        export_adapter(tmp_path / "theirs", tmp_path / "out", "plain")
    with pytest.warns(VeneerWarning, match="worked out again"):
        loaded = PeftModel.from_pretrained(net(), tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "out", "plain")
    assert_close(peft.PeftModel.from_pretrained(net(), tmp_path / "out")(x), theirs(x))


GOLDEN = sorted(path.name for path in DATA.iterdir() if path.name != "lora_bias")


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_plain_files_of_the_reference_mean_the_same_to_it(name: str, tmp_path: Path) -> None:
    golden, case = load_file(DATA / name / "golden.safetensors"), CASES[name]
    base = case.build()
    base.load_state_dict({k.removeprefix("base."): t for k, t in golden.items() if k.startswith("base.")})
    report = export_adapter(DATA / name, tmp_path / "out", "plain")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert report.worst <= torch.finfo(torch.float32).eps
    adapted = eval(report.usage, {"PeftModel": peft.PeftModel, "base_model": base.eval()}).eval()
    assert_close(output(adapted, golden["input"]), golden["output.adapter"])


def test_diffusers_loads_what_is_exported_for_it(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        HEAD
        + """
def saved(model, where, **options):
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**options)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(where)
    return adapted

plain = drawn(unet()), encoded(text_encoder())
draws = dict(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"to_v": 2, "conv1": 5},
             alpha_pattern={"attn2.to_q": 9}, target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"])
reads = dict(r=3, lora_alpha=4, rank_pattern={"fc1": 2}, target_modules=["q_proj", "fc1"])
for name, more in (("folded", {}), ("dora", {"use_dora": True}), ("bias", {"lora_bias": True})):
    if more:
        draws["target_modules"] = ["to_q", "to_v", "to_out.0"]
    here = place / name
    wanted = drawn(saved(unet(), here / "all" / "unet", **draws, **more))
    words = encoded(saved(text_encoder(), here / "all" / "text_encoder", **reads))
    assert not torch.allclose(wanted, plain[0]) and not torch.allclose(words, plain[1])
    report = export_adapter(here / "all", here / "out", "diffusers")
    assert [file.name for file in (here / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = pipeline()
    exec(report.usage, {"pipeline": pipe})
    assert_close(drawn(pipe.unet), wanted)
    assert_close(encoded(pipe.text_encoder), words)
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe.unet), plain[0])

    report = import_adapter(here / "out", here / "back")
    assert set(report.directories) == {"unet", "text_encoder"}
    back = PeftModel.from_pretrained(unet(), here / "back" / "unet").eval()
    assert_close(drawn(back), wanted)
    back = PeftModel.from_pretrained(text_encoder(), here / "back" / "text_encoder").eval()
    assert_close(encoded(back), words)
""",
        ROOT,
        tmp_path,
        python=nopeft_python,
    )


def test_imports_compute_what_diffusers_computes_from_the_same_file(
    nopeft_python: Path, tmp_path: Path
) -> None:
    run_python(
        HEAD
        + """
from diffusers import StableDiffusionPipeline

def random(*shape):
    return torch.randn(*shape) * 0.3

def factors(model, ends, r):
    torch.manual_seed(4)
    for path, module in model.named_modules():
        if path.endswith(ends):
            weight = module.weight
            down = random(r, *weight.shape[1:])
            yield path, down, random(weight.shape[0], r, *[1] * (weight.dim() - 2))

attention = ("to_q", "to_k", "to_v", "to_out.0")
every = (*attention, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
         "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out",
         "time_embedding.linear_1", "time_embedding.linear_2")
clip = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

files = {}
# New names, with and without diffusers' own metadata.
files["new"] = {}
for part, model, ends in (("unet", unet(), every), ("text_encoder", text_encoder(), clip)):
    for path, a, b in factors(model, ends, 3):
        files["new"] |= {f"{part}.{path}.lora_A.weight": a, f"{part}.{path}.lora_B.weight": b}
# Old ones, of attention processors.
files["old"] = {}
for path, a, b in factors(unet(), attention, 3):
    module, end = (path.removesuffix(".0") if path.endswith("to_out.0") else path).rsplit(".", 1)
    stem = f"unet.{module}.processor.{end}_lora"
    files["old"] |= {f"{stem}.down.weight": a, f"{stem}.up.weight": b}
# sd-scripts, with a strength. Of several in one file diffusers loses those of attention and of text encoders.
files["kohya"] = {}
for start, model, ends in (("lora_unet", unet(), every), ("lora_te", text_encoder(), clip)):
    for path, a, b in factors(model, ends, 4):
        path = f"text_model.{path}" if start == "lora_te" and not path.startswith("text_model.") else path
        stem = f"{start}_{path.replace('.', '_')}"
        files["kohya"] |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b,
                           f"{stem}.alpha": torch.tensor(2.5)}

plain = drawn(unet()), encoded(text_encoder())
for name, tensors in files.items():
    here = place / name
    here.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, here / "pytorch_lora_weights.safetensors")
    pipe = pipeline()
    pipe.load_lora_weights(here)
    wanted, words = drawn(pipe.unet), encoded(pipe.text_encoder)
    assert not torch.allclose(wanted, plain[0])
    report = import_adapter(here, here / "out")
    assert sum(map(len, report.modules.values())) == sum("lora_A" in k or "down.weight" in k for k in tensors)
    several = len(report.directories) > 1
    back = PeftModel.from_pretrained(unet(), here / "out" / "unet" if several else here / "out").eval()
    assert_close(drawn(back), wanted)
    if several:
        assert not torch.allclose(words, plain[1])
        back = PeftModel.from_pretrained(text_encoder(), here / "out" / "text_encoder").eval()
        assert_close(encoded(back), words)

# What diffusers itself saves, with its metadata.
pipe = pipeline()
pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=10, use_rslora=True, rank_pattern={"to_v": 2},
                                 target_modules=["to_q", "to_v"]))
for parameter in pipe.unet.parameters():
    if parameter.requires_grad:
        torch.nn.init.normal_(parameter, std=0.3)
from diffusers.utils import convert_state_dict_to_diffusers
from veneer import get_peft_model_state_dict
from diffusers.training_utils import _collate_lora_metadata
StableDiffusionPipeline.save_lora_weights(
    place / "saved", unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet)),
    **_collate_lora_metadata({"unet": pipe.unet}),
)
wanted = drawn(pipe.unet)
import_adapter(place / "saved", place / "back")
assert_close(drawn(PeftModel.from_pretrained(unet(), place / "back").eval()), wanted)
""",
        ROOT,
        tmp_path,
        python=nopeft_python,
    )


def test_names_of_the_original_code_become_those_that_diffusers_gives_them(nopeft_python: Path) -> None:
    run_python(
        """
import sys
sys.path.insert(0, sys.argv[1])
from veneer.as_peft import register_as_peft
register_as_peft()
from types import SimpleNamespace
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers
)
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from veneer.integrations.imports.flat_names import FlatNames

resnet = ["in_layers_2", "emb_layers_1", "out_layers_3", "skip_connection"]
inside = ["proj_in", "proj_out", *(f"transformer_blocks_{n}_{end}" for n in (0, 3) for end in
          ("attn1_to_q", "attn2_to_k", "attn2_to_v", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2"))]
names = ["input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"]
for i in (1, 2, 4, 5, 7, 8):
    names += [f"input_blocks_{i}_0_{end}" for end in resnet]
    names += [f"input_blocks_{i}_1_{end}" for end in inside] * (i > 3)
names += [f"input_blocks_{i}_0_op" for i in (3, 6)]
names += [f"middle_block_{n}_{end}" for n in (0, 2) for end in resnet[:3]]
names += [f"middle_block_1_{end}" for end in inside]
for i in range(9):
    names += [f"output_blocks_{i}_0_{end}" for end in resnet]
    names += [f"output_blocks_{i}_1_{end}" for end in inside] * (i < 6)
names += [f"output_blocks_{i}_2_conv" for i in (2, 5)]

flat, theirs = FlatNames(), {}
for name in names:
    # One by one, so that each says what it became.
    tensors = {f"lora_unet_{name}.lora_{side}.weight": torch.ones(1) for side in ("down", "up")}
    mapped = _maybe_map_sgm_blocks_to_diffusers(tensors, SimpleNamespace(layers_per_block=2))
    found, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    (path,) = {key.partition(".lora_")[0] for key in convert_unet_state_dict_to_peft(found)}
    theirs[name] = path.removeprefix("unet.")
ours = {name: flat.path(name) for name in names}
differing = {name: (ours[name], theirs[name]) for name in names if ours[name] != theirs[name]}
assert not differing, differing
assert len(set(ours.values())) == len(names) > 150, len(names)
""",
        ROOT,
        python=nopeft_python,
    )
