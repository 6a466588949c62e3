"""`veneer eval`: base beside one adapter or several, as a table and as JSON; a classifier's accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, saved_records, saved_tiny, tiny_tokenizer
from veneer import LoraConfig, get_peft_model
from veneer.cli import main
from veneer.training import adapters, load_base


def test_eval(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(adapter), "--data", str(saved_records(tmp_path / "held.jsonl"))]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["tokens"], found["asked"]) == (16, 48, 16)
    assert found["adapter"]["loss"] < found["base"]["loss"]
    assert found["adapter"].keys() == found["base"].keys() == {"loss", "perplexity", "exact"}
    assert main([*words, "--no-exact-match", "--max-samples", "5"]) == 0
    captured = capsys.readouterr()
    assert "perplexity" in captured.out and "exact match" not in captured.out and "\x1b" not in captured.out
    assert "columns prompt + completion" in captured.err and "the first 5 of them" in captured.err
    assert "5 examples" in captured.err


def test_eval_of_a_merged_and_of_a_plain_model(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--data", str(saved_records(tmp_path / "held.jsonl")), "--no-exact-match", "--json"]
    assert main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    found = {}
    for place in (adapter, tmp_path / "merged", base):
        capsys.readouterr()
        assert main(["eval", str(place), *rest]) == 0
        captured = capsys.readouterr()
        found[place.name] = json.loads(captured.out)
        kind = "an adapter" if place == adapter else "a whole model"
        assert f"{place} is {kind}" in captured.err
    assert found["merged"].keys() == {"model_path", "data", "examples", "tokens", "model"}
    for name, expected in (("merged", "adapter"), (base.name, "base")):
        loss = torch.tensor(found[name]["model"]["loss"])
        assert_close(loss, torch.tensor(found["adapter"][expected]["loss"]))
    assert main(["eval", str(base), *rest[:-1]]) == 0
    table = capsys.readouterr().out
    assert "model" in table and "base" not in table


def test_eval_says_what_is_neither_an_adapter_nor_a_model(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = saved_records(tmp_path / "held.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    for words, code, said in (
        (["empty"], 1, "contains neither an adapter (adapter_config.json) nor a model (config.json)"),
        (["broken"], 1, "adapter_model.safetensors"),
        ([str(base), "--model", str(base)], 2, "--model names an adapter's base"),
        ([f"{adapter.name}s"], 1, "is neither an adapter nor a model"),
        (["nobody/nothing"], 1, "nobody/nothing"),
    ):
        if words[0] in ("empty", "broken"):
            words = [str(tmp_path / words[0])]
        assert main(["eval", *words, "--data", str(data)]) == code
        assert said in capsys.readouterr().err


def test_eval_of_columns_with_other_names(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "held.csv"
    data.write_text("question,answer\nDouble 2.,4\n")
    words = ["eval", str(adapter), "--data", str(data), "--json", "--no-exact-match"]
    assert main([*words, "--columns", "prompt=question,completion=answer"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 1
    assert main([*words, "--columns", "prompt=qestion,completion=answer"]) == 1
    assert "--columns: " in (said := capsys.readouterr().err) and "did you mean 'question'" in said


def test_eval_refuses_bad_data_before_the_base_is_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("veneer.training.adapters.load_base", None)
    data = tmp_path / "data.csv"
    for content, said in (
        ("promt,completion\na,b\n", "'promt' should perhaps be 'prompt'"),
        ("", "no records"),
    ):
        data.write_text(content)
        assert main(["eval", str(adapter), "--data", str(data)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and said in captured.err
    for words, said in (
        (["--data", str(data), "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--data", str(data), "--columns", "promt=a"], "--columns: 'promt' is no column"),
        ([], "--data"),
    ):
        assert main(["eval", str(adapter), *words]) == 2
        assert said in capsys.readouterr().err


def made(base: Path, place: Path, **options: Any) -> Path:
    """An adapter that was never trained, drawn at random."""
    torch.manual_seed(len(place.name))
    options = {"r": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options}
    get_peft_model(load_base(base)[0], LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(place)
    return place


def measured(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same answers, and the same loss but for the order of sums in a larger batch."""
    assert found.keys() == expected.keys() and found.get("exact") == expected.get("exact")
    assert found.get("correct") == expected.get("correct")
    assert_close(torch.tensor(found["loss"]), torch.tensor(expected["loss"]))


