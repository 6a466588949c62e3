"""Where models are read from and results are written to, checked before anything is loaded or imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..errors import ConfigError, Text, TrainingError, VeneerError
from ..files.layout import CONFIG_NAME
from ..files.overwrite import check_no_file, check_writable
from ..hub import is_local
from .data.sources import check_source
from .launcher import is_first, processes
from .options import RunOptions
from .resuming import check_beginning


def check_model(source: str | os.PathLike[str], *, config_file: bool = False) -> None:
    """Check that a model lies where it is said to; one of the hub is not asked for.

    Args:
        source: A directory, or a repository id of the hub.
        config_file: Take the file of a configuration, too.

    Raises:
        TrainingError: It does not.
    """
    place = Path(source)
    if not is_local(source) or (place / "config.json").is_file() or (config_file and place.is_file()):
        return
    what = "has no config.json" if place.is_dir() else "does not exist"
    if place.is_file():
        what = "is a file"
    adapter = " It contains an adapter: pass its base model instead." * (place / CONFIG_NAME).is_file()
    raise TrainingError(
        f"no model at {str(source)!r}: it {what}.{adapter} Give a directory that transformers saved, "
        f"{'a config.json, ' * config_file}or a hub id."
    )


def check_not_a_source(place: Path, source: str) -> None:
    """Refuse to write a merged model over its source or beside an adapter.

    transformers applies an adapter that lies beside a model, so the update would count twice.

    Raises:
        VeneerError: The directory is one of these.
    """
    if source and Path(source).exists() and place.resolve() == Path(source).resolve():
        raise VeneerError(f"{place} is what is to be merged; choose another output directory")
    if (place / CONFIG_NAME).exists():
        raise VeneerError(
            f"{place} contains an adapter, which transformers would apply to the merged model again; "
            "choose another output directory"
        )


def check_answer_file(output: Path) -> None:
    """Check that the file for answers can be made, before a model is loaded.

    Raises:
        VeneerError: It exists, or its directory does not exist or cannot be written.
    """
    if output.is_dir():
        raise VeneerError(f"{output} is a directory; choose a file for the answers")
    if output.exists():
        raise VeneerError(f"{output} exists already; choose another file for the answers, or remove it")
    if not output.parent.is_dir():
        raise VeneerError(f"the directory {output.parent} for the answers does not exist")
    check_writable(output.parent)


def check_output(place: Path) -> None:
    """Check that a directory for results can be made, and files in it; nothing is made yet."""
    check_no_file(place)
    check_writable(place)


def check_run(options: RunOptions) -> None:
    """Check everything that a training run reads and writes, as far as it can be told without reading it.

    Raises:
        VeneerError: Something is missing or cannot be written; lists everything that is.
    """
    output = Path(options.output)
    begins = partial(check_beginning, output, options.resume, options.overwrite_output_dir, processes())
    sources = [options.data, *([options.eval_data] if options.eval_data else [])]
    all_of(
        [
            partial(check_model, options.model),
            *(partial(check_source, source) for source in sources),
            *([partial(check_output, output), begins] if is_first() else []),
        ]
    )


def all_of(checks: Sequence[Callable[[], object]]) -> None:
    """Make several checks, and raise one error for all that fail; of its own class where only one does.

    Raises:
        ConfigError: All that fail are about options.
        VeneerError: Others.
    """
    failed = []
    for check in checks:
        try:
            check()
        except VeneerError as error:
            failed.append(error)
    if len(failed) == 1:
        raise failed[0]
    if failed:
        options = all(isinstance(error, ConfigError) for error in failed)
        kind = ConfigError if options else VeneerError
        raise kind(Text.join("\n", (error.message for error in failed)))
