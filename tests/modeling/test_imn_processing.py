"""Tests of IMN's processor: texts, mentions, images, prototypes, and masking for pre-training."""

from __future__ import annotations

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, DetrImageProcessorPil, PreTrainedTokenizerFast

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.inference.features.post_prototypes import PostPrototypes
from hf_mel.modeling.imn import ImnForKnowledgePreTraining, ImnModel, ImnProcessor
from hf_mel.protocols import MelProcessor
from hf_mel.schema import entity_features, post_features
from tests.modeling.test_imn import BERT, DETR, DIMS, ImnConfig

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "taylor", "swift", "sings", "on", "stage", "bird", "flies", "."]
PAD, CLS, SEP, MASK = 0, 2, 3, 4


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = {
        name: f"[{name[:-6].upper()}]" for name in ("unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def processor(tokenizer):
    options = {"max_length": 9, "num_prototypes": 3, "mention_template": "{text}"}
    return ImnProcessor.from_parts(tokenizer, {"size": {"height": 8, "width": 8}}, **options)


def picture(width=12, height=6, colour=(200, 30, 30)):
    return Image.fromarray(np.full((height, width, 3), colour, dtype=np.uint8))


MENTION = {"mention": "taylor swift", "text": "on stage taylor swift sings", "start": 9, "end": 21, "image": None}
POST = {"text": "bird flies", "image": None}


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def test_a_mention_has_the_tokens_of_its_text_and_name(processor):
    batch = processor(mentions=[MENTION, MENTION | {"mention": "", "text": "bird"}])
    assert words(batch["mention_input_ids"][0]) == "[CLS] on stage taylor swift sings [SEP]"
    assert words(batch["mention_input_ids"][1]) == "[CLS] bird [SEP] [PAD] [PAD] [PAD] [PAD]"
    assert batch["mention_attention_mask"].sum(1).tolist() == [7, 3]
    assert words(batch["mention_name_ids"][0]) == "taylor swift"
    assert batch["mention_name_mask"].tolist() == [[1, 1], [0, 0]]
    assert batch["mention_image_mask"].tolist() == [False, False]
    assert "mention_pixel_values" not in batch
    assert isinstance(processor, MelProcessor)


def test_a_template_can_insert_the_mention_into_the_text(tokenizer):
    processor = ImnProcessor.from_parts(tokenizer, mention_template="{mention} [SEP] {text}", max_length=12)
    rows = [MENTION, MENTION | {"mention": None}, MENTION | {"mention": ""}]
    batch = processor(mentions=rows, posts=[POST | {"mention": "swift"}])
    assert words(batch["mention_input_ids"][0]).startswith("[CLS] taylor swift [SEP] on stage")
    assert words(batch["mention_input_ids"][1]).startswith("[CLS] on stage")
    assert words(batch["mention_input_ids"][2]).startswith("[CLS] on stage")
    assert words(batch["post_input_ids"][0]) == "[CLS] bird flies [SEP]"
    assert batch["post_name_mask"].sum() == 0
    assert not any("image" in name or "pixel" in name for name in batch)


def test_long_texts_are_truncated_and_empty_texts_masked(processor):
    batch = processor(mentions=[MENTION | {"text": "bird " * 3000}, MENTION | {"text": " "}, MENTION | {"text": None}])
    assert batch["mention_input_ids"].shape == (3, 9)
    assert words(batch["mention_input_ids"][0]).endswith("bird [SEP]")
    assert batch["mention_attention_mask"].sum(1).tolist() == [9, 0, 0]
    long = processor(mentions=[MENTION | {"mention": "bird " * 50}])
    assert long["mention_name_ids"].shape == (1, 16)


def test_missing_images_are_masked(processor):
    batch = processor(mentions=[MENTION | {"image": picture()}, MENTION], posts=[POST | {"image": picture(5, 30)}])
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    assert batch["mention_pixel_values"].shape == (2, 3, 8, 8)
    np.testing.assert_allclose(
        batch["mention_pixel_values"][0].mean((1, 2)), (np.array([200, 30, 30]) / 255 - mean) / std, atol=1e-5
    )
    assert batch["mention_pixel_values"][1].abs().max() == 0
    assert batch["mention_image_mask"].tolist() == [True, False]
    assert batch["post_image_mask"].tolist() == [True]


def test_a_batch_equals_its_rows_one_by_one(processor):
    rows = [MENTION | {"image": picture()}, MENTION | {"text": "bird"}, MENTION | {"image": picture(5, 30)}]
    batch = processor(mentions=rows)
    for i, row in enumerate(rows):
        for name, tensor in processor(mentions=[row]).items():
            row_tensor = batch[name][i]
            if name.endswith(("ids", "attention_mask", "name_mask")):
                assert (row_tensor[tensor.shape[1] :] == 0).all()
                row_tensor = row_tensor[: tensor.shape[1]]
            torch.testing.assert_close(tensor[0], row_tensor)


def test_prototypes_are_padded_to_k(processor):
    rows = [
        {"entity_id": "Q1", "prototypes": {"text": torch.ones(2, 5), "image": torch.zeros(0, 4)}},
        {"entity_id": "Q2", "prototypes": {"text": torch.full((3, 5), 2.0, dtype=torch.float16)}},
    ]
    batch = processor(entities=rows)
    assert batch["entity_prototypes_text"].shape == (2, 3, 5)
    assert batch["entity_prototypes_text"].dtype == torch.float32
    assert batch["entity_prototypes_text"].sum((1, 2)).tolist() == [10, 30]
    assert batch["entity_prototypes_text_mask"].tolist() == [[True, True, False], [True] * 3]
    assert batch["entity_prototypes_image"].shape == (2, 3, 4)
    assert not batch["entity_prototypes_image_mask"].any()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"entity_id": "Q7", "name": "x"}, "The entity 'Q7' has no prototypes"),
        (
            {"entity_id": "Q7", "prototypes": {"text": torch.ones(4, 5)}},
            r"text prototypes of the entity 'Q7' have the shape \(4, 5\)",
        ),
        ({"entity_id": "Q7", "prototypes": {"text": torch.ones(5)}}, "entity 'Q7'"),
        (
            {"entity_id": "Q7", "prototypes": {"image": torch.full((1, 5), float("nan"))}},
            "image prototypes of the entity 'Q7' contain nan",
        ),
    ],
)
def test_the_error_about_prototypes_names_the_entity(processor, row, message):
    good = {"entity_id": "Q1", "prototypes": {"text": torch.ones(1, 5)}}
    with pytest.raises(ValueError, match=message):
        processor(entities=[good, row])


