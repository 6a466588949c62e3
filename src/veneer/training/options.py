"""The options of a training run, each declared once as field, flag and key of a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from ..config import LoraConfig
from ..errors import ConfigError, Hint, MissingExtraError, Text, UnknownOptionError, short, show
from ..files.config import LARGEST_FILE
from ..wording import did_you_mean, listed
from .bounds import bounded, wrong_values
from .data.columns import parse_columns
from .data.forms import Purpose

T = TypeVar("T")

#: Values in a YAML file.
MOST_VALUES = 100_000

SCHEDULES = (
    "linear cosine constant constant_with_warmup cosine_with_restarts polynomial inverse_sqrt"
).split()
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("nf4", "fp4", "int8", "int4")
METHODS = ("sft", "dpo", "kto", "orpo", "reward")
TASKS = {"causal-lm": "CAUSAL_LM", "seq-cls": "SEQ_CLS"}
#: Initialisations that are measured on data -> the function that does it.
MEASURED = {
    "eva": "initialize_lora_eva_weights",
    "corda": "preprocess_corda",
    "lora_ga": "preprocess_loraga",
}


def option(
    default: T, group: str, text: str, *names: str, free: bool = False, choices: Any = (), **bounds: float
) -> T:
    """A field that is also a flag and a key.

    Args:
        default: Its default.
        group: Its heading in the help of the command line.
        text: What it does.
        names: Its names in other libraries, which are accepted too.
        free: Whether it may change between a checkpoint and its resumption, as no loss depends on it.
        choices: Its possible values, if they can be listed.
        bounds: Of a number, as in `bounded`.
    """
    if choices:
        text = f"{text} {', '.join(choices[:-1])} or {choices[-1]}."
    return bounded(default, group=group, help=text, names=names, free=free, choices=choices, **bounds)


@dataclass(frozen=True)
class TrainOptions:
    """How to train, with transformers' names. ``veneer train --help`` describes each field.

    Raises:
        ConfigError: Some values are invalid; lists all of them.
    """

    learning_rate: float = option(2e-4, "Steps", "Peak learning rate.", above=0)
    epochs: float = option(1.0, "Steps", "Passes over the data.", "num_train_epochs", above=0)
    max_steps: int | None = option(None, "Steps", "Optimizer steps; overrides the epochs.", above=0)
    batch_size: int = option(
        8, "Steps", "Examples per forward pass, on each device.", "per_device_train_batch_size", above=0
    )
    gradient_accumulation_steps: int = option(1, "Steps", "Forward passes per optimizer step.", above=0)
    lr_scheduler_type: str = option(
        "linear", "Steps", "Schedule of the learning rate:", "lr_scheduler", choices=SCHEDULES
    )
    warmup_steps: int = option(0, "Steps", "Steps over which the learning rate rises from 0.", least=0)
    warmup_ratio: float = option(0.0, "Steps", "The same, as a share of all steps.", least=0, below=1)
    weight_decay: float = option(0.0, "Steps", "Weight decay.", least=0)
    max_grad_norm: float = option(1.0, "Steps", "Clip gradients to this norm; 0 does not clip.", least=0)
    optim: str = option(
        "adamw_torch",
        "Steps",
        "Optimizer, by transformers' name; with bitsandbytes also adamw_8bit, paged_adamw_8bit, lion_8bit.",
    )
    seed: int = option(
        0, "Steps", "Seed for the factors, the order of the data, and dropout.", least=0, most=2**32 - 1
    )
    gradient_checkpointing: bool = option(
        False, "Memory", "Recompute activations in the backward pass instead of keeping them."
    )
    loss_chunk_size: int = option(
        0,
        "Memory",
        "Compute logits for this many tokens at a time, and again in the backward pass; 0: all at once.",
        least=0,
    )
    eval_steps: int = option(
        0,
        "Evaluation",
        "Steps between evaluations; 0 evaluates only before the first and after the last.",
        least=0,
    )
    logging_steps: int = option(1, "Output", "Steps between reports to a tracker.", free=True, above=0)
    report_to: str = option(
        "none", "Output", "Trackers to report losses to: tensorboard, wandb, mlflow, …", free=True
    )
    save_steps: int = option(0, "Output", "Steps between checkpoints; 0 writes none.", free=True, least=0)
    save_total_limit: int = option(2, "Output", "Number of checkpoints to keep.", free=True, above=0)
    resume: bool = option(
        False,
        "Output",
        "Continue from the last checkpoint in the output; a finished run stays as it is.",
        free=True,
    )
    overwrite_output_dir: bool = option(
        False, "Output", "Delete the checkpoints of an earlier run in the output.", free=True
    )

    def __post_init__(self) -> None:
        wrong = self.problems()
        if wrong:
            raise ConfigError(Text.join("; ", wrong))

    def problems(self) -> list[Text]:
        """What cannot be right, a sentence each."""
        wrong = wrong_values(self)
        if self.warmup_steps and self.warmup_ratio:
            both = Text(Hint("warmup_steps"), " and ", Hint("warmup_ratio"))
            wrong.append(Text(both, " set the same thing: give only one of them"))
        return wrong


@dataclass(frozen=True)
class RunOptions(TrainOptions):
    """A whole run: model, data and adapter beside the fields of `TrainOptions`.

    Raises:
        ConfigError: Some values are invalid; lists all of them.
    """

    model: str = option("", "Run", "Base model: a directory or a hub id.", "model_name_or_path")
    data: str = option(
        "",
        "Run",
        "Examples: a JSONL, JSON, CSV, TSV or Parquet file, or a dataset of the hub.",
        "dataset_name",
    )
    output: str = option(
        "",
        "Run",
        "Directory for the adapter, metrics.json, loss.png and checkpoints.",
        "output_dir",
        free=True,
    )
    method: str = option(
        "sft",
        "Run",
        "sft learns from answers, dpo and orpo from preferences, kto from answers rated good or bad; reward "
        "trains a reward model on preferences:",
        choices=METHODS,
    )
    task: str = option("causal-lm", "Run", "What the model does:", choices=tuple(TASKS))
    resume_from_adapter: str | None = option(
        None,
        "Run",
        "Continue training a saved adapter, with its configuration and base, into a new output.",
    )
    eval_data: str | None = option(None, "Evaluation", "Held-out examples, in the same form as the data.")
    columns: str | None = option(
        None, "Data", "Columns that have other names in the data: prompt=question,completion=answer."
    )
    validation_split: float = option(
        0.0,
        "Evaluation",
        "Share of the examples to set aside for evaluation; the seed decides which.",
        least=0,
        below=1,
    )
    max_length: int = option(
        1024, "Data", "Maximum length of an example, in tokens; longer ones are cut.", above=0
    )
    packing: bool = option(
        False, "Data", "Put several short examples into one row; they do not see one another."
    )
    beta: float = option(
        0.1,
        "Data",
        "dpo, kto: how strongly the model is kept close to its start; orpo: weight of the preference.",
        above=0,
    )
    lora_r: int = option(16, "Adapter", "Rank.", "r")
    lora_alpha: float = option(16.0, "Adapter", "Numerator of the scaling alpha / r.")
    lora_dropout: float = option(0.0, "Adapter", "Dropout on the input of the factors.")
    lora_target_modules: str = option(
        "all-linear",
        "Adapter",
        "all-linear, comma-separated names, or a regular expression; empty for parameters only.",
        "target_modules",
    )
    lora_target_parameters: str | None = option(
        None,
        "Adapter",
        "Parameters without a module of their own, such as stacks of experts; comma-separated names.",
        "target_parameters",
    )
    lora_modules_to_save: str | None = option(
        None,
        "Adapter",
        "Modules to train in full and save with the adapter; comma-separated names.",
        "modules_to_save",
    )
    use_dora: bool = option(False, "Adapter", "Train the norm of each weight row separately (DoRA).")
    use_rslora: bool = option(False, "Adapter", "Scale by alpha / sqrt(r).")
    init_lora_weights: str = option(
        "true",
        "Adapter",
        "Initialisation of the factors: true, gaussian, orthogonal, pissa, olora, mica, …; eva, corda and "
        "lora_ga are computed from the data.",
    )
    dtype: str = option("auto", "Memory", "Type of the base's weights:", choices=DTYPES)
    quantize: str | None = option(None, "Memory", "Quantise the base:", choices=QUANTIZATIONS)
    attn_implementation: str | None = option(
        None, "Memory", "eager, sdpa, flash_attention_2, …; by default transformers chooses."
    )

    def problems(self) -> list[Text]:
        """What cannot be right, a sentence each."""
        wrong = [
            Text(Hint(name), " is missing: pass it, or set it in a YAML file")
            for name in ("model", "data", "output")
            if not getattr(self, name) and not (name == "model" and self.resume_from_adapter)
        ]
        wrong += [*self._misfits(), *self._start_problems()]
        if self.validation_split and self.eval_data:
            both = Text(Hint("validation_split"), " and ", Hint("eval_data"))
            wrong.append(Text(both, " both say what to validate on: give one of them"))
        wrong += super().problems()
        for check in (self.column_names, *([] if self.resume_from_adapter else [self.lora_config])):
            try:
                check()
            except ConfigError as error:
                wrong.append(error.message)
        return wrong

    def _misfits(self) -> Iterator[Text]:
        """What does not go with the method or the task."""
        method, classes = Hint("method", self.method), Hint("task", "seq-cls")
        if self.purpose != "sft":
            given = [Hint(name) for name in ("packing", "loss_chunk_size") if getattr(self, name)]
            if self.method != "sft" and self.task == "seq-cls":
                given.append(classes)
            for hint in given:
                yield Text(hint, " does not go with ", classes if self.method == "sft" else method)
        if self.method == "kto" and self.batch_size == 1:
            yield Text(method, " compares the answers of a batch: ", Hint("batch_size"), " must be above 1")

    def _start_problems(self) -> Iterator[Text]:
        """Why a new adapter cannot be initialised in this way."""
        if self.resume_from_adapter:
            return
        start = Hint("init_lora_weights", init := self.init_lora_weights.lower())
        if init in MEASURED and self.method != "sft":
            pairs = (" is measured on answers or classes, and ", Hint("method", self.method))
            way = f"measure it in Python with {MEASURED[init]} beside get_peft_model, or start another way"
            yield Text(start, *pairs, f" has preferences: {way}")
        elif init == "loftq":
            yield Text(
                start,
                " replaces weights of the base, which are not saved with the adapter. In Python, "
                "replace_lora_weights_loftq(model, model_path) starts an adapter on a quantised base",
            )

    @property
    def purpose(self) -> Purpose:
        """What the data are used for."""
        if self.method != "sft":
            return "kto" if self.method == "kto" else "dpo"
        return "classification" if self.task == "seq-cls" else "sft"

    def column_names(self) -> dict[str, str]:
        """Name of a column here -> its name in the data."""
        return {} if self.columns is None else parse_columns(self.columns)

    @property
    def task_type(self) -> str:
        """The task of the adapter; a reward model is a classifier with one output."""
        return TASKS["seq-cls" if self.method == "reward" else self.task]

    def lora_config(self) -> LoraConfig:
        """The configuration of the adapter."""
        init: Any = {"true": True, "false": False}.get(self.init_lora_weights.lower(), self.init_lora_weights)
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=_names(self.lora_target_modules),
            target_parameters=_listed(self.lora_target_parameters),
            modules_to_save=_listed(self.lora_modules_to_save),
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=init,
            task_type=self.task_type if self.task in TASKS else None,
        )


def _listed(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [name.strip() for name in text.split(",")] if text.strip() else []


def _names(text: str) -> str | list[str]:
    """A list of names separated by commas, or else the text: ``all-linear`` or an expression."""
    names = _listed(text) or []
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    return names if plain and names != ["all-linear"] else text


def check_names(options: TrainOptions) -> None:
    """Refuse an optimizer or a tracker that transformers does not know or whose library is missing.

    Raises:
        ConfigError: It is unknown; names the nearest known ones.
        MissingExtraError: bitsandbytes is not installed.
    """
    from transformers.training_args import OptimizerNames

    known = [str(name.value) for name in OptimizerNames]
    if options.optim not in known:
        suggestion = did_you_mean(options.optim, known) or f"; it knows {listed(known, 8)}"
        raise ConfigError(Hint("optim"), f" {options.optim!r} is unknown to transformers{suggestion}")
    eight_bits = "8bit" in options.optim.replace("torch_8bit", "") or options.optim.startswith("paged")
    if eight_bits and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quant", f"the optimizer {options.optim}")
    trackers(options.report_to)


def trackers(report_to: str) -> list[str]:
    """The names in ``report_to``, which must all be installed."""
    from transformers.integrations import get_available_reporting_integrations

    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    there = get_available_reporting_integrations()
    missing = [name for name in names if name not in there]
    if missing:
        raise ConfigError(
            Hint("report_to"),
            f": {', '.join(missing)} is not installed or unknown to transformers; installed: "
            f"{', '.join(there) or 'none of those that it knows'}",
        )
    return names


def spellings(kind: type[TrainOptions]) -> dict[str, str]:
    """Every name of an option -> its field."""
    return {
        name: part.name for part in dataclasses.fields(kind) for name in (part.name, *part.metadata["names"])
    }


def read_yaml(path: str | os.PathLike[str], kind: type[TrainOptions] = RunOptions) -> dict[str, Any]:
    """Read options from a YAML file; keys are the flags, with dashes or underscores.

    Raises:
        UnknownOptionError: Some keys are no options; lists them with the nearest options.
        ConfigError: The file cannot be read, is no YAML, gives an option twice, or has a value of another
            type.
    """
    return from_mapping(yaml_mapping(path), str(Path(path)), kind)


def yaml_mapping(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: The file cannot be read, or contains anything else.
    """
    import yaml

    file = Path(path)
    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST_FILE + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {file}: {reason}") from error
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{file} is larger than {LARGEST_FILE >> 20} MiB: not the options of a run")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid YAML: {short(' '.join(str(error).split()))}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must contain keys and values, one per line, such as `lora_r: 8`")
    if _expanded(content, {}) > MOST_VALUES:
        raise ConfigError(f"{file} repeats its values with anchors until they are more than {MOST_VALUES:,}")
    return content


