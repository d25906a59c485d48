"""What this project takes from other libraries, read from its source and held against the installed ones.

Read are imports, chains of attributes that start from one (`torch.nn.functional.pad`), calls of them, and subclasses
of library classes. Not seen is what is known at run time alone: methods of values, and what stands behind a `**`.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dpo_fast", "kernels", "benchmarks")
# Scripts import each other by plain name.
OURS = {"dpo_fast", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}


def library(name: str) -> str:
    return name.partition(".")[0]


@dataclass
class Uses:
    """What the source uses; places are file:line, names are dotted and start with the library."""

    names: list[tuple[str, str]] = field(default_factory=list)
    calls: list[tuple[str, str, ast.Call]] = field(default_factory=list)
    subclasses: list[tuple[str, str, ast.ClassDef]] = field(default_factory=list)
    attributes: set[str] = field(default_factory=set)

    def add(self, source: str, file: str) -> Uses:
        _Reader(file, self).visit(ast.parse(source))
        return self

    def faults(self, of: str) -> list[str]:
        """A line for each use that the installed library `of` does not have, or has otherwise."""
        found = dict.fromkeys(
            f"{place}: {name}: {missing(name)}" for place, name in self.names if library(name) == of and missing(name)
        )
        for place, name, call in self.calls:
            if library(name) == of and not missing(name) and (reason := misfit(resolve(name), call)):
                found[f"{place}: {name}(...): {reason}"] = None
        for file, name, node in self.subclasses:
            if library(name) == of and not missing(name):
                found |= dict.fromkeys(_subclass_faults(file, resolve(name), node, self.attributes))
        return list(found)


@cache
def project_uses() -> Uses:
    # dpo_fast/kernels is a link to kernels.
    paths = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    uses = Uses()
    for path in sorted(paths):
        uses.add(path.read_text(), str(path.relative_to(ROOT)))
    return uses


class _Reader(ast.NodeVisitor):
    """A scope has what a local name stands for: a library's name, or None."""

    def __init__(self, file: str, uses: Uses) -> None:
        self.file, self.uses = file, uses
        self.scopes: list[dict[str, str | None]] = [{}]

    def _import(self, node: ast.stmt, imported: str, local: str, stands_for: str) -> None:
        is_other = library(imported) not in OURS | sys.stdlib_module_names
        self.scopes[-1][local] = stands_for if is_other else None
        if is_other:
            self.uses.names.append((f"{self.file}:{node.lineno}", imported))

    def visit_Import(self, node: ast.Import) -> None:
        for x in node.names:
            stands_for = x.name if x.asname else library(x.name)
            self._import(node, x.name, x.asname or stands_for, stands_for)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for x in node.names:
            name = f"{node.module}.{x.name}"
            self._import(node, "dpo_fast" if node.level else name, x.asname or x.name, name)

    def visit_FunctionDef(self, node: Any) -> None:
        inside = list(ast.walk(node))
        shadowed = [x.arg for x in inside if isinstance(x, ast.arg)]
        shadowed += [x.id for x in inside if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
        self.scopes.append(dict.fromkeys(shadowed))
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def _name(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        before = self._name(node.value) if isinstance(node, ast.Attribute) else None
        return before and f"{before}.{node.attr}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.uses.attributes.add(node.attr)
        if name := self._name(node):
            self.uses.names.append((f"{self.file}:{node.lineno}", name))
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if name := self._name(node.func):
            self.uses.calls.append((f"{self.file}:{node.lineno}", name, node))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.uses.subclasses += [(self.file, name, node) for name in map(self._name, node.bases) if name]
        self.generic_visit(node)


@cache
def resolve(name: str) -> Any:
    """The object of a dotted name; what is no attribute may be a module that nobody has imported yet."""
    head, _, attribute = name.rpartition(".")
    if not head:
        return import_module(name)
    owner = resolve(head)
    if inspect.ismodule(owner) and not hasattr(owner, attribute):
        with suppress(ModuleNotFoundError):
            return import_module(name)
    return getattr(owner, attribute)


@cache
def missing(name: str) -> str | None:
    try:
        resolve(name)
    except (AttributeError, ImportError) as error:
        return str(error)
    return None


def signatures(function: Any) -> list[Signature]:
    """Those that a call may have: several for PyTorch's operators, none where they cannot be known."""
    if type(function).__module__.startswith("triton."):
        function = getattr(function, "fn", function)
    owner = getattr(function, "__self__", None)
    if inspect.isclass(owner) and issubclass(owner, torch.autograd.Function) and function.__name__ == "apply":
        # The context comes from PyTorch.
        return [_without_first(inspect.signature(owner.forward))]
    # transformers' automatic classes wrap a method that is bound already, whose signature would lose its `cls` twice.
    wraps_bound = inspect.ismethod(getattr(function, "__wrapped__", None))
    try:
        found = inspect.signature(function, follow_wrapped=not wraps_bound)
    except (ValueError, TypeError):
        return _operator_signatures(function)
    if inspect.isclass(function) and "self" in found.parameters:  # as classes made by PyO3 have it
        found = _without_first(found)
    takes_anything = {x.kind for x in found.parameters.values()} == {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    return [] if takes_anything else [found]


def _without_first(signature: Signature) -> Signature:
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _operator_signatures(function: Any) -> list[Signature]:
    of_torch = any(function is x for module in (torch, torch.nn.functional) for x in vars(module).values())
    if not of_torch or inspect.isclass(function):
        return []
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{function.__name__}")
    # Some without arguments are TorchScript's alone.
    return [signature for schema in schemas if schema.arguments for signature in _of_schema(schema)]


def _of_schema(schema: Any) -> Iterator[Signature]:
    """As seen from Python: `self` is `input`, a size may be several arguments, and what is made may want a gradient."""
    parameters = [
        Parameter(
            "input" if x.name == "self" else x.name,
            Parameter.KEYWORD_ONLY if x.kwarg_only else Parameter.POSITIONAL_OR_KEYWORD,
            default=x.default_value if x.has_default_value() else Parameter.empty,
        )
        for x in schema.arguments
    ]
    if any(x.name == "pin_memory" for x in parameters):
        parameters.append(Parameter("requires_grad", Parameter.KEYWORD_ONLY, default=False))
    yield Signature(parameters)
    if parameters[0].name == "size":
        rest = (x.replace(kind=Parameter.KEYWORD_ONLY) for x in parameters[1:])
        yield Signature([Parameter("size", Parameter.VAR_POSITIONAL), *rest])


def misfit(function: Any, call: ast.Call, *, has_self: bool = False) -> str | None:
    """Why `function` cannot be called like this; None if it can. `has_self`: its first argument is not written."""
    arguments, num_positional = list(call.args), int(has_self)
    is_open = any(x.arg is None for x in call.keywords)
    while arguments:
        x = arguments.pop()
        if isinstance(x, ast.Starred) and isinstance(x.value, ast.Tuple):
            arguments += x.value.elts
        elif isinstance(x, ast.Starred):
            is_open = True
        else:
            num_positional += 1
    keywords = dict.fromkeys(x.arg for x in call.keywords if x.arg)
    reasons = []
    for signature in signatures(function):
        try:
            (signature.bind_partial if is_open else signature.bind)(*[None] * num_positional, **keywords)
        except TypeError as error:
            reasons.append(f"{error}: {signature}")
        else:
            return None
    return "; ".join(reasons) or None


def _subclass_faults(file: str, base: type, node: ast.ClassDef, attributes: set[str]) -> Iterator[str]:
    """What our methods override, and what they want of their base class.

    A private method that the base lacks and that we never name was meant to override one that is no more.
    """
    methods = {x.name: x for x in node.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)}
    for name, method in methods.items():
        place = f"{file}:{method.lineno}: {node.name}.{name}"
        if hasattr(base, name):
            yield from (f"{place}: {reason}" for reason in _override_faults(getattr(base, name), method))
        elif name.startswith("_") and name not in attributes:
            yield f"{place}: {base.__name__} has none that it overrides, and nothing here calls it"
    given = {name for x in base.__mro__ for name in _given_by(x)} | _set_on_self(node)
    for x in ast.walk(node):
        function = x.func if isinstance(x, ast.Call) else None
        if (name := _of_super(function) or _of_self(function)) and hasattr(base, name):
            is_function = inspect.isfunction(inspect.getattr_static(base, name))
            is_ours = name in methods and not _of_super(function)
            if not is_ours and (reason := misfit(getattr(base, name), x, has_self=is_function)):
                yield f"{file}:{x.lineno}: {base.__name__}.{name}(...): {reason}"
        of_self = _of_self(x)
        wanted = _of_super(x) or (of_self if of_self not in methods.keys() | given else None)
        if wanted and not hasattr(base, wanted):
            yield f"{file}:{x.lineno}: {base.__name__} has no {wanted}"


def _override_faults(base: Any, method: Any) -> Iterator[str]:
    if method.name == "__init__":  # called by its class's own name; its call of super is checked
        return
    ours = [x.arg for x in (*method.args.posonlyargs, *method.args.args)]
    for signature in signatures(base):
        kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        theirs = [x.name for x in signature.parameters.values() if x.kind in kinds]
        takes_rest = method.args.vararg and method.args.kwarg
        if ours[: len(theirs)] != (theirs[: len(ours)] if takes_rest else theirs):
            yield f"takes {ours}, and what it overrides takes {theirs}"


def _of_self(node: ast.AST | None) -> str | None:
    owner = node.value if isinstance(node, ast.Attribute) else None
    return node.attr if isinstance(owner, ast.Name) and owner.id == "self" else None


def _of_super(node: ast.AST | None) -> str | None:
    owner = node.value if isinstance(node, ast.Attribute) else None
    return node.attr if isinstance(owner, ast.Call) and getattr(owner.func, "id", None) == "super" else None


def _set_on_self(node: ast.AST) -> set[str]:
    return {x.attr for x in ast.walk(node) if _of_self(x) and isinstance(x.ctx, ast.Store)}


@cache
def _given_by(base: type) -> set[str]:
    """Attributes of its objects that the class itself does not have."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError):  # not written in Python
        return set()
    annotated = (x.target for x in node.body[0].body if isinstance(x, ast.AnnAssign))
    return _set_on_self(node) | {x.id for x in annotated if isinstance(x, ast.Name)}
