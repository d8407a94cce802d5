"""Recipes. A recipe is a YAML file that describes one training run and is checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_mel.data.examples import PART_ORDERS
from hf_mel.errors import MissingExtraError, RecipeError, UnknownModelError
from hf_mel.files import package_folder

#: The tasks that a recipe can train a model for.
TASKS = ("linking", "pretraining", "knowledge", "candidates", "adaptation")


#: Errors of reading YAML: beside its own, those of dates and numbers that do not exist, of tags such as `!!timestamp`, `!!bool` and
#: `!!int` before other values, and of deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)


class RecipeYamlLoader(yaml.SafeLoader):
    """YAML loader that reads `1e-5` as a number, and `no`, `off`, `yes` and `on` as strings, as YAML 1.2 does.

    PyYAML implements YAML 1.1, in which a number needs a dot and a sign, and `eval_strategy: no` is false. A field that
    takes true or false still accepts these words ([`as_bool`]). Without quotes, they are [`_UnquotedWord`]s.
    """


class _UnquotedWord(str):
    """One of YAML 1.1's words for true and false, written without quotes. In quotes, a string is meant."""

    __slots__ = ()


RecipeYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
for _first in "yYnNoO":
    RecipeYamlLoader.yaml_implicit_resolvers[_first] = [
        (tag, pattern)
        for tag, pattern in RecipeYamlLoader.yaml_implicit_resolvers.get(_first, ())
        if tag != "tag:yaml.org,2002:bool"
    ]

RecipeYamlLoader.add_implicit_resolver("!word", re.compile(r"^(yes|no|on|off)$", re.IGNORECASE), list("yYnNoO"))
RecipeYamlLoader.add_constructor("!word", lambda loader, node: _UnquotedWord(node.value))

_BOOLEAN_WORDS = {"yes": True, "on": True, "no": False, "off": False}


def as_bool(value: Any) -> Any:
    """Returns `True` or `False` for YAML 1.1's words for them (yes, no, on, off), and any other value unchanged."""
    return _BOOLEAN_WORDS.get(value.lower(), value) if isinstance(value, str) else value


