"""Tests of the loopback Hub over plain HTTP: behaviour that the tests of publishing and loading rely on."""

from __future__ import annotations

import http.client
import json

import pytest

from tests.hub_server.server import Fault, HubServer

TOKEN = "hf_" + "t" * 34
CONTENT = bytes(range(256)) * 4


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path) as server:
        server.add_user("alice", TOKEN, orgs=["org"])
        server.store.create("model", "org/toy")
        files = {"a.txt": server.store.put(CONTENT), "big/w.safetensors": server.store.put(CONTENT) | {"lfs": True}}
        server.store.commit("model", "org/toy", "main", "files", files, [])
        yield server


def ask(hub, method: str, path: str, body: bytes | None = None, token: str | None = TOKEN, **headers: str):
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


@pytest.mark.parametrize(
    ("requested", "first", "last"),
    [("0-9", 0, 9), ("1000-", 1000, 1023), ("-7", 1017, 1023), ("5-999999", 5, 1023)],
)
def test_a_range_request_returns_those_bytes(hub, requested, first, last):
    status, headers, body = ask(hub, "GET", "/org/toy/resolve/main/a.txt", Range=f"bytes={requested}")
    assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/1024")
    assert body == CONTENT[first : last + 1]


def test_a_range_beyond_the_end_is_refused(hub):
    assert ask(hub, "GET", "/org/toy/resolve/main/a.txt", Range="bytes=1024-")[0] == 416


def test_large_files_are_on_another_host_and_need_a_signature(hub):
    status, headers, _ = ask(hub, "HEAD", "/org/toy/resolve/main/big/w.safetensors")
    assert status == 302
    assert headers["X-Repo-Commit"] == hub.head("model", "org/toy")
    assert headers["X-Linked-Size"] == "1024"
    host, path = headers["Location"].removeprefix("http://").split("/", 1)
    assert host.startswith("localhost:")
    assert ask(hub, "GET", f"/{path}", token=None)[2] == CONTENT
    assert ask(hub, "GET", f"/{path.split('?')[0]}", token=None)[0] == 403


def test_refusals_have_the_status_and_code_of_the_real_hub(hub):
    hub.store.create("dataset", "org/closed", private=True)
    hub.store.create("dataset", "org/gated", gated="manual")
    hub.add_user("bob", "hf_" + "b" * 34)
    bob = "hf_" + "b" * 34
    for method, path, token, status, code in (
        ("GET", "/api/datasets/org/closed", None, 401, "RepoNotFound"),
        ("GET", "/api/datasets/org/closed", bob, 404, "RepoNotFound"),
        ("GET", "/api/datasets/org/closed", TOKEN, 200, None),
        ("GET", "/api/datasets/org/none", TOKEN, 404, "RepoNotFound"),
        ("GET", "/api/models/org/toy/revision/v9", TOKEN, 404, "RevisionNotFound"),
        ("HEAD", "/org/toy/resolve/main/none.txt", TOKEN, 404, "EntryNotFound"),
        ("GET", "/datasets/org/gated/resolve/main/.gitattributes", None, 401, "GatedRepo"),
        ("GET", "/datasets/org/gated/resolve/main/.gitattributes", bob, 403, "GatedRepo"),
        ("GET", "/api/whoami-v2", "hf_wrong", 401, None),
        ("POST", "/api/models/org/toy/commit/main", bob, 403, None),
    ):
        answer, headers, _ = ask(hub, method, path, b"" if method == "POST" else None, token=token)
        assert (answer, headers.get("X-Error-Code")) == (status, code), path


def test_invalid_creations_and_commits_change_nothing(hub):
    payload = json.dumps({"name": "toy", "organization": "org", "type": "model"}).encode()
    assert ask(hub, "POST", "/api/repos/create", payload)[0] == 409
    lines = [
        {"key": "header", "value": {"summary": "late", "parentCommit": "0" * 40}},
        {"key": "file", "value": {"path": "b.txt", "content": "eA==", "encoding": "base64"}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    before = hub.head("model", "org/toy")
    assert ask(hub, "POST", "/api/models/org/toy/commit/main", body)[0] == 412
    assert hub.head("model", "org/toy") == before
    missing = {"key": "lfsFile", "value": {"path": "c.bin", "oid": "0" * 64, "size": 1, "algo": "sha256"}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, missing])).encode()
    assert ask(hub, "POST", "/api/models/org/toy/commit/main", body)[0] == 400
    assert hub.head("model", "org/toy") == before


def test_old_revisions_stay_available(hub):
    old = hub.head("model", "org/toy")
    hub.store.commit("model", "org/toy", "main", "new", {"a.txt": hub.store.put(b"new")}, ["big/w.safetensors"])
    assert ask(hub, "GET", "/org/toy/resolve/main/a.txt")[2] == b"new"
    assert ask(hub, "GET", f"/org/toy/resolve/{old}/a.txt")[2] == CONTENT
    paths = [
        entry["path"] for entry in json.loads(ask(hub, "GET", f"/api/models/org/toy/tree/{old}?recursive=true")[2])
    ]
    assert paths == [".gitattributes", "a.txt", "big", "big/w.safetensors"]


@pytest.mark.parametrize("kind", ["cut", "lost", "half"])
def test_a_fault_breaks_only_the_matching_request(hub, kind):
    hub.faults.append(Fault(kind, at=2, pattern="resolve"))
    path = "/org/toy/resolve/main/a.txt"
    assert ask(hub, "GET", path)[2] == CONTENT
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(hub, "GET", path)
    assert ask(hub, "GET", path)[2] == CONTENT
