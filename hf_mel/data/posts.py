"""Posts about entities: those of a data set, or the captions of its training mentions."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.data.loading import load_mentions, load_posts
from hf_mel.errors import UnknownSplitError
from hf_mel.schema import NIL, NO_SPAN, Row, mention_features

#: Column of posts made from mentions: the text of the mention before its surface form was removed.
SOURCE_TEXT = "source_text"


def posts_of(
    dataset: str | os.PathLike[str],
    choice: str = "auto",
    *,
    revision: str | None = None,
    config: str = "mentions",
    train_split: str = "train",
) -> datasets.Dataset | None:
    """Loads the posts about the entities of a data set.

    Args:
        dataset (`str` or `os.PathLike`): Folder or Hub id.
        choice (`str`): "auto" loads the posts of the data set, or else the captions of its training split, or else
            nothing; "none" loads nothing; any other value is a split of the mentions, whose captions are the posts.
        revision (`str`, *optional*): Branch, tag or commit of a data set on the Hub.
        config (`str`): The configuration of the mentions.
        train_split (`str`): The training split.

    Returns:
        `datasets.Dataset` of P posts (columns: [`~hf_mel.schema.post_features`], and [`SOURCE_TEXT`] if they are captions), or
        `None`.

    Raises:
        UnknownSplitError: The mentions have no such split.
        MelError: As in [`~hf_mel.data.loading.load_mentions`].
    """
    if choice == "none":
        return None
    if choice != "auto":
        return captions_as_posts(load_mentions(dataset, choice, revision, config=config))
    try:
        return load_posts(dataset, revision=revision)
    except UnknownSplitError:
        pass
    try:
        return captions_as_posts(load_mentions(dataset, train_split, revision, config=config))
    except UnknownSplitError:
        return None


def captions_as_posts(mentions: datasets.Dataset) -> datasets.Dataset:
    """Turns the texts of mentions, without the mention itself, into posts about their golds.

    The surface form is removed at `start` and `end`, or else at its first occurrence. NIL mentions are left out, and so
    are mentions of which neither a word nor an image remains.

    Args:
        mentions (`datasets.Dataset`): M rows of the schema.

    Returns:
        `datasets.Dataset` of up to M posts: `post_id` (the mention's id), `entity_id`, `text`, `image` and
        [`SOURCE_TEXT`].
    """
    texts, kept = [], []
    lazy = LazyRows(mentions.select_columns(["mention_id", "image"]))
    columns = mentions.select_columns(["text", "mention", "start", "end", "entity_id"])[:]
    for number, values in enumerate(zip(*columns.values(), strict=True)):
        row = dict(zip(columns, values, strict=True))
        texts.append(_remove_mention(row))
        if row["entity_id"] != NIL and (texts[-1] or lazy[number].undecoded("image") is not None):
            kept.append(number)
    posts = mentions.select_columns(["mention_id", "entity_id", "image"]).rename_column("mention_id", "post_id")
    posts = posts.add_column("text", texts).add_column(SOURCE_TEXT, columns["text"])
    return posts if len(kept) == len(posts) else posts.select(kept)


def posts_as_mentions(posts: datasets.Dataset) -> datasets.Dataset:
    """Turns posts into mentions without a surface form whose gold is the post's entity, for pre-training.

    Args:
        posts (`datasets.Dataset`): P posts.

    Returns:
        `datasets.Dataset` of P rows in the columns of [`~hf_mel.schema.mention_features`]; `context_id` is the post's id.
    """
    count = len(posts)
    ids = posts["post_id"]
    rows = posts.select_columns(["post_id", "entity_id", "text", "image"]).rename_column("post_id", "mention_id")
    for column, values in (
        ("context_id", list(ids)),
        *((column, [""] * count) for column in ("mention", "mention_type", "topic")),
        *((column, [NO_SPAN] * count) for column in ("start", "end")),
        ("candidates", [[]] * count),
    ):
        rows = rows.add_column(column, values, feature=mention_features()[column])
    return rows


def entities_as_mentions(entities: datasets.Dataset, count: int, seed: int = 0) -> datasets.Dataset:
    """Makes mentions of entities from what the knowledge base says about them, as training material.

    The text of a mention is up to three sentences of the entity's description and attributes, drawn at random. A third of
    the mentions is also named: a name or alias, which is the surface form, ends the text. The image is a random one of the
    entity's. An entity about which nothing is known has no mention.

    Args:
        entities (`datasets.Dataset`): N entities.
        count (`int`): Mentions of each entity.
        seed (`int`): Seed of all draws.

    Returns:
        `datasets.Dataset` of up to N · `count` rows in the columns of [`~hf_mel.schema.mention_features`].
    """
    columns = entities.select_columns(["entity_id", "name", "aliases", "description", "attributes"])
    images = entities.select_columns(["images"]).cast_column("images", [datasets.Image(decode=False)])["images"]
    rows = []
    for entity, pictures in zip(columns, images, strict=True):
        draw = random.Random(f"{seed} {entity['entity_id']}")
        sentences = [(entity[column] or "").split(". ") for column in ("description", "attributes")]
        facts = [fact.strip().rstrip(".") for part in sentences for fact in part if fact.strip(" .")]
        names = [name for name in (entity["name"], *(entity["aliases"] or ())) if name.strip()]
        for number in range(count):
            name = draw.choice(names) if names and (draw.random() < 1 / 3 or not facts) else ""
            told = draw.sample(facts, min(len(facts), draw.randint(0 if name else 1, 3)))
            text = " ".join(f"{sentence}." for sentence in (*told, name) if sentence)
            if not text and not pictures:
                continue
            rows.append(
                {
                    "mention_id": f"{entity['entity_id']}-{number}",
                    "context_id": f"{entity['entity_id']}-{number}",
                    "text": text,
                    "mention": name,
                    "start": len(text) - len(name) - 1 if name else NO_SPAN,
                    "end": len(text) - 1 if name else NO_SPAN,
                    "mention_type": "",
                    "topic": "",
                    "image": draw.choice(pictures) if pictures else None,
                    "entity_id": entity["entity_id"],
                    "candidates": [],
                }
            )
    return datasets.Dataset.from_list(rows, features=mention_features())


def entity_as_post(entity: Row, columns: Sequence[str] = ("name", "description", "attributes")) -> Row:
    """Turns an entity into a post about itself: its columns as sentences, "name. description. attributes.", and its
    first image.

    The image is decoded on access. The items of a list, such as `aliases`, are joined by commas.
    """
    values = [entity.get(column) or "" for column in columns]
    texts = [value if isinstance(value, str) else ", ".join(filter(None, value)) for value in values]
    parts = [text.strip() for text in texts]
    text = " ".join(part if part.endswith((".", "!", "?", "。")) else f"{part}." for part in parts if part)
    return _EntityPost({"post_id": entity["entity_id"], "entity_id": entity["entity_id"], "text": text}, entity)


class _EntityPost(Mapping[str, Any]):
    """Columns of a post whose `image` is taken from the entity on access, so that text models never decode it."""

    def __init__(self, values: dict[str, Any], entity: Row):
        self._values, self._entity = values, entity

    def __getitem__(self, column: str) -> Any:
        if column != "image":
            return self._values[column]
        entity = self._entity
        if isinstance(entity, LazyRow):
            entity = entity.with_image("images", 0) if entity.undecoded("images") else entity
        images = entity["images"]
        return images[0] if images else None

    def __iter__(self):
        return iter([*self._values, "image"])

    def __len__(self) -> int:
        return len(self._values) + 1


def _remove_mention(row: Row) -> str:
    text, start, end = row["text"], row["start"], row["end"]
    if start == NO_SPAN:
        start = text.find(row["mention"]) if row["mention"] else NO_SPAN
        end = start + len(row["mention"])
    return " ".join((text if start == NO_SPAN else f"{text[:start]} {text[end:]}").split())
