"""Tests of `hf-mel kb` and `hf-mel link` with a toy model."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path

import pytest
import typer
from PIL import Image
from rich.cells import cell_len
from typer.testing import CliRunner

from hf_mel.cli import kb
from hf_mel.cli.link import link
from hf_mel.data.entity_files import read_entity_file
from hf_mel.errors import DataFormatError, DuplicateIdError, ImageError, KnowledgeBaseError, LockedError, SpanError
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.row_columns import ColumnMapping
from tests.processes import lock_holder
from tests.toy import ToyProcessor, register, toy_entities, toy_model, write_toy_dataset

MODEL, PROCESSOR = toy_model(), ToyProcessor()

app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(kb.app, name="kb")
app.command()(link)


@pytest.fixture
def model(tmp_path):
    register()
    MODEL.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def base(tmp_path):
    KnowledgeBase.build(toy_entities(12), MODEL, PROCESSOR, output=tmp_path / "kb", progress=False)
    return str(tmp_path / "kb")


def run(*arguments, ok: bool = True):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code == 0) == ok, result.output
    return result


def test_a_knowledge_base_is_built_changed_and_described(tmp_path, model):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    (tmp_path / "mine.csv").write_text("id,name,image\na,Ada,a.png\nb,Bob,\n")
    (tmp_path / "more.jsonl").write_text('{"id": "c", "name": "Cleo"}\n')
    folder = tmp_path / "kb"
    run("kb", "build", model, "--entities", tmp_path / "mine.csv", "--output", folder, "--dtype", "float16")
    assert KnowledgeBase.from_pretrained(folder).entity_ids == ["a", "b"]
    assert KnowledgeBase.from_pretrained(folder).image(0).size == (3, 3)
    assert "3" in run("kb", "add", folder, "--model", model, "--entities", tmp_path / "more.jsonl").stdout
    with pytest.raises(DuplicateIdError, match="'c'"):
        run("kb", "add", folder, "--model", model, "--entities", tmp_path / "more.jsonl")
    run("kb", "add", folder, "--model", model, "--entities", tmp_path / "more.jsonl", "--replace")
    run("kb", "remove", folder, "a", "b")
    assert KnowledgeBase.from_pretrained(folder).entity_ids == ["c"]
    printed = run("kb", "info", folder, "--verify").stdout
    for word in ("1, and 3 removed", "float16", "model (toy_retriever)", "All files have the recorded sha256"):
        assert word in printed


def test_a_knowledge_base_is_updated_from_a_newer_file(tmp_path, model):
    (tmp_path / "mine.csv").write_text("id,name\na,Ada\nb,Bob\nc,Cleo\n")
    folder = tmp_path / "kb"
    run("kb", "build", model, "--entities", tmp_path / "mine.csv", "--output", folder)
    (tmp_path / "newer.csv").write_text("id,name\na,Ada\nc,Cleo Moor\nd,Dee\n")
    arguments = ("kb", "update", folder, "--model", model, "--entities", tmp_path / "newer.csv")
    printed = run(*arguments).stdout
    assert "3 entities: 1 added, 1 changed, 1 removed, 1 unchanged" in printed
    assert "Removed (--json lists all):\n  b" in printed
    assert KnowledgeBase.from_pretrained(folder).entity_ids == ["a", "c", "d"]
    assert json.loads(run(*arguments, "--json").stdout) == {
        "added": [], "changed": [], "removed": [], "num_unchanged": 3
    }  # fmt: skip
    run("kb", "update", folder, "--model", model, ok=False)


def test_bad_images_are_counted_in_the_closing_lines_and_refused_by_strict(tmp_path, model):
    (tmp_path / "mine.csv").write_text("id,name,image\na,Ada,gone.png\nb,Bob,\n")
    (tmp_path / "more.csv").write_text("id,name,image\nc,Cleo,lost.png\n")
    folder = tmp_path / "kb"
    with pytest.raises(ImageError, match=r"mine\.csv, row 2: "):
        run("kb", "build", model, "--entities", tmp_path / "mine.csv", "--output", folder, "--strict")
    assert not folder.exists()
    printed = run("kb", "build", model, "--entities", tmp_path / "mine.csv", "--output", folder).stdout
    assert "missing or damaged: 1." in printed
    assert "  mine.csv, row 2: The image file gone.png does not exist.\n" in printed
    more = ("kb", "add", folder, "--model", model, "--entities", tmp_path / "more.csv")
    with pytest.raises(ImageError, match=r"more\.csv, row 2: "):
        run(*more, "--strict")
    printed = run(*more).stdout
    assert "missing or damaged: 1." in printed
    assert "lost.png" in printed
    assert "gone.png" not in printed


def test_an_index_is_built_used_measured_and_listed(tmp_path, model):
    pytest.importorskip("faiss")
    KnowledgeBase.build(toy_entities(80), MODEL, PROCESSOR, output=tmp_path / "kb", progress=False)
    data = write_toy_dataset(tmp_path / "data", entities=toy_entities(80))
    folder, mention = tmp_path / "kb", ("--text", "Here Entity c met.", "--mention", "Entity c")
    assert "covers its 80 entities" in run("kb", "index", folder, "--model", model, "--kind", "faiss-flat").stdout
    exact = json.loads(run("link", model, "--kb", folder, *mention, "--json").stdout)
    options = ("--index", "faiss-flat", "--first-stage", 20)
    indexed = json.loads(run("link", model, "--kb", folder, *mention, *options, "--json").stdout)
    assert [c["entity_id"] for c in indexed["candidates"]] == [c["entity_id"] for c in exact["candidates"]]
    arguments = ("--model", model, "--kind", "faiss-flat", "--dataset", data, "--limit", 7, "--first-stage", 20)
    report = json.loads(run("kb", "recall", folder, *arguments).stdout)
    recalls = {k: report.pop(f"recall@{k}") for k in (1, 10, 64)}
    assert report == {"index": "faiss-flat", "first_stage": 20, "entities": 80, "mentions": 7}
    assert recalls[1] == recalls[10] == 1  # inner products of the toy's vectors are its scores
    assert recalls[64] <= 22 / 64
    printed = run("kb", "info", folder).stdout
    assert [line.split("│")[2].strip() for line in printed.splitlines() if "indexes" in line] == ["faiss-flat"]
    with pytest.raises(KnowledgeBaseError, match="no index 'milvus'"):
        run("link", model, "--kb", folder, *mention, "--index", "milvus")
    run("kb", "index", folder, "--model", model, "--kind", "exact", ok=False)


def test_a_command_is_refused_while_another_process_changes_the_knowledge_base_or_waits(tmp_path, base):
    pytest.importorskip("faiss")
    (tmp_path / "more.jsonl").write_text('{"id": "c", "name": "Cleo"}\n')
    commands = [
        ("add", base, "--model", "unread", "--entities", tmp_path / "more.jsonl"),
        ("remove", base, "Q1"),
        ("index", base, "--model", "unread"),
    ]
    with lock_holder(Path(base, ".writer.lock")) as process:
        for command in commands:  # before a model is loaded
            with pytest.raises(LockedError, match=f"by process {process.pid} on this host"):
                run("kb", *command)
        threading.Timer(0.2, process.stdin.close).start()
        run("kb", "remove", base, "Q1", "--wait", 60)
    assert "Q1" not in KnowledgeBase(base)


def test_a_knowledge_base_is_built_from_exactly_one_source(tmp_path, model):
    run("kb", "build", model, "--output", tmp_path / "kb", ok=False)
    run("kb", "build", model, "--output", tmp_path / "kb", "--dataset", "a", "--entities", "b.csv", ok=False)
    assert not (tmp_path / "kb").exists()


def test_the_json_output_is_only_the_result_of_the_linker(tmp_path, model, base):
    image = tmp_path / "image.png"
    Image.new("RGB", (3, 3), "red").save(image)
    mention = {"text": "Here Entity c met.", "mention": "Entity c", "image": image}
    options = [option for name, value in mention.items() for option in (f"--{name}", value)]
    shown = run("link", model, "--kb", base, *options, "--top-k", 3, "--nil-threshold", "-5", "--json").stdout
    expected = EntityLinker(MODEL, PROCESSOR, base, nil_threshold=-5)(mention, top_k=3).to_dict()
    assert json.loads(shown) == expected
    assert len(expected["candidates"]) == 3


def test_the_table_shows_candidates_units_and_the_prediction(model, base):
    arguments = ("link", model, "--kb", base, "--text", "Here Entity c met.", "--mention", "Entity c", "--top-k", 4)
    result = EntityLinker(MODEL, PROCESSOR, base)(text="Here Entity c met.", mention="Entity c", top_k=4)
    shown = run(*arguments).stdout
    rows = [line.split("│") for line in shown.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert cells == [
        [
            str(c.rank),
            c.name,
            c.entity_id,
            f"{c.score:.3f}",
            *(f"{u:.3f}" for u in c.unit_scores.values()),
            c.attributes,
        ]
        for c in result.candidates
    ]
    assert f"Entity c → {result.best.name} ({result.best.entity_id})" in shown
    assert "no NIL threshold" in shown
    assert result.warnings[0] in shown
    assert f"NIL: the best score, {result.best.score:.3f}, is below" in run(*arguments, "--nil-threshold", 99).stdout


def test_markup_in_names_is_printed_literally(tmp_path, model):
    (tmp_path / "mine.jsonl").write_text(json.dumps({"id": "[red]", "name": "[b]x[/b] :smile:" + "y" * 10_000}))
    run("kb", "build", model, "--entities", tmp_path / "mine.jsonl", "--output", tmp_path / "kb")
    shown = run("link", model, "--kb", tmp_path / "kb", "--text", "[/b] x", "--mention", "[/b] x").stdout
    assert "[b]x[/b] :smile:yyy" in shown
    assert "[red]" in shown
    assert "'[/b] x' may mean" in shown
    assert len(shown) < 2_000


def test_a_file_of_mentions_is_linked(tmp_path, model, base):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (3, 3), "red").save(tmp_path / "in" / "image.png")
    records = [
        {"text": "Here Entity c met.", "mention": "Entity c", "image": "image.png", "entity_id": "Q3"},
        {"text": "Entity d, Entity d", "start": 10, "end": 18},
    ]
    source, output = tmp_path / "in" / "mentions.jsonl", tmp_path / "out" / "linked.jsonl"
    source.write_text(f"{json.dumps(records[0])}\n\n{json.dumps(records[1])}\n")
    shown = run("link", model, "--kb", base, "--input", source, "--output", output, "--top-k", 2).stdout
    linker = EntityLinker(MODEL, PROCESSOR, base)
    expected = [
        linker(records[0] | {"image": tmp_path / "in" / "image.png"}, top_k=2).to_dict(),
        linker(records[1], top_k=2).to_dict(),
    ]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line, record, result in zip(lines, records, expected, strict=True):
        assert line.pop("linked")["entity_id"] == result["entity_id"]
        assert line == record
    assert "2 mentions linked, 0 of them NIL" in shown
    assert "For 1 of them: The mention has no image" in shown


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ('{"text": "a", "mention": "b"}', SpanError, "row 3: The mention 'b'"),
        (
            '{"text": "a", "mention": "a", "image": "none.png"}',
            ImageError,
            r"row 3: .*none\.png: The image file does not exist",
        ),
        ("{", DataFormatError, "row 3: The line is not JSON"),
        ("[]", DataFormatError, "row 3: The row is not a JSON object"),
        ('{"text": "a", "mention": "a", "image": 3}', DataFormatError, "row 3: The cell 'image' is 3"),
    ],
)
def test_an_invalid_line_is_named_and_nothing_is_written(tmp_path, model, base, line, error, message):
    source = tmp_path / "mentions.jsonl"
    source.write_text('{"text": "a", "mention": "a"}\n\n' + line)
    with pytest.raises(error, match=rf"mentions\.jsonl, {message}"):
        run("link", model, "--kb", base, "--input", source, "--output", tmp_path / "linked.jsonl")
    assert not (tmp_path / "linked.jsonl").exists()


def test_conflicting_options_are_refused(tmp_path, model, base):
    for options in (
        (),
        ("--mention", "a"),
        ("--input", "m.jsonl"),
        ("--output", "o.jsonl", "--text", "a", "--mention", "a"),
        ("--input", "m.jsonl", "--output", "o.jsonl", "--text", "a"),
        ("--input", "m.jsonl", "--output", "o.jsonl", "--json"),
    ):
        assert "Error" in run("link", model, "--kb", base, *options, ok=False).output


def test_a_model_that_did_not_build_the_knowledge_base_is_refused(model, base):
    toy_model(seed=1).save_pretrained(model)
    with pytest.raises(KnowledgeBaseError, match=r"its weights differ.*hf-mel kb build"):
        run("link", model, "--kb", base, "--text", "a", "--mention", "a")


def write_rows(path, rows):
    """Writes rows of strings in the format of the suffix."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".ndjson", ".JSONL", ".TSV")


