"""MelTrainer with a toy reranker, compared with plain gradient steps."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from hf_mel.candidates.lists import CandidateLists
from hf_mel.data.loading import load_mentions
from hf_mel.errors import DataFormatError, RecipeError, UnknownEntityError
from hf_mel.evaluation.candidate_evaluator import END_TO_END, CandidateEvaluator
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.hub.model_cards import eval_results
from hf_mel.inference.checkpoints import load_reranker, load_retriever
from hf_mel.inference.inputs import ModelInputs
from hf_mel.schema import NIL
from hf_mel.training import linking_run
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.collators import Examples, PairCollator
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.sampling import GroupingSampler
from hf_mel.training.trainer import MelTrainer
from tests.toy import ToyPairProcessor, ToyProcessor, register, toy_entities, toy_mentions, toy_model, toy_reranker
from tests.toy_documents import ToyDocumentProcessor, toy_document_reranker, toy_documents
from tests.training.toy_run import write_dataset

ENTITIES, TRAIN, VALIDATION = toy_entities(12), toy_mentions(16), toy_mentions(12)


def lists(mentions, missing: int = 0) -> CandidateLists:
    """Returns five candidates per mention, with the gold except for the first `missing` mentions."""
    candidates = []
    for i, gold in enumerate(mentions["entity_id"]):
        row = int(gold[1:]) - 1
        candidates.append([f"Q{1 + (row + c) % 12}" for c in range(i < missing, 5 + (i < missing))])
    return CandidateLists(list(mentions["mention_id"]), candidates, {}, {"source": "made up"})


def trainer(tmp_path, model=None, **arguments) -> MelTrainer:
    options = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "disable_tqdm": True,
        "log_level": "error",
        "num_negatives": 2,
    }
    return MelTrainer(
        toy_reranker() if model is None else model,
        MelTrainingArguments(output_dir=str(tmp_path / "checkpoints"), **{**options, **arguments}),
        train_dataset=TRAIN,
        eval_dataset=VALIDATION,
        entities=ENTITIES,
        processing_class=ToyPairProcessor(),
        train_candidates=lists(TRAIN),
        eval_candidates=lists(VALIDATION, missing=3),
    )


@pytest.mark.parametrize("unit", ["mention", "context"])
def test_steps_of_two_epochs_are_plain_gradient_steps(tmp_path, unit):
    start = toy_reranker(unit=unit)
    trained = trainer(
        tmp_path,
        copy.deepcopy(start),
        num_train_epochs=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    trained.train()
    examples = Examples(TRAIN, unit)
    sampler = GroupingSampler(range(len(examples)))
    collator = PairCollator(
        ModelInputs(None, ToyPairProcessor()),
        ENTITIES,
        lists(TRAIN).by_mention,
        num_negatives=2,
        unit=unit,
        mentions_per_example=2,
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        collator.epoch, order = epoch, list(sampler)
        for first in range(0, len(order), 4):
            start.zero_grad()
            start(**collator(examples.__getitems__(order[first : first + 4]))).loss.backward()
            with torch.no_grad():
                for parameter in start.parameters():
                    parameter -= 0.1 * parameter.grad
    for (name, expected), actual in zip(start.named_parameters(), trained.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_training_learns_and_ends_with_the_best_checkpoint(tmp_path):
    trained = trainer(tmp_path, num_train_epochs=8, learning_rate=1.0, num_negatives=4)
    before = trained.evaluate()["eval_mrr"]
    trained.train()
    evaluations = [entry["eval_mrr"] for entry in trained.state.log_history if "eval_mrr" in entry]
    assert max(evaluations) > before + 0.05
    assert max(evaluations) > evaluations[-1]  # or this test would not see which checkpoint was kept
    assert trained.evaluate()["eval_mrr"] == max(evaluations)
    result = CandidateEvaluator(ENTITIES, progress=False)(
        ModelInputs(trained.model, ToyPairProcessor()), VALIDATION, lists(VALIDATION, missing=3)
    )
    assert result.orders[END_TO_END]["reranker, jointly"]["metrics"]["mrr"] == max(evaluations)
    assert result.metrics["num_missed"] == 3


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    options = {"num_train_epochs": 3, "save_steps": 2, "save_strategy": "steps", "save_total_limit": None}
    options |= {"eval_strategy": "no", "load_best_model_at_end": False}
    whole = trainer(tmp_path / "a", **options)
    whole.train()
    again = trainer(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoints/checkpoint-6"))  # inside the second epoch
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_uses_a_fixed_sample_of_whole_contexts(tmp_path):
    built = trainer(tmp_path, eval_mentions=5)
    chosen = built.eval_dataset
    assert 5 <= len(chosen) < 8
    assert built.eval_total == 12
    contexts = set(chosen["context_id"])
    assert chosen["mention_id"] == [row["mention_id"] for row in VALIDATION if row["context_id"] in contexts]
    assert trainer(tmp_path, eval_mentions=5).eval_dataset["mention_id"] == chosen["mention_id"]
    assert built.evaluate()["eval_num_ranked"] == len(chosen)


def test_images_of_a_frozen_encoder_are_encoded_once(tmp_path, monkeypatch):
    model, seen = toy_reranker(), []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.extend(pixels) or encode(pixels))
    trainer(tmp_path, model, num_train_epochs=3, eval_strategy="epoch").train()
    assert len(seen) == len({tuple(pixel.flatten().tolist()) for pixel in seen})
    seen.clear()
    model.image_features_are_fixed = False
    trainer(tmp_path, model, num_train_epochs=3, eval_strategy="no", load_best_model_at_end=False).train()
    assert len(seen) > 50  # pixels with every batch


def test_candidates_are_needed_and_checked_before_training(tmp_path):
    options = {"entities": ENTITIES, "processing_class": ToyPairProcessor()}
    arguments = MelTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(RecipeError, match=r"none were given.*candidates\.source"):
        MelTrainer(toy_reranker(), arguments, train_dataset=TRAIN, **options)
    wrong = CandidateLists(list(TRAIN["mention_id"]), [["Q99"]] * 16, {})
    with pytest.raises(UnknownEntityError, match="row m0: The candidate 'Q99'"):
        MelTrainer(toy_reranker(), arguments, train_dataset=TRAIN, train_candidates=wrong, **options)


@pytest.mark.parametrize("wrong", [{"num_negatives": 0}, {"eval_mentions": 0}])
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MelTrainingArguments(output_dir="nowhere", **wrong)


# Recipes


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A recipe that continues a saved model on a small data set, with the candidate cache in tmp_path."""
    register()
    monkeypatch.setattr(linking_run, "default_cache", lambda: tmp_path / "cache")
    toy_reranker().save_pretrained(tmp_path / "start")
    ToyPairProcessor().save_pretrained(tmp_path / "start")
    return {
        "name": "toy",
        "model": {"from_pretrained": str(tmp_path / "start")},
        "data": {"dataset": str(write_dataset(tmp_path / "toy_without_nil"))},
        "candidates": {"source": "name+prior", "k": 4},
        "training": {"num_train_epochs": 1, "use_cpu": True, "bf16": False, "disable_tqdm": True, "eval_mentions": 6},
    }


