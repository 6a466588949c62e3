"""Adapters on a hub, against a server on this machine: what is asked, found, and said when it is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.interop.hub_server import TOKEN, Hub, Repository, serve
from tests.processes import run_python
from veneer.errors import AdapterFileError
from veneer.files.write import write_adapter
from veneer.hub import push_to_hub

TINY = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())
"""

CALLS = """
import json, sys
from pathlib import Path
from veneer import hub

answers = []
for name, args, kwargs in json.loads(sys.argv[1]):
    try:
        answers.append({"value": str(getattr(hub, name)(*args, **kwargs))})
    except Exception as error:
        answers.append({"kinds": [kind.__name__ for kind in type(error).__mro__], "message": str(error)})
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Two adapters of one model, as files; the second also pickled."""
    place = tmp_path_factory.mktemp("adapters")
    run_python(
        TINY
        + """
import sys
from pathlib import Path
from veneer import LoraConfig, get_peft_model

for rank, name, safe in ((2, "one", True), (3, "two", True), (3, "pickled", False)):
    torch.manual_seed(rank)
    model = get_peft_model(Tiny(), LoraConfig(r=rank, lora_alpha=5, target_modules=["first"]))
    torch.nn.init.normal_(model.base_model.model.first.lora_B["default"].weight)
    model.save_pretrained(Path(sys.argv[1]) / name, safe_serialization=safe)
""",
        place,
    )
    return {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        for folder in place.iterdir()
    }


