"""Tests of the full protocol against sorting the scores of one forward pass over all pairs."""

import json

import numpy as np
import pytest
import torch

from hf_mel.candidates.name_index import NAMESAKE_SCORE
from hf_mel.errors import (
    DataFormatError,
    DuplicateIdError,
    KnowledgeBaseError,
    RecipeError,
    ScoreError,
    UnknownEntityError,
)
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.evaluation.name_weight import choose_name_weight
from hf_mel.inference.encode import encode_rows
from hf_mel.inference.entity_sources import EncodedEntities
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.selective import RiskCoverage
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.names import words_of
from hf_mel.schema import NIL
from tests.toy import ToyProcessor, toy_entities, toy_mentions, toy_model

MODEL, PROCESSOR = toy_model(), ToyProcessor()
MENTIONS, ENTITIES = toy_mentions(20, entities=12, nil_every=5), toy_entities(15)


def evaluate(mentions=MENTIONS, entities=ENTITIES, model=MODEL, **options):
    return FullEvaluator(entities, progress=False, **options)(ModelInputs(model, PROCESSOR), mentions)


def forward(mentions=MENTIONS, entities=ENTITIES, unit=None):
    inputs = PROCESSOR(
        mentions=[mentions[i] for i in range(len(mentions))], entities=[entities[i] for i in range(len(entities))]
    )
    with torch.no_grad():
        output = MODEL(**inputs)
    return (output.scores if unit is None else output.unit_scores[unit]).numpy()


def sorted_ranks(scores, mentions=MENTIONS, entities=ENTITIES):
    """Returns the ranks of the golds, `None` for NIL. The scores of a random model do not tie."""
    ids = np.array(entities["entity_id"])
    lists = [list(ids[np.argsort(-row)]) for row in scores]
    return [
        1 + ids.index(gold) if gold != NIL else None for ids, gold in zip(lists, mentions["entity_id"], strict=True)
    ]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("byte_budget", [1, 20_000, 2**29])
def test_metrics_agree_with_sorted_scores(batch_size, byte_budget):
    result = evaluate(batch_size=batch_size, byte_budget=byte_budget, ks=(1, 4))
    ranks = [rank for rank in sorted_ranks(forward()) if rank is not None]
    assert len(ranks) == 16
    assert result.metrics["hits@1"] == pytest.approx(mean(rank <= 1 for rank in ranks))
    assert result.metrics["hits@4"] == pytest.approx(mean(rank <= 4 for rank in ranks))
    assert result.metrics["mrr"] == pytest.approx(mean(1 / rank for rank in ranks))
    assert result.metrics["mr"] == pytest.approx(mean(ranks))
    assert (result.metrics["num_ranked"], result.metrics["num_mentions"], result.metrics["num_nil"]) == (16, 20, 4)


@pytest.mark.parametrize("unit", ["text", "vision"])
def test_a_single_unit_ranks_by_its_scores(unit):
    result = evaluate(units=[unit])
    ids = list(ENTITIES["entity_id"])
    for i, (row, gold) in enumerate(zip(forward(unit=unit), MENTIONS["entity_id"], strict=True)):
        if gold != NIL:
            # Entities without an image have equal vision scores, so they tie.
            difference = row - row[ids.index(gold)]
            assert result.ranking.best_rank[i] == 1 + sum(difference > 1e-6)
            assert result.ranking.worst_rank[i] == sum(difference >= -1e-6)
    assert result.setting["units"] == [unit]


def test_the_score_is_the_mean_of_all_units():
    assert evaluate(units=["text", "vision"]).metrics == evaluate().metrics
    with pytest.raises(RecipeError, match=r"no unit 'sound'\. It has text, vision"):
        evaluate(units=["text", "sound"])
    with pytest.raises(RecipeError, match="text, vision"):
        evaluate(units=[])


