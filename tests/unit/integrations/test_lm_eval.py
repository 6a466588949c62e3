"""The model for lm-evaluation-harness over a stand-in; `make other-trainers` runs the real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import tiny_model
from veneer import ConfigError, LoraConfig, PeftModel, VeneerError, get_peft_model
from veneer.routing import BASE

NAME = "veneer.integrations.lm_eval"
ASKED = [(("q", "a"), [5, 6, 7], [8, 9]), (("q", "b"), [5, 6, 7], [10]), (None, [4], [11, 12, 13])]


class Harness:
    """As lm_eval's HFLM: options, a model, and how it calls `generate`."""

    mixed_precision_dtype = softmax_dtype = None
    device, max_length = torch.device("cpu"), 5

    def __init__(self, pretrained: Any, batch_size: Any = 2) -> None:
        self.batch_size, self.told = batch_size, []
        self.cache_hook = SimpleNamespace(add_partial=lambda *given: self.told.append(given))
        self._model = pretrained
        if isinstance(pretrained, str):
            self._create_model(pretrained)

    model = property(lambda self: self._model)

    def _create_model(self, seed: str) -> None:
        self._model = tiny_model(int(seed))

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> Any:
        return cls(**arg_dict, **(additional_config or {}))

    def _detect_batch_size(self) -> int:
        return 4

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        return self.model.generate(context, max_length=max_length, do_sample=False, **options)


class Command:
    """As lm_eval's command line: what it was called with, and what it ran."""

    ran: list[dict[str, Any]]

    def parse_args(self) -> SimpleNamespace:
        return self.given

    def execute(self, args: SimpleNamespace) -> None:
        self.ran.append({"model_args": args.model_args, "use_cache": args.use_cache})


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """The module, imported over the stand-in."""
    parts = {
        "lm_eval": {},
        "lm_eval._cli": {"HarnessCLI": Command},
        "lm_eval.api": {},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": Harness},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, content in parts.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, NAME, raising=False)
        yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("adapters")
    for r in (2, 3):
        torch.manual_seed(r)
        config = LoraConfig(r=r, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(tiny_model(), config).save_pretrained(place / str(r))
    return [str(place / "2"), BASE, str(place / "3")]


def alone(adapter: str) -> Any:
    return tiny_model() if adapter == BASE else PeftModel.from_pretrained(tiny_model(), adapter)


@torch.no_grad()
def expected(model: Any, context: list[int], wanted: list[int]) -> tuple[float, bool]:
    ids = [*context, *wanted][-6:]
    logits = model(torch.tensor([ids[:-1]])).logits[0, -len(wanted) :].log_softmax(-1)
    likeliest = logits.argmax(-1).tolist() == wanted
    return float(logits[range(len(wanted)), wanted].sum()), likeliest


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_every_adapter_answers_as_alone_and_the_model_runs_for_the_first_only(
    harness: Any, adapters: list[str], batch_size: Any
) -> None:
    lm = harness.VeneerLM("0", ";".join(adapters), adapters[0], batch_size=batch_size)
    context = torch.tensor([[0, 5, 6], [7, 8, 9]])
    mask = (context != 0).long()
    for adapter in adapters:
        lm.answer_as(adapter)
        found, model = lm._loglikelihood_tokens(ASKED), alone(adapter)
        for (_, before, wanted), (logprob, likeliest) in zip(ASKED, found, strict=True):
            right = expected(model, before, wanted)
            assert_close(torch.tensor(logprob), torch.tensor(right[0]))
            assert likeliest == right[1]
        assert lm.told[-2:] == [("loglikelihood", ASKED[i][0], found[i]) for i in (0, 1)]
        written = lm._model_generate(context, 6, ["."], attention_mask=mask)
        own = model.generate(context, max_length=6, do_sample=False, attention_mask=mask)
        assert torch.equal(written[:, : own.shape[1]], own)
        lm._model = None  # it has answered for all of them


def test_the_next_adapter_gets_the_model_that_was_made_last(harness: Any, adapters: list[str]) -> None:
    given = {"pretrained": tiny_model(), "adapters": ";".join(adapters)}
    first = harness.VeneerLM.create_from_arg_obj({**given, "adapter": adapters[2]}, {"batch_size": 3})
    assert first.adapter == adapters[2] and first.batch_size == 3
    second = harness.VeneerLM.create_from_arg_obj({**given, "adapter": adapters[0]}, {"batch_size": 3})
    assert second is first and first.adapter == adapters[0]
    other = harness.VeneerLM.create_from_arg_obj({**given, "pretrained": "0", "adapter": adapters[0]})
    assert other is not first


def test_what_cannot_answer_is_refused(harness: Any, adapters: list[str], tmp_path: Path) -> None:
    for chosen in (None, "other"):
        with pytest.raises(ConfigError, match=r"adapter.* is the one of .*__base__"):
            harness.VeneerLM("0", ";".join(adapters), chosen)
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "idle"
    )
    with pytest.raises(VeneerError, match="idle changes nothing"):
        harness.VeneerLM("0", f"{adapters[0]};{tmp_path / 'idle'}", adapters[0])


def test_the_command_line_runs_once_for_each_adapter(harness: Any) -> None:
    one = {"pretrained": "base", "adapters": "a;b"}
    Command.given = SimpleNamespace(model="veneer", model_args=one, use_cache="kept")
    Command.ran = []
    harness.main()
    assert Command.ran == [
        {"model_args": {**one, "adapter": "a"}, "use_cache": "kept-0"},
        {"model_args": {**one, "adapter": "b"}, "use_cache": "kept-1"},
    ]
    Command.given = SimpleNamespace(model="hf", model_args={"pretrained": "base"}, use_cache=None)
    Command.ran = []
    harness.main()
    assert Command.ran == [{"model_args": {"pretrained": "base"}, "use_cache": None}]
