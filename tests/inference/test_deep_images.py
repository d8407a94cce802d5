"""A 16-bit scan and its 8-bit twin give the same tensors, whichever way their rows reach a processor."""

from __future__ import annotations

import json
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_mel.inference.encode import encode_rows
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.reranking import score_pairs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.schema import entity_features, mention_features
from hf_mel.training.collators import RetrieverCollator
from tests.toy import ToyPairProcessor, ToyProcessor, toy_entities, toy_mentions, toy_model, toy_reranker

SHADES = np.random.default_rng(0).integers(0, 256, (12, 5, 4), dtype=np.uint8)


def scan(number: int) -> Image.Image:
    return Image.fromarray(SHADES[number].astype(np.uint16) * 257)


def file_of(image: Image.Image) -> dict:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def with_images(rows, make):
    """Returns the rows with image number k made by `make(k)`, in place of their own."""
    column, wrap = ("image", lambda image: image) if "mention" in rows[0] else ("images", lambda image: [image])
    return [{**row, column: wrap(make(k))} for k, row in enumerate(rows)]


MENTIONS, ENTITIES = (
    [row | {"image": None} for row in toy_mentions(12)],
    [row | {"images": []} for row in toy_entities(12)],
)
FORMS = {
    "8 bits": lambda k: Image.fromarray(SHADES[k]),
    "PIL": scan,
    "array": lambda k: SHADES[k].astype(np.uint16) * 257,
    "float": lambda k: SHADES[k] / 255,
    "file": lambda k: file_of(scan(k)),
}


def stored(rows, **options) -> datasets.Dataset:
    """Returns rows with 16-bit files as a data set."""
    features = mention_features(stratum=datasets.Value("string")) if "mention" in rows[0] else entity_features()
    return datasets.Dataset.from_list(with_images(rows, lambda k: file_of(scan(k))), features=features, **options)


@pytest.fixture(scope="module")
def expected():
    """The encodings of the 8-bit rows, straight from processor and model."""
    model, processor = toy_model(), ToyProcessor()
    with torch.no_grad():
        return {
            "mentions": model.encode_mentions(**processor(mentions=with_images(MENTIONS, FORMS["8 bits"]))),
            "entities": model.encode_entities(**processor(entities=with_images(ENTITIES, FORMS["8 bits"]))),
        }


def assert_same(encodings, expected):
    for name in ("text", "vision"):
        torch.testing.assert_close(encodings[name], expected[name])


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_memory(expected, form):
    inputs = ModelInputs(toy_model(), ToyProcessor())
    mentions, entities = (with_images(rows, FORMS[form]) for rows in (MENTIONS, ENTITIES))
    with torch.no_grad():
        assert_same(inputs.model.encode_mentions(**inputs.mentions(mentions)), expected["mentions"])
        assert_same(inputs.model.encode_entities(**inputs.entities(entities)), expected["entities"])
    plain, deep = (
        score_pairs(
            ModelInputs(toy_reranker(), ToyPairProcessor()),
            with_images(MENTIONS, FORMS[name]),
            with_images(ENTITIES, FORMS[name]),
            [[k, (k + 1) % 12] for k in range(12)],
        ).scores
        for name in ("8 bits", form)
    )
    torch.testing.assert_close(deep, plain)


@pytest.mark.parametrize("transformed", [False, True])
def test_rows_of_a_data_set(expected, transformed):
    for kind, rows in (("mentions", MENTIONS), ("entities", ENTITIES)):
        data = stored(rows)
        if transformed:  # datasets then decodes the images itself, to 16 bits
            data = data.with_transform(lambda batch: batch)
            column = data[0]["image"] if kind == "mentions" else data[0]["images"][0]
            assert column.mode == "I;16"
        assert_same(encode_rows(ModelInputs(toy_model(), ToyProcessor()), data, kind), expected[kind])


def test_training_batches():
    inputs, entities = ModelInputs(toy_model(), ToyProcessor()), stored(ENTITIES)
    batch = RetrieverCollator(inputs, entities)(with_images(MENTIONS, scan))
    processor = ToyProcessor()
    plain = processor(mentions=with_images(MENTIONS, FORMS["8 bits"]))
    torch.testing.assert_close(batch["mention_colours"], plain["mention_colours"])
    order = [int(mention["entity_id"][1:]) - 1 for mention in MENTIONS]
    plain = processor(entities=with_images(ENTITIES, FORMS["8 bits"]))
    torch.testing.assert_close(batch["entity_colours"][batch["labels"]], plain["entity_colours"][order])


def test_a_knowledge_base_of_files_and_the_linker(expected, tmp_path):
    lines = []
    for k, row in enumerate(ENTITIES):
        scan(k).save(tmp_path / f"{k}.tif")
        lines.append(
            json.dumps({key: row[key] for key in ("entity_id", "name", "attributes")} | {"image": f"{k}.tif"})
        )
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(tmp_path / "mine.jsonl", model, processor, progress=False)
    assert_same(kb.encodings(range(12)), expected["entities"])
    assert np.array_equal(np.asarray(kb.image(3))[:, :, 0], SHADES[3])
    linker = EntityLinker(model, processor, kb)
    mention = {"text": "Entity c", "mention": "Entity c"}
    scores = [linker(mention | {"image": FORMS[form](7)}).best.score for form in FORMS]
    assert scores == pytest.approx([scores[0]] * len(FORMS))
    assert linker(mention).best.score != pytest.approx(scores[0])
