"""Every single edit that a mutation operator makes in a file: `mutants` lists them, `Mutant.text` makes one.

libcst makes the edits, since what is not edited keeps its text to the letter. (cosmic-ray and mutmut drive a
test command over every mutant in a checkout; here a sample is drawn, and judged check by check in a process
that has torch loaded already.)

What cannot change a result is left out: docstrings, annotations, imports, decorators, messages, and what an
implementation declares in SUPPORT. So is what fails by Python's rules alone, and would only embellish a rate:
deleting the one statement that gives a variable a value, or the last ``return`` of a function.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider

REMOVED = ("to", "float", "detach", "contiguous", "clamp")  # methods whose calls are left out
_ARITHMETIC = {
    cst.Add: cst.Subtract, cst.Subtract: cst.Add, cst.Multiply: cst.Divide, cst.Divide: cst.Multiply,
    cst.FloorDivide: cst.Modulo, cst.Modulo: cst.FloorDivide, cst.Power: cst.Multiply,
    cst.BitAnd: cst.BitOr, cst.BitOr: cst.BitAnd,
}  # fmt: skip
_IN_PLACE = {
    cst.AddAssign: cst.SubtractAssign, cst.SubtractAssign: cst.AddAssign,
    cst.MultiplyAssign: cst.DivideAssign, cst.DivideAssign: cst.MultiplyAssign,
}  # fmt: skip
_COMPARISON = {
    cst.LessThan: cst.LessThanEqual, cst.LessThanEqual: cst.LessThan,
    cst.GreaterThan: cst.GreaterThanEqual, cst.GreaterThanEqual: cst.GreaterThan,
    cst.Equal: cst.NotEqual, cst.NotEqual: cst.Equal, cst.Is: cst.IsNot, cst.IsNot: cst.Is,
    cst.In: cst.NotIn, cst.NotIn: cst.In,
}  # fmt: skip
_UNTOUCHED = (cst.Annotation, cst.Import, cst.ImportFrom, cst.Decorator, cst.FormattedString, cst.Raise)


@dataclass(frozen=True)
class Mutant:
    """A file with one edit.

    file: its path in the checkout; function: the qualified name of what the edit is in; line: in the file.
    code: the line as it was; before, after: the part of it that the edit replaces, and what by.
    key: names the mutant as long as the line stays what it is, wherever it moves to within the function.
    """

    key: str
    file: str
    function: str
    line: int
    operator: str
    code: str
    before: str
    after: str
    _edit: tuple[cst.Module, cst.CSTNode, cst.CSTNode] = field(repr=False, compare=False)

    def text(self) -> str:
        """Return the file with the edit made."""
        module, old, new = self._edit
        edited = module.deep_replace(old, new)
        assert isinstance(edited, cst.Module)
        return edited.code


def mutants(file: str, text: str, left_out: Sequence[str] = ()) -> list[Mutant]:
    """List the mutants of a file, in the order of its lines; ``left_out`` names functions without any."""
    wrapper = MetadataWrapper(cst.parse_module(text))
    module, places = wrapper.module, wrapper.resolve(PositionProvider)
    lines, found, seen = text.splitlines(), [], Counter[tuple[str, ...]]()
    for function, (operator, old, new) in _edits(module, _Within(), left_out):
        line = places[old].start.line
        before, after = (" ".join(module.code_for_node(node).split()) for node in (old, new))
        same = (file, function, lines[line - 1].strip(), operator, before, after)
        seen[same] += 1
        key = hashlib.sha256(repr((*same, seen[same])).encode()).hexdigest()[:12]
        code = lines[line - 1].strip()
        found.append(Mutant(key, file, function, line, operator, code, before, after, (module, old, new)))
    return sorted(found, key=lambda mutant: mutant.line)


def unchanged(file: str, text: str) -> Mutant:
    """Make a mutant of a file that is none."""
    module = cst.parse_module(text)
    return Mutant(f"unchanged {file}", file, "", 0, "unchanged", "", "", "", (module, module, module))


class _Within(NamedTuple):
    """What surrounds a node: its function, the names that are given one value there, its last statement."""

    function: str = ""
    once: frozenset[str] = frozenset()
    last: cst.CSTNode | None = None


Edit = tuple[str, cst.CSTNode, cst.CSTNode]  # the operator, what it replaces, and what by


def _edits(node: cst.CSTNode, within: _Within, left_out: Sequence[str]) -> Iterator[tuple[str, Edit]]:
    """Yield the edits of a node and of all that it holds, each with its function."""
    if isinstance(node, _UNTOUCHED) or _is_docstring(node) or _is_declaration(node):
        return
    if isinstance(node, cst.FunctionDef | cst.ClassDef):
        function = f"{within.function}.{node.name.value}".lstrip(".")
        if function in left_out:
            return
        within = _Within(function, _given_once(node), node.body.body[-1])
    yield from ((within.function, edit) for edit in _of_node(node))
    for child in node.children:
        if isinstance(child, cst.SimpleStatementLine) and _can_go(child, within):
            yield within.function, ("deleted statement", child.body[0], cst.Pass())
        yield from _edits(child, within, left_out)


def _of_node(node: cst.CSTNode) -> Iterator[Edit]:
    """Yield what the operators make of a node itself."""
    if isinstance(node, cst.BinaryOperation) and (other := _ARITHMETIC.get(type(node.operator))):
        yield "arithmetic", node, node.with_changes(operator=other())
    elif isinstance(node, cst.AugAssign):
        if other := _IN_PLACE.get(type(node.operator)):
            yield "arithmetic", node, node.with_changes(operator=other())
        yield "+= to =", node, cst.Assign([cst.AssignTarget(node.target)], node.value)
    elif isinstance(node, cst.UnaryOperation):
        operator = "negated condition" if isinstance(node.operator, cst.Not) else "arithmetic"
        yield operator, node, _in_parentheses_of(node, node.expression)
    elif isinstance(node, cst.ComparisonTarget) and (other := _COMPARISON.get(type(node.operator))):
        yield "comparison", node, node.with_changes(operator=other())
    elif isinstance(node, cst.BooleanOperation):
        other = cst.Or if isinstance(node.operator, cst.And) else cst.And
        yield "negated condition", node, node.with_changes(operator=other())
    elif isinstance(node, cst.If | cst.IfExp | cst.While | cst.CompIf | cst.Assert):
        yield "negated condition", node.test, _negated(node.test)
    elif isinstance(node, cst.Integer | cst.Float):
        value = int(node.value, 0) if isinstance(node, cst.Integer) else float(node.value)
        for changed in (value + 1, value - 1):
            yield "constant", node, _in_parentheses_of(node, cst.parse_expression(repr(changed)))
    elif isinstance(node, cst.Name) and node.value in ("True", "False"):
        yield "constant", node, node.with_changes(value=str(node.value == "False"))
    elif isinstance(node, cst.Call):
        yield from _of_call(node)


def _of_call(node: cst.Call) -> Iterator[Edit]:
    if isinstance(node.func, cst.Attribute) and node.func.attr.value in REMOVED:
        yield f"removed .{node.func.attr.value}", node, _in_parentheses_of(node, node.func.value)
    for i, arg in enumerate(node.args):
        if arg.keyword is not None:
            yield "dropped keyword", node, node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])
    for i, (one, other) in enumerate(itertools.pairwise(node.args)):
        if not (one.keyword or one.star or other.keyword or other.star or one.value.deep_equals(other.value)):
            swapped = [one.with_changes(value=other.value), other.with_changes(value=one.value)]
            args = [*node.args[:i], *swapped, *node.args[i + 2 :]]
            yield "swapped arguments", node, node.with_changes(args=args)


def _in_parentheses_of(old: Any, new: Any) -> cst.CSTNode:
    return new.with_changes(lpar=[*old.lpar, *new.lpar], rpar=[*new.rpar, *old.rpar])


def _negated(test: Any) -> cst.CSTNode:
    inner = test.with_changes(lpar=[cst.LeftParen(), *test.lpar], rpar=[*test.rpar, cst.RightParen()])
    return cst.UnaryOperation(cst.Not(), inner)


def _is_docstring(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString | cst.ConcatenatedString)


def _is_declaration(node: cst.CSTNode) -> bool:
    target = node.targets[0].target if isinstance(node, cst.Assign) else None
    return isinstance(target, cst.Name) and target.value == "SUPPORT"


def _can_go(line: cst.SimpleStatementLine, within: _Within) -> bool:
    """Tell whether deleting a statement of a function leaves what Python can run."""
    statement = line.body[0]
    if not within.function or line is within.last or _is_docstring(statement):
        return False
    if isinstance(statement, cst.Assign | cst.AnnAssign):
        return not _names(statement) & within.once
    kinds = cst.Expr | cst.AugAssign | cst.Return | cst.Raise | cst.Assert | cst.Break | cst.Continue
    return isinstance(statement, kinds)


def _names(node: cst.CSTNode) -> set[str]:
    """Return the names that a statement or a parameter gives a value."""
    if isinstance(node, cst.Assign):
        targets = [target.target for target in node.targets]
    else:
        targets = [getattr(node, "target", None) or getattr(node, "name", None)]
    names = set()
    while targets:
        target = targets.pop()
        if isinstance(target, cst.Name):
            names.add(target.value)
        elif isinstance(target, cst.Tuple | cst.List):
            targets += [element.value for element in target.elements]
    return names


def _given_once(function: cst.CSTNode) -> frozenset[str]:
    given = m.Assign() | m.AnnAssign() | m.AugAssign() | m.For() | m.Param() | m.NamedExpr() | m.AsName()
    counts = Counter(name for node in m.findall(function, given) for name in _names(node))
    return frozenset(name for name, count in counts.items() if count == 1)
