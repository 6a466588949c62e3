"""What can be asked of an export, checked without torch."""

from __future__ import annotations

from pathlib import Path

from ...errors import Blank, ConfigError, Hint, Text
from ...files.layout import CONFIG_NAME
from ...registry import installed_plugins

#: The targets of this package; installed packages can bring others.
TARGETS = ("diffusers", "llama.cpp", "mlx", "ollama", "plain", "sglang", "vllm")
DTYPES = ("float32", "float16", "bfloat16")
#: The parts of diffusers' pipelines that take adapters.
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def no_target(name: object, known: tuple[str, ...]) -> Text:
    """That there is no such target, and which there are."""
    return Text(f"there is no target {name!r}; there are {', '.join(known)}")


def pipeline_parts(directory: Path) -> list[str]:
    """The parts of a pipeline whose adapters lie in a directory, if it holds no adapter itself."""
    if (directory / CONFIG_NAME).is_file():
        return []
    return [name for name in COMPONENTS if (directory / name / CONFIG_NAME).is_file()]


def check_options(
    target: str, base: object, dtype: str, dora_to_plain: bool, rank: int | None, component: str | None
) -> None:
    """Check the options of `export_adapter` against one another.

    Raises:
        ConfigError: Some cannot be right; lists all of them.
    """
    wrong = []
    plain = Hint("dora_to_plain")
    if target not in TARGETS and not installed_plugins():
        wrong.append(no_target(target, TARGETS))
    if dtype not in ("auto", *DTYPES):
        wrong.append(Text(Hint("dtype"), f" is auto, {', '.join(DTYPES)}, not {dtype!r}"))
    if dora_to_plain and rank is None:
        wrong.append(Text(plain, " needs the rank of the result: ", Hint("rank", Blank("N"))))
    if dora_to_plain and base is None:
        wrong.append(Text(plain, " needs the base model: ", Hint("base", Blank("DIRECTORY"))))
    if rank is not None and rank < 1:
        wrong.append(Text(Hint("rank"), f" must be at least 1, got {rank}"))
    if rank is not None and not dora_to_plain:
        wrong.append(Text(Hint("rank"), " is for ", plain, ", which was not given"))
    if component is not None and target != "diffusers":
        part = Hint("component", component)
        wrong.append(Text(part, f" is for the target diffusers; {target} has no such parts"))
    elif component is not None and component not in COMPONENTS:
        wrong.append(Text(Hint("component", component), f" is none of {', '.join(COMPONENTS)}"))
    if wrong:
        raise ConfigError(Text.join("; ", wrong))