def test_prototypes_of_several_widths_are_refused(processor):
    rows = [{"entity_id": f"Q{d}", "prototypes": {"text": torch.ones(1, d)}} for d in (5, 6)]
    with pytest.raises(ValueError, match="5, 6"):
        processor(entities=rows)


# Pre-training


def pretrain(processor, rows, partners=None):
    return processor(posts=rows, entities=[{}] * len(rows), partners=partners or range(len(rows)))


def hidden(batch):
    """Returns the positions of masked words in every row."""
    return [set((labels >= 0).nonzero().flatten().tolist()) for labels in batch["labels"]]


def test_only_tokens_of_the_mention_are_masked(processor):
    rows = [MENTION | {"mention_id": i, "image": None} for i in range(600)]
    batch = pretrain(processor, rows)
    counts = Counter(place for places in hidden(batch) for place in places)
    assert set(counts) == {3, 4}
    for count in counts.values():  # 0.85 of 600, within 4 standard deviations
        assert abs(count - 510) < 4 * (600 * 0.85 * 0.15) ** 0.5
    assert set(batch["labels"][:, 3].tolist()) == {WORDS.index("taylor"), -100}
    shown = Counter(batch["input_ids"][batch["labels"][:, 3] >= 0, 3].tolist())
    total = sum(shown.values())
    assert abs(shown[MASK] / total - 0.8) < 0.06  # random words add 1 % by chance
    assert shown[WORDS.index("taylor")] / total == pytest.approx(0.1, abs=0.04)
    untouched = batch["labels"] < 0
    original = processor(posts=rows)["post_input_ids"]
    assert torch.equal(batch["input_ids"][untouched], original[untouched])


def test_the_mention_embedding_does_not_reveal_masked_words(processor):
    batch = pretrain(processor, [MENTION] * 50)
    assert torch.equal(batch["name_ids"], batch["input_ids"][:, 3:5])
    assert (batch["name_mask"] == 1).all()


def test_random_words_are_masked_without_a_mention_or_guidance(processor, tokenizer):
    plain = ImnProcessor.from_parts(tokenizer, max_length=9, knowledge_guided=False)
    rows = [MENTION] * 600
    nowhere = [row | {"mention": "bird", "start": -1, "end": -1} for row in rows]
    unnamed = [row | {"mention": ""} for row in rows]
    for masker, posts in ((plain, rows), (processor, nowhere), (processor, unnamed)):
        batch = pretrain(masker, posts)
        counts = Counter(place for places in hidden(batch) for place in places)
        assert set(counts) == {1, 2, 3, 4, 5}  # neither [CLS] nor [SEP]
        for count in counts.values():
            assert abs(count - 90) < 4 * (600 * 0.15 * 0.85) ** 0.5
    assert words(pretrain(processor, nowhere)["name_ids"][0]) == "bird"
    assert pretrain(processor, unnamed)["name_mask"].sum() == 0


def test_a_mention_without_a_span_is_searched_in_the_text(processor):
    batch = pretrain(processor, [MENTION | {"start": -1, "end": -1, "mention": "Taylor Swift"}] * 30)
    assert set.union(*hidden(batch)) == {3, 4}
    # A truncated mention cannot be masked.
    late = {"mention": "swift", "text": "bird " * 20 + "swift", "start": 100, "end": 105, "image": None}
    assert words(pretrain(processor, [late])["name_ids"][0]) == "swift"


