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


def test_an_adapter_that_widens_a_layer_comes_first(nopeft_python: Path) -> None:
    """A Flux Control adapter: diffusers pads adapters that come after it, and not those that are there."""
    run_python(
        START
        + """
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

def flux(channels=4):
    torch.manual_seed(0)
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    width = dict(joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8))
    return FluxTransformer2DModel(in_channels=channels, out_channels=4, **sizes, **width).eval()

def pipeline():
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, flux())

def adapter(channels):
    model = flux(channels)
    model.add_adapter(LoraConfig(r=2, target_modules=["x_embedder"], init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(model).items()}

@torch.no_grad()
def run(pipe):
    model = pipe.transformer
    x = torch.linspace(-1, 1, 6 * model.x_embedder.in_features).view(1, 6, -1)
    given = dict(encoder_hidden_states=torch.ones(1, 3, 8), pooled_projections=torch.ones(1, 8))
    where = dict(timestep=torch.ones(1), img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(3, 3))
    return model(hidden_states=x, guidance=None, **given, **where).sample

ordinary, control = adapter(4), adapter(8)
pipe = pipeline()
pipe.load_lora_weights(ordinary, adapter_name="ordinary")
before, embedder = run(pipe), pipe.transformer.x_embedder.base_layer
try:
    pipe.load_lora_weights(control, adapter_name="control")
except VeneerError as error:
    assert "x_embedder: from 4 inputs, which 'ordinary' takes, to 8" in str(error), error
else:
    raise AssertionError("nothing was refused")
assert pipe.transformer.x_embedder.base_layer is embedder and pipe.transformer.config.in_channels == 4
assert torch.equal(run(pipe), before) and pipe.get_list_adapters() == {"transformer": ["ordinary"]}

pipe = pipeline()
wrong = {key.replace("lora_B", "lora_C"): value for key, value in control.items()} | control
try:
    pipe.load_lora_weights(wrong, adapter_name="control")
except Exception:
    assert pipe.transformer.x_embedder.in_features == 4 == pipe.transformer.config.in_channels
else:
    raise AssertionError("nothing was refused")
for name, file in (("control", control), ("ordinary", ordinary)):
    pipe.load_lora_weights(file, adapter_name=name)
assert pipe.transformer.config.in_channels == 8
alone = []
for names in (["control"], ["ordinary"], ["control", "ordinary"]):
    pipe.set_adapters(names)
    alone.append(run(pipe))
assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], alone[2])
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
