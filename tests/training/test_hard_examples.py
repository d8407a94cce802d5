"""Training a reranker where it matters: hardest negatives, golds of the context, few easy examples, scores of the list."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.candidates.lists import CandidateLists
from hf_mel.errors import RecipeError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import Examples, PairCollator
from hf_mel.training.sampling import EasyShareSampler
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyPairProcessor, toy_entities, toy_mentions, toy_reranker
from tests.training.test_pair_collator import CANDIDATES, ENTITIES, MENTIONS, Spy, ids
from tests.training.test_reranker_training import lists

NO_EVALUATION = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
GOLDS = dict(zip(MENTIONS["mention_id"], MENTIONS["entity_id"], strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 3), st.sampled_from(["mention", "context"]))
def test_hard_negatives_are_the_first_of_the_list_and_the_rest_is_drawn(negatives, hard, seed, unit):
    hard, spy = min(hard, negatives), Spy()
    examples = Examples(MENTIONS, unit)
    collator = PairCollator(
        ModelInputs(None, spy),
        ENTITIES,
        CANDIDATES,
        num_negatives=negatives,
        hard_negatives=hard,
        unit=unit,
        seed=seed,
    )
    for number in range(len(examples)):
        example = examples.__getitems__([number])
        collator(example)
        golds = {GOLDS[mention] for mention, _ in ids(spy)}
        taken = set()  # by an earlier mention of the example
        for mention, listed in ids(spy):
            others = [each for each in CANDIDATES[mention] if each not in golds | taken]
            chosen = set(listed) - {GOLDS[mention]}
            assert set(others[:hard]) <= chosen
            assert len(listed) == len(set(listed)) == 1 + negatives
            taken |= chosen


def test_the_golds_of_the_context_are_further_negatives():
    mentions = MENTIONS.map(lambda row, i: {"context_id": "big" if i < 4 else row["mention_id"]}, with_indices=True)
    golds = {"big": [GOLDS[f"m{i}"] for i in range(4)]} | {f"m{i}": [GOLDS[f"m{i}"]] for i in range(4, 20)}
    for unit in ("mention", "context"):
        spy = Spy()
        collator = PairCollator(
            ModelInputs(None, spy),
            ENTITIES,
            CANDIDATES,
            num_negatives=2,
            context_golds=golds,
            unit=unit,
            mentions_per_example=2,
        )
        examples = Examples(mentions, unit)
        for collator.epoch in range(5):
            for number in range(5):
                labels = collator(examples.__getitems__([number]))["labels"].tolist()
                drawn: Counter[str] = Counter()
                for (mention, listed), label in zip(ids(spy), labels, strict=True):
                    in_context = set(golds["big"]) if int(mention[1:]) < 4 else {GOLDS[mention]}
                    others = in_context - {GOLDS[mention]}
                    assert listed[label] == GOLDS[mention]
                    assert others <= set(listed)
                    assert len(listed) == len(set(listed)) == 1 + len(others) + 2
                    drawn.update(set(listed) - in_context)
                assert max(drawn.values()) == 1  # a drawn negative of one mention is none of another, as in eq. 11


def test_every_row_carries_its_list_score_and_the_lowest_if_it_is_not_in_the_list():
    scores = {m: {each: -float(place) for place, each in enumerate(listed)} for m, listed in CANDIDATES.items()}
    spy = Spy()
    PairCollator(ModelInputs(None, spy), ENTITIES, CANDIDATES, list_scores=scores, num_negatives=7)(
        Examples(MENTIONS, "mention").__getitems__(range(20))
    )
    for mention, listed in spy.pairs:
        of_list = scores[mention["mention_id"]]
        for entity in listed:
            lowest = min(of_list.values(), default=0.0)
            assert entity["list_score"] == of_list.get(entity["entity_id"], lowest)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 2))
def test_an_epoch_has_all_hard_examples_and_a_share_of_the_easy_ones(is_easy, share, seed):
    sampler = EasyShareSampler(is_easy, share, seed)
    hard = [i for i, easy in enumerate(is_easy) if not easy]
    orders = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert orders[-1] == list(sampler)
        assert len(orders[-1]) == len(set(orders[-1])) == len(sampler) >= 1
        assert set(hard) <= set(orders[-1])
    expected = len(hard) + round(share * (len(is_easy) - len(hard)))
    assert len(sampler) == max(1, expected)
    if share == 1:
        assert all(sorted(order) == list(range(len(is_easy))) for order in orders)


def test_every_easy_example_has_its_turn():
    sampler, drawn = EasyShareSampler([True] * 10 + [False], 0.3), set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        drawn |= set(sampler)
    assert drawn == set(range(11))


@pytest.mark.parametrize("unit", ["mention", "context"])
def test_the_trainer_samples_unambiguous_mentions_that_are_alone(tmp_path, unit):
    """In the toy data, names of entities have no namesakes; the alias makes one of m2's mention."""
    train = toy_mentions(16)
    alias = train[2]["mention"]
    entities = toy_entities(12).map(lambda row: {"aliases": [alias] if row["entity_id"] == "Q12" else []})
    trainer = MelTrainer(
        toy_reranker(unit=unit),
        MelTrainingArguments(output_dir=str(tmp_path), easy_share=0.0, num_negatives=1, **NO_EVALUATION),
        train_dataset=train,
        entities=entities,
        processing_class=ToyPairProcessor(),
        train_candidates=lists(train),
    )
    contexts = Counter(train["context_id"])
    hard = {
        row["mention_id"]
        for row in train
        if contexts[row["context_id"]] > 1 or (row["mention"] == alias and row["entity_id"] != "Q12")
    }
    assert 0 < len(hard) < len(train)
    seen = {row["mention_id"] for index in trainer.sampler for row in trainer.train_dataset[index]}
    assert seen == hard


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hard_negatives": 2, "num_negatives": 1}, "not more"),
        ({"hard_negatives": -1}, "at least 0"),
        ({"easy_share": 1.5}, "between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        MelTrainingArguments(output_dir=str(tmp_path), **options)


def test_a_model_that_reads_list_scores_needs_them(tmp_path):
    model, train = toy_reranker(), toy_mentions(8)
    model.reads_list_scores = True
    made = lists(train)
    options = {"train_dataset": train, "entities": ENTITIES, "processing_class": ToyPairProcessor()}
    arguments = MelTrainingArguments(output_dir=str(tmp_path), **NO_EVALUATION)
    with pytest.raises(RecipeError, match="reads the scores of the list"):
        MelTrainer(model, arguments, train_candidates=made, **options)
    scored = CandidateLists(
        made.mention_ids, made.entity_ids, {"retriever": [[0.5] * len(each) for each in made.entity_ids]}
    )
    trainer = MelTrainer(model, arguments, train_candidates=scored, **options)
    assert trainer.collator.list_scores == scored.relative_scores
