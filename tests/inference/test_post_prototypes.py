"""Prototypes of entities, against the definition in plain steps."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch

from hf_mel.data.lazy_rows import LazyRows
from hf_mel.data.posts import captions_as_posts
from hf_mel.errors import DataFormatError, ImageError, RecipeError, ScoreError
from hf_mel.inference.features.pagerank import random_posts, select_posts
from hf_mel.inference.features.post_prototypes import PostPrototypes
from hf_mel.schema import post_features
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model
from tests.toy_posts import ToyPostsProcessor, toy_posts, toy_posts_model

ENTITIES = toy_entities(14)  # Q13 and Q14 have no posts, nor have Q6 and Q12


def features(model, posts: list[dict], modality: str) -> torch.Tensor:
    with torch.no_grad():
        encodings = [model.encode_posts(**ToyPostsProcessor()(posts=[post])) for post in posts]
    return torch.cat([encoded[modality] for encoded in encodings])


def itself(entity: dict) -> dict:
    text = " ".join(f"{part.rstrip('.')}." for part in (entity["name"], entity["attributes"]) if part)
    return {"post_id": "", "text": text, "image": entity["images"][0] if entity["images"] else None}


def plain(model, posts: list[dict], entity: dict, modality: str, k: int = 3) -> torch.Tensor:
    """Section 3.3 for one entity, post by post."""
    mine = [post for post in posts if post["entity_id"] == entity["entity_id"]] or [itself(entity)]
    mine = [post for post in mine if modality == "text" or post["image"] is not None]
    if not mine:
        return torch.zeros(0, 16 if modality == "text" else 3)
    vectors = features(model, mine, modality)
    chosen = vectors[select_posts(vectors, [range(len(mine))], k)[0]]
    return chosen / chosen.norm(dim=1, keepdim=True).clamp(min=1e-12)  # a black image is zeros


@pytest.mark.parametrize("kept", [False, True])
def test_prototypes_are_those_of_the_definition(kept):
    model, posts = toy_posts_model(), list(toy_posts())
    prototypes = PostPrototypes(model, ToyPostsProcessor(), toy_posts(), batch_size=5)
    if kept:
        prototypes.precompute(ENTITIES)
    rows = prototypes.attach(LazyRows(ENTITIES).__getitems__(list(range(14))))
    for row, entity in zip(rows, ENTITIES, strict=True):
        assert row["name"] == entity["name"]
        for modality in ("text", "image"):
            expected = plain(model, posts, entity, modality)
            torch.testing.assert_close(row["prototypes"][modality], expected)
    # Two and more posts, one, none; entities and posts without images.
    sizes = {tuple(len(row["prototypes"][modality]) for modality in ("text", "image")) for row in rows}
    assert sizes >= {(3, 3), (3, 2), (1, 1), (1, 0)}


def test_prototypes_of_one_entity_equal_those_computed_together():
    model, rows = toy_posts_model(), list(ENTITIES)
    prototypes = PostPrototypes(model, ToyPostsProcessor(), toy_posts())
    together = prototypes.attach(rows)
    for row, same in zip(rows, together, strict=True):
        for modality, vectors in prototypes.attach([row])[0]["prototypes"].items():
            torch.testing.assert_close(vectors, same["prototypes"][modality])


def test_precomputed_prototypes_are_not_encoded_again(monkeypatch):
    monkeypatch.setattr("hf_mel.inference.features.post_prototypes._CHUNK_POSTS", 7)
    model = toy_posts_model()
    prototypes = PostPrototypes(model, ToyPostsProcessor(), toy_posts())
    prototypes.precompute(ENTITIES)
    assert model.posts_seen == len(toy_posts()) + len(ENTITIES)
    prototypes.precompute(ENTITIES)
    prototypes.attach(list(ENTITIES))
    assert model.posts_seen == len(toy_posts()) + len(ENTITIES)


def test_prototypes_leave_the_model_in_its_mode():
    model = toy_posts_model().train()
    PostPrototypes(model, ToyPostsProcessor()).attach(list(ENTITIES)[:1])
    assert model.training


@pytest.mark.parametrize("kept", [False, True])
def test_hidden_texts_are_no_prototypes(kept):
    """No prototype is a post whose text is hidden; a hidden one makes room for the next; the last one for the entity."""
    model, posts = toy_posts_model(), list(toy_posts())
    prototypes = PostPrototypes(model, ToyPostsProcessor(), toy_posts())
    if kept:
        prototypes.precompute(ENTITIES)
    for number in range(12):
        entity = ENTITIES[number]
        mine = [post for post in posts if post["entity_id"] == entity["entity_id"]]
        for hidden in mine:
            vectors = prototypes.attach([entity], without=[hidden["text"], "something else"])[0]["prototypes"]["text"]
            hidden_vector = features(model, [hidden], "text")
            assert not torch.isclose(vectors, hidden_vector / hidden_vector.norm(), atol=1e-5).all(1).any()
            remaining = [post for post in mine if post is not hidden] or [itself(entity)]
            assert len(vectors) == min(len(remaining), 3)
            if len(remaining) == 1:
                torch.testing.assert_close(
                    vectors, features(model, remaining, "text") / features(model, remaining, "text").norm()
                )


def test_the_caption_of_a_hidden_mention_is_no_prototype():
    model, mentions = toy_posts_model(), toy_mentions(24)
    prototypes = PostPrototypes(model, ToyPostsProcessor(), captions_as_posts(mentions))
    prototypes.precompute(ENTITIES)
    for mention in mentions:
        entity = next(row for row in ENTITIES if row["entity_id"] == mention["entity_id"])
        bare = mention["text"].replace(f"{mention['mention']} ", "", 1)
        caption = features(model, [{"text": bare, "image": None}], "text")
        with_it, without = (
            prototypes.attach([entity], without=hidden)[0]["prototypes"]["text"] for hidden in ((), [mention["text"]])
        )
        assert torch.isclose(with_it, caption / caption.norm(), atol=1e-5).all(1).any()
        assert not torch.isclose(without, caption / caption.norm(), atol=1e-5).all(1).any()


def test_of_equal_posts_the_first_are_prototypes():
    same = {"entity_id": "Q1", "text": "again", "image": None}
    posts = datasets.Dataset.from_list([{"post_id": f"p{k}", **same} for k in range(6)], features=post_features())
    model = toy_posts_model()
    prototypes = PostPrototypes(model, ToyPostsProcessor(), posts)
    prototypes.precompute(ENTITIES)
    prototypes_of_first = prototypes.attach([ENTITIES[0]])[0]["prototypes"]
    assert prototypes_of_first["text"].shape == (3, 16)
    assert prototypes_of_first["image"].shape == (0, 3)
    torch.testing.assert_close(prototypes_of_first["text"][0], prototypes_of_first["text"][2])
    assert prototypes.support_set(ENTITIES)["post_id"][:] == ["p0", "p1", "p2"]


def test_an_entity_without_posts_texts_and_images_has_no_prototypes():
    bare = {"entity_id": "Q0", "name": "", "description": "", "attributes": "", "aliases": [], "images": []}
    vectors_by_modality = PostPrototypes(toy_posts_model(), ToyPostsProcessor()).attach([bare])[0]["prototypes"]
    assert {name: tuple(vectors.shape) for name, vectors in vectors_by_modality.items()} == {
        "text": (0, 16),
        "image": (0, 3),
    }


def test_an_entity_whose_posts_are_empty_represents_itself():
    """A post that is empty for this model counts as none."""
    posts = datasets.Dataset.from_list(
        [{"post_id": "p", "entity_id": "Q2", "text": "", "image": None}], features=post_features()
    )
    model = toy_posts_model()
    vectors_by_modality = PostPrototypes(model, ToyPostsProcessor(), posts).attach([ENTITIES[1]])[0]["prototypes"]
    torch.testing.assert_close(vectors_by_modality["text"], plain(model, [], ENTITIES[1], "text"))


def test_features_of_absent_images_are_ignored(monkeypatch):
    model = toy_posts_model()
    expected = PostPrototypes(model, ToyPostsProcessor(), toy_posts()).attach(list(ENTITIES))
    encode = model.encode_posts

    def careless(**inputs):
        encoded = encode(**inputs)
        return encoded | {"image": encoded["image"].masked_fill(~encoded["image_present"][:, None], torch.nan)}

    monkeypatch.setattr(model, "encode_posts", careless)
    for row, same in zip(
        PostPrototypes(model, ToyPostsProcessor(), toy_posts()).attach(list(ENTITIES)), expected, strict=True
    ):
        torch.testing.assert_close(row["prototypes"], same["prototypes"])


def test_random_choice_is_the_same_in_every_run():
    model = toy_posts_model()
    model.config.prototype_selection = "random"
    posts, runs = toy_posts(), []
    for batch_size in (1, 64):
        prototypes = PostPrototypes(model, ToyPostsProcessor(), posts, batch_size=batch_size)
        prototypes.precompute(ENTITIES)
        runs.append([row["prototypes"]["text"] for row in prototypes.attach(list(ENTITIES))])
        for k, vectors in enumerate(runs[-1]):
            mine = [post for post in posts if post["entity_id"] == f"Q{k + 1}"]
            if mine:
                order = random_posts(f"Q{k + 1}", range(len(mine)), len(mine))
                expected = features(model, [mine[place] for place in order[:3]], "text")
                torch.testing.assert_close(vectors, expected / expected.norm(dim=1, keepdim=True))
    for first, second in zip(*runs, strict=True):
        torch.testing.assert_close(first, second)
    model.config.prototype_selection = "pagerank"
    by_rank = PostPrototypes(model, ToyPostsProcessor(), posts).attach(list(ENTITIES))
    assert any(not torch.equal(a, row["prototypes"]["text"]) for a, row in zip(runs[0], by_rank, strict=True))
    model.config.prototype_selection = "best"
    with pytest.raises(RecipeError, match="'best' is not one of pagerank, random"):
        PostPrototypes(model, ToyPostsProcessor())


def test_with_entity_prototype_the_entity_comes_before_its_posts():
    model, posts = toy_posts_model(), list(toy_posts())
    model.config.entity_prototype = True
    rows = PostPrototypes(model, ToyPostsProcessor(), toy_posts()).attach(list(ENTITIES))
    for row, entity in zip(rows, ENTITIES, strict=True):
        entity_vector = plain(model, [], entity, "text")
        others = plain(model, posts, entity, "text", k=2)
        has_posts = any(post["entity_id"] == entity["entity_id"] for post in posts)
        torch.testing.assert_close(
            row["prototypes"]["text"], torch.cat([entity_vector, others]) if has_posts else entity_vector
        )


def test_posts_are_not_encoded_if_the_entity_is_the_only_prototype():
    model, rows = toy_posts_model(), []
    model.config.entity_prototype, model.config.num_prototypes = True, 1

    class Spy(ToyPostsProcessor):
        def __call__(self, *args, posts=None, **kwargs):
            rows.extend(posts or ())
            return super().__call__(*args, posts=posts, **kwargs)

    prototypes = PostPrototypes(model, Spy(), toy_posts())
    prototypes.precompute(ENTITIES)
    assert {row["post_id"] for row in rows} == set(ENTITIES["entity_id"])
    for row, entity in zip(prototypes.attach(list(ENTITIES)), ENTITIES, strict=True):
        torch.testing.assert_close(row["prototypes"]["text"], plain(model, [], entity, "text"))


def test_the_support_set_holds_the_chosen_posts_of_all_entities():
    model, posts = toy_posts_model(), toy_posts()
    prototypes = PostPrototypes(model, ToyPostsProcessor(), posts)
    prototypes.precompute(ENTITIES)
    expected = set()
    for entity in ENTITIES:
        mine = [post for post in posts if post["entity_id"] == entity["entity_id"]]
        for modality in ("text", "image"):
            usable = [post for post in mine if modality == "text" or post["image"] is not None]
            if usable:
                chosen = select_posts(features(model, usable, modality), [range(len(usable))], 3)[0]
                expected |= {usable[place]["post_id"] for place in chosen}
    assert prototypes.support_set(ENTITIES)["post_id"][:] == [i for i in posts["post_id"] if i in expected]
    assert len(expected) < len(posts)
    without = PostPrototypes(model, ToyPostsProcessor())
    without.precompute(ENTITIES)
    with pytest.raises(DataFormatError, match="No entity has posts"):
        without.support_set(ENTITIES)


def test_features_that_are_nan_name_the_post():
    model = copy.deepcopy(toy_posts_model())
    with torch.no_grad():
        model.characters.weight[1 + ord("z") % 96] = torch.nan
    broken = toy_posts().map(lambda row: {"text": "zzz"} if row["post_id"] == "p7" else {})
    for selection in ("pagerank", "random"):
        model.config.prototype_selection = selection
        with pytest.raises(ScoreError, match="row p7"):
            PostPrototypes(model, ToyPostsProcessor(), broken).attach(list(ENTITIES))


def test_a_damaged_image_names_the_post():
    row = {"post_id": "p9", "entity_id": "Q1", "text": "a", "image": {"path": None, "bytes": b"no image"}}
    posts = datasets.Dataset.from_list([row], features=post_features())
    with pytest.raises(ImageError, match="row p9"):
        PostPrototypes(toy_posts_model(), ToyPostsProcessor(), posts).attach([ENTITIES[0]])


def test_only_models_with_posts_have_prototypes():
    assert PostPrototypes.for_model(toy_model(), ToyProcessor(), toy_posts()) is None
    assert PostPrototypes.for_model(toy_posts_model(), ToyPostsProcessor()) is not None
