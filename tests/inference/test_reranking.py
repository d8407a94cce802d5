"""Scoring candidate lists, against one pair at a time, in NumPy where it is about numbers."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.errors import DataFormatError, ScoreError, UnknownEntityError
from hf_mel.inference import reranking
from hf_mel.inference.features.image_features import ImageFeatures
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.probe import sees_images_in_pairs
from hf_mel.inference.reranking import score_pairs
from hf_mel.protocols import Reranker
from tests.toy import ToyPairProcessor, toy_entities, toy_mentions, toy_reranker
from tests.toy_documents import ToyDocumentProcessor, toy_document_reranker, toy_documents

ENTITIES, MENTIONS = toy_entities(12), toy_mentions(10)
PROCESSOR = ToyPairProcessor()
LISTS = st.lists(st.lists(st.integers(0, 11), max_size=6, unique=True), min_size=10, max_size=10)


def by_hand(model, mention, entity) -> tuple[float, np.ndarray]:
    """Score and features of one pair."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    text = f"{mention['mention']} {mention['text']} {entity['name']} {entity['attributes']}"[:60]
    mean = np.mean([weights["characters.weight"][1 + ord(c) % 96] for c in text], axis=0)
    features = np.tanh(weights["hidden.weight"] @ mean + weights["hidden.bias"])
    images = [mention["image"], entity["images"][0] if entity["images"] else None]
    first, second = (np.zeros(3) if i is None else np.asarray(i, dtype=float).mean((0, 1)) / 255 for i in images)
    distance = (weights["vision.weight"] @ (first - second)) ** 2
    return float(weights["out.weight"][0] @ features + weights["out.bias"][0] - distance.sum()), features


def expected(model, lists, width: int) -> np.ndarray:
    scores = np.full((len(lists), width), -np.inf)
    for i, rows in enumerate(lists):
        for c, row in enumerate(rows):
            scores[i, c] = by_hand(model, MENTIONS[i], ENTITIES[row])[0]
    return scores


def test_the_toy_reranker_satisfies_the_protocol():
    assert isinstance(toy_reranker(), Reranker)


