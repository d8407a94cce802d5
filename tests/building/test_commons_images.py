from __future__ import annotations

import io
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_mel.building.build import build_dataset
from hf_mel.building.checks import check_dataset
from hf_mel.building.commons_images import add_images, plain_text
from hf_mel.cli.data import app
from hf_mel.data.loading import load_entities
from hf_mel.errors import DataFormatError, MelError
from tests.dataset_scripts import wikidata_release as release


def picture(colour: str) -> bytes:
    Image.new("RGB", (8, 6), colour).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


class Commons(ThreadingHTTPServer):
    """Wikimedia Commons on loopback: the questions and files that fetching uses. `faults` are answered first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {"Ada Orme.png": picture("red"), "Bo.png": picture("blue"), "Film.webm": b"no image"}
        self.renamed = {"Old name.png": "Bo.png"}
        self.log: list[tuple[float, str, str]] = []  # time, path, user agent
        self.faults: list[tuple[str, int, dict[str, str], bytes]] = []  # start of a path, status, headers, body
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Commons
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.log.append((time.monotonic(), self.path, self.headers["User-Agent"]))
        for fault in self.server.faults:
            if self.path.startswith(fault[0]):
                self.server.faults.remove(fault)
                self.answer(fault[1], fault[3], fault[2])
                return
        parts = urlsplit(self.path)
        if parts.path == "/w/api.php":
            self.answer(200, json.dumps(self.described(parse_qs(parts.query))).encode())
        else:
            data = self.server.files.get(unquote(parts.path.removeprefix("/thumb/500/")))
            self.answer(404 if data is None else 200, data or b"")

    def described(self, query: dict[str, list[str]]) -> dict:
        titles = [title.removeprefix("File:") for title in query["titles"][0].split("|")]
        assert len(titles) <= 50
        assert query["maxlag"] == ["5"]
        redirects = [
            {"from": f"File:{old}", "to": f"File:{new}"} for old, new in self.server.renamed.items() if old in titles
        ]
        pages = []
        for name in dict.fromkeys(self.server.renamed.get(title, title) for title in titles):
            page: dict = {"title": f"File:{name}"}
            if name in self.server.files or name == "Gone.png":
                url = f"{self.server.url}/thumb/{query['iiurlwidth'][0]}/{quote(name)}"
                metadata = {
                    "LicenseShortName": {"value": "CC BY-SA 4.0"},
                    "LicenseUrl": {"value": "https://creativecommons.org/licenses/by-sa/4.0"},
                    "Artist": {"value": f"<a href='x'>Lund &amp; {name}</a>"},
                }
                page["imageinfo"] = [{"thumburl": url, "descriptionurl": f"page of {name}", "extmetadata": metadata}]
            else:
                page["missing"] = True
            pages.append(page)
        return {"query": {"redirects": redirects, "pages": pages}}

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def commons():
    server = Commons()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dataset(tmp_path, built) -> Path:
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Six entities; two name the same file."""
    folder = tmp_path_factory.mktemp("built")
    names = ["Ada Orme.png", "Old name.png", "", "Ada Orme.png", "No|where.png", "Film.webm"]
    lines = [
        release.item(n, release.terms(en=f"Name {n}"), **({"P18": [release.text_value(name)]} if name else {}))
        for n, name in enumerate(names, 1)
    ]
    raw = folder / "dump.json"
    raw.write_text("\n".join(map(json.dumps, lines)))
    build_dataset("wikidata", raw_dir=raw, output=folder / "data")
    return folder


def fetch(dataset: Path, commons: Commons, **options):
    return add_images(dataset, url=commons.url, rate=100, backoff=0.01, progress=False, **options)


def paths(commons: Commons) -> list[str]:
    return [path.partition("?")[0] for _, path, _ in commons.log]


def test_images_are_stored_with_their_licence_and_author(dataset, commons):
    before = load_entities(dataset).remove_columns("images")[:]
    report = fetch(dataset, commons, contact="ada@example.org")
    rows = load_entities(dataset)
    assert {key: rows.remove_columns("images")[:][key] for key in before} == before
    colours = [[image.getpixel((0, 0)) for image in row["images"]] for row in rows]
    assert colours == [[(255, 0, 0)], [(0, 0, 255)], [], [(255, 0, 0)], [], []]
    assert rows["image_license"] == ["CC BY-SA 4.0", "CC BY-SA 4.0", "", "CC BY-SA 4.0", "", ""]
    assert rows["image_author"][:2] == ["Lund & Ada Orme.png", "Lund & Bo.png"]
    assert rows["image_page"][1] == "page of Bo.png"
    assert (report.num_wanted, report.num_fetched, report.num_kept, report.num_entities) == (4, 2, 0, 3)
    assert list(report.absent) == ["No|where.png", "Film.webm"]
    assert "no such file" in report.absent["No|where.png"]
    assert report.failed == {}
    assert {agent for _, _, agent in commons.log} == {"hf_mel/0.1.0 (https://huggingface.co/hf-mel; ada@example.org)"}
    saved = json.loads((dataset / "report.json").read_text())
    assert saved["images"] == {"entities": {"kb": {"images": 3, "rows_without": 3}}}
    assert saved["problems"]["missing_image"]["count"] == 2
    checked = check_dataset(dataset)
    assert checked.problems == {}


