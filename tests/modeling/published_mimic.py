"""Tiny MIMIC network with the published parameter names. `direct_mimic` computes its scores from CLIP's features."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel

from tests.modeling import direct_mimic

DIMS = {
    "input_hidden_dim": 24,
    "input_image_hidden_dim": 20,
    "dt": 24,
    "dv": 12,
    "TGLU_hidden_dim": 12,
    "IDLU_hidden_dim": 12,
    "CMFU_hidden_dim": 16,
}


def clip_config() -> CLIPConfig:
    return CLIPConfig(
        projection_dim=24,
        text_config={
            "vocab_size": 60,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 10,
            "projection_dim": 24,
            "eos_token_id": 59,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 20,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 24,
        },
    )


def state_dict(seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random weights with the names of a published checkpoint."""
    torch.manual_seed(seed)
    weights = {f"encoder.clip.{k}": v.clone() for k, v in CLIPModel(clip_config()).state_dict().items()}
    text, image, d, c = DIMS["dt"], DIMS["dv"], DIMS["dv"], DIMS["CMFU_hidden_dim"]
    linears = {
        "encoder.image_cls_fc": (image, 24),
        "encoder.image_tokens_fc": (image, 20),
        "matcher.tglu.fc_query": (12, text),
        "matcher.tglu.fc_key": (12, text),
        "matcher.tglu.fc_value": (12, text),
        "matcher.tglu.fc_cls": (12, text),
        "matcher.cmfu.text_fc": (c, text),
        "matcher.cmfu.image_fc": (c, image),
        "matcher.cmfu.gate_fc": (1, c),
    }
    norms = {
        "matcher.text_cls_layernorm": text,
        "matcher.text_tokens_layernorm": text,
        "matcher.image_cls_layernorm": image,
        "matcher.image_tokens_layernorm": image,
        "matcher.tglu.layer_norm": 12,
        "matcher.cmfu.gate_layer_norm": c,
        "matcher.cmfu.context_layer_norm": c,
    }
    for direction in ("dual_ent2men", "dual_men2ent"):
        unit = f"matcher.vdlu.{direction}"
        linears |= {f"{unit}.{part}": (d, d) for part in ("fc", "cls_fc", "tokens_fc")}
        linears[f"{unit}.gate_fc"] = (1, d)
        norms |= {f"{unit}.{part}": d for part in ("layer_norm", "add_layer_norm")}
    for name, shape in linears.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.randn(shape) * 0.3, torch.randn(shape[0]) * 0.3
    for name, width in norms.items():
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + torch.randn(width) * 0.2, torch.randn(width) * 0.2
    return weights


def inputs(seed: int = 1, mentions: int = 4, entities: int = 6) -> dict[str, torch.Tensor]:
    """Returns padded texts and images. Mention 1 and entity 2 have no image, so their pixels are zero."""
    torch.manual_seed(seed)
    batch = {}
    for side, count in (("mention", mentions), ("entity", entities)):
        ids, mask = torch.zeros(count, 10, dtype=torch.long), torch.zeros(count, 10, dtype=torch.long)
        for row in range(count):
            length = int(torch.randint(3, 11, ()))
            ids[row, :length] = torch.randint(2, 59, (length,))
            ids[row, 0], ids[row, length - 1] = 1, 59
            mask[row, :length] = 1
        pixels = torch.randn(count, 3, 16, 16)
        pixels[1 if side == "mention" else 2] = 0
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_pixel_values": pixels}
    return batch


def outputs(
    weights: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], clip: CLIPModel
) -> dict[str, torch.Tensor]:
    """Returns the published network's unit scores, their mean, and the loss if entity i is the gold of mention i."""
    clip.eval()
    units = {k.removeprefix("matcher."): v for k, v in weights.items() if k.startswith("matcher.")}
    rename = {"fc_cls": "fc_global", "cls_fc": "fc_global", "tokens_fc": "fc_local", "gate_fc": "fc_gate"}
    rename |= {"dual_ent2men": "entity_to_mention", "dual_men2ent": "mention_to_entity"}
    rename |= {"text_fc": "fc_text", "image_fc": "fc_image", "gate_layer_norm": "layer_norm"}
    units = {".".join(rename.get(part, part) for part in name.split(".")): v for name, v in units.items()}

    def features(side: str) -> list[dict]:
        with torch.no_grad():
            out = clip(
                input_ids=batch[f"{side}_input_ids"],
                attention_mask=batch[f"{side}_attention_mask"],
                pixel_values=batch[f"{side}_pixel_values"],
            )
        rows = []
        for i in range(len(batch[f"{side}_input_ids"])):
            norm = lambda x, name: direct_mimic.layer_norm(x, weights, f"matcher.{name}")  # noqa: E731
            patches = out.vision_model_output.last_hidden_state[i]
            image_global = direct_mimic.linear(out.image_embeds[i], weights, "encoder.image_cls_fc")
            image_local = [direct_mimic.linear(patch, weights, "encoder.image_tokens_fc") for patch in patches]
            tokens = out.text_model_output.last_hidden_state[i]
            rows.append(
                {
                    "text": {
                        "global": norm(out.text_embeds[i], "text_cls_layernorm"),
                        "local": torch.stack([norm(token, "text_tokens_layernorm") for token in tokens]),
                        "mask": batch[f"{side}_attention_mask"][i],
                    },
                    "image": {
                        "global": norm(image_global, "image_cls_layernorm"),
                        "local": torch.stack([norm(patch, "image_tokens_layernorm") for patch in image_local]),
                    },
                }
            )
        return rows

    scores = direct_mimic.all_scores(units, features("mention"), features("entity"), ("text", "vision", "cross_modal"))
    count = len(scores["score"])
    picked = [s[:, :count].log_softmax(-1).diagonal() for s in scores.values()]
    return {
        **{f"{unit}_score": scores[unit] for unit in ("text", "vision", "cross_modal")},
        "score": scores["score"],
        "loss_first_entities_as_positives": -sum(p.mean() for p in picked).reshape(1),
    }
