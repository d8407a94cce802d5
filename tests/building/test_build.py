from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from typer.testing import CliRunner

import hf_mel.dataset_scripts
from hf_mel.building import embedding, writer
from hf_mel.building.build import build_dataset
from hf_mel.building.builders import find_builder, known_datasets
from hf_mel.building.checks import check_dataset
from hf_mel.cli.data import app
from hf_mel.dataset_scripts.wikimel.wikimel import WikiMel
from hf_mel.errors import (
    CountMismatchError,
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    MelError,
    SpanError,
    UnknownDatasetError,
)
from hf_mel.files import building_folder
from hf_mel.schema import entity_features, mention_features
from tests.data.test_images import huge, photo
from tests.dataset_scripts.fixtures import NAMES, picture, write_cleaned, write_ghmfc, write_json, write_melbench

COUNTS = {"mentions": {"train": 5, "validation": 2, "test": 2}, "entities": {"kb": 4}}


@pytest.fixture
def raw(tmp_path):
    return write_melbench(tmp_path / "raw")


@pytest.fixture
def wikimel(monkeypatch):
    """Makes the counts of the small release the official ones."""
    monkeypatch.setattr(WikiMel, "OFFICIAL_COUNTS", {"melbench": COUNTS})


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_loads_where_hf_mel_was_never_imported(raw, tmp_path, wikimel):
    report = build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    assert report.counts == COUNTS
    code = """
        import json, sys
        from datasets import load_dataset
        mentions, entities = load_dataset(sys.argv[1]), load_dataset(sys.argv[1], "entities", split="kb")
        assert not [name for name in sys.modules if name.startswith("hf_mel")]
        image = mentions["train"][1]["image"]
        print(json.dumps([{k: len(v) for k, v in mentions.items()}, len(entities), image.size, mentions["test"][1]]))
    """
    code = code.replace('mentions["test"][1]', '{**mentions["test"][1], "image": None}')
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": "", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts, entities, size, row = json.loads(done.stdout)
    assert (counts, entities, size) == (COUNTS["mentions"], 4, [24, 16])
    assert row == {
        "mention_id": "105-1",
        "context_id": "105",
        "text": "The Falk twins",
        "mention": "Falk",
        "start": -1,
        "end": -1,
        "mention_type": "",
        "topic": "",
        "image": None,
        "entity_id": "Q902",
        "candidates": [],
    }


def test_parquet_holds_the_released_bytes_and_no_file_name(raw, tmp_path, wikimel):
    build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    rows = pq.read_table(tmp_path / "out/mentions/train-00000-of-00001.parquet").to_pylist()
    released = {path.stem: path.read_bytes() for path in (raw / "mention_images").iterdir()}
    assert [row["image"] and row["image"]["bytes"] for row in rows] == [released.get(r["context_id"]) for r in rows]
    assert all(row["image"] is None or row["image"]["path"] is None for row in rows)
    data = load_dataset(str(tmp_path / "out"))
    assert data["train"].features == mention_features()
    assert load_dataset(str(tmp_path / "out"), "entities")["kb"].features == entity_features()


def test_same_input_same_bytes(raw, tmp_path, wikimel):
    build_dataset("wikimel", output=tmp_path / "a", raw_dir=raw)
    moved = raw.rename(tmp_path / "elsewhere")
    build_dataset("wikimel", output=tmp_path / "b" / "c", raw_dir=moved)
    first = files_of(tmp_path / "a")
    assert first == files_of(tmp_path / "b" / "c")
    assert sorted(first) == [
        "README.md",
        "entities/kb-00000-of-00001.parquet",
        "mentions/test-00000-of-00001.parquet",
        "mentions/train-00000-of-00001.parquet",
        "mentions/validation-00000-of-00001.parquet",
        "report.json",
    ]
    assert not any(str(tmp_path).encode() in content for content in first.values())


