"""Cells of a suite: one system on one data set with one seed, the commands that run it, and what it depends on."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_mel.bench.suite import LIST_ORDER, RUN_REFERENCE, Prepared, Suite, System, recipe_overrides
from hf_mel.errors import RecipeError
from hf_mel.files import file_sha256, read_json
from hf_mel.training.recipe import Recipe

#: Files in the folder of a cell. `CELL` is written last, so a folder that contains it is done.
CELL, RUN, EVALUATION, PREDICTIONS, LOG = "cell.json", "run", "evaluation.json", "predictions.jsonl", "log.txt"

#: Options of `hf-mel evaluate` that only one kind of model takes, so that those of a whole suite are for this kind.
_OPTIONS_OF: dict[str, set[str]] = {
    "reranker": {"candidates", "num_candidates", "scorer", "retriever", "joint", "candidate_weight"},
    "retriever": {"units", "nil_threshold", "nil_from", "precision", "name_weight", "top_k"},
}
#: Options that an order without a model does not take.
_FOR_MODELS = {"joint", "candidate_weight", "bf16"}
#: Parts of a recipe that change nothing of what is measured, or that a digest stands for.
_NOT_MEASURED = ("name", "description", "license", "citation")
#: Raised when cells of an earlier version of the harness must not be taken for finished.
_FORMAT = 1


@dataclass(frozen=True)
class RowKey:
    """The identity of a row of a table: all that tells it from other rows, without the seed.

    Args:
        data (`str`): Name of the data set in the suite.
        system (`str`): Name of the system.
        train_fraction (`float`): Share of the training mentions.
        field, value (`str`, *optional*): The field of a sweep, and its value as JSON.
    """

    data: str
    system: str
    train_fraction: float = 1.0
    field: str | None = None
    value: str | None = None

    @property
    def label(self) -> str:
        """The name in tables."""
        parts = [self.system]
        if self.train_fraction != 1:
            parts.append(f"{100 * self.train_fraction:g} % of training")
        if self.field is not None:
            parts.append(f"{self.field.rpartition('.')[2]} {self.value}")
        return ", ".join(parts)


@dataclass
class Cell:
    """One system on one data set with one seed.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        system ([`~hf_mel.bench.suite.System`]): The system.
        row ([`RowKey`]): The row to which the cell belongs.
        seed (`int`): The seed.
        folder (`Path`): Its folder.
        prepared (`dict`): Run folder of every prepared run, by its name.
        set (`dict`): Values of the recipe, with references to prepared runs.
    """

    suite: Suite
    system: System
    row: RowKey
    seed: int
    folder: Path
    prepared: Mapping[str, Path]
    set: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in messages."""
        return f"{self.row.data} · {self.row.label} · seed {self.seed}"

    @property
    def recipe_name(self) -> str | None:
        """The recipe, or `None` for an order and for a system that has none for this data set."""
        return self.system.recipe_for(self.row.data)

    @property
    def references(self) -> list[str]:
        """Names of the prepared runs that the cell needs."""
        return sorted(set(RUN_REFERENCE.findall(json.dumps([self.set, self.evaluate_options(resolved=False)]))))

    def recipe(self, resolved: bool = True) -> Recipe:
        """Returns the recipe with the cell's values.

        Args:
            resolved (`bool`): Whether references to prepared runs become their folders.

        Raises:
            RecipeError: The recipe cannot be used with these values.
        """
        assert self.recipe_name is not None
        return Recipe.load(self.recipe_name, recipe_overrides(self._resolve(self.set) if resolved else self.set))

    @property
    def reranks(self) -> bool:
        """Whether candidates are evaluated, and not a ranking of all entities."""
        return self.system.order is not None or self.recipe(resolved=False).candidates is not None

    def evaluate_options(self, resolved: bool = True) -> dict[str, Any]:
        """Returns the options of `hf-mel evaluate`, those of the system before those of the data set and the suite.

        Candidates that nothing names are those of the recipe.
        """
        data = self.suite.data[self.row.data]
        shared, own = {**self.suite.evaluate, **data.evaluate}, dict[str, Any]()
        if self.system.order is not None:
            reranks = True
            own |= {} if self.system.order == LIST_ORDER else {"candidates": self.system.order}
            own |= {} if self.seed == 0 else {"seed": self.seed}
        else:
            section = self.recipe(resolved=False).candidates
            reranks = section is not None
            if section is not None and "candidates" not in {**shared, **self.system.evaluate}:
                file = None if section.file is None else section.file.replace("{split}", data.split)
                own = {
                    "candidates": file or section.source,
                    "num_candidates": section.k,
                    **({"scorer": section.scorer} if "name" in section.source.split("+") else {}),
                    **({} if section.retriever is None else {"retriever": section.retriever}),
                }
        other = _OPTIONS_OF["retriever" if reranks else "reranker"]
        if self.system.order is not None:
            other = other | _FOR_MODELS
        shared = {key: value for key, value in shared.items() if key not in other}
        options = {**shared, **own, **self.system.evaluate}
        return self._resolve(options) if resolved else options

    def train_arguments(self) -> list[str]:
        """Returns the arguments of `hf-mel` that train the model."""
        assert self.recipe_name is not None
        values = recipe_overrides(self._resolve(self.set))
        options = [word for value in values for word in ("--set", value)]
        return ["train", self.recipe_name, *options, "--resume", "--output", str(self.folder / RUN)]

    def evaluate_arguments(self) -> list[str]:
        """Returns the arguments of `hf-mel` that evaluate the model, or an order without a model."""
        data = self.suite.data[self.row.data]
        words = ["evaluate", *(["--no-model"] if self.system.order is not None else [str(self.folder / RUN)])]
        words += ["--dataset", data.dataset, "--split", data.split]
        words += ["--config", data.config] if data.config != "mentions" else []
        words += ["--dataset-revision", data.revision] if data.revision is not None else []
        words += ["--output", str(self.folder / EVALUATION), "--predictions", str(self.folder / PREDICTIONS)]
        return words + option_words(self.evaluate_options())

    def commands(self) -> list[list[str]]:
        """Returns the arguments of all commands, in order."""
        return [*([self.train_arguments()] if self.system.order is None else []), self.evaluate_arguments()]

    def inputs(self, data_version: Callable[[str], Any]) -> dict[str, Any]:
        """Returns everything that the result depends on, apart from the code.

        Args:
            data_version (`Callable`): Returns what identifies a data set of the suite, by its name.
        """
        content: dict[str, Any] = {"format": _FORMAT, "evaluate": self.evaluate_options(resolved=False)}
        data = self.suite.data[self.row.data]
        content["data"] = {"version": data_version(self.row.data), "split": data.split, "config": data.config}
        if self.system.order is None:
            content["recipe"] = measured_values(self.recipe(resolved=False), with_dataset=False)
        content["files"] = referenced_files(
            [content["evaluate"], content.get("recipe", {})], lambda value: self._resolve(value)
        )
        return content

    def _resolve(self, value: Any) -> Any:
        return resolve_references(value, self.prepared)