def test_an_unknown_unit_is_an_error_before_all_rows_are_encoded():
    model, encoded = toy_model(), []
    encode = model.encode_entities
    model.encode_entities = lambda **inputs: (encoded.append(len(inputs["entity_input_ids"])), encode(**inputs))[1]
    with pytest.raises(RecipeError, match="sound"):
        evaluate(model=model, units=["sound"])
    assert sum(encoded) == 1


def test_strata_have_the_metrics_of_their_mentions():
    result = evaluate(train_golds={"Q1", "Q8"}, nil_threshold=0.05)
    names = {"stratum", "mentions in context", "name of mention", "image of mention", "gold in training"}
    assert result.strata.keys() == names
    assert result.strata["stratum"].keys() == {"text", "image", "both"}
    for group, metrics in result.strata["stratum"].items():
        rows = MENTIONS.filter(lambda row, group=group: row["stratum"] == group)
        assert metrics == pytest.approx(evaluate(rows, nil_threshold=0.05).metrics, nan_ok=True)
    by_name = result.strata["name of mention"]  # all toy names differ
    num_in_kb = len(MENTIONS) - list(MENTIONS["entity_id"]).count(NIL)
    assert {name: group["num_mentions"] for name, group in by_name.items()} == {"unambiguous": num_in_kb}
    seen = result.strata["gold in training"]["seen"]
    ranks = sorted_ranks(forward())
    assert seen["mrr"] == pytest.approx(
        mean(1 / ranks[i] for i, gold in enumerate(MENTIONS["entity_id"]) if gold in {"Q1", "Q8"})
    )
    assert seen["num_nil"] == 0


def test_nil_decisions():
    scores, best = forward(), evaluate().ranking.top_scores[:, 0].tolist()
    threshold = sorted(best)[10]  # the mention with this score is linked
    result = evaluate(nil_threshold=threshold)
    ids, golds = np.array(ENTITIES["entity_id"]), MENTIONS["entity_id"]
    answers = [NIL if top < threshold else ids[row.argmax()] for top, row in zip(best, scores, strict=True)]
    assert answers.count(NIL) == 10
    correct = [answer == gold for answer, gold in zip(answers, golds, strict=True)]
    assert result.metrics["accuracy"] == pytest.approx(mean(correct))
    assert result.metrics["in_kb_accuracy"] == pytest.approx(
        mean(ok for ok, gold in zip(correct, golds, strict=True) if gold != NIL)
    )
    assert result.metrics["nil_recall"] == pytest.approx(
        mean(ok for ok, gold in zip(correct, golds, strict=True) if gold == NIL)
    )
    assert result.metrics["nil_precision"] == pytest.approx(
        mean(ok for ok, answer in zip(correct, answers, strict=True) if answer == NIL)
    )
    assert result.metrics["mrr"] == evaluate().metrics["mrr"]
    assert "accuracy" not in evaluate().metrics


@pytest.mark.parametrize("nil_every", [0, 5])
def test_calibrated_threshold_reaches_its_accuracy(nil_every):
    mentions = toy_mentions(20, entities=12, nil_every=nil_every)
    calibrated = evaluate(mentions).calibrate_nil_threshold()
    assert calibrated.simulated == (nil_every == 0)
    if nil_every:
        assert evaluate(mentions, nil_threshold=calibrated.threshold).metrics["accuracy"] == pytest.approx(
            calibrated.accuracy
        )


def test_the_threshold_of_a_model_that_learns_nil_has_the_best_f1():
    result = evaluate(toy_mentions(20, entities=12, nil_every=5))
    assert result.calibrate_nil_threshold().objective == "accuracy"
    result.nil_is_learned = True
    assert result.calibrate_nil_threshold() == result.calibrate_nil_threshold("f1")
    assert result.calibrate_nil_threshold("accuracy").objective == "accuracy"
    known = evaluate(toy_mentions(20, entities=12, nil_every=0))
    known.nil_is_learned = True
    assert known.calibrate_nil_threshold().objective == "accuracy"  # there is no NIL but a simulated one


