"""What one rank of `test_sharding.py` does: shard an adapted model, train, save, load, merge; compare.

Run as ``python -m tests.laws.sharded RANK WORLD RENDEZVOUS PART``: one line a case; exits 1 if any fails.
"""

from __future__ import annotations

import itertools
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.pairwise import pairwise
from tests.tolerances import assert_close
from veneer import (
    CheckpointError,
    LoraConfig,
    MergeError,
    PeftModel,
    TargetError,
    VeneerWarning,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from veneer.layers import Factor, LoraLayer
from veneer.testing.made import train


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


class Tied(nn.Module):
    """A language model in small: its head has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self._tied_weights_keys = {"head.weight": "embed.weight"}
        self.config = {"tie_word_embeddings": True}
        self.embed = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length) integer -> (batch, length, 12)."""
        h = self.embed(x)
        return self.head(self.norm(h + torch.relu(self.up(h))))


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return Tied() if kind in TIED else Net()


def made(kind: str) -> PeftModel:
    model = get_peft_model(base_of(kind), LoraConfig(r=4, lora_alpha=10, **{**MODELS, **TIED}[kind]))
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


def _fsdp1(model: nn.Module, kinds: set[type[nn.Module]], use_orig_params: bool = True) -> nn.Module:
    policy = ModuleWrapPolicy(kinds) if kinds else None
    device = torch.device("cpu")
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=device)


def _fsdp2(model: nn.Module, kinds: set[type[nn.Module]]) -> nn.Module:
    for module in reversed(list(model.modules())):
        if kinds and isinstance(module, tuple(kinds)):
            fully_shard(module)
    return fully_shard(model)


def _fsdp2_together(model: PeftModel, kinds: set[type[nn.Module]]) -> nn.Module:
    inner = model.get_base_model()
    fully_shard([inner.embed, inner.head])
    return fully_shard(model)


UNITS: dict[str, set[type[nn.Module]]] = {
    "root": set(),
    "layer": {LoraLayer},
    "factor": {Factor},
    "layer and factor": {LoraLayer, Factor},
    "base and factor": {Factor, nn.Linear, nn.Embedding, nn.Conv1d},
}
ENGINES: dict[str, Callable[[Any, set[type[nn.Module]]], nn.Module]] = {
    "FSDP1": _fsdp1,
    "FSDP2": _fsdp2,
    "FSDP1 of flat parameters": partial(_fsdp1, use_orig_params=False),
    "FSDP2 with the head in the unit of the embedding": _fsdp2_together,
    "DDP": lambda model, kinds: DDP(model),
}
MODELS: dict[str, dict[str, Any]] = {
    "linear": dict(target_modules=["up", "down", "head"]),
    "linear with bias": dict(target_modules=["up", "head"], lora_bias=True),
    "embedding and convolution": dict(target_modules=["embed", "conv"]),
    "DoRA": dict(target_modules=["up", "down", "head"], use_dora=True),
    "DoRA of embedding and convolution": dict(target_modules=["embed", "conv"], use_dora=True),
    "frozen term": dict(target_modules=["up", "down", "embed", "conv"], init_lora_weights="pissa"),
}
TIED: dict[str, dict[str, Any]] = {
    "tied LoRA": dict(target_modules=["embed", "up"], ensure_weight_tying=True),
    "trainable tokens": dict(target_modules=["up"], trainable_token_indices=[1, 3]),
    "whole modules": dict(target_modules=["up"], modules_to_save=["norm"]),
    "tied whole modules": dict(target_modules=["up"], modules_to_save=["embed"], ensure_weight_tying=True),
}
#: The head's weight is the embedding's: what puts them into different units is refused by torch itself.
SHARING = ("root", "factor")


