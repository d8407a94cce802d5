"""A detector that runs a spaCy pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_mel.detection.spans import MentionSpan, detect_in_windows
from hf_mel.errors import MissingExtraError, UnknownModelError

#: Labels of spaCy's pipelines that name no entity.
NUMBERS = frozenset({"CARDINAL", "DATE", "MONEY", "ORDINAL", "PERCENT", "QUANTITY", "TIME"})
# Components that named entities do not need.
_UNUSED = ("tagger", "parser", "attribute_ruler", "lemmatizer", "morphologizer", "senter")
# spaCy refuses texts of a million characters, because the memory that it needs grows with them.
_WINDOW, _MARGIN = 100_000, 1_000


class SpacyDetector:
    """Returns the named entities (`doc.ents`) of a spaCy pipeline, without numbers and dates.

    Args:
        pipeline (`str`): Name of an installed pipeline, such as "en_core_web_sm", or its folder.
        labels (sequence of `str`, *optional*): The labels to return. Default: all but [`NUMBERS`].

    Raises:
        MissingExtraError: spaCy is not installed.
        UnknownModelError: The pipeline is not installed, or finds no named entities.
    """

    def __init__(self, pipeline: str, *, labels: Sequence[str] | None = None):
        try:
            import spacy
        except ImportError as error:
            raise MissingExtraError(
                "The detector spacy needs spaCy, which is not installed.", remedy='Run pip install "hf_mel[spacy]".'
            ) from error
        try:
            self._nlp: Any = spacy.load(pipeline, exclude=_UNUSED)
        except (OSError, ValueError) as error:
            raise UnknownModelError(
                f"The spaCy pipeline {pipeline!r} cannot be loaded: {error}",
                remedy=f"Install it, for instance with: python -m spacy download {pipeline}",
            ) from error
        if not any("doc.ents" in self._nlp.get_pipe_meta(name).assigns for name in self._nlp.pipe_names):
            raise UnknownModelError(
                f"The spaCy pipeline {pipeline!r} has no component that finds named entities.",
                remedy="Choose a pipeline with the component ner or entity_ruler.",
            )
        self.pipeline, self.labels = pipeline, None if labels is None else frozenset(labels)

    def describe(self) -> dict[str, Any]:
        """Returns what the spans depend on."""
        labels = None if self.labels is None else sorted(self.labels)
        return {"detector": "spacy", "pipeline": self.pipeline, "version": self._nlp.meta["version"], "labels": labels}

    def __call__(self, texts: Sequence[str]) -> list[list[MentionSpan]]:
        """Returns the spans of each of T texts, without scores, which spaCy does not give."""
        return detect_in_windows(self._detect, texts, _WINDOW, _MARGIN)

    def _detect(self, texts: list[str]) -> Iterator[list[MentionSpan]]:
        for doc in self._nlp.pipe(texts, batch_size=64):
            yield [
                MentionSpan(entity.start_char, entity.end_char, entity.label_)
                for entity in doc.ents
                if (entity.label_ not in NUMBERS if self.labels is None else entity.label_ in self.labels)
                and entity.text.strip()
            ]
