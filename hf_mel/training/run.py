"""From a recipe to a run folder, which is a model repository before it is uploaded."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)

from hf_mel.data.candidates import CandidateLists
from hf_mel.data.loading import dataset_version, load_entities, load_mentions
from hf_mel.data.posts import posts_as_mentions, posts_of
from hf_mel.errors import MissingExtraError, RecipeError
from hf_mel.evaluation.candidates import evaluate_candidates
from hf_mel.evaluation.full import evaluate_full
from hf_mel.evaluation.tables import write_results
from hf_mel.files import write_text
from hf_mel.hub.cards import model_card
from hf_mel.hub.saving import save_model_repository
from hf_mel.linking.candidates import check_source, default_cache, make_candidates
from hf_mel.linking.prototypes import Prototypes
from hf_mel.schema import NIL, Reranker, Retriever
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.plot import plot_training
from hf_mel.training.recipe import Recipe
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from hf_mel.training.trainer import MelTrainer

#: Where run folders go.
RUNS = Path("runs")
#: Written last: a run folder that has it is a finished run.
RESULTS = "results.json"
RECIPE = "recipe.yaml"
LOG = "training_log.json"
PLOT = "training.png"
CARD = "README.md"
CHECKPOINTS = "checkpoints"
#: Written last by the Trainer: a checkpoint without it was interrupted.
_CHECKPOINT_STATE = "trainer_state.json"


def run_recipe(recipe: Recipe, output: str | os.PathLike[str] | None = None, resume: bool = False) -> Path:
    """Trains what a recipe describes and writes the run folder.

    The folder holds weights, configuration, processor, the code that loads them without hf_mel, the model card, the
    recipe with all its defaults, the training log and its plot, and results.json, written last. While training runs,
    it holds the recipe and checkpoints only; they are removed at the end.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): What to train, on what, how.
        output (`str` or `os.PathLike`, *optional*): The run folder. Default: `runs/<name of the recipe>`.
        resume (`bool`, *optional*, defaults to `False`): Go on from the last checkpoint of an interrupted run; start if
            there is none; do nothing if the run is finished.

    Returns:
        `Path`: the run folder.

    Raises:
        RecipeError: the recipe cannot be used as written, or the folder holds another run.
        MelError: whatever the data set, the knowledge base or the model raise.
    """
    if recipe.task == "pretraining":
        from hf_mel.training.pretraining import run_pretraining  # which uses this module

        return run_pretraining(recipe, output, resume)
    folder = RUNS / recipe.name if output is None else Path(output)
    arguments = training_arguments(recipe, folder / CHECKPOINTS)
    checkpoint = _start(folder, recipe, resume)
    if (folder / RESULTS).exists():
        return folder
    _check_candidates(recipe)
    started = time.time()
    with _quiet():
        data = recipe.data
        train = load_mentions(data.dataset, data.train_split, data.revision, config=data.config)
        validation = load_mentions(data.dataset, data.validation_split, data.revision, config=data.config)
        entities = load_entities(data.dataset, revision=data.revision)
        set_seed(arguments.seed)
        model, processor = build_model(recipe, texts_of(train, entities))
        lists: dict[str, Any] = {}
        if isinstance(model, Reranker):
            lists = {
                "train_candidates": candidates_for(recipe, data.train_split, train, train, entities),
                "eval_candidates": candidates_for(recipe, data.validation_split, validation, train, entities),
            }
        elif recipe.candidates is not None:
            raise recipe.error(f"{type(model).__name__} ranks all entities; leave 'candidates' out.")
        prototypes = Prototypes.from_data(
            data.dataset, model, processor, revision=data.revision, config=data.config, train_split=data.train_split
        )
        if recipe.task == "knowledge":
            if prototypes is None:
                raise recipe.error(f"task: {type(model).__name__} does not know entities by posts.")
            model.to(arguments.device)
            prototypes.add(entities, progress=not arguments.disable_tqdm)
            train = posts_as_mentions(prototypes.support(entities))
        trainer = MelTrainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=validation,
            entities=entities,
            processing_class=processor,
            prototypes=prototypes,
            **lists,
        )
        main = trainer.is_world_process_zero()
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / RECIPE, [recipe.to_yaml()])
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if main:
            _finish(folder, recipe, trainer, train, validation, entities, started, resumed=checkpoint is not None)
        trainer.accelerator.wait_for_everyone()
    return folder


def training_arguments(recipe: Recipe, output_dir: str | os.PathLike[str]) -> MelTrainingArguments:
    """The recipe's training arguments, checked.

    Raises:
        RecipeError: an unknown argument, or a value that does not fit.
    """
    known = {item.name: item for item in dataclasses.fields(MelTrainingArguments) if item.init}
    known.pop("output_dir")
    recipe.check_keys("training", recipe.training, known)
    for key, value in recipe.training.items():
        default = known[key].default
        if isinstance(default, bool) != isinstance(value, bool) and isinstance(default, (bool, int, float)):
            raise recipe.error(
                f"training.{key}: {value!r} is not {'true or false' if isinstance(default, bool) else 'a number'}."
            )
        if isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            raise recipe.error(f"training.{key}: {value!r} is not a number.")
    options = {"disable_tqdm": False, "log_level": "error", **recipe.training}
    try:
        return MelTrainingArguments(output_dir=str(Path(output_dir).resolve()), **options)
    except (TypeError, ValueError, ImportError) as error:
        raise recipe.error(f"training: {error}") from error


def candidates_for(
    recipe: Recipe,
    split: str,
    mentions: datasets.Dataset,
    training: datasets.Dataset,
    entities: datasets.Dataset,
) -> CandidateLists:
    """The candidates that a recipe gives to the mentions of a split; made once, and kept for the next run.

    Raises:
        RecipeError: it does not say where they come from.
        DataFormatError: the file it names is not there, or lacks a mention.
        UnknownModelError: the retriever it names cannot be loaded.
    """
    wanted = recipe.candidates
    if wanted is None:
        raise recipe.error("a reranker needs candidates.", "For instance candidates: {source: name, k: 100}.")
    if wanted.source == "file":
        assert wanted.file is not None
        return CandidateLists.load(wanted.file.replace("{split}", split)).of(mentions).top(wanted.k)
    return make_candidates(
        wanted.source,
        mentions,
        entities,
        k=wanted.k,
        scorer=wanted.scorer,
        training=training,
        retriever=wanted.retriever,
        posts=lambda: posts_of(
            recipe.data.dataset,
            revision=recipe.data.revision,
            config=recipe.data.config,
            train_split=recipe.data.train_split,
        ),
        cache_dir=default_cache(),
        progress=True,
    )


def _check_candidates(recipe: Recipe) -> None:
    wanted = recipe.candidates
    if wanted is not None and wanted.source != "file":
        try:
            check_source(wanted.source, k=wanted.k, scorer=wanted.scorer, retriever=wanted.retriever)
        except RecipeError as error:
            raise recipe.error(f"candidates: {error.message}", error.remedy) from None


def build_model(recipe: Recipe, texts: Iterable[str] = ()) -> tuple[Any, Any]:
    """The recipe's model, its new parts untrained, and its processor.

    The classes are those that the Auto classes hold for the model type. With pretrained encoders, both classes offer
    `from_backbones(text=…, vision=…, **options)`; without, the model comes from its configuration alone and the
    processor class offers `from_parts(tokenizer, vision, **options)`.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): What to build.
        texts (iterable of `str`): What a new tokenizer is trained on, if the recipe asks for one.

    Returns:
        model ([`~hf_mel.schema.Retriever`] or [`~hf_mel.schema.Reranker`]) and processor
        ([`~hf_mel.schema.MelProcessor`]).

    Raises:
        RecipeError: an unknown model type or field, or settings the model does not take.
        MissingExtraError: a package with weights is not installed.
    """
    if recipe.model.from_pretrained:
        model, processor = _continued(recipe)
    else:
        model, processor = _new(recipe, texts)
    if not isinstance(model, Retriever | Reranker):
        raise recipe.error(
            f"{type(model).__name__} is neither a retriever (encode_mentions, encode_entities, score, unit_scores) nor a "
            "reranker (example_unit, pairs_are_independent).",
        )
    return model, processor


def _continued(recipe: Recipe) -> tuple[Any, Any]:
    name, trust = recipe.model.from_pretrained, recipe.model.trust_remote_code
    assert name is not None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        _check_config(recipe, type(config), recipe.model.config, "model.config")
        # Checkpoints in half precision load as such; training needs the full one.
        model, report = AutoModel.from_pretrained(
            name, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True, **recipe.model.config
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise recipe.error(f"model.from_pretrained: {name!r} cannot be loaded ({error}).") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        print(f"{name} has no weights for {len(report['missing_keys'])} tensors ({missing}, …): they start untrained.")
    return model, processor


def _new(recipe: Recipe, texts: Iterable[str]) -> tuple[Any, Any]:
    kind, fields = str(recipe.model.type), dict(recipe.model.config)
    config_class = _config_class(recipe, kind, "model.type")
    if config_class not in MODEL_MAPPING or config_class not in PROCESSOR_MAPPING:
        raise recipe.error(
            f"model.type: {kind!r} has no model and processor class that AutoModel and AutoProcessor know."
        )
    _check_config(recipe, config_class, fields, "model.config")
    model_class: Any = MODEL_MAPPING[config_class]
    processor_class: Any = PROCESSOR_MAPPING[config_class]
    recipe.check_keys("processor.options", recipe.processor.options, inspect.signature(processor_class).parameters)

    with tempfile.TemporaryDirectory() as scratch:
        references = {"text": recipe.model.text, "vision": recipe.model.vision}
        weights = {side: _weights(recipe, ref, Path(scratch, side)) for side, ref in references.items() if ref}
        return _assembled(recipe, weights, texts, model_class, processor_class)


def _weights(recipe: Recipe, reference: str, scratch: Path) -> str:
    """Hub id or folder of a pretrained encoder; `part:<name>:<model>` is taken out of its model, into `scratch`."""
    if not reference.startswith("part:"):
        return recipe.resolve_weights(reference)
    name, _, place = reference.removeprefix("part:").partition(":")
    try:
        model, processor = AutoModel.from_pretrained(place), AutoProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise recipe.error(f"{reference}: {place!r} cannot be loaded ({error}).") from error
    part = getattr(model, name, None)
    if not isinstance(part, PreTrainedModel):
        parts = [child for child, module in model.named_children() if isinstance(module, PreTrainedModel)]
        raise recipe.error(f"{reference}: the model has no part {name!r}; it has {', '.join(parts) or 'none'}.")
    part.save_pretrained(scratch)
    for component in ("tokenizer", "image_processor"):
        if getattr(processor, component, None) is not None:
            getattr(processor, component).save_pretrained(scratch)
    return str(scratch)


def _assembled(
    recipe: Recipe, weights: Mapping[str, str], texts: Iterable[str], model_class: Any, processor_class: Any
) -> tuple[Any, Any]:
    kind, fields, options = str(recipe.model.type), dict(recipe.model.config), recipe.processor.options
    vision = weights.get("vision") or recipe.processor.vision
    try:
        if "text" in weights and not recipe.processor.vision:
            processor = processor_class.from_backbones(**weights, **options)
        elif "text" in weights:
            tokenizer = AutoTokenizer.from_pretrained(weights["text"])
            processor = processor_class.from_parts(tokenizer, vision, **options)
        else:
            assert recipe.processor.tokenizer is not None
            tokenizer = train_wordpiece(texts, recipe.processor.tokenizer["vocab_size"])
            processor = processor_class.from_parts(tokenizer, vision, **options)
            if fields.get("text_config"):
                special = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
                fields["text_config"] = {**fields["text_config"], **special}
        if weights:
            return model_class.from_backbones(**weights, **fields), processor
        return AutoModel.from_config(AutoConfig.for_model(kind, **fields)), processor
    except AttributeError as error:
        raise recipe.error(f"model.type: {kind!r} cannot be built from a recipe ({error}).") from error
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise recipe.error(f"model: {error}") from error


def _config_class(recipe: Recipe, kind: str, where: str) -> Any:
    try:
        return CONFIG_MAPPING[kind]
    except KeyError:
        raise recipe.error(
            f"{where}: {kind!r} is not a model type that AutoConfig knows.", "Check the spelling of the method."
        ) from None


def _check_config(recipe: Recipe, config_class: Any, values: Mapping[str, Any], where: str) -> None:
    """Configurations take any keyword and keep it as an attribute; a misspelt field must not pass like that."""
    known = set(inspect.signature(config_class).parameters) | set(getattr(config_class, "attribute_map", {}))
    recipe.check_keys(where, values, known - {"kwargs"} | {"model_type"})
    for key, value in values.items():
        if isinstance(value, Mapping) and "model_type" in value:
            inner = _config_class(recipe, str(value["model_type"]), f"{where}.{key}.model_type")
            _check_config(recipe, inner, value, f"{where}.{key}")


def _start(folder: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Checks that the folder may be used; the checkpoint to go on from, if any."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / RECIPE).exists():
        raise RecipeError("is not empty, and holds no run.", file=folder, remedy="Give another --output.")
    finished, checkpoint = (folder / RESULTS).exists(), _last_checkpoint(folder / CHECKPOINTS)
    if not resume:
        if finished or checkpoint:
            raise RecipeError(
                f"holds {'a finished' if finished else 'an interrupted'} run.",
                file=folder,
                remedy=f"{'Keep' if finished else 'Continue'} it with --resume, remove the folder, or give another --output.",
            )
        return None
    try:
        before = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"cannot be read ({error}).", file=folder / RECIPE, remedy="Give another --output, or remove the folder."
        ) from error
    changed = sorted(_differences(before, recipe.to_dict()))
    if changed:
        raise RecipeError(
            f"was started with other values of {', '.join(changed)}.",
            file=folder / RECIPE,
            remedy="Resume with the same recipe, or give another --output.",
        )
    return checkpoint


def _differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() | after.keys():
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield key


def _last_checkpoint(folder: Path) -> Path | None:
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{_CHECKPOINT_STATE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _finish(
    folder: Path,
    recipe: Recipe,
    trainer: MelTrainer,
    train: datasets.Dataset,
    validation: datasets.Dataset,
    entities: datasets.Dataset,
    started: float,
    resumed: bool,
) -> None:
    """Everything that comes after training, on one process: evaluate, calibrate, write; results.json last."""
    model, processor = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processor
    version = dataset_version(recipe.data.dataset, revision=recipe.data.revision)
    batch_size = trainer.args.per_device_eval_batch_size
    evaluation: Any
    nil = None
    if trainer.reranks:
        assert trainer.eval_candidates is not None
        validation = trainer.eval_dataset  # all of it, or eval_mentions
        evaluation = evaluate_candidates(
            model,
            processor,
            validation,
            entities,
            trainer.eval_candidates,
            images=trainer.image_features,
            batch_size=batch_size,
            data_version=version,
        )
    else:
        evaluation = evaluate_full(
            model,
            processor,
            validation,
            entities,
            prototypes=trainer.prototypes,
            batch_size=batch_size,
            data_version=version,
        )
        nil = evaluation.calibrate_nil_threshold() if len(validation) and len(entities) > 1 else None
    # Made-up NIL cases are half of all by construction; where the data has none, they must not switch NIL on unasked.
    if nil is not None and not nil.simulated and hasattr(model.config, "nil_threshold"):
        model.config.nil_threshold = nil.threshold
    state, device = trainer.state, evaluation.setting["device"]
    results = {
        "recipe": recipe.name,
        "description": recipe.description,
        "license": recipe.license,
        "citation": recipe.citation,
        "model": {
            "type": model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "from_pretrained": recipe.model.from_pretrained,
            "text": recipe.model.text,
            "vision": recipe.model.vision,
            **({} if trainer.prototypes is None else {"posts": True}),
        },
        "data": {
            **version,
            "train_split": "posts" if recipe.task == "knowledge" else recipe.data.train_split,
            "train_mentions": len(train),
            "train_nil": list(train["entity_id"]).count(NIL),
            "validation_split": recipe.data.validation_split,
            "validation_mentions": len(validation),
            "entities": len(entities),
            **({"validation_mentions_of": trainer.eval_total} if trainer.reranks else {}),
        },
        "candidates": None if recipe.candidates is None else dataclasses.asdict(recipe.candidates),
        "validation": evaluation.to_dict(),
        "nil": None if nil is None else dataclasses.asdict(nil),
        "best": _best(state),
        "training": recipe.training,
        "seed": trainer.args.seed,
        "run": {
            "seconds": round(time.time() - started, 1),
            "resumed": resumed,
            "device": f"{os.cpu_count()} CPU cores" if device == "cpu" else f"{trainer.args.world_size} × {device}",
        },
        "versions": evaluation.setting["software"],
    }
    save_model_repository(model, processor, folder)
    write_results(state.log_history, folder / LOG)
    try:
        plot_training(state.log_history, folder / PLOT, title=recipe.name)
    except MissingExtraError as error:
        print(f"No {PLOT}: {error}")
    write_text(folder / CARD, [model_card(results)])
    write_results(results, folder / RESULTS)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _best(state: transformers.TrainerState) -> dict[str, float] | None:
    """Step and epoch of the best evaluation."""
    for entry in state.log_history:
        if entry["step"] == state.best_global_step and "eval_mrr" in entry:
            return {"step": entry["step"], "epoch": entry["epoch"]}
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports every freshly started weight and every file it reads; a user waits for numbers."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
