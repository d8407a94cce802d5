"""Suites. A suite is a YAML file that describes a grid of runs, and is checked before anything runs."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_mel.data.examples import PART_ORDERS
from hf_mel.errors import MelError, RecipeError, SuiteError
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import check_fields
from hf_mel.training.recipe import YAML_ERRORS, Recipe, RecipeYamlLoader, apply_override, shipped_recipes

#: Options of `hf-mel evaluate` that a suite may set, with `_` for `-`.
EVALUATE_OPTIONS = (
    "batch_size",
    "bf16",
    "candidate_weight",
    "candidates",
    "device",
    "joint",
    "ks",
    "name_weight",
    "nil_from",
    "nil_threshold",
    "num_candidates",
    "posts",
    "precision",
    "retriever",
    "scorer",
    "ties",
    "top_k",
    "units",
)
#: The order of the candidates that a suite gives to rerankers.
LIST_ORDER = "list"
#: A reference to the run folder of a prepared run, inside a value of a suite.
RUN_REFERENCE = re.compile(r"\brun:([A-Za-z0-9][A-Za-z0-9._-]*)")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class SuiteData:
    """One data set of a suite.

    Args:
        dataset (`str`): Folder or Hub id.
        split (`str`): The split to evaluate on.
        config (`str`): Configuration with the mentions.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.
        evaluate (`dict`): Options of `hf-mel evaluate` for this data set.
    """

    dataset: str = ""
    split: str = "test"
    config: str = "mentions"
    revision: str | None = None
    evaluate: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budget:
    """The limits of training for every run of a suite. Without a limit, a recipe's own length counts.

    Args:
        max_steps (`int`, *optional*): Number of steps (`training.max_steps`).
        minutes (`float`, *optional*): Minutes of training (`training.max_minutes`).
    """

    max_steps: int | None = None
    minutes: float | None = None

    def overrides(self) -> dict[str, Any]:
        """Returns the values of the recipe that set the budget."""
        values: dict[str, Any] = {}
        if self.max_steps is not None:
            values["training.max_steps"] = self.max_steps
        if self.minutes is not None:
            values["training.max_minutes"] = self.minutes
        return values


@dataclass
class Sweep:
    """The values of one field of a recipe that a system is run with, one after the other.

    Args:
        field (`str`): The field, with dots between its levels.
        values (`list`): Its values.
    """

    field: str
    values: list[Any]


@dataclass
class Prepared:
    """A run that systems of the suite need: a retriever, an encoder, or a stage before linking.

    Args:
        name (`str`): Its name. `run:NAME` inside a value of the suite is its run folder.
        recipe (`str`): A recipe file, or the name of a shipped recipe.
        folder (`str`, *optional*): A run folder that exists already, in place of a run.
        data (`str`, *optional*): The data set of the suite to train on. Default: the only one, or the recipe's own.
        set (`dict`): Values of the recipe.
        per_seed (`bool`): Whether it is run once for each seed; `run:NAME` is then the run of the same seed.
    """

    name: str = ""
    recipe: str = ""
    folder: str | None = None
    data: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    per_seed: bool = False


@dataclass
class System:
    """One system of a suite: a recipe that is trained and evaluated, or an order of candidates without a model.

    Args:
        name (`str`): Its name in tables.
        recipe (`str` or `dict`): A recipe file or the name of a shipped recipe; or one for each data set by its name.
        order (`str`, *optional*): In place of a recipe, a source of candidates whose own order is evaluated, as for
            `hf-mel evaluate --no-model --candidates`. Such a source ranks the knowledge base and keeps the first
            `num_candidates`, so its row stands beside systems that rank all of it; MR, which needs all ranks, is left out.
            "list" is the order of the candidates that the suite gives to rerankers, and stands beside these.
        set (`dict`): Values of the recipe.
        data (`list`, *optional*): Names of the data sets. Default: all of the suite.
        seeds, train_fractions (`list`, *optional*): Default: those of the suite.
        budget ([`Budget`] or "none", *optional*): Default: that of the suite. With "none", the recipe's own length counts.
        sweep ([`Sweep`], *optional*): Default: that of the suite.
        evaluate (`dict`): Options of `hf-mel evaluate`.
        note (`str`): A remark for the tables.
    """

    name: str = ""
    recipe: str | dict[str, str] | None = None
    order: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    data: list[str] | None = None
    seeds: list[int] | None = None
    train_fractions: list[float] | None = None
    budget: Budget | None = None
    sweep: Sweep | None = None
    evaluate: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def recipe_for(self, data: str) -> str | None:
        """Returns the recipe for a data set, or `None` if the system has none."""
        return self.recipe.get(data) if isinstance(self.recipe, dict) else self.recipe


@dataclass
class Suite:
    """A grid of runs: systems, data sets, seeds, shares of the training data, and values of one field.

    Args:
        name (`str`): Name of the output files, and of the folder of the runs.
        title, description (`str`): For the tables.
        data (`dict`): Data sets by name ([`SuiteData`]).
        systems (`list`): The systems ([`System`]).
        seeds (`list` of `int`): Values of `training.seed`.
        train_fractions (`list` of `float`): Values of `data.train_fraction`.
        train_order (`str`): Value of `data.train_order`, "random" or "first".
        budget ([`Budget`]): The budget of every run.
        set (`dict`): Values of the recipes of all systems.
        sweep ([`Sweep`], *optional*): Values of one field.
        prepare (`list`): Runs that systems need ([`Prepared`]), in the file by their names. They are trained first, in this
            order, without budget.
        compare_with (`list` of `str`): Systems that the others are tested against: in every table, the first of them that
            stands in it.
        evaluate (`dict`): Options of `hf-mel evaluate`.
        source (`str`, *optional*): File that the suite was read from.
        lines (`dict`): Line of every key in this file, by its path, such as ("systems", 0, "recipe").
    """

    name: str
    data: dict[str, SuiteData]
    systems: list[System]
    title: str = ""
    description: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    train_fractions: list[float] = field(default_factory=lambda: [1.0])
    train_order: str = "random"
    budget: Budget = field(default_factory=Budget)
    set: dict[str, Any] = field(default_factory=dict)
    sweep: Sweep | None = None
    prepare: list[Prepared] = field(default_factory=list)
    compare_with: list[str] = field(default_factory=list)
    evaluate: dict[str, Any] = field(default_factory=dict)
    source: str | None = None
    lines: dict[tuple, int] = field(default_factory=dict)

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Suite:
        """Reads and checks a suite, with all recipes that it names.

        Args:
            path_or_name (`str` or `os.PathLike`): A YAML file, or the name of a suite that comes with the package.
            overrides (sequence of `str`): `key=value`, with dots between the levels of the key and a YAML value.

        Raises:
            SuiteError: the suite does not exist, is not YAML, or names something that does not exist: a field, a system, a
                recipe, a data set. Names the line, and the most similar name.
        """
        file, text = _read_suite(path_or_name)
        try:
            node = yaml.compose(text, Loader=RecipeYamlLoader)
            content = yaml.load(text, Loader=RecipeYamlLoader)
        except YAML_ERRORS as error:
            mark = getattr(error, "problem_mark", None)
            raise SuiteError(
                f"The suite is not valid YAML ({getattr(error, 'problem', None) or error}).",
                file=file,
                row=None if mark is None else mark.line + 1,
            ) from None
        lines: dict[tuple, int] = {}
        _collect_lines(node, (), lines)
        if not isinstance(content, dict):
            raise SuiteError(
                "The suite is not a mapping of keys to values.", file=file, remedy="Start from a shipped one."
            )
        for override in overrides:
            try:
                apply_override(content, override, file)
            except RecipeError as error:
                raise SuiteError(error.message, file=file, remedy=error.remedy) from None
        return _Reader(file, lines).suite(content)

    def error(self, message: str, path: tuple = (), remedy: str | None = None) -> SuiteError:
        """Returns an error that names this suite's file and the line of a key."""
        return SuiteError(message, file=self.source, row=_line_of(self.lines, path), remedy=remedy)


