"""Reference implementation of MMEL for tests: NumPy loops over pairs and tokens, and ranking by loops and enumeration.

All values are float64. `w` are the weights of the model by name.
"""

from __future__ import annotations

import itertools

import numpy as np


def linear(x, w, name):
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(values):
    values = np.array(values)
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def layer_norm(x, w, name, eps=1e-5):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def ffn(x, w, name, extra=0.0):
    """Applies a linear layer, ReLU and a linear layer."""
    return linear(relu(linear(x, w, f"{name}.fc1") + extra), w, f"{name}.fc2")


def keys_values(rows, w, name):
    return [linear(x, w, f"{name}.key") for x in rows], [linear(x, w, f"{name}.value") for x in rows]


def attention(query, keys, values, w, name, heads):
    """Applies eq. 5 to one query vector and the keys that it may attend to; zeros without keys."""
    q = linear(query, w, f"{name}.query")
    out, size = np.zeros_like(q), len(q) // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        if keys:
            weights = softmax([q[part] @ key[part] / np.sqrt(size) for key in keys])
            out[part] = sum(a * value[part] for a, value in zip(weights, values, strict=True))
    return linear(out, w, f"{name}.output") if heads > 1 else out


def image_block(tokens, groups, w, name, heads):
    """Applies two self-attentions and a feed-forward layer. `groups[i]` are the tokens that token i may attend to."""
    for norm, layer in (("norm1", "attention1"), ("norm2", "attention2")):
        normed = [layer_norm(x, w, f"{name}.{norm}") for x in tokens]
        keys, values = keys_values(normed, w, f"{name}.{layer}")
        tokens = [
            x + attention(n, [keys[j] for j in group], [values[j] for j in group], w, f"{name}.{layer}", heads)
            for x, n, group in zip(tokens, normed, groups, strict=True)
        ]
    return [x + ffn(layer_norm(x, w, f"{name}.norm3"), w, f"{name}.feed_forward") for x in tokens]


def joint_images(context, entity, w, k, blocks, heads, joint=True):
    """Returns the image tokens of one pair (eq. 2-3), k for an image vector and none for `None`."""
    sides = []
    for image in (context, entity):
        sides.append([] if image is None else list(relu(linear(image, w, "image_fc")).reshape(k, -1)))
    tokens = sides[0] + sides[1]
    first = len(sides[0])
    groups = [[j for j in range(len(tokens)) if joint or (j < first) == (i < first)] for i in range(len(tokens))]
    for b in range(blocks):
        tokens = image_block(tokens, groups, w, f"image_blocks.{b}", heads)
    return tokens[:first], tokens[first:]


def mcm(rows, others, w, name):
    """Applies eq. 5-6 with residual connections around both attentions."""
    normed = [layer_norm(x, w, f"{name}.norm1") for x in rows]
    keys, values = keys_values(normed, w, f"{name}.self_attention")
    rows = [x + attention(n, keys, values, w, f"{name}.self_attention", 1) for x, n in zip(rows, normed, strict=True)]
    keys, values = keys_values(others, w, f"{name}.cross_attention")
    rows = [
        x + attention(layer_norm(x, w, f"{name}.norm2"), keys, values, w, f"{name}.cross_attention", 1) for x in rows
    ]
    return [x + ffn(layer_norm(x, w, f"{name}.norm3"), w, f"{name}.feed_forward") for x in rows]


def m_encoder(text, image, w, heads):
    name = "fusion"
    t = [layer_norm(x, w, f"{name}.text_norm1") for x in text]
    v = [layer_norm(x, w, f"{name}.image_norm1") for x in image]
    t_keys, t_values = keys_values(t, w, f"{name}.text_attention")
    v_keys, v_values = keys_values(v, w, f"{name}.image_attention")
    text = [
        x + attention(n, t_keys, t_values, w, f"{name}.text_attention", heads) for x, n in zip(text, t, strict=True)
    ]
    image = [
        x + attention(n, v_keys + t_keys, v_values + t_values, w, f"{name}.image_attention", heads)
        for x, n in zip(image, v, strict=True)
    ]
    t = [layer_norm(x, w, f"{name}.text_norm2") for x in text]
    v = [layer_norm(x, w, f"{name}.image_norm2") for x in image]
    fused = []
    for x, n in zip(text, t, strict=True):
        similar = np.zeros_like(n)
        if v:
            similar = sum(a * patch for a, patch in zip(softmax([n @ patch for patch in v]), v, strict=True))
        fused.append(x + ffn(n, w, f"{name}.text_feed_forward", linear(similar, w, f"{name}.fc_aggregated")))
    image = [x + ffn(n, w, f"{name}.image_feed_forward") for x, n in zip(image, v, strict=True)]
    return fused, image


