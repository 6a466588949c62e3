"""Kill work at its steps on disk and at random moments, and look at what is left.

    python -m tests.e2e.kills [KILLS] [--seed N] [--of WORK ...]

Saves, merges, exports and imports have to leave the old files or the new ones, for every reader that is
promised so; training and sweeps have to go on to the result of a run that nobody killed. Prints for each
work where the kills fell and what they left. Exit 1 at the first that is neither.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import tests.conftest  # noqa: F401  # offline, one thread
from tests.fuzz.cases import content
from tests.kills import dies_at, done, killed_after, steps_of
from veneer import TrainingError
from veneer.files.overwrite import check_replaceable


class Work:
    """Something that is killed; each try has a directory of its own, of which nothing is shared.

    Args:
        root: A directory for what all tries need.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def begin(self, place: Path) -> None:
        """Put the old files into a new directory."""

    def do(self, place: Path) -> object:
        """What is killed."""
        raise NotImplementedError

    def left(self, place: Path) -> str:
        """What a kill has left, in a word; a mixture fails."""
        raise NotImplementedError


class Save(Work):
    """A save over another adapter, seen by Veneer's readers, by PEFT, and by whoever opens the two files."""

    def begin(self, place: Path) -> None:
        from tests.laws.test_saves import OLD, save

        save(place / "adapter", OLD)

    def do(self, place: Path) -> None:
        from tests.laws.test_saves import NEW, save

        save(place / "adapter", NEW)

    def left(self, place: Path) -> str:
        from tests.laws.test_saves import DOORS, NEW, OLD, seen

        (found,) = {seen(door, place / "adapter") for door in DOORS.values()}
        others = {self._by_peft(place / "adapter"), self._by_hand(place / "adapter")}
        # Between its two moves a save shows others the new tensors with the old configuration.
        window = (float(NEW), 8.0 * OLD)
        assert others <= {(float(found or 0), 8.0 * (found or 0)), window}, (found, others)
        return ("new" if found == NEW else "old") + (
            ", others: the new tensors alone" if window in others else ""
        )

    @staticmethod
    def _by_peft(place: Path) -> tuple[float, float]:
        import peft

        from tests.laws.test_saves import Base, of_model

        return of_model(peft.PeftModel.from_pretrained(Base(), str(place)), "default")

    @staticmethod
    def _by_hand(place: Path) -> tuple[float, float]:
        from safetensors.torch import load_file

        from tests.laws.test_saves import only

        config = json.loads((place / "adapter_config.json").read_text())
        return only(load_file(place / "adapter_model.safetensors").values()), float(config["lora_alpha"])


class Directory(Work):
    """Files that replace others in a directory: the old ones, the new ones, or both set aside whole."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.prepare()
        for name in ("old", "new"):
            (root / name).mkdir()
        done(partial(self.make, 0, root / "old" / "out"))
        (root / "old" / "out" / "notes.txt").write_text("mine")
        self.begin(root / "new")
        done(partial(self.make, 1, root / "new" / "out"))
        self.contents = {name: content(root / name / "out") for name in ("old", "new")}
        assert self.contents["old"] != self.contents["new"]

    def prepare(self) -> None:
        """Make what `make` reads."""
        raise NotImplementedError

    def make(self, number: int, out: Path) -> object:
        """Write the first files, or the second."""
        raise NotImplementedError

    def begin(self, place: Path) -> None:
        shutil.copytree(self.root / "old" / "out", place / "out")

    def do(self, place: Path) -> None:
        self.make(1, place / "out")

    def left(self, place: Path) -> str:
        out = place / "out"
        if there := out.exists():
            found = content(out)
        else:
            (hidden,) = place.iterdir()
            found = content(hidden / "new")
            assert content(hidden / "old") == self.contents["old"]
        word = next(name for name, whole in self.contents.items() if whole == found)
        check_replaceable(out, overwrite=True)  # the next run tidies up first
        assert list(place.iterdir()) == [out] and content(out) == found
        return word if there else "both set aside"


class MergeFiles(Directory):
    """``veneer merge --low-memory``, shard by shard."""

    def prepare(self) -> None:
        from tests.unit.training.test_merge_files import adapter_of, base_of

        # Shards of the same names, so that a mixture of them would load.
        self.bases = [base_of(self.root / f"base-{n}", seed=n, max_shard_size="20KB") for n in (0, 1)]
        self.adapters = [adapter_of(base, self.root / f"adapter-{n}") for n, base in enumerate(self.bases)]

    def make(self, number: int, out: Path) -> None:
        from veneer.training.merge_files import merge_files

        merge_files(self.adapters[number], self.bases[number], out, overwrite=True)


class MergeInMemory(MergeFiles):
    """``veneer merge``."""

    def make(self, number: int, out: Path) -> None:
        from veneer.training.adapters import load_adapted, save_merged

        save_merged(*load_adapted(self.adapters[number], str(self.bases[number])), out, overwrite=True)


class Export(Directory):
    """An export over another, of other values."""

    def prepare(self) -> None:
        from tests.laws.test_saves import NEW, OLD, save

        for number, value in enumerate((OLD, NEW)):
            save(self.root / f"adapter-{number}", value)

    def make(self, number: int, out: Path) -> None:
        from veneer import export_adapter

        export_adapter(self.root / f"adapter-{number}", out, "plain", overwrite=True)


class Import(Directory):
    """An import over another adapter."""

    def prepare(self) -> None:
        from tests.fuzz.materials import kohya

        for number in (0, 1):
            kohya(self.root / f"kohya-{number}", seed=number)

    def make(self, number: int, out: Path) -> None:
        from veneer import import_adapter

        import_adapter(self.root / f"kohya-{number}", out, overwrite=True)


class Resize(Export):
    """A smaller rank, written over another adapter."""

    def make(self, number: int, out: Path) -> None:
        from veneer.tools import resize_adapter

        resize_adapter(self.root / f"adapter-{number}", out, rank=1, overwrite=True)


class Training(Work):
    """A run with checkpoints; after a kill it is resumed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.do(root)
        self.whole = self._result(root)
        assert self.whole[0]["steps"] == len(self.whole[0]["losses"]) == 6

    def do(self, place: Path) -> None:
        self._run(place / "out")

    def _run(self, output: Path, **more: Any) -> None:
        """An epoch has four steps. In the end the learning rate is not zero: one step more would be seen."""
        from tests.unit.training.test_run import ROWS, TOKENIZER, adapted
        from veneer.training import TrainOptions, train

        options = TrainOptions(
            learning_rate=1e-2, batch_size=4, lr_scheduler_type="constant", max_steps=6, save_steps=2, **more
        )
        train(adapted(dropout=0.1), TOKENIZER, ROWS, output, options, eval_rows=ROWS[:4])

    def left(self, place: Path) -> str:
        word = "resumed"
        try:
            self._run(place / "out", resume=True)
        except TrainingError as error:
            assert "nothing to resume" in str(error)
            word = "begun again"
            self._run(place / "out", overwrite_output_dir=True)
        assert self._result(place) == self.whole
        return word

    @staticmethod
    def _result(place: Path) -> tuple[dict[str, Any], bytes]:
        metrics = json.loads((place / "out" / "metrics.json").read_text())
        kept = {name: metrics[name] for name in ("steps", "losses", "evaluations", "tokens")}
        return kept, (place / "out" / "adapter_model.safetensors").read_bytes()


