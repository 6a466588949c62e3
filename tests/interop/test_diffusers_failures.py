"""What goes wrong in diffusers with Veneer in the place of peft: it is said, and the model is as it was."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]
START = """
import sys
sys.path.insert(0, sys.argv[1])
from veneer.as_peft import register_as_peft
register_as_peft()
import warnings
import torch
from diffusers.utils import convert_state_dict_to_diffusers, logging
from tests.interop import tiny_diffusion as tiny
from tests.interop.diffusion_life import kohya_file
from veneer import LoraConfig, VeneerError, VeneerWarning, get_peft_model_state_dict
logging.set_verbosity(logging.CRITICAL)
warnings.filterwarnings("error", category=VeneerWarning)

def written(**options):
    unet = tiny.unet()
    unet.add_adapter(LoraConfig(r=4, **options))
    tiny.shake(unet, "default", 1)
    return {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}

file = written(target_modules=["to_q", "to_v"])
narrow = {key: value[:, :-1] if "lora_A" in key else value for key, value in file.items()}
elsewhere = {key.replace("block", "part"): value for key, value in file.items()}

def state(pipe):
    weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    return weights, tiny.image(pipe), pipe.get_list_adapters(), pipe.get_active_adapters()

def refused(pipe, call, words, kind=VeneerError):
    weights, image, *before = state(pipe)
    trained = [p.requires_grad for p in pipe.unet.parameters()]
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"nothing was refused: {words}")
    now, image_now, *after = state(pipe)
    assert before == after, (before, after)
    assert now.keys() == weights.keys() and all(torch.equal(now[key], weights[key]) for key in weights)
    assert torch.equal(image, image_now)
    assert trained == [p.requires_grad for p in pipe.unet.parameters()]

def warned(call, words):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    said = " ".join(str(w.message) for w in seen if w.category is VeneerWarning)
    assert all(word in said for word in words), said

def with_one():
    pipe = tiny.pipeline()
    pipe.load_lora_weights(file, adapter_name="one")
    return pipe
"""


def test_a_failure_leaves_the_model_as_it_was(nopeft_python: Path) -> None:
    """Beside no adapter, and beside one that is active."""
    run_python(
        START
        + """
for pipe in (tiny.pipeline(), with_one()):
    refused(pipe, lambda: pipe.load_lora_weights(narrow, adapter_name="new"), ["widths differ", "(4, 15)"])
    refused(pipe, lambda: pipe.load_lora_weights(elsewhere, adapter_name="new"), ["nothing to adapt"])
    wrong = LoraConfig(target_modules=["to_qq"])
    refused(pipe, lambda: pipe.unet.add_adapter(wrong, "new"), ["'to_qq' matches nothing", "to_q"])
    pipe.load_lora_weights(file, adapter_name="new")
    assert pipe.get_active_adapters() == ["new"]
pipe = with_one()
pipe.unet.add_adapter(config := LoraConfig(target_modules="to_q", base_model_name_or_path="mine"), "mine")
assert config.base_model_name_or_path == "mine" and config.target_modules == "to_q"

# A swap that fails keeps the adapter whose place was to be taken, merged or not.
pipe = with_one()
swap = dict(adapter_name="one", hotswap=True)
parameters = [id(p) for p in pipe.unet.parameters()]
refused(pipe, lambda: pipe.load_lora_weights(narrow, **swap), ["(4, 15)", "does not fit into (4, 16)"])
refused(pipe, lambda: pipe.load_lora_weights(file, adapter_name="two", hotswap=True), ["two"], ValueError)
assert parameters == [id(p) for p in pipe.unet.parameters()]
pipe.fuse_lora(components=["unet"])
refused(pipe, lambda: pipe.load_lora_weights(file, **swap), ["is merged", "unfuse_lora()"])
assert all(m.merged_adapters == ["one"] for m in pipe.unet.modules() if hasattr(m, "merged_adapters"))
pipe.unfuse_lora(components=["unet"])
before = tiny.image(pipe)
pipe.load_lora_weights({key: value * 2 for key, value in file.items()}, **swap)
assert not torch.equal(tiny.image(pipe), before)

# Room for a smaller rank than the file has: refused, and asked for again it is still there.
pipe = tiny.pipeline()
pipe.enable_lora_hotswap(target_rank=2)
refused(pipe, lambda: pipe.load_lora_weights(file, adapter_name="one"), ["target_rank=2 is below"])
assert pipe.unet._prepare_lora_hotswap_kwargs["target_rank"] == 2
""",
        ROOT,
        python=nopeft_python,
    )


def test_what_is_lost_on_the_way_is_said(nopeft_python: Path) -> None:
    run_python(
        START
        + """
# Keys that nothing takes; and diffusers' spelling for some of the keys, which it then does not read.
pipe = tiny.pipeline()
more = {**file, "unet.mid_block.nowhere.lora_A.weight": torch.zeros(4, 16),
        "unet.mid_block.nowhere.lora_B.weight": torch.zeros(16, 4)}
warned(lambda: pipe.load_lora_weights(more, adapter_name="a"), ["mid_block.nowhere.lora_A", "34 tensors"])
mixed = convert_state_dict_to_diffusers(written(target_modules=["to_q", "conv1"]))
assert {"lora_A" in key for key in mixed} == {True, False}
warned(
    lambda: pipe.load_lora_weights(mixed, adapter_name="b"),
    ["16 keys are spelled", "without convert_state_dict_to_diffusers"],
)

# Of strengths that differ diffusers keeps the commonest only.
kohya = kohya_file()
kohya["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.alpha"] = torch.tensor(1.0)
warned(lambda: tiny.pipeline().load_lora_weights(kohya, adapter_name="a"), ["alpha_pattern", "matches no"])

# No adapter is chosen in the place of the one that was active.
pipe = with_one()
pipe.load_lora_weights(file, adapter_name="two")
warned(lambda: pipe.delete_adapters("two"), ["'two' was active", "Choose with set_adapters: 'one'"])
assert pipe.get_list_adapters() == {"unet": ["one"]} and pipe.get_active_adapters() == []
assert torch.equal(tiny.image(pipe), tiny.image(tiny.pipeline()))
pipe.set_adapters("one")
pipe.load_lora_weights(file, adapter_name="two")
pipe.set_adapters("one")
pipe.delete_adapters("two")  # not active: nothing to say
pipe.delete_adapters("one")  # none is left: nothing to choose
""",
        ROOT,
        python=nopeft_python,
    )
