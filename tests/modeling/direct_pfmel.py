"""PFMEL written out one sequence at a time: tokens as a list, embeddings summed in NumPy, losses as printed.

The oracle of the batched model. Only BERT's encoder layers are shared with it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

CLS, SEP = "[CLS]", "[SEP]"


def sequence(first, second):
    """Tokens and segments of two sentences, each a list of token ids and image features (vectors)."""
    return [CLS, *first, SEP, *second, SEP], [0] * (len(first) + 2) + [1] * (len(second) + 1)


def log_odds(logits):
    return logits[0] - logits[1]


def logits(model, first, second, special):
    """The two logits of one sequence: `special` gives the ids of [CLS] and [SEP]."""
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    tokens, segments = sequence(first, second)
    rows = []
    for position, (token, segment) in enumerate(zip(tokens, segments, strict=True)):
        if isinstance(token, np.ndarray):
            vector = weights["image_projection.weight"] @ token + weights["image_projection.bias"]
        else:
            vector = weights["text_model.embeddings.word_embeddings.weight"][special.get(token, token)]
        vector = vector + weights["text_model.embeddings.token_type_embeddings.weight"][segment]
        vector = vector + weights["text_model.embeddings.position_embeddings.weight"][position]
        centred = vector - vector.mean()
        normed = centred / math.sqrt((centred**2).mean() + model.config.text_config.layer_norm_eps)
        scale, shift = (weights[f"text_model.embeddings.LayerNorm.{name}"] for name in ("weight", "bias"))
        rows.append(normed * scale + shift)
    hidden = torch.tensor(np.stack(rows), dtype=torch.float32)[None]
    with torch.no_grad():
        state = model.text_model.encoder(hidden).last_hidden_state[0, 0].double().numpy()
    pooled = np.tanh(weights["text_model.pooler.dense.weight"] @ state + weights["text_model.pooler.dense.bias"])
    return weights["nsp_head.weight"] @ pooled + weights["nsp_head.bias"]


def cross_entropy(two_logits, label):
    """-(isNext log p + (1 - isNext) log(1 - p)), with p the probability of label 1, "a random sentence"."""
    p = 1 / (1 + math.exp(two_logits[0] - two_logits[1]))
    return -(label * math.log(p) + (1 - label) * math.log(1 - p))
