"""diffusers with Veneer in the place of peft: everything that the reference does, and files both ways.

`diffusion_life.py` is run in fresh processes by the reference, by Veneer where peft is absent, and by Veneer
where it is installed. What they answered is compared here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.interop.diffusion_life import CHAPTERS, CONFIGS
from tests.processes import run_python
from tests.tolerances import TRAINING, assert_close

ROOT = Path(__file__).resolve().parents[2]
DOORS = ("the reference", "peft absent", "peft installed")
OURS = DOORS[1:]
REGISTER = "from veneer.as_peft import register_as_peft\nregister_as_peft()\n"
PREPARE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.interop import diffusion_life
"""
LIVE = "diffusion_life.live(Path(sys.argv[2]), exact=EXACT)\n"
READ = "save_file(diffusion_life.read_files(Path(sys.argv[2])), sys.argv[3])\n"
#: Merging one of several leaves the others at work; the reference then computes without them.
OTHERWISE = {"fusing/named": "fusing/named, not fused", "fusing/not active": "fusing/active, not fused"}


class Life(NamedTuple):
    told: dict[str, dict[str, Any]]
    drawn: dict[str, Tensor]
    place: Path


def _run(door: str, nopeft_python: Path, code: str, *arguments: Path) -> None:
    first = "" if door == DOORS[0] else REGISTER
    code = first + PREPARE + code.replace("EXACT", str(door in OURS))
    run_python(code, ROOT, *arguments, python=nopeft_python if door == "peft absent" else sys.executable)


@pytest.fixture(scope="module")
def lives(nopeft_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Life]:
    found = {}
    for door in DOORS:
        place = tmp_path_factory.mktemp("life")
        _run(door, nopeft_python, LIVE, place)
        told = json.loads((place / "told.json").read_text())
        found[door] = Life(told, load_file(place / "drawn.safetensors"), place)
    return found


@pytest.fixture(scope="module")
def readings(
    lives: dict[str, Life], nopeft_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What one library draws with the other's files, by (reader, writer); and ours with our own."""
    found = {}
    for reader, writers in (("the reference", DOORS[:2]), ("peft absent", DOORS[:2])):
        outs = [tmp_path_factory.mktemp("read") / "drawn.safetensors" for _ in writers]
        pairs = [(lives[writer].place, out) for writer, out in zip(writers, outs, strict=True)]
        code = "".join(
            READ.replace("sys.argv[2]", f"sys.argv[{2 + 2 * i}]").replace(
                "sys.argv[3]", f"sys.argv[{3 + 2 * i}]"
            )
            for i in range(len(pairs))
        )
        _run(reader, nopeft_python, code, *(path for pair in pairs for path in pair))
        found.update({(reader, w): load_file(out) for w, out in zip(writers, outs, strict=True)})
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
@pytest.mark.parametrize("door", DOORS)
def test_it_runs(lives: dict[str, Life], door: str, chapter: str) -> None:
    """With `exact`, also: what was fused comes out bit for bit, and there is nothing to warn of."""
    assert "error" not in lives[door].told[chapter], lives[door].told[chapter]["error"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_answers_are_those_of_the_reference(lives: dict[str, Life], chapter: str) -> None:
    ours, theirs = lives["peft absent"], lives["the reference"]
    assert ours.told[chapter] == theirs.told[chapter]
    of_chapter = {key for key in theirs.drawn if key.startswith(f"{chapter}/")}
    assert of_chapter and of_chapter == {key for key in ours.drawn if key.startswith(f"{chapter}/")}
    for key in sorted(of_chapter - set(OTHERWISE)):
        size = theirs.drawn[key].std()
        tolerance = TRAINING if chapter == "training" else None
        assert_close(ours.drawn[key] / size, theirs.drawn[key] / size, tolerance)


def test_both_environments_give_the_same_bits(lives: dict[str, Life]) -> None:
    first, second = (lives[door] for door in OURS)
    assert first.told == second.told and first.drawn.keys() == second.drawn.keys()
    assert all(torch.equal(value, second.drawn[key]) for key, value in first.drawn.items())


def test_fusing_one_of_several_keeps_the_others(lives: dict[str, Life]) -> None:
    drawn = lives["peft absent"].drawn
    for fused, wanted in OTHERWISE.items():
        assert_close(drawn[fused] / drawn[wanted].std(), drawn[wanted] / drawn[wanted].std())


def test_what_is_drawn_depends_on_what_was_asked(lives: dict[str, Life]) -> None:
    """Pictures that were to differ differ, or the comparisons above prove nothing."""
    drawn = lives["peft absent"].drawn
    differing = ["base", "half", "both", "two numbers", "component", "block", "one", "scaled in the call"]
    for i, first in enumerate(differing):
        for second in differing[i + 1 :]:
            apart = (drawn[f"switching/{first}"] - drawn[f"switching/{second}"]).abs().max()
            assert apart > 0.05, (first, second)
    losses = drawn["training/losses"]
    assert losses[-1] < losses[0]


def test_a_kohya_file_does_what_its_numbers_say(lives: dict[str, Life]) -> None:
    drawn = lives["peft absent"].drawn
    size = drawn["kohya/by hand"].std()
    assert_close(drawn["kohya/loaded"] / size, drawn["kohya/by hand"] / size)
    assert (drawn["kohya/loaded"] - drawn["switching/base"]).abs().max() > 0.05


@pytest.mark.parametrize("name", [*CONFIGS, "flux", "dora"])
def test_the_files_hold_the_same_tensors(lives: dict[str, Life], name: str) -> None:
    file = f"{name}/pytorch_lora_weights.safetensors"
    ours, theirs = (load_file(lives[door].place / file) for door in ("peft absent", "the reference"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "lora_magnitude" in key:
            assert_close(ours[key], value)
        else:
            assert torch.equal(ours[key], value), key


def test_files_are_read_both_ways(
    lives: dict[str, Life], readings: dict[tuple[str, str], dict[str, Tensor]]
) -> None:
    ours, theirs = "peft absent", "the reference"
    for reader in (ours, theirs):
        mine, foreign = readings[reader, reader], readings[reader, theirs if reader == ours else ours]
        for name in (*CONFIGS, "flux"):
            assert torch.equal(mine[name], foreign[name]), (reader, name)
    for name in (*CONFIGS, "flux", "dreambooth"):
        expected = readings[theirs, ours][name]
        assert_close(readings[ours, ours][name] / expected.std(), expected / expected.std())


def test_a_dreambooth_run_is_drawn_again_in_a_fresh_process(
    lives: dict[str, Life], readings: dict[tuple[str, str], dict[str, Tensor]]
) -> None:
    drawn = lives["peft absent"].drawn["training/drawn"]
    assert torch.equal(readings["peft absent", "peft absent"]["dreambooth"], drawn)
    assert (drawn - lives["peft absent"].drawn["switching/base"]).abs().max() > 0.05
