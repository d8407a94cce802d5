"""A suite of tiny runs, and a runner that runs commands in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import yaml
from typer.testing import CliRunner

from hf_mel.bench.grid import Spent
from hf_mel.cli import app
from tests.toy import toy_mentions, write_toy_dataset
from tests.training.toy_run import recipe_dict


def write_suite_file(folder: Path, **changes) -> Path:
    """Writes a data set, two recipes and a suite of them to a folder, and returns the suite's file."""
    mentions = toy_mentions(36, 12)
    splits = {
        name: mentions.select(range(12 * i, 12 * i + 12)) for i, name in enumerate(("train", "validation", "test"))
    }
    write_toy_dataset(folder / "data", **splits)
    recipe = recipe_dict(folder / "elsewhere", num_train_epochs=1)
    for name, units in (("whole", ["text", "vision", "cross_modal"]), ("text", ["text"])):
        recipe["name"] = name
        recipe["model"]["config"]["units"] = units
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    suite = {
        "name": "tiny",
        "title": "Tiny systems",
        "data": {"toy": {"dataset": str(folder / "data")}},
        "seeds": [0, 1],
        "budget": {"max_steps": 2},
        "compare_with": "whole",
        "systems": [
            {"name": "whole", "recipe": str(folder / "whole.yaml")},
            {"name": "text & more", "recipe": str(folder / "text.yaml"), "note": "Reads no images."},
        ],
        **changes,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(suite, sort_keys=False))
    return file


class InProcess:
    """Runs commands of `hf-mel` in this process, and remembers them.

    Args:
        stop_before (`int`, *optional*): Number of the command before which the process is "killed".
    """

    def __init__(self, stop_before: int | None = None):
        self.commands: list[list[str]] = []
        self.stop_before = stop_before

    def __call__(self, arguments: Sequence[str], log: Path, alone: bool = False) -> Spent:
        if self.stop_before == len(self.commands):
            raise KeyboardInterrupt
        self.commands.append(list(arguments))
        with contextlib.redirect_stderr(io.StringIO()):
            result = CliRunner().invoke(app, list(arguments))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(result.output)
        error = result.exception
        if error is None or (isinstance(error, SystemExit) and not error.code):
            return Spent(2.0, 1.5, 3 * 10**8)
        return Spent(1.0, 0.5, 10**8, error=f"{type(error).__name__}: {error} {result.output[-300:]}")

    @property
    def stages(self) -> list[str]:
        """The commands in short: the verb, and the folder of the cell."""
        return [f"{words[0]} {cell_name(words)}" for words in self.commands]


def cell_name(words: Sequence[str]) -> str:
    """Returns the readable part of a cell's folder in a command."""
    folder = Path(words[words.index("--output") + 1]).parent.name
    return "-".join([*folder.split("-")[:-2], folder.split("-")[-1]])
