"""Loading a retriever or a reranker and its processor from a folder or the Hub."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor

import hf_mel.auto  # noqa: F401 (registers the shipped methods)
from hf_mel.errors import UnknownModelError
from hf_mel.schema import MelProcessor, Reranker, Retriever

#: What transformers raises for folders and repositories that are not a model, or a damaged one.
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


def load_retriever(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, MelProcessor]:
    """A retriever in float32 and evaluation mode, and its processor.

    Args:
        name (`str` or `os.PathLike`): A run folder, a model folder, or a model on the Hub.
        revision (`str`, *optional*): Branch, tag or commit, for a model on the Hub.
        device (`str` or `torch.device`, *optional*): Where the model goes. Default: a GPU if there is one.
        trust_remote_code (`bool`): Whether to run code that comes with the model; the shipped methods need none.

    Returns:
        model ([`~hf_mel.schema.Retriever`]) and processor ([`~hf_mel.schema.MelProcessor`]).

    Raises:
        [`~hf_mel.errors.UnknownModelError`]: no such model, weights that lack a part, or not a retriever.
    """
    model, processor = load_linking_model(name, revision=revision, device=device, trust_remote_code=trust_remote_code)
    if isinstance(model, Reranker):
        raise UnknownModelError(
            f"{os.fspath(name)!r} reranks candidates, it does not find them.",
            remedy="Give a retriever here, and this one as the reranker.",
        )
    return model, processor


def load_reranker(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, MelProcessor]:
    """A reranker in float32 and evaluation mode, and its processor. Args and errors as in [`load_retriever`].

    Returns:
        model ([`~hf_mel.schema.Reranker`]) and processor ([`~hf_mel.schema.MelProcessor`]).
    """
    model, processor = load_linking_model(name, revision=revision, device=device, trust_remote_code=trust_remote_code)
    if isinstance(model, Retriever):
        raise UnknownModelError(
            f"{os.fspath(name)!r} is a {type(model).__name__}, which finds entities and does not rerank candidates.",
            remedy="Give it as the model, not as the reranker.",
        )
    return model, processor


def load_linking_model(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, MelProcessor]:
    """A retriever or a reranker, whichever it is. Args and errors as in [`load_retriever`]."""
    name = os.fspath(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
        processor = AutoProcessor.from_pretrained(name, **options)
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UnknownModelError(
            f"{name!r} cannot be loaded as a model ({reason[:300]}).",
            remedy="Give a run folder written by `hf-mel train`, or the id of a model on the Hub; one whose code is "
            "not part of hf_mel needs trust_remote_code.",
        ) from error
    if report["missing_keys"]:  # transformers would go on with random values in their place
        missing = sorted(report["missing_keys"])
        raise UnknownModelError(
            f"{name!r}: the weights lack {len(missing)} of the model's tensors, among them {', '.join(missing[:3])}.",
            remedy="The file is incomplete, or belongs to another configuration.",
        )
    try:
        model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).strip().splitlines()[0]
        raise UnknownModelError(
            f"{name!r} cannot go to the device {device!r} ({reason}).", remedy="Try cpu."
        ) from error
    if not isinstance(model, Retriever | Reranker):
        raise UnknownModelError(f"{name!r} is a {type(model).__name__}, which does not encode and score entities.")
    wanted = "pairs" if isinstance(model, Reranker) else "mentions"
    if wanted not in inspect.signature(type(processor).__call__).parameters:
        raise UnknownModelError(
            f"{name!r} has no processor for mentions and entities, only a {type(processor).__name__}.",
            remedy="Save the model's processor into the same folder.",
        )
    return model, processor
