"""Tests of the points of SECURITY.md: what an untrusted repository, folder or file can and cannot do."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_mel.errors import DataFormatError, KnowledgeBaseError, MelError, UnknownModelError
from hf_mel.hub.convert import convert_checkpoint, read_state_dict
from hf_mel.hub.publish.dataset_repo import dataset_publication
from hf_mel.hub.saving import save_model_repository
from hf_mel.hub_errors import holds_token, without_tokens
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.kb.indexes import build_index, open_index
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.schema import entity_features
from tests.hub.conftest import ROOT, TOKEN
from tests.toy import ToyProcessor, register, toy_entities, toy_model


class Trap:
    """Creates the folder it names when unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def model(tmp_path):
    register()
    save_model_repository(toy_model(), ToyProcessor(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def kb(tmp_path):
    return KnowledgeBase.build(toy_entities(), toy_model(), ToyProcessor(), output=tmp_path / "kb", progress=False)


# -- 1. no pickle ------------------------------------------------------------------------------------------------------


def test_no_source_file_unpickles():
    """Opening a pickle runs its code. The only call of `torch.load` passes weights_only."""
    for path in (p for top in ("hf_mel", "modeling", "dataset_scripts", "spaces") for p in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "marshal.loads", "eval"), (
                path
            )
            if name in ("torch.load", "np.load", "numpy.load"):
                arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert arguments.get("weights_only") == "True" or arguments.get("allow_pickle") == "False", path


def test_pickled_weights_are_not_opened(model, tmp_path):
    (model / "model.safetensors").unlink()
    trap = tmp_path / "sprung"
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UnknownModelError, match="no safetensors weights"):
        load_retriever(model, device="cpu")
    assert not trap.exists()


def test_conversion_reads_tensors_and_refuses_other_objects(tmp_path):
    trap = tmp_path / "sprung"
    (tmp_path / "config.json").write_text("{}")
    torch.save({"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": Trap(trap)}, tmp_path / "evil.ckpt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain.pt")
    torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, tmp_path / "lightning.ckpt")
    with pytest.raises(DataFormatError, match="refused"):
        read_state_dict(tmp_path / "evil.ckpt")
    assert not trap.exists()
    for name in ("plain.pt", "lightning.ckpt"):
        assert read_state_dict(tmp_path / name)["a"].tolist() == [0, 0]
    for content in (b"", b"\x80\x04N.", b"not a checkpoint", pickle.dumps([1, 2])):
        (tmp_path / "odd.pt").write_bytes(content)
        with pytest.raises(DataFormatError):
            read_state_dict(tmp_path / "odd.pt")
    with pytest.raises(MelError):
        convert_checkpoint("mimic", tmp_path / "evil.ckpt", tmp_path / "config.json", tmp_path / "out")


# -- 2. no code without the user's consent --------------------------------------------------------------------------------


