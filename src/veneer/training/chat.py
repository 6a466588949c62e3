"""A conversation with a base model and its adapters, any of which can answer the next turn."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch

from ..errors import AdapterNameError, VeneerError
from .data import has_template, prompt_ids
from .forward import evaluating
from .sampling import Sampling
from .stopping import stop_on_signals

Write = Callable[[str], None]


class Chat:
    """A conversation so far, and the adapter that answers next.

    Args:
        model: From `load_adapted`.
        tokenizer: Its tokenizer. Without a chat template each question is continued on its own.
        sampling: How tokens are chosen.
        system: The system message.

    Raises:
        VeneerError: A system message without a chat template.
    """

    def __init__(
        self, model: Any, tokenizer: Any, sampling: Sampling | None = None, system: str | None = None
    ) -> None:
        if system and not has_template(tokenizer):
            raise VeneerError("this model has no chat template, so it cannot take a system message")
        self.model, self.tokenizer = model, tokenizer
        self.sampling = Sampling(max_new_tokens=512) if sampling is None else sampling
        self.system = system
        self.messages: list[dict[str, str]] = []
        #: Who answers; None is the base model.
        self.adapter: str | None = next(iter(model.peft_config), None)
        self.clear()

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters."""
        return list(self.model.peft_config)

    @property
    def remembers(self) -> bool:
        """Whether the model sees earlier turns."""
        return has_template(self.tokenizer)

    def clear(self) -> None:
        """Forget all turns."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def use(self, adapter: str | None) -> None:
        """Let an adapter answer from now on, or with None the base model.

        Raises:
            AdapterNameError: There is no such adapter; nothing has changed.
        """
        if adapter is not None:
            if adapter not in self.adapters:
                raise AdapterNameError(f"no adapter {adapter!r}; there are: {', '.join(self.adapters)}")
            self.model.set_adapter(adapter)
        self.adapter = adapter

    def ask(self, text: str, write: Write) -> str:
        """Answer one turn, piece by piece.

        Ctrl-C ends the answer early; what there is of it stays in the conversation.

        Args:
            text: The user's turn.
            write: Called with each piece of the answer.

        Returns:
            The whole answer.

        Raises:
            VeneerError: The turn cannot be laid out or is too long; the conversation is unchanged.
        """
        turn = {"role": "user", "content": text}
        ids = prompt_ids([*self.messages, turn] if self.remembers else text, self.tokenizer)
        limit = getattr(self.model.get_base_model().config, "max_position_embeddings", None)
        if limit is not None and len(ids) >= limit:
            raise VeneerError(
                f"the conversation has {len(ids)} tokens, and the model reads {limit} at most: "
                "/clear starts over"
            )
        room = None if limit is None else limit - len(ids)
        answer = self._answer(ids, write, room)
        self.messages += [turn, {"role": "assistant", "content": answer}]
        return answer

    def again(self, write: Write) -> str:
        """Answer the last turn again, with the current adapter.

        Raises:
            VeneerError: There is no turn yet.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise VeneerError("nothing has been asked yet")
        before, question = self.messages, self.messages[-2]["content"]
        self.messages = before[:-2]
        try:
            return self.ask(question, write)
        except BaseException:
            self.messages = before
            raise

    @torch.no_grad()
    def _answer(self, ids: list[int], write: Write, room: int | None) -> str:
        from transformers import StoppingCriteriaList, TextStreamer

        pieces: list[str] = []

        class Pieces(TextStreamer):
            """Passes text on instead of printing it."""

            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                write(text)

        device = next(self.model.parameters()).device
        given = torch.tensor([ids], device=device)
        config = self.sampling.config(self.model, self.tokenizer)
        if room is not None:
            config.max_new_tokens = min(config.max_new_tokens, room)
        with (
            evaluating(self.model, base=self.adapter is None),
            stop_on_signals(kinds=[signal.SIGINT]) as stop,
        ):
            self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                generation_config=config,
                streamer=Pieces(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=StoppingCriteriaList(
                    [lambda tokens, scores, **more: _all(tokens, stop.asked)]
                ),
            )
        return "".join(pieces).strip()


def _all(tokens: Any, value: bool) -> Any:
    """The value for every row, as transformers expects of a stopping criterion."""
    return torch.full((tokens.shape[0],), value, device=tokens.device, dtype=torch.bool)
