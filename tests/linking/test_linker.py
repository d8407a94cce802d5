"""Tests of EntityLinker against scores of one pair at a time."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.candidates.name_index import NameIndex
from hf_mel.errors import (
    CalibrationError,
    DataFormatError,
    FilterError,
    ImageError,
    KnowledgeBaseError,
    RecipeError,
    SpanError,
    UnknownEntityError,
    UnknownModelError,
)
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.reranking import score_pairs
from hf_mel.kb import shards
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.linking.results import RankedMention
from hf_mel.schema import NIL, entity_features
from tests.toy import ToyPairProcessor, ToyProcessor, register, toy_entities, toy_mentions, toy_model, toy_reranker
from tests.toy_documents import ToyDocumentProcessor, toy_document_reranker

MODEL, PROCESSOR = toy_model(), ToyProcessor()
WORLD, MENTIONS = toy_entities(30), list(toy_mentions(20, entities=30))


def build(rows=WORLD, **options) -> KnowledgeBase:
    return KnowledgeBase.build(rows, MODEL, PROCESSOR, progress=False, **options)


@pytest.fixture(scope="module")
def linker() -> EntityLinker:
    return EntityLinker(MODEL, PROCESSOR, build())


@torch.no_grad()
def rank_one_by_one(mention, entities=WORLD) -> list[tuple[str, float, dict[str, float]]]:
    """Returns the id, score and unit scores of every entity, best first, from one pair at a time."""
    encoded = MODEL.encode_mentions(**PROCESSOR(mentions=[mention]))
    ranked = []
    for entity in entities:
        units = MODEL.unit_scores(encoded, MODEL.encode_entities(**PROCESSOR(entities=[entity])))
        units = {unit: score.item() for unit, score in units.items()}
        ranked.append((entity["entity_id"], sum(units.values()) / len(units), units))
    return sorted(ranked, key=lambda entry: -entry[1])


def assert_same(results, others) -> None:
    """Asserts that results are equal up to rounding. Candidates that tie up to rounding may come in any order."""
    assert len(results) == len(others)
    for one, other in zip(results, others, strict=True):
        assert (one.mention, one.start, one.end, one.warnings) == (
            other.mention,
            other.start,
            other.end,
            other.warnings,
        )
        assert [c.score for c in one.candidates] == pytest.approx([c.score for c in other.candidates], abs=1e-5)
        scores = {c.entity_id: c for c in other.candidates}
        for candidate in one.candidates:
            twin = scores.get(candidate.entity_id)
            if twin is None:  # a tie at the last place
                assert candidate.score == pytest.approx(other.candidates[-1].score, abs=1e-5)
                continue
            assert candidate.unit_scores == pytest.approx(twin.unit_scores, abs=1e-5)
            assert (candidate.name, candidate.attributes) == (twin.name, twin.attributes)


# Ranking


def test_candidates_and_all_their_scores_are_those_of_one_pair_at_a_time(linker):
    for mention, result in zip(MENTIONS, linker(MENTIONS, top_k=7), strict=True):
        expected = rank_one_by_one(mention)[:7]
        assert [c.entity_id for c in result.candidates] == [entity_id for entity_id, _, _ in expected]
        assert [c.score for c in result.candidates] == pytest.approx([score for _, score, _ in expected], abs=1e-5)
        for candidate, (_, _, units) in zip(result.candidates, expected, strict=True):
            assert candidate.unit_scores == pytest.approx(units, abs=1e-5)
        assert [c.rank for c in result.candidates] == [1, 2, 3, 4, 5, 6, 7]
        names = {row["entity_id"]: row["name"] for row in WORLD}
        assert [c.name for c in result.candidates] == [names[c.entity_id] for c in result.candidates]
        assert result.best is result.candidates[0]
        assert result.entity_id == result.best.entity_id


@pytest.mark.parametrize("unit", ["text", "vision"])
def test_a_single_unit_ranks_by_its_scores(unit):
    linker = EntityLinker(MODEL, PROCESSOR, build(), nil_threshold=1e9)
    for mention, result in zip(MENTIONS[:5], linker(MENTIONS[:5], top_k=4, units=[unit]), strict=True):
        expected = sorted(rank_one_by_one(mention), key=lambda entry: -entry[2][unit])[:4]
        assert [c.score for c in result.candidates] == pytest.approx([units[unit] for *_, units in expected], abs=1e-5)
        assert not result.is_nil  # the threshold applies to the score of all units
    with pytest.raises(RecipeError, match="no unit 'sound'"):
        linker(MENTIONS[0], units=["sound"])


def test_explaining_needs_a_known_entity_and_a_model_that_shows_its_attention(linker):
    assert linker.explain(MENTIONS[0], WORLD[0]["entity_id"]) is None
    with pytest.raises(UnknownEntityError):
        linker.explain(MENTIONS[0], "Q0")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.integers(0, 19), min_size=1, max_size=12), batch_size=st.integers(1, 13))
def test_a_batch_gives_the_results_of_single_mentions(linker, chosen, batch_size):
    mentions = [MENTIONS[k] for k in chosen]
    assert_same(linker(mentions, batch_size=batch_size), [linker(mention) for mention in mentions])


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(30)), shard=st.integers(1, 4000))
def test_order_and_sharding_of_the_entities_change_nothing(linker, order, shard):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_SHARD_BYTES", shard)
        kb = build(WORLD.select(order), batch_size=5)
    assert_same(EntityLinker(MODEL, PROCESSOR, kb)(MENTIONS), linker(MENTIONS))


def test_a_changed_knowledge_base_links_like_a_new_one(tmp_path):
    build(WORLD.select(range(20)), output=tmp_path / "kb")
    kb = KnowledgeBase.from_pretrained(tmp_path / "kb")
    kb.add(WORLD.select(range(20, 30)), MODEL, PROCESSOR, progress=False)
    changed, expected = EntityLinker(MODEL, PROCESSOR, kb), EntityLinker(MODEL, PROCESSOR, build())
    assert_same(changed(MENTIONS), expected(MENTIONS))
    best = sorted({result.entity_id for result in changed(MENTIONS)})
    kb.remove(best)  # the open linker sees the change
    left = WORLD.filter(lambda row: row["entity_id"] not in best)
    assert_same(changed(MENTIONS), EntityLinker(MODEL, PROCESSOR, build(left))(MENTIONS))
    assert_same(EntityLinker(MODEL, PROCESSOR, tmp_path / "kb")(MENTIONS), changed(MENTIONS))


def test_half_precision_scores_are_those_of_rounded_encodings():
    result = EntityLinker(MODEL, PROCESSOR, build(dtype="bfloat16"))(MENTIONS[0], top_k=30)
    exact = {entity_id: score for entity_id, score, _ in rank_one_by_one(MENTIONS[0])}
    assert {c.entity_id: c.score for c in result.candidates} == pytest.approx(exact, abs=0.02)
    for candidate in result.candidates:
        assert sum(candidate.unit_scores.values()) / 2 == pytest.approx(candidate.score, abs=1e-5)


def test_more_candidates_than_entities_and_a_knowledge_base_of_one(linker):
    assert len(linker(MENTIONS[0], top_k=99).candidates) == 30
    one = EntityLinker(MODEL, PROCESSOR, build(WORLD.select([7])))(MENTIONS[0])
    assert [c.entity_id for c in one.candidates] == ["Q8"]


# Mentions


def test_a_mention_as_arguments_as_a_mapping_and_as_a_row_of_a_data_set(linker):
    row = MENTIONS[4]
    alone = linker(text=row["text"], mention=row["mention"], image=row["image"])
    assert_same([alone], [linker({"text": row["text"], "mention": row["mention"], "image": row["image"]})])
    assert_same([alone], [linker(row)])
    rows = datasets.Dataset.from_list(MENTIONS, features=toy_mentions(1).features)
    assert_same(linker(rows, batch_size=3), linker(MENTIONS))
    assert linker([]) == []


def test_the_span_is_searched_or_given(linker):
    text = "Georgia, and then Georgia again."
    first, second = linker(text=text, mention="Georgia"), linker(text=text, mention="Georgia", start=18, end=25)
    assert (first.start, first.end, first.mention) == (0, 7, "Georgia")
    assert (second.start, second.end, second.mention) == (18, 25, "Georgia")
    assert linker(text=text, start=18, end=25).mention == "Georgia"
    assert (
        linker({"text": text, "mention": "Tbilisi", "start": -1, "end": -1}).start == -1
    )  # not located, as in some releases


@pytest.mark.parametrize(
    ("mention", "error", "message"),
    [
        (
            {"text": "Swift", "mention": "Taylor"},
            SpanError,
            r"'Taylor' is not in its text. Write it exactly as in the text.$",
        ),
        ({"text": "Swift", "mention": "swift"}, SpanError, "not in its text.*upper and lower case differ"),
        ({"text": "Swift", "mention": ""}, SpanError, "empty"),
        ({"text": "a b", "mention": " "}, SpanError, "empty"),
        ({"text": "a b", "start": 1, "end": 2}, SpanError, "start=1, end=2 holds no mention"),
        ({"text": "Swift", "start": 2, "end": 9}, SpanError, "start=2, end=9 holds no mention in a text of 5"),
        ({"text": "Swift", "start": -3, "end": 2}, SpanError, "start=-3, end=2"),
        ({"text": "Swift", "start": 3, "end": 3}, SpanError, "start=3, end=3"),
        ({"text": "Swift", "start": -1, "end": -1}, SpanError, "start=-1, end=-1"),
        (
            {"text": "Swift", "mention": "Swi", "start": 0, "end": 2},
            SpanError,
            r"at start=0, end=2 is 'Sw', not 'Swi'.*first character after",
        ),
        ({"text": "Swift", "mention": "Swift", "start": 0}, SpanError, "end= is missing"),
        ({"text": "Swift"}, SpanError, "Nothing says where"),
        ({"text": "", "mention": "Swift"}, SpanError, "not in its text"),
        ({"mention": "Swift"}, DataFormatError, "no text="),
        ({"text": "Swift", "mention": 3}, DataFormatError, "mention=3 is not a string"),
        ({"text": "Swift \ud83d", "mention": "Swift"}, DataFormatError, "Character 6 .*half of a surrogate pair"),
        ({"text": "Swift", "start": 0.0, "end": 2}, DataFormatError, "start=0.0 is not an integer"),
        ({"text": "Swift", "start": False, "end": 2}, DataFormatError, "start=False is not an integer"),
        ({"text": "in Lome\u0301", "mention": "Lom\u00e9"}, SpanError, r"mention NFC, the text NFD\): convert both"),
        ({"text": "in Lom\u00e9", "mention": "Lome\u0301"}, SpanError, r"mention NFD, the text NFC\): convert both"),
        ("Swift", DataFormatError, "The mention is a str"),
    ],
)
def test_an_invalid_mention_is_an_error_with_its_position(linker, mention, error, message):
    good = {
        "text": "Swift",
        "mention": "Swift",
        "image": "/nowhere.png",
    }  # mentions are checked before images are opened
    with pytest.raises(error, match=rf"row 1: .*{message}"):
        linker([good, mention])


def test_offsets_may_be_integers_of_numpy(linker):
    mention = {"text": "Swift on stage", "start": np.int32(0), "end": np.int64(5)}
    assert linker(mention).mention == "Swift"


def test_a_threshold_is_a_number_and_its_json_too(linker, monkeypatch):
    with pytest.raises(ValueError, match="nan"):
        EntityLinker(linker.model, linker.processor, linker.kb, nil_threshold=float("nan"))
    monkeypatch.setattr(linker, "nil_threshold", float("inf"))
    result = linker(text="Entity c", mention="Entity c")
    assert result.is_nil
    json.dumps(result.to_dict(), allow_nan=False)


# Ties


def linker_of(names):
    rows = [{"entity_id": f"Q{k}", "name": name} for k, name in enumerate(names)]
    entities = datasets.Dataset.from_list(
        [row | {"description": "", "attributes": "", "aliases": [], "images": []} for row in rows],
        features=entity_features(),
    )
    return EntityLinker(MODEL, PROCESSOR, KnowledgeBase.build(entities, MODEL, PROCESSOR, progress=False))


def test_entities_with_the_best_score_are_counted_in_the_whole_knowledge_base():
    mention = {"text": "Entity a", "mention": "Entity a"}
    best, other = (c.name for c in linker_of(["Entity a", "Entity z"])(mention).candidates)
    linker = linker_of([other, *[best] * 40, other])
    result = linker(mention, top_k=3)
    assert result.num_tied == 40
    assert [candidate.rank for candidate in result.candidates] == [1, 1, 1]
    assert result.entity_id == "Q1"
    assert "40 entities have the best score. The first of them in the knowledge base was taken." in result.warnings
    assert linker(mention, top_k=1).num_tied == 40


def test_equal_scores_have_equal_ranks():
    result = linker_of(["Entity b", "Entity a", "Entity b", "Entity c"])(text="Entity a", mention="Entity a", top_k=4)
    scores = [candidate.score for candidate in result.candidates]
    expected = [1 + sum(other > score + 1e-4 for other in scores) for score in scores]
    assert [candidate.rank for candidate in result.candidates] == expected
    assert len(set(expected)) < 4
    assert result.num_tied == expected.count(1)


def test_a_tie_of_the_reranker_is_said():
    ranked = RankedMention({}, [0, 1, 2, 3], [4.0, 3.0, 2.0, 2.0], 4.0, [None] * 4, [None] * 4)
    ranked.rerank([1.0, 5.0, 5.0])
    assert ranked.entity_rows == [1, 2, 0, 3]
    assert ranked.ranks() == [1, 1, 3, 4]
    assert ranked.num_tied == 2


def test_no_input_and_two_inputs_are_errors(linker):
    with pytest.raises(DataFormatError, match="either"):
        linker()
    with pytest.raises(DataFormatError, match="either"):
        linker(MENTIONS, text="Swift")


def test_a_very_long_text_is_linked(linker):
    result = linker(text="Swift " * 10_000, mention="Swift " * 2_000)
    assert len(result.candidates) == 10


# Images


def test_an_image_changes_scores_and_may_be_a_path_bytes_or_a_pil_image(linker, tmp_path):
    path = tmp_path / "image.png"
    image = Image.new("RGB", (4, 4), (200, 30, 90))
    image.save(path)
    mention = {"text": "Entity c", "mention": "Entity c"}
    results = [linker(**mention, image=source) for source in (image, path, str(path), path.read_bytes())]
    without = linker(mention)
    for result in results:
        assert_same([result], [results[0]])
        assert result.warnings == []
        assert result.best.unit_scores["vision"] != 0
    assert without.best.unit_scores["vision"] == 0


@pytest.mark.parametrize(
    ("left_out", "warning"),
    [
        (None, "The mention has no image."),
        (True, "The mention has no image, so only the text decides."),
        (False, "The mention has no image. The model reads a blank picture in its place, and its scores count."),
    ],
)
def test_a_warning_says_what_a_missing_image_does(linker, monkeypatch, left_out, warning):
    monkeypatch.setattr(linker.model, "leaves_out_missing_images", left_out, raising=False)
    assert linker(text="Entity c", mention="Entity c").warnings == [warning]


@pytest.fixture
def linker_without_vision(linker, monkeypatch):
    """A linker whose mentions lack what the unit "vision" reads."""
    units = linker.model.unit_scores

    def without_vision(mentions, entities):
        return units(mentions, entities) | {
            "vision": torch.full((len(mentions["text"]), len(entities["text"])), torch.nan)
        }

    def text_score(mentions, entities):
        return units(mentions, entities)["text"]

    monkeypatch.setattr(linker.model, "unit_scores", without_vision)
    monkeypatch.setattr(linker.model, "score", text_score)
    monkeypatch.setattr(linker.model, "leaves_out_missing_images", True, raising=False)
    return linker


def test_a_unit_that_the_mention_lacks_has_no_score(linker_without_vision):
    result = linker_without_vision(text="Entity c", mention="Entity c")
    assert all("vision" not in candidate.unit_scores for candidate in result.candidates)
    assert set(result.best.unit_scores) == {"text"}


@pytest.mark.parametrize(("threshold", "is_said"), [(None, False), (-1e9, True)])
def test_a_threshold_for_scores_of_other_units_is_said(linker_without_vision, monkeypatch, threshold, is_said):
    monkeypatch.setattr(linker_without_vision, "nil_threshold", threshold)
    result = linker_without_vision(text="Entity c", mention="Entity c")
    assert any("NIL threshold may not fit" in warning for warning in result.warnings) == is_said
    assert not any("precision" in warning for warning in result.warnings)
    monkeypatch.setattr(linker_without_vision, "link_threshold", 0.0)
    result = linker_without_vision(text="Entity c", mention="Entity c")
    assert any("stated precision may not hold" in warning for warning in result.warnings)


def test_a_mention_that_lacks_all_chosen_units_is_said(linker_without_vision):
    linker, mention = linker_without_vision, {"text": "Entity c", "mention": "Entity c"}
    sentence = "The mention has no image, which the chosen units need, so all entities have the same score."
    result = linker(mention, units=["vision"])
    assert sentence in result.warnings
    assert result.num_tied == len(linker.kb)
    assert sentence not in linker(mention, units=["vision", "text"]).warnings


def test_a_mention_without_the_image_that_all_units_read_is_said(linker, monkeypatch):
    def no_scores(mentions, entities):
        return torch.full((len(mentions["text"]), len(entities["text"])), torch.nan)

    monkeypatch.setattr(linker.model, "unit_scores", lambda *sides: {"vision": no_scores(*sides)})
    monkeypatch.setattr(linker.model, "score", lambda *sides: no_scores(*sides).nan_to_num(0.0))
    monkeypatch.setattr(linker.model, "leaves_out_missing_images", True, raising=False)
    result = linker(text="Entity c", mention="Entity c")
    assert result.warnings[0] == (
        "The mention has no image, which every unit of the model needs, so all entities have the same score."
    )
    assert result.num_tied == len(linker.kb)


def test_an_image_that_a_text_model_ignores_gives_a_warning():
    class Reader(ToyProcessor):
        def _encode(self, texts, images):
            return super()._encode(texts, [None] * len(images))

    kb = KnowledgeBase.build(WORLD, MODEL, Reader(), progress=False)
    reader = EntityLinker(MODEL, Reader(), kb)
    assert reader(text="Swift", mention="Swift").warnings == []
    (warning,) = reader(text="Swift", mention="Swift", image=Image.new("RGB", (2, 2))).warnings
    assert "not used" in warning


def test_an_image_that_cannot_be_opened_is_an_error_with_its_path(linker, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    mention = {"text": "Swift", "mention": "Swift"}
    with pytest.raises(ImageError, match=r"broken\.png"):
        linker(mention | {"image": broken})
    with pytest.raises(ImageError, match=r"nowhere\.png, row 1: The image file does not exist"):
        linker([mention, mention | {"image": tmp_path / "nowhere.png"}], batch_size=1)
    with pytest.raises(ImageError, match="row 3"):
        linker([mention] * 3 + [mention | {"image": b"123"}], batch_size=2)


# NIL


def test_a_mention_is_nil_below_the_threshold_and_not_at_it():
    kb, best = build(), rank_one_by_one(MENTIONS[0])[0]
    exact = EntityLinker(MODEL, PROCESSOR, kb)(MENTIONS[0]).best.score
    for threshold, nil in ((exact, False), (exact + 1e-3, True), (-1e9, False), (0, exact < 0)):
        result = EntityLinker(MODEL, PROCESSOR, kb, nil_threshold=threshold)(MENTIONS[0])
        assert (result.is_nil, result.entity_id) == (nil, NIL if nil else best[0])
        assert result.nil_threshold == threshold
        assert result.best.entity_id == best[0]  # a NIL mention keeps its candidates


def test_the_threshold_is_the_argument_or_else_that_of_the_model_or_none():
    kb, model = build(), toy_model()
    assert EntityLinker(model, PROCESSOR, kb)(MENTIONS[0]).nil_threshold is None
    model.config.nil_threshold = 1e9
    assert EntityLinker(model, PROCESSOR, kb)(MENTIONS[0]).is_nil
    assert not EntityLinker(model, PROCESSOR, kb, nil_threshold=-1e9)(MENTIONS[0]).is_nil
    assert EntityLinker(model, PROCESSOR, kb)(MENTIONS[0]).to_dict()["is_nil"] is not None


# Loading and results


def test_from_pretrained_links_like_a_linker_of_loaded_parts(linker, tmp_path):
    register()
    MODEL.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    build(output=tmp_path / "kb")
    loaded = EntityLinker.from_pretrained(tmp_path / "model", tmp_path / "kb", device="cpu")
    assert_same(loaded(MENTIONS), linker(MENTIONS))
    assert not loaded.model.training
    with pytest.raises(KnowledgeBaseError, match="hf-mel kb build"):
        EntityLinker.from_pretrained(tmp_path / "model")
    toy_model(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(KnowledgeBaseError, match="its weights differ"):
        EntityLinker.from_pretrained(tmp_path / "model", tmp_path / "kb")


def test_a_result_is_plain_data(linker):
    data = linker(MENTIONS[1], top_k=2).to_dict()
    assert set(data) == {
        "mention", "start", "end", "entity_id", "is_nil", "nil_threshold", "candidates", "warnings", "num_tied",
        "needs_review", "confidence", "certified", "bound"
    }  # fmt: skip
    assert set(data["candidates"][0]) == {
        "rank", "entity_id", "name", "description", "attributes", "score", "unit_scores", "reranker_score",
        "name_score",
    }  # fmt: skip
    assert set(data["candidates"][0]["unit_scores"]) == {"text", "vision"}


def test_identical_entities_are_ranked_in_their_order(linker):
    twins = [WORLD[3] | {"entity_id": f"twin-{k}"} for k in range(6)]
    kb = build(datasets.Dataset.from_list(twins, features=entity_features()), batch_size=6)
    result = EntityLinker(MODEL, PROCESSOR, kb)(MENTIONS[0], top_k=4)
    assert [c.entity_id for c in result.candidates] == ["twin-0", "twin-1", "twin-2", "twin-3"]


# Reranking


RERANKER, PAIRS = toy_reranker(), ToyPairProcessor()


def reranked(jointly_with: list[dict], mention: dict, k: int, reranker=RERANKER) -> list[tuple[str, float]]:
    """Returns the k best of the retriever in the order of the toy reranker, one context at a time."""
    mask = torch.ones(len(jointly_with), k, dtype=torch.bool)
    rows = [{**row, "context_id": "here"} for row in jointly_with]
    lists = [[int(entity_id[1:]) - 1 for entity_id, *_ in rank_one_by_one(row)[:k]] for row in jointly_with]
    scored = score_pairs(ModelInputs(reranker, PAIRS), rows, WORLD, lists, joint_masks=[mask])
    scores = scored.joint[0] if len(jointly_with) > 1 else scored.scores
    number = jointly_with.index(mention)
    pairs = zip((f"Q{row + 1}" for row in lists[number]), scores[number].tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_reranker_orders_the_first_candidates_and_ranks_a_context_together(batch_size):
    mentions = [{**mention, "context_id": ""} for mention in MENTIONS[:5]]
    mentions[3] = {**mentions[0], "mention": "met", "start": 11, "end": 14}  # another mention in the first text
    mentions[3]["start"] = mentions[0]["text"].index("met")
    mentions[3]["end"] = mentions[3]["start"] + 3
    linker = EntityLinker(MODEL, PROCESSOR, build(), reranker=RERANKER, reranker_processor=PAIRS, rerank_k=6)
    results = linker(mentions, top_k=9, batch_size=batch_size)
    for number, (mention, result) in enumerate(zip(mentions, results, strict=True)):
        together = [mentions[0], mentions[3]] if number in (0, 3) else [mention]
        expected = reranked(together, mention, 6)
        plain = {entity_id: score for entity_id, score, _ in rank_one_by_one(mention)}
        assert [c.entity_id for c in result.candidates[:6]] == [entity_id for entity_id, _ in expected]
        assert [c.reranker_score for c in result.candidates[:6]] == pytest.approx([s for _, s in expected], abs=1e-5)
        assert [c.entity_id for c in result.candidates[6:]] == [
            entity_id for entity_id, *_ in rank_one_by_one(mention)[6:9]
        ]
        assert [c.reranker_score for c in result.candidates[6:]] == [None] * 3
        assert [c.score for c in result.candidates] == pytest.approx([plain[c.entity_id] for c in result.candidates])
        assert [c.rank for c in result.candidates] == list(range(1, 10))
    alone = linker(mentions[0], top_k=2)
    assert [c.entity_id for c in alone.candidates] == [e for e, _ in reranked([mentions[0]], mentions[0], 6)[:2]]


def test_a_reranker_gets_the_scores_of_the_retriever_and_may_rank_each_mention_alone():
    seen = {}

    class Spy(ToyPairProcessor):
        def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
            for mention, listed in pairs:
                for entity in listed:
                    seen[mention["text"], entity["entity_id"]] = entity["list_score"]
            return super().__call__(pairs=pairs)

    mentions = [{**mention, "context_id": "one"} for mention in MENTIONS[:2]]
    reranker = toy_reranker()
    reranker.ranks_jointly_by_default = False
    linker = EntityLinker(MODEL, PROCESSOR, build(), reranker=reranker, reranker_processor=Spy(), rerank_k=4)
    results = linker(mentions, top_k=4)
    for mention, result in zip(mentions, results, strict=True):
        ranked = rank_one_by_one(mention)[:4]
        for entity_id, score, _ in ranked:
            assert seen[mention["text"], entity_id] == pytest.approx(score - ranked[0][1], abs=1e-5)
        expected = reranked([mention], mention, 4)
        assert [c.entity_id for c in result.candidates] == [entity_id for entity_id, _ in expected]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_reranker_of_documents_reads_texts_and_images_together(batch_size):
    """One document has three mentions in two texts and two images. Another has no id."""
    picture = [Image.new("RGB", (4, 4), colour) for colour in ((250, 10, 10), (10, 250, 10))]
    document = [
        {"text": "Entity a met Entity b.", "mention": "Entity a", "document_id": "d"},
        {"modality": "image", "image": picture[0], "document_id": "d"},
        {"text": "Entity a met Entity b.", "mention": "Entity b", "document_id": "d"},
        {"text": "It was Entity c.", "mention": "Entity c", "document_id": "d"},
        {"text": "", "mention": "", "modality": "image", "image": picture[1], "document_id": "d"},
    ]
    other = [{"text": "Entity d and Entity e.", "mention": name} for name in ("Entity d", "Entity e")]
    mentions = [document[0], other[0], *document[1:4], other[1], document[4]]
    model, processor = toy_document_reranker(), ToyDocumentProcessor()
    model.rank_jointly = None  # its plain scores are joint already
    linker = EntityLinker(MODEL, PROCESSOR, build(), reranker=model, reranker_processor=processor, rerank_k=5)
    results = linker(mentions, top_k=5, batch_size=batch_size)
    plain = EntityLinker(MODEL, PROCESSOR, build())
    for together in (document, other):
        rows, lists = [], []
        for mention in together:
            result = plain(mention, top_k=5)
            rows.append({"context_id": "c", "document_id": "d", "image": None, "text": "", **mention})
            rows[-1] |= {"mention": result.mention, "document_id": "d"}
            lists.append([WORLD["entity_id"].index(c.entity_id) for c in result.candidates])
        scores = score_pairs(ModelInputs(model, processor), rows, WORLD, lists).scores
        for mention, listed, expected_scores in zip(together, lists, scores.tolist(), strict=True):
            expected = {WORLD[row]["entity_id"]: score for row, score in zip(listed, expected_scores, strict=True)}
            candidates = results[mentions.index(mention)].candidates
            assert {c.entity_id: c.reranker_score for c in candidates} == pytest.approx(expected, abs=1e-4)
            assert [c.reranker_score for c in candidates] == sorted(
                (c.reranker_score for c in candidates), reverse=True
            )
    visual = results[2]
    assert (visual.mention, visual.start, visual.end) == ("", -1, -1)


def test_a_visual_mention_without_an_image_and_a_large_document_are_errors():
    model = toy_document_reranker()
    linker = EntityLinker(
        MODEL, PROCESSOR, build(), reranker=model, reranker_processor=ToyDocumentProcessor(), rerank_k=5
    )
    with pytest.raises(DataFormatError, match="row 1: The visual mention has no image"):
        linker([{"text": "Entity a.", "mention": "Entity a"}, {"modality": "image", "document_id": "d"}])
    model.max_mentions = 2
    with pytest.raises(DataFormatError, match="has 3 mentions; the model takes 2 together"):
        linker([{"text": "Entity a.", "mention": "Entity a", "document_id": "d"}] * 3)


def test_a_reranker_with_one_entity_and_with_a_threshold_of_the_retriever():
    options = {"reranker": RERANKER, "reranker_processor": PAIRS}
    one = EntityLinker(MODEL, PROCESSOR, build(WORLD.select([7])), **options)(MENTIONS[0])
    assert [c.entity_id for c in one.candidates] == ["Q8"]
    best = rank_one_by_one(MENTIONS[0])[0][1]
    for threshold, nil in ((best - 1e-3, False), (best + 1e-3, True)):
        assert EntityLinker(MODEL, PROCESSOR, build(), nil_threshold=threshold, **options)(MENTIONS[0]).is_nil is nil


def test_a_reranker_is_loaded_only_as_the_reranker(tmp_path):
    register()
    for name, model, processor in (("run", MODEL, PROCESSOR), ("reranker", RERANKER, PAIRS)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    build(output=tmp_path / "kb")
    loaded = EntityLinker.from_pretrained(
        tmp_path / "run", tmp_path / "kb", reranker=tmp_path / "reranker", rerank_k=4, device="cpu"
    )
    expected = EntityLinker(MODEL, PROCESSOR, build(), reranker=RERANKER, reranker_processor=PAIRS, rerank_k=4)
    for one, other in zip(loaded(MENTIONS), expected(MENTIONS), strict=True):
        assert [c.entity_id for c in one.candidates] == [c.entity_id for c in other.candidates]
    with pytest.raises(UnknownModelError, match="reranks candidates"):
        EntityLinker.from_pretrained(tmp_path / "reranker", tmp_path / "kb", device="cpu")
    with pytest.raises(UnknownModelError, match="not as the reranker"):
        EntityLinker.from_pretrained(tmp_path / "run", tmp_path / "kb", reranker=tmp_path / "run", device="cpu")


@pytest.mark.parametrize("learned", [False, True])
def test_links_less_sure_than_the_precision_asks_are_left_to_a_reviewer(learned):
    model = toy_model()
    model.learns_nil = learned
    kb = build()
    plain = EntityLinker(model, PROCESSOR, kb)
    leads = []
    for mention in MENTIONS:
        (_, best, _), (_, second, _) = rank_one_by_one(mention)[:2]
        leads.append(best - max(second, 0.0) if learned else best - second)
    # A curve on which the 12 surest of these mentions pass, and all others fail.
    threshold = sorted(leads)[8]
    curve = {"confidences": [threshold, min(leads)], "links": [100, 200], "wrong": [0, 100], "mentions": 200}
    model.config.link_calibration = curve
    linker = EntityLinker(model, PROCESSOR, kb, precision=0.9)
    assert linker.link_threshold == threshold
    results, before = linker(MENTIONS), plain(MENTIONS)
    for result, lead, plain_result in zip(results, leads, before, strict=True):
        assert result.confidence == pytest.approx(lead, abs=1e-5)
        if abs(lead - threshold) > 1e-5:
            assert result.needs_review == (lead < threshold)
        assert result.entity_id == (None if result.needs_review else plain_result.entity_id)
        assert [c.entity_id for c in result.candidates] == [c.entity_id for c in plain_result.candidates]
        assert (plain_result.needs_review, plain_result.confidence) == (False, None)
    assert 0 < sum(result.needs_review for result in results) < len(results)
    assert json.loads(json.dumps(results[0].to_dict()))["confidence"] == pytest.approx(leads[0], abs=1e-5)
    # NIL comes before review, and chosen units have no calibration.
    assert all(
        result.is_nil for result in EntityLinker(model, PROCESSOR, kb, nil_threshold=1e9, precision=0.9)(MENTIONS)
    )
    assert not any(result.needs_review for result in linker(MENTIONS, units=["text"]))


def test_a_precision_that_the_calibration_cannot_show_leaves_all_to_a_reviewer(caplog):
    model = toy_model()
    model.config.link_calibration = {"confidences": [0.0], "links": [10], "wrong": [0], "mentions": 10}
    linker = EntityLinker(model, PROCESSOR, build(), precision=0.99)
    assert "10 mentions of the model's validation split show a precision of 0.99 for no link" in caplog.text
    results = linker(MENTIONS)
    assert all(result.needs_review and result.entity_id is None for result in results)
    assert linker.describe()["precision"] == 0.99


def test_a_precision_without_calibration_or_with_a_reranker_is_an_error():
    kb, model = build(), toy_model()
    with pytest.raises(CalibrationError, match="no calibration of its links"):
        EntityLinker(model, PROCESSOR, kb, precision=0.9)
    with pytest.raises(ValueError, match="precision=1 must be above 0 and below 1"):
        EntityLinker(model, PROCESSOR, kb, precision=1)
    model.config.link_calibration = {"confidences": [], "links": [], "wrong": [], "mentions": 0}
    with pytest.raises(CalibrationError, match="not for the order of a reranker"):
        EntityLinker(
            model, PROCESSOR, kb, precision=0.9, reranker=toy_reranker(), reranker_processor=ToyPairProcessor()
        )


# Names

WITH_ALIASES = WORLD.map(lambda row, k: {"aliases": [f"Alias {k}", f"Number {k % 3}"]}, with_indices=True)
NAMED_MENTIONS = [
    {"text": f"It is {surface}.", "mention": surface}
    for surface in ("Alias 7", "number 1", "alias", "ENTITY b", "Entitty c", "nothing", "!")
]


@pytest.fixture(scope="module")
def naming_linker() -> EntityLinker:
    return EntityLinker(MODEL, PROCESSOR, build(WITH_ALIASES), name_weight=2.5)


def test_the_score_of_the_names_is_added_to_that_of_the_model(naming_linker):
    plain = EntityLinker(MODEL, PROCESSOR, naming_linker.kb)
    for mention in NAMED_MENTIONS:
        scores = {c.entity_id: c.score for c in plain(mention, top_k=30).candidates}
        names = NameIndex([row["name"], *row["aliases"]] for row in WITH_ALIASES).scores([mention["mention"]])
        expected = dict(zip(WORLD["entity_id"], names.of(0, np.arange(30)).tolist(), strict=True))
        result = naming_linker(mention, top_k=30)
        assert [c.name_score for c in result.candidates] == [expected[c.entity_id] for c in result.candidates]
        assert [c.score for c in result.candidates] == pytest.approx(
            [scores[c.entity_id] + 2.5 * expected[c.entity_id] for c in result.candidates], abs=1e-5
        )
        assert [c.score for c in result.candidates] == sorted((c.score for c in result.candidates), reverse=True)
    assert naming_linker(NAMED_MENTIONS[0]).entity_id == WORLD[7]["entity_id"]
    assert plain(NAMED_MENTIONS[0]).candidates[0].name_score is None


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_names_count_in_a_batch_as_for_a_single_mention(naming_linker, batch_size):
    results = naming_linker(NAMED_MENTIONS, batch_size=batch_size)
    assert_same(results, [naming_linker(mention) for mention in NAMED_MENTIONS])


def test_names_do_not_count_for_chosen_units(naming_linker):
    plain = EntityLinker(MODEL, PROCESSOR, naming_linker.kb)
    assert_same(naming_linker(NAMED_MENTIONS, units=["text"]), plain(NAMED_MENTIONS, units=["text"]))


def test_names_of_added_entities_count_and_those_of_removed_ones_do_not():
    kb = build(WITH_ALIASES.select(range(20)))
    linker = EntityLinker(MODEL, PROCESSOR, kb, name_weight=100.0)
    mention = {"text": "Alias 25", "mention": "Alias 25"}
    assert linker(mention).best.name_score < 1
    kb.add(WITH_ALIASES.select(range(20, 30)), MODEL, PROCESSOR, progress=False)
    assert linker(mention).entity_id == WORLD[25]["entity_id"]
    kb.remove([WORLD[3]["entity_id"]])
    assert linker(mention).entity_id == WORLD[25]["entity_id"]
    kb.remove([WORLD[25]["entity_id"]])
    assert linker(mention).best.name_score < 1


def test_the_weight_is_the_argument_or_else_that_of_the_model(tmp_path):
    model = toy_model()
    model.config.name_weight = 0.5
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    register()
    kb = build()  # by the model without a weight, which encodes the same
    assert EntityLinker.from_pretrained(tmp_path, kb, device="cpu").name_weight == 0.5
    assert EntityLinker.from_pretrained(tmp_path, kb, device="cpu", name_weight=0).name_weight == 0
    assert EntityLinker(MODEL, PROCESSOR, kb).name_weight == 0
    with pytest.raises(RecipeError, match="name weight"):
        EntityLinker(MODEL, PROCESSOR, kb, name_weight=-1)


def test_a_reranker_reorders_the_candidates_that_names_choose(naming_linker):
    linker = EntityLinker(
        MODEL,
        PROCESSOR,
        naming_linker.kb,
        name_weight=2.5,
        reranker=RERANKER,
        reranker_processor=ToyPairProcessor(),
        rerank_k=4,
    )
    for mention in NAMED_MENTIONS:
        first, result = naming_linker(mention), linker(mention)
        by_id = {c.entity_id: c.name_score for c in first.candidates}
        assert {c.entity_id for c in result.candidates[:4]} == {c.entity_id for c in first.candidates[:4]}
        assert [c.name_score for c in result.candidates] == [by_id[c.entity_id] for c in result.candidates]


# Filters

TYPED = WORLD.map(
    lambda row, k: {
        "types": ["human", "painter"] if k % 3 == 0 else ["city"] if k % 3 == 1 else [],
        "born": 1800 + 10 * k if k % 7 else None,
        "rating": k / 10,
    },
    with_indices=True,
)
FILTERS = [
    "type = 'human'",
    "type = 'city' and born < 1950",
    "born is null",
    "rating >= 0.5 or type = 'human'",
    "born = 1810",
]


def passing_ids(text: str) -> set[str]:
    """Ids of the entities that pass one of FILTERS, read row by row."""
    return {
        row["entity_id"]
        for row in TYPED
        if eval(  # of the texts above, translated to Python
            text.replace("type = ", "types == ").replace(" is null", " is None").replace("born = ", "born == "),
            {
                "types": _AnyOf(row["types"]),
                "born": _Unknown() if row["born"] is None and "null" not in text else row["born"],
                "rating": row["rating"],
            },
        )
    }


class _AnyOf(list):
    def __eq__(self, other):
        return other in list(self)


class _Unknown:
    def __lt__(self, other):
        return False

    def __eq__(self, other):
        return False


@pytest.fixture(scope="module")
def typed_kb() -> KnowledgeBase:
    return build(TYPED)


@pytest.mark.parametrize("text", FILTERS)
@pytest.mark.parametrize("options", [{}, {"name_weight": 2.0}, {"soft": "born > 1900", "soft_bonus": 1.5}])
def test_filtering_before_ranking_is_ranking_before_filtering(typed_kb, text, options):
    filtered = EntityLinker(MODEL, PROCESSOR, typed_kb, where=text, **options)
    everything = EntityLinker(MODEL, PROCESSOR, typed_kb, **options)
    ids = passing_ids(text)
    assert 0 < len(ids) < 30
    for result, whole in zip(filtered(MENTIONS, top_k=30), everything(MENTIONS, top_k=30), strict=True):
        expected = [c for c in whole.candidates if c.entity_id in ids]
        assert [c.entity_id for c in result.candidates] == [c.entity_id for c in expected]
        assert [c.score for c in result.candidates] == pytest.approx([c.score for c in expected], abs=1e-5)
        assert result.candidates[0].rank == 1
    assert_same(filtered(MENTIONS), [filtered(mention) for mention in MENTIONS])


def test_only_entities_that_pass_are_scored(typed_kb, monkeypatch):
    linker = EntityLinker(MODEL, PROCESSOR, typed_kb, where="type = 'human'")
    scored = []
    score = type(MODEL).score
    monkeypatch.setattr(type(MODEL), "score", lambda self, m, e: scored.append(len(e["text"])) or score(self, m, e))
    linker(MENTIONS[0])
    assert sum(scored) == 10


def test_a_soft_filter_adds_its_bonus_and_a_large_one_is_a_filter(typed_kb):
    plain = EntityLinker(MODEL, PROCESSOR, typed_kb)
    soft = EntityLinker(MODEL, PROCESSOR, typed_kb, soft="type = 'human'", soft_bonus=0.75)
    ids = passing_ids("type = 'human'")
    for result, before in zip(soft(MENTIONS, top_k=30), plain(MENTIONS, top_k=30), strict=True):
        expected = {c.entity_id: c.score + 0.75 * (c.entity_id in ids) for c in before.candidates}
        assert {c.entity_id: c.score for c in result.candidates} == pytest.approx(expected, abs=1e-5)
        assert [c.score for c in result.candidates] == sorted((c.score for c in result.candidates), reverse=True)
    large = EntityLinker(MODEL, PROCESSOR, typed_kb, soft="type = 'human'", soft_bonus=50)
    hard = EntityLinker(MODEL, PROCESSOR, typed_kb, where="type = 'human'")
    for one, other in zip(large(MENTIONS, top_k=10), hard(MENTIONS, top_k=10), strict=True):
        assert {c.entity_id for c in one.candidates} == {c.entity_id for c in other.candidates} == ids


def test_ties_are_counted_among_the_entities_that_pass():
    names = ["Entity z", *["Entity a"] * 40]
    rows = [{"entity_id": f"Q{k}", "name": name, "even": k % 2 == 0} for k, name in enumerate(names)]
    empty = {"description": "", "attributes": "", "aliases": [], "images": []}
    entities = datasets.Dataset.from_list(
        [row | empty for row in rows], features=entity_features(even=datasets.Value("bool"))
    )
    mention = {"text": "Entity a", "mention": "Entity a"}
    for where, ties in (("even = true and name = 'Entity a'", 20), ("name = 'Entity a'", 40)):
        linker = EntityLinker(MODEL, PROCESSOR, build(entities), where=where)
        assert linker(mention, top_k=3).num_tied == ties


def test_an_empty_and_an_unknown_filter_are_said_before_linking(typed_kb):
    with pytest.raises(FilterError, match="None of the 30 entities passes the filter 'born > 3000'"):
        EntityLinker(MODEL, PROCESSOR, typed_kb, where="born > 3000")
    with pytest.raises(FilterError, match=r"no column 'bron'.*born"):
        EntityLinker(MODEL, PROCESSOR, typed_kb, soft="bron > 3000", soft_bonus=1.0)
    with pytest.raises(FilterError, match="no column 'kind'"):
        EntityLinker(MODEL, PROCESSOR, build(), where="kind = 'human'")
    for options in ({"soft": "born > 1"}, {"soft_bonus": 1.0}, {"soft": "born > 1", "soft_bonus": float("nan")}):
        with pytest.raises(ValueError, match="soft"):
            EntityLinker(MODEL, PROCESSOR, typed_kb, **options)


def test_a_filter_follows_the_knowledge_base_and_the_attribute():
    kb = build(TYPED.select(range(20)))
    linker = EntityLinker(MODEL, PROCESSOR, kb, where="type = 'human'")
    assert {c.entity_id for c in linker(MENTIONS[0], top_k=30).candidates} == set(TYPED["entity_id"][:20:3])
    kb.add(TYPED.select(range(20, 30)), MODEL, PROCESSOR, progress=False)
    kb.remove([TYPED["entity_id"][0]])
    assert {c.entity_id for c in linker(MENTIONS[0], top_k=30).candidates} == set(TYPED["entity_id"][3::3])
    linker.where = None
    assert len(linker(MENTIONS[0], top_k=30).candidates) == 29
    assert linker.describe().get("where") is None


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=25),
    batch_size=st.integers(1, 6),
    window=st.integers(1, 12),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mentions_that_are_encoded_by_length_have_their_results_in_their_order(linker, lengths, batch_size, window):
    image = Image.new("RGB", (4, 4), "green")
    mentions = [
        {"text": f"Entity {chr(97 + k)}" + " ab" * length, "mention": f"Entity {chr(97 + k)}"}
        | ({"image": image} if has_image else {})
        for k, (length, has_image) in enumerate(lengths)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_mel.linking.linker._WINDOW", window)
        patch.setattr("hf_mel.linking.linker._ENCODED_TOGETHER", 3)
        batches = list(linker.link_batches(mentions, batch_size=batch_size))
    assert [k for batch, _ in batches for k in batch] == list(range(len(mentions)))
    assert max(len(batch) for batch, _ in batches) <= batch_size
    assert_same([result for _, results in batches for result in results], [linker(mention) for mention in mentions])


def test_texts_of_similar_length_are_encoded_together(linker, monkeypatch):
    monkeypatch.setattr("hf_mel.linking.linker._ENCODED_TOGETHER", 2)
    widths, encode = [], linker.model.encode_mentions

    def watched(**tensors):
        widths.append(int(tensors["mention_attention_mask"].any(0).sum()))
        return encode(**tensors)

    monkeypatch.setattr(linker.model, "encode_mentions", watched)
    texts = ["a" * length for length in (30, 1, 20, 2, 10, 3)]
    linker([{"text": text, "mention": "a"} for text in texts], batch_size=2)
    assert widths == [len("a ") + longest for longest in (2, 10, 30)]