@pytest.mark.parametrize("suffix", FORMATS)
def test_entities_are_read_from_every_format(tmp_path, model, suffix):
    """The same rows give the same knowledge base, through the command line and in Python."""
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    rows = [
        {"id": "a", "name": "Ada, Countess", "aliases": "Ada|A. F.", "image": "a.png"},
        {"id": "b", "name": "Bob", "aliases": "", "image": ""},
    ]
    first = write_rows(tmp_path / f"mine{suffix}", rows)
    more = write_rows(tmp_path / f"more{suffix}", [{"id": "c", "name": "Cleo"}])
    run("kb", "build", model, "--entities", first, "--output", tmp_path / "kb")
    run("kb", "add", tmp_path / "kb", "--model", model, "--entities", more)
    kb = KnowledgeBase(tmp_path / "kb")
    empty = {"description": "", "attributes": ""}
    assert kb.rows(range(3)) == [
        {"entity_id": "a", "name": "Ada, Countess", "aliases": ["Ada", "A. F."], **empty},
        {"entity_id": "b", "name": "Bob", "aliases": [], **empty},
        {"entity_id": "c", "name": "Cleo", "aliases": [], **empty},
    ]
    assert [kb.image(row) is not None for row in range(3)] == [True, False, False]
    in_python = KnowledgeBase.build(str(first), MODEL, PROCESSOR, progress=False)
    assert in_python.rows(range(2)) == kb.rows(range(2))