def _expanded(value: Any, known: dict[int, float]) -> float:
    """How many values a document of YAML has where each alias counts as what it stands for."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # for one that contains itself
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(part, known) for part in inside)
    return known[id(value)]


def from_mapping(
    content: Mapping[Any, Any],
    where: str,
    kind: type[TrainOptions] = RunOptions,
    found: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Field -> value, converted to the field's type.

    Args:
        content: Name of an option -> value.
        where: They are from, for messages.
        kind: What they are options of.
        found: Where to put those that can be used, also if others cannot.

    Raises:
        UnknownOptionError: Some keys are no options; lists them with the nearest options.
        ConfigError: An option is given twice, or a value has another type.
    """
    known, types = spellings(kind), get_type_hints(kind)
    unknown, wrong = [], []
    found = {} if found is None else found
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            unknown.append(f"{show(key)}{did_you_mean(name, known)}")
            continue
        if known[name] in found:
            wrong.append(f"{known[name]} is given twice")
            continue
        try:
            found[known[name]] = _typed(value, types[known[name]])
        except ValueError as error:
            wrong.append(f"{key} must be {error}, not {show(value)}")
    if unknown:
        more = f"; {'; '.join(wrong)}" if wrong else ""
        raise UnknownOptionError(
            f"{where}: unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}{more}. "
            "The options are those of `veneer train`."
        )
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}")
    return found


def plain_type(kind: Any) -> type:
    """``int`` of ``int`` and of ``int | None``."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    found: type = parts[0] if parts else kind
    return found


def _typed(value: Any, kind: Any) -> Any:
    wanted = plain_type(kind)
    if value is None and type(None) in get_args(kind):
        return None
    if wanted is bool:
        if isinstance(value, bool):
            return value
        raise ValueError("true or false")
    if wanted in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            # YAML reads 1e-4 as a text.
            number = value if isinstance(value, wanted) else float(value)
            if (found := wanted(number)) == number:
                return found
    if wanted is str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            return ",".join(value)
        if isinstance(value, dict) and value and all(isinstance(part, str) for part in value.values()):
            return ",".join(f"{name}={part}" for name, part in value.items())
        if isinstance(value, str | int | float):
            return str(value)
    raise ValueError({int: "a whole number", float: "a number", str: "a text"}[wanted])
