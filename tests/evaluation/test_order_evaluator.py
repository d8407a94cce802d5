"""Orders of candidates without a model, against counts by hand and by `collections.Counter`."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import datasets
import pytest
import typer
from typer.testing import CliRunner

from hf_mel.candidates.lists import CandidateLists
from hf_mel.candidates.make import make_candidates
from hf_mel.candidates.sources import bm25_candidates, dictionary_candidates, exact_candidates, namesake_candidates
from hf_mel.cli.evaluate import evaluate
from hf_mel.data.loading import load_entities, load_mentions
from hf_mel.errors import MissingExtraError, RecipeError, UnknownEntityError
from hf_mel.evaluation import OrderEvaluator
from hf_mel.evaluation.candidate_evaluator import END_TO_END, GOLD_ADDED
from hf_mel.evaluation.order_evaluator import RANDOM_ORDER
from hf_mel.schema import NIL
from tests.candidates.test_sources import entities_of, mentions_of
from tests.toy import write_toy_dataset

#: Names and aliases of the entities Q0, Q1, …
NAMES = [
    ["Paris"],
    ["Paris", "Paris, Texas"],
    ["Paris Hilton"],
    ["Mercury", "Quicksilver"],
    ["Mercury (planet)", "Mercury"],
    ["Freddie Mercury"],
    ["Georgia"],
    ["Georgia (state)", "Georgia", "Peach State"],
]
#: Surface form and gold of twelve training mentions.
TRAIN = [
    *[("Paris", "Q0")] * 3,
    ("paris", "Q2"),
    ("Paris", "Q2"),
    *[("Mercury", "Q4")] * 2,
    ("Mercury", "Q5"),
    ("Mercury", NIL),
    ("Georgia", "Q7"),
    ("Peach State", "Q7"),
    ("Texas", "Q1"),
]
#: Surface form and gold of twenty test mentions.
TEST = [
    ("Paris", "Q0"),
    ("Paris", "Q1"),
    ("PARIS", "Q2"),
    ("Paris", "Q0"),
    ("Pâris", "Q0"),
    ("Paris Hilton", "Q2"),
    ("Paris, Texas", "Q1"),
    ("Texas", "Q1"),
    ("Mercury", "Q3"),
    ("Mercury", "Q4"),
    ("Mercury", "Q5"),
    ("mercury", "Q4"),
    ("Quicksilver", "Q3"),
    ("Freddie", "Q5"),
    ("Mercury", NIL),
    ("Georgia", "Q6"),
    ("Georgia", "Q7"),
    ("Peach State", "Q7"),
    ("the queen", "Q5"),
    ("", "Q0"),
]
ENTITIES, MENTIONS = entities_of(NAMES), mentions_of([s for s, _ in TEST], [g for _, g in TEST])
TRAINING = mentions_of([s for s, _ in TRAIN], [g for _, g in TRAIN], prefix="t")


def plain(surface: str) -> str:
    return surface.lower().replace("â", "a")


def hits_at_1(source: str, **options) -> float:
    lists = make_candidates(source, MENTIONS, ENTITIES, training=TRAINING, **options)
    return OrderEvaluator(ENTITIES)(MENTIONS, lists).metrics["hits@1"]


def test_the_prior_is_the_most_frequent_gold_of_the_surface_form():
    counts: dict[str, Counter] = {}
    for surface, gold in TRAIN:
        counts.setdefault(plain(surface), Counter())[gold] += gold != NIL
    expected = [
        bool(counts.get(plain(surface))) and counts[plain(surface)].most_common(1)[0][0] == gold
        for surface, gold in TEST
        if gold != NIL
    ]
    assert hits_at_1("prior") == pytest.approx(sum(expected) / 19)
    assert sum(expected) == 8


def test_exact_names():
    lists = exact_candidates(MENTIONS, ENTITIES)
    expected = []
    for surface, _ in TEST:
        named = {f"Q{i}": 1.0 for i, names in enumerate(NAMES) if surface and plain(names[0]) == plain(surface)}
        alias = {f"Q{i}": 0.5 for i, names in enumerate(NAMES) if plain(surface) in map(plain, names[1:])}
        expected.append({**alias, **named})
    assert [
        dict(zip(*pair, strict=True)) for pair in zip(lists.entity_ids, lists.scores["exact"], strict=True)
    ] == expected
    assert all(scores == sorted(scores, reverse=True) for scores in lists.scores["exact"])
    # Paris has two, whose tie counts half way between first and second, so neither is a hit at 1.
    firsts = [("Q2", "Paris Hilton"), ("Q1", "Paris, Texas"), ("Q3", "Mercury"), ("Q3", "Quicksilver")]
    firsts += [("Q6", "Georgia"), ("Q7", "Peach State")]
    assert hits_at_1("exact") == pytest.approx(sum(Counter((g, s) for s, g in TEST)[pair] for pair in firsts) / 19)


def test_namesakes_are_drawn_by_seed_and_mention():
    all_of = dictionary_candidates(MENTIONS, ENTITIES)
    lists = [namesake_candidates(MENTIONS, ENTITIES, seed=seed) for seed in range(200)]
    for drawn in lists[:3]:
        assert [set(ids) for ids in drawn.entity_ids] == [set(ids) for ids in all_of.entity_ids]
    assert lists[0].entity_ids == namesake_candidates(MENTIONS, ENTITIES, seed=0).entity_ids
    # Every order of the three namesakes of Mercury occurs about equally often.
    orders = Counter(tuple(drawn.entity_ids[8]) for drawn in lists)
    assert set(orders) == set(itertools.permutations(all_of.entity_ids[8]))
    assert min(orders.values()) > 15
    assert any(drawn.entity_ids[8] != drawn.entity_ids[9] for drawn in lists)
    cut = namesake_candidates(MENTIONS, ENTITIES, k=1)
    assert [ids[:1] for ids in lists[0].entity_ids] == cut.entity_ids


@pytest.mark.parametrize("protocol", [END_TO_END, GOLD_ADDED])
def test_the_expectation_is_the_mean_over_all_orders(protocol):
    lists = dictionary_candidates(MENTIONS, ENTITIES)
    expected = OrderEvaluator(ENTITIES, ks=(1, 2, 3))(MENTIONS, lists).orders[protocol][RANDOM_ORDER]["metrics"]
    sums: Counter = Counter()
    for (_, gold), ids in zip(TEST, lists.entity_ids, strict=True):
        if gold == NIL:
            continue
        ids = sorted({*ids, gold}) if protocol == GOLD_ADDED else ids
        orders = list(itertools.permutations(ids)) or [()]
        for order in orders:
            rank = order.index(gold) + 1 if gold in order else math.inf
            sums["mrr"] += 1 / rank / len(orders)
            sums["mr"] += min(rank, len(NAMES)) / len(orders)
            for k in (1, 2, 3):
                sums[f"hits@{k}"] += (rank <= k) / len(orders)
    for name, total in sums.items():
        assert expected[name] == pytest.approx(total / 19), name
    assert expected["num_ranked"] == 19
    assert expected["num_nil"] == 1


def test_bm25_equals_its_formula():
    """Of Lucene, with k1 = 1.5 and b = 0.75, the defaults of the package."""
    pytest.importorskip("bm25s")
    entities = ENTITIES.map(
        lambda row, i: {"description": ["a city of France", "a town", "an heiress"][i % 3]}, with_indices=True
    )
    texts = [" ".join([*row["aliases"], row["name"], row["description"]]) for row in entities]
    documents = [Counter("".join(c if c.isalnum() else " " for c in plain(text)).split()) for text in texts]
    mean = sum(sum(words.values()) for words in documents) / len(documents)
    lists = bm25_candidates(MENTIONS, entities)
    for (surface, _), ids, scores in zip(TEST, lists.entity_ids, lists.scores["bm25"], strict=True):
        expected = {}
        for i, words in enumerate(documents):
            score = 0.0
            for word in "".join(c if c.isalnum() else " " for c in plain(surface)).split():
                holders = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
                length = sum(words.values()) / mean
                score += idf * words[word] / (words[word] + 1.5 * (1 - 0.75 + 0.75 * length))
            if score > 0:
                expected[f"Q{i}"] = score
        assert dict(zip(ids, scores, strict=True)) == pytest.approx(expected, rel=1e-5)
        assert scores == sorted(scores, reverse=True)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"hf_mel\[bm25\]"):
        bm25_candidates(MENTIONS, ENTITIES)


def test_the_order_of_several_sources_is_that_of_the_lists():
    lists = make_candidates("exact+prior", MENTIONS, ENTITIES, training=TRAINING)
    result = OrderEvaluator(ENTITIES)(MENTIONS, lists)
    places = [
        (ids.index(gold) + 1 if gold in ids else None) for (_, gold), ids in zip(TEST, lists.entity_ids, strict=True)
    ]
    assert [None if math.isnan(rank) else rank for rank in result.ranks[END_TO_END]] == places
    assert {"candidates: exact", "candidates: prior", RANDOM_ORDER} < set(result.orders[END_TO_END])
    for record, ids in zip(result.records(), lists.entity_ids, strict=True):
        assert [candidate["entity_id"] for candidate in record["candidates"]] == ids


def test_no_candidates_and_unknown_ones():
    empty = CandidateLists(list(MENTIONS["mention_id"]), [[] for _ in TEST], {"exact": [[] for _ in TEST]})
    result = OrderEvaluator(ENTITIES)(MENTIONS, empty)
    assert result.metrics["hits@1"] == 0
    assert result.orders[END_TO_END][RANDOM_ORDER]["metrics"]["mrr"] == 0
    wrong = CandidateLists(list(MENTIONS["mention_id"]), [["Q99"] for _ in TEST], {})
    with pytest.raises(UnknownEntityError, match="Q99"):
        OrderEvaluator(ENTITIES)(MENTIONS, wrong)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("hf_mel.candidates.make.default_cache", lambda: tmp_path / "lists")
    app = typer.Typer()
    app.command()(evaluate)
    data = write_toy_dataset(tmp_path / "data")

    def run(*arguments):
        words = ["--dataset", str(data), *map(str, arguments)]
        return CliRunner().invoke(app, words, env={"COLUMNS": "200"}, catch_exceptions=False)

    return run


def test_the_command_writes_what_an_evaluation_writes(run, tmp_path):
    done = run(
        "--no-model", "--candidates", "exact", "--output", tmp_path / "r.json", "--predictions", tmp_path / "p.jsonl"
    )
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["model"] is None
    assert results["order"] == "candidates: exact"
    assert results["metrics"]["hits@1"] == 1  # names in the toy data are unique
    assert results["strata"]["gold in training"]
    assert results["candidates"]["source"] == "exact"
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == results["num_mentions"]
    assert "random order" in done.output


def test_the_command_keeps_what_mentions_of_a_document_share_beyond_its_number_of_candidates(run, tmp_path):
    done = run("--no-model", "--candidates", "name+shared", "--num-candidates", 1, "--output", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    mentions, entities = load_mentions(tmp_path / "data", "test"), load_entities(tmp_path / "data")
    lists = make_candidates("name+shared", mentions, entities, k=1)
    assert lists.longest > 1
    mean_length = json.loads((tmp_path / "r.json").read_text())["candidates"]["mean_length"]
    assert mean_length == sum(map(len, lists.entity_ids)) / len(lists)


def test_the_command_says_what_is_missing_or_too_much(run):
    with pytest.raises(RecipeError, match="none were given"):
        run("--no-model")
    with pytest.raises(RecipeError, match="--joint"):
        run("--no-model", "--candidates", "exact", "--joint")
    assert "no-model" in run("--candidates", "exact").output
    assert run("runs/x", "--no-model", "--candidates", "exact").exit_code == 2
