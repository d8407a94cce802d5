"""Tests of README and docs/: command lines parse, tables are complete, and links lead to existing files."""

from __future__ import annotations

import ast
import json
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path

import click
import pytest
import typer
import yaml

import hf_mel.cli
import hf_mel.errors
from hf_mel.building.builders import known_datasets
from hf_mel.training.recipe import Recipe, shipped_recipes
from tests.test_structure import FLOORS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def commands(text: str) -> list[str]:
    """Returns the hf-mel command lines in a page."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines = [re.sub(r"^(\w+=\S+ )+", "", line) for line in lines]  # strips the variables of `FOO=bar hf-mel …`
    return [line for line in lines if line.startswith(("hf-mel ", "accelerate launch ", "torchrun "))]


COMMANDS = sorted({line for text in TEXTS.values() for line in commands(text)})


def arguments(line: str) -> list[str]:
    """Returns the arguments of hf-mel in a command line."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["torchrun", "--nproc_per_node"]:
        words = ["accelerate", "launch", *words[3:]]
    if words[:3] == ["accelerate", "launch", "train.py"]:
        return ["train", *words[3:]]
    if words[:4] == ["accelerate", "launch", "-m", "hf_mel"]:
        return words[4:]
    assert words[0] == "hf-mel"
    return words[1:]


@cache
def command_line() -> click.Command:
    """Returns the command line as a click command."""
    return typer.main.get_command(hf_mel.cli.app)


def parse(arguments: list[str]) -> None:
    """Parses arguments without running the command. Unknown verbs, unknown options and missing arguments raise."""
    if "--help" in arguments:
        return
    command = command_line()
    context = command.make_context("hf-mel", list(arguments), resilient_parsing=False)
    while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line):
    parse(arguments(line))


def test_parsing_detects_a_wrong_option():
    with pytest.raises(Exception, match=r"(?i)no such option|missing"):
        parse(["evaluate", "runs/x", "--datasset", "data/x"])


@pytest.mark.parametrize("line", [line for line in COMMANDS if arguments(line)[0] == "train"])
def test_recipes_in_training_commands_load_with_their_overrides(line):
    _, recipe, *rest = arguments(line)
    overrides = [value for option, value in pairwise(rest) if option == "--set"]
    path = ROOT / recipe
    assert Recipe.load(path if path.is_file() else recipe, overrides).name


def test_recipes_named_in_pages_exist():
    named = {
        name
        for path, text in TEXTS.items()
        if path != "docs/changelog.md"
        for name in re.findall(
            r"`((?:adapt|mimic|imn|mm_nel|mm-nel|mmel|pfmel)[a-z-]*_(?:flags|wikimel|tweets|aida))`", text
        )
    }
    assert len(named) > 5
    assert named <= set(shipped_recipes())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_load(path):
    assert Recipe.load(path).name == path.stem


@pytest.mark.parametrize("page", ["README.md", "docs/guides/data_sets.md"])
def test_the_tables_list_every_data_set(page):
    rows = re.findall(r"^\| `(\w+)` \|", TEXTS[page], re.MULTILINE)
    assert sorted(rows) == known_datasets()


def test_the_table_of_errors_lists_every_error():
    tree = ast.parse(Path(hf_mel.errors.__file__).read_text(encoding="utf-8"))
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "MelError"]
    rows = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/guides/errors.md"], re.MULTILINE)
    assert rows == classes


def test_readme_is_short():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 200
    assert len(text.encode()) <= 12_000


@pytest.mark.parametrize("path", TEXTS)
def test_links_lead_to_existing_files(path):
    """MkDocs checks links within the site and their anchors."""
    for target in re.findall(r"\]\(([^)\s:#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)):
        assert (ROOT / path).parent.joinpath(target).exists(), target


def test_every_page_is_in_the_navigation():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    written = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES if "docs" in path.relative_to(ROOT).parts]
    assert sorted(pages(navigation)) == sorted(written)


def test_modules_and_classes_in_the_reference_exist():
    for path, text in TEXTS.items():
        for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
            file = ROOT / name.replace(".", "/")
            if file.with_suffix(".py").is_file():
                continue
            module, _, member = name.rpartition(".")
            source = (ROOT / module.replace(".", "/")).with_suffix(".py")
            assert source.is_file(), f"{path}: {name}"
            defined = {getattr(node, "name", None) for node in ast.parse(source.read_text(encoding="utf-8")).body}
            assert member in defined, f"{path}: {name}"


def test_contributing_lists_the_floors_of_the_structure_test():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", TEXTS["CONTRIBUTING.md"], re.MULTILINE)
    listed = {int(number): set(re.findall(r"`(\w+)`", modules)) for number, modules in rows}
    assert listed == {number: set(floor) for number, floor in enumerate(FLOORS, 1)}


def test_tests_named_in_security_md_exist():
    named = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    tests = (ROOT / "tests/hub/test_security.py").read_text(encoding="utf-8")
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_yaml_and_json_blocks_parse():
    for text in TEXTS.values():
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
            assert yaml.safe_load(block)
        for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL):
            assert json.loads(block)


def test_every_promise_names_a_test_that_exists():
    promises = TEXTS["docs/promises.md"].partition("\n## What was run\n")[0]
    rows = [line for line in promises.splitlines() if re.match(r"\| (?!promise)[^-]", line)]
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`(tests/[^`]+\.py)::(test_\w+)`", row)
        assert names, row
        for file, name in names:
            functions = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]  # fmt: skip
            assert name in functions, f"{file} has no {name}"
