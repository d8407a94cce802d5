"""Tests of certified ranking with MIMIC's three units: equal to plain ranking, with few entities scored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.sources import stored_kb
from hf_mel.errors import KnowledgeBaseError, ScoreError
from hf_mel.inference.encodings import slice_encodings
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.indexes import certified
from hf_mel.kb.indexes.base import ExactIndex
from hf_mel.kb.indexes.certified import CertifiedIndex
from hf_mel.modeling.mimic import MimicModel
from tests.kb.test_certified import use_codes_for_few
from tests.kb.test_shared_codes import interrupted_at
from tests.modeling.test_mimic import build, texts

ENTITIES = 400


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    use_codes_for_few(monkeypatch, batch=8, largest_share=1.0)


def encodings(model, count: int, side: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns random encodings of `count` mentions or entities."""
    encoded = texts(model, count, side, generator, 0.3, 1.0) if hasattr(model, "tglu") else {}
    for name in ("vision_query", "vision_pooled", "vision_key"):
        encoded[name] = torch.randn(count, model.config.vision_dim, generator=generator)
    if hasattr(model, "cmfu"):
        encoded["cross_modal"] = torch.randn(count, model.config.fusion_dim, generator=generator)
    return encoded


def world(dtype: str = "bfloat16", **fields):
    """Returns a model whose LayerNorms are not those of the start, its knowledge base with codes, and mentions."""
    generator = torch.Generator().manual_seed(0)
    model = build(**fields).eval()
    with torch.no_grad():
        for parameter in model.vdlu.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    entities = encodings(model, ENTITIES, "entity", generator)
    entities = {name: torch.cat([tensor, tensor[:10]]) for name, tensor in entities.items()}  # with duplicates
    kb = stored_kb(model, entities, dtype)
    CertifiedIndex.build(kb, model, progress=False)
    return model, kb, encodings(model, 7, "mention", generator)


