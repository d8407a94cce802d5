"""Tests of MIMIC's processor: templates, truncation, images and saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoProcessor, CLIPModel, PreTrainedTokenizerFast

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.mimic import MimicProcessor
from hf_mel.protocols import MelProcessor
from tests.modeling import published_mimic

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "swift", "on", "stage", "taylor", "singer", "bird", "."]


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def processor(tokenizer):
    options = {"mention_template": "{mention} [SEP] {text}", "entity_template": "{name} [SEP] {attributes}"}
    return MimicProcessor.from_parts(tokenizer, {"size": {"height": 8, "width": 8}}, max_length=9, **options)


def picture(width=12, height=6, colour=(200, 30, 30)):
    return Image.fromarray(np.full((height, width, 3), colour, dtype=np.uint8))


MENTION = {"mention": "swift", "text": "swift on stage", "image": None}
ENTITY = {"name": "taylor swift", "attributes": "singer .", "images": []}


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def test_the_templates_are_equations_2_and_3(processor):
    batch = processor(mentions=[MENTION], entities=[ENTITY])
    assert words(batch["mention_input_ids"][0]) == "[CLS] swift [SEP] swift on stage [SEP] [PAD] [PAD]"
    assert words(batch["entity_input_ids"][0]) == "[CLS] taylor swift [SEP] singer . [SEP] [PAD] [PAD]"
    assert batch["mention_attention_mask"][0].tolist() == [1] * 7 + [0] * 2
    assert isinstance(processor, MelProcessor)


def test_texts_are_padded_and_truncated(processor):
    long = MENTION | {"text": "bird " * 3000}
    assert processor(mentions=[long])["mention_input_ids"].shape == (1, 9)
    assert words(processor(mentions=[long])["mention_input_ids"][0]).endswith("bird [SEP]")
    name = ENTITY | {"name": "bird" * 2500}
    assert processor(entities=[name])["entity_input_ids"].shape == (1, 9)


def test_a_batch_equals_its_rows_one_by_one(processor):
    rows = [MENTION | {"image": picture()}, MENTION | {"mention": "bird"}, MENTION | {"image": picture(5, 30)}]
    batch = processor(mentions=rows)
    for i, row in enumerate(rows):
        for name, tensor in processor(mentions=[row]).items():
            torch.testing.assert_close(tensor[0], batch[name][i])


def test_images_are_stretched_and_normalised_and_missing_ones_are_zero(processor):
    pixels = processor(mentions=[MENTION | {"image": picture()}, MENTION])["mention_pixel_values"]
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    expected = (np.array([200, 30, 30]) / 255 - mean) / std
    assert pixels.shape == (2, 3, 8, 8)
    np.testing.assert_allclose(pixels[0].mean((1, 2)), expected, atol=1e-5)
    assert pixels[1].abs().max() == 0


def test_only_the_first_image_of_an_entity_is_used(processor):
    red, blue = picture(colour=(255, 0, 0)), picture(colour=(0, 0, 255))
    both = processor(entities=[ENTITY | {"images": [blue, red]}])["entity_pixel_values"]
    torch.testing.assert_close(both, processor(entities=[ENTITY | {"images": [blue]}])["entity_pixel_values"])
    assert not torch.allclose(both, processor(entities=[ENTITY | {"images": [red]}])["entity_pixel_values"])
    grey = processor(entities=[ENTITY | {"images": [picture().convert("L")]}])["entity_pixel_values"]
    assert grey.shape == (1, 3, 8, 8)


@pytest.mark.parametrize("crop", [True, False])
def test_a_batch_without_any_image_has_the_same_shape(tokenizer, crop):
    settings = {"size": {"height": 10, "width": 10}, "crop_size": {"height": 6, "width": 6}, "do_center_crop": crop}
    processor = MimicProcessor.from_parts(tokenizer, settings)
    none = processor(mentions=[MENTION])["mention_pixel_values"]
    some = processor(mentions=[MENTION | {"image": picture()}])["mention_pixel_values"]
    assert none.shape == some.shape == (1, 3, 6 if crop else 10, 6 if crop else 10)


def test_a_processor_of_one_modality_returns_only_its_tensors(tokenizer):
    assert set(MimicProcessor.from_parts(tokenizer)(mentions=[MENTION])) == {
        "mention_input_ids",
        "mention_attention_mask",
    }
    images = MimicProcessor.from_parts(tokenizer, {"size": {"height": 8, "width": 8}}, use_text=False)
    assert set(images(mentions=[MENTION])) == {"mention_pixel_values", "mention_image_mask"}


def test_masks_tell_which_rows_have_an_image_and_a_text(processor):
    mentions = [MENTION | {"image": picture()}, MENTION, MENTION | {"text": " ", "mention": "", "image": picture()}]
    batch = processor(mentions=mentions, entities=[ENTITY, ENTITY | {"images": [picture()]}])
    assert batch["mention_image_mask"].tolist() == [True, False, True]
    assert batch["mention_text_mask"].tolist() == [True, True, False]
    assert batch["entity_image_mask"].tolist() == [False, True]
    published = MimicProcessor(processor.image_processor, processor.tokenizer)
    assert set(published(mentions=mentions, entities=[ENTITY])) == {
        f"{side}_{name}" for side in ("mention", "entity") for name in ("input_ids", "attention_mask", "pixel_values")
    }


def test_options_survive_saving(tokenizer, tmp_path):
    options = {
        "max_length": 7,
        "mention_template": "{mention}",
        "entity_template": "{name} {attributes}",
        "use_images": True,
        "use_text": True,
        "mention_marks": ["(", ")"],
    }
    processor = MimicProcessor.from_parts(tokenizer, {"size": {"height": 8, "width": 8}}, **options)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MimicProcessor)
    assert {name: getattr(loaded, name) for name in options} == options
    rows = {"mentions": [MENTION | {"image": picture()}], "entities": [ENTITY]}
    for name, tensor in processor(**rows).items():
        torch.testing.assert_close(loaded(**rows)[name], tensor)


def test_the_error_names_a_missing_column_of_the_template(tokenizer):
    processor = MimicProcessor.from_parts(tokenizer, mention_template="{topic}: {mention}")
    with pytest.raises(ValueError, match="topic"):
        processor(mentions=[MENTION])


def test_missing_attributes_count_as_an_empty_string(processor):
    without = processor(entities=[ENTITY | {"attributes": None}])["entity_input_ids"]
    assert words(without[0]) == "[CLS] taylor swift [SEP] [SEP] [PAD] [PAD] [PAD] [PAD]"
    torch.testing.assert_close(without, processor(entities=[ENTITY | {"attributes": ""}])["entity_input_ids"])


def test_a_clip_backbone_gets_the_published_stretch(tokenizer, tmp_path):
    CLIPModel(published_mimic.clip_config()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    images = MimicProcessor.from_backbones(str(tmp_path)).image_processor
    assert (images.do_center_crop, images.resample) == (False, 1)  # Lanczos, no cropping
    assert dict(images.size) == {"height": 16, "width": 16}


def test_braces_in_a_text_are_text(processor):
    batch = processor(mentions=[MENTION | {"text": "{name} {0} {mention.__class__}"}])
    assert words(batch["mention_input_ids"][0]).count("[UNK]") == 3


def test_pairs_are_refused(processor):
    with pytest.raises(ValueError, match="pairs"):
        processor(pairs=[(MENTION, [ENTITY])])


def test_text_spans_point_into_the_text(processor):
    row = MENTION | {"text": "taylor swift on"}
    (spans,) = processor.text_spans([row])
    assert len(spans) == processor.max_length
    ids = processor(mentions=[row])["mention_input_ids"][0]
    for token, span in zip(words(ids).split(), spans, strict=True):
        if span is not None:
            assert row["text"][slice(*span)] == token
    # The tokens are [CLS] swift [SEP] taylor swift on [SEP], and only the three words of the text have a span.
    assert [span is not None for span in spans] == [False] * 3 + [True] * 3 + [False] * 3


def test_a_template_without_text_gives_no_text_spans(processor):
    processor.mention_template = "{mention}"
    assert processor.text_spans([MENTION]) == [[None] * processor.max_length]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"attributes": "singer ."}, "taylor swift [SEP] singer ."),  # as before, where only attributes are filled
        ({"aliases": ["swift", "", "bird"], "description": "singer"}, "taylor swift [SEP] swift, bird [SEP] singer"),
        ({"aliases": [], "description": " ", "attributes": None}, "taylor swift"),
        ({"name": None, "description": "singer"}, "singer"),
        ({"aliases": None, "description": "on", "attributes": "stage"}, "taylor swift [SEP] on [SEP] stage"),
    ],
)
def test_empty_columns_of_an_entity_leave_nothing(tokenizer, columns, text):
    processor = MimicProcessor.from_parts(tokenizer)
    row = {"entity_id": "Q1", "name": "taylor swift"} | columns
    encoded = tokenizer(text, padding="max_length", max_length=40)["input_ids"]
    assert processor(entities=[row])["entity_input_ids"][0].tolist() == encoded


def test_parts_of_an_entity_template_may_have_words(tokenizer):
    processor = MimicProcessor.from_parts(tokenizer, entity_template=["on {name}", "stage {aliases} ."], max_length=9)
    with_alias, without = processor(entities=[ENTITY | {"aliases": ["bird"]}, ENTITY])["entity_input_ids"]
    assert words(with_alias) == "[CLS] on taylor swift [SEP] stage bird . [SEP]"
    assert words(without) == "[CLS] on taylor swift [SEP] [PAD] [PAD] [PAD] [PAD]"
    with pytest.raises(ValueError, match="nmae"):
        MimicProcessor.from_parts(tokenizer, entity_template=["{nmae}"])(entities=[ENTITY])


@pytest.mark.parametrize("marks", [None, ["«", "»"], ["[[", "]"]])
@pytest.mark.parametrize("place", [0, 3, 12, 19])
@pytest.mark.parametrize("template", ["{mention} [SEP] {window}", "{window}", "on {window} stage", "bird {text}"])
def test_text_spans_point_into_windows(tokenizer, marks, place, template):
    """Each token with a span is that part of the text, and every token of the text that is read has one."""
    parts = ["on", "stage", "bird", "taylor"] * 5
    parts[place] = "swift"
    text = " ".join(parts)
    start = text.index("swift")
    row = {"mention": "swift", "text": text, "start": start, "end": start + 5}
    processor = MimicProcessor.from_parts(tokenizer, mention_template=template, mention_marks=marks, max_length=12)
    (spans,) = processor.text_spans([row])
    (ids,) = processor(mentions=[row])["mention_input_ids"]
    assert len(spans) == len(ids) == 12
    for token, span in zip(words(ids).split(), spans, strict=True):
        assert span is None or text[slice(*span)] == token
    located = [span for span in spans if span is not None]
    assert located == sorted(located)
    others = {"{mention} [SEP] {window}": 4, "{window}": 2, "on {window} stage": 4, "bird {text}": 3}[template]
    assert len(located) == 12 - others - (2 if marks and "{window}" in template else 0)
    assert ((start, start + 5) in located) == ("{window}" in template or place < 9)


def test_a_window_needs_offsets(processor, monkeypatch):
    processor.mention_template = "{window}"
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="offsets"):
        processor(mentions=[MENTION])
