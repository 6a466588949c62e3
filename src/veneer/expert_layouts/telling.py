"""Telling from a file alone in which layout its experts are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, Hint
from veneer.expert_layouts.layouts import LAYOUTS
from veneer.expert_layouts.mixture import Mixture
from veneer.expert_layouts.reading import Found, find, pair_of, parameter_of, path_of, stacks
from veneer.files.layout import SAVED_CONFIG
from veneer.spec import resolve_all

#: The metadata in which Veneer names the layout of a file that it wrote in another than PEFT's.
MARK = "veneer_expert_layout"
#: Keys of the configuration in which Unsloth says since September 2026 how B is ordered: of all stacks, and
#: of each. The second may also lie in ``auto_mapping``, which has the last key in whatever Unsloth trained.
UNSLOTH = "lora_B_layout"
_UNSLOTH_EACH, _UNSLOTH_TRAINED = "unsloth_fused_expert_lora", "unsloth_fixed"
_UNSLOTH_ORDERS = {"rank_major": "peft", "grouped_by_expert": "unsloth"}
#: Where NeMo Automodel says whose layout its stacks are in. It writes no version of PEFT.
AUTOMODEL = "automodel_peft_config.json"
_AUTOMODEL_KEY, _AUTOMODEL_LAYOUTS = "paramwrapper_layout", {"peft-0.19.1": "peft", "peft-0.18": "peft-0.18"}
#: The versions of PEFT that took every stack for (experts, in, out); 0.17 did not write its version.
_FIRST = re.compile(r"0\.18\.|0\.19\.0($|\D)")
#: How many standard errors the two readings must lie apart, and from where on no further stack is looked at.
SURE, CERTAIN = 3.0, 12.0
#: The rows of B, and the experts, that are looked at; more of them tell nothing more.
_ROWS, _GROUPS = 256, 64


class Told(NamedTuple):
    """The layout of a file.

    Attributes:
        layout: Its name, the likeliest of several; None if the file has no experts.
        why: What told it, in words.
        others: The layouts that are as possible.
        unlike: The layout that its tensors look like, although it is written down that they are in another.
    """

    layout: str | None
    why: str
    others: tuple[str, ...] = ()
    unlike: str | None = None

    def decided(self) -> str | None:
        """The layout.

        Raises:
            AdapterFileError: Several are possible; names them and the option that decides.
        """
        if self.others:
            raise AdapterFileError(
                f"the layout of the experts is ambiguous, {self.layout} or {' or '.join(self.others)}: "
                f"{self.why}. ",
                Hint("from_layout"),
                " decides (`veneer convert`, convert_adapter)",
            )
        return self.layout

    def remark(self) -> str | None:
        """What to say where the file is read; None if nothing speaks against PEFT's layout of today."""
        if self.unlike is not None:
            return (
                f"its experts are in the layout {self.layout} ({self.why}), but look like {self.unlike}. If "
                f"it is that one, convert the adapter with from_layout={self.unlike!r}"
            )
        if self.layout in (None, "peft", "transformers-4"):
            return None
        return f"its experts are in the layout {self.layout} ({self.why}) and are read as such"


