"""Checkpoints: which are complete, and whether they belong to the run that is resumed.

A checkpoint and the output of a finished run contain a file that identifies the run. It is written last and
removed first, so a directory that contains it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import atomic_files, new_directory
from ..errors import AdapterFileError, Blank, Hint, Text, TrainingError
from ..wording import first_line
from .options import TrainOptions

if TYPE_CHECKING:
    from .stopping import Stop

#: Identifies the run that wrote a directory; written last.
RUN_NAME = "veneer_run.json"
METRICS_NAME = "metrics.json"
#: Options for the length of a run, which may grow between a checkpoint and its resumption.
_LENGTH = {"epochs", "max_steps"}
_RECORD = {"steps", "options", "adapters", "data", "evaluation data", "processes"}
RESUME, OVERWRITE = Hint("resume", True), Hint("overwrite_output_dir", True)


@dataclass(frozen=True)
class Run:
    """One run and the checkpoint that it starts from.

    Attributes:
        output: Directory of the adapter and the checkpoints.
        options: How to train.
        record: Identifies the run, see `run_record`; written into each checkpoint.
        evaluated: Whether there are held-out rows.
        stop: Ends the run early.
        checkpoint: Where it resumes from, if anywhere.
        seconds: Time spent before that checkpoint.
        planned: Length of the run, in steps, when that checkpoint was written.
    """

    output: Path
    options: TrainOptions
    record: dict[str, Any]
    evaluated: bool
    stop: Stop
    checkpoint: Path | None
    seconds: float
    planned: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps: int = self.record["steps"]
        return steps

    @property
    def finished(self) -> bool:
        """Whether the checkpoint is one of the last step."""
        return self.checkpoint is not None and step_of(self.checkpoint) >= self.steps


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, the whole file or none of it."""
    write_files(path.parent, {path.name: json_bytes(content)})