def test_nothing_is_fetched_twice_also_after_a_new_build(dataset, commons):
    fetch(dataset, commons)
    first = {path.name: path.read_bytes() for path in dataset.rglob("*") if path.is_file()}
    commons.log.clear()
    report = fetch(dataset, commons)
    assert commons.log == []
    assert (report.num_fetched, report.num_kept) == (0, 2)
    assert {path.name: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == first
    build_dataset("wikidata", raw_dir=dataset.parent / "dump.json", output=dataset)
    assert not any(load_entities(dataset)["images"])
    fetch(dataset, commons)
    assert commons.log == []
    assert {path.name: path.read_bytes() for path in dataset.rglob("*") if path.is_file()} == first


def test_refusals_are_waited_for_and_repeated(dataset, commons):
    lag = json.dumps({"error": {"code": "maxlag", "info": "Waiting for a database"}}).encode()
    commons.faults = [
        ("/w/api.php", 503, {"Retry-After": "0"}, b""),
        ("/w/api.php", 200, {"Retry-After": "0"}, lag),
        ("/thumb/500/Ada", 429, {"Retry-After": "1"}, b""),
        ("/thumb/500/Bo", 500, {}, b""),
    ]
    report = fetch(dataset, commons)
    assert report.num_entities == 3
    assert commons.faults == []
    ada = [moment for moment, path, _ in commons.log if path.startswith("/thumb/500/Ada")]
    assert ada[1] - ada[0] >= 0.9  # as long as the server said


def test_a_file_that_fails_is_asked_for_again_by_the_next_call(dataset, commons):
    commons.faults = [("/thumb/500/Bo", 403, {}, b"")]
    report = fetch(dataset, commons)
    assert list(report.failed) == ["Old name.png"]
    assert report.num_entities == 2
    assert fetch(dataset, commons).num_entities == 3


def test_a_server_that_is_gone_is_an_error_and_images_are_kept(dataset, commons):
    commons.faults = [("/thumb/500/Bo", 500, {}, b"")] * 5 + [("/thumb/500/Film", 500, {}, b"")] * 5
    report = fetch(dataset, commons)
    assert set(report.failed) == {"Old name.png", "Film.webm"}
    commons.shutdown()
    commons.server_close()
    with pytest.raises(MelError, match="cannot be reached"):
        fetch(dataset, commons, images=dataset.parent / "other")
    assert load_entities(dataset)["image_license"][0] == "CC BY-SA 4.0"


def test_a_line_that_was_cut_off_is_fetched_again(dataset, commons):
    fetch(dataset, commons)
    log = dataset.parent / "data-images" / "images.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    commons.log.clear()
    fetch(dataset, commons)
    assert len(commons.log) == 2
    commons.log.clear()
    fetch(dataset, commons)
    assert commons.log == []


def test_requests_keep_the_rate(dataset, commons):
    add_images(dataset, url=commons.url, rate=5, progress=False)
    moments = [moment for moment, _, _ in commons.log]
    assert all(later - earlier >= 0.19 for earlier, later in pairwise(moments))


def test_what_cannot_be_done_is_said(dataset, commons, tmp_path):
    with pytest.raises(MelError, match="Wikimedia has no images 300 pixels wide"):
        fetch(dataset, commons, width=300)
    with pytest.raises(MelError, match="out of range"):
        add_images(dataset, rate=0)
    with pytest.raises(DataFormatError, match="no data set that hf-mel data build has written"):
        fetch(tmp_path, commons)
    build_dataset("flags_mel", output=tmp_path / "flags")
    with pytest.raises(DataFormatError, match="no column image_file"):
        fetch(tmp_path / "flags", commons)
    assert commons.log == []


def test_the_command_line(dataset, commons):
    arguments = ["images", str(dataset), "--url", commons.url, "--rate", "100"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "3 entities of" in done.output
    assert "No|where.png: Wikimedia Commons has no such file." in done.output
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["num_kept"] == 2


def test_authors_are_plain_text():
    markup = '<div><span style="display: none;">Creator</span><a href="x">Ada&nbsp;Orme</a>\n <i>(painter)</i></div>'
    assert plain_text(markup) == "Ada Orme (painter)"
