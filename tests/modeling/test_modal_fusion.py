"""Tests of DZMNED, JMEL and VELML: every step against NumPy loops, properties, losses, configuration and pretrained parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, ViTConfig

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.modal_fusion import ModalFusionConfig, ModalFusionModel, ModalFusionProcessor
from hf_mel.modeling.modal_fusion.modeling_modal_fusion import edit_similarity
from hf_mel.protocols import IndexVectors, Retriever
from hf_mel.training.tokenizer import train_wordpiece
from tests.modeling.plain_layers import linear, lstm, margin_loss, sigmoid, softmax, unit, weights_of
from tests.modeling.test_ghmfc import CNN, one
from tests.modeling.test_mimic import BERT, VIT

SMALL = {"hidden_size": 12, "char_hidden_size": 5, "char_dim": 6, "char_vocab_size": 50, "dropout": 0.0}
GLOVE = {"text_config": None, "vocab_size": 60, "word_dim": 7}
JMEL = {"fusion": "concat", "loss": "triplet", "char_hidden_size": None}
VELML = {"image_regions": "grid", "loss": "softmax", "char_hidden_size": None}
TEXT_ONLY = {"vision_config": None}
VARIANTS = {
    "DZMNED": GLOVE,
    "DZMNED(BERT)": {},
    "DZMNED, text": TEXT_ONLY,
    "JMEL": JMEL,
    "JMEL, text": JMEL | TEXT_ONLY,
    "VELML": VELML | {"vision_config": dict(CNN)},
    "VELML, text": VELML | TEXT_ONLY,
    "text of entities, mean, hardest": {"entity_modalities": ["text"], "text_pooling": "mean", "negatives": "hardest"},
    "CNN": {"vision_config": dict(CNN), "train_words": True, **GLOVE},
}
STRINGS = ["Swift", "Swfit", "", "swift", "Taylor Swift"]


def build(seed=0, **fields) -> ModalFusionModel:
    torch.manual_seed(seed)
    fields = {"text_config": dict(BERT), "vision_config": dict(VIT)} | SMALL | fields
    return ModalFusionModel(ModalFusionConfig(**fields)).eval().double()


def codes_of(strings) -> torch.Tensor:
    codes = torch.full((len(strings), max([1, *map(len, strings)])), -1)
    for k, string in enumerate(strings):
        codes[k, : len(string)] = torch.tensor([ord(c) for c in string], dtype=torch.int64)
    return codes


def batch_for(model, length=9, seed=1) -> dict[str, torch.Tensor]:
    """Returns 4 mentions and 5 entities: texts of different lengths; mention 1 and entity 2 have no image."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for side, count, without in (("mention", 4, 1), ("entity", 5, 2)):
        lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
        batch[f"{side}_input_ids"] = torch.randint(2, 59, (count, length), generator=generator)
        batch[f"{side}_attention_mask"] = (torch.arange(length) < lengths).long()
        batch[f"{side}_char_ids"] = codes_of(STRINGS[:count])
        if model.config.vision_config is not None:
            batch[f"{side}_pixel_values"] = torch.randn(count, 3, 16, 16, generator=generator).double()
            batch[f"{side}_image_mask"] = torch.arange(count) != without
    return batch


# ---- the plain computation of one row


def last_states(x, w, name):
    """D1 and D3."""
    forward, backward = lstm(x, w, f"{name}.lstm"), lstm(x, w, f"{name}.lstm", reverse=True)
    return np.concatenate([forward[-1], backward[0]])


def characters_of(model, string, w):
    codes = [ord(c) % model.config.char_vocab_size for c in string]
    return last_states(w["char_embeddings.weight"][codes], w, "characters") if codes else np.zeros(10)


