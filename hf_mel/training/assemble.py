"""Builds the model and the processor that a recipe describes."""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
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
)

from hf_mel.locks import LOADING
from hf_mel.protocols import Reranker, Retriever
from hf_mel.training.lora import add_lora
from hf_mel.training.recipe import Recipe
from hf_mel.training.tokenizer import train_wordpiece

logger = logging.getLogger(__name__)


def build_model(recipe: Recipe, texts: Iterable[str] = ()) -> tuple[Any, Any]:
    """Builds the model of a recipe, with new parts untrained and LoRA if it asks for it, and its processor.

    The classes are those that the Auto classes map the model type to. To use pretrained encoders, both classes need
    `from_backbones(text=…, vision=…, **options)`. Without them, the model is built from its configuration alone, and the
    processor class needs `from_parts(tokenizer, vision, **options)`.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        texts (iterable of `str`): Texts to train a tokenizer on, if the recipe asks for one.

    Returns:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]) and processor
        ([`~hf_mel.protocols.MelProcessor`]).

    Raises:
        RecipeError: the model type or a field is unknown, or the model rejects the settings.
        MissingExtraError: a package with weights is not installed.
    """
    with LOADING:
        if recipe.model.from_pretrained:
            model, processor = _load_pretrained(recipe)
        else:
            model, processor = _build_new(recipe, texts)
    if not isinstance(model, Retriever | Reranker):
        raise recipe.error(
            f"{type(model).__name__} is neither a retriever (encode_mentions, encode_entities, score, unit_scores) nor a "
            "reranker (example_unit, pairs_are_independent)."
        )
    if recipe.model.lora:
        add_lora(model, recipe)
    return model, processor


def _load_pretrained(recipe: Recipe) -> tuple[Any, Any]:
    name, trust = recipe.model.from_pretrained, recipe.model.trust_remote_code
    assert name is not None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        _check_config(recipe, type(config), recipe.model.config, "model.config")
        # A checkpoint in half precision would keep its dtype, but training needs full precision.
        model, report = AutoModel.from_pretrained(
            name, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True, **recipe.model.config
        )
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise recipe.error(f"The model {name!r} (model.from_pretrained) does not load ({error}).") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        logger.warning(
            "%s has no weights for %d tensors (%s, …). They start untrained.",
            name,
            len(missing),
            ", ".join(missing[:3]),
        )
    return model, processor


def check_fields(recipe: Recipe) -> tuple[Any, Any]:
    """Returns the model and processor classes of a new model, after a check of the fields that its recipe names.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): A recipe with `model.type`.

    Raises:
        RecipeError: the model type or a field is unknown.
    """
    kind, fields = str(recipe.model.type), dict(recipe.model.config)
    config_class = _config_class(recipe, kind, "model.type")
    if config_class not in MODEL_MAPPING or config_class not in PROCESSOR_MAPPING:
        raise recipe.error(
            f"The model type {kind!r} (model.type) has no model and processor class registered with AutoModel and "
            "AutoProcessor."
        )
    _check_config(recipe, config_class, fields, "model.config")
    model_class: Any = MODEL_MAPPING[config_class]
    processor_class: Any = PROCESSOR_MAPPING[config_class]
    recipe.check_keys("processor.options", recipe.processor.options, inspect.signature(processor_class).parameters)
    return model_class, processor_class


def _build_new(recipe: Recipe, texts: Iterable[str]) -> tuple[Any, Any]:
    model_class, processor_class = check_fields(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        references = {"text": recipe.model.text, "vision": recipe.model.vision}
        weights = {side: _resolve_encoder(recipe, ref, Path(scratch, side)) for side, ref in references.items() if ref}
        return _build_from_parts(recipe, weights, texts, model_class, processor_class)


def _resolve_encoder(recipe: Recipe, reference: str, scratch: Path) -> str:
    """Returns the Hub id or folder of a pretrained encoder. Saves `part:<name>:<model>` to the folder `scratch`."""
    if not reference.startswith("part:"):
        return recipe.resolve_weights(reference)
    name, _, source = reference.removeprefix("part:").partition(":")
    try:
        model, processor = AutoModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise recipe.error(f"The model {source!r} (needed for {reference}) does not load ({error}).") from error
    part = getattr(model, name, None)
    if not isinstance(part, PreTrainedModel):
        parts = [child for child, module in model.named_children() if isinstance(module, PreTrainedModel)]
        raise recipe.error(f"The model {source!r} has no part {name!r}; it has {', '.join(parts) or 'none'}.")
    part.save_pretrained(scratch)
    for component in ("tokenizer", "image_processor"):
        if getattr(processor, component, None) is not None:
            getattr(processor, component).save_pretrained(scratch)
    return str(scratch)


def _build_from_parts(
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
        raise recipe.error(f"The model type {kind!r} does not support recipes ({error}).") from error
    except (OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise recipe.error(f"The section 'model' does not fit the method: {error}") from error


def _config_class(recipe: Recipe, kind: str, key: str) -> Any:
    try:
        return CONFIG_MAPPING[kind]
    except KeyError:
        raise recipe.error(
            f"The model type {kind!r} ({key}) is not registered with AutoConfig.", "Check the spelling of the method."
        ) from None


def _check_config(recipe: Recipe, config_class: Any, values: Mapping[str, Any], section: str) -> None:
    """Checks the fields of a configuration. Its class would accept any keyword and keep it as an attribute."""
    fields = set(inspect.signature(config_class).parameters) | set(getattr(config_class, "attribute_map", {}))
    recipe.check_keys(section, values, fields - {"kwargs"} | {"model_type"})
    for key, value in values.items():
        if isinstance(value, Mapping) and "model_type" in value:
            inner = _config_class(recipe, str(value["model_type"]), f"{section}.{key}.model_type")
            _check_config(recipe, inner, value, f"{section}.{key}")
