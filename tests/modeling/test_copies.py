"""What a method carries of another's code, marked "# Copied from FILE", is still what stands there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^ *# Copied from (\S+)$", re.MULTILINE)
COPIES = [
    (path.relative_to(ROOT).as_posix(), match[1], path.read_text("utf-8").count("\n", 0, match.start()) + 1)
    for path in sorted((ROOT / "modeling").rglob("*.py"))
    for match in MARK.finditer(path.read_text("utf-8"))
]


def bodies(path: Path) -> dict[str, list[tuple[int, str]]]:
    """By name: first line (with its decorators) and code, without docstring and comments."""
    found: dict[str, list[tuple[int, str]]] = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            code = node.body[1:] if ast.get_docstring(node) else node.body
            found.setdefault(node.name, []).append((line, ast.unparse(ast.Module(code, []))))
    return found


def test_there_are_copies():
    assert COPIES


@pytest.mark.parametrize(("copy", "source", "line"), COPIES)
def test_a_copy_is_what_it_is_a_copy_of(copy, source, line):
    name, code = next(
        (name, code) for name, each in bodies(ROOT / copy).items() for first, code in each if first == line + 1
    )
    assert code in [code for _, code in bodies(ROOT / source).get(name, [])]
