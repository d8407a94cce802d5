"""Tests of loading by Hub id: revisions, offline mode, moved caches, private repositories and failures."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest

from hf_mel.hub.publish.kb_repo import kb_publication
from hf_mel.kb.knowledge_base import KnowledgeBase
from tests.hub.conftest import TOKEN
from tests.hub_server.server import Fault, HubServer
from tests.toy import ToyProcessor, toy_entities, toy_model


@pytest.fixture(scope="module")
def kb_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kb") / "toy"
    KnowledgeBase.build(toy_entities(12), toy_model(), ToyProcessor(), output=folder, progress=False)
    return folder


def upload(hub: HubServer, folder, repo: str = "org/kb", **settings) -> str:
    if hub.head("dataset", repo) is None:
        hub.store.create("dataset", repo, **settings)
    added = {
        path.name: hub.store.put(path.read_bytes()) | {"lfs": path.suffix != ".json"} for path in folder.iterdir()
    }
    return hub.store.commit("dataset", repo, "main", "a knowledge base", added, [])


@pytest.fixture
def kb_runner(client):
    runner = client.runner("kb")
    yield runner
    runner.close()


def ids(done) -> list[str]:
    assert done.returncode == 0, done.output
    return json.loads(done.output.splitlines()[-1])


def test_a_knowledge_base_loads_by_name_with_revisions_and_is_read_only(hub, client, kb_folder, tmp_path):
    first = upload(hub, kb_folder)
    smaller = KnowledgeBase.from_pretrained(shutil.copytree(kb_folder, tmp_path / "changed"))
    smaller.remove(["Q3"])
    upload(hub, smaller.path)
    hub.store.commit("dataset", "org/kb", "main", "junk", {"../evil.parquet": hub.store.put(b"x")}, [])
    hub.store.commit("dataset", "org/kb", "main", "no junk", {"notes.txt": hub.store.put(b"x")}, ["../evil.parquet"])
    code = f"""
import json, os
from hf_mel import KnowledgeBase
from hf_mel.errors import HubError, KnowledgeBaseError

def error(kind, **options):
    try:
        KnowledgeBase.from_pretrained(**options)
    except kind as caught:
        return str(caught)

kb = KnowledgeBase.from_pretrained("org/kb")
old = KnowledgeBase.from_pretrained("org/kb", revision="{first}", verify=True)
report = {{"new": len(kb), "old": old.entity_ids, "same": old.rows([2]) == old.rows([old.row_of("Q3")])}}
def mapped():
    file = os.path.realpath(kb.path / "encodings-00000.safetensors")
    assert "/blobs/" in file
    return file in open("/proc/self/maps").read()
report["mapped"] = mapped()
report["notes"] = (kb.path / "notes.txt").exists()
try:
    kb.remove(["Q1"])
except KnowledgeBaseError as caught:
    report["remove"] = str(caught)