@settings(max_examples=15, deadline=None)
@given(LISTS, st.integers(1, 9))
def test_sorted_batches_score_as_one_pair_at_a_time(lists, batch_size):
    model = toy_reranker()
    scores = score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, lists, batch_size=batch_size).scores
    width = max(map(len, lists))
    assert scores.shape == (10, width)
    np.testing.assert_allclose(scores.numpy(), expected(model, lists, width), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(LISTS, st.randoms())
def test_the_order_of_the_candidates_changes_no_score(lists, random):
    shuffled = [random.sample(rows, len(rows)) for rows in lists]
    model, scores_by_row = toy_reranker(), []
    for some in (lists, shuffled):
        masks = [
            torch.tensor([[c < len(rows) for c in range(max(map(len, some)))] for rows in some], dtype=torch.bool)
        ]
        result = score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, some, joint_masks=masks, batch_size=5)
        for scores in (result.scores, result.joint[0]):
            scores_by_row.append(
                [dict(zip(rows, each, strict=False)) for rows, each in zip(some, scores.tolist(), strict=True)]
            )
    for first, second in zip(scores_by_row[:2], scores_by_row[2:], strict=True):
        for one, other in zip(first, second, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("unit", ["mention", "context"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_dependent_pairs_are_scored_by_whole_examples(unit, batch_size):
    lists = [[i % 12, (i + 1) % 12, (i + 5) % 12][: 1 + i % 3] for i in range(10)]
    lists[4] = []
    model = toy_reranker(unit=unit, independent=False)
    # The context's share would tell a batch of one mention of it from one of two.
    mentions = MENTIONS if unit == "context" else MENTIONS.map(lambda row: {"context_id": row["mention_id"]})
    scores = score_pairs(
        ModelInputs(model, PROCESSOR), mentions, ENTITIES, lists, batch_size=batch_size
    ).scores.numpy()
    plain = expected(model, lists, 3)
    means = {i: np.mean(plain[i, : len(rows)]) for i, rows in enumerate(lists) if rows}
    for i, rows in enumerate(lists):
        same = [j for j in means if mentions[j]["context_id"] == mentions[i]["context_id"]]
        for c in range(len(rows)):
            taken = means[i] + np.mean([means[j] for j in same]) / 2
            assert scores[i, c] == pytest.approx(plain[i, c] - taken, abs=1e-5)
        assert np.isneginf(scores[i, len(rows) :]).all()


@pytest.mark.parametrize("chunk", [1, 12, 8192])
def test_joint_ranking_sees_whole_contexts_and_only_what_its_mask_allows(monkeypatch, chunk):
    monkeypatch.setattr(reranking, "_CHUNK_PAIRS", chunk)
    model, lists = toy_reranker(), [[(3 * i + c) % 12 for c in range(1 + i % 4)] for i in range(10)]
    whole = torch.tensor([[c < len(rows) for c in range(4)] for rows in lists])
    part = whole.clone()
    part[2, 0] = part[0] = False  # one candidate less, and a mention without any
    result = score_pairs(
        ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, lists, joint_masks=[whole, part], batch_size=3
    )
    pairs = {
        (i, c): by_hand(model, MENTIONS[i], ENTITIES[row])
        for i, rows in enumerate(lists)
        for c, row in enumerate(rows)
    }
    for mask, scores in zip((whole, part), result.joint, strict=True):
        for i in range(10):
            for c in range(4):
                if not mask[i, c]:
                    assert scores[i, c] == -torch.inf
                    continue
                score, vector = pairs[i, c]
                others = [
                    float(vector @ pairs[j, d][1])
                    for (j, d) in pairs
                    if j != i and mask[j, d] and MENTIONS[j]["context_id"] == MENTIONS[i]["context_id"]
                ]
                assert scores[i, c].item() == pytest.approx(score + (max(others) if others else 0), abs=1e-5)


def test_every_image_is_encoded_once(monkeypatch):
    model, seen = toy_reranker(), []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.extend(pixels) or encode(pixels))
    lists = [[0, 1, 2, 3, 4, 5]] * 10
    score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, lists, batch_size=4)
    colours = {tuple(pixel.flatten().tolist()) for pixel in seen}
    assert len(seen) == len(colours)
    mentions = [mention["image"] for mention in MENTIONS if mention["image"] is not None]
    entities = [ENTITIES[row]["images"][0] for row in range(6) if ENTITIES[row]["images"]]
    assert len(colours) == len({image.getpixel((0, 0)) for image in mentions + entities})


@pytest.mark.parametrize("limit", [1, 2, None])
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_processor_that_reads_several_images_gets_the_features_of_all(monkeypatch, limit, in_memory):
    """Against colours by NumPy: the first `max_entity_images` of each entity, every image encoded once."""

    class Several(ToyPairProcessor):
        max_entity_images = limit

        def _colour(self, row, column):
            if row.get("image_features") is not None and row["image_features"].dim() == 2:
                row = {"image_features": row["image_features"].mean(0)}
            return super()._colour(row, column)

    colours = [[(10 * k, 5 * i, 7) for k in range(i % 4)] for i in range(12)]
    pictures = [[Image.new("RGB", (4, 4), colour) for colour in each] for each in colours]
    rows = [{**entity, "images": each} for entity, each in zip(ENTITIES, pictures, strict=True)]
    entities = rows if in_memory else datasets.Dataset.from_list(rows, features=ENTITIES.features)
    mentions = list(MENTIONS) if in_memory else MENTIONS
    model, seen = toy_reranker(), []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.extend(pixels) or encode(pixels))
    lists = [[(3 * i + c) % 12 for c in range(5)] for i in range(10)]
    scores = score_pairs(ModelInputs(model, Several()), mentions, entities, lists, batch_size=4).scores
    assert len(seen) == len({tuple(pixel.flatten().tolist()) for pixel in seen})
    for i, listed in enumerate(lists):
        for c, row in enumerate(listed):
            mean = np.mean([*colours[row][:limit]], axis=0) if colours[row] else np.zeros(3)
            shown = [Image.new("RGB", (4, 4))] if colours[row] else []
            base, _ = by_hand(model, MENTIONS[i], {**ENTITIES[row], "images": shown})  # its image black
            weight, mention = model.vision.weight.detach().double().numpy(), MENTIONS[i]["image"]
            colour = np.zeros(3) if mention is None else np.asarray(mention, dtype=float).mean((0, 1)) / 255
            expected = base + ((weight @ colour) ** 2).sum() - ((weight @ (colour - mean / 255)) ** 2).sum()
            assert scores[i, c].item() == pytest.approx(expected, abs=1e-5)

    images = ImageFeatures(model, Several())
    images.precompute(datasets.Dataset.from_list(rows, features=ENTITIES.features))
    shown = None if limit == 1 else limit  # of the one that is shown, training draws which
    assert len(images._cache) == len({colour for each in colours for colour in each[:shown]})


