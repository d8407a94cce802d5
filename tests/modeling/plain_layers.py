"""Layers in NumPy, one item at a time and without masks, for comparison with the models. A weight is looked up by its name."""

from __future__ import annotations

import numpy as np


def weights_of(model) -> dict[str, np.ndarray]:
    """Returns the weights of a model by name, in double precision."""
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}


def linear(x, w, name):
    """W x + b, or W x if the layer has no bias."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(x, w, name):
    """LayerNorm over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    """Softmax over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def unit(x):
    """A vector divided by its length."""
    return x / np.linalg.norm(x)


def cosine(a, b):
    return unit(a) @ unit(b)


def lstm(x, w, name, layer=0, reverse=False):
    """States [L, h] of one direction of a layer of an LSTM that reads `x` [L, d], written out by gates."""
    suffix = f"l{layer}_reverse" if reverse else f"l{layer}"
    hidden = w[f"{name}.weight_hh_{suffix}"].shape[1]
    h, c, states = np.zeros(hidden), np.zeros(hidden), []
    for word in x[::-1] if reverse else x:
        gates = w[f"{name}.weight_ih_{suffix}"] @ word + w[f"{name}.bias_ih_{suffix}"]
        gates = gates + w[f"{name}.weight_hh_{suffix}"] @ h + w[f"{name}.bias_hh_{suffix}"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states[::-1] if reverse else states).reshape(len(x), hidden)


def gru(x, w, name):
    """States [L, h] of a GRU that reads `x` [L, d], written out by gates."""
    hidden = w[f"{name}.weight_hh_l0"].shape[1]
    h, states = np.zeros(hidden), []
    for word in x:
        read = w[f"{name}.weight_ih_l0"] @ word + w[f"{name}.bias_ih_l0"]
        kept = w[f"{name}.weight_hh_l0"] @ h + w[f"{name}.bias_hh_l0"]
        (r, z, n), (r_h, z_h, n_h) = np.split(read, 3), np.split(kept, 3)
        r, z = sigmoid(r + r_h), sigmoid(z + z_h)
        h = (1 - z) * np.tanh(n + r * n_h) + z * h
        states.append(h)
    return np.array(states).reshape(len(x), hidden)


def margin_loss(scores, labels, margin, negatives="mean"):
    """Mean over mentions of max(0, margin − s⁺ + s⁻), over all other columns or of the hardest.

    `margin` is a number, or a function of the columns of a negative and of the gold.
    """
    losses = []
    for row, gold in zip(scores, labels, strict=True):
        others = [j for j in range(len(row)) if j != gold]
        margins = [margin(j, gold) if callable(margin) else margin for j in others]
        hinges = [max(0.0, m - row[gold] + row[j]) for m, j in zip(margins, others, strict=True)]
        losses.append((max(hinges) if negatives == "hardest" else np.mean(hinges)) if hinges else 0.0)
    return np.mean(losses)
