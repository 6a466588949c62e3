"""Everything that reads input: functions of the library, and commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.inputs import ADAPTERS
from tests.fuzz.materials import adapted
from tests.laws.snapshots import Snapshot
from tests.unit.training.tiny import tiny_model, tiny_tokenizer
from veneer import (
    AutoPeftModelForCausalLM,
    Family,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeneerError,
    export_adapter,
    import_adapter,
    load_peft_weights,
)
from veneer.base_files import BaseFiles
from veneer.calibration.measuring import stored
from veneer.cli import main
from veneer.family.family import read_states
from veneer.files.layout import CONFIG_NAME
from veneer.files.read import open_adapter
from veneer.hotswap import hotswap_adapter
from veneer.listing import find_adapters
from veneer.lora_file import open_lora
from veneer.sweep import sweep as sweep_module
from veneer.sweep.options import SweepOptions, check_sweep, options_and_grid
from veneer.sweep.results import read_record
from veneer.tools import (
    combine_adapters,
    compare_adapters,
    convert_adapter,
    extract_adapter,
    resize_adapter,
    verify_adapter,
)
from veneer.training import TrainOptions, encode, load_base, read_records, train
from veneer.training.adapters import describe, load_adapted, own_tokenizer, save_merged
from veneer.training.merge_files import merge_files
from veneer.training.options import RunOptions, read_yaml
from veneer.training.planning import plan_training
from veneer.training.resuming import checkpoints, last_checkpoint
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
        leaves: Checks what it has left in ``output``, where an error may leave something whole; by default
            it may leave nothing.
    """

    enter: Callable[[Inputs], object]
    of: tuple[str, ...]
    weight: float = 1.0
    writes: bool = False
    leaves: Callable[[Path], object] | None = None


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


def by_family(inputs: Inputs) -> None:
    model = tiny_model()
    before = Snapshot(model)
    family = Family(model)
    try:
        family.load_state(inputs.given)
    except VeneerError:
        assert family.names == []
        before.assert_same(model)
        raise


def by_base_files(inputs: Inputs) -> None:
    files = BaseFiles(inputs.given, prefix="model")
    name = files.stored_name("model.layers.0.self_attn.q_proj.weight")
    if name is not None:
        files.read(name)


def by_training(inputs: Inputs) -> None:
    options = TrainOptions(learning_rate=1e-2, batch_size=4, max_steps=3, save_steps=1, save_total_limit=2)
    tokenizer = tiny_tokenizer()
    rows = encode(read_records(inputs.good / "data" / "data.jsonl"), tokenizer).rows
    train(adapted(), tokenizer, rows, inputs.output, options, eval_rows=rows[:2])


def whole_run(place: Path) -> None:
    """Whole checkpoints, and a whole adapter, or one of the two."""
    _no_rest(place)
    if found := checkpoints(place):
        assert last_checkpoint(place) == found[-1]
    if (place / CONFIG_NAME).exists() or not found:
        open_adapter(place).tensors()
        own_tokenizer(place)


def by_sweeping(inputs: Inputs) -> None:
    data = str(inputs.good / "data" / "data.jsonl")
    options = SweepOptions(
        model=str(inputs.good / "base"), data=data, eval_data=data, output=str(inputs.output), max_steps=3,
        batch_size=4,
    )  # fmt: skip
    sweep_module.SAVE_SECONDS = 0.0
    check_sweep(options)
    sweep_module.sweep(options, {"learning_rate": [1e-3, 1e-2]})


def whole_sweep(place: Path) -> None:
    """A record, what it needs to go on, and whole adapters."""
    _no_rest(place)
    record = read_record(place)
    if record.get("state"):
        read_states(place / record["state"])
    for one in record["runs"]:
        if (place / one["name"]).exists():
            whole_run(place / one["name"])


def _no_rest(place: Path) -> None:
    """Nothing is half written, and no directory empty."""
    assert not list(place.rglob(".veneer-*")), "files that were begun"
    assert all(any(folder.iterdir()) for folder in (place, *place.rglob("*")) if folder.is_dir())


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


def _command(
    words: str, *of: str, weight: float = 1.0, leaves: Callable[[Path], object] | None = None
) -> Door:
    return Door(partial(by_command, words=words), of or LORAS, weight, "{output}" in words, leaves)


