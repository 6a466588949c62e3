"""Checkpoints of a run: which one is whole, and whether it belongs to the run that would go on from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import TrainingError
from .options import TrainOptions

#: Beside what the Trainer writes into a checkpoint.
RUN_NAME = "veneer_run.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as waiting:
        waiting.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_record(
    model: Any, rows: Sequence[Any], eval_rows: Sequence[Any], options: TrainOptions, processes: int
) -> dict[str, Any]:
    """All that the losses of a run depend on."""
    adapters = getattr(model, "peft_config", None) or {}
    return {
        "options": {
            part.name: getattr(options, part.name)
            for part in dataclasses.fields(options)
            if not part.metadata["free"]
        },
        "adapters": {name: _plain(config.to_dict()) for name, config in adapters.items()},
        "data": digest(rows),
        "evaluation data": digest(eval_rows),
        "processes": processes,
    }


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back; sets have no order, and paths do not matter."""
    told = json.dumps(content, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = json.loads(told)
    return plain


def digest(rows: Sequence[Any]) -> str:
    """A number that tells other rows, or another order of them."""
    taken = hashlib.sha256()
    for row in rows:
        taken.update(json.dumps(row, sort_keys=True, default=str).encode())
    return taken.hexdigest()[:16]


def last_checkpoint(output: Path, processes: int = 1) -> Path:
    """The newest checkpoint that was written to its end: the Trainer's state is the last of its files.

    Raises:
        TrainingError: There is none.
    """
    numbers = _numbered(output)
    whole = [n for n in sorted(numbers) if _is_whole(numbers[n], processes)]
    if whole:
        return numbers[whole[-1]]
    if numbers:
        raise TrainingError(
            f"nothing to resume: {output} holds no complete checkpoint (of {processes} "
            f"process{'es' * (processes > 1)}). Start without --resume and with --overwrite-output-dir."
        )
    done = "; the run that it holds went to its end" if (output / "metrics.json").is_file() else ""
    raise TrainingError(
        f"nothing to resume: {output} holds no checkpoint{done}. Start without --resume; "
        "Ctrl-C writes one, and --save-steps N one every N steps."
    )


def checkpoints(output: Path) -> list[Path]:
    """All checkpoints in a directory, whole or not, by their step."""
    numbers = _numbered(output)
    return [numbers[n] for n in sorted(numbers)]


def _numbered(output: Path) -> dict[int, Path]:
    return {
        int(place.name.removeprefix("checkpoint-")): place
        for place in output.glob("checkpoint-*")
        if place.name.removeprefix("checkpoint-").isdigit()
    }


def _is_whole(place: Path, processes: int) -> bool:
    states = [place / f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else []
    return _json(place / "trainer_state.json") is not None and all(state.is_file() for state in states)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run was cut off before or while it wrote it
        return None


def check_same_run(checkpoint: Path, now: Mapping[str, Any]) -> float:
    """Seconds that the run took until its checkpoint.

    Raises:
        TrainingError: It belongs to a run with other options, data or processes; names each difference.
    """
    then = _json(checkpoint / RUN_NAME)
    if not isinstance(then, dict):
        raise TrainingError(
            f"{checkpoint} was not written by veneer train (it has no {RUN_NAME}), so nobody can say whether "
            "it belongs to this run. Start without --resume."
        )
    differences = [
        f"{name} was {_told(was)} and is {_told(now['options'].get(name))}"
        for name, was in then["options"].items()
        if was != _plain(now["options"]).get(name)
    ]
    if not differences and then["adapters"] != now["adapters"]:
        keys = {
            k for n, c in then["adapters"].items() for k in c if now["adapters"].get(n, {}).get(k) != c[k]
        }
        differences.append(f"the adapter has another {', '.join(sorted(keys)) or 'name'}")
    differences += [
        f"the {name} {'have other rows' if 'data' in name else f'were {then[name]} and are {now[name]}'}"
        for name in ("data", "evaluation data", "processes")
        if then[name] != now[name]
    ]
    if differences:
        raise TrainingError(
            f"{checkpoint} belongs to another run: {'; '.join(differences)}. --resume goes on with the same "
            "run: give the same options and data, or start a new run in another --output."
        )
    return float(then.get("seconds", 0.0))


def _told(value: object) -> str:
    return "not given" if value is None else repr(value)


def begin_afresh(output: Path, overwrite: bool) -> None:
    """See to it that no checkpoint of an earlier run lies where this one will put its own.

    Raises:
        TrainingError: One does, and it is not to be removed.
    """
    found = checkpoints(output)
    if found and not overwrite:
        raise TrainingError(
            f"{output} holds checkpoints of an earlier run ({', '.join(one.name for one in found[-3:])}), "
            "which a later --resume could not tell from those of this one. Go on with --resume, name another "
            "--output, or remove them with --overwrite-output-dir."
        )
    for place in found:
        shutil.rmtree(place)


def reason(error: BaseException) -> str:
    """Why something could not be written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if error.errno else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
