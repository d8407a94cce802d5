"""Tests of PFMEL's processor: sentence forms, truncation, pre-training examples, images and saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.pfmel import PfmelConfig, PfmelForPreTraining, PfmelModel, PfmelProcessor
from hf_mel.modeling.pfmel.processing_pfmel import ACCOUNT_OPTIONS
from hf_mel.protocols import MelProcessor

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_TEXT = """
. , : @ ana lima anlima she wins again the username of who lives in is and description some recent tweets user include na
porto runner sex female one two three river a b c d e f g h i j
"""
WORDS = [*_SPECIAL, *_TEXT.split()]


def make_tokenizer():
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def make(vision=None, **options):
    return PfmelProcessor.from_parts(make_tokenizer(), vision, **{"mention_marks": None, **options})


def make_with_images(**options):
    return make({"size": {"height": 8, "width": 8}}, **options)


def picture(colour=(200, 30, 30)):
    return Image.fromarray(np.full((6, 12, 3), colour, dtype=np.uint8))


MENTION = {"mention": "Ana", "text": "Ana wins again.", "start": 0, "end": 3, "image": None, "context_id": "c"}
ENTITY = {"name": "Ana Lima", "description": "runner", "attributes": "Sex: female.", "images": []}
ACCOUNT = {
    "screen_name": "@anlima",
    "name": "Ana Lima",
    "location": "Porto",
    "description": "runner",
    "recent_posts": ["one", "two .", "three"],
    "images": [],
}


def words(batch, *cell, name="pair_input_ids"):
    ids, mask = batch[name][cell], batch[name.replace("input_ids", "attention_mask")][cell]
    marks = {int(p): "IMG" for p in batch[name.replace("input_ids", "image_positions")][cell] if p >= 0}
    return " ".join(marks.get(k, WORDS[i]) for k, i in enumerate(ids[mask.bool()].tolist()))


def test_linking_sentences_are_those_of_the_paper():
    """§3.4 has "mention context. mention is" and the entity. Without a screen name, the name identifies it."""
    batch = make()(pairs=[(MENTION, [ENTITY])])
    assert words(batch, 0, 0) == "[CLS] ana wins again . ana is [SEP] ana lima . runner . sex : female . [SEP]"
    assert batch["pair_token_type_ids"][0, 0].tolist() == [0] * 8 + [1] * 10
    assert isinstance(make(), MelProcessor)


def test_account_sentences_are_those_of_the_paper():
    """§3.2 and §3.4 have "userScreen. the username of @userScreen who lives in …"."""
    processor = make(**ACCOUNT_OPTIONS)
    expected = (
        "@ anlima . the username of @ anlima who lives in porto is ana lima and the description is runner . some recent "
        "tweets of the user include : one , two . and three . [SEP]"
    )
    for screen in ("@anlima", "anlima"):
        text = words(processor(pairs=[(MENTION, [ACCOUNT | {"screen_name": screen}])]), 0, 0)
        assert text.split(" [SEP] ")[1] == expected
    bare = dict.fromkeys(ACCOUNT, None) | {"screen_name": "anlima", "name": "Ana Lima", "recent_posts": ["one"]}
    text = words(processor(pairs=[(MENTION, [bare])]), 0, 0)
    assert "who lives in na is ana lima and the description is na ." in text
    assert text.endswith("include : one , na and na . [SEP]")


def test_long_columns_keep_their_first_words():
    """These are 30 words of a description, and 35 words of each of three tweets."""
    posts = [" ".join(["one"] * 50), " ".join(["two"] * 35), "three", "again"]
    row = ACCOUNT | {"description": " ".join(["runner"] * 31), "recent_posts": posts}
    context = words(make(**ACCOUNT_OPTIONS)(pairs=[(MENTION, [row])]), 0, 0).split(" [SEP] ")[1].split()
    assert [context.count(word) for word in ("runner", "one", "two", "three", "again")] == [30, 35, 35, 1, 0]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"description": ""}, "ana lima . sex : female ."),
        ({"attributes": None}, "ana lima . runner ."),
        ({"description": None, "attributes": ""}, "ana lima ."),
        ({"description": "runner."}, "ana lima . runner . sex : female ."),
    ],
)
def test_empty_columns_leave_no_empty_sentences(columns, text):
    batch = make()(pairs=[(MENTION, [ENTITY | columns])])
    assert words(batch, 0, 0).split(" [SEP] ")[1] == f"{text} [SEP]"


def test_an_entity_with_attributes_only():
    """This is the template of MMEL's and GHMFC's tables. A long one is cut at its end."""
    processor = make(entity_template="{attributes}.", max_length=30)
    batch = processor(pairs=[(MENTION, [ENTITY, ENTITY | {"attributes": "Sex: female. " * 30}])])
    assert words(batch, 0, 0).split(" [SEP] ")[1] == "sex : female . [SEP]"
    assert words(batch, 0, 1).startswith("[CLS] ana wins again . ana is [SEP] sex : female . sex : female .")
    assert batch["pair_attention_mask"][0, 1].sum() == 30


def test_images_follow_the_text_of_their_sentence():
    processor = make_with_images(max_entity_images=1)
    shown = MENTION | {"image": picture()}, ENTITY | {"images": [picture(), picture((1, 2, 3))]}
    cases = {
        (0, 0): "[CLS] ana wins again . ana is [SEP] ana lima . runner . sex : female . [SEP]",
        (1, 0): "[CLS] ana wins again . ana is IMG [SEP] ana lima . runner . sex : female . [SEP]",
        (0, 1): "[CLS] ana wins again . ana is [SEP] ana lima . runner . sex : female . IMG [SEP]",
        (1, 1): "[CLS] ana wins again . ana is IMG [SEP] ana lima . runner . sex : female . IMG [SEP]",
    }
    for (left, right), expected in cases.items():
        batch = processor(pairs=[(shown[0] if left else MENTION, [shown[1] if right else ENTITY])])
        assert words(batch, 0, 0) == expected
        assert ("pair_mention_pixel_values" in batch, "pair_entity_pixel_values" in batch) == (bool(left), bool(right))
        segments = batch["pair_token_type_ids"][0, 0].tolist()
        assert segments == [0] * (expected.split().index("[SEP]") + 1) + [1] * (len(segments) - segments.count(0))
    assert batch["pair_entity_pixel_values"].shape == (1, 1, 3, 8, 8)
    torch.testing.assert_close(batch["pair_entity_pixel_values"][0], batch["pair_mention_pixel_values"])
    assert "pair_mention_pixel_values" not in make()(pairs=[(shown[0], [shown[1]])])


def test_features_replace_images():
    features = torch.arange(5.0)
    several = torch.stack([features, features + 2])
    pairs = [
        (MENTION | {"image_features": features}, [ENTITY | {"image_features": None}]),
        (
            MENTION | {"image_features": None},
            [ENTITY | {"image_features": several}, ENTITY | {"image_features": None}],
        ),
    ]
    batch = make_with_images()(pairs=pairs)
    assert not any("pixel" in name for name in batch)
    torch.testing.assert_close(batch["pair_mention_image_features"], torch.stack([features, torch.zeros(5)]))
    assert batch["pair_entity_image_features"].shape == (2, 2, 5)
    torch.testing.assert_close(batch["pair_entity_image_features"][1, 0], features + 1)  # T(e): the mean of all
    shown = (batch["pair_image_positions"] >= 0).tolist()
    assert shown == [[[True, False], [False, False]], [[False, True], [False, False]]]


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_images_of_an_entity_come_with_their_count(limit):
    """T(e) of §3.2 has all images, or the first `limit`."""
    pictures = [picture((10 * k, 0, 250 - 10 * k)) for k in range(3)]
    entities = [ENTITY | {"images": pictures[:k]} for k in (0, 3, 1)]
    processor = make_with_images(max_entity_images=limit, pretraining_tasks=["mixed"])
    linking = processor(pairs=[(MENTION, entities), (MENTION, entities[2:])])
    pretraining = processor(posts=POSTS[:1] * 3, entities=entities, partners=[0, 1, 2])
    max_images = min(3, limit or 3)
    assert ("pair_entity_image_counts" in linking) == ("entity_image_counts" in pretraining) == (max_images > 1)
    for pixels, counts, kept in (
        (linking["pair_entity_pixel_values"][0], linking.get("pair_entity_image_counts", [[0, 1, 1]])[0], entities),
        (pretraining["entity_pixel_values"], pretraining.get("entity_image_counts", [0, 1, 1]), entities),
        (
            linking["pair_entity_pixel_values"][1],
            linking.get("pair_entity_image_counts", [[], [1, 0, 0]])[1],
            [entities[2]],
        ),
    ):
        pixels = pixels if max_images > 1 else pixels.unsqueeze(1)
        assert pixels.shape == (3, max_images, 3, 8, 8)
        for entity, images, count in zip(kept, pixels, counts, strict=False):
            assert int(count) == min(len(entity["images"]), max_images)
            for k in range(max_images):
                expected = processor.images([pictures[k]])[0] if k < count else torch.zeros(3, 8, 8)
                torch.testing.assert_close(images[k], expected)
    features = torch.arange(6.0).view(3, 2)
    row = ENTITY | {"image_features": features}
    batch = processor(pairs=[(MENTION | {"image_features": None}, [row])])
    torch.testing.assert_close(batch["pair_entity_image_features"][0, 0], features[:limit].mean(0))


def test_lists_of_candidates_are_padded_and_may_be_empty():
    unlisted = MENTION | {"context_id": "d"}
    batch = make()(pairs=[(MENTION, [ENTITY]), (unlisted, []), (MENTION, [ENTITY, ENTITY | {"name": "river"}])])
    assert batch["pair_mask"].tolist() == [[True, False], [False, False], [True, True]]
    assert batch["pair_context"].tolist() == [0, 1, 0]
    assert batch["pair_attention_mask"][~batch["pair_mask"]].sum() == 0
    nothing = make()(pairs=[(MENTION, [])])
    assert nothing["pair_mask"].tolist() == [[False]]


def test_a_batch_equals_its_pairs_one_by_one():
    processor = make_with_images()
    pairs = [
        (MENTION | {"image": picture()}, [ENTITY, ENTITY | {"images": [picture()], "name": "a b c d e f g"}]),
        (MENTION | {"text": "she is Ana", "start": 7, "end": 10}, [ENTITY | {"attributes": ""}]),
    ]
    batch = processor(pairs=pairs)
    for m, (mention, entities) in enumerate(pairs):
        for c, entity in enumerate(entities):
            single = processor(pairs=[(mention, [entity])])
            assert words(batch, m, c) == words(single, 0, 0)
            for name in ("pair_mention_pixel_values", "pair_entity_pixel_values"):
                if name in single:
                    index = (m, c) if "entity" in name else (m,)
                    torch.testing.assert_close(batch[name][index], single[name].flatten(0, -4)[0])


def test_a_long_context_is_cut_around_its_mention():
    text = "a b c d e f g h i j " * 40
    for place in (0, len(text) // 2, len(text)):
        row = MENTION | {"text": text[:place] + " Ana " + text[place:], "start": place + 1, "end": place + 4}
        processor = make(max_length=40)
        first, second = words(processor(pairs=[(row, [ENTITY])]), 0, 0).removeprefix("[CLS] ").split(" [SEP] ")
        assert first.endswith(". ana is") or first.endswith(" ana is")
        assert first.split().count("ana") == 2
        assert second == "ana lima . runner . sex : female . [SEP]"
        assert len(first.split()) == 40 - 3 - 9


def test_a_long_entity_loses_its_end():
    row = ENTITY | {"attributes": "Sex: female. " * 100}
    first, second = words(make(max_length=30)(pairs=[(MENTION, [row])]), 0, 0).split(" [SEP] ")
    assert first == "[CLS] ana wins again . ana is"
    assert second.startswith("ana lima . runner . sex")
    assert len(f"{first} [SEP] {second}".split()) == 30


TOKENS = st.lists(st.sampled_from("abcdefg"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(TOKENS, TOKENS, TOKENS, st.integers(20, 60))
def test_the_mention_and_the_name_are_never_cut(before, after, attributes, max_length):
    text = " ".join([*before, "Ana", *after])
    start = len(" ".join(before)) + bool(before)
    row = MENTION | {"text": text, "start": start, "end": start + 3}
    entity = ENTITY | {"description": "", "attributes": " ".join(attributes)}
    sequence = words(make(max_length=max_length)(pairs=[(row, [entity])]), 0, 0)
    first, second = sequence.removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
    full_sentences = f"{' '.join([*before, 'ana', *after])} . ana is", f"ana lima . {' '.join(attributes)} ."
    context, _, tail = first.rpartition(" . ana is")
    assert tail == ""
    assert "ana" in context.split()
    assert second.startswith("ana lima")
    assert f" {context} " in f" {full_sentences[0]} "
    assert full_sentences[1].replace(" . .", " .").startswith(second)
    full = len(full_sentences[0].split()) + len(full_sentences[1].replace(" . .", " .").rstrip().split()) + 3
    if not attributes:
        full = len(full_sentences[0].split()) + 3 + 3
    assert len(sequence.split()) == min(full, max_length)  # truncation must use all available tokens


def test_a_late_name_or_long_mention_takes_tokens_from_the_other_sentence():
    long_text = MENTION | {"text": "a " * 50 + "Ana", "start": 100, "end": 103}
    sequence = words(make(max_length=30, **ACCOUNT_OPTIONS)(pairs=[(long_text, [ACCOUNT])]), 0, 0)
    first, second = sequence.split(" [SEP] ")
    assert second == "@ anlima . the username of @ anlima who lives in porto is ana lima [SEP]"
    assert first.endswith("ana . ana is")
    long_mention = MENTION | {"mention": "a b c d e f", "text": "a b c d e f wins", "start": 0, "end": 11}
    sequence = words(make(max_length=30)(pairs=[(long_mention, [ENTITY | {"attributes": "Sex. " * 30}])]), 0, 0)
    assert sequence.startswith("[CLS] a b c d e f . a b c d e f is [SEP] ana lima")


def test_mentions_and_names_of_any_length_give_sequences_that_fit():
    row = MENTION | {"mention": "a " * 500, "text": "a " * 500, "start": 0, "end": 1000}
    batch = make(max_length=20)(pairs=[(row, [ENTITY | {"name": "b " * 500}])])
    assert batch["pair_attention_mask"].sum() == 20


def test_a_mention_without_a_span_is_searched_in_the_text():
    text = "a " * 100 + "ANA wins " + "b " * 100
    for span in ({"start": -1, "end": -1}, {"start": 5000, "end": 5003}):
        sequence = words(make(max_length=40)(pairs=[(MENTION | {"text": text} | span, [ENTITY])]), 0, 0)
        assert sequence.split(" [SEP] ")[0].split().count("ana") == 2
    absent = make(max_length=40)(pairs=[(MENTION | {"text": "b " * 200, "start": -1, "end": -1}, [ENTITY])])
    assert words(absent, 0, 0).startswith("[CLS] b b b")


POSTS = [{"text": "she wins", "image": picture()}, {"text": "a river", "image": None}]
OWN = [ENTITY | {"images": [picture((9, 9, 9))]}, ENTITY | {"name": "river", "images": [picture()]}]
CONTEXTS = ["ana lima . runner . sex : female .", "river . runner . sex : female ."]


def examples(processor, partners):
    """Returns (form, post, entity, label, sentences) of every example."""
    batch = processor(posts=POSTS, entities=OWN, partners=partners)
    columns = [batch[name].tolist() for name in ("form_ids", "post_index", "entity_index", "labels")]
    texts = [words(batch, row, name="input_ids") for row in range(len(batch["input_ids"]))]
    return [(*numbers, text) for *numbers, text in zip(*columns, texts, strict=True)]


def test_pretraining_examples_are_those_of_the_paper():
    """Covers the examples of §3.3 for a matching post and one paired with another post."""
    assert examples(make_with_images(swap_roles=False), [0, 0]) == [
        # the text of a sentence and the entity image of the next one
        (0, 0, 0, 0, "[CLS] she wins [SEP] IMG [SEP]"),
        (0, 1, 0, 1, "[CLS] a river [SEP] IMG [SEP]"),
        # the entity context of a sentence and the image of the next one
        (1, 0, 0, 0, f"[CLS] {CONTEXTS[0]} [SEP] IMG [SEP]"),
        (1, 0, 1, 1, f"[CLS] {CONTEXTS[1]} [SEP] IMG [SEP]"),
        (2, 0, 0, 0, f"[CLS] she wins [SEP] {CONTEXTS[0]} [SEP]"),
        (2, 1, 0, 1, f"[CLS] a river [SEP] {CONTEXTS[0]} [SEP]"),
        (3, 0, 0, 0, f"[CLS] she wins IMG [SEP] {CONTEXTS[0]} IMG [SEP]"),
        (3, 1, 0, 1, f"[CLS] a river [SEP] {CONTEXTS[0]} IMG [SEP]"),
    ]


def test_swapping_roles_doubles_the_examples():
    plain, doubled = examples(make_with_images(swap_roles=False), [1, 0]), examples(make_with_images(), [1, 0])
    assert len(doubled) == 2 * len(plain)
    assert doubled[::2] == plain
    for (*numbers, text), (*same, swapped) in zip(doubled[::2], doubled[1::2], strict=True):
        assert numbers == same
        first, second = text.removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
        assert swapped == f"[CLS] {second} [SEP] {first} [SEP]"


@pytest.mark.parametrize(
    ("tasks", "forms"),
    [
        (["mixed"], {0, 1}),
        (["mixed", "text"], {0, 1, 2}),
        (["text"], {2}),
        (["mixed", "text", "multimodal"], {0, 1, 2, 3}),
    ],
)
def test_tasks_determine_the_forms(tasks, forms):
    assert {example[0] for example in examples(make_with_images(pretraining_tasks=tasks), [0, 1])} == forms


def test_an_example_about_a_missing_image_is_left_out():
    batch = make_with_images(pretraining_tasks=["mixed"], swap_roles=False)(posts=POSTS, entities=OWN, partners=[0, 1])
    assert batch["form_ids"].tolist() == [0, 0, 1]
    blind = make_with_images(pretraining_tasks=["mixed"])(posts=POSTS[1:], entities=[ENTITY], partners=[0])
    assert len(blind["input_ids"]) == 0
    model = PfmelForPreTraining(tiny_config())
    assert model(**blind).loss.item() == 0


def test_pretraining_uses_the_images_of_its_rows():
    features = [torch.ones(4), 2 * torch.ones(4)]
    posts = [post | {"image_features": f} for post, f in zip(POSTS, features, strict=True)]
    batch = make_with_images()(posts=posts, entities=OWN, partners=[0, 1])
    torch.testing.assert_close(batch["post_image_features"], torch.stack(features))
    assert batch["entity_pixel_values"].shape == (2, 3, 8, 8)
    positions, ids = batch["image_positions"], batch["form_ids"]
    assert ((positions >= 0).sum(1) == torch.tensor([1, 1, 0, 2])[ids]).all()


def tiny_config():
    text = {"model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    return PfmelConfig(text_config=text, vision_config=vision, train_vision=True)


def test_the_models_accept_the_batches():
    processor = make_with_images(max_length=60)
    pairs = [(MENTION | {"image": picture()}, [OWN[0], ENTITY]), (MENTION, [OWN[1]])]
    model = PfmelModel(tiny_config())
    out = model(**processor(pairs=pairs), labels=torch.tensor([1, 0]))
    out.loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert torch.isfinite(out.scores).tolist() == [[True, True], [True, False]]
    model = PfmelForPreTraining(tiny_config())
    out = model(**processor(posts=POSTS, entities=OWN, partners=[1, 1]))
    assert set(out.task_losses) == {"mixed", "text", "multimodal"}
    assert processor.images([picture()]).shape == (1, 3, 8, 8)


def test_options_survive_saving(tmp_path):
    options = {
        "max_length": 77,
        "mention_tail": ", {mention}",
        **ACCOUNT_OPTIONS,
        "use_images": True,
        "max_entity_images": 2,
        "pretraining_tasks": ["mixed"],
        "swap_roles": False,
    }
    processor = make_with_images(**options)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, PfmelProcessor)
    assert {name: getattr(loaded, name) for name in options} == options
    pairs = [(MENTION | {"image": picture()}, [ACCOUNT])]
    for name, tensor in processor(pairs=pairs).items():
        torch.testing.assert_close(loaded(pairs=pairs)[name], tensor)


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"pretraining_tasks": ["mixd"]}, "mixd"),
        ({"pretraining_tasks": []}, "pretraining_tasks"),
        ({"use_images": False, "pretraining_tasks": ["mixed"]}, "use_images"),
        ({"max_length": 5}, "max_length=5"),
        ({"max_entity_images": 0}, "max_entity_images=0"),
    ],
)
def test_impossible_options_are_refused(options, words_):
    with pytest.raises(ValueError, match=words_):
        make_with_images(**options)


def test_the_maximum_length_of_the_tokenizer_is_a_limit():
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 128
    with pytest.raises(ValueError, match="at most 126"):
        PfmelProcessor.from_parts(tokenizer)


def test_wrong_arguments_are_refused():
    processor = make()
    for arguments in ({"mentions": [MENTION]}, {"entities": [ENTITY]}):
        with pytest.raises(ValueError, match="pairs="):
            processor(**arguments)
    with pytest.raises(ValueError, match="partners="):
        processor(posts=POSTS, entities=OWN)
    with pytest.raises(ValueError, match="'location'"):
        make(entity_template="{name} of {location}")(pairs=[(MENTION, [ENTITY])])


def test_braces_in_a_text_are_text():
    sequence = words(make()(pairs=[(MENTION | {"text": "{name} {0}"}, [ENTITY | {"name": "{text}"}])]), 0, 0)
    assert sequence.count("[UNK]") > 5
