"""Tests of the generated and resampled knowledge bases."""

from __future__ import annotations

import pytest
import torch

from benchmarks import sources
from benchmarks.ranking import operations_per_pair
from hf_mel.inference.ranking import rank

SIZES = {"length": 16, "text_width": 12, "unit_width": 8, "image_size": 8, "patch_size": 4, "vision_width": 8}


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> sources.Generated:
    return sources.Generated(tmp_path_factory.mktemp("bench"), 60, steps=3, sizes=SIZES)


def test_a_smaller_world_is_the_start_of_a_larger_one():
    small, large = sources.People(50, sizes=SIZES), sources.People(10_050, sizes=SIZES)
    torch.testing.assert_close(large.tokens[:50], small.tokens)
    torch.testing.assert_close(large.looks[:50], small.looks)


def test_mentions_share_names_and_words_with_their_golds():
    people = sources.People(200, sizes=SIZES)
    golds = torch.arange(200)
    mentions, entities = people.mention_inputs(golds)["input_ids"], people.entity_inputs(golds)["input_ids"]
    assert torch.equal(mentions[:, 2], entities[:, 2])  # the family name
    given = mentions[:, 1] == entities[:, 1]
    assert 60 < given.sum() < 140
    assert (mentions[~given, 1] == sources._UNNAMED).all()
    words = mentions[:, 4:]
    copied = (words[:, :, None] == entities[:, None, 4:10]).any(-1) & (words >= sources._FIRST_WORD)
    by_chance = (words[:, :, None] == entities.roll(1, 0)[:, None, 4:10]).any(-1) & (words >= sources._FIRST_WORD)
    assert copied.sum() > 3 * by_chance.sum()


def test_texts_are_padded_at_their_end():
    inputs = sources.People(100, sizes=SIZES).entity_inputs(torch.arange(100))
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.min() < SIZES["length"]
    assert ((inputs["input_ids"] != 0).long() == inputs["attention_mask"]).all()
    assert (torch.arange(SIZES["length"]) < lengths[:, None]).long().equal(inputs["attention_mask"])


def test_a_knowledge_base_has_the_encodings_of_the_model(generated):
    kb = generated.knowledge_base(30, dtype="float32")
    with torch.no_grad():
        inputs = generated.entity_inputs(torch.tensor([3, 29]))
        expected = generated.model.encode_entities(**{f"entity_{name}": x for name, x in inputs.items()})
    for name, tensor in kb.encodings([3, 29]).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert generated.knowledge_base(30, dtype="float32").path == kb.path


def test_a_knowledge_base_of_several_batches_is_whole(generated, monkeypatch):
    monkeypatch.setattr(sources, "_BATCH", 7)
    kb = generated.knowledge_base(24, dtype="float32")
    kb.verify()
    assert list(kb.entity_ids) == [f"Q{row}" for row in range(24)]
    monkeypatch.undo()
    at_once = generated.knowledge_base(25, dtype="float32").encodings(range(24))
    for name, tensor in kb.encodings(range(24)).items():
        torch.testing.assert_close(tensor, at_once[name], rtol=1e-4, atol=1e-5)


def test_the_trained_model_is_kept(generated):
    again = sources.Generated(generated.scratch.parent, 60, steps=3, sizes=SIZES)
    for name, tensor in again.model.state_dict().items():
        torch.testing.assert_close(tensor, generated.model.state_dict()[name])
    untrained = sources.Generated(generated.scratch.parent, 60, steps=0, sizes=SIZES)
    assert untrained.scratch != generated.scratch


def test_operations_per_pair_at_the_papers_sizes():
    """Counted by hand. The 40 × 40 × 96 multiplications and additions of QKᵀ dominate."""
    entities = {
        "text_global": torch.zeros(1, 512),
        "text_queries": torch.zeros(1, 40, 96),
        "vision_query": torch.zeros(1, 96),
        "cross_modal": torch.zeros(1, 96),
    }
    operations, exponentials = operations_per_pair({"text_keys": torch.zeros(1, 40, 96)}, entities)
    assert exponentials == 1600
    products = 40 * 40 * 96 + 40 * 40 + 40 * 96 + 512 + 10 * 96 + 96
    assert operations == 2 * products + 40 * 40


def test_resampled_rows_are_real_first_and_then_near_copies(generated):
    source = object.__new__(sources.Resampled)
    kb = generated.knowledge_base(30, dtype="float32")
    source._real, source.num_real = kb.encodings(range(30)), 30
    source._deviation = {name: x.flatten(0, -2).std(0) for name, x in source._real.items()}
    made = source.resample(torch.arange(90))
    for name, tensor in made.items():
        real = source._real[name]
        torch.testing.assert_close(tensor[:30], real)
        copies, originals = tensor[30:60], real.roll(1, 0)
        assert not torch.equal(copies, originals)
        torch.testing.assert_close(copies.norm(dim=-1), originals.norm(dim=-1))
        between = (real[:, None] - real[None]).flatten(2).norm(dim=-1)
        assert (copies - originals).flatten(1).norm(dim=-1).median() < between[between > 0].median()
        assert not torch.equal(tensor[60:], tensor[30:60])


def test_ranking_finds_golds_better_than_chance(generated):
    encoded, _, golds = generated.mentions(20)
    assert (golds < 1000).all()
    ranked = rank(generated.model, encoded, generated.knowledge_base(1000), gold_rows=golds)
    assert ranked.best_rank is not None
    assert ranked.best_rank.float().mean() < 500
