"""Tests of `hf-mel annotate` with a toy model."""

from __future__ import annotations

import json

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from hf_mel.cli.annotate import annotate
from hf_mel.errors import FilterError, KnowledgeBaseError, MelError, SpanError, UnknownModelError
from hf_mel.kb.knowledge_base import KnowledgeBase
from tests.toy import ToyProcessor, register, toy_entities, toy_model, write_toy_dataset

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(annotate)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotate")
    register()
    model, processor = toy_model(), ToyProcessor()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    KnowledgeBase.build(toy_entities(12), model, processor, output=folder / "kb", progress=False)
    return str(folder / "model"), "--kb", str(folder / "kb")


def run(*arguments, ok: bool = True, **options):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"}, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code == 0) == ok, result.output
    return result


def test_a_text_is_annotated(arguments, tmp_path):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    text = "[b]Entity b[/b] met Entity c\x1b."
    options = ("--text", text, "--image", tmp_path / "a.png")
    printed = run(*arguments, *options, "--html", tmp_path / "page.html").stdout
    assert "[b]Entity b[/b] met Entity c\\x1b." in printed
    assert "not linked" not in printed
    assert "page.html" in printed
    assert "Entity b" in (tmp_path / "page.html").read_text()
    result = json.loads(run(*arguments, *options, "--json", "--top-k", 2).stdout)
    assert [(m["start"], m["end"], len(m["candidates"])) for m in result["mentions"]] == [(3, 11, 2), (20, 28, 2)]
    nil = json.loads(run(*arguments, *options, "--json", "--nil-threshold", 1e9).stdout)
    assert [m["entity_id"] for m in nil["mentions"]] == ["NIL", "NIL"]
    only = json.loads(run(*arguments, *options, "--json", "--where", "name = 'Entity c'").stdout)
    assert [m["entity_id"] for m in only["mentions"]] == ["Q3", "Q3"]
    assert json.loads(run(*arguments, "--text", "-", "--json", input="Entity b").stdout)["text"] == "Entity b"
    empty = run(*arguments, "--text", "").stdout
    assert "The text is empty." in empty
    assert "--learn-from" not in empty
    assert "--learn-from" not in printed
    assert "--learn-from" in run(*arguments, "--text", "Nobody met no one.").stdout


def test_a_file_is_annotated_and_shown(arguments, tmp_path):
    (tmp_path / "in.csv").write_text("body,id\nEntity b,1\nnobody,2\n")
    options = ("--input", tmp_path / "in.csv", "--column", "text=body", "--output", tmp_path / "out.jsonl")
    printed = run(*arguments, *options, "--html", tmp_path / "page.html").stdout
    assert "2 texts annotated: 1 mentions, 0 of them NIL; 1 texts without a mention." in printed
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(record["mentions"]) for record in records] == [1, 0]
    assert "Text 2" in (tmp_path / "page.html").read_text()
    (tmp_path / "in.jsonl").write_text('{"text": "Entity b"}\n{"text": "a", "spans": [[0, 3]]}\n')
    with pytest.raises(SpanError, match=r"in\.jsonl, row 2"):
        run(*arguments, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "b.jsonl")
    printed = run(
        *arguments, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "b.jsonl", "--skip-bad-rows"
    ).stdout
    assert "1 rows were not annotated" in printed


def test_the_gazetteer_learns_from_a_data_set(arguments, tmp_path):
    data = write_toy_dataset(tmp_path / "data")
    text = "Here Entity b met somebody, Entity c."
    result = json.loads(run(*arguments, "--text", text, "--json", "--learn-from", data).stdout)
    assert all(0 < mention["detection_score"] <= 1 for mention in result["mentions"])
    lower = json.loads(run(*arguments, "--text", text.lower(), "--json", "--ignore-case").stdout)
    assert len(lower["mentions"]) == 2
    assert not json.loads(run(*arguments, "--text", text.lower(), "--json").stdout)["mentions"]


def test_detectors_that_are_not_there(arguments):
    with pytest.raises(UnknownModelError, match="no detector 'nltk'"):
        run(*arguments, "--text", "a", "--detector", "nltk")
    with pytest.raises(UnknownModelError, match="A gazetteer has no labels"):
        run(*arguments, "--text", "a", "--labels", "PERSON")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--text", "a", "--input", "b.jsonl"),
        ("--input", "b.jsonl"),
        ("--text", "a", "--resume"),
        ("--text", "a", "--column", "text=b"),
        ("--input", "b.jsonl", "--output", "c.jsonl", "--json"),
        ("--input", "b.jsonl", "--output", "c.jsonl", "--image", "a.png"),
        ("--input", "b.jsonl", "--output", "-", "--html", "a.html"),
        ("--text", "a", "--nil-threshold", "nan"),
        ("--text", "a", "--entities", "b.csv"),
        ("--text", "a", "--certify", "--index", "faiss-pq"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, options):
    run(*arguments, *options, ok=False)


