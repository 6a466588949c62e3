"""Everything that reads input: functions of the library, and commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.inputs import ADAPTERS
from tests.fuzz.materials import adapted
from tests.laws.snapshots import Snapshot
from tests.unit.training.tiny import tiny_model
from veneer import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeneerError,
    export_adapter,
    import_adapter,
)
from veneer.cli import main
from veneer.hotswap import hotswap_adapter
from veneer.listing import find_adapters
from veneer.lora_file import open_lora
from veneer.sweep.options import check_sweep, options_and_grid
from veneer.tools import combine_adapters, compare_adapters, convert_adapter, resize_adapter, verify_adapter
from veneer.training import read_records
from veneer.training.adapters import describe, load_adapted, save_merged
from veneer.training.merge_files import merge_files
from veneer.training.options import RunOptions, read_yaml
from veneer.training.spectra import spectra


class Inputs(NamedTuple):
    """What a door is given.

    Attributes:
        good: The directory of `tests.fuzz.materials`.
        given: The directory of what is spoiled, or the one of the good ones that it stands for.
        output: Where to write; nothing is there.
    """

    good: Path
    given: Path
    output: Path


class Door(NamedTuple):
    """Something that reads.

    Attributes:
        enter: Reads; an exit code, or nothing.
        of: The inputs that it takes, directories of `tests.fuzz.materials`.
        weight: How often it is tried.
        writes: Whether it writes into ``output``.
    """

    enter: Callable[[Inputs], object]
    of: tuple[str, ...]
    weight: float = 1.0
    writes: bool = False


def by_from_pretrained(inputs: Inputs) -> None:
    _same_after(tiny_model(), lambda model: PeftModel.from_pretrained(model, inputs.given))


def by_load_adapter(inputs: Inputs) -> None:
    _same_after(adapted(), lambda model: model.load_adapter(inputs.given, "other"))


def by_hotswap(inputs: Inputs) -> None:
    _same_after(adapted(), lambda model: hotswap_adapter(model, str(inputs.given), "default"))


def by_merging(inputs: Inputs) -> None:
    model = PeftModel.from_pretrained(tiny_model(), inputs.given)
    _same_after(model, lambda model: model.merge_adapter(), written=True)
    _same_after(model, lambda model: model.unmerge_adapter(), written=True)


def _same_after(model: Any, act: Callable[[Any], object], written: bool = False) -> None:
    """Act on a model, which an error must leave as it was."""
    before = Snapshot(model)
    try:
        act(model)
    except VeneerError:
        before.assert_same(model, written=written)
        raise


def by_inspecting(inputs: Inputs) -> None:
    lora = open_lora(inputs.given)
    describe(lora)
    spectra(lora)


def by_saving(inputs: Inputs) -> None:
    adapted().save_pretrained(inputs.output)


def by_saving_merged(inputs: Inputs) -> None:
    save_merged(*load_adapted(inputs.given, str(inputs.good / "base")), inputs.output)


def by_sweep(inputs: Inputs) -> None:
    options, _ = options_and_grid(inputs.given / "sweep.yaml", {}, [])
    check_sweep(options)


def by_records(inputs: Inputs, purpose: Any) -> None:
    for file in _data_files(inputs.given):
        read_records(file, purpose)


def _data_files(place: Path) -> Iterable[Path]:
    return sorted(place.iterdir())[:1] if place.is_dir() else [place]


def by_command(inputs: Inputs, words: str) -> int:
    """A command; ``{given}`` and the other names of `Inputs` stand for their paths."""
    file = next(iter(_data_files(inputs.given)), inputs.given)
    named = {**inputs._asdict(), "base": inputs.good / "base", "file": file}
    return main([word.format_map(named) for word in words.split()])


def _command(words: str, *of: str, weight: float = 1.0) -> Door:
    return Door(partial(by_command, words=words), of or LORAS, weight, "{output}" in words)


LORAS = (*ADAPTERS, "bin")
WITH_BASE = 0.3  # seconds, not milliseconds
DOORS = {
    "PeftModel.from_pretrained": Door(by_from_pretrained, LORAS, 3),
    "load_adapter": Door(by_load_adapter, LORAS, 3),
    "hotswap_adapter": Door(by_hotswap, LORAS),
    "merge_adapter": Door(by_merging, LORAS, 2),
    "PeftConfig.from_pretrained": Door(lambda i: PeftConfig.from_pretrained(i.given), LORAS),
    "LoraConfig.from_file": Door(lambda i: LoraConfig.from_file(i.given / "adapter_config.json"), LORAS),
    "inspect": Door(by_inspecting, LORAS, 2),
    "find_adapters": Door(lambda i: find_adapters(i.given), LORAS),
    "verify_adapter": Door(lambda i: list(verify_adapter(i.given)), LORAS),
    "compare_adapters": Door(lambda i: compare_adapters(i.good / "second", i.given), LORAS),
    "combine_adapters": Door(
        lambda i: combine_adapters([i.given, i.good / "second"], i.output), LORAS, writes=True
    ),
    "resize_adapter": Door(lambda i: resize_adapter(i.given, i.output, rank=2), LORAS, writes=True),
    "convert_adapter": Door(lambda i: convert_adapter(i.given, i.output), LORAS, writes=True),
    "convert_adapter, an archive": Door(
        lambda i: convert_adapter(i.given / "run.tar", i.output), ("archive",), writes=True
    ),
    "export_adapter": Door(lambda i: export_adapter(i.given, i.output, "plain"), LORAS, writes=True),
    "merge_files": Door(lambda i: merge_files(i.given, i.good / "base", i.output), LORAS, writes=True),
    "merge_files, base": Door(
        lambda i: merge_files(i.good / "adapter", i.given, i.output), ("base",), 3, True
    ),
    "save_pretrained": Door(by_saving, (), writes=True),
    "save_merged": Door(by_saving_merged, LORAS, WITH_BASE, True),
    "import_adapter": Door(lambda i: import_adapter(i.given, i.output), ("kohya",), writes=True),
    **{
        f"read_records, {purpose}": Door(partial(by_records, purpose=purpose), ("data",), 0.5)
        for purpose in ("sft", "dpo", "kto", "classification", "prompt")
    },
    "read_yaml": Door(lambda i: RunOptions(**read_yaml(i.given / "run.yaml")), ("yaml",)),
    "sweep": Door(by_sweep, ("yaml",), 2),
    "veneer inspect": _command("inspect {given} --modules"),
    "veneer inspect --json": _command("inspect {given} --json --no-spectrum"),
    "veneer ls": _command("ls {given} --check"),
    "veneer verify": _command("verify {given}"),
    "veneer verify --model": _command("verify {given} --model {base}", weight=WITH_BASE),
    "veneer diff": _command("diff {given} {good}/second --json"),
    "veneer combine": _command("combine {good}/second {given} --weights 1,-0.5 --output {output}"),
    "veneer resize": _command("resize {given} --energy 0.9 --output {output}"),
    "veneer extract": _command(
        "extract --base {base} --tuned {given} --rank 2 --output {output}", "base", weight=WITH_BASE
    ),
    "veneer import": _command("import {given} {output}", "kohya"),
    **{
        f"veneer export, {target}": _command(
            f"export {{given}} {{output}} --target {target} --model {{base}}", weight=0.3
        )
        for target in ("vllm", "llama.cpp", "ollama", "mlx", "diffusers", "plain")
    },
    "veneer merge": _command("merge {given} --model {base} --output {output}", weight=WITH_BASE),
    "veneer merge --low-memory": _command("merge {given} --model {base} --output {output} --low-memory"),
    "veneer generate": _command(
        "generate {given} Double. --model {base} --max-new-tokens 2", weight=WITH_BASE
    ),
    "veneer chat": _command("chat {given} --model {base} --max-new-tokens 2", weight=WITH_BASE),
    "veneer eval": _command(
        "eval {given} --model {base} --data {good}/data/data.jsonl --max-samples 2 --no-exact-match",
        weight=WITH_BASE,
    ),
    "veneer push": _command("push {given} owner/name"),
    "veneer train --resume-from-adapter": _command(
        "train --resume-from-adapter {given} --model {base} --data {good}/data/data.jsonl --output {output} "
        "--max-steps 1",
        weight=WITH_BASE / 2,
    ),
    "veneer data": _command("data {file} --model {base}", "data"),
    "veneer eval --data": _command(
        "eval {good}/adapter --data {file} --max-samples 2 --no-exact-match", "data", weight=WITH_BASE
    ),
    "veneer generate --data": _command(
        "generate {good}/adapter --data {file} --max-new-tokens 1 --output {output}", "data", weight=WITH_BASE
    ),
    "veneer plan, options": _command("plan {given}/run.yaml", "yaml"),
    "veneer data, options": _command("data {given}/run.yaml", "yaml"),
    "veneer train --print-config": _command("train {given}/run.yaml --print-config", "yaml"),
    "veneer sweep, options": _command(
        "sweep {given}/sweep.yaml --data nowhere.jsonl --output {output}", "yaml"
    ),
}
