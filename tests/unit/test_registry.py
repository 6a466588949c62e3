"""Finding plug-ins by name and by type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from veneer.registry import NameRegistry, TypeRegistry, load_all


def test_names_are_unique_and_sorted() -> None:
    registry: NameRegistry[int] = NameRegistry("thing")
    registry.add("b", 1)
    registry.add("a", 2)
    assert registry.names() == ("a", "b") and list(registry) == [1, 2]
    assert registry.get("a") == 2 and registry.get("c") is None
    with pytest.raises(ValueError, match="thing 'a' is registered twice"):
        registry.add("a", 3)


def test_types_are_found_along_their_bases_and_the_nearest_wins() -> None:
    class Mine(nn.Linear):
        pass

    class Yours(Mine):
        pass

    registry: TypeRegistry[str] = TypeRegistry("layer")
    registry.add(["torch.nn.modules.linear.Linear"], "any linear")
    assert registry.find(Yours) == "any linear" and registry.find(nn.Conv1d) is None
    registry.add([f"{Mine.__module__}.{Mine.__qualname__}"], "mine")
    assert registry.find(Yours) == "mine" and registry.find(nn.Linear) == "any linear"
    with pytest.raises(ValueError, match="two layers for"):
        registry.add(["torch.nn.modules.linear.Linear"], "another")


def test_a_type_of_a_library_that_is_not_there_is_no_obstacle() -> None:
    registry: TypeRegistry[str] = TypeRegistry("layer")
    registry.add(["library_that_does_not_exist.Linear"], "its")
    assert registry.find(nn.Linear) is None
    assert "library_that_does_not_exist" not in sys.modules


def test_every_file_of_a_folder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugins_for_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("found = []\n")
    for name in ("b", "a"):
        (folder / f"{name}.py").write_text(f"import plugins_for_a_test as p\np.found.append({name!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    import plugins_for_a_test

    load_all("plugins_for_a_test", plugins_for_a_test.__path__)
    assert plugins_for_a_test.found == ["a", "b"]
