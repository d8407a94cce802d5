"""Loading a retriever or a reranker and its processor from a folder or the Hub."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor

from hf_mel.errors import HubError, UnknownModelError
from hf_mel.files import package_folder
from hf_mel.hub_errors import check_repo_id, hub_errors
from hf_mel.inference.text_encoders import POOLING_FILE, is_text_encoder, load_text_encoder
from hf_mel.locks import LOADING
from hf_mel.protocols import MelProcessor, Reranker, Retriever

logger = logging.getLogger(__name__)

#: Limits for an untrusted config.json: bytes, nesting, numbers, layers.
_MAX_CONFIG_BYTES, _MAX_CONFIG_DEPTH, _MAX_CONFIG_NUMBER, _MAX_LAYERS = 8 << 20, 32, 1 << 40, 1024
#: The files of a model that are checked before transformers loads it.
_CHECKED_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    POOLING_FILE,
]

#: Errors of transformers for folders and repositories that hold no model, or a damaged one.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


def load_retriever(name: str | os.PathLike[str], **options: Any) -> tuple[Any, MelProcessor]:
    """Loads a retriever in float32 and evaluation mode, and its processor.

    Args:
        name (`str` or `os.PathLike`): A run folder, a model folder, or a model on the Hub.
        options: `revision`, `device`, `trust_remote_code` and `local_files_only`, as in [`load_linking_model`].

    Returns:
        The model ([`~hf_mel.protocols.Retriever`]) and its processor ([`~hf_mel.protocols.MelProcessor`]).

    Raises:
        [`~hf_mel.errors.UnknownModelError`]: As in [`load_linking_model`], or the model is a reranker.
    """
    model, processor = load_linking_model(name, **options)
    if isinstance(model, Reranker):
        raise UnknownModelError(
            f"{os.fspath(name)!r} reranks candidates and cannot retrieve entities.",
            remedy="Give a retriever here, and this model as the reranker.",
        )
    return model, processor


def load_reranker(name: str | os.PathLike[str], **options: Any) -> tuple[Any, MelProcessor]:
    """Loads a reranker in float32 and evaluation mode, and its processor.

    Args:
        name, options: As in [`load_retriever`].

    Returns:
        The model ([`~hf_mel.protocols.Reranker`]) and its processor ([`~hf_mel.protocols.MelProcessor`]).

    Raises:
        [`~hf_mel.errors.UnknownModelError`]: As in [`load_linking_model`], or the model is a retriever.
    """
    model, processor = load_linking_model(name, **options)
    if isinstance(model, Retriever):
        raise UnknownModelError(
            f"{os.fspath(name)!r} is a {type(model).__name__}, which retrieves entities and does not rerank candidates.",
            remedy="Give it as the model, not as the reranker.",
        )
    return model, processor


def load_linking_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> tuple[Any, MelProcessor]:
    """Loads a retriever or a reranker in float32 and evaluation mode, and its processor.

    A plain text encoder becomes a retriever that was not trained to link ([`~hf_mel.inference.text_encoders`]).

    Args:
        name (`str` or `os.PathLike`): A run folder, a model folder, a model on the Hub, or `package:<Python package>/<path
            in it>`.
        revision (`str`, *optional*): Branch, tag or commit, for a model on the Hub.
        device (`str` or `torch.device`, *optional*): Device of the model. Default: a GPU if there is one.
        trust_remote_code (`bool`): Whether to run code that comes with the model. The shipped methods need none.
        local_files_only (`bool`): Whether to use downloaded files only and not contact the Hub.

    Returns:
        The model ([`~hf_mel.protocols.Retriever`] or [`~hf_mel.protocols.Reranker`]) and its processor
        ([`~hf_mel.protocols.MelProcessor`]).

    Raises:
        [`~hf_mel.errors.UnknownModelError`]: The model does not exist or is not accessible (private, offline), its
            configuration is beyond the limits, its weights are not safetensors or incomplete, or it is neither a
            retriever nor a reranker.
    """
    name = os.fspath(name)
    given, name = name, package_folder(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder, weight_bytes = _check_files(name, revision, local_files_only)
    options: dict[str, Any] = {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "local_files_only": local_files_only,
    }
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if not trust_remote_code:
            with LOADING:
                _check_size(name, config, weight_bytes)
        # Other formats of weights are pickles, which run code when they are loaded.
        weights = {"dtype": torch.float32, "use_safetensors": True}
        if is_text_encoder(config):
            with LOADING:
                model, processor, report = load_text_encoder(name, folder, options, weights)
            model.config.name_or_path = given
            logger.info(
                "%s is a plain text encoder, which was not trained to link. The score is the cosine of the texts of mention "
                "and entity, and images are not read.",
                given,
            )
        else:
            with LOADING:
                model, report = AutoModel.from_pretrained(name, output_loading_info=True, **weights, **options)
            processor = AutoProcessor.from_pretrained(name, **options)
    except UnknownModelError:
        raise
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UnknownModelError(
            f"{name!r} cannot be loaded as a model ({reason[:300]}).",
            remedy="Give a run folder written by `hf-mel train`, or the id of a model on the Hub. A model whose code is "
            "not part of hf_mel needs trust_remote_code.",
        ) from error
    if report["missing_keys"]:  # transformers initialises them at random
        missing = sorted(report["missing_keys"])
        raise UnknownModelError(
            f"The weights of {name!r} lack {len(missing)} of the model's tensors, among them {', '.join(missing[:3])}.",
            remedy="Get the complete weights that belong to this configuration.",
        )
    try:
        model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        reason = str(error).strip().splitlines()[0]
        raise UnknownModelError(
            f"{name!r} cannot be moved to the device {device!r} ({reason}).", remedy="Use the device cpu."
        ) from error
    if not isinstance(model, Retriever | Reranker):
        raise UnknownModelError(
            f"{name!r} is a {type(model).__name__}, which is neither a retriever nor a reranker.",
            remedy="Give a run folder written by `hf-mel train`, an entity linking model on the Hub, or a text encoder "
            "such as sentence-transformers/all-MiniLM-L6-v2.",
        )
    argument = "pairs" if isinstance(model, Reranker) else "mentions"
    if argument not in inspect.signature(type(processor).__call__).parameters:
        raise UnknownModelError(
            f"{name!r} has no processor for mentions and entities, only a {type(processor).__name__}.",
            remedy="Save the model's processor in the same folder.",
        )
    return model, processor


def _check_files(name: str, revision: str | None, local_files_only: bool) -> tuple[Path, int]:
    """Checks the files of configuration and weights, and returns their folder and the size of the weights in bytes."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            check_repo_id(name)
            with hub_errors(name, revision):
                folder = Path(
                    huggingface_hub.snapshot_download(
                        name, revision=revision, allow_patterns=_CHECKED_FILES, local_files_only=local_files_only
                    )
                )
        except HubError as error:
            raise UnknownModelError(
                f"{name!r} cannot be loaded. It is not a local folder, and the Hub answers: {error.message}",
                remedy=f"Give a run folder that `hf-mel train` wrote. For a model on the Hub: {error.remedy or 'check its name.'}",
            ) from None
    elif revision is not None:
        raise UnknownModelError(
            f"{name!r} is a folder and has no revision {revision!r}.", remedy="Leave the revision out."
        )
    _check_config(folder / "config.json", name)
    weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not weights:
        raise UnknownModelError(
            f"{name!r} has no safetensors weights.",
            remedy="Give a run folder, a model folder, or a model on the Hub. Pickled weights are not loaded.",
        )
    return folder, sum(path.stat().st_size for path in weights)


