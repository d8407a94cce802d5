"""Tests of GHMFC and HieCoATT-Alter: every step against NumPy loops, properties, losses, configuration and pretrained parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, CLIPModel, ViTConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.ghmfc import GhmfcConfig, GhmfcModel
from hf_mel.protocols import IndexVectors, Retriever
from tests.modeling import published_mimic
from tests.modeling.plain_layers import (
    cosine,
    layer_norm,
    linear,
    lstm,
    margin_loss,
    relu,
    softmax,
    unit,
    weights_of,
)
from tests.modeling.test_mimic import BERT, VIT

#: A CNN without a pooling layer.
CNN = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 20], "depths": [1, 1], "layer_type": "basic"}
SMALL = {"hidden_size": 12, "num_heads": 2, "intermediate_size": 14, "dropout": 0.0}
HIECOATT = {"attention": "alternating", "fusion": "recursive", "levels": ["word", "phrase", "sentence"]}
TEXT_ONLY = {"vision_config": None}
VARIANTS = {
    "GHMFC": {},
    "GHMFC-onlytext": TEXT_ONLY,
    "HieCoATT-Alter": HIECOATT,
    "HieCoATT-Alter, text": HIECOATT | TEXT_ONLY,
    "all levels, residual from input": {"levels": ["word", "phrase", "sentence"], "residual": "input"},
    "CNN, shared": {"vision_config": dict(CNN), "entity_network": "shared", "output_size": 9},
    "alternating, gated": {"attention": "alternating", "levels": ["phrase"]},
    "transformer, recursive": {"fusion": "recursive", "entity_pooling": "mean", "train_entity_text": True},
}


def build(seed=0, **fields) -> GhmfcModel:
    torch.manual_seed(seed)
    fields = {"text_config": dict(BERT), "vision_config": dict(VIT)} | SMALL | fields
    model = GhmfcModel(GhmfcConfig(**fields)).eval()
    with torch.no_grad():  # the initial ones and zeros of norms would hide a weight that is not applied
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


def batch_for(model, mentions=4, entities=5, length=9, seed=1) -> dict[str, torch.Tensor]:
    """Returns random inputs: texts of different lengths; mention 1 and entity 2 have no image."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for side, count, without in (("mention", mentions, 1), ("entity", entities, 2)):
        lengths = torch.randint(4, length + 1, (count, 1), generator=generator)
        batch[f"{side}_input_ids"] = torch.randint(2, 59, (count, length), generator=generator)
        batch[f"{side}_attention_mask"] = (torch.arange(length) < lengths).long()
        if model.config.vision_config is not None:
            batch[f"{side}_pixel_values"] = torch.randn(count, 3, 16, 16, generator=generator).double()
            batch[f"{side}_image_mask"] = torch.arange(count) != without
    return batch


def one(batch, side, row):
    """Inputs of one row of a side, without padding."""
    inputs = {name.removeprefix(f"{side}_"): v[row : row + 1] for name, v in batch.items() if name.startswith(side)}
    real = inputs["attention_mask"][0].bool()
    return inputs | {name: inputs[name][:, real] for name in ("input_ids", "attention_mask")}


# ---- the plain computation of one mention


def attend(query, states, w, name):
    """Multi-head attention with 2 heads, head by head."""
    q, k, v = linear(query, w, f"{name}.query"), linear(states, w, f"{name}.key"), linear(states, w, f"{name}.value")
    size, heads = q.shape[1] // 2, []
    for h in range(2):
        part = slice(h * size, (h + 1) * size)
        rows = [softmax(q[i, part] @ k[:, part].T / size**0.5) @ v[:, part] for i in range(len(q))]
        heads.append(np.array(rows))
    return linear(np.concatenate(heads, 1), w, f"{name}.output")