def test_ties_are_ranked_by_the_policy():
    twice = ENTITIES.map(lambda row: {**row, "name": "Same", "attributes": "", "images": []})
    in_kb = MENTIONS.filter(lambda row: row["entity_id"] != NIL)
    results = {ties: evaluate(in_kb, twice, ties=ties).metrics for ties in ("realistic", "optimistic", "pessimistic")}
    assert [results[ties]["mr"] for ties in results] == [8, 1, 15]
    assert [results[ties]["hits@5"] for ties in results] == [0, 1, 0]


def test_records_have_ranks_and_the_best_entities():
    result = evaluate(top_k=3)
    records = list(result.records())
    assert json.loads(json.dumps(records)) == records
    ids, scores = np.array(ENTITIES["entity_id"]), forward()
    for record, row, gold, rank in zip(records, scores, MENTIONS["entity_id"], sorted_ranks(scores), strict=True):
        order = np.argsort(-row)[:3]
        assert [candidate["entity_id"] for candidate in record["candidates"]] == list(ids[order])
        assert [candidate["score"] for candidate in record["candidates"]] == pytest.approx(list(row[order]), abs=1e-6)
        assert (record["entity_id"], record["rank"], record["best_rank"]) == (gold, rank, rank)
        if gold == NIL:
            assert record["gold_score"] is None
        else:
            assert record["gold_score"] == pytest.approx(row[list(ids).index(gold)], abs=1e-6)


def test_encodings_are_reused():
    encoded = EncodedEntities(
        list(ENTITIES["entity_id"]), encode_rows(ModelInputs(MODEL, PROCESSOR), ENTITIES, "entities")
    )
    mentions = encode_rows(ModelInputs(MODEL, PROCESSOR), MENTIONS, "mentions")
    plain = evaluate(units=["text"])
    reused = FullEvaluator(encoded, units=["text"], progress=False)(
        ModelInputs(MODEL, None), MENTIONS, mention_encodings=mentions
    )
    assert reused.metrics == plain.metrics


def test_a_knowledge_base_gives_the_entities(tmp_path):
    kb = KnowledgeBase.build(ENTITIES, MODEL, PROCESSOR, output=tmp_path / "kb", progress=False)
    assert evaluate(entities=kb).metrics == evaluate().metrics


def test_the_setting_says_how_the_metrics_were_obtained():
    setting = evaluate(data_version={"dataset": "toy", "sha256": "00"}, ties="pessimistic").to_dict()
    assert setting["kb_size"] == 15
    assert (setting["num_mentions"], setting["num_nil"]) == (20, 4)
    assert setting["data"] == {"dataset": "toy", "sha256": "00"}
    assert (setting["ties"], setting["tie_tolerance"]) == ("pessimistic", 1e-6)
    assert len(setting["model"]["weights"]) == 64
    assert setting["software"]["torch"] == torch.__version__
    assert setting["device"] == "cpu"
    assert setting["wall_time_seconds"] > 0
    assert evaluate(model=toy_model(seed=1)).setting["model"] != setting["model"]


def test_the_model_returns_to_training_mode():
    model = toy_model().train()
    seen = []
    model.register_forward_pre_hook(lambda *_: None)
    encode = model.encode_mentions
    model.encode_mentions = lambda **inputs: (seen.append(model.training), encode(**inputs))[1]
    evaluate(model=model)
    assert model.training
    assert seen == [False]
    assert torch.is_grad_enabled()


def test_no_mention_one_mention_and_only_nil():
    empty = evaluate(MENTIONS.select([]))
    assert empty.metrics["num_mentions"] == 0
    assert np.isnan(empty.metrics["mrr"])
    one = evaluate(MENTIONS.select([0]), ENTITIES.select([0]))
    assert one.metrics["hits@1"] == one.metrics["mrr"] == 1
    only_nil = evaluate(MENTIONS.select([4]), nil_threshold=float("inf"))
    assert only_nil.metrics["nil_recall"] == only_nil.metrics["accuracy"] == 1
    assert np.isnan(only_nil.metrics["mrr"])
    assert next(iter(only_nil.records()))["rank"] is None


