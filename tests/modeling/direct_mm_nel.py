"""Reference implementation of MM-nel for tests: NumPy loops over one document, mention and candidate at a time.

A document is a list of mentions. A mention is a dict of `candidates` (dicts of `entity` and `prior`), `gold` (a position
among them, or `None`), and the word ids `left`, `inside` and `right`, or for a visual mention `image` (pixels or
`None`). An entity is a dict of the word ids `name` and `facts`, and `image`.
"""

from __future__ import annotations

import math

import numpy as np


def weights(model) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def softmax(values) -> np.ndarray:
    exp = np.exp(np.asarray(values, float) - np.max(values))
    return exp / exp.sum()


def mean(words, table) -> np.ndarray:
    return sum((table[i] for i in words), np.zeros(table.shape[1])) / max(1, len(words))


def unit(vector) -> np.ndarray:
    norm = math.sqrt(sum(x * x for x in vector))
    return vector / norm if norm > 1e-6 else vector / 1e-6


def entity_vector(w, entity) -> np.ndarray:
    table = w["word_embeddings.weight"]
    mapped = w["entity_vectors.name_map.weight"] @ mean(entity["name"], table) + w["entity_vectors.name_map.bias"]
    return unit(mapped + w["entity_vectors.fact_map.weight"] @ mean(entity["facts"], table))


def context(config, mention) -> list[int]:
    inside = mention["inside"] if config.mention_in_context else []
    return [*mention["left"], *inside, *mention["right"]]


def selected(w, config, mention, entities, keep_gold=False) -> tuple[list[int], list[int]]:
    """Returns the positions of the candidates to rank, and of the others in their order."""
    table = w["word_embeddings.weight"]
    words = sum((table[i] for i in context(config, mention)), np.zeros(table.shape[1]))
    similarity, prior = [], []
    for candidate in mention["candidates"]:
        entity = entities[candidate["entity"]]
        similarity.append(unit(mean(entity["name"], table) + mean(entity["facts"], table)) @ words)
        prior.append(candidate["prior"])
    places = sorted(range(len(prior)), key=lambda c: (-prior[c], -similarity[c], c))
    chosen = places[: config.prior_candidates]
    pool = sorted(
        places[config.prior_candidates : config.num_candidates], key=lambda c: (-similarity[c], places.index(c))
    )
    chosen = chosen + pool[: config.context_candidates]
    gold = mention["gold"]
    if keep_gold and gold is not None and gold not in chosen:
        chosen = [*chosen[:-1], gold]
    return sorted(chosen), [c for c in places if c not in chosen]


def psi(w, config, vectors, words) -> list[float]:
    """Returns Ψ of the candidates of one mention, by the attention of Ganea and Hofmann."""
    if not words:
        return [0.0] * len(vectors)
    table, a, b = w["word_embeddings.weight"], w["local.attention"], w["local.score"]
    agreement = [max(sum(e * a * table[i]) for e in vectors) for i in words]
    kept = sorted(range(len(words)), key=lambda k: -agreement[k])[: config.attention_words]
    beta = softmax([agreement[k] for k in kept])
    return [sum(beta[r] * sum(e * b * table[words[k]]) for r, k in enumerate(kept)) for e in vectors]


def embedding(w, config, mention) -> np.ndarray:
    """Returns f of eq. 3."""
    table, half = w["word_embeddings.weight"], config.relation_window // 2
    left = mention["left"][-half:] if half else []
    parts = [mean(left, table), mean(mention["inside"], table), mean(mention["right"][:half], table)]
    return np.tanh(w["mention_map.weight"] @ np.concatenate(parts) + w["mention_map.bias"])


def alpha(w, mentions) -> np.ndarray:
    """Returns α [n, n, K] of eq. 3-4, or 1/(n - 1) of a model without D_k."""
    n, d = len(mentions), len(mentions[0])
    if "relations.mention" not in w:
        shares = [[1 / (n - 1) if i != j else 0.0 for j in range(n)] for i in range(n)]
        return np.stack([shares] * len(w["relations.entity"]), -1)
    relations = w["relations.mention"]
    out = np.zeros((n, n, len(relations)))
    for k, diagonal in enumerate(relations):
        for i in range(n):
            z = sum(math.exp(mentions[i] @ np.diag(diagonal) @ mentions[j] / math.sqrt(d)) for j in range(n) if j != i)
            for j in range(n):
                if j != i:
                    out[i, j, k] = math.exp(mentions[i] @ np.diag(diagonal) @ mentions[j] / math.sqrt(d)) / z
    return out


