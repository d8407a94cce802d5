"""Tests of plain text encoders as retrievers, from the files of an encoder to linked mentions of a museum's table."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, DistilBertConfig, DistilBertModel, ViTConfig
from transformers import ViTModel as VisionModel
from typer.testing import CliRunner

from hf_mel.cli import app
from hf_mel.errors import KnowledgeBaseError, MissingExtraError, UnknownModelError
from hf_mel.inference.checkpoints import load_reranker, load_retriever
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.training.tokenizer import train_wordpiece

#: An invented table of artists, as a museum would export it.
ARTISTS = """\
no;artist;dates;sex;placeOfBirth;link
1;"Orme, Ada";1801–1870;female;Lisbon;http://example.org/1
2;"Orme, Bo";born 1950;male;Oslo;http://example.org/2
3;"Falk, Cy";1755–1799;male;Rome, Italy;http://example.org/3
4;"Falk, Cy";born 1971;male;Cairo;http://example.org/4
5;"Ito, Dee";1900–1988;female;Kyoto;http://example.org/5
6;"Brun, Eva, the Elder";1610–1666;female;Ghent;http://example.org/6
7;"Brun, Eva, the Younger";1640–1702;female;Ghent;http://example.org/7
8;Sandoval;1850–1911;;;http://example.org/8
9;"Group Nine (Ito, Dee; Falk, Cy)";active 1960;;;http://example.org/9
10;"Lund, Finn";1888–1950;male;Bergen;http://example.org/10
"""
COLUMNS = ["id=no", "name=artist", "description=dates", "attributes=sex,placeOfBirth"]
SENTENCES = ["Falk left Rome in 1790.", "Ito painted the harbour of Kyoto.", "Eva Brun the Elder taught in Ghent."]
MENTIONS = ["Falk", "Ito", "Eva Brun the Elder"]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder with random weights, and without the pooling layer that nothing uses."""
    tokenizer = train_wordpiece([ARTISTS, *SENTENCES], 400)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, initializer_range=0.5, **SIZES)
    path = tmp_path_factory.mktemp("encoders") / "encoder"
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def texts(mention: str, sentence: str) -> str:
    return f"{mention} [SEP] {sentence.replace(mention, f'« {mention} »')}"


@torch.no_grad()
def states(folder, text: str) -> torch.Tensor:
    """The states [L, d] of a text, as transformers alone gives them."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_score_is_the_cosine_of_pooled_texts(folder, tmp_path, caplog, pooling):
    """Texts of other lengths in the batch change nothing, and the encoder's own way of pooling is followed."""
    caplog.set_level(logging.INFO, "hf_mel")
    copied = tmp_path / "encoder"
    AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(copied)
    AutoTokenizer.from_pretrained(folder).save_pretrained(copied)
    if pooling == "cls":
        (copied / "1_Pooling").mkdir()
        (copied / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    model, processor = load_retriever(copied, device="cpu")
    assert f"{copied} is a plain text encoder, which was not trained to link." in caplog.text
    mentions = [
        {"mention": mention, "text": sentence, "start": -1, "end": -1, "image": None}
        for mention, sentence in zip(MENTIONS, SENTENCES, strict=True)
    ]
    entities = [
        {
            "name": "Falk, Cy",
            "aliases": ["Cy Falk"],
            "description": "1755–1799",
            "attributes": "Sex: male.",
            "images": [],
        },
        {"name": "Ito", "aliases": [], "description": "", "attributes": "", "images": []},
    ]
    with torch.no_grad():
        encodings = model.encode_entities(**processor(entities=entities))
        scores = model.score(model.encode_mentions(**processor(mentions=mentions)), encodings)

    def vector(text):
        tokens = states(folder, text)
        return normalize(tokens.mean(0) if pooling == "mean" else tokens[0], dim=0)

    rows = torch.stack([vector(texts(m, s)) for m, s in zip(MENTIONS, SENTENCES, strict=True)])
    columns = torch.stack([vector("Falk, Cy [SEP] Cy Falk [SEP] 1755–1799 [SEP] Sex: male."), vector("Ito")])
    torch.testing.assert_close(scores, rows @ columns.T)
    assert {name: tuple(tensor.shape) for name, tensor in encodings.items()} == {"text_global": (2, 16)}
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for parameter in AutoModel.from_pretrained(folder, add_pooling_layer=False).parameters()
    )


