"""Converts published MIMIC weights (github.com/pengfei-luo/MIMIC, CLIP backbone) to those of a [`MimicModel`]."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from .configuration_mimic import MimicConfig

#: (published prefix, our prefix) of a key; the first that matches is replaced.
_PREFIXES = (
    ("encoder.clip.", ""),
    ("encoder.image_cls_fc.", "image_global_fc."),
    ("encoder.image_tokens_fc.", "image_local_fc."),
    ("matcher.text_cls_layernorm.", "text_global_norm."),
    ("matcher.text_tokens_layernorm.", "text_local_norm."),
    ("matcher.image_cls_layernorm.", "image_global_norm."),
    ("matcher.image_tokens_layernorm.", "image_local_norm."),
    ("matcher.tglu.fc_cls.", "tglu.fc_global."),
    ("matcher.tglu.", "tglu."),
    ("matcher.vdlu.dual_ent2men.", "vdlu.entity_to_mention."),
    ("matcher.vdlu.dual_men2ent.", "vdlu.mention_to_entity."),
    ("matcher.cmfu.text_fc.", "cmfu.fc_text."),
    ("matcher.cmfu.image_fc.", "cmfu.fc_image."),
    ("matcher.cmfu.gate_fc.", "cmfu.fc_gate."),
    ("matcher.cmfu.gate_layer_norm.", "cmfu.layer_norm."),
)
_VDLU_PARTS = {"cls_fc": "fc_global", "tokens_fc": "fc_local", "gate_fc": "fc_gate"}

#: Options of the processor of the published network, which reads eq. 2 and 3 as they are printed.
PROCESSOR_OPTIONS = {
    "mention_template": "{mention} [SEP] {text}",
    "entity_template": "{name} [SEP] {attributes}",
    "mention_marks": None,
    "modality_masks": False,
}

#: Weights of a checkpoint that no score uses: a LayerNorm that is never called, CLIP's temperature, and the position
#: ids that older versions of transformers saved.
_UNUSED = re.compile(r"matcher\.cmfu\.context_layer_norm\.|.*\.logit_scale$|.*\.position_ids$")


def convert_state_dict(published: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """Renames published weights.

    Args:
        published (`dict[str, torch.Tensor]`): Weights by published name. The prefixes `model.` and `module.` of a
            training checkpoint are removed.

    Returns:
        The weights by our names, the published keys that no score uses, and the keys that are unknown.
    """
    converted: dict[str, torch.Tensor] = {}
    unused, unknown = [], []
    for full_key, tensor in published.items():
        key = re.sub(r"^(model\.|module\.)+", "", full_key)
        if _UNUSED.match(key):
            unused.append(full_key)
            continue
        for old, new in _PREFIXES:
            if key.startswith(old):
                name = new + key[len(old) :]
                if new.startswith("vdlu."):
                    unit, direction, part, rest = name.split(".", 3)
                    name = ".".join((unit, direction, _VDLU_PARTS.get(part, part), rest))
                converted[name] = tensor
                break
        else:
            unknown.append(full_key)
    return converted, unused, unknown


def convert_config(published: Mapping[str, Any]) -> MimicConfig:
    """Returns the configuration of a published network.

    Args:
        published (`dict`): `clip_config` (a CLIP configuration) and `dims`, the widths by their published names: `dv`
            (d_v), `TGLU_hidden_dim` (d_t), `IDLU_hidden_dim` (VDLU) and `CMFU_hidden_dim` (d_c).

    Raises:
        `ValueError`: A key is missing, or VDLU's width differs from d_v, which the published network does not allow.
    """
    missing = [key for key in ("clip_config", "dims") if not isinstance(published.get(key), Mapping)]
    if not missing:
        missing = [
            f"dims.{key}"
            for key in ("dv", "TGLU_hidden_dim", "IDLU_hidden_dim", "CMFU_hidden_dim")
            if key not in published["dims"]
        ]
    if missing:
        raise ValueError(f"The configuration lacks {', '.join(missing)}. Its keys are {', '.join(sorted(published))}.")
    clip, dims = published["clip_config"], published["dims"]
    if dims["dv"] != dims["IDLU_hidden_dim"]:
        raise ValueError(f"dims.dv={dims['dv']} and dims.IDLU_hidden_dim={dims['IDLU_hidden_dim']} must be equal.")
    return MimicConfig(
        text_config=clip.get("text_config") or {},
        vision_config=clip.get("vision_config") or {},
        projection_dim=clip.get("projection_dim", 512),
        text_dim=dims["TGLU_hidden_dim"],
        vision_dim=dims["dv"],
        fusion_dim=dims["CMFU_hidden_dim"],
    )


__all__ = ["PROCESSOR_OPTIONS", "convert_config", "convert_state_dict"]