def phi(w, a, i, j, e_i, e_j) -> float:
    """Returns Φ(e_i, e_j) of eq. 2."""
    return sum(a[i, j, k] * (e_i @ np.diag(r) @ e_j) for k, r in enumerate(w["relations.entity"]))


def max_marginals(local, pair, iterations, damping) -> list[list[float]]:
    """Runs loopy max-product with dicts. `pair(i, j, a, b)` is the potential of candidate a of i and candidate b of j."""
    n = len(local)
    message = {(i, j): [1 / len(local[j])] * len(local[j]) for i in range(n) for j in range(n) if i != j}
    for _ in range(iterations):
        update = {}
        for i, j in message:
            values = []
            for b in range(len(local[j])):
                values.append(
                    max(
                        local[i][a]
                        + pair(i, j, a, b)
                        + sum(math.log(message[k, i][a]) for k in range(n) if k not in (i, j))
                        for a in range(len(local[i]))
                    )
                )
            update[i, j] = [
                damping * value + (1 - damping) * old
                for value, old in zip(softmax(values), message[i, j], strict=True)
            ]
        message = update
    return [
        [local[i][a] + sum(math.log(message[k, i][a]) for k in range(n) if k != i) for a in range(len(local[i]))]
        for i in range(n)
    ]


def rho(w, config, belief: float, prior: float) -> float:
    inputs = np.array([belief, math.log(max(prior, config.min_prior))])
    first, second = (clipped(w[f"score_fc{k}.weight"], config.score_max_norm) for k in (1, 2))
    hidden = np.maximum(0, first @ inputs + w["score_fc1.bias"])
    return float((second @ hidden + w["score_fc2.bias"])[0])


def clipped(matrix, limit) -> np.ndarray:
    """Returns a matrix whose rows are scaled down to a norm of at most `limit`."""
    rows = []
    for row in matrix:
        norm = math.sqrt(sum(x * x for x in row))
        rows.append(row * limit / norm if limit is not None and norm > limit else row)
    return np.array(rows)


def link_text(w, config, mentions, entities, keep_gold=False):
    """Returns for each textual mention {position: ρ} of the selected candidates, positions of the rest, and f."""
    picks = [selected(w, config, mention, entities, keep_gold) for mention in mentions]
    vectors = [
        [entity_vector(w, entities[mention["candidates"][c]["entity"]]) for c in chosen]
        for mention, (chosen, _) in zip(mentions, picks, strict=True)
    ]
    local = [psi(w, config, v, context(config, m)) for m, v in zip(mentions, vectors, strict=True)]
    f = [embedding(w, config, mention) for mention in mentions]
    beliefs = local
    if config.num_relations:
        a = alpha(w, f)

        def pair(i, j, x, y):
            one, two = vectors[i][x], vectors[j][y]
            return phi(w, a, i, j, one, two) + phi(w, a, j, i, two, one)

        beliefs = max_marginals(local, pair, config.lbp_iterations, config.lbp_damping)
    out = []
    for mention, (chosen, rest), belief, embedded in zip(mentions, picks, beliefs, f, strict=True):
        scores = [
            rho(w, config, q, mention["candidates"][c]["prior"]) for c, q in zip(chosen, softmax(belief), strict=True)
        ]
        out.append((dict(zip(chosen, scores, strict=True)), rest, embedded))
    return out


def ranking_loss(scores: dict[int, float], gold: int, gamma: float) -> float:
    """Returns the sum of eq. 5-6 for one mention."""
    return sum(max(0.0, gamma - scores[gold] + value) for c, value in scores.items() if c != gold)


