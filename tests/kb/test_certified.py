"""Tests of certified ranking: equal to plain ranking on any vectors, with a bound above all that was not scored."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from hf_mel.errors import KnowledgeBaseError, MelError, ScoreError
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.indexes import base, build_index, certified, open_index
from hf_mel.kb.indexes.base import ExactIndex
from hf_mel.kb.indexes.certified import CertifiedIndex
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.schema import NO_SPAN
from tests.inference.test_score_bounds import WORLDS
from tests.toy import ToyProcessor, ToyRetriever, toy_entities, toy_mentions, toy_model

PROCESSOR = ToyProcessor()


class Bounded(ToyRetriever):
    """The toy retriever, whose scores are inner products, with bounds; entities may be given other vectors."""

    vectors: torch.Tensor | None = None

    def encode_entities(self, entity_input_ids, entity_attention_mask, entity_colours, **_):
        encoded = super().encode_entities(entity_input_ids, entity_attention_mask, entity_colours)
        if self.vectors is not None:
            rows, self.vectors = self.vectors[: len(entity_input_ids)], self.vectors[len(entity_input_ids) :]
            encoded.text, encoded.vision = rows, torch.zeros(len(rows), 1)
        return encoded

    def bound_queries(self, mentions):
        vectors = self.query_vectors(mentions)
        return vectors, vectors.new_zeros(len(vectors), 0), vectors.new_zeros(len(vectors))

    def bound_vectors(self, entities):
        vectors = self.index_vectors({name: tensor.float() for name, tensor in entities.items()})
        return vectors, vectors.new_zeros(len(vectors), 0)


def bounded() -> Bounded:
    model = Bounded(toy_model().config).eval()
    model.load_state_dict(toy_model().state_dict())
    return model


MODEL = bounded()
WORLD = toy_entities(150)


def use_codes_for_few(monkeypatch, batch: int = 3, largest_share: float = 0.9) -> None:
    """Uses codes whatever the size of the knowledge base, and small steps."""
    monkeypatch.setattr(certified, "_LEAST_ENTITIES", 0)
    monkeypatch.setattr(certified, "_LEAST_PER_RESULT", 0)
    monkeypatch.setattr(certified, "_FIRST_SCORED", 4)
    monkeypatch.setattr(certified, "_BATCH", batch)
    monkeypatch.setattr(certified, "_LARGEST_SHARE", largest_share)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    use_codes_for_few(monkeypatch)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb") / "kb"
    kb = KnowledgeBase.build(WORLD, MODEL, PROCESSOR, output=folder, progress=False)
    build_index(kb, "codes", MODEL, PROCESSOR, progress=False)
    return folder


@pytest.fixture
def kb(built, tmp_path) -> KnowledgeBase:
    return KnowledgeBase.from_pretrained(shutil.copytree(built, tmp_path / "kb"))


def encode_mentions(count: int = 12) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(MODEL.encode_mentions(**PROCESSOR(mentions=list(toy_mentions(count, 150)))))


MENTIONS = encode_mentions()


def assert_equal(result, plain, scores: torch.Tensor | None = None):
    """Asserts that a certified result is the plain one, and that its bounds hold for all `scores` [M, N] but its own."""
    rounding = 1e-6 * max(1.0, float(plain.top_scores.abs().max()))
    torch.testing.assert_close(result.top_scores, plain.top_scores, rtol=1e-5, atol=rounding)
    # Scores that differ by rounding alone may change places.
    for m, (rows, expected) in enumerate(zip(result.top_rows, plain.top_rows, strict=True)):
        for place in (rows != expected).nonzero()[:, 0].tolist():
            gaps = (plain.top_scores[m] - plain.top_scores[m, place]).abs()
            assert rows[place] in expected[gaps <= 1e-5 * plain.top_scores[m].abs() + rounding]
    if scores is not None and result.bounds is not None:
        for m, bound in enumerate(result.bounds.tolist()):
            if bound > -np.inf:
                assert bound < result.top_scores[m, -1]
                left_out = torch.ones(scores.shape[1], dtype=torch.bool)
                left_out[result.top_rows[m]] = False
                # Entities that were scored may be above the bound, but not above the last of the best.
                assert (scores[m, left_out] <= result.top_scores[m, -1] + rounding).all()


def kb_of_vectors(vectors: np.ndarray, tmp_path, name="world") -> tuple[Bounded, KnowledgeBase]:
    model = bounded()
    model.vectors = torch.from_numpy(vectors.astype(np.float32))
    entities = toy_entities(len(vectors), images=False)
    kb = KnowledgeBase.build(entities, model, PROCESSOR, output=tmp_path / name, dtype="float32", progress=False)
    model.vectors = None
    build_index(kb, "codes", model, PROCESSOR, progress=False)
    return model, kb


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "single"])
def test_the_best_entities_are_those_of_plain_ranking(world, tmp_path):
    vectors = WORLDS[world]
    model, kb = kb_of_vectors(vectors, tmp_path)
    generator = np.random.default_rng(1)
    text = np.concatenate([generator.standard_normal((4, vectors.shape[1])), vectors[7:10], 0 * vectors[:1]])
    mentions = {"text": torch.from_numpy(text.astype(np.float32)), "vision": torch.zeros(len(text), 1)}
    index, plain = open_index(kb, "exact", model, certify=True), ExactIndex(kb, model)
    assert isinstance(index, CertifiedIndex)
    scores = model.score(mentions, kb.encodings(range(len(kb))))
    for top_k in (1, 5, len(kb) - 1, len(kb), len(kb) + 9):
        result = index.find(mentions, top_k)
        assert_equal(result, plain.find(mentions, top_k), scores)
    result = index.find(mentions, 3)
    assert result.bounds is not None
    assert result.bounds[-1] == -torch.inf  # the mention of zeros scores all entities alike


def test_few_entities_are_scored_where_one_stands_out(kb, monkeypatch):
    index = open_index(kb, "exact", MODEL)
    scored = []
    plain = certified.rank_rows
    monkeypatch.setattr(
        certified, "rank_rows", lambda *args, **options: scored.append(len(args[3])) or plain(*args, **options)
    )
    result = index.find(MENTIONS, 1)
    assert result.bounds is not None
    assert (result.bounds > -torch.inf).all()
    assert sum(scored) < 0.5 * len(kb) * len(MENTIONS["text"])


class Pairs(Bounded):
    """With loose bounds from codes, and tighter ones of pairs from the encoding "text" alone."""

    pair_bound_encodings = ["text"]

    def bound_queries(self, mentions):
        vectors, _, constants = super().bound_queries(mentions)
        return vectors, torch.ones(len(vectors), 1), constants

    def bound_vectors(self, entities):
        vectors, _ = super().bound_vectors(entities)
        return vectors, torch.full((len(vectors), 1), 2.0)

    def pair_bounds(self, mentions, entities):
        assert set(entities) == {"text"}
        assert entities["text"].dtype == torch.bfloat16
        return (mentions["text"] @ entities["text"].float().T + mentions["vision"].norm(dim=-1, keepdim=True)) / 2


def pairs_of_world(world: str, folder) -> tuple[Pairs, KnowledgeBase, dict[str, torch.Tensor]]:
    """Returns a model, a knowledge base with codes, and mentions."""
    model = Pairs(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    vectors = torch.from_numpy((WORLDS[world] / max(1.0, np.abs(WORLDS[world]).max())).astype(np.float32))
    model.vectors = vectors
    entities = toy_entities(len(vectors), images=False)
    kb = KnowledgeBase.build(entities, model, PROCESSOR, output=folder, dtype="bfloat16", progress=False)
    model.vectors = None
    build_index(kb, "codes", model, PROCESSOR, progress=False)
    generator = torch.Generator().manual_seed(0)
    text = torch.cat([torch.randn(4, vectors.shape[1], generator=generator), vectors[7:10]])
    return model, kb, {"text": text, "vision": torch.rand(len(text), 1, generator=generator) * 0.1}


@pytest.mark.parametrize("limit", ["rows", "bytes"])
def test_bounds_of_pairs_read_few_entities_at_a_time(tmp_path, monkeypatch, limit):
    model, kb, mentions = pairs_of_world("plain", tmp_path / "kb")
    monkeypatch.setattr(certified, "_LARGEST_SHARE", 1.0)
    monkeypatch.setattr(certified, "_BATCH", 64)
    index, reads, read = open_index(kb, "exact", model), [], kb.encodings

    def watched(rows, *, names=None, **options):
        if names is not None:
            reads.append(len(rows))
        return read(rows, names=names, **options)

    monkeypatch.setattr(kb, "encodings", watched)
    whole, most_at_once = index.find(mentions, 3), max(reads)
    reads.clear()
    if limit == "rows":
        monkeypatch.setattr(certified, "_CHUNK_ROWS", 7)
    else:
        monkeypatch.setattr(base, "_CHUNK_BYTES", 7 * 2 * WORLDS["plain"].shape[1] + 1)  # bfloat16
    few = index.find(mentions, 3)
    assert max(reads) == 7 < most_at_once
    assert torch.equal(few.top_rows, whole.top_rows)
    torch.testing.assert_close(few.bounds, whole.bounds, rtol=1e-5, atol=1e-5)
    assert_equal(few, ExactIndex(kb, model).find(mentions, 3))


@pytest.mark.parametrize("world", [name for name in WORLDS if name not in ("single", "uneven_norms")])
def test_bounds_of_pairs_spare_reading_entities_and_change_nothing(world, tmp_path, monkeypatch):
    model, kb, mentions = pairs_of_world(world, tmp_path / "kb")
    text = mentions["text"]
    monkeypatch.setattr(certified, "_LARGEST_SHARE", 1.0)
    index, plain, scored = open_index(kb, "exact", model), ExactIndex(kb, model), []
    original = certified.rank_rows
    monkeypatch.setattr(
        certified, "rank_rows", lambda *args, **options: scored.append(len(args[3])) or original(*args, **options)
    )
    scores = model.score(mentions, kb.encodings(range(len(kb))))
    pairs = [(np.arange(3), np.array([0.3, 0.1, -0.2], dtype=np.float32)) for _ in text]
    added = SparseScores.of_mentions(pairs)
    with_added = scores.clone()
    with_added[:, :3] += torch.tensor([0.3, 0.1, -0.2])
    counts = []
    for names in (["text"], []):
        monkeypatch.setattr(Pairs, "pair_bound_encodings", names)
        scored.clear()
        for top_k in (1, 5):
            for more, expected in ((None, scores), (added, with_added)):
                found, all_ranked = index.find(mentions, top_k, added=more), plain.find(mentions, top_k, added=more)
                rounding = 1e-5 * max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(found.top_scores, all_ranked.top_scores, rtol=0, atol=rounding)
                # Of duplicates, whose scores differ by the rounding of a batch, any may be found, but none twice.
                torch.testing.assert_close(
                    expected.gather(1, found.top_rows), all_ranked.top_scores, rtol=0, atol=rounding
                )
                assert all(len(set(rows)) == top_k for rows in found.top_rows.tolist())
                assert (found.bounds < found.top_scores[:, -1]).all()
        counts.append(sum(scored))
    assert counts[0] <= counts[1]
    if world in ("plain", "wide", "equal_norms"):
        assert counts[0] < 0.8 * counts[1]


@pytest.mark.parametrize("reads_less", [True, False])
def test_the_first_to_be_scored_have_the_highest_of_the_tightest_bounds(reads_less, tmp_path, monkeypatch):
    model, kb, mentions = pairs_of_world("plain", tmp_path / "kb")
    monkeypatch.setattr(Pairs, "pair_bound_encodings", ["text"] if reads_less else [])
    monkeypatch.setattr(certified, "_FIRST_SURPLUS", 1000)
    monkeypatch.setattr(certified, "_FIRST_BOUNDED", 1000)
    index, scored, original = CertifiedIndex(kb, model), [], certified.rank_rows
    monkeypatch.setattr(
        certified, "rank_rows", lambda *args, **options: scored.append(args[3]) or original(*args, **options)
    )
    monkeypatch.setattr(certified, "_LARGEST_SHARE", 1.0)
    every = torch.arange(len(kb))
    for number in range(len(mentions["text"])):
        mention = {name: tensor[number : number + 1] for name, tensor in mentions.items()}
        scored.clear()
        index.find(mention, 3)
        if reads_less:
            stored = kb.encodings(every.numpy(), as_stored=True, names=["text"])
            bounds, count = model.pair_bounds(mention, stored)[0], 4
        else:
            bounds, count = index._codes.bounds(index._queries(mention), every), 6
        assert bounds[scored[0]].min() >= bounds.topk(count).values[-1] - 1e-5
        assert len(scored[0]) == count


def test_equal_scores_are_all_computed_and_the_result_says_so(tmp_path):
    model, kb = kb_of_vectors(np.tile(WORLDS["plain"][:1], (200, 1)), tmp_path)
    mentions = {"text": torch.from_numpy(WORLDS["plain"][:3].astype(np.float32)), "vision": torch.zeros(3, 1)}
    result = open_index(kb, "exact", model).find(mentions, 5)
    assert result.bounds is not None
    assert (result.bounds == -torch.inf).all()
    assert result.top_rows.tolist() == [list(range(5))] * 3


def test_ties_are_ordered_by_row_as_in_plain_ranking(tmp_path):
    model, kb = kb_of_vectors(WORLDS["duplicates"], tmp_path)
    mentions = {"text": torch.from_numpy(WORLDS["duplicates"][::40].astype(np.float32)), "vision": torch.zeros(8, 1)}
    found = open_index(kb, "exact", model).find(mentions, 30)
    assert torch.equal(found.top_rows, ExactIndex(kb, model).find(mentions, 30).top_rows)


@pytest.mark.parametrize("top_k", [1, 7])
def test_filters_added_scores_and_changes_of_the_knowledge_base_count(kb, top_k):
    generator = np.random.default_rng(3)
    index, plain = open_index(kb, "exact", MODEL), ExactIndex(kb, MODEL)
    count = len(MENTIONS["text"])
    for change in (
        lambda: None,
        lambda: kb.remove(kb.entity_ids[3:20:2]),
        more(kb),
        lambda: kb.remove(kb.entity_ids[:2]),
    ):
        change()
        scores = MODEL.score(MENTIONS, kb.encodings(range(len(kb))))
        assert_equal(index.find(MENTIONS, top_k), plain.find(MENTIONS, top_k), scores)
        rows = np.sort(generator.choice(len(kb), 60, replace=False))
        assert_equal(index.find(MENTIONS, top_k, rows=rows), plain.find(MENTIONS, top_k, rows=rows))
        pairs = []
        for _ in range(count):
            chosen = np.sort(generator.choice(len(kb), 5, replace=False))
            pairs.append((chosen, generator.uniform(-3, 3, 5).astype(np.float32)))
        added = SparseScores.of_mentions(pairs)
        for of_entities in (None, generator.uniform(0, 2, len(kb)).astype(np.float32)):
            added.of_entities = of_entities
            for choice in (None, rows):
                found = index.find(MENTIONS, top_k, added=added, rows=choice)
                assert_equal(found, plain.find(MENTIONS, top_k, added=added, rows=choice))
    units = index.find(MENTIONS, top_k, units=["text"])
    assert_equal(units, plain.find(MENTIONS, top_k, units=["text"]))


def more(kb):
    return lambda: kb.add(toy_entities(170).select(range(150, 170)), MODEL, PROCESSOR, progress=False)


def test_all_mentions_together_are_ranked_as_each_alone(kb):
    index = open_index(kb, "exact", MODEL)
    together = index.find(MENTIONS, 4)
    for m in range(len(MENTIONS["text"])):
        alone = index.find({name: tensor[m : m + 1] for name, tensor in MENTIONS.items()}, 4)
        assert_equal(alone, type(together)(together.top_scores[m : m + 1], together.top_rows[m : m + 1]))


def test_a_small_knowledge_base_is_ranked_without_codes(kb, monkeypatch):
    monkeypatch.setattr(certified, "_LEAST_PER_RESULT", 300)
    assert open_index(kb, "exact", MODEL).find(MENTIONS, 3).bounds is None


# Bad input


def test_codes_are_asked_for_but_missing_or_of_no_use(tmp_path, kb):
    bare = KnowledgeBase.build(WORLD, MODEL, PROCESSOR, output=tmp_path / "bare", progress=False)
    assert type(open_index(bare, "exact", MODEL)) is ExactIndex
    with pytest.raises(KnowledgeBaseError, match=r"no index 'codes'.*hf-mel kb index .* --kind codes"):
        open_index(bare, "exact", MODEL, certify=True)
    with pytest.raises(KnowledgeBaseError, match="'faiss-pq' may miss entities"):
        open_index(kb, "faiss-pq", MODEL, certify=True)
    with pytest.raises(KnowledgeBaseError, match="no bounds of its scores"):
        build_index(kb, "codes", toy_model(), PROCESSOR, progress=False)


class Doubled(Bounded):
    def bound_vectors(self, entities):
        vectors, extras = super().bound_vectors(entities)
        return vectors * 2, extras


def test_codes_of_another_model_are_not_used(kb, caplog):
    other = Doubled(MODEL.config).eval()
    other.load_state_dict(MODEL.state_dict())
    with pytest.raises(KnowledgeBaseError, match="the vectors of this model are others"):
        open_index(kb, "exact", other, certify=True)
    with caplog.at_level(logging.WARNING):
        assert type(open_index(kb, "exact", other)) is ExactIndex
    assert "Every entity is scored" in caplog.text


def test_codes_of_other_encodings_are_not_used(kb):
    index = open_index(kb, "exact", MODEL)
    kb.remove(kb.entity_ids[:1])
    kb.save(kb.path, progress=False)  # compacts it: the rows are others
    with pytest.raises(KnowledgeBaseError, match="other encodings"):
        index.find(MENTIONS, 3)
    replaced = KnowledgeBase.from_pretrained(kb.path)
    assert type(open_index(replaced, "exact", MODEL)) is ExactIndex


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "record"])
def test_damaged_codes_are_refused_and_exact_ranking_goes_on(kb, damage, caplog):
    (path,) = kb.path.glob("index-codes-*")
    data = path.read_bytes()
    if damage == "record":
        record = kb.path / "index-codes.json"
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "settings": {**content["settings"], "head": 3}}))
    elif damage == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        path.write_bytes(
            data[:-9] if damage == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        )
    with pytest.raises(KnowledgeBaseError, match=r"The index 'codes' is damaged.*hf-mel kb index"):
        open_index(kb, "exact", MODEL, certify=True)
    with caplog.at_level(logging.WARNING):
        index = open_index(kb, "exact", MODEL)
    assert "Every entity is scored" in caplog.text
    assert_equal(index.find(MENTIONS, 3), ExactIndex(kb, MODEL).find(MENTIONS, 3))
    build_index(kb, "codes", MODEL, PROCESSOR, progress=False)
    assert isinstance(open_index(kb, "exact", MODEL), CertifiedIndex)
    assert len(list(kb.path.glob("index-codes-*"))) == 1


def test_vectors_that_are_not_finite_are_refused(kb):
    model = bounded()
    for value in (torch.nan, torch.inf):
        model.bound_vectors = lambda entities, value=value: (
            torch.full((len(entities["text"]), 4), value),
            torch.zeros(len(entities["text"]), 0),
        )
        with pytest.raises(KnowledgeBaseError, match="row 0: The vector of an entity is nan or infinite"):
            build_index(kb, "codes", model, PROCESSOR, progress=False)
    index = open_index(kb, "exact", MODEL)
    for value in (torch.nan, torch.inf):
        broken = {name: tensor.clone() for name, tensor in MENTIONS.items()}
        broken["text"][2, 1] = value
        with pytest.raises(ScoreError, match="nan or infinite"):
            index.find(broken, 3)


def test_a_full_disk_leaves_the_old_codes(kb):
    index = open_index(kb, "exact", MODEL)
    before = {path.name: path.read_bytes() for path in kb.path.glob("*") if path.is_file()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(MelError, match=r"cannot be written.*disk has room"):
            build_index(kb, "codes", MODEL, PROCESSOR, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in kb.path.glob("*") if path.is_file()} == before
    assert_equal(index.find(MENTIONS, 3), ExactIndex(kb, MODEL).find(MENTIONS, 3))


# Linking


def test_results_say_whether_they_are_proven_and_by_which_bound(kb):
    mentions = [{**row, "start": NO_SPAN, "end": NO_SPAN} for row in toy_mentions(6, 150)]
    certain = EntityLinker(MODEL, PROCESSOR, kb, certify=True)(mentions, top_k=3)
    shutil.copytree(kb.path, kb.path.with_name("bare"), ignore=shutil.ignore_patterns("index-*"))
    plain = EntityLinker(MODEL, PROCESSOR, str(kb.path.with_name("bare")))(mentions, top_k=3)
    for result, expected in zip(certain, plain, strict=True):
        assert [c.entity_id for c in result.candidates] == [c.entity_id for c in expected.candidates]
        assert result.certified
        assert expected.certified
        assert expected.bound is None
    with_bound = [result for result in certain if result.bound is not None]
    assert with_bound
    for result in with_bound:
        assert result.bound < result.candidates[-1].score
        assert json.loads(json.dumps(result.to_dict()))["bound"] == result.bound


def test_a_linker_says_that_all_entities_were_scored(kb, monkeypatch):
    monkeypatch.setattr(certified, "_LARGEST_SHARE", -1.0)
    mention = {**toy_mentions(1, 150)[0], "start": NO_SPAN, "end": NO_SPAN}
    result = EntityLinker(MODEL, PROCESSOR, kb)(mention)
    assert result.certified
    assert result.bound is None
    assert any("Every entity was scored" in warning for warning in result.warnings)


def test_an_index_that_may_miss_entities_proves_nothing(kb):
    pytest.importorskip("faiss")
    build_index(kb, "faiss-flat", MODEL, PROCESSOR, progress=False)
    mention = {**toy_mentions(1, 150)[0], "start": NO_SPAN, "end": NO_SPAN}
    few, all_of_them = (
        EntityLinker(MODEL, PROCESSOR, kb, index="faiss-flat", first_stage=stage)(mention, top_k=3)
        for stage in (20, 150)
    )
    assert (few.certified, few.bound) == (False, None)
    assert (all_of_them.certified, all_of_them.bound) == (True, None)
