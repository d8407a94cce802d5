"""Tests of the demo Space without a browser: linking, refusals, HTML and the API."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tempfile
import threading
import time
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import gradio
import pytest
import requests
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.explaining import Explanation
from hf_mel.linking.linker import EntityLinker
from hf_mel.linking.results import Candidate, LinkResult
from hf_mel.row_files import ROW_SUFFIXES
from tests.soak.space import Visitor
from tests.soak.space import requests as soak_requests
from tests.spaces.small_model import small_model
from tests.toy import ToyPairProcessor, ToyProcessor, register, toy_entities, toy_model, toy_reranker

SPACE = Path(__file__).parents[2] / "spaces" / "entity_linking"
TEXT = "Georgia won again, and Jordan lost."


@pytest.fixture(scope="module")
def space():
    """The Space's modules, imported as on the Hub."""
    sys.path.insert(0, str(SPACE))
    try:
        import app
        import handlers
        import render
        import service

        yield type("Space", (), {"app": app, "handlers": handlers, "render": render, "service": service})
    finally:
        sys.path.remove(str(SPACE))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("space")
    small_model(root / "model")
    return root


@pytest.fixture(scope="module")
def service(space, folders):
    return space.service.Service({"small": str(folders / "model")}, {"flags": str(folders / "model" / "kb")})


@pytest.fixture
def session(space):
    session = space.service.Session()
    yield session
    session.close()


def link(service, text=TEXT, mentions=("Georgia",), image=None, **options):
    return service.link(text, list(mentions), image, **{"model": "small", "kb": "flags"} | options)[0]


# Linking


def test_all_mentions_of_a_text_are_linked(service):
    first, second = link(service, mentions=["Georgia", (23, 29)])
    assert (first.mention, second.mention) == ("Georgia", "Jordan")
    assert link(service, mentions=["Jordan"])[0].best.score == pytest.approx(second.best.score)


def test_the_threshold_and_units_change_the_results(service):
    (result,) = link(service, nil_threshold=1e9)
    assert result.is_nil
    assert result.entity_id == "NIL"
    (alone,) = link(service, units=["text"], nil_threshold=1e9)
    assert not alone.is_nil
    assert alone.best.score == pytest.approx(alone.best.unit_scores["text"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, "Paste a caption"),
        ({"text": " \n"}, "Paste a caption"),
        ({"text": "x" * 2001}, "2,001 characters"),
        ({"mentions": []}, "Say which words"),
        ({"mentions": ["Peru"]}, "“Peru” is not in the caption"),
        ({"mentions": [" "]}, "empty"),
        ({"mentions": [(5, 900)]}, "holds no mention"),
        ({"mentions": ["Georgia"] * 9}, "At most 8"),
        ({"top_k": 0}, "between 1 and 20"),
        ({"top_k": 500}, "between 1 and 20"),
        ({"nil_threshold": float("nan")}, "must be a number"),
        ({"model": "<b>other"}, "does not exist"),
        ({"kb": "../../etc"}, "does not exist"),
    ],
)
def test_invalid_requests_are_refused_with_a_message(space, service, options, message):
    with pytest.raises(space.service.Refused, match=message):
        link(service, **options)


def test_comparing_the_units_without_a_photo_says_what_a_missing_photo_does(
    space, service, session, tmp_path, monkeypatch
):
    compare = space.handlers.Handlers(service, []).compare_evidence
    ask = (TEXT, "Georgia", "", None, "small", "flags", None, session)
    answer = compare(*ask)
    assert "one kind of evidence here" in answer
    assert "no image, so only the text decides" in answer
    (tmp_path / "photo.png").write_bytes(png())
    with_photo = compare(*ask[:3], str(tmp_path / "photo.png"), *ask[4:])
    assert with_photo.count("alone") >= 3
    assert "No photo was given" not in with_photo
    monkeypatch.setattr(service.linker("small", "flags").model.config, "missing_images", "zeros")
    published = compare(*ask)
    assert published.count("alone") >= 3
    assert "the model reads a blank picture" in published


