"""Reference implementation of MIMIC's scores for tests: the paper's equations, one pair at a time, with loops over tokens.

`Switches` selects the variant of the paper or of the published network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Switches:
    mask_padding: bool = False
    query_norm: bool = True
    text_local: bool = True
    cosine_scale: float | None = None  # weight of the local half if scores are cosines


def linear(x, weights, name):
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def layer_norm(x, weights, name, eps=1e-5):
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def text_score(weights, mention, entity, switches=Switches()):
    """Returns eq. 4 and 8–10 of one pair from `global` [d_T], `local` [L, d], `mask` [L] of each side, already normalised."""
    score = mention["global"] @ entity["global"]
    if not switches.text_local:
        return score
    keep = (
        (lambda mask: [i for i in range(len(mask)) if mask[i]]) if switches.mask_padding else (lambda m: range(len(m)))
    )
    keys = [linear(mention["local"][i], weights, "tglu.fc_key") for i in keep(mention["mask"])]
    values = [linear(mention["local"][i], weights, "tglu.fc_value") for i in keep(mention["mask"])]
    context = 0
    rows = list(keep(entity["mask"]))
    for i in rows:
        query = linear(entity["local"][i], weights, "tglu.fc_query")
        logits = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
        attention = torch.exp(logits - logits.max())
        attention = attention / attention.sum()
        context = context + sum(a * v for a, v in zip(attention, values, strict=True))
    context = layer_norm(context / len(rows), weights, "tglu.layer_norm")
    query = linear(entity["global"], weights, "tglu.fc_global")
    if switches.cosine_scale is not None:
        query = switches.cosine_scale * query / query.norm() / math.sqrt(len(query))
    return (score + query @ context) / 2


def dual_score(weights, name, query, key, patches, switches=Switches()):
    """Returns eq. 12–14 of one pair from v_A^G, v_B^G [d_v] and V_B^L [n, d_v]."""
    query = linear(query, weights, f"{name}.fc_global")
    key = linear(key, weights, f"{name}.fc_global")
    pooled = torch.stack([linear(patch, weights, f"{name}.fc_local") for patch in patches]).mean(0)
    fused = linear(layer_norm(pooled + query, weights, f"{name}.add_layer_norm"), weights, f"{name}.fc")
    gate = torch.tanh(linear(fused, weights, f"{name}.fc_gate"))
    value = layer_norm(gate * fused + key, weights, f"{name}.layer_norm")
    return value @ (layer_norm(query, weights, f"{name}.layer_norm") if switches.query_norm else query)


def vision_score(weights, mention, entity, switches=Switches()):
    """Returns eq. 5 and 11 of one pair from `global` [d_v] and `local` [n, d_v] of each side."""
    e2m = dual_score(
        weights, "vdlu.entity_to_mention", entity["global"], mention["global"], mention["local"], switches
    )
    m2e = dual_score(weights, "vdlu.mention_to_entity", mention["global"], entity["global"], entity["local"], switches)
    return (e2m + m2e) / 2


def fuse(weights, text, patches):
    """Returns eq. 15–18 of one item."""
    text = linear(text, weights, "cmfu.fc_text")
    patches = [linear(patch, weights, "cmfu.fc_image") for patch in patches]
    alpha = torch.stack([text @ patch for patch in patches])
    alpha = torch.exp(alpha - alpha.max())
    alpha = alpha / alpha.sum()
    context = sum(a * patch for a, patch in zip(alpha, patches, strict=True))
    gate = torch.tanh(linear(text, weights, "cmfu.fc_gate"))  # one number or a vector
    return layer_norm(gate * text + context, weights, "cmfu.layer_norm")


def all_scores(weights, mentions, entities, units, switches=Switches()):
    """Returns unit scores [M, N] from lists of {"text": {...}, "image": {...}} features; `score` is their mean (eq. 7)."""
    pair = {
        "text": lambda m, e: text_score(weights, m["text"], e["text"], switches),
        "vision": lambda m, e: vision_score(weights, m["image"], e["image"], switches),
        "cross_modal": lambda m, e: (
            fuse(weights, m["text"]["global"], m["image"]["local"])
            @ fuse(weights, e["text"]["global"], e["image"]["local"])
        ),
    }
    scores = {u: torch.stack([torch.stack([pair[u](m, e) for e in entities]) for m in mentions]) for u in units}
    scores["score"] = sum(scores.values()) / len(scores)
    return scores
