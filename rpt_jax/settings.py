"""The source of a settings dataclass -> its flags, kinds, defaults and comments, without importing anything of it.

`rpt train --help` has to come at once, and importing JAX takes seconds; so the dataclasses are read as text. What is
read is what tyro makes flags of (tests/test_settings.py holds the two against each other).
"""

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).resolve().parent
KINDS = {"int": "INT", "float": "FLOAT", "str": "STR", "bool": ""}


@dataclass(frozen=True)
class Setting:
    """One flag of a command."""

    name: str  # without the dashes, e.g. update.learning-rate
    kind: str  # INT, FLOAT, STR, "STR ..." for several, "" for yes or no
    choices: tuple[str, ...]  # that may be given; empty: anything of its kind
    default: object
    about: str  # the comment on the field

    @property
    def section(self) -> str:
        """The part of the name before the first dot; empty for a setting of the command itself."""
        return self.name.partition(".")[0] if "." in self.name else ""

    @property
    def flag(self) -> str:
        """As it is typed to change it: of a setting that is on by default the flag that turns it off."""
        if self.kind == "" and self.default:
            before, dot, last = self.name.rpartition(".")
            return f"--{before}{dot}no-{last}"
        return f"--{self.name}"

    @property
    def takes(self) -> str:
        """What follows the flag."""
        several = " ..." if self.kind.endswith("...") else ""
        return "{" + ",".join(self.choices) + "}" + several if self.choices else self.kind

    @property
    def shown_default(self) -> str:
        """As it would be typed; empty for what is empty by default, and for switches."""
        if self.kind == "" or self.default in ("", ()):
            return ""
        words = self.default if isinstance(self.default, tuple) else (self.default,)
        return " ".join(str(word) for word in words).replace("\n", "\\n")


def read(place: str) -> tuple[Setting, ...]:
    """All settings of `module:Class`, in order, nested ones by their dotted names, e.g. rpt_jax.config:Config."""
    module, _, name = place.partition(":")
    return tuple(_settings(module, name, "", {}))


def sections(place: str) -> dict[str, str]:
    """The dataclasses within `module:Class` by the name of their section, with the first line of their docstrings."""
    module, _, name = place.partition(":")
    found = {}
    for field, nested in ((field, _nested(module, field)) for field in _fields(module, name)):
        if nested:
            found[_dashed(field.target.id)] = docstring(f"{nested[0]}:{nested[1]}").partition("\n")[0]
    return found


def comments(place: str) -> dict[str, str]:
    """Of the fields of the dataclass `module:Class` itself, whatever their types; fields without one are left out."""
    module, _, name = place.partition(":")
    found = {field.target.id: _comment(module, field) for field in _fields(module, name)}
    return {field: text for field, text in found.items() if text}


def docstring(place: str) -> str:
    """Of `module:Class`; empty where it has none."""
    module, _, name = place.partition(":")
    return ast.get_docstring(_found(module, name)[1]) or ""


def _settings(module: str, name: str, prefix: str, given: dict[str, object]) -> Iterator[Setting]:
    """given: defaults that the place where the class is used sets."""
    home, _ = _found(module, name)
    for field in _fields(module, name):
        own, nested = field.target.id, _nested(home, field)
        if nested:
            yield from _settings(*nested[:2], f"{prefix}{_dashed(own)}.", nested[2])
            continue
        kind, choices = _kind(home, field.annotation)
        default = given[own] if own in given else _value(home, field.value)
        yield Setting(prefix + _dashed(own), kind, choices, default, _comment(home, field))


def _fields(module: str, name: str) -> list[ast.AnnAssign]:
    _, found = _found(module, name)
    return [node for node in found.body if isinstance(node, ast.AnnAssign)]


def _nested(module: str, field: ast.AnnAssign) -> tuple[str, str, dict] | None:
    """(module, class, defaults) if the field holds a dataclass: `= X(a=1)`, or the default factory X or lambda: X()."""
    made = field.value
    if isinstance(made, ast.Call) and getattr(made.func, "id", "") == "field":
        made = next(keyword.value for keyword in made.keywords if keyword.arg == "default_factory")
        made = made.body if isinstance(made, ast.Lambda) else made
    called = made.func if isinstance(made, ast.Call) else made
    if not isinstance(called, ast.Name | ast.Attribute) or not isinstance(field.annotation, ast.Name | ast.Attribute):
        return None
    home, found = _named(module, field.annotation)
    if not isinstance(found, ast.ClassDef):
        return None
    keywords = made.keywords if isinstance(made, ast.Call) else ()
    return home, found.name, {keyword.arg: _value(module, keyword.value) for keyword in keywords}


def _kind(module: str, annotation: ast.expr) -> tuple[str, tuple[str, ...]]:
    """(kind, choices) of an annotation: int, float, str, bool, Literal, a tuple of one of them, or a name for one."""
    if isinstance(annotation, ast.Name) and annotation.id in KINDS:
        return KINDS[annotation.id], ()
    if isinstance(annotation, ast.Name):
        home, found = _found(module, annotation.id)
        return _kind(home, found)
    of, inner = annotation.value.id, annotation.slice
    if of == "Literal":
        choices = tuple(each.value for each in (inner.elts if isinstance(inner, ast.Tuple) else [inner]))
        return "STR", choices
    kind, choices = _kind(module, inner.elts[0])
    return f"{kind} ...", choices


def _value(module: str, value: ast.expr) -> object:
    """What a default is; a name stands for the constant that it names."""
    if isinstance(value, ast.Name):
        return _value(*_found(module, value.id))
    return ast.literal_eval(value)


def _named(module: str, name: ast.Name | ast.Attribute) -> tuple[str, ast.AST]:
    """_found for a name, or for module.name where the module was imported by `from package import module`."""
    if isinstance(name, ast.Name):
        return _found(module, name.id)
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name.value.id in [alias.name for alias in node.names]:
            return _found(f"{node.module}.{name.value.id}", name.attr)
    raise LookupError(f"{module} imports no {name.value.id}")


def _found(module: str, name: str) -> tuple[str, ast.AST]:
    """(module, definition) of a class, or the value of a constant, wherever the module has it from."""
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return module, node.value
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _found(node.module, name)
    raise LookupError(f"{module} has no {name}")


def _comment(module: str, field: ast.AnnAssign) -> str:
    """What stands behind the field, or else the comment lines right above it."""
    comments = _comments(module)
    if field.end_lineno in comments:
        return comments[field.end_lineno][0]
    lines, row = [], field.lineno - 1
    while row in comments and comments[row][1]:
        lines.insert(0, comments[row][0])
        row -= 1
    return " ".join(lines)


@functools.cache
def _comments(module: str) -> dict[int, tuple[str, bool]]:
    """By line: (the comment, it has the line for itself)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(_source(module)).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("# "), not token.line[: token.start[1]].strip()
    return found


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


@functools.cache
def _source(module: str) -> str:
    return (HOME.joinpath(*module.split(".")[1:]).with_suffix(".py")).read_text(encoding="utf-8")


def _dashed(name: str) -> str:
    return name.replace("_", "-")
