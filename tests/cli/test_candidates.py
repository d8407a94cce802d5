"""Tests of `hf-mel candidates`, and of evaluating and linking with a reranker."""

from __future__ import annotations

import json

import datasets
import pytest
import typer
from typer.testing import CliRunner

from hf_mel.candidates import make as making
from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.sources import name_candidates
from hf_mel.cli.candidates import candidates
from hf_mel.cli.evaluate import evaluate
from hf_mel.cli.link import link
from hf_mel.errors import RecipeError, UnknownModelError
from hf_mel.evaluation.candidate_evaluator import END_TO_END, CandidateEvaluator
from hf_mel.inference.inputs import ModelInputs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from tests.toy import (
    ToyPairProcessor,
    ToyProcessor,
    register,
    toy_entities,
    toy_mentions,
    toy_model,
    toy_reranker,
    write_toy_dataset,
)

TEST = toy_mentions(60, nil_every=6).select(range(40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    register()
    folder = tmp_path_factory.mktemp("candidates")
    for name, model, processor in (
        ("model", toy_model(), ToyProcessor()),
        ("reranker", toy_reranker(), ToyPairProcessor()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_toy_dataset(folder / "toy_candidates")
    KnowledgeBase.build(toy_entities(), toy_model(), ToyProcessor(), output=folder / "kb", progress=False)
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(making, "default_cache", lambda: tmp_path / "lists")
    monkeypatch.chdir(folder)

    def run(verb, *arguments):
        app = typer.Typer()
        app.command()(verb)
        command = [*map(str, arguments), "--device", "cpu"]
        return CliRunner().invoke(app, command, env={"COLUMNS": "200"}, catch_exceptions=False)

    return run


def test_candidates_are_written_to_a_file_and_reranked_from_it(run, tmp_path):
    outcome = run(candidates, "toy_candidates", "--output", tmp_path / "c.parquet", "--k", 5, "--scorer", "ratio")
    assert outcome.exit_code == 0
    loaded = CandidateLists.load(tmp_path / "c.parquet")
    expected = name_candidates(TEST, toy_entities(), k=5, scorer="ratio")
    assert (loaded.mention_ids, loaded.entity_ids) == (expected.mention_ids, expected.entity_ids)
    recall = expected.recall(list(TEST["entity_id"]), [5])["recall@5"]
    assert f"{100 * recall:.1f} at 5" in outcome.stdout
    output = ["--output", tmp_path / "r.json", "--predictions", tmp_path / "p.jsonl", "--ks", "1,2"]
    outcome = run(evaluate, "reranker", "--dataset", "toy_candidates", "--candidates", tmp_path / "c.parquet", *output)
    assert outcome.exit_code == 0
    result = CandidateEvaluator(toy_entities(), ks=(1, 2), progress=False)(
        ModelInputs(toy_reranker(), ToyPairProcessor()), TEST, expected
    )
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["metrics"] == pytest.approx(result.metrics)
    assert written["gold_added"]["protocol"] == "candidates (gold added)"
    assert written["candidates"]["scorer"] == "ratio"
    assert "gold in training" in written["strata"]
    for words in ("end to end", "gold added", "reranker, jointly", "candidates: name"):
        assert words in outcome.stdout
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert records == json.loads(json.dumps(list(result.records())))


def test_candidates_of_a_retriever_are_reranked_without_joint_ranking(run, tmp_path):
    output = tmp_path / "r.json"
    outcome = run(
        evaluate, "reranker", "--dataset", "toy_candidates", "--candidates", "retriever+prior", "--retriever", "model",
        "--num-candidates", 4, "--no-joint", "--output", output,
    )  # fmt: skip
    assert outcome.exit_code == 0
    written = json.loads(output.read_text())
    assert written["order"] == "reranker"
    assert written["candidates"]["source"] == "retriever+prior"
    assert set(written["orders"]) == {
        "reranker", "reranker, jointly", "candidates: retriever", "candidates: prior",
    }  # fmt: skip


def test_the_candidate_weight_is_chosen_on_validation_and_set_on_test(run, tmp_path):
    arguments = ["reranker", "--dataset", "toy_candidates", "--candidates", "name", "--output", tmp_path / "r.json"]
    assert run(evaluate, *arguments, "--split", "validation", "--candidate-weight", "auto").exit_code == 0
    selected = json.loads((tmp_path / "r.json").read_text())["candidate_weight"]
    tried = selected["chosen_by_mrr"]
    assert tried[f"{selected['weight']:g}"] == max(tried.values())
    outcome = run(evaluate, *arguments, "--candidate-weight", "2")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["order"] == "reranker + candidates"
    assert written["candidate_weight"]["weight"] == 2
    assert "reranker, jointly + 2 * name score" in outcome.stdout
    with pytest.raises(RecipeError, match=r"on 'test'.*--split validation"):
        run(evaluate, *arguments, "--candidate-weight", "auto")
    assert run(evaluate, *arguments, "--candidate-weight", "name=2").exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text()) | {"wall_time_seconds": 0} == written | {
        "wall_time_seconds": 0
    }
    with pytest.raises(RecipeError, match=r"on 'test'"):
        run(evaluate, *arguments, "--candidate-weight", "name=auto")
    with pytest.raises(RecipeError, match=r"no scores of 'prior'.*Choose among name"):
        run(evaluate, *arguments, "--candidate-weight", "prior=2")
    for weight in ("much", "-1", "nan", "=2", "name=", "name=much"):
        assert run(evaluate, *arguments, "--candidate-weight", weight).exit_code == 2
    with pytest.raises(RecipeError, match="ranks all entities"):
        run(evaluate, "model", "--dataset", "toy_candidates", "--candidate-weight", "2")


def test_a_retriever_is_evaluated_on_candidates(run, folder, tmp_path):
    arguments = ["model", "--dataset", "toy_candidates", "--candidates", "name", "--num-candidates", 3]
    outcome = run(evaluate, *arguments, "--ks", "1,3", "--output", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["protocol"] == END_TO_END
    assert (results["order"], results["candidates"]["k"]) == ("retriever", 3)
    assert set(results["orders"]) == {"retriever", "candidates: name"}
    assert results["metrics"]["hits@3"] <= results["candidates"]["recall"]["recall@3"]
    assert "candidates: name" in outcome.stdout
    run(evaluate, *arguments, "--candidate-weight", "2", "--output", tmp_path / "w.json")
    assert json.loads((tmp_path / "w.json").read_text())["order"] == "retriever + candidates"


def test_options_that_do_not_apply_are_refused(run, folder):
    with pytest.raises(RecipeError, match=r"none were given.*--candidates retriever --retriever"):
        run(evaluate, "reranker", "--dataset", "toy_candidates")
    with pytest.raises(RecipeError, match=r"ranks all entities and cannot use --retriever.*or give --candidates"):
        run(evaluate, "model", "--dataset", "toy_candidates", "--retriever", "model")
    for option in (("--units", "text"), ("--joint",), ("--nil-threshold", "1")):
        with pytest.raises(RecipeError, match=rf"ranks the candidates alone and cannot use {option[0][:5]}"):
            run(evaluate, "model", "--dataset", "toy_candidates", "--candidates", "name", *option)
    with pytest.raises(RecipeError, match=r"cannot use --units.*Leave out options for retrievers"):
        run(evaluate, "reranker", "--dataset", "toy_candidates", "--candidates", "name", "--units", "text")
    with pytest.raises(RecipeError, match="'fuzzy'"):
        run(candidates, "toy_candidates", "--output", folder / "c.parquet", "--source", "fuzzy")
    with pytest.raises(UnknownModelError, match="reranks candidates"):
        run(link, "reranker", "--kb", "kb", "--text", "a b", "--mention", "b")


def test_several_mentions_of_a_text_are_linked_with_a_reranker(run, folder):
    text = "Entity c met Entity d."
    arguments = ["model", "--kb", "kb", "--text", text, "--mention", "Entity c", "--mention", "Entity d"]
    outcome = run(link, *arguments, "--reranker", "reranker", "--rerank-k", 4, "--json")
    linker = EntityLinker(
        toy_model(), ToyProcessor(), folder / "kb", reranker=toy_reranker(), reranker_processor=ToyPairProcessor(),
        rerank_k=4,
    )  # fmt: skip
    expected = linker([{"text": text, "mention": surface} for surface in ("Entity c", "Entity d")])
    for row, result in zip(json.loads(outcome.stdout), expected, strict=True):
        assert [c["entity_id"] for c in row["candidates"]] == [c.entity_id for c in result.candidates]
        assert row["candidates"][0]["reranker_score"] == pytest.approx(result.best.reranker_score)
    printed = run(link, *arguments, "--reranker", "reranker", "--rerank-k", 4).stdout
    assert "reranker" in printed
    assert f"{expected[1].best.reranker_score:.3f}" in printed
    assert run(link, *arguments, "--start", 0).exit_code == 2


def test_candidates_go_to_standard_output_alone(run, tmp_path):
    outcome = run(candidates, "toy_candidates", "--output", "-", "--k", 5)
    (tmp_path / "c.parquet").write_bytes(outcome.stdout_bytes)
    assert CandidateLists.load(tmp_path / "c.parquet").mention_ids == list(TEST["mention_id"])
    assert b"on average" in outcome.stderr_bytes