@pytest.mark.parametrize(
    ("mentions", "spans", "expected"),
    [
        ("Georgia", "", ["Georgia"]),
        ("Georgia", "[[12, 19]]", [(12, 19)]),
        ("Georgia\nGeorgia", "[[12, 19]]", [(12, 19), "Georgia"]),
        ("Georgia\nGeorgia", "[[12, 19], [0, 7]]", [(12, 19), (0, 7)]),
        (" Peru \n\n", "[[0, 7]]", ["Peru"]),  # typed after selecting something else
        ("in Jordan", "[[20, 29]]", [(20, 29)]),  # spans two lines
        ("Georgia", "[[0, 7000], [-7, 0], [7, 0]]", ["Georgia"]),
        ("Georgia", '{"a": [1]}', ["Georgia"]),
        ("Georgia", "[[NaN, Infinity]]", ["Georgia"]),
        ("Georgia", "[" * 100_000, ["Georgia"]),
        (None, None, []),
    ],
)
def test_mentions_are_selected_or_typed(space, mentions, spans, expected):
    assert space.service.parse_mentions("Georgia met Georgia in\nJordan", mentions, spans) == expected


def test_nan_scores_give_a_message_and_the_app_keeps_working(space, service, monkeypatch):
    model = service.linker("small", "flags").model
    with monkeypatch.context() as patch:
        patch.setattr(model, "quick_scores", lambda *args, score=model.quick_scores: score(*args) * float("nan"))
        with pytest.raises(space.service.Refused, match="nan"):
            link(service)
    assert link(service)[0].candidates


def test_an_internal_error_does_not_reveal_details_of_the_server(space, service, monkeypatch):
    def fail(*args):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(service.linker("small", "flags").model, "quick_scores", fail)
    with pytest.raises(space.service.Refused, match="on our side") as refused:
        link(service)
    assert "secret" not in str(refused.value)


def test_a_reranker_ranks_all_mentions_of_a_caption_jointly(space, folders, tmp_path):
    register()
    toy_reranker(unit="context").save_pretrained(tmp_path / "reranker")
    ToyPairProcessor().save_pretrained(tmp_path / "reranker")
    both = {"model": str(folders / "model"), "reranker": str(tmp_path / "reranker")}
    service = space.service.Service({"small": both}, {"flags": str(folders / "model" / "kb")})
    results = link(service, mentions=["Georgia", "Jordan"])
    linker = EntityLinker.from_pretrained(both["model"], kb=folders / "model" / "kb", reranker=both["reranker"])
    rows = [{"text": TEXT, "mention": mention, "context_id": "x"} for mention in ("Georgia", "Jordan")]
    expected = linker(rows, top_k=5)
    assert [c.entity_id for r in results for c in r.candidates] == [
        c.entity_id for r in expected for c in r.candidates
    ]
    alone = linker(rows[:1], top_k=5)[0]
    assert [c.reranker_score for c in alone.candidates] != [c.reranker_score for c in results[0].candidates]
    assert (
        "reranker ranks it ahead"
        in Tags(space.render.results([{"result": r, "images": [None] * 5} for r in results], 0)).text
    )


def test_a_knowledge_base_is_offered_only_with_the_model_that_built_it(space, folders, service, session, tmp_path):
    model = toy_model()
    register()
    model.save_pretrained(tmp_path / "toy")
    ToyProcessor().save_pretrained(tmp_path / "toy")
    KnowledgeBase.build(toy_entities(), model, ToyProcessor(), output=tmp_path / "kb", progress=False)
    two = space.service.Service(
        {**service.models, "toy": str(tmp_path / "toy")}, {**service.kbs, "toys": str(tmp_path / "kb")}
    )
    assert [two.fitting_kbs(name) for name in ("small", "toy")] == [["flags"], ["toys"]]
    label, *_ = two.build_kb(
        "Mine", entities_csv(tmp_path / "x.csv", [["1", "Jo", "", ""]]), None, model="toy", session=session
    )
    assert [two.fitting_kbs(name, session) for name in ("small", "toy")] == [["flags"], ["toys", label]]
    with pytest.raises(space.service.Refused, match="works only with the model that built it"):
        link(two, kb="toys")
    with pytest.raises(space.service.Refused, match="No knowledge base here works"):
        link(two, kb=None)