@dataclass
class PreparedCell:
    """A prepared run of a suite.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        prepared ([`~hf_mel.bench.suite.Prepared`]): The run.
        folder (`Path`): Its folder.
        seed (`int`, *optional*): The seed, for a run of every seed.
        runs (`dict`): Run folder of every run that was prepared before, by its name.
    """

    suite: Suite
    prepared: Prepared
    folder: Path
    seed: int | None
    runs: Mapping[str, Path]

    @property
    def label(self) -> str:
        """The name in messages."""
        return f"prepare · {self.prepared.name}" + ("" if self.seed is None else f" · seed {self.seed}")

    @property
    def references(self) -> list[str]:
        """Names of the prepared runs that the run needs."""
        return sorted(set(RUN_REFERENCE.findall(json.dumps(self.prepared.set))))

    @property
    def data(self) -> str | None:
        """Name of the data set in the suite; `None` if the recipe's own is used."""
        if self.prepared.data is None and len(self.suite.data) == 1:
            return next(iter(self.suite.data))
        return self.prepared.data

    @property
    def set(self) -> dict[str, Any]:
        """Values of the recipe, with references to prepared runs."""
        values = dict(self.prepared.set)
        if self.data is not None:
            values = {**data_values(self.suite, self.data), **values}
        return values if self.seed is None else {**values, "training.seed": self.seed}

    def recipe(self) -> Recipe:
        """Returns the recipe with the values of the run."""
        return Recipe.load(self.prepared.recipe, recipe_overrides(resolve_references(self.set, self.runs)))

    def commands(self) -> list[list[str]]:
        """Returns the arguments of all commands, in order."""
        values = recipe_overrides(resolve_references(self.set, self.runs))
        options = [word for value in values for word in ("--set", value)]
        return [["train", self.prepared.recipe, *options, "--resume", "--output", str(self.folder / RUN)]]

    def inputs(self, data_version: Callable[[str], Any]) -> dict[str, Any]:
        """Returns everything that the run depends on, apart from the code; see [`Cell.inputs`]."""
        recipe = Recipe.load(self.prepared.recipe, recipe_overrides(self.set))
        content: dict[str, Any] = {"format": _FORMAT, "recipe": measured_values(recipe, self.data is None)}
        if self.data is not None:
            content["data"] = data_version(self.data)
        content["files"] = referenced_files(content["recipe"], lambda value: resolve_references(value, self.runs))
        return content


