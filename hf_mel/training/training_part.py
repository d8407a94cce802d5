"""The part of a training split that a recipe trains on, and the posts that may be known with it."""

from __future__ import annotations

import datasets

from hf_mel.data.examples import part_of_mentions
from hf_mel.data.loading import load_mentions
from hf_mel.data.posts import SOURCE_TEXT, captions_as_posts, posts_of
from hf_mel.training.recipe import Recipe
from hf_mel.training.run_folder import recorded_values


def training_mentions(recipe: Recipe) -> datasets.Dataset:
    """Loads the mentions that a recipe trains on: those of `data.train_split`, or the part `data.train_fraction` of them.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe. `training.seed` draws the part.

    Raises:
        MelError: As in [`~hf_mel.data.loading.load_mentions`].
    """
    data = recipe.data
    mentions = load_mentions(data.dataset, data.train_split, data.revision, config=data.config)
    return part_of_mentions(mentions, data.train_fraction, data.train_order, int(recipe.training.get("seed", 0)))


def training_posts(recipe: Recipe, mentions: datasets.Dataset) -> datasets.Dataset | None:
    """Loads the posts about the entities. If they are captions of training mentions, only those of `mentions` are.

    Args:
        recipe ([`~hf_mel.training.recipe.Recipe`]): The recipe.
        mentions (`datasets.Dataset`): The mentions that it trains on.
    """
    data = recipe.data
    posts = posts_of(data.dataset, revision=data.revision, config=data.config, train_split=data.train_split)
    if posts is not None and SOURCE_TEXT in posts.column_names and data.train_fraction < 1:
        return captions_as_posts(mentions)
    return posts


def part_trained_on(model: str, mentions: datasets.Dataset) -> datasets.Dataset:
    """Returns the part of a training split that a model was trained on: all of it, unless its recipe says otherwise.

    Args:
        model (`str`): A run folder, which holds its recipe, or any other model.
        mentions (`datasets.Dataset`): The mentions of the training split.
    """
    data, training = recorded_values(model, "data"), recorded_values(model, "training")
    try:
        seed = int(training.get("seed", 0))
        return part_of_mentions(mentions, data["train_fraction"], data["train_order"], seed)
    except (KeyError, ValueError, TypeError):
        return mentions  # no run folder, or one of before data.train_fraction
