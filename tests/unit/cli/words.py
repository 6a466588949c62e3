"""What a user types to train."""

from __future__ import annotations

from pathlib import Path


def train_words(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    files = ["--model", str(base), "--data", str(data), "--output", str(output)]
    how = "--max-steps 4 --batch-size 4 --learning-rate 0.01 --lora-r 4".split()
    return ["train", *files, *how, *more]
