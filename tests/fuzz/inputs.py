"""Kinds of broken input: each takes good files in a directory and spoils something of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fuzz.files import Bomb, parts, put
from tests.fuzz.values import ODD, odd, spoiled, spoiled_bytes, spoiled_json
from veneer.files.digest import DATA_DIGEST
from veneer.files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME


class Kind(NamedTuple):
    """A kind of broken input.

    Attributes:
        spoil: Spoils what lies in a directory.
        of: The good inputs that it can spoil, directories of `tests.fuzz.materials`.
    """

    spoil: Callable[[Path, Random], None]
    of: tuple[str, ...]


def configuration(place: Path, random: Random) -> None:
    """Other values, nesting, keys and texts in ``adapter_config.json``."""
    file = place / CONFIG_NAME
    file.write_bytes(spoiled_json(json.loads(file.read_bytes()), random))


def header(place: Path, random: Random) -> None:
    """The header of a safetensors file: names, types, shapes, offsets, its length, what is no JSON."""
    file = tensors_of(place)
    content, body = parts(file)
    act = random.randrange(8)
    if act < 3:
        put(file, spoiled(content, random), body)
    elif act == 3:
        put(file, spoiled_json(content, random), body)
    elif act == 4:
        raw = file.read_bytes()
        length = random.choice(
            (0, 1, len(raw), len(raw) - 8, 2**63, 2**64 - 1, 10**8, random.randrange(1000))
        )
        file.write_bytes(struct.pack("<Q", length) + raw[8:])
    else:
        entry = content[random.choice([name for name in content if name != "__metadata__"])]
        lies: dict[str, list[Any]] = {
            "dtype": ["F64", "F16", "I8", "BOOL", "F8_E4M3", "F128", "", 3],
            "shape": [[], [0], [2**62, 4], [2**32, 2**32], [-1], [1] * 17, [len(body)], entry["shape"][::-1]],
            "data_offsets": [
                [0, 0],
                [0, len(body)],
                [0, 2**62],
                [4, 2],
                [-8, 8],
                [1, 2, 3],
                entry["data_offsets"][:1],
            ],
        }
        field = random.choice(sorted(lies))
        entry[field] = random.choice(lies[field])
        put(file, content, body)


def metadata(place: Path, random: Random) -> None:
    """Metadata of a safetensors file that are not those of its tensors."""
    file = tensors_of(place)
    content, body = parts(file)
    table = content.setdefault("__metadata__", {"veneer_config": "{}", "lora_adapter_metadata": "{}"})
    name = random.choice(sorted(table))
    try:
        table[name] = spoiled_json(json.loads(table[name]), random).decode("utf-8", "replace")
    except ValueError:
        table[name] = str(odd(random))
    put(file, content, body)


def damage(place: Path, random: Random) -> None:
    """Bytes of one of the files: cut, flipped, doubled."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    file = random.choice(files)
    file.write_bytes(spoiled_bytes(file.read_bytes(), random))


def values(place: Path, random: Random) -> None:
    """Good files of tensors that are no adapter's, or another's: NaN, types, shapes, names."""
    file = tensors_of(place)
    tensors = load_file(file)
    content, _ = parts(file)
    for _ in range(random.choice((1, 1, 3))):
        tensors = _other(tensors, random)
    kept = {key: text for key, text in content.get("__metadata__", {}).items() if key != DATA_DIGEST}
    save_file(tensors, file, metadata=kept if random.random() < 0.7 else None)


