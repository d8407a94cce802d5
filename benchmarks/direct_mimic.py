"""MIMIC's equations as in the paper, evaluated for all pairs by broadcasting. The benchmarks compare the library with it.

Every pair has an attention map [M, N, L, L] (eq. 9), a context [M, N, L, d_t] (eq. 10) and gated vectors [M, N, d_v]
(eq. 12–14). The cache of an entity is that of a plain evaluation: the outputs of the encoders at the width of the units'
inputs (at the paper's sizes 2 + 80 + 0.4 + 18.75 KiB in float32, 103,552 bytes). This is a straightforward PyTorch
implementation, and nothing in it is slow on purpose.

To compare it with golden values of the published network:

    python -m benchmarks.direct_mimic FOLDER
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

#: Mentions × entities of one block of the published evaluation.
BLOCK = (20, 6000)

Features = dict[str, torch.Tensor]


class DirectMimic:
    """Computes the scores of a trained [`MimicModel`] without its scoring code.

    Args:
        model ([`MimicModel`]): Weights, configuration and encoders. The image encoder is a ViT or CLIP's.
    """

    def __init__(self, model: Any):
        self.config, self.model = model.config, model
        self.weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Applies the linear layer `name` to the last axis."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Applies the LayerNorm `name` to the last axis."""
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    @torch.inference_mode()
    def features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> Features:
        """Computes the tensors to cache for B mentions or entities.

        Returns:
            `dict`: `text_global` [B, d_T], `text_tokens` [B, L, d_T], `image_global` [B, d_v], `image_patches`
            [B, n, d_v] and, with `config.mask_padding`, `mask` [B, L]. Tensors that no unit needs are absent.
        """
        cached: Features = {}
        if hasattr(self.model, "text_model"):
            out = self.model.text_model(input_ids=input_ids, attention_mask=attention_mask)
            tokens = out.last_hidden_state
            if self.config.text_pooling == "mean":
                share = attention_mask.to(tokens.dtype) / attention_mask.sum(1, keepdim=True)
                pooled = (share[:, :, None] * tokens).sum(1)
            else:
                pooled = tokens[:, 0] if self.config.text_pooling == "cls" else out.pooler_output
            if self.config.projection_dim:
                pooled = F.normalize(pooled @ self.weights["text_projection.weight"].T, dim=-1)
            cached |= {"text_global": pooled, "text_tokens": tokens}
            if self.config.mask_padding:
                cached["mask"] = attention_mask.bool()
        if hasattr(self.model, "vision_model"):
            out = self.model.vision_model(pixel_values=pixel_values)
            if "vision" in self.config.units:
                pooled = getattr(out, "pooler_output", None)
                pooled = out.last_hidden_state[:, 0] if pooled is None else pooled
                if self.config.projection_dim:
                    pooled = F.normalize(pooled @ self.weights["visual_projection.weight"].T, dim=-1)
                cached["image_global"] = self.linear("image_global_fc", pooled)
            cached["image_patches"] = self.linear("image_local_fc", out.last_hidden_state)
        return cached

    @torch.inference_mode()
    def unit_scores(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> Features:
        """Computes the scores of each unit (eq. 4–6), by name, of shape `[M, N]`."""
        mentions, entities = self._normed(mentions), self._normed(entities)
        units = {"text": self._text, "vision": self._vision, "cross_modal": self._cross_modal}
        return {unit: units[unit](mentions, entities) for unit in self.config.units}

    @torch.inference_mode()
    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Computes the scores (eq. 7), of shape `[M, N]`."""
        return torch.stack(list(self.unit_scores(mentions, entities).values())).mean(0)

    def _normed(self, features: Mapping[str, torch.Tensor]) -> Features:
        normed = dict(features)
        if "text_global" in normed:
            if self.config.global_norm == "l2":
                normed["text_global"] = F.normalize(normed["text_global"], dim=-1)
            else:
                normed["text_global"] = self.norm("text_global_norm", normed["text_global"])
            if "text" in self.config.units and self.config.text_local:
                normed["text_tokens"] = self.norm("text_local_norm", normed["text_tokens"])
        if "image_global" in normed:
            normed["image_global"] = self.norm("image_global_norm", normed["image_global"])
        if "image_patches" in normed:
            normed["image_patches"] = self.norm("image_local_norm", normed["image_patches"])
        return normed

    def _text(self, mentions: Features, entities: Features) -> torch.Tensor:
        global_to_global = mentions["text_global"] @ entities["text_global"].T  # eq. 8
        if not self.config.text_local:
            return global_to_global
        query = self.linear("tglu.fc_query", entities["text_tokens"])  # [N, L, d_t]
        key = self.linear("tglu.fc_key", mentions["text_tokens"])
        value = self.linear("tglu.fc_value", mentions["text_tokens"])
        dim = query.shape[-1]
        attention = query[None] @ key[:, None].transpose(-1, -2) / dim**0.5  # [M, N, L, L]
        if self.config.mask_padding:
            attention = attention.masked_fill(~mentions["mask"][:, None, None], -torch.inf)
        context = attention.softmax(-1) @ value[:, None]  # eq. 9: [M, N, L, d_t]
        if self.config.mask_padding:
            keep = entities["mask"][None, :, :, None].to(context.dtype)
            pooled = (context * keep).sum(2) / keep.sum(2)
        else:
            pooled = context.mean(2)
        pooled = self.norm("tglu.layer_norm", pooled)  # h_t of eq. 10: [M, N, d_t]
        target = self.linear("tglu.fc_global", entities["text_global"])
        if self.config.global_norm == "l2":  # h_t has length √d_t, and this half its weight
            target = F.normalize(target, dim=-1) * self.config.local_scale / dim**0.5
        return (global_to_global + (target[None] * pooled).sum(-1)) / 2

    def _vision(self, mentions: Features, entities: Features) -> torch.Tensor:
        e2m = self._dual("vdlu.entity_to_mention", entities, mentions)
        m2e = self._dual("vdlu.mention_to_entity", mentions, entities)
        return (e2m.T + m2e) / 2

    def _dual(self, name: str, queries: Features, targets: Features) -> torch.Tensor:
        """Computes DUAL_A2B (eq. 11–14) of A queries and B targets, of shape `[A, B]`."""
        query = self.linear(f"{name}.fc_global", queries["image_global"])[:, None]  # [A, 1, d_v]
        key = self.linear(f"{name}.fc_global", targets["image_global"])[None]
        pooled = self.linear(f"{name}.fc_local", targets["image_patches"]).mean(1)[None]
        fused = self.linear(f"{name}.fc", self.norm(f"{name}.add_layer_norm", pooled + query))  # eq. 12: [A, B, d_v]
        gate = torch.tanh(self.linear(f"{name}.fc_gate", fused))  # eq. 13
        value = self.norm(f"{name}.layer_norm", gate * fused + key)
        if self.config.query_norm:
            query = self.norm(f"{name}.layer_norm", query)
        return (value * query).sum(-1)  # eq. 14

    def _cross_modal(self, mentions: Features, entities: Features) -> torch.Tensor:
        return self._fuse(mentions) @ self._fuse(entities).T  # eq. 19

    def _fuse(self, features: Features) -> torch.Tensor:
        """Computes the fused vectors (eq. 15–18), of shape `[B, d_c]`."""
        text = self.linear("cmfu.fc_text", features["text_global"])
        patches = self.linear("cmfu.fc_image", features["image_patches"])
        share = (text[:, None] * patches).sum(-1).softmax(-1)
        context = (share[:, :, None] * patches).sum(1)
        gate = torch.tanh(self.linear("cmfu.fc_gate", text))
        return self.norm("cmfu.layer_norm", gate * text + context)


def rank_directly(
    direct: DirectMimic,
    mentions: Mapping[str, torch.Tensor],
    entities: Mapping[str, torch.Tensor],
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """Computes the scores `[M, N]` block by block, in the order of the published evaluation."""
    count, total = (len(next(iter(side.values()))) for side in (mentions, entities))
    scores = torch.empty(count, total, device=next(iter(mentions.values())).device)
    for first in range(0, count, block[0]):
        rows = {name: tensor[first : first + block[0]] for name, tensor in mentions.items()}
        for start in range(0, total, block[1]):
            part = {name: tensor[start : start + block[1]] for name, tensor in entities.items()}
            scores[first : first + block[0], start : start + block[1]] = direct.score(rows, part)
    return scores


def golden_differences(folder: Path) -> dict[str, float]:
    """Returns the largest absolute difference from each golden score of the published network.

    See `tests.modeling.check_golden`.
    """
    from safetensors.torch import load_file
    from transformers import AutoModel

    from hf_mel.hub.convert import convert_checkpoint

    io = load_file(folder / "io.safetensors")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "model"
        convert_checkpoint("mimic", folder / "state_dict.safetensors", folder / "config.json", output)
        direct = DirectMimic(AutoModel.from_pretrained(output).eval())
    inputs = ("input_ids", "attention_mask", "pixel_values")
    mentions, entities = (
        direct.features(**{name: io[f"{side}_{name}"] for name in inputs}) for side in ("mention", "entity")
    )
    computed = {f"{unit}_score": scores for unit, scores in direct.unit_scores(mentions, entities).items()}
    computed["score"] = direct.score(mentions, entities)
    return {name: (value - io[name]).abs().max().item() for name, value in computed.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "golden",
        type=Path,
        help="folder of golden values, with config.json, state_dict.safetensors and io.safetensors",
    )
    differences = golden_differences(parser.parse_args().golden)
    for name, value in differences.items():
        print(f"{name:20s} {value:.1e}  {'ok' if value <= 1e-5 else 'DIFFERS'}")
    return int(max(differences.values()) > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
