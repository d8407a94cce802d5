"""Detectors by name, as the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_mel.detection.gazetteer import Gazetteer, NamedEntities
from hf_mel.detection.gliner_detector import GlinerDetector
from hf_mel.detection.spacy_detector import SpacyDetector
from hf_mel.detection.spans import MentionDetector
from hf_mel.detection.token_classifier import TokenClassifier
from hf_mel.errors import UnknownModelError

#: Detectors that run a model: kind → what its model is.
_EXAMPLES = {
    "spacy": "spacy:en_core_web_sm",
    "transformers": "transformers:dslim/bert-base-NER",
    "gliner": "gliner:urchade/gliner_small-v2.1",
}


def open_detector(
    name: str,
    *,
    kb: NamedEntities | None = None,
    labels: Sequence[str] | None = None,
    device: str | None = None,
    **options: Any,
) -> MentionDetector:
    """Opens a detector.

    Args:
        name (`str`): "gazetteer", "spacy:PIPELINE", "transformers:MODEL" or "gliner:MODEL".
        kb ([`~hf_mel.KnowledgeBase`], *optional*): The knowledge base whose names the gazetteer finds.
        labels (sequence of `str`, *optional*): What to find, in the words of the detector. A gazetteer has no labels.
        device (`str`, *optional*): Where a model computes.
        options: Arguments of [`~hf_mel.detection.gazetteer.Gazetteer`].

    Raises:
        UnknownModelError: There is no such detector, or its model cannot be loaded.
        MissingExtraError: Its package is not installed.
    """
    kind, _, model = name.partition(":")
    if kind == "gazetteer" and not model:
        if labels is not None:
            raise UnknownModelError(
                "A gazetteer has no labels.",
                remedy=f"Leave them out, or choose another detector: {_EXAMPLES['gliner']}.",
            )
        if kb is None:
            raise UnknownModelError("A gazetteer needs a knowledge base.", remedy="Give one as kb=.")
        return Gazetteer.from_kb(kb, **options)
    if options:
        raise UnknownModelError(
            f"The detector {kind} has no {', '.join(options)}.", remedy="Leave it out, or choose the gazetteer."
        )
    if kind not in _EXAMPLES:
        raise UnknownModelError(
            f"There is no detector {name!r}.",
            remedy=f"Choose gazetteer, or for instance {', '.join(_EXAMPLES.values())}.",
        )
    if not model:
        raise UnknownModelError(f"The detector {kind} needs a model.", remedy=f"Give it: {_EXAMPLES[kind]}.")
    if kind == "spacy":
        return SpacyDetector(model, labels=labels)
    if kind == "transformers":
        return TokenClassifier(model, labels=labels, device=device)
    return GlinerDetector(model, labels=labels, device=device)
