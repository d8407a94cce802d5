"""Finding the mentions of a text, before they are linked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_mel.lazy import lazy_exports

if TYPE_CHECKING:
    from hf_mel.detection.detectors import open_detector as open_detector
    from hf_mel.detection.gazetteer import Gazetteer as Gazetteer
    from hf_mel.detection.gliner_detector import GlinerDetector as GlinerDetector
    from hf_mel.detection.spacy_detector import SpacyDetector as SpacyDetector
    from hf_mel.detection.spans import MentionDetector as MentionDetector
    from hf_mel.detection.spans import MentionSpan as MentionSpan
    from hf_mel.detection.spans import resolve_overlaps as resolve_overlaps
    from hf_mel.detection.token_classifier import TokenClassifier as TokenClassifier

#: Public name → its module, imported on first use of the name, because some import torch.
_EXPORTS = {
    "Gazetteer": "hf_mel.detection.gazetteer",
    "GlinerDetector": "hf_mel.detection.gliner_detector",
    "MentionDetector": "hf_mel.detection.spans",
    "MentionSpan": "hf_mel.detection.spans",
    "SpacyDetector": "hf_mel.detection.spacy_detector",
    "TokenClassifier": "hf_mel.detection.token_classifier",
    "open_detector": "hf_mel.detection.detectors",
    "resolve_overlaps": "hf_mel.detection.spans",
}

__all__ = [*_EXPORTS]

__getattr__ = lazy_exports(__name__, _EXPORTS)