@dataclass
class ModelRecipe:
    """Section `model:` of a recipe. It has either `type` or `from_pretrained`.

    Args:
        type (`str`, *optional*): A model type that is registered with `AutoConfig`.
        from_pretrained (`str`, *optional*): Hub id or folder of a model whose training continues.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code in the `from_pretrained` repository.
        text, vision (`str`, *optional*): Pretrained encoders: a Hub id, a folder, `package:<Python package>/<path in it>`,
            or `part:<name>:<model>` for a part of another model, such as `part:vision_model:runs/mine`.
        config (`dict`, *optional*): Fields of the method's configuration.
        lora (`dict`, *optional*): Train the encoders through LoRA ([`hf_mel.training.lora`]): `r` is the rank of its matrices,
            `alpha` (by default 2 r) their weight, `dropout` (0) is of their inputs, and `targets` has the ends of the names of the
            linear layers, such as `[query, value]`; by default all of the encoders. Empty: no LoRA.
    """

    type: str | None = None
    from_pretrained: str | None = None
    trust_remote_code: bool = False
    text: str | None = None
    vision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProcessorRecipe:
    """Section `processor:` of a recipe.

    Args:
        tokenizer (`dict`, *optional*): `vocab_size` of the WordPiece tokenizer to train on the training texts and the
            knowledge base, for a model without a pretrained text encoder.
        vision (`dict`, *optional*): Settings of the image processor, for a model without a pretrained image encoder.
        options (`dict`, *optional*): Options of the method's processor.
    """

    tokenizer: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataRecipe:
    """Section `data:` of a recipe.

    Args:
        dataset (`str`): Folder or Hub id of a data set in the schema of [`hf_mel.schema`]. For the task "adaptation", also a
            file of entities, or a knowledge base: a folder, or one on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.
        config (`str`): Configuration with the mentions, for a data set that has several.
        train_split, validation_split (`str`): Splits to train on, and to select the best checkpoint with.
        posts_split (`str`, *optional*): Split of the data set's posts to pre-train on, instead of the mentions of
            `train_split`.
        find_mentions (`bool`): With `posts_split`, whether names of entities in the posts are their mentions
            ([`~hf_mel.training.pretraining.with_found_mentions`]). A post whose entity is NIL, that is, unknown, is about
            the entity that is named in it.
        extra_mentions (`dict`): For linking with a retriever, further training mentions by their source, with a number.
            `posts: n` takes every post of the data set n times. `entities: n` makes n mentions of every entity
            ([`~hf_mel.data.posts.entities_as_mentions`]).
        extra_datasets (`list[str]`): For linking, folders or Hub ids of further data sets. Their mentions of `train_split`
            and their entities are added for training; validation stays that of `dataset`.
        train_fraction (`float`, *optional*, defaults to 1.0): Share of the mentions of `train_split` to train on. The
            others are as if the data set did not have them: priors and captions come from this part too.
        train_order (`str`, *optional*, defaults to `"random"`): Which part it is: "random" draws whole documents or
            contexts by `training.seed`, "first" takes the first mentions of the release
            ([`~hf_mel.data.examples.part_of_mentions`]).
        columns (`dict`): For a file of entities, the arguments of its [`~hf_mel.row_columns.ColumnMapping`].
    """

    dataset: str = ""
    revision: str | None = None
    config: str = "mentions"
    train_split: str = "train"
    validation_split: str = "validation"
    posts_split: str | None = None
    find_mentions: bool = False
    extra_mentions: dict[str, Any] = field(default_factory=dict)
    extra_datasets: list[str] = field(default_factory=list)
    train_fraction: float = 1.0
    train_order: str = "random"
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class CandidatesRecipe:
    """Section `candidates:` of a recipe: the candidates that a reranker scores in training and in evaluation.

    Args:
        source (`str`): "file", or a source of [`~hf_mel.candidates.make.make_candidates`]: "name", "prior", "retriever",
            "release" (candidates in the data set), or several of these joined by "+", with "document" as the last.
        k (`int`, *optional*, defaults to 100): Maximum number of candidates per mention.
        scorer (`str`, *optional*, defaults to `"WRatio"`): String similarity for the source "name".
        retriever (`str`, *optional*): Run folder or Hub id of a trained retriever.
        file (`str`, *optional*): Output file of `hf-mel candidates`. `{split}` is replaced by the name of the split.
        train_file (`str`, *optional*): File with the candidates of the training split, instead of the source. The lists of
            a retriever for mentions that it was trained on are easier than those of other mentions, so a reranker should
            learn from lists that a recipe with the task "candidates" wrote.
    """

    source: str = ""
    k: int = 100
    scorer: str = "WRatio"
    retriever: str | None = None
    file: str | None = None
    train_file: str | None = None


@dataclass
class FoldsRecipe:
    """Section `folds:` of a recipe with the task "candidates".

    Args:
        count (`int`, *optional*, defaults to 2): Number of parts of the training split. A document is in one part. For each
            part, a retriever is trained on the others.
        k (`int`, *optional*, defaults to 16): Number of candidates per mention.
    """

    count: int = 2
    k: int = 16


@dataclass
class AdaptationRecipe:
    """Section `adaptation:` of a recipe with that task: what is made of the entities.

    Args:
        per_entity (`int`, *optional*, defaults to 4): Mentions made of each entity for training.
        posts (`int`, *optional*, defaults to 1): How many times each post about an entity is a training mention.
        limit (`int`, *optional*, defaults to 4000): Maximum number of training mentions. Beyond it, every entity has fewer,
            and then some entities have none: whole groups of entities whose names end in the same word, drawn at random.
        validation (`int`, *optional*, defaults to 500): Number of other mentions, by which the checkpoint is selected.
        ranked (`int`, *optional*, defaults to 2000): Maximum number of entities that are ranked for these.
        nil (`float`, *optional*, defaults to 0.05): Share of the entities that are left out of training. Mentions of them
            are NIL, in validation, and in training for a model that learns NIL.
        train (`bool`, *optional*, defaults to `False`): Whether to train on made mentions and posts. Wherever we measured
            it, the model linked real mentions worse afterwards.
        names (`bool`, *optional*, defaults to `True`): Whether to choose the weight of the names, for a model that has none.
    """

    per_entity: int = 4
    posts: int = 1
    limit: int = 4000
    validation: int = 500
    ranked: int = 2000
    nil: float = 0.05
    train: bool = False
    names: bool = True


