"""Tests of the counted cost of a large knowledge base: its figures are products of measured ones."""

from __future__ import annotations

import json
import re

from benchmarks import cluster, harness
from benchmarks.cluster import arguments, measure, page_with, tables
from hf_mel.hub.saving import save_model_repository
from tests.toy import ToyProcessor, register, toy_entities, toy_model, write_toy_dataset


def test_the_page_has_the_tables_of_the_results():
    args = arguments().parse_args([])
    text = tables(harness.RESULTS, args.entities, args.hosts, args.cores, args.price)
    page = cluster.PAGE.read_text(encoding="utf-8")
    assert page_with(text, page) == page, "Run python -m benchmarks.cluster --docs."


def test_figures_are_products(tmp_path):
    for name in ("building", "latency-mimic-text_wikimel-codes"):
        (tmp_path / f"{name}.json").write_text((harness.RESULTS / f"{name}.json").read_text())
    content = json.loads((harness.RESULTS / "cluster.json").read_text())
    content |= {
        "cpu_seconds_per_entity": 0.036,
        "encoding_bytes_per_entity": 2000,
        "reading_cpu_seconds_per_entity": 36e-6,
    }
    (tmp_path / "cluster.json").write_text(json.dumps(content))
    text = tables(tmp_path, 1_000_000, hosts=2, cores=5, price=3.0)
    assert "| 36 ms | 10 | 1.0 | 30 |" in text  # 36,000 s
    assert re.search(r"\| encodings, float16 \| 2,000 \| 2 GB \| 1 GB \|", text)
    assert "36 µs an entity (measured, texts), 0.010 hours" in text
    seconds = json.loads((tmp_path / "latency-mimic-text_wikimel-codes.json").read_text())["rows"][3]["cpu_p50_s"]
    assert (
        f"| `exact` | {seconds * 1e3:,.0f} ms | {seconds:.1f} | {seconds / 10:.2f} | {seconds * 1e6 / 3600 * 3:,.0f} |"
        in text
    )


def test_a_sample_is_measured(tmp_path):
    register()
    save_model_repository(toy_model(), ToyProcessor(), tmp_path / "run")
    words = [
        "--measure",
        "--model",
        tmp_path / "run",
        "--dataset",
        write_toy_dataset(tmp_path / "data", entities=toy_entities(200)),
    ]
    args = arguments().parse_args([str(word) for word in [*words, "--scratch", tmp_path / "scratch", "--sample", 100]])
    content = measure(args)
    assert content["entities"] == 100
    assert content["reading_cpu_seconds_per_entity"] > 0
    assert content["encoding_bytes_per_entity"] > 2 * 16 * 2  # two vectors in float16
