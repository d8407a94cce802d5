"""Exact ranking of a knowledge base in few bits, of which only the tokens of few entities are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.sources import stored_kb
from hf_mel.inference import ranking
from hf_mel.inference.encodings import slice_encodings
from hf_mel.inference.entity_sources import ChosenEntities, EncodedEntities, EntityPart
from hf_mel.inference.ranking import rank
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.indexes.base import ExactIndex
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.modeling.mimic import scoring_mimic
from tests.modeling.test_mimic import batch_for, build, texts

MODELS = {
    "text": {"units": ["text"], "vision_config": None, "mask_padding": True},
    "text with padding": {"units": ["text"], "vision_config": None},
    "three units": {"mask_padding": True},
    "missing images and NIL": {"mask_padding": True, "missing_images": "absent", "nil_score": True},
}
MENTIONS, ENTITIES = 9, 90


def encoded(name: str, seed: int = 0):
    """A model, encodings of mentions and of entities: those of a batch with the texts of a trained model. Some entities are equal."""
    model = build(seed, **MODELS[name])
    generator = torch.Generator().manual_seed(seed)
    batch = batch_for(model, mentions=MENTIONS, entities=ENTITIES)
    if model.config.missing_images == "absent":
        batch |= {"mention_image_mask": torch.arange(MENTIONS) % 3 != 1}
        batch |= {"entity_image_mask": torch.arange(ENTITIES) % 4 != 2}
        batch |= {"mention_text_mask": torch.arange(MENTIONS) != 3}
    sides = []
    for side, count in (("mention", MENTIONS), ("entity", ENTITIES)):
        with torch.no_grad():
            encode = getattr(model, f"encode_{'mentions' if side == 'mention' else 'entities'}")
            encodings = dict(encode(**{k: v for k, v in batch.items() if k.startswith(side)}))
        sides.append(encodings | texts(model, count, side, generator, spread=0.2, aligned=1.0))
    mentions, entities = sides
    entities["text_query_global"][::7] = mentions["text_values"].mean(1)[0] * 3
    entities = {name: torch.cat([tensor[:80], tensor[:10]]) for name, tensor in entities.items()}
    return model, mentions, entities


@pytest.fixture(params=MODELS)
def world(request):
    return encoded(request.param)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small chunks, and bounds that are always tried."""
    monkeypatch.setattr(ranking, "_CHUNK_ROWS", 16)
    monkeypatch.setattr(scoring_mimic, "_DENSE", 1.0)


@pytest.fixture
def token_rows(monkeypatch) -> list[int]:
    """The rows of the tokens that are read."""
    read: list[int] = []
    gather = KnowledgeBase._gather

    def watched(kb, physical, names=None):
        if names is None or "text_queries" in names:
            read.extend(physical.tolist())
        return gather(kb, physical, names)

    monkeypatch.setattr(KnowledgeBase, "_gather", watched)
    return read


def in_memory(kb: KnowledgeBase) -> EncodedEntities:
    return EncodedEntities(kb.entity_ids, kb.encodings(range(len(kb))))


def assert_same(result, expected, exactly: bool = True) -> None:
    for name in ("top_scores", "gold_score"):
        first, second = getattr(result, name), getattr(expected, name)
        if first is not None:
            limits = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(first, second, equal_nan=True, **limits)
    if exactly:
        for name in ("top_rows", "best_rank", "worst_rank"):
            first, second = getattr(result, name), getattr(expected, name)
            assert (first is None and second is None) or torch.equal(first, second)


def options_of(kb: KnowledgeBase) -> Iterator[dict]:
    """Options of a ranking: with golds, with scores of names that are added, with chosen pairs, with a floor."""
    generator = np.random.default_rng(0)
    golds = generator.integers(-1, len(kb), MENTIONS)
    added = SparseScores.of_mentions(
        [(np.array([2, 40, 71]), generator.uniform(-3, 3, 3).astype(np.float32)) for _ in range(MENTIONS)]
    )
    added.of_entities = generator.uniform(0, 2, len(kb)).astype(np.float32)
    yield {}
    yield {"gold_rows": golds}
    yield {"gold_rows": golds, "added": added, "top_k": 1}
    yield {"among": torch.from_numpy(generator.random((MENTIONS, len(kb))) < 0.3), "top_k": 3}
    yield {"floor": 0.0, "top_k": 5}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("pairs", [16, 2**19], ids=["one by one", "together"])
def test_ranking_gives_what_it_gives_when_all_is_read(world, dtype, pairs, monkeypatch):
    monkeypatch.setitem(ranking._BLOCK_PAIRS, "cpu", pairs)
    model, mentions, entities = world
    kb = stored_kb(model, entities, dtype)
    kb.remove(kb.entity_ids[3:6])
    whole = in_memory(kb)
    assert kb.converts
    assert not whole.converts
    for options in options_of(kb):
        result = rank(model, mentions, kb, **options)
        assert_same(result, rank(model, mentions, whole, **options))
        if "floor" not in options:  # below which any order will do
            assert_same(result, rank(model, mentions, whole, prune=False, **options), exactly=False)
        for number in range(MENTIONS if "gold_rows" not in options and "among" not in options else 0):
            alone = rank(model, slice_encodings(mentions, slice(number, number + 1)), kb, **options)
            if "floor" not in options:
                torch.testing.assert_close(alone.top_scores[0], result.top_scores[number], rtol=1e-5, atol=1e-5)
    rows = np.arange(1, len(kb), 3)
    found = ExactIndex(kb, model).find(mentions, 4, rows=rows)
    assert_same(found, rank(model, mentions, ChosenEntities(whole, rows), top_k=4), exactly=False)
    assert set(found.top_rows.flatten().tolist()) <= set(rows.tolist())
    part = rank(model, mentions, EntityPart(kb, range(10, 60)), top_k=4)
    assert_same(part, rank(model, mentions, EntityPart(whole, range(10, 60)), top_k=4))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_tokens_of_entities_that_cannot_win_are_not_read(dtype, token_rows):
    model, mentions, entities = encoded("text")
    kb = stored_kb(model, entities, dtype)
    mention = slice_encodings(mentions, slice(1))
    rank(model, mention, kb, top_k=2)
    # Whole rows tell the size of one, and golds need theirs.
    assert len(set(token_rows)) < 0.5 * len(kb)
    rank(model, mention, kb, top_k=2, prune=False)
    assert set(token_rows) == set(range(len(kb)))


def test_what_is_stored_in_half_precision_is_mapped_and_not_copied(token_rows):
    model, mentions, entities = encoded("text")
    kb = stored_kb(model, entities, "bfloat16")
    assert not kb.converts
    rank(model, mentions, kb, top_k=2)
    assert set(token_rows) == set(range(len(kb)))


def test_no_more_rows_are_read_one_by_one_than_there_are(token_rows, monkeypatch):
    model, mentions, entities = encoded("text")
    kb = stored_kb(model, entities, "int4")
    monkeypatch.setitem(ranking._BLOCK_PAIRS, "cpu", 16)  # one mention at a time
    result = rank(model, mentions, kb, top_k=2)
    token_rows.remove(0)  # which tells the size of a row
    counts = np.bincount(np.array(token_rows) // 16, minlength=6)
    assert len(set(token_rows)) < len(token_rows)
    assert (counts <= 2 * np.array([16, 16, 16, 16, 16, 10])).all()
    assert_same(result, rank(model, mentions, in_memory(kb), top_k=2))