def test_a_file_of_entities_in_an_unknown_format_is_refused(tmp_path, model):
    path = tmp_path / "e.xlsx"
    path.write_text('{"id": "a", "name": "Ada"}\n')
    for name in (path, tmp_path / "missing.tsv"):
        with pytest.raises(DataFormatError, match=r"not one of \.jsonl, \.json, \.csv, \.tsv|cannot be read"):
            run("kb", "build", model, "--entities", name, "--output", tmp_path / "kb")
    assert not (tmp_path / "kb").exists()


def test_a_data_set_can_be_given_as_entities(tmp_path, model):
    data = write_toy_dataset(tmp_path / "data", entities=toy_entities(12))
    run("kb", "build", model, "--entities", data, "--output", tmp_path / "kb")
    assert len(KnowledgeBase(tmp_path / "kb")) == 12
    answers = [
        run("link", model, *source, "--text", "Entity c", "--mention", "Entity c", "--json").stdout
        for source in (["--kb", tmp_path / "kb"], ["--entities", data])
    ]
    assert answers[0] == answers[1]
    with pytest.raises(DataFormatError):
        run("kb", "build", model, "--entities", data, "--column", "name=x", "--output", tmp_path / "new")


def test_entities_of_a_museums_table_are_read_by_assigned_columns(tmp_path, model):
    path = tmp_path / "artists.csv"
    path.write_text('no;artist;sex;birth;url\na;"Bo, Ada";f;Rome;x\n', encoding="utf-8")
    more = tmp_path / "more.csv"
    more.write_text("no,artist\nb,Cy\n")
    columns = ["--column", "id=no", "--column", "name=artist"]
    options = [*columns, "--column", "attributes=sex,birth", "--ignore-other-columns", "--inverted-names"]
    done = run("kb", "build", model, "--entities", path, *options, "--output", tmp_path / "kb")
    assert "these columns are left out: url." in done.stderr
    run("kb", "add", tmp_path / "kb", "--model", model, "--entities", more, *columns)
    empty = {"description": "", "attributes": "", "aliases": []}
    assert KnowledgeBase(tmp_path / "kb").rows(range(2)) == [
        {**empty, "entity_id": "a", "name": "Bo, Ada", "attributes": "Sex: f. Birth: Rome.", "aliases": ["Ada Bo"]},
        {**empty, "entity_id": "b", "name": "Cy"},
    ]
    assert (
        "--column"
        in run("kb", "build", model, "--dataset", "d", *columns, "--output", tmp_path / "x", ok=False).output
    )


