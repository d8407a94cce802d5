from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hf_mel.building.build import build_dataset
from hf_mel.cli.data import app
from hf_mel.data.loading import load_entities
from hf_mel.dataset_scripts.wikidata import documents, parts
from hf_mel.dataset_scripts.wikidata.documents import date_text
from hf_mel.errors import DataFormatError, KnowledgeBaseError, MelError, MissingExtraError
from tests.dataset_scripts import wikidata_release as release


def build(raw: Path, output: Path, **options: Any) -> Any:
    return build_dataset("wikidata", raw_dir=raw, output=output, config_options=options)


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    return {row["entity_id"]: row for row in load_entities(output).remove_columns("images")}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def dump(tmp_path) -> Path:
    release.write_dump(tmp_path / "dump.json")
    return tmp_path / "dump.json"


OPTIONS = {"languages": "en,de", "classes": "Q215627", "min_sitelinks": "2"}


def test_rows_and_report_of_a_dump(dump, tmp_path):
    report = build(dump, tmp_path / "out", properties="P106,P27,P569,P570,P2048", **OPTIONS)
    rows = rows_of(tmp_path / "out")
    # Q109 is an instance of Q15, which was merged into Q16, below Q5. The classes have a cycle.
    assert list(rows) == ["Q101", "Q102", "Q103", "Q106", "Q109", "Q111"]
    assert rows["Q101"] == {
        "entity_id": "Q101",
        "name": "Ada Orme",
        "description": "Norland painter",
        "attributes": "Occupation: painter, Dichterin. Country of citizenship: Norland. Date of birth: 1852-03-11. "
        "Date of death: 1911. P2048: 1.75 metre.",
        "aliases": ["A. Orme", "Ada Orme (Malerin)"],
        "types": ["human", "person", "agent"],
        "born": 1852,
        "died": 1911,
        "founded": None,
        "dissolved": None,
        "place": "Norland",
        "latitude": 49.25,
        "longitude": -8.5,
        "sitelinks": 3,
        "image_file": "Ada Orme by Lund.jpg",
    }
    assert rows["Q102"]["name"] == "Bo Falk"
    assert rows["Q102"]["attributes"] == "Date of birth: 195X."
    assert (rows["Q102"]["born"], rows["Q103"]["born"]) == (None, -44)
    assert rows["Q103"]["name"] == "Cy Lund"
    assert rows["Q106"]["founded"] == 1988  # the preferred date
    assert rows["Q111"]["types"][:3] == ["below a merged class", "Q16 is below human", "human"]
    assert rows["Q109"]["types"] == ["Q16 is below human", "human", "person", "agent"]
    expected = {
        "line_not_json": 1, "not_an_item": 1, "too_few_sitelinks": 9, "no_label": 1, "not_of_classes": 5,
        "repeated_id": 1, "malformed_entity": 1, "deleted_id": 1, "merged_id": 2, "value_without_label": 1,
        "property_without_label": 4,
    }  # fmt: skip
    assert report.left_out == expected
    assert report.problems["line_not_json"][0][:2] == ("dump.json", "5")
    assert report.problems["repeated_id"] == [("entities/kb", "Q101", "the first entity is kept")]
    assert report.problems["no_label"] == [("dump.json", "17", "Q104")]
    assert report.problems["merged_id"][1] == ("dump.json", "Q15", "Q16")
    assert "too_few_sitelinks" not in report.problems
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["left_out"] == expected


def test_packed_dumps_and_documents_give_the_rows_of_the_dump(dump, tmp_path):
    data = dump.read_bytes()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.json.bz2").write_bytes(bz2.compress(data))
    lines = b"\n".join(line.rstrip(b",") for line in data.splitlines() if line not in (b"[", b"]"))
    (tmp_path / "c.jsonl").write_bytes(lines)
    (tmp_path / "documents").mkdir()
    release.write_documents(tmp_path / "documents")
    build(dump, tmp_path / "out", **OPTIONS)
    expected = rows_of(tmp_path / "out")
    for name in ("a.json.gz", "b.json.bz2", "c.jsonl", "documents"):
        build(tmp_path / name, tmp_path / f"{name}.out", **OPTIONS)
        assert rows_of(tmp_path / f"{name}.out") == expected, name


def write_lines(path: Path, entities: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(entity) for entity in entities), encoding="utf-8")
    return path