def fuse(words, image, w, config):
    """Applies eq. 4 and 7-9 to the word states and image tokens of one side. `image` is `None` in a text-only model."""
    text = [relu(linear(x, w, "text_fc")) for x in words]
    if image is None:
        return np.max(mcm(text, text, w, "fusion.text"), axis=0)
    if config.fusion == "m_encoder":
        text, image = m_encoder(text, image, w, config.num_attention_heads)
    else:
        image = mcm(image, text, w, "fusion.image") if image else []
        text = mcm(text, image, w, "fusion.text")
    text = np.max(text, axis=0)
    if not image:
        return text
    image = np.max(image, axis=0)
    gate = softmax(ffn(np.concatenate([text, image]), w, "gate"))
    return gate[0] * text + gate[1] * image


def pair(context_words, entity_words, context_image, entity_image, w, config):
    """Returns m (eq. 10) and h^e of one pair, from word states and image vectors (`None` if missing)."""
    images = (None, None)
    if config.vision_config is not None:
        images = joint_images(
            context_image,
            entity_image,
            w,
            config.num_image_tokens,
            config.num_image_blocks,
            config.num_attention_heads,
            config.joint_image,
        )
    h_context = fuse(context_words, images[0], w, config)
    h_entity = fuse(entity_words, images[1], w, config)
    return softmax(linear(np.concatenate([h_context, h_entity]), w, "classifier"))[1], h_entity


def similarity(a, b, w):
    """Returns S(a, b) = σ(FFN([a; b])), with the weight of the first layer as one matrix."""
    first = np.concatenate([w["similarity.fc_first.weight"], w["similarity.fc_second.weight"]], 1)
    hidden = relu(first @ np.concatenate([a, b]) + w["similarity.fc_first.bias"])
    return sigmoid(linear(hidden, w, "similarity.fc_out"))[0]


def pairwise_loss(mentions, similar, margin):
    """Returns eq. 11 as a mean over pairs of mentions of one context.

    A mention is a dict of `context` and of the features `positive` and `negatives`.
    """
    losses = []
    for first, second in itertools.combinations(mentions, 2):
        if first["context"] == second["context"]:
            loss = 0.0
            for anchor, other in ((first, second), (second, first)):
                near = similar(anchor["positive"], other["positive"])
                terms = [max(similar(anchor["positive"], n) - near + margin, 0) for n in other["negatives"]]
                loss += np.mean(terms) if terms else 0.0
            losses.append(loss)
    return np.mean(losses) if losses else 0.0


def confidence_order(mentions):
    return sorted(range(len(mentions)), key=lambda i: -max(m for m, _ in mentions[i]))


def combination(choice, ordered, similar, weight=1):
    """Returns the score of one candidate per mention, averaged as in §3.5. S has the given weight."""
    score, features = ordered[0][choice[0]]
    for mention, column in zip(ordered[1:], choice[1:], strict=True):
        m, h = mention[column]
        score = (weight * similar(features, h) + score + m) / (weight + 2)
        features = (features + h) / 2
    return score


def add_best_combinations(mentions, order, kept):
    """Returns m plus the best score of the kept combinations {choice: score} that include a candidate."""
    out = []
    for i, mention in enumerate(mentions):
        place = order.index(i)
        rows = []
        for column, (m, _) in enumerate(mention):
            scores = [score for choice, score in kept.items() if choice[place] == column]
            rows.append(m + max(scores) if scores else m)
        out.append(rows)
    return out


def rank_by_greedy(mentions, similar, weight=1):
    """Runs §3.5 in loops. A mention is a list of (m, features). Returns a list of final scores per mention."""
    order = confidence_order(mentions)
    ordered = [mentions[i] for i in order]
    size = max(map(len, mentions))
    kept = [(score, features, (column,)) for column, (score, features) in enumerate(ordered[0])]
    for mention in ordered[1:]:
        grown = []
        for score, features, choice in kept:
            for column, (m, h) in enumerate(mention):
                average = (weight * similar(features, h) + score + m) / (weight + 2)
                grown.append((average, (features + h) / 2, (*choice, column)))
        kept = sorted(grown, key=lambda item: -item[0])[:size]
    return add_best_combinations(mentions, order, {choice: score for score, _, choice in kept})


def rank_by_enumeration(mentions, similar):
    """Runs §3.5, but drops combinations only after all mentions are combined."""
    order = confidence_order(mentions)
    ordered = [mentions[i] for i in order]
    size = max(map(len, mentions))
    choices = itertools.product(*(range(len(mention)) for mention in ordered))
    scored = {choice: combination(choice, ordered, similar) for choice in choices}
    best = sorted(scored, key=lambda choice: -scored[choice])[:size]
    return add_best_combinations(mentions, order, {choice: scored[choice] for choice in best})
