"""Tests of indexes: results against NumPy and exact ranking, changes of the knowledge base, damaged files and crashes."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

from hf_mel.errors import KnowledgeBaseError, MelError, MissingExtraError
from hf_mel.hub.publish.kb_repo import kb_publication
from hf_mel.inference.sparse_scores import SparseScores
from hf_mel.kb.indexes import KINDS, base, build_index, faiss, open_index
from hf_mel.kb.indexes.base import IndexRecord
from hf_mel.kb.indexes.recall import recall
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.schema import NO_SPAN
from tests.toy import ToyProcessor, ToyRetriever, toy_entities, toy_mentions, toy_model

MODEL, PROCESSOR = toy_model(), ToyProcessor()
WORLD = toy_entities(120)
FAISS = ("faiss-flat", "faiss-pq")
BUILT = (*FAISS, pytest.param("milvus", marks=pytest.mark.milvus))


@pytest.fixture(autouse=True)
def _skip_without_the_package(request):
    names = [request.node.callspec.params.get("kind", "")] if hasattr(request.node, "callspec") else []
    if request.node.get_closest_marker("milvus") or "milvus" in names:
        pytest.importorskip("milvus_lite")
        pytest.importorskip("pymilvus")
    else:
        pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb") / "kb"
    KnowledgeBase.build(WORLD, MODEL, PROCESSOR, output=folder, progress=False)
    return folder


@pytest.fixture
def kb(built, tmp_path) -> KnowledgeBase:
    return KnowledgeBase.from_pretrained(shutil.copytree(built, tmp_path / "kb"))


def encode_mentions(count: int = 15) -> dict[str, torch.Tensor]:
    rows = list(toy_mentions(count, 120))
    with torch.no_grad():
        return dict(MODEL.encode_mentions(**PROCESSOR(mentions=rows)))


MENTIONS = encode_mentions()


def build(kb: KnowledgeBase, kind: str, model=MODEL, **options):
    return build_index(kb, kind, model, PROCESSOR, progress=False, **options)


def products(kb: KnowledgeBase, mentions=MENTIONS) -> np.ndarray:
    """Inner products of all mentions and all entities [M, N], which are the toy model's scores."""
    entities = kb.encodings(range(len(kb)))
    text, vision = (mentions[unit].numpy() @ entities[unit].numpy().T for unit in ("text", "vision"))
    return (text + vision) / 2


def best(kb: KnowledgeBase, k: int, mentions=MENTIONS) -> np.ndarray:
    return np.argsort(-products(kb, mentions), axis=1, kind="stable")[:, :k]


def assert_finds(index, kb: KnowledgeBase, top_k: int = 10) -> None:
    """Asserts that the index returns the best entities in order, with their scores."""
    ranked = index.find(MENTIONS, top_k)
    rows = best(kb, top_k)
    if index.kind == "faiss-pq" and max(top_k, index.first_stage) < len(kb):  # quantisation loses some
        rows = ranked.top_rows.numpy()
        assert (ranked.top_scores.diff(dim=1) <= 0).all()
        assert (
            np.mean([len({*row} & {*target}) / top_k for row, target in zip(rows, best(kb, top_k), strict=True)]) > 0.8
        )
    assert np.array_equal(ranked.top_rows.numpy(), rows)
    expected = np.take_along_axis(products(kb), rows, 1)
    np.testing.assert_allclose(ranked.top_scores.numpy(), expected, rtol=1e-5, atol=1e-6)


