"""Blocks marked "# Copied from FILE" in `modeling/` have the same code as the block of that name in FILE."""

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
    """Maps the name of each function and class to its definitions: (first line, code without docstring and comments).

    The first line is that of the first decorator, if any.
    """
    definitions: dict[str, list[tuple[int, str]]] = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            statements = node.body[1:] if ast.get_docstring(node) else node.body
            definitions.setdefault(node.name, []).append((line, ast.unparse(ast.Module(statements, []))))
    return definitions


def test_there_are_copies():
    assert COPIES


@pytest.mark.parametrize(("copy", "source", "line"), COPIES)
def test_a_copy_equals_its_source(copy, source, line):
    name, code = next(
        (name, code)
        for name, definitions in bodies(ROOT / copy).items()
        for first_line, code in definitions
        if first_line == line + 1
    )
    assert code in [source_code for _, source_code in bodies(ROOT / source).get(name, [])]
