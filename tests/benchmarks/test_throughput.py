"""Tests of the benchmark of throughput on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness, summary, throughput
from hf_mel.linking.linker import EntityLinker

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> throughput.GeneratedTexts:
    return throughput.GeneratedTexts(tmp_path_factory.mktemp("bench"), 40, TINY)


def test_mentions_stand_in_their_texts_and_have_golds(source):
    rows = source.mention_rows(50, 30)
    names = source.named_kb(30).rows(range(30))
    assert len(rows) == 50
    for row in rows:
        assert row["text"][row["start"] : row["end"]] == row["mention"]
        assert row["mention"] == names[int(row["entity_id"][1:])]["name"]
    assert throughput.as_dataset(rows)["mention"][:] == [row["mention"] for row in rows]


def test_the_plain_loop_finds_what_the_library_finds(source, monkeypatch):
    monkeypatch.setattr(throughput, "PLAIN_BATCH", 3)
    monkeypatch.setattr(throughput, "_PLAIN_ENTITIES", 7)
    kb, rows = source.named_kb(40), source.mention_rows(8, 40)
    best = throughput.plain_loop(source.model, source.processor, rows, kb.encodings(range(40)), bf16=False)
    linked = EntityLinker(source.model, source.processor, kb)(rows, top_k=throughput.TOP_K)
    assert [[f"Q{row}" for row in rows_of_mention] for rows_of_mention in best.tolist()] == [
        [candidate.entity_id for candidate in result.candidates] for result in linked
    ]


def test_the_encoder_alone_encodes_every_mention_once(source, monkeypatch):
    monkeypatch.setattr(throughput, "PLAIN_BATCH", 4)
    encode, lengths = source.model.encode_mentions, []

    def watched(**inputs):
        lengths.append(inputs["mention_attention_mask"].sum(1))
        return encode(**inputs)

    monkeypatch.setattr(source.model, "encode_mentions", watched)
    rows = source.mention_rows(10, 40)
    throughput.encoder_alone(source.model, source.processor, rows, bf16=False)()
    assert [len(batch) for batch in lengths] == [4, 4, 2]
    expected = source.processor(mentions=rows)["mention_attention_mask"].sum(1)
    assert torch.equal(torch.cat(lengths), expected.sort().values)


def test_changes_are_counted():
    golds = ["a", "a", "a", "a"]
    links = [["a", "b"], ["b", "a"], ["b", "c"], ["b", "c"]]
    others = [["a", "b"], ["a", "b"], ["b", "d"], ["c", "b"]]
    assert throughput.changes(golds, links, others) == {"changed_first_places": 2, "changed_gold_places": 1}


def test_a_run_has_every_case_and_a_table(source, tmp_path):
    rows = source.mention_rows(12, 40)
    options = {"plain_mentions": 5, "repeats": 1, "device": "cpu"}
    results = list(throughput.measure(source, 40, "exact", rows, tmp_path, **options))
    assert [result["dtype"] for result in results] == ["float32", "bfloat16"]
    for result in results:
        assert result["entities"] == 40
        assert result["mentions"] == 12
        assert all(result[f"{case}_cpu_s"] > 0 for case in ("link", "encoder", "plain", "evaluate"))
    linked = EntityLinker(source.model, source.processor, source.named_kb(40))(rows)
    right = sum(result.entity_id == row["entity_id"] for result, row in zip(linked, rows, strict=True))
    assert results[0]["hits@1"] == right / 12
    assert results[0]["changed_first_places"] == results[0]["changed_gold_places"] == 0

    row = {**results[0], "link_cpu_s": 0.01, "link_s": 0.02, "encoder_cpu_s": 0.005, "plain_cpu_s": 0.2}
    row |= {"evaluate_cpu_s": 0.009, "hits@1": 0.5}
    machine = {"cpu": "a CPU", "cores": 2, "threads": 1, "load_at_start": 0.1, "gemm_gflops": 200.0, "software": {}}
    result = {"source": "a source", "rows": [row], "plain_mentions": 5, "top_k": 10, "machine": machine}
    harness.write(tmp_path, "throughput", json.loads(json.dumps(result)))
    expected = "| 40 | exact | float32 | 20.0 | 0.50 | 10.0 ms | 50 | 9.0 ms | 5.0 ms | 200.0 ms | 0 | 0 | 0.500 |"
    assert expected in summary.markdown(tmp_path)
