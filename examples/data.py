"""The examples' model and data; ``make examples-data`` fetches what is not in this directory."""

from __future__ import annotations

import ast
import functools
import gzip
import json
import re
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).resolve().parent.parent / ".cache" / "data"
SMOLLM2 = DATA.parent / "veneer" / "SmolLM2-135M-Instruct"
INSTRUCTION = (
    "Turn this e-mail header into JSON with the keys date (YYYY-MM-DD), domain (of the sender), "
    "list (or null) and subject."
)
CLOTHES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16, unless this machine is faster in float32: many processors only emulate bfloat16."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(576, 576, dtype=dtype)
        x @ x
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - begun)
        return min(times)

    fast = torch.cuda.is_available() or seconds(torch.bfloat16) <= seconds(torch.float32)
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Mail:
    """One e-mail with all its headers."""

    text: str
    spam: bool
    group: str


@dataclass(frozen=True)
class Prompt:
    """One spoken prompt: `samples` (n,) from -1 to 1 at `rate` Hz, and what is said."""

    name: str
    text: str
    samples: torch.Tensor
    rate: int


def folder(name: str) -> Path:
    """The directory of a dataset; if it is missing, the program ends and says what to do."""
    if not (DATA / name / ".stamp").is_file():
        raise SystemExit(f"{DATA / name} is not there. Fetch it: make examples-data")
    return DATA / name


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct; if it is missing, the program ends and says what to do."""
    if not (SMOLLM2 / "config.json").is_file():
        raise SystemExit(f"{SMOLLM2} is not there. Fetch it: python tools/smollm2.py")
    return SMOLLM2


def headers() -> dict[str, list[dict[str, Any]]]:
    """Headers of mails and the JSON answers to `INSTRUCTION`: parts ``train``, ``heldout``, ``extra``."""
    path = Path(__file__).resolve().parent / "mails" / "mails.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def record_of(mail: dict[str, Any]) -> dict[str, str]:
    """One of `headers` as a training record: prompt and completion."""
    return {"prompt": f"{INSTRUCTION}\n\n{mail['header']}", "completion": json.dumps(mail["answer"])}


def mails() -> list[Mail]:
    """The 6,046 mails of SpamAssassin's public corpus, in the order of their files."""
    found = []
    for path in sorted(folder("spam-assassin").rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.append(Mail(record["text"], record["group"].startswith("spam"), record["group"]))
    return found


def fashion_mnist(train: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 28, 28) of uint8 and labels (n,), indices into `CLOTHES`; 60,000 of them or 10,000."""
    kind, where = "train" if train else "t10k", folder("fashion-mnist")
    pixels = gzip.decompress((where / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((where / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:]
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 28, 28)
    return images, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()


def spoken_prompts() -> list[Prompt]:
    """The telephone exchange's prompts that say words, with their texts, sorted by name."""
    where = folder("asterisk-sounds")
    texts = gzip.decompress((where / "core-sounds-en.txt.gz").read_bytes()).decode("utf-8")
    found = []
    for name, text in sorted(re.findall(r"^([^;:\n]+): *(.+)$", texts, re.M)):
        path = where / f"{name}.wav"
        if text.startswith(("(", "[")) or not path.is_file():
            continue  # a tone, music, or silence
        with wave.open(str(path)) as sound:
            raw, rate = sound.readframes(sound.getnframes()), sound.getframerate()
        samples = torch.frombuffer(bytearray(raw), dtype=torch.int16).float() / 2**15
        found.append(Prompt(name, re.sub(r"\s*[\[(].*?[\])]", "", text).strip(), samples, rate))
    return found


def translations(language: str) -> list[tuple[str, str]]:
    """Pairs (English, `language`) of Django's messages, each English text once, in the order of the files."""
    where = folder("django-translations")
    paths = sorted(where.rglob(f"locale/{language}/LC_MESSAGES/*.po"))
    if not paths:
        raise ValueError(f"Django has no language {language!r}")
    pairs: dict[str, str] = {}
    for path in paths:
        for entry in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            if re.search(r"^#,.*fuzzy", entry, re.M) or "msgid_plural" in entry:
                continue
            english, other = (_message(entry, keyword) for keyword in ("msgid", "msgstr"))
            if english and other:
                pairs.setdefault(english, other)
    return list(pairs.items())


def _message(entry: str, keyword: str) -> str:
    """The text of one keyword of an entry of a .po file: string literals on one or several lines."""
    match = re.search(rf'^{keyword} ((?:".*"\s*)+)', entry, re.M)
    return "".join(ast.literal_eval(line) for line in match[1].splitlines()) if match else ""
