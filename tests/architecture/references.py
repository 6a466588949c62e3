"""Which definitions nothing reaches, read from the syntax trees.

A definition is a function, class or constant of a module, or a method or attribute in the body of such a
class. What a function defines inside itself is part of that function. The fields of a dataclass are data and
not asked for.

The code that runs on import is reached, and so is what registers itself by being defined, and what is public:
a public class with its public methods. From there on a definition is reached if reached code names it:

- A name is looked up in its module, and through imports where it came from.
- An attribute of a module is looked up there. Any other attribute reaches every method of that name, in every
  class that is reached, and so does a string that is a name (`getattr`, tables of names).
- A string that names a module makes that module one that is imported at run time: an attribute reaches the
  definitions of that name in it too.

So a test reaches nothing, and two definitions that only name one another are both unreached.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Definition:
    """One definition, and the code that runs when it is used.

    `name` is `f`, `Class` or `Class.method`.
    """

    module: str
    name: str
    line: int
    body: list[ast.AST]
    decorators: list[ast.expr] = field(default_factory=list)

    @property
    def owner(self) -> str | None:
        """The class that it is in the body of."""
        return self.name.partition(".")[0] if "." in self.name else None

    @property
    def last(self) -> str:
        """Its name without the class."""
        return self.name.rpartition(".")[2]


@dataclass
class Module:
    """A module: its definitions, the names that it imports, and what runs when it is imported."""

    name: str
    file: Path
    definitions: dict[str, Definition] = field(default_factory=dict)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    head: list[ast.AST] = field(default_factory=list)
    bases: dict[str, list[ast.expr]] = field(default_factory=dict)


class Package:
    """The modules below a directory of sources."""

    def __init__(self, source: Path) -> None:
        self.modules: dict[str, Module] = {}
        for file in sorted(source.rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            self.modules[name] = _read(name, file, is_package)

    def resolve(self, module: str, name: str) -> Definition | Module | None:
        """What `name` in `module` is, imports followed."""
        seen: set[tuple[str, str]] = set()
        wanted = [(module, name)]
        while wanted:
            place, name = wanted.pop()
            found = self.modules.get(place)
            if found is None or (place, name) in seen:
                continue
            seen.add((place, name))
            if name in found.definitions:
                return found.definitions[name]
            if name in found.imported and found.imported[name] != (place, name):
                source, original = found.imported[name]
                if original is None:
                    return self.modules.get(source)
                wanted.append((source, original))
            elif f"{place}.{name}" in self.modules:
                return self.modules[f"{place}.{name}"]
            else:
                wanted.extend((star, name) for star in found.stars)
        return None

    def classes_above(self, definition: Definition) -> Iterator[Definition | str]:
        """The class itself and all classes of the package that it inherits from; others by their name."""
        waiting = [definition]
        while waiting:
            one = waiting.pop()
            yield one
            for base in self.modules[one.module].bases.get(one.name, ()):
                base = base.value if isinstance(base, ast.Subscript) else base
                found = self.value_of(one.module, base)
                if isinstance(found, Definition):
                    waiting.append(found)
                else:
                    yield ast.unparse(base).rpartition(".")[2]

    def value_of(self, module: str, node: ast.AST) -> Definition | Module | None:
        """What a dotted name in `module` is."""
        if isinstance(node, ast.Name):
            return self.resolve(module, node.id)
        if isinstance(node, ast.Attribute):
            inner = self.value_of(module, node.value)
            if isinstance(inner, Module):
                return self.resolve(inner.name, node.attr)
        return None


def _read(name: str, file: Path, is_package: bool) -> Module:
    tree = ast.parse(file.read_text())
    module = Module(name, file)
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(source)
                else:
                    module.imported[alias.asname or alias.name] = (source, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                module.imported[bound] = (alias.name if alias.asname else bound, None)
    _define(module, tree.body)
    return module


def _define(module: Module, body: list[ast.stmt]) -> None:
    for node in body:
        if isinstance(node, FUNCTIONS):
            module.head += [*node.decorator_list, node.args]
            module.definitions[node.name] = _function(module.name, node.name, node)
        elif isinstance(node, ast.ClassDef):
            module.head += [*node.decorator_list, *node.bases, *(word.value for word in node.keywords)]
            module.bases[node.name] = node.bases
            module.definitions[node.name] = Definition(
                module.name, node.name, node.lineno, [], node.decorator_list
            )
            _define_inside(module, node)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                _define(module, getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                _define(module, handler.body)
            module.head += [node.test] if isinstance(node, ast.If) else []
        else:
            targets = list(_targets(node))
            for target in targets:
                module.definitions[target] = Definition(module.name, target, node.lineno, [node])
            if not targets or not isinstance(node, ast.Assign | ast.AnnAssign):
                module.head.append(node)


def _define_inside(module: Module, node: ast.ClassDef) -> None:
    owner = module.definitions[node.name]
    for inner in node.body:
        if isinstance(inner, FUNCTIONS):
            name = f"{node.name}.{inner.name}"
            owner.body += [*inner.decorator_list, inner.args]
            if name in module.definitions:  # a property and its setter, overloads
                module.definitions[name].body += inner.body
            else:
                module.definitions[name] = _function(module.name, name, inner)
        else:
            owner.body.append(inner)
            for target in [] if _is_field(inner) else _targets(inner):
                name = f"{node.name}.{target}"
                module.definitions[name] = Definition(module.name, name, inner.lineno, [])


def _function(module: str, name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Definition:
    body: list[ast.AST] = [*node.body, *([node.returns] if node.returns else [])]
    return Definition(module, name, node.lineno, body, node.decorator_list)


def _targets(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(name, ast.Name):
                    yield name.id
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)


class Reach:
    """What is reached in a package.

    Args:
        package: All modules.
        roots: What is public, each as `module:name`.
        called: Methods that other libraries call, by the name of the class: of theirs, from which ours
            inherits, or of ours.
    """

    def __init__(
        self, package: Package, roots: Iterable[str] = (), called: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self.package = package
        self.called = called or {}
        #: Which entries of `called` reached something.
        self.used: set[tuple[str, str]] = set()
        self.live: set[int] = set()
        self.words: set[str] = set()
        self.named: set[str] = set()
        self.waiting: list[tuple[str, ast.AST]] = []
        self.everything = [d for module in package.modules.values() for d in module.definitions.values()]
        for module in package.modules.values():
            self.waiting += [(module.name, node) for node in module.head]
        for definition in self.everything:
            if self._is_registered(definition):
                self._mark(definition)
        for root in roots:
            place, _, name = root.partition(":")
            found = package.resolve(place, name)
            if isinstance(found, Definition):
                self._publish(found)
        self._run()

    def _is_registered(self, definition: Definition) -> bool:
        """What registers itself by being defined, or is what the import system asks of a module."""
        if definition.owner is not None:
            return False
        for decorator in definition.decorators:
            while isinstance(decorator, ast.Call | ast.Attribute):
                if self.package.value_of(definition.module, decorator):
                    return True
                decorator = decorator.func if isinstance(decorator, ast.Call) else decorator.value
            if self.package.value_of(definition.module, decorator):
                return True
        above = (cls for cls in self.package.classes_above(definition) if isinstance(cls, Definition))
        return _is_special(definition.name) or any(
            f"{cls.name}.__init_subclass__" in self.package.modules[cls.module].definitions
            for cls in above
            if cls is not definition
        )

    def _publish(self, definition: Definition) -> None:
        """A public class is reached with its public methods, those that it inherits too."""
        self._mark(definition)
        for cls in self.package.classes_above(definition):
            if isinstance(cls, Definition):
                self._mark(cls)
                for other in self.package.modules[cls.module].definitions.values():
                    if other.owner == cls.name and not other.last.startswith("_"):
                        self._mark(other)

    def _mark(self, definition: Definition) -> None:
        if id(definition) not in self.live:
            self.live.add(id(definition))
            self.waiting += [(definition.module, node) for node in definition.body]

    def _run(self) -> None:
        while True:
            while self.waiting:
                self._follow(*self.waiting.pop())
            for definition in self.everything:
                if id(definition) not in self.live and self._is_called(definition):
                    self._mark(definition)
            if not self.waiting:
                return

    def _is_called(self, definition: Definition) -> bool:
        """Whether it is reached by its name alone."""
        name = definition.last
        if definition.owner is None:
            return definition.module in self.named and name in self.words
        cls = self.package.modules[definition.module].definitions[definition.owner]
        if id(cls) not in self.live:
            return False
        if name in self.words or _is_special(name):
            return True
        above = [one if isinstance(one, str) else one.name for one in self.package.classes_above(cls)]
        used = {(base, name) for base in above if name in self.called.get(base, ())}
        self.used |= used
        return bool(used)

    def _follow(self, module: str, top: ast.AST) -> None:
        for node in ast.walk(top):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found = self.package.resolve(module, node.id)
                if isinstance(found, Definition):
                    self._mark(found)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found = self.package.value_of(module, node)
                if isinstance(found, Definition):
                    self._mark(found)
                self.words.add(node.attr)
            elif isinstance(node, ast.JoinedStr):
                self.named.add(self._module_of(module, node))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value in self.package.modules:
                    self.named.add(node.value)
                elif node.value.isidentifier():
                    self.words.add(node.value)

    def _module_of(self, module: str, node: ast.JoinedStr) -> str:
        """What ``f"{__name__}.x"`` or ``f"{__package__}.x"`` is."""
        parent = module if self.package.modules[module].file.stem == "__init__" else module.rpartition(".")[0]
        own = {"__name__": module, "__package__": parent}
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else own.get(ast.unparse(part.value), "?")
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )

    def unreached(self) -> list[Definition]:
        """What nothing reaches, in the order of the files."""
        return [definition for definition in self.everything if id(definition) not in self.live]
