"""Tests of the cross-encoder: scores and losses against one sequence at a time, texts, and what every reranker must do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.hub.saving import save_model_repository
from hf_mel.modeling.cross_encoder import CrossEncoderConfig, CrossEncoderModel, CrossEncoderProcessor
from hf_mel.modeling.cross_encoder import modeling_cross_encoder as module
from hf_mel.protocols import MelProcessor, Reranker, reads_list_scores
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.toy import toy_entities, toy_mentions

BERT = {
    "vocab_size": 200,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LIST = {"list_weight": 40, "name_weight": 5, "pooled_sides": True}
VARIANTS = {
    "BLINK": {},
    "CHOLAN": {"loss": "pairwise"},
    "first state": {"pooling": "cls"},
    "mean": {"pooling": "mean"},
    "one segment": {"text_config": {**BERT, "type_vocab_size": 1}},
    "from the list": {**LIST, "pooling": "mean"},
    "from the list, pairwise": {**LIST, "loss": "pairwise"},
}


def build(seed: int = 0, noise: float = 0.3, **fields) -> CrossEncoderModel:
    torch.manual_seed(seed)
    model = CrossEncoderModel(CrossEncoderConfig(**({"text_config": dict(BERT), "dropout": 0.0} | fields))).eval()
    with torch.no_grad():  # the initial ones and zeros would hide a weight that is not applied
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(texts_of(toy_mentions(), toy_entities()), 200)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return CrossEncoderProcessor.from_parts(tokenizer, max_length=40, name_match=True)


def pairs(lengths=(3, 1, 4)) -> list[tuple[dict, list[dict]]]:
    entities = [dict(row) | {"list_score": -0.01 * k} for k, row in enumerate(toy_entities())]
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    return [
        (mention, entities[first : first + length])
        for mention, first, length in zip(toy_mentions(len(lengths)), starts, lengths, strict=True)
    ]


LABELS = torch.tensor([2, -100, 0])


def plain_score(model, batch, row: int, column: int) -> float:
    """The score of one pair: only the encoder is the model's, the rest is computed with NumPy."""
    config, weights = model.config, {name: value.detach().numpy() for name, value in model.state_dict().items()}
    length = int(batch["pair_attention_mask"][row, column].sum())
    ids, segments = (batch[f"pair_{name}"][row, column, :length] for name in ("input_ids", "token_type_ids"))
    inputs = {"token_type_ids": segments[None]} if config.text_config.type_vocab_size > 1 else {}
    with torch.no_grad():
        output = model.text_model(input_ids=ids[None], **inputs)
    states = output.last_hidden_state[0].numpy()
    state = states.mean(0) if config.pooling == "mean" else states[0]
    if config.pooling == "pooler":
        state = np.tanh(weights["text_model.pooler.dense.weight"] @ state + weights["text_model.pooler.dense.bias"])
    logits = weights["head.weight"] @ state + weights["head.bias"]
    if config.pooled_sides:
        means = []
        for side in (0, 1):
            mean = np.mean([states[k] for k in range(length) if segments[k] == side], axis=0)
            mean = mean - mean.mean()
            means.append(mean / math.sqrt((mean**2).mean() + 1e-5))
        compared = np.concatenate([means[0] * means[1], np.abs(means[0] - means[1])])
        logits = logits + weights["sides_head.weight"] @ compared + weights["sides_head.bias"]
    score = logits[1] - logits[0] if config.loss == "pairwise" else logits[0]
    if config.list_weight is not None:
        scales = weights["given_scores.scales"]
        score += scales[0] * config.list_weight * float(batch["pair_list_score"][row, column])
        score += scales[1] * config.name_weight * float(batch["pair_name_match"][row, column])
    return float(score)