def test_invalid_input_is_an_error():
    with pytest.raises(UnknownEntityError, match=r"'Q3' of mention 'm2'"):
        evaluate(entities=ENTITIES.select([0, 1, 7, 9]))
    with pytest.raises(DuplicateIdError, match="'Q1'"):
        evaluate(entities=ENTITIES.select([*range(15), 0]))
    with pytest.raises(DuplicateIdError, match="'m0'"):
        evaluate(MENTIONS.select([0, 1, 0]))
    with pytest.raises(KnowledgeBaseError, match="no entities"):
        evaluate(entities=ENTITIES.select([]))
    with pytest.raises(DataFormatError, match="genre"):
        evaluate(strata=["genre"])
    with pytest.raises(ValueError, match="random"):
        evaluate(ties="random")
    broken = toy_model()
    with torch.no_grad():
        broken.mention_text.bias.fill_(float("nan"))
    with pytest.raises(ScoreError, match="mention 0 and entity row 0"):
        evaluate(model=broken)


def test_only_the_first_image_of_an_entity_is_decoded():
    broken = {"bytes": b"not an image", "path": None}
    stored = ENTITIES.with_format("arrow")[:].to_pylist()
    for row in stored:
        row["images"] = [*row["images"], broken] if row["images"] else []
    rows = type(ENTITIES).from_list(stored, features=ENTITIES.features)
    assert evaluate(entities=rows).metrics == evaluate().metrics


@pytest.mark.parametrize("learned", [False, True])
def test_links_at_a_stated_precision_are_counted_one_by_one(learned, monkeypatch):
    monkeypatch.setattr(MODEL, "learns_nil", learned, raising=False)
    mentions = toy_mentions(120, entities=12, nil_every=5)
    scores, golds, ids = forward(mentions), list(mentions["entity_id"]), np.array(ENTITIES["entity_id"])
    threshold = float(np.median(scores.max(1)) - 1)
    result = evaluate(mentions, nil_threshold=threshold)
    links = []  # confidence and whether it is right, of the mentions that are not predicted NIL
    for row, gold in zip(scores, golds, strict=True):
        second, best = np.sort(row)[-2:]
        if best >= threshold:
            links.append((best - (max(second, 0.0) if learned else second), ids[row.argmax()] == gold))
    curve = result.risk_coverage(threshold)
    assert curve.mentions == 120
    assert curve.links[-1] == len(links)
    assert curve.wrong[-1] == sum(not right for _, right in links)
    sure = float(np.median([confidence for confidence, _ in links])) + 1e-4
    calibration = RiskCoverage([sure, sure - 1], [90, 120], [0, 20], 120)  # passes at the first point alone
    outcome = result.at_precision(0.95, calibration, threshold)
    made = [right for confidence, right in links if confidence >= sure]
    assert outcome["links"] == len(made) > 0
    assert outcome["precision"] == pytest.approx(mean(made))
    assert outcome["nil"] == 120 - len(links)
    assert outcome["review"] == len(links) - len(made)
    assert outcome["coverage"] == pytest.approx(len(made) / 120)
    nothing = result.at_precision(0.95, RiskCoverage([], [], [], 0), threshold)
    assert (nothing["links"], nothing["precision"], nothing["threshold"]) == (0, None, None)
    json.dumps(nothing)


