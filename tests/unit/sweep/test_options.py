"""The grid of a sweep, and what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError, MissingExtraError, TrainingError, UnknownOptionError, VeneerError
from veneer.sweep.options import HELD_OUT, SweepOptions, check_sweep, options_and_grid
from veneer.sweep.trial import short

GIVEN = {"model": "m", "data": "d", "output": "o", "seeds": None}


def test_flags_and_yaml_make_one_grid(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "model: m\ndata: d\noutput: o\nseeds: 3\n"
        "grid:\n  r: [4, 16]\n  learning-rate: [1e-4, 1e-3]\n"
        "  target_modules: [all-linear, [q_proj, v_proj]]\n"
    )
    options, grid = options_and_grid(file, {"seeds": 2}, ["lora_r=8", "use_dora=true,false"])
    assert options.seeds == 2 and options.validation_split == HELD_OUT
    assert grid == {
        "lora_r": [8],
        "learning_rate": [1e-4, 1e-3],
        "lora_target_modules": ["all-linear", "q_proj,v_proj"],
        "use_dora": [True, False],
    }
    _, grid = options_and_grid(None, GIVEN, ["lora_target_modules=q_proj,v_proj; all-linear"])
    assert grid == {"lora_target_modules": ["q_proj,v_proj", "all-linear"]}
    assert len(options.points(grid)) == 2
    options, _ = options_and_grid(None, {**GIVEN, "eval_data": "e"}, ["lora_r=8"])
    assert options.validation_split == 0.0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "a sweep needs a grid of options to try"),
        (["lora_r"], r"grid takes NAME=VALUE,VALUE, not 'lora_r'"),
        (["lora_r=4,"], "NAME=VALUE"),
        (["lora_r=4", "lora_r=8"], "grid has lora_r twice"),
        (["lora_r=4,4"], "lora_r has a value twice"),
        (["lora_r=4", "r=8"], "lora_r is given twice"),
        (
            ["lora_r=4,x", "learning_rate=fast"],
            r"lora_r must be a whole number.*learning_rate must be a number",
        ),
        (["lora_r=0,-1"], "values that cannot be used: .*r"),
        (["learning_rate=0", "batch_size=0"], "learning_rate must be above 0.*batch_size must be above 0"),
        (
            ["model=a,b", "seed=1,2"],
            "model is the same for all runs of a sweep.*; seeds=3 trains each configuration with",
        ),
        (["init_lora_weights=eva,pissa"], "eva.* is measured on the data"),
        (["output=a"], "output is the same"),
        (
            [
                f"{name}={','.join(map(str, range(1, 23)))}"
                for name in ("lora_r", "lora_alpha", "warmup_steps")
            ],
            "the grid has 10,648 configurations; at most 10,000 can be compared",
        ),
    ],
)
def test_bad_grids_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options_and_grid(None, GIVEN, flags)


def test_all_unknown_names_are_listed() -> None:
    with pytest.raises(
        UnknownOptionError, match=r"'lora_rank'.*'lerning_rate' .did you mean 'learning_rate'"
    ):
        options_and_grid(None, GIVEN, ["lora_rank=4", "lerning_rate=1"])


def test_everything_that_is_wrong_comes_at_once(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("model: m\nouput: o\nepochs: many\nseeds: 0\ngrid: {lora_rank: [4], lora_r: [x, 4]}")
    with pytest.raises(ConfigError) as caught:
        options_and_grid(file, {"data": "d", "batch_size": 0}, ["lora_alpha", "lora_dropout=2", "use_dora=,"])
    lines = str(caught.value).splitlines()
    assert "'ouput' (did you mean 'output'?); epochs must be a number, not 'many'" in lines[0]
    assert lines[1].endswith("unknown option 'lora_rank' (did you mean 'lora_r'?). The options are those of "
                             "`veneer train`.")  # fmt: skip
    assert lines[2] == f"grid of {file}: lora_r must be a whole number, not 'x'"
    assert [line.split("; ") for line in lines[3:4]] == [
        [f"grid takes NAME=VALUE,VALUE, not {flag!r}" for flag in ("lora_alpha", "use_dora=,")]
    ]
    for said in ("output is missing", "batch_size must be above 0", "seeds must be above 0", "lora_dropout"):
        assert said in lines[4]
    assert len(lines) == 5


def test_a_grid_in_a_file_needs_lists(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    for text in ("grid: {lora_r: 4}", "grid: [4]", "grid: {lora_r: []}"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="each option needs a list of values"):
            options_and_grid(file, GIVEN, [])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_r": 8}, "lora_r is in the grid and given beside it"),
        ({"method": "dpo", "packing": True}, "method is nothing for a sweep.*packing is nothing for a sweep"),
        ({"memory": "1%"}, "memory is a size such as 8GB, not '1%'"),
        ({"memory": "much"}, "memory is a size such as 8GB, not 'much'"),
        ({"seeds": 0}, "seeds must be above 0"),
    ],
)
def test_options_that_do_not_go_with_a_sweep(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        options_and_grid(None, {**GIVEN, **given}, ["lora_r=4,8"])


def test_values_are_short() -> None:
    assert [short(v) for v in (1e-4, 3e-4, 0.05, 0.00123, 16.0, 4, True, "pissa")] == [
        "1e-4", "3e-4", "0.05", "1.23e-3", "16", "4", "True", "pissa",
    ]  # fmt: skip


def test_where_ray_runs_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model": "m", "data": "d", "output": "o"}
    for address in ("local", "auto", "10.0.0.1:6379", "ray://head:10001", "[::1]:6379"):
        SweepOptions(**given, ray=address, ray_workers=2)
    with pytest.raises(ConfigError, match=r"ray is local, auto or HOST:PORT, not 'sweep\.yaml'"):
        SweepOptions(**given, ray="sweep.yaml")
    with pytest.raises(ConfigError, match="ray_workers are those of a Ray cluster: give ray='local'"):
        SweepOptions(**given, ray_workers=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ray needs ray, .* pip install 'veneer\[ray\]'"):
        check_sweep(SweepOptions(**given, ray="local"))


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TrainingError, match="a sweep starts its own processes: start it without a launcher"):
        check_sweep(SweepOptions(model="m", data="d", output="o"))


def test_what_a_sweep_left_that_was_killed_at_once_is_no_obstacle(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "config.json").write_text("{}")
    (output / ".veneer-0123456789abcdef.tmp").write_text('{"finished": fal')
    options = SweepOptions(model=str(tmp_path), data=str(tmp_path / "data.jsonl"), output=str(output))
    check_sweep(options)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(VeneerError, match="is not empty; choose another one"):
        check_sweep(options)