def plain_side(model, inputs, side, string, w):
    """D1–D4 of one row. Only the encoders are those of the model."""
    config = model.config
    with torch.no_grad():
        if config.text_config is None:
            text = last_states(w["word_embeddings.weight"][inputs["input_ids"][0]], w, "words")
        else:
            states = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[0].numpy()
            text = states.mean(0) if config.text_pooling == "mean" else states[0]
        modalities = {"text": text}
        if config.vision_config is not None and (side == "mention" or "image" in config.entity_modalities):
            modalities["image"] = None
            if inputs["image_mask"][0]:
                output = model.vision_model(inputs["pixel_values"])
                cells = output.last_hidden_state[0]
                cells = (cells.flatten(1).T if cells.dim() == 3 else cells).numpy()
                is_cnn = config.vision_config.model_type == "resnet"
                image = cells.mean(0) if is_cnn else cells[0]
                if config.image_regions == "grid":
                    guide = linear(text, w, "regions.text")
                    logits = [
                        linear(np.tanh(linear(c, w, "regions.cells") + guide), w, "regions.weight")[0] for c in cells
                    ]
                    image = softmax(np.array(logits)) @ cells
                modalities["image"] = image
    if config.char_hidden_size is not None and side == "mention":
        modalities["characters"] = characters_of(model, string, w)
    name = f"{side}_fusion"
    mapped = {
        key: np.zeros(12) if vector is None else linear(vector, w, f"{name}.maps.{key}")
        for key, vector in modalities.items()
    }
    joined = np.concatenate(list(mapped.values()))
    if config.fusion == "concat":
        return np.tanh(linear(joined, w, f"{name}.joint"))
    if len(mapped) == 1:
        return mapped["text"]
    powers = np.exp(sigmoid(linear(joined, w, f"{name}.attention")))
    powers = powers * np.array([vector is not None for vector in modalities.values()])
    return sum(share * vector for share, vector in zip(powers / powers.sum(), mapped.values(), strict=True))


def plain_scores(model, batch):
    """Scores of every unit, pair by pair (D5 and D6)."""
    w = weights_of(model)
    has_characters = model.config.char_hidden_size is not None
    mentions = [plain_side(model, one(batch, "mention", k), "mention", STRINGS[k], w) for k in range(4)]
    entities = [unit(plain_side(model, one(batch, "entity", k), "entity", STRINGS[k], w)) for k in range(5)]
    queries = [unit(linear(m, w, "label_map") if has_characters else m) for m in mentions]
    scores = {"label": np.array([[m @ e for e in entities] for m in queries])}
    vectors = {"label": entities}
    if has_characters:
        names = [characters_of(model, string, w) for string in STRINGS]
        vectors["lexical"] = [unit(name) if name.any() else name for name in names]
        queries = [unit(linear(m, w, "lexical_map")) for m in mentions]
        scores["lexical"] = np.array([[m @ e for e in vectors["lexical"]] for m in queries])
    return scores, vectors


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_scores_and_losses_equal_the_plain_computation(fields):
    model = build(**fields)
    batch, labels = batch_for(model), [0, 3, 3, 4]
    assert isinstance(model, Retriever)
    assert isinstance(model, IndexVectors)
    with torch.no_grad():
        out = model(**batch, labels=torch.tensor(labels))
    expected, vectors = plain_scores(model, batch)
    np.testing.assert_allclose(out.scores.numpy(), np.mean(list(expected.values()), 0), atol=1e-9)
    assert set(out.unit_scores) == (set(expected) if len(expected) > 1 else set())
    for name, scores in out.unit_scores.items():
        np.testing.assert_allclose(scores.numpy(), expected[name], atol=1e-9)
    total = 0
    for name, scores in expected.items():
        if model.config.loss == "softmax":
            rows = [np.exp(row / 0.05) for row in scores]
            loss = np.mean([-np.log(row[gold] / row.sum()) for row, gold in zip(rows, labels, strict=True)])
        else:
            margin = 0.2
            if model.config.loss == "adaptive_hinge":
                margin = lambda wrong, right, name=name: vectors[name][wrong] @ vectors[name][right]  # noqa: E731
            loss = margin_loss(scores, labels, margin, model.config.negatives)
        assert out.losses[name].item() == pytest.approx(loss, rel=1e-8)
        total += loss
    if "lexical" in expected:
        w = weights_of(model)
        squares = []
        for a in STRINGS[:4]:
            for b in STRINGS:
                va, vb = characters_of(model, a, w), characters_of(model, b, w)
                cos = unit(va) @ unit(vb) if va.any() and vb.any() else 0
                squares.append(((cos + 1) / 2 - plain_edit_similarity(a, b)) ** 2)
        assert out.losses["edit"].item() == pytest.approx(np.mean(squares), rel=1e-8)
        total += np.mean(squares)
    assert out.loss.item() == pytest.approx(total, rel=1e-8)