def layer_norm(x, weight, bias) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def image_vector(w, config, pixels) -> np.ndarray:
    """Returns m^v of eq. 7 for one image [3, H, W], cut into 8 × 8 pieces."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    size = pixels.shape[1] // 8
    kernel = w["image_encoder.pieces.weight"].reshape(config.hidden_size, -1)
    pieces = []
    for row in range(8):
        for column in range(8):
            cut = pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            pieces.append(kernel @ cut.reshape(-1) + w["image_encoder.pieces.bias"])
    x = np.stack(pieces) + w["image_encoder.position.weight"]
    heads = config.num_attention_heads
    for k in range(config.num_image_layers):
        name = f"image_encoder.layers.{k}"
        query, key, value = (linear(f"{name}.{part}", x) for part in ("query", "key", "value"))
        width = query.shape[1] // heads
        head_outputs = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            head_outputs.append(
                np.stack([softmax(key[:, part] @ q / math.sqrt(width)) for q in query[:, part]]) @ value[:, part]
            )
        attended = linear(f"{name}.output", np.concatenate(head_outputs, 1))
        o = layer_norm(x + attended, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"])
        inner = linear(f"{name}.fc2", np.maximum(0, linear(f"{name}.fc1", o)))
        x = layer_norm(o + inner, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"])
    return sum(x) / 64


def triplet_loss(scores: dict[int, float], gold: int, config) -> float:
    """Returns the mean or sum of eq. 8 over the negatives of one mention."""
    hinges = [max(0.0, config.margin - scores[gold] + value) for c, value in scores.items() if c != gold]
    return float(np.mean(hinges) if config.triplet_reduction == "mean" else np.sum(hinges))


def cosine_cost(a, b) -> float:
    return 1 - float(unit(a) @ unit(b))


def costs(x, y):
    return tuple(
        np.array([[cosine_cost(a, b) for b in second] for a in first]) for first, second in ((x, y), (x, x), (y, y))
    )


def scaling(cost, beta, rounds=20000) -> np.ndarray:
    """Solves eq. 10 between uniform distributions by plain matrix scaling."""
    n, m = cost.shape
    kernel = np.exp(-(cost - cost.min()) / beta)
    v = np.ones(m)
    for _ in range(rounds):
        u = (1 / n) / (kernel @ v)
        v, previous = (1 / m) / (kernel.T @ u), v
        if np.abs(v - previous).max() < 1e-14 * np.abs(v).max():
            break
    return u[:, None] * kernel * v


def pair_cost(within, other, plan) -> np.ndarray:
    """Returns Σ T_i'j' (c₁(i, i') - c₂(j, j'))² for each i, j. Its sum weighted by T is eq. 9."""
    n, m = plan.shape
    out = np.zeros((n, m))
    for i in range(n):
        for j in range(m):
            for k in range(n):
                for l in range(m):  # noqa: E741
                    out[i, j] += plan[k, l] * (within[i, k] - other[j, l]) ** 2
    return out


def rescaled(scores: dict[int, float]) -> dict[int, float]:
    """Returns scores from 0, the worst, to 1, the best; 0 if all are equal."""
    low, high = min(scores.values(), default=0), max(scores.values(), default=0)
    return {entity: (score - low) / (high - low) if high > low else 0.0 for entity, score in scores.items()}


def agreement(text_scores: dict[int, float], image_scores: dict[int, float]) -> float:
    """Returns the largest product of the scaled scores of two mentions for an entity that is a candidate of both."""
    one, two = rescaled(text_scores), rescaled(image_scores)
    return max((one[entity] * two[entity] for entity in one.keys() & two.keys()), default=0.0)


def transport(x, y, config, agreements) -> tuple[np.ndarray, float]:
    """Returns the plan between two lists of embeddings whose mentions' candidates agree so far, and its cost."""
    cross, within, other = costs(x, y)
    cross = (1 - config.agreement_weight) * cross + config.agreement_weight * (1 - agreements)
    plan = np.full(cross.shape, 1 / cross.size)
    a = config.gw_weight
    for _ in range(500):
        previous = plan
        plan = scaling((1 - a) * cross + 2 * a * pair_cost(within, other, plan), config.beta)
        if np.abs(plan - previous).sum() < 1e-9:
            break
    return plan, float(((1 - a) * plan * cross).sum() + a * (plan * pair_cost(within, other, plan)).sum())


