"""Candidates from every source, and the cache."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch

from hf_mel.candidates import make as module
from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.make import make_candidates, retriever_candidates
from hf_mel.candidates.sources import name_candidates, prior_candidates, union_candidates
from hf_mel.errors import RecipeError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.schema import mention_features
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model
from tests.toy_documents import toy_documents

ENTITIES, MENTIONS = toy_entities(12), toy_mentions(8)


def test_candidates_of_a_retriever_are_its_highest_scores():
    model, processor = toy_model(), ToyProcessor()
    lists = retriever_candidates(ModelInputs(model, processor), MENTIONS, ENTITIES, k=4)
    with torch.no_grad():
        scores = model.score(
            model.encode_mentions(**processor(mentions=list(MENTIONS))),
            model.encode_entities(**processor(entities=list(ENTITIES))),
        )
    best = scores.sort(descending=True, dim=1)
    assert lists.entity_ids == [[f"Q{row + 1}" for row in rows] for rows in best.indices[:, :4].tolist()]
    torch.testing.assert_close(torch.tensor(lists.scores["retriever"]), best.values[:, :4])
    assert lists.setting["retriever"]["type"] == "toy_retriever"
    assert len(retriever_candidates(ModelInputs(model, processor), MENTIONS.select([]), ENTITIES, k=4)) == 0


def test_joined_sources_are_made_once_and_cached(tmp_path, monkeypatch):
    register()
    toy_model().save_pretrained(tmp_path / "run")
    ToyProcessor().save_pretrained(tmp_path / "run")
    options = {"k": 5, "training": MENTIONS, "retriever": tmp_path / "run", "device": "cpu"}
    options["cache_dir"] = tmp_path / "cache"
    first = make_candidates("name+prior+retriever", MENTIONS, ENTITIES, **options)
    parts = [
        name_candidates(MENTIONS, ENTITIES, k=5),
        prior_candidates(MENTIONS, MENTIONS, k=5),
        retriever_candidates(ModelInputs(toy_model(), ToyProcessor()), MENTIONS, ENTITIES, k=5),
    ]
    assert first.entity_ids == union_candidates(parts, k=5).entity_ids
    cached_kinds = [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert sorted(cached_kinds) == ["kb", "name", "prior", "retriever"]
    for name in ("name_candidates", "prior_candidates", "retriever_candidates"):
        monkeypatch.setattr(module, name, None)  # so that making one again would fail
    again = make_candidates("name+prior+retriever", MENTIONS, ENTITIES, **options)
    assert again.entity_ids == first.entity_ids
    for changed in ({"k": 4}, {"scorer": "ratio"}):
        with pytest.raises(TypeError):
            make_candidates("name", MENTIONS, ENTITIES, **{**options, **changed})
    with pytest.raises(TypeError):
        make_candidates("name", MENTIONS.select(range(7)), ENTITIES, **options)
    toy_model(seed=1).save_pretrained(tmp_path / "run")
    with pytest.raises(TypeError):
        make_candidates("retriever", MENTIONS, ENTITIES, **options)


def test_entities_are_encoded_once_for_all_splits(tmp_path, monkeypatch):
    register()
    toy_model().save_pretrained(tmp_path / "run")
    ToyProcessor().save_pretrained(tmp_path / "run")
    options = {"k": 5, "retriever": tmp_path / "run", "device": "cpu"}
    cached = {**options, "cache_dir": tmp_path / "cache"}
    built = []
    build = KnowledgeBase.build
    monkeypatch.setattr(KnowledgeBase, "build", lambda *given, **kwargs: built.append(1) or build(*given, **kwargs))
    for some in (range(3), range(3, 8)):
        candidates = make_candidates("retriever", MENTIONS.select(some), ENTITIES, **cached)
        expected = make_candidates("retriever", MENTIONS.select(some), ENTITIES, **options)
        assert candidates.entity_ids == expected.entity_ids
        for row, wanted in zip(candidates.scores["retriever"], expected.scores["retriever"], strict=True):
            assert row == pytest.approx(wanted)
    assert len(built) == 1
    make_candidates("retriever", MENTIONS, ENTITIES.select(range(6)), **cached)
    ToyProcessor(text_width=40).save_pretrained(tmp_path / "run")
    make_candidates("retriever", MENTIONS.select([0]), ENTITIES, **cached)
    assert len(built) == 3
    for shard in (tmp_path / "cache").glob("kb-*/encodings-*"):
        shard.write_bytes(shard.read_bytes()[:-40])
    make_candidates("retriever", MENTIONS.select([1]), ENTITIES, **cached)
    assert len(built) == 4


def test_processes_that_start_together_share_one_encoding(tmp_path, monkeypatch):
    register()
    toy_model().save_pretrained(tmp_path / "run")
    ToyProcessor().save_pretrained(tmp_path / "run")
    options = {"k": 5, "retriever": tmp_path / "run", "device": "cpu", "cache_dir": tmp_path / "cache"}
    built, build = [], KnowledgeBase.build

    def slowly(*given, **kwargs):
        built.append(1)
        time.sleep(0.5)
        return build(*given, **kwargs)

    monkeypatch.setattr(KnowledgeBase, "build", slowly)
    with ThreadPoolExecutor(2) as pool:
        made = list(
            pool.map(lambda _: make_candidates("retriever", MENTIONS, ENTITIES, **options).entity_ids, range(2))
        )
    assert made[0] == made[1]
    assert len(built) == 1


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("fuzzy", {}, "'fuzzy'.*name, exact, bm25, prior, dictionary, namesake, retriever"),
        ("name+name", {}, "twice"),
        ("name", {"k": 0}, "too few"),
        ("name", {"scorer": "soundex"}, "'soundex'.*WRatio"),
        ("retriever", {}, "run folder"),
        ("prior", {}, "training split"),
    ],
)
def test_wrong_sources_and_options_are_refused_before_any_work(source, options, message):
    with pytest.raises(RecipeError, match=message):
        make_candidates(source, MENTIONS, ENTITIES, **options)


def test_mentions_without_candidates_get_those_of_their_document():
    documents = toy_documents(12)
    by_name = make_candidates("name", documents, ENTITIES, k=4)
    shared = make_candidates("name+document", documents, ENTITIES, k=4)
    for i, modality in enumerate(documents["modality"]):
        assert bool(by_name.entity_ids[i]) == (modality == "text")
        if modality == "text":
            assert shared.entity_ids[i] == by_name.entity_ids[i]
        else:
            of_document = {e for j in range(12) if j % 3 == i % 3 for e in by_name.entity_ids[j]}
            assert len(shared.entity_ids[i]) == 4
            assert set(shared.entity_ids[i]) <= of_document
    assert set(shared.scores) == {"name", "document"}


def test_mentions_of_a_document_share_candidates_beyond_k():
    documents = toy_documents(12)
    plain = make_candidates("name+dictionary+document", documents, ENTITIES, k=4)
    shared = make_candidates("name+dictionary+document+shared", documents, ENTITIES, k=4)
    for i, ids in enumerate(plain.entity_ids):
        of_others = {e for j in range(12) if j % 3 == i % 3 and i != j for e in plain.entity_ids[j][:4]}
        assert shared.entity_ids[i][: len(ids)] == ids
        assert set(shared.entity_ids[i]) == {*ids, *of_others}
    assert shared.longest > 4
    with pytest.raises(RecipeError, match="finds none"):
        make_candidates("document+shared", documents, ENTITIES, k=4)


def test_released_candidates_join_others_but_not_other_priors():
    rows = [{**row, "candidates": ["Q3", "Q1"], "candidate_priors": [0.2, 0.7]} for row in MENTIONS.to_list()]
    features = mention_features(stratum=datasets.Value("string"), candidate_priors=[datasets.Value("float64")])
    mentions = datasets.Dataset.from_list(rows, features=features)
    candidates = make_candidates("release+name", mentions, ENTITIES, k=3)
    assert [ids[0] for ids in candidates.entity_ids] == ["Q1"] * 8
    assert all(priors.items() >= {"Q1": 0.7}.items() for priors in candidates.priors.values())
    with pytest.raises(RecipeError, match="The release ships priors"):
        make_candidates("release+prior", mentions, ENTITIES, k=3, training=MENTIONS)
    with pytest.raises(RecipeError, match="shares the candidates"):
        make_candidates("document", mentions, ENTITIES, k=3)


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(CandidateLists, "save", None)
    make_candidates("name", MENTIONS, ENTITIES)


def test_candidates_of_a_retriever_with_a_name_weight_are_those_that_link_finds(tmp_path):
    register()
    model = toy_model()
    model.config.name_weight = 1.5
    model.save_pretrained(tmp_path / "run")
    ToyProcessor().save_pretrained(tmp_path / "run")
    names = [ENTITIES["name"][i] if i % 2 else ENTITIES["name"][i].split()[1] for i in range(len(MENTIONS))]
    mentions = MENTIONS.remove_columns("mention").add_column("mention", names)
    options = {"k": 4, "retriever": tmp_path / "run", "device": "cpu", "cache_dir": tmp_path / "cache"}
    lists = make_candidates("retriever", mentions, ENTITIES, **options)
    kb = KnowledgeBase.build(ENTITIES, model, ToyProcessor(), progress=False)
    results = EntityLinker(model, ToyProcessor(), kb)(
        [
            {"text": row["text"], "mention": row["mention"], "start": -1, "end": -1, "image": row["image"]}
            for row in mentions
        ],
        top_k=4,
    )
    assert lists.entity_ids == [[c.entity_id for c in result.candidates] for result in results]
    assert lists.setting["name_weight"] == 1.5
    model.config.name_weight = None
    model.save_pretrained(tmp_path / "run")
    assert (
        make_candidates("retriever", mentions, ENTITIES, **options).entity_ids != lists.entity_ids
    )  # not from the cache


def test_the_digest_of_lists_is_that_of_mentions_and_candidates():
    lists = CandidateLists(["a", "b"], [["x", "y"], []], {"name": [[2.0, 1.0], []]}, {"k": 2})
    same = CandidateLists(["a", "b"], [["x", "y"], []], {}, {"source": "file"})
    assert lists.sha256 == same.sha256
    for ids, entities in (
        (["b", "a"], [["x", "y"], []]),
        (["a", "b"], [["y", "x"], []]),
        (["a", "b"], [["x"], ["y"]]),
    ):
        assert CandidateLists(ids, entities, {}).sha256 != lists.sha256