def prepared_cells(suite: Suite, runs: Path) -> list[PreparedCell]:
    """Returns the prepared runs of a suite, in order.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        runs (`Path`): The folder of all its runs.
    """
    cells = []
    for prepared in suite.prepare:
        if prepared.folder is not None:
            continue
        for seed in suite_seeds(suite) if prepared.per_seed else [None]:
            folder = prepared_folder(prepared, seed, runs)
            cells.append(PreparedCell(suite, prepared, folder, seed, prepared_runs(suite, seed, runs)))
    return cells


def suite_seeds(suite: Suite) -> list[int]:
    """Returns all seeds of a suite and its systems, in the order of their first use."""
    return list(
        dict.fromkeys(seed for seeds in (suite.seeds, *(s.seeds or [] for s in suite.systems)) for seed in seeds)
    )


def prepared_folder(prepared: Prepared, seed: int | None, runs: Path) -> Path:
    """Returns the folder of a prepared run."""
    return (
        runs / "prepared" / (prepared.name if seed is None or not prepared.per_seed else f"{prepared.name}-seed{seed}")
    )


def prepared_runs(suite: Suite, seed: int | None, runs: Path) -> dict[str, Path]:
    """Returns the run folder of every prepared run for a seed, by its name."""
    return {
        prepared.name: prepared_folder(prepared, seed, runs) / RUN
        if prepared.folder is None
        else Path(prepared.folder)
        for prepared in suite.prepare
    }


def grid_cells(suite: Suite, runs: Path) -> list[Cell]:
    """Returns the cells of a suite: all of the first seed, then all of the next one.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        runs (`Path`): The folder of all its runs.
    """
    cells: list[Cell] = []
    for system in suite.systems:
        for name in system.data if system.data is not None else suite.data:
            sweep = None if system.order is not None else system.sweep or suite.sweep
            fractions = [1.0] if system.order is not None else system.train_fractions or suite.train_fractions
            for fraction in fractions:
                for value in [None] if sweep is None else sweep.values:
                    field = None if sweep is None else sweep.field
                    row = RowKey(name, system.name, fraction, field, None if sweep is None else json.dumps(value))
                    # An order depends on a seed only if it is drawn, which its own `seeds` say. Otherwise the suite's first
                    # seed stands for all, whose prepared runs exist.
                    seeds = system.seeds or (suite.seeds if system.order is None else suite.seeds[:1])
                    for seed in seeds:
                        values: dict[str, Any] = {**data_values(suite, name), **suite.set, **system.set}
                        if fraction != 1:
                            values |= {"data.train_fraction": fraction, "data.train_order": suite.train_order}
                        values |= (suite.budget if system.budget is None else system.budget).overrides()
                        if field is not None:
                            values[field] = value
                        values["training.seed"] = seed
                        folder = runs / _folder_name(row, seed)
                        cells.append(Cell(suite, system, row, seed, folder, prepared_runs(suite, seed, runs), values))
    order = {seed: number for number, seed in enumerate(suite_seeds(suite))}
    return sorted(cells, key=lambda cell: order[cell.seed])


def cells_by_row(suite: Suite, runs: Path) -> dict[RowKey, list[Cell]]:
    """Returns the cells of each row of a suite, one for each seed; see [`grid_cells`]."""
    rows: dict[RowKey, list[Cell]] = {}
    for cell in grid_cells(suite, runs):
        rows.setdefault(cell.row, []).append(cell)
    return rows


