"""A model for lm-evaluation-harness: several adapters of one base, answered in mixed batches.

Importing this module registers it as ``veneer``. lm_eval finds by itself only the models that it ships, so
its command line runs through this module, with the same arguments::

    python -m veneer.integrations.lm_eval --model veneer --model_args "pretrained=BASE,adapters=A;B;C" …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from veneer.checks import check_adapters_act
from veneer.errors import ConfigError, Hint
from veneer.peft_model import PeftModel
from veneer.routing import BASE

#: (log-probability of a continuation, whether it is the likeliest).
Answer = tuple[float, bool]


@register_model("veneer")
class VeneerLM(HFLM):
    """A causal language model that answers as one of several adapters, and keeps what the others answer.

    Every request is computed for all adapters in one mixed batch. lm_eval asks for one model at a time: for
    the next adapter, `answer_as` it and evaluate again, which takes the kept answers.

    Args:
        pretrained: The base: a directory, a hub id or a model.
        adapters: Directories or hub ids, separated by ``;``; ``__base__`` is the base by itself.
        adapter: Which of them answers; needed if there are several.
        **options: As for lm_eval's ``hf``. A batch holds ``batch_size`` requests for each adapter.

    Raises:
        ConfigError: Several adapters and no choice, or one that is not among them.
        VeneerError: Some adapters change nothing; names all of them.
        AdapterFileError, BaseMismatchError, LoadMismatchError: As in `PeftModel.from_pretrained`.
    """

    def __init__(self, pretrained: Any, adapters: str, adapter: str | None = None, **options: Any) -> None:
        self.adapters = adapters.split(";")
        self.answer_as(adapter or adapters)
        self._answers: dict[Any, list[Answer]] = {}
        self._generated: dict[Any, Sequence[torch.Tensor]] = {}
        super().__init__(pretrained, **options)
        if not isinstance(pretrained, str):
            self._model = self._adapted(self._model)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: Any = None) -> VeneerLM:
        """The model that was made last, if only the adapter that answers differs."""
        options = {**arg_dict, **(additional_config or {})}
        adapter = options.pop("adapter", None)
        if cls._last is None or cls._last[0] != options:
            cls._last = None  # two bases may not fit
            made = super().create_from_arg_obj({**arg_dict, "adapter": adapter}, additional_config)
            cls._last = (options, made)
        last: VeneerLM = cls._last[1]
        last.answer_as(adapter or options["adapters"])
        return last

    _last: tuple[dict[str, Any], VeneerLM] | None = None
    _model: Any

    def answer_as(self, adapter: str) -> None:
        """Let this adapter give the answers from now on.

        Raises:
            ConfigError: It is not among the adapters.
        """
        if adapter not in self.adapters:
            raise ConfigError(
                Hint("adapter"), f" is the one of {', '.join(self.adapters)} that answers, not {adapter!r}"
            )
        self.adapter = adapter

    @property
    def _names(self) -> list[str]:
        """The names of the adapters in the model."""
        return [BASE if one == BASE else str(number) for number, one in enumerate(self.adapters)]

    def _create_model(self, *given: Any, **options: Any) -> None:
        super()._create_model(*given, **options)
        self._model = self._adapted(self._model)

    def _adapted(self, model: Any) -> Any:
        labels = {name: place for name, place in zip(self._names, self.adapters, strict=True) if name != BASE}
        adapted: Any = None
        for name, place in labels.items():
            if adapted is None:
                adapted = PeftModel.from_pretrained(model, place, adapter_name=name)
            else:
                adapted.load_adapter(place, name)
        check_adapters_act(adapted, labels)
        return adapted.eval()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        asked = [(tuple(context), tuple(wanted)) for _, context, wanted in requests]
        new = sorted({*asked} - self._answers.keys(), key=lambda one: (-len(one[0]) - len(one[1]), one))
        size = override_bs or self.batch_size
        if size == "auto":
            size = max(1, self._detect_batch_size() // len(self.adapters))
        for start in range(0, len(new), size):
            chosen = new[start : start + size]
            self._answers.update(zip(chosen, self._mixed_answers(chosen), strict=True))
        mine = self.adapters.index(self.adapter)
        answers = [self._answers[one][mine] for one in asked]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    @torch.no_grad()
    def _mixed_answers(self, asked: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[Answer]]:
        """For each (context, continuation) the answers of all adapters."""
        rows = [[*context, *wanted][-(self.max_length + 1) : -1] for context, wanted in asked]
        longest = max(map(len, rows))
        # What stands behind a row is seen by none of its tokens.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        owners = [name for name in self._names for _ in rows]
        kind = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            logits = self.model(ids.repeat(len(self.adapters), 1), adapter_names=owners).logits
        found: list[list[Answer]] = []
        for number, (_, wanted) in enumerate(asked):
            end, tokens = len(rows[number]), torch.tensor(wanted, device=self.device)
            own = logits[number :: len(rows), end - len(wanted) : end].log_softmax(
                -1, dtype=self.softmax_dtype
            )
            sums = own.gather(2, tokens.expand(len(own), -1).unsqueeze(2)).squeeze(2).sum(1)
            likeliest = (own.argmax(-1) == tokens).all(1)
            found.append(list(zip(sums.tolist(), likeliest.tolist(), strict=True)))
        return found

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        plain = {name: value for name, value in options.items() if not isinstance(value, torch.Tensor)}
        key = (str(context.tolist()), max_length, *stop, str(sorted(plain.items())))
        if key not in self._generated:
            count = len(self.adapters)
            repeated = {
                name: value.repeat(count, 1) if isinstance(value, torch.Tensor) else value
                for name, value in options.items()
            }
            owners = [name for name in self._names for _ in context]
            out = super()._model_generate(
                context.repeat(count, 1), max_length, stop, adapter_names=owners, **repeated
            )
            self._generated[key] = out.chunk(count)
        return self._generated[key][self.adapters.index(self.adapter)]


def main() -> None:
    """lm_eval's command line, once for each adapter; from the second on, its answers are there already."""
    parser = HarnessCLI()
    args = parser.parse_args()
    given, cache = getattr(args, "model_args", None) or {}, getattr(args, "use_cache", None)
    several = args.model == "veneer" and "adapter" not in given and given.get("adapters", "").split(";")
    for number, adapter in enumerate(several or [None]):
        if adapter:
            args.model_args = {**given, "adapter": adapter}
            args.use_cache = cache and f"{cache}-{number}"  # lm_eval's cache does not know adapters
        parser.execute(args)


if __name__ == "__main__":
    main()
