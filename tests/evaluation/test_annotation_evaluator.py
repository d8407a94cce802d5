"""Evaluation of annotated texts: the figures are those of the mentions that `annotate` returns."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from hf_mel.building.build import build_dataset
from hf_mel.cli.annotate import annotate
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.detection.gazetteer import Gazetteer
from hf_mel.errors import DataFormatError
from hf_mel.evaluation.annotation_evaluator import annotation_rows, evaluate_annotations
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.spaces.mel_annotation.mel_annotation import annotation_metrics
from tests.dataset_scripts.aida_conll_release import write as write_aida
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model, write_toy_dataset

MENTIONS = toy_mentions(20, nil_every=6)


@pytest.fixture(scope="module")
def linker():
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(toy_entities(9), model, processor, progress=False)  # Q10 to Q12 are not in it
    return EntityLinker(model, processor, kb)


def plain(linker, **options):
    """One text at a time. Every toy mention has a text of its own."""
    golds, predictions = [], []
    for row in MENTIONS:
        spans = {"spans": [[row["start"], row["end"]]]} if options.get("gold_spans") else {}
        annotated = linker.annotate({"text": row["text"], "image": row["image"], **spans})
        golds.append([(row["start"], row["end"], row["entity_id"] if row["entity_id"] in linker.kb else "NIL")])
        predictions.append([(m.start, m.end, m.entity_id) for m in annotated])
    return annotation_metrics(golds, predictions)


@pytest.mark.parametrize("gold_spans", [False, True])
def test_the_figures_are_those_of_annotate(linker, gold_spans):
    results = evaluate_annotations(linker, MENTIONS, gold_spans=gold_spans)
    expected = plain(linker, gold_spans=gold_spans)
    assert {key: results[key] for key in expected} == expected
    assert (results["num_mentions"], results["num_left_out"], results["kb_size"]) == (20, 0, 9)
    recall = results["strong"]["detection"]["micro_recall"]
    assert recall == 1 if gold_spans else 0 < recall < 1


def test_mentions_of_one_context_are_one_text(linker):
    rows = [
        {**MENTIONS[0], "text": "Entity a met Entity b.", "start": start, "end": start + 8, "entity_id": gold}
        for start, gold in ((0, "Q1"), (13, "Q2"))
    ]
    mentions = type(MENTIONS).from_list([*rows, {**MENTIONS[1], "start": -1, "end": -1}], features=MENTIONS.features)
    results = evaluate_annotations(linker, mentions)
    assert (results["num_texts"], results["num_mentions"], results["num_left_out"]) == (1, 2, 1)
    with pytest.raises(DataFormatError, match="No mention has a position"):
        evaluate_annotations(linker, mentions.select([2]))


def test_the_command_prints_and_writes_the_figures(tmp_path, linker):
    register()
    linker.model.save_pretrained(tmp_path / "model")
    linker.processor.save_pretrained(tmp_path / "model")
    linker.kb.save(tmp_path / "kb", progress=False)
    data = write_toy_dataset(tmp_path / "data", test=MENTIONS)
    app = typer.Typer()
    app.command()(annotate)
    arguments = [str(tmp_path / "model"), "--kb", str(tmp_path / "kb"), "--dataset", str(data)]
    output = tmp_path / "results.json"
    done = CliRunner().invoke(app, [*arguments, "--output", str(output)], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    results = evaluate_annotations(linker, MENTIONS)
    for row in annotation_rows(results):
        assert any(all(cell in line for cell in row) for line in done.stdout.splitlines()), row
    written = json.loads(output.read_text())
    assert written["strong"] == results["strong"]
    assert written["detector"]["detector"] == "gazetteer"
    done = CliRunner().invoke(app, [*arguments, "--gold-spans"], env={"COLUMNS": "100"})
    assert "100.0" in done.stdout
    for options in (["--image", "a.png"], ["--text", "a"], ["--json"]):
        assert CliRunner().invoke(app, [*arguments, *options]).exit_code == 2


def test_texts_of_aida(tmp_path):
    """Every layout of AIDA builds the same columns, so one stands for all."""
    raw = write_aida(tmp_path / "raw")
    options = {"entities": str(raw / "texts.jsonl")}
    build_dataset(
        "aida_conll", raw_dir=raw, output=tmp_path / "data", config_options=options, allow_count_mismatch=True
    )
    model, processor = toy_model(), ToyProcessor()
    kb = KnowledgeBase.build(load_entities(tmp_path / "data"), model, processor, progress=False)
    linker = EntityLinker(model, processor, kb)
    train = load_mentions(tmp_path / "data", "train")
    given = evaluate_annotations(linker, train, gold_spans=True)
    # "Nordby beat Falk", "The Harbour Cup" and "The Nobody left", whose mention has no entity.
    assert (given["num_texts"], given["num_mentions"], given["strong"]["nil"]["num_gold"]) == (3, 4, 1)
    assert given["strong"]["detection"]["micro_f1"] == 1
    # The names are "Nordby", "Harbour Cup", "Ada Falk", …: "Falk" alone and "Nobody" are none.
    assert evaluate_annotations(linker, train)["strong"]["detection"]["num_correct"] == 2
    learned = Gazetteer.from_kb(kb, training=train)
    assert evaluate_annotations(linker, train, learned)["strong"]["detection"]["num_correct"] == 4
    test = evaluate_annotations(linker, load_mentions(tmp_path / "data", "test"), learned)
    assert (
        test["strong"]["detection"] | {"num_gold": 1, "num_predicted": 1, "num_correct": 1}
        == test["strong"]["detection"]
    )
