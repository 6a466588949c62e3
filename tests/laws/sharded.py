"""What one rank of `test_sharding.py` does: shard an adapted model, train, compare with one process.

Run as ``python -m tests.laws.sharded RANK WORLD RENDEZVOUS``: one line a case; exits 1 if any fails.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, TargetError, get_peft_model, get_peft_model_state_dict
from veneer.layers import Factor, LoraLayer


class Net(nn.Module):
    """A stack of what is adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.conv = nn.Conv1d(8, 6, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length) integer -> (batch, length, 4)."""
        h = self.embed(x)
        h = h + self.down(torch.relu(self.up(h)))
        return self.head(self.conv(h.transpose(1, 2)).transpose(1, 2))


def make(targets: list[str], **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, **options)
    model = get_peft_model(Net(), config)
    train(model, "default")
    return model


def steps(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Two steps of training; the outputs before each and after both."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    outputs = []
    for x in inputs:
        y = model(x)
        outputs.append(y.detach().clone())
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        outputs.append(model(inputs[0]).clone())
    return outputs


def _fsdp1(model: nn.Module, kinds: set[type[nn.Module]]) -> nn.Module:
    policy = ModuleWrapPolicy(kinds) if kinds else None
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def _fsdp2(model: nn.Module, kinds: set[type[nn.Module]]) -> nn.Module:
    for module in reversed(list(model.modules())):
        if kinds and isinstance(module, tuple(kinds)):
            fully_shard(module)
    return fully_shard(model)


UNITS: dict[str, set[type[nn.Module]]] = {
    "root": set(),
    "layer": {LoraLayer},
    "factor": {Factor},
    "layer and factor": {LoraLayer, Factor},
    "base and factor": {Factor, nn.Linear, nn.Embedding, nn.Conv1d},
}
ENGINES: dict[str, Callable[[nn.Module, set[type[nn.Module]]], nn.Module]] = {
    "FSDP1": _fsdp1,
    "FSDP2": _fsdp2,
}
MODELS = {
    "linear": partial(make, ["up", "down", "head"]),
    "linear with bias": partial(make, ["up", "head"], lora_bias=True),
    "embedding and convolution": partial(make, ["embed", "conv"]),
    "DoRA": partial(make, ["up", "down", "head"], use_dora=True),
    "DoRA of embedding and convolution": partial(make, ["embed", "conv"], use_dora=True),
    "frozen term": partial(make, ["up", "down", "embed", "conv"], init_lora_weights="pissa"),
}


#: Cases that are refused: what the message says of the way out.
REFUSED = {
    ("FSDP1", "base and factor", "DoRA"): "Wrap whole adapted layers",
    ("FSDP1", "base and factor", "DoRA of embedding and convolution"): "Wrap whole adapted layers",
}


def refused(engine: str, unit: str, kind: str, way_out: str) -> None:
    """The error of a forward names the way out."""
    model = ENGINES[engine](MODELS[kind](), UNITS[unit])
    try:
        model(torch.zeros(3, 5, dtype=torch.long))
    except TargetError as error:
        assert way_out in str(error), error
    else:
        raise AssertionError("nothing was refused")


def check(engine: str, unit: str, kind: str) -> None:
    """Outputs, after two steps, equal those of one process; so do the adapter's gathered tensors."""
    generator = torch.Generator().manual_seed(1)
    # Every rank sees the same batch, so that the mean of the gradients is that of one process.
    inputs = [torch.randint(0, 12, (3, 5), generator=generator) for _ in range(2)]
    alone = make_model = MODELS[kind]()
    expected = steps(alone, inputs)
    model = ENGINES[engine](MODELS[kind](), UNITS[unit])
    for ours, theirs in zip(steps(model, inputs), expected, strict=True):
        assert_close(ours, theirs)
    if engine == "FSDP2":
        full = {
            name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for name, tensor in model.state_dict().items()
        }
        saved = get_peft_model_state_dict(model, state_dict=full)
    else:
        with FSDP.summon_full_params(model, writeback=False):
            inner = model.module
            saved = {n: t.clone() for n, t in get_peft_model_state_dict(inner).items()}
    for name, tensor in get_peft_model_state_dict(make_model).items():
        assert_close(saved[name], tensor)


def same_start_on_all_ranks() -> None:
    """Every rank gets rank 0's draw, whatever its own generator says."""
    torch.manual_seed(100 + dist.get_rank())
    model = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=10, target_modules=["up", "embed"]))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        theirs = parameter.detach().clone()
        dist.broadcast(theirs, src=0)
        assert torch.equal(theirs, parameter)


def main(rank: int, world: int, rendezvous: str) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    failed = 0
    cases: dict[str, Callable[[], None]] = {"start": same_start_on_all_ranks}
    for engine in ENGINES:
        for unit in UNITS:
            for kind in MODELS:
                way_out = REFUSED.get((engine, unit, kind))
                case = partial(refused, way_out=way_out) if way_out else check
                cases[f"{engine} by {unit}: {kind}"] = partial(case, engine, unit, kind)
    for name, case in cases.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", UserWarning)
                case()
            print(f"ok      {name}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc(limit=-6)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
