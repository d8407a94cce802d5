"""Tests of MM-nel's processor: words, documents, entities, images, GloVe's format and saving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BertConfig, BertModel, PreTrainedTokenizerFast

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.modeling.mm_nel import MmNelModel, MmNelProcessor, processing_mm_nel
from hf_mel.modeling.mm_nel.glove_mm_nel import glove_tokenizer, glove_vectors
from hf_mel.protocols import MelProcessor

WORDS = [
    "wayne",
    "bruce",
    "gordon",
    "meets",
    "in",
    "gotham",
    "hero",
    "city",
    "police",
    "the",
    *(f"w{i}" for i in range(40)),
]
TEXT = "Bruce meets Gordon, in the unheard-of Gotham city."


@pytest.fixture
def glove(tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text("".join(f"{word} {k}.5 -{k}e-1 3\n" for k, word in enumerate(WORDS)))
    return str(file)


@pytest.fixture
def processor(glove):
    return MmNelProcessor.from_backbones(text=glove, use_images=True)


def picture(k):
    return Image.fromarray(np.full((6, 9, 3), (k, 255 - k, 7), dtype=np.uint8))


def mention(surface, text=TEXT, **more):
    start = text.find(surface)
    row = {"mention_id": surface, "text": text, "mention": surface, "start": start, "end": start + len(surface)}
    return {**row, "context_id": "a", "image": picture(99), **more}


def entity(key, name="Gotham", **more):
    return {"entity_id": key, "name": name, "description": "city", "attributes": "", "images": [], **more}


def visual(k=1, **more):
    return {"mention_id": f"v{k}", "modality": "image", "image": picture(k), "context_id": "a", **more}


def words(ids):
    return [WORDS[i - 2] for i in ids.tolist() if i >= 0]


def context_parts(batch, row):
    """Returns the words left of a mention, of the mention, and right of it."""
    start, stop = batch["pair_span"][row].tolist()
    return [
        words(part)
        for part in batch["pair_word_ids"][row].split([start, stop - start, batch["pair_word_ids"].shape[1] - stop])
    ]


def test_words_of_a_mention_and_of_its_context(processor):
    batch = processor(pairs=[(mention("Gordon"), []), (mention("Gotham city"), [])])
    assert context_parts(batch, 0) == [["bruce", "meets"], ["gordon"], ["in", "the", "gotham", "city"]]
    assert context_parts(batch, 1) == [["bruce", "meets", "gordon", "in", "the"], ["gotham", "city"], []]
    assert isinstance(processor, MelProcessor)


def test_half_of_the_window_is_on_each_side(glove):
    text = " ".join([*WORDS[10:30], "Gordon", *WORDS[30:]])
    narrow = MmNelProcessor.from_backbones(text=glove, context_words=6)
    assert context_parts(narrow(pairs=[(mention("Gordon", text), [])]), 0) == [WORDS[27:30], ["gordon"], WORDS[30:33]]
    none = MmNelProcessor.from_backbones(text=glove, context_words=0)
    assert context_parts(none(pairs=[(mention("Gordon", text), [])]), 0) == [[], ["gordon"], []]


def test_a_mention_without_a_span_is_searched_in_the_text(processor):
    lost = mention("Gordon", start=-1, end=-1)
    absent = mention("police", start=-1, end=-1)
    batch = processor(
        pairs=[(lost, []), (absent, []), ({**absent, "mention": "unknown"}, []), ({**lost, "text": ""}, [])]
    )
    assert context_parts(batch, 0) == [["bruce", "meets"], ["gordon"], ["in", "the", "gotham", "city"]]
    context = ["bruce", "meets", "gordon", "in", "the", "gotham", "city"]
    assert context_parts(batch, 1) == [[], ["police"], context]
    assert context_parts(batch, 2) == [[], [], context]
    assert context_parts(batch, 3) == [[], ["gordon"], []]


def test_distinct_entities_are_prepared_once(processor):
    long = " ".join(["w1"] * 100)
    gordon = entity("Q2", "Police Gordon the", description="hero", attributes=long, prior=0.25)
    batch = processor(
        pairs=[
            (mention("Gordon"), [gordon, entity("Q1")]),
            (mention("Gotham"), [entity("Q1", prior=0.5)]),
            (visual(), []),
        ]
    )
    assert batch["pair_entity"].tolist() == [[0, 1], [1, -1], [-1, -1]]
    assert batch["pair_mask"].tolist() == [[True, True], [True, False], [False, False]]
    assert batch["pair_prior"].tolist() == [[0.25, 0], [0.5, 0], [0, 0]]
    assert [words(ids) for ids in batch["pair_name_ids"]] == [["police", "gordon", "the"], ["gotham"]]
    assert [words(ids) for ids in batch["pair_fact_ids"]] == [["hero", *["w1"] * 63], ["city"]]


@pytest.mark.parametrize("most_read", [0, 2**15])
def test_texts_that_were_read_before_have_the_same_words(processor, glove, monkeypatch, most_read):
    monkeypatch.setattr(processing_mm_nel, "_MOST_READ", most_read)
    texts = ["Bruce Wayne", "unheard-of", "", "Gotham city", "Bruce Wayne", *(f"w{i} the w{i}" for i in range(9))]
    plain = MmNelProcessor.from_backbones(text=glove)._word_ids(texts)
    for order in (texts, texts[::-1], texts[3:]):
        words = processor._word_ids(order)
        assert [list(ids) for ids in words] == [list(plain[texts.index(text)]) for text in order]
        assert [list(ids) for ids in words] == [
            [processor.tokenizer.vocab[word] for word in text.lower().split() if word in WORDS] for text in order
        ]


def test_documents_are_grouped_by_document_id_or_context_id(processor):
    rows = [mention("Gordon"), mention("Gotham"), mention("Gordon", document_id="d"), visual(document_id="d")]
    rows += [mention("Gordon", context_id=None), mention("Gotham", context_id=""), visual(document_id="")]
    rows += [mention("Gordon", document_id="a")]
    assert processor(pairs=[(row, []) for row in rows])["pair_context"].tolist() == [0, 0, 1, 1, 2, 3, 0, 4]


def test_only_visual_mentions_and_their_candidates_have_images(processor):
    shown = entity("Q1", images=[picture(5), picture(6)])
    pairs = [
        (mention("Gordon"), [entity("Q3", images=[picture(8)])]),
        (visual(1), [shown, entity("Q2"), entity("Q4", images=[picture(1)])]),
        (visual(2, image=None), [shown]),
    ]
    batch = processor(pairs=pairs)
    assert batch["pair_visual"].tolist() == [False, True, True]
    assert batch["pair_mention_image"].tolist() == [-1, 0, -1]
    assert batch["pair_entity_image"].tolist() == [[-1] * 3, [1, -1, 0], [1, -1, -1]]
    expected = processor.images([picture(1), picture(5)])
    torch.testing.assert_close(batch["pair_pixel_values"], expected)
    assert expected.shape == (2, 3, 64, 64)

    vector = torch.randn(4)
    encoded = [
        (
            {**row, "image_features": None if row["image"] is None else vector},
            [{**candidate, "image_features": vector} for candidate in candidates],
        )
        for row, candidates in pairs
    ]
    batch = processor(pairs=encoded)
    assert batch["pair_image_features"].tolist() == [vector.tolist()]
    assert batch["pair_mention_image"].tolist() == [-1, 0, -1]
    assert "pair_pixel_values" not in batch
    with pytest.raises(ValueError, match="image_features"):
        processor(pairs=[encoded[1], pairs[2]])


def test_without_images(glove):
    batch = MmNelProcessor.from_backbones(text=glove)(pairs=[(visual(), [entity("Q1", images=[picture(1)])])])
    assert not [name for name in batch if "image" in name or "pixel" in name]


@pytest.mark.parametrize("pairs", [[], [(mention("Gordon"), [])], [(visual(), [])]], ids=["none", "text", "image"])
def test_mentions_without_candidates(processor, pairs, glove):
    batch = processor(pairs=pairs)
    assert batch["pair_mask"].shape == (len(pairs), 1)
    model = MmNelModel.from_backbones(text=glove, hidden_size=6, num_image_layers=1, intermediate_size=4).eval()
    out = model(**batch, labels=torch.full((len(pairs),), -100))
    assert torch.isneginf(out.scores).all()
    assert out.loss.item() == 0


def test_the_model_accepts_a_batch(processor, glove):
    model = MmNelModel.from_backbones(text=glove, hidden_size=6, num_image_layers=1, intermediate_size=4).eval()
    candidates = [entity(f"Q{k}", WORDS[k], images=[picture(40 * k)], prior=0.1 * k) for k in range(5)]
    pairs = [
        (mention("Gordon"), candidates),
        (visual(), candidates[1:]),
        (mention("Gotham", context_id="b"), candidates),
    ]
    with torch.no_grad():
        together = model(**processor(pairs=pairs)).scores
        alone = model(**processor(pairs=pairs[2:])).scores
    torch.testing.assert_close(together[2:], alone)
    assert together.isfinite().sum() == 14


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(visual(modality="sound"), [])], ["'v1'", "'sound'", "'image'"]),
        ([(mention("Gordon"), [entity("Q7", prior=-0.1)])], ["'Gordon'", "'Q7'", "-0.1"]),
        ([(mention("Gordon"), [entity("Q7", prior=float("nan"))])], ["'Q7'", "nan"]),
    ],
    ids=["modality", "prior", "nan"],
)
def test_bad_rows_are_refused(processor, pairs, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        processor(pairs=pairs)
    assert all(word in str(error.value) for word in words)


def test_bad_arguments_are_refused(processor):
    with pytest.raises(ValueError, match="pairs="):
        processor(mentions=[mention("Gordon")])
    with pytest.raises(ValueError, match="context_words=-1"):
        MmNelProcessor(processor.image_processor, processor.tokenizer, context_words=-1)
    with pytest.raises(ValueError, match="GloVe"):
        MmNelProcessor.from_backbones()


def test_the_format_of_glove(tmp_path):
    file = tmp_path / "vectors.txt"
    file.write_bytes("4 2\nthe 1 2\n. . . 3 4\nCafé 5 6 \nthe 7 8\r\nsize 9 -1e-2\n".encode())
    torch.testing.assert_close(
        glove_vectors(str(file)), torch.tensor([[0, 0], [0, 0], [1, 2], [3, 4], [5, 6], [9, -0.01]])
    )
    tokenizer = glove_tokenizer(str(file))
    assert tokenizer("the Café café size", add_special_tokens=False)["input_ids"] == [2, 4, tokenizer.unk_token_id, 5]
    lower = tmp_path / "lower.txt"
    lower.write_text("the 1\ncafé 2\n")
    assert glove_tokenizer(str(lower))("The CAFÉ", add_special_tokens=False)["input_ids"] == [2, 3]


@pytest.mark.parametrize(
    ("content", "row", "words"),
    [
        (b"the 1 2\nof 1\n", 2, "is not a word and 2 numbers"),
        (b"the 1 2\nof 1 x\n", 2, "x"),
        (b"the 1 2\nof 1 nan\n", 2, "nan or infinite"),
        (b"the 1 2\n\nof 1 2\n", 2, "is not a word"),
        (b"word\n", 1, "is not a word"),
        (b"the 1 2\n\xff\xfe 1 2\n", 2, "UTF-8"),
    ],
    ids=["short", "text", "nan", "empty", "no numbers", "bytes"],
)
def test_an_error_names_the_line(tmp_path, content, row, words):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        glove_vectors(str(file))
    assert f"{file}, row {row}: " in str(error.value)


def test_an_empty_file_is_refused(tmp_path):
    file = tmp_path / "bad.txt"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="no word vectors"):
        glove_tokenizer(str(file))


def test_words_from_a_transformers_model(tmp_path, processor):
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=60, **bert)).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    loaded = MmNelProcessor.from_backbones(text=str(tmp_path))
    assert context_parts(loaded(pairs=[(mention("Gordon"), [])]), 0)[1] == ["gordon"]


def test_save_and_load(tmp_path, processor):
    processor.context_words, processor.entity_words = 4, 2
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, MmNelProcessor)
    assert isinstance(loaded.tokenizer, PreTrainedTokenizerFast)
    pairs = [
        (mention("Gordon"), [entity("Q1", attributes="hero hero hero")]),
        (visual(), [entity("Q2", images=[picture(3)])]),
    ]
    before, after = processor(pairs=pairs), loaded(pairs=pairs)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name])
