"""A diffusers UNet with Veneer in the place of peft: add, save, load, weigh, fuse, unload."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[2]


def test_the_life_of_an_adapter_in_a_unet(nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        """
import sys
sys.path.insert(0, sys.argv[1])
from veneer.as_peft import register_as_peft
register_as_peft()
import torch
from diffusers import UNet2DConditionModel
from tests.tolerances import assert_close
from veneer import LoraConfig
torch.set_num_threads(1)
torch.set_grad_enabled(False)

def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
    ).eval()

x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8)

def out(model):
    return model(x, t, c).sample

first = unet()
base = out(first)
first.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "conv1"]), adapter_name="one")
for name, parameter in first.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(parameter, std=0.3)
wanted = out(first)
assert not torch.allclose(wanted, base)
first.save_lora_adapter(sys.argv[2], adapter_name="one")

def load():
    model = unet()
    model.load_lora_adapter(
        sys.argv[2], prefix=None, adapter_name="x", weight_name="pytorch_lora_weights.safetensors",
        use_safetensors=True,
    )
    return model

model = load()
assert torch.equal(out(model), wanted)
model.set_adapters(["x"], [0.5])
assert not torch.allclose(out(model), wanted)
model.set_adapters(["x"], [1.0])
assert torch.equal(out(model), wanted)
model.disable_lora()
assert torch.equal(out(model), base)
model.enable_lora()
model.fuse_lora()
assert_close(out(model), wanted)
model.unfuse_lora()
assert torch.equal(out(model), wanted)
model.delete_adapters("x")
assert torch.equal(out(model), base)
model = load()
model.unload_lora()
assert torch.equal(out(model), base)
assert not [m for m in model.modules() if type(m).__module__.startswith("veneer")]
""",
        ROOT,
        tmp_path,
        python=nopeft_python,
    )
