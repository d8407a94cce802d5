"""Rerankers that start from their list: given scores, pooled sides, the loss over the list, ranking jointly by log-odds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from hf_mel.modeling.mmel import MmelConfig, MmelModel
from hf_mel.modeling.mmel.processing_mmel import given_tensors
from hf_mel.modeling.pfmel import PfmelConfig, PfmelModel
from hf_mel.names import namesakes_of
from tests.modeling import direct_mmel, test_mmel, test_pfmel
from tests.modeling.test_mmel import TEXT_ONLY, contexts_for, in_double, weights_of

LIST = {"list_weight": 40, "name_weight": 5, "pooled_sides": True, "list_loss_weight": 1}


def mmel_batch(model) -> dict[str, torch.Tensor]:
    return test_mmel.batch_for(model) | given_inputs(4, 3)


def given_inputs(mentions, candidates) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "pair_list_score": -torch.rand(mentions, candidates, generator=generator),
        "pair_name_match": (torch.rand(mentions, candidates, generator=generator) < 0.5).float(),
    }


def pfmel_batch() -> dict[str, torch.Tensor]:
    batch = test_pfmel.tensors(test_pfmel.sentences())
    return batch | given_inputs(*batch["pair_mask"].shape)


def new_model(method, **fields):
    """Returns a model as training starts with it."""
    torch.manual_seed(3)
    if method == "mmel":
        encoders = {"text_config": dict(test_mmel.BERT)}
        if fields.get("image_weight"):
            encoders["vision_config"] = dict(test_mmel.VIT)
        return MmelModel(MmelConfig(**encoders, **test_mmel.SMALL, **LIST, **fields)).eval()
    return PfmelModel(
        PfmelConfig(text_config=dict(test_pfmel.BERT), vision_config=dict(test_pfmel.RESNET), **LIST, **fields)
    ).eval()


@pytest.mark.parametrize("method", ["mmel", "pfmel"])
def test_before_the_first_step_the_order_is_that_of_list_and_name(method):
    model = new_model(method)
    batch = mmel_batch(model) if method == "mmel" else pfmel_batch()
    scores = model(**batch).scores
    expected = 40 * batch["pair_list_score"] + 5 * batch["pair_name_match"]
    mask = batch["pair_mask"]
    torch.testing.assert_close(scores[mask], expected[mask])
    assert (scores[~mask] == -torch.inf).all()


@pytest.mark.parametrize("method", ["mmel", "pfmel"])
def test_every_given_part_learns_and_survives_saving(method, tmp_path):
    model = new_model(method)
    batch = mmel_batch(model) if method == "mmel" else pfmel_batch()
    labels = torch.zeros(len(batch["pair_mask"]), dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    assert (model.given_scores.scales != 1).all()
    head = model.classifier if method == "mmel" else model.sides_head
    assert head.weight.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).scores, model(**batch).scores)


@pytest.mark.parametrize("method", ["mmel", "pfmel"])
def test_a_batch_without_list_scores_is_refused(method):
    model = new_model(method)
    batch = mmel_batch(model) if method == "mmel" else pfmel_batch()
    del batch["pair_list_score"]
    with pytest.raises(ValueError, match="list_score"):
        model(**batch)
    assert model.reads_list_scores


def image_inputs(method, model):
    """Returns features of both sides, some of which are missing, and where both images are."""
    generator = torch.Generator().manual_seed(11)
    batch = (mmel_batch(model) if method == "mmel" else pfmel_batch()).copy()
    mask = batch["pair_mask"]
    (m, c), width = mask.shape, model.image_match.projection.in_features
    features = {
        "pair_mention_image_features": torch.rand(m, width, generator=generator),
        "pair_entity_image_features": torch.rand(m, c, width, generator=generator),
    }
    if method == "mmel":
        sides = torch.arange(m) != 1, torch.arange(m * c).view(m, c) % 4 != 0
        batch |= {"pair_mention_image_mask": sides[0], "pair_entity_image_mask": sides[1] & mask}
        both = sides[0].unsqueeze(1) & sides[1] & mask
    else:
        both = (batch["pair_image_positions"] >= 0).all(-1) & mask
    batch = {name: x for name, x in batch.items() if "pixel" not in name and "counts" not in name} | features
    return batch, both


def log_odds_of_images(model, batch, i, j) -> float:
    w = weights_of(model)
    first, second = (
        w["image_match.projection.weight"] @ batch[name][place].double().numpy()
        for name, place in (("pair_mention_image_features", i), ("pair_entity_image_features", (i, j)))
    )
    cosine = first @ second / np.sqrt(first @ first) / np.sqrt(second @ second)
    return 20 * w["image_match.scale"] * (cosine - w["image_match.midpoint"])


@pytest.mark.parametrize("method", ["mmel", "pfmel"])
@pytest.mark.parametrize("trained", [False, True], ids=["first step", "later"])
def test_images_add_the_cosine_of_their_projected_features(method, trained):
    model = new_model(method, image_weight=20)
    with torch.no_grad():
        if trained:
            model.image_match.projection.weight.normal_()
            model.image_match.scale.fill_(1.5)
            model.image_match.midpoint.fill_(0.3)
        else:
            assert (model.image_match.projection.weight == torch.eye(model.image_match.projection.in_features)).all()
    batch, both = image_inputs(method, model)
    scores = model(**batch).scores
    given = 40 * batch["pair_list_score"] + 5 * batch["pair_name_match"]
    assert both.any()
    assert (~both & batch["pair_mask"]).any()
    for i, j in batch["pair_mask"].nonzero().tolist():
        expected = given[i, j].item() + (log_odds_of_images(model, batch, i, j) if both[i, j] else 0.0)
        assert scores[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("method", ["mmel", "pfmel"])
def test_the_comparison_of_images_learns_and_survives_saving(method, tmp_path):
    model = new_model(method, image_weight=20)
    batch, _ = image_inputs(method, model)
    model(**batch, labels=torch.zeros(len(batch["pair_mask"]), dtype=torch.long)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.image_match.parameters())
    with torch.no_grad():
        model.image_match.projection.weight.normal_()
        model.image_match.midpoint.fill_(0.3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path)(**batch).scores, model(**batch).scores)


def test_images_are_not_compared_without_an_image_encoder():
    text = {"text_config": {"model_type": "bert"}}
    for make in (MmelConfig, PfmelConfig):
        with pytest.raises(ValueError, match="image encoder"):
            make(**text, image_weight=20)


@pytest.mark.parametrize("field", ["list_weight", "name_weight", "image_weight", "list_loss_weight"])
def test_negative_weights_are_refused(field):
    for make in (MmelConfig, PfmelConfig):
        with pytest.raises(ValueError, match=field):
            make(**{field: -1})


def standardised(x):
    x = x - x.mean()
    return x / np.sqrt((x**2).mean() + 1e-5)


def compared(states, sides):
    first, second = (standardised(states[side].mean(0)) for side in sides)
    return np.concatenate([first * second, np.abs(first - second)])


def test_mmel_adds_to_equation_10_what_a_plain_computation_adds():
    model = test_mmel.build(**TEXT_ONLY, **LIST, pairwise_loss_weight=0)
    with torch.no_grad():
        model.classifier.weight.normal_()
    model, batch = in_double(model, mmel_batch(model))
    w, dim = weights_of(model), model.config.hidden_size
    scores = model(**batch).scores
    paper = {**w, "classifier.weight": w["classifier.weight"][:, : 2 * dim]}
    for i, j in batch["pair_mask"].nonzero().tolist():
        parts = [batch[f"pair_{side}_mask"][i, j] for side in ("context", "entity")]
        ids = batch["pair_input_ids"][i, j][parts[0] | parts[1]].unsqueeze(0)
        with torch.no_grad():
            states = model.text_model(input_ids=ids).last_hidden_state[0].numpy()
        count = int(parts[0].sum())
        matching, _ = direct_mmel.pair(states[:count], states[count:], None, None, paper, model.config)
        sides = w["classifier.weight"][:, 2 * dim :] @ compared(states, (slice(count), slice(count, None)))
        expected = np.log(matching / (1 - matching)) + sides[1] - sides[0]
        values = (batch["pair_list_score"][i, j].item(), batch["pair_name_match"][i, j].item())
        expected += np.dot(w["given_scores.scales"] * [40, 5], values)
        assert scores[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_pfmel_adds_to_its_head_what_a_plain_computation_adds():
    model = test_pfmel.build(vision=False, text_pooling="mean", **LIST).double()
    plain = test_pfmel.build(vision=False, text_pooling="mean").double()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in plain.state_dict()})
    batch = {name: x for name, x in pfmel_batch().items() if "image" not in name}
    own = plain(**batch).scores
    scores, w = model(**batch).scores, weights_of(model)
    for i, j in batch["pair_mask"].nonzero().tolist():
        length = int(batch["pair_attention_mask"][i, j].sum())
        ids, segment = (batch[f"pair_{name}"][i, j, :length] for name in ("input_ids", "token_type_ids"))
        with torch.no_grad():
            states = model.text_model(ids.unsqueeze(0), token_type_ids=segment.unsqueeze(0)).last_hidden_state[0]
        sides = w["sides_head.weight"] @ compared(states.numpy(), ((segment == 0).numpy(), (segment == 1).numpy()))
        sides += w["sides_head.bias"]
        values = (batch["pair_list_score"][i, j].item(), batch["pair_name_match"][i, j].item())
        expected = own[i, j].item() + sides[0] - sides[1] + np.dot(w["given_scores.scales"] * [40, 5], values)
        assert scores[i, j].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["mmel", "pfmel"])
@pytest.mark.parametrize("labels", [[0, -100, 1], [-100, -100, -100]], ids=str)
def test_the_list_loss_is_the_cross_entropy_among_the_candidates(method, labels):
    losses = []
    for weight in (0, 3):
        model = new_model(method, **({} if method == "pfmel" else {"vision_config": None}))
        model.config.list_loss_weight = weight
        batch = mmel_batch(model) if method == "mmel" else pfmel_batch()
        targets = torch.tensor(labels + [-100] * (len(batch["pair_mask"]) - 3))
        if method == "pfmel":
            targets[2] = min(targets[2], 0) if targets[2] < 0 else 1
        losses.append(model(**batch, labels=targets).loss.item())
    scores = model(**batch).scores
    terms = [
        -np.log(np.exp(scores[i, gold].item()) / sum(np.exp(s) for s in scores[i].tolist() if s > -np.inf))
        for i, gold in enumerate(targets.tolist())
        if gold >= 0
    ]
    assert losses[1] - losses[0] == pytest.approx(3 * np.mean(terms) if terms else 0.0, rel=1e-4, abs=1e-6)


def test_a_gold_of_the_context_is_no_negative_of_equation_11():
    """Mentions 0 and 1 share a context, and the gold of mention 0 is a candidate of mention 1."""
    model = test_mmel.build(**TEXT_ONLY)
    batch, labels = test_mmel.batch_for(model), torch.tensor([0, 1, 2, 0])
    entities = torch.arange(12).view(4, 3)
    losses = {}
    for name, changed in (("apart", entities), ("shared", entities.clone())):
        if name == "shared":
            changed[1, 0] = changed[0, 0]
        losses[name] = model(**batch, labels=labels, pair_entity=changed).loss
    features = model(**batch).features
    w = weights_of(model)

    def expected(is_negative):
        mentions = [
            {
                "context": int(batch["pair_context"][i]),
                "positive": features[i, gold].detach().double().numpy(),
                "negatives": [
                    features[i, j].detach().double().numpy()
                    for j in range(3)
                    if j != gold and batch["pair_mask"][i, j] and is_negative(i, j)
                ],
            }
            for i, gold in enumerate(labels.tolist())
        ]
        return 0.5 * direct_mmel.pairwise_loss(mentions, lambda a, b: direct_mmel.similarity(a, b, w), 0.3)

    difference = expected(lambda i, j: True) - expected(lambda i, j: (i, j) != (1, 0))
    assert abs(difference) > 1e-4
    assert (losses["apart"] - losses["shared"]).item() == pytest.approx(difference, abs=1e-5)


def test_mentions_by_themselves_have_no_pairwise_loss():
    with pytest.raises(ValueError, match="pairwise_loss_weight=0"):
        MmelConfig(training_unit="mention")
    assert MmelModel.example_unit.fget(test_mmel.build(**TEXT_ONLY)) == "context"
    model = test_mmel.build(**TEXT_ONLY, training_unit="mention", pairwise_loss_weight=0)
    assert model.example_unit == "mention"


WORDS = st.lists(st.sampled_from(["Ana", "ANA", "Łódź", "Müller", "muller", "O'Neill", "de", "!"]), max_size=3)


@settings(deadline=None, max_examples=60)
@given(WORDS.filter(bool).map(" ".join), st.lists(WORDS.map(" ".join), min_size=1, max_size=4), WORDS.map(" ".join))
def test_a_name_matches_as_it_does_for_the_strata(surface, names, alias):
    rows = [{"name": name, "aliases": [alias], "list_score": 0.0} for name in names]
    tensors = given_tensors([({"mention": surface}, rows)], torch.ones(1, len(rows), dtype=torch.bool), True)
    namesakes = namesakes_of([surface], {str(i): [name, alias] for i, name in enumerate(names)})[surface]
    assert tensors["pair_name_match"][0].tolist() == [str(i) in namesakes for i in range(len(names))]


def test_list_scores_are_tensors_only_if_every_candidate_has_one():
    mask = torch.tensor([[True, True], [True, False]])
    pairs = [
        ({"mention": "x"}, [{"name": "x", "list_score": 0.0}, {"name": "y", "list_score": -1.5}]),
        ({"mention": ""}, [{"name": None, "list_score": -2.0}]),
    ]
    assert given_tensors(pairs, mask, True)["pair_list_score"].tolist() == [[0, -1.5], [-2, 0]]
    del pairs[1][1][0]["list_score"]
    assert set(given_tensors(pairs, mask, True)) == {"pair_name_match"}
    assert given_tensors(pairs, mask, False) == {}


# ---- ranking jointly by log-odds


def joint_model(similarity_weight=0, distinct=True) -> MmelModel:
    model = test_mmel.build(
        **TEXT_ONLY,
        hidden_size=6,
        joint_combination="log_odds",
        distinct_entities=distinct,
        similarity_weight=similarity_weight,
    ).double()
    with torch.no_grad():
        model.similarity.fc_out.weight.mul_(6)
    return model


def entities_for(seed, mask):
    return torch.from_numpy(np.random.default_rng(seed).permuted(np.tile(np.arange(6), (len(mask), 1)), axis=1)[:, :4])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("weight", "distinct"), [(0, True), (0.7, True), (0.7, False)])
def test_the_order_of_two_mentions_is_that_of_the_best_pairs(seed, weight, distinct):
    """By enumeration of all pairs of candidates."""
    model = joint_model(weight, distinct)
    scores, features, mask, contexts = contexts_for(seed, [2, 1, 2])
    entities, w = entities_for(seed, mask), weights_of(model)
    ranked = model.rank_jointly(scores, features, mask, contexts, entities)
    for context in contexts.unique():
        rows = (contexts == context).nonzero()[:, 0].tolist()
        for row in rows:
            for c in mask[row].nonzero()[:, 0].tolist():
                expected = scores[row, c].item()
                for other in set(rows) - {row}:
                    sums = []
                    for d in mask[other].nonzero()[:, 0].tolist():
                        if distinct and entities[row, c] == entities[other, d]:
                            continue
                        s = direct_mmel.similarity(features[row, c].numpy(), features[other, d].numpy(), w)
                        sums.append(scores[other, d].item() + weight * np.log(s / (1 - s)))
                    expected += max(sums) - scores[other].max().item() if sums else 0.0
                assert ranked[row, c].item() == pytest.approx(expected, abs=1e-9)
        assert (ranked[~mask] == -torch.inf).all()


@pytest.mark.parametrize("seed", range(5))
def test_two_mentions_never_get_the_same_entity(seed):
    generator = np.random.default_rng(seed)
    scores = torch.from_numpy(generator.normal(size=(2, 4)))
    entities = entities_for(seed, scores)
    mask = torch.ones(2, 4, dtype=torch.bool)
    ranked = joint_model().rank_jointly(scores, torch.zeros(2, 4, 6).double(), mask, torch.zeros(2), entities)
    first, second = ranked.argmax(1).tolist()
    best = max(
        (scores[0, i] + scores[1, j]).item()
        for i, j in itertools.product(range(4), range(4))
        if entities[0, i] != entities[1, j]
    )
    assert entities[0, first] != entities[1, second]
    assert (scores[0, first] + scores[1, second]).item() == pytest.approx(best)


def test_unusual_contexts_have_finite_joint_scores():
    model = joint_model()
    scores = torch.tensor([[2.0, -torch.inf], [1.0, -torch.inf], [0.0, 0.0], [-torch.inf] * 2]).double()
    mask, features = scores > -torch.inf, torch.zeros(4, 2, 6).double()
    contexts, entities = torch.tensor([0, 0, 1, 0]), torch.tensor([[5, -1], [5, -1], [5, 6], [-1, -1]])
    ranked = model.rank_jointly(scores, features, mask, contexts, entities)
    # One candidate each, and it is the same: neither knows of another. A mention that is alone keeps its equal scores.
    assert ranked.tolist() == scores.tolist()
    with pytest.raises(ValueError, match="entities"):
        model.rank_jointly(scores, features, mask, contexts)
    with pytest.raises(ValueError, match="log_odds"):
        MmelConfig(distinct_entities=True)
    with pytest.raises(ValueError, match="joint_combination"):
        MmelConfig(joint_combination="sums")


def test_joint_log_odds_ignore_the_order_of_rows_and_columns_and_the_block_size(monkeypatch):
    model = joint_model(0.7)
    scores, features, mask, contexts = contexts_for(1, [3, 2, 1, 4])
    entities = entities_for(1, mask)
    ranked = model.rank_jointly(scores, features, mask, contexts, entities)
    monkeypatch.setattr(test_mmel.modeling_mmel, "_BLOCK_ELEMENTS", {"cpu": 1})
    torch.testing.assert_close(model.rank_jointly(scores, features, mask, contexts, entities), ranked)
    rows, columns = torch.randperm(10), torch.randperm(4)
    shuffled = [x[rows][:, columns] for x in (scores, features, mask)]
    again = model.rank_jointly(*shuffled, contexts[rows], entities[rows][:, columns])
    torch.testing.assert_close(again, ranked[rows][:, columns])
