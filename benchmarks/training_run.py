"""How long does a training run take beside the same run by TRL's SFTTrainer with a PEFT adapter?

Rows as those of the demo: a long prompt and a short answer, which alone has a loss. All sides train the same
adapter on the same rows with the same options, from building the trainer to saved files, and take turns in
one process. TRL with Veneer's adapter tells how much of it is the adapter, and how much the loss.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._models import LINEARS, library, llama
from benchmarks.harness import THREADS, Report, Row, question, ratio, take_turns
from examples.data import fast_dtype

#: A run of veneer train takes at most this share of TRL's with PEFT: 1.8 times as fast.
BAR = 1 / 1.8
DROPOUTS = (0.0, 0.05)
HIDDEN, LAYERS, VOCABULARY = 576, 30, 49152
STEPS, BATCH, PROMPT, ANSWER = 12, 4, 200, 30


def rows() -> list[dict[str, list[int]]]:
    """Tokens of a prompt and an answer, each a little longer or shorter."""
    drawn = torch.Generator().manual_seed(0)
    made = []
    for number in range(STEPS * BATCH):
        prompt, answer = PROMPT + number % 9 - 4, ANSWER + number % 7 - 3
        ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=drawn).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def adapted(side: str, p: float) -> Any:
    lora = library(side)
    base = llama(HIDDEN, LAYERS, fast_dtype(), head=True, vocabulary=VOCABULARY)
    config = lora.LoraConfig(
        r=16, lora_alpha=16, lora_dropout=p, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return lora.get_peft_model(base, config)


def veneer_run(p: float, steps: int) -> float:
    from veneer.training import TrainOptions, train

    model, options = adapted("veneer", p), TrainOptions(max_steps=steps, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        train(model, tokenizer(), rows(), place, options)
        return time.perf_counter() - start


def trl_run(side: str, p: float, steps: int) -> float:
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    model = adapted(side, p)
    data = Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(n != -100) for n in row["labels"]]}
            for row in rows()
        ]
    )
    with tempfile.TemporaryDirectory() as place:
        options = SFTConfig(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=2e-4,
            completion_only_loss=True,
            max_length=None,
            activation_checkpointing=False,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        start = time.perf_counter()
        trainer = SFTTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(place)
        return time.perf_counter() - start


def sides(p: float, steps: int) -> dict[str, Callable[[], float]]:
    return {
        "veneer": lambda: veneer_run(p, steps),
        "TRL, Veneer's adapter": lambda: trl_run("veneer", p, steps),
        "TRL, PEFT": lambda: trl_run("PEFT", p, steps),
    }


def measure(quick: bool) -> Report:
    for module in ("veneer.training.trainer", "trl.trainer.sft_trainer", "peft"):
        importlib.import_module(module)  # not a part of anybody's first run
    torch.set_num_threads(THREADS)
    steps, rounds = (2, 1) if quick else (STEPS, 3)
    table = []
    for p in DROPOUTS:
        seconds = take_turns(sides(p, steps), rounds=rounds, warm_up=0)
        peer = seconds["TRL, PEFT"]
        table.append(
            Row(
                f"dropout {p}: run ÷ that of TRL with PEFT",
                ratio(seconds["veneer"], peer),
                at_most=BAR,
                beside={"TRL, Veneer's adapter": ratio(seconds["TRL, Veneer's adapter"], peer)},
            )
        )
    conditions = {
        "model": f"Llama-shaped, hidden {HIDDEN}, {LAYERS} layers, {VOCABULARY} tokens, {fast_dtype()}",
        "run": f"{steps} steps of {BATCH} rows, {PROMPT} tokens of prompt and {ANSWER} of answer",
        "adapter": "r = 16 on every linear, float32 factors",
    }
    return Report(question(__doc__), table, conditions)
