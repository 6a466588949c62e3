"""What two ranks do with accelerate; run as ``python accelerate_ranks.py DIRECTORY peft|veneer``.

With ``peft`` the names come from ``peft``, which is Veneer there (`register_as_peft`); with ``veneer`` from
Veneer, beside the real peft if that is installed. One line a case and rank; exits 1 if any fails.

accelerate shards on accelerators only. It is told here that the two processes on the CPU are such: everything
after that is its own code and torch's.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

DOOR = sys.argv[2] if len(sys.argv) > 2 else "veneer"
if DOOR == "peft":
    from veneer.as_peft import register_as_peft

    register_as_peft()

import accelerate  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import load_fsdp_model, save_fsdp_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import X, gpt2, llama, shake  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: E402

if DOOR == "peft":
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.utils.other import fsdp_auto_wrap_policy
else:
    from veneer import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from veneer.integrations.as_peft.objects import fsdp_auto_wrap_policy

#: What each rank learns from; one process learns from both in one batch.
ROWS = [torch.arange(12).reshape(2, 6) % 50, torch.arange(100, 112).reshape(2, 6) % 50]


def adapted(**options: Any) -> Any:
    targets = ["q_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(llama(), config)
    shake(model)
    return model


def fresh_state(sharding: bool) -> None:
    """Let accelerate begin anew, and take the processes for accelerators where it is to shard."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.MULTI_CPU
    if sharding:
        state.distributed_type, state.device = DistributedType.MULTI_XPU, torch.device("cpu")


def accelerator(plugin: Any = None) -> Any:
    fresh_state(sharding=plugin is not None)
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def prepared(acc: Any, model: Any) -> tuple[Any, Any]:
    """The model and its optimizer as each engine wants them: of FSDP1 the optimizer comes second."""
    make = torch.optim.AdamW
    if acc.distributed_type == DistributedType.FSDP and not acc.is_fsdp2:
        model = acc.prepare(model)
        return model, acc.prepare(make(trainable(model), lr=0.02))
    return tuple(acc.prepare(model, make(trainable(model), lr=0.02)))  # type: ignore[return-value]


def steps(
    model: Any, optimizer: Any, batches: Sequence[torch.Tensor], backward: Any, count: int = 2
) -> list[float]:
    losses = []
    for _ in range(count):
        loss = sum(model(input_ids=b, labels=b).loss for b in batches) / len(batches)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def alone() -> Any:
    """After the same steps in one process, on the rows of both ranks."""
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    steps(model, optimizer, ROWS, torch.Tensor.backward)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=X).logits.detach().clone()


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    from veneer.testing.tolerances import assert_close

    assert_close(ours, theirs)


def learned(acc: Any, model: Any, optimizer: Any, place: Path) -> None:
    """Train, resume, save the adapter, read it back."""
    mine = [ROWS[acc.process_index]]
    steps(model, optimizer, mine, acc.backward)
    reference = alone()
    same(logits(model), logits(reference))
    acc.save_state(str(place / "state"))
    on = steps(model, optimizer, mine, acc.backward)
    acc.load_state(str(place / "state"))
    same(logits(model), logits(reference))
    assert steps(model, optimizer, mine, acc.backward) == on
    face = acc.unwrap_model(model)
    assert isinstance(face, PeftModel)
    # What is saved is what the model has now, as the outputs of a model read back tell.
    after = logits(model)
    given = whole(get_peft_model_state_dict(model if model is not face and not is_ddp(model) else face))
    face.save_pretrained(place / "given", state_dict=given, is_main_process=acc.is_main_process)
    acc.wait_for_everyone()
    same(logits(PeftModel.from_pretrained(llama(), place / "given")), after)
    names = sorted(path.name for path in (place / "given").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"], names


def is_ddp(model: Any) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def ddp(place: Path) -> None:
    acc = accelerator()
    model, optimizer = prepared(acc, adapted())
    assert is_ddp(model)
    learned(acc, model, optimizer, place)


def plugin(version: int, model: Any, kind: str, wrap: Any, **more: Any) -> Any:
    if version == 1:
        more = {"use_orig_params": True, **more}
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        state_dict_type=kind,
        auto_wrap_policy=wrap(model),
        cpu_ram_efficient_loading=False,
        **more,
    )


def fsdp1(place: Path) -> None:
    """By root, the adapter's policy, and layers of the model; checkpoints from shards."""
    for number, wrap in enumerate((lambda m: "no_wrap", fsdp_auto_wrap_policy)):
        model = adapted()
        acc = accelerator(plugin(1, model, "SHARDED_STATE_DICT", wrap))
        model, optimizer = prepared(acc, model)
        assert isinstance(model, FSDP)
        learned(acc, model, optimizer, place / str(number))


