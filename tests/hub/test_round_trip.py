"""Runs the commands of the guide "Publish" with the real clients: build → publish → load by name → train → publish → load
by name with and without hf_mel → link. Every step is a separate process."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from tests.hub.bare import bare_environment
from tests.hub.conftest import ROOT, TOKEN
from tests.training.toy_run import recipe_dict

_SECTION = (ROOT / "docs/guides/publish.md").read_text(encoding="utf-8")
_COMMANDS = re.search(r"```sh\n(.*?)```", _SECTION, re.DOTALL)[1].replace("ORG", "org").splitlines()
_SNIPPET = re.search(r"```python\n(.*?)```", _SECTION, re.DOTALL)[1].replace("ORG", "org")

# Scores a batch with the loaded model.
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
    """Reduces every split to a few mentions, with the same files and columns."""
    for path in (folder / "mentions").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.slice(0, 24), path)
        assert table.schema.equals(pq.read_schema(path), check_metadata=True)
    readme = folder / "README.md"
    _, metadata, body = readme.read_text(encoding="utf-8").split("---\n", 2)
    metadata = {key: value for key, value in yaml.safe_load(metadata).items() if key != "dataset_info"}
    readme.write_text(f"---\n{yaml.safe_dump(metadata)}---\n{body}", encoding="utf-8")


@pytest.mark.slow
def test_published_data_sets_models_and_knowledge_bases_load_by_name(hub, client, new_client, tmp_path):
    home = client.home

    def publish(kind: str) -> None:
        """The guide's commands of one kind."""
        lines = [line for line in _COMMANDS if line.startswith(f"hf-mel publish {kind} ")]
        assert lines
        for line in lines:
            done = client.cli(*shlex.split(line)[1:])
            assert ("Published in one commit" if "--yes" in line else "nothing was uploaded") in done.stdout

    # Build FlagsMEL, publish it and load it by name without hf_mel.
    client.cli("data", "build", "flags_mel", "--output", "data/flags_mel")
    shrink(home / "data/flags_mel")
    publish("dataset")
    loaded = client.python(
        "import json, datasets\n"
        "mentions = datasets.load_dataset('org/flags_mel', split='test')\n"
        "entities = datasets.load_dataset('org/flags_mel', 'entities', split='kb')\n"
        "print(json.dumps([list(mentions['mention_id']), len(entities), entities[0]['images'][0].size]))"
    )
    ids, entities, size = json.loads(loaded.stdout.splitlines()[-1])
    raw = pa.concat_tables([pq.read_table(path) for path in (home / "data/flags_mel/mentions").glob("test-*")])
    assert ids == raw["mention_id"].to_pylist()
    assert (entities, min(size) > 10) == (129, True)

    # Train on it by name and publish the model. Its card and results name the commit of the data set.
    recipe = recipe_dict("org/flags_mel", max_steps=2, eval_strategy="no", save_strategy="no")
    recipe["training"]["load_best_model_at_end"] = False
    (home / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    client.cli("train", "tiny.yaml", "--output", "runs/mimic_flags")
    publish("model")
    assert hub.store.meta("model", "org/mimic-flags")["private"] is True
    files = hub.files("model", "org/mimic-flags")
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/hf_mel.yaml"]))
    assert {(e.dataset_id, e.dataset_revision) for e in entries} == {
        ("org/flags_mel", hub.head("dataset", "org/flags_mel"))
    }
    assert b"- org/flags_mel" in files["README.md"]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]

    # A knowledge base built before the model was published works with the published model.
    client.cli("kb", "build", "runs/mimic_flags", "--dataset", "org/flags_mel", "--output", "kb/flags_mel")
    publish("kb")
    publish("metric")

    # On another machine without hf_mel, the code comes from the repository, with trust_remote_code only.
    elsewhere = new_client("elsewhere")
    bare = bare_environment(tmp_path / "bare", "torch", "transformers", "pillow")
    assert not any((bare / name).exists() for name in ("hf_mel", "datasets", "evaluate", "torchvision"))

    def without_hf_mel(code: str):
        return subprocess.run(
            [sys.executable, "-S", "-c", code],
            env=elsewhere.environment | {"PYTHONPATH": str(bare)},
            cwd=elsewhere.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    refused = """
import os, sys
try:
    exec(unasked)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
    assert not os.path.exists(os.path.join(os.environ["HF_HOME"], "modules/transformers_modules/org"))
else:
    sys.exit("code of the repository was run unasked")
"""
    remote = without_hf_mel(
        f"unasked = {_LOAD.format('')!r}" + refused + _LOAD.format(", trust_remote_code=True") + _SCORES
    )
    assert remote.returncode == 0, remote.stderr[-4000:]
    remote = json.loads(
        remote.stdout[remote.stdout.rindex('{"scores"') :]
    )  # after the unanswered prompt of transformers
    assert remote["code"] == "transformers_modules"

    # With hf_mel: no remote code and the same scores; then the Python API, the pipeline and the metric.
    local = elsewhere.python(
        "import hf_mel\n"
        + _LOAD.format("")
        + _SCORES
        + _SNIPPET
        + """
from hf_mel import EntityLinker
mention = {key: mentions[0][key] for key in ("text", "start", "end", "image")}
alone = EntityLinker.from_pretrained("org/mimic-flags", kb="org/flags-kb", device="cpu")
print(json.dumps([alone(mention, top_k=129).to_dict(), linked, mentions[0]["entity_id"], mention["text"]]))
mentions[0]["image"] and mentions[0]["image"].save("image.png")
"""
    )
    local_scores, mrr, results = map(json.loads, local.stdout.splitlines()[-3:])
    assert local_scores["code"] == "hf_mel"
    for local_row, remote_row in zip(local_scores["scores"], remote["scores"], strict=True):
        assert local_row == pytest.approx(remote_row, abs=1e-5)
    linked, piped, gold, text = results
    assert piped == linked
    ranked = [candidate["entity_id"] for candidate in linked["candidates"]]
    assert set(ranked) == set(
        pq.read_table(home / "data/flags_mel/entities", columns=["entity_id"])["entity_id"].to_pylist()
    )
    assert mrr == pytest.approx(1 / (1 + ranked.index(gold)))

    # The command line links by name, offline from the cache.
    image = ["--image", "image.png"] if (elsewhere.home / "image.png").exists() else []
    span = ["--start", linked["start"], "--end", linked["end"], *image]
    cli = elsewhere.cli(
        *("link", "org/mimic-flags", "--kb", "org/flags-kb", "--device", "cpu", "--json", "--text", text, *span),
        HF_HUB_OFFLINE="1",
    )
    assert json.loads(cli.stdout)["candidates"][0]["entity_id"] == ranked[0]

    # The clients used no endpoint that this Hub lacks, and sent no token to the storage host.
    unknown = {f"{r.method} {r.path}" for r in hub.log if r.status >= 400} - {
        f"{r.method} {r.path}" for r in hub.log if r.status == 404 and r.method in ("HEAD", "GET")
    }
    assert not unknown
    assert all(TOKEN not in r.authorization for r in hub.log if r.host.startswith("localhost"))