def test_card(raw, tmp_path, wikimel):
    build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    _, head, body = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    head = yaml.safe_load(head)
    configs = {config["config_name"]: config for config in head["configs"]}
    assert configs["mentions"]["default"] is True
    assert "default" not in configs["entities"]
    assert [file["split"] for file in configs["mentions"]["data_files"]] == ["train", "validation", "test"]
    assert configs["entities"]["data_files"] == [{"split": "kb", "path": "entities/kb-*"}]
    sizes = {
        info["config_name"]: {s["name"]: s["num_examples"] for s in info["splits"]} for info in head["dataset_info"]
    }
    assert sizes == COUNTS
    assert head["license"] == "other"
    assert head["language"] == ["en"]
    for name in ("Wikidata-MEL.json", "splits.json", "qid2ne.json", "qid2abs.json"):
        assert f"| {name} | `{hashlib.sha256((raw / name).read_bytes()).hexdigest()}` |" in body
    assert "| mentions | train | 5 | 4 | 1 |" in body  # the mentions of 101 and 102 have an image, that of 103 none
    assert "| mention not in text | 1 | mentions/train, row 103 |" in body
    assert WikiMel.CITATION in body
    assert "$" not in body


def test_report(raw, tmp_path, wikimel):
    (raw / "entity_images").mkdir()
    (raw / "entity_images" / "Q904.jpg").write_bytes((raw / "mention_images" / "104.jpg").read_bytes())
    write_json(raw / "qid2ne.json", {**NAMES, "Q902": "Ada Falk"})
    attributes = json.loads((raw / "qid2abs.json").read_text())
    write_json(raw / "qid2abs.json", {**attributes, "Q902": attributes["Q901"]})
    report = build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    saved = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert saved == report.to_dict()
    assert saved["layout"] == "melbench"
    assert saved["images"]["mentions"]["train"] == {"images": 4, "rows_without": 1}
    assert saved["duplicates"] == {"entities_sharing_their_text": 2, "mention_images_in_kb": 2}
    assert saved["problems"]["mention_not_in_text"] == {
        "count": 1,
        "entries": {"mentions/train": [["103", "Berta Holm"]]},
    }
    assert saved["problems"]["mention_not_located"]["entries"] == {"mentions/test": [["105-1", "Falk"]]}
    assert saved["problems"]["missing_mention_image"]["entries"] == {"Wikidata-MEL.json": [["103", "103.jpg"]]}


def test_undecodable_images_become_null_and_are_listed(raw, tmp_path, wikimel):
    folder = raw / "mention_images"
    (folder / "101.jpg").write_bytes(photo()[:900])
    (folder / "102.jpg").write_bytes(huge())
    (folder / "104.jpg").write_bytes(b"<html>")
    report = build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    broken = {(where, row): why for where, row, why in report.problems["broken_image"]}
    assert set(broken) == {
        *(("mentions/train", row) for row in ("101", "102-0", "102-1", "102-2")),
        *(("mentions/validation", row) for row in ("104-0", "104-1")),
    }
    assert "10000 × 9000" in broken["mentions/train", "102-1"]
    data = load_dataset(str(tmp_path / "out"))
    assert [row["image"] is None for row in data["train"]] == [True] * 5
    assert [row["image"] is None for row in data["test"]] == [False] * 2
    assert report.images["mentions"]["train"] == {"images": 0, "rows_without": 5}


def test_broken_entity_image_leaves_the_others(tmp_path):
    raw = write_cleaned(tmp_path / "raw", "WIKIMEL")
    (raw / "kb_image" / "Q901_0.PNG").write_bytes(photo("PNG")[:500])
    report = build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw, allow_count_mismatch=True)
    kb = pq.read_table(tmp_path / "out/entities/kb-00000-of-00001.parquet").to_pylist()
    assert [image["bytes"] for image in kb[0]["images"]] == [(raw / "kb_image" / "Q901_1.jpg").read_bytes()]
    assert [row for _, row, _ in report.problems["broken_image"]] == ["Q901"]