def test_parquet_tables_give_the_rows_of_a_dump_of_the_same_entities(tmp_path, monkeypatch):
    options = {**OPTIONS, "properties": "P106,P27,P569,P570,P2048"}
    build(write_lines(tmp_path / "dump.jsonl", release.tabular_entities()), tmp_path / "expected", **options)
    release.write_tables(tmp_path / "tables")
    report = build(tmp_path / "tables", tmp_path / "out", **options)
    rows = rows_of(tmp_path / "out")
    assert rows == rows_of(tmp_path / "expected")
    assert rows["Q101"]["attributes"].endswith("P2048: 1.75 metre.")
    assert (rows["Q101"]["latitude"], rows["Q101"]["died"], rows["Q101"]["aliases"][0]) == (49.25, 1911, "A. Orme")
    assert report.layout == "Parquet tables"
    assert {"claims/part-1-of-9.parquet", "wikidata-labels/de/part-1-of-9.parquet"} <= set(report.raw_sha256)
    assert not any("/fr/" in name for name in report.raw_sha256)
    monkeypatch.setattr(parts, "PART_BYTES", 500)
    build(tmp_path / "tables", tmp_path / "parts", **options)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "out")


def test_more_than_nine_files_of_a_table_are_read_in_the_order_of_their_numbers(tmp_path):
    release.write_tables(tmp_path / "whole", rows_of_a_file=100)
    release.write_tables(tmp_path / "many", rows_of_a_file=1)
    assert len(list((tmp_path / "many" / "claims").iterdir())) > 10
    for name in ("whole", "many"):
        build(tmp_path / name, tmp_path / f"{name}.out", **OPTIONS)
    assert rows_of(tmp_path / "many.out") == rows_of(tmp_path / "whole.out")


def _unsort(table: Path) -> None:
    first, second = sorted(table.iterdir())[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def _cut(table: Path) -> None:
    file = sorted(table.iterdir())[1]
    file.write_bytes(file.read_bytes()[:-20])


def _rename_column(table: Path) -> None:
    file = sorted(table.iterdir())[0]
    content = pq.read_table(file)
    pq.write_table(
        content.rename_columns(["other" if name == "property" else name for name in content.column_names]), file
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unsort, "not sorted by id: 'Q.*' comes after 'Q"),
        (_cut, "The table cannot be read"),
        (_rename_column, r"lacks the columns \['property'\]"),
        (shutil.rmtree, "no table of claims"),
    ],
)
def test_damaged_tables_are_an_error_and_nothing_is_written(tmp_path, damage, message):
    release.write_tables(tmp_path / "tables")
    damage(tmp_path / "tables" / "claims")
    with pytest.raises(DataFormatError, match=message):
        build(tmp_path / "tables", tmp_path / "out" / "kb", **OPTIONS)
    assert list((tmp_path / "out").iterdir()) == []


def test_sitelinks_of_tables_need_their_table(tmp_path):
    release.write_tables(tmp_path / "tables")
    shutil.rmtree(tmp_path / "tables" / "links")
    with pytest.raises(DataFormatError, match="no table of links, which min_sitelinks counts"):
        build(tmp_path / "tables", tmp_path / "out", min_sitelinks="1")
    build(tmp_path / "tables", tmp_path / "out", classes="Q5")
    assert {row["sitelinks"] for row in rows_of(tmp_path / "out").values()} == {0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Q5 Q215627 Q24229398 Q215380 Q7 Q30 Q11573 Q101 Q103 Q105 Q106 Q107 Q109 Q16 Q17 Q111"),
        ({"classes": "Q215380"}, "Q106"),
        ({"having": "P18"}, "Q101"),
        ({"having": "P106=Q8", "languages": "de"}, "Q101"),
        ({"having": "P106=Q9999,P18"}, None),  # deprecated
        ({"ids": "Q15,Q103,Q6"}, "Q103 Q16"),
        ({"min_sitelinks": "9", "classes": "Q24229398"}, "Q106 Q101"),
    ],
)
def test_subsets(dump, tmp_path, options, expected):
    if expected is None:
        with pytest.raises(KnowledgeBaseError, match=r"No item was taken\. Left out: .*without property"):
            build(dump, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    report = build(dump, tmp_path / "out", **options)
    assert sorted(rows_of(tmp_path / "out")) == sorted(expected.split())
    if "ids" in options:
        assert report.problems["id_without_entity"] == [("ids", "Q6", "")]


def test_ids_come_from_a_file_of_ids_or_addresses(dump, tmp_path):
    (tmp_path / "ids.txt").write_text("http://www.wikidata.org/entity/Q103\n\nQ106\n")
    build(dump, tmp_path / "out", ids=str(tmp_path / "ids.txt"))
    assert list(rows_of(tmp_path / "out")) == ["Q103", "Q106"]
    (tmp_path / "ids.txt").write_text("Q103\nAda\n")
    with pytest.raises(DataFormatError, match="'Ada' is not a value of ids") as caught:
        build(dump, tmp_path / "out", ids=str(tmp_path / "ids.txt"))
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "ids.txt"), 2)


