"""Tests of relinking: after any edits of the knowledge base, its results are those of linking all mentions anew."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from hf_mel.cli.link import link
from hf_mel.cli.relink import relink
from hf_mel.errors import DataFormatError, ImageError, KnowledgeBaseError, MelError
from hf_mel.inference.score_bounds import QueryCodes
from hf_mel.kb.indexes import build_index
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking import relinking
from hf_mel.linking.link_file import link_file, read_mentions
from hf_mel.linking.linker import EntityLinker
from hf_mel.linking.relinking import relink_file
from hf_mel.linking.traces import LinkOrigin, Traces, trace_path
from hf_mel.schema import entity_features
from tests.inference.test_score_bounds import WORLDS, normal
from tests.kb.test_certified import bounded
from tests.toy import ToyPairProcessor, ToyProcessor, register, toy_model, toy_reranker

PROCESSOR = ToyProcessor()
MODELS = {"bounds": bounded(), "no bounds": toy_model()}
ROWS = [
    {
        "text": f"Here Entity {letter * (1 + k % 2)} met {other}, {k} times.",
        "mention": f"Entity {letter * (1 + k % 2)}",
        "own": k,
    }
    for k, (letter, other) in enumerate(zip("abcdefghijkl", "mnopqrstuvwx", strict=True))
] + [{"text": "Nobody met Zzyzx.", "mention": "Zzyzx", "own": 12}]


def entity(number: int, words: str) -> dict:
    images = [Image.new("RGB", (2, 2), (number * 37 % 256, 90, 200))] if number % 3 else []
    return {
        "entity_id": f"Q{number}",
        "name": words,
        "description": "",
        "attributes": "",
        "aliases": [],
        "images": images,
    }


def as_dataset(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=entity_features())


def random_words(draw: random.Random) -> str:
    """Few different names, so that entities are equal and tie."""
    return f"Entity {draw.choice('abcdefghijkl') * draw.choice([1, 1, 2])}"


def base_of(folder, model, draw, count=40):
    rows = [entity(number, random_words(draw)) for number in range(count)]
    return KnowledgeBase.build(as_dataset(rows), model, PROCESSOR, output=folder, progress=False)


def edit(kb, model, draw, edits):
    """Removes, edits and adds random entities."""
    changed, gone = {}, set()
    for _ in range(edits):
        kind, existing = draw.choice(["remove", "edit", "add"]), draw.choice(kb.entity_ids)
        if kind == "remove":
            gone.add(existing)
        else:
            number = int(existing[1:]) if kind == "edit" else draw.randrange(1000, 10**6)
            changed[number] = entity(number, random_words(draw))
    if gone:
        kb.remove(sorted(gone))
    if changed:
        kb.add(as_dataset(list(changed.values())), model, PROCESSOR, replace=True, progress=False)


def write_rows(tmp_path, rows=ROWS):
    path = tmp_path / "mentions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def link_all(linker, source, output, top_k):
    return link_file(
        linker, read_mentions(source), output, top_k=top_k, batch_size=4, origin=LinkOrigin(source, "model")
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(path, other):
    """Asserts that two files have the same results. Scores that differ by rounding may change places."""
    for record, wanted in zip(lines(path), lines(other), strict=True):
        one, two = record.pop("linked"), wanted.pop("linked")
        assert record == wanted
        scores, expected = ([c["score"] for c in result["candidates"]] for result in (one, two))
        assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for key in ("mention", "start", "end", "is_nil", "nil_threshold", "num_tied", "needs_review"):
            assert one[key] == two[key], key
        pairs = zip(one["candidates"], two["candidates"], strict=True)
        for place, (candidate, target) in enumerate(pairs):
            if candidate["entity_id"] != target["entity_id"]:
                near = [c["entity_id"] for c in two["candidates"] if abs(c["score"] - scores[place]) < 1e-5]
                if abs(scores[-1] - scores[place]) < 1e-5:  # another of those that tie may be cut off
                    continue
                assert candidate["entity_id"] in near
            else:
                assert {**candidate, "score": 0, "unit_scores": 0, "reranker_score": 0} == {
                    **target,
                    "score": 0,
                    "unit_scores": 0,
                    "reranker_score": 0,
                }
        assert one["certified"]
        assert one["bound"] is None or one["bound"] <= scores[-1] + 1e-5


CASES = {
    "plain": ({}, 5),
    "one candidate": ({"nil_threshold": 0.5}, 1),
    "more than there are": ({}, 60),
    "names": ({"name_weight": 0.7}, 4),
    "filter": ({"where": "name in ('Entity a', 'Entity bb', 'Entity c', 'Entity d')"}, 3),
    "bonus": ({"soft": "name in ('Entity a', 'Entity b')", "soft_bonus": 0.5}, 3),
    "penalty": ({"soft": "name in ('Entity a', 'Entity b')", "soft_bonus": -0.5}, 3),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_relinking_equals_linking_anew_after_any_edits(tmp_path, case, kind):
    options, top_k = CASES[case]
    model = MODELS[kind]
    source = write_rows(tmp_path)
    for seed in range(2):
        draw = random.Random(f"{case} {seed}")
        kb = base_of(tmp_path / f"kb{seed}", model, draw)
        results = tmp_path / f"linked{seed}.jsonl"
        link_all(EntityLinker(model, PROCESSOR, kb, **options), source, results, top_k)
        for edits in (1, 4, 0):  # results of one relinking are relinked by the next
            edit(kb, model, draw, edits)
            linker = EntityLinker(model, PROCESSOR, kb, **options)
            before = lines(results)
            report = relink_file(linker, results, results, batch_size=3)
            link_all(linker, source, tmp_path / "anew.jsonl", top_k)
            assert_same(results, tmp_path / "anew.jsonl")
            assert report.num_encoded <= report.num_mentions
            assert edits or not report.num_encoded
            differing = {
                number
                for number, (old, new) in enumerate(zip(before, lines(results), strict=True), 1)
                if old["linked"]["candidates"] != new["linked"]["candidates"]
            }
            changed = {change.line for change in report.changes}
            assert changed <= differing
            ids = [
                [[c["entity_id"] for c in r["linked"]["candidates"]] for r in side]
                for side in (before, lines(results))
            ]
            assert {n for n, (a, b) in enumerate(zip(*ids, strict=True), 1) if a != b} <= changed


@pytest.mark.parametrize("joint", [False, True])
def test_a_reranker_reranks_what_it_reads_together(tmp_path, joint):
    model, draw = MODELS["bounds"], random.Random(3)
    reranker = toy_reranker()
    kb = base_of(tmp_path / "kb", model, draw)
    rows = [{**row, "context_id": f"c{k // 3}"} for k, row in enumerate(ROWS)]
    source, results = write_rows(tmp_path, rows), tmp_path / "linked.jsonl"
    options = {"reranker": reranker, "reranker_processor": ToyPairProcessor(), "rerank_k": 4 if joint else 2}
    link_all(EntityLinker(model, PROCESSOR, kb, **options), source, results, 3)
    edit(kb, model, draw, 3)
    linker = EntityLinker(model, PROCESSOR, kb, **options)
    relink_file(linker, results, results)
    link_all(linker, source, tmp_path / "anew.jsonl", 3)
    assert_same(results, tmp_path / "anew.jsonl")


def test_bounds_clear_mentions_that_are_then_not_encoded(tmp_path, monkeypatch):
    model, draw = MODELS["bounds"], random.Random(0)
    kb = base_of(tmp_path / "kb", model, draw, 60)
    source, results = write_rows(tmp_path), tmp_path / "linked.jsonl"
    linker = EntityLinker(model, PROCESSOR, kb)
    link_all(linker, source, results, 2)
    worst = min(set(kb.entity_ids) - {c["entity_id"] for r in lines(results) for c in r["linked"]["candidates"]})
    name = kb.rows([kb.row_of(worst)])[0]["name"]
    floors = [r["linked"]["candidates"][-1]["score"] for r in lines(results)]
    kb.add(as_dataset([entity(int(worst[1:]) + 3000, name)]), model, PROCESSOR, progress=False)
    linker = EntityLinker(model, PROCESSOR, kb)
    scores = [
        next(
            c["score"]
            for c in linker(r, top_k=61).to_dict()["candidates"]
            if c["entity_id"] == f"Q{int(worst[1:]) + 3000}"
        )
        for r in ROWS
    ]
    report = relink_file(linker, results, tmp_path / "new.jsonl")
    may_reach = sum(score > floor - 0.1 * abs(floor) for score, floor in zip(scores, floors, strict=True))
    assert report.num_encoded <= may_reach < len(ROWS)
    # The bounds of mentions that were not encoded count the new entity.
    for record, score in zip(lines(tmp_path / "new.jsonl"), scores, strict=True):
        bound = record["linked"]["bound"]
        in_list = f"Q{int(worst[1:]) + 3000}" in [c["entity_id"] for c in record["linked"]["candidates"]]
        assert in_list or bound is None or bound >= score - 1e-6


def linked(tmp_path, **options):
    model = MODELS["bounds"]
    kb = base_of(tmp_path / "kb", model, random.Random(1))
    source, results = write_rows(tmp_path), tmp_path / "linked.jsonl"
    linker = EntityLinker(model, PROCESSOR, kb, **options)
    link_all(linker, source, results, 3)
    return linker, results


def test_bad_results_are_refused(tmp_path):
    linker, results = linked(tmp_path)
    content, path = results.read_bytes(), trace_path(results)
    traces = path.read_bytes()
    results.write_bytes(content.replace(b"Entity a", b"Entity z", 1))
    with pytest.raises(DataFormatError, match="were changed after they were linked"):
        relink_file(linker, results)
    results.write_bytes(content)
    for damaged in (traces[:100], b"", traces[: len(traces) // 2], b"{}" * 50):
        path.write_bytes(damaged)
        with pytest.raises(DataFormatError, match="traces of the results are damaged"):
            relink_file(linker, results)
    path.unlink()
    with pytest.raises(DataFormatError, match=r"no traces.*--relinkable"):
        relink_file(linker, results)
    with pytest.raises(DataFormatError, match="does not exist"):
        relink_file(linker, tmp_path / "none.jsonl")


def test_results_that_another_program_replaces_meanwhile_are_refused(tmp_path, monkeypatch):
    linker, results = linked(tmp_path)
    output, compared = tmp_path / "new.jsonl", relinking._Relinker._compared

    def link_again(self, changed):
        outcome = compared(self, changed)
        link_all(linker, tmp_path / "mentions.jsonl", results, 3)
        return outcome

    monkeypatch.setattr(relinking._Relinker, "_compared", link_again)
    with pytest.raises(DataFormatError, match="were changed while"):
        relink_file(linker, results, output)
    assert not output.exists()
    assert not trace_path(output).exists()


def test_results_that_are_linked_again_without_traces_have_none(tmp_path):
    linker, results = linked(tmp_path)
    link_file(linker, read_mentions(tmp_path / "mentions.jsonl"), results, top_k=3)
    with pytest.raises(DataFormatError, match=r"no traces.*--relinkable"):
        relink_file(linker, results)


def test_a_kill_at_any_moment_leaves_results_with_their_traces(tmp_path, monkeypatch):
    linker, results = linked(tmp_path)
    old = results.read_bytes()
    edit(linker.kb, MODELS["bounds"], random.Random(3), 12)
    whole = tmp_path / "whole.jsonl"
    relink_file(linker, results, whole)
    assert whole.read_bytes() != old
    copies, replace = [], Path.replace

    def watched(path, target):
        for moment in ("before", "after"):
            copies.append(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{len(copies)}")))
            path = replace(path, target) if moment == "before" else path

    monkeypatch.setattr(Path, "replace", watched)
    relink_file(linker, results, results)  # edited and written in place
    source = tmp_path / "mentions.jsonl"
    link_all(linker, source, tmp_path / "linked_anew.jsonl", 3)
    monkeypatch.undo()
    assert results.read_bytes() == whole.read_bytes()
    seen = set()
    for folder in copies:
        stored = folder / results.name
        seen.add(stored.read_bytes())
        relink_file(linker, stored, stored)
        assert stored.read_bytes() == whole.read_bytes()
        assert not (folder / ".linked.jsonl.relink").exists()
        if (anew := folder / "linked_anew.jsonl").is_file():
            Traces.read(anew)
    assert seen == {old, whole.read_bytes()}
    link_file(linker, read_mentions(source), copies[0] / results.name, top_k=3)
    assert sorted(path.name for path in copies[0].glob("*.relink")) == ["whole.jsonl.relink"]


def test_two_kills_in_a_row_leave_results_with_their_traces(tmp_path, monkeypatch):
    linker, results = linked(tmp_path)
    replace, folders = Path.replace, []

    def relink_and_be_killed(folder, num_renames):
        left = iter(range(num_renames))

        def rename(path, target):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return replace(path, target)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "replace", rename)
            relink_file(linker, folder / results.name, folder / results.name)

    edit(linker.kb, MODELS["bounds"], random.Random(3), 12)
    for first in range(3):
        for second in range(4):
            folders.append((tmp_path / f"{first}-{second}", second))
            folders[-1][0].mkdir()
            for path in (results, trace_path(results), tmp_path / "mentions.jsonl"):
                shutil.copy(path, folders[-1][0])
            relink_and_be_killed(folders[-1][0], first)
    edit(linker.kb, MODELS["bounds"], random.Random(4), 12)
    link_all(linker, tmp_path / "mentions.jsonl", tmp_path / "anew.jsonl", 3)
    for folder, second in folders:
        relink_and_be_killed(folder, second)
        relink_file(linker, folder / results.name, folder / results.name)
        assert_same(folder / results.name, tmp_path / "anew.jsonl")


def test_another_model_knowledge_base_or_setting_is_refused(tmp_path):
    linker, results = linked(tmp_path)
    model = MODELS["bounds"]
    with pytest.raises(DataFormatError, match=r"other settings: nil_threshold was None and is 3\.0"):
        relink_file(EntityLinker(model, PROCESSOR, linker.kb, nil_threshold=3.0), results)
    other = bounded()
    with torch.no_grad():
        other.mention_text.bias += 1
    elsewhere = base_of(tmp_path / "other", other, random.Random(1))
    with pytest.raises(DataFormatError, match="another model: its weights differ"):
        relink_file(EntityLinker(other, PROCESSOR, elsewhere), results)
    built_again = base_of(tmp_path / "third", model, random.Random(2))
    with pytest.raises(KnowledgeBaseError, match="not of this knowledge base"):
        relink_file(EntityLinker(model, PROCESSOR, built_again), results)
    build_index(linker.kb, "faiss-flat", model, PROCESSOR, progress=False)
    approximate = EntityLinker(model, PROCESSOR, linker.kb, index="faiss-flat")
    with pytest.raises(MelError, match="may miss entities"):
        link_all(approximate, tmp_path / "mentions.jsonl", tmp_path / "x.jsonl", 3)
    with pytest.raises(MelError, match="bfloat16"):
        link_all(
            EntityLinker(model, PROCESSOR, linker.kb, bf16=True), tmp_path / "mentions.jsonl", tmp_path / "x.jsonl", 3
        )


def test_a_knowledge_base_whose_encodings_are_the_same_and_whose_state_is_not_is_refused(tmp_path):
    model, source, results = MODELS["bounds"], write_rows(tmp_path), tmp_path / "linked.jsonl"

    def built(name: str, born: int) -> KnowledgeBase:
        rows = [entity(number, f"Entity {letter}") | {"born": born} for number, letter in enumerate("abcdef")]
        table = datasets.Dataset.from_list(rows, features=entity_features(born=datasets.Value("int64")))
        return KnowledgeBase.build(table, model, PROCESSOR, output=tmp_path / name, progress=False)

    kb, other_column, other_removal = built("kb", 1900), built("again", 1800), built("backup", 1900)
    assert kb.shards == other_column.shards == other_removal.shards
    kb.remove(["Q0"])
    other_column.remove(["Q0"])
    other_removal.remove(["Q1"])
    linker = EntityLinker(model, PROCESSOR, kb, where="born < 2000")
    link_all(linker, source, results, 3)
    relink_file(linker, results)
    for changed in (other_column, other_removal):
        with pytest.raises(KnowledgeBaseError, match="not of this knowledge base"):
            relink_file(EntityLinker(model, PROCESSOR, changed, where="born < 2000"), results)


def test_a_missing_image_stops_relinking_and_leaves_the_results(tmp_path):
    model = MODELS["bounds"]
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    source = write_rows(tmp_path, [{**ROWS[0], "image": "a.png"}])
    kb = base_of(tmp_path / "kb", model, random.Random(1))
    (tmp_path / "out").mkdir()
    results = tmp_path / "out" / "linked.jsonl"
    link_all(EntityLinker(model, PROCESSOR, kb), source, results, 3)
    kb.remove([lines(results)[0]["linked"]["candidates"][0]["entity_id"]])
    content = results.read_bytes()
    linker = EntityLinker(model, PROCESSOR, kb)
    relink_file(linker, results)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png"):
        relink_file(linker, results, results)
    assert results.read_bytes() == content


def test_an_interrupted_run_keeps_its_traces(tmp_path, monkeypatch):
    model = MODELS["bounds"]
    kb = base_of(tmp_path / "kb", model, random.Random(1))
    source, linker = write_rows(tmp_path), EntityLinker(model, PROCESSOR, kb)
    link_all(linker, source, tmp_path / "whole.jsonl", 3)
    original, calls = linker.link_encoded, []

    def interrupted(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(linker, "link_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        link_all(linker, source, tmp_path / "out.jsonl", 3)
    monkeypatch.undo()
    with pytest.raises(MelError, match="leave out --resume"):
        link_file(linker, read_mentions(source), tmp_path / "out.jsonl", top_k=3, batch_size=4, resume=True)
    link_file(
        linker,
        read_mentions(source),
        tmp_path / "out.jsonl",
        top_k=3,
        batch_size=4,
        resume=True,
        origin=LinkOrigin(source, "model"),
    )
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    parts = [vars(Traces.read(tmp_path / name)) for name in ("out.jsonl", "whole.jsonl")]
    for name in ("settings", "origin", "lines", "physical_rows", "scores", "num_tied", "has_namesakes"):
        np.testing.assert_array_equal(parts[0][name], parts[1][name])
    for one, other in zip(*(vars(part["queries"]).values() for part in parts), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("world", WORLDS)
def test_bounds_of_stored_mentions_are_above_the_scores(world):
    entities = WORLDS[world].astype(np.float32)
    count, dim = entities.shape
    extras = normal(count, 2).astype(np.float32)
    queries = np.concatenate([normal(5, dim), entities[:: max(1, count // 5)][:5], np.zeros((1, dim))]).astype(
        np.float32
    )
    weights = np.abs(normal(len(queries), 2)).astype(np.float32)
    constants = normal(len(queries)).astype(np.float32)
    exact = queries.astype(np.float64) @ entities.T.astype(np.float64)
    exact += weights.astype(np.float64) @ extras.T.astype(np.float64) + constants[:, None]
    rounded = (
        (torch.from_numpy(queries) @ torch.from_numpy(entities).T).numpy() + weights @ extras.T + constants[:, None]
    )
    bounds = QueryCodes.of(queries, weights, constants).bounds(entities, extras)
    assert (bounds >= exact).all()
    assert (bounds >= rounded).all()
    size = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(entities.astype(np.float64), axis=1)
    loosest = 0.01 * size * np.sqrt(dim) + 1e-3 * (np.abs(exact).max() + size.max() + 1)
    assert (bounds - exact <= loosest).all()


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(link)
app.command()(relink)


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_shows_the_difference_and_writes_the_new_results(tmp_path):
    register()
    model = toy_model()
    model.save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    kb = base_of(tmp_path / "kb", model, random.Random(1))
    source, results, new = write_rows(tmp_path), tmp_path / "linked.jsonl", tmp_path / "new.jsonl"
    shown = run("link", tmp_path / "model", "--kb", kb.path, "--input", source, "--output", results, "--relinkable")
    assert "hf-mel relink" in shown.output
    gone = lines(results)[0]["linked"]["entity_id"]
    shown = run("relink", results, "--kb", kb.path)
    assert "0 of 13 results changed" in shown.output
    kb.remove([gone])
    shown = run("relink", results, "--kb", kb.path).output
    assert gone in shown
    assert "Nothing was written" in shown
    content = json.loads(run("relink", results, "--kb", kb.path, "--output", new, "--json").stdout)
    assert content["changes"][0]["change"] == "link"
    assert content["num_gone_entities"] == 1
    first = next(change for change in content["changes"] if change["line"] == 1)
    assert (first["before"]["entity_id"], first["after"]["entity_id"]) == (gone, lines(new)[0]["linked"]["entity_id"])
    assert gone not in new.read_text()
    shown = run("relink", new, "--kb", kb.path).output
    assert "0 of 13 results changed" in shown
    assert "NIL threshold" not in shown
    model.config.nil_threshold = 0.25
    model.save_pretrained(tmp_path / "model")
    shown = run("relink", new, "--kb", kb.path).output
    assert "keep the NIL threshold that they were linked with (none), and that of the model is 0.25." in shown
    assert "0 of 13 results changed" in shown


def test_relinkable_needs_a_file_and_a_knowledge_base(tmp_path):
    for options in (
        ["--text", "a", "--mention", "a", "--kb", "x"],
        ["--input", "x.csv", "--output", "y.jsonl", "--entities", "z.csv"],
    ):
        result = run("link", "m", *options, "--relinkable")
        assert result.exit_code == 2
        assert "--relinkable" in result.output
