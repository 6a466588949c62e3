"""How the next token of an answer is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, Hint, Text
from .bounds import bounded, wrong_values


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, with the names and meanings of transformers.

    Attributes:
        max_new_tokens: Maximum length of an answer.
        do_sample: Sample instead of taking the most likely token. None samples if ``temperature`` (not 0),
            ``top_p`` or ``top_k`` is given.
        temperature: Divides the logits before sampling.
        top_p: Sample from the most likely tokens that make up this share.
        top_k: Sample from this many of the most likely tokens.
        repetition_penalty: Divides the scores of tokens that occur already; 1 changes nothing.
    """

    max_new_tokens: int = bounded(128, above=0)
    do_sample: bool | None = None
    temperature: float | None = bounded(None, least=0)
    top_p: float | None = bounded(None, above=0, most=1)
    top_k: int | None = bounded(None, above=0)
    repetition_penalty: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        wrong = wrong_values(self)
        drawn = [Hint(n) for n in ("temperature", "top_p", "top_k") if getattr(self, n)]
        if self.do_sample is False and drawn:
            named = Text.join(" and ", drawn)
            wrong.append(Text(named, " say how to sample, but ", Hint("do_sample"), " is off"))
        if self.temperature == 0 and (self.do_sample or len(drawn) > 0):
            zero = Hint("temperature", 0)
            wrong.append(Text(zero, " takes the most likely token, so there is nothing to sample"))
        if wrong:
            raise ConfigError(Text.join("; ", wrong))

    @property
    def draws(self) -> bool:
        """Whether tokens are sampled."""
        if self.do_sample is not None:
            return self.do_sample
        return any((self.temperature, self.top_p, self.top_k))

    def config(self, model: Any, tokenizer: Any) -> Any:
        """As a ``GenerationConfig``; an answer ends at the end tokens of the model and of the tokenizer."""
        from transformers import GenerationConfig

        from .data import pad_token

        own = getattr(model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
            ends.append(tokenizer.eos_token_id)
        settings: dict[str, Any] = {"do_sample": self.draws}
        if self.draws:
            # Neutral values, or transformers would take those of the model's own configuration.
            settings |= {
                "temperature": self.temperature or 1.0,
                "top_p": self.top_p or 1.0,
                "top_k": self.top_k or 0,
            }
        if self.repetition_penalty is not None:
            settings["repetition_penalty"] = self.repetition_penalty
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=pad_token(tokenizer),
            bos_token_id=getattr(own, "bos_token_id", None),
            eos_token_id=ends or None,
            **settings,
        )
