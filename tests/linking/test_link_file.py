"""Tests of linking files: all rows are checked first, results are kept, and an interrupted run goes on."""

from __future__ import annotations

import json
import os
import threading

import pytest
from PIL import Image

from hf_mel.errors import DataFormatError, ImageError, LockedError, MelError
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.link_file import link_file, read_mentions
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyPairProcessor, ToyProcessor, toy_entities, toy_model, toy_reranker

ROWS = [
    {"text": f"Entity {letter} and {number}", "mention": f"Entity {letter}", "own": number}
    for number, letter in enumerate("abcdefgh")
]
ENTITIES = toy_entities(12)


@pytest.fixture(scope="module")
def linker():
    model, processor = toy_model(), ToyProcessor()
    return EntityLinker(model, processor, KnowledgeBase.build(ENTITIES, model, processor, progress=False))


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(linker, rows):
    return [row | {"linked": linker(text=row["text"], mention=row["mention"]).to_dict()} for row in rows]


def assert_linked(records, wanted):
    assert len(records) == len(wanted)
    for record, other in zip(records, wanted, strict=True):
        assert {k: v for k, v in record.items() if k != "linked"} == {k: v for k, v in other.items() if k != "linked"}
        assert record["linked"]["entity_id"] == other["linked"]["entity_id"]
        scores, others = ([c["score"] for c in r["linked"]["candidates"]] for r in (record, other))
        assert scores == pytest.approx(others, abs=1e-6)