def test_masking_depends_only_on_the_seed_and_the_batch(processor, tokenizer):
    rows = [MENTION | {"image": picture()}] * 20
    first, again = pretrain(processor, rows), pretrain(processor, rows)
    assert all(torch.equal(first[name], again[name]) for name in first)
    seeded = ImnProcessor.from_parts(tokenizer, {"size": {"height": 8, "width": 8}}, max_length=9, mask_seed=1)
    for other in (
        pretrain(seeded, rows),
        pretrain(processor, rows[:-1]),
        pretrain(processor, rows, [1, 0, *range(2, 20)]),
    ):
        assert hidden(other)[:19] != hidden(first)[:19]
        assert not torch.equal(other["mask_seeds"][:19], first["mask_seeds"][:19])


def test_matching_ignores_missing_images_and_texts(processor):
    shown = MENTION | {"image": picture()}
    batch = pretrain(processor, [shown, MENTION, shown, shown | {"text": ""}], [0, 2, 1, 0])
    assert batch["matching_labels"].tolist() == [0, 1, -100, -100]
    assert batch["partners"].tolist() == [0, 2, 1, 0]


def test_the_models_accept_the_output(processor):
    torch.manual_seed(0)
    config = {"text_config": dict(BERT), "vision_config": dict(DETR)} | DIMS | {"num_prototypes": 3}
    rows = [MENTION | {"image": picture()}, MENTION, MENTION | {"mention": "", "text": "bird", "image": picture(9, 9)}]
    trained = ImnForKnowledgePreTraining(ImnConfig(**config))
    assert trained(**pretrain(processor, rows, [2, 1, 2])).loss.isfinite()
    assert trained(**pretrain(processor, [POST, POST])).loss.isfinite()
    model = ImnModel(ImnConfig(**config)).eval()
    posts = [
        {"post_id": f"p{i}", "entity_id": f"Q{i % 2}", "text": " ".join(WORDS[5 + i % 3 : 9]), "image": picture(9 + i)}
        for i in range(8)
    ]
    entities = [
        {"entity_id": f"Q{i}", "name": "bird", "description": "", "attributes": "", "aliases": [], "images": []}
        for i in range(3)  # the last one has no posts
    ]
    prototypes = PostPrototypes(model, processor, datasets.Dataset.from_list(posts, features=post_features()))
    attached = prototypes.attach(list(datasets.Dataset.from_list(entities, features=entity_features())))
    batch = {**processor(mentions=rows), **processor(entities=attached)}
    assert batch["entity_prototypes_text_mask"].sum(1).tolist() == [3, 3, 1]
    assert batch["entity_prototypes_image_mask"].sum(1).tolist() == [3, 3, 0]
    with torch.no_grad():
        out = model(**batch, labels=torch.tensor([0, 1, 2]))
    assert out.scores.shape == (3, 3)
    assert out.loss.isfinite()


def test_options_survive_saving(processor, tmp_path):
    processor.num_prototypes, processor.knowledge_guided, processor.mask_seed = 7, False, 5
    processor.mention_template = "{mention} . {text}"
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, ImnProcessor)
    for option in ("max_length", "mention_template", "use_images", "num_prototypes", "knowledge_guided", "mask_seed"):
        assert getattr(loaded, option) == getattr(processor, option)
    row = MENTION | {"image": picture()}
    for name, tensor in processor(mentions=[row]).items():
        assert torch.equal(loaded(mentions=[row])[name], tensor)


def test_images_for_detr_are_squares(tokenizer, tmp_path):
    """DETR's own image processor keeps proportions and pads, so features would depend on the batch."""
    DetrImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 40}).save_pretrained(tmp_path)
    processor = ImnProcessor.from_parts(tokenizer, str(tmp_path))
    rows = [MENTION | {"image": picture(40, 10)}, MENTION | {"image": picture(10, 30)}]
    batch = processor(mentions=rows)
    assert batch["mention_pixel_values"].shape == (2, 3, 16, 16)
    assert set(batch) == set(processor(mentions=rows[:1]))


@pytest.mark.parametrize("options", [{"max_length": 2}, {"num_prototypes": 0}], ids=str)
def test_impossible_options_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImnProcessor.from_parts(tokenizer, **options)


def test_missing_arguments_are_refused(processor, tokenizer):
    with pytest.raises(ValueError, match="mentions= and entities="):
        processor(pairs=[(MENTION, [])])
    with pytest.raises(ValueError, match="posts="):
        processor(mentions=[MENTION], partners=[0])
    with pytest.raises(ValueError, match="text encoder"):
        ImnProcessor.from_backbones()
    processor.mention_template = "{title}"
    with pytest.raises(ValueError, match="'title'"):
        processor(mentions=[MENTION])
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="MASK"):
        pretrain(processor, [MENTION])


def test_cached_features_replace_a_mention(processor):
    rows = [{"features": {"text": torch.full((length, 2), float(length))}} for length in (3, 0, 5)]
    batch = processor(mentions=rows)
    assert set(batch) == {"mention_features_text", "mention_features_text_mask"}
    assert batch["mention_features_text_mask"].sum(1).tolist() == [3, 0, 5]
    assert batch["mention_features_text"].sum((1, 2)).tolist() == [18, 0, 50]
    with pytest.raises(ValueError, match="Some mentions have features"):
        processor(mentions=[*rows, MENTION])
