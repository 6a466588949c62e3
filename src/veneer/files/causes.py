"""Why a file and a model do not fit: the likely causes, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from veneer.files.keys import MAGNITUDE, TOKENS_DELTA
from veneer.files.report import LoadReport, Shape
from veneer.wording import ranges

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in|embed_out|embeddings|lm_head|embed\w*|shared)\."
)

#: How other programs call the two factors: diffusers in its older files, kohya's sd-scripts.
_OTHER_SPELLING = re.compile(
    r"\.lora\.(down|up)\.|[._]lora_linear_layer\.|lora_(down|up)\.|_lora\.(down|up)\."
)

#: Which axis of a factor is its rank, and factors without an axis of tokens.
_RANK_AXIS = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}
_WITHOUT_TOKENS = ("lora_A.weight", "lora_embedding_B")
#: How tensors end that an option makes, the option, and what they are called.
_OPTIONS = {
    MAGNITUDE: ("use_dora", "magnitude vectors of DoRA"),
    "lora_B.bias": ("lora_bias", "biases of lora_B"),
    TOKENS_DELTA: ("trainable_token_indices", "trained tokens"),
    "base_layer.bias": ("bias", "biases of the base model"),
}
#: Options whose tensors a program does not write.
_NEVER_WRITTEN = {"bias": " (PEFT before 0.21 saves none with bias='lora_only': they are lost)"}


def likely_causes(report: LoadReport) -> tuple[str, ...]:
    """The causes that explain the report, most telling first."""
    causes = [
        _spelling(report),
        _nothing_fits(report),
        _ambiguous(report),
        _layers(report),
        *_shapes(report.mismatched),
        *_options(report),
    ]
    return tuple(cause for cause in causes if cause)


def _spelling(report: LoadReport) -> str | None:
    strange = [key for key in report.unexpected if _OTHER_SPELLING.search(key)]
    if not strange:
        return None
    return (
        f"{len(strange)} keys are spelled as in diffusers' older files or kohya's ({strange[0]}). diffusers "
        "rewrites all keys or none, by the first: a file must not mix spellings. Save what "
        "get_peft_model_state_dict gives, without convert_state_dict_to_diffusers"
    )


def _nothing_fits(report: LoadReport) -> str | None:
    if report.renamed or report.mismatched or report.ambiguous or not report.unexpected:
        return None
    if not any("lora_" in k for k in report.unexpected):
        return f"the file is not a LoRA adapter: none of its keys has factors ({report.unexpected[0]})"
    if not report.missing:
        return None
    return (
        f"no key of the file occurs in the model, under any prefix (file: {report.unexpected[0]}, "
        f"model: {report.missing[0]}): an adapter of another architecture"
    )


def _ambiguous(report: LoadReport) -> str | None:
    if not report.ambiguous:
        return None
    pairs = ", ".join(f"{old!r} -> {new!r}" for old, new in report.ambiguous[:3])
    return f"the keys differ by a prefix, and more than one replacement fits: {pairs}; use key_mapping="


def _layers(report: LoadReport) -> str | None:
    extra, lacking = _indices(report.unexpected), _indices(report.missing)
    have = _indices([*report.renamed.values(), *(k for k, _, _ in report.mismatched)])
    for stem in [*extra, *lacking]:
        more, fewer = extra.get(stem, set()), lacking.get(stem, set())
        common = have.get(stem, set())
        if not common or more & common or fewer & common:
            continue
        file, model = common | more, common | fewer
        if file != model:
            there, here = (ranges(sorted(numbers)) for numbers in (file, model))
            return (
                f"the file has layers {there} of {stem!r}, the model has {here}: "
                f"a base model with another number of layers, or another layers_to_transform"
            )
    return None


def _indices(keys: Iterable[str]) -> dict[str, set[int]]:
    """Numbers of layers by the name before them: ``a.layers.3.b`` -> ``{"a.layers": {3}}``."""
    table: dict[str, set[int]] = {}
    for key in keys:
        parts = key.split(".")
        for i, part in enumerate(parts):
            if part.isdigit() and i:
                table.setdefault(".".join(parts[:i]), set()).add(int(part))
                break
    return table


def _shapes(mismatched: Sequence[tuple[str, Shape, Shape]]) -> list[str]:
    """Which size differs: the vocabulary, the rank, or a width of the model."""
    vocabularies: Counter[tuple[int, int]] = Counter()
    ranks, widths = vocabularies.copy(), vocabularies.copy()
    for key, expected, found in mismatched:
        rank_axis = next((axis for end, axis in _RANK_AXIS.items() if key.endswith(end)), None)
        token_axis = 1 if key.endswith("lora_embedding_A") else 0
        for axis, sizes in enumerate(zip(expected, found, strict=False)):
            if sizes[0] == sizes[1]:
                continue
            if axis == rank_axis:
                ranks[sizes] += 1
            elif axis == token_axis and _VOCABULARY.search(key) and not key.endswith(_WITHOUT_TOKENS):
                vocabularies[sizes] += 1
            else:
                widths[sizes] += 1
    causes = []
    for model, file in list(vocabularies)[:1]:
        causes.append(
            f"the vocabulary has {file} entries in the file and {model} in the model: "
            f"model.resize_token_embeddings({file}) before loading the adapter"
        )
    if widths:
        ((model, file), _) = widths.most_common(1)[0]
        causes.append(
            f"widths differ ({file} in the file, {model} in the model): the adapter was made for another "
            "base model"
        )
    elif ranks:
        pairs = [
            f"r={file} in the file where the configuration gives r={model}" for model, file in sorted(ranks)
        ]
        causes.append(
            f"{', '.join(pairs[:3])}: adapter_config.json does not belong to these weights (r, rank_pattern)"
        )
    return causes


def _options(report: LoadReport) -> list[str]:
    """Options that the configuration has but the file's tensors do not, or the reverse."""
    return [
        f"the configuration has {option}, but the file has no {what}{_NEVER_WRITTEN.get(option, '')}"
        if lacking
        else f"the file has {what}, but the configuration has no {option}"
        for end, (option, what) in _OPTIONS.items()
        if (lacking := any(key.endswith(end) for key in report.missing))
        != any(key.endswith(end) for key in report.unexpected)
    ]