def files(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Results


def test_the_exact_index_sorts_all_scores_and_breaks_ties_by_row(tmp_path):
    rows = WORLD.select(range(20))
    twins = rows.map(lambda row: {"entity_id": row["entity_id"] + "b"})
    import datasets

    kb = KnowledgeBase.build(datasets.concatenate_datasets([rows, twins]), MODEL, PROCESSOR, progress=False)
    index = open_index(kb, "exact", MODEL)
    ranked = index.find(MENTIONS, 40)
    ids = np.array(kb.entity_ids)[ranked.top_rows.numpy()]
    for ranking in ids:
        assert [name + "b" for name in ranking[::2]] == list(ranking[1::2])  # every twin directly follows its original
    text = index.find(MENTIONS, 40, units=["text"]).top_scores.numpy()
    expected = MENTIONS["text"].numpy() @ kb.encodings(range(40))["text"].numpy().T
    np.testing.assert_allclose(text, -np.sort(-expected, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("first_stage", [1, 30, 119, 120, 5000])
def test_an_index_finds_the_entities_that_exact_ranking_finds(kb, kind, first_stage):
    """Inner products of the toy's vectors are its scores, so any first stage that contains the k best gives the same result."""
    index = build(kb, kind)
    index.first_stage = first_stage
    assert_finds(index, kb, top_k=20)
    assert_finds(open_index(KnowledgeBase.from_pretrained(kb.path), kind, MODEL, first_stage=first_stage), kb)


@pytest.mark.parametrize("kind", BUILT)
def test_k_may_exceed_the_size_of_the_knowledge_base(kb, kind):
    index = build(kb, kind)
    assert_finds(index, kb, top_k=500)
    single = KnowledgeBase.build(WORLD.select([3]), MODEL, PROCESSOR, progress=False)
    ranked = build(single, kind).find(MENTIONS, 5)
    assert ranked.top_rows.tolist() == [[0]] * 15


@pytest.mark.parametrize("kind", BUILT)
def test_candidates_are_the_largest_inner_products(kb, kind):
    index = build(kb, kind)
    for rows, expected in zip(index.candidates(MENTIONS, 25), best(kb, 25), strict=True):
        assert (np.diff(rows) > 0).all()
        least = {"faiss-flat": 24, "faiss-pq": 15}  # half precision, and five bytes for 20 coordinates
        assert len(set(rows) & set(expected)) >= least.get(kind, 23)


def clustered(kb_rows: int = 1500, dim: int = 16):
    """Returns a model whose encodings form clusters of vectors of very different norms, and its knowledge base."""

    class Clustered(ToyRetriever):
        def encode_entities(self, entity_input_ids, **_):
            seeds = (entity_input_ids * torch.arange(1, entity_input_ids.shape[1] + 1)).sum(1)
            rows = []
            for seed in seeds.tolist():
                generator = np.random.default_rng(seed)
                centre = np.random.default_rng(seed % 40).normal(size=2 * dim) * 2 + 3
                rows.append((centre + generator.normal(size=2 * dim)) * generator.uniform(0.3, 3))
            vectors = torch.tensor(np.array(rows), dtype=torch.float32)
            return {"text": vectors[:, :dim], "vision": vectors[:, dim:]}

    model = Clustered(MODEL.config).eval()
    return model, KnowledgeBase.build(toy_entities(kb_rows, images=False), model, PROCESSOR, progress=False)


def test_recall_is_high_on_clusters_of_vectors_with_uneven_norms():
    """A graph index over plain inner products finds almost nothing in these data."""
    model, kb = clustered()
    generator = torch.Generator().manual_seed(0)
    near = kb.encodings(range(0, 1500, 30))
    mentions = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in near.items()}
    scores = sum(mentions[unit] @ kb.encodings(range(1500))[unit].T for unit in ("text", "vision"))
    order = scores.numpy().argsort(1)[:, ::-1]
    for kind in FAISS:
        index = build(kb, kind, model=model)
        index.first_stage = 100
        measured = recall(index, mentions)
        sets = [set(rows) for rows in index.candidates(mentions)]
        for k in (1, 10, 64):
            expected = np.mean([len(sets[m] & set(order[m, :k])) / k for m in range(50)])
            assert measured[k] == pytest.approx(expected)
            assert measured[k] >= {"faiss-pq": 0.9}.get(kind, 0.98)
        index.first_stage = 5
        assert recall(index, mentions)[10] <= 0.5
    with pytest.raises(KnowledgeBaseError, match="misses nothing"):
        recall(open_index(kb, "exact", model), mentions)


def test_stored_vectors_have_one_norm_and_keep_the_order_of_scores():
    generator = np.random.default_rng(1)
    entities, mentions = generator.normal(2, 1, (50, 6)), generator.normal(0, 1, (9, 6)).astype(np.float32)
    entities = (entities * generator.uniform(0.1, 5, (50, 1))).astype(np.float32)
    mean = entities.mean(0)
    radius = float(np.linalg.norm(entities - mean, axis=1).max())
    record = IndexRecord("faiss-flat", [(50, "")], [0.0] * 6, mean.tolist(), radius)
    stored, sought = record.entity_vectors(entities), record.mention_vectors(mentions)
    assert stored.shape[1] == sought.shape[1] == record.dim
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), radius, rtol=1e-5)
    np.testing.assert_allclose(sought @ stored.T, mentions @ (entities - mean).T, rtol=1e-4, atol=1e-4)
    longer = record.entity_vectors(entities * 9)  # entities added later exceed the radius
    np.testing.assert_allclose(sought @ longer.T, mentions @ (9 * entities - mean).T, rtol=1e-4, atol=1e-3)