def test_rows_in_memory_score_like_those_of_a_data_set():
    model, lists = toy_reranker(), [[1, 2, 3]] * 10
    one = score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, lists).scores
    torch.testing.assert_close(
        score_pairs(ModelInputs(model, PROCESSOR), list(MENTIONS), list(ENTITIES), lists).scores, one
    )


def test_a_processor_that_sees_no_images_gets_no_features():
    class Blind(ToyPairProcessor):
        def _colour(self, row, column):
            assert "image_features" not in row
            return torch.zeros(3)

    assert ImageFeatures.for_model(toy_reranker(), PROCESSOR) is not None
    assert ImageFeatures.for_model(toy_reranker(), Blind()) is None
    score_pairs(ModelInputs(toy_reranker(), Blind()), MENTIONS, ENTITIES, [[1]] * 10)


def test_mentions_without_candidates_and_no_mentions_give_empty_scores():
    assert score_pairs(ModelInputs(toy_reranker(), PROCESSOR), MENTIONS, ENTITIES, [[]] * 10).scores.shape == (10, 0)
    assert score_pairs(ModelInputs(toy_reranker(), PROCESSOR), [], ENTITIES, []).scores.shape == (0, 0)


def test_scoring_leaves_the_model_in_its_mode():
    model = toy_reranker().train()
    score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, [[1]] * 10)
    assert model.training


def test_bad_scores_and_candidates_are_named():
    model = toy_reranker()
    with pytest.raises(UnknownEntityError, match="row 3: Candidate row 12"):
        score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, [[0]] * 3 + [[12]] + [[0]] * 6)
    with pytest.raises(ValueError, match="10 mentions"):
        score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, [[0]])
    with torch.no_grad():
        model.out.bias.fill_(torch.nan)
    with pytest.raises(ScoreError, match=r"row m\d: The score with entity 'Q5' is nan"):
        score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, [[4]] * 10)


# Documents

DOCUMENTS = toy_documents(12)
DOCUMENT_PROCESSOR = ToyDocumentProcessor()


def prior_of(i: int, row: int) -> float:
    return (1 + (5 * i + 3 * row) % 7) / 8