LORAS = (*ADAPTERS, "bin")
WITH_BASE = 0.3  # seconds, not milliseconds
DOORS = {
    "PeftModel.from_pretrained": Door(by_from_pretrained, LORAS, 3),
    "PeftModel.load_adapter": Door(by_load_adapter, LORAS, 3),
    "hotswap_adapter": Door(by_hotswap, LORAS),
    "merge_adapter": Door(by_merging, LORAS, 2),
    "PeftConfig.from_pretrained": Door(lambda i: PeftConfig.from_pretrained(i.given), LORAS),
    "PeftConfig.from_file": Door(lambda i: LoraConfig.from_file(i.given / "adapter_config.json"), LORAS),
    "PeftConfig.from_json_file": Door(
        lambda i: LoraConfig.from_json_file(i.given / "adapter_config.json"), LORAS, 0.5
    ),
    "load_peft_weights": Door(lambda i: load_peft_weights(i.given), LORAS),
    "AutoPeftModel.from_pretrained": Door(
        lambda i: AutoPeftModelForCausalLM.from_pretrained(i.given), LORAS, WITH_BASE
    ),
    "Family.load_state": Door(by_family, ("state",)),
    "preprocess_loraga": Door(lambda i: stored(i.given / "cache.pt"), ("state",)),
    "load_base": Door(lambda i: load_base(i.given), ("base",), WITH_BASE),
    "plan_training": Door(lambda i: plan_training(i.given, LoraConfig()), ("base",), WITH_BASE),
    "replace_lora_weights_loftq": Door(by_base_files, ("base",)),
    "inspect": Door(by_inspecting, LORAS, 2),
    "find_adapters": Door(lambda i: find_adapters(i.given), LORAS),
    "verify_adapter": Door(lambda i: list(verify_adapter(i.given)), LORAS),
    "compare_adapters": Door(lambda i: compare_adapters(i.good / "second", i.given), LORAS),
    "combine_adapters": Door(
        lambda i: combine_adapters([i.given, i.good / "second"], i.output), LORAS, writes=True
    ),
    "resize_adapter": Door(lambda i: resize_adapter(i.given, i.output, rank=2), LORAS, writes=True),
    "convert_adapter": Door(lambda i: convert_adapter(i.given, i.output), LORAS, 2, True),
    "convert_adapter, an archive": Door(
        lambda i: convert_adapter(i.given / "run.tar", i.output), ("archive",), writes=True
    ),
    "export_adapter": Door(lambda i: export_adapter(i.given, i.output, "plain"), LORAS, writes=True),
    "merge_files": Door(lambda i: merge_files(i.given, i.good / "base", i.output), LORAS, writes=True),
    "merge_files, base": Door(
        lambda i: merge_files(i.good / "adapter", i.given, i.output), ("base",), 3, True
    ),
    "PeftModel.save_pretrained": Door(by_saving, (), writes=True),
    "save_merged": Door(by_saving_merged, LORAS, WITH_BASE, True),
    "extract_adapter": Door(
        lambda i: extract_adapter(i.good / "base", i.given, i.output, rank=2), ("base",), writes=True
    ),
    "PeftConfig.save_pretrained": Door(lambda i: LoraConfig().save_pretrained(i.output), (), writes=True),
    "PeftModel.create_or_update_model_card": Door(
        lambda i: adapted().create_or_update_model_card(i.output), (), writes=True
    ),
    "train": Door(by_training, (), WITH_BASE, True, whole_run),
    "sweep, results": Door(by_sweeping, (), WITH_BASE, True, whole_sweep),
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
    "veneer convert": _command("convert {given} {output}", weight=2),
    "veneer convert --plain": _command("convert {given} {output} --plain"),
    "veneer convert --plain, DoRA": _command(
        "convert {given} {output} --plain --rank 2 --model {base}", "special", weight=2
    ),
    **{
        f"veneer convert --layout {layout}": _command(
            f"convert {{given}} {{output}} --layout {layout}", "experts"
        )
        for layout in ("peft", "vllm")
    },
    "veneer convert --from-layout": _command(
        "convert {given} {output} --from-layout unsloth --layout vllm --model {base}", "experts"
    ),
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
        leaves=whole_run,
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
#: Commands and public functions that take a path and are no doors, with the reason.
NO_DOORS = {
    "Family.save_pretrained": "saves as PeftModel.save_pretrained does",
    "Family.save_state": "written by write_states, of which sweeps are a door",
    "answer_file": "reads records that were read; `veneer generate --data` writes by it",
    "empty_model": "reads config.json, as plan_training does",
    "Target.write": "by export_adapter",
    "Target.read": "by export_adapter",
    "Target.usage": "text",
    "Target.changed_others": "by export_adapter",
}
