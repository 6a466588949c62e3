"""Merging adapters into base weights, with an account of what rounding kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from veneer.adapters import as_names
from veneer.errors import MergeError, VeneerWarning
from veneer.inject import eject
from veneer.inject.embeddings import embedding_of
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.merge import Undoing, merge_all
from veneer.model.dequantising import dequantise, forget_quantisation
from veneer.model.verbs import AdapterVerbs
from veneer.rollback import Rollback
from veneer.sharded import settle

#: Below this share of the update that survives rounding, a merge warns.
KEPT_WARNING = 0.8


@dataclass(frozen=True)
class MergeReport:
    """What merging kept of the update, after rounding to the type of the base weight.

    Attributes:
        kept: Share of the update kept, ``1 − ‖error‖ / ‖update‖``, by module path. It is in [0, 1] for
            floating-point weights; quantising a weight again may change it by more than the update does, and
            the share is then below 0. It is NaN where the merged weight is not finite.
        requantised: Paths of the modules whose weight was quantised again.
    """

    kept: Mapping[str, float]
    requantised: tuple[str, ...] = ()

    @property
    def undefined(self) -> list[str]:
        """Paths of the modules whose merged weight is not finite, so that nothing can be said of it."""
        return [path for path, share in self.kept.items() if math.isnan(share)]

    @property
    def error(self) -> Mapping[str, float]:
        """Norm of the error of each merged weight, in units of the norm of its update."""
        return {path: 1.0 - share for path, share in self.kept.items()}

    @property
    def worst(self) -> float:
        """The smallest share of a module; NaN where one is."""
        return math.nan if self.undefined else min(self.kept.values(), default=1.0)

    @property
    def mean(self) -> float:
        """The mean share over the modules."""
        return sum(self.kept.values()) / len(self.kept) if self.kept else 1.0

    def __str__(self) -> str:
        if lost := self.undefined:
            return (
                f"merged {len(self.kept)} modules; {len(lost)} of them hold NaN or infinity now, for example "
                f"{lost[0]}"
            )
        said = (
            f"merged {len(self.kept)} modules; {self.mean:.1%} of the update kept (least: {self.worst:.1%})"
        )
        if not self.requantised:
            return said
        error = sum(self.error[path] for path in self.requantised) / len(self.requantised)
        return f"{said}; {len(self.requantised)} quantised again, with an error of {error:.1%} of the update"


class MergeVerbs(AdapterVerbs):
    """Adapters into the base weights, and out again."""

    #: What the last merge kept.
    merge_report: MergeReport | None = None

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        untie: bool = False,
        undo: Undoing = "copy",
    ) -> MergeReport:
        """Add adapters into the base weights, to be taken out again by `unmerge_adapter`.

        An adapter that is merged already stays as it was merged, whatever became of it since.

        Args:
            adapter_names: The adapters; None means the active ones.
            safe_merge: Refuse a base too that holds NaN or infinity. An adapter that does, and one that would
                leave the range of a weight's type, is refused in any case.
            untie: Give an adapted layer whose weight is shared with another module a weight of its own.
            undo: What is kept of each weight for `unmerge_adapter`: "copy", all of it.

        Returns:
            The share of the update that each layer kept.

        Raises:
            MergeError: Naming every layer that cannot be merged.

        Whatever is raised, the model is then as it was, bit for bit.
        """
        with Rollback() as back:
            report = self._merge(adapter_names, safe_merge, untie, undo, back)
        self.merge_report = report
        _mention(report, stacklevel=3)
        return report

    def _merge(
        self,
        adapter_names: Sequence[str] | None,
        safe_merge: bool,
        untie: bool,
        undo: Undoing,
        back: Rollback,
        progressbar: bool = False,
    ) -> MergeReport:
        """Ask everything that can be known, then write; ``back`` is given what takes it back."""
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        self.index.check(names, known=self.peft_config)
        self.mention_unmeasured(names)
        settle(self)
        layers = self.mergeable()
        kept = merge_all(
            self.model,
            layers,
            names,
            back,
            safe_merge=safe_merge,
            untie=untie,
            undo=undo,
            progressbar=progressbar,
        )
        requantised = tuple(path for path in kept if layers[path].backend.quantization is not None)
        before = {} if self.merge_report is None else self.merge_report.kept
        merged = [path for path, layer in layers.items() if layer.merged and layer.tied_adapter is None]
        kept = {path: before[path] for path in merged if path in before} | kept
        return MergeReport(kept, requantised)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        untie: bool = False,
        dequantize: bool | torch.dtype = False,
    ) -> nn.Module:
        """Merge adapters into the base and return it without any trace of them.

        What was kept of the update stands in `merge_report` afterwards. No copy of the base is made: should
        memory run out between two layers, or somebody interrupt, then the layers that are written stay
        merged, and the error names them. The model computes the same as before then, and calling this again
        goes on. For all or nothing call `merge_adapter` before, which keeps copies.

        Args:
            progressbar: Show progress on standard error.
            safe_merge: Refuse a base too that holds NaN or infinity. An adapter that does, and one that would
                leave the range of a weight's type, is refused in any case.
            adapter_names: The adapters; None means the active ones.
            untie: Give an adapted layer whose weight is shared with another module a weight of its own.
            dequantize: First replace every quantised module of the model, adapted or not, by an ordinary one,
                so that the update is not quantised away. Its weights get this type; with True that of the
                model's configuration, or else the one that was quantised.

        Raises:
            MergeError: Naming every layer that cannot be merged; the model is then as it was. Or naming the
                layers that stay merged, with what stopped the others as its cause.
        """
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        if self.peft_config and not names:
            raise MergeError(
                f"no adapter is active, so there is nothing to merge; the model has: "
                f"{', '.join(self.peft_config)}. "
                "Choose with set_adapter or adapter_names, or take the base alone by unload()"
            )
        if reasons := {r for m in self.index.modules() if (r := m.refuses_active(names)) is not None}:
            raise MergeError("; ".join(sorted(reasons)))
        before = {path: layer.merged_adapters for path, layer in self.mergeable().items()}
        try:
            with Rollback() as back:
                if dequantize:
                    self._dequantise(dequantize, back)
                report = self._merge(names, safe_merge, untie, None, back, progressbar)
        except BaseException as error:
            self._name_what_stays(before, error)
            raise
        self.merge_report = report
        if dequantize:
            forget_quantisation(self.model)
        extra = [n for layer in self.mergeable().values() for n in layer.merged_adapters if n not in names]
        for module in self.index.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter(names, inference_mode=True)
                module.enable_adapters(True)
        eject(self.model, trained_copies=True)
        _note_untied(self.model)
        self.peft_config = {}
        _mention(report, stacklevel=3)
        if extra:
            warnings.warn(
                f"the adapter {extra[0]!r} was merged before and stays merged", VeneerWarning, stacklevel=2
            )
        return self.model

    def _name_what_stays(self, before: Mapping[str, list[str]], error: BaseException) -> None:
        """After a failure: the layers that could not be put back, since no copy was kept of their weight."""
        layers = self.mergeable().items()
        paths = [path for path, layer in layers if layer.merged_adapters != before.get(path)]
        if not paths:
            return
        named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        text = (
            f"merging stopped: {type(error).__name__}: {error}. {len(paths)} of {len(before)} layers are "
            f"merged by now ({named}) and stay so, as merge_and_unload keeps no copies. The model computes "
            "the same as before; calling merge_and_unload again goes on with the others"
        )
        if isinstance(error, Exception):
            raise MergeError(text) from error
        warnings.warn(text, VeneerWarning, stacklevel=3)

    def _dequantise(self, dtype: bool | torch.dtype, back: Rollback) -> None:
        """Replace quantised modules."""
        if merged := [path for path, layer in self.layers().items() if layer.merged]:
            raise MergeError(
                f"adapters are merged into {merged[0]} and {len(merged) - 1} more layers as they are "
                "quantised: unmerge_adapter() first"
            )
        dequantise(self.model, back, dtype if isinstance(dtype, torch.dtype) else None)

    def unload(self) -> nn.Module:
        """The base model without adapters, its weights and biases bit for bit as they were."""
        self.unmerge_adapter()
        self._restore_biases()
        eject(self.model)
        self.peft_config = {}
        return self.model


def _mention(report: MergeReport, stacklevel: int) -> None:
    """Warn of what merging lost."""
    if lost := report.undefined:
        warnings.warn(
            f"the merged weights of {', '.join(lost[:3])} hold NaN or infinity, as the base's do"
            + (f"; so do those of {len(lost) - 3} more" if len(lost) > 3 else ""),
            VeneerWarning,
            stacklevel=stacklevel + 1,
        )
    elif report.mean < KEPT_WARNING:
        worst = min(report.kept, key=lambda p: report.kept[p])
        way_out = (
            "Merge into ordinary weights (merge_and_unload(dequantize=True))"
            if report.requantised
            else "Merge into float32"
        )
        warnings.warn(
            f"only {report.mean:.0%} of the update survives rounding to the base weights' type (least in "
            f"{worst}: {report.worst:.0%}): merged and unmerged outputs will differ. {way_out}, or keep "
            "the adapter unmerged",
            VeneerWarning,
            stacklevel=stacklevel + 1,
        )


def _note_untied(model: nn.Module) -> None:
    """Let a configuration not say that embeddings are tied where a trained copy of one took its place."""
    weights = [
        getattr(module, "weight", None)
        for module in (embedding_of(model, "input"), embedding_of(model, "output"))
    ]
    if weights[0] is None or weights[1] is None or weights[0] is weights[1]:
        return
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    for part in (config, text):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
