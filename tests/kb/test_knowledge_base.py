"""Tests of KnowledgeBase against plain Python: contents, adding and removing entities, crashes and damaged files."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    LockedError,
    MelError,
    UnknownEntityError,
)
from hf_mel.kb import build_index, knowledge_base, open_index, shards
from hf_mel.kb.indexes import base as indexes_base
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.schema import entity_features, post_features
from tests.processes import lock_holder
from tests.toy import ToyProcessor, ToyRetriever, ToyTokenRetriever, toy_entities, toy_model, write_toy_dataset
from tests.toy_posts import ToyPostsProcessor, toy_posts, toy_posts_model

MODEL, PROCESSOR = toy_model(), ToyProcessor()
WORLD = toy_entities(30)


def build(rows, output=None, model=MODEL, processor=PROCESSOR, **options) -> KnowledgeBase:
    return KnowledgeBase.build(rows, model, processor, output=output, **{"batch_size": 4, "progress": False} | options)


def dataset(*rows, **columns) -> datasets.Dataset:
    """Returns entities with the given columns. All other columns are empty."""
    empty = {"entity_id": "Q1", "name": "", "description": "", "attributes": "", "aliases": [], "images": []}
    return datasets.Dataset.from_list([empty | columns | row for row in rows], features=entity_features())


def encoded(rows) -> dict[str, torch.Tensor]:
    """Returns the encodings of entities, computed one at a time."""
    with torch.no_grad():
        parts = [MODEL.encode_entities(**PROCESSOR(entities=[row])) for row in rows]
    return {name: torch.cat([part[name] for part in parts]) for name in ("text", "vision")}


def content(kb: KnowledgeBase, chunk_size: int = 7):
    """Returns ids, rows and encodings of a knowledge base."""
    chunks = list(kb.iter_chunks(chunk_size))
    sizes = [len(chunk["text"]) for _, chunk in chunks]
    assert [first for first, _ in chunks] == [sum(sizes[:k]) for k in range(len(sizes))]
    assert all(size == chunk_size for size in sizes[:-1])
    assert sum(sizes) == len(kb)
    tensors = {name: torch.cat([chunk[name] for _, chunk in chunks]) for name in ("text", "vision")}
    return list(kb.entity_ids), kb.rows(range(len(kb))), tensors


def assert_holds(kb: KnowledgeBase, rows: list[dict], chunk_size: int = 7) -> None:
    ids, stored, tensors = content(kb, chunk_size)
    assert ids == [row["entity_id"] for row in rows]
    assert stored == [{k: v for k, v in row.items() if k != "images"} for row in rows]
    for name, expected in encoded(rows).items():
        torch.testing.assert_close(tensors[name], expected)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "kb.json").read_text())
    change(manifest)
    (folder / "kb.json").write_text(json.dumps(manifest))


# Contents


@pytest.mark.parametrize("batch_size", [1, 4, 30, 100])
def test_a_knowledge_base_holds_encodings_and_texts_of_its_entities_in_order(tmp_path, batch_size):
    kb = build(WORLD, tmp_path / "kb", batch_size=batch_size)
    assert_holds(kb, list(WORLD))
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), list(WORLD), chunk_size=100)


@pytest.mark.parametrize(("window", "num_shards"), [(1, 3), (2, 2), (3, 3)])
def test_many_shards_hold_the_same_as_one(tmp_path, monkeypatch, window, num_shards):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 9 * 2 * 16 * 4)
    monkeypatch.setattr(shards, "_GROUP_ROWS", 2)
    monkeypatch.setattr("hf_mel.inference.encode._WINDOW_BATCHES", window)
    kb = build(WORLD, tmp_path / "kb")
    assert kb.info()["shards"] == num_shards  # of 12 or 16 rows, because a shard ends with the window that fills it
    for chunk_size in (1, 5, 12, 100):
        assert_holds(kb, list(WORLD), chunk_size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once_and_returned_as_float32(tmp_path, dtype):
    kb = build(WORLD, tmp_path / "kb", dtype=dtype)
    for name, expected in encoded(WORLD).items():
        encodings = kb.encodings(range(len(kb)))[name]
        assert encodings.dtype == torch.float32
        torch.testing.assert_close(encodings, expected.to(getattr(torch, dtype)).float(), rtol=0, atol=1e-7)
        with safe_open(tmp_path / "kb" / "encodings-00000.safetensors", "pt") as file:
            assert file.get_tensor(name).dtype == getattr(torch, dtype)


class Tokens(ToyRetriever):
    """The toy retriever, which also returns vectors of tokens, a mask, a number, and plain integers of 8 bits."""

    def encode_entities(self, **inputs):
        encoded = super().encode_entities(**inputs)
        mask = inputs["entity_attention_mask"].bool()
        tokens = encoded.text[:, None, :5] * torch.arange(1, mask.shape[1] + 1)[:, None]
        others = {"tokens": tokens, "mask": mask, "number": encoded.text[:, 0], "small": mask.sum(1).to(torch.int8)}
        return {**others, **encoded}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_few_bits_are_rounded_once_and_returned_as_float32(tmp_path, dtype):
    model = Tokens(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    with torch.no_grad():
        expected = dict(model.encode_entities(**PROCESSOR(entities=list(WORLD))))
    kb = build(WORLD, tmp_path / "kb", model=model, dtype=dtype)
    stored = kb.encodings(range(len(kb)))
    for name, tensor in expected.items():
        assert stored[name].shape == tensor.shape
        if name in ("mask", "number", "small"):
            assert torch.equal(stored[name], tensor)
            continue
        assert stored[name].dtype == torch.float32
        steps = tensor.abs().amax(-1, keepdim=True) / (7 if (dtype, name) == ("int4", "tokens") else 127) * 1.01
        assert ((stored[name] - tensor).abs() <= steps / 2).all()
        assert not torch.equal(stored[name], tensor)
    # Read in any part and order, saved, changed and opened again, the rows are the same.
    rows = [7, 3, 29, 3]
    for name, tensor in kb.encodings(rows, as_stored=True).items():
        assert torch.equal(tensor, stored[name][rows])
    for first, chunk in kb.iter_chunks(7):
        for name, tensor in chunk.items():
            assert torch.equal(tensor, stored[name][first : first + 7])
    kb.remove([kb.entity_ids[2]])
    kb.add(WORLD.select([2]), model, PROCESSOR, progress=False)
    order = [*range(2), *range(3, 30), 2]
    for other in (kb, KnowledgeBase.from_pretrained(kb.path), kb.save(tmp_path / "copy", progress=False)):
        assert (other.dtype, other.info()["encodings"]) == (dtype, kb.info()["encodings"])
        for name, tensor in other.encodings(range(30)).items():
            assert torch.equal(tensor, stored[name][order])


def token_models() -> tuple[ToyTokenRetriever, ToyTokenRetriever]:
    """Returns a model that says which padding is not read, and the same one that does not."""
    models = [ToyTokenRetriever(MODEL.config).eval() for _ in range(2)]
    for model in models:
        model.load_state_dict(MODEL.state_dict())
    models[1].entity_token_masks = {}
    return models[0], models[1]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_few_bits_leave_out_padding_that_no_score_reads(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("hf_mel.inference.encode._WINDOW_BATCHES", 1)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 3_000)
    masked, plain = token_models()
    kb = build(WORLD, tmp_path / "kb", model=masked, dtype=dtype)
    padded = build(WORLD, tmp_path / "padded", model=plain, dtype=dtype)
    assert kb.info()["shards"] == padded.info()["shards"] > 2
    expected = padded.encodings(range(30))
    mask = expected["mask"]
    assert {0, mask.shape[1]} < set(mask.sum(1).tolist())
    expected["tokens"] = expected["tokens"] * mask[..., None]
    assert kb.info()["encoding_bytes"] < padded.info()["encoding_bytes"]
    sizes = [0, 0]
    for number in range(kb.info()["shards"]):
        with safe_open(kb.path / f"encodings-{number:05d}.safetensors", "pt") as file:
            sizes[0] += len(file.get_tensor("tokens"))
            sizes[1] += file.get_tensor("mask").nbytes
    assert sizes == [int(mask.sum()), 30 * -(-mask.shape[1] // 8)]

    def assert_equal(encodings, rows):
        assert set(encodings) == set(expected)
        for name, tensor in encodings.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name][rows])

    for rows in ([7, 3, 29, 3], [], [4], [0, 10, 20, 29], range(5, 25), torch.randperm(30).tolist()):
        assert_equal(kb.encodings(rows), list(rows))
        assert_equal(kb.encodings(rows, as_stored=True), list(rows))
        part = kb.encodings(rows, names=["tokens", "vision"])
        assert list(part) == ["tokens", "vision"]
        assert torch.equal(part["tokens"], expected["tokens"][list(rows)])
    for chunk_size in (1, 7, 30):
        for first, chunk in kb.iter_chunks(chunk_size):
            assert_equal(chunk, slice(first, first + chunk_size))
    kb.remove([kb.entity_ids[2], kb.entity_ids[29]])
    kb.add(WORLD.select([2]), masked, PROCESSOR, progress=False)
    order = [0, 1, *range(3, 29), 2]
    for other in (kb, KnowledgeBase.from_pretrained(kb.path), kb.save(tmp_path / "copy", progress=False)):
        assert other.info()["encodings"]["tokens"]["mask"] == "mask"
        assert_equal(other.encodings(range(29)), order)


def test_entities_are_added_in_the_form_of_those_that_are_there(tmp_path):
    """A knowledge base that was made before padding was left out keeps it."""
    masked, plain = token_models()
    kb = build(WORLD, tmp_path / "kb", model=plain, dtype="int4")
    expected, layout = kb.encodings(range(30)), kb.info()["encodings"]
    kb.remove([kb.entity_ids[2]])
    kb.add(WORLD.select([2]), masked, PROCESSOR, progress=False)
    assert kb.info()["encodings"] == layout
    for name, tensor in kb.encodings(range(30)).items():
        assert torch.equal(tensor, expected[name][[0, 1, *range(3, 30), 2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_stays_where_encodings_are_mapped(tmp_path, dtype):
    masked, plain = token_models()
    kb = build(WORLD, tmp_path / "kb", model=masked, dtype=dtype)
    padded = build(WORLD, tmp_path / "padded", model=plain, dtype=dtype)
    assert files(kb.path).keys() == files(padded.path).keys()
    for name, content in files(kb.path).items():
        assert content == files(padded.path)[name]


@pytest.mark.parametrize(
    "masks", [{"tokens": "none"}, {"none": "mask"}, {"mask": "mask"}, {"text": "mask"}, {"tokens": "text"}]
)
def test_masks_that_are_none_are_refused(tmp_path, masks):
    model, _ = token_models()
    model.entity_token_masks = masks
    with pytest.raises(KnowledgeBaseError, match=r"says that .* is the mask of .*entity_token_masks"):
        build(WORLD, tmp_path / "kb", model=model, dtype="int4")
    assert not (tmp_path / "kb").exists()


def test_a_file_whose_vectors_are_not_those_of_its_rows_is_refused(tmp_path):
    model, _ = token_models()
    kb = build(WORLD, tmp_path / "kb", model=model, dtype="int4")
    path = kb.path / "encodings-00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(changed):
        save_file(changed, path)
        edit_manifest(kb.path, lambda m: m["shards"][0]["encodings"].update(bytes=path.stat().st_size))

    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != "mask.first"},
        tensors | {"tokens": tensors["tokens"][:-1]},
        tensors | {"tokens.scale": tensors["tokens.scale"][:-1]},
        tensors | {"tokens": tensors["tokens"][:-1], "tokens.scale": tensors["tokens.scale"][:-1]},
        tensors | {"mask": torch.full_like(tensors["mask"], 255)},
        tensors | {"mask.first": tensors["mask.first"] + 1},
        tensors | {"mask.first": tensors["mask.first"][:-1]},
    ):
        write(changed)
        with pytest.raises(KnowledgeBaseError, match="do not match"):
            KnowledgeBase.from_pretrained(kb.path)
    first = tensors["mask.first"].clone()
    first[3] = 10**9
    write(tensors | {"mask.first": first})
    kb = KnowledgeBase.from_pretrained(kb.path)
    assert kb.encodings([2])["tokens"].shape[0] == 1
    with pytest.raises(KnowledgeBaseError, match=r"encodings-00000.*damaged.*does not fit"):
        kb.encodings(range(30))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(dtype="bfloat16"),
        lambda m: m["encodings"]["tokens"].update(mask="text"),
        lambda m: m["encodings"]["tokens"].update(mask=7),
        lambda m: m["encodings"]["tokens"].update(dtype="float32"),
        lambda m: m["encodings"]["tokens"].pop("mask"),
        lambda m: m["encodings"]["mask"].update(shape=[47]),
    ],
)
def test_a_manifest_with_a_mask_that_is_none_is_refused(tmp_path, change):
    model, _ = token_models()
    build(WORLD, tmp_path / "kb", model=model, dtype="int4")
    edit_manifest(tmp_path / "kb", change)
    with pytest.raises(KnowledgeBaseError, match="The knowledge base is damaged"):
        KnowledgeBase.from_pretrained(tmp_path / "kb")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_resumed_build_in_few_bits_gives_the_same_files(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 300)
    monkeypatch.setattr("hf_mel.inference.encode._WINDOW_BATCHES", 1)
    whole = build(WORLD, tmp_path / "whole", dtype=dtype)
    broken = list(WORLD)
    encode, calls = MODEL.encode_entities, []

    def failing(**inputs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(**inputs)

    monkeypatch.setattr(MODEL, "encode_entities", failing)
    with pytest.raises(KeyboardInterrupt):
        build(WORLD, tmp_path / "kb", dtype=dtype)
    resumed = build(WORLD, tmp_path / "kb", dtype=dtype)
    assert len(calls) < 1 + 6 + -(-len(broken) // 4)
    assert resumed.info()["shards"] > 1
    rows = [29, 0, 7, 8]  # of several shards
    for as_stored in (False, True):
        part = resumed.encodings(rows, as_stored=as_stored, names=["vision"])
        assert set(part) == {"vision"}
        assert torch.equal(part["vision"], whole.encodings(range(30))["vision"][rows])
    for name in whole.files():
        if name.endswith(".safetensors"):
            assert (tmp_path / "kb" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_file_of_few_bits_with_other_tensors_is_refused(tmp_path):
    kb = build(WORLD, tmp_path / "kb", dtype="int8")
    path = kb.path / "encodings-00000.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != "text.scale"},
        tensors | {"text": tensors["text"].float()},
        tensors | {"text.scale": tensors["text.scale"][:-1]},
    ):
        save_file(changed, path)
        edit_manifest(kb.path, lambda m: m["shards"][0]["encodings"].update(bytes=path.stat().st_size))
        with pytest.raises(KnowledgeBaseError, match="damaged"):
            KnowledgeBase.from_pretrained(kb.path)
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(KnowledgeBaseError, match="bytes"):
        KnowledgeBase.from_pretrained(kb.path)


def test_masks_keep_their_dtype():
    class Masked(ToyRetriever):
        def encode_entities(self, **inputs):
            return {"mask": inputs["entity_attention_mask"].bool(), **super().encode_entities(**inputs)}

    kb = build(WORLD, model=Masked(MODEL.config).eval(), dtype="float16")
    mask = kb.encodings([4, 2])["mask"]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, PROCESSOR(entities=[WORLD[4], WORLD[2]])["entity_attention_mask"].bool())


def test_threads_that_read_at_once_get_what_one_gets(monkeypatch):
    """Without a lock, threads that read one Parquet file crash the process, though not every time."""
    monkeypatch.setattr(shards, "_GROUP_ROWS", 2)
    kb = build(WORLD)
    positions = [[(seed * 7 + k * 11) % 30 for k in range(20)] for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(kb.rows, positions * 10))
    for expected, rows in zip(positions * 10, answers, strict=True):
        assert [row["entity_id"] for row in rows] == [WORLD[k]["entity_id"] for k in expected]


def test_rows_and_encodings_come_in_the_requested_order(monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "_GROUP_ROWS", 2)
    kb = build(WORLD)
    kb.remove(["Q2", "Q3", "Q29"])
    remaining = [row for row in WORLD if row["entity_id"] not in ("Q2", "Q3", "Q29")]
    positions = [20, 3, 3, 26, 0, 4, 5]
    assert [row["entity_id"] for row in kb.rows(positions)] == [remaining[k]["entity_id"] for k in positions]
    torch.testing.assert_close(kb.encodings(positions)["text"], encoded([remaining[k] for k in positions])["text"])
    assert [kb.row_of(remaining[k]["entity_id"]) for k in positions] == positions
    assert kb.rows([]) == []
    assert kb.encodings([])["text"].shape == (0, 16)


def test_only_the_first_image_is_stored_with_its_bytes_but_not_its_name(tmp_path):
    paths = []
    for k, colour in enumerate(("red", "blue")):
        paths.append(tmp_path / f"the-answer-is-{k}.png")
        Image.new("RGB", (5, 3), colour).save(paths[-1])
    rows = dataset({"images": [str(path) for path in paths]}, {"entity_id": "Q2"})
    kb = build(rows, tmp_path / "kb")
    stored = pq.read_table(tmp_path / "kb" / "entities-00000.parquet").column("images").to_pylist()
    assert stored == [[{"bytes": paths[0].read_bytes(), "path": None}], []]
    assert kb.image(0).getpixel((0, 0)) == (255, 0, 0)
    assert kb.image(1) is None
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "kb" / "entities-*.parquet"), split="train", cache_dir=tmp_path / "cache"
    )
    assert loaded.features == entity_features()
    assert loaded[0]["images"][0].size == (5, 3)


def test_nearly_empty_and_very_long_entities_are_accepted(tmp_path):
    name = "ab" * 5_000
    kb = build(dataset({"name": name}, {"entity_id": "Q2"}, {"entity_id": "Q3", "description": None}), tmp_path / "kb")
    assert [row["name"] for row in kb.rows([0, 1])] == [name, ""]
    assert kb.rows([2])[0]["description"] == ""
    assert build(dataset({})).rows([0])[0]["entity_id"] == "Q1"  # a knowledge base of one


def test_a_knowledge_base_is_built_from_a_file_or_a_data_folder(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "name": "Ada"}\n{"id": "b", "name": "Bob", "aliases": ["B"]}\n')
    kb = build(tmp_path / "mine.jsonl")
    assert [(row["entity_id"], row["name"], row["aliases"]) for row in kb.rows([0, 1])] == [
        ("a", "Ada", []),
        ("b", "Bob", ["B"]),
    ]
    folder = tmp_path / "data"
    (folder / "entities").mkdir(parents=True)
    WORLD.to_parquet(folder / "entities" / "kb-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: entities\n  data_files:\n  - split: kb\n    path: entities/kb-*\n---\n"
    )
    assert_holds(build(str(folder)), list(WORLD))


def test_the_model_encodes_in_evaluation_mode_and_then_returns_to_its_own():
    class Moody(ToyRetriever):
        def encode_entities(self, **inputs):
            output = super().encode_entities(**inputs)
            return {name: tensor * (2 if self.training else 1) for name, tensor in output.items()}

    model = Moody(MODEL.config)
    model.load_state_dict(MODEL.state_dict())
    model.train()
    assert_holds(build(WORLD, model=model), list(WORLD))
    assert model.training


# Changes


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_sequence_of_adds_and_removes_equals_that_on_a_plain_list(data):
    """Compares with a list of rows, also after reloading and after saving a compact copy."""
    start = data.draw(st.integers(1, 10))
    kb, rows = build(WORLD.select(range(start))), list(WORLD.select(range(start)))
    for _ in range(data.draw(st.integers(1, 5))):
        if len(rows) > 1 and data.draw(st.booleans()):
            removed = data.draw(
                st.sets(st.sampled_from([row["entity_id"] for row in rows]), min_size=1, max_size=len(rows) - 1)
            )
            assert kb.remove(sorted(removed)) == len(removed)
            rows = [row for row in rows if row["entity_id"] not in removed]
        else:
            chosen = data.draw(st.lists(st.integers(0, 29), min_size=1, max_size=8, unique=True))
            added = WORLD.select(chosen).map(
                lambda row, mark: {"attributes": row["attributes"] + mark}, fn_kwargs={"mark": "!" * len(rows)}
            )
            assert kb.add(added, MODEL, PROCESSOR, replace=True, progress=False) == len(chosen)
            rows = [row for row in rows if row["entity_id"] not in added["entity_id"]] + list(added)
    assert_holds(kb, rows, data.draw(st.integers(1, 12)))
    assert_holds(KnowledgeBase.from_pretrained(kb.path, verify=True), rows)
    copy = kb.save(kb.path.with_name(kb.path.name + "-copy"), progress=False)
    try:
        assert_holds(copy, rows)
        assert copy.info()["removed"] == 0
        assert copy.info()["shards"] == 1
    finally:
        shutil.rmtree(copy.path)


def test_adding_entities_leaves_existing_files_untouched(tmp_path):
    kb = build(WORLD.select(range(10)), tmp_path / "kb")
    before = files(kb.path)
    kb.add(WORLD.select(range(10, 14)), MODEL, PROCESSOR, progress=False)
    kb.remove(["Q1"])
    after = files(kb.path)
    assert {name for name in after if after[name] != before.get(name)} == {
        "kb.json",
        "encodings-00001.safetensors",
        "entities-00001.parquet",
    }
    assert set(before) <= set(after)


def test_a_removed_entity_can_be_added_again():
    kb = build(WORLD.select(range(3)))
    kb.remove("Q2")
    assert "Q2" not in kb
    kb.add(WORLD.select([1]), MODEL, PROCESSOR, progress=False)
    assert kb.entity_ids == ["Q1", "Q3", "Q2"]
    assert kb.row_of("Q2") == 2


def test_saving_to_the_same_folder_compacts_it(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    kb.remove([f"Q{k}" for k in range(1, 21)])
    kb.add(WORLD.select([0]), MODEL, PROCESSOR, progress=False)
    kb.save(tmp_path / "kb", progress=False)
    rows = [*WORLD.select(range(20, 30)), WORLD[0]]
    assert_holds(kb, rows)
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), rows)
    assert sorted(os.listdir(tmp_path)) == ["kb"]


def test_removing_an_unknown_entity_removes_nothing():
    kb = build(WORLD)
    with pytest.raises(UnknownEntityError, match="'Q99'"):
        kb.remove(["Q1", "Q99"])
    assert len(kb) == 30
    kb.remove(["Q1"])
    with pytest.raises(UnknownEntityError, match="'Q1'"):
        kb.remove(["Q1"])


def test_the_last_entity_cannot_be_removed():
    kb = build(WORLD.select(range(2)))
    with pytest.raises(KnowledgeBaseError, match="leave no entities"):
        kb.remove(["Q1", "Q2"])
    assert len(kb) == 2


def test_adding_an_existing_entity_is_an_error_that_names_it():
    kb = build(WORLD.select(range(5)))
    with pytest.raises(DuplicateIdError, match=r"already has the id 'Q5' \(and 1 more"):
        kb.add(WORLD.select([7, 4, 2]), MODEL, PROCESSOR, progress=False)
    assert_holds(kb, list(WORLD.select(range(5))))


def test_a_change_through_an_older_object_keeps_the_changes_of_others(tmp_path):
    kb = build(WORLD.select(range(5)), tmp_path / "kb")
    older = [KnowledgeBase.from_pretrained(tmp_path / "kb") for _ in range(3)]
    kb.remove(["Q1"])
    older[0].add(WORLD.select([9]), MODEL, PROCESSOR, progress=False)
    older[1].remove(["Q2"])
    with pytest.raises(UnknownEntityError, match="'Q1'"):
        older[2].remove(["Q1"])
    with pytest.raises(DuplicateIdError, match="'Q10'"):
        kb.add(WORLD.select([9]), MODEL, PROCESSOR, progress=False)
    older[2].save(tmp_path / "kb", progress=False)
    kb.remove(["Q3"])
    rows = list(WORLD.select([3, 4, 9]))
    assert_holds(kb, rows)
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), rows)


def test_a_change_after_a_build_by_another_model_is_refused(tmp_path):
    kb = build(WORLD.select(range(5)), tmp_path / "kb")
    other = toy_model(seed=1)
    build(WORLD.select(range(5)), tmp_path / "kb", model=other)
    with pytest.raises(KnowledgeBaseError, match="not the one that built"):
        kb.add(WORLD.select([9]), MODEL, PROCESSOR, progress=False)


SMALL = build(WORLD.select(range(3)))
CHANGES = {
    "add": lambda kb: kb.add(WORLD.select([9]), MODEL, PROCESSOR, progress=False),
    "remove": lambda kb: kb.remove(["Q2"]),
    "save": lambda kb: kb.save(kb.path, progress=False),
    "save over": lambda kb: SMALL.save(kb.path, progress=False),
    "build over": lambda kb: build(WORLD, kb.path),
    "index": lambda kb: build_index(kb, "faiss-flat", MODEL, PROCESSOR, progress=False),
}


def test_every_change_is_refused_while_another_process_writes(tmp_path):
    kb = build(WORLD.select(range(5)), tmp_path / "kb")
    before = files(kb.path)
    with lock_holder(kb.path / ".writer.lock") as process:
        for change in CHANGES.values():
            with pytest.raises(LockedError, match=f"being changed already, by process {process.pid} .*--wait"):
                change(kb)
        assert_holds(KnowledgeBase.from_pretrained(kb.path, verify=True), list(WORLD.select(range(5))))
        assert {name: text for name, text in files(kb.path).items() if name != ".writer.lock"} == before
        threading.Timer(0.2, process.stdin.close).start()
        with kb.writing(wait=60):
            kb.remove(["Q2"])
    assert kb.entity_ids == ["Q1", "Q3", "Q4", "Q5"]


@pytest.mark.parametrize("first", CHANGES)
def test_a_change_within_another_is_refused_and_the_first_completes(tmp_path, monkeypatch, first):
    """The second change comes between the check of the first and the moment at which it takes effect."""
    build(WORLD.select(range(5)), tmp_path / "kb")
    kb, other = KnowledgeBase(tmp_path / "kb"), KnowledgeBase(tmp_path / "kb")
    place, name = (indexes_base, "write_text") if first == "index" else (knowledge_base, "write_manifest")
    real, refused = getattr(place, name), []

    def late(*given):
        monkeypatch.undo()
        for change in CHANGES.values():
            with pytest.raises(LockedError):
                change(other)
            refused.append(change)
        real(*given)

    monkeypatch.setattr(place, name, late)
    CHANGES[first](kb)
    assert len(refused) == len(CHANGES)
    ids = {"add": [0, 1, 2, 3, 4, 9], "remove": [0, 2, 3, 4], "save over": [0, 1, 2], "build over": range(30)}
    rows = list(WORLD.select(ids.get(first, range(5))))
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), rows)


REMOVE = """
import sys
from hf_mel.kb.knowledge_base import KnowledgeBase
kb = KnowledgeBase(sys.argv[1])
print("opened", flush=True)
for number in range(2, 31, 3):
    with kb.writing(wait=120):
        kb.remove([f"Q{number}"])
