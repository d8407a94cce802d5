"""Tests of the bi-encoder: vectors, scores and losses against plain computations, and what every retriever must do."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, CLIPConfig, CLIPModel, ViltConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.hub.saving import save_model_repository
from hf_mel.inference.quantisation import dequantised, layout_of, quantised
from hf_mel.modeling.bi_encoder import BiEncoderConfig, BiEncoderModel, BiEncoderProcessor, modeling_bi_encoder
from hf_mel.modeling.bi_encoder.modeling_bi_encoder import cell_boxes
from hf_mel.protocols import IndexVectors, MelProcessor, Retriever, entity_token_masks, leaves_out_missing_images
from hf_mel.training.tokenizer import texts_of, train_wordpiece
from tests.modeling import direct_bi_encoder as direct
from tests.toy import toy_entities, toy_mentions

BERT = {
    "model_type": "bert",
    "vocab_size": 200,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 20,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CNN = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [12], "depths": [1], "layer_type": "basic"}
VILT = {**BERT, "model_type": "vilt", "image_size": 16, "patch_size": 8, "max_position_embeddings": 64}
LXMERT = {
    "model_type": "lxmert",
    "vocab_size": 200,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "l_layers": 1,
    "x_layers": 1,
    "r_layers": 1,
    "visual_feat_dim": 12,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BRIDGE = {
    "model_type": "bridgetower",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "text_config": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 200,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 2, "patch_size": 8, "image_size": 16},
}
STREAM = {"vision_config": VIT, "num_fusion_layers": 2, "fusion_heads": 2, "fusion_dropout": 0.0}
#: Name → fields of the configuration; `text_config` is BERT unless there is a joint encoder.
VARIANTS = {
    "first state": {},
    "mean": {"pooling": "mean", "temperature": 0.1},
    "pooler": {"pooling": "pooler", "projection_dim": 8},
    "mention": {"pooling": "mention"},
    "two encoders, inner product": {"shared": False, "similarity": "dot", "temperature": 1},
    "late": {"vision_config": VIT},
    "late, feature map": {"vision_config": CNN, "similarity": "dot"},
    "late, cross-modal": {"vision_config": VIT, "cross_modal": True, "projection_dim": 8, "learn_temperature": True},
    "late, absent images": {"vision_config": VIT, "missing_images": "absent", "projection_dim": 8},
    "images alone": {"vision_config": VIT, "text_config": None, "missing_images": "absent"},
    "one stream": {**STREAM, "fusion": "text_stream", "projection_dim": 8},
    "one stream, absent images": {**STREAM, "fusion": "text_stream", "missing_images": "absent", "pooling": "mean"},
    "two streams": {**STREAM, "fusion": "two_streams", "fusion_size": 16},
    "two streams, absent images": {**STREAM, "fusion": "two_streams", "fusion_size": 16, "missing_images": "absent"},
    "vilt": {"joint_config": VILT, "pooling": "pooler"},
    "lxmert": {"joint_config": LXMERT, "vision_config": CNN, "pooling": "mention"},
    "bridgetower": {"joint_config": BRIDGE, "pooling": "pooler"},
    "maxsim": {"interaction": "maxsim", "projection_dim": 8, "temperature": 1},
}


def build(seed: int = 0, **fields) -> BiEncoderModel:
    torch.manual_seed(seed)
    text = {} if "joint_config" in fields else {"text_config": dict(BERT)}
    model = BiEncoderModel(BiEncoderConfig(**(text | fields))).eval()
    with torch.no_grad():  # the initial ones and zeros would hide a weight that is not applied
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(texts_of(toy_mentions(), toy_entities()), 200)


def processor_of(model: BiEncoderModel, tokenizer, **options) -> BiEncoderProcessor:
    config = model.config
    sees = config.vision_config is not None or config.joint_config is not None
    reads = config.text_config is not None or config.joint_config is not None
    options = {"max_length": 32, "use_text": reads, "mention_tokens": config.pooling == "mention"} | options
    vision = {"size": {"height": 16, "width": 16}} if sees else None
    return BiEncoderProcessor.from_parts(tokenizer, vision, **options)


def rows(count: int = 5) -> tuple[list[dict], list[dict]]:
    """Rows of different lengths, so that a batch has padding."""
    mentions, entities = [dict(row) for row in toy_mentions(count)], [dict(row) for row in toy_entities(count + 1)]
    mentions[1]["text"] += " Here."
    entities[0]["attributes"] *= 3
    return mentions, entities


def batch_of(model, tokenizer, count: int = 5, **options) -> dict[str, torch.Tensor]:
    mentions, entities = rows(count)
    return dict(processor_of(model, tokenizer, **options)(mentions=mentions, entities=entities))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_scores_and_loss_equal_a_plain_computation(fields, tokenizer):
    model = build(**fields).double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch_of(model, tokenizer).items()}
    labels = torch.tensor([3, 0, 1, 1, 4])
    with torch.no_grad():
        output = model(**batch, labels=labels)
    expected = direct.scores(model, batch)
    assert set(output.unit_scores) == (set(expected["units"]) if len(expected["units"]) > 1 else set())
    for name, scores in output.unit_scores.items():
        np.testing.assert_allclose(scores.numpy(), expected["units"][name], atol=1e-6)
    np.testing.assert_allclose(output.scores.numpy(), expected["scores"], atol=1e-6)
    config = model.config
    temperature = model.temperature().item() if config.learn_temperature else config.temperature
    np.testing.assert_allclose(
        output.loss.item(), direct.loss(expected["scores"], labels.tolist(), temperature), atol=1e-6
    )


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_a_retriever(fields, tokenizer):
    model = build(**fields)
    processor = processor_of(model, tokenizer)
    assert isinstance(model, Retriever)
    assert isinstance(model, IndexVectors)
    assert isinstance(processor, MelProcessor)
    mentions, entities = rows()
    with torch.no_grad():
        encoded = (
            model.encode_mentions(**processor(mentions=mentions)),
            model.encode_entities(**processor(entities=entities)),
        )
        scores = model.score(*encoded)
        if model.config.interaction == "pooled":
            vectors = model.query_vectors(encoded[0]) @ model.index_vectors(encoded[1]).T
            torch.testing.assert_close(vectors, scores)
        alone = [model.encode_mentions(**processor(mentions=[row])) for row in mentions]
        entities_alone = [model.encode_entities(**processor(entities=[row])) for row in entities]
        one_by_one = [[model.score(mention, entity).item() for entity in entities_alone] for mention in alone]
    torch.testing.assert_close(torch.tensor(one_by_one), scores, atol=1e-5, rtol=1e-5)
    half = [{k: v.half() if v.is_floating_point() else v for k, v in side.items()} for side in encoded]
    torch.testing.assert_close(model.score(*half), scores, atol=2e-2, rtol=1e-2)


SAVED = ["mention", "two encoders, inner product", "late, cross-modal", "late, absent images", "lxmert"]


@pytest.mark.parametrize("variant", SAVED)
def test_a_saved_model_gives_the_same_scores(variant, tokenizer, tmp_path):
    model = build(**VARIANTS[variant])
    processor = processor_of(model, tokenizer)
    save_model_repository(model, processor, tmp_path)
    again, reader = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is BiEncoderModel
    mentions, entities = rows()
    batch = processor(mentions=mentions, entities=entities)
    for name, tensor in reader(mentions=mentions, entities=entities).items():
        torch.testing.assert_close(tensor, batch[name])
    labels = torch.tensor([3, 0, 1, 1, 4])
    with torch.no_grad():
        expected, output = model(**batch, labels=labels), again(**batch, labels=labels)
    torch.testing.assert_close(output.scores, expected.scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_a_step_lowers_the_loss_and_reaches_every_parameter(fields, tokenizer):
    model = build(**fields).train()
    batch = batch_of(model, tokenizer) | {"labels": torch.tensor([3, 0, 1, 1, 4])}
    before = model(**batch).loss
    before.backward()
    # Of LXMERT's last cross layer, only the text is read; the cells of BridgeTower's ViT have a class token that is not.
    unread = {name for name, p in model.named_parameters() if p.grad is None}
    assert not {name for name in unread if "joint_model" not in name}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / (1e-12 + parameter.grad.norm())
        assert model(**batch).loss < before


@pytest.mark.parametrize("name", VARIANTS)
def test_no_score_is_above_its_bound(name, tokenizer):
    model = build(**VARIANTS[name])
    batch = batch_of(model, tokenizer)
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")})
        scores = model.score(mentions, entities)
        vectors, weights, constants = model.bound_queries(mentions)
        coordinates, extras = model.bound_vectors(entities)
        bounds = vectors @ coordinates.T + weights @ extras.T + constants[:, None]
    assert (scores <= bounds + 1e-5 * bounds.abs().max()).all()
    if model.config.interaction != "maxsim":
        torch.testing.assert_close(scores, bounds)
    else:
        assert (bounds <= vectors.norm(dim=1, keepdim=True) + 2 * weights).all()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    limits=st.tuples(st.sampled_from([1, 50, 2**20]), st.sampled_from([1, 60, 2**19])),
    lengths=st.tuples(st.lists(st.integers(0, 4), max_size=3), st.lists(st.integers(1, 5), max_size=9)),
    seed=st.integers(0, 99),
)
def test_maxsim_in_blocks_of_stored_vectors_equals_a_loop_over_pairs(dtype, limits, lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(len(of_side), 6, generator=generator) for of_side in lengths]  # tokens may be anywhere
    masks = [
        mask.argsort(1).argsort(1) < torch.tensor(of_side, dtype=torch.long)[:, None]
        for mask, of_side in zip(masks, lengths, strict=True)
    ]
    mentions, entities = (torch.randn(*mask.shape, 3, generator=generator) for mask in masks)
    stored = entities.to(dtype)
    of_mentions, of_entities = (
        [row[kept].double() for row, kept in zip(tokens, mask, strict=True)]
        for tokens, mask in zip((mentions, stored), masks, strict=True)
    )
    expected = [
        [sum(max(float(t @ e) for e in entity) for t in mention) for entity in of_entities] for mention in of_mentions
    ]
    before = stored.clone()
    with mock.patch.multiple(modeling_bi_encoder, _BLOCK_SIMILARITIES=limits[0], _BLOCK_VALUES=limits[1]):
        scores = modeling_bi_encoder.max_similarities(mentions, masks[0], stored, masks[1])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected).view(len(mentions), len(stored)).float())
    assert torch.equal(stored, before)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 32), min_size=6, max_size=6))
def test_no_score_of_maxsim_reads_the_padding_that_few_bits_leave_out(tokenizer, lengths):
    model = build(**VARIANTS["maxsim"])
    batch = batch_of(model, tokenizer)
    with torch.no_grad():
        mentions = model.encode_mentions(**{k: v for k, v in batch.items() if k.startswith("mention")})
        entities = dict(model.encode_entities(**{k: v for k, v in batch.items() if k.startswith("entity")}))
        entities["token_mask"] = torch.arange(entities["tokens"].shape[1]) < torch.tensor(lengths)[:, None]
        scores = []
        for masks in ({}, entity_token_masks(model)):
            layout = layout_of(entities, "int4", masks)
            restored = dequantised(quantised(entities, layout), layout)
            bounds = model.bound_vectors(restored)
            scores.append((model.score(mentions, restored), model.index_vectors(restored), *bounds))
    assert len(quantised(entities, layout)["tokens"]) == sum(min(n, entities["tokens"].shape[1]) for n in lengths)
    for padded, packed in zip(*scores, strict=True):
        assert torch.equal(padded, packed)
    assert entity_token_masks(build()) == {}


def test_training_equals_a_plain_training_loop(tokenizer):
    """The loss of `benchmarks.plain_bi_encoder`: mean pooling, cosines, in-batch softmax, equal golds masked."""
    model = build(pooling="mean", temperature=0.05).train()
    torch.manual_seed(1)
    encoder = BertModel(BertConfig(**BERT), add_pooling_layer=False).train()
    encoder.load_state_dict(model.text_model.state_dict())
    mentions, entities = list(toy_mentions(24)), list(toy_entities())
    templates = {"mention_template": "{mention} | {text}", "entity_template": "{name} | {attributes}"}
    processor = processor_of(model, tokenizer, **templates, max_length=20)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, encoder))

    def embed(texts):
        tokens = tokenizer(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(-1)
        states = encoder(**tokens).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    for first in (0, 8, 16):
        batch = mentions[first : first + 8]
        golds = [row["entity_id"] for row in batch]
        columns = sorted(set(golds))
        by_id = {row["entity_id"]: row for row in entities}
        loss = model(
            **processor(mentions=batch, entities=[by_id[gold] for gold in columns]),
            labels=torch.tensor([columns.index(gold) for gold in golds]),
        ).loss
        ours.zero_grad()
        loss.backward()
        ours.step()
        left = embed([f"{row['mention']} | {row['text']}" for row in batch])
        right = embed([f"{by_id[gold]['name']} | {by_id[gold]['attributes']}" for gold in golds])
        same = torch.tensor([[a == b for b in golds] for a in golds]) & ~torch.eye(8, dtype=torch.bool)
        plain = torch.nn.functional.cross_entropy(
            (left @ right.T / 0.05).masked_fill(same, -torch.inf), torch.arange(8)
        )
        theirs.zero_grad()
        plain.backward()
        theirs.step()
        torch.testing.assert_close(loss, plain, atol=1e-4, rtol=1e-4)


def test_the_vectors_of_clip_are_those_of_its_own_projections(tokenizer, tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 200, "max_position_embeddings": 32, "eos_token_id": tokenizer.sep_token_id}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = BiEncoderModel.from_backbones(
        text=str(tmp_path), cross_modal=True, learn_temperature=True, temperature=0.07
    ).eval()
    processor = BiEncoderProcessor.from_backbones(text=str(tmp_path), max_length=32)
    assert model.config.pooling == "pooler"
    names = ("text_model", "vision_model", "text_projection", "visual_projection")
    assert set(model.backbone_names) == {f"encoder.{name}" for name in names}
    batch = processor(mentions=rows()[0])
    with torch.no_grad():
        encoded = model.encode_mentions(**batch)
        text = clip.get_text_features(batch["mention_input_ids"], batch["mention_attention_mask"]).pooler_output
        image = clip.get_image_features(batch["mention_pixel_values"]).pooler_output
    torch.testing.assert_close(encoded.text, text / text.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(encoded.vision, image / image.norm(dim=-1, keepdim=True))
    assert model.temperature().item() == pytest.approx(0.07)


def test_pretrained_encoders_of_both_sides_and_the_first_layers_alone(tokenizer, tmp_path):
    bert = BertModel(BertConfig(**{**BERT, "num_hidden_layers": 2}))
    bert.save_pretrained(tmp_path / "bert")
    AutoModel.from_config(ViltConfig(**VILT)).save_pretrained(tmp_path / "vilt")
    model = BiEncoderModel.from_backbones(
        text=str(tmp_path / "bert"), shared=False, text_config={"num_hidden_layers": 1}
    )
    assert model.backbone_names == ("encoder.text_model", "entity_encoder.text_model")
    for side in (model.encoder, model.entity_encoder):
        weights = side.text_model.state_dict()
        assert not any("layer.1." in name for name in weights)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, bert.state_dict()[name])
    joint = BiEncoderModel.from_backbones(text=str(tmp_path / "vilt"), pooling="pooler")
    assert joint.config.joint_config.model_type == "vilt"
    saved = AutoModel.from_pretrained(tmp_path / "vilt").state_dict()
    for name, weight in joint.encoder.joint_model.state_dict().items():
        torch.testing.assert_close(weight, saved[name])


@pytest.mark.parametrize("variant", ["late, absent images", "one stream, absent images", "two streams, absent images"])
def test_an_absent_image_changes_nothing(variant, tokenizer):
    """The picture that stands for a missing image has no share in the scores."""
    model = build(**VARIANTS[variant])
    assert leaves_out_missing_images(model)
    assert not leaves_out_missing_images(build(**VARIANTS["late"]))
    batch = batch_of(model, tokenizer)
    assert not batch["mention_image_mask"].all()
    assert not batch["entity_image_mask"].all()
    with torch.no_grad():
        scores = model(**batch).scores
        for side in ("mention", "entity"):
            batch[f"{side}_pixel_values"][~batch[f"{side}_image_mask"]] = 1.0
        torch.testing.assert_close(model(**batch).scores, scores)
        batch["mention_pixel_values"] += 1
        assert not torch.allclose(model(**batch).scores, scores)


def test_a_mention_without_an_image_is_scored_by_its_text(tokenizer):
    model = build(**VARIANTS["late, absent images"])
    batch = batch_of(model, tokenizer)
    with torch.no_grad():
        output = model(**batch)
    without = ~batch["mention_image_mask"]
    assert output.unit_scores["vision"][without].isnan().all()
    torch.testing.assert_close(output.scores[without], output.unit_scores["text"][without])
    both = torch.stack(list(output.unit_scores.values())).mean(0)
    torch.testing.assert_close(output.scores[~without], both[~without])


def test_image_dropout_treats_entities_as_without_image(tokenizer):
    model = build(**VARIANTS["late, absent images"], image_dropout=0.999999).train()
    with torch.no_grad():
        vectors = (
            model(**batch_of(model, tokenizer)),
            model.encode_entities(
                **{k: v for k, v in batch_of(model, tokenizer).items() if k.startswith("entity")}
            ).vision,
        )
    assert torch.allclose(vectors[1], vectors[1][:1])


def test_the_prior_is_added_inside_the_loss_alone(tokenizer):
    model = build()
    batch, labels = batch_of(model, tokenizer), torch.tensor([3, 0, 1, 1, 4])
    prior = torch.linspace(-1, 1, 6)
    with torch.no_grad():
        plain, corrected = model(**batch, labels=labels), model(**batch, labels=labels, entity_log_prior=prior)
    torch.testing.assert_close(plain.scores, corrected.scores)
    expected = direct.loss((corrected.scores + prior * 0.05).numpy(), labels.tolist(), 0.05)
    assert corrected.loss.item() == pytest.approx(expected, abs=1e-5)


def test_boxes_of_cells():
    boxes = cell_boxes(2, 4)
    assert boxes.shape == (8, 4)
    assert boxes[0].tolist() == [0, 0, 0.25, 0.5]
    assert boxes[5].tolist() == [0.25, 0.5, 0.5, 1]


WORDS = ["we", "saw", "the", "red", "fox", "run", "far", "away", "today", "title", "reynard"]


@pytest.fixture(scope="module")
def words():
    """A tokenizer with one token a word, whose vocabulary has markers."""
    return train_wordpiece([" ".join(WORDS)] * 30, 400)


SENTENCE = "We saw the red fox run far away today"


@pytest.mark.parametrize(
    ("row", "length", "expected"),
    [
        ({"start": 7, "end": 18}, 20, "we saw < the red fox > run far away today"),
        ({"start": 0, "end": 2}, 20, "< we > saw the red fox run far away today"),
        ({"start": 32, "end": 37}, 20, "we saw the red fox run far away < today >"),
        ({"start": 15, "end": 18}, 9, "the red < fox > run far"),
        ({"start": 0, "end": 2}, 9, "< we > saw the red fox"),  # the room on the left goes to the right
        ({"start": 32, "end": 37}, 9, "fox run far away < today >"),
        ({"mention": "fox"}, 9, "the red < fox > run far"),  # no span: where it occurs
        ({"mention": "Reynard"}, 20, "< reynard > we saw the red fox run far away today"),
        ({"mention": ""}, 20, "we saw the red fox run far away today"),
    ],
)
def test_the_mention_is_marked_in_a_balanced_window(row, length, expected, words):
    processor = BiEncoderProcessor.from_parts(
        words, max_length=length, mention_template="{window}", markers=["<", ">"], mention_tokens=True
    )
    row = {"mention": SENTENCE[row.get("start", 0) : row.get("end", 0)], "text": SENTENCE, **row}
    batch = processor(mentions=[row])
    tokens = words.convert_ids_to_tokens(batch["mention_input_ids"][0][batch["mention_attention_mask"][0].bool()])
    assert " ".join(tokens[1:-1]) == expected
