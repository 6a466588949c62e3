"""``veneer train``: fine-tune a causal language model on a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import app, show_json, size


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    data: Annotated[Path, typer.Option(help="JSONL with prompt and completion, or messages.")],
    output: Annotated[Path, typer.Option(help="Directory for the adapter.")],
    lora_r: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    lora_alpha: Annotated[float, typer.Option(help="Numerator of the scaling alpha / r.")] = 16.0,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the factors.")] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names with commas, or an expression.")
    ] = "all-linear",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    epochs: Annotated[
        float, typer.Option("--epochs", "--num-train-epochs", help="Passes over the data.")
    ] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; goes before --epochs.")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-train-batch-size", help="Examples a forward pass.")
    ] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Forward passes an optimizer step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the factors, the order of the data, and dropout.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: type of the base.")
    ] = "auto",
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; 0 writes none.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Fine-tune a causal language model with an adapter; loss falls on the answers only."""
    import torch

    from .. import LoraConfig, get_peft_model
    from ..training import Terminal, TrainOptions, encode, load_base, read_records
    from ..training import train as run
    from ..training.models import check_output, refuse_file
    from ..training.plots import can_plot, loss_picture

    progress = Terminal()
    options = TrainOptions(
        learning_rate=learning_rate,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        seed=seed,
        save_steps=save_steps,
        resume=resume,
    )
    config = LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=_targets(target_modules),
        task_type="CAUSAL_LM",
    )
    check_dtype(dtype)
    refuse_file(output)
    records = read_records(data)
    if Path(model).is_dir():  # the adapter notes where its base is, for whoever stands elsewhere later
        model = str(Path(model).resolve())
    base, tokenizer = load_base(model, dtype)
    encoded = encode(records, tokenizer, max_length)
    progress.say(f"{len(encoded.rows)} examples from {data}")
    if encoded.cut:
        progress.say(
            f"warning: {encoded.cut} examples are longer than {max_length} tokens and were cut"
            + (
                f"; {encoded.dropped} of them lost their whole answer and were left out"
                * bool(encoded.dropped)
            )
        )
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(base, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    progress.say(f"Training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    check_output(output)
    metrics = run(adapted, tokenizer, encoded.rows, output, options, progress)
    losses = [entry["loss"] for entry in metrics["losses"]]
    if can_plot() and losses:
        loss_picture(output / "loss.png", losses, "Training loss")
    if as_json:
        show_json(metrics)
        return
    weights = (output / "adapter_model.safetensors").stat().st_size
    print(f"{metrics['steps']} steps in {metrics['seconds']:.0f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"adapter ({size(weights)}): {output}")


def _targets(text: str) -> str | list[str]:
    """A list where names are divided by commas, else what it is: a name, a keyword or an expression."""
    names = [name.strip() for name in text.split(",")]
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    return names if plain and names != ["all-linear"] else text


def check_dtype(dtype: str) -> None:
    """Refuse a type that models are not loaded in."""
    known = ("auto", "float32", "bfloat16", "float16")
    if dtype not in known:
        raise typer.BadParameter(f"--dtype is one of {', '.join(known)}, not {dtype!r}")