@contextmanager
def running(adapters: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    one, two = adapters["one"], adapters["two"]
    nested = {f"deep/er/{name}": data for name, data in two.items()}
    with serve(
        {
            "team/adapter": Repository({"main": one, "v2": {**two, **nested}}),
            "team/pickled": Repository({"main": adapters["pickled"]}),
            "team/private": Repository({"main": one}, private=True),
            "team/gated": Repository({"main": one}, gated=True),
            "team/model": Repository({"main": {"model.safetensors": b"", "config.json": b"{}"}}),
            "team/half": Repository({"main": {"adapter_config.json": one["adapter_config.json"]}}),
        }
    ) as hub:
        yield hub


@pytest.fixture
def hub(adapters: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with running(adapters) as hub:
        yield hub


def environment(hub: Hub, home: Path, **more: str | None) -> dict[str, str | None]:
    """A user with an empty cache and no stored token, whose hub is the one on this machine."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": None,
        "TRANSFORMERS_OFFLINE": None,
        "HF_TOKEN": None,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **more,
    }


def call(env: dict[str, str | None], *calls: tuple[str, list[Any], dict[str, Any]]) -> list[dict[str, Any]]:
    done = run_python(CALLS, json.dumps(calls), env=env)
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_an_adapter_arrives_with_revision_subfolder_and_token(
    hub: Hub, tmp_path: Path, adapters: dict[str, dict[str, bytes]]
) -> None:
    answers = call(
        environment(hub, tmp_path),
        ("download_adapter", ["team/adapter"], {}),
        ("download_adapter", ["team/adapter"], {"revision": "v2"}),
        ("download_adapter", ["team/adapter"], {"revision": "v2", "subfolder": "deep/er"}),
        ("download_adapter", ["team/pickled"], {}),
        ("download_adapter", ["team/private"], {"token": TOKEN}),
        ("download_adapter", ["team/gated"], {"token": TOKEN, "proxies": None, "resume_download": None}),
        ("download_adapter", ["team/adapter"], {"cache_dir": str(tmp_path / "elsewhere")}),
    )
    assert [answer for answer in answers if "value" not in answer] == []
    for answer, wanted in zip(answers, ["one", "two", "two", "pickled", "one", "one", "one"], strict=True):
        folder = Path(answer["value"])
        for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
            assert (folder / name).is_file() == (name in adapters[wanted])
            if name in adapters[wanted]:
                assert (folder / name).read_bytes() == adapters[wanted][name]
    assert (tmp_path / "elsewhere") in Path(answers[-1]["value"]).parents


def test_both_files_come_from_one_commit(hub: Hub, tmp_path: Path) -> None:
    """The branch may move between the two requests: the second asks for the commit of the first."""
    call(environment(hub, tmp_path), ("download_adapter", ["team/adapter"], {"revision": "v2"}))
    commit = hub.repositories["team/adapter"].commit("v2")
    asked = [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    assert asked == [
        "/team/adapter/resolve/v2/adapter_config.json",
        f"/team/adapter/resolve/{commit}/adapter_model.safetensors",
    ]


REFUSALS: list[tuple[str, list[str], dict[str, Any], list[str]]] = [
    ("download_adapter", ["team/nothing"], {}, ["team/nothing", "no repository", "spelling", "token"]),
    ("download_adapter", ["team/private"], {}, ["team/private", "private", "hf auth login"]),
    ("download_adapter", ["team/gated"], {}, ["team/gated", "gated", "Ask for access"]),
    ("download_adapter", ["team/adapter"], {"revision": "v9"}, ["team/adapter", "'v9'", "main branch"]),
    ("download_adapter", ["team/model"], {}, ["adapter_config.json", "whole model", "subfolder"]),
    ("download_adapter", ["team/half"], {}, ["neither", "adapter_model.bin", "incomplete"]),
    ("download_file", ["team/adapter", "x.txt"], {"revision": "v2"}, ["x.txt", "'v2'"]),
    ("download_adapter", ["not/an/id"], {}, ["not/an/id", "neither a directory"]),
    ("download_adapter", ["team/adapter"], {"local_files_only": True}, ["cache", "local_files_only"]),
    (
        "download_adapter",
        ["team/adapter"],
        {"local_files_only": True, "force_download": True},
        ["team/adapter", "force_download"],
    ),
    ("push_to_hub", ["no/such/place"], {"repo_id": "team/new"}, ["there is no directory"]),
]


@pytest.fixture(scope="module")
def refusals(
    adapters: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What all the calls of REFUSALS answer, made in one process."""
    home = tmp_path_factory.mktemp("home")
    with running(adapters) as hub:
        return call(environment(hub, home), *[(name, args, kwargs) for name, args, kwargs, _ in REFUSALS])


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_what_stands_in_the_way_is_said(refusals: list[dict[str, Any]], number: int) -> None:
    answer, words = refusals[number], REFUSALS[number][-1]
    assert "AdapterFileError" in answer["kinds"], answer
    for word in words:
        assert word in answer["message"]


def test_offline_takes_the_cache_and_says_when_it_lacks_something(hub: Hub, tmp_path: Path) -> None:
    fetch = ("download_adapter", ["team/adapter"], {})
    pickled = ("download_adapter", ["team/pickled"], {})
    (first, second) = call(environment(hub, tmp_path), fetch, pickled)
    before = len(hub.asked)
    offline = environment(hub, tmp_path, HF_HUB_OFFLINE="1")
    again, bin_again, other = call(offline, fetch, pickled, ("download_adapter", ["team/half"], {}))
    assert (again, bin_again) == (first, second)
    assert "HF_HUB_OFFLINE=1" in other["message"]
    assert len(hub.asked) == before


def test_no_network_is_told_from_no_file(hub: Hub, tmp_path: Path) -> None:
    fetch = ("download_adapter", ["team/adapter"], {})
    (first,) = call(environment(hub, tmp_path), fetch)
    nobody = environment(hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    again, other = call(nobody, fetch, ("download_adapter", ["team/half"], {}))
    assert again == first
    assert "http://127.0.0.1:9 does not answer" in other["message"]


def test_a_model_takes_its_adapter_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """from_pretrained with an id equals from_pretrained with the directory."""
    done = run_python(
        TINY
        + """
from veneer import PeftConfig, PeftModel
from veneer.hub import download_adapter

x = torch.randn(5, 4)
for where in ({}, {"revision": "v2"}, {"revision": "v2", "subfolder": "deep/er"}):
    folder = download_adapter("team/adapter", **where)
    near = PeftModel.from_pretrained(Tiny(), folder)
    far = PeftModel.from_pretrained(Tiny(), "team/adapter", **where)
    assert PeftConfig.from_pretrained("team/adapter", **where).r == near.peft_config["default"].r
    assert torch.equal(near(x), far(x)), where
    assert not torch.equal(near(x), Tiny()(x))
    far.load_adapter("team/adapter", "second", **where)
    assert set(far.peft_config) == {"default", "second"}
print("same")
""",
        env=environment(hub, tmp_path),
    )
    assert done.stdout.strip() == "same"


def test_a_local_path_never_touches_the_network(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "local"
    done = run_python(
        TINY
        + """
import sys
from veneer import LoraConfig, PeftModel, get_peft_model

model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["first"]))
model.peft_config["default"].base_model_name_or_path = "team/model"
model.save_pretrained(sys.argv[1])
again = PeftModel.from_pretrained(Tiny(), sys.argv[1])
again.load_adapter(sys.argv[1], "second")
print("huggingface_hub" in sys.modules)
""",
        folder,
        env=environment(hub, tmp_path / "home"),
    )
    assert done.stdout.strip() == "False"
    assert hub.asked == []


def test_an_adapter_is_published_without_what_lies_beside_it(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = run_python(
        TINY
        + """
import sys
from pathlib import Path
from veneer import LoraConfig, PeftModel, get_peft_model

model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["first"]))
model.save_pretrained(sys.argv[1])
Path(sys.argv[1], "optimizer.pt").write_text("not for others")
from veneer.hub import push_to_hub

print(push_to_hub(sys.argv[1], "me/published", token=sys.argv[2], private=True))
far = PeftModel.from_pretrained(Tiny(), "me/published", token=sys.argv[2])
for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, far.state_dict()[name]), name
print(model.push_to_hub("me/from-memory", token=sys.argv[2], commit_message="By hand"))
near = PeftModel.from_pretrained(Tiny(), "me/from-memory")
assert near.state_dict().keys() == far.state_dict().keys()
assert all(torch.equal(tensor, near.state_dict()[name]) for name, tensor in far.state_dict().items())
""",
        tmp_path / "adapter",
        TOKEN,
        env=environment(hub, home),
    )
    assert done.stdout.startswith(f"{hub.endpoint}/me/published/commit/")
    assert f"{hub.endpoint}/me/from-memory/commit/" in done.stdout
    files = hub.repositories["me/published"].branches["main"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()


def test_a_wrong_token_is_refused_and_said(hub: Hub, tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    write_adapter(
        place, {"base_model.model.m.lora_A.weight": torch.ones(2, 4)}, {"peft_type": "LORA", "r": 2}
    )
    refused, public = call(
        environment(hub, tmp_path / "home"),
        ("push_to_hub", [str(place), "me/x"], {"token": "hf_wrong"}),
        ("push_to_hub", [str(place), "team/adapter"], {"token": TOKEN, "private": True}),
    )
    assert all("AdapterFileError" in answer["kinds"] for answer in (refused, public))
    assert "or set HF_TOKEN, or pass token=..." in refused["message"]
    assert "is public. Leave out private=True" in public["message"]


def test_half_a_save_is_not_published(tmp_path: Path) -> None:
    tensors = {"m.lora_A.weight": torch.ones(2, 4)}
    write_adapter(tmp_path, tensors, {"peft_type": "LORA", "r": 2})
    before = (tmp_path / "adapter_config.json").read_bytes()
    write_adapter(tmp_path, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 64})
    (tmp_path / "adapter_config.json").write_bytes(before)
    with pytest.raises(AdapterFileError, match=r"was cut short.*save it again first"):
        push_to_hub(tmp_path, "me/published")


def test_without_huggingface_hub_the_install_line_is_named() -> None:
    done = run_python(
        """
import sys
sys.modules["huggingface_hub"] = None
from veneer.errors import MissingExtraError
from veneer import hub
calls = (("download_file", ("o/n", "x")), ("download_adapter", ("o/n",)), ("push_to_hub", (".", "o/n")))
for name, args in calls:
    try:
        getattr(hub, name)(*args)
    except MissingExtraError as error:
        print(error)
"""
    )
    assert done.stdout.count("pip install 'veneer[hf]'") == 3
