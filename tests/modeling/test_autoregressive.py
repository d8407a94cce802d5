"""Tests of GENRE and "Autoregressive": scores token by token, an LSTM in NumPy, and search in a trie against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from hf_mel.modeling.autoregressive import (
    AutoregressiveConfig,
    AutoregressiveModel,
    AutoregressiveProcessor,
    NameTrie,
    modeling_autoregressive,
)
from hf_mel.protocols import Reranker
from hf_mel.training.tokenizer import train_wordpiece

START, END, VOCAB = 0, 1, 6


def make_tokenizer():
    return train_wordpiece(["a b c d e f g h i j START END [ _ ]"], 100)


BART = {
    "model_type": "bart",
    "vocab_size": VOCAB,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "pad_token_id": 5,
    "init_std": 0.6,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
KINDS = {
    "genre": {"text_config": BART},
    "autoregressive": {"text_config": BERT, "name_decoder": "lstm", "correction": True, "dropout": 0.0},
}
#: Three names that share prefixes, one of which is the beginning of another.
NAMES = [[START, 2, END], [START, 2, 3, END], [START, 4, 2, 3, 3, END], [START, 4, 3, END]]


def build(kind, seed=0, **fields):
    torch.manual_seed(seed)
    model = AutoregressiveModel(AutoregressiveConfig(**KINDS[kind] | fields)).eval()
    with torch.no_grad():  # zero biases would hide a part that is not applied
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.double()


def tensors(counts=(3, 1, 4), labels=(1, -100, 2), extra=0):
    draw = np.random.default_rng(0)
    lengths = [5, 3, 6]
    batch = {
        "pair_input_ids": torch.full((3, 6 + extra), 5),
        "pair_attention_mask": torch.zeros(3, 6 + extra, dtype=torch.long),
        "pair_ends": torch.tensor([[1, 3], [1, 1], [2, 4]]),
        "pair_mask": torch.zeros(3, 4, dtype=torch.bool),
        "pair_entity": torch.full((3, 4), -1),
        "pair_name_ids": torch.full((len(NAMES), 6 + extra), -1),
    }
    for m, length in enumerate(lengths):
        batch["pair_input_ids"][m, :length] = torch.from_numpy(draw.integers(2, 5, length))
        batch["pair_attention_mask"][m, :length] = 1
        batch["pair_mask"][m, : counts[m]] = True
        batch["pair_entity"][m, : counts[m]] = torch.from_numpy(draw.permutation(len(NAMES))[: counts[m]])
    for row, name in zip(batch["pair_name_ids"], NAMES, strict=True):
        row[: len(name)] = torch.tensor(name)
    return batch, torch.tensor(labels)


def log_softmax(x):
    return x - math.log(sum(math.exp(v - max(x)) for v in x)) - max(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Direct:
    """One mention, one prefix and one step at a time."""

    def __init__(self, model, batch, m):
        self.model, length = model, int(batch["pair_attention_mask"][m].sum())
        self.ids = batch["pair_input_ids"][m : m + 1, :length]
        self.ends = batch["pair_ends"][m].tolist()
        self.w = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def layer(self, name, x):
        return self.w[f"name_decoder.{name}.weight"] @ x + self.w[f"name_decoder.{name}.bias"]

    def lstm(self, prefix):
        """Returns the states after each token of a prefix, the last cell and the fed vector, by four gates in NumPy."""
        states = self.model.text_model(input_ids=self.ids).last_hidden_state[0].detach().numpy()
        both = np.concatenate([states[k] for k in self.ends])
        hidden, cell, fed = np.split(self.layer("start_fc2", np.maximum(0, self.layer("start_fc1", both))), 3)
        table = self.model.text_model.get_input_embeddings().weight.detach().numpy()
        w, out = {k.removeprefix("name_decoder.lstm."): v for k, v in self.w.items() if ".lstm." in k}, []
        for token in prefix:
            x = np.concatenate([table[token], fed])
            gates = w["weight_ih_l0"] @ x + w["bias_ih_l0"] + w["weight_hh_l0"] @ hidden + w["bias_hh_l0"]
            enters, forgets, new, leaves = np.split(gates, 4)
            cell = sigmoid(forgets) * cell + sigmoid(enters) * np.tanh(new)
            hidden = sigmoid(leaves) * np.tanh(cell)
            out.append(hidden)
        return out, cell, fed, table

    def next_log_probabilities(self, prefix):
        if self.model.config.name_decoder == "pretrained":
            out = self.model.text_model(input_ids=self.ids, decoder_input_ids=torch.tensor([prefix]), use_cache=False)
            return log_softmax(out.logits[0, -1].detach().numpy())
        states, _, _, table = self.lstm(prefix)
        x = self.layer("dense", states[-1])
        x = x * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x]))
        x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
        x = x * self.w["name_decoder.norm.weight"] + self.w["name_decoder.norm.bias"]
        return log_softmax(table @ x + self.w["name_decoder.bias"])

    def token_log_probabilities(self, name):
        return [self.next_log_probabilities(name[:k])[name[k]] for k in range(1, len(name))]

    def correction(self, name):
        if not self.model.config.correction:
            return 0.0
        _, cell, fed, _ = self.lstm(name[:-1])
        return float(
            self.layer("correct_fc2", np.maximum(0, self.layer("correct_fc1", np.concatenate([fed, cell]))))[0]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_loss_equal_those_of_single_tokens(kind, monkeypatch):
    model, (batch, labels) = build(kind), tensors()
    out = model(**batch, labels=labels)
    smoothing, tokens, classified = model.config.label_smoothing, [], []
    for m, gold in enumerate(labels.tolist()):
        direct, corrections = Direct(model, batch, m), []
        for c, number in enumerate(batch["pair_entity"][m].tolist()):
            if number < 0:
                assert torch.isneginf(out.scores[m, c])
                continue
            name = NAMES[number]
            values = direct.token_log_probabilities(name)
            corrections.append(direct.correction(name))
            assert out.scores[m, c].item() == pytest.approx(np.mean(values) + corrections[-1], abs=1e-5)
            if c == gold:
                every = [direct.next_log_probabilities(name[:k]) for k in range(1, len(name))]
                tokens += [
                    -(1 - smoothing) * value - smoothing * np.mean(row)
                    for value, row in zip(values, every, strict=True)
                ]
        if gold >= 0:
            classified.append(-log_softmax(np.array(corrections))[gold])
    expected = np.mean(tokens) + (np.mean(classified) if model.config.correction else 0)
    assert out.loss.item() == pytest.approx(expected, abs=1e-5)
    # Blocks, padding and partners change nothing.
    monkeypatch.setattr(modeling_autoregressive, "_BLOCK_NAMES", (2, 2))
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch, labels=labels).loss.double(), out.loss.double(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(model(**tensors(extra=2)[0]).scores, out.scores.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_search_in_a_trie_is_the_order_of_enumeration(kind):
    model, (batch, _) = build(kind), tensors()
    with torch.no_grad():
        memory = model.encode(batch["pair_input_ids"], batch["pair_attention_mask"], batch["pair_ends"])
    trie = NameTrie([*NAMES, NAMES[1]])
    found = model.generate_names(memory, trie, num_beams=4)
    for m, beams in enumerate(found):
        direct = Direct(model, batch, m)
        scores = {n: np.mean(direct.token_log_probabilities(name)) for n, name in enumerate([*NAMES, NAMES[1]])}
        assert sorted(number for number, _ in beams) == [0, 1, 2, 3, 4]  # two entities share a name
        values = [score for _, score in beams]
        assert values == sorted(values, reverse=True)
        for number, score in beams:
            assert score == pytest.approx(scores[number], abs=1e-5)
        # The probabilities of names of one trie exclude each other.
        assert sum(math.exp(sum(direct.token_log_probabilities(name))) for name in NAMES) <= 1
    greedy = model.generate_names(memory, trie, num_beams=1)
    assert all(len(beams) <= 2 for beams in greedy)


def test_a_trie_knows_what_follows():
    trie = NameTrie(NAMES)
    assert trie.next_tokens([]) == [START]
    assert trie.next_tokens([START]) == [2, 4]
    assert trie.next_tokens([START, 2]) == [END, 3]
    assert trie.next_tokens([START, 2, END]) == trie.next_tokens([START, 5]) == []
    for prefix in itertools.product(range(VOCAB), repeat=3):
        expected = {name[3] for name in NAMES if tuple(name[:3]) == prefix and len(name) > 3}
        assert trie.next_tokens(prefix) == sorted(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_lowers_the_loss_and_reaches_every_parameter(kind):
    model, (batch, labels) = build(kind).train(), tensors()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant that a softmax cancels has no gradient.
    constant = ("k_proj.bias", "key.bias", "correct_fc2.bias")
    assert [name for name in silent if not name.endswith(constant)] == []
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model(**batch, labels=labels).loss < loss
    assert isinstance(model, Reranker)


def test_an_encoder_gets_a_decoder_of_its_kind(tmp_path):
    encoder = BertModel(BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"} | {"num_hidden_layers": 2}))
    encoder.save_pretrained(tmp_path / "text")
    text = str(tmp_path / "text")
    model = AutoregressiveModel.from_backbones(text, num_encoder_layers=1, num_decoder_layers=3).eval()
    assert len(model.text_model.encoder.encoder.layer) == 1
    assert len(model.text_model.decoder.bert.encoder.layer) == 3
    assert text not in model.config.to_json_string()
    copied = model.text_model.encoder.state_dict()
    assert all(torch.equal(v, copied[k]) for k, v in encoder.state_dict().items() if k in copied)
    assert any(name.startswith("text_model.encoder.") for name, _ in model.named_parameters())
    batch, _ = tensors()
    model.save_pretrained(tmp_path / "model")
    again = AutoregressiveModel.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(again(**batch).scores, model(**batch).scores)
    lstm = AutoregressiveModel.from_backbones(text, name_decoder="lstm")
    assert not hasattr(lstm.name_decoder, "correct_fc1")
    assert torch.equal(lstm.text_model.get_input_embeddings().weight, encoder.get_input_embeddings().weight)


def test_mentions_without_candidates_or_golds():
    model, (batch, labels) = build("autoregressive").train(), tensors()
    loss = model(**batch, labels=torch.full_like(labels, -100)).loss
    loss.backward()
    assert loss.item() == 0
    batch["pair_mask"][:] = False
    out = model(**batch, labels=labels)
    assert out.loss.item() == 0
    assert torch.isneginf(out.scores).all()


def test_the_processor_marks_the_mention_and_keeps_it_in_the_window():
    processor = AutoregressiveProcessor.from_parts(make_tokenizer(), mention_marks=None, max_length=8)
    tokenizer = processor.tokenizer
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    text = " ".join(words)
    mention = {"text": text, "mention": "g", "start": text.index("g"), "end": text.index("g") + 1, "context_id": "c"}
    entities = [{"name": "a b"}, {"name": "c"}, {"name": "a b"}]
    batch = processor(pairs=[(mention, entities)])
    window = batch["pair_input_ids"][0].tolist()
    full = tokenizer(text)["input_ids"]
    assert len(window) == 8
    assert (window[0], window[-1]) == (full[0], full[-1])
    first, last = batch["pair_ends"][0].tolist()
    assert window[first : last + 1] == tokenizer("g", add_special_tokens=False)["input_ids"]
    assert batch["pair_entity"].tolist() == [[0, 1, 0]]
    assert [i for i in batch["pair_name_ids"][1].tolist() if i >= 0] == tokenizer("c")["input_ids"]
    missing = {"text": "a b", "mention": "c", "start": -1, "end": -1}
    marked = AutoregressiveProcessor.from_parts(make_tokenizer())._marked([missing, mention])
    assert marked[0][0] == "[START_ENT] c [END_ENT] a b"
    assert marked[1][0][slice(*marked[1][1])] == "[START_ENT] g [END_ENT]"
    with_start = AutoregressiveProcessor.from_parts(make_tokenizer(), start_token=tokenizer.sep_token)
    assert with_start.name_tokens(["c"]) == [[tokenizer.sep_token_id, *tokenizer("c")["input_ids"]]]
    described = AutoregressiveProcessor.from_parts(make_tokenizer(), name_template="{name} ({description})")
    with pytest.raises(ValueError, match="'description'"):
        described(pairs=[(mention, entities)])
    with pytest.raises(ValueError, match="Give pairs="):
        processor(entities=entities)
    assert processor.num_left_out(pairs=[(mention, entities)]) == [len(full) - 8] * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name_decoder": "tree"}, "name_decoder='tree'"),
        ({"correction": True}, "lstm"),
        ({"name_decoder": "lstm"}, "'bart'"),
        ({"text_config": BERT}, "'bert'"),
        ({"label_smoothing": 1}, "label_smoothing=1"),
        ({"num_decoder_layers": 0}, "num_decoder_layers=0"),
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        AutoregressiveConfig(**fields)
