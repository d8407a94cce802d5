"""Batches against brute force: who means whom, which entity stands where, which image it shows."""

from __future__ import annotations

from io import BytesIO

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.data.images import open_image
from hf_mel.data.lazy_rows import LazyRow, LazyRows
from hf_mel.errors import ImageError, UnknownEntityError
from hf_mel.inference.inputs import ModelInputs
from hf_mel.schema import NIL, entity_features
from hf_mel.training.collators import RetrieverCollator
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

ENTITIES = toy_entities(12)


class Spy:
    """A processor that keeps the rows it was given."""

    def __call__(self, mentions=None, entities=None, pairs=None, **kwargs):
        if mentions is not None:
            self.mentions = mentions
            return {"mention_id": torch.arange(len(mentions))}
        self.entities = entities
        return {"entity_id": torch.arange(len(entities))}


def row(gold: str, number: int = 0) -> dict:
    return {"mention_id": f"m{number}", "mention": gold, "text": gold, "image": None, "entity_id": gold}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_labels_point_to_the_gold_and_no_entity_occurs_twice(golds):
    spy = Spy()
    batch = RetrieverCollator(ModelInputs(None, spy), ENTITIES)([row(f"Q{gold}", i) for i, gold in enumerate(golds)])
    columns = [entity["entity_id"] for entity in spy.entities]
    assert len(set(columns)) == len(columns)
    assert set(columns) == {f"Q{gold}" for gold in golds}
    assert [columns[label] for label in batch["labels"].tolist()] == [f"Q{gold}" for gold in golds]


def test_the_loss_of_a_batch_with_a_repeated_gold_is_over_distinct_entities():
    mentions = [toy_mentions(20)[i] for i in (0, 1, 12, 0)]  # golds Q1, Q8, Q1, Q1
    assert [mention["entity_id"] for mention in mentions] == ["Q1", "Q8", "Q1", "Q1"]
    model, processor = toy_model(), ToyProcessor()
    batch = RetrieverCollator(ModelInputs(None, processor), ENTITIES)(mentions)
    scores = model.score(
        model.encode_mentions(**processor(mentions=mentions)),
        model.encode_entities(**processor(entities=[ENTITIES[0], ENTITIES[7]])),
    )
    expected = sum(scores[i].logsumexp(0) - scores[i, j] for i, j in enumerate([0, 1, 0, 0])) / 4
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("gold", ["Q99", NIL])
def test_a_gold_outside_the_knowledge_base_names_the_mention(gold):
    with pytest.raises(UnknownEntityError, match=rf"row m7: The gold '{gold}'"):
        RetrieverCollator(ModelInputs(None, Spy()), ENTITIES)([row("Q1"), row(gold, 7)])


class LearnsNil:
    """A model that learns from NIL mentions."""

    learns_nil = True


def test_nil_mentions_have_no_column_if_the_model_learns_nil():
    spy = Spy()
    rows = [row("Q2"), row(NIL, 1), row("Q1", 2), row(NIL, 3)]
    batch = RetrieverCollator(ModelInputs(LearnsNil(), spy), ENTITIES)(rows)
    assert [entity["entity_id"] for entity in spy.entities] == ["Q2", "Q1"]
    assert batch["labels"].tolist() == [0, -1, 1, -1]
    # A batch of NIL mentions alone has an entity too, which they do not mean.
    batch = RetrieverCollator(ModelInputs(LearnsNil(), spy), ENTITIES)([row(NIL), row(NIL, 1)])
    assert len(spy.entities) == 1
    assert batch["labels"].tolist() == [-1, -1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 3))
def test_random_negatives_are_other_entities_and_the_same_for_the_same_batch(golds, count, seed):
    rows = [row(f"Q{gold}" if gold else NIL, i) for i, gold in enumerate(golds)]
    spies = [Spy(), Spy()]
    batches = [
        RetrieverCollator(ModelInputs(LearnsNil(), spy), ENTITIES, random_negatives=count, seed=seed)(rows)
        for spy in spies
    ]
    columns, again = ([entity["entity_id"] for entity in spy.entities] for spy in spies)
    distinct = {f"Q{gold}" for gold in golds if gold}
    assert columns == again
    assert len(set(columns)) == len(columns) == min(12, max(1, len(distinct) + count))
    assert distinct <= set(columns)
    labels = [NIL if label < 0 else columns[label] for label in batches[0]["labels"].tolist()]
    assert labels == [mention["entity_id"] for mention in rows]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.sampled_from([0.0, 0.5, 0.99]), st.integers(0, 6))
def test_golds_that_are_left_out_make_their_mentions_nil(golds, share, count):
    rows = [row(f"Q{gold}" if gold else NIL, i) for i, gold in enumerate(golds)]
    spy = Spy()
    collator = RetrieverCollator(
        ModelInputs(LearnsNil(), spy),
        ENTITIES,
        negatives={"m0": ["Q1", "Q2", "Q3"]},
        random_negatives=count,
        simulated_nil=share,
    )
    batch = collator(rows)
    columns = [entity["entity_id"] for entity in spy.entities]
    assert len(set(columns)) == len(columns) > 0
    missing = {f"Q{gold}" for gold in golds if gold} - set(columns)  # in no way a column of this batch
    labels = [NIL if label < 0 else columns[label] for label in batch["labels"].tolist()]
    assert labels == [NIL if r["entity_id"] in missing else r["entity_id"] for r in rows]
    if share == 0:
        assert not missing
    if any(golds):
        assert any(label != NIL for label in labels)  # never all are left out