def data_values(suite: Suite, name: str) -> dict[str, Any]:
    """Returns the values of a recipe that name a data set of the suite."""
    data = suite.data[name]
    values: dict[str, Any] = {"data.dataset": data.dataset}
    if data.config != "mentions":
        values["data.config"] = data.config
    if data.revision is not None:
        values["data.revision"] = data.revision
    return values


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Returns options of a command as words: `{"num_candidates": 16, "joint": False}` → `--num-candidates 16 --no-joint`."""
    words: list[str] = []
    for key, value in options.items():
        name = key.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            if value or key == "joint":
                words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def resolve_references(value: Any, runs: Mapping[str, Path]) -> Any:
    """Replaces `run:NAME` by the folder of the run in a value and inside it."""
    if isinstance(value, str):
        return RUN_REFERENCE.sub(lambda match: str(runs[match[1]]) if match[1] in runs else match[0], value)
    if isinstance(value, dict):
        return {key: resolve_references(item, runs) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_references(item, runs) for item in value]
    return value


def referenced_files(content: Any, resolve: Callable[[str], str]) -> dict[str, str]:
    """Returns a digest of every file and model folder that some content names, by the name it uses.

    Args:
        content: Nested dictionaries and lists.
        resolve (`Callable`): Turns references to prepared runs into paths.
    """
    digests: dict[str, str] = {}
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, str) and len(value) < 1000 and "\n" not in value:
            path = Path(re.sub(r"^part:[^:]*:", "", resolve(value)))
            if value and (path.is_file() or (path / "config.json").is_file()):
                digests[value] = _path_digest(path, path.stat().st_mtime_ns)
    return digests


@cache
def _path_digest(path: Path, _changed: int) -> str:
    """Returns one digest of a file, or of the weights and settings in a model folder."""
    if path.is_file():
        return file_sha256(path)
    names = ["config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json"]
    files = sorted({*path.glob("*.safetensors"), *path.glob("*.bin"), *(path / name for name in names)})
    lines = [f"{file.name} {file_sha256(file)}" for file in files if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def shown_command(arguments: Sequence[str]) -> str:
    """Returns a command of `hf-mel` as it is typed."""
    return shlex.join(["hf-mel", *arguments])


def measured_values(recipe: Recipe, with_dataset: bool) -> dict[str, Any]:
    """Returns the values of a recipe that change results and are not defaults.

    So a field that a later version of the package adds changes no inputs.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        with_dataset (`bool`): Whether the name of the data set is part of it.
    """
    content = _without_defaults(recipe)
    for key in _NOT_MEASURED:
        content.pop(key, None)
    if not with_dataset:
        content.get("data", {}).pop("dataset", None)
    return content


def _without_defaults(section: Any) -> dict[str, Any]:
    values = {}
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            values[item.name] = _without_defaults(value)
        elif value != (item.default if item.default_factory is MISSING else item.default_factory()):
            values[item.name] = value
    return {key: value for key, value in values.items() if key != "source"}


def inputs_digest(inputs: Mapping[str, Any]) -> str:
    """Returns the sha256 of the inputs of a cell."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def empty_reason(cell: Cell) -> str | None:
    """Returns why a cell stays empty before anything runs, or `None`."""
    if cell.system.order is not None:
        return None
    if cell.recipe_name is None:
        return f"The system has no recipe for {cell.row.data}."
    try:
        cell.recipe()
    except RecipeError as error:
        return f"{error.message} {error.remedy or ''}".strip()
    return None


def read_record(cell: Cell | PreparedCell) -> dict[str, Any] | None:
    """Returns the content of a cell's `cell.json`, or `None` if the cell is not done.

    A cell is not done if that file is missing or damaged, or if it says "finished" and there are no results.
    """
    record = read_json(cell.folder / CELL)
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in (("state", str), ("inputs", str), ("spent", dict))
    ):
        return None
    if record["state"] != "finished":
        return record if isinstance(record.get("reason"), str) else None
    results = read_json(cell.folder / (EVALUATION if isinstance(cell, Cell) else f"{RUN}/results.json"))
    return record if isinstance(results, dict) and isinstance(record.get("commands"), list) else None


def _folder_name(row: RowKey, seed: int) -> str:
    """Returns the name of a cell's folder: readable, and different for different cells."""
    parts = [row.data, row.system]
    if row.train_fraction != 1:
        parts.append(f"train{row.train_fraction:g}")
    if row.field is not None:
        parts.append(f"{row.field.rpartition('.')[2]}={row.value}")
    readable = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join(parts)).strip("_")[:80]
    digest = hashlib.sha256(json.dumps([row.data, row.system, row.train_fraction, row.field, row.value]).encode())
    return f"{readable}-{digest.hexdigest()[:6]}-seed{seed}"
