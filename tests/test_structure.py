"""Who may import whom, and that the library knows no method or data set by name."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    "__main__": 3,
    "cli": 3,
    "hub": 2,
    "training": 2,
    "evaluation": 2,
    "linking": 2,
    "data": 1,
    "schema": 0,
    "errors": 0,
    "rows": 0,
    "auto": 0,
}


def imports(path: Path) -> set[str]:
    """Every absolute module a file imports, anywhere in it; relative ones as `.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path) if not name.startswith(".")} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", files("modeling"), ids=str)
def test_a_method_imports_torch_transformers_and_its_own_folder(path):
    # tokenizers comes with transformers, and ot (POT) is imported where an option asks for it.
    assert roots(path) <= {"torch", "transformers", "tokenizers", "ot"}
    assert not any(name.startswith("..") for name in imports(path))


@pytest.mark.parametrize("path", files("dataset_scripts"), ids=str)
def test_a_builder_imports_datasets_and_the_schema(path):
    assert roots(path) <= {"datasets", "numpy", "PIL", "hf_mel"}
    ours = {name for name in imports(path) if name.startswith("hf_mel")}
    shared = {"hf_mel.dataset_scripts.release", "hf_mel.dataset_scripts.mapping"}
    assert ours <= {"hf_mel.schema", "hf_mel.errors", "hf_mel.rows", *shared}


@pytest.mark.parametrize("path", files("spaces"), ids=str)
def test_a_space_stands_alone(path):
    assert not any(name.startswith(("hf_mel.", "..")) for name in imports(path))


def layer(module: str) -> int:
    return LAYERS.get(module.split(".")[1], 0) if "." in module else 0


@pytest.mark.parametrize("path", files("hf_mel"), ids=str)
def test_the_library_imports_downwards(path):
    here = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for name in imports(path):
        if name.startswith("hf_mel."):
            assert layer(name) <= layer(here) or here == "hf_mel.__init__", f"{here} imports {name}"


def test_the_library_names_no_method_and_no_data_set():
    """Only the list of shipped methods does, and the demo, which is about one of each."""
    named = [p.name for folder in ("modeling", "dataset_scripts") for p in (ROOT / folder).iterdir() if p.is_dir()]
    named = [name for name in named if not name.startswith("__")]
    assert "mimic" in named
    assert "flags_mel" in named
    for path in files("hf_mel"):
        if path.name in ("auto.py", "demo.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = imports(path) if isinstance(node, ast.Module) else set()
            assert not any(part in named for name in names for part in name.split(".")), path
            if isinstance(node, ast.Compare):
                values = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert not any(value in named for value in values), f"{path}: compares with a name"
