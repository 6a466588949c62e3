"""Generate answers to prompts: in batches, or for a file of records."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from ..atomic import atomic_file
from .data import Records, pad_token
from .data.encoding import each, prompt_tokens
from .forward import evaluating
from .progress import Advance, Progress, Silent
from .sampling import Sampling

#: The column of answers; the name is that of transformers' pipelines.
ANSWER = "generated_text"


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    temperature: float = 0.0,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[str]:
    """Answer tokenised prompts, in batches padded on the left.

    Args:
        model: A causal language model of transformers, adapted or not.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        max_new_tokens: Maximum length of an answer.
        batch_size: Prompts in a batch; those of similar length are batched together.
        temperature: 0 takes the likeliest token at each step.
        sampling: Replaces ``max_new_tokens`` and ``temperature``.
        progress: Where to report.
        adapter_names: The adapter that answers each prompt, as in `PeftModel.generate`.

    Returns:
        The answers in the order of the prompts, without special tokens.
    """
    config = (sampling or Sampling(max_new_tokens, temperature=temperature)).config(model, tokenizer)
    with evaluating(model), (progress or Silent()).bar("answers", len(prompts)) as advance:
        return batched_answers(model, tokenizer, prompts, config, batch_size, advance, adapter_names)


@torch.no_grad()
def batched_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    config: Any,
    batch_size: int,
    advance: Advance,
    adapter_names: Sequence[str] | None = None,
) -> list[str]:
    """The answers in the order of the prompts; see `generate_answers`."""
    device, pad = next(model.parameters()).device, pad_token(tokenizer)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        routed = {}
        if adapter_names is not None:
            places.sort(key=lambda place: adapter_names[place])  # rows of one adapter lie together
            routed = {"adapter_names": [adapter_names[place] for place in places]}
        longest = max(len(prompts[place]) for place in places)
        gaps = [longest - len(prompts[place]) for place in places]
        ids = [[pad] * gap + prompts[place] for gap, place in zip(gaps, places, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        out = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            **routed,
        )
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            answers[place] = text
        advance(len(places), "")
    return answers


def prompts_of(records: Records, tokenizer: Any) -> list[list[int]]:
    """The tokens of each record's prompt, laid out as in training."""
    return each(records, "prompt", lambda example, form: prompt_tokens(example, tokenizer, form.separator))


def answer_file(
    model: Any,
    tokenizer: Any,
    records: Records,
    output: Path,
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 8,
    made_by: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Answer every record and write records and answers as JSONL; the file appears when it is complete.

    Until then, answers are kept in a file beside it, and the same call resumes from there.

    Args:
        model: A causal language model of transformers, adapted or not.
        tokenizer: Its tokenizer.
        records: Read with the purpose ``prompt``.
        output: The file; each line is a record with ``generated_text``.
        sampling: How tokens are chosen.
        seed: Seed of drawing, applied to each block of records, so that a resumed call draws the same.
        batch_size: Prompts in a batch.
        made_by: What else the answers depend on; a file begun with something else is not resumed.
        progress: Where to report.

    Returns:
        How many answers were there already.
    """
    progress = Silent() if progress is None else progress
    prompts = prompts_of(records, tokenizer)
    block = 8 * batch_size
    part = output.with_name(f".{output.name}.part")
    how = {"sampling": asdict(sampling), "seed": seed, "block": block, **(made_by or {})}
    mark = hashlib.sha256(json.dumps([how, list(records)], sort_keys=True, default=str).encode()).hexdigest()
    config = sampling.config(model, tokenizer)
    done = _begun(part, mark, block)
    if done:
        progress.say(f"Continuing after {done} earlier answers, in {part}")
    else:
        part.unlink(missing_ok=True)  # begun with other settings, or a link to another file
    with (
        open(part, "a" if done else "x", encoding="utf-8", newline="") as file,
        evaluating(model),
        progress.bar("answers", len(records)) as advance,
    ):
        if not done:
            _write(file, [{"begun": mark}])
        advance(done, "")
        for start in range(done, len(records), block):
            torch.manual_seed(seed + start)
            chosen = prompts[start : start + block]
            answers = batched_answers(model, tokenizer, chosen, config, batch_size, advance)
            found = zip(records[start : start + block], answers, strict=True)
            _write(file, [{**record, ANSWER: answer} for record, answer in found])
    _without_first_line(part, output)
    return done


def _write(file: IO[str], records: Sequence[Mapping[str, Any]]) -> None:
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    file.flush()


def _begun(part: Path, mark: str, block: int) -> int:
    """The number of answers in complete blocks of a file with this mark; the rest is cut off."""
    if part.is_symlink():
        return 0
    try:
        lines = part.read_bytes().split(b"\n")
        begun = json.loads(lines[0])
    except (OSError, ValueError):
        return 0
    if not isinstance(begun, dict) or begun.get("begun") != mark:
        return 0
    done = (len(lines) - 2) // block * block
    if done > 0:
        with open(part, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[: done + 1]))
    return max(done, 0)


def _without_first_line(part: Path, output: Path) -> None:
    """Move the answers to the output."""
    with atomic_file(output) as whole, open(part, "rb") as source, open(whole, "wb") as target:
        source.readline()
        shutil.copyfileobj(source, target, 1 << 20)
    part.unlink()
