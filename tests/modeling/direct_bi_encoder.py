"""The bi-encoder in plain loops over rows, heads and tokens, in NumPy, given the states of the bare encoders."""

from __future__ import annotations

import math

import numpy as np
import torch


def loss(scores: np.ndarray, labels: list[int], temperature: float) -> float:
    """Mean over mentions of the log-sum-exp over all columns minus the gold's score, all divided by the temperature."""
    total = 0.0
    for row, label in zip(scores / temperature, labels, strict=True):
        total += math.log(sum(math.exp(x - max(row)) for x in row)) + max(row) - row[label]
    return total / len(labels)


def scores(model, batch) -> dict:
    """Returns "scores" [M, N] and "units" (name → [M, N], nan for a mention that lacks the modality)."""
    config = model.config
    sides = {"mention": model.encoder, "entity": model.encoder if config.shared else model.entity_encoder}
    vectors = {
        side: [
            row_vectors(
                encoder, side, {k.removeprefix(f"{side}_"): v[i] for k, v in batch.items() if k.startswith(side)}
            )
            for i in range(len(next(v for k, v in batch.items() if k.startswith(side))))
        ]
        for side, encoder in sides.items()
    }
    mentions, entities = vectors["mention"], vectors["entity"]
    if config.interaction == "maxsim":
        table = [
            [sum(max(float(q @ d) for d in e["tokens"]) for q in m["tokens"]) for e in entities] for m in mentions
        ]
        return {"scores": np.array(table), "units": {}}
    if "fused" in mentions[0]:
        return {"scores": np.array([[m["fused"] @ e["fused"] for e in entities] for m in mentions]), "units": {}}
    pairs = {"text": ("text", "text"), "vision": ("vision", "vision")}
    if config.cross_modal:
        pairs |= {"text_to_vision": ("text", "vision"), "vision_to_text": ("vision", "text")}
    units = {
        name: np.array([[m[a] @ e[b] if not m.get(f"no {a}") else np.nan for e in entities] for m in mentions])
        for name, (a, b) in pairs.items()
        if a in mentions[0] and b in entities[0]
    }
    tables = np.stack(list(units.values()))
    counts = (~np.isnan(tables)).sum(0)
    return {"scores": np.nan_to_num(tables).sum(0) / np.maximum(counts, 1), "units": units}


