"""Tests of IMN's model: scores against the paper's equations, extractors, pre-training, variants and saving."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.hub.saving import save_model_repository
from hf_mel.modeling.imn import ImnConfig, ImnForKnowledgePreTraining, ImnModel, modeling_imn, pretraining_imn
from hf_mel.protocols import Retriever
from tests.modeling import direct_imn

BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 10],
    "depths": [1, 1],
    "layer_type": "basic",
}
DETR = {
    "model_type": "detr",
    "backbone_config": {**RESNET, "out_features": ["stage2"]},
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "num_queries": 5,
    "dropout": 0.0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
DIMS = {"hidden_dim": 8, "aux_dim": 6, "conv_dim": 3, "num_heads": 2, "num_prototypes": 4, "dropout": 0.0}


def build(cls=ImnModel, seed=0, vision=DETR, **fields):
    torch.manual_seed(seed)
    config = {"text_config": dict(BERT)} | ({"vision_config": dict(vision)} if vision else {}) | DIMS | fields
    model = cls(ImnConfig(**config)).eval()
    with torch.no_grad():  # initial ones, zeros and small weights would hide a part that is not applied
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_model"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if "encoder.norm" in name and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model


def posts(rows=4, side="mention", seed=0, width=9, images=True):
    """Returns random mentions or posts. The second has no image, the third no name and the fourth no text."""
    random = torch.Generator().manual_seed(seed)
    lengths = [int(torch.randint(3, width + 1, (), generator=random)) for _ in range(rows)]
    if rows > 3:
        lengths[3] = 0
    names = [0 if row % 4 == 2 else 1 + row % 3 for row in range(rows)]
    batch = {
        "input_ids": torch.randint(4, 59, (rows, width), generator=random),
        "attention_mask": torch.arange(width) < torch.tensor(lengths).unsqueeze(1),
        "name_ids": torch.randint(4, 59, (rows, 3), generator=random),
        "name_mask": torch.arange(3) < torch.tensor(names).unsqueeze(1),
    }
    if images:
        batch["image_mask"] = torch.tensor([row % 4 != 1 for row in range(rows)])
        batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=random)
    return {f"{side}_{name}": tensor.long() if "mask" in name else tensor for name, tensor in batch.items()}


def prototypes(model, rows=3, seed=1):
    """Returns entities with 0 to k prototypes."""
    random, k = torch.Generator().manual_seed(seed), model.config.num_prototypes
    batch = {}
    for place, name in enumerate(model.config.entity_modalities):
        counts = torch.tensor([(row + place + 1) % (k + 1) for row in range(rows)])
        mask = torch.arange(k) < counts.unsqueeze(1)
        vectors = torch.nn.functional.normalize(torch.randn(rows, k, model.widths[name], generator=random), dim=-1)
        batch[f"entity_prototypes_{name}"] = vectors * mask.unsqueeze(-1)
        batch[f"entity_prototypes_{name}_mask"] = mask
    return batch


def batch_for(model, mentions=4, entities=3):
    images = model.config.vision_config is not None
    return posts(mentions, images=images) | prototypes(model, entities)


def side(batch, name):
    return {key: value for key, value in batch.items() if key.startswith(name)}


def plain(sequences, count):
    """Returns the sequences of a batch as lists of vectors without padding, one dict per item."""
    return [
        {name: list(states[i][mask[i].bool()].detach().double().numpy()) for name, (states, mask) in sequences.items()}
        for i in range(count)
    ]


def read(model, batch):
    """Returns the inputs of both encoding networks, one dict per item. Other tests cover the extractors."""
    mention_sequences = model._extract("mention", model.config.mention_modalities, side(batch, "mention"))
    entity_sequences = {
        name: (batch[f"entity_prototypes_{name}"], batch[f"entity_prototypes_{name}_mask"])
        for name in model.config.entity_modalities
    }
    return (
        plain(mention_sequences, len(batch["mention_input_ids"])),
        plain(entity_sequences, len(next(iter(entity_sequences.values()))[0])),
    )


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


T, V, J = "text", "image", "joint"
TABLE_3 = {
    f"{'+'.join(mention)} / {'+'.join(entity)}": {"mention_modalities": mention, "entity_modalities": entity}
    for mention, entity in (
        ([T], [T]),
        ([V], [V]),
        ([J], [J]),
        ([T, V], [T]),
        ([T, J], [T]),
        ([T, V, J], [T]),
        ([T], [T, V]),
        ([T], [T, J]),
        ([T], [T, V, J]),
    )
}
TABLE_4 = {"- aux 1": {"spaces": [2, 3]}, "- aux 1, 2": {"spaces": [3]}, "- aux 1, 2, 3": {"spaces": []}}
VARIANTS = {
    "the paper's": {},
    **TABLE_3,
    **TABLE_4,
    "text without a vision model": {"vision": None},
    "joint without a vision model": {"vision": None, "mention_modalities": [T, J], "entity_modalities": [J]},
    "- co-attention": {"co_attention": False},
    "two layers, other rates": {"num_layers": 2, "dilations": [2, 1]},
    "feature map": {"vision": RESNET},
    "vit": {"vision": VIT},
    "aligned start": {"encoder_init": "aligned"},
    "paired start": {"encoder_init": "paired", "conv_dim": 4},
    "other weights": {"loss_weights": [0.1, 0.7, 0.2, 2], "margin": 1},
}
FEW = (
    "the paper's",
    "aligned start",
    "paired start",
    "- co-attention",
    "text+image / text",
    "- aux 1",
    "text without a vision model",
    "joint without a vision model",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_and_loss_equal_the_equations_of_the_paper(name):
    """Covers eq. 1–14 in evaluation mode, with a mention without text and entities without prototypes."""
    model = build(**VARIANTS[name])
    batch, labels = batch_for(model), torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        out = model(**batch, labels=labels)
        mentions, entities = read(model, batch)
    weights, config = weights_of(model), model.config
    aux_m = direct_imn.spaces(weights, "mention", mentions, config)
    aux_e = direct_imn.spaces(weights, "entity", entities, config)
    np.testing.assert_allclose(model.encode_mentions(**side(batch, "mention")).aux.detach(), aux_m, atol=1e-4)
    np.testing.assert_allclose(model.encode_entities(**side(batch, "entity")).aux.detach(), aux_e, atol=1e-4)
    np.testing.assert_allclose(out.scores, direct_imn.all_scores(weights, aux_m, aux_e), atol=1e-4)
    expected = direct_imn.loss(weights, aux_m, aux_e, labels.tolist(), config)
    assert out.loss.item() == pytest.approx(expected, abs=1e-3)
    assert expected > 0.05
    assert set(out.space_scores) == set(config.spaces)
    for space, values in out.space_scores.items():
        cosines = [[direct_imn.cosine(m[space - 1], e[space - 1]) for e in aux_e] for m in aux_m]
        np.testing.assert_allclose(values, cosines, atol=1e-4)
    assert out.unit_scores == model.unit_scores({}, {}) == {}


@pytest.mark.parametrize("name", FEW)
def test_a_prior_of_entities_is_added_to_all_scores_of_the_loss_and_to_no_others(name):
    model = build(**VARIANTS[name])
    batch, labels, prior = batch_for(model), torch.tensor([2, 0, 2, 1]), torch.tensor([0.3, -0.2, 0.05])
    with torch.no_grad():
        plain, out = model(**batch, labels=labels), model(**batch, labels=labels, entity_log_prior=prior)
    torch.testing.assert_close(out.scores, plain.scores)
    config = model.config
    expected = 0.0
    for weight, scores in [
        (config.loss_weights[3], plain.scores),
        *((config.loss_weights[space - 1], values) for space, values in plain.space_scores.items()),
    ]:
        for m, gold in enumerate(labels.tolist()):
            for e in range(3):
                if e != gold:
                    gap = scores[m, e] + prior[e] - scores[m, gold] - prior[gold]
                    expected += weight * max(0.0, config.margin + gap.item()) / 4
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(model(**batch, labels=labels, entity_log_prior=torch.zeros(3)).loss, plain.loss)


def test_batch_norms_use_batch_statistics_in_training():
    model = build()
    batch = batch_for(model, entities=5)
    with torch.no_grad():
        mentions, entities = read(model, batch)
    weights = weights_of(model)
    model.train()
    with torch.no_grad():
        aux_m = model.encode_mentions(**side(batch, "mention")).aux
        aux_e = model.encode_entities(**side(batch, "entity")).aux
    np.testing.assert_allclose(aux_m, direct_imn.spaces(weights, "mention", mentions, model.config, True), atol=1e-3)
    np.testing.assert_allclose(aux_e, direct_imn.spaces(weights, "entity", entities, model.config, True), atol=1e-3)
    assert not torch.equal(
        model.state_dict()["mention_encoder.norm.0.running_mean"], weights["mention_encoder.norm.0.running_mean"]
    )


def test_a_training_batch_of_one_is_normalised_by_the_running_statistics():
    model = build()
    batch = batch_for(model, mentions=1, entities=1)
    expected = model(**batch).scores
    before = weights_of(model)
    out = model.train()(**batch, labels=torch.tensor([0]))
    torch.testing.assert_close(out.scores, expected)
    assert out.loss.item() == 0  # a batch of one has no negatives
    out.loss.backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_equal_finite_differences():
    """Checks the gradient of eq. 14 in float64, at the element with the largest gradient in every trained tensor."""
    model = build(vision=None, mention_modalities=[T], margin=2).double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_for(model, 4, 4).items()}
    labels, step = torch.tensor([2, 0, 3, 1]), 1e-6
    with torch.no_grad():
        sequences = model._extract("mention", [T], side(batch, "mention"))
    model._extract = lambda *_: sequences  # these are frozen, and slow to compute
    model(**batch, labels=labels).loss.backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) > 60
    for name, parameter in learning.items():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        place = int(gradient.abs().argmax())
        value, sides = flat[place].item(), []
        for shifted in (value + step, value - step):
            flat[place] = shifted
            with torch.no_grad():
                sides.append(model(**batch, labels=labels).loss.item())
        flat[place] = value
        assert gradient[place].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-6), name


def test_the_margin_pushes_the_gold_up():
    """Eq. 13 as printed would push it down, because its two similarities are exchanged."""
    model = build(spaces=[])
    labels = torch.tensor([0])
    good, bad = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.1, 0.9]])
    assert model._margin_loss(good, labels) == 0
    assert model._margin_loss(bad, labels).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", [*TABLE_3, *TABLE_4, "- co-attention", "text without a vision model"])
def test_every_variant_in_the_tables_of_the_paper_trains(name):
    model = build(**VARIANTS[name]).train()
    batch, labels = batch_for(model, mentions=4, entities=3), torch.tensor([2, 0, 1, 2])
    before = weights_of(model)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    extractors = {n for n in before if n.split(".")[0] in (*model.backbone_names, "patch_projection")}
    assert not learning & extractors
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [n for n, p in model.named_parameters() if n in learning and p.grad is None] == []
    assert all(torch.equal(before[n], model.state_dict()[n]) for n in extractors)


def test_padding_does_not_change_scores():
    model = build()
    batch = batch_for(model, entities=5)
    longer = dict(batch)
    for name in ("input_ids", "attention_mask", "name_ids", "name_mask"):
        longer[f"mention_{name}"] = torch.nn.functional.pad(batch[f"mention_{name}"], (0, 7))
    filled = dict(batch)
    filled["mention_pixel_values"] = batch["mention_pixel_values"].clone()
    filled["mention_pixel_values"][1] = 9
    for name in (T, V, J):
        mask = batch[f"entity_prototypes_{name}_mask"].unsqueeze(-1)
        filled[f"entity_prototypes_{name}"] = batch[f"entity_prototypes_{name}"].masked_fill(~mask, 5.0)
    with torch.no_grad():
        expected = model(**batch).scores
        torch.testing.assert_close(model(**longer).scores, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(**filled).scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_batches_chunks_and_order_do_not_change_scores(name):
    """Scores are the same one by one and in chunks, and permuted entities get permuted columns."""
    model = build(**VARIANTS[name])
    batch = batch_for(model, mentions=6, entities=7)
    with torch.no_grad():
        mentions = model.encode_mentions(**side(batch, "mention"))
        entities = model.encode_entities(**side(batch, "entity"))
        scores = model.score(mentions, entities)
        alone_m = [
            model.encode_mentions(**{k: v[i : i + 1] for k, v in side(batch, "mention").items()}) for i in range(6)
        ]
        alone_e = [
            model.encode_entities(**{k: v[i : i + 1] for k, v in side(batch, "entity").items()}) for i in range(7)
        ]
        singles = torch.cat([torch.cat([model.score(m, e) for e in alone_e], 1) for m in alone_m])
        order = torch.randperm(7)
        permuted = model.score(mentions, {k: v[order] for k, v in entities.items()})
        chunked = torch.cat(
            [model.score(mentions, {k: v[i : i + 3] for k, v in entities.items()}) for i in (0, 3, 6)], 1
        )
    torch.testing.assert_close(singles, scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted, scores[:, order])
    torch.testing.assert_close(chunked, scores)
    assert {tuple(v.shape) for v in entities.values()} == {(7, 3, 6)}
    assert isinstance(model, Retriever)


@pytest.mark.parametrize("counts", [(6, 7), (3, 9), (9, 2)])
def test_scores_with_and_without_gradients_are_the_same(counts):
    model = build()
    batch = batch_for(model, *counts)
    with torch.no_grad():
        expected = model(**batch).scores
    scores = model(**batch).scores
    assert scores.requires_grad
    torch.testing.assert_close(scores.detach(), expected, atol=1e-5, rtol=1e-5)


def test_large_batches_are_encoded_in_groups_by_length():
    """Grouping by length gives the same aux as encoding one by one."""
    model = build()
    batch = batch_for(model, mentions=41, entities=modeling_imn._MIN_BATCH_TO_GROUP)
    for name, count in (("mention", 41), ("entity", modeling_imn._MIN_BATCH_TO_GROUP)):
        encode = model.encode_mentions if name == "mention" else model.encode_entities
        with torch.no_grad():
            grouped = encode(**side(batch, name)).aux
            single = [encode(**{k: v[i : i + 1] for k, v in side(batch, name).items()}).aux for i in range(count)]
        torch.testing.assert_close(grouped, torch.cat(single), atol=1e-5, rtol=1e-5)


def test_the_aligned_start_maps_single_tokens():
    """Both networks start as the same map of single tokens, the ReLU of an orthogonal projection."""
    torch.manual_seed(0)
    wide = {"vision_config": None, "encoder_init": "aligned", "dilations": [1, 2], **DIMS, "hidden_dim": 8}
    model = ImnModel(ImnConfig(text_config=dict(BERT), **wide)).eval()
    width = model.widths["text"]
    token, others = torch.randn(2, width), torch.randn(5, width)
    for encoder in (model.mention_encoder, model.entity_encoder):
        weight = encoder.cnn["text"].layers[0].weight[:, :, 1]
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder.cnn["text"].layers[1].weight[:, :, 1], torch.eye(8))
        seen = encoder.cnn["text"](others.unsqueeze(0), torch.ones(1, 5, dtype=torch.bool))[0]
        torch.testing.assert_close(seen, (others @ weight.T).clamp(min=0), atol=1e-5, rtol=1e-5)
    mask = torch.ones(2, 1, dtype=torch.bool)
    with torch.no_grad():
        mention_sequences = model.mention_encoder({"text": (token.unsqueeze(1), mask)})
        entity_sequences = model.entity_encoder({"text": (token.unsqueeze(1), mask)})
        # The token is repeated eight times. Only taps after the first read the zeros that eq. 6 adds at the end.
        repeated = model.mention_encoder({"text": (token.unsqueeze(1).expand(2, 8, width), mask.expand(2, 8))})
    torch.testing.assert_close(mention_sequences, entity_sequences)
    torch.testing.assert_close(repeated, mention_sequences, atol=1e-5, rtol=1e-5)
    assert mention_sequences[0].sub(mention_sequences[1]).abs().max() > 0.01
    largest = 0.1 * model.config.aux_dim**-0.5  # a tenth of PyTorch's default, so that co-attention is nearly uniform
    for direction in (model.mention_to_entity, model.entity_to_mention):
        for linear in (direction.query, direction.key):
            assert largest / 2 < linear.weight.abs().max() <= largest


def test_the_paired_start_cuts_nothing_off():
    """Spaces 1 and 2 start as projections of the mean token, space 3 of the middle between largest and smallest.

    The projections are read off the weights here, and orthogonal ones lose nothing, so inner products are the tokens'.
    """
    torch.manual_seed(0)
    modalities = {"mention_modalities": ["text", "image"], "entity_modalities": ["text", "image"]}
    widths = {"hidden_dim": 48, "aux_dim": 48, "conv_dim": 12, "dilations": [1, 2]}
    model = ImnModel(
        ImnConfig(text_config=dict(BERT), vision_config=dict(VIT), encoder_init="paired", **DIMS | modalities | widths)
    ).eval()
    lengths, sequences = {"text": 5, "image": 3}, {}
    for name, length in lengths.items():
        sequences[name] = (torch.randn(2, length, model.widths[name]), torch.ones(2, length, dtype=torch.bool))
    with torch.no_grad():
        mention_aux, entity_aux = model.mention_encoder(sequences), model.entity_encoder(sequences)
    torch.testing.assert_close(mention_aux, entity_aux)
    assert max(model.widths[name] for name in lengths) <= 24  # so that 24 pairs and 24 outputs lose nothing
    for place, name in enumerate(lengths):
        conv = model.mention_encoder.cnn[name].layers[0].weight[:24, :, 1].detach()
        tokens = sequences[name][0]
        mean = tokens.mean(1)
        rows = slice(24 * place, 24 * (place + 1))
        shown = mention_aux[:, 0, rows]
        torch.testing.assert_close(shown @ shown.T, mean @ mean.T, atol=1e-3, rtol=1e-3)
        # The Transformer starts as a LayerNorm of the pair [x⁺; x⁻], whose difference is x / σ.
        x = tokens @ conv.T
        pair = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
        normed = x / pair.std(-1, unbiased=False, keepdim=True)
        second = mention_aux[:, 1, rows]
        torch.testing.assert_close(second @ second.T, normed.mean(1) @ normed.mean(1).T, atol=1e-3, rtol=1e-3)
        blocks = []
        for block in model.mention_encoder.convolutions[name]:
            y = normed @ block.weight[:6, :24, 0].detach().T
            blocks.append(y.amax(1).clamp(min=0) + y.amin(1).clamp(max=0))
        third = 10 * mention_aux[:, 2, rows]  # the weight of the batch normalisation starts at 0.1
        expected = torch.cat(blocks, -1)
        torch.testing.assert_close(third @ third.T, expected @ expected.T, atol=1e-3, rtol=1e-3)


def test_blocks_do_not_change_scores(monkeypatch):
    model = build()
    batch = batch_for(model, mentions=11, entities=9)
    with torch.no_grad():
        expected = model(**batch).scores
        for elements, mentions in ((1, 8), (150, 1), (900, 3), (5000, 8)):
            monkeypatch.setattr(modeling_imn, "_BLOCK_ELEMENTS", {"cpu": elements})
            monkeypatch.setattr(modeling_imn, "_BLOCK_MENTIONS", mentions)
            torch.testing.assert_close(model(**batch).scores, expected)


def test_scores_stay_finite_cosines_if_spaces_cancel():
    model = build()
    aux = torch.zeros(2, 3, 6)
    aux[0, :, 0] = torch.tensor([1e4, -1e4, 0])
    encodings = {"aux": aux, "query": aux, "key": aux}
    scores = model.score(encodings, encodings)
    assert scores.isfinite().all()
    assert scores.abs().max() <= 1 + 1e-5


def test_half_precision_encodings_are_scored_in_float32():
    model = build()
    batch = batch_for(model, 5, 6)
    with torch.no_grad():
        mentions = model.encode_mentions(**side(batch, "mention"))
        entities = model.encode_entities(**side(batch, "entity"))
        scores = model.score(mentions, {name: tensor.half() for name, tensor in entities.items()})
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, model.score(mentions, entities), atol=0.02, rtol=0.02)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model.score(mentions, entities), model.score(mentions, entities))
            assert model(**batch).scores.dtype == torch.float32


def test_posts_are_encoded_as_means_of_the_extractors_states():
    model = build()
    batch = posts(5, "post")
    encoded = model.encode_posts(**batch)
    mask, shown = batch["post_attention_mask"].bool(), batch["post_image_mask"].bool()
    assert encoded["text_present"].tolist() == mask.any(1).tolist() == [True, True, True, False, True]
    assert encoded["image_present"].tolist() == shown.tolist()
    assert encoded["joint_present"].all()
    with torch.no_grad():
        for i in range(5):
            text, image = np.zeros(12), np.zeros(8)
            if mask[i].any():
                states = model.text_model(input_ids=batch["post_input_ids"][i : i + 1, mask[i]]).last_hidden_state[0]
                text = states.mean(0)
            if shown[i]:
                image = model.vision_model(batch["post_pixel_values"][i : i + 1]).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(encoded["text"][i], text, atol=1e-5)
            np.testing.assert_allclose(encoded["image"][i], image, atol=1e-5)
    assert all(tensor.isfinite().all() and not tensor.requires_grad for tensor in encoded.values())
    empty = {name: torch.zeros_like(v) for name, v in batch.items()}
    empty = model.encode_posts(**empty)
    assert all((tensor == 0).all() for tensor in empty.values())


def test_the_joint_model_reads_text_mention_and_patches():
    """Compares with embeddings, positions and segments built one item at a time."""
    model = build()
    batch = posts(5)
    patches = model._patches(batch["mention_pixel_values"], batch["mention_image_mask"].bool())
    mask, name_mask = batch["mention_attention_mask"].bool(), batch["mention_name_mask"].bool()
    with torch.no_grad():
        states, present, _ = model._joint(
            batch["mention_input_ids"], mask, batch["mention_name_ids"], name_mask, patches
        )
        words = model.joint_model.get_input_embeddings().weight
        for i in range(5):
            tokens = batch["mention_input_ids"][i][mask[i]].tolist()
            sequence = [words[token] for token in tokens]
            positions, segments = list(range(len(tokens))), [0] * len(tokens)
            if name_mask[i].any():
                pieces = batch["mention_name_ids"][i][name_mask[i]].tolist()
                sequence.append(sum(words[piece] for piece in pieces) / len(pieces))
                positions.append(len(tokens))
                segments.append(0)
            if batch["mention_image_mask"][i]:
                image = model.vision_model(batch["mention_pixel_values"][i : i + 1]).last_hidden_state[0]
                sequence += [model.patch_projection(patch) for patch in image]
                positions += range(len(image))
                segments += [1] * len(image)
            expected = model.joint_model(
                inputs_embeds=torch.stack(sequence).unsqueeze(0),
                position_ids=torch.tensor([positions]),
                token_type_ids=torch.tensor([segments]),
            ).last_hidden_state[0]
            assert present[i].sum() == len(expected)
            assert present[i, : len(expected)].all()
            torch.testing.assert_close(states[i, : len(expected)], expected, atol=1e-5, rtol=1e-5)
            assert (states[i, len(expected) :] == 0).all()


def test_a_batch_without_images_needs_no_pixels():
    model = build()
    batch = batch_for(model) | {"mention_image_mask": torch.zeros(4)}
    with torch.no_grad():
        expected = model(**batch).scores
        del batch["mention_pixel_values"]
        torch.testing.assert_close(model(**batch).scores, expected)


# Pre-training


def pretraining_batch(rows=5, seed=3):
    batch = {name.removeprefix("x_"): value for name, value in posts(rows, "x", seed).items()}
    random = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(batch["input_ids"].shape, generator=random) < 0.4) & batch["attention_mask"].bool()
    partners = torch.tensor([0, 2, 1, 0, 4, 3][:rows])
    matching = (partners != torch.arange(rows)).long()
    return batch | {
        "labels": torch.where(hidden, batch["input_ids"], -100),
        "partners": partners,
        "matching_labels": matching.masked_fill(~batch["image_mask"].bool()[partners], -100),
        "mask_seeds": torch.arange(100, 100 + rows),
    }


def test_the_pretraining_loss_is_the_adaptive_sum_of_three_losses():
    model = build(ImnForKnowledgePreTraining, patch_mask_probability=0.4)
    batch = pretraining_batch()
    with torch.no_grad():
        out = model(**batch)
    words = model.joint_model.get_input_embeddings().weight.detach()
    language, patch, matching = [], [], []
    with torch.no_grad():
        for i in range(5):
            present = batch["attention_mask"][i].bool()
            j, length = int(batch["partners"][i]), int(present.sum())
            names = batch["name_ids"][i][batch["name_mask"][i].bool()]
            shown = bool(batch["image_mask"][j])
            target = model.vision_model(batch["pixel_values"][j : j + 1]).last_hidden_state
            drawn = torch.rand(5, generator=torch.Generator().manual_seed(100 + i)) < 0.4
            patches = target.clone()
            patches[0, drawn] = 0
            states, _, _ = model._joint(
                batch["input_ids"][i : i + 1, present],
                torch.ones(1, length).bool(),
                names.unsqueeze(0) if len(names) else None,
                torch.ones(1, len(names)).bool() if len(names) else None,
                (patches, torch.full((1, 5), shown)),
            )
            states = states[0]
            for place, label in enumerate(batch["labels"][i][present].tolist()):
                if label >= 0:
                    logits = model.language_head(states[place], words).double().numpy()
                    language.append(-np.log(direct_imn.softmax(logits)[label]))
            if not shown:
                continue
            first = length + bool(len(names))
            for place in range(5):
                if drawn[place]:
                    p = direct_imn.softmax(target[0, place].double().numpy())
                    q = direct_imn.softmax(model.patch_head(states[first + place]).double().numpy())
                    patch.append(sum(p * np.log(p / q)))
            logits = model.matching_head(states[0]).double().numpy()
            matching.append(-np.log(direct_imn.softmax(logits)[int(i != j)]))
            np.testing.assert_allclose(out.logits[i], logits, atol=1e-4)
    losses = np.array([np.mean(values) for values in (language, patch, matching)])
    for name, expected in zip(("language", "patch", "matching"), losses, strict=True):
        assert out.task_losses[name].item() == pytest.approx(expected, rel=1e-4)
    inverse = [1 / (3 - share**2) for share in np.exp(losses) / np.exp(losses).sum()]
    weights = [value / sum(inverse) for value in inverse]
    np.testing.assert_allclose([weight.item() for weight in out.task_weights.values()], weights, rtol=1e-4)
    assert out.loss.item() == pytest.approx(sum(w * loss for w, loss in zip(weights, losses, strict=True)), rel=1e-4)


def test_adaptive_weights_favour_the_harder_task_and_have_no_gradient():
    weights = pretraining_imn._adaptive_weights(torch.tensor([3.0, 1.0]))
    assert weights[0] > weights[1]
    assert weights.sum() == 1
    assert pretraining_imn._adaptive_weights(torch.tensor([5.0])).tolist() == [1.0]
    model = build(ImnForKnowledgePreTraining).train()
    batch = pretraining_batch()
    out = model(**batch)
    out.loss.backward()
    gradient = model.matching_head[2].bias.grad.clone()
    model.zero_grad()
    model(**batch).task_losses["matching"].backward()
    torch.testing.assert_close(gradient, out.task_weights["matching"] * model.matching_head[2].bias.grad)


def test_pretraining_trains_only_the_joint_model():
    model = build(ImnForKnowledgePreTraining).train()
    model(**pretraining_batch()).loss.backward()
    missing = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert missing == {"text_model", "vision_model"}
    assert model.joint_model.training
    assert not model.vision_model.training


def test_pretraining_without_images_uses_the_language_loss_only():
    model = build(ImnForKnowledgePreTraining, vision=None, mention_modalities=[T, J])
    batch = pretraining_batch()
    batch = {k: batch[k] for k in ("input_ids", "attention_mask", "name_ids", "name_mask", "labels")}
    out = model(**batch)
    assert set(out.task_losses) == {"language"}
    torch.testing.assert_close(out.loss, out.task_losses["language"])
    assert out.logits is None
    batch["labels"] = torch.full_like(batch["labels"], -100)
    unlabelled = model(**batch)
    assert unlabelled.loss.item() == 0
    unlabelled.loss.backward()


def test_pretraining_needs_a_joint_model():
    with pytest.raises(ValueError, match="joint"):
        build(ImnForKnowledgePreTraining, vision=None)


def test_a_pretrained_model_loads_for_linking(tmp_path):
    model = build(ImnForKnowledgePreTraining)
    model.save_pretrained(tmp_path)
    linking, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(linking, ImnModel)
    untrained = {name.split(".")[0] for name in info["missing_keys"]}
    assert untrained == {"mention_encoder", "entity_encoder", "mention_to_entity", "entity_to_mention"}
    for name in ("joint_model", "patch_projection", "text_model", "vision_model"):
        for key, value in getattr(model, name).state_dict().items():
            assert torch.equal(getattr(linking, name).state_dict()[key], value), key
    assert all(tensor.isfinite().all() for tensor in linking.state_dict().values())
    norm = linking.mention_encoder.norm[0]
    assert norm.running_mean.abs().max() == 0
    assert (norm.running_var == 1).all()
    assert linking(**batch_for(linking)).scores.isfinite().all()
    again, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, ImnForKnowledgePreTraining)
    assert not any(info.values())


# Saving, building and invalid inputs


@pytest.mark.parametrize("name", [*FEW, "vit", "feature map"])
def test_save_and_load(name, tmp_path):
    model = build(**VARIANTS[name])
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, ImnModel)
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    frozen = [p for n, p in loaded.named_parameters() if n.split(".")[0] in loaded.backbone_names]
    assert not any(p.requires_grad for p in frozen)
    assert loaded.num_prototypes == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).scores, model(**batch).scores, atol=1e-6, rtol=1e-6)


def test_remote_code_loads_without_the_package(tmp_path):
    for cls, auto in ((ImnConfig, "AutoConfig"), (ImnModel, "AutoModel")):
        cls.register_for_auto_class(auto)
    model = build()
    batch = batch_for(model)
    model.save_pretrained(tmp_path)
    torch.save((batch, model(**batch).scores.detach()), tmp_path / "batch.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = None  # any import of it fails
import torch
from transformers import AutoModel
batch, scores = torch.load({str(tmp_path / "batch.pt")!r})
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(**batch).scores, scores, atol=1e-5, rtol=1e-5)
assert type(model).__module__.startswith("transformers_modules"), type(model)
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr


def test_a_pretraining_repository_contains_all_its_code(tmp_path):
    save_model_repository(build(ImnForKnowledgePreTraining, vision=None, mention_modalities=[J]), None, tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert code == {"configuration_imn.py", "modeling_imn.py", "pretraining_imn.py"}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "pretraining_imn.ImnForKnowledgePreTraining"


def test_from_backbones_copies_the_pretrained_weights(tmp_path):
    torch.manual_seed(0)
    parts = {name: build().get_submodule(f"{name}_model") for name in ("text", "vision")}
    for name, part in parts.items():
        part.save_pretrained(tmp_path / name)
    text, vision = str(tmp_path / "text"), str(tmp_path / "vision")
    both = ImnModel.from_backbones(text=text, vision=vision, **DIMS)
    assert both.config.modalities == ["text", "image", "joint"]
    assert str(tmp_path) not in both.config.to_json_string()
    for ours, theirs in ((both.text_model, "text"), (both.joint_model, "text"), (both.vision_model, "vision")):
        expected = parts[theirs].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    alone = ImnModel.from_backbones(text=text, **DIMS)
    assert alone.config.modalities == ["text"]
    assert not hasattr(alone, "joint_model")
    assert alone.config.vision_config is None
    joint = ImnForKnowledgePreTraining.from_backbones(text=text, mention_modalities=["joint"], **DIMS)
    assert torch.equal(
        joint.joint_model.state_dict()["embeddings.word_embeddings.weight"],
        parts["text"].state_dict()["embeddings.word_embeddings.weight"],
    )
    with pytest.raises(ValueError, match="not a text encoder"):
        ImnModel.from_backbones(text=vision)
    with pytest.raises(ValueError, match="text encoder"):
        ImnModel.from_backbones()


def test_the_default_configuration_is_that_of_the_paper():
    config = ImnConfig()
    assert (config.text_config.model_type, config.vision_config.model_type) == ("bert", "detr")
    assert config.vision_config.num_queries == 100
    assert config.mention_modalities == config.entity_modalities == ["text", "image", "joint"]
    assert (config.num_prototypes, config.margin, config.dropout) == (10, 0.2, 0.2)
    assert (config.loss_weights, config.spaces) == ([0.5, 0.5, 0.5, 1.0], [1, 2, 3])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mention_modalities": ["txet"]}, ["mention_modalities", "'text'"]),
        ({"entity_modalities": []}, ["entity_modalities"]),
        ({"vision_config": None, "mention_modalities": ["image"]}, ["'image'", "vision_config"]),
        ({"text_config": None, "entity_modalities": ["text"]}, ["'text'", "text_config"]),
        ({"spaces": [0]}, ["spaces"]),
        ({"loss_weights": [1.0]}, ["loss_weights"]),
        ({"dilations": [0]}, ["dilations"]),
        ({"num_heads": 3}, ["num_heads"]),
        ({"num_prototypes": 0}, ["num_prototypes"]),
        ({"prototype_selection": "best"}, ["prototype_selection", "'random'"]),
        ({"dropout": 1}, ["dropout"]),
        ({"encoder_init": "zero"}, ["encoder_init", "'aligned'"]),
        ({"encoder_init": "aligned", "entity_modalities": ["text"]}, ["encoder_init", "entity_modalities=['text']"]),
        ({"encoder_init": "paired", "entity_modalities": ["text"]}, ["'paired'", "entity_modalities=['text']"]),
        ({"encoder_init": "paired", "conv_dim": 3}, ["'paired'", "conv_dim=3", "even"]),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ImnConfig(**({"text_config": dict(BERT), "vision_config": dict(DETR)} | DIMS | fields))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mention_input_ids", "mention_input_ids"),
        ("mention_pixel_values", "pixel_values"),
        ("entity_prototypes_joint", "entity_prototypes_joint"),
    ],
)
def test_the_error_names_missing_inputs(name, message):
    model = build()
    batch = batch_for(model)
    del batch[name]
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_prototypes_of_another_width_are_refused():
    model = build()
    batch = batch_for(model)
    batch["entity_prototypes_text"] = torch.zeros(3, 4, 99)
    with pytest.raises(ValueError, match="99 wide"):
        model(**batch)


def test_a_text_longer_than_the_positions_is_refused():
    model = build(mention_modalities=[J])
    batch = batch_for(model) | posts(4, width=40)
    with pytest.raises(ValueError, match="max_length"):
        model(**batch)


def test_cached_features_give_the_same_encodings_and_gradients():
    """Cached features contain no padding, so they do not depend on the batch that they were computed in."""
    model = build()
    batch = posts(6, "mention", seed=4)
    with torch.no_grad():
        expected = model.encode_mentions(**batch)
        features = model.mention_features(**batch)
        cached = {}
        for name in (T, V, J):
            states, mask = features[name], features[f"{name}_mask"]
            rows = [states[row, mask[row]] for row in (5, 3, 1)]
            cached[f"mention_features_{name}"] = torch.nn.utils.rnn.pad_sequence(
                [*rows, torch.zeros(40, states.shape[2])], True
            )[:3]
            counts = torch.tensor([len(row) for row in rows])
            cached[f"mention_features_{name}_mask"] = torch.arange(40) < counts[:, None]
        for name, tensor in model.encode_mentions(**cached).items():
            torch.testing.assert_close(tensor, expected[name][[5, 3, 1]], atol=1e-5, rtol=1e-5)
    entities, labels = prototypes(model, 3), torch.arange(3)
    losses = []
    for inputs in (cached, {key: tensor[[5, 3, 1]] for key, tensor in batch.items() if "pixel" not in key}):
        if inputs is not cached:
            seen = batch["mention_image_mask"][[5, 3, 1]].bool()
            inputs["mention_pixel_values"] = batch["mention_pixel_values"][[5, 3, 1]]
            assert seen.any()
        model.train()
        model.zero_grad()
        model(**inputs, **entities, labels=labels).loss.backward()
        losses.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.eval()
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-4)
    assert losses[0].abs().max() > 0


def test_dropout_applies_in_training_only():
    model, plain = build(dropout=0.4), build()
    plain.load_state_dict(model.state_dict())
    batch = batch_for(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).scores, plain(**batch).scores)
        model.train()
        torch.manual_seed(0)
        first, second = model.mention_encoder, model.entity_encoder
        sequences = {
            name: (torch.randn(4, 5, model.widths[name]), torch.ones(4, 5, dtype=torch.bool)) for name in (T, V, J)
        }
        for encoder in (first, second):
            levels = [encoder(sequences) for _ in range(2)]
            assert (
                levels[0][:, 0] - levels[1][:, 0]
            ).abs().max() > 1e-3  # space 1 has no Transformer, so this is the dropout before eq. 3
