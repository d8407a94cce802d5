"""Tests of PFMEL's model: scores against single sequences, the head and its labels, masks, images and saving."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    BertConfig,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ResNetConfig,
    ViTConfig,
)

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.hub.saving import save_model_repository
from hf_mel.modeling.pfmel import PfmelConfig, PfmelForPreTraining, PfmelModel, PfmelProcessor, modeling_pfmel
from hf_mel.protocols import Reranker
from tests.modeling import direct_pfmel
from tests.modeling.test_pfmel_processing import WORDS, make_tokenizer

BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12],
    "depths": [1, 1],
    "layer_type": "basic",
}
CLS, SEP = 2, 3
WIDTH = 12


def build(cls=PfmelModel, seed=0, vision=True, **fields):
    torch.manual_seed(seed)
    config = {"text_config": dict(BERT)} | ({"vision_config": dict(RESNET)} if vision else {}) | fields
    model = cls(PfmelConfig(**config)).eval()
    with torch.no_grad():  # zero biases and small weights would hide a part that is not applied
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_model"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def sentences(counts=(3, 1, 2), width=9, seed=0):
    """Returns pairs of a mention and its candidates; each has the token ids of a text, and image features or `None`."""
    random = np.random.default_rng(seed)

    def text():
        return random.integers(4, 59, random.integers(2, width)).tolist()

    def image(present):
        return random.normal(size=WIDTH).astype(np.float32) if present else None

    out = []
    for row, count in enumerate(counts):
        mention = (text(), image(row % 3 != 1))
        out.append((mention, [(text(), image((row + k) % 3 != 2)) for k in range(count)]))
    return out


def tensors(pairs, columns=None, extra=0):
    """Returns the inputs that a processor would make of pairs."""
    columns = columns or max(len(candidates) for _, candidates in pairs)
    length = 3 + 2 + extra + max(len(m[0]) + len(c[0]) for m, cs in pairs for c in cs)
    shape = (len(pairs), columns)
    batch = {
        "pair_input_ids": torch.zeros(*shape, length, dtype=torch.long),
        "pair_attention_mask": torch.zeros(*shape, length, dtype=torch.long),
        "pair_token_type_ids": torch.zeros(*shape, length, dtype=torch.long),
        "pair_mask": torch.zeros(*shape, dtype=torch.bool),
        "pair_image_positions": torch.full((*shape, 2), -1),
        "pair_mention_image_features": torch.zeros(len(pairs), WIDTH),
        "pair_entity_image_features": torch.zeros(*shape, WIDTH),
    }
    for m, ((text, image), candidates) in enumerate(pairs):
        if image is not None:
            batch["pair_mention_image_features"][m] = torch.from_numpy(image)
        for c, (other, other_image) in enumerate(candidates):
            ids = [CLS, *text]
            if image is not None:
                batch["pair_image_positions"][m, c, 0] = len(ids)
                ids.append(0)
            ids.append(SEP)
            first = len(ids)
            ids += other
            if other_image is not None:
                batch["pair_image_positions"][m, c, 1] = len(ids)
                batch["pair_entity_image_features"][m, c] = torch.from_numpy(other_image)
                ids.append(0)
            ids.append(SEP)
            batch["pair_mask"][m, c] = True
            batch["pair_input_ids"][m, c, : len(ids)] = torch.tensor(ids)
            batch["pair_attention_mask"][m, c, : len(ids)] = 1
            batch["pair_token_type_ids"][m, c, first : len(ids)] = 1
    return batch


def shown(sentence):
    text, image = sentence
    return [*text, *([] if image is None else [image.astype(np.float64)])]


def direct(model, pairs):
    return [
        [
            direct_pfmel.logits(model, shown(mention), shown(candidate), {"[CLS]": CLS, "[SEP]": SEP})
            for candidate in candidates
        ]
        for mention, candidates in pairs
    ]


def test_scores_and_loss_equal_those_of_single_sequences():
    model, pairs = build(), sentences((3, 1, 2, 2))
    labels = torch.tensor([1, 0, -100, 0])
    with torch.no_grad():
        out = model(**tensors(pairs), labels=labels)
    expected = direct(model, pairs)
    losses = []
    for m, row in enumerate(expected):
        for c, logits in enumerate(row):
            assert out.scores[m, c].item() == pytest.approx(direct_pfmel.log_odds(logits), abs=2e-4)
            if labels[m] >= 0:
                losses.append(direct_pfmel.cross_entropy(logits, int(labels[m] != c)))
        assert torch.isneginf(out.scores[m, len(row) :]).all()
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert len(losses) == 6
    assert out.scores.dtype == torch.float32


def test_a_text_model_equals_single_sequences():
    model = build(vision=False)
    pairs = [((text, None), [(other, None) for other, _ in cs]) for (text, _), cs in sentences()]
    batch = {k: v for k, v in tensors(pairs).items() if "image" not in k}
    with torch.no_grad():
        scores = model(**batch).scores
    assert not hasattr(model, "image_projection")
    for m, row in enumerate(direct(model, pairs)):
        for c, logits in enumerate(row):
            assert scores[m, c].item() == pytest.approx(direct_pfmel.log_odds(logits), abs=2e-4)


def test_padding_grouping_and_order_do_not_change_scores():
    """Every pair is scored alone, and permuted candidates get permuted scores."""
    model, pairs = build(), sentences((3, 1, 2))
    with torch.no_grad():
        expected = model(**tensors(pairs)).scores
        padded = model(**tensors(pairs, columns=5, extra=7)).scores
        single = [[model(**tensors([(m, [c])])).scores.item() for c in cs] for m, cs in pairs]
        turned = model(**tensors([(m, cs[::-1]) for m, cs in pairs])).scores
    torch.testing.assert_close(padded[:, :3], expected, atol=1e-5, rtol=1e-5)
    assert torch.isneginf(padded[:, 3:]).all()
    for m, row in enumerate(single):
        torch.testing.assert_close(expected[m, : len(row)], torch.tensor(row), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(turned[m, : len(row)].flip(0), expected[m, : len(row)], atol=1e-5, rtol=1e-5)


def test_blocks_do_not_change_scores(monkeypatch):
    for vision in (True, False):
        model, batch = build(vision=vision), tensors(sentences((3, 1, 4)))
        if not vision:
            batch = {k: v for k, v in batch.items() if "image" not in k}
            batch["pair_attention_mask"][batch["pair_input_ids"] == 0] = 0
        scores_by_block = []
        for block in (100, 3, 1):
            monkeypatch.setattr(modeling_pfmel, "_BLOCK_SEQUENCES", (block, block))
            with torch.no_grad():
                scores_by_block.append(model(**batch).scores)
        torch.testing.assert_close(scores_by_block[1], scores_by_block[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores_by_block[2], scores_by_block[0], atol=1e-5, rtol=1e-5)


def test_a_masked_candidate_has_no_influence():
    """The values in masked cells, even nan, change neither scores nor gradients."""
    model, pairs = build(), sentences((3, 1, 2))
    batch, labels = tensors(pairs), torch.tensor([2, 0, 1])
    garbage = {k: v.clone() for k, v in batch.items()}
    garbage["pair_entity_image_features"][~batch["pair_mask"]] = float("nan")
    garbage["pair_input_ids"][~batch["pair_mask"]] = 17
    garbage["pair_image_positions"][~batch["pair_mask"]] = 1
    results = []
    for inputs in (batch, garbage):
        model.zero_grad()
        out = model(**inputs, labels=labels)
        out.loss.backward()
        results.append((out.loss.detach(), out.scores.detach(), model.image_projection.weight.grad.clone()))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)
    assert torch.isfinite(results[0][2]).all()


def test_mentions_without_candidates():
    model = build()
    batch = tensors(sentences((2, 2)))
    batch["pair_mask"][:] = False
    out = model(**batch, labels=torch.tensor([-100, -100]))
    assert torch.isneginf(out.scores).all()
    out.loss.backward()
    assert out.loss.item() == 0


def test_pixels_and_their_features_give_the_same_scores():
    model, pairs = build(), sentences((3, 1, 2))
    batch = tensors(pairs)
    pixels = torch.randn(len(pairs), 3, 16, 16), torch.randn(*batch["pair_mask"].shape, 3, 16, 16)
    with torch.no_grad():
        batch["pair_mention_image_features"] = model.encode_images(pixels[0])
        batch["pair_entity_image_features"] = model.encode_images(pixels[1].flatten(0, 1)).unflatten(0, (3, 3))
        by_features = model(**batch).scores
        names = ("pair_mention_image_features", "pair_entity_image_features")
        without = {k: v for k, v in batch.items() if k not in names}
        by_pixels = model(**without, pair_mention_pixel_values=pixels[0], pair_entity_pixel_values=pixels[1]).scores
        with pytest.raises(ValueError, match="pair_mention_pixel_values"):
            model(**without)
    torch.testing.assert_close(by_pixels, by_features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_the_image_of_an_entity_is_the_mean_of_its_images(trained):
    """T(e) of §3.2 equals the mean over single images, and so do the gradients of a trained encoder."""
    model, pairs = build(train_vision=trained), sentences((3, 1, 2))
    batch = tensors(pairs)
    has_image = batch["pair_image_positions"][..., 1] >= 0
    counts = torch.randint(1, 4, has_image.shape, generator=torch.Generator().manual_seed(2)) * has_image
    assert len(counts[has_image].unique()) > 1
    pixels = torch.randn(*has_image.shape, 3, 3, 16, 16)
    pixels[torch.arange(3) >= counts.unsqueeze(-1)] = float("nan")  # missing images have no influence
    labels, results = torch.tensor([2, 0, 1]), []
    means = torch.zeros(*has_image.shape, WIDTH)
    for m, c in has_image.nonzero().tolist():
        features = [model.encode_images(pixels[m, c, k : k + 1])[0] for k in range(counts[m, c])]
        means[m, c] = sum(features) / len(features)
    batch.pop("pair_entity_image_features")
    for inputs in (
        {"pair_entity_image_features": means},
        {"pair_entity_pixel_values": pixels, "pair_entity_image_counts": counts},
    ):
        model.zero_grad()
        out = model(**batch, **inputs, labels=labels)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.scores.detach(), gradients))
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
    assert any(name.startswith("vision_model") for name in results[0][1]) == trained

    model = build(PfmelForPreTraining, train_vision=trained)
    batch, _, labels = pretraining_batch()
    batch.pop("entity_image_features")
    pixels, counts = pixels[:1, :2].nan_to_num().squeeze(0), torch.tensor([3, 1])
    with torch.no_grad():
        single = [[model.encode_images(pixels[i, k : k + 1])[0] for k in range(n)] for i, n in enumerate(counts)]
        means = torch.stack([sum(features) / len(features) for features in single])
        by_features = model(**batch, entity_image_features=means, labels=labels).logits
        by_pixels = model(**batch, entity_pixel_values=pixels, entity_image_counts=counts, labels=labels).logits
    torch.testing.assert_close(by_pixels, by_features, atol=1e-4, rtol=1e-4)


VISIONS = {
    "resnet": (ResNetConfig(**{k: v for k, v in RESNET.items() if k != "model_type"}), 12),
    "vit": (
        ViTConfig(
            hidden_size=20,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        20,
    ),
    "convnext": (ConvNextConfig(hidden_sizes=[8, 20], depths=[1, 1], num_stages=2, image_size=16), 20),
}


@pytest.mark.parametrize("name", VISIONS)
def test_every_kind_of_image_encoder(name):
    config, width = VISIONS[name]
    model = build(vision_config=config.to_dict(), train_vision=True)
    pixels = torch.randn(2, 3, 16, 16)
    features = model.encode_images(pixels)
    assert features.shape == (2, width)
    output = model.vision_model(pixel_values=pixels)
    states = output.last_hidden_state  # the mean of a feature map, or the first token of a Transformer
    if name == "convnext":  # its pooler normalises the mean
        expected = output.pooler_output
    else:
        expected = states.mean((2, 3)) if states.dim() == 4 else states[:, 0]
    torch.testing.assert_close(features, expected)
    assert model.image_projection.in_features == width
    assert features.requires_grad


def test_a_frozen_image_encoder_does_not_change():
    model, batch = build().train(), tensors(sentences())
    before = {k: v.clone() for k, v in model.vision_model.state_dict().items()}
    pixels = torch.randn(4, 3, 16, 16) * 3 + 1
    assert model.image_features_are_fixed
    assert not model.encode_images(pixels).requires_grad
    assert not any(p.requires_grad for p in model.vision_model.parameters())
    torch.testing.assert_close(model.vision_model.state_dict(), before)  # including the statistics of batch norms
    model(**batch, labels=torch.tensor([0, 0, 0])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    trained = build(train_vision=True).train()
    assert not trained.image_features_are_fixed
    assert all(p.requires_grad for p in trained.vision_model.parameters())
    assert trained.vision_model.training


def pretraining_batch(seed=0):
    """Returns the examples of two posts and two entities: one positive and one negative of every form and order."""
    random = np.random.default_rng(seed)
    posts, entities = (
        [(random.integers(4, 59, n).tolist(), random.normal(size=WIDTH).astype(np.float32)) for n in lengths]
        for lengths in ((4, 6), (5, 3))
    )
    rows = []
    for form, (with_text, with_image) in enumerate(
        (((1, 0), (0, 1)), ((0, 1), (1, 0)), ((1, 1), (0, 0)), ((1, 1), (1, 1)))
    ):
        for post, entity in ((0, 0), (0, 1)):
            sides = [
                [*(text if t else []), *([image] if i else [])]
                for (text, image), t, i in zip((posts[post], entities[entity]), with_text, with_image, strict=True)
            ]
            for order in ((0, 1), (1, 0)):
                rows.append((form, post, entity, [sides[k] for k in order], order))
    length = 3 + max(len(a) + len(b) for *_, (a, b), _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, types, positions = torch.zeros_like(ids), torch.zeros_like(ids), torch.full((len(rows), 2), -1)
    for r, (*_, pair, order) in enumerate(rows):
        tokens, segments = direct_pfmel.sequence(*pair)
        mask[r, : len(tokens)] = 1
        types[r, : len(tokens)] = torch.tensor(segments)
        for k, token in enumerate(tokens):
            if isinstance(token, np.ndarray):
                positions[r, order[segments[k]]] = k
            else:
                ids[r, k] = {"[CLS]": CLS, "[SEP]": SEP}.get(token, token)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "image_positions": positions,
        "form_ids": torch.tensor([row[0] for row in rows]),
        "post_index": torch.tensor([row[1] for row in rows]),
        "entity_index": torch.tensor([row[2] for row in rows]),
        "post_image_features": torch.from_numpy(np.stack([image for _, image in posts])),
        "entity_image_features": torch.from_numpy(np.stack([image for _, image in entities])),
    }
    return batch, [row[3] for row in rows], torch.tensor([int(row[1] != row[2]) for row in rows])


def test_the_pretraining_loss_is_the_sum_of_the_three_tasks():
    model = build(PfmelForPreTraining)
    batch, sequences, labels = pretraining_batch()
    with torch.no_grad():
        out = model(**batch, labels=labels)
    by_form = {form: [] for form in range(4)}
    for r, (first, second) in enumerate(sequences):
        first, second = (
            [t.astype(np.float64) if isinstance(t, np.ndarray) else t for t in side] for side in (first, second)
        )
        logits = direct_pfmel.logits(model, first, second, {"[CLS]": CLS, "[SEP]": SEP})
        np.testing.assert_allclose(out.logits[r].numpy(), logits, atol=2e-4)
        by_form[int(batch["form_ids"][r])].append(direct_pfmel.cross_entropy(logits, int(labels[r])))
    mean = {form: np.mean(losses) for form, losses in by_form.items()}
    expected = {"mixed": mean[0] + mean[1], "text": mean[2], "multimodal": mean[3]}
    assert {k: v.item() for k, v in out.task_losses.items()} == pytest.approx(expected, rel=1e-4)
    assert out.loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_a_batch_without_examples_has_no_loss():
    model = build(PfmelForPreTraining)
    batch, _, labels = pretraining_batch()
    batch = {k: v if k.endswith("features") else v[:0] for k, v in batch.items()}
    out = model(**batch, labels=labels[:0])
    out.loss.backward()
    assert out.loss.item() == 0


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForNextSentencePrediction])
def test_a_bert_checkpoint_provides_the_head(tmp_path, kind):
    torch.manual_seed(1)
    bert = kind(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})).eval()
    bert.save_pretrained(tmp_path)
    model = PfmelModel.from_backbones(text=str(tmp_path)).eval()
    assert torch.equal(model.nsp_head.weight, bert.cls.seq_relationship.weight)
    assert torch.equal(model.nsp_head.bias, bert.cls.seq_relationship.bias)
    assert "nsp_head" in model.backbone_names
    assert str(tmp_path) not in model.config.to_json_string()
    pairs = [((text, None), [(other, None) for other, _ in cs]) for (text, _), cs in sentences()]
    batch = tensors(pairs)
    with torch.no_grad():
        scores = model(**{k: v for k, v in batch.items() if "image" not in k}).scores
        output = bert(batch["pair_input_ids"][0], batch["pair_attention_mask"][0], batch["pair_token_type_ids"][0])
    logits = output["logits"] if "logits" in output else output["seq_relationship_logits"]
    # In BERT the first logit is that of "is next".
    torch.testing.assert_close(scores[0], logits[:, 0] - logits[:, 1], atol=1e-5, rtol=1e-5)


def test_a_bert_without_a_head_gets_an_initialised_one(tmp_path):
    torch.manual_seed(1)
    bert = BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    bert.save_pretrained(tmp_path)
    model = PfmelModel.from_backbones(text=str(tmp_path), text_pooling="pooler")
    for key, value in bert.state_dict().items():
        assert torch.equal(model.text_model.state_dict()[key], value), key
    assert model.nsp_head.bias.abs().max() == 0
    assert 0.01 < model.nsp_head.weight.std() < 0.03
    assert "nsp_head" not in model.backbone_names  # so it has the learning rate of new parts
    assert "nsp_head" in PfmelModel.backbone_names


@pytest.mark.parametrize("trained", [False, True])
def test_a_pooler_that_was_never_trained_is_not_read(tmp_path, trained):
    torch.manual_seed(1)
    bert = BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})).eval()
    if trained:
        bert.pooler.dense.bias.data.normal_()
    bert.save_pretrained(tmp_path)
    model = PfmelModel.from_backbones(text=str(tmp_path)).eval()
    asked = PfmelModel.from_backbones(text=str(tmp_path), text_pooling="pooler").eval()
    assert (model.config.text_pooling, asked.config.text_pooling) == ("pooler" if trained else "mean", "pooler")
    pairs = [((text, None), [(other, None) for other, _ in cs]) for (text, _), cs in sentences()]
    batch = {k: v for k, v in tensors(pairs).items() if "image" not in k}
    place = (0, 0)
    ids, mask, segments = (batch[f"pair_{k}"][place] for k in ("input_ids", "attention_mask", "token_type_ids"))
    length = int(mask.sum())  # the sequence alone, without padding
    for each in (model, asked):
        with torch.no_grad():
            output = bert(ids[None, :length], mask[None, :length], segments[None, :length])
            reads_mean = each.config.text_pooling == "mean"
            state = output.last_hidden_state[0].mean(0) if reads_mean else output.pooler_output[0]
            logits = each.nsp_head(state)
            scores = each(**batch).scores
        torch.testing.assert_close(scores[place], logits[0] - logits[1], atol=1e-5, rtol=1e-5)


def test_a_missing_pooler_is_an_untrained_one(tmp_path):
    bert = BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}), add_pooling_layer=False)
    bert.save_pretrained(tmp_path / "bert")
    model = PfmelModel.from_backbones(text=str(tmp_path / "bert"))
    assert model.config.text_pooling == "mean"
    model.save_pretrained(tmp_path / "model")
    loaded, info = PfmelModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert loaded.config.text_pooling == "mean"
    assert not any(info.values())


def test_backbones_of_text_and_vision(tmp_path):
    bert = BertForNextSentencePrediction(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    bert.save_pretrained(tmp_path / "bert")
    resnet = AutoModel.from_config(VISIONS["resnet"][0])
    resnet.save_pretrained(tmp_path / "resnet")
    tower = {"hidden_size": 20, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=tower, vision_config=tower | {"image_size": 16, "patch_size": 8}))
    clip.save_pretrained(tmp_path / "clip")
    model = PfmelModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "resnet"))
    for key, value in resnet.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[key], value), key
    model = PfmelModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "clip")).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = clip.eval().vision_model(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model.encode_images(pixels), expected)
    fresh = PfmelModel.from_backbones(text=str(tmp_path / "bert"), vision_config=dict(RESNET), train_vision=True)
    assert fresh.image_projection.in_features == 12
    blank = PfmelModel.from_backbones(vision=str(tmp_path / "resnet"), text_config=bert.config.to_dict())
    assert all(torch.equal(value, blank.vision_model.state_dict()[key]) for key, value in resnet.state_dict().items())
    with pytest.raises(ValueError, match="next sentence prediction"):
        PfmelModel.from_backbones(text=str(tmp_path / "resnet"))


@pytest.mark.parametrize("vision", [True, False])
def test_save_and_load(tmp_path, vision):
    model = build(vision=vision)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, PfmelModel)
    assert isinstance(loaded, Reranker)
    assert (loaded.example_unit, loaded.pairs_are_independent) == ("mention", True)
    assert not hasattr(loaded, "rank_jointly")
    assert not any(info.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    if vision:
        assert not any(p.requires_grad for p in loaded.vision_model.parameters())


def test_a_pretrained_model_loads_as_a_reranker(tmp_path):
    model = build(PfmelForPreTraining)
    model.save_pretrained(tmp_path)
    linking, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(linking, PfmelModel)
    assert not any(info.values())
    again, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, PfmelForPreTraining)
    assert not any(info.values())
    assert torch.equal(linking.nsp_head.weight, model.nsp_head.weight)


ROWS = """
[
    (
        {"mention": "Ana", "text": "Ana wins again.", "start": 0, "end": 3, "image": picture, "context_id": "c"},
        [
            {"name": "Ana Lima", "description": "runner", "attributes": "Sex: female.", "images": [picture, other]},
            {"name": "Porto", "description": "river", "attributes": "", "images": []},
        ],
    ),
]
"""


def test_remote_code_loads_without_the_package(tmp_path):
    """Model and processor of a repository score plain rows without hf_mel installed."""
    processor = PfmelProcessor.from_parts(make_tokenizer(), {"size": {"height": 16, "width": 16}}, max_length=30)
    model = build(text_config=dict(BERT, vocab_size=len(WORDS)))
    save_model_repository(model, processor, tmp_path)
    pictures = {"picture": Image.new("RGB", (9, 7), (200, 30, 30)), "other": Image.new("RGB", (5, 5), (2, 3, 230))}
    with torch.no_grad():
        torch.save(model(**processor(pairs=eval(ROWS, pictures))).scores, tmp_path / "scores.pt")
    program = f"""