def test_a_recipe_trains_a_reranker_and_records_its_candidates(base, tmp_path):
    folder = run_recipe(Recipe.from_dict(base), tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    assert results["candidates"] == {
        "source": "name+prior", "k": 4, "scorer": "WRatio", "retriever": None, "file": None, "train_file": None,
    }  # fmt: skip
    validation = results["validation"]
    assert validation["protocol"] == END_TO_END
    assert validation["candidates"]["source"] == "name+prior"
    assert results["data"]["validation_mentions"] == validation["num_mentions"] < 8
    assert results["data"]["validation_mentions_of"] == 12
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert Recipe.load(folder / "recipe.yaml").to_dict() == Recipe.from_dict(base).to_dict()
    model, _ = load_reranker(folder, device="cpu")
    log = [e["eval_mrr"] for e in json.loads((folder / "training_log.json").read_text()) if "eval_mrr" in e]
    assert validation["metrics"]["mrr"] == pytest.approx(max(log))
    assert not torch.equal(model.out.weight, toy_reranker().out.weight)


@pytest.mark.parametrize("reranks", [True, False])
def test_a_run_can_end_without_an_evaluation(base, tmp_path, monkeypatch, reranks):
    def fail(*args, **kwargs):
        raise AssertionError("evaluated")

    if reranks:
        recipe = base
    else:
        toy_model().save_pretrained(tmp_path / "start")
        ToyProcessor().save_pretrained(tmp_path / "start")
        recipe = {key: value for key, value in base.items() if key != "candidates"}
    training = {"final_evaluation": False, "eval_strategy": "no", "load_best_model_at_end": False}
    recipe = {**recipe, "training": {**base["training"], **training}}
    monkeypatch.setattr(CandidateEvaluator, "__call__", fail)
    monkeypatch.setattr(FullEvaluator, "__call__", fail)
    folder = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    assert results["validation"] is None
    assert results["nil"] is None
    card = (folder / "README.md").read_text()
    assert "was not evaluated on `validation`" in card
    assert ("up to 4 by name+prior" in card) == reranks
    assert eval_results(results | {"data": results["data"] | {"dataset": "org/toy", "revision": "f" * 40}}) == []
    (load_reranker if reranks else load_retriever)(folder, device="cpu")


def test_candidates_from_files_by_split(base, tmp_path):
    for split in ("train", "validation"):
        lists(load_mentions(base["data"]["dataset"], split)).save(tmp_path / f"{split}.parquet")
    recipe = {**base, "candidates": {"source": "file", "file": str(tmp_path / "{split}.parquet"), "k": 3}}
    folder = run_recipe(Recipe.from_dict(recipe), tmp_path / "run")
    assert json.loads((folder / "results.json").read_text())["validation"]["candidates"]["k"] == 3
    (tmp_path / "validation.parquet").unlink()
    with pytest.raises(DataFormatError, match=r"validation\.parquet"):
        run_recipe(Recipe.from_dict(recipe), tmp_path / "other")


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (None, "A reranker needs candidates"),
        ({"source": "fuzzy"}, "andidates cannot come from 'fuzzy'"),
        ({"source": "retriever"}, "needs a trained retriever"),
        ({"source": "file"}, "need each other"),
        ({"source": "name", "file": "x"}, "need each other"),
        ({"source": "name", "k": "many"}, "The value 'many' of candidates.k is not a whole number"),
        ({"source": "name", "scorrer": "x"}, "Did you mean 'scorer'"),
    ],
)
def test_candidates_of_a_recipe_are_checked(base, tmp_path, candidates, message):
    with pytest.raises(RecipeError, match=message):
        run_recipe(Recipe.from_dict({**base, "candidates": candidates}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_retriever_takes_no_candidates(base, tmp_path):
    toy_model().save_pretrained(tmp_path / "start")
    with pytest.raises(RecipeError, match="Remove the section 'candidates'"):
        run_recipe(Recipe.from_dict(base), tmp_path / "run")


# Documents

DOCUMENTS = toy_documents(16, nil_every=7)


def with_priors(mentions, prior=0.25) -> CandidateLists:
    """Returns five candidates with priors per mention, some with the gold. The last mention has no candidates."""
    candidates = [
        [f"Q{1 + (3 * i + c) % 12}" for c in range(5 * (i + 1 < len(mentions)))] for i in range(len(mentions))
    ]
    scores = [[prior * (1 + c) / 2 for c in range(len(ids))] for ids in candidates]
    return CandidateLists(list(mentions["mention_id"]), candidates, {"prior": scores}, {"source": "made up"})


def document_trainer(tmp_path, model=None, lists=None, **arguments) -> MelTrainer:
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "num_negatives": 4, "log_level": "error"}
    options |= {"disable_tqdm": True, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    return MelTrainer(
        toy_document_reranker() if model is None else model,
        MelTrainingArguments(output_dir=str(tmp_path / "checkpoints"), **{**options, **arguments}),
        train_dataset=DOCUMENTS,
        eval_dataset=DOCUMENTS,
        entities=ENTITIES,
        processing_class=ToyDocumentProcessor(),
        train_candidates=with_priors(DOCUMENTS) if lists is None else lists,
        eval_candidates=with_priors(DOCUMENTS),
    )


def test_a_document_model_trains_on_whole_documents_with_their_priors(tmp_path):
    start = toy_document_reranker()
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    trained = document_trainer(tmp_path, copy.deepcopy(start), **options)
    trained.train()
    with_gold = DOCUMENTS.select([i for i, gold in enumerate(DOCUMENTS["entity_id"]) if gold != NIL])
    collator = PairCollator(
        ModelInputs(None, ToyDocumentProcessor()),
        ENTITIES,
        with_priors(DOCUMENTS).by_mention,
        priors=with_priors(DOCUMENTS).priors,
        num_negatives=4,
        unit="document",
    )
    examples = [
        [with_gold[i] for i in range(len(with_gold)) if with_gold[i]["document_id"] == f"d{k}"] for k in range(4)
    ]
    sampler = GroupingSampler(range(4))
    for epoch in range(2):
        sampler.set_epoch(epoch)
        collator.epoch, order = epoch, list(sampler)
        for first in (0, 2):
            start.zero_grad()
            start(**collator([examples[i] for i in order[first : first + 2]])).loss.backward()
            with torch.no_grad():
                for parameter in start.parameters():
                    parameter -= 0.1 * parameter.grad
    for (name, expected), actual in zip(start.named_parameters(), trained.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=name)


def test_documents_are_evaluated_whole(tmp_path):
    built = document_trainer(tmp_path, eval_mentions=5)
    chosen = built.eval_dataset
    assert len(chosen) == 8  # two of four
    assert all(sum(other == name for other in chosen["document_id"]) == 4 for name in set(chosen["document_id"]))
    assert "eval_micro_f1" in built.evaluate()


def test_documents_that_are_too_long_and_wrong_priors_raise(tmp_path):
    model = toy_document_reranker()
    model.max_mentions = 2
    with pytest.raises(DataFormatError, match="mentions; the model takes 2 together"):
        document_trainer(tmp_path, model)
    with pytest.raises(DataFormatError, match=r"row m0: The prior of the candidate 'Q1' is -0.5"):
        document_trainer(tmp_path, lists=with_priors(DOCUMENTS, prior=-1.0))