def stack(x, other, w, name, config):
    """G4."""
    for k in range(config.num_layers):
        layer = f"{name}.layers.{k}"
        normed = layer_norm(x, w, f"{layer}.self_norm")
        state = x + attend(normed, normed, w, f"{layer}.self_attention")
        if other is not None:
            attended = attend(layer_norm(state, w, f"{layer}.cross_norm"), other, w, f"{layer}.cross_attention")
            state = attended + (x if config.residual == "input" else state)
        inner = relu(linear(layer_norm(state, w, f"{layer}.inner_norm"), w, f"{layer}.fc1"))
        x = state + linear(inner, w, f"{layer}.fc2")
    return layer_norm(x, w, f"{name}.norm")


def guided(x, guide, w, name):
    """H1."""
    logits = []
    for state in x:
        hidden = linear(state, w, f"{name}.states")
        if guide is not None:
            hidden = hidden + linear(guide, w, f"{name}.guide")
        logits.append(linear(np.tanh(hidden), w, f"{name}.weight")[0])
    return softmax(np.array(logits)) @ x


def to_map(x, w, name, config):
    """G1 and G2."""
    x = linear(x, w, f"{name}.linear")
    return np.tanh(x) if config.attention == "alternating" else layer_norm(relu(x), w, f"{name}.norm")


def phrases(words, w, config):
    """G3, window by window."""
    zeros, rows = np.zeros(words.shape[1]), []
    for k in range(len(words)):
        at = {j: words[j] if 0 <= j < len(words) else zeros for j in (k - 1, k, k + 1)}
        outputs = []
        for c, window in enumerate(((k,), (k, k + 1), (k - 1, k, k + 1))):
            weight, bias = (w[f"phrases.convolutions.{c}.{part}"] for part in ("weight", "bias"))
            x = bias + sum(weight[:, :, place] @ at[j] for place, j in enumerate(window))
            if config.attention != "alternating":
                x = layer_norm(relu(x), w, f"phrases.norms.{c}")
            outputs.append(x)
        best = np.max(outputs, 0)
        rows.append(np.tanh(best) if config.attention == "alternating" else best)
    return np.array(rows)


def plain_vector(model, inputs):
    """Vector of one mention, and its mean word and mean cell. Only the encoders are those of the model."""
    w, config = weights_of(model), model.config
    with torch.no_grad():
        states = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[0].numpy()
        cells = None
        if config.vision_config is not None and inputs["image_mask"][0]:
            cells = model.vision_model(inputs["pixel_values"]).last_hidden_state[0]
            cells = cells.flatten(1).T.numpy() if cells.dim() == 3 else cells.numpy()
            cells = to_map(cells, w, "image_map", config)
    words = x = to_map(states[1:], w, "text_map", config)
    texts, images = [], []
    for level in config.levels:
        if level == "phrase":
            x = phrases(x, w, config)
        if level == "sentence":
            for layer in range(config.lstm_layers):
                x = lstm(x, w, "sentence", layer)
        name = f"levels.{level}"
        if config.attention == "transformer":
            attended = None if cells is None else stack(cells, x, w, f"{name}.image", config)
            texts.append(stack(x, attended, w, f"{name}.text", config).max(0))
            images.append(np.zeros(12) if cells is None else attended.max(0))
        elif config.vision_config is None:
            texts.append(guided(x, None, w, f"{name}.summary"))
        else:
            summary = guided(x, None, w, f"{name}.summary")
            images.append(np.zeros(12) if cells is None else guided(cells, summary, w, f"{name}.image"))
            texts.append(guided(x, images[-1], w, f"{name}.text"))
    if config.fusion == "gated":
        features = text = layer_norm(np.sum(texts, 0), w, "fusion.text_norm")
        if config.vision_config is not None:
            combined = text
            if cells is not None:
                image = layer_norm(np.sum(images, 0), w, "fusion.image_norm")
                shares = softmax(np.array([linear(side, w, "fusion.gate")[0] for side in (text, image)]))
                combined = shares[0] * text + shares[1] * image
            features = np.concatenate([text, combined])
        out = linear(relu(linear(features, w, "fusion.hidden")), w, "fusion.output")
    else:
        hidden = np.zeros(0)
        for k, text in enumerate(texts):
            both = text + images[k] if images else text
            hidden = np.tanh(linear(np.concatenate([both, hidden]), w, f"fusion.levels.{k}"))
        out = linear(hidden, w, "fusion.output")
    return unit(out), words.mean(0), None if cells is None else cells.mean(0)


