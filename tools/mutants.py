"""Try the tests: break one law or refusal at a time, and see that the short suite notices.

    python tools/mutants.py [NAME ...]

Each mutant is one edit of a copy of the sources. The tests named with it, all of the short suite, run on the
copy and have to fail. Printed is a table of the mutants, what each breaks, and the test that noticed. Exit 1
if one survives, or if its edit no longer fits the sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LAYER_LAWS = ("tests/laws/test_layers.py", "-k", "Linear-plain-Default and dense-float32")


class Mutant(NamedTuple):
    """An edit that breaks something.

    Attributes:
        name: Short, for the command line.
        breaks: The law or the refusal.
        file: Below ``src/veneer``.
        before: Text that stands there once.
        after: What takes its place.
        tests: Arguments for pytest: tests of the short suite, one of which has to fail.
    """

    name: str
    breaks: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "scaling", "s = lora_alpha / r", "spec.py",
        "math.sqrt(self.r) if self.use_rslora else self.r)", "math.sqrt(self.r) if self.use_rslora else 1)",
        ("tests/unit/test_spec.py",),
    ),
    Mutant(
        "rslora", "s = lora_alpha / sqrt(r) with use_rslora", "spec.py",
        "(math.sqrt(self.r) if self.use_rslora else self.r)", "self.r",
        ("tests/unit/test_spec.py",),
    ),
    Mutant(
        "rank-zero", "a rank below one is refused", "spec.py",
        "if self.r < 1:", "if self.r < -(10**9):",
        ("tests/unit/test_spec.py",),
    ),
    Mutant(
        "first-pattern", "the first rank pattern that matches counts", "spec.py",
        "r=rank_of[ranks[path][0]]", "r=rank_of[ranks[path][-1]]",
        ("tests/unit/test_spec.py",),
    ),
    Mutant(
        "reference-scale", "the plain-torch step scales the branch", "ops/lora_linear.py",
        "return scaling * F.linear(F.linear(x, A), B, B_bias)", "return F.linear(F.linear(x, A), B, B_bias)",
        ("tests/unit/ops/test_lora_linear.py",),
    ),
    Mutant(
        "dropout-scale", "what dropout leaves is divided by 1 - p", "ops/lora_step.py",
        "return self.parts[0].scaling / (1.0 - self.parts[0].p)\n", "return self.parts[0].scaling\n",
        ("tests/unit/ops/test_lora_linear.py",),
    ),
    Mutant(
        "gradient-of-rows", "an adapter's gradients come from its own rows", "ops/lora_step.py",
        "None if rows is None else block.of(rows)", "None if rows is None else block.of(rows.flip(0))",
        ("tests/laws/test_family.py",),
    ),
    Mutant(
        "family-draws", "what dropout drops does not depend on what texts are filled up to", "ops/dropout.py",
        "if self.tokens == self.filled or count % self.filled:", "if True:",
        ("tests/laws/test_family.py",),
    ),
    Mutant(
        "family-mean", "a step takes the mean over what was counted", "family/trainee.py",
        "limit / (norm + 1e-6)) / count", "limit / (norm + 1e-6))",
        ("tests/unit/family/test_family.py",),
    ),
    Mutant(
        "few-rows-bias", "the bias of B counts in a decoding step", "ops/lora_linear.py",
        "return y if B_bias is None else y.add_(widened(B_bias), alpha=scaling)", "return y",
        ("tests/unit/ops/test_lora_linear.py",),
    ),
    Mutant(
        "disabled", "disabled equals the base, bit for bit, while merged", "layers/layer.py",
        "if self._disabled and self._merged:", "if False:",
        LAYER_LAWS,
    ),
    Mutant(
        "live", "what is merged is not added a second time", "layers/layer.py",
        "if n in self._specs and n not in self._merged])", "if n in self._specs])",
        LAYER_LAWS,
    ),
    Mutant(
        "unmerge-on-switch", "an adapter that is no longer active is unmerged", "layers/layer.py",
        "            self.unmerge(left)\n", "            pass\n",
        ("tests/unit/layers/test_layer.py", "tests/laws/test_lifecycle_machine.py"),
    ),
    Mutant(
        "trainable", "only active adapters are trainable", "adapters.py",
        "trainable = active and not inference_mode", "trainable = not inference_mode",
        ("tests/unit/test_adapters.py", "tests/unit/test_lora_model.py"),
    ),
    Mutant(
        "contexts", "a context of one thread ends alone", "adapters.py",
        "            here.remove(context)", "            here.clear()",
        ("tests/unit/test_routing.py", "tests/laws/test_calls.py"),
    ),
    Mutant(
        "frozen-base", "the base is frozen by the first adapter", "inject/injection.py",
        "                    parameter.requires_grad_(False)\n", "                    pass\n",
        ("tests/unit/test_inject.py", "tests/laws/test_models.py"),
    ),
    Mutant(
        "merge-twice", "what is merged is not merged again", "merge.py",
        "if n in present and n not in layer._merged}", "if n in present}",
        ("tests/unit/layers/test_layer.py",),
    ),
    Mutant(
        "finite-update", "an update that is not finite is refused", "merge.py",
        "if not update.is_finite(sizes[name])]", "if False]",
        ("tests/unit/test_merge.py",),
    ),
    Mutant(
        "finite-bias", "a bias that would not be finite is refused", "merge.py",
        "    if any(u.bias is not None for u in every):\n        bias = _original",
        "    if False:\n        bias = _original",
        ("tests/unit/test_merge.py",),
    ),
    Mutant(
        "merged-stays", "what is merged stays as it was merged", "merge.py",
        "name: update.copied() for name, update in updates.items()",
        "name: update for name, update in updates.items()",
        LAYER_LAWS,
    ),
    Mutant(
        "rollback", "a merge that fails leaves the model as it was", "rollback.py",
        "            self._steps.__exit__(kind, error, trace)", "            self._steps.pop_all()",
        ("tests/unit/test_rollback.py",),
    ),
    Mutant(
        "tied-merge", "a weight that others share is not merged into", "merge.py",
        "        if others:\n            found[path] = others",
        "        if False:\n            found[path] = others",
        ("tests/laws/test_models.py", "tests/unit/test_merge.py"),
    ),
    Mutant(
        "untie-config", "untying says so in the model's configuration", "merge.py",
        "        config.tie_word_embeddings = False\n", "        pass\n",
        ("tests/unit/test_lora_model.py",),
    ),
    Mutant(
        "dora-norm", "a merged DoRA has rows of length m", "variants/dora.py",
        "return total * (extra[MAGNITUDE].reshape(-1) / _safe(norms)).unsqueeze(1)",
        "return total * extra[MAGNITUDE].reshape(-1).unsqueeze(1)",
        ("tests/laws/test_layers.py", "-k", "Linear and Default-dora-dense-float32"),
    ),
    Mutant(
        "pissa-start", "PiSSA's start is the principal part of W", "inits/pissa.py",
        "root = (s[:rank] / request.spec.scaling).sqrt()", "root = s[:rank] / request.spec.scaling",
        ("tests/unit/inits/test_subtracted.py",),
    ),
    Mutant(
        "residual", "identity at the start, though A and B are not zero", "inits/base.py",
        "return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)",
        "return torch.cat([a, a]), torch.cat([b, b0], dim=1)",
        ("tests/unit/inits/test_subtracted.py",),
    ),
    Mutant(
        "generator", "two layers do not start alike", "inits/base.py",
        'key = f"{self.seed}:{self.spec.path}.{parameter}".encode()',
        'key = f"{self.seed}:{parameter}".encode()',
        ("tests/unit/inits/test_random.py", "tests/unit/test_inject.py"),
    ),
    Mutant(
        "rows-of-others", "a row goes through its own adapter", "layers/layer.py",
        "rows, scale = slice(start, stop), self", "rows, scale = slice(0, stop - start), self",
        ("tests/laws/test_mixed_batch.py",),
    ),
    Mutant(
        "rows-of-dropout", "each adapter of a family has random numbers of its own", "layers/linear.py",
        "own_draws = p > 0.0 and draws_of(name, x) is not None", "own_draws = False",
        ("tests/laws/test_family_layers.py", "-k", "Linear-3-D and alora-dense"),
    ),
    Mutant(
        "rows-in-place", "a training step copies no output for each adapter", "ops/rows.py",
        "kept.append(y[own].clone())", "kept.append(y.clone()[own])",
        ("tests/laws/test_family_layers.py", "-k", "Linear-3-D and dora-dense"),
    ),
    Mutant(
        "rows-of-callers", "a loss of the caller's reaches its adapter's rows alone", "family/batches.py",
        "own = output[self.rows[name]]", "own = output",
        ("tests/unit/family/test_family.py",),
    ),
    Mutant(
        "rows-of-experts", "rows go through their own adapter of a bare parameter", "layers/parameter.py",
        "return self._with(() if name is None else (name,))", "return self._with(None)",
        ("tests/unit/test_routing.py",),
    ),
    Mutant(
        "nan-in-file", "NaN and infinity in a file are refused", "files/values.py",
        "    if check_finite is not False:\n", "    if False:\n",
        ("tests/unit/files/test_values.py",),
    ),
    Mutant(
        "flipped-bit", "tensors that differ from what was saved are refused", "files/read.py",
        "if data_digest(self.memory, self.header.first) != saved:", "if False:",
        ("tests/unit/files/test_read.py",),
    ),
    Mutant(
        "integer-factors", "factors that are no floating-point numbers are refused", "files/values.py",
        "if tensor.dtype not in _TYPES and _OF_THE_ADAPTER.search(name)", "if False",
        ("tests/unit/files/test_values.py",),
    ),
    Mutant(
        "other-part", "the encoder's tensors are not read as the decoder's", "files/match.py",
        "if only_tail or (named_old and named_new and named_old != named_new):", "if only_tail:",
        ("tests/unit/files/test_match.py",),
    ),
    Mutant(
        "missing", "tensors that the file lacks are named", "files/match.py",
        "missing = tuple(e for e in expected if e not in filled and e not in optional)", "missing = ()",
        ("tests/unit/files/test_match.py",),
    ),
    Mutant(
        "key-twice", "a key twice in a configuration is refused", "files/config.py",
        "    if len(table) != len(pairs):\n", "    if False:\n",
        ("tests/unit/files", "tests/golden/test_hostile.py", "tests/golden/test_hostile_configurations.py"),
    ),
    Mutant(
        "cut-short", "a save that was cut short is read with its own configuration", "files/layout.py",
        "if beside is None or _digest(beside) == metadata.get(REPLACED_CONFIG):", "if beside is None:",
        ("tests/unit/files/test_layout.py", "tests/golden/test_killed_save.py"),
    ),
    Mutant(
        "order-of-moves", "the tensors are in place before their configuration", "atomic.py",
        "for number, (temporary, place) in enumerate(waiting.items()):",
        "for number, (temporary, place) in enumerate(reversed(waiting.items())):",
        ("tests/unit/test_atomic.py", "tests/golden/test_killed_save.py"),
    ),
    Mutant(
        "cat-strength", "a combination counts each adapter's own strength", "arithmetic.py",
        "b = torch.cat([strengths[n] * part[1] for n, part in parts.items()], dim=1)",
        "b = torch.cat([part[1] for n, part in parts.items()], dim=1)",
        ("tests/unit/test_arithmetic.py",),
    ),
    Mutant(
        "resize-strength", "resizing keeps the strength of every module", "tools/resizing.py",
        "lora_alpha=alpha_of(spec.scaling, rank, spec.use_rslora)", "lora_alpha=spec.lora_alpha",
        ("tests/unit/tools/test_resizing.py", "-k", "strength"),
    ),
    Mutant(
        "layout-order", "the order of B says whose a column is", "expert_layouts/reading.py",
        "order = (1, 0, 2) if layout.expert_slowest", "order = (1, 2, 0) if layout.expert_slowest",
        ("tests/laws/test_expert_layouts.py", "-k", "stay and unsloth and qwen3_moe-plain"),
    ),
    Mutant(
        "layout-ambiguous", "experts in an ambiguous layout are refused", "expert_layouts/standard.py",
        "if told.others and not ambiguous:", "if False:",
        ("tests/unit/expert_layouts/test_standard.py", "-k", "ambiguous"),
    ),
    Mutant(
        "tokens-lost", "tokens whose rows are unknown are refused in a mixed batch", "routing.py",
        "if tokens == LOST and len(set(mine)) > 1:", "if False:",
        ("tests/unit/test_routing.py", "-k", "tokens"),
    ),
    Mutant(
        "combine-weights", "a sum of saved adapters counts their weights", "tools/combining.py",
        "s.strength * s.b for s", "s.scaling * s.b for s",
        ("tests/unit/tools/test_combining.py", "-k", "weighted"),
    ),
    Mutant(
        "diff-sign", "two updates are compared by their difference", "tools/measuring.py",
        "-s2 * b2", "s2 * b2",
        ("tests/unit/tools/test_comparing.py", "-k", "dense"),
    ),
    Mutant(
        "verify-merge", "an adapter that merges into something else fails", "tools/verifying.py",
        "apart <= allowed", "True",
        ("tests/unit/tools/test_verifying.py", "-k", "merging"),
    ),
    Mutant(
        "wrong-base", "an adapter of another base is refused", "base_fingerprint.py",
        '    if result.severity == "wrong":\n', "    if False:\n",
        ("tests/unit/test_load.py", "tests/laws/test_trust.py"),
    ),
    Mutant(
        "lorafa", "LoRA-FA projects the gradient of B", "optimizers/lorafa.py",
        "@ torch.linalg.pinv(gram) / layer.scaling[name] ** 2", "/ layer.scaling[name] ** 2",
        ("tests/unit/optimizers",),
    ),
    Mutant(
        "mica", "MiCA never trains B", "layers/layer.py",
        "if init is True or not inits.find(init).freezes_b:", "if True:",
        ("tests/unit/inits/test_mica.py",),
    ),
    Mutant(
        "alora", "an aLoRA acts from its invocation tokens on", "routing.py",
        "torch.arange(tokens, device=x.device) >= starts.unsqueeze(1)",
        "torch.arange(tokens, device=x.device) > starts.unsqueeze(1)",
        ("tests/unit/variants/test_alora.py",),
    ),
)  # fmt: skip


class Outcome(NamedTuple):
    """How a mutant fared: the test that noticed, or what went wrong."""

    mutant: Mutant
    caught: bool
    words: str


def edited(mutant: Mutant, source: Path) -> str:
    """The text of the mutant's file with its edit.

    Raises:
        ValueError: The text that it replaces does not stand there once.
    """
    text = (source / mutant.file).read_text()
    if (count := text.count(mutant.before)) != 1:
        raise ValueError(f"its text stands {count} times in {mutant.file}: adapt tools/mutants.py")
    return text.replace(mutant.before, mutant.after)


def tried(mutant: Mutant) -> Outcome:
    """Run the tests of a mutant on a copy of the sources that holds it."""
    try:
        text = edited(mutant, ROOT / "src/veneer")
    except (ValueError, OSError) as error:
        return Outcome(mutant, False, str(error))
    if missing := [t for t in mutant.tests if t.startswith("tests/") and not (ROOT / t).exists()]:
        return Outcome(mutant, False, f"no such tests: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        (source / "veneer" / mutant.file).write_text(text)
        options = ("-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
        command = [sys.executable, "-m", "pytest", *options, *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = re.search(r"^FAILED \S*?([^/\s]+::\S+)", run.stdout, re.MULTILINE)
    if run.returncode == 1 and failed:
        return Outcome(mutant, True, failed[1])
    if run.returncode == 0:
        return Outcome(mutant, False, "SURVIVED: its tests pass")
    return Outcome(mutant, False, f"pytest ended with {run.returncode}: {run.stdout.strip()[-300:]}")


def main(names: Sequence[str]) -> int:
    """Try the mutants of these names, or all."""
    if unknown := set(names) - {mutant.name for mutant in MUTANTS}:
        print(f"no mutant is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survived = 0
    print("| mutant | breaks | caught by |\n| --- | --- | --- |", flush=True)
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for outcome in pool.map(tried, chosen):
            survived += not outcome.caught
            words = f"`{outcome.words}`" if outcome.caught else f"**{outcome.words}**"
            print(f"| {outcome.mutant.name} | {outcome.mutant.breaks} | {words} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} mutants are caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
