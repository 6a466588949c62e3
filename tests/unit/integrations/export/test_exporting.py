"""Every kind of adapter for every target: what a reader of its own makes of the files, or a full refusal."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tests.readers.llama_cpp
import tests.readers.mlx
import tests.readers.ollama
import tests.readers.plain
import tests.readers.vllm
from tests.golden.make import DATA
from tests.tolerances import BY_DTYPE, assert_close
from tests.unit.integrations.export.adapters import CASES, Saved, save
from veneer import PeftModel, export_adapter
from veneer.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    ExportError,
    VeneerError,
    VeneerWarning,
)
from veneer.files.rope import write_older_names
from veneer.integrations.export import ExportReport, options, targets
from veneer.integrations.export.base import FOLDED
from veneer.integrations.export.source import FEATURES, read_source

ROOT = Path(__file__).parents[4]
SINGLE = BY_DTYPE[torch.float32]


def read(target: str, place: Path, adapter: Saved) -> dict[str, Tensor]:
    """What the target's own reader makes of the files; for diffusers see tests/interop/test_export.py."""
    if target == "vllm":
        return tests.readers.vllm.read(place)
    if target == "llama.cpp":
        return tests.readers.llama_cpp.read(place, _ties(adapter))
    if target == "ollama":
        return tests.readers.ollama.read(place)
    if target in ("plain", "sglang"):
        return tests.readers.plain.read(place)
    modules = dict(adapter.model.named_modules())
    linears = {p: m.weight for p, m in modules.items() if isinstance(m, nn.Linear)}
    linears |= {p: m.weight.T for p, m in modules.items() if type(m).__name__ == "Conv1D"}
    if _ties(adapter):
        linears.pop("lm_head")  # which mlx-lm's module tree has not got
    tables = {p: m.weight for p, m in modules.items() if isinstance(m, nn.Embedding)}
    return tests.readers.mlx.read(place, linears, tables)


def _ties(adapter: Saved) -> bool:
    config = getattr(adapter.model, "config", None)
    return bool(getattr(config, "tie_word_embeddings", False))


def options_for(target: str, name: str) -> dict[str, Any]:
    return {"component": "unet"} if target == "diffusers" else {}


