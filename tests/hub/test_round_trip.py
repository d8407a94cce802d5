"""The whole way with the real clients, each step in a process of its own: build → publish → load by name → train →
publish → load by name with and without hf_mel → link."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from tests.hub.bare import bare_environment
from tests.hub.conftest import TOKEN
from tests.training.toy_run import recipe_dict

# A made-up batch, scored by whoever loads the model.
_SCORES = """
import torch
from PIL import Image
mentions = [{"mention": "The hosts", "text": "The hosts raised their flag in Accra.", "image": None},
            {"mention": "They", "text": "They won.", "image": Image.new("RGB", (20, 10), (200, 30, 30))}]
entities = [{"name": name, "attributes": f"Capital: {name}.", "description": "", "aliases": [],
             "images": [Image.new("RGB", (9, 9), (k * 60, 9, 9))]} for k, name in enumerate(["Ghana", "Togo", "Mali"])]
with torch.no_grad():
    scores = model.score(model.encode_mentions(**processor(mentions=mentions)),
                         model.encode_entities(**processor(entities=entities)))
print(json.dumps({"scores": scores.tolist(), "code": type(model).__module__.split(".")[0]}))
"""
_LOAD = """
import json
from transformers import AutoConfig, AutoModel, AutoProcessor
config = AutoConfig.from_pretrained("org/mimic-flags"{0})
model = AutoModel.from_pretrained("org/mimic-flags"{0}).eval()
processor = AutoProcessor.from_pretrained("org/mimic-flags"{0})
assert type(config).__name__ == "MimicConfig" and type(processor).__name__ == "MimicProcessor"
"""


def shrink(folder):
    """Keeps few mentions of each split: the same columns and files."""
    for path in (folder / "mentions").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.slice(0, 24), path)
        assert table.schema.equals(pq.read_schema(path), check_metadata=True)
    readme = folder / "README.md"
    _, metadata, body = readme.read_text(encoding="utf-8").split("---\n", 2)
    kept = {key: value for key, value in yaml.safe_load(metadata).items() if key != "dataset_info"}
    readme.write_text(f"---\n{yaml.safe_dump(kept)}---\n{body}", encoding="utf-8")


@pytest.mark.slow
def test_the_round_trip(hub, client, new_client, tmp_path):
    home = client.home
    # Build FlagsMEL, publish it, load it by name in a process that has no hf_mel in it.
    client.cli("data", "build", "flags_mel", "--output", "flags")
    shrink(home / "flags")
    client.cli("publish", "dataset", "flags", "org/flags_mel", "--yes")
    loaded = client.python(
        "import json, datasets\n"
        "mentions = datasets.load_dataset('org/flags_mel', split='test')\n"
        "entities = datasets.load_dataset('org/flags_mel', 'entities', split='kb')\n"
        "print(json.dumps([list(mentions['mention_id']), len(entities), entities[0]['images'][0].size]))"
    )
    ids, entities, size = json.loads(loaded.stdout.splitlines()[-1])
    raw = pa.concat_tables([pq.read_table(path) for path in (home / "flags/mentions").glob("test-*")])
    assert ids == raw["mention_id"].to_pylist()
    assert (entities, min(size) > 10) == (129, True)

    # Train on it by name, publish the model: its card and results name the data set by commit.
    recipe = recipe_dict("org/flags_mel", max_steps=2, eval_strategy="no", save_strategy="no")
    recipe["training"]["load_best_model_at_end"] = False
    (home / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    client.cli("train", "tiny.yaml", "--output", "run")
    client.cli("publish", "model", "run", "org/mimic-flags", "--yes", "--private")
    files = hub.files("model", "org/mimic-flags")
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/hf_mel.yaml"]))
    assert {(e.dataset_id, e.dataset_revision) for e in entries} == {
        ("org/flags_mel", hub.head("dataset", "org/flags_mel"))
    }
    assert b"- org/flags_mel" in files["README.md"]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]

    # A knowledge base built by the published model, published in turn.
    client.cli("kb", "build", "org/mimic-flags", "--dataset", "org/flags_mel", "--output", "kb")
    client.cli("publish", "kb", "kb", "org/flags-kb", "--yes")
    client.cli("publish", "metric", "mel_ranking", "org/mel_ranking", "--yes")

    # Somewhere else, without hf_mel: the code comes from the repository, on the user's word only.
    elsewhere = new_client("elsewhere")
    bare = bare_environment(tmp_path / "bare", "torch", "transformers", "pillow")
    assert not any((bare / name).exists() for name in ("hf_mel", "datasets", "evaluate", "torchvision"))

    def without_hf_mel(code: str):
        return subprocess.run(
            [sys.executable, "-S", "-c", code],
            env=elsewhere.environment | {"PYTHONPATH": str(bare)},
            cwd=elsewhere.home,
            capture_output=True,
            text=True,
            timeout=180,
        )

    refused = without_hf_mel(_LOAD.format(""))
    assert refused.returncode != 0
    assert "trust_remote_code" in refused.stderr
    assert not (elsewhere.home / "modules/transformers_modules").exists(), "code was fetched unasked"
    remote = without_hf_mel(_LOAD.format(", trust_remote_code=True") + _SCORES)
    assert remote.returncode == 0, remote.stderr[-4000:]
    remote = json.loads(remote.stdout.splitlines()[-1])
    assert remote["code"] == "transformers_modules"

    # With hf_mel: no remote code, the same scores; then link, by the Python API, the pipeline and the metric.
    local = elsewhere.python(
        "import hf_mel\n"
        + _LOAD.format("")
        + _SCORES
        + """