def plain_edit_similarity(a, b):
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(changed, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return 1 - table[-1][-1] / max(len(a), len(b), 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc", max_size=7), min_size=1, max_size=4),
    st.lists(st.text("abc", max_size=7), min_size=1, max_size=4),
)
def test_the_edit_similarity_equals_the_table_of_distances(first, second):
    values = edit_similarity(codes_of(first), codes_of(second))
    assert values.tolist() == [[pytest.approx(plain_edit_similarity(a, b)) for b in second] for a in first]


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_padding_batch_partners_and_pixels_of_missing_images_do_not_matter(fields):
    model = build(**fields)
    batch = batch_for(model)
    with torch.no_grad():
        scores = model(**batch).scores
        longer = {
            k: torch.nn.functional.pad(v, (0, 4), value=-1 if "char" in k else 0) if v.dim() == 2 else v
            for k, v in batch.items()
        }
        longer["mention_input_ids"][:, -4:] = 7
        for k in ("mention_pixel_values", "entity_pixel_values"):
            if k in longer:
                longer[k] = longer[k].clone()
                longer[k][~longer[k.replace("pixel_values", "image_mask")]] = 9.0
        torch.testing.assert_close(model(**longer).scores, scores)
        sides = {side: {k: v for k, v in batch.items() if k.startswith(side)} for side in ("mention", "entity")}
        alone = [model.encode_mentions(**{k: v[i : i + 1] for k, v in sides["mention"].items()}) for i in range(4)]
        entities = model.encode_entities(**sides["entity"])
        torch.testing.assert_close(torch.cat([model.score(mention, entities) for mention in alone]), scores)
        queries = torch.cat([model.query_vectors(mention) for mention in alone])
        torch.testing.assert_close(queries @ model.index_vectors(entities).T, scores)


def test_the_attention_sums_to_1_and_a_single_modality_has_all_of_it():
    fusion = build().mention_fusion
    mapped = torch.randn(3, 3, 12).double()
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    weights = fusion.weights(mapped, present)
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    assert weights[1, 1] == 0
    assert weights[2].tolist() == [0, 1, 0]


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_trained_parameter_has_a_gradient(fields):
    model = build(**fields, freeze_vision=False).train()
    out = model(**batch_for(model), labels=torch.tensor([0, 1, 2, 0]))
    out.loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    if model.config.text_config is None:
        assert model.word_embeddings.weight.requires_grad == model.config.train_words
    assert not any(p.requires_grad for p in build().train().vision_model.parameters())


@pytest.mark.parametrize("fields", [VELML, JMEL, {"char_hidden_size": 5}], ids=["VELML", "JMEL", "DZMNED"])
def test_with_an_aligned_start_equal_texts_have_equal_vectors(fields):
    texts = {"input_ids": torch.randint(2, 59, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.int64)}
    batch = {f"{side}_{name}": tensor for side in ("mention", "entity") for name, tensor in texts.items()}
    for aligned in (True, False):
        torch.manual_seed(0)
        config = ModalFusionConfig(
            text_config=dict(BERT), **SMALL | {"hidden_size": 24, "aligned_start": aligned} | fields
        )
        model = ModalFusionModel(config).eval()
        chars = codes_of(STRINGS[:4])
        with torch.no_grad():
            mentions = model.encode_mentions(
                **{k: v for k, v in batch.items() if k.startswith("m")}, mention_char_ids=chars
            )
            entities = model.encode_entities(
                **{k: v for k, v in batch.items() if k.startswith("e")}, entity_char_ids=chars
            )
            cosines = (mentions.label @ entities.label.T).diagonal()
            if fields == VELML and aligned:  # one projection, which keeps angles
                states = model.text_model(**texts).last_hidden_state[:, 0]
                unit_states = torch.nn.functional.normalize(states, dim=-1)
                torch.testing.assert_close(mentions.label @ entities.label.T, unit_states @ unit_states.T)
        if fields != {"char_hidden_size": 5} or not aligned:  # the characters join DZMNED's mentions
            assert (cosines > 0.999).all() == aligned
        else:
            assert (cosines > 0.3).all()


def test_linking_does_not_change_the_characters_if_the_edit_loss_does():
    for weight, learns in ((1, False), (0, True)):
        model = build(edit_loss_weight=weight)
        losses = model(**batch_for(model), labels=torch.tensor([0, 1, 2, 0])).losses
        (losses["label"] + losses["lexical"]).backward()
        assert (model.char_embeddings.weight.grad is not None) == learns
        assert ("edit" in losses) == (not learns)


def test_a_text_without_words_and_no_images_have_finite_scores():
    for fields in (GLOVE, JMEL):
        model = build(**fields)
        batch = batch_for(model)
        batch["mention_attention_mask"][0] = 0
        batch |= {k: torch.zeros_like(v) for k, v in batch.items() if k.endswith("image_mask")}
        with torch.no_grad():
            assert model(**batch).scores.isfinite().all()


def test_scores_are_float32_under_autocast():
    model = build().float()
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_for(model).items()}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch, labels=torch.tensor([0, 1, 2, 3]))
    assert out.scores.dtype == torch.float32
    torch.testing.assert_close(out.scores, model(**batch).scores, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text_config": None}, "either text_config"),
        ({"vocab_size": 5, "word_dim": 3}, "either text_config"),
        ({"text_config": None, "vocab_size": 5}, "both or none"),
        ({"fusion": "sum"}, "fusion='sum' is not one of"),
        ({"entity_modalities": ["image"]}, "entity_modalities"),
        ({"entity_modalities": ["text", "image"], "vision_config": None}, "Give a vision_config"),
        ({"hidden_size": 13}, "odd"),
        ({"char_hidden_size": 0}, "at least 1"),
        ({"temperature": 0}, "must be positive"),
        ({"margin": -1}, "must not be negative"),
        ({"dropout": 1}, "below 1"),
    ],
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        ModalFusionConfig(**({"text_config": dict(BERT), "vision_config": dict(VIT)} | SMALL | fields))


