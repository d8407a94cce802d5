"""Annotating texts: found mentions are linked as the linker links them, in texts of any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.detection.spans import MentionSpan
from hf_mel.errors import DataFormatError, ImageError, SpanError
from hf_mel.inference import precision
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.annotating import AnnotatedMention, _window
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyPairProcessor, ToyProcessor, toy_entities, toy_model, toy_reranker

ENTITIES = toy_entities(12)
TEXT = "Entity b met Entity c, but entity d stayed. ENTITY L did not."


@pytest.fixture(scope="module")
def linker():
    model, processor = toy_model(), ToyProcessor()
    return EntityLinker(model, processor, KnowledgeBase.build(ENTITIES, model, processor, progress=False))


def with_reranker(linker, **config):
    reranker = toy_reranker(**config)
    return EntityLinker(
        linker.model, linker.processor, linker.kb, reranker=reranker, reranker_processor=ToyPairProcessor()
    )


def approx_equal(mentions, results):
    for mention, result in zip(mentions, results, strict=True):
        assert (mention.start, mention.end, mention.mention) == (result.start, result.end, result.mention)
        assert mention.entity_id == result.entity_id
        scores, others = ([c.score for c in r.candidates] for r in (mention.link, result))
        assert scores == pytest.approx(others, abs=1e-5)


def test_found_mentions_are_linked(linker):
    annotated = linker.annotate(TEXT)
    assert [mention.mention for mention in annotated] == ["Entity b", "Entity c", "ENTITY L"]
    approx_equal(annotated, [linker(text=TEXT, start=m.start, end=m.end, top_k=5) for m in annotated])
    assert annotated.warnings == []


def test_texts_together_are_as_each_alone(linker):
    texts = [TEXT, "", "Entity a", "😀", "Entity k and Entity k", "nobody"]
    together = linker.annotate(texts, batch_size=2)
    for annotated, text in zip(together, texts, strict=True):
        alone = linker.annotate(text)
        assert annotated.warnings == alone.warnings
        approx_equal(annotated, [mention.link for mention in alone])
    assert [len(annotated) for annotated in together] == [3, 0, 1, 0, 2, 0]
    assert together[1].warnings == ["The text is empty."]
    assert together[3].warnings == ["No mention was found."]


@pytest.mark.parametrize("config", [{"unit": "mention"}, {"unit": "document", "independent": False}])
def test_mentions_of_a_text_are_ranked_together(linker, config):
    reranking = with_reranker(linker, **config)
    other = "Entity e met Entity f."
    annotated = reranking.annotate([TEXT, other])
    for result in annotated:
        spans = [{"text": result.text, "start": m.start, "end": m.end} for m in result]
        approx_equal(result, reranking(spans, top_k=5))
        scores = [c.reranker_score for m in result for c in m.link.candidates]
        expected = [c.reranker_score for r in reranking(spans, top_k=5) for c in r.candidates]
        assert scores == pytest.approx(expected, abs=1e-5)


def test_an_image_belongs_to_all_mentions_of_its_text(linker, tmp_path):
    image = ENTITIES[1]["images"][0]
    image.save(tmp_path / "photo.png")
    annotated = linker.annotate(TEXT, image=tmp_path / "photo.png")
    approx_equal(annotated, [linker(text=TEXT, start=m.start, end=m.end, image=image, top_k=5) for m in annotated])
    both = linker.annotate([{"text": TEXT, "image": image}, {"text": TEXT}])
    approx_equal(both[0], [mention.link for mention in annotated])
    approx_equal(both[1], [mention.link for mention in linker.annotate(TEXT)])
    with pytest.raises(ImageError) as error:
        linker.annotate(TEXT, image=tmp_path / "missing.png")
    assert error.value.row is None  # there is one text only
    with pytest.raises(ImageError) as error:
        linker.annotate([TEXT, {"text": TEXT, "image": tmp_path / "missing.png"}])
    assert error.value.row == 1


def test_nil_and_not_linked_differ(linker):
    strict = EntityLinker(linker.model, linker.processor, linker.kb, nil_threshold=1e9)
    [mention] = strict.annotate("Entity b")
    assert (mention.entity_id, mention.name) == ("NIL", None)
    assert mention.to_dict()["entity_id"] == "NIL"
    assert mention.score == mention.link.best.score
    unsure = EntityLinker(linker.model, linker.processor, linker.kb)
    unsure.link_threshold = float("inf")  # no link is sure enough for a stated precision
    [mention] = unsure.annotate("Entity b")
    assert (mention.entity_id, mention.name, mention.to_dict()["entity_id"]) == (None, None, None)
    assert len(mention.to_dict()["candidates"]) == 5
    unlinked = AnnotatedMention(0, 4, "Oslo", "GPE", 0.5)
    assert (unlinked.entity_id, unlinked.name, unlinked.score) == (None, None, None)
    assert unlinked.to_dict() == {
        "start": 0,
        "end": 4,
        "mention": "Oslo",
        "label": "GPE",
        "detection_score": 0.5,
        "entity_id": None,
        "candidates": [],
    }


def test_own_spans_are_linked_and_not_searched(linker):
    spans = [{"start": 27, "end": 35, "label": "person"}, [0, 8]]
    annotated = linker.annotate(TEXT, spans=spans, detector=lambda texts: pytest.fail("searched"))
    assert [(m.mention, m.label) for m in annotated] == [("Entity b", ""), ("entity d", "person")]
    assert linker.annotate({"text": TEXT, "spans": []}).mentions == []


def test_overlapping_spans(linker):
    spans = [[0, 8], [7, 8], [0, 12]]
    assert [(m.start, m.end) for m in linker.annotate(TEXT, spans=spans)] == [(0, 12)]
    kept = linker.annotate(TEXT, spans=spans, overlapping=True)
    assert [(m.start, m.end) for m in kept] == [(0, 8), (0, 12), (7, 8)]


def test_overlapping_names_of_the_knowledge_base(linker, tmp_path):
    (tmp_path / "entities.csv").write_text("id,name\nQ1,Entity b\nQ2,Entity b Hall\n")
    kb = KnowledgeBase.build(tmp_path / "entities.csv", linker.model, linker.processor, progress=False)
    other, text = EntityLinker(linker.model, linker.processor, kb), "They met in Entity b Hall."
    assert [mention.mention for mention in other.annotate(text)] == ["Entity b Hall"]
    assert [mention.mention for mention in other.annotate(text, overlapping=True)] == ["Entity b", "Entity b Hall"]


def outside(texts):
    return [[MentionSpan(0, len(text) + 1)] for text in texts]


def test_a_detector_that_returns_no_mentions_of_the_text_is_named(linker):
    with pytest.raises(SpanError, match="The detector function returned what is no mention") as error:
        linker.annotate(["", "Entity a"], detector=outside)
    assert error.value.row == 0
    with pytest.raises(SpanError, match="returned spans of 0 texts for 1 texts"):
        linker.annotate("Entity a", detector=lambda texts: [])
    for answer, words in ((None, "no list"), ([None], "spans of 1 texts")):
        with pytest.raises(SpanError, match=f"returned {words} for 1 texts"):
            linker.annotate("Entity a", detector=lambda texts, answer=answer: answer)


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([TEXT, None], DataFormatError),
        ([TEXT, {"txt": "a"}], DataFormatError),
        ([TEXT, "half \ud83d"], DataFormatError),
        ([TEXT, {"text": "abc", "spans": "0:2"}], DataFormatError),
        ([TEXT, {"text": "abc", "spans": [[0, 4]]}], SpanError),
        ([TEXT, {"text": "abc", "spans": [[0]]}], SpanError),
    ],
)
def test_bad_texts_are_named_before_any_is_linked(linker, texts, error):
    with pytest.raises(error) as raised:
        linker.annotate(texts, detector=lambda texts: pytest.fail("searched"))
    assert raised.value.row == 1


@pytest.mark.parametrize("texts", [None, 5, {"a"}])
def test_what_is_no_text_is_refused(linker, texts):
    with pytest.raises(DataFormatError, match="missing or no string"):
        linker.annotate(texts)


def test_an_image_of_several_texts_is_refused(linker):
    with pytest.raises(DataFormatError, match="belong to a single text"):
        linker.annotate([TEXT], image="photo.jpg")


class ShortSighted(ToyProcessor):
    """Reads the first 300 characters of a text, and says so."""

    def num_left_out(self, mentions=None, entities=None, pairs=None):
        return [max(0, len(row["text"]) - 300) for row in mentions or ()]


@pytest.mark.parametrize("processor", [ToyProcessor(), ShortSighted()])
def test_long_texts_are_windowed(linker, processor):
    rows = []

    class Recorder(EntityLinker):
        def link_batches(self, mentions, **options):
            rows.extend(mentions)
            return super().link_batches(mentions, **options)

    kb = KnowledgeBase.build(ENTITIES, linker.model, processor, progress=False)
    text = "".join(f"{'so ' * (17 * k)}Entity {'abcdefghijkl'[k % 12]} " for k in range(40))
    annotated = Recorder(linker.model, processor, kb).annotate(text)
    assert [m.mention for m in annotated] == [f"Entity {'abcdefghijkl'[k % 12]}" for k in range(40)]
    assert all(text[m.start : m.end] == m.mention for m in annotated)
    assert all((m.link.start, m.link.end) == (m.start, m.end) for m in annotated)
    longest = 4000 if type(processor) is ToyProcessor else 300
    for row, mention in zip(rows, annotated, strict=True):
        assert row["text"] in text
        assert len(row["text"]) <= longest
        assert row["text"][row["start"] : row["end"]] == mention.mention
    # Mentions of one window share a context, so that a reranker reads them together.
    contexts = {}
    for row in rows:
        assert contexts.setdefault(row["context_id"], row["text"]) == row["text"]
    assert len(contexts) < len(rows)


@given(st.integers(0, 5000), st.integers(1, 60), st.integers(200, 400), st.integers(0, 5000))
def test_a_mention_has_text_on_both_sides(before, length, size, after):
    text = "x" * (before + length + after)
    start, end = _window(text, MentionSpan(before, before + length), size)
    assert 0 <= start <= before < before + length <= end <= len(text)
    assert end - start <= size
    if len(text) > size:
        assert before - start >= min(before, size // 4 - length)
        assert end - before - length >= min(after, size // 4 - length)


def test_the_gazetteer_knows_added_entities(tmp_path):
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(ENTITIES.select(range(3)), model, processor, output=tmp_path / "kb", progress=False)
    linker = EntityLinker(model, processor, kb)
    assert len(linker.annotate("Entity a, Entity d")) == 1
    assert linker.gazetteer is linker.gazetteer
    kb.add(ENTITIES.select([3]), model, processor, progress=False)
    assert len(linker.annotate("Entity a, Entity d")) == 2
    kb.remove(["Q1"])
    assert [m.mention for m in linker.annotate("Entity a, Entity d")] == ["Entity d"]


def test_bf16_encodes_mentions_as_autocast_does_and_scores_in_float32(linker, monkeypatch, caplog):
    seen = []
    encode, score = linker.model.encode_mentions, linker.model.score

    def encode_mentions(**inputs):
        seen.append(("encode", torch.is_autocast_enabled("cpu")))
        return encode(**inputs)

    def spied_score(mentions, entities):
        seen.append(("score", torch.is_autocast_enabled("cpu")))
        assert all(t.dtype == torch.float32 for t in mentions.values() if t.is_floating_point())
        return score(mentions, entities)

    monkeypatch.setattr(linker.model, "encode_mentions", encode_mentions)
    monkeypatch.setattr(linker.model, "score", spied_score)
    monkeypatch.setattr(precision, "_cpu_instructions", lambda: {"avx2"})
    with caplog.at_level("WARNING"):
        half = EntityLinker(linker.model, linker.processor, linker.kb, bf16=True)
    assert "slower than in float32 here: the CPU lacks native bfloat16" in caplog.text
    annotated = half.annotate(TEXT)
    assert set(seen) == {("encode", True), ("score", False)}
    seen.clear()
    exact = linker.annotate(TEXT)
    assert set(seen) == {("encode", False), ("score", False)}
    scores, exact_scores = ([c.score for m in text for c in m.link.candidates] for text in (annotated, exact))
    assert scores != exact_scores
    assert sorted(scores) == pytest.approx(sorted(exact_scores), rel=0.05, abs=0.05)
    assert half.describe() == {**linker.describe(), "bf16": True}  # --resume notices


def test_wrong_arguments_say_what_is_wrong(linker):
    with pytest.raises(ValueError, match=r"'gazetteer' is no function.*open_detector"):
        linker.annotate(TEXT, detector="gazetteer")
    with pytest.raises(ValueError, match="top_k must be at least 1, not 0"):
        linker.annotate(TEXT, top_k=0)
    with pytest.raises(DataFormatError) as error:
        linker.annotate(TEXT.encode())
    assert error.value.row is None


def test_spans_of_numpy_are_spans(linker):
    annotated = linker.annotate(TEXT, spans=[np.array([0, 8])])
    assert annotated.to_dict() == linker.annotate(TEXT, spans=[[0, 8]]).to_dict()
    assert type(next(iter(annotated)).start) is int  # which JSON can write