def fsdp1_flat(place: Path) -> None:
    """accelerate's default: the parameters are views of flat ones, and the adapter's policy is needed."""
    model = adapted()
    acc = accelerator(plugin(1, model, "SHARDED_STATE_DICT", fsdp_auto_wrap_policy, use_orig_params=False))
    model, optimizer = prepared(acc, model)
    steps(model, optimizer, [ROWS[acc.process_index]], acc.backward)
    same(logits(model), logits(alone()))
    acc.unwrap_model(model).save_pretrained(place)
    same(logits(PeftModel.from_pretrained(llama(), place)), logits(model))


def fsdp2(place: Path) -> None:
    """By root and by the model's blocks; a full state dict and one in shards."""
    kinds = (("no_wrap", "FULL_STATE_DICT"), ("transformer_based_wrap", "SHARDED_STATE_DICT"))
    for number, (wrap, kind) in enumerate(kinds):
        model = adapted()
        acc = accelerator(plugin(2, model, kind, lambda m, wrap=wrap: wrap))
        model, optimizer = prepared(acc, model)
        assert type(model).__name__.startswith("FSDP")
        learned(acc, model, optimizer, place / str(number))
        # accelerate's own way to a full state dict: rank 0 has it, the others nothing.
        full = acc.get_state_dict(model)
        acc.unwrap_model(model).save_pretrained(
            place / f"full{number}", state_dict=full, is_main_process=acc.is_main_process
        )
        # And ours: every rank calls, one writes.
        model.save_pretrained(place / f"ours{number}")
        for name in ("full", "ours"):
            same(logits(PeftModel.from_pretrained(llama(), place / f"{name}{number}")), logits(model))


def fsdp2_tied(place: Path) -> None:
    """A head that shares its embedding's factors, saved both ways."""
    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["wte", "c_attn"],
        ensure_weight_tying=True,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(gpt2(), config)
    shake(model)
    acc = accelerator(plugin(2, model, "FULL_STATE_DICT", lambda m: "no_wrap"))
    model, optimizer = prepared(acc, model)
    steps(model, optimizer, [ROWS[acc.process_index]], acc.backward)
    face, after = acc.unwrap_model(model), logits(model)
    model.save_pretrained(place / "ours")
    full = acc.get_state_dict(model)
    face.save_pretrained(place / "full", state_dict=full, is_main_process=acc.is_main_process)
    acc.wait_for_everyone()
    for name in ("ours", "full"):
        same(logits(PeftModel.from_pretrained(gpt2(), place / name)), after)


