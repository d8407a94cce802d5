"""Training on a part of a split: which mentions it is, and that nothing else of the split is known."""

from __future__ import annotations

import random
from collections import defaultdict

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.data.examples import part_of_mentions
from hf_mel.data.posts import SOURCE_TEXT
from hf_mel.errors import RecipeError
from hf_mel.training.linking_run import candidates_from_recipe
from hf_mel.training.recipe import Recipe
from hf_mel.training.run import run_recipe
from hf_mel.training.training_part import part_trained_on, training_mentions, training_posts
from tests.toy import toy_entities
from tests.training.test_run import results_of
from tests.training.toy_run import recipe_dict, write_dataset


def mentions_of(contexts: list[int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"mention_id": [f"m{i}" for i in range(len(contexts))], "context_id": [f"c{c}" for c in contexts]}
    )


def test_the_first_mentions_are_those_of_the_release():
    part = part_of_mentions(mentions_of(list(range(30))), 0.1, "first")
    assert list(part["mention_id"]) == ["m0", "m1", "m2"]


def test_a_random_part_is_that_of_a_plain_draw_of_contexts():
    contexts = [0, 1, 1, 2, 3, 0, 4, 5, 5, 5]
    rows_of = defaultdict(list)
    for row, context in enumerate(contexts):
        rows_of[context].append(row)
    order = list(rows_of.values())  # in the order of their first mention
    random.Random(7).shuffle(order)
    expected, number = [], 0
    while len(expected) < 4:
        expected += order[number]
        number += 1
    part = part_of_mentions(mentions_of(contexts), 0.4, "random", seed=7)
    assert list(part["mention_id"]) == [f"m{row}" for row in sorted(expected)]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.sampled_from(["first", "random"]),
    st.integers(0, 3),
)
def test_a_smaller_part_lies_in_a_larger_one(contexts, fractions, order, seed):
    mentions = mentions_of(contexts)
    small, large = (
        list(part_of_mentions(mentions, fraction, order, seed)["mention_id"]) for fraction in sorted(fractions)
    )
    assert set(small) <= set(large)
    assert small == sorted(small, key=lambda name: int(name[1:]))
    assert len(small) >= max(1, round(min(fractions) * len(contexts)))
    if order == "random":
        contexts_of = dict(zip(mentions["mention_id"], mentions["context_id"], strict=True))
        chosen = {contexts_of[name] for name in small}
        assert {name for name, context in contexts_of.items() if context in chosen} == set(small)


def test_seeds_draw_other_parts():
    mentions = mentions_of(list(range(100)))
    parts = [tuple(part_of_mentions(mentions, 0.2, seed=seed)["mention_id"]) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train_fraction": 0}, "not above 0 and at most 1"),
        ({"train_fraction": 1.5}, "not above 0 and at most 1"),
        ({"train_fraction": "half"}, "is not a whole number or a number"),
        ({"train_order": "last"}, "train_order is not one of first, random"),
    ],
)
def test_parts_that_do_not_exist_are_errors(tmp_path, data, message):
    recipe = recipe_dict(tmp_path)
    recipe["data"] |= data
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(recipe, file="mine.yaml")


def test_a_part_of_the_mentions_is_no_part_of_posts(tmp_path):
    recipe = recipe_dict(tmp_path)
    recipe["task"] = "pretraining"
    recipe["data"] |= {"train_fraction": 0.5, "posts_split": "kb"}
    with pytest.raises(RecipeError, match="trains on posts"):
        Recipe.from_dict(recipe)


def test_a_run_trains_on_the_part_and_knows_nothing_else_of_the_split(tmp_path):
    recipe = recipe_dict(write_dataset(tmp_path / "data"), num_train_epochs=1)
    recipe["data"] |= {"train_fraction": 0.25, "train_order": "first"}
    recipe["candidates"] = {"source": "prior"}
    recipe = Recipe.from_dict(recipe)
    part = training_mentions(recipe)
    assert list(part["mention_id"]) == [f"m{i}" for i in range(6)]
    captions = training_posts(recipe, part)
    assert SOURCE_TEXT in captions.column_names
    assert set(captions["post_id"]) == set(part["mention_id"])
    lists = candidates_from_recipe(recipe, "train", part, part, toy_entities(12))
    assert {entity for listed in lists.entity_ids for entity in listed} <= set(part["entity_id"])
    recipe.candidates = None
    data = results_of(run_recipe(recipe, tmp_path / "run"))["data"]
    assert (data["train_mentions"], data["train_fraction"]) == (6, 0.25)


def test_an_evaluation_knows_the_part_that_a_run_was_trained_on(tmp_path):
    mentions = mentions_of(list(range(40)))
    recipe = recipe_dict(tmp_path, seed=5)
    recipe["data"]["train_fraction"] = 0.25
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(Recipe.from_dict(recipe).to_yaml())
    part = part_trained_on(str(tmp_path / "run"), mentions)
    assert list(part["mention_id"]) == list(part_of_mentions(mentions, 0.25, "random", 5)["mention_id"])
    (tmp_path / "run/recipe.yaml").write_text("name: of before\ndata: {dataset: x}\n")
    for other in (str(tmp_path / "run"), "an/id-of-the-hub"):
        assert part_trained_on(other, mentions) is mentions