import sys
sys.modules["hf_mel"] = None  # makes every import of it fail
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
picture, other = Image.new("RGB", (9, 7), (200, 30, 30)), Image.new("RGB", (5, 5), (2, 3, 230))
with torch.no_grad():
    scores = model(**processor(pairs={ROWS.strip()})).scores
torch.testing.assert_close(scores, torch.load({str(tmp_path / "scores.pt")!r}), atol=1e-5, rtol=1e-5)
for part in (model, processor):
    assert type(part).__module__.startswith("transformers_modules"), type(part)
print("loaded")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.strip() == "loaded", run.stderr


def test_scores_under_autocast_are_close_and_float32():
    model, batch = build(), tensors(sentences())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, labels=torch.tensor([0, 0, 0]))
    assert out.scores.dtype == out.loss.dtype == torch.float32
    with torch.no_grad():
        exact = model(**batch).scores
    real = batch["pair_mask"]
    torch.testing.assert_close(out.scores[real], exact[real], atol=0.3, rtol=0.1)


def test_the_default_configuration_is_that_of_the_paper():
    config = PfmelConfig()
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (768, 12)
    assert (config.vision_config.hidden_sizes[-1], list(config.vision_config.depths)) == (2048, [3, 4, 6, 3])
    with torch.device("meta"):
        projection = PfmelModel(config).image_projection
    assert tuple(projection.weight.shape) == (768, 2048)  # "W is a 2048 × 768 matrix"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vision_config": dict(RESNET)}, ["text_config"]),
        ({"text_config": dict(BERT, type_vocab_size=1)}, ["segments"]),
        ({"text_config": {"model_type": "distilbert"}}, ["segments", "'distilbert'"]),
        ({"text_config": dict(BERT), "train_vision": True}, ["vision_config"]),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        PfmelConfig(**fields)
    assert all(word in str(error.value) for word in words)


def test_a_sequence_longer_than_the_text_encoder_is_refused():
    model = build()
    with pytest.raises(ValueError, match="max_length=38"):
        model(**tensors([((list(range(4, 30)), None), [(list(range(4, 30)), None)])]))


def test_a_text_model_refuses_images():
    with pytest.raises(ValueError, match="no image encoder"):
        build(vision=False).encode_images(torch.zeros(1, 3, 16, 16))