@dataclass
class Recipe:
    """One training run: model, processor, data and training arguments.

    Args:
        name (`str`): The run folder is `runs/<name>`.
        task (`str`): "linking"; "pretraining" on posts, a stage before linking; "knowledge", an optional stage between
            the two that trains on the posts that serve as entity prototypes; "candidates", which writes the lists of
            the training split that a reranker learns from, each by a retriever that was not trained on its mention; or
            "adaptation", which trains a retriever on mentions made from the knowledge base alone.
        description (`str`): One line about the model.
        license (`str`): Licence identifier of the trained model, as the Hub spells it.
        citation (`str`): BibTeX for the model card.
        model ([`ModelRecipe`]): The model to train.
        processor ([`ProcessorRecipe`]): The processor that turns rows into tensors.
        data ([`DataRecipe`]): The data set and its splits.
        candidates ([`CandidatesRecipe`], *optional*): For a reranker, the candidates of the mentions.
        folds ([`FoldsRecipe`], *optional*): For the task "candidates", the number of retrievers and of candidates.
        adaptation ([`AdaptationRecipe`], *optional*): For the task "adaptation", what is made of the entities.
        training (`dict`): Fields of [`~hf_mel.training.arguments.MelTrainingArguments`].
        source (`str`, *optional*): File that the recipe was read from. Errors name it; it is not saved.
    """

    name: str
    model: ModelRecipe
    data: DataRecipe
    task: str = "linking"
    description: str = ""
    license: str = "apache-2.0"
    citation: str = ""
    processor: ProcessorRecipe = field(default_factory=ProcessorRecipe)
    candidates: CandidatesRecipe | None = None
    folds: FoldsRecipe | None = None
    adaptation: AdaptationRecipe | None = None
    training: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """Reads and checks a recipe.

        Args:
            path_or_name (`str` or `os.PathLike`): A YAML file, or the name of a recipe that comes with the package.
            overrides (sequence of `str`): `key=value`, with dots between the levels of the key and a YAML value, such as
                `training.num_train_epochs=1`. The value of a text, such as `data.dataset=out[1]`, is taken as it is
                written, unless it is in quotes.

        Raises:
            RecipeError: the recipe does not exist, is not YAML, has an unknown key or a value of the wrong type, or
                contradicts itself.
        """
        file, text = _read_recipe(path_or_name)
        try:
            content = yaml.load(text, Loader=RecipeYamlLoader)
        except YAML_ERRORS as error:
            raise RecipeError(f"The recipe is not valid YAML ({error}).", file=file) from None
        if not isinstance(content, dict):
            raise RecipeError(
                "The recipe is not a mapping of keys to values.", file=file, remedy="Start from a shipped recipe."
            )
        for override in overrides:
            apply_override(content, override, file)
        return cls.from_dict(content, file=file)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str | None = None) -> Recipe:
        """Builds a recipe from the content of its file.

        Args:
            content (`Mapping[str, Any]`): Nested sections and values.
            file (`str`, *optional*): File name for errors.

        Raises:
            RecipeError: as in [`Recipe.load`].
        """
        top = {name: kind for name, kind in _field_types(cls).items() if name != "source"}
        _check_keys(content, top, "", file)
        for key in ("name", "model", "data"):
            if not content.get(key):
                raise RecipeError(f"The recipe has no {key!r}.", file=file, remedy="Add this key.")
        sections = {
            name: _build_section(section, content.get(name), name, file)
            for name, section in (("model", ModelRecipe), ("processor", ProcessorRecipe), ("data", DataRecipe))
        }
        plain = {
            name: _read_words(content[name], False)
            for name in ("name", "task", "description", "license", "citation")
            if name in content
        }
        for name, value in plain.items():
            _check_type(value, str, name, file)
        if content.get("candidates") is not None:
            sections["candidates"] = _build_section(CandidatesRecipe, content["candidates"], "candidates", file)
        if content.get("folds") is not None:
            sections["folds"] = _build_section(FoldsRecipe, content["folds"], "folds", file)
        if content.get("adaptation") is not None:
            sections["adaptation"] = _build_section(AdaptationRecipe, content["adaptation"], "adaptation", file)
        training = content.get("training") or {}
        _check_type(training, dict, "training", file)
        recipe = cls(**plain, **sections, training=_read_words(training, False), source=file)
        recipe._check()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe with all defaults, in the form that [`Recipe.from_dict`] accepts."""
        return {name: value for name, value in asdict(self).items() if name != "source"}

    def to_yaml(self) -> str:
        """Returns [`Recipe.to_dict`] as YAML that [`Recipe.load`] reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=119)

    def error(self, message: str, remedy: str | None = None) -> RecipeError:
        """Returns an error that names this recipe's file."""
        return RecipeError(message, file=self.source, remedy=remedy)

    def check_keys(self, section: str, keys: Iterable[str], allowed: Iterable[str]) -> None:
        """Raises a [`RecipeError`] if a key of `section` is not allowed; the message suggests the most similar allowed key."""
        _check_keys(keys, dict.fromkeys(allowed), section, self.source)

    def _check(self) -> None:
        model = self.model
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise self.error(
                f"The name {self.name!r} is not usable as a folder name.", "Use letters, digits, '.', '_' and '-'."
            )
        if self.task not in TASKS:
            raise self.error(f"The task {self.task!r} is not one of {', '.join(map(repr, TASKS))}.")
        if self.data.posts_split is not None and self.task != "pretraining":
            raise self.error(
                f"data.posts_split does not apply to the task {self.task!r}.",
                "Remove data.posts_split, or set task: pretraining.",
            )
        if self.data.find_mentions and self.data.posts_split is None:
            raise self.error("data.find_mentions needs posts.", "Set data.posts_split, or remove data.find_mentions.")
        if self.folds is not None and self.task != "candidates":
            raise self.error(
                f"The section 'folds' does not apply to the task {self.task!r}.",
                "Remove the section, or set task: candidates.",
            )
        if self.folds is not None and (self.folds.count < 2 or self.folds.k < 1):
            raise self.error("folds.count must be at least 2, and folds.k at least 1.")
        if self.adaptation is not None:
            self._check_adaptation(self.adaptation)
        if self.data.columns and self.task != "adaptation":
            raise self.error(f"data.columns does not apply to the task {self.task!r}.", "Remove data.columns.")
        if self.task == "candidates" and self.candidates is not None:
            raise self.error(
                "The task 'candidates' makes candidates and reads none.", "Remove the section 'candidates'."
            )
        if not self.data.dataset:
            raise self.error("The section 'data' has no 'dataset'.", "Give a folder or a Hub id.")
        if not 0 < self.data.train_fraction <= 1:
            raise self.error(
                f"The value {self.data.train_fraction!r} of data.train_fraction is not above 0 and at most 1."
            )
        if self.data.train_order not in PART_ORDERS:
            raise self.error(
                f"The value {self.data.train_order!r} of data.train_order is not one of {', '.join(PART_ORDERS)}."
            )
        if self.data.train_fraction < 1 and self.data.posts_split is not None:
            raise self.error(
                "data.train_fraction is a part of the mentions, and data.posts_split trains on posts.",
                "Remove one of them.",
            )
        self.check_keys("data.extra_mentions", self.data.extra_mentions, ("posts", "entities"))
        for key, count in self.data.extra_mentions.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise self.error(
                    f"The value {count!r} of data.extra_mentions.{key} is not a whole number of at least 0."
                )
        if self.data.extra_mentions and self.task not in ("linking", "candidates"):
            raise self.error(
                f"data.extra_mentions does not apply to the task {self.task!r}.", "Remove data.extra_mentions."
            )
        if not all(isinstance(dataset, str) and dataset for dataset in self.data.extra_datasets):
            raise self.error(
                f"The value {self.data.extra_datasets!r} of data.extra_datasets is not a list of folders and Hub ids."
            )
        if self.data.extra_datasets and self.task != "linking":
            raise self.error(
                f"data.extra_datasets does not apply to the task {self.task!r}.", "Remove data.extra_datasets."
            )
        if self.candidates is not None and (self.candidates.source == "file") != bool(self.candidates.file):
            raise self.error("candidates.source: file and candidates.file need each other.", "Give both or neither.")
        if bool(model.type) == bool(model.from_pretrained):
            raise self.error("The section 'model' needs either 'type' or 'from_pretrained'.")
        if model.from_pretrained:
            if model.text or model.vision:
                raise self.error(
                    "model.text and model.vision start a new model, but model.from_pretrained continues one.",
                    "Remove one of them.",
                )
            if self.processor != ProcessorRecipe():
                raise self.error("model.from_pretrained has a processor already.", "Remove the section 'processor'.")
        elif model.text and self.processor.tokenizer:
            raise self.error("model.text has a tokenizer already.", "Remove processor.tokenizer.")
        elif model.vision and self.processor.vision:
            raise self.error("model.vision has an image processor already.", "Remove processor.vision.")
        elif not model.text and not self.processor.tokenizer:
            raise self.error(
                "The recipe has neither a pretrained text encoder (model.text) nor a tokenizer to train "
                "(processor.tokenizer).",
                "Give one of them, for instance processor.tokenizer: {vocab_size: 4000}.",
            )
        if model.lora:
            self._check_lora(model.lora)
        if self.processor.tokenizer:
            # Recipes written before have a `type`, which could only be "wordpiece".
            self.check_keys("processor.tokenizer", self.processor.tokenizer, ("type", "vocab_size"))
            kind = self.processor.tokenizer.get("type", "wordpiece")
            if kind != "wordpiece":
                raise self.error(
                    f"The tokenizer type {kind!r} is not 'wordpiece'.", "Remove processor.tokenizer.type."
                )
            size = self.processor.tokenizer.get("vocab_size")
            if not isinstance(size, int) or isinstance(size, bool) or size < 100:
                raise self.error(
                    f"The value {size!r} of processor.tokenizer.vocab_size is not a whole number of at least 100."
                )
            self.processor.tokenizer = {"vocab_size": size}

    def _check_lora(self, lora: Mapping[str, Any]) -> None:
        self.check_keys("model.lora", lora, ("r", "alpha", "dropout", "targets"))
        if self.task != "linking":
            raise self.error(f"model.lora does not apply to the task {self.task!r}.", "Remove model.lora.")

        def is_number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        wanted = {
            "r": (
                lambda value: isinstance(value, int) and is_number(value) and value >= 1,
                "a whole number of at least 1",
            ),
            "alpha": (lambda value: is_number(value) and value > 0, "a number above 0"),
            "dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
            "targets": (
                lambda value: isinstance(value, list) and value and all(isinstance(end, str) and end for end in value),
                "a list of ends of names, such as [query, value]",
            ),
        }
        for key, value in lora.items():
            is_right, words = wanted[key]
            if not is_right(value):
                raise self.error(f"The value {value!r} of model.lora.{key} is not {words}.")

    def _check_adaptation(self, adaptation: AdaptationRecipe) -> None:
        if self.task != "adaptation":
            raise self.error(
                f"The section 'adaptation' does not apply to the task {self.task!r}.",
                "Remove the section, or set task: adaptation.",
            )
        for name, least in (("per_entity", 1), ("posts", 0), ("limit", 1), ("validation", 1), ("ranked", 2)):
            if getattr(adaptation, name) < least:
                raise self.error(f"adaptation.{name} is {getattr(adaptation, name)}, and must be at least {least}.")
        if not 0 <= adaptation.nil <= 0.5:
            raise self.error(f"adaptation.nil is {adaptation.nil}, and must be between 0 and 0.5.")

    def resolve_weights(self, reference: str) -> str:
        """Returns the Hub id or folder of pretrained weights.

        Args:
            reference (`str`): A Hub id or folder, returned unchanged, or `package:<Python package>/<path in it>`.

        Raises:
            MissingExtraError: the package is not installed.
            RecipeError: the package has no such folder.
        """
        try:
            return package_folder(reference)
        except MissingExtraError as error:
            raise error.changed(file=self.source) from error
        except UnknownModelError as error:
            raise self.error(error.message) from error


