"""Tests of warnings about texts that are too long for a processor, in every place that reads many texts."""

from __future__ import annotations

import logging

import pytest

from hf_mel.candidates.lists import CandidateLists
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.reranking import score_pairs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyPairProcessor, ToyProcessor, toy_entities, toy_mentions, toy_model, toy_reranker

FILLED = toy_entities(3).map(lambda row: row | {"description": "a b c", "attributes": row["attributes"] or "d"})


class Limited(ToyProcessor):
    """Tells which texts have more than `text_width` characters."""

    length_options = ("text_width",)

    def num_left_out(self, mentions=None, entities=None, pairs=None):
        texts = [row["text"] for row in mentions or ()] + [row["attributes"] for row in entities or ()]
        return [max(len(text) - self.text_width, 0) for text in texts]


class Locating(Limited):
    """Also tells that it reads the first `text_width` characters."""

    def text_spans(self, mentions):
        return [[(k, k + 1) for k in range(min(self.text_width, len(row["text"])))] for row in mentions]


class LimitedPairs(ToyPairProcessor):
    def num_left_out(self, mentions=None, entities=None, pairs=()):
        return [int(mention["mention_id"] == "m2") for mention, candidates in pairs for _ in candidates]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_encoding_counts_long_texts_and_warns_once(caplog):
    entities = toy_entities(5).map(
        lambda row: row | {"attributes": "x" * (10 + 5 * (row["entity_id"] in ("Q1", "Q5")))}
    )
    inputs = ModelInputs(toy_model(), Limited(text_width=14))
    for _ in range(2):
        encode_rows(inputs, entities, "entities", batch_size=2)
    assert warnings_of(caplog) == [
        "2 of 5 entities have more text than Limited reads (text_width=14), and the rest is left out. To read "
        "more, train with a larger processor.options.text_width."
    ]


def test_texts_that_fit_give_no_warning(caplog):
    encode_rows(ModelInputs(toy_model(), Limited(text_width=500)), toy_entities(5), "entities")
    encode_rows(ModelInputs(toy_model(), ToyProcessor(text_width=1)), toy_entities(5), "entities")  # does not tell
    assert warnings_of(caplog) == []


def test_reranking_counts_pairs(caplog):
    mentions, entities = toy_mentions(6, entities=4), toy_entities(4)
    score_pairs(ModelInputs(toy_reranker(), LimitedPairs()), mentions, entities, [[0, 1]] * 6)
    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        "2 of 12 pairs of a mention and an entity have more text than LimitedPairs reads (max_length=60)"
    )


@pytest.mark.parametrize("reranks", [False, True])
def test_training_counts_its_texts(caplog, tmp_path, reranks):
    mentions, entities = toy_mentions(6, entities=4), toy_entities(4)
    arguments = MelTrainingArguments(
        str(tmp_path), disable_tqdm=True, eval_strategy="no", load_best_model_at_end=False
    )
    options = {"entities": entities, "args": arguments, "train_dataset": mentions}
    if reranks:
        lists = CandidateLists(mentions["mention_id"], [list(entities["entity_id"])] * 6, {})
        MelTrainer(toy_reranker(), processing_class=LimitedPairs(), train_candidates=lists, **options)
        expected = ["1 of 6 pairs"]
    else:
        MelTrainer(toy_model(), processing_class=Limited(text_width=1), **options)
        expected = ["6 of 6 mentions", "4 of 4 entities"]
    found = [
        warning.partition(" have more")[0].removesuffix(" of a mention and an entity")
        for warning in warnings_of(caplog)
    ]
    assert found == expected


def test_building_names_filled_columns_that_are_not_read(caplog, tmp_path):
    """The toy processor reads name and attributes only."""
    model, processor = toy_model(), ToyProcessor()
    bare = FILLED.map(lambda row: row | {"description": "", "aliases": []})
    kb = KnowledgeBase.build(bare, model, processor, output=tmp_path / "kb", progress=False)
    assert warnings_of(caplog) == []
    more = FILLED.map(lambda row: row | {"entity_id": row["entity_id"] + "x", "aliases": ["", "e"]})
    kb.add(more, model, processor, progress=False)
    KnowledgeBase.build(FILLED.map(lambda row: row | {"aliases": [""]}), model, processor, progress=False)
    added, built = warnings_of(caplog)
    assert "aliases, description. To use them" in added
    assert ": description. To use them" in built


def test_linking_names_filled_columns_that_the_reranker_does_not_read(caplog):
    """The toy reranker reads name and attributes only."""
    model, processor = toy_model(), ToyProcessor()
    for rows, expected in ((toy_entities(3), []), (FILLED, ["description"])):
        kb = KnowledgeBase.build(rows, model, processor, progress=False)
        linker = EntityLinker(model, processor, kb, reranker=toy_reranker(), reranker_processor=ToyPairProcessor())
        caplog.clear()
        for _ in range(2):
            linker(text="Swift sings", mention="Swift")
        assert [warning.rpartition(": ")[2].rstrip(".") for warning in warnings_of(caplog)] == expected


@pytest.mark.parametrize("processor_class", [Limited, Locating, ToyProcessor])
def test_a_link_result_tells_that_a_text_was_too_long(processor_class):
    processor = processor_class(text_width=12)
    kb = KnowledgeBase.build(toy_entities(3), toy_model(), processor, progress=False)
    linker = EntityLinker(toy_model(), processor, kb)
    rain = "rain " * 4
    texts = ["Swift sings", f"Swift {rain}", f"{rain} Swift"]
    found = [[w for w in linker(text=text, mention="Swift").warnings if "longer" in w] for text in texts]
    if processor_class is ToyProcessor:
        assert found == [[], [], []]
        return
    assert found[0] == []
    assert found[1] == ["The text is longer than the model reads, so a part of it was left out."]
    unread = "The text is longer than the model reads, and the mention stands in the part that it left out."
    assert found[2] == ([unread] if processor_class is Locating else found[1])