def test_the_share_of_golds_that_are_left_out():
    spy, missing = Spy(), 0
    collator = RetrieverCollator(ModelInputs(LearnsNil(), spy), ENTITIES, simulated_nil=0.25)
    for number in range(100):
        labels = collator([row(f"Q{k}", 20 * number + k) for k in range(1, 11)])["labels"]
        missing += int((labels < 0).sum())
    assert 200 < missing < 300


def test_random_negatives_reach_every_entity_and_differ_between_batches():
    spy, seen = Spy(), []
    collator = RetrieverCollator(ModelInputs(None, spy), ENTITIES, random_negatives=2)
    for number in range(60):
        collator([row("Q1", number)])
        seen.append(tuple(entity["entity_id"] for entity in spy.entities[1:]))
    assert {entity_id for pair in seen for entity_id in pair} == {f"Q{k}" for k in range(2, 13)}
    assert len(set(seen)) > 20


def test_only_images_of_mentions_are_changed_and_by_the_seed():
    image = Image.new("RGB", (24, 16), (200, 0, 0))
    image.paste((0, 0, 200), (0, 0, 12, 16))
    rows = [{**row("Q1"), "image": image}, row("Q2", 1), {**row("Q3", 2), "image": image}]
    entities = toy_entities(12)

    def shown(**options):
        spy = Spy()
        RetrieverCollator(ModelInputs(None, spy), entities, **options)(rows)
        mentions = [None if mention["image"] is None else mention["image"].tobytes() for mention in spy.mentions]
        assert [dict(mention) | {"image": 0} for mention in spy.mentions] == [each | {"image": 0} for each in rows]
        return mentions, [[picture.tobytes() for picture in entity["images"]] for entity in spy.entities]

    plain, changed = shown(random_image=False), shown(random_image=False, augment_images=True)
    assert plain[0] == [image.tobytes(), None, image.tobytes()]
    assert changed[0][1] is None
    assert len({image.tobytes(), changed[0][0], changed[0][2]}) == 3
    assert changed[1] == plain[1]
    assert shown(random_image=False, augment_images=True) == changed
    assert shown(random_image=False, augment_images=True, seed=1) != changed
    strong = shown(random_image=False, augment_images="strong")
    assert strong not in (plain, changed)
    assert shown(random_image=False, augment_images="strong") == strong


def _colours(count: int) -> datasets.Dataset:
    images = [Image.new("RGB", (2, 2), (10 * i, 0, 0)) for i in range(count)]
    rows = [
        {"entity_id": "Q1", "name": "", "description": "", "attributes": "", "aliases": [], "images": images},
        {"entity_id": "Q2", "name": "", "description": "", "attributes": "", "aliases": [], "images": []},
    ]
    return datasets.Dataset.from_list(rows, features=entity_features())


def _shown(spy: Spy) -> int:
    (image,) = spy.entities[0]["images"]
    return image.getpixel((0, 0))[0] // 10


def test_training_uses_every_image_and_the_same_one_for_the_same_batch():
    spy = Spy()
    collator = RetrieverCollator(ModelInputs(None, spy), _colours(4), seed=0)
    shown = []
    for number in range(40):
        collator([row("Q1", number)])
        shown.append(_shown(spy))
    assert set(shown) == {0, 1, 2, 3}
    again = RetrieverCollator(ModelInputs(None, spy), _colours(4), seed=0)
    again([row("Q1", 3)])
    assert _shown(spy) == shown[3]
    other = RetrieverCollator(ModelInputs(None, spy), _colours(4), seed=1)
    others = []
    for number in range(40):
        other([row("Q1", number)])
        others.append(_shown(spy))
    assert others != shown


def test_without_random_images_the_rows_keep_all_images_in_order():
    spy = Spy()
    collator = RetrieverCollator(ModelInputs(None, spy), _colours(3), random_image=False)
    collator([row("Q1"), row("Q2")])
    assert [image.getpixel((0, 0))[0] // 10 for image in spy.entities[0]["images"]] == [0, 1, 2]
    assert spy.entities[1]["images"] == []


def test_lazy_rows_are_the_rows_of_the_data_set():
    mentions = toy_mentions(7).select([5, 3, 1, 0])
    rows = LazyRows(mentions).__getitems__([3, 0, 2])
    for lazy, index in zip(rows, [3, 0, 2], strict=True):
        plain = mentions[index]
        assert set(lazy) == set(plain)
        assert len(lazy) == len(plain)
        for column, value in plain.items():
            if column == "image" and value is not None:
                assert list(lazy[column].getdata()) == list(value.getdata())
            else:
                assert lazy[column] == value
    assert LazyRows(mentions)[1]["mention_id"] == "m3"


def test_images_look_the_same_in_training_and_in_linking():
    """Decoders differ for a transparent image. Training puts it on white, as `open_image` does for the linker."""
    file = BytesIO()
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(file, "PNG")
    features = datasets.Features({"mention_id": datasets.Value("string"), "image": datasets.Image()})
    lazy = LazyRow({"mention_id": "m1", "image": {"bytes": file.getvalue(), "path": None}}, features)
    assert lazy["image"].mode == "RGB"
    assert lazy["image"].getpixel((0, 0)) == open_image(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_an_unused_image_is_not_decoded():
    features = datasets.Features({"mention_id": datasets.Value("string"), "image": datasets.Image()})
    lazy = LazyRow({"mention_id": "m1", "image": {"bytes": b"not an image", "path": None}}, features)
    assert lazy["mention_id"] == "m1"
    with pytest.raises(ImageError, match="row m1"):
        lazy["image"]