def test_code_of_a_model_repository_runs_only_with_consent(model, tmp_path):
    trap = tmp_path / "sprung"
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "nobodys", "auto_map": {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel")}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    with pytest.raises(UnknownModelError, match="trust_remote_code"):
        load_retriever(model, device="cpu")
    assert not trap.exists()


# -- 3. names that lead out of a folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b.parquet", "encodings-0.safetensors/../x"])
def test_a_manifest_may_name_only_files_of_its_folder(kb, name):
    manifest = json.loads((kb.path / "kb.json").read_text())
    for part in ("encodings", "entities"):
        changed = json.loads(json.dumps(manifest))
        changed["shards"][0][part]["file"] = name
        (kb.path / "kb.json").write_text(json.dumps(changed))
        with pytest.raises(KnowledgeBaseError, match="names the file"):
            KnowledgeBase.from_pretrained(kb.path)


def test_files_of_a_repository_stay_in_the_cache(hub, client):
    """A hostile Hub or repository lists `../…`; nothing is written outside the cache."""
    hub.store.create("dataset", "org/kb")
    for name in ("../../entities-1.parquet", "entities-../../../x.parquet"):
        hub.store.commit("dataset", "org/kb", "main", "evil", {name: hub.store.put(b"evil")}, [])
    done = client.python(
        "from hf_mel import KnowledgeBase\n"
        "try:\n    KnowledgeBase.from_pretrained('org/kb')\nexcept Exception as error:\n    print(type(error).__name__)"
    )
    assert done.stdout.split()[-1] in ("KnowledgeBaseError", "HubError", "ValueError")
    written = [path for path in client.home.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]
    cache = client.home / "hub/datasets--org--kb"
    assert all(cache in path.resolve().parents for path in written)


def test_indexes_are_not_downloaded(hub, client, kb):
    """faiss is native code, so it reads only files that were written on this machine."""
    hub.store.create("dataset", "org/kb")
    files = {path.name: hub.store.put(path.read_bytes()) for path in kb.path.iterdir()}
    evil = {name: hub.store.put(b"evil") for name in ("index-faiss-flat.json", "index-faiss-flat-00.faiss")}
    hub.store.commit("dataset", "org/kb", "main", "with an index", files | evil, [])
    done = client.python(
        "from hf_mel import KnowledgeBase\n"
        "from hf_mel.kb import open_index\n"
        "kb = KnowledgeBase.from_pretrained('org/kb')\n"
        "print(len(kb), kb.info()['indexes'])\n"
        "try:\n    open_index(kb, 'faiss-flat', None)\nexcept Exception as error:\n    print(type(error).__name__)"
    )
    assert done.stdout.splitlines()[-2:] == ["12 []", "KnowledgeBaseError"]
    assert not [path for path in client.home.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_a_changed_index_or_one_outside_its_folder_is_not_parsed(kb, tmp_path, monkeypatch):
    faiss = pytest.importorskip("faiss")
    build_index(kb, "faiss-flat", toy_model(), ToyProcessor(), progress=False)
    open_index(kb, "faiss-flat", toy_model())
    record, (file,) = kb.path / "index-faiss-flat.json", kb.path.glob("*.faiss")
    content, text = file.read_bytes(), record.read_text()
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("the file was parsed"))
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(KnowledgeBaseError, match="not what was written"):
        open_index(kb, "faiss-flat", toy_model())
    (tmp_path / "elsewhere").write_bytes(content)
    for name in (f"/../../elsewhere{'0' * 50}", str(tmp_path / "elsewhere"), "", None, 3):
        changed = json.loads(text)
        changed["store"] |= {"sha256": name, "file": str(tmp_path / "elsewhere")}
        record.write_text(json.dumps(changed))
        with pytest.raises(KnowledgeBaseError, match="damaged"):
            open_index(kb, "faiss-flat", toy_model())


# -- 4. excessive sizes, depths and types ----------------------------------------------------------------------

_HOSTILE = {
    "deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested": json.dumps({"model_type": "toy_retriever", "x": eval("[" * 60 + "]" * 60)}),
    "list": "[1, 2]",
    "text": '"toy_retriever"',
    "nothing": "",
    "binary": "\x00\x01",
    "infinite": '{"model_type": "toy_retriever", "dim": 1e999}',
    "huge": '{"model_type": "toy_retriever", "dim": 1000000000000000}',
    "vocabulary": '{"model_type": "toy_retriever", "vocab_size": 99999999999}',
    "layers": '{"model_type": "bert", "num_hidden_layers": 100000000}',
    "stages": '{"model_type": "convnext", "depths": [1, 9999999, 1]}',
    "wrong type": '{"model_type": "toy_retriever", "dim": "many"}',
    "negative": '{"model_type": "toy_retriever", "dim": -5}',
    "no type": "{}",
    "type of type": '{"model_type": [1]}',
    "long": '{"model_type": "toy_retriever", "x": "' + "x" * (9 << 20) + '"}',
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_a_hostile_configuration_is_an_error(model, name):
    (model / "config.json").write_text(_HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnknownModelError):
        load_retriever(model, device="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20, "the refusal took over a gigabyte"


def test_a_model_with_mostly_missing_weights_is_refused(model):
    """A configuration of 320 million parameters with a few thousand weights is refused before they are allocated."""
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "characters" not in name}, model / "model.safetensors"
    )
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 20_000_000}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownModelError, match="needs 320,0"):
        load_retriever(model, device="cpu")


def _rewrite(kb: KnowledgeBase, table: pa.Table, **options) -> None:
    """Replaces the table of entities and updates the manifest."""
    path = kb.path / "entities-00000.parquet"
    pq.write_table(table, path, **options)
    manifest = json.loads((kb.path / "kb.json").read_text())
    manifest["shards"][0]["entities"]["bytes"] = path.stat().st_size
    (kb.path / "kb.json").write_text(json.dumps(manifest))


def test_a_parquet_file_with_unexpected_columns_is_refused(kb):
    rows = pq.read_table(kb.path / "entities-00000.parquet")
    deep = pa.array([None] * rows.num_rows, pa.string())
    for _ in range(40):
        deep = pa.StructArray.from_arrays([deep], ["x"])
    for table in (
        rows.drop_columns(["aliases"]),
        rows.set_column(1, "name", pa.array(range(rows.num_rows))),
        rows.append_column("deep", deep),
    ):
        _rewrite(kb, table)
        with pytest.raises(KnowledgeBaseError, match="columns"):
            _ = KnowledgeBase.from_pretrained(kb.path).entity_ids


