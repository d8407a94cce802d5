"""Tests that every method reads the text around a mention, knows which occurrence is meant, and reads all of an entity."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from transformers import AutoProcessor

import hf_mel  # noqa: F401 (registers the methods)
from hf_mel.data.posts import entity_as_post
from hf_mel.inference.probe import unread_columns, unread_columns_in_pairs
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking.linker import EntityLinker
from hf_mel.modeling.bi_encoder import BiEncoderProcessor
from hf_mel.modeling.context_rnn import ContextRnnProcessor
from hf_mel.modeling.cross_encoder import CrossEncoderProcessor
from hf_mel.modeling.ghmfc import GhmfcProcessor
from hf_mel.modeling.imn import ImnProcessor
from hf_mel.modeling.mimic import MimicConfig, MimicModel, MimicProcessor
from hf_mel.modeling.mm_nel import MmNelProcessor
from hf_mel.modeling.mmel import MmelProcessor
from hf_mel.modeling.modal_fusion import ModalFusionProcessor
from hf_mel.modeling.pfmel import PfmelProcessor
from hf_mel.protocols import LimitsTexts, post_columns
from hf_mel.schema import entity_features
from hf_mel.training.tokenizer import train_wordpiece

TEXTS = [
    "the mayor spoke at noon while rain fell on Accra and Tokyo",
    "Georgia is a state",
    "加纳首都阿克拉",
    "أكرا مدينة",
]
ENTITY = {
    "entity_id": "Q1",
    "name": "Accra",
    "aliases": ["Ankara", "Akkra"],
    "description": "capital of Ghana",
    "attributes": "Country: Ghana.",
    "images": [],
}
LIMITS = {
    ContextRnnProcessor: {"context_words": 30},
    BiEncoderProcessor: {"max_length": 40},
    CrossEncoderProcessor: {"max_length": 50},
    GhmfcProcessor: {"max_length": 40},
    MimicProcessor: {"max_length": 40},
    ModalFusionProcessor: {"max_length": 40},
    ImnProcessor: {"max_length": 40},
    MmelProcessor: {"max_length": 50},
    PfmelProcessor: {"max_length": 50},
    MmNelProcessor: {"context_words": 30},
}
#: Processors of retrievers that read the rows of entities.
OF_RETRIEVERS = (
    BiEncoderProcessor,
    GhmfcProcessor,
    MimicProcessor,
    ModalFusionProcessor,
)
#: Processors that tell the mention by the place of its words.
WITHOUT_MARKS = (ContextRnnProcessor, MmNelProcessor)
METHODS = pytest.mark.parametrize("method", LIMITS)
MARKING_METHODS = pytest.mark.parametrize("method", [method for method in LIMITS if method not in WITHOUT_MARKS])


@pytest.fixture(scope="module")
def tokenizer():
    extra = ["Ankara Akkra capital of Ghana", "Country: Ghana. Mention Context Entity is", "wort " * 3, "İstanbul"]
    return train_wordpiece([*TEXTS, *extra], 600)


def make(method, tokenizer, **options):
    return method.from_parts(tokenizer, **(LIMITS[method] | options))


def reads(processor, text, mention, start=-1, end=-1):
    """The words that a processor reads of a mention."""
    row = {"mention": mention, "text": text, "start": start, "end": end, "image": None}
    if isinstance(processor, (*OF_RETRIEVERS, ImnProcessor)):
        ids = processor(mentions=[row])["mention_input_ids"][0]
    else:
        batch = processor(pairs=[(row, [ENTITY])])
        ids = batch["pair_word_ids"][0] if "pair_word_ids" in batch else batch["pair_input_ids"][0, 0]
    return " ".join(processor.tokenizer.convert_ids_to_tokens(ids[ids > 0].tolist())).replace(" ##", "")


def tensors_of_entity(processor, entity):
    if isinstance(processor, OF_RETRIEVERS):
        return processor(entities=[entity])
    if isinstance(processor, ImnProcessor):
        return processor(posts=[entity_as_post(entity, post_columns(processor))])
    return processor(pairs=[({"mention": "A", "text": "A", "start": 0, "end": 1}, [entity])])


@METHODS
def test_the_words_beside_a_late_mention_are_read(tokenizer, method):
    processor = make(method, tokenizer)
    filler = "the mayor spoke at noon while rain fell " * 20
    accra, tokyo = (f"{filler}in {city} Georgia" for city in ("Accra", "Tokyo"))
    start = len(filler) + len("in Accra ")
    read = [reads(processor, text, "Georgia", start, start + len("Georgia")) for text in (accra, tokyo)]
    contexts = [text.partition("entity : ")[0].partition("[SEP] accra")[0] for text in read]  # without a candidate
    assert [("accra" in text, "tokyo" in text) for text in contexts] == [(True, False), (False, True)]


@METHODS
def test_another_occurrence_has_another_window(tokenizer, method):
    processor = make(method, tokenizer)
    text = "Georgia tokyo " + "the rain fell " * 30 + "Georgia state"
    second = text.rindex("Georgia")
    first_window = reads(processor, text, "Georgia", 0, 7)
    assert reads(processor, text, "Georgia") == first_window  # without offsets, the first occurrence counts
    second_window = reads(processor, text, "Georgia", second, second + 7)
    assert [("tokyo" in text, "state" in text) for text in (first_window, second_window)] == [(1, 0), (0, 1)]


@MARKING_METHODS
def test_the_occurrence_is_marked_in_a_text_that_fits(tokenizer, method):
    processor = make(method, tokenizer)
    text = "Georgia is not Georgia"
    assert "« georgia » is not georgia" in reads(processor, text, "Georgia", 0, 7)
    assert "georgia is not « georgia »" in reads(processor, text, "Georgia", 15, 22)
    assert "«" not in reads(processor, text, "Tokyo")  # a mention that is not in its text


@METHODS
@pytest.mark.parametrize(
    ("text", "mention"),
    [
        ("加纳首都阿克拉" * 30 + "东京" + "加纳首都" * 30, "东京"),
        ("أكرا مدينة " * 30 + "طوكيو " + "مدينة " * 60, "طوكيو"),
        ("Tokyo " + "rain " * 100, "Tokyo"),
        ("rain " * 100 + "Tokyo", "Tokyo"),
        ("İ" * 50 + " rain" * 50 + " Tokyo", "tokyo"),  # lower() makes two characters of this letter
    ],
    ids=["Chinese", "Arabic", "first", "last", "Turkish"],
)
def test_the_mention_is_always_in_the_window(method, text, mention):
    tokenizer = train_wordpiece([text, *TEXTS, "Mention Context Entity . :"], 300)
    processor = make(method, tokenizer)
    tokens = " ".join(tokenizer.tokenize(mention))
    read = " ".join(tokenizer.tokenize(reads(processor, text, mention)))
    # MIMIC and the rerankers also name the mention apart from its text.
    named = {**dict.fromkeys(OF_RETRIEVERS, 1), CrossEncoderProcessor: 1, MmelProcessor: 1, PfmelProcessor: 1}
    assert read.count(tokens) >= 1 + named.get(method, 0)
    if method not in WITHOUT_MARKS:
        assert f"« {tokens} »" in read


@METHODS
def test_a_mention_longer_than_the_window_fits(tokenizer, method):
    processor = make(method, tokenizer)
    mention = "Georgia " * 80
    for text in (mention, f"rain fell {mention} rain"):
        row = {"mention": mention, "text": text, "start": text.index(mention), "end": text.index(mention) + 640}
        assert "georgia" in reads(processor, **row)
        if method not in WITHOUT_MARKS:  # they do not have `max_length`
            ids = processor.tokenizer(reads(processor, **row), add_special_tokens=False)["input_ids"]
            assert len(ids) <= processor.max_length


@METHODS
def test_every_column_of_an_entity_is_read(tokenizer, method):
    processor = make(method, tokenizer, **({"max_length": 90} if "max_length" in LIMITS[method] else {}))
    columns = ["name", "aliases", "description", "attributes"]
    if isinstance(processor, (*OF_RETRIEVERS, ImnProcessor)):
        assert unread_columns(processor, columns, posts=isinstance(processor, ImnProcessor)) == []
    else:
        assert unread_columns_in_pairs(processor, columns) == []
    bare = {name: ENTITY[name] for name in ("entity_id", "name")}
    empty = bare | {"aliases": [], "description": None, "attributes": ""}
    for name, tensor in tensors_of_entity(processor, bare).items():
        assert torch.equal(tensor, tensors_of_entity(processor, empty)[name])


@METHODS
def test_a_processor_saved_before_reads_what_it_read(tokenizer, method, tmp_path):
    """Old folders have no fields for marks and columns, and their templates are saved."""
    make(method, tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    config = json.loads(path.read_text())
    for field in ("mention_marks", "entity_columns", "fact_columns"):
        config.pop(field, None)
    old = {
        BiEncoderProcessor: {
            "mention_template": "{mention} [SEP] {text}",
            "entity_template": "{name} [SEP] {attributes}",
        },
        CrossEncoderProcessor: {"mention_template": "{mention} | {text}", "entity_template": "{name}. {description}"},
        GhmfcProcessor: {"mention_template": "{text}", "entity_template": "{name}. {attributes}"},
        ModalFusionProcessor: {"mention_template": "{text}", "entity_template": "{name}. {attributes}"},
        MimicProcessor: {"mention_template": "{mention} [SEP] {text}", "entity_template": "{name} [SEP] {attributes}"},
        ImnProcessor: {"mention_template": "{text}"},
        MmelProcessor: {"entity_template": "name_attributes"},
        PfmelProcessor: {"entity_template": "{name}. {description}. {attributes}."},
        ContextRnnProcessor: {"fact_columns": ["description", "attributes"]},
        MmNelProcessor: {},
    }[method]
    path.write_text(json.dumps(config | old))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, method)
    expected = {
        BiEncoderProcessor: "[CLS] georgia [SEP] rain in georgia [SEP]",
        CrossEncoderProcessor: "[CLS] georgia | rain in georgia [SEP] accra . capital of ghana [SEP]",
        GhmfcProcessor: "[CLS] rain in georgia [SEP]",
        ModalFusionProcessor: "[CLS] rain in georgia [SEP]",
        MimicProcessor: "[CLS] georgia [SEP] rain in georgia [SEP]",
        ImnProcessor: "[CLS] rain in georgia [SEP]",
        MmelProcessor: "[CLS] mention : georgia . context : rain in georgia . entity : accra",
        PfmelProcessor: "[CLS] rain in georgia . georgia is [SEP] accra . capital of ghana . country : ghana . [SEP]",
        ContextRnnProcessor: "rain in georgia",
        MmNelProcessor: "rain in georgia",
    }[method]
    assert reads(processor, "rain in Georgia", "Georgia").startswith(expected)
    other = ENTITY | {"aliases": []}
    for name, tensor in tensors_of_entity(processor, ENTITY).items():
        assert torch.equal(tensor, tensors_of_entity(processor, other)[name])


@METHODS
def test_a_processor_tells_how_much_it_leaves_out(tokenizer, method):
    processor = make(method, tokenizer)
    assert isinstance(processor, LimitsTexts)
    rows = [
        {"mention": "Accra", "text": text, "start": -1, "end": -1}
        for text in ("rain in Accra", "rain fell " * 20 + "in Accra")
    ]
    if isinstance(processor, (*OF_RETRIEVERS, ImnProcessor)):
        short, long = processor.num_left_out(mentions=rows)
        one, same = rows[1], rows[1] | {"text": "rain " + rows[1]["text"]}
        assert processor.num_left_out(mentions=[one, same]) == [long, long + 1]
        texts = {"posts": [{"text": "rain"}, {"text": "rain " * 50}]}
        if isinstance(processor, OF_RETRIEVERS):
            texts = {"entities": [ENTITY, ENTITY | {"attributes": "rain " * 50}]}
        counts = processor.num_left_out(**texts)
        assert counts[0] == 0 < counts[1]
    else:
        short, long, also_long = processor.num_left_out(pairs=[(rows[0], [ENTITY]), (rows[1], [ENTITY, ENTITY])])
        assert long == also_long
    assert short == 0 < long


def test_linking_tells_apart_what_the_fields_and_the_places_tell_apart(tokenizer):
    """Two entities of one name, two endings of a long text, and two occurrences of a mention have other scores."""
    text_config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config |= {"intermediate_size": 32, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = MimicModel(MimicConfig(text_config=text_config, units=["text"], text_dim=8)).eval()
    processor = make(MimicProcessor, tokenizer)
    descriptions = ["state in the United States", "republic in Western Asia"]
    rows = [
        {"entity_id": f"Q{k}", "name": "Georgia", "aliases": aliases, "description": descriptions[k % 2]}
        | {"attributes": "", "images": []}
        for k, aliases in enumerate(([], [], ["Sakartvelo"]))
    ]
    kb = KnowledgeBase.build(
        datasets.Dataset.from_list(rows, features=entity_features()), model, processor, progress=False
    )
    linker = EntityLinker(model, processor, kb)

    def scores(text, **place):
        result = linker(text=text, mention="Georgia", **place)
        return [candidate.score for candidate in sorted(result.candidates, key=lambda c: c.entity_id)]

    late = "rain fell at noon " * 30
    of_accra, of_tokyo = scores(f"{late}Georgia in Accra"), scores(f"{late}Georgia in Tokyo")
    assert len(set(of_accra)) == 3
    assert of_accra != of_tokyo
    twice = "Georgia is not Georgia"
    assert scores(twice, start=0, end=7) == scores(twice) != scores(twice, start=15, end=22)