def test_gold_outside_the_kb_is_left_out_and_listed(raw, tmp_path, wikimel):
    write_json(raw / "qid2ne.json", {qid: name for qid, name in NAMES.items() if qid != "Q901"})
    with pytest.raises(CountMismatchError) as caught:
        build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    message = str(caught.value)
    assert "mentions/train: expected 5 rows, found 3" in message
    assert "entities/kb: expected 4 rows, found 3" in message
    assert "gold_not_in_kb 3" in message
    report = build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw, allow_count_mismatch=True)
    assert report.problems["gold_not_in_kb"] == [
        ("mentions/train", "101", "Q901"),
        ("mentions/train", "102-1", "Q901"),
        ("mentions/test", "105-0", "Q901"),
    ]
    assert report.problems["attributes_without_entity"] == [("qid2abs.json", "Q901", "")]
    assert load_dataset(str(tmp_path / "out"))["test"]["mention_id"] == ["105-1"]


def test_official_counts_depend_on_the_layout(tmp_path):
    with pytest.raises(CountMismatchError, match=r"entities/kb: expected 17,805 rows, found 40") as caught:
        build_dataset("richpediamel", output=tmp_path / "out", raw_dir=write_ghmfc(tmp_path / "raw", test=False))
    assert "mentions/test" not in str(caught.value)
    raw = write_cleaned(tmp_path / "cleaned", "RichpediaMEL")
    with pytest.raises(CountMismatchError, match=r"mentions/test: expected 3,562 rows, found 1"):
        build_dataset("richpediamel", output=tmp_path / "out", raw_dir=raw)


def test_failure_leaves_nothing_behind(raw, tmp_path, wikimel):
    out = tmp_path / "data" / "wikimel"
    build_dataset("wikimel", output=out, raw_dir=raw)
    before = files_of(out)
    write_json(raw / "splits.json", {"train": ["101"], "test": ["105"], "dev": ["104"]})
    with pytest.raises(CountMismatchError):
        build_dataset("wikimel", output=out, raw_dir=raw)
    with pytest.raises(CountMismatchError):
        build_dataset("wikimel", output=tmp_path / "data" / "new", raw_dir=raw)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["wikimel"]
    assert files_of(out) == before
    build_dataset("wikimel", output=out, raw_dir=raw, allow_count_mismatch=True)  # an earlier build is replaced
    assert len(load_dataset(str(out))["train"]) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["wikimel"]


def test_other_folders_are_not_replaced(raw, tmp_path, wikimel, monkeypatch):
    out = tmp_path / "precious"
    out.mkdir()
    build_dataset("wikimel", output=out, raw_dir=raw)  # an empty folder is fine
    (out / "report.json").write_text('{"dataset": "another"}')
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataFormatError, match="holds the data set 'another'; only an earlier build of 'wikimel'"):
        build_dataset("wikimel", output=out, raw_dir=raw)
    assert (out / "thesis.tex").read_text() == "years of work"
    build_dataset("wikimel", output=out, raw_dir=raw, overwrite=True)
    assert not (out / "thesis.tex").exists()
    monkeypatch.chdir(out)
    for target in (raw, tmp_path, ".", ".."):
        with pytest.raises(DataFormatError, match="cannot be the output"):
            build_dataset("wikimel", output=target, raw_dir=raw, overwrite=True)
    assert (raw / "splits.json").is_file()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataFormatError, match="is not a folder"):
        build_dataset("wikimel", output=file, raw_dir=raw, overwrite=True)
    with pytest.raises(MelError, match="cannot be built"):
        build_dataset("wikimel", output=file / "out", raw_dir=raw)


