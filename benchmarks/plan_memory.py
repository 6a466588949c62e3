"""Does `veneer plan` predict the memory that a training step takes? Predicted against measured peaks.

Each measurement is a fresh process: a model is made, adapted, trained for two steps with AdamW as
`veneer train` does it, and the peak of the second step is read from torch's own allocator, of which the
profiler records every allocation and release, those inside an operation too: exact and repeatable. Weights
are random: their values take no part in it. The bar is a tenth, of all memory and of what comes on top of
weights and optimizer state.
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness import Figure, Report, Row, in_fresh_process, question

#: Shapes of models in common use.
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "GPT-2": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    "MiniLM-L6": {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "pad_token_id": 0,
    },
}
#: What a case may set, and its usual value.
USUAL = {
    "dtype": "float32",
    "checkpointing": False,
    "padded": False,
    "dropout": 0.0,
    "batch": 2,
    "length": 192,
}
CASES: list[dict[str, Any]] = [
    *(
        {"model": name, "dtype": dtype, "checkpointing": checkpointing}
        for name in MODELS
        for dtype, checkpointing in (("float32", False), ("bfloat16", True))
    ),
    {"model": "SmolLM2-135M", "checkpointing": True},
    {"model": "SmolLM2-135M", "padded": True, "dropout": 0.05},
    {"model": "MiniLM-L6", "batch": 16, "length": 64, "padded": True},
]
TOLERANCE = 0.1
MARK = 1_234_567  # bytes of an allocation that tells where the second step begins


def adapter(task: str, dropout: float) -> Any:
    """The configuration that both sides use."""
    from veneer import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear", lora_dropout=dropout, task_type=task)


def predict(case: dict[str, Any]) -> dict[str, int]:
    """Peak and its standing part, by the estimate."""
    import tempfile
    from pathlib import Path

    from veneer.training.planning import Step, empty_model, estimate_memory
    from veneer.training.planning.sources import task_of

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "config.json"
        place.write_text(json.dumps(MODELS[case["model"]]))
        model = empty_model(place, dtype=case["dtype"])
    found = estimate_memory(
        model,
        adapter(task_of(model.config), case["dropout"]),
        Step(
            batch_size=case["batch"],
            sequence_length=case["length"],
            gradient_checkpointing=case["checkpointing"],
            padded=case["padded"],
        ),
    )
    return {"peak": found.peak, "standing": found.base + found.factors + found.optimizer}


def measured_step(case: dict[str, Any]) -> dict[str, int]:
    """The same of a real step, in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step = _trainer(case)
        step()
        torch.empty(MARK, dtype=torch.uint8)
        step()
    peak, standing = allocated(profiled, MARK)
    return {"peak": peak, "standing": standing}


def _trainer(case: dict[str, Any]) -> Any:
    """A function that takes one training step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from veneer import get_peft_model
    from veneer.training.evaluate import loss_sum

    values = dict(MODELS[case["model"]])
    causal = "SequenceClassification" not in values["architectures"][0]
    loader = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.use_cache = False
    base = loader.from_config(config, dtype=getattr(torch, case["dtype"]))
    model: Any = get_peft_model(base, adapter("CAUSAL_LM" if causal else "SEQ_CLS", case["dropout"]))
    model.train()
    if case["checkpointing"]:
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    ids = torch.ones(case["batch"], case["length"], dtype=torch.long)
    mask = torch.ones_like(ids)
    if case["padded"]:
        mask[0, -3:] = 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        if causal:
            batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
            total, count = loss_sum(model, batch)
            loss = total / count
        else:
            loss = model(input_ids=ids, attention_mask=mask, labels=ids[:, 0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def allocated(profiled: Any, mark: int) -> tuple[int, int]:
    """(peak, what was there before) since an allocation of `mark` bytes, seen by the profiler."""
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = standing = 0
    for _, change in changes:
        if change == mark:
            peak = standing = live
        live += change
        if change != mark:
            peak = max(peak, live)
    return peak, standing


def measure(quick: bool) -> Report:
    rows = []
    for given in CASES:
        case = USUAL | given
        if quick and case["model"] != "MiniLM-L6":
            continue
        predicted, measured = predict(case), in_fresh_process(measured_step, case=case)
        whole = predicted["peak"] / measured["peak"]
        beyond = (predicted["peak"] - predicted["standing"]) / (measured["peak"] - measured["standing"])
        for label, found in ((_label(case), whole), (f"{_label(case)}, beyond weights", beyond)):
            off = abs(found - 1.0)
            rows.append(Row(label, Figure.exact(off), "off", at_most=TOLERANCE))
    return Report(question(__doc__), rows, {"figure": "|predicted ÷ measured − 1|"})


def _label(case: dict[str, Any]) -> str:
    words = [case["model"], case["dtype"], f"{case['batch']}x{case['length']}"]
    words += ["checkpointing"] * case["checkpointing"] + ["padded"] * case["padded"]
    words += [f"dropout {case['dropout']}"] * bool(case["dropout"])
    return " ".join(words)