# Images


def test_images_are_scaled_down_and_converted_to_rgb(space, tmp_path):
    Image.new("RGBA", (3000, 1500), (200, 0, 0, 255)).save(tmp_path / "large.png")
    image = space.service.read_image(tmp_path / "large.png")
    assert (image.mode, image.size) == ("RGB", (1024, 512))
    assert space.service.read_image(None) is None


@pytest.mark.parametrize("kind", ["svg", "html", "cut off", "bomb", "large file"])
def test_files_that_are_no_safe_image_are_refused(space, tmp_path, kind):
    path = tmp_path / "upload.png"
    if kind == "svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>')
    elif kind == "html":
        path.write_text("<html><script>alert(1)</script></html>")
    elif kind == "cut off":
        out = io.BytesIO()
        Image.effect_noise((200, 200), 50).save(out, "PNG")
        path.write_bytes(out.getvalue()[:500])
    elif kind == "bomb":
        Image.new("1", (30_000, 30_000)).save(path)  # 900 million pixels in about 100 kB
    else:
        path.write_bytes(b"\x89PNG" + bytes(9 << 20))
    with pytest.raises(space.service.Refused):
        space.service.read_image(path)


# Knowledge bases of visitors


def entities_csv(path: Path, rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["id", "name", "description", "image"], *rows])
    return path


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def png(colour="red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, "PNG")
    return out.getvalue()


def test_a_visitor_can_build_use_and_download_a_knowledge_base(service, session, tmp_path):
    table = entities_csv(tmp_path / "mine.csv", [["1", "Jo", "a cat", "jo.png"], ["2", "Al", "a dog", ""]])
    archive = zipped(tmp_path / "images.zip", {"jo.png": png(), "readme.txt": b"left out"})
    label, count, left_out = service.build_kb("Pets", table, archive, model="small", session=session)
    assert (label, count, left_out) == ("Pets (yours)", 2, [])
    (result,) = link(service, "Jo barks", ["Jo"], kb=label, session=session)
    assert {c.entity_id for c in result.candidates} == {"1", "2"}
    kb = KnowledgeBase.from_pretrained(session.kbs[label])
    assert [kb.image(row) is not None for row in (kb.row_of("1"), kb.row_of("2"))] == [True, False]
    with zipfile.ZipFile(service.download_kb(label, session)) as packed:
        assert "kb.json" in packed.namelist()
        packed.extractall(tmp_path / "again")
    assert len(KnowledgeBase.from_pretrained(tmp_path / "again")) == 2


def test_a_knowledge_base_belongs_to_one_visitor_and_is_deleted_with_the_session(space, service, session, tmp_path):
    table = entities_csv(tmp_path / "mine.csv", [["1", "Jo", "", ""]])
    label, *_ = service.build_kb("Secret", table, None, model="small", session=session)
    for stranger in (space.service.Session(), None):
        with pytest.raises(space.service.Refused, match="does not exist"):
            link(service, kb=label, session=stranger)
    folder = session.folder
    assert folder.exists()
    session.close()
    assert not folder.exists()
    with pytest.raises(space.service.Refused, match="does not exist"):
        link(service, kb=label, session=session)


def test_the_error_names_every_invalid_row(space, service, session, tmp_path):
    rows = [
        ["1", "Jo", "", ""],
        ["1", "Jo", "", ""],
        ["2", "", "", ""],
        ["3", "Al", "", "../x.png"],
        ["4", "Di", "", "x.png"],
    ]
    with pytest.raises(space.service.Refused) as refused:
        service.build_kb("x", entities_csv(tmp_path / "mine.csv", rows), None, model="small", session=session)
    words = str(refused.value)
    assert words.startswith("3 rows cannot be used")
    assert [f"Row {row}:" in words for row in (2, 3, 4, 5, 6)] == [False, True, True, True, False]
    assert str(session.folder) not in words
    assert not session.kbs


def test_missing_and_damaged_images_are_listed_and_their_entities_go_without_them(service, space, session, tmp_path):
    rows = [["1", "Jo", "", "gone.png"], ["2", "Al", "", "bad.png"], ["3", "Di", "", "di.png"]]
    table = entities_csv(tmp_path / "mine.csv", rows)
    archive = zipped(tmp_path / "images.zip", {"bad.png": png()[:40], "di.png": png()})
    for _ in range(2):  # the second time, the knowledge base exists
        label, count, left_out = service.build_kb("Pets", table, archive, model="small", session=session)
        assert count == 3
        assert left_out[0] == "Row 2: The image file gone.png does not exist."
        assert left_out[1].startswith("Row 3: bad.png: The ")
        assert len(left_out) == 2
    kb = KnowledgeBase.from_pretrained(session.kbs[label])
    assert [kb.image(row) is not None for row in range(3)] == [False, False, True]
    message, *_ = space.app.Handlers(service, []).build_own_kb("Pets", table, archive, "small", session)
    assert "missing or damaged: 2." in message


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "..\\out.png", "a/../../out.png"])
def test_a_zip_cannot_write_outside_its_folder(space, tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(space.service.Refused, match="leads out"):
        space.service.unpack_images(zipped(tmp_path / "x.zip", {name: png()}), inside)
    assert not list(tmp_path.rglob("out.png"))


def test_a_zip_that_is_invalid_too_large_or_contains_a_link_is_refused(space, tmp_path, monkeypatch):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as out:
        out.writestr(link, "/etc/hostname")
    (tmp_path / "no.zip").write_bytes(b"PK no zip")
    monkeypatch.setattr(space.service, "MAX_UNPACKED_BYTES", 100_000)
    zipped(tmp_path / "bomb.zip", {f"{k}.png": bytes(60_000) for k in range(2)})
    lying = (tmp_path / "bomb.zip").read_bytes().replace((60_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    (tmp_path / "lying.zip").write_bytes(lying)
    for name in ("link.zip", "no.zip", "bomb.zip", "lying.zip"):
        folder = tmp_path / name[:-4]
        folder.mkdir()
        with pytest.raises(space.service.Refused):
            space.service.unpack_images(tmp_path / name, folder)
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 200_000


# Batches


def test_a_batch_keeps_its_order_and_reports_invalid_rows(service, tmp_path):
    path = tmp_path / "mentions.csv"
    path.write_text("\ufefftext,mention\r\nGeorgia won,Georgia\r\nGeorgia won,Peru\r\nin Jordan,Jordan\r\n", "utf-8")
    rows = service.link_batch(path, model="small", kb="flags")
    assert [row["mention"] for row in rows] == ["Georgia", "Peru", "Jordan"]
    assert ["error" in row for row in rows] == [False, True, False]
    assert rows[2]["num_tied"] == link(service, "in Jordan", ["Jordan"])[0].num_tied
    assert rows[2]["entity_id"] == link(service, "in Jordan", ["Jordan"])[0].entity_id


def test_files_of_every_format_are_read(space, service, session, tmp_path):
    """The formats that the library reads, with names of columns in any case, and semicolons."""
    assert sorted(space.service.TABLE_SUFFIXES) == sorted(ROW_SUFFIXES)
    tables = {
        ".csv": "ID;Name\n1;Jo\n",
        ".tsv": "ID\tName\n1\tJo\n",
        ".json": '[{"ID": 1, "Name": "Jo"}]',
        ".jsonl": '{"ID": 1, "Name": "Jo"}\n',
        ".ndjson": '{"ID": 1, "Name": "Jo"}\n',
    }
    for suffix, content in tables.items():
        (tmp_path / f"mine{suffix}").write_text(content)
        assert service.build_kb(suffix, tmp_path / f"mine{suffix}", None, model="small", session=session)[1] == 1
        mentions = (
            content.replace("ID", "TEXT").replace("Name", "Mention").replace("1", '"Jo met."').replace("Jo", "Jo")
        )
        (tmp_path / f"mentions{suffix}").write_text(mentions)
        [row] = service.link_batch(tmp_path / f"mentions{suffix}", model="small", kb="flags")
        assert (row["text"], row["mention"]) == ("Jo met.", "Jo")


def test_results_are_written_as_csv_and_json(space, tmp_path):
    rows = [{"text": "=1+1", "mention": "@x", "entity_id": "Q1", "name": 'a "b", c', "score": 0.5}]
    as_csv, as_json = space.service.write_results(rows, tmp_path)
    assert json.loads(Path(as_json).read_text("utf-8")) == rows
    (read,) = csv.DictReader(io.StringIO(Path(as_csv).read_text("utf-8-sig")))
    assert read["name"] == 'a "b", c'
    assert read["text"] == "'=1+1"  # a spreadsheet would run it as a formula
    assert read["mention"] == "'@x"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,word\nx,y\n", "column “mention”"),
        ("a.csv", "", "no mentions"),
        ("a.jsonl", '{"text": "x"', "not JSON"),
        ("a.jsonl", '["x"]', "Row 1"),
        ("a.csv", "text,mention\n" + "a,a\n" * 501, "501 rows"),
        ("a.xlsx", "x", "json or .jsonl"),
        ("a.csv", b"\xff\xfe\x00", "UTF-8"),
        ("a.csv", 'text,mention\nx\nx,"x" y\n', "2 rows cannot be used:\nRow 2: .*\nRow 3: "),
    ],
)
def test_an_invalid_batch_file_is_refused(space, service, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(space.service.Refused, match=words):
        service.link_batch(path, model="small", kb="flags")


# HTML

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """Parses tags, attributes and text as a browser does."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def result(name="Ada", **changes) -> LinkResult:
    candidates = [
        Candidate(1, "Q7259", name, "d", "a", 2.0, {"text": 1.0, "vision": 3.0}),
        Candidate(2, "kb-1", "Bo", "", "", 1.0, {"text": 1.5, "vision": 0.5}),
    ]
    default = LinkResult("Ada", 0, 3, "Q7259", False, None, candidates)
    return replace(default, **changes)


def test_no_evidence_puts_one_of_two_tied_candidates_ahead(space):
    words = "3 entities have the best score. The first of them in the knowledge base was taken."
    first, second = result().candidates
    tied = result(candidates=[first, replace(first, entity_id="kb-1", name="Bo")], num_tied=3, warnings=[words])
    shown = Tags(space.render.results([{"result": tied, "images": [None, None]}], 0)).text
    assert "Ahead of" not in shown
    assert words in shown
    reranked = [replace(first, reranker_score=2.0), replace(second, rank=1, reranker_score=2.0)]
    shown = Tags(space.render.results([{"result": result(candidates=reranked), "images": [None, None]}], 0)).text
    assert "ahead" not in shown


def test_text_from_users_and_models_never_becomes_markup(space):
    render = space.render
    evil = result(EVIL, mention=EVIL, warnings=[EVIL])
    for candidate in evil.candidates:
        candidate.description = candidate.attributes = candidate.entity_id = EVIL
        candidate.unit_scores = {EVIL: 1.0, "text": 2.0 * candidate.rank}
    words = [(0, 8, 0.5), (8, len(EVIL), 0.5)]
    image = Image.new("RGB", (4, 4))
    html = render.results(
        [
            {
                "result": evil,
                "images": [image, None],
                "evidence": render.evidence(EVIL, Explanation(words, [[1.0]]), image, image, EVIL),
            }
        ],
        0.1,
    )
    html += render.comparison([(EVIL, evil, [image, None])]) + render.message(EVIL)
    seen = Tags(html)
    assert "script" not in seen.tags
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert seen.text.count("<script>alert(1)</script>") >= 8  # visible as text


def test_an_annotated_text_never_becomes_markup(space):
    evil = "<script>alert(1)</script>"
    first = replace(result("<b>"), mention="<b>x", start=len(evil), end=len(evil) + 4)
    page = space.render.annotated_text(f"{evil}<b>x", [{"result": first, "images": [None, None]}], 0.1)
    assert "<script" not in page
    assert "<b>x" not in page
    assert "&lt;b&gt;x</button>" in page
    assert "No name of the knowledge base" in space.render.annotated_text("x", [], 0.1)


def test_a_card_shows_how_the_units_contributed(space):
    seen = Tags(space.render.results([{"result": result(), "images": [None, None]}], 0.1))
    assert "Ahead of Bo mostly because of the image. Alone, the text would favour Bo." in seen.text
    assert "Text 1.000, Image 3.000" in seen.text
    html = space.render.results([{"result": result(), "images": [None, None]}], 0.1)
    assert html.count("https://www.wikidata.org/wiki/") == 1  # kb-1 is not a Wikidata id
    # Bars show the margin over the weakest candidate in every unit. Ada has 2.5 for vision, Bo 0.5 for text.
    assert [part.split("%")[0] for part in html.split("width:")[1:]] == ["100.0", "20.0"]


@pytest.mark.parametrize(
    ("certified", "bound", "words"),
    [
        (True, None, "Proven: every entity was scored."),
        (
            True,
            -1.25,
            "Proven: no entity that was not scored reaches more than -1.250, which is too low for this list.",
        ),
        (False, None, "Not proven: the index may have missed an entity that belongs here."),
    ],
)
def test_an_answer_says_what_is_proven(space, certified, bound, words):
    answer = space.render.results([{"result": result(certified=certified, bound=bound), "images": [None, None]}], 0.1)
    assert words in answer
    assert answer.count("roven: ") == 1


def test_nil_is_explained(space):
    html = space.render.results(
        [{"result": result(is_nil=True, entity_id="NIL", nil_threshold=5.0), "images": [None, None]}], 0.1
    )
    assert "NIL: not in this knowledge base. The best score, 2.000, is below the threshold 5.000." in Tags(html).text


# The app


@pytest.fixture(scope="module")
def demo(space, service, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        demo = space.app.build(service)
        space.app.launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield demo
        demo.close()


@pytest.fixture(scope="module")
def url(demo):
    return demo.local_url


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


def test_the_api_links(client, service, tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    answer = client.predict(TEXT, "Georgia", handle_file(str(tmp_path / "x.png")), top_k=3, api_name="/link")
    (expected,) = link(service, image=Image.new("RGB", (16, 16), "red"), top_k=3)
    assert [c["entity_id"] for c in answer["candidates"]] == [c.entity_id for c in expected.candidates]
    assert [c["score"] for c in answer["candidates"]] == pytest.approx(
        [c.score for c in expected.candidates], abs=1e-3
    )
    without = client.predict(TEXT, "Georgia", api_name="/link")
    assert without["warnings"]


def test_the_api_accepts_the_span_of_a_mention(client):
    text = "Georgia met Georgia"
    assert client.predict(text, "Georgia", start=12, api_name="/link")["start"] == 12
    with pytest.raises(AppError, match="does not start at character 3"):
        client.predict(text, "Georgia", start=3, api_name="/link")


def test_the_api_annotates_a_text(client, service):
    text = "Georgia <b>met</b> Jordan, and georgia slept."
    answer = client.predict(text, api_name="/annotate")
    assert [(m["start"], m["end"], m["mention"]) for m in answer["mentions"]] == [
        (0, 7, "Georgia"),
        (19, 25, "Jordan"),
    ]
    expected, _ = service.annotate(text, None, model="small", kb="flags")
    assert [m["entity_id"] for m in answer["mentions"]] == [m.entity_id for m in expected.mentions]
    with pytest.raises(AppError, match="at most 2,000 are allowed"):
        client.predict("x" * 2_001, api_name="/annotate")
    with pytest.raises(AppError, match="Paste a caption or a text first"):
        client.predict(" ", api_name="/annotate")


def test_the_api_takes_a_constraint(client):
    answer = client.predict("Georgia won.", "Georgia", where="name in ('Ghana', 'Togo')", api_name="/link")
    assert {candidate["name"] for candidate in answer["candidates"]} == {"Ghana", "Togo"}
    answer = client.predict("Georgia met Ghana.", where="name = 'Togo'", api_name="/annotate")
    assert [[c["name"] for c in mention["candidates"]] for mention in answer["mentions"]] == [["Togo"]] * 2
    for where, words in (("born < 1900", "no column 'born'"), ("x" * 501, "at most 500 characters")):
        with pytest.raises(AppError, match=words):
            client.predict("Georgia won.", where=where, api_name="/annotate")


def test_the_api_links_a_batch_and_only_three_endpoints_are_public(client, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"text": TEXT, "mention": "Jordan"}))
    (row,) = client.predict(handle_file(str(tmp_path / "m.jsonl")), api_name="/batch")
    assert row["mention"] == "Jordan"
    assert row["entity_id"]
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/link", "/annotate", "/batch"}


def test_an_error_has_a_message_and_the_next_request_succeeds(client):
    with pytest.raises(AppError, match="not in the caption"):
        client.predict(TEXT, "Peru", api_name="/link")
    assert client.predict(TEXT, "Georgia", api_name="/link")["entity_id"]


def test_a_path_that_was_not_uploaded_is_not_read(url, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"text": "secret", "mention": "secret"}))
    for path in (str(secret), "/etc/hostname", "../../../../etc/hostname"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "secret.jsonl"}
        event = requests.post(f"{url}gradio_api/call/batch", json={"data": [file]}, timeout=30)
        answer = event.text
        if event.ok:
            answer = requests.get(f"{url}gradio_api/call/batch/{event.json()['event_id']}", timeout=30).text
        assert "secret" not in answer.replace("secret.jsonl", "").replace(str(tmp_path), "")
        assert "complete" not in answer
    for path in (secret, SPACE / "app.py", "/etc/hostname"):
        assert not requests.get(f"{url}gradio_api/file={path}", timeout=30).ok


def test_every_request_of_the_soak_is_answered_as_by_the_library_or_refused(url, folders):
    """`make torture` sends them for half an hour and watches memory and open files."""
    visitor = Visitor(url)
    requests = soak_requests(folders / "model", folders / "model" / "kb")
    problems = [visitor.problem(request) for request in requests]
    assert [problem for problem in problems if problem] == []
    swapped = replace(requests[0], expected=[requests[0].expected[0][::-1]])
    assert "is not" in visitor.problem(swapped)
    assert "answered and not refused" in visitor.problem(replace(requests[0], refusal="x"))
    visitor.close()


def test_simultaneous_requests_are_all_served(client):
    answers, threads = [], []
    for k in range(12):
        text = f"Georgia {k}"
        job = threading.Thread(
            target=lambda text=text: answers.append(client.predict(text, "Georgia", api_name="/link"))
        )
        threads.append(job)
        job.start()
    for job in threads:
        job.join(60)
    assert len(answers) == 12
    assert all(answer["mention"] == "Georgia" for answer in answers)


def uploaded(url: str, path: Path) -> dict:
    with path.open("rb") as file:
        (place,) = requests.post(f"{url}gradio_api/upload", files={"files": file}, timeout=30).json()
    return {"path": place, "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def private_call(demo, url: str, name: str, data: list, visitor: str) -> str:
    """Calls a handler of the page like a browser and returns the server's answer."""
    number = next(key for key, fn in demo.fns.items() if getattr(fn.fn, "__name__", "") == name)
    body = {"data": data, "fn_index": number, "session_hash": visitor}
    assert requests.post(f"{url}gradio_api/queue/join", json=body, timeout=30).ok
    return requests.get(f"{url}gradio_api/queue/data?session_hash={visitor}", timeout=60).text


def test_uploads_of_a_visitor_are_private_and_deleted_later(space, service, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(space.app, "SESSION_SECONDS", 5)
    demo = space.app.build(service)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        table = uploaded(url, entities_csv(tmp_path / "mine.csv", [["1", "Jo", "", ""]]))
        answer = private_call(demo, url, "build_own_kb", ["Mine", table, None, "small", None], "first")
        assert "is ready, with 1 entities" in answer
        assert len(list(tmp_path.glob("mel-space-*"))) == 1
        question = ["Jo won", "Jo", "", None, "small", "Mine (yours)", 5, None, "", None]
        assert ">Jo<" in private_call(demo, url, "answer", question, "first").replace("</strong>", "<")
        assert "not in the list of choices" in private_call(demo, url, "answer", question, "second")
        for _ in range(100):
            if not list(tmp_path.glob("mel-space-*")):
                break
            time.sleep(0.2)
        assert not list(tmp_path.glob("mel-space-*"))
        assert "deleted after an hour" in private_call(demo, url, "answer", question, "first")
    finally:
        demo.close()


def test_the_app_itself_opens_uploads_only(space, tmp_path, monkeypatch):
    """Gradio already refuses other paths, but the app does not rely on it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    for name in ("secret.csv", "uploads/mine.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "uploads" / "link.csv").symlink_to(tmp_path / "secret.csv")
    for name in ("secret.csv", "uploads/../secret.csv", "uploads/link.csv", "uploads", "uploads/none.csv"):
        with pytest.raises(space.service.Refused, match="a path alone is not read"):
            space.app.uploaded_path({"path": str(tmp_path / name)})
    assert space.app.uploaded_path({"path": str(tmp_path / "uploads/mine.csv")}) == str(tmp_path / "uploads/mine.csv")
    assert space.app.uploaded_path(None) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("no.png", "not an image"), ("x.svg", "not an image"), ("x.html", "not an image"), ("bomb.png", "pixels")],
)
def test_an_upload_that_is_no_photo_is_refused_with_a_message(demo, url, tmp_path, name, words):
    (tmp_path / name).write_text("<svg><script>alert(1)</script></svg>")
    if name == "bomb.png":
        Image.new("1", (16_000, 10_000)).save(tmp_path / name)  # 160 million pixels, which Pillow accepts
    file = uploaded(url, tmp_path / name)
    question = [TEXT, "Georgia", "", file, "small", "flags", 5, None, "", None]
    assert words in private_call(demo, url, "answer", question, name)
    served = requests.get(f"{url}gradio_api/file={file['path']}", timeout=30)
    assert served.headers["Content-Type"].startswith("image/png") or (
        "attachment" in served.headers["Content-Disposition"]  # never displayed as a page of the app
    )


def test_requests_beyond_the_queue_limit_are_refused_with_a_message(space, service, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(space.app, "WAITING", 2)
    released, answers = threading.Event(), []
    slow = space.service.Service(service.models, service.kbs)
    link_now = slow.link
    demo = space.app.build(slow)  # links the first example before `link` is slowed down
    slow.link = lambda *args, **options: (released.wait(30), link_now(*args, **options))[1]
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        jobs = [client.submit(TEXT, "Georgia", api_name="/link") for _ in range(9)]
        while not any(job.done() for job in jobs):
            time.sleep(0.05)
        released.set()
        for job in jobs:
            try:
                answers.append(job.result(timeout=60)["mention"])
            except Exception as error:
                answers.append(str(error))
    finally:
        released.set()
        demo.close()
    assert set(answers) == {"Georgia", "Queue is full! Please try again."}
    assert answers.count("Georgia") >= 2


def test_the_snippet_of_the_guide_runs(url, tmp_path, monkeypatch):
    guide = SPACE.parents[1] / "docs" / "guides" / "space.md"
    code = re.search(r"```python\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), "red").save("photo.jpg")
    Path("mentions.csv").write_text(f'text,mention\n"{TEXT}",Georgia\n')
    namespace: dict = {}
    exec(compile(code.replace("http://127.0.0.1:7860", url), str(guide), "exec"), namespace)
    assert namespace["answer"]["entity_id"]
    assert [row["text"] for row in namespace["rows"]] == [TEXT]


def test_the_space_has_the_metadata_that_the_hub_requires():
    head = (SPACE / "README.md").read_text("utf-8").split("---")[1]
    assert f"sdk_version: {gradio.__version__}" in head
    assert "app_file: app.py" in head
    assert "hf_mel" in (SPACE / "requirements.txt").read_text("utf-8").split()