"""


def test_processes_that_remove_entities_at_once_lose_no_removal(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    command = [sys.executable, "-c", REMOVE, str(kb.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "opened\n"
        for number in range(3, 31, 3):
            with kb.writing(wait=120):
                kb.remove([f"Q{number}"])
    assert process.returncode == 0
    rows = list(WORLD.select(range(0, 30, 3)))
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), rows)


def test_an_open_reader_keeps_its_contents_while_others_write(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    reader, unread = (KnowledgeBase.from_pretrained(tmp_path / "kb") for _ in range(2))
    content(reader)
    kb.remove(["Q1"])
    kb.save(tmp_path / "kb", progress=False)
    assert_holds(reader, list(WORLD))
    changed = WORLD.map(lambda row: {"attributes": row["attributes"] + "!"})
    build(changed, tmp_path / "kb", model=MODEL)
    assert_holds(unread, list(WORLD))
    assert_holds(KnowledgeBase(tmp_path / "kb"), list(changed))


def test_a_reader_finds_the_old_or_the_new_state_at_every_moment_of_a_build(tmp_path, monkeypatch, small_shards):
    old, new = WORLD.select(range(10)), WORLD.select(range(10, 30))
    build(old, tmp_path / "kb")
    seen, replace, unlink = [], os.replace, Path.unlink

    def look():
        reader = KnowledgeBase(tmp_path / "kb")
        rows = list(old if len(reader) == 10 else new)
        assert_holds(reader, rows)
        seen.append(len(rows))

    def looking(act):
        def look_and_act(*given, **options):
            look()
            act(*given, **options)
            look()

        return look_and_act

    monkeypatch.setattr(os, "replace", looking(replace))
    monkeypatch.setattr(Path, "rename", looking(Path.rename))
    monkeypatch.setattr(Path, "unlink", looking(unlink))
    build(new, tmp_path / "kb")
    assert seen == sorted(seen)
    assert set(seen) == {10, 20}


def test_a_reader_that_meets_a_change_while_it_opens_sees_the_new_state(tmp_path, monkeypatch):
    build(WORLD.select(range(10)), tmp_path / "kb")
    real, changes = knowledge_base.map_encodings, []

    def late(*given):
        if not changes:
            changes.append(1)
            build(WORLD.select(range(20)), tmp_path / "kb")
        return real(*given)

    monkeypatch.setattr(knowledge_base, "map_encodings", late)
    assert_holds(KnowledgeBase(tmp_path / "kb"), list(WORLD.select(range(20))))


def test_reading_writes_nothing_and_a_read_only_folder_is_an_error_for_writers(tmp_path, monkeypatch):
    kb = build(WORLD, tmp_path / "kb")
    build_index(kb, "faiss-flat", MODEL, PROCESSOR, progress=False)
    times = [path.stat().st_mtime_ns for path in (kb.path, *sorted(kb.path.iterdir()))]

    def refuse(path, flags, *rest):
        raise OSError(errno.EROFS, "Read-only file system", path)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    reader = KnowledgeBase(kb.path)
    assert_holds(reader, list(WORLD))
    open_index(reader, "faiss-flat", MODEL)
    for name, change in CHANGES.items():
        if name != "build over":  # which needs a temporary folder first
            with pytest.raises(MelError, match="Read-only file system"):
                change(reader)
    monkeypatch.undo()
    assert [path.stat().st_mtime_ns for path in (kb.path, *sorted(kb.path.iterdir()))] == times


def test_a_link_to_a_folder_is_written_through(tmp_path):
    build(WORLD.select(range(3)), tmp_path / "kb")
    (tmp_path / "link").symlink_to(tmp_path / "kb")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "empty")
    for link in ("link", "other"):
        build(WORLD, tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert_holds(KnowledgeBase(tmp_path / link), list(WORLD))
    assert_holds(KnowledgeBase(tmp_path / "kb"), list(WORLD))
    assert sorted(os.listdir(tmp_path)) == ["empty", "kb", "link", "other"]


# Failures


class Broken(ToyProcessor):
    """Fails at its third batch of entities."""

    calls = 0

    def __call__(self, entities=None, **kwargs):
        if len(entities) == 4:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("the lights went out")
        return super().__call__(entities=entities, **kwargs)


def test_a_failed_build_leaves_the_old_knowledge_base_or_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="lights"):
        build(WORLD, tmp_path / "kb", processor=Broken())
    assert os.listdir(tmp_path) == []
    build(WORLD.select(range(3)), tmp_path / "kb")
    before = files(tmp_path)
    with pytest.raises(RuntimeError, match="lights"):
        build(WORLD, tmp_path / "kb", processor=Broken())
    assert files(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["kb"]
    build(WORLD, tmp_path / "kb")
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb"), list(WORLD))


class Interrupted(ToyProcessor):
    """Counts entities, and runs `call` before the batch that contains entity `at`."""

    def __init__(self, at: str | None = None, call=lambda: None):
        super().__init__()
        self.at, self.call, self.seen = at, call, 0

    def __call__(self, entities=None, **kwargs):
        if len(entities) == 4 or entities[0]["entity_id"] == "Q29":  # ignores the probe rows of the fingerprint
            if any(row["entity_id"] == self.at for row in entities):
                self.call()
            self.seen += len(entities)
        return super().__call__(entities=entities, **kwargs)


def ctrl_c():
    raise KeyboardInterrupt


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 8 * 2 * 16 * 4)  # 8 rows, two batches
    monkeypatch.setattr(shards, "_GROUP_ROWS", 4)
    monkeypatch.setattr("hf_mel.inference.encode._WINDOW_BATCHES", 1)


@pytest.mark.parametrize(("at", "num_done"), [("Q1", 0), ("Q8", 0), ("Q9", 8), ("Q21", 16), ("Q30", 24)])
def test_an_interrupted_build_resumes_and_gives_the_same_bytes(tmp_path, small_shards, caplog, at, num_done):
    build(WORLD, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(WORLD, tmp_path / "kb", processor=Interrupted(at, ctrl_c))
    assert not (tmp_path / "kb").exists()
    assert (tmp_path / ".kb.building").exists() == (num_done > 0)
    second = Interrupted()
    caplog.set_level("INFO")
    assert_holds(build(WORLD, tmp_path / "kb", processor=second), list(WORLD))
    assert second.seen == 30 - num_done
    assert (f"{num_done} entities are done" in caplog.text) == (num_done > 0)
    resumed, whole = files(tmp_path / "kb"), files(tmp_path / "whole")
    assert {k: v for k, v in resumed.items() if k != "kb.json"} == {k: v for k, v in whole.items() if k != "kb.json"}
    assert sorted(os.listdir(tmp_path)) == ["kb", "whole"]


@pytest.mark.parametrize("at", ["Q1", "Q14", "Q21", "Q30"])
def test_a_build_resumes_from_the_files_of_a_killed_process(tmp_path, small_shards, at, monkeypatch):
    monkeypatch.setattr("hf_mel.inference.encode.computed_ahead", lambda batches: batches)
    stage, leftovers = tmp_path / ".kb.building", tmp_path / "leftovers"
    build(WORLD, tmp_path / "kb", processor=Interrupted(at, lambda: shutil.copytree(stage, leftovers)))
    if at == "Q30":  # killed after the last rename, so only the notes remain
        shutil.rmtree(leftovers / "kb")
    shutil.rmtree(tmp_path / "kb")
    leftovers.rename(stage)
    assert_holds(build(WORLD, tmp_path / "kb"), list(WORLD))
    assert sorted(os.listdir(tmp_path)) == ["kb"]


@pytest.mark.parametrize("change", ["texts", "image", "model", "dtype", "truncated"])
def test_an_interrupted_build_with_other_inputs_is_not_resumed(tmp_path, small_shards, change):
    with pytest.raises(KeyboardInterrupt):
        build(WORLD, tmp_path / "kb", processor=Interrupted("Q21", ctrl_c))
    rows, options = WORLD, {}
    if change == "texts":
        rows = WORLD.map(lambda row: {"name": row["name"].replace("Entity b", "Entity B")})
    elif change == "image":
        image = {"images": [Image.new("RGB", (4, 4), "white")]}
        rows = WORLD.map(lambda row: image if row["entity_id"] == "Q2" else {}, features=WORLD.features)
    elif change == "truncated":
        file = tmp_path / ".kb.building" / "kb" / "encodings-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        options = {"model": toy_model(seed=1)} if change == "model" else {"dtype": "float16"}
    second = Interrupted()
    kb = build(rows, tmp_path / "kb", processor=second, **options)
    assert second.seen == (22 if change == "truncated" else 30)
    assert len(kb) == 30
    assert kb.rows(range(30)) == [{k: v for k, v in row.items() if k != "images"} for row in rows]
    if change == "image":
        assert kb.image(1).getpixel((0, 0)) == (255, 255, 255)


def test_a_build_that_must_not_replace_a_knowledge_base_keeps_what_was_finished(tmp_path, small_shards):
    build(WORLD, tmp_path / "kb", dtype="float16")
    with pytest.raises(KeyboardInterrupt):
        build(WORLD, tmp_path / "kb", processor=Interrupted("Q21", ctrl_c))
    with lock_holder(tmp_path / "kb" / ".writer.lock"), pytest.raises(LockedError):
        build(WORLD, tmp_path / "kb")
    second = Interrupted()
    assert_holds(build(WORLD, tmp_path / "kb", processor=second), list(WORLD))
    assert second.seen == 30 - 16


def test_only_one_process_builds_a_folder(tmp_path, small_shards):
    def second():
        with pytest.raises(MelError, match="being built already"):
            build(WORLD, tmp_path / "kb")

    assert_holds(build(WORLD, tmp_path / "kb", processor=Interrupted("Q13", second)), list(WORLD))


@pytest.mark.parametrize("nth", range(4))
def test_an_add_interrupted_at_any_rename_changes_nothing_and_can_be_repeated(tmp_path, monkeypatch, nth):
    kb = build(WORLD.select(range(3)), tmp_path / "kb")
    done, real = [], os.replace

    def replace(source, target):
        done.append(target)
        if len(done) == nth + 1:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if nth < 3:  # the renames of encodings, entities and kb.json
        with pytest.raises(KeyboardInterrupt):
            kb.add(WORLD.select([5, 6]), MODEL, PROCESSOR, progress=False)
        assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), list(WORLD.select(range(3))))
        assert not [name for name in os.listdir(tmp_path / "kb") if name.startswith(".")]
    monkeypatch.setattr(os, "replace", real)
    kb.add(WORLD.select([7, 8]), MODEL, PROCESSOR, progress=False)
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), list(WORLD.select([0, 1, 2, 7, 8])))


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(KnowledgeBaseError, match=r"encodings-00000.*No space left.*disk has room"):
        build(WORLD, tmp_path / "kb")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (WORLD.select([]), KnowledgeBaseError, "no entities"),
        (WORLD.select([0, 1, 2, 1]), DuplicateIdError, "row 3: The entity id 'Q2' is also that of row 1"),
        (dataset({"entity_id": ""}), DataFormatError, "row 0: The entity id is ''"),
        (dataset({}, {"entity_id": None}), DataFormatError, "row 1: The entity id is None"),
        (dataset({"entity_id": "NIL"}), DataFormatError, "'NIL'"),
        (WORLD.remove_columns("attributes"), DataFormatError, r"lack the columns \['attributes'\]"),
    ],
)
def test_invalid_entities_are_refused(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        build(rows, tmp_path / "kb")
    assert os.listdir(tmp_path) == []


BAD = {2: b"no image", 3: b"", 9: b"GIF89a"}


def with_bad_images(folder):
    """Returns the entities of WORLD with damaged images, those of Q5 and Q6 missing in the folder; and without them."""
    rows, clean = [], []
    for k, row in enumerate(WORLD.with_format("arrow")[:].to_pylist()):
        good = row["images"]
        bad = [{"bytes": BAD[k], "path": None}] if k in BAD else []
        if k in (4, 5):
            bad = [{"bytes": None, "path": str(folder / f"gone{k}.png")}]
        # Q4 has a good image after its bad one, the others have none.
        images = [*bad, *good] if k == 3 else bad or good
        rows.append({**row, "images": images})
        clean.append({**row, "images": [image for image in images if image not in bad]})
    return datasets.Dataset.from_list(rows, features=entity_features()), list(
        datasets.Dataset.from_list(clean, features=entity_features())
    )


def test_missing_and_damaged_images_are_listed_and_their_entities_go_without_them(tmp_path, caplog):
    rows, clean = with_bad_images(tmp_path)
    kb = build(rows, tmp_path / "kb")
    assert_holds(kb, clean)
    assert [(entry["file"], entry["row"]) for entry in kb.left_out_images] == [
        (None, "Q3"),
        (None, "Q4"),
        (None, "Q5"),
        (None, "Q6"),
        (None, "Q10"),
    ]
    assert "gone4.png: The image file does not exist." in kb.left_out_images[2]["problem"]
    assert kb.image(3) is not None
    assert "5 images are missing or damaged, and left out. The first: row Q3: " in caplog.text
    # One JSON object a line, which neither verification nor publication takes for a part of the knowledge base.
    lines = (tmp_path / "kb" / "left_out_images.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == kb.left_out_images
    kb.verify()
    assert "left_out_images.jsonl" not in kb.files()
    assert kb.save(tmp_path / "copy").left_out_images == kb.left_out_images
    # A later addition appends to the list; a new build replaces it.
    extra = dataset({"entity_id": "X1"}, {"entity_id": "X2", "images": [{"bytes": b"x", "path": None}]})
    kb.add(extra, MODEL, PROCESSOR, progress=False)
    assert [entry["row"] for entry in kb.left_out_images] == ["Q3", "Q4", "Q5", "Q6", "Q10", "X2"]
    assert kb.image(kb.row_of("X2")) is None
    assert build(WORLD, tmp_path / "kb").left_out_images == []
    assert build(rows, tmp_path / "kb").left_out_images[4]["row"] == "Q10"


def test_every_source_of_entities_goes_on_without_bad_images(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (3, 3), "red").save(tmp_path / "good.png")
    lines = [
        {"id": "a", "name": "Ada", "image": "gone.png"},
        {"id": "b", "name": "Bo", "image": ["broken.png", "good.png"]},
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kb = build(tmp_path / "mine.jsonl", tmp_path / "kb")
    assert [(entry["file"], entry["row"]) for entry in kb.left_out_images] == [("mine.jsonl", 1), ("mine.jsonl", 2)]
    assert str(tmp_path) not in json.dumps(kb.left_out_images)
    assert [kb.image(0), kb.image(1).size] == [None, (3, 3)]
    rows, clean = with_bad_images(tmp_path)
    kept = [k for k in range(30) if k not in (4, 5)]  # `to_parquet` takes no missing files
    kb = build(write_toy_dataset(tmp_path / "data", rows.select(kept)))
    assert_holds(kb, [clean[k] for k in kept])
    assert [entry["row"] for entry in kb.left_out_images] == ["Q3", "Q4", "Q10"]
    assert {entry["file"] for entry in kb.left_out_images} == {"data"}


@pytest.mark.parametrize("source", ["rows", "file"])
def test_a_strict_knowledge_base_takes_no_bad_image_and_writes_nothing(tmp_path, source):
    rows, _ = with_bad_images(tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"id": "a", "name": "Ada"}\n{"id": "Q3", "name": "Bo", "image": "gone.png"}')
    entities, row = (rows, "Q3") if source == "rows" else (tmp_path / "mine.jsonl", 2)
    with pytest.raises(ImageError) as caught:
        build(entities, tmp_path / "kb", strict=True)
    assert caught.value.row == row
    assert sorted(os.listdir(tmp_path)) == ["mine.jsonl"]
    kb = build(WORLD.select(range(2)), tmp_path / "kb")
    before = files(tmp_path / "kb")
    with pytest.raises(ImageError):
        kb.add(entities, MODEL, PROCESSOR, strict=True, progress=False)
    assert {name: content for name, content in files(tmp_path / "kb").items() if name in before} == before
    assert kb.entity_ids == ["Q1", "Q2"]


def test_posts_with_bad_images_go_on_without_them():
    posts = list(toy_posts())
    bad = {4, 5, 20}
    undecoded = toy_posts().with_format("arrow")[:].to_pylist()
    broken = [{**row, "image": {"bytes": b"x", "path": None}} if k in bad else row for k, row in enumerate(undecoded)]
    clean = [{**row, "image": None} if k in bad else row for k, row in enumerate(posts)]
    options = {"model": toy_posts_model(), "processor": ToyPostsProcessor()}
    one, other = (
        build(toy_entities(), posts=datasets.Dataset.from_list(rows, features=post_features()), **options)
        for rows in (broken, clean)
    )
    assert [entry["row"] for entry in one.left_out_images] == [posts[k]["post_id"] for k in sorted(bad)]
    for name in ("text", "vision"):
        torch.testing.assert_close(one.encodings(range(12))[name], other.encodings(range(12))[name])


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (lambda e: e | {"text": e["text"] * torch.nan}, "float32", "'text' of entity 'Q1' is nan"),
        (lambda e: e | {"vision": e["vision"] + 1e6}, "float16", "'vision' of entity 'Q1' is too large for float16"),
        (lambda e: e | {"text": e["text"] * torch.nan}, "int4", "'text' of entity 'Q1' is nan"),
        (lambda e: e | {"vision": e["vision"] * torch.inf}, "int8", "'vision' of entity 'Q1' is nan or infinite"),
        (lambda e: e | {"text": e["text"] * 0 + 3.4e38}, "int4", "'text' of entity 'Q1' is too large for int4"),
        (lambda e: {"text": e["text"][:-1]}, "float32", "encodings of 4 entities"),
        (lambda e: {"text": e["text"][:, : 3 + len(e["text"])]}, "float32", r"\(5,\).* pad"),
    ],
)
def test_encodings_that_cannot_be_stored_are_refused(change, dtype, message):
    class Odd(ToyRetriever):
        def encode_entities(self, **inputs):
            return change(dict(super().encode_entities(**inputs)))

    with pytest.raises(KnowledgeBaseError, match=message):
        build(WORLD, model=Odd(MODEL.config).eval(), dtype=dtype)


def test_a_model_that_encodes_no_entities_is_refused():
    with pytest.raises(KnowledgeBaseError, match="retriever"):
        build(WORLD, model=torch.nn.Linear(2, 2))
    with pytest.raises(KnowledgeBaseError, match="float64"):
        build(WORLD, dtype="float64")


def test_an_output_that_is_no_knowledge_base_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    for target in (tmp_path, tmp_path / "thesis.txt", tmp_path / "elsewhere"):
        with pytest.raises(KnowledgeBaseError, match="Choose another output"):
            build(WORLD, target)
        with pytest.raises(KnowledgeBaseError, match="Choose another output"):
            build(WORLD).save(target)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "thesis.txt"]


# Damage


@pytest.mark.parametrize("name", ["kb.json", "encodings-00000.safetensors", "entities-00000.parquet"])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_a_missing_file_or_one_of_another_size_is_refused(tmp_path, name, damage):
    build(WORLD, tmp_path / "kb")
    path = tmp_path / "kb" / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data + b"!")
    with pytest.raises(KnowledgeBaseError, match=r"kb\.json" if damage == "missing" and name == "kb.json" else name):
        KnowledgeBase.from_pretrained(tmp_path / "kb")


@pytest.mark.parametrize("name", ["encodings-00000.safetensors", "entities-00000.parquet"])
def test_verify_detects_a_changed_byte(tmp_path, name):
    build(WORLD, tmp_path / "kb")
    path = tmp_path / "kb" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    KnowledgeBase.from_pretrained(tmp_path / "kb")
    with pytest.raises(KnowledgeBaseError, match=rf"{name}.*not what was written"):
        KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True)


def test_verify_tells_replaced_files_from_damaged_ones(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    build(WORLD, tmp_path / "kb")
    with pytest.raises(KnowledgeBaseError, match="changed by another process since it was opened"):
        kb.verify()
    kb = KnowledgeBase(tmp_path / "kb")
    (tmp_path / "kb" / kb.files()[1]).unlink()
    with pytest.raises(KnowledgeBaseError, match="damaged: the file is missing"):
        kb.verify()


@pytest.mark.parametrize("part", ["encodings", "entities"])
@pytest.mark.parametrize("damage", ["noise", "others"])
def test_a_file_of_the_right_size_with_wrong_content_is_an_error_when_read(tmp_path, part, damage):
    kb = build(WORLD, tmp_path / "kb")
    name = {"encodings": "encodings-00000.safetensors", "entities": "entities-00000.parquet"}[part]
    path = tmp_path / "kb" / name
    if damage == "noise":
        path.write_bytes(b"\xff" * path.stat().st_size)
    elif part == "encodings":
        save_file({"text": torch.zeros(30, 16)}, path)
    else:
        pq.write_table(pq.read_table(path).slice(0, 7), path)
    edit_manifest(kb.path, lambda m: m["shards"][0][part].update(bytes=path.stat().st_size))
    with pytest.raises(KnowledgeBaseError, match=rf"{name}: The knowledge base is damaged"):
        content(KnowledgeBase.from_pretrained(tmp_path / "kb"))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("shards"),
        lambda m: m["shards"].clear(),
        lambda m: m["shards"][0].update(rows=0),
        lambda m: m["shards"][0].update(rows="30"),
        lambda m: m["shards"][0].update(rows=10**15),
        lambda m: m["shards"][0]["encodings"].update(file="../kb/encodings-00000.safetensors"),
        lambda m: m["shards"][0]["entities"].update(file="/etc/passwd"),
        lambda m: m["shards"][0]["entities"].update(bytes=None),
        lambda m: m.update(removed=[30]),
        lambda m: m.update(removed=[-1]),
        lambda m: m.update(removed=[1, 1]),
        lambda m: m.update(removed=list(range(30))),
        lambda m: m.update(removed=None),
        lambda m: m.update(dtype="int3"),
        lambda m: m.update(model=None),
        lambda m: m["model"].update(weights=None),
        lambda m: m.update(encodings=[]),
        lambda m: m["encodings"]["text"].update(shape=[2.5]),
        lambda m: m["encodings"]["text"].update(dtype="scaled int4"),
        lambda m: m["encodings"]["text"].update(dtype="scaled int8", shape=[]),
    ],
)
def test_a_manifest_with_invalid_values_is_refused(tmp_path, change):
    build(WORLD, tmp_path / "kb")
    edit_manifest(tmp_path / "kb", change)
    with pytest.raises(KnowledgeBaseError, match=r"kb\.json: The knowledge base is damaged"):
        KnowledgeBase.from_pretrained(tmp_path / "kb")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "[" * 100_000, '{"format": "hf_mel.knowledge_base"}', "\udcff"]
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "kb.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(KnowledgeBaseError, match=r"kb\.json"):
        KnowledgeBase.from_pretrained(tmp_path)


def test_a_newer_format_is_refused_with_a_remedy(tmp_path):
    build(WORLD, tmp_path / "kb")
    edit_manifest(tmp_path / "kb", lambda m: m.update(version=2))
    with pytest.raises(KnowledgeBaseError, match=r"version 2.*Update hf_mel"):
        KnowledgeBase.from_pretrained(tmp_path / "kb")


def test_a_folder_without_a_knowledge_base_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(KnowledgeBaseError, match=r"holds no knowledge base|is not an existing folder"):
            KnowledgeBase.from_pretrained(path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_loading_maps_the_encodings_and_reads_only_requested_rows(tmp_path):
    """Opening a sparse file of 1 GiB and reading a few rows must not load it into memory."""
    kb = build(WORLD.select(range(1)), tmp_path / "kb")
    rows, path = 2**23, tmp_path / "kb" / "encodings-00000.safetensors"
    header, offset = {}, 0
    for name in ("text", "vision"):
        header[name] = {"dtype": "F32", "shape": [rows, 16], "data_offsets": [offset, offset + rows * 64]}
        offset += rows * 64
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)

    def grow(manifest):
        manifest["shards"][0]["rows"] = rows
        manifest["shards"][0]["encodings"]["bytes"] = path.stat().st_size

    edit_manifest(kb.path, grow)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    kb = KnowledgeBase.from_pretrained(tmp_path / "kb")
    assert len(kb) == rows
    assert not kb.encodings([rows - 1, 5])["text"].any()
    first, chunk = next(kb.iter_chunks(1000))
    assert (first, chunk["vision"].shape) == (0, (1000, 16))
    assert resident() - before < 2**28  # of which the row numbers take 64 MiB


# Match of model and knowledge base


def test_a_different_model_or_processor_is_refused_with_the_reason(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    nudged = toy_model()
    with torch.no_grad():
        nudged.mention_text.weight[0, 0] += 1e-6  # weights of the mention side change scores too
    for model, processor, reason in (
        (nudged, PROCESSOR, "model .* its weights differ"),
        (toy_model(dim=8), PROCESSOR, "model .* dim is 8, was 16"),
        (toy_model().to(torch.bfloat16), PROCESSOR, "model .* bfloat16, not float32"),
        (MODEL, ToyProcessor(text_width=40), "processor .* other tensors"),
    ):
        with pytest.raises(KnowledgeBaseError, match=reason):
            kb.check_made_by(model, processor)
        with pytest.raises(KnowledgeBaseError, match=reason):
            kb.add(WORLD.select([0]), model, processor, replace=True, progress=False)
    assert_holds(kb, list(WORLD))


def test_a_saved_and_reloaded_model_matches_the_knowledge_base(tmp_path):
    model = toy_model()
    model.config.nil_threshold = 0.25
    kb = build(WORLD, model=model)
    model.config.nil_threshold = 0.5  # changes NIL decisions, but no scores
    model.save_pretrained(tmp_path / "model")
    loaded = ToyRetriever.from_pretrained(tmp_path / "model")
    assert loaded.config.nil_threshold == 0.5
    kb.check_made_by(loaded, ToyProcessor())
    edit_manifest(kb.path, lambda m: m["model"]["config"].update(a_field_of_another_version=1))
    KnowledgeBase.from_pretrained(kb.path).check_made_by(loaded, PROCESSOR)


def test_a_local_model_is_recorded_by_its_folder_name_only(tmp_path):
    MODEL.save_pretrained(tmp_path / "my-model")
    kb = build(WORLD, model=ToyRetriever.from_pretrained(tmp_path / "my-model"))
    assert kb.info()["model"]["name"] == "my-model"
    assert str(tmp_path) not in (kb.path / "kb.json").read_text()


def test_the_temporary_folder_of_a_knowledge_base_is_deleted_with_it():
    kb = build(WORLD)
    path = kb.path
    assert path.is_dir()
    del kb
    assert not path.exists()


# Old names


def test_names_of_the_last_release_work_with_a_warning(tmp_path):
    built = build(WORLD.select(range(5)), tmp_path / "kb")
    built.remove(["Q2"])
    with pytest.warns(FutureWarning, match=r"KnowledgeBase\.load is deprecated.*from_pretrained"):
        kb = KnowledgeBase.load(tmp_path / "kb", verify=True)
    assert kb.entity_ids == built.entity_ids
    with pytest.warns(FutureWarning, match="num_physical_rows"):
        assert kb.stored == 5
    with pytest.warns(FutureWarning, match=r"Use hf_mel\.kb\.open_index"):
        assert kb.open_index("exact", MODEL).kb is kb
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kb.nonsense


def test_names_and_lists_are_read_from_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_ROWS", 64)
    rows = [{"entity_id": f"Q{k}", "name": f"name {k}", "aliases": [f"alias {k}", "same"]} for k in range(300)]
    kb = build(dataset(*rows), tmp_path / "kb", batch_size=100)
    assert kb._tables[0]._parquet[0].num_row_groups > 1
    assert [*kb.names()] == [[row["name"], *row["aliases"]] for row in rows]
    assert len(kb.where("aliases = 'alias 7'")) == 1


@pytest.mark.parametrize(("kept_bytes", "group_bytes"), [(1 << 20, 1 << 20), (2000, 1 << 20), (1 << 20, 0)])
def test_rows_are_the_same_whatever_is_kept_of_them(tmp_path, monkeypatch, kept_bytes, group_bytes):
    monkeypatch.setattr(shards, "_GROUP_ROWS", 16)
    monkeypatch.setattr(shards, "_KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(shards, "_KEPT_GROUP_BYTES", group_bytes)
    rows = [{"entity_id": f"Q{k}", "name": f"name {k}", "aliases": ["same"] * (k % 3)} for k in range(300)]
    kb = build(dataset(*rows[:200]), tmp_path / "kb", batch_size=50)
    kb.add(dataset(*rows[200:]), MODEL, PROCESSOR)
    assert len(kb._tables) == 2
    generator = np.random.default_rng(0)
    for _ in range(30):
        chosen = generator.integers(300, size=5).tolist()
        for row, entity in zip(chosen, kb.rows(chosen), strict=True):
            assert {name: entity[name] for name in rows[row]} == rows[row]
        assert [row["name"] for row in kb.rows(chosen, further=True)] == [rows[row]["name"] for row in chosen]
    held = sum(table.nbytes for table in kb._kept._tables.values())
    assert kb._kept._bytes == held <= kept_bytes
    assert bool(held) == bool(group_bytes)


def test_a_row_group_is_read_once_by_threads_that_ask_for_its_rows(tmp_path, monkeypatch):
    kb = build(WORLD, tmp_path / "kb")
    expected = kb.rows(range(30))
    read: list[int] = []
    decode = shards.decode_table
    monkeypatch.setattr(shards, "decode_table", lambda *args: read.append(1) or decode(*args))
    kb = KnowledgeBase.from_pretrained(kb.path)
    kb.rows([0])
    with ThreadPoolExecutor(4) as pool:
        assert [row for rows in pool.map(kb.rows, [[k] for k in range(30)]) for row in rows] == expected
    assert read == [1]


# Updating


def counting_model(counts: list[int]):
    """A toy model that notes how many entities it encodes at a time."""
    model = toy_model()
    encode = model.encode_entities

    def encode_entities(**inputs):
        encodings = encode(**inputs)
        counts.append(len(encodings["text"]))
        return encodings

    model.encode_entities = encode_entities  # type: ignore[method-assign]
    return model


def test_an_update_encodes_only_what_changed_and_holds_what_a_new_build_holds(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    rows = list(WORLD)
    newer = [rows[k] for k in range(30) if k not in (3, 17)]
    newer[4] = {**newer[4], "name": "Renamed"}
    newer[9] = {**newer[9], "images": [Image.new("RGB", (3, 3), "red")]}
    newer[12] = {**newer[12], "aliases": ["Another name"]}
    newer += [{**rows[0], "entity_id": "new-1"}, {**rows[1], "entity_id": "new-2"}]
    source = datasets.Dataset.from_list(newer, features=entity_features())
    counts: list[int] = []
    done = kb.update(source, counting_model(counts), PROCESSOR, batch_size=4, progress=False)
    assert (done.added, done.removed) == (["new-1", "new-2"], [rows[3]["entity_id"], rows[17]["entity_id"]])
    assert done.changed == [newer[k]["entity_id"] for k in (4, 9, 12)]
    assert (done.num_unchanged, sum(counts)) == (25, 5)
    moved = {*done.changed, *done.added}
    expected = [row for row in source if row["entity_id"] not in moved]
    expected += [row for row in source if row["entity_id"] in moved]
    assert_holds(kb, expected)
    assert_holds(KnowledgeBase.from_pretrained(tmp_path / "kb", verify=True), expected)
    before = files(tmp_path / "kb")
    assert kb.update(source, counting_model(counts), PROCESSOR, progress=False).num_unchanged == 30
    assert sum(counts) == 5
    assert files(tmp_path / "kb") == before


def test_an_update_that_only_removes_writes_no_shard(tmp_path):
    kb = build(WORLD, tmp_path / "kb")
    done = kb.update(WORLD.select(range(10)), MODEL, PROCESSOR, progress=False)
    assert done.removed == WORLD["entity_id"][10:]
    assert kb.info()["shards"] == 1
    assert_holds(kb, list(WORLD.select(range(10))))


def test_an_index_stays_valid_after_an_update(tmp_path):
    pytest.importorskip("faiss")
    kb = build(WORLD, tmp_path / "kb")
    build_index(kb, "faiss-flat", MODEL, PROCESSOR)
    newer = [row if k != 5 else {**row, "name": "Other words"} for k, row in enumerate(WORLD) if k != 7]
    kb.update(datasets.Dataset.from_list(newer, features=entity_features()), MODEL, PROCESSOR, progress=False)
    index = open_index(kb, "faiss-flat", MODEL)
    assert index.record.rows == 30
    mentions = kb.encodings(range(3))
    found = index.find(mentions, 29)
    exact = open_index(kb, "exact", MODEL).find(mentions, 29)
    assert found.top_rows.tolist() == exact.top_rows.tolist()


def test_an_update_that_fails_changes_nothing(tmp_path, monkeypatch):
    kb = build(WORLD, tmp_path / "kb")
    before = files(tmp_path / "kb")
    newer = datasets.Dataset.from_list([{**row, "name": "x"} for row in WORLD], features=entity_features())
    monkeypatch.setattr(
        shards, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(KnowledgeBaseError, match="No space left"):
        kb.update(newer, MODEL, PROCESSOR, progress=False)
    monkeypatch.undo()
    assert files(tmp_path / "kb") == before
    assert_holds(KnowledgeBase(tmp_path / "kb"), list(WORLD))


def test_an_update_of_a_model_of_posts_is_refused():
    model, processor = toy_posts_model(), ToyPostsProcessor()
    kb = build(WORLD, model=model, processor=processor, posts=toy_posts(30))
    with pytest.raises(KnowledgeBaseError, match="would miss new posts"):
        kb.update(WORLD, model, processor)


# Columns to filter by


def typed_entities(count: int, **columns) -> datasets.Dataset:
    rows = toy_entities(count)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def test_further_columns_are_stored_copied_and_filtered_by(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP_ROWS", 3)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 500)
    monkeypatch.setattr("hf_mel.inference.encode._WINDOW_BATCHES", 1)
    rows = typed_entities(
        12,
        types=[["human", "painter"] if k % 2 else None for k in range(12)],
        born=[1800 + k if k % 3 else None for k in range(12)],
        place=[f"Place {k}" for k in range(12)],
        ratio=[k / 4 for k in range(12)],
        day=[datetime.date(1900 + k, 1, 1) for k in range(12)],
        vector=[[0.5, k] for k in range(12)],  # not stored
    )
    kb = KnowledgeBase.build(rows, MODEL, PROCESSOR, output=tmp_path / "kb", batch_size=4, progress=False)
    assert len(kb.shards) > 1
    assert list(kb.columns)[-5:] == ["types", "born", "place", "ratio", "day"]
    assert kb.where("type = 'painter' and born >= 1805").tolist() == [5, 7, 11]
    assert kb.where("day > '1909-12-31' or place = 'Place 0'").tolist() == [0, 10, 11]
    assert kb.where("ratio < 0.5 and name = 'Entity a'").tolist() == [0]
    kb.remove([rows["entity_id"][5], rows["entity_id"][0]])
    assert kb.where("type = 'painter' and born >= 1805").tolist() == [5, 9]  # rows count those that are left
    copy = kb.save(tmp_path / "copy", progress=False)
    assert copy.columns == kb.columns
    assert copy.where("type = 'painter' and born >= 1805").tolist() == [5, 9]
    assert copy.rows([5]) == kb.rows([5])
    assert set(copy.rows([5])[0]) == {"entity_id", "name", "description", "attributes", "aliases"}


def test_added_entities_may_lack_columns_and_have_others_but_not_of_another_type(tmp_path):
    kb = KnowledgeBase.build(
        typed_entities(4, born=[1, 2, 3, 4]), MODEL, PROCESSOR, output=tmp_path / "kb", progress=False
    )
    more = typed_entities(8, place=[f"Place {k}" for k in range(8)]).select(range(4, 8))
    kb.add(more, MODEL, PROCESSOR, progress=False)
    assert kb.where("born >= 3").tolist() == [2, 3]
    assert kb.where("born is null").tolist() == [4, 5, 6, 7]
    assert kb.where("place = 'Place 6'").tolist() == [6]
    assert len(kb.save(tmp_path / "copy", progress=False).where("place is null")) == 4
    newer = typed_entities(4, born=[1, 2, None, 9])
    assert kb.update(newer, MODEL, PROCESSOR, progress=False).changed == ["Q3", "Q4"]
    assert kb.where("born >= 2").tolist() == [1, 3]
    assert kb.update(newer, MODEL, PROCESSOR, progress=False).num_unchanged == 4
    wrong = typed_entities(9, born=[str(k) for k in range(9)]).select([8])
    with pytest.raises(KnowledgeBaseError, match="'born' is string, and in the knowledge base it is int64"):
        kb.add(wrong, MODEL, PROCESSOR, progress=False)
    assert len(kb) == 4


def test_a_knowledge_base_without_further_columns_filters_by_its_texts():
    kb = KnowledgeBase.build(toy_entities(5), MODEL, PROCESSOR, progress=False)
    assert list(kb.columns) == ["entity_id", "name", "description", "attributes", "aliases"]
    assert kb.where("entity_id in ('Q2', 'Q4')").tolist() == [1, 3]
    assert not len(kb.where("name = 'nothing'"))
