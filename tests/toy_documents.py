"""Toy documents of textual and visual mentions, and a pair processor that reads whole documents and candidate priors."""

from __future__ import annotations

import datasets

from hf_mel.schema import mention_features
from tests.toy import ToyPairProcessor, ToyReranker, toy_mentions, toy_reranker


class ToyDocumentProcessor(ToyPairProcessor):
    """[`~tests.toy.ToyPairProcessor`] whose `pair_context` is the document. A candidate's prior is added to the colour of
    its image."""

    def _colour(self, row, column):
        return super()._colour(row, column) + row.get("prior", 0.0)

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        batch = super().__call__(pairs=pairs)
        names = [mention.get("document_id") or mention["context_id"] for mention, _ in pairs]
        batch["pair_context"] = batch["pair_context"].new_tensor([names.index(name) for name in names])
        return batch


def toy_document_reranker(**config) -> ToyReranker:
    """Returns a reranker whose scores depend on all mentions of a document and their candidates."""
    return toy_reranker(unit="document", independent=False, **config)


def toy_documents(count: int = 12, size: int = 4, nil_every: int = 0) -> datasets.Dataset:
    """Returns [`~tests.toy.toy_mentions`] as documents of `size` mentions, the last of which is visual.

    Documents are not contiguous. Mention i belongs to document i modulo the number of documents.
    """
    rows = toy_mentions(count, nil_every=nil_every).to_list()
    documents = -(-count // size)
    pictures = toy_mentions(count + 3)["image"]
    for i, row in enumerate(rows):
        row |= {"document_id": f"d{i % documents}", "modality": "text"}
        if i // documents == size - 1:
            picture = pictures[i - i % 3 + 1]
            row |= {"modality": "image", "text": "", "mention": "", "start": -1, "end": -1, "image": picture}
    features = mention_features(
        stratum=datasets.Value("string"), document_id=datasets.Value("string"), modality=datasets.Value("string")
    )
    return datasets.Dataset.from_list(rows, features=features)
