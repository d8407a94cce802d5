"""Tests of loading mentions, entities and posts."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest

from hf_mel.building.build import build_dataset
from hf_mel.data.loading import (
    check_golds,
    dataset_version,
    load_entities,
    load_mentions,
    load_posts,
)
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    UnknownDatasetError,
    UnknownEntityError,
    UnknownSplitError,
)
from hf_mel.schema import NIL
from tests.dataset_scripts.fixtures import NAMES, write_melbench
from tests.toy import toy_entities, toy_mentions, write_toy_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    build_dataset("wikimel", output=root / "wikimel", raw_dir=write_melbench(root / "raw"), allow_count_mismatch=True)
    return root / "wikimel"


def test_mentions_and_entities_load(folder):
    mentions = load_mentions(folder, "validation")
    assert [row["mention"] for row in mentions] == ["José Brun", "Brun"]
    assert mentions[0]["image"].size == (24, 16)
    assert load_mentions(str(folder), "test")["mention_id"] == ["105-0", "105-1"]
    entities = load_entities(folder)
    assert dict(zip(entities["entity_id"], entities["name"], strict=True)) == NAMES


def test_an_unknown_split_or_configuration_is_an_error(folder):
    with pytest.raises(UnknownSplitError, match=r"no split 'dev'; it has 'train', 'validation', 'test'"):
        load_mentions(folder, "dev")
    with pytest.raises(UnknownSplitError, match=r"no configuration 'posts'; it has .*'mentions'"):
        load_posts(folder)


def test_an_unknown_data_set_is_an_error(tmp_path, folder):
    for name in (tmp_path / "typo", "no spaces allowed"):
        with pytest.raises(UnknownDatasetError, match="neither a folder"):
            load_mentions(name, "test")
    with pytest.raises(UnknownDatasetError, match="neither a folder"):  # cannot be reached offline
        load_mentions("nobody/has-this", "test")
    with pytest.raises(UnknownDatasetError, match="holds no data set"):
        load_mentions(tmp_path, "test")
    with pytest.raises(UnknownDatasetError, match="no revision"):
        load_mentions(folder, "test", revision="v2")
    with pytest.raises(UnknownDatasetError, match="is a file"):
        load_entities(folder / "README.md")


def test_a_damaged_parquet_file_is_an_error(folder, tmp_path):
    copy = tmp_path / "copy"
    (copy / "entities").mkdir(parents=True)
    (copy / "README.md").write_bytes((folder / "README.md").read_bytes())
    name = "entities/kb-00000-of-00001.parquet"
    (copy / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(DataFormatError, match="cannot be read"):
        load_entities(copy)


def test_missing_columns_are_an_error(tmp_path):
    datasets.Dataset.from_dict({"entity_id": ["E"], "name": ["n"]}).to_parquet(tmp_path / "entities" / "kb.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: entities\n  data_files:\n  - split: kb\n    path: entities/kb*\n---\n"
    )
    with pytest.raises(DataFormatError, match=r"lacks the columns \['description', 'attributes'"):
        load_entities(tmp_path)


def test_a_folder_and_its_copy_on_the_hub_have_the_same_version(folder, monkeypatch):
    version = dataset_version(folder)
    parquet = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}
    lines = sorted(f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in parquet.items())
    assert version == {
        "dataset": "wikimel",
        "revision": None,
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }
    siblings = [
        SimpleNamespace(rfilename=name, lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()))
        for name, content in reversed(parquet.items())
    ]
    siblings.append(SimpleNamespace(rfilename="README.md", lfs=None))
    info = SimpleNamespace(sha="c0ffee", siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    assert dataset_version("org/wikimel") == {**version, "dataset": "org/wikimel", "revision": "c0ffee"}
    siblings[0].lfs = None
    assert dataset_version("org/wikimel")["sha256"] is None


def test_the_version_needs_the_hub_or_parquet_files(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert dataset_version("org/name", revision="v1") == {"dataset": "org/name", "revision": "v1", "sha256": None}
    with pytest.raises(UnknownDatasetError):
        dataset_version(tmp_path)


def test_one_changed_byte_changes_the_version(folder, tmp_path):
    before = dataset_version(folder)["sha256"]
    for path in folder.rglob("*.parquet"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert dataset_version(tmp_path)["sha256"] == before
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert dataset_version(tmp_path)["sha256"] != before


def test_unknown_golds_and_repeated_ids_are_errors(folder):
    mentions, ids = load_mentions(folder, "train"), load_entities(folder)["entity_id"]
    check_golds(mentions, ids)
    check_golds([{"mention_id": "1", "entity_id": NIL}], [])
    with pytest.raises(UnknownEntityError, match="gold 'Q901' of mention '101'") as caught:
        check_golds(mentions, [i for i in ids if i != "Q901"], file="f")
    assert (caught.value.file, caught.value.row) == ("f", 1)
    with pytest.raises(DuplicateIdError, match="that of row 0") as caught:
        check_golds([*mentions, mentions[0]], ids)
    assert caught.value.row == 5
    with pytest.raises(DuplicateIdError, match="entity id 'Q901'"):
        check_golds(mentions, [*ids, "Q901"])


def test_a_folder_of_the_same_name_or_built_again_does_not_load_cached_rows(tmp_path):
    """`datasets` identifies a folder by its name and card, and would return the rows cached for the first one."""
    golds = []
    for period, place in ((0, "a"), (6, "b"), (4, "b")):
        write_toy_dataset(tmp_path / place / "data", toy_entities(), train=toy_mentions(20, nil_every=period))
        golds.append(list(load_mentions(tmp_path / place / "data", "train")["entity_id"]).count(NIL))
    assert golds == [0, 20 // 6, 20 // 4]