def test_proven_links_need_codes(arguments):
    with pytest.raises(KnowledgeBaseError, match="no bounds of its scores"):
        run(*arguments, "--text", "Entity b", "--certify")


ODD_TEXTS = {
    "empty": "",
    "emoji": "😀🇬🇭👩‍👩‍👧",
    "no space": "x" * 1_000_000,
    "right to left": "ذهبت Entity b إلى القاهرة",
    "chinese": "昨天Entity b在北京",
    "markup": "<script>alert('Entity c')</script><b>Entity b</b>",
}


def test_odd_texts_lose_nothing(arguments, tmp_path):
    rows = [{"text": text, "kind": kind} for kind, text in ODD_TEXTS.items()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--html", tmp_path / "page.html")
    printed = run(*arguments, *options).stdout
    assert f"{len(rows)} texts annotated" in printed
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{"text": record["text"], "kind": record["kind"]} for record in records] == rows
    found = {record["kind"]: [mention["mention"] for mention in record["mentions"]] for record in records}
    assert found == {
        "empty": [],
        "emoji": [],
        "no space": [],
        "right to left": ["Entity b"],
        "chinese": ["Entity b"],
        "markup": ["Entity c", "Entity b"],  # a table holds text, whatever it looks like; only .html files are markup
    }
    for record in records:
        for mention in record["mentions"]:
            assert record["text"][mention["start"] : mention["end"]] == mention["mention"]
    assert [bool(record["warnings"]) for record in records] == [True, True, True, False, False, False]
    assert "<script>alert" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("kind", ["empty", "emoji", "right to left", "chinese", "markup"])
def test_odd_texts_of_the_command_line(arguments, kind):
    result = json.loads(run(*arguments, "--text", ODD_TEXTS[kind], "--json").stdout)
    assert result["text"] == ODD_TEXTS[kind]
    assert run(*arguments, "--text", ODD_TEXTS[kind]).stdout.strip()


def test_html_files_are_read_without_their_scripts(arguments, tmp_path):
    folder = tmp_path / "pages"
    folder.mkdir()
    (folder / "a.html").write_text("<title>T</title><script>Entity c</script><p>Entity b &amp; co</p>")
    run(*arguments, "--input", folder, "--output", tmp_path / "out.jsonl")
    (record,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [mention["mention"] for mention in record["mentions"]] == ["Entity b"]
    assert "Entity c" not in record["text"]


def test_spans_that_overlap_or_lie_outside(arguments, tmp_path):
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"text": "Entity b met", "spans": [[0, 8], [7, 8], [0, 12]]}))
    run(*arguments, "--input", file, "--output", output)
    assert [(m["start"], m["end"]) for m in json.loads(output.read_text())["mentions"]] == [(0, 12)]
    kept = tmp_path / "kept.jsonl"
    run(*arguments, "--input", file, "--output", kept, "--overlapping")
    assert [(m["start"], m["end"]) for m in json.loads(kept.read_text())["mentions"]] == [(0, 8), (0, 12), (7, 8)]
    file.write_text(json.dumps({"text": "Entity b met", "spans": [[0, 99]]}))
    with pytest.raises(SpanError, match="row 1"):
        run(*arguments, "--input", file, "--output", tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("option", ["--where", "--soft"])
def test_a_filter_on_a_column_that_is_not_there(arguments, option):
    bonus = ("--soft-bonus", 1) if option == "--soft" else ()
    with pytest.raises(FilterError, match="no column 'born' to filter by"):
        run(*arguments, "--text", "Entity b", option, "born < 1900", *bonus)


def test_an_output_with_another_suffix_is_refused(arguments, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "Entity b"}\n')
    with pytest.raises(MelError, match="JSON lines"):
        run(*arguments, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.csv")


def test_entities_of_a_table_with_columns_of_other_names(arguments, tmp_path):
    (tmp_path / "artists.csv").write_text('id,artist,born,room\n1,"Turner, William",1775,3\n2,"Moore, Henry",1898,4\n')
    (tmp_path / "letters.csv").write_text("letter\nWilliam Turner met Henry Moore.\n")
    table = ("--entities", tmp_path / "artists.csv", "--column", "name=artist", "--inverted-names")
    options = (*table, "--ignore-other-columns", "--keep-column", "born", "--where", "born < 1800")
    files = ("--input", tmp_path / "letters.csv", "--output", tmp_path / "out.jsonl")
    run(arguments[0], *options, "--column", "text=letter", *files)
    mentions = json.loads((tmp_path / "out.jsonl").read_text())["mentions"]
    linked = [
        (mention["mention"], [candidate["entity_id"] for candidate in mention["candidates"]]) for mention in mentions
    ]
    assert linked == [("William Turner", ["1"]), ("Henry Moore", ["1"])]
    with pytest.raises(MelError, match="room"):
        run(arguments[0], *table, "--keep-column", "born", "--text", "William Turner")
    for option in ("--inverted-names", "--ignore-other-columns"):
        assert "--entities" in run(*arguments, option, "--text", "Entity b", ok=False).output
