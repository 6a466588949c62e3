"""Foreign files, spelt in every way, and everything that is refused of them."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tolerances import BY_DTYPE, assert_close
from veneer import export_adapter, import_adapter
from veneer.errors import AdapterFileError, ExportError, VeneerError
from veneer.integrations.export.source import Source, read_source
from veneer.integrations.imports.flat_names import FlatNames
from veneer.integrations.imports.spellings import place

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = Q.replace(".", "_")


def pair(
    name: str, ends: tuple[str, str], r: int = 2, size: int = 6, dtype: Any = torch.float32
) -> dict[str, Tensor]:
    return {
        f"{name}.{ends[0]}": torch.randn(r, size, dtype=dtype),
        f"{name}.{ends[1]}": torch.randn(size, r, dtype=dtype),
    }


KOHYA = ("lora_down.weight", "lora_up.weight")
NEW = ("lora_A.weight", "lora_B.weight")


def written(tensors: dict[str, Tensor], where: Path, metadata: dict[str, str] | None = None) -> Path:
    file = where / "adapter.safetensors"
    save_file(tensors, file, metadata=metadata)
    return file


def imported(tensors: dict[str, Tensor], where: Path, **more: Any) -> Source:
    metadata = more.pop("metadata", None)
    import_adapter(written(tensors, where, metadata), where / "out", **more)
    return read_source(where / "out")


@pytest.mark.parametrize(
    ("name", "component", "path", "role"),
    [
        (f"lora_unet_{FLAT}.lora_down.weight", "unet", Q, "A"),
        (f"lora_unet_{FLAT}.alpha", "unet", Q, "alpha"),
        ("lora_te_text_model_encoder_layers_11_self_attn_q_proj.lora_up.weight", "text_encoder",
         "text_model.encoder.layers.11.self_attn.q_proj", "B"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.dora_scale", "text_encoder",
         "text_model.encoder.layers.0.mlp.fc1", "dora_scale"),
        ("lora_te2_text_projection.lora_down.weight", "text_encoder_2", "text_projection", "A"),
        (f"unet.{Q}.lora_A.weight", "unet", Q, "A"),
        (f"unet.{Q}.lora_B.bias", "unet", Q, "bias"),
        (f"unet.{Q}.lora_magnitude_vector", "unet", Q, "magnitude"),
        (f"unet.{Q}.lora.down.weight", "unet", Q, "A"),
        ("unet.up_blocks.1.attn1.processor.to_out_lora.up.weight", "unet", "up_blocks.1.attn1.to_out.0", "B"),
        ("mid_block.attentions.0.attn2.processor.to_k_lora.down.weight", "unet",
         "mid_block.attentions.0.attn2.to_k", "A"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.to_v_lora.up.weight", "text_encoder",
         "text_model.encoder.layers.0.self_attn.v_proj", "B"),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
         "text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", "A"),
        ("transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", "transformer",
         "single_transformer_blocks.3.attn.to_q", "A"),
    ],
)  # fmt: skip
def test_names(name: str, component: str, path: str, role: str) -> None:
    found = place(name, {})
    assert found is not None and (found.component, found.path, found.role) == (component, path, role)


def test_a_base_says_where_the_dots_go() -> None:
    flat = FlatNames(["my_block.in_proj", "a.b_c", "a_b.c"])
    assert flat.path("my_block_in_proj") == "my_block.in_proj"
    assert flat.path("a_b_c") is None  # two modules look like that
    assert FlatNames().path("my_block_in_proj") is None
    assert FlatNames(["encoder.layers.0.self_attn.q_proj"]).path(
        "text_model_encoder_layers_0_self_attn_q_proj"
    ) == "encoder.layers.0.self_attn.q_proj"  # fmt: skip


def test_strengths_and_ranks_of_kohya(tmp_path: Path) -> None:
    names = [f"lora_unet_down_blocks_{n}_attentions_0_transformer_blocks_0_attn1_to_q" for n in range(3)]
    tensors = {}
    for name, r in zip(names, (2, 2, 4), strict=True):
        tensors |= pair(name, KOHYA, r, dtype=torch.float16)
    tensors |= {f"{names[0]}.alpha": torch.tensor(1.0), f"{names[1]}.alpha": torch.tensor(0.25)}
    source = imported(tensors, tmp_path, base_model_name_or_path="org/base")
    updates = list(source.updates.values())
    assert [u.scaling for u in updates] == [0.5, 0.125, 1.0]  # without an alpha it is the rank
    assert [u.r for u in updates] == [2, 2, 4]
    assert source.config.base_model_name_or_path == "org/base"
    for update, name in zip(updates, names, strict=True):
        assert torch.equal(update.a, tensors[f"{name}.lora_down.weight"]) and update.a.dtype == torch.float16
        assert torch.equal(update.b, tensors[f"{name}.lora_up.weight"])


def test_magnitudes_of_kohya(tmp_path: Path) -> None:
    stem = f"lora_unet_{FLAT}"
    magnitude = torch.rand(6, 1)
    source = imported(pair(stem, KOHYA) | {f"{stem}.dora_scale": magnitude}, tmp_path)
    assert source.config.use_dora
    (update,) = source.updates.values()
    assert update.magnitude is not None and torch.equal(update.magnitude, magnitude.flatten())


def test_metadata_of_diffusers(tmp_path: Path) -> None:
    values = {"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.target_modules": ["to_q"],
              "unet.alpha_pattern": {"attn2.to_q": 3}}  # fmt: skip
    other = Q.replace("attn1", "attn2")
    tensors = pair(f"unet.{Q}", NEW) | pair(f"unet.{other}", NEW)
    source = imported(tensors, tmp_path, metadata={"lora_adapter_metadata": json.dumps(values)})
    assert source.config.use_rslora
    strengths = torch.tensor([source.updates[Q].scaling, source.updates[other].scaling])
    assert_close(strengths, torch.tensor([6 / 2**0.5, 3 / 2**0.5]), BY_DTYPE[torch.float32])


def test_there_and_back_is_the_identity(tmp_path: Path) -> None:
    tensors = pair(f"unet.{Q}", NEW) | pair("text_encoder.encoder.layers.0.self_attn.q_proj", NEW, 3)
    report = import_adapter(written(tensors, tmp_path), tmp_path / "out")
    assert report.modules == {"unet": {Q: 2}, "text_encoder": {"encoder.layers.0.self_attn.q_proj": 3}}
    export_adapter(tmp_path / "out", tmp_path / "back", "diffusers")
    back = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)


def test_everything_that_is_unknown_is_listed(tmp_path: Path) -> None:
    tensors = pair(f"lora_unet_{FLAT}", KOHYA) | {
        "lora_unet_my_own_module.lora_down.weight": torch.ones(2, 6),
        f"lora_unet_{FLAT}.lora_mid.weight": torch.ones(2, 2),
        "lora_unet_x.hada_w1_a": torch.ones(2, 2),
        "encoder.weight": torch.ones(1),
    }
    with pytest.raises(ExportError) as refusal:
        import_adapter(written(tensors, tmp_path), tmp_path / "out")
    text = str(refusal.value)
    assert "lora_unet_my_own_module.lora_down.weight: where the dots" in text and "(base) would say" in text
    assert "lora_mid.weight: of another method" in text and "hada_w1_a: of another method" in text
    assert "encoder.weight: no known name" in text
    assert not (tmp_path / "out").exists()


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.my_own = nn.ModuleDict({"module": nn.Linear(6, 6)})


def test_names_of_a_base(tmp_path: Path) -> None:
    tensors = pair("lora_unet_my_own_module", KOHYA)
    source = imported(tensors, tmp_path, base=Owner())
    assert list(source.updates) == ["my_own.module"]
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    save_file({"my_own.module.weight": torch.ones(6, 6)},
              tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")  # fmt: skip
    report = import_adapter(tmp_path / "adapter.safetensors", tmp_path / "more", base=tmp_path / "pipeline")
    assert report.modules == {"unet": {"my_own.module": 2}}


STEM = f"lora_unet_{FLAT}"
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "half": ({f"{STEM}.lora_down.weight": torch.ones(2, 6)}, "only A of its factors"),
    "no product": ({f"{STEM}.lora_down.weight": torch.ones(2, 6), f"{STEM}.lora_up.weight": torch.ones(6, 3)},
                   r"\(2, 6\) and \(6, 3\) have no product"),
    "vector": ({f"{STEM}.lora_down.weight": torch.ones(2), f"{STEM}.lora_up.weight": torch.ones(2)},
               "have no product"),
    "alpha": (pair(STEM, KOHYA) | {f"{STEM}.alpha": torch.ones(3)}, r"alpha of shape \(3,\)"),
    "zero": (pair(STEM, KOHYA) | {f"{STEM}.alpha": torch.zeros(())}, "an alpha of 0"),
    "nan": (pair(STEM, KOHYA) | {f"{STEM}.alpha": torch.tensor(float("nan"))}, "an alpha of nan"),
    "dora by columns": (pair(STEM, KOHYA, size=6) | {f"{STEM}.dora_scale": torch.ones(1, 6)},
                        "not one number for each of 6 rows"),
    "half dora": (pair(STEM, KOHYA) | {f"{STEM}.dora_scale": torch.ones(6, 1)}
                  | pair(STEM.replace("attn1", "attn2"), KOHYA), "one configuration cannot say"),
    "twice": (pair(STEM, KOHYA) | pair(f"unet.{Q}", NEW), "are the same tensor"),
    "already": (pair("base_model.model.q", NEW), "PEFT's format already"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(kind: str, tmp_path: Path) -> None:
    tensors, words = BROKEN[kind]
    with pytest.raises(ExportError, match=words):
        import_adapter(written(tensors, tmp_path), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors"}


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": "many"}', '{"unet.nonsense": 3}'])
def test_damaged_metadata(text: str, tmp_path: Path) -> None:
    file = written(pair(f"unet.{Q}", NEW), tmp_path, {"lora_adapter_metadata": text})
    with pytest.raises(AdapterFileError, match="lora_adapter_metadata"):
        import_adapter(file, tmp_path / "out")


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(AdapterFileError, match="no file or directory"):
        import_adapter(tmp_path / "nowhere", out)
    with pytest.raises(AdapterFileError, match="no file of tensors"):
        import_adapter(tmp_path, out)
    file = written(pair(f"unet.{Q}", NEW), tmp_path)
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(AdapterFileError, match=r"several files of tensors \(adapter.safetensors, other"):
        import_adapter(tmp_path, out)
    raw = file.read_bytes()
    for bad in (raw[:20], raw[:-1], b"version https://git-lfs", b"\xff" * 64):
        file.write_bytes(bad)
        with pytest.raises(AdapterFileError, match=r"truncated|damaged"):
            import_adapter(file, out)
    (tmp_path / "pickle.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(AdapterFileError):
        import_adapter(tmp_path / "pickle.bin", out)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="PEFT's format already"):
        import_adapter(tmp_path, out)
    assert not out.exists()


def test_outputs_that_hold_files(tmp_path: Path) -> None:
    file = written(pair(f"unet.{Q}", NEW) | pair("text_encoder.encoder.layers.0.fc1", NEW), tmp_path)
    out = tmp_path / "out"
    import_adapter(file, out)
    (out / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(VeneerError, match="or write over its adapter with overwrite=True"):
        import_adapter(file, out)
    written({name: tensor + 1 for name, tensor in load_file(file).items()}, tmp_path)
    import_adapter(file, out, overwrite=True)
    assert (out / "unet" / "notes.txt").read_text() == "mine"
    update = read_source(out / "unet").updates[Q]
    assert torch.equal(update.a, load_file(file)[f"unet.{Q}.lora_A.weight"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_half_written(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.integrations.imports import importing

    file = written(pair(f"unet.{Q}", NEW) | pair("text_encoder.encoder.layers.0.fc1", NEW), tmp_path)
    calls = []

    def fail(directory: Path, *more: Any, **others: Any) -> None:
        calls.append(directory)
        if len(calls) == 2:
            raise error
        write(directory, *more, **others)

    write = importing.write_adapter
    monkeypatch.setattr(importing, "write_adapter", fail)
    with pytest.raises(VeneerError if isinstance(error, OSError) else type(error)):
        import_adapter(file, tmp_path / "new" / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter.safetensors"}