def files_of(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


PAIRS = [(name, target) for name in CASES for target in targets.names()]


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_the_files_mean_the_adapter_or_nothing_is_written(
    name: str, target: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    adapter, case, out = saved(name), CASES[name], tmp_path / "out"
    before = files_of(adapter.place)
    if target not in case.targets.split():
        with pytest.raises(ExportError) as refusal:
            export_adapter(adapter.place, out, target, **options_for(target, name))
        reasons = (*case.feature, "other than", "one weight in this", "of lm_head alone", "is an aLoRA")
        assert any(reason in str(refusal.value) for reason in reasons)
        assert list(tmp_path.iterdir()) == []
        assert files_of(adapter.place) == before
        return
    report = export_adapter(adapter.place, out, target, **options_for(target, name))
    assert files_of(adapter.place) == before
    assert set(files_of(out)) == set(report.files)
    start = "unet." if target == "diffusers" else ""
    followed = {"lm_head"} if (name, target) == ("one for both", "mlx") else set()
    assert {path.removeprefix(start) for path in report.modules} == adapter.updates.keys() - followed
    assert report.worst <= torch.finfo(torch.float32).eps
    if target == "diffusers":
        return
    found = read(target, out, adapter)
    wanted = adapter.changes if "dora" in name else adapter.updates
    assert found.keys() == wanted.keys() - followed
    for path, update in found.items():
        assert_close(update.reshape(wanted[path].shape), wanted[path], SINGLE)


def test_every_target_takes_something_and_refuses_something() -> None:
    for target in targets.names():
        taken = [name for name, case in CASES.items() if target in case.targets.split()]
        assert 3 < len(taken) < len(CASES), target


def test_every_feature_has_a_case(saved: Callable[[str], Saved]) -> None:
    found = set()
    for name in CASES:
        found |= set(read_source(saved(name).place).features())
    assert found == set(FEATURES)


def test_a_refusal_lists_everything(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    with pytest.raises(ExportError) as refusal:
        export_adapter(saved("much at once").place, tmp_path / "out", "ollama")
    text = str(refusal.value)
    for words in ("magnitudes of DoRA", "biases of the base", "trained whole", "layers' projections"):
        assert words in text
    assert "dora_to_plain=True" in text and "veneer merge" in text


# -- what is folded, and how exactly -------------------------------------------------------------------


def test_what_a_target_can_say_is_written_bit_for_bit(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    source = load_file(saved("linear").place / "adapter_model.safetensors")
    for target in ("vllm", "llama.cpp", "ollama", "plain"):
        report = export_adapter(saved("linear").place, tmp_path / target, target)
        written = load_file(tmp_path / target / "adapter_model.safetensors")
        assert report.exact and report.folded == ()
        assert written.keys() == source.keys()
        assert all(torch.equal(written[name], source[name]) for name in source)


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "mlx", "ollama"])
def test_commands_quote_a_path_with_a_space(
    target: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    place = tmp_path / "my adapter"
    report = export_adapter(saved("linear").place, place, target)
    quoted = {"vllm": f"'NAME={place}'", "ollama": f"'{place}/Modelfile'"}.get(target, f"'{place}'")
    assert quoted in report.usage


@pytest.mark.parametrize(("r", "most"), [(1, 1), (5, 8), (8, 8), (130, 256), (512, 512)])
def test_vllm_is_told_a_largest_rank_that_it_has(r: int, most: int, tmp_path: Path) -> None:
    adapter = save("linear", tmp_path, r=r)
    usage = export_adapter(adapter.place, tmp_path / "out", "vllm").usage
    assert f"--max-lora-rank {most} " in usage
    tests.readers.vllm.read(tmp_path / "out", most)


def test_the_command_for_vllm_is_that_of_the_page_on_serving(
    saved: Callable[[str], Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    usage = export_adapter(saved("linear").place, Path("runs/mails-vllm"), "vllm").usage
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert usage.replace(str(saved("linear").base), "BASE") in page.splitlines()


def test_a_rank_above_the_largest_of_vllm_is_refused(tmp_path: Path) -> None:
    adapter = save("linear", tmp_path, rank_pattern={"layers.1.self_attn.q_proj": 513})
    with pytest.raises(ExportError, match=r"ranks above 512: model\.layers\.1\.self_attn\.q_proj"):
        export_adapter(adapter.place, tmp_path / "out", "vllm")


def test_the_converter_is_given_a_base_on_the_disk_or_the_name_of_one(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    adapter = saved("linear")
    usage = export_adapter(adapter.place, tmp_path / "here", "llama.cpp").usage
    assert f" --base {adapter.base} " in usage
    config = json.loads((adapter.place / "adapter_config.json").read_text())
    place = tmp_path / "adapter"
    shutil.copytree(adapter.place, place)
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    usage = export_adapter(place, tmp_path / "hub", "llama.cpp").usage
    assert " --base-model-id org/base " in usage
    usage = export_adapter(place, tmp_path / "given", "llama.cpp", base=adapter.base).usage
    assert f" --base {adapter.base} " in usage


@pytest.mark.parametrize("pair", ["head mlx", "head llama.cpp", "embedding llama.cpp"])
def test_a_base_that_is_not_at_hand_is_said_where_it_may_be_tied(
    pair: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    name, target = pair.split()
    adapter, place = saved(name), tmp_path / "adapter"
    shutil.copytree(adapter.place, place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    (note,) = export_adapter(place, tmp_path / "out", target).notes
    assert "is not there to check" in note
    if adapter.base is not None:
        known = export_adapter(place, tmp_path / "known", target, base=adapter.base)
        assert not any("is not there to check" in note for note in known.notes)


def test_a_base_whose_angles_mlx_lm_does_not_find_is_said(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    adapter, base = saved("linear"), tmp_path / "base"
    shutil.copytree(adapter.base, base)
    (note,) = export_adapter(adapter.place, tmp_path / "one", "mlx", base=base).notes
    assert f"mlx-lm looks for rope_theta at the top of {base}'s config.json" in note
    assert 'add {"rope_theta": 10000.0}' in note
    write_older_names(base)
    assert export_adapter(adapter.place, tmp_path / "two", "mlx", base=base).notes == ()


def test_ollama_gets_a_modelfile(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    adapter = saved("linear")
    report = export_adapter(adapter.place, tmp_path / "here", "ollama")
    assert (tmp_path / "here" / "Modelfile").read_text() == f'FROM "{adapter.base}"\nADAPTER .\n'
    assert report.usage == f"ollama create NAME -f {tmp_path}/here/Modelfile"
    place = tmp_path / "adapter"
    shutil.copytree(adapter.place, place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    report = export_adapter(place, tmp_path / "hub", "ollama")
    assert (tmp_path / "hub" / "Modelfile").read_text().startswith('FROM "org/base"')
    assert "put what Ollama calls org/base after FROM" in report.notes[-1]


def test_one_update_for_both_is_that_of_the_embedding_to_mlx(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    report = export_adapter(saved("one for both").place, tmp_path / "out", "mlx")
    assert set(load_file(tmp_path / "out" / "adapters.safetensors")) == {
        "model.embed_tokens.lora_a",
        "model.embed_tokens.lora_b",
    }
    assert report.exact and "the embedding's pair is written alone" in report.notes[-1]


def test_a_head_that_does_not_follow_its_embedding_is_refused(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    place = tmp_path / "adapter"
    shutil.copytree(saved("one for both").place, place)
    tensors = load_file(place / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] *= 2
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="an update of lm_head alone"):
        export_adapter(place, tmp_path / "out", "mlx")


def test_vllm_divides_by_the_root_where_the_adapter_does(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    report = export_adapter(saved("rslora").place, tmp_path / "out", "vllm")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert report.exact and config["use_rslora"] and (config["r"], config["lora_alpha"]) == (5, 7)


def test_powers_of_two_change_no_digit(tmp_path: Path) -> None:
    adapter = save("linear", tmp_path, alpha_pattern={"down_proj": 12, "layers.1.self_attn.q_proj": 3})
    report = export_adapter(adapter.place, tmp_path / "out", "plain")
    assert report.exact and len(report.folded) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_rounds_once_and_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = save("patterns", tmp_path, dtype)
    report = export_adapter(adapter.place, tmp_path / "out", "vllm")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert not report.exact and 0 < report.worst <= torch.finfo(dtype).eps
    wide = export_adapter(adapter.place, tmp_path / "wide", "vllm", dtype="float32")
    assert wide.worst < report.worst / 1000


def test_factors_that_overflow_are_refused(tmp_path: Path) -> None:
    adapter = save("patterns", tmp_path, torch.float16)
    file = adapter.place / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {
        k: t * 1e5 if k.endswith("1.self_attn.q_proj.lora_B.weight") else t for k, t in tensors.items()
    }
    tensors = {k: t.nan_to_num(posinf=6e4, neginf=-6e4) for k, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((adapter.place / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"layers.1.self_attn.q_proj": 500}
    (adapter.place / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"1 modules do not fit into torch.float16.*dtype='float32'"):
        export_adapter(adapter.place, tmp_path / "out", "vllm")
    assert not (tmp_path / "out").exists()
    export_adapter(adapter.place, tmp_path / "out", "vllm", dtype="float32")


def test_files_of_the_reference_library(tmp_path: Path) -> None:
    for name, target in (("rslora", "plain"), ("linear_patterns", "vllm"), ("llama_embedding", "llama.cpp")):
        export_adapter(DATA / name, tmp_path / name, target)
    config = json.loads((tmp_path / "rslora" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert tests.readers.vllm.read(tmp_path / "linear_patterns").keys() == {"up", "down"}


def test_biases_of_b_go_into_the_layers_own(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    place, base = saved("lora_bias").place, saved("lora_bias").model
    with pytest.raises(ExportError, match="without the base model"):
        export_adapter(place, tmp_path / "out", "plain")
    with pytest.raises(ExportError, match=r"layers without a bias: down"):
        export_adapter(place, tmp_path / "out", "plain", base=base)
    adapter = save("lora_bias", tmp_path, target_modules=["up", "head"])
    report = export_adapter(adapter.place, tmp_path / "out", "plain", base=adapter.model)
    assert report.exact and "added to the layers' own biases" in report.folded[-1]
    source = load_file(adapter.place / "adapter_model.safetensors")
    for path in ("up", "head"):
        own = adapter.model.get_submodule(path).bias.detach()
        b = source[f"base_model.model.{path}.lora_B.bias"]
        wanted = own.double() + 1.5 * b.double()
        found = tests.readers.plain.others(tmp_path / "out")[f"{path}.base_layer.bias"]
        assert torch.equal(found, wanted.float())
    x = torch.randn(3, 6)
    before, after = (
        PeftModel.from_pretrained(copy.deepcopy(adapter.model), place, check_base=False).eval()
        for place in (adapter.place, tmp_path / "out")
    )
    assert_close(after(x), before(x))


def test_whole_modules_go_along_bit_for_bit(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    for name in ("norms", "whole head", "every bias"):
        export_adapter(saved(name).place, tmp_path / name, "plain")
        before = tests.readers.plain.others(saved(name).place)
        after = tests.readers.plain.others(tmp_path / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_copies_of_embeddings_are_left_out_and_said(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    adapter = saved("llama embedding")
    report = export_adapter(adapter.place, tmp_path / "one", "vllm")
    assert "embed_tokens" in report.left_out[0] and "merge instead" in report.left_out[0]
    report = export_adapter(adapter.place, tmp_path / "two", "vllm", base=adapter.base)
    assert "they are equal" in report.left_out[0]
    other = adapter.model.eval()
    with torch.no_grad():
        other.get_input_embeddings().weight[3] += 1e-3
    with pytest.raises(ExportError, match="not the base's"):
        export_adapter(adapter.place, tmp_path / "three", "vllm", base=other)
    with torch.no_grad():
        other.get_input_embeddings().weight[3] -= 1e-3


def test_another_base_than_the_adapters_is_refused(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    adapter, other = saved("rslora"), tmp_path / "other"
    export_adapter(adapter.place, tmp_path / "own", "vllm", base=adapter.base)
    shutil.copytree(adapter.base, other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: -t for k, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match=rf"another base model than {other}: .* 200%"):
        export_adapter(adapter.place, tmp_path / "out", "vllm", base=other)
    # Of weights stored as codes nothing can be said.
    codes = {k: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for k, t in tensors.items()}
    save_file(codes, other / "model.safetensors", {"format": "pt"})
    export_adapter(adapter.place, tmp_path / "out", "vllm", base=other)


def test_a_start_that_changed_the_base_is_refused(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    shutil.copytree(saved("linear").place, place)
    config = json.loads((place / "adapter_config.json").read_text())
    for init in ("pissa", "olora", "corda", "PiSSA_niter_4"):
        (place / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
        for target in targets.names():
            edited = pytest.warns(VeneerWarning, match="was edited after it was saved")
            with edited, pytest.raises(ExportError, match="changed the base"):
                export_adapter(place, tmp_path / "out", target, **options_for(target, ""))


# -- DoRA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "ollama", "plain"])
def test_dora_made_plain_is_what_the_report_says(
    target: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    adapter = saved("dora")
    errors = []
    for rank in (1, 4, 8):
        out = tmp_path / f"{rank}"
        report = export_adapter(adapter.place, out, target, base=adapter.base, dora_to_plain=True, rank=rank)
        assert report.dora_errors.keys() == adapter.changes.keys()
        for path, update in read(target, out, adapter).items():
            wanted = adapter.changes[path]
            missed = torch.linalg.matrix_norm(update - wanted) / torch.linalg.matrix_norm(wanted)
            assert_close(missed, torch.tensor(report.dora_errors[path]).double(), SINGLE)
            after = torch.linalg.matrix_norm(adapter.model.get_submodule(path).weight.double() + wanted)
            share = torch.linalg.matrix_norm(update - wanted) / after
            assert_close(share, torch.tensor(report.dora_output_errors[path]).double(), SINGLE)
            whole = torch.linalg.svdvals(wanted)
            best = (whole[rank:].square().sum() / whole.square().sum()).sqrt()
            assert_close(missed, best, SINGLE)
        errors.append(max(report.dora_errors.values()))
    assert errors[0] > errors[1] > errors[2]
    assert_close(torch.tensor(errors[2]), torch.tensor(0.0), SINGLE)  # the rank of the weight


@pytest.mark.parametrize("name", ["embedding", "conv1d", "conv2d", "gpt2"])
def test_dora_of_every_layer_is_made_plain(name: str, tmp_path: Path) -> None:
    adapter = save(name, tmp_path, use_dora=True)
    out = tmp_path / "out"
    export_adapter(adapter.place, out, "plain", base=adapter.model, dora_to_plain=True, rank=99)
    found = read("plain", out, adapter)
    assert found.keys() == adapter.changes.keys()
    for path, update in found.items():
        assert_close(update.reshape(adapter.changes[path].shape), adapter.changes[path], SINGLE)


def test_dora_needs_its_base_and_a_rank(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    place, out = saved("dora").place, tmp_path / "out"
    with pytest.raises(ConfigError, match=r"rank=N; .*base="):
        export_adapter(place, out, "vllm", dora_to_plain=True)
    with pytest.raises(ConfigError, match=r"base=.*; rank must be at least 1, got 0"):
        export_adapter(place, tmp_path / "out", "plain", dora_to_plain=True, rank=0)
    with pytest.raises(ConfigError, match="was not given"):
        export_adapter(place, out, "vllm", rank=4)
    with pytest.raises(ExportError, match="the base has no"):
        export_adapter(place, out, "vllm", dora_to_plain=True, rank=4, base=nn.Linear(2, 2))
    with pytest.raises(ExportError, match="is not a DoRA adapter"):
        export_adapter(
            saved("linear").place, out, "vllm", dora_to_plain=True, rank=4, base=saved("linear").base
        )
    with pytest.raises(ExportError, match="no weights of a base model"):
        export_adapter(place, out, "vllm", dora_to_plain=True, rank=4, base=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("beside", [False, True])
def test_dora_over_a_base_of_codes_is_not_made_plain(
    beside: bool, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    adapter, base, out = saved("dora"), tmp_path / "base", tmp_path / "out"
    shutil.copytree(adapter.base, base)
    tensors = load_file(base / "model.safetensors")
    path = next(iter(adapter.changes))
    name = next(name for name in tensors if f"{path}.weight".endswith(name))
    if beside:
        tensors[f"{name}_scale_inv"] = torch.ones(1)
    else:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = r"as weight_scale_inv" if beside else "its weight holds 8-bit floats"
    with pytest.raises(ExportError, match=f"{path}: .*{said}"):
        export_adapter(adapter.place, out, "vllm", dora_to_plain=True, rank=4, base=base)
    assert not out.exists()


# -- what can go wrong around it -----------------------------------------------------------------------


def test_an_output_that_holds_files(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    place = saved("linear").place
    with pytest.raises(VeneerError, match="or write over its adapter with overwrite=True"):
        export_adapter(place, tmp_path, "mlx")
    export_adapter(place, tmp_path, "mlx", overwrite=True)
    export_adapter(place, tmp_path, "vllm", overwrite=True)
    # Nothing of the target before is left to be taken for this one's.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes.txt", "adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(ExportError, match="contains the adapter itself"):
        export_adapter(tmp_path, tmp_path, "plain", overwrite=True)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("target", ["vllm", "mlx", "diffusers"])
def test_nothing_is_half_written(
    error: BaseException,
    target: str,
    saved: Callable[[str], Saved],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = targets.get(target)
    assert chosen is not None
    write = type(chosen).write

    def fail(self: Any, parts: Any, place: Path) -> None:
        write(self, parts, place)
        raise error

    monkeypatch.setattr(type(chosen), "write", fail)
    with pytest.raises(VeneerError if isinstance(error, OSError) else type(error)):
        export_adapter(saved("linear").place, tmp_path / "new" / "out", target, **options_for(target, ""))
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_wrong_is_found_out(
    saved: Callable[[str], Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target, file in (("vllm", "adapter_model.safetensors"), ("mlx", "adapters.safetensors")):
        chosen = targets.get(target)
        assert chosen is not None
        for spoil in (_scaled, _swapped, _short):
            with monkeypatch.context() as patch:
                patch.setattr(type(chosen), "write", _spoilt(type(chosen).write, file, spoil))
                with pytest.raises((ExportError, AdapterFileError, KeyError)):
                    export_adapter(saved("linear").place, tmp_path / "out", target)
            assert list(tmp_path.iterdir()) == []


def test_a_writer_that_loses_a_part_or_another_tensor_is_found_out(
    saved: Callable[[str], Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = targets.get("plain")
    assert chosen is not None
    write, file = type(chosen).write, "adapter_model.safetensors"
    with monkeypatch.context() as patch:
        more = _spoilt(write, file, lambda tensors: {**tensors, "classifier.weight": torch.ones(1)})
        patch.setattr(type(chosen), "write", more)
        with pytest.raises(ExportError, match=r"does not read back, so it was removed: classifier\.weight"):
            export_adapter(saved("linear").place, tmp_path / "out", "plain")
    with monkeypatch.context() as patch:
        patch.setattr(type(chosen), "read", lambda self, place: {"elsewhere": {}})
        with pytest.raises(ExportError, match="reads back as elsewhere"):
            export_adapter(saved("linear").place, tmp_path / "out", "plain")
    with monkeypatch.context() as patch:
        patch.setattr(type(chosen), "config", lambda self, part: {"r": 2, "rank_pattern": {"up": 4}})
        with pytest.raises(ExportError, match="patterns of ranks"):
            export_adapter(saved("linear").place, tmp_path / "out", "plain")
    assert list(tmp_path.iterdir()) == []


def _spoilt(write: Any, file: str, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    def changed(self: Any, parts: Any, place: Path) -> None:
        write(self, parts, place)
        save_file(spoil(load_file(place / file)), place / file)

    return changed


def _scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last = sorted(tensors)[-1]
    return {**tensors, last: tensors[last] * 1.0001}


def _swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first, second = [
        name for name in sorted(tensors) if "q_proj.lora_" in name and "b" in name[-10:].lower()
    ][:2]
    return {**tensors, first: tensors[second], second: tensors[first]}


def _short(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in sorted(tensors)[:-2]}


def test_the_names_that_are_known_without_torch_are_those_of_the_targets() -> None:
    own = [target.name for target in targets if type(target).__module__.startswith("veneer.")]
    assert sorted(own) == list(options.TARGETS)


def test_targets_that_are_none_and_parts_that_are_none(
    saved: Callable[[str], Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved("linear").place
    for plugins in ((), ("a plug-in, which may bring targets",)):
        monkeypatch.setattr(options, "installed_plugins", lambda found=plugins: found)
        with pytest.raises(ConfigError, match=r"no target 'gguf'; there are diffusers, llama.cpp"):
            export_adapter(place, tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="no such parts"):
        export_adapter(place, tmp_path / "out", "vllm", component="unet")
    with pytest.raises(ConfigError, match="which part of a pipeline"):
        export_adapter(place, tmp_path / "out", "diffusers")
    with pytest.raises(ConfigError, match="none of unet"):
        export_adapter(place, tmp_path / "out", "diffusers", component="vae")
    with pytest.raises(ConfigError, match="dtype is auto"):
        export_adapter(place, tmp_path / "out", "vllm", dtype="int8")


def test_tensors_that_nothing_explains(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    shutil.copytree(saved("linear").place, place)
    file = place / "adapter_model.safetensors"
    odd = {"base_model.model.x.lora_C.weight": torch.ones(1), "stranger": torch.ones(2)}
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][0, 0] = float("inf")
    save_file({**tensors, **odd}, file)
    with pytest.raises(
        AdapterFileError, match=r"(?s)lora_C.*stranger.*1.mlp.down_proj holds NaN or infinity"
    ):
        export_adapter(place, tmp_path / "out", "plain")


def test_several_parts_of_a_pipeline(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    shutil.copytree(saved("conv2d").place, tmp_path / "all" / "unet")
    shutil.copytree(saved("linear").place, tmp_path / "all" / "text_encoder")
    report = export_adapter(tmp_path / "all", tmp_path / "out", "diffusers")
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"unet", "text_encoder"}
    assert isinstance(report, ExportReport) and any(p.startswith("text_encoder.") for p in report.modules)
    with pytest.raises(ConfigError, match="no component to choose"):
        export_adapter(tmp_path / "all", tmp_path / "more", "diffusers", component="unet")


def test_what_is_folded_is_no_reason_to_refuse() -> None:
    assert set(FOLDED) <= set(FEATURES)
    for target in targets:
        assert not target.keeps & set(FOLDED) and target.keeps <= set(FEATURES)