@pytest.mark.parametrize(
    "options",
    [{"languages": "EN!"}, {"languages": ""}, {"min_sitelinks": "-1"}, {"having": "Q5"}, {"having": "P27=P5"},
     {"properties": "106"}, {"classes": "human"}],
)  # fmt: skip
def test_an_option_that_means_nothing_is_refused(dump, tmp_path, options):
    with pytest.raises(DataFormatError, match="is not a value of"):
        build(dump, tmp_path / "out", **options)


@pytest.mark.parametrize("suffix", [".gz", ".bz2"])
def test_a_packed_dump_that_is_cut_off_is_an_error_and_nothing_is_written(dump, tmp_path, suffix):
    packed = tmp_path / f"cut.json{suffix}"
    packed.write_bytes({".gz": gzip, ".bz2": bz2}[suffix].compress(dump.read_bytes())[:-20])  # type: ignore[attr-defined]
    with pytest.raises(DataFormatError, match="cannot be read to its end") as caught:
        build(packed, tmp_path / "out" / "kb", **OPTIONS)
    assert caught.value.file == packed
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_on_several_processes_give_the_bytes_of_one_part(dump, tmp_path, monkeypatch):
    build(dump, tmp_path / "whole", **OPTIONS)
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    build(dump, tmp_path / "parts", **OPTIONS)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


def test_a_full_disk_is_an_error_and_nothing_is_left(dump, tmp_path, monkeypatch):
    def write(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts, "_write", write)
    with pytest.raises(MelError, match="No space left on device"):
        build(dump, tmp_path / "out" / "kb", **OPTIONS)
    assert list((tmp_path / "out").iterdir()) == []


