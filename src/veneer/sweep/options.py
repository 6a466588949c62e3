"""The options of a sweep and its grid, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import Blank, ConfigError, Hint, Text, TrainingError
from ..files.layout import left_over
from ..files.overwrite import check_replaceable, check_writable
from ..training.data.sources import check_source
from ..training.launcher import launched
from ..training.libraries import require
from ..training.options import MEASURED, RunOptions, from_mapping, option, spellings, yaml_mapping
from ..training.paths import all_of, check_model
from ..training.planning.limits import parse_budget
from ..wording import listed

#: What a sweep has no use for: it learns from answers, with AdamW, and saves in its own way.
LEFT_OUT = (
    "method", "beta", "packing", "loss_chunk_size", "optim", "resume_from_adapter", "eval_steps",
    "logging_steps", "report_to", "save_steps", "save_total_limit", "overwrite_output_dir",
)  # fmt: skip
#: Share of the examples that is set aside where nothing says what to compare the runs on.
HELD_OUT = 0.1
#: Configurations of a grid.
MOST_POINTS = 10_000
#: The file that says what a sweep did, and how far it is.
RESULT_NAME = "sweep.json"

#: Where `ray` is to run unless a cluster runs already.
LOCAL = "local"
_ADDRESS = re.compile(r"auto|(ray://)?[^:/\s]+:\d+|(ray://)?\[[0-9a-f:]+\]:\d+")

#: Name of an option -> its values.
Grid = dict[str, list[Any]]
_LISTS = "each option needs a list of values, such as `lora_r: [4, 16]`"


@dataclass(frozen=True)
class SweepOptions(RunOptions):
    """The options that all runs of a sweep share.

    Raises:
        ConfigError: Some values are invalid; lists all of them.
    """

    output: str = option(
        "", "Run", "Directory for the adapters, sweep.json, sweep.md and sweep.png.", "output_dir", free=True
    )
    seeds: int = option(1, "Steps", "Runs of each configuration, with this seed and the next ones.", above=0)
    early_stop: bool = option(
        True, "Evaluation", "Stop runs early: a third of them goes on at 1/9 of the steps, and at 1/3."
    )
    memory: str | None = option(
        None,
        "Memory",
        "Memory to use, such as 8GB, by each worker; by default, most of what is free.",
        free=True,
    )
    exact: bool = option(
        False,
        "Memory",
        "Compute each run in a pass of its own: slower, and the same bit for bit with any memory and any "
        "number of workers.",
    )
    ray: str | None = option(
        None,
        "Run",
        "Train on a Ray cluster: alone, on one that is started here and ended with the sweep; with HOST:PORT "
        "or auto, on one that runs.",
        free=True,
    )
    ray_workers: int | None = option(
        None,
        "Run",
        "Workers on it, each with the base; by default one for each GPU, or for each machine if there are "
        "none.",
        free=True,
        above=0,
    )

    def problems(self) -> list[Text]:
        """What cannot be right, a sentence each."""
        parts = {part.name: part for part in dataclasses.fields(self)}
        wrong = [
            Text(Hint(name), " is nothing for a sweep: leave it out")
            for name in LEFT_OUT
            if getattr(self, name) != parts[name].default
        ]
        if self.init_lora_weights.lower() in MEASURED:
            start = Hint("init_lora_weights", self.init_lora_weights)
            wrong.append(Text(start, " is measured on the data, which a sweep does not do"))
        if self.memory is not None:
            try:
                given = parse_budget(self.memory).memory
            except ConfigError:
                given = None
            if given is None:
                wrong.append(Text(Hint("memory"), f" is a size such as 8GB, not {self.memory!r}"))
        if self.ray is not None and self.ray != LOCAL and not _ADDRESS.fullmatch(self.ray):
            wrong.append(Text(Hint("ray"), f" is {LOCAL}, auto or HOST:PORT, not {self.ray!r}"))
        if self.ray_workers is not None and self.ray is None:
            wrong.append(Text(Hint("ray_workers"), " are those of a Ray cluster: give ", Hint("ray", LOCAL)))
        return [*super().problems(), *wrong]

    def points(self, grid: Grid) -> list[tuple[dict[str, Any], SweepOptions]]:
        """Each configuration of a grid: its values, and its options.

        Raises:
            ConfigError: Some of them are invalid; lists everything that is wrong once.
        """
        if (count := math.prod(map(len, grid.values()))) > MOST_POINTS:
            raise ConfigError(
                f"the grid has {count:,} configurations; at most {MOST_POINTS:,} can be compared"
            )
        found, wrong = [], {}
        for values in itertools.product(*grid.values()):
            named = dict(zip(grid, values, strict=True))
            try:
                found.append((named, replace(self, **named)))
            except ConfigError as error:
                wrong[str(error)] = error.message
        if wrong:
            raise ConfigError("the grid has values that cannot be used: ", Text.join("; ", wrong.values()))
        return found


def swept() -> list[str]:
    """The options that a grid may vary."""
    return [
        part.name
        for part in dataclasses.fields(SweepOptions)
        if part.metadata["group"] in ("Steps", "Adapter") and part.name not in (*LEFT_OUT, "seed", "seeds")
    ]


def options_and_grid(
    config: Path | None, given: Mapping[str, Any], flags: Sequence[str]
) -> tuple[SweepOptions, Grid]:
    """The options and the grid: of a YAML file, and over them those of the flags.

    Args:
        config: Keys of `SweepOptions`, and ``grid`` with a list of values for each option.
        given: The options that were given as flags; None where one was not.
        flags: ``name=value,value``; with a semicolon between values, commas belong to them.

    Raises:
        UnknownOptionError: Names that are no options.
        ConfigError: Something cannot be right, or there is no grid.
    """
    content = {} if config is None else yaml_mapping(config)
    told = content.pop("grid", None) or {}
    found: dict[str, Any] = {}
    grid = Grid()
    all_of(
        [
            partial(from_mapping, content, str(config), SweepOptions, found),
            partial(_read_grid, told, f"grid of {config}", grid),
            partial(_read_flags, flags, grid),
            partial(_complete, found, given, grid, bool(told or flags)),
        ]
    )
    return SweepOptions(**found), grid


def _complete(found: dict[str, Any], given: Mapping[str, Any], grid: Grid, told: bool) -> None:
    """Add the flags to the options of a file, and check what they come to, alone and with a grid."""
    found.update((name, value) for name, value in given.items() if value is not None)
    if not found.get("eval_data") and not found.get("validation_split"):
        found["validation_split"] = HELD_OUT
    wrong: list[Text] = []
    if not told:
        example = Hint("grid", Blank("learning_rate=1e-4,3e-4,1e-3"))
        wrong.append(Text("a sweep needs a grid of options to try: ", example))
    if both := [name for name in grid if name in found]:
        names = Text.join(", ", map(Hint, both))
        wrong.append(Text(names, " is in the grid and given beside it: choose one"))
    options = SweepOptions(model=".", data=".", output=".")
    try:
        options = SweepOptions(**found)
    except ConfigError as error:
        wrong.append(error.message)
    try:
        options.points(grid)
    except ConfigError as error:
        wrong.append(error.message)
    if wrong:
        raise ConfigError(Text.join("; ", wrong))


def _read_flags(flags: Sequence[str], grid: Grid) -> None:
    """Add to a grid what flags say, all of them or none."""
    found: dict[str, Any] = {}
    words: dict[str, Any] = {"true": True, "false": False}
    wrong = []
    for flag in flags:
        name, sign, text = (part.strip() for part in flag.partition("="))
        values = [part.strip() for part in text.split(";" if ";" in text else ",")]
        if not sign or not all((name, *values)):
            wrong.append(Text(Hint("grid"), f" takes NAME=VALUE,VALUE, not {flag!r}"))
        elif name in found:
            wrong.append(Text(Hint("grid"), f" has {name} twice: give all its values at once"))
        else:
            found[name] = [words.get(value, value) for value in values]

    def well_formed() -> None:
        if wrong:
            raise ConfigError(Text.join("; ", wrong))

    all_of([well_formed, partial(_read_grid, found, "grid", grid)])


def _read_grid(content: Any, where: str, grid: Grid) -> None:
    """Add to a grid the values of each option, with its own name and type, as far as they can be read.

    Raises:
        UnknownOptionError: Names that are no options.
        ConfigError: Other things that cannot be right.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: {_LISTS}")
    known = spellings(SweepOptions)
    names = {key: known.get(str(key).replace("-", "_")) for key in content}
    unknown = {key: None for key, name in names.items() if name is None}
    wrong: list[str | Text] = []
    found = Grid()
    for key, name in names.items():
        if name is not None:
            try:
                found |= {name: _values(key, name, content[key], found)}
            except ConfigError as error:
                wrong.append(error.message)
    grid |= found

    def well_formed() -> None:
        if wrong:
            raise ConfigError(f"{where}: ", Text.join("; ", wrong))

    all_of([partial(from_mapping, unknown, where, SweepOptions), well_formed])