def face_of(model: nn.Module) -> PeftModel:
    """The PeftModel within what wraps it."""
    return model if isinstance(model, PeftModel) else model.module


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def batches() -> list[Tensor]:
    """The same on every rank, so that the mean of the gradients is that of one process."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 12, (3, 5), generator=generator) for _ in range(2)]


def refused(engine: str, unit: str, kind: str, error: type[Exception], way_out: str) -> None:
    """The error of a forward names the way out."""
    model = ENGINES[engine](made(kind), UNITS[unit])
    with pytest.raises(error, match=way_out):
        model(torch.zeros(3, 5, dtype=torch.long))


def check(engine: str, unit: str, kind: str) -> None:
    """Outputs, after two steps, equal those of one process; so do the adapter's gathered tensors.

    Then other values are written into it, and read back bit for bit.
    """
    alone = made(kind)
    expected = steps(alone, batches())
    model = ENGINES[engine](made(kind), UNITS[unit])
    for ours, theirs in zip(steps(model, batches()), expected, strict=True):
        assert_close(ours, theirs)
    asked = face_of(model) if engine == "DDP" else model
    saved, wanted = whole(get_peft_model_state_dict(asked)), get_peft_model_state_dict(alone)
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(saved[name], tensor)
    generator = torch.Generator().manual_seed(2)
    other = {
        n: torch.randn(t.shape, generator=generator) for n, t in get_peft_model_state_dict(alone).items()
    }
    # Of a pair that is one tensor under two names, only one can be kept.
    set_peft_model_state_dict(alone, other)
    other = get_peft_model_state_dict(alone)
    assert set_peft_model_state_dict(asked, other) == ([], [])
    back = whole(get_peft_model_state_dict(asked))
    assert all(torch.equal(back[name], tensor) for name, tensor in other.items())
    with torch.no_grad():
        assert_close(model(batches()[0]), alone(batches()[0]))


def saving(engine: str, unit: str, kind: str, place: Path) -> None:
    """All ranks call; one writes; what is read back, onto one process and into the shards, is what was there.

    The last forward leaves whole tensors with the outermost unit of FSDP2: they are not to be met.
    """
    model = ENGINES[engine](made(kind), UNITS[unit])
    with torch.no_grad():
        before = model(batches()[0]).clone()
    face_of(model).save_pretrained(place)
    assert sorted(p.name for p in place.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    alone = PeftModel.from_pretrained(base_of(kind), place)
    wanted = get_peft_model_state_dict(made(kind))
    assert all(torch.equal(t, wanted[n]) for n, t in get_peft_model_state_dict(alone).items())
    assert_close(alone(batches()[0]), before)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    set_peft_model_state_dict(model, zeros)
    report = face_of(model).load_adapter(place, "default", is_trainable=True)
    assert report.ok
    with torch.no_grad():
        assert_close(model(batches()[0]), before)


def not_saved(kind: str, place: Path) -> None:
    """From inside, FSDP1's outermost unit cannot be seen: saving is refused, and existing files stay."""
    face = made(kind)
    if dist.get_rank() == 0:
        face.save_pretrained(place)
    dist.barrier()
    files = {path.name: path.read_bytes() for path in place.iterdir()}
    model = _fsdp1(face, set())
    pieces = [p.detach().clone() for p in model.parameters()]
    for call in (
        partial(face.save_pretrained, place),
        partial(get_peft_model_state_dict, face),
        partial(face.load_adapter, place, "default"),
    ):
        with pytest.raises(CheckpointError, match=r"in pieces(.|\n)*summon_full_params"):
            call()
    assert files == {path.name: path.read_bytes() for path in place.iterdir()}
    assert all(torch.equal(*both) for both in zip(pieces, model.parameters(), strict=True))
    # The ways out that it names, by the rank that writes.
    wanted = get_peft_model_state_dict(made(kind))
    rank = dist.get_rank()
    given = get_peft_model_state_dict(model)
    face.save_pretrained(place.with_name("given"), state_dict=given, is_main_process=rank == 0)
    with FSDP.summon_full_params(model, writeback=False):
        face.save_pretrained(place.with_name("summoned"), is_main_process=rank == 0)
    dist.barrier()
    for name in ("given", "summoned"):
        alone = PeftModel.from_pretrained(base_of(kind), place.with_name(name))
        assert all(torch.equal(t, wanted[n]) for n, t in get_peft_model_state_dict(alone).items())


def merging(engine: str, unit: str, kind: str) -> None:
    """FSDP2: merged equals unmerged, unmerged again bit for bit; the pieces hold it, not a passing copy."""
    model = ENGINES[engine](made(kind), UNITS[unit])
    face = face_of(model)
    with torch.no_grad():
        before = model(batches()[0]).clone()
        face.merge_adapter()
        face.state_dict()  # FSDP2 takes its whole tensors back
        assert_close(model(batches()[0]), before)
        face.unmerge_adapter()
        face.state_dict()
        assert torch.equal(model(batches()[0]), before)


def not_merged(engine: str, unit: str, kind: str, reason: str) -> None:
    """Refused for every layer, before any changes."""
    model = ENGINES[engine](made(kind), UNITS[unit])
    with pytest.raises(MergeError, match=reason):
        face_of(model).merge_adapter()
    assert not any(layer.merged for layer in face_of(model).base_model.layers().values())