FIELDS = {
    "three units": {},
    "masked": {"mask_padding": True, "unit_weights": [1, 3, 1]},
    "images alone": {"units": ["vision"], "text_config": None},
    "without query norm": {"units": ["vision", "cross_modal"], "query_norm": False},
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("chosen_share", [0.0, 1.0])
def test_the_best_entities_are_those_of_plain_ranking(name, chosen_share, monkeypatch):
    monkeypatch.setattr(certified, "_CHOSEN_SHARE", chosen_share)
    model, kb, mentions = world(**FIELDS[name])
    index, plain = CertifiedIndex(kb, model), ExactIndex(kb, model)
    generator = np.random.default_rng(0)
    pairs = [(np.arange(5), generator.uniform(-2, 2, 5).astype(np.float32)) for _ in range(7)]
    for rows in (None, np.arange(3, len(kb), 2)):
        for added in (None, SparseScores.of_mentions(pairs)):
            for top_k in (1, 6):
                found = index.find(mentions, top_k, added=added, rows=rows)
                expected = plain.find(mentions, top_k, added=added, rows=rows)
                rounding = 1e-5 * float(expected.top_scores.abs().max())
                torch.testing.assert_close(found.top_scores, expected.top_scores, rtol=1e-5, atol=rounding)
                assert (found.bounds <= found.top_scores[:, -1] + rounding).all()
                assert all(len(set(row)) == top_k for row in found.top_rows.tolist())
    kb.remove(kb.entity_ids[5:60:3])
    found, expected = index.find(mentions, 6), plain.find(mentions, 6)
    torch.testing.assert_close(found.top_scores, expected.top_scores, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize("chosen_share", [0.0, 1.0])
def test_the_bound_holds_for_all_that_were_not_scored(chosen_share, monkeypatch):
    monkeypatch.setattr(certified, "_CHOSEN_SHARE", chosen_share)
    scored, original = [], certified.rank_rows
    monkeypatch.setattr(
        certified, "rank_rows", lambda *args, **options: scored.append(args[3]) or original(*args, **options)
    )
    for fields in ({}, {"units": ["vision", "cross_modal"]}):
        model, kb, mentions = world(**fields)
        index, scores = CertifiedIndex(kb, model), model.score(mentions, kb.encodings(range(len(kb))))
        for m in range(len(scores)):
            scored.clear()
            found = index.find(slice_encodings(mentions, slice(m, m + 1)), 3)
            left_out = np.setdiff1d(np.arange(len(kb)), np.concatenate(scored))
            assert len(left_out)
            assert scores[m, left_out].max() <= found.bounds[0] + 1e-4
            assert found.bounds[0] < found.top_scores[0, -1]


def test_entities_that_tighter_bounds_leave_out_count_for_the_highest_bound():
    rows, bounds = torch.arange(4), torch.tensor([5.0, 2.0, 3.0, 1.0])
    for floor, kept, highest in ((3.0, [0, 2], 2.0), (0.0, [0, 1, 2, 3], 0.5), (9.0, [], 5.0)):
        still_open, of_open, bound = certified._split(rows, bounds, floor, 0.5)
        assert still_open.tolist() == kept
        assert of_open.tolist() == bounds[kept].tolist()
        assert bound == highest


def test_products_spare_most_scores(monkeypatch):
    scored, original = [], certified.rank_rows
    monkeypatch.setattr(
        certified, "rank_rows", lambda *args, **options: scored.append(len(args[3])) or original(*args, **options)
    )
    counts = {}
    for by_products in (True, False):
        monkeypatch.setattr(MimicModel, "bounds_by_products", by_products)
        model, kb, mentions = world(units=["vision", "cross_modal"])
        index = CertifiedIndex(kb, model)
        scored.clear()
        index.find(mentions, 2)
        counts[by_products] = sum(scored)
    assert counts[True] < 0.2 * counts[False]
    assert counts[True] < 0.1 * 7 * ENTITIES


def test_mentions_without_an_image_have_no_share_of_the_products():
    model, kb, mentions = world(missing_images="absent")
    mentions |= {
        "has_image": torch.tensor([True, False] * 3 + [False]),
        "has_text": torch.tensor([True] * 6 + [False]),
    }
    index, plain = CertifiedIndex(kb, model), ExactIndex(kb, model)
    found, expected = index.find(mentions, 4), plain.find(mentions, 4)
    torch.testing.assert_close(found.top_scores, expected.top_scores, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("before", [True, False])
def test_a_build_that_goes_on_with_other_products_begins_again(before, monkeypatch):
    model, kb, mentions = world(units=["vision", "cross_modal"])
    monkeypatch.setattr(certified, "_UNIT_ROWS", 16)
    monkeypatch.setattr(certified, "_CHUNK_ROWS", 16)
    monkeypatch.setattr(MimicModel, "bounds_by_products", before)
    with interrupted_at(3):
        CertifiedIndex.build(kb, model, progress=False)
    monkeypatch.setattr(MimicModel, "bounds_by_products", not before)
    CertifiedIndex.build(kb, model, progress=False)
    found, expected = CertifiedIndex(kb, model).find(mentions, 4), ExactIndex(kb, model).find(mentions, 4)
    torch.testing.assert_close(found.top_scores, expected.top_scores, rtol=1e-5, atol=1e-4)


def test_codes_of_other_products_are_stale():
    model, kb, _ = world(units=["vision", "cross_modal"])
    with torch.no_grad():
        model.vdlu.mention_to_entity.fc.weight.mul_(-3)  # neither x nor b has it
    with pytest.raises(KnowledgeBaseError, match="the vectors of this model are others"):
        CertifiedIndex(kb, model)


def test_codes_with_products_are_stale_for_a_model_without(monkeypatch):
    model, kb, _ = world(units=["vision", "cross_modal"])
    monkeypatch.setattr(MimicModel, "bounds_by_products", False)
    with pytest.raises(KnowledgeBaseError, match="they have products, and this model has none"):
        CertifiedIndex(kb, model)


def test_codes_of_an_older_form_are_stale():
    model, kb, _ = world(units=["vision", "cross_modal"])
    path = kb.path / "index-codes.json"
    record = json.loads(path.read_text())
    del record["settings"]["dims"]
    path.write_text(json.dumps(record))
    with pytest.raises(KnowledgeBaseError, match="they are of an older form"):
        CertifiedIndex(kb, model)


def test_bad_products_are_reported(monkeypatch):
    model, kb, mentions = world(units=["vision", "cross_modal"])
    index = CertifiedIndex(kb, model)
    broken = {name: tensor.clone() for name, tensor in mentions.items()}
    broken["vision_query"][2, 0] = torch.nan
    with pytest.raises(ScoreError, match="nan or infinite"):
        index.find(broken, 2)
    alone = index.find(slice_encodings(broken, slice(0, 2)), 2)
    assert alone.top_rows.shape == (2, 2)
    vectors = MimicModel.product_vectors

    def infinite(self, entities):
        of_entities, numbers = vectors(self, entities)
        return of_entities, numbers / 0

    monkeypatch.setattr(MimicModel, "product_vectors", infinite)
    with pytest.raises(KnowledgeBaseError, match="nan or infinite"):
        CertifiedIndex.build(kb, model, progress=False)
    monkeypatch.setattr(MimicModel, "product_vectors", vectors)
    CertifiedIndex(kb, model)  # the codes of before are still there


def test_codes_that_were_made_without_products_prove_the_same(monkeypatch):
    monkeypatch.setattr(MimicModel, "bounds_by_products", False)
    model, kb, mentions = world(units=["vision", "cross_modal"])
    monkeypatch.undo()
    use_codes_for_few(monkeypatch, batch=8, largest_share=1.0)
    expected = ExactIndex(kb, model).find(mentions, 3)
    torch.testing.assert_close(CertifiedIndex(kb, model).find(mentions, 3).top_scores, expected.top_scores)
