"""Adapters written by an earlier version of Veneer: ``python -m tests.golden.earlier`` wrote them with 0.1.

``data_0_1/<case>/`` holds what `PeftModel.save_pretrained` of that version wrote, and golden.safetensors: the
base weights, an input, and the outputs of the base alone and with the adapter. The files are never written
again: later versions have to read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.golden.models import CASES, Case, Words, ids, llama, mlp, output

DATA = Path(__file__).parent / "data_0_1"


class Experts(nn.Module):
    """Two experts whose weights lie in one bare parameter; the first feature chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., :1] > 0, x @ self.down[0], x @ self.down[1])


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.up(x))


def words(**config: Any) -> Case:
    return Case(Words, lambda: ids(12), {"r": 3, "lora_alpha": 5, "target_modules": ["out"], **config})


EARLIER: dict[str, Case] = {
    "rslora_patterns": mlp(use_rslora=True, rank_pattern={"down": 2}, alpha_pattern={"up": 9}),
    "dora": mlp(use_dora=True),
    "pissa": mlp(init_lora_weights="pissa"),
    "olora": mlp(init_lora_weights="olora"),
    "lora_bias": mlp(target_modules=["up", "head"], lora_bias=True),
    "modules_to_save": mlp(modules_to_save=["head"]),
    "bias_all": mlp(bias="all"),
    "conv2d": CASES["conv2d"],
    "embedding": CASES["embedding"],
    "tokens": words(trainable_token_indices={"table": [3, 7]}),
    "experts": Case(
        Mixture,
        lambda: torch.randn(3, 5, 6),
        {"r": 2, "lora_alpha": 5, "target_modules": ["up"], "target_parameters": ["experts.down"]},
    ),
    "llama": Case(
        llama,
        lambda: ids(20),
        {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": ["embed_tokens", "q_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
        },
    ),
}


@torch.no_grad()
def main() -> None:
    """Write all cases, with the version of Veneer that is installed."""
    import veneer

    torch.set_num_threads(1)
    for name, case in EARLIER.items():
        torch.manual_seed(sum(name.encode()))
        base = case.build().eval()
        weights = {k: t.clone() for k, t in base.state_dict().items()}
        inputs = case.inputs()
        tensors = {"input": inputs, "output.base": output(base, inputs)}
        model = veneer.get_peft_model(base, veneer.LoraConfig(**case.config)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
        tensors["output.adapter"] = output(model, inputs)
        model.save_pretrained(DATA / name)
        tensors |= {f"base.{k}": t for k, t in weights.items()}
        save_file(
            {k: t.detach().clone().contiguous() for k, t in tensors.items()},
            DATA / name / "golden.safetensors",
        )
        (DATA / name / "README.md").unlink()


if __name__ == "__main__":
    main()
