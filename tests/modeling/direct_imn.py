"""Reference implementation of IMN for tests: eq. 1–14 in NumPy float64, with loops over tokens, spaces and pairs.

It was written from the paper, independently of the model's code. `weights` are the model's weights by name. `sequences` of
a side map a modality to a list of vectors without padding.
"""

from __future__ import annotations

import numpy as np


def array(weights, name):
    return weights[name].double().numpy()


def linear(x, weights, name):
    y = array(weights, f"{name}.weight") @ x
    return y + array(weights, f"{name}.bias") if f"{name}.bias" in weights else y


def softmax(values):
    exps = np.exp(np.array(values) - np.max(values))
    return exps / exps.sum()


def layer_norm(x, weights, name, eps=1e-5):
    normed = (x - x.mean()) / np.sqrt(x.var() + eps)
    return normed * array(weights, f"{name}.weight") + array(weights, f"{name}.bias")


def batch_norm(x, weights, name, statistics=None, eps=1e-5):
    """Normalises with `statistics`, the mean and variance. Default: the running statistics."""
    mean, var = statistics or (array(weights, f"{name}.running_mean"), array(weights, f"{name}.running_var"))
    return (x - mean) / np.sqrt(var + eps) * array(weights, f"{name}.weight") + array(weights, f"{name}.bias")


def dilated_cnn(tokens, weights, name, dilations):
    """Applies eq. 1. Tokens beyond either end are zeros."""
    for layer, dilation in enumerate(dilations):
        kernel, bias = array(weights, f"{name}.layers.{layer}.weight"), array(weights, f"{name}.layers.{layer}.bias")
        out = []
        for i in range(len(tokens)):
            y = bias.copy()
            for tap, j in enumerate((i - dilation, i, i + dilation)):
                if 0 <= j < len(tokens):
                    y += kernel[:, :, tap] @ tokens[j]
            out.append(np.maximum(y, 0))
        tokens = out
    return tokens


def attention_pooling(g, weights, name):
    """Applies eq. 2."""
    alpha = softmax([linear(x, weights, name)[0] for x in g])
    return sum(share * x for share, x in zip(alpha, g, strict=True))


def transformer(tokens, weights, name, layers, heads):
    """Applies eq. 4, post-norm encoder layers (Vaswani et al.), one token and head at a time."""
    if not tokens:
        return []
    for layer in range(layers):
        prefix = f"{name}.layers.{layer}"
        inside, bias = (
            array(weights, f"{prefix}.self_attn.in_proj_weight"),
            array(weights, f"{prefix}.self_attn.in_proj_bias"),
        )
        dim = len(tokens[0])
        queries, keys, values = (
            [inside[k * dim : (k + 1) * dim] @ x + bias[k * dim : (k + 1) * dim] for x in tokens] for k in range(3)
        )
        size, out = dim // heads, []
        for i, x in enumerate(tokens):
            heads_output = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                shares = softmax([queries[i][part] @ key[part] / np.sqrt(size) for key in keys])
                heads_output.append(sum(share * value[part] for share, value in zip(shares, values, strict=True)))
            attended = linear(np.concatenate(heads_output), weights, f"{prefix}.self_attn.out_proj")
            x = layer_norm(x + attended, weights, f"{prefix}.norm1")
            inner = np.maximum(linear(x, weights, f"{prefix}.linear1"), 0)
            out.append(layer_norm(x + linear(inner, weights, f"{prefix}.linear2"), weights, f"{prefix}.norm2"))
        tokens = out
    return tokens


def conv_pooling(t, weights, name):
    """Applies eq. 6–7. A window starts at every token and reads zeros beyond the last one."""
    out = []
    for block, kernel in enumerate((2, 3, 4, 5)):
        weight, bias = array(weights, f"{name}.{block}.weight"), array(weights, f"{name}.{block}.bias")
        windows = []
        for i in range(len(t)):
            y = bias.copy()
            for tap in range(kernel):
                if i + tap < len(t):
                    y += weight[:, :, tap] @ t[i + tap]
            windows.append(np.maximum(y, 0))
        out.append(np.max(windows, axis=0))
    return np.concatenate(out)


