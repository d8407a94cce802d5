"""A detector that runs a token-classification model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_mel.detection.spans import MentionSpan
from hf_mel.errors import UnknownModelError
from hf_mel.locks import LOADING


class TokenClassifier:
    """Returns the entities of any token-classification model. Long texts are read in overlapping parts.

    Args:
        model (`str`): Folder or Hub id of the model. Its tokenizer must be a fast one.
        labels (sequence of `str`, *optional*): The labels to return, without "B-" and "I-". Default: all.
        device (`str`, *optional*): Where to compute, for instance "cuda". Default: the processor.
        batch_size (`int`): Texts per forward pass.

    Raises:
        UnknownModelError: The model cannot be loaded, or classifies no tokens.
    """

    def __init__(
        self, model: str, *, labels: Sequence[str] | None = None, device: str | None = None, batch_size: int = 16
    ):
        from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, pipeline

        try:
            config = AutoConfig.from_pretrained(model)
            architectures = getattr(config, "architectures", None) or []
            if not any(name.endswith("ForTokenClassification") for name in architectures):
                # transformers would add a layer with random weights, which finds random words.
                raise ValueError(f"its architecture is {', '.join(architectures) or 'unknown'}")
            tokenizer = AutoTokenizer.from_pretrained(model)
            if not tokenizer.is_fast:
                raise ValueError("its tokenizer is no fast one, which gives the places of tokens")
            with LOADING:
                network = AutoModelForTokenClassification.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise UnknownModelError(
                f"{model} cannot be used as a token classifier: {error}",
                remedy="Give the folder or Hub id of a token-classification model.",
            ) from error
        limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
        # RoBERTa and its kin need two positions more than they have tokens.
        tokenizer.model_max_length = limit - 2
        self._pipeline: Any = pipeline(
            "token-classification",
            model=network,
            tokenizer=tokenizer,
            aggregation_strategy="first",  # a word has one label, that of its first token
            stride=limit // 4,
            device=device or "cpu",
            batch_size=batch_size,
        )
        self.model, self.labels = model, None if labels is None else frozenset(labels)
        self._commit = getattr(config, "_commit_hash", None)

    def describe(self) -> dict[str, Any]:
        """Returns what the spans depend on."""
        labels = None if self.labels is None else sorted(self.labels)
        return {"detector": "transformers", "model": self.model, "commit": self._commit, "labels": labels}

    def __call__(self, texts: Sequence[str]) -> list[list[MentionSpan]]:
        """Returns the spans of each of T texts, with the mean probability of their tokens as score."""
        read = [number for number, text in enumerate(texts) if text.strip()]
        spans: list[list[MentionSpan]] = [[] for _ in texts]
        results = self._pipeline([texts[number] for number in read]) if read else []
        for number, entities in zip(read, results, strict=True):
            spans[number] = [
                MentionSpan(entity["start"], entity["end"], entity["entity_group"], float(entity["score"]))
                for entity in entities
                if (self.labels is None or entity["entity_group"] in self.labels)
                and texts[number][entity["start"] : entity["end"]].strip()
            ]
        return spans
