"""The site has every page and every public name, and its figures are those of the sources."""

from __future__ import annotations

import re

import veneer
import veneer.errors
import veneer.family
import veneer.tools
import veneer.training
from tests.docs.pages import ROOT

DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_each_public_name_is_in_the_reference_once() -> None:
    pages = sorted((DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: (veneer\.\S+)$", "\n".join(page.read_text() for page in pages), re.M)
    for package in (veneer.training, veneer.tools, veneer.family):  # they have public names of their own
        mine = [name for name in shown if name.startswith(f"{package.__name__}.")]
        assert sorted(mine) == sorted(f"{package.__name__}.{name}" for name in package.__all__)
        shown = [name for name in shown if name not in mine]
    rest = [name.rpartition(".")[2] for name in shown] + ["Family"]
    assert sorted(rest) == sorted(veneer.__all__)


def test_each_page_is_in_the_navigation_once() -> None:
    navigation = re.findall(r"([\w./-]+\.md)$", SITE.partition("\nnav:\n")[2], re.M)
    assert sorted(navigation) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_learning_rates_are_those_of_the_guides_scripts() -> None:
    page = (DOCS / "how-to" / "rank-and-learning-rate.md").read_text(encoding="utf-8")
    rows = re.findall(r"guides/(\w+)\.md\) \| (\S+) \| (\S+) \|", page)
    assert len(rows) == 4
    for name, *rates in rows:
        source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        line = re.search(r"^(?:RATES|LEARNING_RATE) = \{(.*)\}", source, re.M)
        assert line is not None
        found = re.findall(r'(LORA|"LoRA"|"full[^"]*"): (\S+?)(?:,|$)', line[1])
        assert [rate for _, rate in found] == rates, name


def test_troubleshooting_has_every_error_and_quotes_what_is_said() -> None:
    page = (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    kinds = (veneer.errors.VeneerError, veneer.errors.VeneerWarning)
    classes = [
        name
        for name, value in vars(veneer.errors).items()
        if isinstance(value, type) and issubclass(value, kinds)
    ]
    assert len(classes) > 10
    assert re.findall(r"^## `(\w+)`$", page, re.M) == classes
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    quoted = re.findall(r'^- \*\*"(.*)":\*\*', page, re.M)
    parts = [part.strip(" ;") for quote in quoted for part in quote.split("…") if part.strip(" ;")]
    assert len(parts) > 8
    assert [part for part in parts if part not in said] == []