def write_files(place: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a directory: all of them, or none."""
    with new_directory(place), ExitStack() as stack:
        for folder in sorted({(place / name).parent for name in files}):
            stack.enter_context(new_directory(folder))
        with atomic_files(*(place / name for name in files)) as waiting:
            for path, content in zip(waiting, files.values(), strict=True):
                path.write_bytes(content)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(content, indent=2) + "\n").encode()


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What a tokenizer saves, by the names of its files."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = [path for path in Path(place).rglob("*") if path.is_file()]
        return {path.relative_to(place).as_posix(): path.read_bytes() for path in files}


def run_record(
    model: Any,
    rows: Sequence[Any],
    eval_rows: Sequence[Any],
    options: TrainOptions,
    processes: int,
    steps: int,
) -> dict[str, Any]:
    """Everything that the losses of a run depend on, and its number of steps."""
    adapters = getattr(model, "peft_config", None) or {}
    record = {
        "steps": steps,
        "options": {
            part.name: getattr(options, part.name)
            for part in dataclasses.fields(options)
            if not part.metadata["free"]
        },
        "adapters": {name: config.to_dict() for name, config in adapters.items()},
        "data": digest(rows),
        "evaluation data": digest(eval_rows),
        "processes": processes,
    }
    # As it is read back.
    told = json.dumps(record, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = json.loads(told)
    return plain


def digest(rows: Sequence[Any]) -> str:
    """A hash of the rows and their order."""
    taken = hashlib.sha256()
    for row in rows:
        taken.update(json.dumps(row, sort_keys=True, default=str).encode())
    return taken.hexdigest()[:16]


def last_checkpoint(output: Path, processes: int = 1) -> Path:
    """The newest complete checkpoint, of whatever run (see `check_same_run`); there must be one."""
    found = checkpoints(output)
    whole = [place for place in found if _is_whole(place, processes)]
    if whole:
        return whole[-1]
    if found:
        raise TrainingError(
            f"nothing to resume: {output} contains no complete checkpoint (of {processes} "
            f"process{'es' * (processes > 1)}), only incomplete ones or those of another program. "
            "Start without ",
            RESUME,
            " and with ",
            OVERWRITE,
        )
    done = "; the run that it holds went to its end" if (output / METRICS_NAME).is_file() else ""
    raise TrainingError(
        f"nothing to resume: {output} contains no checkpoint{done}. Start without ",
        RESUME,
        "; Ctrl-C writes one, and ",
        Hint("save_steps", Blank("N")),
        " one every N steps",
    )


def checkpoints(output: Path) -> list[Path]:
    """All checkpoints in a directory, complete or not, in the order of their steps."""
    found = [place for place in output.glob("checkpoint-*") if place.name.partition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.partition("-")[2])


def _is_whole(place: Path, processes: int) -> bool:
    run = _record(place)
    if run is None or _json(place / "trainer_state.json") is None:
        return False
    states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else []
    sizes = _sizes(place)
    return run.get("files", {}).items() <= sizes.items() and all(name in sizes for name in states)


def _sizes(place: Path) -> dict[str, int]:
    files = (path for path in sorted(place.rglob("*")) if path.is_file() and path.name != RUN_NAME)
    return {path.relative_to(place).as_posix(): path.stat().st_size for path in files}


def _record(place: Path) -> dict[str, Any] | None:
    """The `run_record` that a checkpoint or an output contains, if any."""
    found = _json(place / RUN_NAME)
    return found if isinstance(found, dict) and found.keys() >= _RECORD else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run was cut off before or while it wrote it
        return None


def complete_checkpoint(place: Path, record: Mapping[str, Any], seconds: float) -> None:
    """Mark a checkpoint as complete: write the record of its run, the time spent, and its files."""
    write_json(place / RUN_NAME, {**record, "seconds": seconds, "files": _sizes(place)})


def remove_checkpoint(place: Path) -> None:
    """Remove a checkpoint so that what a kill leaves of it does not count as complete."""
    (place / RUN_NAME).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def check_same_run(checkpoint: Path, now: Mapping[str, Any]) -> tuple[float, int]:
    """(seconds spent before the checkpoint, planned steps at that time).

    Raises:
        TrainingError: The checkpoint belongs to a run with other options, data or processes, or to a longer
            one; lists the differences.
    """
    then = _json(checkpoint / RUN_NAME)
    if differences := _differences(then, now):
        raise TrainingError(
            f"{checkpoint} belongs to another run: ",
            Text.join("; ", differences),
            ". ",
            RESUME,
            " continues the same run: give the same options and data, or start a new run in another ",
            Hint("output"),
        )
    return float(then["seconds"]), int(then["steps"])


def finished_run(output: Path, now: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics of this run if it has finished in this directory and its adapters are there."""
    then, metrics = _record(output), _json(output / METRICS_NAME)
    if then is None or not isinstance(metrics, dict):
        return None
    if then["steps"] != now["steps"] or _differences(then, now):
        return None
    from ..files.read import open_adapter

    try:
        for name in now["adapters"]:
            open_adapter(output if name == "default" else output / name)
    except AdapterFileError:
        return None
    return metrics


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Text]:
    """How two runs differ; more steps alone are no difference."""
    options = {
        name: Text(Hint(name), f" was {_told(was)} and is {_told(now['options'].get(name))}")
        for name, was in then["options"].items()
        if was != now["options"].get(name)
    }
    only_length = options.keys() <= _LENGTH
    others = []
    if only_length and then["adapters"] != now["adapters"]:
        keys = {
            k for n, c in then["adapters"].items() for k in c if now["adapters"].get(n, {}).get(k) != c[k]
        }
        what = Text.join(", ", map(Hint, sorted(keys))) if keys else "name"
        others.append(Text("the adapter has another ", what))
    others += [
        Text(
            f"the {name} {'have other rows' if 'data' in name else f'were {then[name]} and are {now[name]}'}"
        )
        for name in ("data", "evaluation data", "processes")
        if then[name] != now[name]
    ]
    if not others and only_length and now["steps"] >= then["steps"]:
        return []
    return [*options.values(), *others]


def _told(value: object) -> str:
    return "not given" if value is None else repr(value)


def check_beginning(output: Path, resume: bool, overwrite: bool, processes: int) -> None:
    """Check that a run can begin in an output, or be resumed there; nothing is changed.

    Raises:
        TrainingError: There is nothing to resume; or there are checkpoints of an earlier run, and
            ``overwrite`` is False.
    """
    if resume:
        if not (output / METRICS_NAME).is_file():  # a finished run stays as it is
            last_checkpoint(output, processes)
        return
    found = checkpoints(output)
    if found and not overwrite:
        raise TrainingError(
            f"{output} contains checkpoints of an earlier run ({', '.join(one.name for one in found[-3:])}), "
            "which a later ",
            RESUME,
            " could not tell from those of this one. Continue with ",
            RESUME,
            ", name another ",
            Hint("output"),
            ", or remove them with ",
            OVERWRITE,
        )


def begin_afresh(output: Path, overwrite: bool) -> None:
    """Remove the checkpoints of an earlier run, or refuse them where ``overwrite`` is False."""
    check_beginning(output, False, overwrite, 1)
    try:
        for place in checkpoints(output):
            remove_checkpoint(place)
        (output / RUN_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(
            f"what an earlier run left in {output} cannot be removed: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """Why writing failed, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if error.errno else error.strerror
    return first_line(error)
