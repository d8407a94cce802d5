"""MIMIC: Multi-Grained Multimodal Interaction Network for Entity Linking (Luo et al., KDD 2023).

Equation numbers are the paper's. `modeling/mimic/README.md` lists where the published network differs from the paper,
and which of the two each option follows. All pairs are scored by matrix products of per-item vectors: VDLU in
[`DualGate`], TGLU's global-to-local half in `scoring_mimic.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .configuration_mimic import MimicConfig
from .dual_bounds_mimic import Gate, caps, entity_products, highest_dual_scores, mention_products
from .scoring_mimic import (
    centred,
    global_to_local_bounds,
    global_to_local_scores,
    global_to_local_scores_above,
    highest_global_to_local_scores,
    masked_mean,
    mention_attention,
    pairs_above,
)

#: Pairs in one block of `quick_scores` on the CPU, so that the two dozen steps of VDLU stay in the cache.
_BLOCK_PAIRS = 2**16
#: Attribute of the model that holds each unit.
_UNIT_MODULES = {"text": "tglu", "vision": "vdlu", "cross_modal": "cmfu"}
#: Encodings that say which mentions have the modalities of a unit.
_UNIT_MASKS = {"text": ("has_text",), "vision": ("has_image",), "cross_modal": ("has_text", "has_image")}

logger = logging.get_logger(__name__)


@dataclass
class MimicMentionEncodings(ModelOutput):
    """Encodings of M mentions, complete for scoring. A field is `None` if the model lacks its unit.

    Args:
        text_global (`torch.Tensor` [M, d_T]): t_M^G, normalised (eq. 8).
        text_keys, text_values (`torch.Tensor` [M, L, d_t]): K and V of eq. 9.
        text_mask (`torch.Tensor` [M, L]): True where a token is not padding. Only with `config.mask_padding`.
        vision_query, vision_pooled, vision_key (`torch.Tensor` [M, d_v]): v_A^G as query of mention-to-entity, and
            pooled patches and v_B^G as target of entity-to-mention (eq. 11–14).
        cross_modal (`torch.Tensor` [M, d_c]): h_m of eq. 18.
        has_text, has_image (`torch.Tensor` [M]): True for a mention that has the modality. Only with
            `config.missing_images="absent"`; `has_text` only in a model that reads images, too.
    """

    text_global: torch.Tensor | None = None
    text_keys: torch.Tensor | None = None
    text_values: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    vision_query: torch.Tensor | None = None
    vision_pooled: torch.Tensor | None = None
    vision_key: torch.Tensor | None = None
    cross_modal: torch.Tensor | None = None
    has_text: torch.Tensor | None = None
    has_image: torch.Tensor | None = None


@dataclass
class MimicEntityEncodings(ModelOutput):
    """Encodings of N entities, complete for scoring. A field is `None` if the model lacks its unit.

    Args:
        text_global (`torch.Tensor` [N, d_T]): t_E^G, normalised (eq. 8).
        text_query_global (`torch.Tensor` [N, d_t]): FC(t_E^G) of eq. 10.
        text_queries (`torch.Tensor` [N, L, d_t]): Q of eq. 9.
        text_mask (`torch.Tensor` [N, L]): True where a token is not padding. Only with `config.mask_padding`.
        vision_query, vision_pooled, vision_key (`torch.Tensor` [N, d_v]): v_A^G as query of entity-to-mention, and
            pooled patches and v_B^G as target of mention-to-entity (eq. 11–14).
        cross_modal (`torch.Tensor` [N, d_c]): h_e of eq. 18.
    """

    text_global: torch.Tensor | None = None
    text_query_global: torch.Tensor | None = None
    text_queries: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    vision_query: torch.Tensor | None = None
    vision_pooled: torch.Tensor | None = None
    vision_key: torch.Tensor | None = None
    cross_modal: torch.Tensor | None = None


@dataclass
class MimicOutput(ModelOutput):
    """Output of [`MimicModel`].

    Args:
        loss (`torch.Tensor` [], *optional*): Eq. 22. Returned if `labels` are given.
        scores (`torch.Tensor` [M, N]): Eq. 7. Higher is better.
        unit_scores (`dict[str, torch.Tensor]`): Eq. 4–6, unit name → scores [M, N]; nan for a mention that lacks the
            unit's modality.
        losses (`dict[str, torch.Tensor]`, *optional*): The terms of eq. 22: "overall" (eq. 20), and one of each unit (eq. 21).
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None
    losses: dict[str, torch.Tensor] | None = None


class _AlignedLinear(nn.Linear):
    """Linear map without a bias at first, whose weight starts as one orthogonal matrix for all maps of its shape."""