copy = kb.save("copy")
copy.remove(["Q1"])
report["copy"] = len(copy)
report["revision"] = error(HubError, name="org/kb", revision="v9")
report["missing"] = error(HubError, name="org/kbb")
report["folder"] = error(KnowledgeBaseError, name="./nothing/here")
report["cached"] = len(KnowledgeBase.from_pretrained("org/kb", local_files_only=True))
report["not cached"] = error(HubError, name="org/other", local_files_only=True)
print(json.dumps(report))
"""
    report = json.loads(client.python(code).stdout.splitlines()[-1])
    assert report["new"] == 11
    assert report["old"] == [f"Q{i + 1}" for i in range(12)]
    assert report["mapped"], "encodings are mapped from the cache, not read"
    assert report["notes"] is False, "only the files of the knowledge base are downloaded"
    assert "kb.save(FOLDER)" in report["remove"]
    assert report["copy"] == 10
    assert "has no revision 'v9'" in report["revision"]
    assert "does not exist, or is private" in report["missing"]
    assert "is not an existing folder" in report["folder"]
    assert report["cached"] == 11
    assert "not completely in the cache" in report["not cached"]
    assert "HF_HOME" in report["not cached"]


def test_loading_offline_from_a_moved_cache_and_from_private_and_gated_repositories(
    hub, client, new_client, kb_folder, tmp_path
):
    upload(hub, kb_folder)
    upload(hub, kb_folder, "org/private", private=True)
    upload(hub, kb_folder, "org/gated", gated="manual")
    online = client.runner("kb")
    assert len(ids(online.run("open_kb", "org/kb"))) == 12
    assert len(ids(online.run("open_kb", "org/private"))) == 12
    online.close()

    anonymous = new_client("nobody", None).runner("kb")
    for repo, words in (("org/private", "private and your token"), ("org/gated", "is gated")):
        done = anonymous.run("open_kb", repo)
        assert done.returncode == 1
        assert words in done.output
    anonymous.close()

    client.environment["HF_HUB_OFFLINE"] = "1"
    offline = client.runner("kb")
    hub.log.clear()
    assert len(ids(offline.run("open_kb", "org/kb"))) == 12
    moved = client.home / "moved"
    shutil.copytree(client.home / "hub", moved, symlinks=True)
    assert len(ids(offline.run("open_kb", "org/kb", cache=moved))) == 12
    uncached = offline.run("open_kb", "org/kb", cache=client.home / "elsewhere")
    assert uncached.returncode == 1
    assert "HF_HUB_CACHE" in uncached.output
    # A file missing from the cache is an error.
    blob = max((moved / "datasets--org--kb/blobs").iterdir(), key=lambda path: path.stat().st_size)
    blob.unlink()
    broken = offline.run("open_kb", "org/kb", cache=moved)
    assert broken.returncode == 1
    assert "Error" in broken.output.split()[0]
    offline.close()
    assert not hub.log


def test_a_download_interrupted_at_any_request_fails_or_completes_and_the_next_one_completes(
    hub, kb_runner, kb_folder
):
    upload(hub, kb_folder)
    home = kb_runner.folder
    hub.log.clear()
    expected = ids(kb_runner.run("open_kb", "org/kb", cache=home / "count"))
    count = len(hub.log)
    assert count >= 6
    cases = []
    for kind in ("cut", "half"):
        for at in range(1, count + 1):
            user, token = f"{kind}{at}", f"hf_{kind}{at:030d}"
            hub.add_user(user, token)
            hub.faults.append(Fault(kind, at=at, pattern=rf"user={user}\b"))
            cases.append((user, token))
    started = [kb_runner.start("open_kb", "org/kb", token=token, cache=home / user) for user, token in cases]
    failed = 0
    for output in started:
        done = kb_runner.result(output)
        if done.returncode:
            failed += 1
            assert done.output.split()[-1], done.output
            assert "HubError" in done.output
        else:
            assert ids(done) == expected
    assert failed >= 2
    assert [fault for fault in hub.faults if fault.seen < fault.at] == [], [
        (r.user, r.method, r.path) for r in hub.log
    ]
    hub.faults.clear()
    started = [kb_runner.start("open_kb", "org/kb", token=token, cache=home / user) for user, token in cases]
    assert all(ids(kb_runner.result(output)) == expected for output in started)


def test_a_published_knowledge_base_omits_removed_entities(kb_folder, tmp_path):
    kb = KnowledgeBase.from_pretrained(shutil.copytree(kb_folder, tmp_path / "changed"))
    kb.remove(["Q3"])
    publication = kb_publication(kb.path, "org/kb", work=tmp_path)
    assert "1 removed entities are left out" in " ".join(publication.notes)
    for name, content in publication.files.items():
        (tmp_path / "up").mkdir(exist_ok=True)
        (tmp_path / "up" / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    stored = [pq.read_table(path)["entity_id"].to_pylist() for path in (tmp_path / "up").glob("entities-*.parquet")]
    assert stored == [kb.entity_ids], "a removed entity is uploaded"
    copy = KnowledgeBase.from_pretrained(tmp_path / "up", verify=True)
    assert copy.entity_ids == kb.entity_ids
    assert TOKEN.encode() not in publication.files["README.md"]


def test_a_model_that_cannot_be_loaded_by_name_gives_the_reason(hub, client, new_client, tmp_path):
    from hf_mel.hub.saving import save_model_repository
    from tests.toy import toy_model

    save_model_repository(toy_model(), ToyProcessor(), tmp_path / "model")
    hub.store.create("model", "org/toy", private=True)
    added = {
        path.name: hub.store.put(path.read_bytes()) | {"lfs": path.suffix == ".safetensors"}
        for path in (tmp_path / "model").iterdir()
    }
    hub.store.commit("model", "org/toy", "main", "a model", added, [])
    code = """
import json
from hf_mel.errors import UnknownModelError
from hf_mel.inference.checkpoints import load_retriever

def why(name, **options):
    try:
        load_retriever(name, device="cpu", **options)
    except UnknownModelError as error:
        return str(error)

print(json.dumps([why("org/toy", revision="v9"), why("org/toy"), why("org/toy", local_files_only=True),
                  why("org/toy", trust_remote_code=True), why("org/toy", local_files_only=True)]))
"""
    revision, code_refused, _, trusted, _ = json.loads(client.python(code).stdout.splitlines()[-1])
    assert "has no revision 'v9'" in revision
    assert "trust_remote_code" in code_refused
    assert trusted is None
    anonymous = new_client("nobody", None).python(code)
    private = json.loads(anonymous.stdout.splitlines()[-1])
    assert all("private and your token" in error or "not completely in the cache" in error for error in private)
