"""What the examples share: methods side by side, seeds, a table, a JSON file, claims that are checked.

An example passes its own functions::

    study = Study(__doc__)                      # reads the flags: --short, --out, --seeds
    study.compare(METHODS, build, train, score, once=("base",))
    study.claim("LoRA beats the base", study.lowest("LoRA") > study.highest("base"))
    study.picture()
    return study.finish()                       # prints, writes, 0 if every claim holds, else 1

``build(method)`` returns a model, ``train(model, method, seed)`` trains it, and ``score(model)`` returns
named scores, the main one first. A model without trainable parameters is not trained.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from veneer import PeftModel, get_peft_model_state_dict
from veneer.training.plots import INK, PALE, STRONG
from veneer.training.progress import Terminal

RESULTS = Path(__file__).resolve().parent / "results"
#: Pretrained models that came as packages, see requirements/models.txt; `make setup-test` fetches them.
MODELS = RESULTS.parent.parent / ".cache" / "models"
#: For transformers' TrainingArguments and their kin: nothing is written, nothing is logged.
QUIET: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
PACKAGES = ("veneer", "torch", "transformers", "trl", "diffusers")
# Optional libraries of transformers say on import which of their kernels this machine does not have.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
#: Of bars and lines: the adapter's is the third.
COLOURS = (PALE, "#8fa3ad", STRONG, INK, "#c8772e", "#6a4c93")


@dataclass
class Row:
    """The results of one method, for every seed."""

    method: str
    trainable: int
    parameters: int
    saved_bytes: int
    scores: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """The main score, seed by seed."""
        return next(iter(self.scores.values()))


class Study:
    """One example's run: its flags, its rows, its claims.

    Attributes:
        short: Whether to run the short form, which only shows that everything works.
        part: The held-out part to score: ``"test"``, or ``"validation"`` with the flag of that name, on which
            learning rates and set-up were chosen.
        out: Directory for the results; it exists.
        seeds: The seeds: one in the short form, three otherwise, unless ``--seeds`` says how many.
        rows: What `compare` found, by method.
        extra: More for the JSON file.
    """

    def __init__(
        self, doc: str | None, arguments: argparse.ArgumentParser | None = None, validation: bool = False
    ) -> None:
        self.name = Path(sys.argv[0]).stem
        self.title = (doc or "").strip().split("\n", 1)[0]
        parser = arguments or argparse.ArgumentParser()
        parser.description = self.title
        parser.add_argument("--short", action="store_true", help="a short form of about ten seconds")
        parser.add_argument("--seeds", type=int, help="how many (1 in the short form, otherwise 3)")
        parser.add_argument("--out", type=Path, help="directory for the results (examples/results/NAME)")
        if validation:
            what = "score the examples on which rates and set-up were chosen, not the test"
            parser.add_argument("--validation", action="store_true", help=what)
        self.options = parser.parse_args()
        _hush()
        self.short: bool = self.options.short
        self.part = "validation" if getattr(self.options, "validation", False) else "test"
        self.seeds = range(self.options.seeds or (1 if self.short else 3))
        self.out: Path = self.options.out or RESULTS / self.name
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        self.claims: dict[str, bool] = {}
        self.extra: dict[str, Any] = {}
        self.progress = Terminal()
        self._begun = (time.perf_counter(), _cpu())
        self._spent = self.out / f"spent{'-short' * self.short}.json"
        self._console = Console(record=True, width=114, highlight=False)
        self._console.print(f"[bold]{self.title}[/bold]")

    def compare(
        self,
        methods: Iterable[str],
        build: Callable[[str], Any],
        train: Callable[[Any, str, int], object],
        score: Callable[[Any], Mapping[str, float]],
        *,
        once: Collection[str] = (),
        save: Callable[[Any, Path], object] | None = None,
    ) -> None:
        """Build, train and score every method with every seed; those in ``once`` with the first one only.

        Args:
            methods: Their names, as the table shall show them.
            build: The model of a method, with that gradient asked for which the method trains.
            train: Trains a model, by the method's name and the seed. Only this is timed.
            score: Named figures of a model, the one that counts first.
            once: Methods in which nothing is drawn.
            save: Writes into a directory what somebody would keep; `keep` unless given.
        """
        for method in methods:
            for seed in self.seeds[:1] if method in once else self.seeds:
                seed_all(seed)
                model = build(method)
                trainable = _trainable(model)
                start = (time.perf_counter(), time.process_time())
                if trainable:
                    train(model, method, seed)
                spent = (time.perf_counter() - start[0], time.process_time() - start[1])
                scores = score(model)
                if method not in self.rows:
                    size = _saved_bytes(model, save or keep) if trainable else 0
                    total = sum(p.numel() for p in model.parameters())
                    self.rows[method] = Row(method, trainable, total, size, {name: [] for name in scores})
                row = self.rows[method]
                for name, value in scores.items():
                    row.scores[name].append(float(value))
                row.seconds.append(spent[0])
                row.cpu_seconds.append(spent[1])
                said = ", ".join(f"{name} {short(value)}" for name, value in scores.items())
                self.progress.say(f"  {method}, seed {seed}: {said}; {spent[0]:.0f} s of training")
                del model
                gc.collect()

    def median(self, method: str, score: str | None = None) -> float:
        """The median over the seeds, of the score that counts or of another."""
        return statistics.median(self._values(method, score))

    def lowest(self, method: str, score: str | None = None) -> float:
        """The lowest value of any seed."""
        return min(self._values(method, score))

    def highest(self, method: str, score: str | None = None) -> float:
        """The highest value of any seed."""
        return max(self._values(method, score))

    def _values(self, method: str, score: str | None) -> list[float]:
        row = self.rows[method]
        return row.values if score is None else row.scores[score]

    def go_on(self) -> None:
        """Count the time of earlier calls too, up to the last `keep_time` of each."""
        if self._spent.is_file():
            wall, cpu = json.loads(self._spent.read_text(encoding="utf-8"))
            self._begun = (self._begun[0] - wall, self._begun[1] - cpu)

    def keep_time(self) -> None:
        """Write down the time so far: what was done in it, the next call need not do again."""
        write(self._spent, json.dumps([time.perf_counter() - self._begun[0], _cpu() - self._begun[1]]))

    def claim(self, what: str, holds: bool) -> None:
        """Something that must hold, or the example exits with 1."""
        self.claims[what] = bool(holds)

    def show(self, what: Any) -> None:
        """Print something, a line or a table of rich; the page of the example shows it too."""
        self._console.print(what)

    def figure(self, width: float = 9.0, height: float = 4.0, **columns: Any) -> Any:
        """A figure of matplotlib and its axes, ``subplots(**columns)``; give it back to `save_figure`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.subplots(**columns)

    def save_figure(self, figure: Any, name: str | None = None) -> Path:
        """Write the picture beside the results, as ``<example>.png`` or ``<example>-<name>.png``."""
        path = self.out / f"{self.name}{'-' + name if name else ''}.png"
        figure.savefig(path)
        return path

    def picture(self, score: str | None = None, floor: float | None = None) -> None:
        """Draw a bar for every method: its median, a dot for every seed; with a line at ``floor``."""
        figure, axes = self.figure(7.5, 0.9 + 0.5 * len(self.rows))
        rows = list(self.rows.values())[::-1]
        for place, row in enumerate(rows):
            values = row.values if score is None else row.scores[score]
            colour = STRONG if "LoRA" in row.method else PALE if not row.trainable else COLOURS[1]
            middle = statistics.median(values)
            axes.barh(place, middle, 0.7, color=colour)
            axes.scatter(values, [place] * len(values), color="white", edgecolor=INK, s=14, zorder=3)
            label = f" {short(middle)}   {_count(row.trainable)} trained"
            axes.annotate(
                label, (max(values), place), xytext=(5, 0), textcoords="offset points", va="center", size=8
            )
        axes.set_xlim(0, max(max(row.scores[score] if score else row.values) for row in rows) * 1.35)
        if "%" in (score or next(iter(rows[0].scores))):
            axes.set_xticks(range(0, 101, 20))
        if floor is not None:
            axes.axvline(floor, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows)), [row.method for row in rows])
        axes.set_xlabel(score or next(iter(rows[0].scores)))
        axes.spines[["top", "right"]].set_visible(False)
        self.save_figure(figure)

    def finish(self) -> int:
        """Print the table, the machine and the claims, write them, and give the exit code."""
        if self.rows:
            self.show(self.table())
        where = machine()
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        wall, cpu = time.perf_counter() - self._begun[0], _cpu() - self._begun[1]
        for what, holds in self.claims.items():
            self.show(f"{'[green]holds[/green]' if holds else '[bold red]FAILS[/bold red]'}  {what}")
        self.show(
            f"\n{'short form, ' * self.short}{wall:.0f} s, {cpu:.0f} CPU seconds; {where['processor']}, "
            f"{where['cores']} cores, {where['threads']} threads, Python {where['python']}, {versions}"
        )
        content = {
            "name": self.name,
            "short": self.short,
            "seeds": list(self.seeds),
            "part": self.part,
            "machine": where,
            "seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "rows": [asdict(row) for row in self.rows.values()],
            "claims": self.claims,
            "passed": all(self.claims.values()),
            "extra": self.extra,
        }
        write(self.out / f"{self.name}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self._console.print(f"Written to {self.out}", soft_wrap=True)
        write(self.out / f"{self.name}.txt", self._console.export_text().rpartition("\nWritten to ")[0])
        return 0 if content["passed"] else 1

    def table(self) -> Table:
        """The rows, each score as the median with the lowest and highest of the seeds."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("", no_wrap=True)
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row.scores))
        for name in names:
            table.add_column(name, justify="right", overflow="fold")
        for name in ("trained", "CPU s", "saved"):
            table.add_column(name, justify="right", no_wrap=True)
        # Many scores find room below one another.
        gap = " " if len(names) < 3 else "\n"
        for row in self.rows.values():
            part = f"{_count(row.trainable)} ({100 * row.trainable / row.parameters:.3g} %)"
            table.add_row(
                row.method,
                *(spread(row.scores[name]).replace(" ", gap) if name in row.scores else "" for name in names),
                part if row.trainable else "–",
                short(statistics.median(row.cpu_seconds)) if row.trainable else "–",
                _size(row.saved_bytes) if row.trainable else "–",
            )
        table.caption = "trained: parameters; CPU s: of training, the median"
        if len(self.seeds) > 1:
            table.caption = f"median (lowest–highest) of {len(self.seeds)} seeds; {table.caption}"
        return table


def _cpu() -> float:
    """CPU seconds of this process and of its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _hush() -> None:
    """Silence other libraries, except for errors."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_error()
        sys.modules["transformers"].logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def quiet(trainer: Any) -> Any:
    """A transformers trainer that does not print its log."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def seed_all(seed: int) -> None:
    """Seed all random generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def keep(model: Any, folder: Path) -> None:
    """Save what has to be kept of a model: the adapter, or without one the trained parameters."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return
    trained = {
        name: p.detach().clone().contiguous() for name, p in model.named_parameters() if p.requires_grad
    }
    save_file(trained, folder / "trained.safetensors")


def _trainable(model: Any) -> int:
    """The number of trained parameters; with several adapters, of all of them together."""
    if isinstance(model, PeftModel) and len(model.peft_config) > 1:
        states = (get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config)
        return sum(tensor.numel() for state in states for tensor in state.values())
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _saved_bytes(model: Any, save: Callable[[Any, Path], object]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def machine() -> dict[str, Any]:
    """The processor, its count, and the versions of what the examples use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").partition(":")[2].strip()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def short(value: float) -> str:
    """One digit after the point, or three if the number is small."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def spread(values: Sequence[float]) -> str:
    """Median, and lowest and highest where there are several."""
    middle = short(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({short(min(values))}–{short(max(values))})"


def _count(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} M"
    return f"{number / 1e3:.1f} k" if number >= 1000 else str(number)


def _size(number: int) -> str:
    return f"{number / 1e6:.3g} MB" if number >= 1e5 else f"{number / 1e3:.3g} kB"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def run(main: Callable[[], int]) -> None:
    """Run an example's ``main`` as a program, with a line instead of a traceback on Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: no results were written")
