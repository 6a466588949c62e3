"""A tiny base model and an adapter that `veneer train` made for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.architecture.message_rules import spelt_in_python
from tests.unit.cli.words import train_words
from tests.unit.conftest import shared
from tests.unit.training.tiny import saved_records, tiny_model
from veneer.cli import common, main, messages
from veneer.training import progress


@pytest.fixture(autouse=True)
def _no_option_as_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command shows a message that spells one of its options as Python does."""
    running: list[str] = []
    run, show = common.main, print

    def main_of(arguments: Sequence[str] | None = None) -> int:
        running[:] = [next((word for word in arguments or () if not word.startswith("-")), "")]
        return run(arguments)

    def shown(line: str, **where: object) -> None:
        if running:
            assert not spelt_in_python(line, common.flags_of(running[0])), line
        show(line, **where)  # type: ignore[call-overload]

    monkeypatch.setattr(common, "main", main_of)
    monkeypatch.setattr(messages, "print", shown, raising=False)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line about what takes long, however busy the machine is."""
    monkeypatch.setattr(progress, "PATIENCE", 600.0)


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("trained")
    assert main(train_words(base, saved_records(place / "data.jsonl"), place / "adapter")) == 0
    with shared(place / "adapter"):
        yield place / "adapter"


@pytest.fixture(scope="session")
def dora(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from veneer import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("dora") / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_model(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(place)
    return place
