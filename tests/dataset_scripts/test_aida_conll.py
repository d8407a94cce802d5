from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.building.build import build_dataset
from hf_mel.dataset_scripts.aida_conll.aida_conll import AidaConll
from hf_mel.errors import CountMismatchError, DataFormatError
from hf_mel.schema import NIL
from tests.dataset_scripts.aida_conll_release import CONLL, CSV, GENRE, line, write, write_conll
from tests.dataset_scripts.raw import edited, edits, reads_or_raises, rows_of


@pytest.fixture
def raw(tmp_path):
    return write(tmp_path / "raw")


def short(row):
    return (row["mention_id"], row["document_id"], row["text"], row["start"], row["end"], row["entity_id"])


def check(rows, builder):
    for row in (row for part in rows.values() for row in part):
        assert row["text"][row["start"] : row["end"]] == row["mention"]
        assert set(row) == set(builder.info.features)
        assert row["image"] is None


def test_csv_by_hand(raw, tmp_path):
    rows, builder = rows_of(AidaConll, raw, "mentions", tmp_path)
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        "train": [
            ("train-1", "1 EU", "Nordby beat Falk , 3-1 .", 0, 6, "Nordby, Ohio"),
            ("train-2", "1 EU", "Nordby beat Falk , 3-1 .", 12, 16, "Ada Falk"),
            ("train-3", "2 Rugby", "The Harbour Cup", 4, 15, "Harbour Cup"),
            ("train-4", "2 Rugby", "The Nobody left", 4, 10, NIL),
        ],
        "validation": [("validation-1", "947testa CRICKET", "for Brun won", 4, 8, "José Brun")],
        "test": [("test-1", "1163testb SOCCER", "for Falk lost", 4, 8, "Ada Falk")],
    }
    check(rows, builder)
    assert [row["context_id"] for row in rows["train"]] == ["train-1", "train-1", "train-3", "train-4"]
    assert [(row["candidates"], row["candidate_priors"]) for row in rows["train"]] == [
        (["Nordby", "Nordby, Ohio", "Falk & Sons"], [0.75, 0.125, 0.0625]),
        (["Falk & Sons"], [1.0]),
        ([], []),
        ([], []),
    ]
    assert builder.release.layout == "csv"
    assert builder.release.problems == {"candidate_twice": [("aida_train.csv", "2", "Falk & Sons")]}


def test_genre_by_hand(raw, tmp_path):
    rows, builder = rows_of(AidaConll, raw, "wiki", tmp_path)
    assert [short(row) for row in rows["test"]] == [
        ("wiki-1", "wiki-1", "in Nordby there", 3, 9, "Nordby, Ohio"),
        ("wiki-2", "wiki-2", "Falk", 0, 4, NIL),
    ]
    check(rows, builder)
    assert [row["candidates"] for row in rows["test"]] == [["Nordby", "Nordby, Ohio"], []]


def test_conll_and_blink_by_hand(tmp_path):
    raw = write_conll(tmp_path / "raw")
    rows, builder = rows_of(AidaConll, raw, "mentions", tmp_path)
    text = "Nordby beat Ada Falk .\nNobody Nordby won"
    assert {split: [short(row) for row in part] for split, part in rows.items()} == {
        "train": [
            ("train-2", "1 EU", text, 0, 6, "Nordby, Ohio"),
            ("train-4", "1 EU", text, 12, 20, "Ada Falk"),
            ("train-8", "1 EU", text, 23, 29, NIL),
            ("train-9", "1 EU", text, 30, 36, "José Brun"),
        ],
        "validation": [("validation-14", "947testa CRICKET", "Brun", 0, 4, "José Brun")],
        "test": [("test-17", "1163testb", "Falk", 0, 4, "Ada Falk")],
    }
    check(rows, builder)
    assert {row["context_id"] for row in rows["train"]} == {"train-2"}
    assert builder.release.layout == "conll"
    rows, builder = rows_of(AidaConll, raw, "ace2004", tmp_path)
    assert [short(row) for row in rows["test"]] == [
        ("ace2004-1", "ace2004-1", "in Nordby there", 3, 9, "Nordby, Ohio"),
        ("ace2004-2", "ace2004-2", "Falk", 0, 4, NIL),
    ]


def test_entities_by_hand(raw, tmp_path):
    rows, builder = rows_of(AidaConll, raw, "entities", tmp_path, entities=str(raw / "texts.jsonl"))
    actual = {row["entity_id"]: (row["wikipedia_id"], row["description"]) for row in rows["kb"]}
    assert actual == {
        "Nordby, Ohio": ("12", "A town."),
        "Ada Falk": ("15", "A sailor."),
        "Harbour Cup": ("16", ""),
        "José Brun": ("17", ""),
        "Nordby": ("11", ""),
        "Falk & Sons": ("13", ""),
    }
    assert all(row["name"] == row["entity_id"] for row in rows["kb"])
    kinds = {kind: len(entries) for kind, entries in builder.release.problems.items()}
    assert kinds == {"entity_without_text": 4}
    assert set(builder.release.sha256) == {*CSV, "wiki-test-kilt.jsonl", "texts.jsonl"}


def test_a_page_number_is_not_lost_to_a_form_without(tmp_path):
    raw = write_conll(tmp_path / "raw")
    record = {**GENRE[0], "output": [], "candidates": ["Ada Falk", "Cy Orr"]}
    (raw / "wiki-test-kilt.jsonl").write_text(json.dumps(record))
    rows, _ = rows_of(AidaConll, raw, "entities", tmp_path)
    actual = [(row["entity_id"], row["wikipedia_id"]) for row in rows["kb"]]
    assert actual == [("Nordby, Ohio", "12"), ("Ada Falk", "15"), ("José Brun", "17"), ("Cy Orr", "")]