class Sweep(Work):
    """Three configurations, of which one comes to its sixth step; after a kill it is resumed."""

    def __init__(self, root: Path) -> None:
        from tests.unit.training.tiny import saved_records, saved_tiny

        super().__init__(root)
        saved_tiny(root / "base")
        saved_records(root / "data.jsonl")
        self.do(root)
        self.whole = self._result(root)

    def do(self, place: Path) -> None:
        self._run(place / "out")

    def _run(self, output: Path, resume: bool = False) -> None:
        from veneer.sweep import sweep as module
        from veneer.sweep.options import SweepOptions, check_sweep

        data = str(self.root / "data.jsonl")
        options = SweepOptions(
            model=str(self.root / "base"), data=data, eval_data=data, output=str(output), max_steps=6,
            batch_size=4, lora_dropout=0.1, resume=resume,
        )  # fmt: skip
        module.SAVE_SECONDS = 0.0
        check_sweep(options)
        module.sweep(options, {"learning_rate": [1e-3, 1e-2, 3e-2]})

    def left(self, place: Path) -> str:
        word = "resumed"
        try:
            self._run(place / "out", resume=True)
        except TrainingError as error:
            assert "nothing to resume" in str(error)
            word = "begun again"
            self._run(place / "out")
        assert self._result(place) == self.whole
        return word

    @staticmethod
    def _result(place: Path) -> tuple[dict[str, Any], set[str], bytes]:
        found = json.loads((place / "out" / "sweep.json").read_text())
        del found["seconds"]
        best = place / "out" / found["best"] / "adapter_model.safetensors"
        return found, {path.name for path in (place / "out").iterdir()}, best.read_bytes()


WORKS: dict[str, Callable[[Path], Work]] = {
    "save": Save,
    "export": Export,
    "import": Import,
    "resize": Resize,
    "merge --low-memory": MergeFiles,
    "merge": MergeInMemory,
    "train": Training,
    "sweep": Sweep,
}


def tried(name: str, kills: int, seed: int, root: Path) -> Counter[str]:
    """Kill a work as often as asked, in turn at a step and at a moment, and count what was left.

    Args:
        name: Of `WORKS`.
        kills: How often; 0 kills at every step once.
        seed: Where the kills fall.
        root: A new directory.
    """
    random = Random(f"{seed} {name}")
    (root / "shared").mkdir(parents=True)
    work = WORKS[name](root / "shared")
    work.begin(_new(root / "counted"))
    begun = time.monotonic()
    steps = steps_of(partial(work.do, root / "counted"), root / "counted")
    seconds = time.monotonic() - begun
    order = random.sample(range(1, steps + 1), steps)
    found: Counter[str] = Counter({"steps": steps})
    for number in range(kills or steps):
        place = _new(root / str(number))
        work.begin(place)
        if not kills or number % 2 == 0:
            where, step = "at a step", order[(number if not kills else number // 2) % steps]
            killed = dies_at(step, partial(work.do, place), place)
        else:
            where, step = "at a moment", random.uniform(0.0, seconds)
            killed = killed_after(step, partial(work.do, place))
        try:
            what = work.left(place)
        except BaseException as error:
            raise AssertionError(f"{name}, killed {where} ({step}), left {sorted(content(place))}") from error
        found[where if killed else "ended before"] += 1
        found[what] += 1
        shutil.rmtree(place)
    return found


def _new(place: Path) -> Path:
    place.mkdir()
    return place


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=60, help="of all works; 0: at every step")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--of", nargs="+", choices=WORKS, default=list(WORKS))
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    for number, name in enumerate(asked.of):
        kills = asked.kills // len(asked.of) + (number < asked.kills % len(asked.of))
        with tempfile.TemporaryDirectory(prefix="veneer-kills-") as root:
            found = tried(name, kills, asked.seed, Path(root) / "tries")
        counts = "; ".join(f"{what}: {count}" for what, count in found.items())
        print(f"{name}: {counts}", flush=True)


if __name__ == "__main__":
    main()
