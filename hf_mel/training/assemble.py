"""hf_mel.training.assemble."""

from __future__ import annotations

import inspect
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

from hf_mel.protocols import Reranker, Retriever
from hf_mel.training.recipe import Recipe
from hf_mel.training.tokenizer import train_wordpiece


def build_model(recipe: Recipe, texts: Iterable[str] = ()) -> tuple[Any, Any]:
    """The recipe's model, its new parts untrained, and its processor.

    The classes are those that the Auto classes hold for the model type. With pretrained encoders, both classes offer
    `from_backbones(text=…, vision=…, **options)`; without, the model comes from its configuration alone and the
    processor class offers `from_parts(tokenizer, vision, **options)`.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): What to build.
        texts (iterable of `str`): What a new tokenizer is trained on, if the recipe asks for one.

    Returns:
        model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]) and processor
        ([`~hf_mel.protocols.MelProcessor`]).

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
