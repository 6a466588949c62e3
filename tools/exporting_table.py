"""Write the table of docs/exporting.md from the targets; with ``--check`` only say whether it is current."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import made_page
from made_page import ROOT

PAGE = ROOT / "docs" / "exporting.md"
BEGIN = "<!-- table: made by `python tools/exporting_table.py` from the targets themselves -->"
END = "<!-- end of table -->"
ORDER = ("vllm", "sglang", "llama.cpp", "ollama", "mlx", "diffusers", "plain")


def page() -> str:
    """The page with a new table in it."""
    text = PAGE.read_text(encoding="utf-8")
    between = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    table = "\n".join(["| an adapter with | " + " | ".join(f"`{name}`" for name in ORDER) + " |", *_rows()])
    return between.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def _rows() -> list[str]:
    from veneer.integrations.export import targets
    from veneer.integrations.export.source import FEATURES

    if sorted(ORDER) != sorted(targets.names()):
        raise SystemExit(f"the targets are {targets.names()}")
    lines = ["|---|" + "---|" * len(ORDER)]
    for feature, title in FEATURES.items():
        cells = [_cell(targets.get(name), feature) for name in ORDER]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _cell(target: object, feature: str) -> str:
    from veneer.integrations.export.base import Target

    assert isinstance(target, Target)
    if feature in target.keeps:
        return "yes"
    if feature in target.sometimes:
        return target.sometimes[feature]
    if feature == "rank_pattern":
        return "padded" if target.rules.one_rank else "yes"
    if feature == "use_rslora":
        return "yes" if target.rules.rslora else "folded"
    if feature == "alpha_pattern":
        return "folded"
    if feature == "dora":
        return "made plain"
    if feature == "lora_bias" and target.name == "plain":
        return "into biases"
    return "no"


if __name__ == "__main__":
    sys.exit(made_page.main(__doc__, page, PAGE))
