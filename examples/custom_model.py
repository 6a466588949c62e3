"""A model of your own: a small network that knows upright clothes learns to see them lying on their side.

Any ``torch.nn.Module`` can be adapted: name the layers in ``target_modules``. Base, head only, LoRA and full
fine-tuning are compared, with a plain PyTorch loop. The pictures are Fashion-MNIST (``make examples-data``).
"""

from __future__ import annotations

import copy
from typing import Any

import data
import torch
from side_by_side import Study, run
from torch import Tensor, nn

from veneer import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

LORA = "LoRA, r=8"
RATES = {"head only": 1e-2, LORA: 5e-3, "full fine-tuning": 3e-3}
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["token", "up", "down"], modules_to_save=["head"])


class Block(nn.Module):
    """Mix over the patches, then transform each patch by itself."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.token = nn.Linear(patches, patches)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(torch.relu(self.up(self.norms[1](x))))


class Mixer(nn.Module):
    """Pictures (n, 28, 28) -> scores of the kinds of clothes (n, 10), by 49 patches of 4 × 4."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.patch = nn.Linear(16, width)
        self.blocks = nn.Sequential(Block(49, width), Block(49, width))
        self.head = nn.Linear(width, len(data.CLOTHES))

    def forward(self, pictures: Tensor) -> Tensor:
        patches = pictures.unflatten(2, (7, 4)).unflatten(1, (7, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.head(self.blocks(self.patch(patches)).mean(1))


def fit(model: nn.Module, pictures: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    """A plain training loop; the optimizer gets the trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(pictures), (64,))
        loss = nn.functional.cross_entropy(model(pictures[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> int:
    study = Study(__doc__, validation=True)
    pictures, labels = data.fashion_mnist()
    test_pictures, test_labels = data.fashion_mnist(train=False)
    part = slice(2000, 4000) if study.part == "test" else slice(2000)
    pictures, test_pictures, test_labels = pictures / 255, test_pictures[part] / 255, test_labels[part]
    lying, test_lying = (torch.rot90(p, 1, (1, 2)) for p in (pictures[-1024:], test_pictures))

    torch.manual_seed(0)
    pretrained = Mixer()
    fit(pretrained, pictures[:20_000], labels[:20_000], 60 if study.short else 400, 3e-3)

    def build(method: str) -> Any:
        model = copy.deepcopy(pretrained)
        if method == LORA:
            return get_peft_model(model, CONFIG)
        model.requires_grad_(method == "full fine-tuning")
        model.head.requires_grad_(method != "base")
        return model

    def train(model: Any, method: str, seed: int) -> None:
        fit(model, lying, labels[-1024:], 60 if study.short else 200, RATES[method])

    @torch.no_grad()
    def right(model: Any, pictures: Tensor) -> float:
        return 100 * (model.eval()(pictures).argmax(-1) == test_labels).float().mean().item()

    study.compare(
        ["base", *RATES], build, train, lambda model: {"% right": right(model, test_lying)}, once=("base",)
    )
    study.show(
        f"The network before: right for {right(pretrained, test_pictures):.1f} % of {len(test_labels)} "
        f"upright pictures,\n{right(pretrained, test_lying):.1f} % of the same lying on their side; "
        f"trained on {len(lying)} such.\n"
    )
    study.claim("LoRA is right more often than the head alone, with every seed",
                study.lowest(LORA) > study.highest("head only") > study.highest("base"))  # fmt: skip

    # The same without a wrapper: the model stays your own class, with adapters inside.
    torch.manual_seed(0)
    wrapped = get_peft_model(copy.deepcopy(pretrained), CONFIG)
    torch.manual_seed(0)
    inside = inject_adapter_in_model(CONFIG, copy.deepcopy(pretrained))
    for model in (wrapped, inside):
        torch.manual_seed(1)
        fit(model, lying, labels[-1024:], 5, 1e-3)
    study.claim(
        "inject_adapter_in_model gives a Mixer that computes what the wrapped one does, bit for bit",
        type(inside) is Mixer and torch.equal(inside(test_lying[:64]), wrapped(test_lying[:64])),
    )
    study.extra["tensors of the injected adapter"] = sorted(get_peft_model_state_dict(inside))
    merged = wrapped.merge_and_unload()
    study.claim(
        "merged, it is a Mixer without adapters that gives the same answers",
        type(merged) is Mixer
        and torch.equal(merged(test_lying).argmax(-1), inside(test_lying).argmax(-1))
        and not any("lora" in name for name, _ in merged.named_parameters()),
    )
    study.picture()
    return study.finish()


if __name__ == "__main__":
    run(main)