def adapter_only(place: Path) -> None:
    """What Trainer has accelerate keep of an adapter: no base weights, by our functions."""
    for version, kind in ((1, "SHARDED_STATE_DICT"), (2, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT")):
        model, folder = adapted(), place / f"{version}{kind}"
        made = plugin(version, model, kind, fsdp_auto_wrap_policy)
        acc = accelerator(made)
        model, optimizer = prepared(acc, model)
        mine = [ROWS[acc.process_index]]
        steps(model, optimizer, mine, acc.backward)
        before = logits(model)
        save_fsdp_model(made, acc, model, folder, adapter_only=True)
        acc.wait_for_everyone()
        kept = names_in(folder)
        assert kept and all("lora_" in name for name in kept), kept
        steps(model, optimizer, mine, acc.backward)
        assert not torch.equal(logits(model), before)
        load_fsdp_model(made, acc, model, folder, adapter_only=True)
        assert torch.equal(logits(model), before)


def names_in(folder: Path) -> list[str]:
    """The tensors of a checkpoint of FSDP."""
    if (whole := folder / "pytorch_model_fsdp.bin").exists():
        return list(torch.load(whole, weights_only=True))
    reader = FileSystemReader(folder / "pytorch_model_fsdp_0")
    return list(reader.read_metadata().state_dict_metadata)


def policy(place: Path) -> None:
    """The units that the adapter's policy makes: each factor by itself, each block of the model."""
    model = adapted()
    acc = accelerator(plugin(1, model, "FULL_STATE_DICT", fsdp_auto_wrap_policy))
    model = acc.prepare(model)
    inside = {type(unit.module).__name__ for unit in FSDP.fsdp_modules(model)}
    assert inside == {"PeftModelForCausalLM", "LlamaDecoderLayer", "Factor"}, inside


def trainer(place: Path) -> None:
    """transformers' Trainer, with both engines: trains, saves the adapter, resumes to the same weights."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in torch.cat(ROWS)]
    for version, kind in ((1, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT")):

        def made(name: str, steps: int, version: int = version, kind: str = kind) -> Any:
            fresh_state(sharding=True)
            arguments = TrainingArguments(
                str(place / f"{version}{name}"),
                use_cpu=True,
                accelerator_config={"use_configured_state": True},
                fsdp=True,
                fsdp_config={
                    "version": version,
                    "state_dict_type": kind,
                    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                    "sync_module_states": False,  # wants a device of its own
                },
                per_device_train_batch_size=1,
                max_steps=steps,
                save_steps=2,
                # accelerate reads a fresh optimizer's state of FSDP1 as empty, whichever library adapts: none
                # is kept there.
                optim="sgd" if version == 1 else "adamw_torch",
                lr_scheduler_type="constant",
                learning_rate=0.02,
                report_to="none",
                disable_tqdm=True,
            )
            return Trainer(adapted(), arguments, train_dataset=rows)

        through = made("through", 4)
        through.train()
        saved = str(place / f"{version}saved")
        if version == 2:
            through.save_model(saved)
        else:  # from shards Trainer saves checkpoints alone; a full state of FSDP1 crashes torch on a CPU
            through.accelerator.unwrap_model(through.model_wrapped).save_pretrained(saved)
        torch.distributed.barrier()
        after = logits(through.model_wrapped)
        again = PeftModel.from_pretrained(llama(), saved)
        same(logits(again), after)
        assert not torch.equal(logits(again), logits(adapted()))
        # Stopped after two steps and gone on with: the same as all four at once.
        made("twice", 2).train()
        second = made("twice", 4)
        second.train(resume_from_checkpoint=True)
        same(logits(second.model_wrapped), after)


def veneer_train(place: Path) -> None:
    """`veneer.training.train` with FSDP2: the losses of DDP; stopped and gone on with, the same adapter."""
    from tiny_trl import tokenizer

    from veneer.training import TrainOptions, train
    from veneer.training import trainer as ours
    from veneer.training.stopping import Interrupted, Stop

    rows = [{"input_ids": row.tolist(), "labels": [-100, -100, *row.tolist()[2:]]} for row in torch.cat(ROWS)]
    plain = ours.arguments
    sharded = {
        "use_cpu": True,
        "accelerator_config": {"use_configured_state": True},
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "cpu_ram_efficient_loading": False,
        },
    }

    class Third(Stop):
        """Asks to stop after the third step."""

        def __init__(self) -> None:
            self.steps = 0

        @property
        def asked(self) -> bool:
            self.steps += 1
            return self.steps == 3

    def run(name: str, *, shards: bool = True, stop: Stop | None = None, **more: Any) -> dict[str, Any]:
        fresh_state(sharding=shards)
        ours.arguments = lambda run: plain(run) | (sharded if shards else {})
        options = TrainOptions(
            max_steps=4, batch_size=1, learning_rate=0.02, lr_scheduler_type="constant", save_steps=4, **more
        )
        torch.manual_seed(0)
        try:
            model = adapted(lora_dropout=0.1)
            return train(model, tokenizer(), rows, place / name, options, eval_rows=rows[:3], stop=stop)
        finally:
            torch.distributed.barrier()

    def tensors(name: str) -> dict[str, torch.Tensor]:
        return load_file(place / name / "adapter_model.safetensors")

    through = run("through")
    assert through["losses"][-1]["loss"] < through["losses"][0]["loss"]
    together = run("ddp", shards=False)
    for part in ("losses", "evaluations"):
        shards, whole = (torch.tensor([e["loss"] for e in found[part]]) for found in (through, together))
        same(shards, whole)
    try:
        run("cut", stop=Third())
        raise AssertionError("it was not stopped")
    except Interrupted as left:
        assert left.step == 3
    assert run("cut", resume=True)["losses"] == through["losses"]
    assert all(torch.equal(t, tensors("through")[name]) for name, t in tensors("cut").items())
    # Nothing is left to train, only to write.
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for name in ("adapter_model.safetensors", "metrics.json"):
            (place / "cut" / name).unlink()
    torch.distributed.barrier()
    assert run("cut", resume=True)["losses"] == through["losses"]
    assert all(torch.equal(t, tensors("through")[name]) for name, t in tensors("cut").items())


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case
    for case in (ddp, fsdp1, fsdp1_flat, fsdp2, fsdp2_tied, adapter_only, policy, trainer, veneer_train)
}


def say(line: str) -> None:
    """In one piece: two ranks speak at once."""
    os.write(1, line.encode())


def rank_of(rank: int, world: int, directory: str) -> None:
    torch.set_num_threads(1)
    place = Path(directory)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    logging.disable(logging.WARNING)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place / 'store'}", rank=rank, world_size=world
    )
    failed = 0
    for name, case in CASES.items():
        try:
            with warnings.catch_warnings():
                for kind in (FutureWarning, UserWarning, DeprecationWarning):
                    warnings.simplefilter("ignore", kind)
                case(place / name)
            say(f"ok      {name} {rank}\n")
        except Exception:
            failed += 1
            say(f"FAILED  {name} {rank}\n{traceback.format_exc(limit=-8)}\n")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.exit(int(failed > 0))


def main(directory: str) -> int:
    """Two children of one process that has imported everything."""
    shutil.rmtree(directory, ignore_errors=True)
    Path(directory).mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=rank_of, args=(rank, 2, directory)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return int(any(child.exitcode for child in children))


if __name__ == "__main__":
    print("accelerate", accelerate.__version__, flush=True)
    sys.exit(main(sys.argv[1]))