def plain_entity(model, inputs):
    if model.config.entity_network == "shared":
        return plain_vector(model, inputs)[0]
    with torch.no_grad():
        states = model.entity_text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[0].numpy()
    return unit(states.mean(0) if model.config.entity_pooling == "mean" else states[0])


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_score_equals_the_plain_computation(fields):
    model = build(**fields)
    batch = batch_for(model)
    assert isinstance(model, Retriever)
    assert isinstance(model, IndexVectors)
    with torch.no_grad():
        out = model(**batch)
    mentions = [plain_vector(model, one(batch, "mention", k))[0] for k in range(4)]
    entities = [plain_entity(model, one(batch, "entity", k)) for k in range(5)]
    expected = [[cosine(m, e) for e in entities] for m in mentions]
    np.testing.assert_allclose(out.scores.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("fields", [{}, {"negatives": "hardest"}, {"contrastive_includes_positive": False}, TEXT_ONLY])
def test_the_loss_equals_g8_and_g9(fields):
    model = build(**fields, margin=0.3, contrastive_weight=0.7)
    batch, labels = batch_for(model), [0, 3, 3, 1]
    with torch.no_grad():
        out = model(**batch, labels=torch.tensor(labels))
    scores = out.scores.numpy()
    expected = margin_loss(scores, labels, 0.3, model.config.negatives)
    assert out.losses["ranking"].item() == pytest.approx(expected, rel=1e-9)
    if "vision_config" not in fields:
        parts = [plain_vector(model, one(batch, "mention", k))[1:] for k in (0, 2, 3)]  # those with an image
        terms = []
        for k, (text, _) in enumerate(parts):
            powers = [np.exp(cosine(text, cell) / 0.6) for _, cell in parts]
            total = sum(p for j, p in enumerate(powers) if j != k or model.config.contrastive_includes_positive)
            terms.append(-np.log(powers[k] / total))
        assert out.losses["contrastive"].item() == pytest.approx(np.mean(terms), rel=1e-9)
        expected += 0.7 * np.mean(terms)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_padding_batch_partners_and_the_order_of_cells_do_not_matter(fields):
    model = build(**fields)
    batch = batch_for(model)
    with torch.no_grad():
        scores = model(**batch).scores
        longer = batch | {k: torch.nn.functional.pad(v, (0, 4)) for k, v in batch.items() if v.dim() == 2}
        longer["mention_input_ids"][:, -4:] = 7
        torch.testing.assert_close(model(**longer).scores, scores)
        sides = {side: {k: v for k, v in batch.items() if k.startswith(side)} for side in ("mention", "entity")}
        alone = torch.cat(
            [model.encode_mentions(**{k: v[i : i + 1] for k, v in sides["mention"].items()}).vector for i in range(4)]
        )
        torch.testing.assert_close(alone @ model.encode_entities(**sides["entity"]).vector.T, scores)
        if model.config.vision_config is not None and model.config.vision_config.model_type == "vit":
            words, mask = model._words(batch["mention_input_ids"], batch["mention_attention_mask"])
            cells, cell_mask = model._cells(batch["mention_pixel_values"], batch["mention_image_mask"])
            order = torch.randperm(cells.shape[1])
            level = model.levels[model.config.levels[0]]
            for whole, permuted in zip(
                level(words, mask, cells, cell_mask), level(words, mask, cells[:, order], cell_mask), strict=True
            ):
                torch.testing.assert_close(permuted, whole)


@pytest.mark.parametrize("fields", [{}, HIECOATT], ids=["GHMFC", "HieCoATT-Alter"])
def test_the_pixels_of_a_missing_image_do_not_matter(fields):
    model = build(entity_network="shared", **fields)
    batch = batch_for(model)
    changed = dict(batch)
    for side in ("mention", "entity"):
        changed[f"{side}_pixel_values"] = batch[f"{side}_pixel_values"].clone()
        changed[f"{side}_pixel_values"][~batch[f"{side}_image_mask"]] = 9.0
    without = batch | {k: torch.zeros_like(v) for k, v in batch.items() if k.endswith("image_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**changed).scores, model(**batch).scores)
        nothing = model(**without).scores
        assert nothing.isfinite().all()
        assert not torch.allclose(nothing, model(**batch).scores)
        torch.testing.assert_close(nothing[1, 2], model(**batch).scores[1, 2])


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_trained_parameter_has_a_gradient_and_frozen_ones_have_none(fields):
    model = build(**fields, freeze_vision=False).train()
    model(**batch_for(model), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    frozen = model.config.entity_network == "text_encoder" and not model.config.train_entity_text
    for name, parameter in model.named_parameters():
        is_frozen = frozen and name.startswith("entity_text_model")
        assert (parameter.grad is None) == is_frozen, name
        assert parameter.requires_grad == (not is_frozen), name
    frozen_vision = build().train()
    assert not any(p.requires_grad for p in frozen_vision.vision_model.parameters())
    assert not frozen_vision.vision_model.training


def test_one_entity_and_one_image_have_a_loss_of_zero():
    model = build()
    batch = batch_for(model, mentions=2, entities=1)
    out = model(**batch, labels=torch.tensor([0, 0]))
    assert out.loss.item() == 0
    out.loss.backward()


def test_empty_texts_have_finite_scores():
    model = build()
    batch = {k: v[:, :1] if v.dim() == 2 else v for k, v in batch_for(model).items()}
    with torch.no_grad():
        assert model(**batch).scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_scores_are_float32_under_autocast(dtype):
    model = build().float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_for(model).items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = model(**batch, labels=torch.tensor([0, 1, 2, 3]))
    assert out.scores.dtype == torch.float32
    torch.testing.assert_close(out.scores, model(**batch).scores, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_config": None}, "text_config is missing"),
        ({"attention": "dot"}, "attention='dot' is not one of"),
        ({"levels": ["phrase", "word"]}, "in this order"),
        ({"levels": []}, "one or more"),
        ({"num_heads": 5}, "not a multiple"),
        ({"output_size": 9}, "entity_network='shared'"),
        ({"dropout": 1.0}, "below 1"),
        ({"contrastive_temperature": 0}, "must be positive"),
        ({"margin": -1}, "must not be negative"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        GhmfcConfig(**({"text_config": dict(BERT), "vision_config": dict(VIT)} | SMALL | fields))


def test_the_default_configuration_is_the_published_one():
    config = GhmfcConfig()
    assert (config.text_config.model_type, config.vision_config.model_type) == ("bert", "resnet")
    assert (config.hidden_size, config.num_heads, config.num_layers, config.output_size) == (512, 8, 2, 768)
    assert (config.margin, config.contrastive_temperature, config.dropout) == (0.5, 0.6, 0.4)


def test_from_backbones_copies_the_pretrained_weights(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    vit = AutoModel.from_config(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}))
    clip = CLIPModel(published_mimic.clip_config())
    for name, part in (("bert", bert), ("vit", vit), ("clip", clip)):
        part.save_pretrained(tmp_path / name)
    both = GhmfcModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit"), **SMALL)
    clipped = GhmfcModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "clip"), **SMALL)
    assert str(tmp_path) not in both.config.to_json_string()
    for copy, original in (
        (both.text_model, bert),
        (both.entity_text_model, bert),
        (both.vision_model, vit),
        (clipped.vision_model, clip.vision_model),
    ):
        for key, value in copy.state_dict().items():
            torch.testing.assert_close(value, original.state_dict()[key], msg=key)
    with pytest.raises(ValueError, match="text encoder"):
        GhmfcModel.from_backbones(vision=str(tmp_path / "vit"))


def test_images_are_required_by_a_model_that_reads_them():
    model = build()
    batch = {k: v for k, v in batch_for(model).items() if "image" not in k and "pixel" not in k}
    with pytest.raises(ValueError, match="mention_pixel_values"):
        model(**batch)
