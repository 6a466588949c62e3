"""Write what the commands of docs/tools.md print, and its pictures; with ``--check`` write nothing."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import made_page
from made_page import ROOT

from benchmarks._pictures import picture
from veneer.training.plots import INK, STRONG

PAGE, IMAGES = ROOT / "docs" / "tools.md", ROOT / "docs" / "images"
#: Title and labels of each picture.
ANGLES = (
    "What letters and mails share: the angles between the directions of their updates",
    "direction",
    "principal angle in degrees",
)
ERRORS = ("What a smaller rank of letters misses", "rank", "error in % of the update")
SHOWN = ("layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "lm_head", "embed_tokens")
SPECTRA = (
    "How many directions of a weight full training changed",
    "direction",
    "singular value of the change in % of the first",
)
_BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.M | re.S)


def page() -> str:
    """The page with new outputs in it; its blocks run one after the other in an empty directory."""
    return run()[0]


def run(pictures: bool = False) -> tuple[str, dict[str, Any]]:
    """(the page, what its pictures show)."""
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(work)
        try:
            text = _BLOCK.sub(lambda found: _with_output(found, names), text)
            return text, measured() if pictures else {}
        finally:
            os.chdir(before)


def _with_output(found: re.Match[str], names: dict[str, Any]) -> str:
    language, code, shown = found.groups()
    if language == "bash" and shown is None:  # a command whose output the page does not show
        return found[0]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
        else:
            from veneer.cli import main

            for line in code.replace("\\\n", " ").splitlines():
                main(shlex.split(line)[1:])
    block = f"```{language}\n{code}```\n"
    printed = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return block if shown is None else f"{block}```text\n{printed}\n```\n"


#: Lines that are told apart in grey too: colour, style, marker.
STYLES = ((INK, "-", "o"), (STRONG, "--", "s"), ("#7f939d", "-.", "^"), ("#a3adb4", ":", "D"))


def measured() -> dict[str, Any]:
    """What the pictures show, of the adapters that the blocks of the page have made here."""
    from veneer.lora_file import open_lora, updates
    from veneer.ops import low_rank
    from veneer.tools import compare_adapters, extract_adapter, resize_adapter

    extract_adapter("base", "tuned", "whole", rank=64)
    spectra: dict[str, list[float]] = {}
    for update in updates(open_lora("whole")):
        ((b, a),) = update.pairs()
        values = low_rank.spectrum(b, a)
        spectra[update.path.removeprefix("model.")] = (values / values[0]).tolist()
    ranks = range(1, 9)
    resized = [resize_adapter("letters", f"letters of {rank}", rank=rank) for rank in ranks]
    paths = {path.removeprefix("model."): path for path in resized[0].modules if ".1." in path}
    return {
        "angles": compare_adapters("letters", "mails").modules,
        "errors": {name: [report.modules[path].error for report in resized] for name, path in paths.items()},
        "spectra": {name: spectra[name] for name in SHOWN},
    }


def draw(found: Mapping[str, Any]) -> None:
    """The pictures of the page."""
    with picture(IMAGES / "tools-diff.png", *ANGLES) as axes:
        styles = iter(STYLES)
        for path, module in found["angles"].items():
            for side in ("inputs", "outputs"):
                angles = getattr(module, side)
                label = f"{path.removeprefix('model.')}, {side}"
                _line(axes, angles.degrees, label, next(styles))
        chance = math.degrees(math.acos(angles.chance**0.5))
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
        right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        axes.annotate("by chance", (1, chance), (-4, -11), fontsize=8, **right)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(0.8, None)
        axes.set(ylim=(0, 95), yticks=range(0, 91, 15))
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    for place, words, values in (("resize", ERRORS, "errors"), ("extract", SPECTRA, "spectra")):
        with picture(IMAGES / f"tools-{place}.png", *words) as axes:
            for (name, line), style in zip(found[values].items(), STYLES, strict=False):
                _line(axes, [100 * value for value in line], name, style)
            axes.set_ylim(0, None)
            axes.legend(frameon=False, fontsize=9)


def _line(axes: Any, values: Sequence[float], label: str, style: tuple[str, str, str]) -> None:
    colour, line, marker = style
    few = len(values) <= 16
    axes.plot(
        range(1, len(values) + 1),
        values,
        color=colour,
        linestyle=line,
        marker=marker,
        markersize=5 if few else 4,
        markevery=1 if few else 8,
        label=label,
    )


def page_and_pictures() -> str:
    """The page, once its pictures are drawn."""
    text, found = run(pictures=True)
    draw(found)
    return text


if __name__ == "__main__":
    sys.exit(made_page.main(__doc__, page if "--check" in sys.argv else page_and_pictures, PAGE))
