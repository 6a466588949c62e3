"""The readers of the examples' data, on small files of the same forms."""

from __future__ import annotations

import gzip
import json
import struct
import wave
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.programs import load_program


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """examples/data.py with a cache of its own, in which every data set is an empty folder."""
    module = load_program(monkeypatch, "examples_data_reader", "examples/data.py")
    monkeypatch.setattr(module, "DATA", tmp_path)
    for name in ("spam-assassin", "fashion-mnist", "asterisk-sounds", "django-translations"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".stamp").touch()
    return module


def test_mails_are_read_with_their_kind(data: ModuleType) -> None:
    for group, text in (("spam-1", "Buy!"), ("easy-ham-2", "Grüße")):
        file = data.DATA / "spam-assassin" / group / "00001.json"
        file.parent.mkdir()
        file.write_text(json.dumps({"text": text, "group": group}), encoding="utf-8")
    assert [(mail.text, mail.spam) for mail in data.mails()] == [("Grüße", False), ("Buy!", True)]


def test_pictures_are_read_with_their_labels(data: ModuleType) -> None:
    pixels = torch.arange(2 * 784).remainder(251).to(torch.uint8)
    for kind, start in (("images-idx3", 16), ("labels-idx1", 8)):
        content = bytes(pixels.tolist()) if start == 16 else bytes([9, 3])
        packed = gzip.compress(bytes(start) + content)
        (data.DATA / "fashion-mnist" / f"t10k-{kind}-ubyte.gz").write_bytes(packed)
    images, labels = data.fashion_mnist(train=False)
    assert torch.equal(images, pixels.view(2, 28, 28))
    assert labels.tolist() == [9, 3]


def test_prompts_are_read_without_tones_and_remarks(data: ModuleType) -> None:
    where = data.DATA / "asterisk-sounds"
    (where / "letters").mkdir()
    texts = "; Sounds\n\nhello: Hello.\nletters/at: at [@]\nbeep: [a beep]\nlost: No such file.\n"
    (where / "core-sounds-en.txt.gz").write_bytes(gzip.compress(texts.encode()))
    for name in ("hello", "letters/at", "beep"):
        with wave.open(str(where / f"{name}.wav"), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(struct.pack("<3h", 0, 2**14, -(2**15)))
    prompts = data.spoken_prompts()
    assert [(prompt.name, prompt.text, prompt.rate) for prompt in prompts] == [
        ("hello", "Hello.", 8000),
        ("letters/at", "at", 8000),
    ]
    assert prompts[0].samples.tolist() == [0.0, 0.5, -1.0]


PO = r"""
msgid ""
msgstr "Language: de\n"

#. of a calendar
msgctxt "month"
msgid "May"
msgstr "Mai"

#, python-format
msgid ""
"Two \"quoted\" "
"lines, %(n)s\n"
msgstr ""
"Zwei Zeilen, "
"%(n)s\n"

#, fuzzy
msgid "unsure"
msgstr "unsicher"

msgid "open"
msgstr ""

msgid "%d year"
msgid_plural "%d years"
msgstr[0] "%d Jahr"
msgstr[1] "%d Jahre"

#~ msgid "old"
#~ msgstr "alt"
"""


def test_translations_are_read_without_the_unsure_and_the_open(data: ModuleType) -> None:
    file = data.DATA / "django-translations" / "django" / "locale" / "de" / "LC_MESSAGES" / "django.po"
    file.parent.mkdir(parents=True)
    file.write_text(PO, encoding="utf-8")
    pairs = data.translations("de")
    assert pairs == [("May", "Mai"), ('Two "quoted" lines, %(n)s\n', "Zwei Zeilen, %(n)s\n")]
    with pytest.raises(ValueError, match="no language 'xx'"):
        data.translations("xx")


def test_data_that_was_not_fetched_is_said_with_what_to_do(data: ModuleType) -> None:
    (data.DATA / "spam-assassin" / ".stamp").unlink()
    with pytest.raises(SystemExit, match="make examples-data"):
        data.mails()