@pytest.mark.parametrize("verb", ["build", "add"])
def test_wrong_columns_and_bad_rows_are_told_before_the_model_is_loaded(tmp_path, base, verb):
    """All at once. There is no model of this name, so that loading it would be another error."""
    path = tmp_path / "e.csv"
    where = (
        ["build", "no-model", "--output", tmp_path / "new"]
        if verb == "build"
        else ["add", base, "--model", "no-model"]
    )
    path.write_text("qid,nmae\n1,x\n")
    with pytest.raises(DataFormatError, match=r"The columns 'qid', 'nmae' are unknown"):
        run("kb", *where, "--entities", path)
    path.write_text("id,name\n1,\n2,x\n2 ,y\n")
    with pytest.raises(DataFormatError, match=r"2 rows cannot be used:\n  row 2: .*\n  row 4: "):
        run("kb", *where, "--entities", path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_mentions_are_linked_from_every_format(tmp_path, model, base, suffix):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "image.png")
    rows = [
        {
            "text": "Here Entity c met.",
            "mention": "Entity c",
            "start": "",
            "end": "",
            "image": "image.png",
            "note": "x",
        },
        {"text": "Entity d, Entity d", "mention": "", "start": "10", "end": "18", "image": "", "note": ""},
    ]
    if suffix.lower() in (".json", ".jsonl", ".ndjson"):
        rows = [{column: cell for column, cell in row.items() if cell} for row in rows]
    source, output = write_rows(tmp_path / f"mentions{suffix}", rows), tmp_path / "linked.jsonl"
    run("link", model, "--kb", base, "--input", source, "--output", output, "--top-k", 2)
    linker = EntityLinker(MODEL, PROCESSOR, base)
    expected = linker(
        [
            {"text": "Here Entity c met.", "mention": "Entity c", "image": tmp_path / "image.png"},
            {"text": "Entity d, Entity d", "start": 10, "end": 18},
        ],
        top_k=2,
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["linked"] for line in lines] == [result.to_dict() for result in expected]
    assert [line.get("note") or None for line in lines] == ["x", None]
    assert (lines[1]["start"], lines[1]["end"]) == (10, 18)


