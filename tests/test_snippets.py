"""Runs every Python snippet in README and docs, every example and the notebook on a small form of FlagsMEL."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import use_small_flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A snippet, and the requirement in the comment before it, if any. Snippets with a requirement run in other tests.
SNIPPET = re.compile(r"(?:<!-- needs: ([^>]*) -->\n)?```python\n(.*?)```", re.DOTALL)


def snippets(page: Path) -> list[str]:
    """Returns the snippets of a page that have no special requirement."""
    return [code for needs, code in SNIPPET.findall(page.read_text(encoding="utf-8")) if not needs]


@pytest.fixture(autouse=True)
def _run_in_the_demo_folder(demo_run, monkeypatch):
    use_small_flags(monkeypatch, demo_run[0])


def test_the_demo_runs_all_stages(demo_run):
    """Training stops after three steps."""
    folder, printed = demo_run
    for phrase in (
        "1/6",
        "6/6",
        "Test mentions, by what tells the states apart",
        "both together",
        "fused",
        "The right answer is",
        "hf-mel annotate",
        "Right: ",
        "hf-mel link",
        "For your own entities take a text encoder",
    ):
        assert phrase in printed
    for file in (
        "data/flags_mel/README.md",
        "runs/mimic_flags/results_test.json",
        "kb/flags_mel/kb.json",
        "runs/mimic_flags/post.html",
    ):
        assert (folder / file).is_file()


def test_only_snippets_that_run_in_other_tests_are_skipped():
    """`tests/hub/test_round_trip.py` and `tests/spaces/test_entity_linking.py` run them."""
    needs = {
        (page.relative_to(ROOT).as_posix(), need)
        for page in PAGES
        for need, _ in SNIPPET.findall(page.read_text(encoding="utf-8"))
        if need
    }
    assert needs == {("docs/guides/publish.md", "the Hub"), ("docs/guides/space.md", "a running Space")}


_ran: set[str] = set()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_snippets_of_a_page_run(page, capsys):
    """Snippets of a page share a namespace. A snippet that occurs on several pages runs once, and training is short."""
    namespace: dict = {}
    for code in snippets(page):
        if code not in _ran:
            _ran.add(code)
            exec(compile(re.sub(r"num_train_epochs=\d+", "num_train_epochs=1", code), str(page), "exec"), namespace)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert re.search(r"^(Q\d+|NIL) ", printed, re.MULTILINE)
        assert "'hits@1': 0.5" in printed
        assert "'mrr': 0.75" in printed


#: Arguments that shorten the training of examples.
ARGUMENTS = {"train_mimic.py": ["1"], "your_own_method.py": ["1"]}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.name, [])])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_readme_or_docs_name_every_example():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names >= {"link_a_mention.py", "train_mimic.py", "evaluate.py", "your_own_entities.py", "rerank.py"}
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in sorted(names) if name not in pages] == []


def test_the_notebook_runs(capsys):
    notebook = json.loads((ROOT / "notebooks/quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    namespace: dict = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    for number, code in enumerate(cells):
        exec(compile(code.replace("epochs = 12", "epochs = 1"), f"cell {number}", "exec"), namespace)
    assert "H@1" in capsys.readouterr().out