def test_only_what_is_there_is_built(raw, tmp_path):
    assert AidaConll.configs_in(raw, {}) == ["mentions", "msnbc", "wiki", "entities"]
    (raw / "aida_testB.csv").unlink()
    assert AidaConll.configs_in(raw, {}) == ["msnbc", "wiki", "entities"]
    assert len(AidaConll.configs_in(tmp_path / "nothing", {})) == 7
    with pytest.raises(DataFormatError, match=r"aida_testB\.csv \(missing\)"):
        rows_of(AidaConll, raw, "mentions", tmp_path)
    report = build_dataset("aida_conll", raw_dir=raw, output=tmp_path / "out", allow_count_mismatch=True)
    assert report.counts == {"msnbc": {"test": 1}, "wiki": {"test": 2}, "entities": {"kb": 2}}
    assert "mention" in (tmp_path / "out" / "README.md").read_text()


def test_official_counts_of_what_is_there(raw, tmp_path):
    with pytest.raises(CountMismatchError, match=r"msnbc/test: expected 656 rows, found 1\.") as caught:
        build_dataset("aida_conll", raw_dir=raw, output=tmp_path / "out")
    assert "mentions/train: expected 18,448 rows, found 4" in str(caught.value)
    assert "aquaint" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ta\tm\tl\tr\tCANDS\t1,1,x\tGT:\t-1", "CANDIDATES as the sixth"),
        ("a\ta\tm", "has 3 columns"),
        ("a\ta\tm\tl\tr\tCANDIDATES\t1,nan,x\tGT:\t-1", "'1,nan,x', expected page id,prior,title"),
        ("a\ta\tm\tl\tr\tCANDIDATES\tx,1,x\tGT:\t-1", "'x,1,x', expected"),
        ("a\ta\tm\tl\tr\tCANDIDATES\t1,1,x\tGT:\t1,1", "'1', expected"),
        ("a\ta\tm\tl\tr\tCANDIDATES\t1,1,x\tGT:\tx,1,1,x", "expected a number first"),
    ],
)
def test_bad_csv(raw, tmp_path, text, message):
    (raw / "wned-msnbc.csv").write_text(f"{line(CSV['wned-msnbc.csv'][0])}\n{text}\n")
    with pytest.raises(DataFormatError, match=message) as caught:
        rows_of(AidaConll, raw, "msnbc", tmp_path)
    assert (caught.value.file, caught.value.row) == (raw / "wned-msnbc.csv", 2)


@pytest.mark.parametrize(
    ("old", "new", "message", "row"),
    [
        ("-DOCSTART- (1 EU)", "-DOCSTART- EU", "expected -DOCSTART-", 1),
        ("-DOCSTART- (1 EU)\n", "", "before the first", 1),
        ("beat\n", "beat\nwon\tI\tx\ty\n", "expected B", 4),
        ("beat\n", "beat\tI\tNordby\n", None, None),
        ("beat\n", "beat\tO\n", "'O' in the second", 3),
        ("\t--NME--", "", "3 columns and 'B'", 8),
        ("\t--NME--", "\t_", "names no entity", 8),
    ],
)
def test_bad_conll(tmp_path, old, new, message, row):
    raw = write_conll(tmp_path / "raw")
    (raw / "AIDA-YAGO2-dataset.tsv").write_text(CONLL.replace(old, new, 1), encoding="utf-8")
    if message is None:  # the mention goes on
        rows, _ = rows_of(AidaConll, raw, "mentions", tmp_path)
        assert rows["train"][0]["mention"] == "Nordby beat"
        return
    with pytest.raises(DataFormatError, match=message) as caught:
        rows_of(AidaConll, raw, "mentions", tmp_path)
    assert caught.value.row == row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "Nordby"}, "no output of the form"),
        ({"output": [{"answer": 3}]}, "no output of the form"),
        ({"candidates": [3]}, "not a list of strings"),
        ({"meta": {"left_context": "x"}}, "lacks 'mention', 'right_context'"),
        ({"meta": {"left_context": 1, "mention": "x", "right_context": ""}}, "'left_context' is a int"),
    ],
)
def test_bad_genre(raw, tmp_path, change, message):
    (raw / "wiki-test-kilt.jsonl").write_text(json.dumps({**GENRE[0], **change}))
    with pytest.raises(DataFormatError, match=message):
        rows_of(AidaConll, raw, "wiki", tmp_path)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(["aida_train.csv", "wiki-test-kilt.jsonl", "texts.jsonl", "AIDA-YAGO2-dataset.tsv", "ace2004"]),
    edits,
)
def test_changed_bytes_give_rows_or_a_typed_error(name, changes):
    with tempfile.TemporaryDirectory() as folder:
        form = write_conll if name.startswith(("AIDA", "ace")) else write
        raw = form(Path(folder) / "raw")
        path = raw / (f"{name}_questions.jsonl" if name == "ace2004" else name)
        path.write_bytes(edited(path.read_bytes(), changes))
        configs = ["mentions", "ace2004"] if form is write_conll else ["mentions", "wiki"]
        reads_or_raises(AidaConll, raw, Path(folder), configs)
        reads_or_raises(AidaConll, raw, Path(folder), ["entities"], entities=str(raw / "texts.jsonl"))