def _other(tensors: dict[str, Tensor], random: Random) -> dict[str, Tensor]:
    name = random.choice(sorted(tensors))
    tensor, rest = tensors[name], {key: value for key, value in tensors.items() if key != name}
    act = random.randrange(9)
    if act == 0 and tensor.is_floating_point() and tensor.numel():
        tensor = tensor.clone()
        tensor.view(-1)[random.randrange(tensor.numel())] = random.choice((float("nan"), float("inf"), 3e38))
    elif act == 1:
        kind = random.choice(
            (torch.int8, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int64)
        )
        tensor = tensor.to(kind)
    elif act == 2:
        tensor = random.choice(
            (tensor.flatten(), tensor[..., None], tensor.movedim(0, -1).contiguous(), tensor[:1], tensor[:0])
        )
    elif act == 3:
        tensor = random.choice(
            (torch.zeros(()), torch.zeros(2**18, 1), torch.zeros(0, 2**40), torch.ones(1, 1, 1, 1))
        )
    elif act == 4:
        return rest or tensors
    elif act == 5:
        prefix = random.choice(("", "model.", "base_model.model.", "base_model.model.model.", "x" * 900))
        return {**rest, prefix + name.removeprefix("base_model.model."): tensor}
    elif act == 6:
        return {**tensors, str(random.choice(ODD))[:200] or "a": torch.ones(2)}
    elif act == 7:
        ends = (
            "lora_A.weight",
            "lora_B.weight",
            "lora_magnitude_vector",
            "lora_embedding_A",
            "weight",
            "bias",
            "alpha",
        )
        return {**tensors, f"{name.rsplit('.lora', 1)[0]}.{random.choice(ends)}": tensor.clone()}
    else:
        return {key.replace("layers.0", "layers.10"): value for key, value in tensors.items()}
    return {**rest, name: tensor}