def _values(key: Any, name: str, values: Any, grid: Grid) -> list[Any]:
    """The values that one option of a grid takes."""
    if name in grid:
        raise ConfigError(f"{name} is given twice")
    if name == "seed":
        raise ConfigError(Hint("seeds", 3), " trains each configuration with three seeds; seed is the first")
    if name not in (may := swept()):
        raise ConfigError(f"{key} is the same for all runs of a sweep; it can vary {listed(may, len(may))}")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{key}: {_LISTS}")
    try:
        found = [from_mapping({key: value}, "grid", SweepOptions)[name] for value in values]
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("grid: ")) from error
    if len(set(found)) < len(values):
        raise ConfigError(f"{key} has a value twice")
    return found


def check_sweep(options: SweepOptions) -> None:
    """Check everything that a sweep reads and writes, as far as it can be told without reading it.

    Raises:
        VeneerError: Something is missing or cannot be written; lists everything that is.
    """
    if launched():
        raise TrainingError("a sweep starts its own processes: start it without a launcher")
    if options.ray is not None:
        require("ray", "ray", Hint("ray"))
    sources = [options.data, *([options.eval_data] if options.eval_data else [])]
    all_of(
        [
            partial(check_model, options.model),
            *(partial(check_source, source) for source in sources),
            partial(_check_beginning, Path(options.output), options.resume),
        ]
    )


def _check_beginning(output: Path, resume: bool) -> None:
    there, again = (output / RESULT_NAME).is_file(), Hint("resume", True)
    if resume and not there:
        raise TrainingError(f"nothing to resume: {output} contains no sweep. Start without ", again)
    if there and not resume:
        raise TrainingError(
            f"{output} contains a sweep. Continue it with ", again, ", or name another ", Hint("output")
        )
    if not resume and _killed_at_once(output):
        check_writable(output)
    elif not resume:
        check_replaceable(output, what="sweep")


def _killed_at_once(output: Path) -> bool:
    """Whether a directory holds nothing but what a sweep left that was killed before its first record."""
    left = set(output.iterdir()) if output.is_dir() else set()
    return bool(left) and left == set(left_over(output))