def test_a_sample_takes_all_of_a_small_knowledge_base_and_spreads_over_a_large_one(monkeypatch):
    monkeypatch.setattr(base, "_SAMPLE_RUN", 4)
    kb = KnowledgeBase.build(WORLD, MODEL, PROCESSOR, progress=False)
    everything = np.concatenate([part for _, part in base.iter_vectors(kb, MODEL, 0)])
    assert np.array_equal(base.sample_vectors(kb, MODEL, 120), everything)
    assert np.array_equal(base.sample_vectors(kb, MODEL, 500), everything)
    sample = base.sample_vectors(kb, MODEL, 20)
    rows = [int(np.flatnonzero((everything == vector).all(1))[0]) for vector in sample]
    assert len(set(rows)) == 20
    assert rows[0] == 0
    assert rows[-1] == 119
    assert {row // 30 for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", BUILT)
def test_too_few_candidates_fall_back_to_exact_ranking(kb, kind, monkeypatch):
    index = build(kb, kind)
    monkeypatch.setattr(type(index), "search", lambda self, queries, k: np.full((len(queries), k), -1))
    index.first_stage = 20
    assert_finds(index, kb, top_k=10)


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("first_stage", [1, 20])
def test_an_index_misses_no_entity_with_an_added_score(kb, kind, first_stage):
    index = build(kb, kind)
    index.first_stage = first_stage
    generator = np.random.default_rng(0)
    pairs = [np.sort(generator.choice(len(kb), 3, replace=False)) for _ in MENTIONS["text"]]
    values = generator.uniform(0.1, 1, (len(pairs), 3)).astype(np.float32)
    added = SparseScores.of_mentions(list(zip(pairs, values, strict=True)))
    exact = open_index(kb, "exact", MODEL).find(MENTIONS, len(kb), added=added)
    found = index.find(MENTIONS, 4, added=added)
    total = products(kb)
    for number, (rows, scores) in enumerate(zip(pairs, values, strict=True)):
        total[number, rows] += scores
        order = exact.top_rows[number].tolist()
        assert order == np.argsort(-total[number], kind="stable").tolist()
        # The entities that the index returns are in the exact order, with exact scores, and none with an added score is lost.
        places = [order.index(row) for row in found.top_rows[number].tolist()]
        assert places == sorted(places)
        np.testing.assert_allclose(
            found.top_scores[number], total[number, found.top_rows[number]], rtol=1e-5, atol=1e-6
        )
        worst = order.index(found.top_rows[number, -1].item())
        assert all(row in found.top_rows[number] for row in rows if order.index(row) < worst)


class TwoStepRetriever(ToyRetriever):
    """The toy model, whose vision unit is scored second, and only where the score reaches the floor."""

    def quick_scores(self, mentions, entities):
        return self.unit_scores(mentions, entities)["text"] / 2

    def remaining_scores(self, mentions, entities, floor):
        rest = self.unit_scores(mentions, entities)["vision"] / 2
        return rest.masked_fill(rest < floor, -torch.inf)


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("model_class", [ToyRetriever, TwoStepRetriever])
@pytest.mark.parametrize("few", [False, True])
def test_mentions_together_are_ranked_as_each_alone(kb, kind, model_class, few, monkeypatch):
    model = model_class(MODEL.config)
    model.load_state_dict(MODEL.state_dict())
    index = build(kb, kind, model)
    index.first_stage = 12
    if few:  # some mentions have too few candidates, and are ranked among all entities
        search = type(index).search

        def search_few(self, queries, k):
            found = search(self, queries, k)
            found[queries[:, 0] > 0, 2:] = -1
            return found

        monkeypatch.setattr(type(index), "search", search_few)
    pairs = [(np.array([k, k + 40, k + 80]), np.array([0.5, 0.25, 2])) for k in range(len(MENTIONS["text"]))]
    for added in (None, SparseScores.of_mentions(pairs)):
        together = index.find(MENTIONS, 5, added=added)
        for number in range(len(pairs)):
            mention = {name: tensor[number : number + 1] for name, tensor in MENTIONS.items()}
            alone = index.find(mention, 5, added=None if added is None else added.select([number]))
            assert together.top_rows[number].tolist() == alone.top_rows[0].tolist()
            np.testing.assert_allclose(together.top_scores[number], alone.top_scores[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BUILT)
@pytest.mark.parametrize("share", [2, 10, 60])
@pytest.mark.parametrize("surplus", [0, 2])
def test_an_index_finds_only_the_chosen_entities_in_their_exact_order(kb, kind, share, surplus, monkeypatch):
    monkeypatch.setattr(base, "_SEARCH_SURPLUS", surplus)  # with 0, every choice is searched for
    index = build(kb, kind)
    index.first_stage = 6
    rows = np.arange(0, len(kb), share)
    bonus = np.where(np.arange(len(kb)) % 4 == 0, 0.5, 0).astype(np.float32)
    added = SparseScores.of_mentions([(np.array([1, 2]), np.array([0.25, 0.5]))] * len(MENTIONS["text"]))
    for scores in (None, added, dataclasses.replace(added, of_entities=bonus)):
        exact = open_index(kb, "exact", MODEL).find(MENTIONS, len(kb), added=scores, rows=rows)
        found = index.find(MENTIONS, 3, added=scores, rows=rows)
        assert found.top_rows.shape[1] == min(3, len(rows))
        total = products(kb)
        for number in range(len(total)):
            if scores is not None:
                total[number] += scores.of(number, np.arange(len(kb)))
            order = exact.top_rows[number].tolist()
            assert order == rows[np.argsort(-total[number, rows], kind="stable")].tolist()
            places = [order.index(row) for row in found.top_rows[number].tolist()]
            assert places == sorted(set(places))
            expected = total[number, found.top_rows[number]]
            np.testing.assert_allclose(found.top_scores[number], expected, rtol=1e-5, atol=1e-6)
            if (
                surplus and kind != "faiss-pq"
            ):  # the share is so small, or the search so wide, that all of the best are found
                assert places == list(range(len(places)))


# Added and removed entities


@pytest.mark.parametrize("kind", BUILT)
def test_removed_entities_are_not_found_and_added_ones_are(kb, kind):
    index = build(kb, kind)
    index.first_stage = 20
    kb.remove(
        sorted({kb.entity_ids[row] for row in best(kb, 3).flatten()})
    )  # the three best entities of every mention
    assert_finds(index, kb)
    kb.add(toy_entities(140).select(range(120, 140)), MODEL, PROCESSOR, progress=False)
    assert_finds(index, kb)
    again = KnowledgeBase.from_pretrained(kb.path)
    assert_finds(open_index(again, kind, MODEL, first_stage=20), again)
    kb.add(WORLD.select(best(kb, 1)[:3, 0].tolist()[:1]), MODEL, PROCESSOR, replace=True, progress=False)
    assert_finds(index, kb)
    extended = build(kb, kind)
    extended.first_stage = 20
    assert extended.record.rows == kb.num_physical_rows
    assert_finds(extended, kb)
    kb.remove(kb.entity_ids[best(kb, 1)[0, 0]])
    assert_finds(extended, kb)


@pytest.mark.parametrize("kind", BUILT)
def test_an_index_that_lacks_too_many_entities_is_refused_until_it_is_updated(kb, kind, monkeypatch):
    monkeypatch.setattr(base, "_MAX_UNINDEXED", 3)
    index = build(kb, kind)
    index.first_stage = 20
    kb.add(toy_entities(124).select(range(120, 124)), MODEL, PROCESSOR, progress=False)
    for refused in (lambda: index.find(MENTIONS, 3), lambda: open_index(kb, kind, MODEL)):
        with pytest.raises(KnowledgeBaseError, match=rf"lacks 4 added.*hf-mel kb index .*{kind}"):
            refused()
    build(kb, kind)
    assert_finds(open_index(kb, kind, MODEL, first_stage=20), kb)


def test_an_index_is_extended_with_added_entities_unless_they_are_the_majority(kb, monkeypatch):
    build(kb, "faiss-pq")
    trained = []
    monkeypatch.setattr(
        faiss, "_create_index", lambda *args, real=faiss._create_index: trained.append(1) or real(*args)
    )
    kb.add(toy_entities(200).select(range(120, 200)), MODEL, PROCESSOR, progress=False)
    build(kb, "faiss-pq")
    assert not trained
    kb.add(toy_entities(500).select(range(200, 500)), MODEL, PROCESSOR, progress=False)
    index = build(kb, "faiss-pq")
    assert trained == [1]
    assert index.record.settings == {"per_code": 2}
    assert len([name for name in os.listdir(kb.path) if name.endswith(".faiss")]) == 1
    assert_finds(index, kb)


def test_compacting_drops_the_index_and_an_open_index_notices(kb):
    index = build(kb, "faiss-flat")
    index.first_stage = 20
    kb.remove(["Q1"])
    kb.save(kb.path, progress=False)
    with pytest.raises(KnowledgeBaseError, match="built from other encodings"):
        index.find(MENTIONS, 3)
    with pytest.raises(KnowledgeBaseError, match=r"no index 'faiss-flat'.*hf-mel kb index"):
        open_index(kb, "faiss-flat", MODEL)
    shutil.copy(kb.path / "kb.json", kb.path / "index-faiss-flat.json")
    with pytest.raises(KnowledgeBaseError, match="damaged"):
        open_index(kb, "faiss-flat", MODEL)


# Refusals


def test_unsupported_requests_are_refused(kb, monkeypatch):
    index = build(kb, "faiss-flat")
    with pytest.raises(KnowledgeBaseError, match=r"not by text alone.*'exact'"):
        index.find(MENTIONS, 3, units=["text"])
    with pytest.raises(KnowledgeBaseError, match=r"kind 'annoy'.*faiss-flat"):
        open_index(kb, "annoy", MODEL)
    for removed in ("faiss-ivf", "faiss-hnsw"):
        (kb.path / f"index-{removed}.json").write_text("{}")
        for refused in (lambda kind: build(kb, kind), lambda kind: open_index(kb, kind, MODEL)):
            with pytest.raises(KnowledgeBaseError, match=rf"'{removed}' are no longer supported.*Build 'faiss-pq' or"):
                refused(removed)
    with pytest.raises(KnowledgeBaseError, match="'exact' is never built"):
        build(kb, "exact")
    with pytest.raises(KnowledgeBaseError, match="has no server"):
        build(kb, "faiss-flat", uri="http://localhost:19530")
    with pytest.raises(KnowledgeBaseError, match="weights differ"):
        build(kb, "faiss-flat", model=toy_model(seed=1))

    class Blind(ToyRetriever):
        query_vectors = index_vectors = None

    blind = Blind(MODEL.config).eval()
    blind.load_state_dict(MODEL.state_dict())
    for refused in (lambda: build(kb, "faiss-pq", model=blind), lambda: open_index(kb, "faiss-flat", blind)):
        with pytest.raises(KnowledgeBaseError, match=r"no vectors for an index.*'exact'"):
            refused()
    assert_finds(open_index(kb, "exact", blind), kb)
    kb._hub_id = "org/kb"
    with pytest.raises(KnowledgeBaseError, match="in the Hub cache, which is read-only"):
        build(kb, "faiss-flat")


def test_vectors_that_cannot_be_stored_are_refused(kb):
    class Odd(ToyRetriever):
        change = staticmethod(lambda vectors: vectors)

        def index_vectors(self, entities):
            return self.change(super().index_vectors(entities))

    odd = Odd(MODEL.config).eval()
    odd.load_state_dict(MODEL.state_dict())
    for change, message in (
        (lambda vectors: vectors / 0, "row 0: The vector of an entity is nan or infinite"),
        (lambda vectors: vectors[:, 0], "vectors of shape"),
    ):
        odd.change = change
        with pytest.raises(KnowledgeBaseError, match=message):
            build(kb, "faiss-flat", model=odd)
    odd.change = lambda vectors: vectors
    build(kb, "faiss-flat", model=odd)
    odd.change = lambda vectors: vectors * 2  # same weights, different method
    with pytest.raises(KnowledgeBaseError, match="its vectors differ from those that this model gives"):
        open_index(kb, "faiss-flat", odd)
    build(kb, "faiss-flat", model=odd)
    open_index(kb, "faiss-flat", odd)


@pytest.mark.parametrize(("kind", "package"), [("faiss-pq", "faiss"), ("milvus", "pymilvus")])
def test_the_error_names_the_missing_extra(kb, kind, package, monkeypatch):
    build(kb, kind)
    monkeypatch.setitem(sys.modules, package, None)
    for refused in (lambda: build(kb, kind), lambda: open_index(kb, kind, MODEL)):
        with pytest.raises(MissingExtraError, match=rf"pip install \"hf_mel\[{kind.partition('-')[0]}\]\""):
            refused()
    assert_finds(open_index(kb, "exact", MODEL), kb)


# Damage and crashes


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "changed"])
@pytest.mark.parametrize("kind", ["faiss-flat", "faiss-pq"])
def test_a_damaged_index_file_is_refused_and_can_be_rebuilt(kb, kind, damage):
    build(kb, kind)
    (path,) = kb.path.glob("*.faiss")
    data = path.read_bytes()
    path.unlink()
    changed = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    if damage != "missing":
        path.write_bytes({"cut": data[:-9], "longer": data + b"!", "changed": changed}[damage])
    with pytest.raises(KnowledgeBaseError, match=rf"{path.name}: The index '{kind}' is damaged.*hf-mel kb index"):
        open_index(kb, kind, MODEL)
    assert_finds(open_index(KnowledgeBase.from_pretrained(kb.path, verify=True), "exact", MODEL), kb)
    assert_finds(build(kb, kind), kb)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.clear(),
        lambda r: r.update(version=2),
        lambda r: r.update(kind="faiss-pq"),
        lambda r: r.update(shards=[]),
        lambda r: r.update(shards=3),
        lambda r: r.update(mean=[1.0]),
        lambda r: r.update(radius="wide"),
        lambda r: r.update(probe=None),
        lambda r: r["store"].update(sha256="../../etc/passwd"),
        lambda r: r["store"].update(sha256=None),
        lambda r: r.update(store=[]),
    ],
)
def test_an_invalid_index_record_is_refused(kb, change):
    build(kb, "faiss-flat")
    path = kb.path / "index-faiss-flat.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(KnowledgeBaseError, match=r"index-faiss-flat.*The index 'faiss-flat' is damaged"):
        open_index(kb, "faiss-flat", MODEL)
    assert_finds(build(kb, "faiss-flat"), kb)