import evaluate
from transformers import pipeline
from hf_mel import EntityLinker
mention = {"text": "The hosts raised their flag in Accra.", "mention": "The hosts"}
linker = EntityLinker.from_pretrained("org/mimic-flags", kb="org/flags-kb", device="cpu")
linked = linker(mention, top_k=129).to_dict()
pipe = pipeline("multimodal-entity-linking", model="org/mimic-flags", kb="org/flags-kb", device="cpu")
metric = evaluate.load("org/mel_ranking")
scored = metric.compute(predictions=[["a", "b"]], references=["b"])
print(json.dumps([linked, pipe(mention, top_k=129), scored["mrr"]]))
"""
    )
    local_scores, results = map(json.loads, local.stdout.splitlines()[-2:])
    assert local_scores["code"] == "hf_mel"
    for here, there in zip(local_scores["scores"], remote["scores"], strict=True):
        assert here == pytest.approx(there, abs=1e-5)
    linked, piped, mrr = results
    assert mrr == 0.5
    assert len(linked["candidates"]) == 129
    assert {c["entity_id"] for c in linked["candidates"]} == set(
        pq.read_table(home / "flags/entities", columns=["entity_id"])["entity_id"].to_pylist()
    )
    assert [c["entity_id"] for c in piped["candidates"]] == [c["entity_id"] for c in linked["candidates"]]

    # The command line links by name, and offline from what is in the cache.
    cli = elsewhere.cli(
        *("link", "org/mimic-flags", "--kb", "org/flags-kb", "--device", "cpu", "--json"),
        *("--text", "The hosts raised their flag in Accra.", "--mention", "The hosts"),
        HF_HUB_OFFLINE="1",
    )
    assert json.loads(cli.stdout)["candidates"][0]["entity_id"] == linked["candidates"][0]["entity_id"]

    # Nothing was asked that this Hub does not know, and no token went where it should not.
    unknown = {f"{r.method} {r.path}" for r in hub.log if r.status >= 400} - {
        f"{r.method} {r.path}" for r in hub.log if r.status == 404 and r.method in ("HEAD", "GET")
    }
    assert not unknown
    assert all(TOKEN not in r.authorization for r in hub.log if r.host.startswith("localhost"))
