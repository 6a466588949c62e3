"""Why a file and a model do not fit: the likely causes, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from veneer.files.keys import MAGNITUDE, TOKENS_DELTA
from veneer.files.report import LoadReport, Shape
from veneer.wording import listed

_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in|embed_out|embeddings|lm_head|embed\w*|shared)\."
)

#: How other programs call the two factors: diffusers in its older files, kohya's sd-scripts.
_OTHER_SPELLING = re.compile(
    r"\.lora\.(down|up)\.|[._]lora_linear_layer\.|lora_(down|up)\.|_lora\.(down|up)\."
)


def likely_causes(report: LoadReport) -> tuple[str, ...]:
    """The causes that explain the report, most telling first."""
    vocabulary, others = _split_vocabulary(report.mismatched)
    causes = [
        _spelling(report),
        _nothing_fits(report),
        _ambiguous(report),
        _layers(report),
        _vocabulary(vocabulary),
        _shapes(others),
        *_kinds(report),
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
    """Layer numbers that only one side has."""
    extra, lacking = _indices(report.unexpected), _indices(report.missing)
    have = _indices([*report.renamed.values(), *(k for k, _, _ in report.mismatched)])
    for stem in [*extra, *lacking]:
        more, fewer = extra.get(stem, set()), lacking.get(stem, set())
        common = have.get(stem, set())
        if not common or more & common or fewer & common:
            continue
        file, model = common | more, common | fewer
        if file != model:
            return (
                f"the file has layers {_span(file)} of {stem!r}, the model has {_span(model)}: "
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


def _span(numbers: set[int]) -> str:
    ordered = sorted(numbers)
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ", ".join(map(str, ordered[:6])) + (" ..." if len(ordered) > 6 else "")


def _split_vocabulary(
    mismatched: Sequence[tuple[str, Shape, Shape]],
) -> tuple[list[tuple[int, int]], list[tuple[str, Shape, Shape]]]:
    """Pairs ``(expected, found)`` of vocabulary sizes, and the mismatches that are not about them."""
    sizes, others = [], []
    for key, expected, found in mismatched:
        axis = 1 if key.endswith("lora_embedding_A") else 0
        about = _VOCABULARY.search(key) and not key.endswith(("lora_A.weight", "lora_embedding_B"))
        differing = [i for i, (e, f) in enumerate(zip(expected, found, strict=False)) if e != f]
        if about and len(expected) == len(found) and differing == [axis]:
            sizes.append((expected[axis], found[axis]))
        else:
            others.append((key, expected, found))
    return sizes, others


def _vocabulary(sizes: list[tuple[int, int]]) -> str | None:
    if not sizes:
        return None
    model, file = sizes[0]
    return (
        f"the vocabulary has {file} entries in the file and {model} in the model: "
        f"model.resize_token_embeddings({file}) before loading the adapter"
    )


def _shapes(mismatched: Sequence[tuple[str, Shape, Shape]]) -> str | None:
    ranks: set[tuple[int, int]] = set()
    sizes: dict[tuple[int, int], int] = {}
    for key, expected, found in mismatched:
        rank_axis = {"lora_A.weight": 0, "lora_embedding_A": 0, "lora_B.weight": 1, "lora_embedding_B": 1}
        axis = next((a for end, a in rank_axis.items() if key.endswith(end)), None)
        if len(expected) != len(found):
            continue
        for i, (e, f) in enumerate(zip(expected, found, strict=True)):
            if e != f and i == axis:
                ranks.add((e, f))
            elif e != f:
                sizes[e, f] = sizes.get((e, f), 0) + 1
    if sizes:
        e, f = max(sizes, key=lambda pair: sizes[pair])
        return (
            f"widths differ ({f} in the file, {e} in the model): the adapter was made for another base model"
        )
    if ranks:
        said = ", ".join(
            f"r={f} in the file where the configuration gives r={e}" for e, f in sorted(ranks)[:3]
        )
        return f"{said}: adapter_config.json does not belong to these weights (r, rank_pattern)"
    return None


def _kinds(report: LoadReport) -> list[str]:
    """What whole groups of missing or unexpected tensors say about the configuration."""
    causes = []
    lacking, extra = _by_kind(report.missing), _by_kind(report.unexpected)
    for kind, (option, noun) in _OPTIONS.items():
        if kind in lacking and kind not in extra:
            causes.append(f"the configuration has {option}, but the file has no {noun}")
        elif kind in extra and kind not in lacking:
            causes.append(f"the file has {noun}, but the configuration has no {option}")
    if "factor" in extra and (report.renamed or report.mismatched):
        ours = _targets([*report.renamed.values(), *report.missing, *(k for k, _, _ in report.mismatched)])
        theirs = _targets(extra["factor"]) - ours
        if theirs:
            causes.append(
                f"target_modules of the configuration do not cover {_names(theirs)}, which the file adapts"
            )
    if "factor" in lacking and (report.renamed or report.mismatched):
        theirs = _targets(
            [*report.renamed.values(), *report.unexpected, *(k for k, _, _ in report.mismatched)]
        )
        ours = _targets(lacking["factor"]) - theirs
        if ours:
            causes.append(
                f"the file does not adapt {_names(ours)}, which target_modules of the configuration match"
            )
    return causes


_OPTIONS = {
    "magnitude": ("use_dora=True", "magnitude vectors of DoRA"),
    "lora_bias": ("lora_bias=True", "biases of lora_B"),
    "tokens": ("trainable_token_indices", "trained tokens"),
    "bias": ("bias='all' or 'lora_only'", "biases of the base model"),
    "saved": ("modules_to_save (or a head that the task type adds)", "such whole modules"),
}


def _by_kind(keys: Iterable[str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for key in keys:
        table.setdefault(_kind(key), []).append(key)
    return table


def _kind(key: str) -> str:
    if _OTHER_SPELLING.search(key):
        return "spelling"
    if MAGNITUDE in key:
        return "magnitude"
    if key.endswith("lora_B.bias"):
        return "lora_bias"
    if TOKENS_DELTA in key:
        return "tokens"
    if ".lora_" in key or key.startswith("lora_"):
        return "factor"
    if key.endswith("base_layer.bias"):
        return "bias"
    if key.endswith("base_layer.weight"):
        return "embedding"
    return "saved"


def _targets(keys: Iterable[str]) -> set[str]:
    """Last segments of the module paths of factors."""
    return {m[1] for m in (re.search(r"([^.]+)\.lora_", k) for k in keys) if m}


def _names(names: set[str]) -> str:
    return listed(sorted(names), 4)