def test_a_failed_rename_restores_the_earlier_build(raw, tmp_path, wikimel, monkeypatch):
    out = tmp_path / "data" / "wikimel"
    build_dataset("wikimel", output=out, raw_dir=raw)
    before, rename = files_of(out), Path.rename

    def full_disk(self, target):
        if Path(target) == out and not self.name.endswith(".old"):
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(MelError, match="no space left"):
        build_dataset("wikimel", output=out, raw_dir=raw)
    assert files_of(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["wikimel"]


def test_large_splits_go_to_several_files_in_order(raw, tmp_path, wikimel, monkeypatch):
    monkeypatch.setattr(writer, "_GROUP_ROWS", 2)
    monkeypatch.setattr(writer, "_FILE_BYTES", 1)
    build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    names = sorted(path.name for path in (tmp_path / "out" / "mentions").iterdir())
    assert names[:2] == ["test-00000-of-00001.parquet", "train-00000-of-00003.parquet"]
    train = load_dataset(str(tmp_path / "out"), split="train")
    assert train["mention_id"] == ["103", "101", "102-0", "102-1", "102-2"]
    assert train[4]["image"].size == (24, 16)


def test_an_unknown_name_lists_the_data_sets():
    with pytest.raises(UnknownDatasetError, match=r"No builder is named 'wikimell'.*wikimel"):
        build_dataset("wikimell", output="nowhere")
    assert {"wikimel", "richpediamel"} <= set(known_datasets())
    assert "release" not in known_datasets()


def test_the_raw_folder_is_required(tmp_path):
    with pytest.raises(DataFormatError, match="--raw-dir"):
        build_dataset("wikimel", output=tmp_path / "out")
    with pytest.raises(MelError, match="takes no seed"):
        build_dataset("wikimel", output=tmp_path / "out", raw_dir=tmp_path, seed=3)


@pytest.mark.parametrize("name", known_datasets())
def test_every_builder_declares_what_the_pipeline_reads(name):
    builder = find_builder(name)
    assert name == builder.NAME
    configs = [config.name for config in builder.BUILDER_CONFIGS]
    assert {"mentions", "entities"} <= set(configs) or configs == ["entities"]
    assert configs[0] == builder.DEFAULT_CONFIG_NAME
    assert builder.LICENSE
    assert builder.CITATION
    assert builder.HOMEPAGE.startswith("https://")
    layouts = [builder.OFFICIAL_COUNTS] if "mentions" in builder.OFFICIAL_COUNTS else builder.OFFICIAL_COUNTS.values()
    for counts in layouts:
        assert set(counts) <= set(configs)
    assert builder.TASK
    assert builder.DOWNLOAD or not builder.NEEDS_RAW
    assert isinstance(builder.REDISTRIBUTION, str)


TOY = """
import datasets
from dataclasses import dataclass
from hf_mel.schema import entity_features, mention_features, post_features
INTERRUPT = {}
ROWS = {
    "entities": [dict(entity_id="E1", name="One", description="", attributes="", aliases=[], images=[])],
    "mentions": [dict(mention_id="m", context_id="m", text="One.", mention="One", start=0, end=3, mention_type="",
                      topic="", image=None, entity_id="E1", candidates=["E1", "E9"])],
    "posts": [dict(post_id="p", entity_id="E1", text="hello", image=None)],
}
FEATURES = {"entities": entity_features(), "mentions": mention_features(), "posts": post_features()}
@dataclass
class ToyConfig(datasets.BuilderConfig):
    colour: str = ""
class Toy(datasets.GeneratorBasedBuilder):
    NAME, TITLE, LICENSE, LANGUAGES, HOMEPAGE, CITATION = "toy", "Toy", "cc0-1.0", ("en",), "https://example.org", "@"
    TASK, DOWNLOAD, REDISTRIBUTION = "toys", "", ""
    NEEDS_RAW, OFFICIAL_COUNTS = False, {"mentions": {"test": 1}, "entities": {"kb": 1}, "posts": {"kb": 1}}
    BUILDER_CONFIG_CLASS = ToyConfig
    BUILDER_CONFIGS = [ToyConfig(name=name, version="1.0.0") for name in ("mentions", "entities", "posts")]
    DEFAULT_CONFIG_NAME = "mentions"
    def _info(self):
        return datasets.DatasetInfo(features=FEATURES[self.config.name])
    def _split_generators(self, dl_manager):
        split = "test" if self.config.name == "mentions" else "kb"
        return [datasets.SplitGenerator(name=split, gen_kwargs={})]
    def _generate_examples(self):
        for k, row in enumerate(ROWS[self.config.name]):
            if INTERRUPT.get(self.config.name) == k:
                raise KeyboardInterrupt
            yield k, row
BUILDER_CLASS = Toy
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Adds a builder to the folder in which the pipeline looks for builders, and yields its rows."""
    package = tmp_path / "scripts" / "toy"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "toy.py").write_text(TOY)
    (package / "README.template.md").write_text("# $title\n\n$counts")
    monkeypatch.setattr(hf_mel.dataset_scripts, "__path__", [str(tmp_path / "scripts")])
    monkeypatch.delitem(sys.modules, "hf_mel.dataset_scripts.toy", raising=False)
    monkeypatch.delitem(sys.modules, "hf_mel.dataset_scripts.toy.toy", raising=False)
    yield sys.modules[find_builder("toy").__module__].ROWS
    sys.modules.pop("hf_mel.dataset_scripts.toy.toy")
    sys.modules.pop("hf_mel.dataset_scripts.toy")