def added_late() -> None:
    """Nobody averages the gradients of what is added after sharding; that is said."""
    model = _fsdp2(made("linear"), set())
    with pytest.warns(VeneerWarning, match="nobody averages their gradients"):
        face_of(model).add_adapter("late", LoraConfig(r=4, target_modules=["up"]))


def same_start_on_all_ranks() -> None:
    """Every rank gets rank 0's draw, whatever its own generator says."""
    torch.manual_seed(100 + dist.get_rank())
    model = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=10, target_modules=["up", "embed"]))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        theirs = parameter.detach().clone()
        dist.broadcast(theirs, src=0)
        assert torch.equal(theirs, parameter)


def cases(place: Path) -> dict[str, dict[str, Callable[[], None]]]:
    """All of them, by name: in the part "short" with a pairwise cover of what is sharded how, the "rest"."""
    found: dict[str, Callable[[], None]] = {"start": same_start_on_all_ranks, "added late": added_late}
    rest: dict[str, Callable[[], None]] = {}
    sharded = list(itertools.product(("FSDP1", "FSDP2"), UNITS, MODELS))
    short = pairwise(sharded)
    for row in [*sharded, *itertools.product(("FSDP1", "FSDP2"), SHARING, TIED)]:
        engine, unit, kind = row
        part = rest if row in sharded and row not in short else found
        part[f"{engine} by {unit}: {kind}"] = partial(check, *row)
    for kind in ("DoRA", "DoRA of embedding and convolution"):
        found[f"FSDP1 by base and factor: {kind}"] = partial(
            refused, "FSDP1", "base and factor", kind, TargetError, "Wrap whole adapted layers"
        )
    for kind in ("linear", "linear with bias", "DoRA"):
        engine = "FSDP1 of flat parameters"
        found[f"{engine} by factor: {kind}"] = partial(check, engine, "factor", kind)
    for kind in ("linear", "DoRA", *TIED):
        found[f"DDP: {kind}"] = partial(check, "DDP", "root", kind)
    engine = "FSDP2 with the head in the unit of the embedding"
    found[f"{engine}: tied LoRA"] = partial(check, engine, "root", "tied LoRA")
    for engine, error, way_out in (
        ("FSDP1", TargetError, "one unit of FSDP"),
        ("FSDP2", ValueError, "place them in the same FSDP group"),
    ):
        found[f"{engine} by layer: tied LoRA"] = partial(
            refused, engine, "layer", "tied LoRA", error, way_out
        )
    saves = {
        "FSDP1": ("factor", ["linear", "DoRA"]),
        "FSDP1 of flat parameters": ("factor", ["linear with bias"]),
        "FSDP2": ("root", ["linear", "frozen term", *TIED]),
    }
    for engine, (unit, kinds) in saves.items():
        for number, kind in enumerate(kinds):
            name = f"{engine} by {unit}, saved: {kind}"
            found[name] = partial(saving, engine, unit, kind, place / f"{engine}{number}")
    found["FSDP1 by root, not saved"] = partial(not_saved, "linear", place / "refused")
    for kind in ("linear", "embedding and convolution", "DoRA", "tied LoRA", "whole modules"):
        found[f"FSDP2 by root, merged: {kind}"] = partial(merging, "FSDP2", "root", kind)
    found["FSDP2 by layer, merged: linear"] = partial(merging, "FSDP2", "layer", "linear")
    for engine, unit, kind, reason in (
        ("FSDP1", "root", "linear", r"up: FSDP1(.|\n)*down: FSDP1 keeps the base weight in pieces"),
        ("FSDP1", "factor", "DoRA", "FSDP1 keeps the base weight in pieces"),
        ("FSDP1", "root", "trainable tokens", "embed: FSDP1 keeps the base weight in pieces"),
        ("FSDP2", "factor", "linear", "units of FSDP by themselves"),
        ("FSDP2", "root", "trainable tokens", "a row is in one piece"),
    ):
        found[f"{engine} by {unit}, not merged: {kind}"] = partial(not_merged, engine, unit, kind, reason)
    return {"short": found, "rest": rest}


def main(rank: int, world: int, rendezvous: str, part: str) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    failed = 0
    for name, case in cases(Path(rendezvous).parent)[part].items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", VeneerWarning)
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
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
