"""Annotating files: rows are checked first, results are kept, and an interrupted run goes on. The page that shows them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from hf_mel.detection.spans import MentionSpan
from hf_mel.errors import DataFormatError, MelError
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking import annotating
from hf_mel.linking.annotate_file import annotate_file, read_annotated, read_texts
from hf_mel.linking.annotations_page import write_annotations_page
from hf_mel.linking.linker import EntityLinker
from tests.toy import ToyProcessor, toy_entities, toy_model

ENTITIES = toy_entities(12)
TEXTS = [f"{n}: Entity {'abcdefghijkl'[n % 12]} met Entity {'abcdefghijkl'[(5 * n) % 12]}." for n in range(150)]


@pytest.fixture(scope="module")
def linker():
    model, processor = toy_model(), ToyProcessor()
    return EntityLinker(model, processor, KnowledgeBase.build(ENTITIES, model, processor, progress=False))


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(linker, rows, output, detector=None, **options):
    return annotate_file(linker, rows, output, detector or linker.gazetteer, **options)


def test_rows_get_their_mentions(linker, tmp_path):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    rows = [
        {"text": TEXTS[1], "own": 7, "image": "a.png"},
        {"text": "", "own": 8},
        {"text": TEXTS[2], "spans": [[0, 1], {"start": 3, "end": 11, "label": "x"}], "image": None},
    ]
    summary = run(linker, read_texts(write(tmp_path / "in.jsonl", rows)), tmp_path / "out.jsonl")
    records = list(read_annotated(tmp_path / "out.jsonl"))
    assert [record["text"] for record in records] == [row["text"] for row in rows]
    assert records[0]["own"] == 7
    alone = linker.annotate(TEXTS[1], image=tmp_path / "a.png").to_dict()
    assert [m["entity_id"] for m in records[0]["mentions"]] == [m["entity_id"] for m in alone["mentions"]]
    assert records[1]["warnings"] == ["The text is empty."]
    assert [(m["mention"], m["label"]) for m in records[2]["mentions"]] == [("2", ""), ("Entity c", "x")]
    assert (summary.num_texts, summary.num_mentions, summary.num_empty) == (3, 4, 1)


def test_a_table_has_spans_as_json(linker, tmp_path):
    (tmp_path / "in.csv").write_text('text,spans\nEntity b,"[[0, 8]]"\nEntity c,\n')
    rows = read_texts(tmp_path / "in.csv")
    assert [row.mention for row in rows] == [{"text": "Entity b", "spans": [[0, 8]]}, {"text": "Entity c"}]


def test_a_folder_of_texts(linker, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("Entity b")
    (tmp_path / "in" / "sub" / "a.html").write_text("<p>Entity <i>c</i><script>Entity d</script></p>")
    (tmp_path / "in" / "bad.md").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataFormatError, match=r"bad\.md.*--skip-bad-rows"):
        read_texts(tmp_path / "in")
    summary = run(linker, read_texts(tmp_path / "in", skip_bad_rows=True), tmp_path / "out.jsonl")
    records = list(read_annotated(tmp_path / "out.jsonl"))
    assert [record["file"] for record in records] == ["b.txt", "bad.md", "sub/a.html"]
    assert "UTF-16" in records[1]["error"]
    assert records[2]["text"] == "Entity c"
    assert summary.num_mentions == 2
    assert [row.row for row in read_texts(tmp_path / "in" / "b.txt")] == [{"file": "b.txt", "text": "Entity b"}]


BAD = {
    "no text": ({"txt": "a"}, "text"),
    "number": ({"text": 3}, "text is missing or no string"),
    "spans": ({"text": "abc", "spans": [[0, 9]]}, "holds no mention"),
    "no list": ({"text": "abc", "spans": "[0, 1"}, "JSON|spans"),
    "image": ({"text": "abc", "image": "gone.png"}, "gone.png"),
    "no JSON": ('{"text": "a"', "JSON"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_and_can_be_left_out(linker, tmp_path, kind):
    row, message = BAD[kind]
    path = write(tmp_path / "in.jsonl", [{"text": "Entity b"}, row, {"text": "Entity c"}])
    with pytest.raises(MelError, match=message) as error:
        read_texts(path)
    assert error.value.row == 2
    summary = run(linker, read_texts(path, skip_bad_rows=True), tmp_path / "out.jsonl")
    records = list(read_annotated(tmp_path / "out.jsonl"))
    assert ["error" in record for record in records] == [False, True, False]
    assert len(summary.bad_rows) == 1


@pytest.mark.parametrize("column", ["mentions", "warnings", "error"])
def test_columns_that_the_output_adds_are_refused(tmp_path, column):
    with pytest.raises(DataFormatError, match=f"column '{column}', which the output adds"):
        read_texts(write(tmp_path / "in.jsonl", [{"text": "a", column: 1}]))


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on(linker, tmp_path, monkeypatch):
    monkeypatch.setattr(annotating, "_TEXTS_PER_BATCH", 64)
    rows = read_texts(write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS]))
    run(linker, rows, tmp_path / "whole.jsonl")
    asked = []

    class Detector:
        def __init__(self, stops):
            self.stops = stops

        def describe(self):
            return linker.gazetteer.describe()

        def __call__(self, texts):
            asked.extend(texts)
            if self.stops and len(asked) > 100:
                raise Stop
            return linker.gazetteer(texts)

    with pytest.raises(Stop):
        run(linker, rows, tmp_path / "out.jsonl", Detector(True))
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(MelError, match="other rows, settings"):
        run(linker, rows, tmp_path / "out.jsonl", lambda texts: [[] for _ in texts], resume=True)
    asked.clear()
    summary = run(linker, rows, tmp_path / "out.jsonl", Detector(False), resume=True)
    assert summary.num_resumed == 64
    assert asked == TEXTS[64:]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


class Marks(HTMLParser):
    """Collects the text outside cards, the marked words, and all elements."""

    def __init__(self):
        super().__init__()
        self.shown, self.tags, self.depth, self.attributes = "", [], 0, []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if self.depth or dict(attrs).get("class") == "cards":
            self.depth += tag not in ("img", "br")

    def handle_endtag(self, tag):
        self.depth -= self.depth > 0

    def handle_data(self, data):
        if not self.depth:
            self.shown += data


def test_the_page_shows_the_text_and_escapes_it(linker, tmp_path):
    text = '<script>alert(1)</script> Entity b & Entity "c" \u202e \ud800'
    spans = [MentionSpan(26, 34, "<i>"), MentionSpan(33, 46), MentionSpan(0, 8)]
    record = linker.annotate(text.replace("\ud800", "?"), spans=spans, overlapping=True).to_dict()
    record["text"] = text  # annotating refuses half of a pair, but a file may have one
    record["mentions"][0]["entity_id"] = None
    kb = linker.kb
    images = {entity_id: kb.image(kb.row_of(entity_id)) for entity_id in kb.entity_ids}
    records = [{**record, "file": "<b>.txt"}, {"file": "bad", "error": "a < b"}]
    write_annotations_page(tmp_path / "page.html", records, entity_image=images.get, title="<Title>")
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Marks()
    page.feed(source)
    assert text.replace("\ud800", "?") in page.shown
    assert not {"script", "b.txt"} & set(page.tags)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "http" not in source.replace("http-equiv", "")
    assert "a < b" in page.shown
    assert source.count('class="none"') == 2  # the key, and the mention that is not linked
    assert "data:image/jpeg" in source