class _MissingImage(nn.Module):
    """Learned features in place of those of a missing image: v^G, and the one patch that all patches equal."""

    def __init__(self, dim: int, has_global: bool):
        super().__init__()
        self.patch = nn.Parameter(torch.zeros(dim))
        if has_global:
            self.whole = nn.Parameter(torch.zeros(dim))

    def forward(
        self, image_global: torch.Tensor | None, image_local: torch.Tensor, present: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Replaces the features [B, d_v] and [B, n, d_v] of the images that `present` [B] says are missing."""
        image_local = torch.where(present[:, None, None], image_local, self.patch.to(image_local))
        if image_global is not None:
            image_global = torch.where(present[:, None], image_global, self.whole.to(image_global))
        return image_global, image_local


class _NilScore(nn.Module):
    """Learned score of "none of the entities": a vector and a bias beside the entities' first-stage vectors."""

    def __init__(self, dim: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, query_vectors: torch.Tensor) -> torch.Tensor:
        """Scores [M] of mentions with first-stage vectors [M, D]."""
        return query_vectors @ self.vector + self.bias


class TGLU(nn.Module):
    """Text-based Global-Local interaction Unit (§3.3.1, eq. 4 and 8–10)."""

    def __init__(self, config: MimicConfig, global_dim: int, local_dim: int):
        super().__init__()
        self.local, self.mask_padding = config.text_local, config.mask_padding
        if self.local:
            linear = _AlignedLinear if config.local_init == "aligned" else nn.Linear
            self.fc_query = linear(local_dim, config.text_dim)
            self.fc_key = linear(local_dim, config.text_dim)
            self.fc_value = linear(local_dim, config.text_dim)
            self.fc_global = linear(global_dim, config.text_dim)
            self.layer_norm = nn.LayerNorm(config.text_dim)
            # With cosines, FC(t_E^G) has length 1 and LayerNorm gives h_t length √d_t, which this scale divides out.
            self.cosine_scale = config.local_scale * config.text_dim**-0.5 if config.global_norm == "l2" else None

    def encode_mentions(self, text_global, text_local, mask) -> dict[str, torch.Tensor]:
        """Global feature, and K and V of eq. 9."""
        encoded = {"text_global": text_global}
        if self.local:
            encoded |= {"text_keys": self.fc_key(text_local), "text_values": self.fc_value(text_local)}
            if self.mask_padding:
                encoded["text_mask"] = mask.bool()
        return encoded

    def encode_entities(self, text_global, text_local, mask) -> dict[str, torch.Tensor]:
        """Global feature, FC(t_E^G) of eq. 10, and Q of eq. 9."""
        encoded = {"text_global": text_global}
        if self.local:
            query_global = self.fc_global(text_global)
            if self.cosine_scale is not None:
                query_global = F.normalize(query_global, dim=-1) * self.cosine_scale
            encoded |= {"text_query_global": query_global, "text_queries": self.fc_query(text_local)}
            if self.mask_padding:
                encoded["text_mask"] = mask.bool()
        return encoded

    def forward(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """S_T [M, N] (eq. 4), or S_T^G2G (eq. 8) if the unit has no local half."""
        quick = self.quick_scores(mentions, entities)
        return quick + global_to_local_scores(mentions, entities, self.layer_norm) / 2 if self.local else quick

    def quick_scores(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Part of S_T (eq. 4) that S_T^G2G (eq. 8) contributes, [M, N]."""
        global_to_global = mentions["text_global"] @ entities["text_global"].T
        return global_to_global / 2 if self.local else global_to_global

    def query_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """First-stage vectors [M, D]: t_M^G, and h_t (eq. 10) under uniform attention."""
        if not self.local:
            return mentions["text_global"]
        mask = mentions.get("text_mask")
        values = mentions["text_values"]
        context = self.layer_norm(values.mean(1) if mask is None else masked_mean(values, mask))
        return torch.cat([mentions["text_global"], context], -1) / 2  # eq. 4

    def index_vectors(self, entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """First-stage vectors [N, D]: t_E^G, and FC(t_E^G) of eq. 10."""
        if not self.local:
            return entities["text_global"]
        return torch.cat([entities["text_global"], entities["text_query_global"]], -1)


class DualGate(nn.Module):
    """DUAL_A2B of eq. 11–14 (§3.3.2): scores every A against every B, gated by both."""

    def __init__(self, config: MimicConfig):
        super().__init__()
        dim = config.vision_dim
        self.query_norm = config.query_norm
        self.fc_global = nn.Linear(dim, dim)
        self.fc_local = nn.Linear(dim, dim)
        self.add_layer_norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, dim)
        self.fc_gate = nn.Linear(dim, 1)
        self.layer_norm = nn.LayerNorm(dim)

    def encode_query(self, image_global: torch.Tensor) -> torch.Tensor:
        """v_A^G [A, d_v]."""
        return self.fc_global(image_global)

    def encode_target(self, image_global: torch.Tensor, image_local: torch.Tensor):
        """Mean of V_B^L (eq. 12) and v_B^G, both [B, d_v]. The mean comes first, as it commutes with a linear map."""
        return self.fc_local(image_local.mean(1)), self.fc_global(image_global)

    def query_vectors(self, query: torch.Tensor) -> torch.Tensor:
        """The factor of A in eq. 14, [A, d_v]."""
        return self.layer_norm(query) if self.query_norm else query

    def caps(self, query: torch.Tensor) -> torch.Tensor:
        """Scores [A] that S_V^A2B exceeds for no B."""
        gate = Gate(self)
        return caps(gate.constants.dim, gate.asking(query)[2])

    def target_vectors(self, pooled: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """v_B^L of eq. 13 if v_A^G is zero in eq. 12, [B, d_v]: the part that depends on B alone."""
        fused = self.fc(self.add_layer_norm(pooled))
        return self.layer_norm(torch.tanh(self.fc_gate(fused)) * fused + key)

    def forward(self, query: torch.Tensor, pooled: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """S_V^A2B [A, B] from v_A^G [A, d_v], the mean patch [B, d_v] and v_B^G [B, d_v].

        The printed equations build [A, B, d_v] tensors. With x̃ for x centred, eq. 12 is
        h_vc = W(γ(p̃ + ã)/σ₁ + β) + c = (P + Q)/σ₁ + c', where P = Wγp̃ depends on B alone and Q = Wγã on A alone. The
        gate of eq. 13 therefore needs one inner product per pair (inside σ₁), and the second LayerNorm four more.
        """
        norm1, norm2 = self.add_layer_norm, self.layer_norm
        dim = query.shape[-1]
        a, p = centred(query), centred(pooled)
        weight = self.fc.weight * norm1.weight
        q_map, p_map = a @ weight.T, p @ weight.T
        constant = self.fc.weight @ norm1.bias + self.fc.bias
        gate_weight = self.fc_gate.weight[0]

        inverse1 = torch.rsqrt((_norms(a, p) + 2 * a @ p.T).clamp(min=0) / dim + norm1.eps)  # 1/σ₁ [A, B]
        gate = torch.tanh(
            inverse1 * ((q_map @ gate_weight)[:, None] + (p_map @ gate_weight)[None])
            + constant @ gate_weight
            + self.fc_gate.bias
        )  # h_vg [A, B]

        # y = u(P + Q) + g c' + k is the argument of the LayerNorm of eq. 13.
        u = gate * inverse1
        k = centred(key)
        q_map, p_map, constant = centred(q_map), centred(p_map), centred(constant)
        squared = (
            u.square() * (_norms(q_map, p_map) + 2 * q_map @ p_map.T)
            + gate.square() * constant.square().sum()
            + k.square().sum(-1)[None]
            + 2 * u * gate * ((q_map @ constant)[:, None] + (p_map @ constant)[None])
            + 2 * u * ((p_map * k).sum(-1)[None] + q_map @ k.T)
            + 2 * gate * (k @ constant)[None]
        )  # |ỹ|²
        inverse2 = torch.rsqrt(squared.clamp(min=0) / dim + norm2.eps)

        final = norm2(query) if self.query_norm else query
        r = final * norm2.weight
        dot = u * ((q_map * r).sum(-1)[:, None] + r @ p_map.T) + gate * (r @ constant)[:, None] + r @ k.T
        # If rounding is all that is left of |ỹ|, the quotient means nothing. By Cauchy and Schwarz, no score exceeds `reach`.
        reach = (centred(r).norm(dim=-1) * dim**0.5)[:, None]
        return (dot * inverse2).clamp(-reach, reach) + (final @ norm2.bias)[:, None]


def _norms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a|² + |b|² of every pair, [A, B]."""
    return a.square().sum(-1)[:, None] + b.square().sum(-1)[None]


class VDLU(nn.Module):
    """Vision-based DuaL interaction Unit (§3.3.2, eq. 5 and 11–14)."""

    def __init__(self, config: MimicConfig):
        super().__init__()
        self.entity_to_mention = DualGate(config)
        self.mention_to_entity = DualGate(config)

    def encode_mentions(self, image_global, image_local) -> dict[str, torch.Tensor]:
        """Target of entity-to-mention, and query of mention-to-entity."""
        pooled, key = self.entity_to_mention.encode_target(image_global, image_local)
        query = self.mention_to_entity.encode_query(image_global)
        return {"vision_query": query, "vision_pooled": pooled, "vision_key": key}

    def encode_entities(self, image_global, image_local) -> dict[str, torch.Tensor]:
        """Target of mention-to-entity, and query of entity-to-mention."""
        pooled, key = self.mention_to_entity.encode_target(image_global, image_local)
        query = self.entity_to_mention.encode_query(image_global)
        return {"vision_query": query, "vision_pooled": pooled, "vision_key": key}

    def forward(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """S_V [M, N] (eq. 5)."""
        e2m = self.entity_to_mention(entities["vision_query"], mentions["vision_pooled"], mentions["vision_key"])
        m2e = self.mention_to_entity(mentions["vision_query"], entities["vision_pooled"], entities["vision_key"])
        return (e2m.T + m2e) / 2


class CMFU(nn.Module):
    """Cross-Modal Fusion-based interaction Unit (§3.3.3, eq. 15–19)."""

    def __init__(self, config: MimicConfig, global_dim: int):
        super().__init__()
        dim = config.fusion_dim
        self.fc_text = nn.Linear(global_dim, dim)
        self.fc_image = nn.Linear(config.vision_dim, dim)
        self.fc_gate = nn.Linear(dim, 1 if config.gate == "scalar" else dim)
        self.layer_norm = nn.LayerNorm(dim)

    def fuse(self, text_global: torch.Tensor, image_local: torch.Tensor) -> torch.Tensor:
        """h_o [B, d_c] = FUSE(h_ot, H_ov) (eq. 15–18)."""
        text, patches = self.fc_text(text_global), self.fc_image(image_local)
        context = (self._attention(text, patches).unsqueeze(1) @ patches).squeeze(1)
        return self.layer_norm(torch.tanh(self.fc_gate(text)) * text + context)

    def attention(self, text_global: torch.Tensor, image_local: torch.Tensor) -> torch.Tensor:
        """α of eq. 15–16: the attention [B, n] over n patches."""
        return self._attention(self.fc_text(text_global), self.fc_image(image_local))

    @staticmethod
    def _attention(text: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return (patches @ text.unsqueeze(-1)).squeeze(-1).softmax(-1)

    def forward(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """S_C [M, N] (eq. 19)."""
        return mentions["cross_modal"] @ entities["cross_modal"].T


class MimicPreTrainedModel(PreTrainedModel):
    """Base class of the MIMIC models: configuration, weight initialisation, and attention implementations."""

    config: MimicConfig
    config_class = MimicConfig
    base_model_prefix = "mimic"
    main_input_name = "mention_input_ids"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, so the Trainer must scale it when accumulating
    _no_split_modules = []
    # The units have no self-attention. These flags let an attention implementation reach the backbones.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _AlignedLinear):
            # One seed, so that query, key, value and global map start as the same projection.
            shared = torch.empty(module.weight.shape)
            nn.init.orthogonal_(shared, generator=torch.Generator().manual_seed(0))
            init.copy_(module.weight, shared.to(module.weight))
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # PyTorch's default, as in the published network
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, _MissingImage | _NilScore):
            for vector in module.parameters():
                init.zeros_(vector)


class MimicModel(MimicPreTrainedModel):
    """MIMIC, a retriever: encodes mentions and entities apart and scores every pair by up to three units.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/mimic-wikimel")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/mimic-wikimel")  # doctest: +SKIP
    >>> mentions = model.encode_mentions(**processor(mentions=mention_rows))  # doctest: +SKIP
    >>> entities = model.encode_entities(**processor(entities=entity_rows))  # doctest: +SKIP
    >>> model.score(mentions, entities)  # [M, N] # doctest: +SKIP
    ```
    """

    #: Pretrained submodules. The trainer may give all other parameters another learning rate.
    backbone_names = ("text_model", "vision_model", "text_projection", "visual_projection")

    def __init__(self, config: MimicConfig):
        super().__init__(config)
        units = set(config.units or ())
        has_text, has_vision = bool(units & {"text", "cross_modal"}), bool(units & {"vision", "cross_modal"})

        if has_text:
            # An unused pooling head would be a parameter without a gradient, which breaks distributed training.
            self.text_model = _build_backbone(config.text_config, config.text_pooling == "pooler")
            local_dim: int = config.text_config.hidden_size  # type: ignore[union-attr]
            global_dim = config.projection_dim or local_dim
            if config.projection_dim:
                self.text_projection = nn.Linear(local_dim, config.projection_dim, bias=False)
            if config.global_norm == "layer_norm":
                self.text_global_norm = nn.LayerNorm(global_dim)
            if config.local_init == "aligned" and global_dim != local_dim:
                raise ValueError(
                    f"local_init='aligned' needs global and local text features of the same width, but theirs are "
                    f"{global_dim} and {local_dim}. Leave projection_dim unset, or set local_init='default'."
                )
        if has_vision:
            self.vision_model = _build_backbone(config.vision_config, False)
            patch_dim = _last_width(config.vision_config)
            if config.projection_dim:
                self.visual_projection = nn.Linear(patch_dim, config.projection_dim, bias=False)
            self.image_local_fc = nn.Linear(patch_dim, config.vision_dim)
            self.image_local_norm = nn.LayerNorm(config.vision_dim)
            if config.missing_images == "absent":
                self.missing_image = _MissingImage(config.vision_dim, "vision" in units)

        if "text" in units:
            if config.text_local:
                self.text_local_norm = nn.LayerNorm(local_dim)
            self.tglu = TGLU(config, global_dim, local_dim)
        if "vision" in units:
            self.image_global_fc = nn.Linear(config.projection_dim or patch_dim, config.vision_dim)
            self.image_global_norm = nn.LayerNorm(config.vision_dim)
            self.vdlu = VDLU(config)
        if "cross_modal" in units:
            self.cmfu = CMFU(config, global_dim)
        if config.nil_score:
            widths = {
                "text": global_dim + (config.text_dim if config.text_local else 0) if "text" in units else 0,
                "vision": 2 * config.vision_dim,
                "cross_modal": config.fusion_dim,
            }
            self.nil = _NilScore(sum(widths[unit] for unit in units))
        self.post_init()

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> MimicModel:
        """Builds a model with pretrained encoders and untrained units.

        A text encoder's pooler that was never trained is not read, unless `text_pooling` asks for it. A warning says so.

        Args:
            text (`str`, *optional*): Hub id or folder of a text encoder, or of a CLIP model, which provides both
                encoders and the joint space.
            vision (`str`, *optional*): Hub id or folder of an image encoder.
            config: Fields of [`MimicConfig`]. With an image encoder, `missing_images` is "absent" and `image_dropout` 0.1
                unless they are given; the published network has "zeros".

        Raises:
            `ValueError`: Neither `text` nor `vision` is given.
        """
        if text is None and vision is None:
            raise ValueError(
                "No encoder is given. Pass the Hub id or folder of a text encoder, a vision encoder, or both."
            )
        parts: dict[str, Any] = {}
        if text is not None and AutoConfig.from_pretrained(text).model_type == "clip":
            clip = AutoModel.from_pretrained(text)
            parts = {name: getattr(clip, name) for name in cls.backbone_names}
            config.setdefault("projection_dim", clip.config.projection_dim)
        elif text is not None:
            parts["text_model"] = AutoModel.from_pretrained(text)
            if "text_pooling" not in config and _pooler_is_untrained(parts["text_model"]):
                logger.warning("The pooler of %s was never trained. The mean of all states is read instead.", text)
                config["text_pooling"] = "mean"
        if vision is not None:
            parts["vision_model"] = AutoModel.from_pretrained(vision)
            parts.pop("visual_projection", None)
        for name in ("text_model", "vision_model"):
            if name in parts:
                encoder = parts[name].config.to_dict()
                encoder.pop("_name_or_path", None)  # it may be a local path, and the weights are saved with the model
                config.setdefault(name.replace("model", "config"), encoder)
        if config.get("vision_config") and config.setdefault("missing_images", "absent") == "absent":
            config.setdefault("image_dropout", 0.1)
        model = cls(MimicConfig(**config))
        for name, part in parts.items():
            target = getattr(model, name, None)
            if target is not None and (name.endswith("model") or config["projection_dim"]):
                target_keys = target.state_dict().keys()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in target_keys})
        return model

    @classmethod
    def from_text_encoder(cls, encoder: PreTrainedModel, pooling: str = "mean") -> MimicModel:
        """Makes a bi-encoder of a pretrained text encoder. It has no other parameters, so it works without training.

        The score is S_T^G2G of eq. 8 alone: the cosine of the pooled texts of mention and entity.

        Args:
            encoder (`PreTrainedModel`): A BERT-like text encoder.
            pooling (`str`): As `text_pooling` of [`MimicConfig`].
        """
        config = encoder.config.to_dict()
        config.pop("_name_or_path", None)
        model = cls(
            MimicConfig(
                text_config=config,
                units=["text"],
                text_pooling=pooling,
                text_local=False,
                global_norm="l2",
                mask_padding=True,
            )
        )
        weights, target_keys = encoder.state_dict(), model.text_model.state_dict().keys()
        model.text_model.load_state_dict({key: weights[key] for key in target_keys})
        return model

    @property
    def leaves_out_missing_images(self) -> bool:
        """Whether a missing image is absent from the score, as [`hf_mel.protocols.leaves_out_missing_images`] asks."""
        return self.config.missing_images == "absent" or not hasattr(self, "vision_model")

    @property
    def learns_nil(self) -> bool:
        """Whether NIL mentions take part in training, as [`hf_mel.protocols.learns_nil`] asks."""
        return hasattr(self, "nil")

    def _text_features(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """t^G [B, d_T] and T^L [B, L, d] (§3.2.2)."""
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask)
        local, pooling = output.last_hidden_state, self.config.text_pooling
        if pooling == "mean":
            pooled = masked_mean(local, attention_mask)
        elif pooling == "cls":
            pooled = local[:, 0]
        else:
            pooled = output.pooler_output
            if pooled is None:
                raise ValueError(
                    f"The text encoder {type(self.text_model).__name__} has no pooled output. Set text_pooling to "
                    "'cls' or 'mean'."
                )
        if self.config.projection_dim:
            pooled = F.normalize(self.text_projection(pooled), dim=-1)
        if self.config.global_norm == "l2":
            return F.normalize(pooled, dim=-1), local
        return self.text_global_norm(pooled), local

    def _image_features(self, pixel_values) -> tuple[torch.Tensor | None, torch.Tensor]:
        """v^G [B, d_v] (`None` without VDLU) and V^L [B, n, d_v] (§3.2.1)."""
        output = self.vision_model(pixel_values=pixel_values)
        local, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if local.dim() == 4:  # the feature map [B, C, H, W] of a CNN: every cell is a patch
            local = local.flatten(2).transpose(1, 2)
            pooled = local.mean(1) if pooled is None else pooled.flatten(1)
        elif pooled is None:
            pooled = local[:, 0]
        patches = self.image_local_norm(self.image_local_fc(local))
        if not hasattr(self, "vdlu"):
            return None, patches
        if self.config.projection_dim:
            pooled = F.normalize(self.visual_projection(pooled), dim=-1)
        return self.image_global_norm(self.image_global_fc(pooled)), patches

    def _encode(
        self, side: str, input_ids, attention_mask, pixel_values, image_mask, text_mask=None
    ) -> dict[str, torch.Tensor]:
        """Encodings of `side`, "mention" or "entity"; see [`~MimicModel.encode_mentions`]."""
        encoded: dict[str, torch.Tensor] = {}
        absent = self.config.missing_images == "absent"
        if hasattr(self, "text_model"):
            if input_ids is None:
                raise ValueError(f"{side}_input_ids is missing. Pass it, as this model reads text.")
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
            width = input_ids.shape[1]
            if self.config.mask_padding or not self.config.text_local:
                # Padding changes no score, so columns that are padding in every row are left out of the forward pass.
                used = attention_mask.any(0).nonzero()
                width = int(used[-1]) + 1 if len(used) else 1
            text_global, text_local = self._text_features(input_ids[:, :width], attention_mask[:, :width])
            text_local = F.pad(text_local, (0, 0, 0, input_ids.shape[1] - width))
        if hasattr(self, "vision_model"):
            if pixel_values is None:
                raise ValueError(f"{side}_pixel_values is missing. Pass it, as this model reads images.")
            image_global, image_local = self._image_features(pixel_values)
            if absent:
                present = self._present(f"{side}_image_mask", image_mask)
                if side == "entity" and self.training and self.config.image_dropout:
                    present = present & (torch.rand(present.shape, device=present.device) >= self.config.image_dropout)
                image_global, image_local = self.missing_image(image_global, image_local, present)
                if side == "mention":
                    encoded["has_image"] = present
        if absent and side == "mention" and hasattr(self, "text_model") and hasattr(self, "vision_model"):
            encoded["has_text"] = self._present("mention_text_mask", text_mask)
        if hasattr(self, "tglu"):
            if self.config.text_local:
                text_local = self.text_local_norm(text_local)
            encode_text = self.tglu.encode_mentions if side == "mention" else self.tglu.encode_entities
            encoded |= encode_text(text_global, text_local, attention_mask)
        if hasattr(self, "vdlu"):
            encode_image = self.vdlu.encode_mentions if side == "mention" else self.vdlu.encode_entities
            encoded |= encode_image(image_global, image_local)
        if hasattr(self, "cmfu"):
            encoded["cross_modal"] = self.cmfu.fuse(text_global, image_local)
        return encoded

    @staticmethod
    def _present(name: str, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            raise ValueError(
                f"{name} is missing. Pass it, or build the processor with modality_masks=True: this model leaves missing "
                "images and texts out (missing_images='absent')."
            )
        return mask.bool()

    def encode_mentions(
        self,
        mention_input_ids: torch.LongTensor | None = None,
        mention_attention_mask: torch.Tensor | None = None,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_text_mask: torch.Tensor | None = None,
    ) -> MimicMentionEncodings:
        """Encodes M mentions.

        Args:
            mention_input_ids, mention_attention_mask (`torch.Tensor` [M, L]): The texts.
            mention_pixel_values (`torch.Tensor` [M, 3, H, W]): The images.
            mention_image_mask, mention_text_mask (`torch.Tensor` [M]): True for a mention that has an image or a text.
                Needed with `config.missing_images="absent"`, otherwise ignored.
        """
        return MimicMentionEncodings(
            **self._encode(
                "mention",
                mention_input_ids,
                mention_attention_mask,
                mention_pixel_values,
                mention_image_mask,
                mention_text_mask,
            )
        )

    def encode_entities(
        self,
        entity_input_ids: torch.LongTensor | None = None,
        entity_attention_mask: torch.Tensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
    ) -> MimicEntityEncodings:
        """Encodes N entities: `input_ids` and `attention_mask` [N, L], `pixel_values` [N, 3, H, W], `image_mask` [N]."""
        return MimicEntityEncodings(
            **self._encode("entity", entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask)
        )

    def unit_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """S_T, S_V, S_C (eq. 4–6) of every pair, unit name → [M, N], for the model's units.

        The scores of a mention that lacks a unit's modality are nan (`config.missing_images="absent"`). Scores are float32
        even under autocast: half precision has too few digits for ranking, and VDLU's expansion subtracts nearly equal
        terms.
        """
        return _nan_where_absent(self._all_unit_scores(mentions, entities), self._units_present(mentions))

    def _all_unit_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Scores [M, N] of every unit, also for mentions that lack its modality."""
        mentions, entities = _to_float32(mentions), _to_float32(entities)
        with torch.autocast(self.device.type, enabled=False):
            return {unit: getattr(self, _UNIT_MODULES[unit])(mentions, entities) for unit in self.config.units or ()}

    def _units_present(self, mentions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """Returns a mask of the mentions that have the modalities of each unit: unit name → [M], `None` if all have them."""
        masks = {}
        for unit in self.config.units or ():
            present = [mask for name in _UNIT_MASKS[unit] if (mask := mentions.get(name)) is not None]
            masks[unit] = torch.stack(present).bool().all(0) if present else None
        return masks

    def _unit_weights(
        self, mentions: Mapping[str, torch.Tensor], shares: Sequence[float] | None = None
    ) -> dict[str, torch.Tensor | float]:
        """Weight of each unit in the mean of eq. 7: unit name → [M], or one number if all mentions have all units.

        `shares`, by default `config.unit_weights`, weigh the mean. A mention with no unit at all has weights of 0, so that its
        scores are equal.
        """
        present = self._units_present(mentions)
        shares_of_units = shares or self.config.unit_weights or [1.0] * len(present)
        share_of = dict(zip(present, shares_of_units, strict=True))
        masks = [mask for mask in present.values() if mask is not None]
        if not masks:
            return {unit: share / sum(share_of.values()) for unit, share in share_of.items()}
        counts = {
            unit: share_of[unit] * (masks[0].new_ones(len(masks[0])) if mask is None else mask)
            for unit, mask in present.items()
        }
        total = torch.stack(list(counts.values())).sum(0)
        total = total.masked_fill(total == 0, 1)
        return {unit: count / total for unit, count in counts.items()}

    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """S [M, N] (eq. 7), the (weighted) mean of the scores of the units whose modalities the mention has.

        With `config.nil_score`, less the mention's NIL score, which changes no rank.
        """
        scores = _weighted_sum(self._all_unit_scores(mentions, entities), self._unit_weights(mentions))
        return self._minus_nil(scores, mentions)

    def _minus_nil(self, scores: torch.Tensor, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores [M, N] less the NIL scores of the mentions, if the model has them."""
        if not hasattr(self, "nil"):
            return scores
        query_vectors = self._nil_vectors(mentions)
        with torch.autocast(self.device.type, enabled=False):
            return scores - self.nil(query_vectors)[:, None]

    def _nil_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [M, D] that the NIL score is read from: those of the weights of the loss, which it was trained on."""
        return self._query_vectors(mentions, self.config.loss_unit_weights)

    def _nil_rounding(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rounding [M] that bounds of scores less NIL scores need: more than that of the difference, which may be near 0.

        Sums are rounded in another way for other numbers of mentions and entities.
        """
        with torch.autocast(self.device.type, enabled=False):
            lengths = self._nil_vectors(mentions).norm(dim=-1)
            return (lengths * self.nil.vector.norm() + self.nil.bias.abs()) * 1e-5

    @torch.no_grad()
    def quick_scores(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """S [M, N] (eq. 7) without TGLU's local half: the part that takes only products of per-item vectors."""
        mentions, entities = _to_float32(mentions), _to_float32(entities, without="text_queries")
        units = {unit: getattr(self, _UNIT_MODULES[unit]) for unit in self.config.units or ()}
        weights = self._unit_weights(mentions)
        m, n = (len(next(iter(side.values()))) for side in (mentions, entities))
        step = max(1, _BLOCK_PAIRS // max(1, m)) if self.device.type == "cpu" else max(1, n)
        columns = []
        with torch.autocast(self.device.type, enabled=False):
            for first in range(0, max(1, n), step):
                part = {name: tensor[first : first + step] for name, tensor in entities.items()}
                scores = {name: getattr(unit, "quick_scores", unit)(mentions, part) for name, unit in units.items()}
                columns.append(_weighted_sum(scores, weights))
        return self._minus_nil(torch.cat(columns, 1), mentions)

    @torch.no_grad()
    def remaining_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor], floor: torch.Tensor
    ) -> torch.Tensor:
        """Part of S that [`~MimicModel.quick_scores`] leaves out, [M, N].

        Args:
            mentions ([`MimicMentionEncodings`]): Of M mentions.
            entities ([`MimicEntityEncodings`]): Of N entities; half precision is read as stored.
            floor (`torch.Tensor` [M, N]): A pair whose remaining score is surely below it gets -inf.
        """
        if "text" not in (self.config.units or ()) or not self.config.text_local:
            return torch.zeros_like(floor)
        mentions, entities = _to_float32(mentions), {**entities, **_to_float32(entities, without="text_queries")}
        weight, without_text, floor = self._local_floor(mentions, floor)
        with torch.autocast(self.device.type, enabled=False):
            scores = global_to_local_scores_above(mentions, entities, floor, self.tglu.layer_norm)
        return scores * weight if without_text is None else torch.where(without_text, 0, scores * weight)

    @torch.no_grad()
    def may_reach(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor], floor: torch.Tensor
    ) -> torch.Tensor:
        """Mask [M, N] of pairs: False where [`~MimicModel.remaining_scores`] is surely below `floor` [M, N].

        Args:
            mentions ([`MimicMentionEncodings`]): Of M mentions.
            entities: `pair_bound_encodings` of N entities; half precision is read as stored.
            floor: As in [`~MimicModel.remaining_scores`].
        """
        if not self.pair_bound_encodings:
            return floor <= 0
        mentions, entities = _to_float32(mentions), _to_float32(entities, without="text_queries")
        _, without_text, local_floor = self._local_floor(mentions, floor)
        with torch.autocast(self.device.type, enabled=False):
            candidates = pairs_above(mentions, entities, local_floor, self.tglu.layer_norm)
        return candidates if without_text is None else torch.where(without_text, floor <= 0, candidates)

    def _local_floor(
        self, mentions: Mapping[str, torch.Tensor], floor: torch.Tensor
    ) -> tuple[torch.Tensor | float, torch.Tensor | None, torch.Tensor]:
        """Weight of S_T^G2L in S (a number, or [M, 1]), mentions for which it is 0 [M, 1], and `floor` [M, N] for S_T^G2L."""
        weight = self._unit_weights(mentions)["text"] / 2  # eq. 4 and 7
        if not isinstance(weight, torch.Tensor):
            return weight, None, floor / weight
        weight = weight[:, None]
        without_text = weight == 0
        return weight, without_text, torch.where(without_text, torch.inf, floor / weight.masked_fill(without_text, 1))

    @torch.no_grad()
    def query_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """First-stage vectors of mentions, [M, D], float32.

        Their inner products with the entities' [`~MimicModel.index_vectors`] approximate the scores, up to the NIL score,
        which is the same for all entities of a mention. CMFU and TGLU's global half are inner products already. The other
        two parts are approximated by leaving out the interaction of mention and entity: TGLU's local half by h_t under
        uniform attention (eq. 9), VDLU by v_B^L without the other image (eq. 12).
        """
        return self._query_vectors(mentions)

    def _query_vectors(
        self, mentions: Mapping[str, torch.Tensor], shares: Sequence[float] | None = None
    ) -> torch.Tensor:
        """[`~MimicModel.query_vectors`], with gradients and with the weights of [`~MimicModel._unit_weights`]."""
        mentions = _to_float32(mentions)
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for unit in self.config.units or ():
                if unit == "text":
                    parts.append(self.tglu.query_vectors(mentions))
                elif unit == "vision":
                    targets = self.vdlu.entity_to_mention.target_vectors(
                        mentions["vision_pooled"], mentions["vision_key"]
                    )
                    queries = self.vdlu.mention_to_entity.query_vectors(mentions["vision_query"])
                    parts.append(torch.cat([targets, queries], -1) / 2)  # eq. 5
                else:
                    parts.append(mentions["cross_modal"])
            weights = self._unit_weights(mentions, shares).values()  # eq. 7
            parts = [part * _column(weight) for part, weight in zip(parts, weights, strict=True)]
        return torch.cat(parts, -1)

    @torch.no_grad()
    def index_vectors(self, entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """First-stage vectors of entities, [N, D], float32; see [`~MimicModel.query_vectors`]."""
        entities = _to_float32(entities, without="text_queries")
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for unit in self.config.units or ():
                if unit == "text":
                    parts.append(self.tglu.index_vectors(entities))
                elif unit == "vision":
                    queries = self.vdlu.entity_to_mention.query_vectors(entities["vision_query"])
                    targets = self.vdlu.mention_to_entity.target_vectors(
                        entities["vision_pooled"], entities["vision_key"]
                    )
                    parts.append(torch.cat([queries, targets], -1))
                else:
                    parts.append(entities["cross_modal"])
        return torch.cat(parts, -1)

    @property
    def entity_token_masks(self) -> dict[str, str]:
        """The mask outside of which TGLU reads no Q of eq. 9; none if padding counts, as in the published network."""
        is_masked = "text" in (self.config.units or ()) and self.config.text_local and self.config.mask_padding
        return {"text_queries": "text_mask"} if is_masked else {}

    @torch.no_grad()
    def bound_queries(self, mentions: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [M, D], w [M, R] and c [M] (float32), which bound the scores from above.

        With x and b of [`~MimicModel.bound_vectors`], S ≤ ⟨q, x⟩ + ⟨w, b⟩ + c (eq. 7) for every pair. Unit by unit:

        - TGLU: S_T^G2G is the inner product of the global features (eq. 8). S_T^G2L (eq. 9–10) is at most b = √d_t |q'|
          and the constant of its LayerNorm ([`~scoring_mimic.pairs_above`]).
        - VDLU: each direction of S_V (eq. 5) is at most the cap of its A in eq. 14 ([`~dual_bounds_mimic.caps`]), of which
          the entity's is in b and the mention's in c. [`~MimicModel.product_bounds`] brings the bound close to S_V.
        - CMFU: S_C is an inner product (eq. 19).

        c is less the NIL score of a model that learns it.
        """
        mentions = _to_float32(mentions)
        vectors, extras = [], []
        with torch.autocast(self.device.type, enabled=False):
            first = next(iter(mentions.values()))
            constant = first.new_zeros(len(first), dtype=torch.float32)
            if hasattr(self, "nil"):
                constant = self._nil_rounding(mentions) - self.nil(self._nil_vectors(mentions))
            for unit, weight in self._unit_weights(mentions).items():
                if unit == "text":
                    share = weight / 2 if self.config.text_local else weight  # eq. 4
                    vectors.append(mentions["text_global"] * _column(share))
                    if self.config.text_local:
                        extras.append(_repeated(share, constant))
                elif unit == "vision":
                    share = weight / 2  # eq. 5
                    extras.append(_repeated(share, constant))
                    constant = constant + share * self.vdlu.mention_to_entity.caps(mentions["vision_query"])
                else:
                    vectors.append(mentions["cross_modal"] * _column(weight))
        # A model with VDLU alone has no inner products, and a vector of one zero.
        return (
            torch.cat(vectors or [constant.new_zeros(len(constant), 1)], -1),
            torch.stack([*extras, constant], 1)[:, : len(extras)],
            constant,
        )

    @torch.no_grad()
    def bound_vectors(self, entities: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, D] and b [N, R] (float32); see [`~MimicModel.bound_queries`]."""
        entities = _to_float32(entities, without="text_queries")
        vectors, extras = [], []
        with torch.autocast(self.device.type, enabled=False):
            for unit in self.config.units or ():
                if unit == "text":
                    vectors.append(entities["text_global"])
                    if self.config.text_local:
                        extras.append(highest_global_to_local_scores(entities, self.tglu.layer_norm))
                elif unit == "vision":
                    extras.append(self.vdlu.entity_to_mention.caps(entities["vision_query"]))
                else:
                    vectors.append(entities["cross_modal"])
        first = next(iter(entities.values()))
        zero = first.new_zeros(len(first), dtype=torch.float32)
        return torch.cat(vectors or [zero[:, None]], -1), torch.stack([*extras, zero], 1)[:, : len(extras)]

    @property
    def bounds_by_products(self) -> bool:
        """Whether [`~MimicModel.product_bounds`] improves the bound, as [`hf_mel.protocols.bounds_by_products`] asks."""
        return "vision" in (self.config.units or ())

    @torch.no_grad()
    def product_queries(self, mentions: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Vectors [M, K, d_v] of each of VDLU's three products, and a state [M, S]; see [`dual_bounds_mimic`]."""
        mentions = _to_float32(mentions)
        with torch.autocast(self.device.type, enabled=False):
            vectors, state = mention_products(self.vdlu, mentions)
            weight = _repeated(self._unit_weights(mentions)["vision"], state)
        return vectors, torch.cat([weight[:, None], state], 1)

    @torch.no_grad()
    def product_vectors(self, entities: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Vectors [N, d_v] of each of VDLU's three products, and numbers [N, R]; see [`dual_bounds_mimic`]."""
        entities = _to_float32(entities, without="text_queries")
        with torch.autocast(self.device.type, enabled=False):
            return entity_products(self.vdlu, entities)

    @staticmethod
    @torch.no_grad()
    def product_bounds(
        state: torch.Tensor, products: Mapping[str, tuple[torch.Tensor, torch.Tensor]], numbers: torch.Tensor
    ) -> torch.Tensor:
        """At most 0: what the bound of [`~MimicModel.bound_queries`] has too much, by the products of VDLU, [n].

        Args:
            state (`torch.Tensor` [S]): Of one mention.
            products (`dict`): Name → inner products [K, n] of the vectors of mention and entities, and their radii [K, n].
            numbers (`torch.Tensor` [R, n]): Of n entities.
        """
        highest, cap = highest_dual_scores(state[1:], products, numbers)
        return (highest - cap).clamp(max=0) * float(state[0])

    @property
    def pair_bound_encodings(self) -> list[str]:
        """Names of the entities' encodings that [`~MimicModel.pair_bounds`] and [`~MimicModel.may_reach`] need.

        These are all but the tokens and their mask.
        """
        units = self.config.units or ()
        if "text" not in units or not self.config.text_local:
            return []
        of_units = {
            "text": ["text_global", "text_query_global"],
            "vision": ["vision_query", "vision_pooled", "vision_key"],
            "cross_modal": ["cross_modal"],
        }
        return [name for unit in units for name in of_units[unit]]

    @torch.no_grad()
    def pair_bounds(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Upper bounds [M, N] of S (eq. 7) without the tokens of entities, for a model with TGLU's local half.

        S_V (eq. 5 and 11–14), S_C (eq. 19) and S_T^G2G (eq. 8) are exact ([`~MimicModel.quick_scores`]). S_T^G2L (eq. 9–10)
        is bounded by [`~scoring_mimic.global_to_local_bounds`].

        Args:
            mentions ([`MimicMentionEncodings`]): Of M mentions.
            entities: `pair_bound_encodings` of N entities; half precision is read as stored.
        """
        mentions, entities = _to_float32(mentions), _to_float32(entities, without="text_queries")
        weight = self._unit_weights(mentions)["text"] / 2  # eq. 4 and 7
        with torch.autocast(self.device.type, enabled=False):
            local = global_to_local_bounds(mentions, entities, self.tglu.layer_norm)
        bounds = self.quick_scores(mentions, entities) + local * _column(weight)
        return bounds + self._nil_rounding(mentions)[:, None] if hasattr(self, "nil") else bounds

    @torch.no_grad()
    def attention(
        self,
        mention_input_ids: torch.LongTensor | None = None,
        mention_attention_mask: torch.Tensor | None = None,
        mention_pixel_values: torch.Tensor | None = None,
        entity_input_ids: torch.LongTensor | None = None,
        entity_attention_mask: torch.Tensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        **masks: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Attention weights of the units, for M mentions and N entities.

        Args: as [`~MimicModel.forward`].

        Returns:
            `dict`, as far as the model has the units: `words` [M, N, L], TGLU's attention over the tokens of a mention
            (eq. 9, averaged over the entity's tokens); `mention_patches` [M, h, w] and `entity_patches` [N, h, w],
            CMFU's attention over image patches (eq. 15–16), without a ViT's class token.
        """
        weights: dict[str, torch.Tensor] = {}
        if hasattr(self, "tglu") and self.config.text_local:
            mentions = self.encode_mentions(
                mention_input_ids,
                mention_attention_mask,
                mention_pixel_values,
                **{name: mask for name, mask in masks.items() if name.startswith("mention")},
            )
            entities = self.encode_entities(
                entity_input_ids,
                entity_attention_mask,
                entity_pixel_values,
                **{name: mask for name, mask in masks.items() if name.startswith("entity")},
            )
            weights["words"] = mention_attention(mentions, entities)
        if hasattr(self, "cmfu"):
            sides = {
                "mention": (mention_input_ids, mention_attention_mask, mention_pixel_values),
                "entity": (entity_input_ids, entity_attention_mask, entity_pixel_values),
            }
            for side, (input_ids, mask, pixels) in sides.items():
                text, _ = self._text_features(input_ids, mask)
                shares = self.cmfu.attention(text, self._image_features(pixels)[1])
                height = int(shares.shape[1] ** 0.5)
                if height**2 in (shares.shape[1], shares.shape[1] - 1):
                    weights[f"{side}_patches"] = shares[:, -(height**2) :].unflatten(1, (height, height))
        return weights

    def forward(
        self,
        mention_input_ids: torch.LongTensor | None = None,
        mention_attention_mask: torch.Tensor | None = None,
        mention_pixel_values: torch.Tensor | None = None,
        entity_input_ids: torch.LongTensor | None = None,
        entity_attention_mask: torch.Tensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_text_mask: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
        entity_log_prior: torch.Tensor | None = None,
    ) -> MimicOutput:
        """Scores M mentions against N entities and, given labels, computes the loss.

        Args:
            mention_input_ids, mention_attention_mask (`torch.Tensor` [M, L], *optional*): Needed if the model reads
                text. Default mask: ones.
            mention_pixel_values (`torch.Tensor` [M, 3, H, W], *optional*): Needed if the model reads images.
            entity_input_ids, entity_attention_mask, entity_pixel_values: The same of the entities.
            labels (`torch.LongTensor` [M], *optional*): Column of each mention's gold among the N entities. All other
                columns are negatives, so every entity may have one column only. With `config.nil_score`, -1 is NIL: the
                overall loss has one more column, whose score is 0, and the losses of the units leave the mention out.
            mention_image_mask, mention_text_mask (`torch.Tensor` [M]), entity_image_mask (`torch.Tensor` [N],
                *optional*): See [`~MimicModel.encode_mentions`]. The loss of a unit is over the mentions that have its
                modalities.
            entity_log_prior (`torch.Tensor` [N], *optional*): Logarithm of how often each entity is a gold in training. It
                is added to the scores inside the losses, so that the scores themselves do not learn it (logit adjustment,
                Menon et al., 2021).
        """
        mentions = self.encode_mentions(
            mention_input_ids, mention_attention_mask, mention_pixel_values, mention_image_mask, mention_text_mask
        )
        entities = self.encode_entities(
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask
        )
        unit_scores = self._all_unit_scores(mentions, entities)
        present = self._units_present(mentions)
        scores = self._minus_nil(_weighted_sum(unit_scores, self._unit_weights(mentions)), mentions)
        loss, losses = None, None
        if labels is not None:
            # In the losses, scores are divided by the temperature.
            prior = 0.0 if entity_log_prior is None else entity_log_prior.float() * self.config.temperature
            if shares := self.config.loss_unit_weights:
                weighted = _weighted_sum(unit_scores, self._unit_weights(mentions, shares))
                overall = self._minus_nil(weighted, mentions) + prior
            else:
                overall = scores + prior
            of_units, columns = present, labels.long()
            if hasattr(self, "nil"):
                known = columns >= 0
                overall = F.pad(overall, (0, 1))  # NIL
                columns = columns.where(known, scores.shape[1])
                of_units = {unit: known if mask is None else known & mask for unit, mask in present.items()}
            units = {unit: unit_scores[unit] + prior for unit in self.config.unit_losses or ()}
            terms = {"overall": (overall, None), **{unit: (units[unit], of_units[unit]) for unit in units}}
            losses = {
                name: self._contrastive_loss(term, columns, mask) for name, (term, mask) in terms.items()
            }  # eq. 20–21
            loss = torch.stack(list(losses.values())).sum()  # eq. 22
        unit_scores = _nan_where_absent(unit_scores, present)
        return MimicOutput(loss=loss, scores=scores, unit_scores=unit_scores, losses=losses)

    def _contrastive_loss(
        self, scores: torch.Tensor, labels: torch.Tensor, present: torch.Tensor | None
    ) -> torch.Tensor:
        """Eq. 20–21: cross entropy over the columns, averaged over the mentions that `present` [M] selects."""
        if present is None:
            return F.cross_entropy(scores / self.config.temperature, labels)
        labels = labels.clamp(max=scores.shape[1] - 1)  # NIL has no column of a unit; `present` leaves it out
        losses = F.cross_entropy(scores / self.config.temperature, labels, reduction="none")
        return (losses * present).sum() / present.sum().clamp(min=1)


def _nan_where_absent(
    scores: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """Unit scores [M, N] with nan in the rows of mentions that lack the unit, which `present` [M] says."""
    masks = ((unit, score, present[unit]) for unit, score in scores.items())
    return {unit: s if mask is None else s.masked_fill(~mask[:, None], torch.nan) for unit, s, mask in masks}


def _weighted_sum(scores: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor | float]) -> torch.Tensor:
    """Sum [M, N] of the units' scores [M, N] with weights [M], or one weight for all mentions."""
    equal = all(isinstance(weight, float) for weight in weights.values()) and len(set(weights.values())) == 1
    if equal:  # dividing once rounds once
        first, *others = scores.values()
        return sum(others, first) / len(scores)
    first, *others = (score * _column(weights[unit]) for unit, score in scores.items())
    return sum(others, first)


def _repeated(weight: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A weight of each of M mentions, [M], from one of all. `like` has the first axis M."""
    return weight if isinstance(weight, torch.Tensor) else like.new_full((len(like),), weight)


def _column(weight: torch.Tensor | float) -> torch.Tensor | float:
    return weight[:, None] if isinstance(weight, torch.Tensor) else weight


def _to_float32(encodings: Mapping[str, torch.Tensor], without: str | None = None) -> dict[str, torch.Tensor]:
    """Casts half-precision tensors (from autocast, or stored on disk) to float32 and drops `None` and `without`."""
    return {
        name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in encodings.items()
        if tensor is not None and name != without
    }


def _build_backbone(config, pooling_layer: bool) -> PreTrainedModel:
    """Builds an untrained encoder; `pooling_layer` is ignored by encoders whose pooling layer is not optional."""
    try:
        return AutoModel.from_config(config, add_pooling_layer=pooling_layer)
    except TypeError:  # the encoder has no argument `add_pooling_layer`
        return AutoModel.from_config(config)


def _pooler_is_untrained(model: nn.Module) -> bool:
    """Whether an encoder has a pooler that was never trained: its bias is exactly zero, as it is initialised."""
    dense = getattr(getattr(model, "pooler", None), "dense", None)
    return isinstance(dense, nn.Linear) and dense.bias is not None and not dense.bias.any()


def _last_width(config) -> int:
    """Returns the width of an image encoder's last layer: `hidden_sizes[-1]` of a CNN, `hidden_size` of a ViT."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


__all__ = ["MimicModel", "MimicPreTrainedModel"]
