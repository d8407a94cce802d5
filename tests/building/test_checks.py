"""Tests of the checks: plain loops over random small data sets, and one data set for each kind of problem."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.building.checks import check_dataset, check_tables
from hf_mel.building.id_set import IdSet
from hf_mel.building.report import FATAL, CheckReport
from hf_mel.errors import DataFormatError, DuplicateIdError, KnowledgeBaseError, UnknownDatasetError
from hf_mel.schema import NIL, entity_features, mention_features, post_features
from tests.data.test_images import photo
from tests.dataset_scripts.fixtures import picture

PICTURES = [picture(colour) for colour in ("red", "green", "blue", "gold")]
FEATURES = {"mentions": mention_features(), "entities": entity_features(), "posts": post_features()}


def image(data):
    return {"bytes": data, "path": None}


def entity(entity_id, name="One", images=(), **columns):
    row = {"entity_id": entity_id, "name": name, "description": "", "attributes": "", "aliases": []}
    return {**row, "images": [image(data) for data in images], **columns}


def mention(mention_id, entity_id="E1", text="One.", data=None, **columns):
    row = {"mention_id": mention_id, "context_id": mention_id, "text": text, "mention": "One", "start": 0, "end": 3}
    row |= {"mention_type": "", "topic": "", "image": data and image(data), "entity_id": entity_id, "candidates": []}
    return {**row, **columns}


def post(post_id, entity_id="E1", **columns):
    return {"post_id": post_id, "entity_id": entity_id, "text": "", "image": None, **columns}


def checked(data, size=3, features=FEATURES):
    """Returns the report on `{config: {split: rows}}`, read `size` rows at a time."""

    def reader(config, rows):
        kind = features.get(config) or features["mentions"]
        table = pa.Table.from_pylist(rows, schema=kind.arrow_schema)
        return lambda: (table.slice(k, size) for k in range(0, max(len(table), 1), size))

    tables = {c: {split: reader(c, rows) for split, rows in splits.items()} for c, splits in data.items()}
    report = CheckReport(dataset="toy")
    check_tables(tables, report, progress=False)
    return report


def small(mentions=None, entities=None):
    return {
        "mentions": mentions or {"test": [mention("a")]},
        "entities": {"kb": [entity("E1")] if entities is None else entities},
    }


def random_data(seed):
    rng = random.Random(seed)
    texts = ["One.", "One and two.", "One or the other.", ""]
    entities = [
        entity(f"E{k}", rng.choice("ABC"), rng.sample(PICTURES, rng.randrange(3)), description=rng.choice(["", "d"]))
        for k in range(6)
    ]

    def mentions(split):
        for k in range(rng.randrange(1, 9)):
            text = rng.choice(texts)
            place = {"start": 0, "end": 3} if text else {"start": -1, "end": -1}
            yield mention(
                f"{split}-{k}",
                rng.choice(["E0", "E1", "E2", "E3", NIL, "E9"]),
                text,
                rng.choice([None, *PICTURES]),
                candidates=rng.sample(["E0", "E5", "E8", NIL], rng.randrange(4)),
                **place,
            )

    splits = {split: list(mentions(split)) for split in ("test", "train", "validation")}
    return {"mentions": splits, "entities": {"kb": entities}}


@pytest.mark.parametrize("seed", range(25))
def test_the_report_equals_that_of_plain_loops(seed):
    data = random_data(seed)
    report = checked(data, size=1 + seed % 4)
    kb = data["entities"]["kb"]
    ids = {row["entity_id"] for row in kb}
    pictures = {row["entity_id"]: [i["bytes"] for i in row["images"]] for row in kb}
    every_picture = {data for images in pictures.values() for data in images}
    train = data["mentions"]["train"]
    for split, rows in data["mentions"].items():
        linked = [row for row in rows if row["entity_id"] != NIL]
        shown = [row for row in rows if row["image"]]
        expected = {
            "with_gold": len(linked),
            "with_image": len(shown),
            "image_in_kb": sum(row["image"]["bytes"] in every_picture for row in shown),
            "image_of_gold": sum(row["image"]["bytes"] in pictures.get(row["entity_id"], ()) for row in shown),
        }
        if split != "train":
            expected |= {
                "gold_in_train": sum(row["entity_id"] in {t["entity_id"] for t in train} for row in linked),
                "text_in_train": sum(row["text"] != "" and row["text"] in {t["text"] for t in train} for row in rows),
                "image_in_train": sum(row["image"] in [t["image"] for t in train] for row in shown),
            }
        assert report.leakage["mentions"][split] == expected
        assert report.images["mentions"][split] == {"images": len(shown), "rows_without": len(rows) - len(shown)}
        where = f"mentions/{split}"
        wrong = [(where, row["mention_id"], row["entity_id"]) for row in linked if row["entity_id"] not in ids]
        assert [case for case in report.problems.get("gold_not_in_kb", []) if case[0] == where] == wrong
    texts = Counter((row["name"], row["description"]) for row in kb)
    assert report.duplicates == {
        "entities_sharing_their_text": sum(n for n in texts.values() if n > 1),
        "mention_images_in_kb": sum(leakage["image_in_kb"] for leakage in report.leakage["mentions"].values()),
    }
    rows = [row for rows in data["mentions"].values() for row in rows]
    outside_kb = Counter(c for row in rows for c in row["candidates"] if c not in ids and c != NIL)
    assert Counter(case[2] for case in report.problems.get("candidate_not_in_kb", [])) == outside_kb
    assert report.counts == {c: {s: len(rows) for s, rows in splits.items()} for c, splits in data.items()}


def test_a_clean_data_set_has_no_problems():
    report = checked({**small(), "posts": {"kb": [post("p")]}})
    assert report.problems == {}
    assert report.fatal == []
    assert report.duplicates == {"entities_sharing_their_text": 0, "mention_images_in_kb": 0}


CASES = {
    "gold_not_in_kb": (small({"test": [mention("a", "E2")]}), ("mentions/test", "a", "E2")),
    "duplicate_id": (
        small({"train": [mention("a"), mention("b")], "test": [mention("c"), mention("b")]}),
        ("mentions/test", "b", "b"),
    ),
    "wrong_span": (
        small({"test": [mention("a", start=1)]}),
        ("mentions/test", "a", "characters 1:3 are 'ne', the mention is 'One'"),
    ),
    "null_value": (small({"test": [mention("a", text=None)]}), ("mentions/test", "a", "text")),
    "empty_split": (small({"test": [mention("a")], "train": []}), ("mentions/train", "", "")),
    "no_knowledge_base": ({"mentions": {"test": [mention("a", NIL)]}}, ("entities", "", "")),
    "broken_image": (
        small({"test": [mention("a", data=photo()[:900])]}),
        ("mentions/test", "a", "The image is damaged"),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_problems_that_make_a_data_set_unusable(kind):
    data, (file, row, detail) = CASES[kind]
    report = checked(data)
    assert report.fatal == [kind]
    [problem] = report.problems[kind]
    assert problem[:2] == (file, row)
    assert problem[2].startswith(detail)
    error, _ = FATAL[kind]
    with pytest.raises(error, match=r"Do this\.$") as caught:
        report.raise_fatal("Do this.")
    assert detail in str(caught.value)
    assert report.to_dict()["problems"][kind]["count"] == 1


def test_problems_that_are_warnings():
    no_span = {"start": -1, "end": -1}
    rows = [
        mention("absent", text="Two.", **no_span),
        mention("elsewhere", **no_span),
        mention("candidate", candidates=["E1", "E7", NIL]),
    ]
    report = checked(small({"test": rows}))
    assert report.problems == {
        "mention_not_in_text": [("mentions/test", "absent", "One")],
        "mention_not_located": [("mentions/test", "elsewhere", "One")],
        "candidate_not_in_kb": [("mentions/test", "candidate", "E7")],
    }
    assert report.fatal == []


def test_a_visual_mention_needs_no_span_and_candidates_need_a_prior_each():
    features = mention_features(
        modality=datasets.Value("string"),
        candidate_priors=[datasets.Value("float32")],
        document_id=datasets.Value("string"),
    )
    seen = {"mention": "", "text": "", "start": -1, "end": -1, "modality": "image"}
    rows = [
        mention("seen", **seen),
        mention("read", text="Two.", start=-1, end=-1, modality="text", candidates=["E1"], candidate_priors=[0.5]),
        mention("odd", modality="text", candidates=["E1"], candidate_priors=[0.5, 0.5]),
    ]
    report = checked(small({"test": rows}), features={**FEATURES, "mentions": features})
    assert report.problems == {
        "mention_not_in_text": [("mentions/test", "read", "One")],
        "priors_unlike_candidates": [("mentions/test", "odd", "candidates: 1, candidate_priors: 2")],
    }
    assert report.fatal == ["priors_unlike_candidates"]


def test_other_configurations_are_compared_with_their_train_split_or_that_of_mentions():
    data = small({"train": [mention("a", text="One a."), mention("b", text="One b.")]})
    data["elsewhere"] = {"test": [mention("a", text="One b.")]}
    data["own_train"] = {"train": [mention("c", text="One c.")], "test": [mention("d", text="One b.")]}
    report = checked(data)
    assert report.fatal == []  # ids are unique within a configuration
    assert report.leakage["elsewhere"]["test"]["text_in_train"] == 1
    assert report.leakage["own_train"]["test"]["text_in_train"] == 0


def test_ids_of_the_knowledge_base_and_of_posts_are_unique_too():
    report = checked({**small(entities=[entity("E1"), entity("E1")]), "posts": {"kb": [post("p"), post("p", "E5")]}})
    assert report.problems["duplicate_id"] == [("entities/kb", "E1", "E1"), ("posts/kb", "p", "p")]
    assert report.problems["gold_not_in_kb"] == [("posts/kb", "p", "E5")]
    with pytest.raises(DuplicateIdError, match=r"entities/kb, row E1: The id 'E1' occurs twice\."):
        report.raise_fatal("")


@given(st.lists(st.text(max_size=3)), st.lists(st.text(max_size=3)))
@settings(max_examples=60, deadline=None)
def test_an_id_set_contains_what_a_set_contains(texts, asked):
    ids = IdSet(array("q", map(hash, texts)))
    assert ids.contains_hashes([hash(text) for text in asked]).tolist() == [text in set(texts) for text in asked]
    assert [text in ids for text in asked] == [text in set(texts) for text in asked]


def write_folder(folder, data, types=None):
    """Writes a repository that hf_mel did not build: Parquet files, and a card that lists the configurations."""
    lines = ["---", "configs:"]
    for config, splits in data.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            table = pa.Table.from_pylist(rows, schema=FEATURES.get(config, FEATURES["mentions"]).arrow_schema)
            table = pa.Table.from_pylist(
                rows, schema=pa.schema([(f.name, (types or {}).get(f.name, f.type)) for f in table.schema])
            )
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# Theirs"]), encoding="utf-8")
    return folder


def test_a_folder_has_the_checks_of_its_tables(tmp_path):
    data = random_data(7)
    report = checked(data)
    checks = check_dataset(write_folder(tmp_path / "theirs", data))
    assert checks.to_dict() == {**report.to_dict(), "dataset": str(tmp_path / "theirs")}
    wider = {"text": pa.large_string(), "start": pa.int64(), "candidates": pa.large_list(pa.large_string())}
    assert check_dataset(write_folder(tmp_path / "wider", data, wider)).problems == checks.problems


def test_missing_columns_and_columns_of_another_type(tmp_path):
    folder = write_folder(tmp_path / "theirs", small())
    rows = pq.read_table(folder / "mentions" / "test.parquet")
    pq.write_table(rows.drop_columns(["start", "topic"]), folder / "mentions" / "test.parquet")
    report = check_dataset(folder)
    assert report.fatal == ["wrong_schema"]
    assert report.problems["wrong_schema"][0][2].startswith("missing: start, topic; found: mention_id,")
    pq.write_table(rows.set_column(4, "start", pa.array(["0"])), folder / "mentions" / "test.parquet")
    assert check_dataset(folder).problems["wrong_schema"] == [("mentions/test", "", "start is string")]
    with pytest.raises(
        DataFormatError, match=r"mentions/test: The columns do not match the schema \(start is string\)\."
    ):
        check_dataset(folder).raise_fatal("")


def test_a_card_with_another_number_of_rows_is_fatal(tmp_path):
    folder = write_folder(tmp_path / "theirs", small())
    card = (folder / "README.md").read_text()
    info = "dataset_info:\n- config_name: mentions\n  splits:\n  - name: test\n    num_bytes: 1\n    num_examples: 2\n"
    (folder / "README.md").write_text(card.replace("---\n# Theirs", info + "---\n# Theirs"))
    report = check_dataset(folder)
    assert report.problems == {"rows_not_as_in_card": [("mentions/test", "", "card: 2, files: 1")]}
    assert report.fatal == ["rows_not_as_in_card"]


def test_damaged_files_and_other_formats(tmp_path):
    folder = write_folder(tmp_path / "theirs", small())
    path = folder / "mentions" / "test.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    assert check_dataset(folder).fatal == ["unreadable"]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "test.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataFormatError, match="not stored as Parquet"):
        check_dataset(tmp_path / "json")
    with pytest.raises(UnknownDatasetError, match="No folder has this name"):
        check_dataset(tmp_path / "nothing")
    with pytest.raises(KnowledgeBaseError, match="no configuration 'entities'"):
        check_dataset(write_folder(tmp_path / "no_kb", {"mentions": small()["mentions"]})).raise_fatal("")


def test_images_stored_as_paths_are_broken():
    row = mention("a")
    row["image"] = {"bytes": None, "path": "a.jpg"}
    assert checked(small({"test": [row]})).problems == {
        "broken_image": [("mentions/test", "a", "The image is stored as a path, so it is not part of the data set.")]
    }


def test_images_are_compared_by_their_bytes():
    rows = [mention(f"m{k}", data=data) for k, data in enumerate([PICTURES[0], PICTURES[1], PICTURES[0]])]
    report = checked(
        {"mentions": {"train": rows[:1], "test": rows[1:]}, **{"entities": {"kb": [entity("E1")]}}}, size=2
    )
    assert report.leakage["mentions"]["test"]["image_in_train"] == 1
    assert np.sum([leakage["with_image"] for leakage in report.leakage["mentions"].values()]) == 3
