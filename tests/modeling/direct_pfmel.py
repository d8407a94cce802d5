"""Reference implementation of PFMEL for tests: one sequence at a time, embeddings in NumPy, losses as in the paper.

Only BERT's encoder layers are shared with the model.
"""

from __future__ import annotations

import math

import numpy as np
import torch

CLS, SEP = "[CLS]", "[SEP]"


def sequence(first, second):
    """Returns tokens and segments of two sentences. A sentence is a list of token ids and image features (vectors)."""
    return [CLS, *first, SEP, *second, SEP], [0] * (len(first) + 2) + [1] * (len(second) + 1)


def log_odds(logits):
    return logits[0] - logits[1]


def logits(model, first, second, special):
    """Returns the two logits of one sequence. `special` maps [CLS] and [SEP] to their ids."""
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
    """Returns -(isNext log p + (1 - isNext) log(1 - p)), where p is the probability of label 1, a random sentence."""
    p = 1 / (1 + math.exp(two_logits[0] - two_logits[1]))
    return -(label * math.log(p) + (1 - label) * math.log(1 - p))
