"""Tests of MMEL's processor: the template and its split, truncation, images and saving."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, CLIPModel, PreTrainedTokenizerFast

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.mmel import MmelProcessor
from hf_mel.protocols import MelProcessor
from tests.modeling import published_mimic

TEXT = "chaplin and anderson in chicago"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ":", "mention", "context", "entity"]
WORDS += ["charlie", "chaplin", "anderson", "and", "in", "chicago", "actor", "british", *(f"w{i}" for i in range(60))]


def make_tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def processor(tokenizer):
    size = {"size": {"height": 8, "width": 8}}
    return MmelProcessor.from_parts(tokenizer, size, max_length=40, mention_marks=None)


def picture(width=12, height=6, colour=(200, 30, 30)):
    return Image.fromarray(np.full((height, width, 3), colour, dtype=np.uint8))


MENTION = {"mention": "Chaplin", "text": TEXT, "start": 0, "end": 7, "context_id": "a", "image": None}
ENTITY = {"name": "Charlie Chaplin", "description": "", "attributes": "actor", "images": []}
OTHER = {"name": "Chaplin", "description": "british", "attributes": "actor", "images": []}


def words(ids, mask=None):
    return " ".join(WORDS[i] for i, keep in zip(ids, [1] * len(ids) if mask is None else mask, strict=True) if keep)


def sides(batch, m=0, c=0):
    return [words(batch["pair_input_ids"][m, c], batch[f"pair_{side}_mask"][m, c]) for side in ("context", "entity")]


def test_a_pair_follows_the_template_and_splits_into_two_sides(processor):
    batch = processor(pairs=[(MENTION, [ENTITY, OTHER])])
    context = "[CLS] mention : chaplin . context : chaplin and anderson in chicago ."
    assert sides(batch) == [context, "entity : charlie chaplin . actor . [SEP]"]
    assert sides(batch, 0, 1) == [context, "entity : chaplin . british . actor . [SEP]"]
    sequence = words(batch["pair_input_ids"][0, 0], batch["pair_attention_mask"][0, 0])
    assert sequence == " ".join(sides(batch))
    assert isinstance(processor, MelProcessor)


def test_the_templates_in_the_paper(tokenizer):
    printed = MmelProcessor.from_parts(
        tokenizer, context_template="context", entity_template="attributes", mention_marks=None
    )
    batch = printed(pairs=[(MENTION, [OTHER])])
    assert sides(batch) == ["[CLS] context : chaplin and anderson in chicago .", "entity : actor . [SEP]"]


def test_tensors_have_the_documented_shapes_and_masks(processor):
    lone = {**MENTION, "context_id": None}
    batch = processor(
        pairs=[
            (MENTION, [ENTITY]),
            (lone, []),
            ({**MENTION, "mention": "Anderson"}, [OTHER, ENTITY, OTHER]),
            (lone, [ENTITY]),
        ]
    )
    assert batch["pair_mask"].tolist() == [[True, False, False], [False] * 3, [True] * 3, [True, False, False]]
    numbers = batch["pair_context"].tolist()
    assert numbers[0] == numbers[2]
    assert len(set(numbers)) == 3
    assert batch["pair_input_ids"].shape == batch["pair_entity_mask"].shape
    longest = batch["pair_attention_mask"].sum(-1).max()
    assert batch["pair_input_ids"].shape[2] == longest
    split = batch["pair_context_mask"].long() + batch["pair_entity_mask"].long()
    assert torch.equal(split, batch["pair_attention_mask"])
    assert not batch["pair_attention_mask"][~batch["pair_mask"]].any()
    assert (batch["pair_input_ids"][batch["pair_attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("pairs", [[], [(MENTION, [])]], ids=["no mention", "no candidate"])
def test_mentions_without_candidates(processor, pairs):
    batch = processor(pairs=pairs)
    assert batch["pair_mask"].shape == (len(pairs), 1)
    assert not batch["pair_mask"].any()
    assert batch["pair_input_ids"].shape[:2] == (len(pairs), 1)


def test_a_batch_equals_its_pairs_one_by_one(processor):
    pairs = [
        (MENTION, [ENTITY, OTHER]),
        ({**MENTION, "text": "w1 w2 chaplin " + "w3 " * 50, "start": 6, "end": 13}, [OTHER]),
    ]
    batch = processor(pairs=pairs)
    for m, (mention, candidates) in enumerate(pairs):
        for c, row in enumerate(candidates):
            assert sides(processor(pairs=[(mention, [row])])) == sides(batch, m, c)


@settings(max_examples=150, deadline=None)
@given(
    before=st.integers(0, 60),
    after=st.integers(0, 60),
    surface=st.integers(1, 4),
    name=st.integers(1, 6),
    facts=st.integers(0, 60),
    length=st.integers(30, 60),
    located=st.booleans(),
)
def test_the_mention_and_the_name_are_never_cut(before, after, surface, name, facts, length, located):
    processor = MmelProcessor.from_parts(make_tokenizer(), max_length=length, mention_marks=None)
    mention = " ".join(["chaplin", "anderson", "and", "in"][:surface])
    left, right = [f"w{i}" for i in range(before)], [f"w{i}" for i in range(after)]
    text = " ".join([*left, mention, *right])
    start = len(" ".join(left)) + (before > 0) if located else -1
    full_name = " ".join(["charlie", "chaplin"] * 3)[: 8 * name].split(" ")[:name]
    row = {"name": " ".join(full_name), "attributes": " ".join(f"w{i}" for i in range(facts))}
    rows = {"mention": mention, "text": text, "start": start, "end": start + len(mention) if located else -1}
    context, entity = sides(processor(pairs=[(rows, [row])]))
    sequence = f"{context} {entity}".split()
    assert len(sequence) <= length
    assert f"mention : {mention} ." in context
    inside = context.partition("context : ")[2].removesuffix(" .")
    assert mention in inside
    assert inside in text
    assert entity.startswith(f"entity : {row['name']}")
    facts_kept = entity.removeprefix(f"entity : {row['name']}").removesuffix(" . [SEP]").removeprefix(" . ").split()
    assert facts_kept == row["attributes"].split()[: len(facts_kept)]
    if len(inside.split()) < len(text.split()) or len(facts_kept) < facts:  # truncation must use all available tokens
        assert len(sequence) == length
        around, extra = len(inside.split()) - surface, length - 13 - 2 * surface - name
        assert around >= min(before + after, extra // 2)
        window = inside.split().index("chaplin")
        missing = (before - window, after - (around - window))
        assert (
            min(missing) == 0 or abs(window - (around - window)) <= 1
        )  # the mention is in the middle unless the text ends


def test_a_mention_and_a_name_that_cannot_fit_are_cut(tokenizer):
    processor = MmelProcessor.from_parts(tokenizer, max_length=24)
    mention = {**MENTION, "mention": "chaplin " * 80, "text": "chaplin " * 80, "start": 0, "end": 640}
    batch = processor(pairs=[(mention, [{**ENTITY, "name": "charlie " * 90}])])
    assert batch["pair_input_ids"].shape[2] <= 24
    assert all("ch" in side for side in sides(batch))
    with pytest.raises(ValueError, match="max_length=8"):
        MmelProcessor.from_parts(tokenizer, max_length=8)(pairs=[(MENTION, [ENTITY])])


def test_a_mention_too_long_to_fit_keeps_its_beginning(tokenizer):
    surface = " ".join(f"w{i}" for i in range(40))
    mention = {**MENTION, "mention": surface, "text": f"anderson and {surface}", "start": 13, "end": 13 + len(surface)}
    context, _ = sides(
        MmelProcessor.from_parts(tokenizer, max_length=30, mention_marks=None)(pairs=[(mention, [ENTITY])])
    )
    named, _, inside = context.removeprefix("[CLS] mention : ").removesuffix(" .").partition(" . context : ")
    assert len(named.split()) > 3
    assert surface.startswith(named)
    assert surface.startswith(inside)


def test_the_span_of_a_mention_has_its_tokens_only(tokenizer):
    """Neighbouring tokens are left out. A mention without a span is searched in any case."""
    processor = MmelProcessor.from_parts(tokenizer, mention_marks=None)
    for text, surface in (("w1.chaplin.w2", "chaplin"), ("(W1 CHAPLIN)", "w1 chaplin"), ("chaplin", "chaplin")):
        start = text.lower().index(surface)
        for place in ((start, start + len(surface)), (-1, -1), (None, None)):
            [(ids, first, last)] = processor._tokens_with_span(
                [{"text": text, "mention": surface, "start": place[0], "end": place[1]}]
            )
            assert words(ids[first:last]) == surface


def test_texts_are_tokenized_as_inside_a_sentence():
    """A tokenizer like RoBERTa's, which distinguishes words after a space, gets that space."""
    vocabulary = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", ".", ":", *(f"Ġ{w}" for w in ("Mention", "Context", "Entity"))]
    vocabulary += ["Ġchaplin", "Ġcharlie", "Ġactor"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep")}
    processor = MmelProcessor.from_parts(
        PreTrainedTokenizerFast(tokenizer_object=backend, **names), mention_marks=None
    )
    mention = {**MENTION, "mention": "chaplin", "text": "chaplin", "start": 0, "end": 7}
    ids = processor(pairs=[(mention, [{**ENTITY, "name": "charlie"}])])["pair_input_ids"][0, 0].tolist()
    expected = "[CLS] ĠMention : Ġchaplin . ĠContext : Ġchaplin . ĠEntity : Ġcharlie . Ġactor . [SEP]"
    assert " ".join(vocabulary[i] for i in ids) == expected


def test_a_mention_outside_its_text_is_accepted(processor):
    context, _ = sides(processor(pairs=[({**MENTION, "mention": "w9", "start": -1, "end": -1}, [ENTITY])]))
    assert context == f"[CLS] mention : w9 . context : {TEXT} ."
    context, _ = sides(processor(pairs=[({**MENTION, "text": "w9 " * 200, "start": -1, "end": -1}, [ENTITY])]))
    assert re.fullmatch(r"\[CLS\] mention : chaplin \. context : (w9 )+\.", context)


def test_empty_texts_are_accepted(processor):
    batch = processor(
        pairs=[({**MENTION, "text": ""}, [{"name": "chaplin", "description": None, "attributes": None}])]
    )
    assert sides(batch) == ["[CLS] mention : chaplin . context : .", "entity : chaplin . [SEP]"]
    braces = processor(pairs=[({**MENTION, "text": "{name} {0}"}, [ENTITY])])
    assert "[UNK]" in sides(braces)[0]


def test_images_are_prepared_and_missing_ones_masked(processor):
    pairs = [
        ({**MENTION, "image": picture()}, [ENTITY, {**OTHER, "images": [picture(colour=(0, 0, 255)), picture()]}]),
        (MENTION, [{**OTHER, "images": [picture(5, 30)]}]),
    ]
    batch = processor(pairs=pairs)
    assert batch["pair_mention_pixel_values"].shape == (2, 3, 8, 8)
    assert batch["pair_entity_pixel_values"].shape == (2, 2, 3, 8, 8)
    assert batch["pair_mention_image_mask"].tolist() == [True, False]
    assert batch["pair_entity_image_mask"].tolist() == [[False, True], [True, False]]
    torch.testing.assert_close(batch["pair_mention_pixel_values"][0], processor.images([picture()])[0])
    blue = processor.images([picture(colour=(0, 0, 255))])[0]
    torch.testing.assert_close(batch["pair_entity_pixel_values"][0, 1], blue)
    torch.testing.assert_close(batch["pair_entity_pixel_values"][1, 0], processor.images([picture(5, 30)])[0])
    assert batch["pair_entity_pixel_values"][0, 0].abs().max() == 0
    none = processor(pairs=[(MENTION, [ENTITY])])
    assert none["pair_entity_pixel_values"].shape == (1, 1, 3, 8, 8)
    assert not none["pair_entity_image_mask"].any()


def test_features_replace_pixels(processor):
    one, two = torch.arange(5.0), torch.arange(5.0) + 7
    pairs = [
        ({**MENTION, "image_features": one}, [{**ENTITY, "image_features": None}, {**OTHER, "image_features": two}]),
        ({**MENTION, "image_features": None}, [{**OTHER, "image_features": one}]),
    ]
    batch = processor(pairs=pairs)
    assert not [name for name in batch if "pixel" in name]
    torch.testing.assert_close(batch["pair_mention_image_features"], torch.stack([one, torch.zeros(5)]))
    torch.testing.assert_close(batch["pair_entity_image_features"][0], torch.stack([torch.zeros(5), two]))
    torch.testing.assert_close(batch["pair_entity_image_features"][1, 0], one)
    assert batch["pair_entity_image_mask"].tolist() == [[False, True], [True, False]]
    without = processor(pairs=[({**MENTION, "image_features": None}, [{**ENTITY, "image_features": None}])])
    assert {name for name in without if "image" in name} == {"pair_mention_image_mask", "pair_entity_image_mask"}
    with pytest.raises(ValueError, match="image_features"):
        processor(pairs=[(MENTION, [{**ENTITY, "image_features": one}])])


def test_a_text_processor_prepares_no_images(tokenizer):
    batch = MmelProcessor.from_parts(tokenizer)(pairs=[({**MENTION, "image": picture()}, [ENTITY])])
    assert not [name for name in batch if "image" in name or "pixel" in name]


def test_options_survive_saving(tokenizer, tmp_path):
    options = {"max_length": 33, "context_template": "context", "entity_template": "attributes", "use_images": True}
    processor = MmelProcessor.from_parts(tokenizer, {"size": {"height": 8, "width": 8}}, **options)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MmelProcessor)
    assert {name: getattr(loaded, name) for name in options} == options
    pairs = [({**MENTION, "image": picture()}, [ENTITY, OTHER])]
    for name, tensor in processor(pairs=pairs).items():
        torch.testing.assert_close(loaded(pairs=pairs)[name], tensor)


def test_backbones_determine_tokenizer_and_image_size(tokenizer, tmp_path):
    CLIPModel(published_mimic.clip_config()).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "text")
    processor = MmelProcessor.from_backbones(text=str(tmp_path / "text"), vision=str(tmp_path / "clip"))
    assert dict(processor.image_processor.size) == {"height": 16, "width": 16}
    assert processor.use_images
    assert not MmelProcessor.from_backbones(text=str(tmp_path / "text")).use_images
    with pytest.raises(ValueError, match="text encoder"):
        MmelProcessor.from_backbones()


@pytest.mark.parametrize("options", [{"context_template": "x"}, {"entity_template": "name"}])
def test_unknown_templates_are_refused(tokenizer, options):
    with pytest.raises(ValueError, match="is not one of"):
        MmelProcessor.from_parts(tokenizer, **options)


def test_mentions_or_entities_alone_are_refused(processor):
    with pytest.raises(ValueError, match="pairs"):
        processor(mentions=[MENTION])
    with pytest.raises(ValueError, match="pairs"):
        processor(entities=[ENTITY])
