"""Is the order of B in a stack of experts told from the file alone? Of 200 small trained adapters each.

Tiny mixtures with random weights, adapters of rank 2 to 16 over 4 to 16 experts, trained for 10 to 40 steps
on random texts of few and of many words. Unsloth's order is that of the same training, written as it wrote
it. Nothing else in the files says what they are. The bar is 5 of 100 that are ambiguous, and none that is
told wrongly.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.harness import Figure, Report, Row, question
from veneer import LoraConfig, get_peft_model, get_peft_model_state_dict
from veneer.expert_layouts.layouts import LAYOUTS
from veneer.expert_layouts.mixture import Mixture
from veneer.expert_layouts.reading import folded, unfolded
from veneer.expert_layouts.telling import Evidence, Told, tell

COUNT, QUICK = 200, 10
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
_TOKENS = 64


def trained(
    seed: int, experts: int | None = None, r: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter, as PEFT writes them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    choose = random.Random(seed)
    torch.manual_seed(seed)
    experts = experts or choose.choice([4, 8, 16])
    r = r or choose.choice([2, 4, 8, 16])
    sizes = dict(
        vocab_size=_TOKENS,
        hidden_size=choose.choice([16, 32]),
        intermediate_size=24,
        num_hidden_layers=choose.choice([1, 2]),
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    base = MixtralForCausalLM(MixtralConfig(**sizes))
    spread = choose.choice([0.1, 0.3, 1.0])  # how unevenly the experts are chosen
    for name, parameter in base.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=spread)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"], target_parameters=STACKS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    rate, steps = choose.choice([3e-4, 1e-3, 3e-3]), choose.choice([10, 20, 40])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    rows = choose.choice([1, 2, 4])
    often = 1 / torch.arange(1, _TOKENS) ** choose.choice([0.5, 1.0, 1.5])
    often = often[torch.randperm(_TOKENS - 1)]
    for _ in range(steps):
        ids = 1 + torch.multinomial(often, rows * 24, replacement=True).view(rows, 24)
        ids[:, 1::2] = (ids[:, ::2] * 7 + 3) % (_TOKENS - 1) + 1
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return config, {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model).items()}


def in_order(tensors: Mapping[str, Tensor], r: int, layout: str) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter with the stacks in another layout."""
    made = dict(tensors)
    for name in tensors:
        if ".experts" in name and ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            factors = unfolded(made[name], made[other], r, LAYOUTS["peft"])
            made[name], made[other] = folded(*factors, LAYOUTS[layout])
    return made


def told(config: LoraConfig, tensors: Mapping[str, Tensor], **values: object) -> Told:
    """What is told of a file whose configuration has no keys of other programs but these."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    evidence = Evidence(shapes, values, {}, lambda names: {name: tensors[name] for name in names})
    return tell(evidence, config, Mixture())


def measure(quick: bool) -> Report:
    torch.set_num_threads(1)  # the models are too small for more
    count = QUICK if quick else COUNT
    rows = []
    for number, layout in enumerate(("peft", "unsloth")):
        found = []
        for seed in range(number * count, (number + 1) * count):
            config, tensors = trained(seed)
            found.append(told(config, in_order(tensors, config.r, layout)))
        ambiguous = sum(bool(one.others) for one in found)
        wrong = sum(one.layout != layout and not one.others for one in found)
        for what, of, most in (("ambiguous", ambiguous, count / 20), ("told wrongly", wrong, 0)):
            label = f"{what}, of {count} in the layout {layout}"
            rows.append(Row(label, Figure.exact(of), "adapters", at_most=most))
    return Report(question(__doc__), rows, {"adapters": f"{count} of each layout", "threads": 1})