def test_orjson_is_named_where_it_lacks(dump, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orjson", None)
    with pytest.raises(MissingExtraError, match=r"hf_mel\[wikidata\]"):
        build(dump, tmp_path / "out", **OPTIONS)


_KILLED_BUILD = """
import sys, os, signal
from hf_mel.dataset_scripts.wikidata import parts
parts.PART_BYTES = 1000
if sys.argv[3] == "killed":
    process, calls = parts._Workers.process, []
    def process_and_die(self, number, part):
        process(self, number, part)
        calls.append(number)
        if len(calls) == 6:
            self.finish()
            os.kill(os.getpid(), signal.SIGKILL)
    parts._Workers.process = process_and_die
else:
    process_part = parts._Workers._send
    def send(self, number, part):
        os.write(1, f"read again {number}\\n".encode())  # in one piece: threads write at the same time
        return process_part(self, number, part)
    parts._Workers._send = send
from hf_mel.building.build import build_dataset
build_dataset("wikidata", raw_dir=sys.argv[1], output=sys.argv[2],
    config_options={"languages": "en,de", "classes": "Q215627", "min_sitelinks": "2"})
"""


def test_a_build_that_was_killed_goes_on_and_gives_the_same_bytes(dump, tmp_path):
    build(dump, tmp_path / "whole", **OPTIONS)

    def run(how: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", _KILLED_BUILD, str(dump), str(tmp_path / "out" / "kb"), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})

    killed = run("killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == []
    again = run("again")
    assert again.returncode == 0, again.stderr
    numbers = sorted(int(line.removeprefix("read again ")) for line in again.stdout.splitlines())
    assert numbers == list(range(6, 6 + len(numbers)))
    assert numbers
    assert bytes_of(tmp_path / "out" / "kb") == bytes_of(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kb"]


@pytest.mark.parametrize("cut", [1, 5, None])
def test_a_worker_finishes_whole_parts_only(tmp_path, cut):
    whole = parts.Part(True, [("ä.json", 1, b'{"type": "item", "id": "Q1"}\n'), ("b.json", 7, b"[\n")])
    stream, answers = io.BytesIO(), io.BytesIO()
    stream.write(json.dumps([str(tmp_path), asdict(documents.Selection(("en",), ()))]).encode() + b"\n")
    for number in range(2):
        parts._send_part(stream, number, whole)
    length = stream.tell()
    end_of_header = stream.getvalue().rindex(b"]]]\n") + 4
    stops = {None: length, 1: length - 1, 5: end_of_header - 5}
    parts._work(io.BytesIO(stream.getvalue()[: stops[cut]]), answers)
    finished = 2 if cut is None else 1
    assert answers.getvalue() == b"null\n" * finished
    assert sorted(path.name for path in tmp_path.glob("*.items")) == [f"{n:06d}.items" for n in range(finished)]
    parts.process_part(tmp_path / "..", 0, whole, documents.Selection(("en",), ()))
    assert (tmp_path / "000000.items").read_bytes() == (tmp_path / ".." / "000000.items").read_bytes()


def test_an_error_of_a_worker_is_raised_by_its_parent(tmp_path):
    with parts._Workers(tmp_path / "missing", documents.Selection(("en",), (), ids=frozenset({1}))) as workers:
        for number in range(2):
            workers.process(number, parts.Part(True, [("x", 1, b"[")]))
        with pytest.raises(OSError, match="No such file"):
            workers.finish()


def test_workers_end_with_the_process_that_started_them(tmp_path):
    program = (
        "import sys, time; from pathlib import Path\n"
        "from hf_mel.dataset_scripts.wikidata import parts, documents\n"
        "workers = parts._Workers(Path(sys.argv[1]), documents.Selection(('en',), ()))\n"
        "for n in range(2): workers.process(n, parts.Part(True, [('x', 1, b'[')]))\n"
        "workers.finish(); print(*[p.pid for p in workers._processes], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError("a worker goes on")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("time", "precision", "expected"),
    [
        ("+1952-03-11T00:00:00Z", 11, "1952-03-11"),
        ("+1952-03-00T00:00:00Z", 10, "1952-03"),
        ("+1952-00-00T00:00:00Z", 9, "1952"),
        ("+1950-00-00T00:00:00Z", 8, "195X"),
        ("+1900-00-00T00:00:00Z", 7, "19XX"),
        ("+1000-00-00T00:00:00Z", 6, "1XXX"),
        ("-0044-03-15T00:00:00Z", 11, "-0044-03-15"),
        ("+00000001969-06-15T00:00:00Z", 11, "1969-06-15"),
        ("+0800-00-00T00:00:00Z", 11, "0800"),
        ("-13798000000-00-00T00:00:00Z", 3, None),
        ("1952", 11, None),
        (None, None, None),
    ],
)
def test_dates_are_written_to_their_precision(time, precision, expected):
    assert date_text(time, precision) == expected


def test_an_update_takes_the_options_of_the_earlier_build_and_lists_what_changed(dump, tmp_path):
    output = tmp_path / "out"
    build(dump, output, **OPTIONS)
    entities = [entity for entity in release.entities() if entity["id"] not in ("Q103", "Q7")]
    # Bo Falk gets a description, Ada Orme's occupation has another name, Cy Lund goes, and Eve Moor comes.
    next(entity for entity in entities if entity["id"] == "Q102")["descriptions"] = release.terms(de="Müller")
    entities.append(release.item(7, release.terms(en="artist")))
    entities.append(release.item(120, release.terms(en="Eve Moor"), 7, P31=[release.item_value(5)]))
    newer = tmp_path / "newer.json"
    newer.write_text("\n".join(map(json.dumps, entities)))
    build_dataset("wikidata", raw_dir=newer, output=output, update=True)
    changes = json.loads((output / "changes.json").read_text())
    assert changes == {"added": ["Q120"], "changed": ["Q101", "Q102"], "removed": ["Q103"]}
    assert json.loads((output / "report.json").read_text())["options"] == OPTIONS
    build_dataset("wikidata", raw_dir=newer, output=output, update=True, config_options={"min_sitelinks": "5"})
    assert json.loads((output / "changes.json").read_text()) == {
        "added": [],
        "changed": ["Q101"],  # its second entity has nine pages
        "removed": ["Q102", "Q109", "Q111"],
    }


def test_an_update_needs_an_earlier_build(dump, tmp_path):
    with pytest.raises(DataFormatError, match="holds no build of 'wikidata' to update"):
        build_dataset("wikidata", raw_dir=dump, output=tmp_path / "out", update=True)


def test_the_command_line_updates(dump, tmp_path):
    build(dump, tmp_path / "out", **OPTIONS)
    arguments = ["build", "wikidata", "--update", str(dump), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Entities since the earlier build: 0 added, 0 changed, 0 removed." in done.output
    assert CliRunner().invoke(app, [*arguments, "--raw-dir", str(dump)]).exit_code == 2
