"""Lists of the training split out of fold: the parts, independence of a list from its own golds, resuming, errors."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.make import retriever_candidates
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.errors import DataFormatError, RecipeError
from hf_mel.training import fold_lists, linking_run
from hf_mel.training.assemble import build_model
from hf_mel.training.fold_lists import fold_rows
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.run_folder import training_arguments
from hf_mel.training.tokenizer import texts_of
from hf_mel.training.trainer import MelTrainer
from tests.training.toy_run import recipe_dict, write_dataset


def recipe_for(dataset, count=2, k=4, **training) -> dict:
    content = recipe_dict(dataset, num_train_epochs=1, **training)
    return {**content, "name": "folds", "task": "candidates", "folds": {"count": count, "k": k}}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=8, max_size=30), st.integers(2, 4), st.integers(0, 3))
def test_parts_are_whole_contexts_and_cover_every_mention_once(contexts, count, seed):
    mentions = Dataset.from_dict({"context_id": [f"c{number}" for number in contexts]})
    if len(set(contexts)) < count:
        with pytest.raises(DataFormatError, match="too few"):
            fold_rows(mentions, count, seed)
        return
    parts = fold_rows(mentions, count, seed)
    assert sorted(row for part in parts for row in part) == list(range(len(contexts)))
    part_of = [{number for number, part in enumerate(parts) for row in part if contexts[row] == c} for c in contexts]
    assert all(len(numbers) == 1 for numbers in part_of)
    sizes = [len({contexts[row] for row in part}) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_list_is_that_of_a_retriever_trained_on_the_other_parts(tmp_path):
    dataset = write_dataset(tmp_path / "toy_data")
    content = recipe_for(dataset, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    folder = run_recipe(Recipe.from_dict(content), tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "results.json", "train.parquet"}
    lists = CandidateLists.load(folder / "train.parquet")
    train, entities = load_mentions(dataset, "train"), load_entities(dataset)
    assert lists.mention_ids == list(train["mention_id"])
    results = json.loads((folder / "results.json").read_text())
    assert results["candidates"]["recall"] == lists.recall(list(train["entity_id"]), [1, 3, 4])

    recipe = Recipe.from_dict(content)
    rows = fold_rows(train, 2, 0)[1]
    others = train.select([row for row in range(len(train)) if row not in rows])
    fold_lists.set_seed(0)
    model, processor = build_model(recipe, texts_of(others, entities))
    arguments = training_arguments(recipe, tmp_path / "plain")
    plain = MelTrainer(model, arguments, others, entities=entities, processing_class=processor)
    plain.train()
    plain.model.eval()
    expected = retriever_candidates(plain.inputs, train.select(rows), entities, k=4)
    assert lists.for_mentions(train.select(rows)).entity_ids == expected.entity_ids
    for actual, wanted in zip(
        lists.for_mentions(train.select(rows)).scores["retriever"], expected.scores["retriever"], strict=True
    ):
        assert actual == pytest.approx(wanted, abs=1e-6)


def test_every_retriever_also_learns_from_extra_mentions(tmp_path, monkeypatch):
    content = recipe_for(write_dataset(tmp_path / "toy_data"))
    content["data"]["extra_mentions"] = {"entities": 2}
    recipe = Recipe.from_dict(content)
    train, entities = load_mentions(recipe.data.dataset, "train"), load_entities(recipe.data.dataset)
    learned = []

    class Recorder(MelTrainer):
        def __init__(self, *args, train_dataset, **kwargs):
            super().__init__(*args, train_dataset=train_dataset, **kwargs)
            learned.append(list(train_dataset["mention_id"]))

    monkeypatch.setattr(fold_lists, "MelTrainer", Recorder)
    run_recipe(recipe, tmp_path / "run")
    assert len(learned) == 2
    for ids, left_out in zip(learned, fold_rows(train, 2, 0), strict=True):
        extra = set(ids) - set(train["mention_id"])
        assert len(extra) == 2 * len(entities)
        assert set(ids) - extra == set(train["mention_id"]) - {train[row]["mention_id"] for row in left_out}


def test_a_part_smaller_than_a_batch_trains_and_gets_its_lists(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "toy_data")
    content = recipe_for(dataset, per_device_train_batch_size=64, eval_strategy="no", load_best_model_at_end=False)
    steps = []
    train = MelTrainer.train

    def counted(trainer, *args, **options):
        result = train(trainer, *args, **options)
        steps.append(trainer.state.global_step)
        return result

    monkeypatch.setattr(MelTrainer, "train", counted)
    folder = run_recipe(Recipe.from_dict(content), tmp_path / "run")
    assert steps == [1, 1]
    lists = CandidateLists.load(folder / "train.parquet")
    assert all(len(ids) == 4 for ids in lists.entity_ids)


def test_a_list_does_not_depend_on_the_golds_of_its_part(tmp_path):
    dataset = write_dataset(tmp_path / "toy_data")
    first = CandidateLists.load(run_recipe(Recipe.from_dict(recipe_for(dataset)), tmp_path / "run") / "train.parquet")
    train = load_mentions(dataset, "train")
    part = fold_rows(train, 2, 0)[0]
    file = dataset / "mentions/train.parquet"
    golds = list(train["entity_id"])
    changed = [golds[(row + 5) % len(golds)] if row in part else gold for row, gold in enumerate(golds)]
    assert changed != golds
    table = pq.read_table(file)
    column = table.column_names.index("entity_id")
    pq.write_table(table.set_column(column, "entity_id", [changed]), file)
    second = CandidateLists.load(
        run_recipe(Recipe.from_dict(recipe_for(dataset)), tmp_path / "again") / "train.parquet"
    )
    rows = train.select(part)
    assert first.for_mentions(rows).scores == second.for_mentions(rows).scores
    assert first.scores != second.scores


def test_a_resumed_run_trains_the_missing_retrievers_only(tmp_path, monkeypatch):
    recipe = Recipe.from_dict(recipe_for(write_dataset(tmp_path / "toy_data")))
    whole = CandidateLists.load(run_recipe(recipe, tmp_path / "whole") / "train.parquet")
    trained = []
    train = fold_lists._train

    def interrupted(*arguments):
        trained.append(len(arguments[2]))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(fold_lists, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "train.parquet").exists()
    folder = run_recipe(recipe, tmp_path / "run", resume=True)
    assert len(trained) == 3
    assert CandidateLists.load(folder / "train.parquet").scores == whole.scores


def test_unusable_recipes_are_refused(tmp_path):
    dataset = write_dataset(tmp_path / "toy_data")
    with pytest.raises(DataFormatError, match="too few"):
        run_recipe(Recipe.from_dict(recipe_for(dataset, count=50)), tmp_path / "run")
    content = recipe_for(dataset)
    for change, words in (
        ({"task": "linking"}, "does not apply"),
        ({"folds": {"count": 1}}, "at least 2"),
        ({"candidates": {"source": "name"}}, "reads none"),
    ):
        with pytest.raises(RecipeError, match=words):
            Recipe.from_dict({**content, **change})
    content["model"] = {
        "type": "mmel",
        "config": {"text_config": content["model"]["config"]["text_config"], "hidden_size": 8, "vision_config": None},
    }
    content["processor"].pop("vision")
    content["processor"]["options"] = {"max_length": 40}
    with pytest.raises(RecipeError, match="not a retriever"):
        run_recipe(Recipe.from_dict(content), tmp_path / "reranker")


def test_a_reranker_learns_from_the_train_file(tmp_path):
    dataset = write_dataset(tmp_path / "toy_data")
    train, entities = load_mentions(dataset, "train"), load_entities(dataset)
    listed = CandidateLists(list(train["mention_id"]), [["Q3"]] * len(train), {})
    listed.save(tmp_path / "train.parquet")
    content = recipe_dict(dataset) | {"candidates": {"source": "name", "train_file": str(tmp_path / "train.parquet")}}
    recipe = Recipe.from_dict(content)
    lists = linking_run.candidates_from_recipe(recipe, "train", train, train, entities)
    assert lists.entity_ids == listed.entity_ids
    others = linking_run.candidates_from_recipe(recipe, "validation", train, train, entities)
    assert others.entity_ids != listed.entity_ids