def corrected(scores, other_scores, mass, config, weight, compared=None) -> dict[int, float]:
    """Applies Algorithm 1 to one mention.

    Args:
        scores: {entity: score} of the mention's candidates.
        other_scores: For each mention of the other modality, {entity: score}.
        mass: The mass of the plan between the mention and each of those.
        weight: The weight of the correction.
        compared: The scores that determine its spread. The default is all scores.
    """
    compared = list(scores.values()) if compared is None else compared
    best = sorted(range(len(mass)), key=lambda k: -mass[k])[: config.transport_matches or len(mass)]
    total = sum(mass[k] for k in best)
    spread = max(compared) - min(compared) if compared else 0
    out = {}
    for entity, score in scores.items():
        added = 0.0
        for k in best:
            if not other_scores[k]:
                continue
            low, high = min(other_scores[k].values()), max(other_scores[k].values())
            if entity in other_scores[k] and high > low:
                added += mass[k] / total * (other_scores[k][entity] - low) / (high - low)
        out[entity] = score + weight * (spread or 1.0) * added
    return out


def link(model, document, entities, keep_gold=False):
    """Links one document.

    Returns:
        `dict` of `scores`, a list per mention; `ranking` and `triplet`, the losses of the mentions that have one; and
        `plan` and `cost`, or `None`.
    """
    w, config = weights(model), model.config
    textual = [k for k, mention in enumerate(document) if "inside" in mention and mention["candidates"]]
    visual = [k for k, mention in enumerate(document) if "inside" not in mention and mention["candidates"]]
    linked = link_text(w, config, [document[k] for k in textual], entities, keep_gold) if textual else []
    ranking, triplet = [], []
    for k, (scores, _, _) in zip(textual, linked, strict=True):
        gold = document[k]["gold"]
        if gold is not None and gold in scores:
            ranking.append(ranking_loss(scores, gold, config.gamma))
    similar, vectors, compared = {}, {}, {}
    for k in visual:
        mention, scores, shown = document[k], {}, {}
        if mention["image"] is not None:
            vectors[k] = image_vector(w, config, mention["image"])
        for c, candidate in enumerate(mention["candidates"]):
            picture = entities[candidate["entity"]]["image"]
            if mention["image"] is None:
                scores[c] = 0.0
            elif picture is None:
                scores[c] = -1.0
            else:
                scores[c] = shown[c] = 1 - cosine_cost(vectors[k], image_vector(w, config, picture))
        similar[k], compared[k] = scores, shown
        if mention["gold"] in shown and len(shown) > 1:
            triplet.append(triplet_loss(shown, mention["gold"], config))

    def by_entity(k, scores):
        return {document[k]["candidates"][c]["entity"]: value for c, value in scores.items()}

    text_scores = [by_entity(k, scores) for k, (scores, _, _) in zip(textual, linked, strict=True)]
    image_scores = [by_entity(k, compared[k]) for k in vectors]
    plan = cost = None
    if config.joint == "transport" and textual and vectors:
        agreements = np.array([[agreement(one, two) for two in image_scores] for one in text_scores])
        plan, cost = transport([f for *_, f in linked], list(vectors.values()), config, agreements)
    weight = config.correction_weight
    image_weight = weight if config.image_correction_weight is None else config.image_correction_weight
    out = [None] * len(document)
    for r, (k, (scores, rest, _)) in enumerate(zip(textual, linked, strict=True)):
        if plan is not None:
            final = corrected(text_scores[r], image_scores, plan[r], config, weight)
            scores = {c: final[document[k]["candidates"][c]["entity"]] for c in scores}
        low = min(scores.values())
        scores = scores | {c: low - 1 - place for place, c in enumerate(rest)}
        out[k] = [scores[c] for c in range(len(scores))]
    for k in visual:
        scores = similar[k]
        if plan is not None and k in vectors:
            mass = plan[:, list(vectors).index(k)]
            final = corrected(by_entity(k, scores), text_scores, mass, config, image_weight, [*compared[k].values()])
            scores = {c: final[document[k]["candidates"][c]["entity"]] for c in scores}
        out[k] = [scores[c] for c in range(len(scores))]
    return {
        "scores": [row or [] for row in out],
        "ranking": ranking,
        "triplet": triplet,
        "plan": plan,
        "cost": cost,
        "textual": textual,
        "visual": list(vectors),
    }
