"""Loading knowledge bases and models by Hub id: revisions, offline mode, moved caches, private repositories, failures."""

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


def put_up(hub: HubServer, folder, repo: str = "org/kb", **settings) -> str:
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


def test_a_knowledge_base_by_name_with_revisions_offline_and_read_only(hub, client, kb_folder, tmp_path):
    first = put_up(hub, kb_folder)
    smaller = KnowledgeBase.from_pretrained(shutil.copytree(kb_folder, tmp_path / "changed"))
    smaller.remove(["Q3"])
    put_up(hub, smaller.path)
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
found = {{"new": len(kb), "old": old.entity_ids, "same": old.rows([2]) == old.rows([old.row_of("Q3")])}}
def mapped():
    file = os.path.realpath(kb.path / "encodings-00000.safetensors")
    assert "/blobs/" in file
    return file in open("/proc/self/maps").read()
before = mapped()
kept = kb.encodings([0, 1])
found["mapped"] = (before, mapped())
found["notes"] = (kb.path / "notes.txt").exists()
try:
    kb.remove(["Q1"])
except KnowledgeBaseError as caught:
    found["remove"] = str(caught)
copy = kb.save("copy")
copy.remove(["Q1"])
found["copy"] = len(copy)
found["revision"] = error(HubError, name="org/kb", revision="v9")
found["missing"] = error(HubError, name="org/kbb")
found["folder"] = error(KnowledgeBaseError, name="./nothing/here")
found["cached"] = len(KnowledgeBase.from_pretrained("org/kb", local_files_only=True))
found["not cached"] = error(HubError, name="org/other", local_files_only=True)
print(json.dumps(found))
"""
    found = json.loads(client.python(code).stdout.splitlines()[-1])
    assert found["new"] == 11
    assert found["old"] == [f"Q{i + 1}" for i in range(12)]
    assert found["mapped"] == [False, True]
    assert found["notes"] is False, "only the files of the knowledge base are downloaded"
    assert "kb.save(FOLDER)" in found["remove"]
    assert found["copy"] == 10
    assert "has no revision 'v9'" in found["revision"]
    assert "does not exist, or is private" in found["missing"]
    assert "no knowledge base here" in found["folder"]
    assert found["cached"] == 11
    assert "not completely in the cache" in found["not cached"]
    assert "HF_HOME" in found["not cached"]


def test_offline_moved_cache_private_and_gated(hub, client, new_client, kb_folder, tmp_path):
    put_up(hub, kb_folder)
    put_up(hub, kb_folder, "org/private", private=True)
    put_up(hub, kb_folder, "org/gated", gated="manual")
    online = client.runner("kb")
    assert len(ids(online.run("open_kb", "org/kb"))) == 12
    assert len(ids(online.run("open_kb", "org/private"))) == 12
    online.close()

    nobody = new_client("nobody", None).runner("kb")
    for repo, words in (("org/private", "private and your token"), ("org/gated", "is gated")):
        done = nobody.run("open_kb", repo)
        assert done.returncode == 1
        assert words in done.output
    nobody.close()

    client.environment["HF_HUB_OFFLINE"] = "1"
    offline = client.runner("kb")
    hub.log.clear()
    assert len(ids(offline.run("open_kb", "org/kb"))) == 12
    moved = client.home / "moved"
    shutil.copytree(client.home / "hub", moved, symlinks=True)
    assert len(ids(offline.run("open_kb", "org/kb", cache=moved))) == 12
    lost = offline.run("open_kb", "org/kb", cache=client.home / "elsewhere")
    assert lost.returncode == 1
    assert "HF_HUB_CACHE" in lost.output
    # A cache that lost a file is an error.
    blob = max((moved / "datasets--org--kb/blobs").iterdir(), key=lambda path: path.stat().st_size)
    blob.unlink()
    broken = offline.run("open_kb", "org/kb", cache=moved)
    assert broken.returncode == 1
    assert "Error" in broken.output.split()[0]
    offline.close()
    assert not hub.log


def test_a_download_cut_at_every_request_is_an_error_or_whole_and_the_next_one_completes(hub, kb_runner, kb_folder):
    put_up(hub, kb_folder)
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


def test_a_published_knowledge_base_leaves_removed_entities_here(kb_folder, tmp_path):
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


def test_a_model_by_name_says_why_not(hub, client, new_client, tmp_path):
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
    revision, code_asked, _, trusted, _ = json.loads(client.python(code).stdout.splitlines()[-1])
    assert "has no revision 'v9'" in revision
    assert "trust_remote_code" in code_asked
    assert trusted is None
    nobody = new_client("nobody", None).python(code)
    private = json.loads(nobody.stdout.splitlines()[-1])
    assert all("private and your token" in error or "not completely in the cache" in error for error in private)
