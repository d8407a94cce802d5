"""Batches of pairs: the candidates of a mention, where negatives are drawn from, and the position of the gold."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.errors import UnknownEntityError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.schema import entity_features
from hf_mel.training.collators import Examples, PairCollator
from tests.toy import ToyPairProcessor, toy_entities, toy_mentions, toy_reranker
from tests.toy_documents import toy_documents

ENTITIES, MENTIONS = toy_entities(12), toy_mentions(20)
CANDIDATES = {f"m{i}": [f"Q{1 + (i * 5 + c) % 12}" for c in range(i % 6)] for i in range(20)}


class Spy:
    """A processor that keeps the pairs it was given."""

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        self.pairs = pairs
        return {"pair_mask": torch.ones(len(pairs), len(pairs[0][1]), dtype=torch.bool)}


def ids(spy: Spy) -> list[tuple[str, list[str]]]:
    return [(mention["mention_id"], [entity["entity_id"] for entity in listed]) for mention, listed in spy.pairs]


def batch(spy, examples, epoch=0, **options):
    collator = PairCollator(ModelInputs(None, spy), ENTITIES, CANDIDATES, **options)
    collator.epoch = epoch
    return collator(examples)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=8, unique=True),
    st.integers(1, 14),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_each_mention_has_its_gold_and_negatives_of_its_list_first(rows, negatives, seed, epoch):
    spy, examples = Spy(), Examples(MENTIONS, "mention").__getitems__(rows)
    tensors = batch(spy, examples, epoch, num_negatives=negatives, seed=seed)
    golds = {mention["mention_id"]: mention["entity_id"] for mention in MENTIONS}
    assert [mention for mention, _ in ids(spy)] == [f"m{row}" for row in rows]
    for (mention, listed), label in zip(ids(spy), tensors["labels"].tolist(), strict=True):
        gold = golds[mention]
        assert listed[label] == gold
        assert len(set(listed)) == len(listed) == 1 + min(negatives, 11)
        of_list = set(CANDIDATES[mention]) - {gold}
        others = set(listed) - {gold}
        assert len(others & of_list) == min(negatives, len(of_list))


@pytest.mark.parametrize("negatives", [1, 4, 11])
@pytest.mark.parametrize("unit", ["mention", "document"])
def test_without_filling_a_list_has_the_gold_and_its_own_candidates_only(negatives, unit):
    spy, examples = Spy(), Examples(MENTIONS, unit)
    tensors = batch(
        spy, examples.__getitems__(range(len(examples))), num_negatives=negatives, fill_short_lists=False, unit=unit
    )
    golds = dict(zip(MENTIONS["mention_id"], MENTIONS["entity_id"], strict=True))
    made = ids(spy)
    assert len(made) == 20
    assert min(len(listed) for _, listed in made) == 1  # some have no candidates
    for (mention, listed), label in zip(made, tensors["labels"].tolist(), strict=True):
        others = set(CANDIDATES[mention]) - {golds[mention]}
        assert listed[label] == golds[mention]
        assert set(listed) <= others | {golds[mention]}
        assert len(listed) == len(set(listed)) == 1 + min(negatives, len(others))


@pytest.mark.parametrize("unit", ["mention", "context"])
def test_a_batch_of_short_lists_has_a_finite_loss_and_is_padded(unit):
    examples = Examples(MENTIONS, unit).__getitems__(range(6))
    options = {"unit": unit, "mentions_per_example": 2, "num_negatives": 5, "fill_short_lists": False}
    made = batch(ToyPairProcessor(), examples, **options)
    assert not made["pair_mask"].all()
    assert toy_reranker(unit=unit)(**made).loss.isfinite()


@pytest.mark.parametrize("first", [1, 2, 3])
def test_negatives_come_from_the_first_of_the_other_candidates(first):
    golds = {mention["mention_id"]: mention["entity_id"] for mention in MENTIONS}
    hardest = {m: [each for each in CANDIDATES[m] if each != golds[m]][:first] for m in CANDIDATES}
    drawn = {m: set() for m in CANDIDATES}
    for epoch in range(30):
        spy = Spy()
        batch(spy, Examples(MENTIONS, "mention").__getitems__(range(20)), epoch, num_negatives=1, negatives_from=first)
        for mention, listed in ids(spy):
            drawn[mention] |= set(listed) - {golds[mention]}
    long = [m for m in CANDIDATES if len(hardest[m]) == first and m in golds]
    assert long
    assert all(drawn[m] == set(hardest[m]) for m in long)


def test_draws_are_a_function_of_seed_epoch_and_ids():
    spy = Spy()

    def drawn(rows, **options):
        batch(spy, Examples(MENTIONS, "mention").__getitems__(rows), num_negatives=3, **options)
        return dict(ids(spy))

    first = drawn(range(20))
    assert drawn(range(20)) == first
    assert {
        mention: drawn([int(mention[1:])])[mention] for mention in first
    } == first  # regardless of the rest of the batch
    assert drawn(range(20), epoch=1) != first
    assert drawn(range(20), seed=1) != first


def test_the_position_of_the_gold_is_uniform():
    examples, places = Examples(MENTIONS, "mention").__getitems__(range(20)), Counter()
    for epoch in range(60):
        places.update(batch(Spy(), examples, epoch, num_negatives=3)["labels"].tolist())
    assert set(places) == {0, 1, 2, 3}
    assert all(abs(count - 300) < 75 for count in places.values())  # five standard deviations


def test_a_context_gives_two_mentions_and_a_single_mention_twice():
    mentions = MENTIONS.map(lambda row, i: {"context_id": "big" if i < 5 else row["mention_id"]}, with_indices=True)
    examples, pairs = Examples(mentions, "context"), Counter()
    assert len(examples) == 16
    for epoch in range(40):
        spy = Spy()
        tensors = batch(spy, examples.__getitems__(range(16)), epoch, unit="context", mentions_per_example=2)
        listed = ids(spy)
        assert len(listed) == 32
        assert tensors["labels"].shape == (32,)
        golds = {mention["mention_id"]: mention["entity_id"] for mention in mentions}
        for k in range(0, 32, 2):
            (one, first), (other, second) = listed[k : k + 2]
            assert golds[one] == first[tensors["labels"][k]]
            assert golds[other] == second[tensors["labels"][k + 1]]
            if k == 0:
                assert one != other
                pairs[one, other] += 1
            else:
                assert one == other
            taken = {golds[one], golds[other]}
            assert len((set(first) | set(second)) - taken) == 2  # a negative each, another one, and none a gold
    assert len(pairs) > 12  # of 20


def test_a_document_gives_all_its_mentions():
    spy = Spy()
    mentions = MENTIONS.map(lambda row: {"context_id": "one"})
    batch(spy, Examples(mentions, "document").__getitems__([0]), unit="document")
    assert [mention for mention, _ in ids(spy)] == [f"m{row}" for row in range(20)]


def test_a_tiny_knowledge_base_gives_fewer_negatives():
    spy = Spy()
    collator = PairCollator(ModelInputs(None, spy), ENTITIES.select([0, 1]), {}, num_negatives=5)
    tensors = collator(Examples(MENTIONS, "mention").__getitems__([0]))
    ((_, listed),) = ids(spy)
    assert sorted(listed) == ["Q1", "Q2"]
    assert listed[tensors["labels"].item()] == "Q1"


@pytest.mark.parametrize(
    ("gold", "candidates", "message"),
    [("NIL", [], "row m0: The gold 'NIL'"), ("Q1", ["Q1", "Q77"], "row m0: The candidate 'Q77'")],
)
def test_ids_outside_the_knowledge_base_name_the_mention(gold, candidates, message):
    row = {**MENTIONS[0], "entity_id": gold}
    with pytest.raises(UnknownEntityError, match=message):
        PairCollator(ModelInputs(None, Spy()), ENTITIES, {"m0": candidates})([[row]])


def test_entities_show_a_random_image_or_their_first():
    images = [Image.new("RGB", (2, 2), (10 * i, 0, 0)) for i in range(4)]
    rows = [
        {"entity_id": f"Q{i}", "name": "", "description": "", "attributes": "", "aliases": [], "images": images}
        for i in (1, 2)
    ]
    entities, spy = datasets.Dataset.from_list(rows, features=entity_features()), Spy()
    for random_image, expected in ((True, {0, 1, 2, 3}), (False, {0})):
        collator, shown = PairCollator(ModelInputs(None, spy), entities, {}, random_image=random_image), set()
        for collator.epoch in range(40):
            collator(Examples(MENTIONS, "mention").__getitems__([0]))
            shown |= {entity["images"][0].getpixel((0, 0))[0] // 10 for _, listed in spy.pairs for entity in listed}
        assert shown == expected


def test_a_processor_that_reads_several_images_gets_them_all():
    images = [Image.new("RGB", (2, 2), (10 * i, 0, 0)) for i in range(4)]
    row = {"entity_id": "Q1", "name": "", "description": "", "attributes": "", "aliases": [], "images": images}
    spy = Spy()
    spy.max_entity_images = None
    collator = PairCollator(ModelInputs(None, spy), datasets.Dataset.from_list([row], features=entity_features()), {})
    collator(Examples(MENTIONS, "mention").__getitems__([0]))
    [(_, [entity])] = spy.pairs
    assert [image.getpixel((0, 0))[0] for image in entity["images"]] == [0, 10, 20, 30]


def test_the_loss_of_a_batch_is_cross_entropy_over_each_list():
    examples = Examples(MENTIONS, "context").__getitems__(range(4))
    made = batch(ToyPairProcessor(), examples, unit="context", mentions_per_example=2, num_negatives=2)
    output = toy_reranker(unit="context")(**made)
    scores, labels = output.scores, made["labels"]
    expected = sum(scores[i].logsumexp(0) - scores[i, label] for i, label in enumerate(labels)) / len(labels)
    torch.testing.assert_close(output.loss, expected)


# Documents

DOCUMENTS = toy_documents(20)
LISTS = {f"m{i}": [f"Q{1 + (i * 5 + c) % 12}" for c in range(i % 6)] for i in range(20)}
PRIORS = {m: {each: (1 + place) / 8 for place, each in enumerate(listed[1:])} for m, listed in LISTS.items()}


@pytest.mark.parametrize("negatives", [1, 3, 11])
def test_each_mention_of_a_document_has_a_separate_list(negatives):
    spy = Spy()
    tensors = PairCollator(ModelInputs(None, spy), ENTITIES, LISTS, num_negatives=negatives, unit="document")(
        Examples(DOCUMENTS, "document").__getitems__([0, 3])
    )
    golds = dict(zip(DOCUMENTS["mention_id"], DOCUMENTS["entity_id"], strict=True))
    assert [mention for mention, _ in ids(spy)] == [f"m{i}" for i in (0, 5, 10, 15, 3, 8, 13, 18)]
    for (mention, listed), label in zip(ids(spy), tensors["labels"].tolist(), strict=True):
        others = set(LISTS[mention]) - {golds[mention]}
        assert listed[label] == golds[mention]
        assert len(set(listed)) == len(listed) == 1 + negatives
        assert len(set(listed) & others) == min(negatives, len(others))  # regardless of the other mentions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["mention", "context", "document"]), st.integers(1, 11))
def test_every_candidate_keeps_its_prior_at_any_position(seed, epoch, unit, negatives):
    spy = Spy()
    collator = PairCollator(
        ModelInputs(None, spy),
        ENTITIES,
        LISTS,
        priors=PRIORS,
        num_negatives=negatives,
        unit=unit,
        mentions_per_example=2,
        seed=seed,
    )
    collator.epoch = epoch
    collator(Examples(DOCUMENTS, unit).__getitems__([0, 1, 2]))
    assert spy.pairs
    for mention, listed in spy.pairs:
        for entity in listed:  # the gold too, listed or not
            assert entity["prior"] == PRIORS[mention["mention_id"]].get(entity["entity_id"], 0)


def test_without_priors_rows_carry_none_and_images_stay_undecoded(monkeypatch):
    spy, decoded = Spy(), []
    monkeypatch.setattr("hf_mel.data.lazy_rows.open_image", lambda image, row=None: decoded.append(row))
    for priors in (None, PRIORS):
        PairCollator(ModelInputs(None, spy), ENTITIES, LISTS, priors=priors, unit="document")(
            Examples(DOCUMENTS, "document").__getitems__([0])
        )
        assert all(("prior" in entity) == (priors is not None) for _, listed in spy.pairs for entity in listed)
    assert not decoded