@pytest.mark.parametrize("kind", BUILT)
def test_a_full_disk_leaves_the_old_index_and_a_retry_works(kb, kind):
    kb.add(toy_entities(220).select(range(120, 220)), MODEL, PROCESSOR, progress=False)
    index = build(kb, kind)
    index.first_stage = 20
    kb.add(toy_entities(240).select(range(220, 240)), MODEL, PROCESSOR, progress=False)
    before = files(kb.path)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if kind == "faiss-pq" else 6000, limits[1]))
    try:
        with pytest.raises(MelError, match=r"(cannot be written|reports an error).*disk has room"):
            build(kb, kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    if kind != "milvus":  # the database may still write to its folder
        assert files(kb.path) == before
    else:
        assert {k: v for k, v in files(kb.path).items() if ".db/" not in k} == {
            k: v for k, v in before.items() if ".db/" not in k
        }
    assert_finds(index, kb)
    assert_finds(build(kb, kind), kb)
    assert not [name for name in os.listdir(kb.path) if name.startswith(".")]


class Counting(ToyRetriever):
    """Counts computed index vectors, and runs `call` before the chunk that starts at vector `at`."""

    num_vectors, at = 0, None

    def index_vectors(self, entities):
        if len(entities["text"]) == 8:
            if self.at is not None and self.num_vectors >= self.at:
                self.call()
            self.num_vectors += 8
        return super().index_vectors(entities)


def counting(at=None, call=None) -> Counting:
    model = Counting(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    model.at, model.call = at, call
    return model


@pytest.fixture
def _in_eights(monkeypatch):
    monkeypatch.setattr(base, "_CHUNK_BYTES", 8 * 2 * 16 * 4)
    monkeypatch.setattr(base, "_SAMPLE_ROWS", 4096)
    monkeypatch.setattr(faiss, "_CHECKPOINT_SECONDS", -1)
    milvus = pytest.importorskip("hf_mel.kb.indexes.milvus")
    monkeypatch.setattr(milvus, "_BATCH_ROWS", 8)


def ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.usefixtures("_in_eights")
@pytest.mark.parametrize("kind", BUILT)
def test_an_interrupted_index_build_resumes(kb, kind, tmp_path):
    uninterrupted = counting()
    build(kb, kind, model=uninterrupted)
    kb = KnowledgeBase.from_pretrained(shutil.copytree(kb.path, tmp_path / "other", ignore=lambda *_: ["index-*"]))
    for path in kb.path.glob("index-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = counting(uninterrupted.num_vectors - 40, ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        build(kb, kind, model=first)
    with pytest.raises(KnowledgeBaseError, match="no index"):
        open_index(kb, kind, MODEL)
    second = counting()
    index = build(kb, kind, model=second)
    assert second.num_vectors <= 120 + 40 + 8  # only the rest; Milvus computes the norms again
    assert second.num_vectors < uninterrupted.num_vectors
    index.first_stage = 20
    assert_finds(index, kb)
    assert not [name for name in os.listdir(kb.path) if name.startswith(".")]


@pytest.mark.usefixtures("_in_eights")
def test_a_build_resumes_from_the_files_of_a_killed_process(kb, tmp_path):
    stage, leftovers = kb.path / ".index-faiss-flat.building", tmp_path / "leftovers"
    build(kb, "faiss-flat", model=counting(200, lambda: leftovers.exists() or shutil.copytree(stage, leftovers)))
    uninterrupted = files(kb.path)
    for path in kb.path.glob("index-*"):
        path.unlink()
    leftovers.rename(stage)
    second = counting()
    build(kb, "faiss-flat", model=second)
    assert 0 < second.num_vectors < 120
    assert files(kb.path) == uninterrupted


@pytest.mark.usefixtures("_in_eights")
def test_only_one_process_builds_an_index(kb):
    def second():
        with pytest.raises(MelError, match="being built already"):
            build(kb, "faiss-flat")

    build(kb, "faiss-flat", model=counting(200, second))


@pytest.mark.parametrize("nth", [0, 1])
def test_a_build_interrupted_at_any_rename_leaves_the_previous_index(kb, monkeypatch, nth):
    from pathlib import Path

    index = build(kb, "faiss-flat")
    index.first_stage = 20
    kb.add(toy_entities(140).select(range(120, 140)), MODEL, PROCESSOR, progress=False)
    done, real = [], Path.replace

    def replace(self, target):
        if (".building" in str(self) and self.name == "index.faiss") or str(target).endswith("faiss-flat.json"):
            done.append(target)
            if len(done) == nth + 1:
                raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        build(kb, "faiss-flat")
    monkeypatch.setattr(Path, "replace", real)
    opened = open_index(kb, "faiss-flat", MODEL, first_stage=20)
    assert opened.record.rows == 120
    assert_finds(opened, kb)
    assert_finds(build(kb, "faiss-flat"), kb)
    assert len(list(kb.path.glob("*.faiss"))) == 1


# Milvus


@pytest.mark.milvus
def test_an_unreachable_server_or_invalid_address_is_refused(kb, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
    before = files(kb.path)
    for uri, message in (
        ("http://127.0.0.1:1", "127.0.0.1:1 reports an error.*Check the server"),
        ("localhost", "not the address of a Milvus server"),
        ("http://root:secret@127.0.0.1:1", "contains a password.*MILVUS_TOKEN"),
    ):
        with pytest.raises(KnowledgeBaseError, match=message) as error:
            build(kb, "milvus", uri=uri)
        assert "secret" not in str(error.value)
        assert files(kb.path) == before
    build(kb, "milvus")
    assert not any(b"secret" in content for content in files(kb.path).values())
    path = kb.path / "index-milvus.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"store": record["store"] | {"uri": "http://127.0.0.1:1"}}))
    with pytest.raises(KnowledgeBaseError, match=r"reports an error.*Check the server"):
        open_index(kb, "milvus", MODEL)
    assert_finds(build(kb, "milvus"), kb)


@pytest.mark.milvus
@pytest.mark.parametrize("damage", ["missing", "another", "fewer"])
def test_a_missing_or_replaced_milvus_collection_is_refused(kb, damage):
    index = build(kb, "milvus")
    if damage == "fewer":
        index._client.delete(index._collection, ids=[3, 4])
    elif damage == "another":
        index._client.drop_collection(index._collection)
    else:
        shutil.rmtree(kb.path / "index-milvus.db")
    with pytest.raises(KnowledgeBaseError, match="The index 'milvus' is damaged"):
        open_index(kb, "milvus", MODEL)


@pytest.mark.milvus
def test_more_candidates_than_milvus_returns_are_refused(kb, monkeypatch):
    from hf_mel.kb.indexes import milvus

    index = build(kb, "milvus")
    index.first_stage = 30
    kb.remove([f"Q{k}" for k in range(1, 12)])
    monkeypatch.setattr(milvus, "_MAX_RESULTS", 40)
    with pytest.raises(KnowledgeBaseError, match="40 candidates at most, and 41 are needed, of which 11 for removed"):
        index.find(MENTIONS, 3)


# Linking and publishing


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_linker_gives_the_same_results_with_and_without_an_index(kb, kind):
    if kind != "exact":
        build(kb, kind)
    mentions = [{**row, "start": NO_SPAN, "end": NO_SPAN} for row in toy_mentions(8, 120)]
    plain = EntityLinker(MODEL, PROCESSOR, kb, nil_threshold=0.1)
    linker = EntityLinker(MODEL, PROCESSOR, str(kb.path), nil_threshold=0.1, index=kind, first_stage=30)
    for result, expected in zip(linker(mentions, top_k=5), plain(mentions, top_k=5), strict=True):
        assert [c.entity_id for c in result.candidates] == [c.entity_id for c in expected.candidates]
        assert [c.score for c in result.candidates] == pytest.approx([c.score for c in expected.candidates], abs=1e-5)
        assert result.entity_id == expected.entity_id


def test_an_index_is_not_published(kb, tmp_path):
    before = set(kb_publication(kb.path, "org/kb", work=tmp_path).files)
    for kind in ("faiss-flat", "faiss-pq"):
        build(kb, kind)
    assert kb.info()["indexes"] == ["faiss-flat", "faiss-pq"]
    assert set(kb_publication(kb.path, "org/kb", work=tmp_path).files) == before