def pickles(place: Path, random: Random) -> None:
    """A ``.bin`` in place of the safetensors file: code, other objects, old and damaged archives."""
    file = tensors_of(place)
    tensors: dict[Any, Any] = dict(load_file(file))
    file.unlink()
    target = place / (BIN_NAME if file.name == SAFETENSORS_NAME else f"{file.stem}.bin")
    act = random.randrange(10)
    if act == 0:
        torch.save(random.choice((Bomb(), {**tensors, "x": Bomb()}, [Bomb()])), target)
    elif act == 1:
        torch.save(tensors, target, _use_new_zipfile_serialization=False)
    elif act == 2:
        target.write_bytes(
            pickle.dumps(random.choice((Bomb(), {"a": [1.0]}, tensors)), protocol=random.randrange(6))
        )
    elif act == 3:
        wrong = [
            torch.ones(1).expand(2**20, 2**20),
            torch.ones(3).to_sparse(),
            torch.empty(3, device="meta"),
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            torch.ones(2, dtype=torch.complex64),
            torch.nn.Parameter(torch.ones(2)),
            torch.empty(0),
            [torch.ones(1)],
            {},
            "x",
            1,
            None,
        ]
        torch.save({**tensors, random.choice(("a", "", 3, "x" * 2000, None)): random.choice(wrong)}, target)
    elif act == 4:
        torch.save(
            random.choice(([], {}, list(tensors.values()), {"state_dict": tensors}, torch.ones(2))), target
        )
    elif act == 5:
        torch.save(tensors, target)
        with zipfile.ZipFile(target) as old, zipfile.ZipFile(place / "new", "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
        os.replace(place / "new", target)
    elif act == 6:
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(
                random.choice(("data.pkl", "a/data.pkl", "../../x", "/etc/x")), random.randbytes(50)
            )
    else:
        torch.save(tensors, target)
        target.write_bytes(spoiled_bytes(target.read_bytes(), random))


def entries(place: Path, random: Random) -> None:
    """Links, pipes, sockets, devices and directories in place of a file or beside it, or of the directory."""
    names = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    names += [Path(name) for name in ("README.md", "metrics.json", "config.json", "tokenizer_config.json")]
    if (place / CONFIG_NAME).is_file():
        names += [Path(BIN_NAME), Path(SAFETENSORS_NAME), Path(CONFIG_NAME)] * 2
    target = place / random.choice(sorted(set(names))) if random.random() < 0.9 else place
    if target.is_dir():
        shutil.rmtree(target)
    old = target.read_bytes() if target.exists() else b"{}"
    target.unlink(missing_ok=True)
    act = random.randrange(9)
    if act == 0:
        os.mkfifo(target)
    elif act == 1:
        target.mkdir()
        (target / "inside").write_bytes(old)
    elif act == 2:
        with socket.socket(socket.AF_UNIX) as listening:
            here = os.open(target.parent, os.O_RDONLY)
            listening.bind(f"/proc/self/fd/{here}/{target.name}")  # a socket's path may not be long
            os.close(here)
    elif act == 3:
        target.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem")))
    elif act == 4:
        target.symlink_to(target.name)
    elif act == 5:
        target.symlink_to(random.choice(("nothing", "..", ".", "/", "x" * 200)))
    elif act == 6:
        target.with_name("elsewhere").write_bytes(old)
        target.symlink_to("elsewhere")
    elif act == 7:
        target.write_bytes(b"")
    # 8: it is missing


def records(place: Path, random: Random) -> None:
    """Data that cannot be used: values and types of records, lines, cells, bytes."""
    file = random.choice(
        [place / name for name in ("data.jsonl", "data.json", "data.csv", "data.tsv", "data.parquet")]
    )
    raw = file.read_bytes()
    if file.suffix == ".jsonl":
        lines = raw.splitlines()
        number = random.randrange(len(lines))
        lines[number] = spoiled_json(json.loads(lines[number]), random)
        raw = b"\n".join(lines)
    elif file.suffix == ".json":
        raw = spoiled_json(json.loads(raw), random)
    else:
        raw = spoiled_bytes(raw, random)
    for other in place.iterdir():
        other.unlink()
    file.write_bytes(raw)


#: What YAML can be made to be.
YAML = (
    "!!python/object/apply:os.system ['touch exploded']",
    "lora_r: !!binary x",
    "a: &a [*a]",
    "? [1, 2]\n: 3",
    "{1: 2, null: 3}",
    "- a",
    "lora_r: 8\nlora_r: 9",
    "--- a\n--- b",
    "lora_r: 2024-13-45",
    "lora_r: " + "1" * 5000,
    "lora_r: " + "[" * 2000,
    "grid: &a {lora_r: *a}",
    "grid: {lora_r: [8, 8.0, '8']}",
    "grid: {lora_r: [1, 2, 2.5, '3', null]}",
    "grid: 3",
    "columns: {a: {b: c}}",
    "seed: -1",
    "model: [a, b]",
)
#: Options whose values a grid may multiply.
GRID = "learning_rate weight_decay lora_dropout warmup_ratio max_grad_norm epochs lora_alpha".split()


def options(place: Path, random: Random) -> None:
    """A YAML file of a run or a sweep: options of other types and values, and other kinds of YAML."""
    import yaml

    for file in sorted(place.glob("*.yaml")):
        content = yaml.safe_load(file.read_text())
        act = random.randrange(8)
        if act < 4:
            raw = json.dumps(spoiled(content, random)).encode()  # JSON is YAML
        elif act == 4:
            raw = spoiled_bytes(file.read_bytes(), random)
        elif act == 5:  # a few lines that stand for billions of values
            levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
            raw = "\n".join(["a0: &a0 [x]", *levels, f"{random.choice(sorted(content))}: *a11"]).encode()
        elif act == 6:
            raw = json.dumps(
                {**content, "grid": {name: [n / 10 for n in range(1, 10)] for name in GRID}}
            ).encode()
        else:
            raw = random.choice((b"", file.read_bytes() + b"\n")) + random.choice(YAML).encode()
        file.write_bytes(raw)


def tensors_of(place: Path) -> Path:
    """The one file of safetensors in a directory."""
    (found,) = place.glob("*.safetensors")
    return found


ADAPTERS = ("adapter", "special", "of others", "experts")
KINDS = {
    "configuration": Kind(configuration, ADAPTERS),
    "header": Kind(header, (*ADAPTERS, "kohya", "base")),
    "metadata": Kind(metadata, (*ADAPTERS, "kohya")),
    "damage": Kind(damage, (*ADAPTERS, "bin", "kohya", "archive", "state", "base")),
    "values": Kind(values, (*ADAPTERS, "kohya", "base")),
    "pickle": Kind(pickles, (*ADAPTERS, "kohya")),
    "entries": Kind(entries, (*ADAPTERS, "bin", "kohya", "data", "archive", "state", "base")),
    "records": Kind(records, ("data",)),
    "options": Kind(options, ("yaml",)),
}
