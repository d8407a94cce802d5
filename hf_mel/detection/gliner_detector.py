"""A detector that runs a GLiNER model, which finds what its labels say in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_mel.detection.spans import MentionSpan, detect_in_windows
from hf_mel.errors import MissingExtraError, UnknownModelError
from hf_mel.locks import LOADING

#: Labels of most entities of a general knowledge base.
LABELS = ("person", "organization", "place", "event", "work of art", "product")
# GLiNER cuts texts after 384 words. So many characters usually hold fewer.
_WINDOW, _MARGIN = 1_000, 150


class GlinerDetector:
    """Returns the spans that a GLiNER model (Zaratiana et al. 2024) finds for labels in words.

    Args:
        model (`str`): Folder or Hub id of the model.
        labels (sequence of `str`, *optional*): What to find, in words: "ship", "football club". Default: [`LABELS`].
        threshold (`float`): Spans with a lower probability are left out.
        device (`str`, *optional*): Where to compute, for instance "cuda". Default: the processor.
        batch_size (`int`): Texts per forward pass.

    Raises:
        MissingExtraError: GLiNER is not installed.
        UnknownModelError: The model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        labels: Sequence[str] | None = None,
        threshold: float = 0.5,
        device: str | None = None,
        batch_size: int = 8,
    ):
        try:
            from gliner import GLiNER
        except ImportError as error:
            raise MissingExtraError(
                "The detector gliner needs the package gliner, which is not installed.",
                remedy='Run pip install "hf_mel[gliner]".',
            ) from error
        try:
            with LOADING:
                self._model: Any = GLiNER.from_pretrained(model, map_location=device or "cpu")
        except (OSError, ValueError) as error:
            raise UnknownModelError(
                f"{model} cannot be loaded as a GLiNER model: {error}", remedy="Give its folder or Hub id."
            ) from error
        self.model, self.threshold, self.batch_size = model, threshold, batch_size
        self.labels = list(LABELS if labels is None else labels)

    def describe(self) -> dict[str, Any]:
        """Returns what the spans depend on."""
        return {"detector": "gliner", "model": self.model, "labels": self.labels, "threshold": self.threshold}

    def __call__(self, texts: Sequence[str]) -> list[list[MentionSpan]]:
        """Returns the spans of each of T texts, with their probability as score."""
        return detect_in_windows(self._detect, texts, _WINDOW, _MARGIN)

    def _detect(self, texts: list[str]) -> Iterator[list[MentionSpan]]:
        read = [text for text in texts if text.strip()]
        results = iter(
            self._model.inference(read, self.labels, threshold=self.threshold, batch_size=self.batch_size)
            if read
            else ()
        )
        for text in texts:
            entities = next(results) if text.strip() else []
            yield [MentionSpan(e["start"], e["end"], e["label"], float(e["score"])) for e in entities]
