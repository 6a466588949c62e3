"""The plug-in of vLLM over a stand-in for its resolvers; `make readers-vllm` runs the real server."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.readers import vllm as reader
from tests.unit.integrations.export.adapters import Saved, save
from veneer.errors import AdapterFileError, BaseMismatchError, ConfigError, ExportError, VeneerError

NAME = "veneer.integrations.vllm"


@dataclass
class Request:
    """As vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str


class Registry:
    """As vLLM's registry of resolvers."""

    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def register_resolver(self, name: str, resolver: Any) -> None:
        self.resolvers[name] = resolver


def imported(patch: pytest.MonkeyPatch) -> Any:
    """The module, over the stand-in."""
    parts = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": Registry()},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, NAME, raising=False)
    return importlib.import_module(NAME)


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        yield imported(patch)
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return {name: save(name, tmp_path_factory.mktemp("made")) for name in ("patterns", "dora")}


@pytest.fixture
def runs(made: dict[str, Saved], tmp_path: Path) -> Path:
    """A directory with an adapter that must be folded and one that is refused."""
    for name, adapter in made.items():
        shutil.copytree(adapter.place, tmp_path / "runs" / name)
    (tmp_path / "cache").mkdir()
    return tmp_path / "runs"


def resolved(plugin: Any, runs: Path, base: Any, name: str) -> Any:
    resolver = plugin.AdapterResolver(runs, runs.parent / "cache")
    return asyncio.run(resolver.resolve_lora(str(base), name))


def test_an_adapter_is_exported_once_for_all_servers(
    plugin: Any, runs: Path, made: dict[str, Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception, match="patterns"):
        reader.read(runs / "patterns")
    found = resolved(plugin, runs, made["patterns"].base, "patterns")
    assert found.lora_name == "patterns" and found.lora_int_id > 0
    assert reader.read(Path(found.lora_path)).keys() == made["patterns"].updates.keys()
    monkeypatch.setattr(plugin, "export_adapter", lambda *given, **options: pytest.fail("exported again"))
    assert resolved(plugin, runs, made["patterns"].base, "patterns") == found


def test_an_adapter_that_was_trained_again_is_exported_again(
    plugin: Any, runs: Path, made: dict[str, Saved]
) -> None:
    before = resolved(plugin, runs, made["patterns"].base, "patterns")
    tensors, path = load_file(runs / "patterns" / "adapter_model.safetensors"), Path(before.lora_path)
    save_file({k: 2 * t for k, t in tensors.items()}, runs / "patterns" / "adapter_model.safetensors")
    after = resolved(plugin, runs, made["patterns"].base, "patterns")
    old, new = reader.read(path), reader.read(Path(after.lora_path))
    assert all((new[name] == 4 * old[name]).all() for name in old)


def test_reasons_are_raised_and_logged(
    plugin: Any, runs: Path, made: dict[str, Saved], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.veneer"), pytest.raises(ExportError, match="magnitudes"):
        resolved(plugin, runs, made["dora"].base, "dora")
    (line,) = caplog.messages
    assert "dora is not served" in line and "the magnitudes of DoRA" in line
    (runs / "patterns" / "adapter_model.safetensors").write_bytes(b"nonsense")
    # vLLM answers a ValueError with its words, and any other error without them.
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors") as error:
        resolved(plugin, runs, made["patterns"].base, "patterns")
    assert isinstance(error.value, AdapterFileError)
    assert list((runs.parent / "cache").iterdir()) == []


def test_another_base_is_refused(plugin: Any, runs: Path, made: dict[str, Saved], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made["patterns"].base, other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: -t for k, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="another base model"):
        resolved(plugin, runs, other, "patterns")


def test_a_base_that_is_not_here_is_said(plugin: Any, runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vllm.veneer"):
        assert resolved(plugin, runs, "nobody/nothing", "patterns") is not None
    assert "not compared with the base" in caplog.text


NAMES = ["nothing", "", ".", "..", "../secret", "patterns/../../secret", "patterns/", "/etc", ".hidden"]


@pytest.mark.parametrize("name", [*NAMES, "..\\secret", "a\0b", "x" * 300])
def test_no_name_leads_out_of_the_directory(plugin: Any, runs: Path, name: str) -> None:
    for place in (runs.parent / "secret", runs / ".hidden", runs, runs.parent):
        place.mkdir(exist_ok=True)
        (place / "adapter_config.json").write_text("{}")
    assert resolved(plugin, runs, "base", name) is None


def test_an_adapter_that_changes_meanwhile_is_not_kept(
    plugin: Any, runs: Path, made: dict[str, Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(adapter: Path, place: Path, *given: Any, **options: Any) -> Any:
        report = original(adapter, place, *given, **options)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": "later"}))
        return report

    original = plugin.export_adapter
    monkeypatch.setattr(plugin, "export_adapter", export)
    with pytest.raises(AdapterFileError, match="ask again"):
        resolved(plugin, runs, made["patterns"].base, "patterns")
    assert list((runs.parent / "cache").iterdir()) == []


def _resolve_elsewhere(runs: Path, base: Path, answers: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        answers.put(resolved(imported(patch), runs, base, "patterns").lora_path)


def test_two_processes_share_a_cache(plugin: Any, runs: Path, made: dict[str, Saved]) -> None:
    spawn = multiprocessing.get_context("spawn")
    answers: Any = spawn.Queue()
    given = (runs, made["patterns"].base, answers)
    others = [spawn.Process(target=_resolve_elsewhere, args=given) for _ in range(2)]
    for other in others:
        other.start()
    places = {answers.get(timeout=300) for _ in others}
    for other in others:
        other.join()
    (place,) = places
    assert reader.read(Path(place)).keys() == made["patterns"].updates.keys()
    assert list((runs.parent / "cache").iterdir()) == [Path(place)]


def test_registering(plugin: Any, runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    registry = plugin.LoRAResolverRegistry
    monkeypatch.delenv(plugin.ADAPTERS, raising=False)
    plugin.register()
    assert registry.resolvers == {}
    monkeypatch.setenv(plugin.ADAPTERS, str(runs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(runs.parent / "caches"))
    with caplog.at_level(logging.WARNING, "vllm.veneer"):
        plugin.register()
    assert "only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caplog.text
    assert registry.resolvers["veneer"].cache == runs.parent / "caches" / "veneer" / "vllm"
    monkeypatch.setenv(plugin.ASKED, "true")
    monkeypatch.setenv(plugin.CACHE, str(runs.parent / "own"))
    caplog.clear()
    plugin.register()
    assert registry.resolvers["veneer"].cache == runs.parent / "own" and not caplog.messages
    monkeypatch.setenv(plugin.CACHE, str(runs / "patterns" / "adapter_config.json"))
    with pytest.raises(VeneerError, match="cannot write"):
        plugin.register()
    monkeypatch.setenv(plugin.ADAPTERS, str(runs / "none"))
    with pytest.raises(ConfigError, match="no directory"):
        plugin.register()