def test_mentions_are_linked_by_assigned_columns(tmp_path, model, base):
    source, output = tmp_path / "letters.csv", tmp_path / "linked.jsonl"
    source.write_text("Letter;who;mention;no\nHere Entity c met.;Entity c;x;7\n")
    columns = ["--column", "text=letter", "--column", "mention=who"]
    run("link", model, "--kb", base, "--input", source, *columns, "--output", output)
    [line] = [json.loads(line) for line in output.read_text().splitlines()]
    assert line.pop("linked")["mention"] == "Entity c"
    assert line == {"text": "Here Entity c met.", "mention": "Entity c", "no": "7"}
    with pytest.raises(DataFormatError, match=r"There is no column 'lettr'.*Did you mean 'Letter'"):
        run("link", "no-model", "--kb", base, "--input", source, "--column", "text=lettr", "--output", output)
    assert "--column" in run("link", model, "--kb", base, "--text", "a", "--mention", "a", *columns, ok=False).output


def test_entities_of_a_file_are_linked_without_a_knowledge_base(tmp_path, model):
    """An assignment counts for the file that has its columns. Wrong rows are told before a model is loaded."""
    (tmp_path / "artists.csv").write_text("no;artist;link\na;Ada;x\nb;Bo;y\n")
    mapping = ColumnMapping({"id": "no", "name": "artist"}, ignore_others=True)
    entities = read_entity_file(tmp_path / "artists.csv", mapping=mapping)
    expected = EntityLinker(MODEL, PROCESSOR, KnowledgeBase.build(entities, MODEL, PROCESSOR, progress=False))
    table = ["--entities", tmp_path / "artists.csv", "--column", "id=no", "--column", "name=artist"]
    table.append("--ignore-other-columns")
    printed = run("link", model, *table, "--text", "Ada met Bo.", "--mention", "Ada", "--json").stdout
    assert json.loads(printed) == expected(text="Ada met Bo.", mention="Ada").to_dict()
    linker = EntityLinker.from_pretrained(model, entities=tmp_path / "artists.csv", mapping=mapping)
    assert linker(text="Ada met Bo.", mention="Ada") == expected(text="Ada met Bo.", mention="Ada")

    (tmp_path / "letters.csv").write_text("letter,mention,no\nAda met Bo.,Bo,7\n")
    output = tmp_path / "linked.jsonl"
    letters = ["--input", tmp_path / "letters.csv", "--column", "text=letter", "--output", output]
    run("link", model, *table, *letters)
    line = json.loads(output.read_text())
    assert line.pop("linked") == expected(text="Ada met Bo.", mention="Bo").to_dict()
    assert line == {"text": "Ada met Bo.", "mention": "Bo", "no": "7"}

    with pytest.raises(DataFormatError, match=r"The columns 'no', 'artist', 'link' are unknown"):
        run("link", "no-model", *table[:2], "--text", "Ada", "--mention", "Ada")
    with pytest.raises(DataFormatError, match=r"There is no column 'artists'.*Did you mean 'artist'"):
        run("link", "no-model", *table, "--column", "aliases=artists", "--text", "Ada", "--mention", "Ada")
    with pytest.raises(KnowledgeBaseError, match="Both kb= and entities="):
        EntityLinker.from_pretrained(model, kb="kb", entities=entities)
    for wrong in (["--kb", "kb", *table], ["--kb", "kb", "--inverted-names"], []):
        run("link", model, *wrong, "--text", "Ada", "--mention", "Ada", ok=False)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("text,mention\nHere Bo.,Bo\nHere Bo.,Cy\n", SpanError, "row 3: .*'Cy'"),
        ("text,mention,start\nHere Bo.,Bo,five\n", DataFormatError, "row 2: The cell 'start' is 'five'"),
        ("text,mention\nHere Bo.\n", DataFormatError, "row 2: The row has 1 field, not the 2"),
        ("text,mention\n", DataFormatError, "holds no mentions"),
        ("textt,mention\nHere Bo.,Bo\n", DataFormatError, "row 1: There is no column 'text'.*--column text=textt"),
    ],
)
def test_the_error_names_an_invalid_row_of_a_table(tmp_path, model, base, content, error, message):
    source = tmp_path / "mentions.csv"
    source.write_text(content)
    with pytest.raises(error, match=rf"mentions\.csv.*{message}"):
        run("link", model, "--kb", base, "--input", source, "--output", tmp_path / "linked.jsonl")