def row_vectors(encoder, side: str, row: dict) -> dict:
    """Returns the vectors of one row, each a NumPy array, by the name of the encoding."""
    config, out = encoder.config, {}
    weights = {name: value.detach().numpy() for name, value in encoder.named_parameters()}
    absent = config.missing_images == "absent" and config.vision_config is not None and not bool(row["image_mask"])
    ids = mask = None
    if "input_ids" in row:
        length = int(row["attention_mask"].sum())
        ids, mask = row["input_ids"][None, :length], row["attention_mask"][None, :length]

    def pool(states, pooled):
        if config.pooling == "mean":
            return sum(states[:length]) / length
        if config.pooling == "mention" and side == "mention":
            named = [states[k] for k in range(length) if row["token_mask"][k]]
            return sum(named) / len(named) if named else states[0]
        return (
            pooled if config.pooling == "pooler" or (config.pooling == "mention" and pooled is not None) else states[0]
        )

    def finish(vector, projection):
        if config.projection_dim is not None:
            vector = weights[f"{projection}.weight"] @ vector
        return vector / math.sqrt(sum(x * x for x in vector)) if config.similarity == "cosine" else vector

    with torch.no_grad():
        if config.joint_config is not None:
            pixels = row["pixel_values"][None]
            if config.joint_config.model_type == "lxmert":
                cells = encoder.vision_model(pixel_values=pixels).last_hidden_state[0]
                _, height, width = cells.shape
                objects = torch.stack([cells[:, y, x] for y in range(height) for x in range(width)])
                boxes = [
                    [x / width, y / height, (x + 1) / width, (y + 1) / height]
                    for y in range(height)
                    for x in range(width)
                ]
                boxes = torch.tensor(boxes, dtype=torch.float32).to(objects)  # as the model rounds them
                output = encoder.joint_model(ids, objects[None], boxes[None], attention_mask=mask)
                states, pooled = output.language_output, output.pooled_output
            else:
                output = encoder.joint_model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
                states = output.text_features if hasattr(output, "text_features") else output.last_hidden_state
                pooled = output.pooler_output
            return {"fused": finish(pool(states[0].numpy(), pooled[0].numpy()), "projection")}
        if ids is not None:
            output = encoder.text_model(input_ids=ids, attention_mask=mask)
            states = output.last_hidden_state[0].numpy()
            pooled = output.pooler_output[0].numpy() if config.pooling == "pooler" else None
        if config.vision_config is not None:
            output = encoder.vision_model(pixel_values=row["pixel_values"][None])
            patches = output.last_hidden_state[0].numpy()
            if patches.ndim == 3:
                patches = patches.reshape(len(patches), -1).T
                image = sum(patches) / len(patches)
            else:
                image = patches[0]
    if config.fusion == "text_stream":
        for k in range(config.num_fusion_layers):
            states = fusion_layer(
                weights, f"stream.layers.{k}", config.fusion_heads, states, None if absent else patches
            )
        return {"fused": finish(pool(states, None), "projection")}
    if config.fusion == "two_streams":
        text = np.stack([dense(weights, "stream.text_map", x) + weights["stream.modality.weight"][0] for x in states])
        cells = np.stack(
            [dense(weights, "stream.image_map", x) + weights["stream.modality.weight"][1] for x in patches]
        )
        for k in range(config.num_fusion_layers):
            new = fusion_layer(
                weights, f"stream.text_layers.{k}", config.fusion_heads, text, None if absent else cells
            )
            cells = fusion_layer(weights, f"stream.image_layers.{k}", config.fusion_heads, cells, text)
            text = new
        halves = [
            np.tanh(dense(weights, "stream.text_pooler", pool(text, None))),
            np.tanh(dense(weights, "stream.image_pooler", cells[0])) * (not absent),
        ]
        return {"fused": finish(np.concatenate(halves), "projection")}
    if config.interaction == "maxsim":
        return {"tokens": [finish(state, "text_projection") for state in states]}
    if ids is not None:
        out["text"] = finish(pool(states, pooled), "text_projection")
        out["no text"] = config.missing_images == "absent" and side == "mention" and not row["text_mask"]
    if config.vision_config is not None:
        if not absent:
            out["vision"] = finish(image, "visual_projection")
        else:  # the learned vector is in the joint space
            vector = weights["missing_image.vector"]
            out["vision"] = vector / math.sqrt(sum(vector**2)) if config.similarity == "cosine" else vector
        out["no vision"] = absent and side == "mention"
    return out


def dense(weights, name: str, x: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def norm(weights, name: str, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(), x.var()
    return (x - mean) / math.sqrt(variance + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(weights, name: str, heads: int, states: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    """One attention block, head by head and state by state; without a context only the LayerNorm remains."""
    if context is None:
        return np.stack([norm(weights, f"{name}.norm", x) for x in states])
    out, size = [], len(states[0]) // heads
    keys = [dense(weights, f"{name}.key", y) for y in context]
    values = [dense(weights, f"{name}.value", y) for y in context]
    for x in states:
        query, parts = dense(weights, f"{name}.query", x), []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = [query[part] @ key[part] / math.sqrt(size) for key in keys]
            shares = [math.exp(value - max(logits)) for value in logits]
            parts.append(sum(s / sum(shares) * v[part] for s, v in zip(shares, values, strict=True)))
        out.append(norm(weights, f"{name}.norm", x + dense(weights, f"{name}.output", np.concatenate(parts))))
    return np.stack(out)


def fusion_layer(weights, name: str, heads: int, states: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    states = attend(weights, f"{name}.self_attention", heads, states, states)
    states = attend(weights, f"{name}.cross_attention", heads, states, context)
    out = []
    for x in states:
        inner = dense(weights, f"{name}.inner", x)
        inner = np.array([y * 0.5 * (1 + math.erf(y / math.sqrt(2))) for y in inner])
        out.append(norm(weights, f"{name}.norm", x + dense(weights, f"{name}.outer", inner)))
    return np.stack(out)