@pytest.mark.parametrize("batch_size", [1, 20, 1000])
@pytest.mark.parametrize("chunk", [1, 8192])
def test_documents_together_score_as_each_alone(monkeypatch, batch_size, chunk):
    """Also one larger than a batch, one with a single mention, one without images, one without texts."""
    monkeypatch.setattr(reranking, "_CHUNK_PAIRS", chunk)
    names = ["d0"] * 6 + ["d1", "d2", "d2", "d3", "d3", "d3"]
    modalities = ["text", "image"] * 3 + ["text", "text", "text", "image", "image", "image"]
    order = [7, 0, 9, 6, 1, 2, 10, 8, 3, 4, 11, 5]  # documents are not contiguous
    rows = [{**DOCUMENTS[i], "document_id": names[i], "modality": modalities[i]} for i in range(12)]
    mentions = datasets.Dataset.from_list([rows[i] for i in order], features=DOCUMENTS.features)
    lists = [[(3 * i + c) % 12 for c in range(i % 5)] for i in range(12)]
    priors = [[prior_of(i, row) for row in each] for i, each in enumerate(lists)]
    model = toy_document_reranker()
    together = score_pairs(
        ModelInputs(model, DOCUMENT_PROCESSOR), mentions, ENTITIES, lists, priors=priors, batch_size=batch_size
    ).scores
    for name in set(names):
        members = [i for i, row in enumerate(mentions["document_id"]) if row == name]
        alone = score_pairs(
            ModelInputs(model, DOCUMENT_PROCESSOR),
            mentions.select(members),
            ENTITIES,
            [lists[i] for i in members],
            priors=[priors[i] for i in members],
        ).scores
        torch.testing.assert_close(together[members, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)
        assert (together[members, alone.shape[1] :] == -torch.inf).all()
    # The document counts: linked one by one, its mentions score otherwise.
    single = mentions.map(lambda row: {"document_id": row["mention_id"]}, load_from_cache_file=False)
    apart = score_pairs(ModelInputs(model, DOCUMENT_PROCESSOR), single, ENTITIES, lists, priors=priors).scores
    assert not torch.allclose(apart[apart.isfinite()], together[together.isfinite()])


@settings(max_examples=20, deadline=None)
@given(LISTS, st.randoms(), st.booleans())
def test_priors_follow_their_candidates_in_any_order(lists, random, independent):
    lists = [*lists, [], []]
    shuffled = [random.sample(rows, len(rows)) for rows in lists]
    model, scores_by_row = toy_reranker(unit="document", independent=independent), []
    for some in (lists, shuffled):
        priors = [[prior_of(i, row) for row in rows] for i, rows in enumerate(some)]
        scores = score_pairs(
            ModelInputs(model, DOCUMENT_PROCESSOR), DOCUMENTS, ENTITIES, some, priors=priors, batch_size=7
        ).scores
        scores_by_row.append(
            [dict(zip(rows, each, strict=False)) for rows, each in zip(some, scores.tolist(), strict=True)]
        )
    for one, other in zip(*scores_by_row, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_prior_changes_the_score_of_its_candidate():
    model, lists = toy_reranker(unit="document"), [[1, 2, 3]] * 12
    scores = [
        score_pairs(ModelInputs(model, DOCUMENT_PROCESSOR), DOCUMENTS, ENTITIES, lists, priors=priors).scores
        for priors in (None, [[0.0, 0.0, 0.0]] * 12, [[0.0, 0.5, 0.0]] * 12)
    ]
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[1] != scores[2]).all(0).tolist() == [False, True, False]


def test_missing_priors_and_long_documents_are_refused():
    lists = [[1, 2]] * 12
    with pytest.raises(ValueError, match="one prior per candidate"):
        score_pairs(ModelInputs(toy_reranker(), DOCUMENT_PROCESSOR), DOCUMENTS, ENTITIES, lists, priors=[[0.5]] * 12)
    model = toy_document_reranker()
    model.max_mentions = 3
    with pytest.raises(DataFormatError, match="The document 'd0' has 4 mentions"):
        score_pairs(ModelInputs(model, DOCUMENT_PROCESSOR), DOCUMENTS, ENTITIES, lists)
    model.max_mentions = 4
    score_pairs(ModelInputs(model, DOCUMENT_PROCESSOR), DOCUMENTS, ENTITIES, lists)


def test_a_processor_that_reads_images_of_visual_mentions_alone_counts_as_seeing_images():
    class OfVisual(ToyPairProcessor):
        def _colour(self, row, column):
            return torch.zeros(3) if column == "images" or row["modality"] == "text" else super()._colour(row, column)

    class OfNone(ToyPairProcessor):
        def _colour(self, row, column):
            return torch.zeros(3)

    assert sees_images_in_pairs(OfVisual())
    assert not sees_images_in_pairs(OfNone())


class SpyOnScores(ToyPairProcessor):
    """Keeps the list score of every pair."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        for mention, listed in pairs:
            for entity in listed:
                if "list_score" in entity:  # rows of a probe have none
                    self.seen[mention["mention_id"], entity["entity_id"]] = entity["list_score"]
        return super().__call__(pairs=pairs)


@pytest.mark.parametrize("independent", [True, False])
def test_list_scores_follow_their_candidates(independent):
    lists = [[(3 * i + c) % 12 for c in range(i % 4)] for i in range(10)]
    numbers = [[-float(i + row) for row in rows] for i, rows in enumerate(lists)]
    model, spy = toy_reranker(unit="context", independent=independent), SpyOnScores()
    score_pairs(ModelInputs(model, spy), MENTIONS, ENTITIES, lists, list_scores=numbers, batch_size=3)
    expected = {(f"m{i}", f"Q{row + 1}"): -float(i + row) for i, rows in enumerate(lists) for row in rows}
    assert spy.seen == expected
    with pytest.raises(ValueError, match="one list score per candidate"):
        score_pairs(ModelInputs(model, spy), MENTIONS, ENTITIES, lists, list_scores=numbers[::-1])


def test_a_model_that_asks_for_entities_ranks_jointly_with_their_numbers(monkeypatch):
    monkeypatch.setattr(reranking, "_CHUNK_PAIRS", 5)
    lists = [[(3 * i + c) % 12 for c in range(i % 4)] for i in range(10)]
    seen = {}

    def rank_jointly(scores, features, mask, contexts, entities):
        for row, is_candidate in enumerate(mask):
            seen[tuple(scores[row][is_candidate].tolist())] = entities[row][is_candidate].tolist()
        return scores

    model = toy_reranker()
    model.rank_jointly = rank_jointly
    mask = torch.tensor([[c < len(rows) for c in range(3)] for rows in lists])
    mask[3, 1] = False
    scored = score_pairs(ModelInputs(model, PROCESSOR), MENTIONS, ENTITIES, lists, joint_masks=[mask])
    for i, rows in enumerate(lists):
        if rows:
            assert seen[tuple(scored.scores[i][mask[i]].tolist())] == [rows[c] for c in mask[i].nonzero().flatten()]