def shipped_recipes() -> list[str]:
    """Returns the names of the recipes that come with the package, sorted."""
    files = resources.files("hf_mel.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read_recipe(path_or_name: str | os.PathLike[str]) -> tuple[str, str]:
    """Returns the file name of a recipe, for errors, and its text."""
    path = Path(path_or_name)
    try:
        if path.is_file():
            return str(path), path.read_text(encoding="utf-8")
        name = _shipped_name(os.fspath(path_or_name))
        if name is not None:
            return f"{name}.yaml", (resources.files("hf_mel.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe is not readable ({error}).", file=path) from None
    raise RecipeError(
        "The recipe file does not exist.",
        file=path,
        remedy="Give the path of a YAML file, or the name of a recipe that comes with hf_mel: "
        f"{', '.join(shipped_recipes())}.",
    )


def _shipped_name(name: str) -> str | None:
    """Returns the name of a shipped recipe, or `None`. Accepts the old spelling of a name, with a warning."""
    shipped = shipped_recipes()
    if name in shipped:
        return name
    for current in shipped:
        if current.replace("-", "_") == name.replace("-", "_"):
            warnings.warn(
                f"The recipe {name!r} is now called {current!r}, and so is its run folder. The old name will stop "
                "working in the next release.",
                FutureWarning,
                stacklevel=4,
            )
            return current
    return None


def apply_override(content: dict[str, Any], override: str, file: str | None) -> None:
    """Sets one value in the content of a recipe.

    Args:
        content (`dict`): Content of a recipe. It is changed in place.
        override (`str`): `key=value`, as in [`Recipe.load`].
        file (`str`, *optional*): File name for errors.

    Raises:
        RecipeError: the override is not `key=value`, its value is not YAML, or its key leads through a plain value.
    """
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(
            f"The option --set {override!r} is not key=value.", file=file, remedy="Write for instance training.seed=1."
        )
    target = content
    *parents, last = key.split(".")
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise RecipeError(f"In --set {override!r}, {parent!r} is a value and has no keys.", file=file)
    if _is_text(key) and value not in ("", "~", "null") and value[0] + value[-1] not in ("''", '""'):
        target[last] = value  # in YAML, a folder `[a]` would be a list, and ` #1` at the end of its name a comment
        return
    try:
        target[last] = yaml.load(value, Loader=RecipeYamlLoader)
    except YAML_ERRORS as error:
        raise RecipeError(f"In --set {override!r}, the value is not valid YAML ({error}).", file=file) from None


def _is_text(key: str) -> bool:
    """Whether a key of a recipe, with dots between its levels, takes a text."""
    sections = {
        "": Recipe,
        "model": ModelRecipe,
        "data": DataRecipe,
        "candidates": CandidatesRecipe,
        "folds": FoldsRecipe,
        "adaptation": AdaptationRecipe,
    }
    section, _, name = key.rpartition(".")
    return section in sections and _field_types(sections[section]).get(name, "").startswith("str")


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "str | None": (str, type(None)),
    "bool": bool,
    "int": int,
    "list[str]": list,
    "float": (int, float),
    "dict[str, Any]": dict,
    "dict[str, Any] | None": (dict, type(None)),
}
_TYPE_NAMES: dict[type, str] = {
    dict: "a mapping",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


def _field_types(section: type) -> dict[str, str]:
    return {item.name: str(item.type) for item in fields(section)}


def _build_section(section: Any, content: Any, name: str, file: str | None) -> Any:
    """Builds a section's dataclass from its content, after a check of keys and types."""
    content = {} if content is None else content
    _check_type(content, dict, name, file)
    types = _field_types(section)
    _check_keys(content, types, name, file)
    values = {}
    for key, value in content.items():
        if value is None and types[key].startswith(("dict", "list")):
            continue  # An empty `config:` in the file.
        value = as_bool(value) if types[key] == "bool" else _read_words(value, types[key].startswith("dict"))
        _check_type(value, _TYPES[types[key]], f"{name}.{key}", file)
        values[key] = value
    return section(**values)


def _read_words(value: Any, as_booleans: bool) -> Any:
    """Replaces the unquoted words in a value and inside it by `True` and `False`, or else by plain strings.

    Nothing says the types of the values of a mapping such as `model.config`. There, the words are true or false, as they
    were when PyYAML decided.
    """
    if isinstance(value, dict):
        return {_read_words(key, False): _read_words(item, as_booleans) for key, item in value.items()}
    if isinstance(value, list):
        return [_read_words(item, as_booleans) for item in value]
    if not isinstance(value, _UnquotedWord):
        return value
    return as_bool(value) if as_booleans else str(value)


def _check_keys(keys: Iterable[str], allowed: Iterable[str], section: str, file: str | None) -> None:
    allowed = list(allowed)
    for key in keys:
        if key not in allowed:
            similar = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            remedy = f"Did you mean {similar[0]!r}?" if similar else f"Known keys: {', '.join(sorted(allowed))}."
            full_key = f"{section}.{key}" if section else str(key)
            raise RecipeError(f"The recipe has an unknown key {full_key!r}.", file=file, remedy=remedy)


def _check_type(value: Any, expected: type | tuple[type, ...], key: str, file: str | None) -> None:
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        expected_names = " or ".join(_TYPE_NAMES[kind] for kind in types)
        raise RecipeError(f"The value {value!r} of {key} is not {expected_names}.", file=file)