def test_an_encoder_without_an_optional_pooling_layer_works(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    DistilBertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, processor = load_retriever(tmp_path, device="cpu")
    row = {"mention": "Ito", "text": "Ito", "start": 0, "end": 3, "image": None}
    assert model.encode_mentions(**processor(mentions=[row]))["text_global"].shape == (1, 16)


def test_what_is_no_complete_text_encoder_is_refused(folder, tmp_path):
    with pytest.raises(UnknownModelError, match="retrieves entities and does not rerank"):
        load_reranker(folder, device="cpu")
    sizes = {key: SIZES[key] for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")}
    VisionModel(ViTConfig(hidden_size=16, image_size=32, **sizes)).save_pretrained(tmp_path / "vision")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "vision")
    with pytest.raises(UnknownModelError, match=r"ViTModel.*neither a retriever nor a reranker"):
        load_retriever(tmp_path / "vision", device="cpu")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    (tmp_path / "part").mkdir()
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "part" / "config.json").write_text((folder / "config.json").read_text())
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "part")
    with pytest.raises(UnknownModelError, match=r"lack 1 of .*encoder\.layer\.1\.output\.dense\.bias"):
        load_retriever(tmp_path / "part", device="cpu")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "mute")
    with pytest.raises(UnknownModelError, match="has no tokenizer"):
        load_retriever(tmp_path / "mute", device="cpu")


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_a_museums_table_becomes_linked_sentences_in_one_command(folder, tmp_path):
    """The table is as it was exported. The ranking is that of the plain computation, also from a knowledge base."""
    (tmp_path / "artists.csv").write_text(ARTISTS, encoding="utf-8")
    rows = zip(SENTENCES, MENTIONS, strict=True)
    (tmp_path / "letters.tsv").write_text("Text\tWho\n" + "".join(f"{s}\t{m}\n" for s, m in rows), encoding="utf-8")
    columns = [option for column in COLUMNS for option in ("--column", column)]
    table = ["--entities", tmp_path / "artists.csv", *columns, "--ignore-other-columns", "--inverted-names"]
    letters = ["--input", tmp_path / "letters.tsv", "--column", "mention=who", "--top-k", 10, "--device", "cpu"]
    run("link", folder, *table, *letters, "--output", tmp_path / "linked.jsonl")
    lines = (tmp_path / "linked.jsonl").read_text()

    kb = tmp_path / "kb"
    done = run("kb", "build", folder, *table, "--device", "cpu", "--output", kb)
    assert "is a plain text encoder, which was not trained to link." in done.output
    run("link", folder, "--kb", kb, *letters, "--output", tmp_path / "from_kb.jsonl")
    assert (tmp_path / "from_kb.jsonl").read_text() == lines

    entities = KnowledgeBase(kb).rows(range(10))
    assert [entity["aliases"] for entity in entities[:3]] == [["Ada Orme"], ["Bo Orme"], ["Cy Falk"]]
    parts = [[e["name"], ", ".join(e["aliases"]), e["description"], e["attributes"]] for e in entities]
    vectors = [normalize(states(folder, " [SEP] ".join(filter(None, part))).mean(0), dim=0) for part in parts]
    for line, mention, sentence in zip(lines.splitlines(), MENTIONS, SENTENCES, strict=True):
        scores = torch.stack(vectors) @ normalize(states(folder, texts(mention, sentence)).mean(0), dim=0)
        candidates = json.loads(line)["linked"]["candidates"]
        order = scores.argsort(descending=True).tolist()
        assert [candidate["entity_id"] for candidate in candidates] == [entities[k]["entity_id"] for k in order]
        torch.testing.assert_close(torch.tensor([candidate["score"] for candidate in candidates]), scores[order])


def test_a_knowledge_base_belongs_to_its_encoder(folder, tmp_path):
    (tmp_path / "e.csv").write_text("id,name\n1,Ada\n")
    model, processor = load_retriever(folder, device="cpu")
    kb = KnowledgeBase.build(tmp_path / "e.csv", model, processor, progress=False)
    assert kb.info()["model"]["name"] == "encoder"
    kb.check_made_by(*load_retriever(folder, device="cpu"))
    other = tmp_path / "other"
    AutoTokenizer.from_pretrained(folder).save_pretrained(other)
    torch.manual_seed(1)
    BertModel(AutoModel.from_pretrained(folder).config).save_pretrained(other)
    with pytest.raises(KnowledgeBaseError, match="its weights differ"):
        kb.check_made_by(*load_retriever(other, device="cpu"))


def test_an_encoder_of_a_python_package_is_loaded(folder, tmp_path, monkeypatch):
    package = tmp_path / "package_of_an_encoder"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model").symlink_to(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "package:package_of_an_encoder/model"
    model, processor = load_retriever(name, device="cpu")
    (tmp_path / "e.csv").write_text("id,name\n1,Ada\n")
    kb = KnowledgeBase.build(tmp_path / "e.csv", model, processor, progress=False)
    assert kb.info()["model"]["name"] == name
    with pytest.raises(UnknownModelError, match="has no folder 'typo'"):
        load_retriever("package:package_of_an_encoder/typo")
    with pytest.raises(MissingExtraError, match="'no_such_package', which is not installed"):
        load_retriever("package:no_such_package/model")
