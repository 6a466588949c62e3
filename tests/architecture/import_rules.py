"""Who may import whom, read from the syntax trees.

    errors -> wording -> registry · lazy · atomic · ops -> files -> hub -> config -> spec
           -> module_names · expert_layouts -> targets · adapters · inits · variants · backends · sharded
           -> routing · rollback · base_files -> merge -> layers -> inject · arithmetic
           -> state_dict · base_fingerprint · hotswap · status -> lora_model -> load · save -> peft_model
           -> calibration · family -> integrations -> training -> sweep · tools -> as_peft -> cli

1. A unit (a module or folder right under the package) imports only from the left; units of one rank do not
   import one another. What stands to the right of all
   that the public face gathers may import that face.
2. Imports inside functions only where optional libraries are met, and in the doors.
3. The first units use the standard library alone, the core torch and safetensors beside it.
4. Kernels are modules in the language of an optional library, which they import at their head. The door that
   leads to them is all that imports them, so that whoever does not pass it never needs that library.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "veneer"
RANKS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("wording",),
    ("registry", "lazy", "atomic", "ops"),
    ("files",),
    ("hub",),
    ("config",),
    ("spec",),
    ("module_names", "expert_layouts"),
    ("targets", "adapters", "inits", "variants", "backends", "sharded"),
    ("routing", "rollback", "base_files", "forward"),
    ("merge",),
    ("layers",),
    ("inject", "arithmetic", "checks", "optimizers", "lora_file", "listing", "dequantise", "merge_report"),
    ("state_dict", "base_fingerprint", "hotswap", "status"),
    ("lora_model",),
    ("load", "save"),
    ("peft_model",),
    ("calibration", "family"),
    ("integrations",),
    ("public",),
    ("training",),
    ("sweep",),
    ("testing",),
    ("tools",),
    ("as_peft",),
    ("cli",),
)
RANK = {unit: rank for rank, units in enumerate(RANKS) for unit in units}
FUNCTION_IMPORTS = {"hub", "backends", "integrations", "training", "sweep", "as_peft", "cli"}
#: (file, outermost function) of the doors: they need what stands to their right, or load public names lazily.
DOORS = {
    ("__init__.py", "__getattr__"),
    ("public.py", "__getattr__"),
    ("ops/gpu.py", "_checked_step"),
}
#: Modules of kernels, and the optional library that each may import.
KERNELS = {"ops/triton_kernels.py": "triton", "ops/triton_lora.py": "triton"}
USES_PUBLIC_FACE = {"training", "sweep", "as_peft", "cli"}
STDLIB_ONLY = {
    "errors",
    "version",
    "wording",
    "registry",
    "lazy",
    "atomic",
    "config",
    "spec",
    "module_names",
    "targets",
}
CORE_LIBRARIES = {"torch", "safetensors"}
OPTIONAL_ALLOWED = {"hub", "backends", "integrations", "training", "sweep", "as_peft", "cli"}


@dataclass(frozen=True)
class Import:
    """One imported name: where, what, and inside which function (None at module level)."""

    line: int
    target: str
    function: str | None


def imports_of(tree: ast.Module, module: tuple[str, ...], is_package: bool) -> Iterator[Import]:
    """All imports of a module with dotted parts `module`, relative ones made absolute."""
    package = module if is_package else module[:-1]

    def visit(node: ast.AST, function: str | None) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(child.lineno, alias.name, function)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                stem = ".".join((*base, *([child.module] if child.module else [])))
                for alias in child.names:
                    yield Import(child.lineno, f"{stem}.{alias.name}", function)
            elif isinstance(child, ast.Call) and _dynamic(child) is not None:
                yield Import(child.lineno, str(_dynamic(child)), function)
            inner = function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = function or child.name
            elif isinstance(child, ast.Lambda):
                inner = function or "<lambda>"
            yield from visit(child, inner)

    yield from visit(tree, None)


def _dynamic(call: ast.Call) -> str | None:
    """The constant name that import_module or __import__ is called with."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("import_module", "__import__") or not call.args:
        return None
    first = call.args[0]
    if not isinstance(first, ast.Constant) or not isinstance(first.value, str) or first.value.startswith("."):
        return None
    return first.value


def check(package: Path) -> list[str]:
    """Every breach of the rules under `package` (the directory), as file:line: what."""
    breaches: list[str] = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = (PACKAGE, *(parts[:-1] if is_package else parts))
        unit = parts[0] if module != (PACKAGE,) else "__init__"
        where = file.relative_to(package).as_posix()
        if unit not in RANK and unit not in ("__init__", "__main__"):
            breaches.append(f"{where}: unit {unit!r} has no place in RANKS")
            continue
        for found in imports_of(ast.parse(file.read_text()), module, is_package):
            reason = _breach(found, unit, where, package)
            if reason:
                breaches.append(f"{where}:{found.line}: {reason}")
    return breaches


def _breach(found: Import, unit: str, where: str, package: Path) -> str | None:
    top, _, rest = found.target.partition(".")
    door = (where, found.function) in DOORS
    if found.function is not None and unit not in FUNCTION_IMPORTS and not door:
        return f"import of {found.target} inside {found.function}()"
    if _is_kernel(rest) and not door and where not in KERNELS:
        return f"{found.target} is reached through its door alone"
    if top == PACKAGE:
        return (
            None
            if unit in ("__init__", "__main__") or door
            else _direction(unit, rest.split(".")[0], package)
        )
    if top in sys.stdlib_module_names:
        return None
    if unit in STDLIB_ONLY and not door:
        return f"{unit} uses the standard library alone, not {top}"
    if top in CORE_LIBRARIES or unit in OPTIONAL_ALLOWED or door or KERNELS.get(where) == top:
        return None
    return f"{unit} may use torch and safetensors, not {top}"


def _is_kernel(target: str) -> bool:
    """Whether a name below the package is a module of kernels, or lies in one."""
    names = [Path(file).with_suffix("").as_posix().replace("/", ".") for file in KERNELS]
    return any(target == name or target.startswith(f"{name}.") for name in names)


def _direction(unit: str, other: str, package: Path) -> str | None:
    if not (package / other).is_dir() and not (package / f"{other}.py").is_file():
        if unit in USES_PUBLIC_FACE:
            return None
        return f"{unit} imports {other!r} from the package root: name the unit that holds it"
    if other == unit:
        return None
    if other not in RANK:
        return None  # reported where that unit's own files are read
    if RANK[other] >= RANK[unit]:
        side = "beside" if RANK[other] == RANK[unit] else "to the right of"
        return f"{unit} imports {other}, which stands {side} it"
    return None


def circles(package: Path) -> list[list[str]]:
    """Files that import one another in a circle, the imports inside functions and for types included.

    A package's ``__init__`` counts as a file of its own: who imports a module is not taken to import that.
    """
    files: dict[str, Path] = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        files[".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = file
    arrows: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        tree = ast.parse(file.read_text())
        for found in imports_of(tree, tuple(name.split(".")), file.name == "__init__.py"):
            target = found.target
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != name:
                arrows[name].add(target)
    reach = {name: _reached(name, arrows) for name in files}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in files if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reached(start: str, arrows: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        for name in arrows[left.pop()] - found:
            found.add(name)
            left.append(name)
    return found
