"""Sampling from several adapters in one batch, each row with random numbers of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, DataError
from veneer.peft_model import PeftModel


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        tokens: Without the prompt; the token that ended it is the last.
        logprobs: Log-probability of each under the adapter, whatever the temperature.
    """

    tokens: list[int]
    logprobs: list[float]


class Chooser:
    """Chooses the next token of each row; for ``generate`` as a processor of logits before an argmax.

    A token is drawn by adding Gumbel noise from the row's own generator, so no row depends on another.

    Args:
        generators: One for each row.
        temperature: 0 takes the likeliest token.
    """

    def __init__(self, generators: Sequence[torch.Generator], temperature: float) -> None:
        self.generators = generators
        self.temperature = temperature
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (rows, vocabulary) -> the same shape, the chosen token largest."""
        scores = scores.float()
        chosen = self._noisy(scores).argmax(-1, keepdim=True)
        self.tokens.append(chosen.squeeze(1))
        self.logprobs.append(scores.log_softmax(-1).gather(1, chosen).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    def _noisy(self, scores: Tensor) -> Tensor:
        if not self.temperature:
            return scores
        uniform = torch.stack(
            [torch.rand(scores.shape[1], generator=one, device=one.device) for one in self.generators]
        )
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1.0 - 1e-7)))
        return scores / self.temperature + noise.to(scores.device)


def check_prompts(prompts: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Refuse what is no list of prompts by adapter.

    Raises:
        DataError: Listing every adapter whose prompts cannot be used.
    """
    problems = []
    for name, given in prompts.items():
        every: Sequence[Any] = given
        if not all(isinstance(one, list | tuple) and one and {*map(type, one)} == {int} for one in every):
            problems.append(f"{name!r}: a list of prompts is needed, each a list of at least one token")
    if not any(len(given) for given in prompts.values()):
        problems.append("there is no prompt")
    if problems:
        raise DataError(f"nothing can be sampled: {'; '.join(problems)}")


@torch.no_grad()
def sample(
    model: PeftModel,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    generators: Mapping[str, torch.Generator],
    *,
    num_samples: int,
    max_tokens: int,
    temperature: float,
    stop: Sequence[int],
) -> dict[str, list[list[Sample]]]:
    """Answers of each adapter to its prompts: ``[prompt][sample]``; see `Family.sample`.

    Raises:
        ConfigError: The model cannot generate.
    """
    base: Any = model.get_base_model()
    if not hasattr(base, "generate"):
        raise ConfigError(f"{type(base).__name__} has no generate, so nothing can be sampled from it")
    owners = [n for n, given in prompts.items() for _ in range(len(given) * num_samples)]
    rows = [list(one) for given in prompts.values() for one in given for _ in range(num_samples)]
    seeds = {
        n: torch.randint(2**62, (len(given) * num_samples,), generator=generators[n], device="cpu").tolist()
        for n, given in prompts.items()
    }
    own = [torch.Generator().manual_seed(seed) for every in seeds.values() for seed in every]
    longest, padding = max(map(len, rows)), stop[0] if stop else 0
    device = next(base.parameters()).device
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    chooser = Chooser(own, temperature)
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        adapter_names=owners,
        logits_processor=[chooser],
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        max_new_tokens=max_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=padding,
    )
    tokens = torch.stack(chooser.tokens, 1).tolist()
    logprobs = torch.stack(chooser.logprobs, 1).tolist()
    answers = [_until(stop, *both) for both in zip(tokens, logprobs, strict=True)]
    found, at = {}, 0
    for name, given in prompts.items():
        found[name] = [answers[at + i * num_samples : at + (i + 1) * num_samples] for i in range(len(given))]
        at += len(given) * num_samples
    return found


def _until(stop: Sequence[int], tokens: list[int], logprobs: list[float]) -> Sample:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return Sample(tokens[:end], logprobs[:end])