def test_missing_inputs_are_named():
    model = build()
    batch = batch_for(model)
    with pytest.raises(ValueError, match="mention_pixel_values"):
        model(**{k: v for k, v in batch.items() if "pixel" not in k})
    with pytest.raises(ValueError, match="mention_char_ids"):
        model(**{k: v for k, v in batch.items() if "char" not in k})


def test_from_backbones_copies_pretrained_weights_and_word_vectors(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    vit = AutoModel.from_config(ViTConfig(**{k: v for k, v in VIT.items() if k != "model_type"}))
    for name, part in (("bert", bert), ("vit", vit)):
        part.save_pretrained(tmp_path / name)
    both = ModalFusionModel.from_backbones(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit"), **SMALL)
    assert str(tmp_path) not in both.config.to_json_string()
    for copy, original in ((both.text_model, bert), (both.vision_model, vit)):
        for key, value in copy.state_dict().items():
            torch.testing.assert_close(value, original.state_dict()[key], msg=key)
    file = tmp_path / "glove.txt"
    file.write_text("rain 1 0.5\nfell -1 2\n")
    words = ModalFusionModel.from_backbones(text=str(file), **SMALL)
    assert words.word_embeddings.weight.tolist() == [[0, 0], [0, 0], [1, 0.5], [-1, 2]]
    processor = ModalFusionProcessor.from_backbones(text=str(file), mention_template="{window}")
    batch = processor(mentions=[{"mention": "Rain", "text": "Rain fell"}, {"mention": "", "text": ""}])
    assert batch["mention_input_ids"].tolist() == [[1, 2, 1, 3], [0, 0, 0, 0]]
    names = {"input_ids": torch.tensor([[2]]), "attention_mask": torch.tensor([[1]]), "char_ids": codes_of(["rain"])}
    assert words(**batch, **{f"entity_{key}": value for key, value in names.items()}).scores.shape == (2, 1)
    with pytest.raises(ValueError, match="word vectors"):
        ModalFusionModel.from_backbones(vision=str(tmp_path / "vit"))


def test_the_processor_gives_code_points_of_mentions_and_names():
    tokenizer = train_wordpiece(["rain fell in Accra"], 60)
    processor = ModalFusionProcessor.from_parts(tokenizer, max_characters=4)
    batch = processor(
        mentions=[{"mention": "Accra", "text": "in Accra"}, {"mention": "É", "text": ""}], entities=[{"name": "Ab"}]
    )
    assert batch["mention_char_ids"].tolist() == [[97, 99, 99, 114], [233, -1, -1, -1]]
    assert batch["entity_char_ids"].tolist() == [[97, 98]]
    bare = ModalFusionProcessor.from_parts(tokenizer, use_characters=False)
    assert "mention_char_ids" not in bare(mentions=[{"mention": "Accra", "text": "in Accra"}])