class Evidence(NamedTuple):
    """What a file says of itself.

    Attributes:
        shapes: Of its tensors, by name.
        values: The content of its configuration, with the keys that Veneer does not know.
        metadata: Those of its tensors.
        read: Gives tensors by name.
        automodel: The content of `AUTOMODEL`, where there is one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Any]
    metadata: Mapping[str, str]
    read: Callable[[Iterable[str]], Mapping[str, Tensor]]
    automodel: Mapping[str, Any] | None = None


def tell(evidence: Evidence, config: LoraConfig, mixture: Mixture) -> Told:
    """In which layout the experts of a file are.

    Names and shapes tell most; of the order of B in a folded stack, what the program wrote down. Where
    nothing is written down, the directions of B's columns tell: those of one expert, which learned from the
    same tokens, point into more similar directions than those of several.

    Args:
        evidence: Of the file.
        config: Its configuration.
        mixture: What is known of the base model.
    """
    found = find(evidence.shapes, config)
    if not found.places:
        return by_names(evidence.shapes)
    if (name := evidence.metadata.get(MARK)) in LAYOUTS:
        return Told(name, f"{MARK} in the metadata of the tensors")
    if len(found.forms) > 1:
        return Told(None, "its experts are written in several ways")
    (form,) = found.forms
    if form == "each":
        return Told("transformers-4", "every expert has tensors of its own")
    if form == "stacked":
        numbered = any(place.part.startswith("w") for place in found.places.values())
        return Told("tinker" if numbered else "sglang-shared", "its tensors have an axis of experts")
    return _folded(evidence, config, found, mixture)


def by_names(shapes: Iterable[str]) -> Told:
    """What names tell of an adapter without experts: a program may call other modules its way."""
    for row in LAYOUTS.values():
        for theirs, _ in row.renames:
            if any(theirs in name for name in shapes):
                return Told(row.name, f"it has a module {theirs.strip('.')}")
    return Told(None, "it has no experts")


def _folded(evidence: Evidence, config: LoraConfig, found: Found, mixture: Mixture) -> Told:
    order = _order_of_unsloth(evidence.values)
    if order is not None:
        return Told(_UNSLOTH_ORDERS[order], f"{UNSLOTH} in its configuration")
    stamp = (evidence.automodel or {}).get(_AUTOMODEL_KEY)
    if isinstance(stamp, str) and stamp in _AUTOMODEL_LAYOUTS:
        return Told(_AUTOMODEL_LAYOUTS[stamp], f"{_AUTOMODEL_KEY} in {AUTOMODEL}")
    if SAVED_CONFIG in evidence.metadata:
        return Told("peft", "it was saved by Veneer")
    if mixture.as_stored:
        return Told("peft", "PEFT takes the stacks of this base as they are stored")
    turned = False if mixture.transposed else _is_turned(evidence, config, found)
    version = evidence.values.get("peft_version")
    if turned is None and isinstance(version, str):
        if _FIRST.match(version):
            return Told("peft-0.18", f"PEFT {version} wrote its configuration")
        turned = False
    if turned is None:
        why = "which of its factors is A depends on the shapes of the base"
        return Told("peft", why, ("peft-0.18",))
    if turned:
        why = "A has the size of the output"
        if version is not None or "loftq_config" in evidence.values:
            return Told("peft-0.18", f"{why}, and PEFT wrote its configuration")
        if evidence.automodel is not None:
            return Told("peft-0.18", f"{why}, and there is an {AUTOMODEL}")
        return Told("megatron-bridge-stacks", f"{why}, and not PEFT's configuration")
    score = _order(evidence, config, found)
    if score is None:
        return Told("peft", "B is the same in every order")
    looks = "peft" if score > 0 else "unsloth"
    if abs(score) <= CERTAIN:
        # Whoever wrote the configuration is as good a witness.
        sure = looks if abs(score) >= SURE else None
        if _trained_by_unsloth(evidence.values):
            why = f"Unsloth trained it, and did not write {UNSLOTH} yet"
            return Told("unsloth", why, unlike=sure if sure != "unsloth" else None)
        if isinstance(version, str) or evidence.automodel is not None:
            who = f"PEFT {version}" if isinstance(version, str) else "NeMo Automodel"
            why = f"{who} wrote its configuration"
            return Told("peft", why, unlike=sure if sure != "peft" else None)
    if abs(score) < SURE:
        why = "the columns of B do not tell whether those of an expert lie together"
        return Told("peft", why, ("unsloth",))
    return Told(looks, f"the columns of B ({abs(score):.0f} standard errors)")


def _order_of_unsloth(values: Mapping[str, Any]) -> str | None:
    """The order of B that Unsloth wrote down; None if it is not the same for all stacks."""
    for source in (values, _auto_mapping(values)):
        detail = source.get(_UNSLOTH_EACH)
        each = detail.get("parameters") if isinstance(detail, dict) else None
        found = each.values() if isinstance(each, dict) else [source]
        orders = [one.get(UNSLOTH) for one in found if isinstance(one, Mapping)]
        named = {order for order in orders if isinstance(order, str)} & _UNSLOTH_ORDERS.keys()
        if named:
            return named.pop() if len(named) == 1 else None
    return None


def _trained_by_unsloth(values: Mapping[str, Any]) -> bool:
    return bool(_auto_mapping(values).get(_UNSLOTH_TRAINED))


def _auto_mapping(values: Mapping[str, Any]) -> Mapping[str, Any]:
    found = values.get("auto_mapping")
    return found if isinstance(found, Mapping) else {}


def _is_turned(evidence: Evidence, config: LoraConfig, found: Found) -> bool | None:
    """Whether A has the size of the output: from both stacks of a layer, or from the attention beside one."""
    shapes, votes = evidence.shapes, set()
    pairs = {name: place for name, place in found.places.items() if place.role == "A"}
    for name, place in pairs.items():
        ins, outs = shapes[name][1], shapes.get(_partner(name), (0,))[0]
        around = f"{place.holder}.lora_A.weight"
        if place.part and around in shapes:
            down_in, down_out = shapes[around][1], shapes.get(_partner(around), (0,))[0]
            plain = (ins, outs) == (down_out, 2 * down_in)
            votes.add(plain is False if plain != ((outs, ins) == (down_in, 2 * down_out)) else None)
    hidden = {shape[1] for name, shape in shapes.items() if name.endswith(_READS_HIDDEN)}
    for name, place in pairs.items():
        if not votes and len(hidden) == 1:
            reads_hidden = shapes[name][1] in hidden
            stack = parameter_of(place, [place.part], config)
            votes.add({"gate_up_proj": not reads_hidden, "down_proj": reads_hidden}.get(stack or ""))
    return votes.pop() if len(votes) == 1 else None


#: Modules whose input has the width of the model.
_READS_HIDDEN = tuple(f".{name}.lora_A.weight" for name in ("q_proj", "k_proj", "v_proj"))


def _partner(name: str) -> str:
    return name.replace(".lora_A.", ".lora_B.")


def _order(evidence: Evidence, config: LoraConfig, found: Found) -> float | None:
    """By how many standard errors B speaks for PEFT's order (above 0) or Unsloth's; None if both are one.

    In PEFT's order the columns j of expert e are those with ``j % E == e``, in Unsloth's those with
    ``j // r == e``. Columns that only one of the two puts together are compared by the cosines between them.
    """
    known = stacks(found, config)
    paths = {
        name: path_of(place.holder, stack)
        for name, place in found.places.items()
        if place.role == "B" and (stack := known[pair_of(place)]) is not None
    }
    specs = resolve_all(config, "", dict.fromkeys(paths.values(), ""))
    above, weight, same = 0.0, 0.0, True
    for name, path in paths.items():
        r = specs[path].r
        if r == 1 or evidence.shapes[name][1] % r or evidence.shapes[name][1] == r:
            continue
        b = evidence.read([name])[name]
        same = same and not b.any()
        # Gate and up are two witnesses.
        for half in b.chunk(2) if path.endswith("gate_up_proj") else (b,):
            difference, variance = similarity(half, r)
            if variance:
                above, weight = above + difference / variance, weight + 1 / variance
        if abs(above) > CERTAIN * math.sqrt(weight):
            break
    return above / math.sqrt(weight) if weight else None if same else 0.0


def similarity(b: Tensor, r: int) -> tuple[float, float]:
    """By how much more alike columns of one expert are in PEFT's order than in Unsloth's, and its variance.

    Args:
        b: B of a folded stack, (out, r·E).
        r: The rank of an expert.
    """
    columns = b[:: max(1, b.shape[0] // _ROWS)].float()
    experts = b.shape[1] // r
    place = torch.arange(b.shape[1])
    fastest, slowest = place.view(r, experts).T, place.view(experts, r)
    one = _alike(columns, fastest, slowest.flatten() // r)
    other = _alike(columns, slowest, slowest.flatten() % experts)
    if len(one) < 2 or len(other) < 2:
        return 0.0, 0.0
    variance = one.var() / len(one) + other.var() / len(other)
    return float(one.mean() - other.mean()), float(variance)


def _alike(columns: Tensor, groups: Tensor, others: Tensor) -> Tensor:
    """The cosines, without sign, between columns of a group that the other order does not put together.

    Args:
        columns: (out, r·E).
        groups: The columns of each expert, (E, r).
        others: The expert of each column in the other order.
    """
    some = groups[:: max(1, len(groups) // _GROUPS)]
    chosen = columns[:, some].movedim(0, -1)
    length = chosen.norm(dim=-1, keepdim=True)
    chosen = chosen / length.clamp_min(torch.finfo(chosen.dtype).tiny)
    cosines = (chosen @ chosen.transpose(-2, -1)).abs()
    apart = others[some][:, :, None] != others[some][:, None]
    pairs = torch.ones(groups.shape[1], groups.shape[1], dtype=torch.bool).triu(1) & apart
    found: Tensor = cosines[pairs & (length > 0) & (length.transpose(-2, -1) > 0)]
    return found