def test_several_adapters_are_measured_as_one_at_a_time(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [adapter, made(base, tmp_path / "plain"), made(base, tmp_path / "dora", use_dora=True, r=5)]
    named, data = [str(place) for place in places], str(saved_records(tmp_path / "held.jsonl"))
    # At most two of the four examples of a batch fit into a mixed one with all adapters.
    rest = ["--data", data, "--max-samples", "5", "--batch-size", "4", "--max-length", "60"]
    with mock.patch.object(adapters, "load_base", wraps=load_base) as loading:
        found = measured([*named, *rest], capsys)
    assert loading.call_count == 1
    assert found.keys() == {"data", "examples", "tokens", "asked", "base", "adapters"}
    assert list(found["adapters"]) == named
    for name in named:
        alone = measured([name, *rest], capsys)
        assert [alone[key] for key in ("examples", "tokens", "asked")] == [5, 15, 5]
        assert_same(found["adapters"][name], alone["adapter"])
        assert_same(found["base"], alone["base"])
    assert len({score["loss"] for score in found["adapters"].values()}) == 3
    assert main(["eval", *named, *rest, "--no-exact-match"]) == 0
    captured = capsys.readouterr()
    table = [line for line in captured.out.splitlines() if "│" in line]
    assert len(table) == 4 and table[0].split()[1:3] == ["base", "│"] and "perplexity" not in table[0]
    assert [line.split()[1] for line in table[1:]] == named
    assert "3 adapters of one base" in captured.err and "in mixed batches" in captured.err


def test_adapters_that_cannot_be_measured_together_are_named_at_once(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_base, elsewhere = saved_tiny(tmp_path / "other", seed=1), tmp_path / "elsewhere"
    made(other_base, elsewhere, bias="lora_only")
    noted = {"options": {"quantize": "nf4"}}
    (elsewhere / "metrics.json").write_text(json.dumps(noted))
    rest = ["--data", str(saved_records(tmp_path / "held.jsonl"))]
    assert main(["eval", str(adapter), str(adapter), str(elsewhere), *rest]) == 2
    said = capsys.readouterr().err
    for part in (
        f"{adapter}, {adapter} are the same directory: name it once",
        f"their bases differ ({adapter}, {adapter}: {base}; {elsewhere}: {other_base})",
        "or pass --model",
        f"{elsewhere}: nf4",
        f"{elsewhere}: trains biases of the base",
    ):
        assert part in said
    missing = [str(tmp_path / name) for name in ("a", "b", "gone.jsonl")]
    assert main(["eval", str(adapter), *missing[:2], "--data", missing[2]]) == 1
    said = capsys.readouterr().err
    assert all(path in said for path in missing)


def test_adapters_that_change_nothing_are_refused_by_name(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = made(base, tmp_path / "idle", init_lora_weights=True)
    rest = ["--data", str(saved_records(tmp_path / "held.jsonl")), "--no-exact-match"]
    for named in ([str(idle)], [str(adapter), str(idle)]):
        assert main(["eval", *named, *rest]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and f"{idle} changes nothing" in captured.err
        assert f"{adapter} changes" not in captured.err


def test_adapters_with_other_tokenizers_are_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made(base, tmp_path / "other")
    tiny_tokenizer("{% for m in messages %}[{{ m['content'] }}]{% endfor %}").save_pretrained(other)
    data = tmp_path / "held.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    assert main(["eval", str(adapter), str(other), "--data", str(data)]) == 1
    assert f"beside {other} lays the data out in another way" in capsys.readouterr().err


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return made_classifier(saved_tiny(tmp_path / "base"), tmp_path / "classifier")


def made_classifier(base: Path, place: Path, r: int = 4) -> Path:
    torch.manual_seed(r)
    model, _ = load_base(base, label_names=["odd", "even"])
    config = LoraConfig(r=r, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    (place / "metrics.json").write_text('{"label_names": ["odd", "even"]}')
    return place


def test_several_classifiers_are_measured_as_one_at_a_time(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made_classifier(tmp_path / "base", tmp_path / "other", r=2)
    data = tmp_path / "texts.csv"
    data.write_text("text,label\n" + "".join(f"Is {n}?,{('even', 'odd')[n % 2]}\n" for n in range(7)))
    rest = ["--data", str(data), "--batch-size", "3"]
    found = measured([str(classifier), str(other), *rest], capsys)
    assert found["commonest"] == 4 / 7 and "base" not in found
    losses = set()
    for place in (classifier, other):
        alone = measured([str(place), *rest], capsys)
        assert_same(found["adapters"][str(place)], alone["adapter"])
        losses.add(alone["adapter"]["loss"])
    assert len(losses) == 2


def test_eval_of_a_classifier(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "texts.csv"
    data.write_text("text,label\n" + "".join(f"Is {n}?,{('even', 'odd')[n % 2]}\n" for n in range(7)))
    words = ["eval", str(classifier), "--data", str(data)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 7 and 0 <= found["adapter"]["correct"] <= 7
    assert found["commonest"] == 4 / 7 and "base" not in found
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "accuracy" in captured.out and "57.1%" in captured.out
    assert "7 examples: odd 3, even 4" in captured.err
    data.write_text("text,label\na,evn\n")
    assert main(words) == 1
    assert (
        "label 'evn' is no class that is known: odd, even (did you mean 'even'?)" in capsys.readouterr().err
    )


def test_a_reward_model_names_no_classes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = load_base(base, label_names=["reward"])
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "reward")
    data = tmp_path / "texts.csv"
    data.write_text("text,label\na,b\n")
    assert main(["eval", str(tmp_path / "reward"), "--data", str(data)]) == 1
    assert "is a reward model, which names no classes" in capsys.readouterr().err


def test_a_classifier_writes_no_text(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["generate", str(classifier), "Hello"], ["chat", str(classifier)]):
        assert main(words) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and "is an adapter of a classifier" in captured.err
        assert f"veneer eval {classifier} --data FILE" in captured.err


def test_training_and_measuring_a_classifier(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "texts.jsonl"
    rows = [{"text": r["prompt"], "label": "high" if int(r["completion"]) > 34 else "low"} for r in RECORDS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = tmp_path / "adapter"
    words = ["--model", str(base), "--data", str(data), "--output", str(place), "--max-steps", "2"]
    assert main(["train", *words, "--task", "seq-cls"]) == 0
    capsys.readouterr()
    assert json.loads((place / "metrics.json").read_text())["label_names"] == ["high", "low"]
    assert main(["eval", str(place), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 16