def shipped_suites() -> list[str]:
    """Returns the names of the suites that come with the package, sorted."""
    files = _suites_folder().iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_overrides(values: Mapping[str, Any]) -> list[str]:
    """Returns values of a recipe as the options `--set key=value`, which [`Recipe.load`] reads back unchanged."""
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    # YAML takes no control characters, unless they are escaped.
    return [f"{key}={text if text.isprintable() else json.dumps(values[key])}" for key, text in texts.items()]


def _suites_folder() -> Any:
    """Returns the folder of the shipped suites."""
    try:
        return resources.files("hf_mel.suites")
    except ModuleNotFoundError:  # an editable installation that was made before the folder was there
        return resources.files("hf_mel") / ".." / "suites"


def _read_suite(path_or_name: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns the file name of a suite, for errors, and its text."""
    path, name = Path(path_or_name), os.fspath(path_or_name)
    try:
        if path.is_file():
            return str(path), path.read_text(encoding="utf-8")
        if name in shipped_suites():
            return f"{name}.yaml", (_suites_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"The suite is not readable ({error}).", file=path) from None
    raise SuiteError(
        "The suite does not exist.",
        file=path,
        remedy=_suggestion(name, shipped_suites(), "Give the path of a YAML file, or a suite that comes with hf_mel"),
    )


def _suggestion(name: Any, valid: Iterable[str], listing: str = "Valid") -> str:
    """Returns a remedy with the most similar valid name, or else with all of them."""
    valid = list(valid)
    similar = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"Did you mean {similar[0]!r}?" if similar else f"{listing}: {', '.join(valid) or 'none'}."


def _collect_lines(node: Any, path: tuple, lines: dict[tuple, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, key.value)
            lines[place] = key.start_mark.line + 1
            _collect_lines(value, place, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            place = (*path, number)
            lines[place] = item.start_mark.line + 1
            _collect_lines(item, place, lines)


def _line_of(lines: Mapping[tuple, int], path: tuple) -> int | None:
    """Returns the line of a key, or of the closest level above it."""
    while path and path not in lines:
        path = path[:-1]
    return lines[path] if path else None


class _Reader:
    """Builds a suite from the content of its file, and checks it."""

    def __init__(self, file: str, lines: dict[tuple, int]):
        self.file, self.lines = file, lines

    def error(self, message: str, path: tuple = (), remedy: str | None = None) -> SuiteError:
        return SuiteError(message, file=self.file, row=_line_of(self.lines, path), remedy=remedy)

    def suite(self, content: dict[str, Any]) -> Suite:
        kinds = {
            "name": str, "title": str, "description": str, "data": dict, "systems": list, "seeds": list,
            "train_fractions": list, "train_order": str, "budget": dict, "set": dict, "sweep": dict, "prepare": dict,
            "compare_with": (str, list), "evaluate": dict,
        }  # fmt: skip
        values = self.section(content, kinds, (), required=("data", "systems"))
        values.setdefault("name", Path(self.file).name.removesuffix(".yaml"))
        if not _NAME.fullmatch(values["name"]):
            raise self.error(
                f"The name {values['name']!r} is not usable as a file name.",
                ("name",),
                "Use letters, digits, . _ and -.",
            )
        compare_with = values.pop("compare_with", [])
        suite = Suite(
            **{key: values[key] for key in ("name", "title", "description", "train_order") if key in values},
            data={str(name): self.data(item, name) for name, item in values["data"].items()},
            systems=[self.system(item, number) for number, item in enumerate(values["systems"])],
            seeds=self.numbers(values.get("seeds", [0]), ("seeds",), whole=True),
            train_fractions=self.fractions(values.get("train_fractions", [1.0]), ("train_fractions",)),
            budget=self.budget(values.get("budget") or {}, ("budget",)),
            set=dict(values.get("set") or {}),
            sweep=self.sweep(values["sweep"], ("sweep",)) if values.get("sweep") else None,
            prepare=[self.prepared(item, name) for name, item in (values.get("prepare") or {}).items()],
            compare_with=[compare_with] if isinstance(compare_with, str) else compare_with,
            evaluate=self.options(values.get("evaluate") or {}, ("evaluate",)),
            source=self.file,
            lines=self.lines,
        )
        self.check(suite)
        return suite

    def section(
        self, content: Any, kinds: Mapping[str, Any], path: tuple, required: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Checks the keys and the types of a mapping, and returns it without empty values."""
        where = ".".join(map(str, path)) or "the suite"
        if not isinstance(content, dict):
            raise self.error(f"{where} is {content!r}, not a mapping of keys to values.", path)
        for key, value in content.items():
            if key not in kinds:
                raise self.error(
                    f"Unknown field {key!r} in {where}.", (*path, key), _suggestion(key, kinds, "Known fields")
                )
            if value is not None and not (isinstance(value, kinds[key]) and not self.is_flag(value, kinds[key])):
                raise self.error(f"The value {value!r} of {key!r} in {where} has the wrong type.", (*path, key))
        for key in required:
            if not content.get(key):
                raise self.error(f"{where} has no {key!r}.", path, f"Add {key!r}.")
        return {key: str(value) if kinds[key] is str else value for key, value in content.items() if value is not None}

    @staticmethod
    def is_flag(value: Any, kind: Any) -> bool:
        """Whether a value is true or false where a number is asked for, which Python takes for one."""
        return isinstance(value, bool) and kind is not bool

    def data(self, content: Any, name: Any) -> SuiteData:
        path = ("data", name)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self.error(f"{name!r} is no name of a data set.", path, "Use letters, digits, . _ and -.")
        kinds = {"dataset": str, "split": str, "config": str, "revision": str, "evaluate": dict}
        content = {"dataset": content} if isinstance(content, str) else content
        values = self.section(content, kinds, path, required=("dataset",))
        if "evaluate" in values:
            values["evaluate"] = self.options(values["evaluate"], (*path, "evaluate"))
        return SuiteData(**values)

    def system(self, content: Any, number: int) -> System:
        path = ("systems", number)
        kinds = {
            "name": str, "recipe": (str, dict), "order": str, "set": dict, "data": (str, list), "seeds": list,
            "train_fractions": list, "budget": (dict, str), "sweep": dict, "evaluate": dict, "note": str,
        }  # fmt: skip
        values = self.section(content, kinds, path)
        if ("recipe" in values) == ("order" in values):
            raise self.error("A system has either a recipe or an order.", path, "Give one of them.")
        default = values.get("order") or (values["recipe"] if isinstance(values["recipe"], str) else None)
        values.setdefault("name", default)
        if not values["name"]:
            raise self.error("The system has no name.", path, "Add 'name'.")
        if values["name"] == default and "recipe" in values:
            values["name"] = Path(str(default)).name.removesuffix(".yaml")
        if isinstance(values.get("data"), str):
            values["data"] = [values["data"]]
        if "seeds" in values:
            values["seeds"] = self.numbers(values["seeds"], (*path, "seeds"), whole=True)
        if "train_fractions" in values:
            values["train_fractions"] = self.fractions(values["train_fractions"], (*path, "train_fractions"))
        if isinstance(values.get("budget"), str):
            if values["budget"] != "none":
                raise self.error(f"The budget {values['budget']!r} is not 'none' or a mapping.", (*path, "budget"))
            values["budget"] = Budget()
        elif "budget" in values:
            values["budget"] = self.budget(values["budget"], (*path, "budget"))
        if "sweep" in values:
            values["sweep"] = self.sweep(values["sweep"], (*path, "sweep"))
        values["evaluate"] = self.options(values.get("evaluate") or {}, (*path, "evaluate"))
        return System(**values)

    def prepared(self, content: Any, name: Any) -> Prepared:
        path = ("prepare", name)
        kinds = {"recipe": str, "folder": str, "data": str, "set": dict, "per_seed": bool}
        content = {"recipe": content} if isinstance(content, str) else content
        values = self.section(content, kinds, path)
        if not values.get("recipe") and not values.get("folder"):
            raise self.error(f"The prepared run {name!r} has no recipe.", path, "Add 'recipe'.")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise self.error(f"{name!r} is no name of a run.", path, "Use letters, digits, . _ and -.")
        if values.get("folder") and not Path(values["folder"]).is_dir():
            raise self.error(f"The run folder {values['folder']!r} does not exist.", (*path, "folder"))
        return Prepared(name, **values)

    def budget(self, content: Any, path: tuple) -> Budget:
        values = self.section(content, {"max_steps": int, "minutes": (int, float)}, path)
        for key, value in values.items():
            if value <= 0:
                raise self.error(f"The budget {key} is {value}.", (*path, key), "Give a number above 0.")
        return Budget(**values)

    def sweep(self, content: Any, path: tuple) -> Sweep:
        values = self.section(content, {"field": str, "values": list}, path, required=("field", "values"))
        return Sweep(**values)

    def options(self, content: Any, path: tuple) -> dict[str, Any]:
        """Checks options of `hf-mel evaluate`."""
        scalar = (str, int, float, bool, list)
        kinds = dict.fromkeys(EVALUATE_OPTIONS, scalar)
        if not isinstance(content, dict):
            raise self.error(f"{'.'.join(map(str, path))} is {content!r}, not a mapping of options to values.", path)
        for key, value in content.items():
            if key not in kinds:
                raise self.error(
                    f"Unknown field {key!r} in {'.'.join(map(str, path))}.",
                    (*path, key),
                    _suggestion(key, kinds, "Options of hf-mel evaluate"),
                )
            if value is not None and not isinstance(value, scalar):
                raise self.error(f"The value {value!r} of {key!r} has the wrong type.", (*path, key))
        return dict(content)

    def numbers(self, content: list[Any], path: tuple, whole: bool = False) -> list[Any]:
        kind = int if whole else (int, float)
        for number, value in enumerate(content):
            if isinstance(value, bool) or not isinstance(value, kind):
                raise self.error(
                    f"{value!r} in {path[-1]!r} is not a {'whole ' if whole else ''}number.", (*path, number)
                )
        if not content or len(set(content)) < len(content):
            raise self.error(f"{path[-1]!r} is empty or names a value twice.", path)
        return list(content)

    def fractions(self, content: list[Any], path: tuple) -> list[float]:
        for number, value in enumerate(self.numbers(content, path)):
            if not 0 < value <= 1:
                raise self.error(f"The fraction {value} is not above 0 and at most 1.", (*path, number))
        return [float(value) for value in content]

    def check(self, suite: Suite) -> None:
        """Checks that names refer to something, and that every recipe loads with its values."""
        if suite.train_order not in PART_ORDERS:
            raise self.error(
                f"The train_order {suite.train_order!r} does not exist.",
                ("train_order",),
                _suggestion(suite.train_order, PART_ORDERS),
            )
        names = [system.name for system in suite.systems]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise self.error(f"Two systems are named {name!r}.", ("systems", number, "name"))
        for number, name in enumerate(suite.compare_with):
            if name not in names:
                raise self.error(
                    f"The suite has no system {name!r} to compare with.",
                    ("compare_with", number),
                    _suggestion(name, names, "Systems"),
                )
        ready: list[str] = []
        for prepared in suite.prepare:
            path = ("prepare", prepared.name)
            self.check_references(prepared.set, (*path, "set"), ready)
            if prepared.data is not None:
                self.check_data([prepared.data], suite, (*path, "data"))
            if prepared.folder is None:
                self.check_recipe(prepared.recipe, prepared.set, (*path, "recipe"))
            ready.append(prepared.name)
        self.check_references(suite.set, ("set",), ready)
        self.check_references(suite.evaluate, ("evaluate",), ready)
        for name, data in suite.data.items():
            self.check_references(data.evaluate, ("data", name, "evaluate"), ready)
        for number, system in enumerate(suite.systems):
            self.check_system(suite, system, ("systems", number), ready)

    def check_system(self, suite: Suite, system: System, path: tuple, ready: Sequence[str]) -> None:
        """Checks what a system refers to, and that its recipes load with their values."""
        self.check_references(system.set, (*path, "set"), ready)
        self.check_references(system.evaluate, (*path, "evaluate"), ready)
        chosen = list(suite.data) if system.data is None else system.data
        self.check_data(chosen, suite, (*path, "data"))
        if isinstance(system.recipe, dict):
            self.check_data(system.recipe, suite, (*path, "recipe"))
        sweep = system.sweep or suite.sweep
        values = {} if sweep is None else {sweep.field: sweep.values[0]}
        for data in chosen:
            recipe = system.recipe_for(data)
            if recipe is not None:
                where = (*path, "recipe", data) if isinstance(system.recipe, dict) else (*path, "recipe")
                self.check_recipe(recipe, {**suite.set, **system.set, **values}, where)

    def check_data(self, names: Iterable[Any], suite: Suite, path: tuple) -> None:
        for name in names:
            if name not in suite.data:
                raise self.error(
                    f"The suite has no data set {name!r}.", (*path, name), _suggestion(name, suite.data, "Data sets")
                )

    def check_references(self, values: Mapping[str, Any], path: tuple, ready: Sequence[str]) -> None:
        for key, value in values.items():
            for name in RUN_REFERENCE.findall(json.dumps(value)):
                if name not in ready:
                    raise self.error(
                        f"{key!r} refers to the run {name!r}, which is not prepared before.",
                        (*path, key),
                        _suggestion(name, ready, "Prepared runs"),
                    )

    def check_recipe(self, name: str, values: Mapping[str, Any], path: tuple) -> None:
        if not Path(name).is_file() and name not in shipped_recipes():
            raise self.error(
                f"The recipe {name!r} does not exist.", path, _suggestion(name, shipped_recipes(), "Recipes")
            )
        try:
            recipe = Recipe.load(name, recipe_overrides(values))
            recipe.check_keys("training", recipe.training, {item.name for item in fields(MelTrainingArguments)})
            if recipe.model.type is not None:
                check_fields(recipe)
        except MelError as error:
            raise self.error(f"The recipe {name!r} cannot be used: {error.message}", path, error.remedy) from error
