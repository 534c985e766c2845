"""The line rules that ruff cannot hold, on the package, the demo, the examples and the tools."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [
        ROOT / "generation_demo.py",
        *(ROOT / "neuron_minimax").rglob("*.py"),
        *(ROOT / "examples").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
    ]
)


def assigns_twice(node: ast.AST) -> bool:
    """`a = b = 0` and `a, b = 0, 1`; not the swap `a, b = b, a`, nor the unpacking of one value."""
    if not isinstance(node, ast.Assign):
        return False
    if len(node.targets) > 1:
        return True
    (target,) = node.targets
    if not isinstance(target, ast.Tuple | ast.List) or not isinstance(
        node.value, ast.Tuple | ast.List
    ):
        return False
    targets = sorted(map(ast.unparse, target.elts))
    values = sorted(map(ast.unparse, node.value.elts))
    return targets != values


def nests_conditions(node: ast.AST) -> bool:
    """`a if b else c if d else e`, in whichever of the three places."""
    return isinstance(node, ast.IfExp) and any(
        isinstance(part, ast.IfExp) for part in (node.test, node.body, node.orelse)
    )


def rounds_up_by_negation(node: ast.AST) -> bool:
    """`-(-a // b)`, which `fp8.ceil_div` says in words."""
    match node:
        case ast.UnaryOp(
            op=ast.USub(),
            operand=ast.BinOp(op=ast.FloorDiv(), left=ast.UnaryOp(op=ast.USub())),
        ):
            return True
    return False


RULES: dict[str, Callable[[ast.AST], bool]] = {
    "one assignment a line": assigns_twice,
    "no nested conditional expressions": nests_conditions,
    "ceil_div, not -(-a // b)": rounds_up_by_negation,
}


def faults(source: str) -> list[str]:
    """The lines that break a rule, and which."""
    return [
        f"line {node.lineno}: {rule}"  # type: ignore[attr-defined]
        for node in ast.walk(ast.parse(source))
        for rule, breaks in RULES.items()
        if breaks(node)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_line_says_one_thing(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("a = b = 0", "one assignment a line"),
        ("a, b = 0, 1", "one assignment a line"),
        ("a, b = b, a + b", "one assignment a line"),
        ("a, *b = c, d, e", "one assignment a line"),
        ("x = a if b else c if d else e", "no nested conditional expressions"),
        ("x = (a if b else c) if d else e", "no nested conditional expressions"),
        ("x = a if (b if c else d) else e", "no nested conditional expressions"),
        ("x = -(-a // b)", "ceil_div, not -(-a // b)"),
        ("x = -(-(a + 1) // b) * b", "ceil_div, not -(-a // b)"),
    ],
)
def test_a_line_that_says_two_things_is_found(source: str, rule: str) -> None:
    assert faults(source) == [f"line 1: {rule}"]


@pytest.mark.parametrize(
    "source",
    [
        "a, b = b, a",
        "a, b = c",
        "(a, b), c = function()",
        "a, *b = c",
        "x = [a if b else c for b in d] if e else f",
        "x = -(a // b)",
        "x = -a // b",
    ],
)
def test_swaps_and_unpacking_are_one_thing(source: str) -> None:
    assert faults(source) == []