def levels(weights, side, sequences, config):
    """Returns the inputs of the linear maps in eq. 3, 5 and 8, three vectors."""
    prefix, hidden = f"{side}_encoder", config.hidden_dim
    g = {
        name: dilated_cnn([np.float64(x) for x in tokens], weights, f"{prefix}.cnn.{name}", config.dilations)
        for name, tokens in sequences.items()
    }
    joined = [x for tokens in g.values() for x in tokens]
    states = transformer(joined, weights, f"{prefix}.transformer", config.num_layers, config.num_heads)
    t, first = {}, 0
    for name, tokens in g.items():
        t[name], first = states[first : first + len(tokens)], first + len(tokens)
    pooled, averaged, convolved = [], [], []
    for name in sequences:
        if not g[name]:
            pooled.append(np.zeros(hidden))
            averaged.append(np.zeros(hidden))
            convolved.append(np.zeros(4 * config.conv_dim))
            continue
        pooled.append(attention_pooling(g[name], weights, f"{prefix}.attention.{name}"))
        averaged.append(np.mean(t[name], axis=0))
        convolved.append(conv_pooling(t[name], weights, f"{prefix}.convolutions.{name}"))
    return [np.concatenate(level) for level in (pooled, averaged, convolved)]


def spaces(weights, side, items, config, training=False):
    """Returns aux^1, aux^2 and aux^3 (eq. 3, 5, 8) of a batch [B, 3, d]."""
    mapped = [
        [linear(x, weights, f"{side}_encoder.fc.{k}") for k, x in enumerate(levels(weights, side, item, config))]
        for item in items
    ]
    out = []
    for item in mapped:
        aux = []
        for k, x in enumerate(item):
            column = np.array([row[k] for row in mapped])
            statistics = (column.mean(0), column.var(0)) if training and len(items) > 1 else None
            aux.append(batch_norm(x, weights, f"{side}_encoder.norm.{k}", statistics))
        out.append(aux)
    return np.array(out)


def attended(weights, direction, queries, keys):
    """Returns u (eq. 9–12) of a side with the spaces `queries` [3, d] that attends to `keys` [3, d]."""
    us = []
    for i in range(3):
        b = [
            queries[i]
            @ np.maximum(
                linear(queries[i], weights, f"{direction}.query") + linear(keys[j], weights, f"{direction}.key"), 0
            )
            for j in range(3)
        ]  # eq. 9
        beta = softmax(b)  # eq. 10
        us.append(sum(beta[j] * keys[j] for j in range(3)))  # eq. 11
    return np.mean(us, axis=0)  # eq. 12


def cosine(x, y):
    return x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def fused(weights, mention, entity):
    """Returns f(u_m, u_e) of one pair of spaces [3, d]."""
    if not any(name.startswith("mention_to_entity") for name in weights):  # without co-attention
        return cosine(sum(mention) / 3, sum(entity) / 3)
    u_m = attended(weights, "mention_to_entity", mention, entity)
    u_e = attended(weights, "entity_to_mention", entity, mention)
    return cosine(u_m, u_e)


def all_scores(weights, mentions, entities):
    return np.array([[fused(weights, m, e) for e in entities] for m in mentions])


def margin_loss(scores, labels, margin):
    """Returns eq. 13 with its two similarities exchanged, averaged over mentions."""
    losses = []
    for row, gold in enumerate(labels):
        losses.append(
            sum(
                max(margin - scores[row][gold] + scores[row][negative], 0)
                for negative in range(len(scores[row]))
                if negative != gold
            )
        )
    return np.mean(losses)


def loss(weights, mentions, entities, labels, config):
    """Returns eq. 14."""
    *taus, last = config.loss_weights
    total = last * margin_loss(all_scores(weights, mentions, entities), labels, config.margin)
    for space in config.spaces:
        scores = [[cosine(m[space - 1], e[space - 1]) for e in entities] for m in mentions]
        total += taus[space - 1] * margin_loss(scores, labels, config.margin)
    return total
