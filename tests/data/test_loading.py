"""Tests of loading mentions, entities and posts."""

from __future__ import annotations

import hashlib
import shutil
from types import SimpleNamespace

import datasets
import filelock
import huggingface_hub
import pytest

from hf_mel.building.build import build_dataset
from hf_mel.building.checks import check_dataset
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
        with pytest.raises(UnknownDatasetError, match=r"No folder has this name, and .*OWNER/NAME") as caught:
            load_mentions(name, "test")
        assert caught.value.file == str(name)
    with pytest.raises(UnknownDatasetError, match=r"^nobody/has-this: .*Hub cannot be reached.*HF_HUB_OFFLINE is set"):
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


def write_folder(folder, count):
    """Writes a data set with `count` mentions. It is renamed, because `to_parquet` takes some names for addresses."""
    plain = write_toy_dataset(folder.parent / "plain", toy_entities(), train=toy_mentions(count))
    if folder.exists():
        shutil.rmtree(folder)
    return plain.rename(folder)


@pytest.mark.parametrize(
    ("name", "matching"),
    [
        ("out[1]", "out1"),
        ("out*", "outer"),
        ("ou?", "out"),
        ("[!a]", "b"),
        ("{a,b}", "a"),
        ("100% #1 'new'", "100"),
        ("zip::a", "zip"),
        ("~root", "root"),
        ("https:", "http"),
        ("csv", "json"),
    ],
)
def test_the_path_of_a_folder_is_never_a_pattern_or_an_address(tmp_path, monkeypatch, name, matching):
    write_folder(tmp_path / matching, 9)  # what the pattern would find
    folder = write_folder(tmp_path / name, 4)
    monkeypatch.chdir(tmp_path)
    for path in (folder, name):
        assert len(load_mentions(path, "train")) == 4
        assert len(load_entities(path)) == 12
        report = check_dataset(path)
        assert report.counts["mentions"] == {"train": 4}
        assert not report.fatal
    assert len(load_mentions(matching, "train")) == 9
    with pytest.raises(UnknownSplitError, match="no split 'test'"):
        load_mentions(name, "test")
    (folder / "mentions" / "train.parquet").write_bytes(b"damaged")
    with pytest.raises(DataFormatError, match="cannot be read") as caught:
        load_mentions(name, "train")
    assert "hf_cache" not in str(caught.value)  # the user's path is shown, not that of the links


def test_a_folder_below_one_with_a_pattern_in_its_name_loads_from_the_cache_the_second_time(tmp_path):
    folder = write_folder(tmp_path / "x[1]", 5).rename(tmp_path / "y[1]")
    load_mentions(folder, "train")
    cache = tmp_path / "hf_cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    load_mentions(folder, "train")
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert len(before) == 1


def copies(cache):
    return {path for path in (cache / "hf_mel").glob("*/*") if path.is_dir()}


def test_a_folder_has_one_copy_in_the_cache_of_its_present_state(tmp_path):
    cache = tmp_path / "hf_cache"
    other = write_folder(tmp_path / "b" / "data", 3)
    assert len(load_mentions(other, "train")) == 3
    (of_other,) = copies(cache)
    stranger = of_other.parent / "notes"
    stranger.mkdir()
    rows = []
    for count in (5, 6, 7):
        folder = write_folder(tmp_path / "a" / "data", count)
        rows.append(load_mentions(folder, "train"))
        load_entities(folder)
        assert [len(table) for table in rows] == [5, 6, 7][: len(rows)]
        assert len(copies(cache)) == 3  # of this folder, of the other, and what is not ours
    assert rows[0][4]["mention_id"] == "m4"  # rows that are in use can still be read
    assert {of_other, stranger} < copies(cache)
    assert len(load_mentions(other, "train")) == 3


def test_a_copy_that_another_process_reads_is_kept_until_it_ends(tmp_path):
    cache, folder = tmp_path / "hf_cache", write_folder(tmp_path / "data", 5)
    load_mentions(folder, "train")
    (first,) = copies(cache)
    # Locks of one process exclude each other, too, so this stands for another process.
    reader = filelock.FileLock(first / "readers" / "other.lock")
    reader.acquire()
    for count in (6, 7):
        write_folder(folder, count)
        assert len(load_mentions(folder, "train")) == count
        assert first in copies(cache)
        assert len(copies(cache)) == 2
    assert [path.name for path in first.rglob("*.arrow")] == ["data-train.arrow"]
    reader.release()
    write_folder(folder, 8)
    load_mentions(folder, "train")
    assert len(copies(cache)) == 1
    assert first not in copies(cache)


def test_an_interrupted_deletion_is_finished(tmp_path):
    folder = write_folder(tmp_path / "data", 5)
    load_mentions(folder, "train")
    (place,) = copies(tmp_path / "hf_cache")
    left = place.with_name("0123456789abcdef.old")
    left.mkdir()
    (left / "data-train.arrow").write_bytes(b"x")
    load_entities(folder)
    assert copies(tmp_path / "hf_cache") == {place}