def test_nil_is_also_simulated_by_leaving_out_golds_that_training_lacks():
    scores, golds, ids = forward(), list(MENTIONS["entity_id"]), list(ENTITIES["entity_id"])
    train_golds = {"Q1", "Q2", "Q3"}
    nil, known, left_out = [], [], []
    for row, gold in zip(scores, golds, strict=True):
        if gold == NIL:
            nil.append(row.max())
            continue
        known.append(row.max())
        if gold not in train_golds:
            left_out.append(np.delete(row, ids.index(gold)).max())
    results = evaluate(nil_threshold=1.0).nil_detection(train_golds)
    for name, group in (("annotated", nil), ("left out", left_out)):
        assert results[name]["num"] == len(group) > 0
        assert results[name]["auc"] == pytest.approx(mean((a < b) + (a == b) / 2 for a in group for b in known))
        assert results[name]["recall"] == pytest.approx(mean(value < 1 for value in group))
    everything = evaluate().nil_detection()
    assert everything["left out"]["num"] == len(known)
    assert "recall" not in everything["annotated"]
    assert "left out" not in evaluate(top_k=1).nil_detection()
    with pytest.raises(ValueError, match="larger top_k"):
        evaluate(top_k=1).risk_coverage()


def name_scores(mentions=MENTIONS, entities=ENTITIES) -> np.ndarray:
    """Name scores [M, N] by comparing every mention and every name."""
    words = [words_of(name) for name in entities["name"]]
    return np.array(
        [
            [1.0 if words_of(surface) == name else NAMESAKE_SCORE * (words_of(surface) <= name) for name in words]
            for surface in mentions["mention"]
        ]
    )


def named(mentions=MENTIONS):
    """The mentions, every other one with the name of another entity than its gold."""
    names = ENTITIES["name"]
    surfaces = [names[(3 * i) % 15] if i % 2 else names[(5 * i) % 15].split()[1] for i in range(len(mentions))]
    return mentions.remove_columns("mention").add_column("mention", surfaces)


@pytest.mark.parametrize("weight", [0.3, 5.0])
@pytest.mark.parametrize("byte_budget", [1, 2**29])
def test_the_names_are_added_to_the_scores(weight, byte_budget):
    mentions = named()
    result = evaluate(mentions, name_weight=weight, byte_budget=byte_budget)
    scores = forward(mentions) + weight * name_scores(mentions)
    ranks = [rank for rank in sorted_ranks(scores, mentions) if rank is not None]
    assert result.metrics["mrr"] == pytest.approx(mean(1 / rank for rank in ranks))
    assert result.ranking.top_scores[:, 0].tolist() == pytest.approx(scores.max(1).tolist(), abs=1e-5)
    assert result.to_dict()["name_weight"] == weight
    plain = evaluate(mentions)
    assert plain.metrics["mrr"] != pytest.approx(result.metrics["mrr"])


def test_the_weight_of_the_names_is_the_best_of_those_tried():
    mentions, inputs = named(), ModelInputs(MODEL, PROCESSOR)
    encoded = EncodedEntities(list(ENTITIES["entity_id"]), encode_rows(inputs, ENTITIES, "entities"))
    names = FullEvaluator(ENTITIES).name_index()
    chosen = choose_name_weight(inputs, mentions, encoded, names)
    mrr_of = {weight: evaluate(mentions, name_weight=float(weight)).metrics["mrr"] for weight in chosen.chosen_by_mrr}
    assert mrr_of == pytest.approx(chosen.chosen_by_mrr)
    assert len(set(mrr_of.values())) > 1
    assert chosen.weight == next(float(weight) for weight in mrr_of if mrr_of[weight] == max(mrr_of.values()))


def test_names_need_entities_with_names_and_a_gold_to_choose_by():
    inputs = ModelInputs(MODEL, PROCESSOR)
    encoded = EncodedEntities(list(ENTITIES["entity_id"]), encode_rows(inputs, ENTITIES, "entities"))
    with pytest.raises(RecipeError, match="no names"):
        evaluate(entities=encoded, name_weight=1.0)
    nil = MENTIONS.filter(lambda mention: mention["entity_id"] == NIL)
    with pytest.raises(RecipeError, match="cannot be chosen"):
        choose_name_weight(inputs, nil, encoded, FullEvaluator(ENTITIES).name_index())
