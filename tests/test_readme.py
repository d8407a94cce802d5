"""README: its commands parse, its snippets run as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

import hf_mel.cli
from hf_mel.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [line for line in lines if line.startswith(("hf-mel ", "accelerate launch train.py "))]


def parse(arguments: list[str]) -> None:
    """Walks the command line down to its verb; an unknown verb, option or a missing argument raises."""
    command = typer.main.get_command(hf_mel.cli.app)
    context = command.make_context("hf-mel", list(arguments), resilient_parsing=False)
    while isinstance(command, click.Group) or hasattr(command, "resolve_command"):
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(command.name, rest, parent=context)


@pytest.mark.parametrize("line", commands(TEXT))
def test_commands_parse(line):
    words = shlex.split(line, comments=True)
    parse(["train", *words[3:]] if words[0] == "accelerate" else words[1:])


def test_a_wrong_option_would_be_seen():
    with pytest.raises(Exception, match=r"(?i)no such option|missing"):
        parse(["evaluate", "runs/x", "--datasset", "data/x"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_load(path):
    assert Recipe.load(path).name == path.stem


def snippet(name: str) -> str:
    return re.search(rf"<!-- snippet: {name} -->\n```python\n(.*?)```", TEXT, re.DOTALL).group(1)


def test_metric_snippet(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet("metric"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'hits@1': 0.5" in printed
    assert "'mrr': 0.75" in printed


def test_demo_and_link_snippet(tmp_path, capsys, monkeypatch):
    """The demo with a training of three steps: every stage runs, and README's first snippet works on what it leaves."""
    load = Recipe.load.__func__
    short = ["training.max_steps=3", "training.num_train_epochs=1"]
    monkeypatch.setattr(
        Recipe, "load", classmethod(lambda cls, name, overrides=(): load(cls, name, [*overrides, *short]))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    hf_mel.cli.demo(folder=Path("."))
    printed = capsys.readouterr().out
    for words in (
        "1/5",
        "5/5",
        "all units",
        "text unit",
        "vision unit",
        "The gold of this test mention",
        "hf-mel link",
    ):
        assert words in printed
    for place in ("data/flags_mel/README.md", "runs/mimic_flags/results_test.json", "kb/flags_mel/kb.json"):
        assert (tmp_path / place).is_file()
    exec(compile(snippet("link"), "README.md", "exec"), {})
    assert re.match(r"(Q\d+|NIL) ", capsys.readouterr().out)


def test_every_data_set_is_in_the_table():
    from hf_mel.building.builders import known_datasets

    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert sorted(rows) == known_datasets()