def test_linked_mentions_go_to_standard_output_and_messages_elsewhere(tmp_path, model, base):
    source = tmp_path / "m.jsonl"
    source.write_text('{"text": "Ada and Bob", "mention": "Bob"}\n{"text": "Ada", "mention": "Eve"}\n')
    done = run("link", model, "--kb", base, "--input", source, "--output", "-", "--skip-bad-rows")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["linked"]["mention"] == "Bob"
    assert "is not in its text" in second["error"]
    assert "1 mentions linked" in done.stderr
    assert "row 2" in done.stderr


def test_an_infinite_threshold_prints_json_and_nan_is_refused(model, base):
    options = ("link", model, "--kb", base, "--text", "Bob", "--mention", "Bob", "--json", "--nil-threshold")

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(run(*options, "inf").stdout, parse_constant=refuse)["is_nil"] is True
    assert run(*options, "nan", ok=False).exit_code == 2


def test_a_name_cannot_control_the_terminal_and_json_keeps_it(tmp_path, model):
    names = ["\x1b[31mRed\nBull\x1b[0m", "東京東京東京東京東京東京東京東京東京東京", "Bob"]
    rows = [json.dumps({"id": f"{number}\x1b[2J", "name": name}) for number, name in enumerate(names)]
    (tmp_path / "e.jsonl").write_text("\n".join(rows))
    run("kb", "build", model, "--entities", tmp_path / "e.jsonl", "--output", tmp_path / "kb")
    options = ("link", model, "--kb", tmp_path / "kb", "--text", "Bob", "--mention", "Bob")
    shown = run(*options).stdout
    assert "\x1b" not in shown
    assert r"\x1b[31mRed Bull\x1b[0m" in shown
    table = [line for line in shown.splitlines() if "│" in line]
    assert len({cell_len(line) for line in table}) == 1
    candidates = json.loads(run(*options, "--json").stdout)["candidates"]
    assert {candidate["name"] for candidate in candidates} == set(names)