BAD = {
    "not JSON": ('{"text": "a", "mention"', "is not JSON"),
    "infinity": ('{"text": "Entity a", "mention": "Entity a", "own": Infinity}', "Infinity"),
    "surrogate": (r'{"text": "Entity a \ud83d", "mention": "Entity a"}', "surrogate"),
    "not in the text": ({"text": "Entity a", "mention": "Entity b"}, "is not in its text"),
    "no text": ({"mention": "Entity a"}, "text"),
    "no image": ({"text": "Entity a", "mention": "Entity a", "image": "none.png"}, "none.png"),
    "offset": ({"text": "Entity a", "start": "first", "end": 3}, "start"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_row_is_named_before_anything_is_linked(tmp_path, kind):
    row, words = BAD[kind]
    source = write(tmp_path / "in.jsonl", [ROWS[0], row, ROWS[1]])
    with pytest.raises(MelError, match=rf"in\.jsonl, row 2: .*{words}.*--skip-bad-rows") as caught:
        read_mentions(source)
    assert caught.value.row == 2


def test_all_bad_rows_are_told_in_one_run(tmp_path):
    source = write(tmp_path / "in.jsonl", [ROWS[0], *(row for row, _ in BAD.values()), ROWS[1]])
    with pytest.raises(DataFormatError, match="7 of 9 rows cannot be linked") as caught:
        read_mentions(source)
    for number, (_, words) in enumerate(BAD.values(), start=2):
        assert f"row {number}: " in str(caught.value)
        assert words in str(caught.value)


def test_bad_rows_are_skipped_and_have_an_error_in_the_output(tmp_path, linker):
    source = write(tmp_path / "in.jsonl", [ROWS[0], *(row for row, _ in BAD.values()), ROWS[1]])
    rows = read_mentions(source, skip_bad_rows=True)
    summary = link_file(linker, rows, tmp_path / "out.jsonl")
    records = lines(tmp_path / "out.jsonl")
    assert (summary.num_linked, len(summary.bad_rows)) == (2, 7)
    assert ["error" in record for record in records] == [False, *[True] * 7, False]
    assert_linked([records[0], records[-1]], expected(linker, ROWS[:2]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_damaged_image_is_a_bad_row(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    source = write(tmp_path / "in.jsonl", [ROWS[0] | {"image": "a.jpg"}])
    with pytest.raises(ImageError, match="row 1"):
        read_mentions(source)


@pytest.mark.parametrize("done", range(0, 8, 3))
def test_an_interrupted_run_goes_on_and_gives_the_same_file(tmp_path, linker, monkeypatch, done):
    rows = read_mentions(write(tmp_path / "in.jsonl", ROWS))
    link_file(linker, rows, tmp_path / "whole.jsonl", batch_size=1)
    linked = []
    original = linker.link_encoded

    def interrupted(batch, **options):
        if len(linked) == done and limit:
            raise KeyboardInterrupt
        linked.append(batch)
        return original(batch, **options)

    limit = True
    monkeypatch.setattr(linker, "link_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        link_file(linker, rows, tmp_path / "out.jsonl", batch_size=1)
    assert not (tmp_path / "out.jsonl").exists()
    with (tmp_path / ".out.jsonl.partial").open("ab") as partial:
        partial.write(b'[7, {"mention": "cut o')  # killed in the middle of a line
    limit = False
    linked.clear()
    summary = link_file(linker, rows, tmp_path / "out.jsonl", batch_size=1, resume=True)
    assert (len(linked), summary.num_resumed, summary.num_linked) == (8 - done, done, 8)
    assert_linked(lines(tmp_path / "out.jsonl"), lines(tmp_path / "whole.jsonl"))
    assert not (tmp_path / ".out.jsonl.partial").exists()


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_run_with_other_rows_or_settings_is_not_resumed(tmp_path, linker, monkeypatch):
    rows = read_mentions(write(tmp_path / "in.jsonl", ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(linker, "link_encoded", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            link_file(linker, rows, tmp_path / "out.jsonl")
    for other, options in ((rows[1:], {}), (rows, {"top_k": 3})):
        with pytest.raises(MelError, match="leave out --resume"):
            link_file(linker, other, tmp_path / "out.jsonl", resume=True, **options)


def test_a_run_with_another_picture_in_the_same_place_is_not_resumed(tmp_path, linker, monkeypatch):
    rows = []
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "a.png")
        rows.append(read_mentions(write(tmp_path / "in.jsonl", [ROWS[0] | {"image": "a.png"}])))
        if color == "red":
            with monkeypatch.context() as patch:
                patch.setattr(linker, "link_encoded", _interrupt)
                with pytest.raises(KeyboardInterrupt):
                    link_file(linker, rows[0], tmp_path / "out.jsonl")
    with pytest.raises(MelError, match="leave out --resume"):
        link_file(linker, rows[1], tmp_path / "out.jsonl", resume=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    link_file(linker, rows[0], tmp_path / "out.jsonl", resume=True)


def test_a_symbolic_link_is_written_through_and_a_pipe_is_written_to(tmp_path, linker):
    rows = read_mentions(write(tmp_path / "in.jsonl", ROWS))
    (tmp_path / "real").mkdir()
    (tmp_path / "out.jsonl").symlink_to("real/target.jsonl")
    link_file(linker, rows, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").is_symlink()
    assert_linked(lines(tmp_path / "real/target.jsonl"), expected(linker, ROWS))
    os.mkfifo(tmp_path / "pipe.jsonl")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe.jsonl").read_text()))
    reader.start()
    link_file(linker, rows, tmp_path / "pipe.jsonl", batch_size=3)
    reader.join(10)
    assert_linked([json.loads(line) for line in received[0].splitlines()], expected(linker, ROWS))
    assert (tmp_path / "pipe.jsonl").is_fifo()


def test_mentions_of_a_context_are_reranked_together_and_keep_their_places(tmp_path):
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(ENTITIES, model, processor, progress=False)
    linker = EntityLinker(model, processor, kb, reranker=toy_reranker(), reranker_processor=ToyPairProcessor())
    own = [row | {"context_id": f"c{number % 3}"} for number, row in enumerate(ROWS)]
    rows = read_mentions(write(tmp_path / "in.jsonl", own))
    link_file(linker, rows, tmp_path / "out.jsonl", batch_size=2)
    together = linker([row.mention for row in rows])
    assert [r["linked"]["entity_id"] for r in lines(tmp_path / "out.jsonl")] == [r.entity_id for r in together]
    assert [r["own"] for r in lines(tmp_path / "out.jsonl")] == list(range(8))


@pytest.mark.parametrize("column", ["linked", "error"])
def test_a_column_that_the_output_adds_is_refused_and_not_replaced(tmp_path, column):
    source = write(tmp_path / "in.jsonl", [ROWS[0], ROWS[1] | {column: "mine"}])
    with pytest.raises(DataFormatError, match=rf"row 2: .*{column}.*Rename") as caught:
        read_mentions(source, skip_bad_rows=True)
    assert caught.value.row == 2


@pytest.mark.parametrize("name", ["out.json", "out.csv", "out.TSV"])
def test_a_name_that_promises_another_format_is_refused(tmp_path, linker, name):
    rows = read_mentions(write(tmp_path / "in.jsonl", ROWS))
    with pytest.raises(DataFormatError, match="JSON lines"):
        link_file(linker, rows, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_damaged_kept_results_are_an_error(tmp_path, linker, monkeypatch):
    rows = read_mentions(write(tmp_path / "in.jsonl", ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(linker, "link_encoded", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            link_file(linker, rows, tmp_path / "out.jsonl")
    fingerprint = (tmp_path / ".out.jsonl.partial").read_bytes()
    for content in (b"", b"garbage\n", b"[]\n[]\n", fingerprint + b"7\n", fingerprint + b'[0, {"cut\n'):
        (tmp_path / ".out.jsonl.partial").write_bytes(content)
        with pytest.raises(MelError, match=r"[lL]eave out --resume"):
            link_file(linker, rows, tmp_path / "out.jsonl", resume=True)
        assert (tmp_path / ".out.jsonl.partial").read_bytes() == content


def test_one_process_at_a_time_writes_an_output(tmp_path, linker, monkeypatch):
    rows = read_mentions(write(tmp_path / "in.jsonl", ROWS))
    original, errors = linker.link_encoded, []

    def link_twice(*arguments, **options):
        monkeypatch.setattr(linker, "link_encoded", original)
        with pytest.raises(LockedError, match="being written") as caught:
            link_file(linker, rows, tmp_path / "out.jsonl")
        errors.append(caught.value)
        return original(*arguments, **options)

    monkeypatch.setattr(linker, "link_encoded", link_twice)
    link_file(linker, rows, tmp_path / "out.jsonl", batch_size=2)
    assert len(errors) == 1
    assert_linked(lines(tmp_path / "out.jsonl"), expected(linker, ROWS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