def test_a_builder_of_three_configurations_is_found_and_built(toy, tmp_path):
    path = tmp_path / "stored.png"
    path.write_bytes(picture("red", form="PNG"))
    toy["posts"][0]["image"] = str(path)  # the bytes are embedded even if the builder gives a path
    report = build_dataset("toy", output=tmp_path / "out")
    assert report.counts == {"mentions": {"test": 1}, "entities": {"kb": 1}, "posts": {"kb": 1}}
    assert report.problems == {"candidate_not_in_kb": [("mentions/test", "m", "E9")]}
    path.unlink()
    [stored] = pq.read_table(tmp_path / "out/posts/kb-00000-of-00001.parquet")["image"].to_pylist()
    assert stored == {"bytes": picture("red", form="PNG"), "path": None}
    assert load_dataset(str(tmp_path / "out"), "posts")["kb"][0]["image"].size == (24, 16)
    with pytest.raises(MelError, match="takes no raw_dir"):
        build_dataset("toy", output=tmp_path / "out", raw_dir=tmp_path)


@pytest.mark.parametrize("config", ["mentions", "entities", "posts"])
def test_duplicate_ids(toy, tmp_path, config):
    toy[config] *= 2
    with pytest.raises(DuplicateIdError, match="occurs twice"):
        build_dataset("toy", output=tmp_path / "out", allow_count_mismatch=True)
    assert not (tmp_path / "out").exists()


def test_empty_kb_and_empty_split(toy, tmp_path):
    entities, toy["entities"] = toy["entities"], []
    with pytest.raises(KnowledgeBaseError, match="knowledge base is empty"):
        build_dataset("toy", output=tmp_path / "out", allow_count_mismatch=True)
    toy["entities"], toy["posts"] = entities, []
    with pytest.raises(DataFormatError, match="split is empty"):
        build_dataset("toy", output=tmp_path / "out", allow_count_mismatch=True)


def test_wrong_offsets_are_an_error(toy, tmp_path):
    toy["mentions"][0]["start"] = 1
    with pytest.raises(SpanError, match="characters 1:3 are 'ne'"):
        build_dataset("toy", output=tmp_path / "out")


