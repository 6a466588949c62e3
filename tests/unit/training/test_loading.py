"""Where a base model goes and how it is kept, with accelerators that are only spoken of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.tiny import Told, tiny_model
from veneer import ConfigError, LoraConfig, TrainingError, get_peft_model
from veneer.training import load_base, loading, run
from veneer.training.adapters import load_adapted
from veneer.training.loading import Loading, check_device, device_map, weight_bytes
from veneer.training.saved_adapter import read_adapter


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_base(base)[0], config).save_pretrained(place)
    return place


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [torch.device("cuda", number) for number in range(2)]
    monkeypatch.setattr(loading, "accelerators", lambda: there)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 10**9)


def test_values_that_cannot_be_right_are_refused_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Loading("int4", "gpu", "int3")
    for part in ("dtype is one of auto, float32", "quantize is one of auto, none", "not 'gpu'"):
        assert part in str(caught.value)


def test_without_an_accelerator_everything_stays_on_the_cpu(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "accelerators", lambda: [])
    for device in ("auto", "cpu"):
        assert device_map(base, Loading(device=device)) == (None, None)
    with pytest.raises(TrainingError, match=r"device='cuda': this machine has no such device, only cpu$"):
        device_map(base, Loading(device="cuda"))


@pytest.mark.usefixtures("two_gpus")
def test_a_base_goes_to_the_first_gpu_or_the_one_that_is_named(base: Path) -> None:
    assert device_map(base, Loading()) == ({"": "cuda:0"}, "The base model goes to cuda:0.")
    assert device_map(base, Loading(device="cuda:1")) == ({"": "cuda:1"}, None)
    assert device_map(base, Loading(device="cpu")) == (None, None)
    assert device_map(base, Loading(device="cpu", quantize="nf4")) == ({"": "cpu"}, None)
    with pytest.raises(TrainingError, match="only cpu, cuda:0, cuda:1"):
        check_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_a_base_that_one_gpu_cannot_hold_is_spread(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = weight_bytes(base, Loading())
    for free, place in ((size / loading.ROOM + 8, {"": "cuda:0"}), (size, "auto")):
        monkeypatch.setattr(loading, "free_bytes", lambda device, free=free: int(free))
        where, said = device_map(base, Loading())
        assert where == place
    assert said is not None and "spread over all devices and the CPU's memory" in said


@pytest.mark.usefixtures("two_gpus")
def test_what_cannot_be_known_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    where, said = device_map(tmp_path, Loading())
    assert where == {"": "cuda:0"} and said is not None and "its size is unknown" in said
    monkeypatch.setattr(loading, "free_bytes", lambda device: None)
    assert device_map(base, Loading())[0] == {"": "cuda:0"}


def test_bytes_of_weights_are_told_from_the_configuration(base: Path) -> None:
    model = tiny_model()
    weights, buffers = (
        sum(tensor.numel() * 4 for tensor in tensors) for tensors in (model.parameters(), model.buffers())
    )
    assert weight_bytes(base, Loading()) == weight_bytes(base, Loading("float32")) == weights + buffers
    assert weight_bytes(base, Loading("bfloat16")) == weights // 2 + buffers
    linears = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    rest = weights + buffers - 4 * linears
    four, eight = (weight_bytes(base, Loading(quantize=kind)) for kind in ("nf4", "int8"))
    assert rest + linears // 2 < four < eight == rest + linears


def test_an_adapter_is_loaded_as_it_was_asked_for(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    asked: list[dict[str, Any]] = []
    load = AutoModelForCausalLM.from_pretrained

    def watched(source: Any, **options: Any) -> Any:
        asked.append(options)
        return load(source, **{**options, "device_map": None})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    monkeypatch.setattr(loading, "accelerators", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(loading, "free_bytes", lambda device: 10**9)
    progress = Told()
    model, _ = load_adapted(
        adapter, str(base), Loading("bfloat16", attn_implementation="eager"), progress=progress
    )
    assert asked[0]["device_map"] == {"": "cuda:0"} and model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert progress.lines == ["The base model goes to cuda:0."]


@pytest.mark.parametrize("there", [True, False])
def test_an_adapter_is_used_over_what_it_was_trained_over(
    there: bool, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "metrics.json").write_text(json.dumps({"options": {"quantize": "nf4" if there else "int4"}}))
    if not there:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    progress, saved = Told(), read_adapter(tmp_path)
    model, _ = load_adapted(saved, str(base), Loading(quantize="auto"), progress=progress)
    kind = type(model.get_base_model().model.layers[0].mlp.up_proj).__name__
    assert kind == ("Linear4bit" if there else "Linear")
    expected = "kept in nf4" if there else "int4, which this machine cannot use (it needs a GPU)"
    assert expected in progress.lines[0]
    (tmp_path / "metrics.json").write_text('{"options": "none that are known"}')
    plain, _ = load_adapted(saved, str(base), Loading(quantize="auto"))
    assert type(plain.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear"


def test_a_run_says_which_gpus_stay_idle_and_what_is_wider_than_it_needs_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(run, "accelerators", lambda: [torch.device("cuda", number) for number in range(4)])
    idle, wide = run._about_devices(tiny_model())
    assert "one of 4 GPUs" in idle and "torchrun --nproc-per-node 4 -m veneer train" in idle
    assert "float32" in wide and "bfloat16" in wide
    monkeypatch.setenv("RANK", "0")
    assert not list(run._about_devices(tiny_model().bfloat16()))
    monkeypatch.setattr(run, "accelerators", lambda: [])
    assert not list(run._about_devices(tiny_model()))


@pytest.mark.parametrize(("rank", "device"), [("0", "cuda:0"), ("1", "cuda:1")])
@pytest.mark.usefixtures("two_gpus")
def test_each_process_trains_on_a_device_of_its_own(
    rank: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(loading.training_device()) == device