def plain_loss(model, scores: dict[tuple[int, int], float]) -> float:
    losses = []
    for row, label in enumerate(LABELS.tolist()):
        listed = {column: score for (m, column), score in scores.items() if m == row}
        if label < 0:
            continue
        if model.config.loss == "listwise":
            losses.append(math.log(sum(math.exp(s) for s in listed.values())) - listed[label])
        else:
            losses += [math.log(1 + math.exp(-s if column == label else s)) for column, s in listed.items()]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_scores_and_loss_equal_those_of_single_sequences(fields, processor):
    model = build(**fields).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in processor(pairs=pairs()).items()}
    with torch.no_grad():
        output = model(**batch, labels=LABELS)
    assert (output.scores[~batch["pair_mask"]] == -torch.inf).all()
    scores = {(r, c): plain_score(model, batch, r, c) for r, c in batch["pair_mask"].nonzero().tolist()}
    for (row, column), score in scores.items():
        assert output.scores[row, column].item() == pytest.approx(score, abs=1e-6)
    assert output.loss.item() == pytest.approx(plain_loss(model, scores), abs=1e-6)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_a_reranker(fields, processor, monkeypatch):
    model = build(**fields)
    assert isinstance(model, Reranker)
    assert isinstance(processor, MelProcessor)
    assert reads_list_scores(model) == ("list_weight" in fields)
    with torch.no_grad():
        scores = model(**processor(pairs=pairs())).scores
        for row, pair in enumerate(pairs()):  # alone, and in another order
            mention, candidates = pair
            alone = model(**processor(pairs=[(mention, candidates[::-1])])).scores[0]
            torch.testing.assert_close(alone.flip(0), scores[row, : len(candidates)], atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(module, "_BLOCK_SEQUENCES", (3, 3))
        torch.testing.assert_close(model(**processor(pairs=pairs())).scores, scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["BLINK", "from the list, pairwise"])
def test_a_saved_model_gives_the_same_scores(variant, processor, tmp_path):
    model = build(**VARIANTS[variant])
    save_model_repository(model, processor, tmp_path)
    again, reader = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, scores = model(**processor(pairs=pairs())).scores, again(**reader(pairs=pairs())).scores
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_step_lowers_the_loss_and_reaches_every_parameter(fields, processor):
    model = build(**fields).train()
    batch = dict(processor(pairs=pairs())) | {"labels": LABELS}
    before = model(**batch).loss
    before.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            parameter -= 1e-3 * parameter.grad / (1e-12 + parameter.grad.norm())
        assert model(**batch).loss < before


@pytest.mark.parametrize("loss", ["listwise", "pairwise"])
def test_before_the_first_step_the_order_is_that_of_list_and_name(loss, processor):
    torch.manual_seed(0)
    model = CrossEncoderModel(CrossEncoderConfig(text_config=dict(BERT), loss=loss, **LIST)).eval()
    batch = processor(pairs=pairs())
    with torch.no_grad():
        scores = model(**batch).scores
    expected = 40 * batch["pair_list_score"] + 5 * batch["pair_name_match"]
    torch.testing.assert_close(scores[batch["pair_mask"]], expected[batch["pair_mask"]])
    del batch["pair_list_score"]
    with pytest.raises(ValueError, match="list_score"):
        model(**batch)


def test_mentions_without_candidates_or_gold_have_gradients(processor):
    model = build()
    loss = model(**processor(pairs=pairs((0, 2))), labels=torch.tensor([-100, -100])).loss
    assert loss.item() == 0
    loss.backward()
    empty = model(**processor(pairs=pairs((0, 0))), labels=torch.tensor([-100, -100]))
    assert empty.loss.item() == 0
    assert (empty.scores == -torch.inf).all()


def test_scores_under_autocast_are_float32(processor):
    model = build(pooling="mean")
    batch = processor(pairs=pairs())
    with torch.no_grad():
        exact = model(**batch).scores
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(**batch).scores
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("trained", [True, False])
def test_a_pooler_that_was_never_trained_is_not_read(trained, tokenizer, tmp_path):
    bert = BertModel(BertConfig(**BERT))
    with torch.no_grad():
        bert.pooler.dense.bias.fill_(float(trained))
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CrossEncoderModel.from_backbones(text=str(tmp_path))
    assert model.config.pooling == ("pooler" if trained else "mean")
    for name, weight in model.text_model.state_dict().items():
        torch.testing.assert_close(weight, bert.state_dict()[name])
    assert CrossEncoderProcessor.from_backbones(text=str(tmp_path)).max_length == 256
    with pytest.raises(ValueError, match="text only"):
        CrossEncoderModel.from_backbones(text=str(tmp_path), vision=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": "hinge"}, "loss"),
        ({"pooling": "max"}, "pooling"),
        ({"list_weight": -1}, "list_weight"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        CrossEncoderConfig(**fields)


WORDS = "we saw the red fox run far away today title reynard animal that lives in woods and fields"
SENTENCE = "We saw the red fox run far away today"
FOX = {"mention": "fox", "text": SENTENCE, "start": 15, "end": 18}


@pytest.fixture(scope="module")
def words():
    """A tokenizer with one token a word, whose vocabulary has markers."""
    return train_wordpiece([WORDS] * 30, 400)


@pytest.mark.parametrize(
    ("mention", "entity", "length", "expected"),
    [
        (FOX, {"name": "Reynard"}, 40, "we saw the red < fox > run far away today [SEP] reynard |"),
        ({**FOX, "start": None, "end": None}, {"name": "x"}, 15, "saw the red < fox > run far away today [SEP]"),
        (
            {**FOX, "mention": "Reynard", "start": -1},
            {"name": "fox"},
            40,
            "< reynard > we saw the red fox run far away",
        ),
        # Of eleven words and eight, twelve fit: six of each.
        (
            FOX,
            {"name": "Animal that lives in woods and fields"},
            15,
            "red < fox > run far [SEP] animal that lives in woods and",
        ),
        # What the entity leaves is the mention's.
        (FOX, {"name": "Animal that"}, 15, "saw the red < fox > run far away [SEP] animal that |"),
    ],
)
def test_texts_are_cut_around_the_mention(mention, entity, length, expected, words):
    templates = {"mention_template": "{window}", "entity_template": "{name} | {description}", "markers": ["<", ">"]}
    processor = CrossEncoderProcessor.from_parts(words, max_length=length, **templates)
    batch = processor(pairs=[(mention, [entity])])
    tokens = words.convert_ids_to_tokens(batch["pair_input_ids"][0, 0])
    assert len(tokens) <= length
    assert " ".join(tokens[1:]).startswith(expected)
    split = tokens.index("[SEP]") + 1
    assert batch["pair_token_type_ids"][0, 0].tolist() == [0] * split + [1] * (len(tokens) - split)
    left_out = processor.num_left_out(pairs=[(mention, [entity])])[0]
    whole = CrossEncoderProcessor.from_parts(words, max_length=99, **templates)(pairs=[(mention, [entity])])
    assert left_out == whole["pair_input_ids"].shape[-1] - len(tokens)