def _check_config(path: Path, name: str) -> None:
    """Rejects a configuration that would exhaust memory or time, before a class is built from it."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UnknownModelError(
                f"The configuration of {name!r} has {path.stat().st_size:,} bytes, more than {_MAX_CONFIG_BYTES:,}."
            )
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnknownModelError(
            f"{name!r} cannot be loaded as a model (config.json: {type(error).__name__}: {str(error)[:200]}).",
            remedy="Give a run folder written by `hf-mel train`, or the id of a model on the Hub.",
        ) from error
    if not isinstance(config, dict):
        raise UnknownModelError(f"The configuration of {name!r} is not a JSON object.")
    for key, value, depth in _walk(config, "", 0):
        if depth > _MAX_CONFIG_DEPTH:
            raise UnknownModelError(f"The configuration of {name!r} is nested deeper than {_MAX_CONFIG_DEPTH} levels.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = _MAX_LAYERS if re.search(r"layers|depths?$|stages|blocks", key) else _MAX_CONFIG_NUMBER
            if value > limit:
                raise UnknownModelError(f"The configuration of {name!r} has {key} = {value:g}, more than {limit:,}.")


def _walk(value: Any, key: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Yields every value inside a JSON value with its key and depth, down to just below the maximal depth."""
    yield key, value, depth
    if depth <= _MAX_CONFIG_DEPTH:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from _walk(item, name, depth + 1)
        elif isinstance(value, list):
            for item in value:
                yield from _walk(item, key, depth + 1)


def _check_size(name: str, config: Any, weight_bytes: int) -> None:
    """Rejects a configuration with many more parameters than the files hold, which would be allocated at random."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > 4 * weight_bytes + (1 << 20):
        raise UnknownModelError(
            f"The weights of {name!r} lack most of the model: the configuration needs {parameters:,} parameters, and the "
            f"files have {weight_bytes:,} bytes.",
            remedy="Get the weights that belong to this configuration.",
        )