def add_many_rows(toy, tmp_path):
    """Gives the toy builder enough rows for several files, some of which are left out or have broken images."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.png").write_bytes(photo("PNG", (8 + k, 8)))
    (folder / "3.png").write_bytes(b"no picture")
    one_entity, one_mention = toy["entities"][0], toy["mentions"][0]
    toy["entities"] = [
        {**one_entity, "entity_id": f"E{k}", "images": [{"bytes": photo(size=(8, 8 + k)), "path": None}]}
        for k in range(6)
    ]
    toy["mentions"] = [
        {
            **one_mention,
            "mention_id": f"m{k}",
            "entity_id": f"E{k % 7}",
            "image": {"bytes": None, "path": str(folder / f"{k % 5}.png")},
        }
        for k in range(23)
    ]


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(writer, "_GROUP_ROWS", 2)
    monkeypatch.setattr(writer, "_FILE_BYTES", 1)
    monkeypatch.setattr(embedding, "_ROWS_PER_CORE", 0)


def module_of(name):
    return sys.modules[find_builder(name).__module__]


@pytest.mark.parametrize(
    ("config", "row"), [("entities", 0), ("entities", 3), ("mentions", 0), ("mentions", 20), ("posts", 0)]
)
def test_an_interrupted_build_continues_to_the_same_bytes(toy, tmp_path, small_files, monkeypatch, config, row):
    add_many_rows(toy, tmp_path)
    whole = build_dataset("toy", output=tmp_path / "whole", allow_count_mismatch=True)
    monkeypatch.setitem(module_of("toy").INTERRUPT, config, row)
    with pytest.raises(KeyboardInterrupt):
        build_dataset("toy", output=tmp_path / "out", allow_count_mismatch=True)
    assert not (tmp_path / "out").exists()
    stage = tmp_path / ".out.building"
    finished = sorted(path.name for path in stage.rglob("*.parquet"))
    assert bool(finished) is ((config, row) != ("entities", 0))
    module_of("toy").INTERRUPT.clear()
    decoded = []
    verify = embedding.verify_image
    monkeypatch.setattr(embedding, "verify_image", lambda data: decoded.append(data) or verify(data))
    report = build_dataset("toy", output=tmp_path / "out", allow_count_mismatch=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert report.to_dict() == whole.to_dict()
    assert not stage.exists()
    if config == "posts":
        assert not decoded  # finished files are not built again
    if (config, row) == ("mentions", 20):
        assert not any(data in decoded for data in (photo(size=(8, 8 + k)) for k in range(6)))


def test_left_out_rows_and_unusable_images_are_listed_in_order(toy, tmp_path, small_files):
    add_many_rows(toy, tmp_path)
    report = build_dataset("toy", output=tmp_path / "out", allow_count_mismatch=True)
    assert report.counts["mentions"]["test"] == 20
    problems = {kind: [row for _, row, _ in entries] for kind, entries in report.problems.items()}
    assert problems["gold_not_in_kb"] == ["m6", "m13", "m20"]
    assert problems["broken_image"] == ["m3", "m8", "m18"]
    assert problems["missing_image"] == ["m4", "m9", "m14", "m19"]
    rows = [row for file in sorted((tmp_path / "out/mentions").iterdir()) for row in pq.read_table(file).to_pylist()]
    expected = [k for k in range(23) if k % 7 != 6]
    assert [row["mention_id"] for row in rows] == [f"m{k}" for k in expected]
    for k, row in zip(expected, rows, strict=True):
        path = tmp_path / "pictures" / f"{k % 5}.png"
        assert row["image"] == (None if k % 5 > 2 else {"bytes": path.read_bytes(), "path": None})
    assert str(tmp_path).encode() not in b"".join(files_of(tmp_path / "out").values())


def test_an_image_file_that_cannot_be_read_is_listed_as_broken(toy, tmp_path, monkeypatch):
    (tmp_path / "locked.png").write_bytes(picture("red"))
    toy["mentions"][0]["image"] = {"bytes": None, "path": str(tmp_path / "locked.png")}
    read_bytes = Path.read_bytes

    def refuse(path):
        if path.name == "locked.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    report = build_dataset("toy", output=tmp_path / "out")
    detail = "The image file cannot be read (Permission denied)."
    assert report.problems["broken_image"] == [("mentions/test", "m", detail)]
    with pytest.raises(ImageError, match=r"^mentions/test, row m: .*Permission denied"):
        build_dataset("toy", output=tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_strict_build_of_a_release_stops_at_a_missing_image(raw, tmp_path, wikimel):
    with pytest.raises(ImageError, match=r"An image is missing \(103\.jpg\)") as caught:
        build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw, strict=True)
    assert (caught.value.file, caught.value.row) == ("Wikidata-MEL.json", "103")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["option", "raw", "code"])
def test_an_interrupted_build_is_not_continued_after_a_change(toy, tmp_path, small_files, monkeypatch, change):
    add_many_rows(toy, tmp_path)
    raw = tmp_path / "raw.txt"
    raw.write_text("1")
    monkeypatch.setitem(module_of("toy").INTERRUPT, "mentions", 20)
    options = {"config_options": {"colour": str(raw)}, "allow_count_mismatch": True}
    with pytest.raises(KeyboardInterrupt):
        build_dataset("toy", output=tmp_path / "out", **options)
    module_of("toy").INTERRUPT.clear()
    toy["entities"] = [{**row, "name": "Other"} for row in toy["entities"]]
    if change == "option":
        options["resize"] = 500
    elif change == "raw":
        raw.write_text("22")
    else:
        script = tmp_path / "scripts" / "toy" / "toy.py"
        script.write_text(script.read_text() + "#")
    build_dataset("toy", output=tmp_path / "out", **options)
    assert set(load_dataset(str(tmp_path / "out"), "entities")["kb"]["name"]) == {"Other"}


def test_two_builds_into_one_folder_are_refused(toy, tmp_path):
    with building_folder(tmp_path / "out", "other"):
        with pytest.raises(MelError, match="is being built already"):
            build_dataset("toy", output=tmp_path / "out")
        assert (tmp_path / ".out.building").is_dir()  # the folder of the first build
    assert not (tmp_path / ".out.building").exists()
    build_dataset("toy", output=tmp_path / "out")


def test_a_killed_build_leaves_no_output_and_can_be_continued(raw, tmp_path):
    script = """
        import os, sys
        import hf_mel.building.build as building
        building._check_staged_files = lambda *_: os.kill(os.getpid(), 9)
        building.build_dataset("wikimel", output=sys.argv[1], raw_dir=sys.argv[2], allow_count_mismatch=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out"), str(raw)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.building" / "notes" / "mentions.json").exists()
    build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw, allow_count_mismatch=True)
    build_dataset("wikimel", output=tmp_path / "whole", raw_dir=raw, allow_count_mismatch=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_options_of_the_builder_are_reported(toy, tmp_path):
    report = build_dataset("toy", output=tmp_path / "out", config_options={"colour": "red"}, resize=9)
    assert report.to_dict()["options"] == {"resize": 9, "colour": "red"}
    with pytest.raises(MelError, match=r"no option 'color'\. Choose from: colour\."):
        build_dataset("toy", output=tmp_path / "out", config_options={"color": "red"})
    with pytest.raises(MelError, match="scaled to 0 pixels"):
        build_dataset("toy", output=tmp_path / "out", resize=0)


def test_resized_images(toy, tmp_path):
    toy["mentions"][0]["image"] = {"bytes": photo(size=(64, 48)), "path": None}
    toy["posts"][0]["image"] = {"bytes": photo(size=(16, 12)), "path": None}
    build_dataset("toy", output=tmp_path / "out", resize=16)
    assert load_dataset(str(tmp_path / "out"))["test"][0]["image"].size == (16, 12)
    [kept] = pq.read_table(tmp_path / "out/posts/kb-00000-of-00001.parquet")["image"].to_pylist()
    assert kept["bytes"] == photo(size=(16, 12))
    first = files_of(tmp_path / "out")
    build_dataset("toy", output=tmp_path / "out", resize=16)
    assert files_of(tmp_path / "out") == first


def test_a_build_has_the_checks_of_its_folder(raw, tmp_path, wikimel):
    (raw / "entity_images").mkdir()
    (raw / "entity_images" / "Q904.jpg").write_bytes((raw / "mention_images" / "104.jpg").read_bytes())
    report = build_dataset("wikimel", output=tmp_path / "out", raw_dir=raw)
    checks = check_dataset(tmp_path / "out")
    assert (checks.counts, checks.images) == (report.counts, report.images)
    assert (checks.duplicates, checks.leakage) == (report.duplicates, report.leakage)
    assert checks.problems == {kind: report.problems[kind] for kind in ("mention_not_in_text", "mention_not_located")}
    assert report.leakage["mentions"]["validation"] == {
        **{"with_gold": 2, "with_image": 2, "gold_in_train": 0, "text_in_train": 0, "image_in_train": 0},
        **{"image_in_kb": 2, "image_of_gold": 2},
    }


def test_cli(raw, tmp_path, wikimel):
    arguments = ["build", "wikimel", "--raw-dir", str(raw), "--images", str(raw / "mention_images"), "--output"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "melbench" in done.output
    assert f'load_dataset("{tmp_path / "out"}", "entities")' in done.output
    (raw / "splits.json").write_text("{")
    failed = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")])
    assert isinstance(failed.exception, DataFormatError)
