"""Tests of ARNN, IMN's "BERT" and Att: every step against NumPy loops, the image filter, losses, inputs and pretrained parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, BertConfig, ViTConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.context_rnn import ContextRnnConfig, ContextRnnModel, ContextRnnProcessor
from hf_mel.protocols import EncodesImages, Reranker
from hf_mel.training.tokenizer import train_wordpiece
from tests.modeling.plain_layers import cosine, gru, linear, lstm, relu, sigmoid, unit, weights_of
from tests.modeling.test_ghmfc import CNN
from tests.modeling.test_mimic import BERT, VIT

SMALL = {"hidden_size": 6, "output_size": 8, "dropout": 0.0, "vocab_size": 60, "word_dim": 7}
BERT_ROW = {"encoder": "text", "text_config": dict(BERT), "rnn": None}
ATT_TEXT = {
    "encoder": "text",
    "text_config": dict(BERT),
    "train_text": False,
    "rnn": "lstm",
    "mention_in_states": True,
    "head": "cosine",
    "loss": "triplet",
}
#: The thresholds are such that some images pass and some do not.
ATT = ATT_TEXT | {
    "images": "filtered",
    "vision_config": dict(VIT),
    "text_image_threshold": -0.05,
    "candidate_image_threshold": 0.1,
}
VARIANTS = {
    "ARNN": {},
    "ARNN, use_mention, LSTM, frozen words": {"use_mention": True, "rnn": "lstm", "train_words": False},
    "ARNN, last states": {"context_attention": False},
    "BERT": BERT_ROW,
    "BERT, means": BERT_ROW | {"context_attention": False, "text_pooling": "mean"},
    "Att": ATT,
    "Att, text": ATT_TEXT,
    "Att, last states, mlp, CNN": ATT
    | {
        "context_attention": False,
        "head": "mlp",
        "loss": "binary",
        "vision_config": dict(CNN),
        "freeze_vision": False,
        "text_image_threshold": -1,
        "candidate_image_threshold": -1,
    },
}
#: Words left of, in and right of each of four mentions, and the numbers of their candidates.
PARTS = [(3, 1, 4), (0, 2, 5), (4, 2, 0), (2, 1, 1)]
CANDIDATES = [[0, 1, 2], [2, 3], [4, 0, 1], [1, 3, 4]]
#: Numbers of the images of mentions and entities; -1 for none.
MENTION_IMAGES = [0, -1, 1, 2]
ENTITY_IMAGES = [3, 4, -1, 5, 0]


def build(seed=0, **fields) -> ContextRnnModel:
    torch.manual_seed(seed)
    return ContextRnnModel(ContextRnnConfig(**(SMALL | fields))).eval().double()


def padded(rows, value=-1) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value)
    for k, row in enumerate(rows):
        out[k, : len(row)] = torch.as_tensor(row)
    return out


def batch_for(model, seed=1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(2, 59, (length,), generator=generator)

    special = model.config.encoder == "text"
    parts = [[1] * left + [2] * inside + [3] * right for left, inside, right in PARTS]
    if special:
        parts = [[0, *part, 0] for part in parts]
    entity = padded(CANDIDATES)
    batch = {
        "pair_mask": entity >= 0,
        "pair_entity": entity,
        "pair_word_ids": padded([ids(len(part)) for part in parts]),
        "pair_part": padded(parts, 0),
        "pair_context": torch.arange(4),
    }
    if special:
        batch["pair_entity_ids"] = padded([ids(length) for length in (4, 2, 6, 3, 5)])
    else:
        batch["pair_name_ids"] = padded([ids(length) for length in (1, 2, 1, 3, 2)])
        batch["pair_fact_ids"] = padded([ids(length) for length in (4, 0, 2, 3, 1)])
    if model.config.images == "filtered":
        batch["pair_mention_image"] = torch.tensor(MENTION_IMAGES)
        batch["pair_entity_image"] = torch.tensor(ENTITY_IMAGES)[entity.clamp(min=0)].masked_fill(entity < 0, -1)
        batch["pair_pixel_values"] = torch.randn(6, 3, 16, 16, generator=generator).double()
    return batch


# ---- the plain computation of one pair


def encode(model, ids, w):
    """States and pooled state of a text, and for word vectors the mean of the words."""
    ids = ids[ids >= 0]
    if model.config.encoder == "words":
        states = w["word_embeddings.weight"][ids.numpy()]
        return states, states.mean(0) if len(states) else np.zeros(7)
    with torch.no_grad():
        states = model.text_model(input_ids=ids[None]).last_hidden_state[0].numpy()
    return states, states.mean(0) if model.config.text_pooling == "mean" else states[0]


def context_of(states, side, candidate, w, config):
    """C4."""
    if config.rnn is not None and len(states):
        states = (gru if config.rnn == "gru" else lstm)(states, w, f"{side}_rnn")
    if not len(states):
        return np.zeros(6 if config.rnn else states.shape[1])
    if config.context_attention:
        key = linear(candidate, w, f"{side}_attention.entity_map")
        shares = [sigmoid(key @ state) for state in states]
        return sum(share * state for share, state in zip(shares, states, strict=True)) / sum(shares)
    return states.mean(0) if config.rnn is None else states[-1]


def plain_scores(model, batch):
    """Score of every pair, and who passes the filter. Only the encoders are those of the model."""
    w, config = weights_of(model), model.config
    scores, passing = np.full(batch["pair_mask"].shape, -np.inf), []
    features = None
    if config.images == "filtered":
        with torch.no_grad():
            features = model.encode_images(batch["pair_pixel_values"]).numpy()
    for m, candidates in enumerate(CANDIDATES):
        states, pooled = encode(model, batch["pair_word_ids"][m], w)
        part = batch["pair_part"][m][: len(states)].numpy()
        mention = states[part == 2].mean(0)
        image, passes = np.zeros(24), False
        if features is not None and MENTION_IMAGES[m] >= 0:  # C6, as two ifs
            vector = features[MENTION_IMAGES[m]]
            mapped = linear(vector, w, "image_map")
            shown = [features[ENTITY_IMAGES[e]] for e in candidates if ENTITY_IMAGES[e] >= 0]
            if cosine(pooled, mapped) >= config.text_image_threshold:
                passes = max(cosine(vector, other) for other in shown) >= config.candidate_image_threshold
            if passes:
                image = mapped
        passing.append(passes)
        joined = [states]
        if config.mention_in_states:
            joined.append(np.tile(mention, (len(states), 1)))
        if features is not None:
            joined.append(np.tile(image, (len(states), 1)))
        joined = np.concatenate(joined, 1)
        for c, e in enumerate(candidates):
            if config.encoder == "words":  # C3
                means = [encode(model, batch[f"pair_{name}_ids"][e], w)[1] for name in ("name", "fact")]
                candidate = unit(
                    sum(linear(x, w, f"entity_vectors.{n}_map") for x, n in zip(means, ("name", "fact"), strict=True))
                )
            else:
                candidate = encode(model, batch["pair_entity_ids"][e], w)[1]
            described = candidate
            if features is not None:
                other = features[ENTITY_IMAGES[e]] if passes and ENTITY_IMAGES[e] >= 0 else np.zeros(features.shape[1])
                described = np.concatenate([candidate, other])
            context = [
                context_of(joined[part == k], side, candidate, w, config) for side, k in (("left", 1), ("right", 3))
            ]
            context = np.concatenate([*context, *([mention] if config.use_mention else [])])
            if config.head == "mlp":
                logits = linear(relu(linear(np.concatenate([described, context]), w, "hidden")), w, "classifier")
                scores[m, c] = logits[0] - logits[1]
            else:
                scores[m, c] = cosine(linear(context, w, "mention_output"), linear(described, w, "entity_output"))
    return scores, passing


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_score_equals_the_plain_computation(fields):
    model = build(**fields)
    batch = batch_for(model)
    assert isinstance(model, Reranker)
    assert isinstance(model, EncodesImages)
    assert model.pairs_are_independent == (model.config.images == "none")
    with torch.no_grad():
        out = model(**batch)
    expected, passing = plain_scores(model, batch)
    np.testing.assert_allclose(out.scores.numpy(), expected, atol=1e-9)
    if model.config.images == "filtered":
        assert out.image_passes.tolist() == passing
        assert {True, False} == set(passing)


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [2, -100, 0, 1], [-100] * 4], ids=str)
@pytest.mark.parametrize("name", ["ARNN", "Att"])
def test_the_loss_equals_c8(name, labels):
    model = build(**VARIANTS[name])
    batch = batch_for(model)
    with torch.no_grad():
        out = model(**batch, labels=torch.tensor(labels))
    terms = []
    for m, gold in enumerate(labels):
        for c in range(len(CANDIDATES[m])) if gold >= 0 else ():
            score = out.scores[m, c].item()
            if name == "ARNN":
                terms.append(-np.log(sigmoid(score if c == gold else -score)))
            elif c != gold:
                terms.append(max(0.0, 0.25 - out.scores[m, gold].item() + score))
    assert out.loss.item() == pytest.approx(np.mean(terms) if terms else 0.0, rel=1e-9)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_padding_grouping_and_order_do_not_change_scores(fields):
    model = build(**fields)
    batch = batch_for(model)
    grid = ["pair_mask", "pair_entity", *(["pair_entity_image"] if "pair_entity_image" in batch else [])]
    rows = [
        *grid,
        "pair_word_ids",
        "pair_part",
        "pair_context",
        *(["pair_mention_image"] if "pair_mention_image" in batch else []),
    ]
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        scores = model(**batch).scores
        longer = {
            k: torch.nn.functional.pad(v, (0, 3), value=0 if k == "pair_part" else -1)
            for k, v in batch.items()
            if k.endswith(("ids", "part"))
        }
        torch.testing.assert_close(model(**batch | longer).scores, scores)
        torch.testing.assert_close(model(**batch | {k: batch[k][:, order] for k in grid}).scores, scores[:, order])
        alone = [model(**batch | {k: batch[k][m : m + 1] for k in rows}).scores for m in range(4)]
        torch.testing.assert_close(torch.cat(alone), scores)
        if model.pairs_are_independent:
            pairs = [
                batch | {k: batch[k][m : m + 1, c : c + 1] if k in grid else batch[k][m : m + 1] for k in rows}
                for m in range(4)
                for c in range(3)
            ]
            torch.testing.assert_close(torch.cat([model(**pair).scores for pair in pairs]).view(4, 3), scores)


def test_with_a_threshold_above_1_no_image_counts():
    for name in ("text_image_threshold", "candidate_image_threshold"):
        model = build(**ATT | {name: 1.1})
        batch = batch_for(model)
        none = {k: torch.full_like(batch[k], -1) for k in ("pair_mention_image", "pair_entity_image")}
        with torch.no_grad():
            out, blind = model(**batch), model(**batch | none)
            without = model(**{k: v for k, v in batch.items() if k != "pair_pixel_values"} | none)
        assert not out.image_passes.any()
        torch.testing.assert_close(out.scores, blind.scores)
        torch.testing.assert_close(out.scores, without.scores)
    open_model = build(**ATT | {"text_image_threshold": -1, "candidate_image_threshold": -1})
    with torch.no_grad():
        batch = batch_for(open_model)
        assert open_model(**batch).image_passes.tolist() == [True, False, True, True]
        blank = torch.full_like(batch["pair_entity_image"], -1)  # no candidate has an image to compare with
        assert not open_model(**batch | {"pair_entity_image": blank}).image_passes.any()


def test_features_and_their_images_give_the_same_scores():
    model = build(**ATT)
    batch = batch_for(model)
    with torch.no_grad():
        encoded = {k: v for k, v in batch.items() if k != "pair_pixel_values"}
        encoded["pair_image_features"] = model.encode_images(batch["pair_pixel_values"])
        torch.testing.assert_close(model(**encoded).scores, model(**batch).scores)
    assert model.image_features_are_fixed


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_trained_parameter_has_a_gradient_and_frozen_ones_have_none(fields):
    model = build(**fields).train()
    model(**batch_for(model), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    config = model.config
    frozen = {
        "word_embeddings": not config.train_words,
        "text_model": not config.train_text,
        "vision_model": config.freeze_vision,
    }
    for name, is_frozen in frozen.items():
        if hasattr(model, name):
            assert all(p.requires_grad != is_frozen for p in getattr(model, name).parameters())


def test_no_candidates_and_no_gold():
    model = build()
    batch = batch_for(model)
    batch["pair_mask"][:] = False
    out = model(**batch, labels=torch.full((4,), -100))
    assert (out.scores == -torch.inf).all()
    assert out.loss.item() == 0
    out.loss.backward()


def test_scores_are_float32_under_autocast():
    for fields in ({}, ATT):
        model = build(**fields).float()
        batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_for(model).items()}
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(**batch, labels=torch.tensor([0, 1, 2, 0]))
        assert out.scores.dtype == torch.float32
        assert out.scores[batch["pair_mask"]].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"encoder": "letters"}, "encoder='letters' is not one of"),
        ({"rnn": "rnn"}, "rnn='rnn' is not one of"),
        ({"encoder": "text"}, "needs a text_config"),
        ({"text_config": dict(BERT)}, "encoder='words' has none"),
        ({"images": "filtered", "vision_config": dict(VIT)}, "encoder='text'"),
        ({"vision_config": dict(VIT)}, "reads no images"),
        ({"head": "cosine"}, "loss='binary' needs"),
        ({"hidden_size": 0}, "at least 1"),
        ({"dropout": 1}, "below 1"),
        ({"margin": -1}, "must not be negative"),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ContextRnnConfig(**(SMALL | fields))


def test_missing_inputs_are_named():
    for fields, name in (({}, "pair_name_ids"), (BERT_ROW, "pair_entity_ids"), (ATT, "pair_mention_image")):
        model = build(**fields)
        with pytest.raises(ValueError, match=f"{name}"):
            model(**{k: v for k, v in batch_for(model).items() if k != name})
    with pytest.raises(ValueError, match="sees no images"):
        build().encode_images(torch.zeros(1, 3, 16, 16))


# ---- the processor


TEXT = "the rain fell in Accra at noon"


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([TEXT, "Accra capital of Ghana"], 200)


def words_of(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(ids[ids >= 0].tolist())


def entity(number, **fields):
    return {"entity_id": f"Q{number}", "name": "Accra", "description": "capital of Ghana", "images": []} | fields


@pytest.mark.parametrize(
    ("row", "words", "parts"),
    [
        ({"mention": "Accra", "start": 17, "end": 22}, "rain fell in accra at noon", [1, 1, 1, 2, 3, 3]),
        ({"mention": "the rain", "start": 0, "end": 8}, "the rain fell in accra", [2, 2, 3, 3, 3]),
        ({"mention": "noon"}, "in accra at noon", [1, 1, 1, 2]),
        ({"mention": "Ghana"}, "ghana the rain fell in accra at", [2, 3, 3, 3, 3, 3, 3]),  # not in the text
    ],
)
def test_words_have_parts(tokenizer, row, words, parts):
    for special in (False, True):
        processor = ContextRnnProcessor.from_parts(tokenizer, context_words=6, special_tokens=special)
        batch = processor(pairs=[({"text": TEXT} | row, [entity(1), entity(2), entity(1)])])
        expected = ["[CLS]", *words.split(), "[SEP]"] if special else words.split()
        assert words_of(processor, batch["pair_word_ids"][0]) == expected
        assert batch["pair_part"][0].tolist() == ([0, *parts, 0] if special else parts)
        assert batch["pair_entity"].tolist() == [[0, 1, 0]]
        read = "pair_entity_ids" if special else "pair_name_ids"
        assert (
            words_of(processor, batch[read][0])[: 2 + special] == ["[CLS]", "accra", "capital"][1 - special : 3]
            or not special
        )
        assert len(batch[read]) == 2


def test_images_are_numbered_and_each_is_prepared_once(tokenizer):
    processor = ContextRnnProcessor.from_parts(tokenizer, {"size": {"height": 16, "width": 16}})
    red, blue = (Image.new("RGB", (9, 7), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    rows = [
        ({"mention": "Accra", "text": TEXT, "image": red}, [entity(1, images=[blue]), entity(2)]),
        ({"mention": "Accra", "text": TEXT, "image": None}, [entity(3, images=[red])]),
    ]
    batch = processor(pairs=rows)
    assert batch["pair_mention_image"].tolist() == [0, -1]
    assert batch["pair_entity_image"].tolist() == [[1, -1], [0, -1]]
    assert batch["pair_pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="pairs="):
        processor(mentions=[])
    with pytest.raises(ValueError, match="at least 1"):
        ContextRnnProcessor.from_parts(tokenizer, context_words=0)


def test_from_backbones_copies_pretrained_weights_and_word_vectors(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    vit = AutoModel.from_config(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}))
    for name, part in (("bert", bert), ("vit", vit)):
        part.save_pretrained(tmp_path / name)
    options = {k: v for k, v in ATT.items() if k not in ("text_config", "vision_config")} | SMALL
    both = ContextRnnModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit"), **options)
    assert str(tmp_path) not in both.config.to_json_string()
    for copy, original in ((both.text_model, bert), (both.vision_model, vit)):
        for key, value in copy.state_dict().items():
            torch.testing.assert_close(value, original.state_dict()[key], msg=key)
    table = ContextRnnModel.from_backbones(text=str(tmp_path / "bert"))
    torch.testing.assert_close(table.word_embeddings.weight, bert.get_input_embeddings().weight)
    file = tmp_path / "glove.txt"
    file.write_text("rain 1 0.5\nfell -1 2\n")
    words = ContextRnnModel.from_backbones(text=str(file))
    assert words.word_embeddings.weight.tolist() == [[0, 0], [0, 0], [1, 0.5], [-1, 2]]
    processor = ContextRnnProcessor.from_backbones(text=str(file))
    batch = processor(pairs=[({"mention": "fell", "text": "the rain fell", "image": None}, [entity(1, name="rain")])])
    assert batch["pair_word_ids"].tolist() == [[2, 3]]
    assert words.eval()(**batch).scores.isfinite().all()