_BOMB = """
import resource, sys
limit = int(open("/proc/self/statm").read().split()[0]) * 4096
from hf_mel.errors import MelError
from hf_mel.kb.knowledge_base import KnowledgeBase
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
for name in sys.argv[1:]:
    kb = KnowledgeBase.from_pretrained(name)
    for read in (lambda: kb.entity_ids, lambda: kb.rows([0]), lambda: kb.image(0)):
        try:
            read()
        except MelError as error:
            print(type(error).__name__)
            print(error, file=sys.stderr)
            break
    else:
        print("read it")
"""


def test_a_parquet_bomb_is_an_error_before_it_is_decoded(tmp_path):
    """Small files whose columns decode to terabytes: aliases, descriptions or images, repeated."""
    folders = []
    schema = entity_features().arrow_schema
    big, count = "x" * (4 << 20), 12
    plain = {"entity_id": [f"Q{i}" for i in range(count)], "name": ["n"] * count, "description": [""] * count}
    plain |= {"attributes": [""] * count, "aliases": [[]] * count, "images": [[]] * count}
    for k, changes in enumerate(
        (
            {
                "aliases": pa.ListArray.from_arrays(
                    pa.array([0] + [1 << 20] * count, pa.int32()), _repeat(big, 1 << 20)
                )
            },
            {"description": _repeat(big, count), "aliases": _lists(big, count, 4096)},
            {"images": _images(b"x" * (4 << 20), count, 4096)},
        )
    ):
        kb = KnowledgeBase.build(
            toy_entities(count), toy_model(), ToyProcessor(), output=tmp_path / f"kb{k}", progress=False
        )
        columns = plain | changes
        arrays = [
            columns[name] if isinstance(columns[name], pa.Array) else pa.array(columns[name], schema.field(name).type)
            for name in schema.names
        ]
        types = pa.schema([pa.field(name, array.type) for name, array in zip(schema.names, arrays, strict=True)])
        _write_bomb(kb, pa.Table.from_arrays(arrays, schema=types), schema)
        assert (kb.path / "entities-00000.parquet").stat().st_size < 64 << 20
        folders.append(str(kb.path))
    done = subprocess.run(
        [sys.executable, "-c", _BOMB, *folders],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["KnowledgeBaseError"] * 3, done.stdout + done.stderr[-3000:]
    assert done.stderr.count(" decode to ") == 3, done.stderr


def _repeat(value, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def _lists(value, rows: int, length: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(
        pa.array(range(0, (rows + 1) * length, length), pa.int32()), _repeat(value, rows * length)
    )


def _images(value: bytes, rows: int, length: int) -> pa.ListArray:
    paths = pa.DictionaryArray.from_arrays(pa.array([None] * (rows * length), pa.int32()), pa.array(["p"]))
    structs = pa.StructArray.from_arrays([_repeat(value, rows * length), paths], ["bytes", "path"])
    return pa.ListArray.from_arrays(pa.array(range(0, (rows + 1) * length, length), pa.int32()), structs)


def _write_bomb(kb: KnowledgeBase, table: pa.Table, schema: pa.Schema) -> None:
    """Writes dictionary-encoded columns under the plain schema that a reader expects."""
    _rewrite(kb, table, dictionary_pagesize_limit=64 << 20, compression="zstd", store_schema=False)


def test_a_card_is_text_and_not_more(tmp_path):
    (tmp_path / "mentions").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "mentions/train-00000-of-00001.parquet")
    (tmp_path / "report.json").write_text('{"redistribution": null}')
    for metadata in ("!!python/object/apply:os.mkdir [sprung]", "[" * 20_000, "a: b: c", "- 1", "\x00"):
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
        with pytest.raises(MelError):
            dataset_publication(tmp_path, "org/toy")
    assert not (tmp_path / "sprung").exists()


# -- 5. tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_redacted_in_messages_and_detected_in_files(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token")
    assert without_tokens("sent an-unusual-token and " + TOKEN) == "sent <token> and <token>"
    assert holds_token(b"x an-unusual-token x")
    assert holds_token(f"token: {TOKEN}\n".encode())
    assert not holds_token(b"hf_mel hf_xet the_hf_hub_download_function_of_the_client_library")


def test_no_message_of_a_failed_publication_contains_the_token(hub, runner, tmp_path):
    """The Hub echoes the token in its answer; `tests.hub.conftest` searches all output for it."""
    from tests.hub.test_publish import data_folder
    from tests.hub_server.server import Fault

    folder = data_folder(tmp_path / "toy")
    for status in (400, 403, 404, 500):
        hub.faults[:] = [
            Fault(status, pattern="commit", stays=True, headers={"X-Error-Message": f"bad token {TOKEN}"})
        ]
        done = runner.run("publish", "dataset", folder, "org/toy", "--yes")
        assert done.returncode == 1
        assert re.search(r"(Hub|Publish)Error", done.output)


def test_security_md_names_every_test_here():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {
        node.name
        for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert named <= defined
    assert len(named) >= 8
