"""Rules for imports. Every module of the library has a floor. Imports point to lower floors, and never form a cycle."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: The floors of the library, lowest first. A room (a module or package) imports only itself and rooms on lower floors.
FLOORS = [
    ["errors", "lazy", "names", "terminal"],
    ["locks"],
    ["schema", "files", "hub_errors", "row_columns"],
    ["protocols", "row_files"],
    ["data", "detection"],
    ["building", "inference"],
    ["kb"],
    ["candidates"],
    ["linking", "hub"],
    ["evaluation"],
    ["training"],
    ["bench"],
    ["cli"],
    ["auto"],
    ["__main__", "__init__"],
]
#: Wings: folders that become Hub repositories, and the rooms that may import them. `evaluate.load` needs the metric in a
#: self-contained file, so the library imports it from there.
WINGS = {
    "modeling": ["auto"],
    "dataset_scripts": ["building"],
    "spaces": ["evaluation", "cli", "hub"],
    "recipes": ["training"],
    "suites": ["bench"],
}


def imports(path: Path) -> set[str]:
    """Returns all modules that a file imports, at its top or inside functions. Relative ones start with a dot."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path) if not name.startswith(".")} - set(sys.stdlib_module_names)


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def library_imports() -> dict[str, set[str]]:
    """Returns for each module of the library those that it imports, at its top or inside functions."""
    modules = {module_name(path): path for path in files("hf_mel")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                # `from hf_mel.kb import indexes` imports a module, `from hf_mel.kb.indexes import KINDS` a name.
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [member if member in modules else node.module for member in members]
            else:
                continue
            graph[name] |= {target for target in targets if target in modules} - {name}
    return graph


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("path", files("modeling"), ids=str)
def test_a_method_imports_torch_transformers_and_its_own_folder(path):
    # tokenizers is a dependency of transformers. scikit-learn fits the forest of ET; its import is optional.
    optional = {"sklearn"} if path.name == "modeling_extra_trees.py" else set()
    assert roots(path) - optional <= {"torch", "transformers", "tokenizers"}
    assert not any(name.startswith("..") for name in imports(path))


@pytest.mark.parametrize("path", files("dataset_scripts"), ids=str)
def test_a_builder_imports_datasets_and_the_lowest_floors(path):
    assert roots(path) <= {"datasets", "numpy", "PIL", "pyarrow", "hf_mel", "orjson"}
    ours = {name for name in imports(path) if name.startswith("hf_mel")}
    shared = [name for name in ours if name.startswith("hf_mel.dataset_scripts.")]
    own_folder = module_name(path).rsplit(".", 1)[0]
    for name in shared:
        folder = name.removeprefix("hf_mel.").rsplit(".", 1)[0]
        assert folder in ("dataset_scripts", "dataset_scripts.layouts", own_folder), f"{path} imports {name}"
    assert ours - set(shared) <= {"hf_mel.schema", "hf_mel.errors", "hf_mel.row_files", "hf_mel.row_columns"}


@pytest.mark.parametrize("path", files("spaces"), ids=str)
def test_a_space_does_not_import_library_modules(path):
    assert not any(name.startswith(("hf_mel.", "..")) for name in imports(path))


def test_every_room_of_the_library_has_a_floor():
    rooms = {path.name if path.is_dir() else path.stem for path in (ROOT / "hf_mel").iterdir()}
    rooms -= {"py", "__pycache__"}
    rooms = {name for name in rooms if not name.startswith(("py.", "."))}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_the_library_imports_lower_floors_only():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    upwards = [
        f"{name} imports {target}"
        for name, targets in library_imports().items()
        for target in targets
        if room(name) != room(target) and not floor_of[room(target)] < floor_of[room(name)]
    ]
    assert not upwards


def test_no_imports_form_a_cycle():
    waiting = library_imports()
    while ready := {name for name, targets in waiting.items() if not targets & waiting.keys()}:
        waiting = {name: targets for name, targets in waiting.items() if name not in ready}
    # Modules that only depend on a cycle are not part of it.
    while leaves := {name for name in waiting if not any(name in targets for targets in waiting.values())}:
        waiting = {name: targets for name, targets in waiting.items() if name not in leaves}
    assert not waiting


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_is_imported_only_by_the_rooms_that_may(wing):
    for path in files("hf_mel"):
        if any(name.startswith(f"hf_mel.{wing}") for name in imports(path)):
            assert room(module_name(path)) in WINGS[wing], path


def test_no_two_modules_share_a_name():
    """Modules of the command line are exempt, because they have the names of its verbs."""
    names = Counter(path.stem for path in files("hf_mel") if path.stem != "__init__" and path.parent.name != "cli")
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_no_verb_of_the_command_line_imports_another_verb():
    helpers = {"hf_mel.cli.options", "hf_mel.cli.printing"}
    for name, targets in library_imports().items():
        if name.startswith("hf_mel.cli."):
            assert {target for target in targets if target.startswith("hf_mel.cli.")} <= helpers, name


def test_the_library_names_no_method_and_no_data_set():
    """Exceptions are the list of shipped methods, and the demo."""
    named = [p.name for folder in ("modeling", "dataset_scripts") for p in (ROOT / folder).iterdir() if p.is_dir()]
    named = [name for name in named if not name.startswith("__") and name != "layouts"]
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
