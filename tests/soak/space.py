"""The Space under mixed load: links with and without a photo and a filter, whole texts, files of mentions, and bad requests.

Every answer must be that of the library for the same model and knowledge base, and every bad request must be refused with its reason.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from benchmarks.space_load import EXAMPLES, wait_for_server
from hf_mel.linking.linker import EntityLinker
from tests.soak.watching import Watch
from tests.spaces.small_model import small_model

Ranked = list[tuple[str, float]]
_FILTERS = ("name in ('Ghana', 'Togo', 'Mali')", "name = 'Ghana'")


@dataclass(frozen=True)
class Request:
    """A request to the Space, and the right answer.

    Args:
        endpoint (`str`): Name of the endpoint.
        values (`dict`): Its parameters by name; others have their defaults.
        upload (`tuple[str, bytes]`, *optional*): Name and content of a file that is uploaded first, and its parameter's name is
            "image" or "file".
        expected (`list[list[tuple[str, float]]]`): Ids and scores of the candidates of every mention.
        refusal (`str`, *optional*): Words of the message with which a bad request must be refused.
    """

    endpoint: str
    values: dict[str, Any]
    upload: tuple[str, bytes] | None = None
    expected: list[Ranked] = field(default_factory=list)
    refusal: str | None = None

    @property
    def kind(self) -> str:
        """The kind of request, for counting."""
        what = self.endpoint + (" with a filter" if self.values.get("where") else "")
        what += " with a file" if self.upload else ""
        return f"{what}, bad" if self.refusal else what


def requests(model: str | os.PathLike[str], kb: str | os.PathLike[str]) -> list[Request]:
    """Returns requests of all kinds. The library computes the answers."""
    linker = EntityLinker.from_pretrained(model, kb=kb)
    filtered = {where: EntityLinker.from_pretrained(model, kb=kb, where=where) for where in _FILTERS}
    examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    made, rows = [], []
    for number, example in enumerate(examples):
        text, mention, photo = example["text"], example["mentions"][0], EXAMPLES / example["image"]
        question, upload = {"text": text, "mention": mention}, (photo.name, photo.read_bytes())
        where = _FILTERS[number % len(_FILTERS)]
        rows.append(question)
        seen = {**question, "image": str(photo)}
        made += [
            Request("link", question, expected=[_ranked(linker(question, top_k=5))]),
            Request("link", question, upload, [_ranked(linker(seen, top_k=5))]),
            Request("link", {**question, "where": where}, upload, [_ranked(filtered[where](seen, top_k=5))]),
        ]
    text = "Georgia drew with Ghana on Saturday. In the other match, Ireland lost to Italy."
    photo = EXAMPLES / examples[0]["image"]
    annotated = linker.annotate(text, image=str(photo), top_k=5).mentions
    some = filtered[_FILTERS[0]].annotate(text, top_k=5).mentions
    file = "\n".join(json.dumps(row) for row in rows).encode()
    made += [
        Request(
            "annotate",
            {"text": text},
            (photo.name, photo.read_bytes()),
            [_ranked(mention.link) for mention in annotated],
        ),
        Request(
            "annotate", {"text": text, "where": _FILTERS[0]}, expected=[_ranked(mention.link) for mention in some]
        ),
        Request("batch", {}, ("mentions.jsonl", file), [_ranked(result) for result in linker(rows, top_k=3)]),
    ]
    return made + _bad_requests({"text": "Georgia won.", "mention": "Georgia"})


def _bad_requests(question: dict[str, Any]) -> list[Request]:
    large, noise = io.BytesIO(), io.BytesIO()
    Image.new("1", (16_000, 10_000)).save(large, "PNG")  # 160 million pixels
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    return [
        Request("link", question, ("cut.png", noise.getvalue()[:500]), refusal="image"),
        Request("link", question, ("no.png", b"<svg><script>alert(1)</script></svg>"), refusal="not an image"),
        Request("link", question, ("bomb.png", large.getvalue()), refusal="pixels"),
        Request("link", {**question, "mention": "Peru"}, refusal="not in the caption"),
        Request("link", {**question, "top_k": 500}, refusal="between 1 and 20"),
        Request("link", {**question, "where": "born < 1900"}, refusal="no column 'born'"),
        Request("link", {**question, "where": "name = 'Nobody'"}, refusal=""),
        Request("annotate", {"text": "x" * 2001}, refusal="at most 2,000"),
        Request("batch", {}, ("mentions.csv", b"text,word\nx,y\n"), refusal="column “mention”"),
        Request("batch", {}, ("mentions.csv", b"\xff\xfe\x00"), refusal="UTF-8"),
    ]


def _ranked(result: Any) -> Ranked:
    return [(candidate.entity_id, candidate.score) for candidate in result.candidates]


class Visitor:
    """A client of the Space.

    Args:
        url (`str`): Address of the Space.
    """

    def __init__(self, url: str):
        # The server closes idle connections after five seconds; on a busy machine, a request may come at this moment.
        limits = httpx.Limits(keepalive_expiry=1)
        self.client = httpx.Client(base_url=f"{url.rstrip('/')}/gradio_api", timeout=120, limits=limits)
        endpoints = self.client.get("/info").raise_for_status().json()["named_endpoints"]
        self.parameters = {name: endpoint["parameters"] for name, endpoint in endpoints.items()}

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    def problem(self, request: Request) -> str | None:
        """Sends a request. Returns what is wrong with the answer, or `None`."""
        values = dict(request.values)
        if request.upload is not None:
            files = self.client.post("/upload", files={"files": request.upload}).raise_for_status().json()
            values["file" if request.endpoint == "batch" else "image"] = {
                "path": files[0],
                "meta": {"_type": "gradio.FileData"},
            }
        data = [
            values.get(parameter["parameter_name"], parameter.get("parameter_default"))
            for parameter in self.parameters[f"/{request.endpoint}"]
        ]
        response = self.client.post(f"/call/{request.endpoint}", json={"data": data}).raise_for_status()
        events = self.client.get(f"/call/{request.endpoint}/{response.json()['event_id']}").raise_for_status().text
        if "event: complete" not in events:
            words = json.dumps(request.refusal, ensure_ascii=True)[1:-1]
            is_right = request.refusal is not None and (words in events or request.refusal in events)
            return None if is_right else f"{request.kind}: {events[-300:]}"
        if request.refusal is not None:
            return f"{request.kind}: answered and not refused ({request.refusal})"
        answer = json.loads(events.split("event: complete\ndata: ")[1].split("\n")[0])[0]
        parts = {"link": lambda: [answer], "annotate": lambda: answer["mentions"], "batch": lambda: answer}
        ranked = [
            [(candidate["entity_id"], candidate["score"]) for candidate in part["candidates"]]
            for part in parts[request.endpoint]()
        ]
        return None if _equal(ranked, request.expected) else f"{request.kind}: {ranked} is not {request.expected}"


def _equal(answers: list[Ranked], expected: list[Ranked]) -> bool:
    """Whether ids are equal and scores nearly: the Space links alone what the library links in a batch."""
    return len(answers) == len(expected) and all(
        [entity for entity, _ in ranked] == [entity for entity, _ in right]
        and all(abs(score - other) < 1e-3 for (_, score), (_, other) in zip(ranked, right, strict=True))
        for ranked, right in zip(answers, expected, strict=True)
    )


def soak_space(
    minutes: float, clients: int = 16, pause: float = 0, model: Path | None = None, kb: Path | None = None
) -> dict[str, Any]:
    """Starts the Space as `hf-mel space` does, and sends it requests of all kinds.

    Args:
        minutes (`float`): The time.
        clients (`int`): Number of visitors at the same time.
        pause (`float`): Seconds between two requests of a visitor.
        model, kb (`Path`, *optional*): Run folder of a retriever, and a knowledge base of flags that it built. Default: a small
            untrained one.

    Returns:
        `dict`: Counts, memory and open files of the server over time, wrong answers, and what grew.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None or kb is None:
            model, kb = small_model(folder / "model"), folder / "model" / "kb"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (folder / "uploads").mkdir()
        command = ["space", str(model), str(kb), "--port", str(port)]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(
                [sys.executable, "-c", "from hf_mel.cli import main; main()", *command],
                env=os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "GRADIO_ANALYTICS_ENABLED": "False"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            if not wait_for_server(url, server):
                raise RuntimeError(f"The Space did not start:\n{(folder / 'log').read_text()[-2000:]}")
            return _load(url, server, requests(model, kb), minutes, clients, pause)
        finally:
            server.terminate()
            server.wait(30)


def _load(
    url: str, server: subprocess.Popen, asked: list[Request], minutes: float, clients: int, pause: float
) -> dict[str, Any]:
    end, counts = time.monotonic() + 60 * minutes, Counter[str]()
    problems: list[str] = []

    def work(number: int) -> None:
        visitor, turn = Visitor(url), number * 7
        while time.monotonic() < end and len(problems) < 5:
            request, turn = asked[turn % len(asked)], turn + 1
            try:
                problem = visitor.problem(request)
            except Exception as error:
                problem = f"{request.kind}: {type(error).__name__}: {error}"
            if problem:
                problems.append(problem)
            counts[request.kind] += 1
            time.sleep(pause)
        visitor.close()

    watch = Watch(server.pid)
    _run(work, clients, watch)
    return {
        "minutes": minutes, "requests": sum(counts.values()), "kinds": dict(sorted(counts.items())),
        "wrong": problems[:5], "grown": watch.growth(), **watch.summary(),
    }  # fmt: skip


def _run(work: Callable[[int], None], clients: int, watch: Watch) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    watch.look()
    while any(thread.is_alive() for thread in threads):
        time.sleep(5)
        watch.look()
