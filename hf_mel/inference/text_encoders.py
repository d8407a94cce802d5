"""Plain text encoders as retrievers: a mention and an entity are compared by the cosine of their pooled texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_MAPPING, PROCESSOR_MAPPING, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_mel.errors import UnknownModelError
from hf_mel.protocols import MelProcessor, WrapsTextEncoders

#: The file in which sentence-transformers keeps how an encoder pools its tokens.
POOLING_FILE = "1_Pooling/config.json"


def is_text_encoder(config: Any) -> bool:
    """Returns whether a configuration of transformers is that of a plain text encoder, such as BERT."""
    is_masked_lm = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return is_masked_lm and not getattr(config, "is_encoder_decoder", False)


def load_text_encoder(
    name: str, folder: Path, options: Mapping[str, Any], weights: Mapping[str, Any]
) -> tuple[Any, MelProcessor, dict[str, Any]]:
    """Loads a text encoder, and makes a retriever of it that was not trained to link.

    The class of the retriever is the first of those registered with `AutoModel` that [`WrapsTextEncoders`].

    Args:
        name (`str`): Folder or Hub id of the encoder.
        folder (`Path`): The folder of its files.
        options, weights (mapping): Arguments of `from_pretrained`, and further ones for weights.

    Returns:
        The retriever, its processor, and the loading report of transformers, with `missing_keys` that the retriever needs.

    Raises:
        UnknownModelError: The encoder has no tokenizer.
    """
    registered: dict[Any, Any] = MODEL_MAPPING._extra_content  # the classes that transformers does not ship
    config_class, model_class = next(
        (config_class, model_class)
        for config_class, model_class in registered.items()
        if isinstance(model_class, WrapsTextEncoders)
    )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would report a missing pooling layer, which nothing uses
    try:
        encoder, report = AutoModel.from_pretrained(name, output_loading_info=True, **weights, **options)
    finally:
        transformers.logging.set_verbosity(verbosity)
    model = model_class.from_text_encoder(encoder, _pooling(folder))
    model.config._commit_hash = getattr(encoder.config, "_commit_hash", None)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) < encoder.config.vocab_size / 2:  # without files, transformers makes a tokenizer without words
        raise UnknownModelError(
            f"{name!r} has no tokenizer.", remedy="Save the encoder's tokenizer in the same folder."
        )
    processor_class: Any = PROCESSOR_MAPPING[config_class]
    processor = processor_class.from_text_encoder(tokenizer)
    used = {key.partition(".")[2] for key in model.state_dict()}
    return model, processor, {**report, "missing_keys": used & set(report["missing_keys"])}


def _pooling(folder: Path) -> str:
    """Returns how the encoder was trained to pool its tokens, "mean" if its folder does not say."""
    try:
        settings = json.loads((folder / POOLING_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return "mean"
    return "cls" if isinstance(settings, dict) and settings.get("pooling_mode_cls_token") else "mean"
