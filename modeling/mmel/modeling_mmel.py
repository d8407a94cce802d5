"""MMEL, a reranker that scores and then jointly ranks the mentions of a context (Yang et al., UAI 2023).

A text encoder reads context and candidate in one sequence, image tokens of both attend to each other, and co-attention
fuses text and image. Equation numbers are the paper's. `README.md` in this folder describes where the paper is open,
misprinted or contradicts itself, and how this code reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_mmel import MmelConfig

#: Maximum number of values in one block of collaborative ranking, by device type. It bounds the memory.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
#: Number of sequences that the text encoder reads at once, on a CPU and on a GPU.
_BLOCK_SEQUENCES = (16, 256)


@dataclass
class MmelOutput(ModelOutput):
    """Output of [`MmelModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): Cross entropy of eq. 10 plus λ times eq. 11, if `labels` are given.
        scores (`torch.Tensor` [M, C]): Log-odds of m (eq. 10); higher is better, -inf where a mention has no
            candidate.
        features (`torch.Tensor` [M, C, d_v]): h^e, the input of `rank_jointly`; 0 where a mention has no candidate.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    features: torch.Tensor | None = None


class FeedForward(nn.Module):
    """FFN of eq. 6 and 8: linear, ReLU, linear."""

    def __init__(self, dim: int, inner: int, out: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, extra: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Applies the layer to `x`. `extra` is added to the hidden layer before its ReLU."""
        return self.fc2(self.dropout(F.relu(self.fc1(x) + extra)))


class Attention(nn.Module):
    """Attention A of eq. 5. With more than one head, a linear output layer follows."""

    def __init__(self, dim: int, heads: int = 1):
        super().__init__()
        self.num_heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim) if heads > 1 else nn.Identity()

    def forward(self, query, key, value, mask) -> torch.Tensor:
        """Attends from `query` to `key` and `value`, which [`Attention.project`] has made.

        Args:
            query (`torch.Tensor` [B, Q, d]): Queries, not projected.
            key, value (`torch.Tensor` [B, K, d]): Projected keys and values.
            mask (`torch.Tensor` [B, K] or [B, Q, K]): True where a query may attend.

        Returns:
            `torch.Tensor` [B, Q, d]: The attended values; zeros for a query that may attend to nothing.
        """
        if mask.dim() == 2:
            mask = mask.unsqueeze(1)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.query(query), key, value)
        )  # [B, heads, ·, d / heads]
        logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = _softmax_or_zeros(logits, mask.unsqueeze(1))
        return self.output((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `x` projected to keys and to values."""
        return self.key(x), self.value(x)


class ImageBlock(nn.Module):
    """Block of §3.2.2: two multi-head self-attentions and a feed-forward layer."""

    def __init__(self, config: MmelConfig):
        super().__init__()
        dim = config.hidden_size
        self.attention1, self.attention2 = (Attention(dim, config.num_attention_heads) for _ in range(2))
        self.feed_forward = FeedForward(dim, config.intermediate_size, dim, config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for norm, attention in ((self.norm1, self.attention1), (self.norm2, self.attention2)):
            normed = norm(x)
            x = x + self.dropout(attention(normed, *attention.project(normed), mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class MCM(nn.Module):
    """MCM of eq. 5-6: self-attention, attention to the other modality, and a feed-forward layer."""

    def __init__(self, config: MmelConfig):
        super().__init__()
        dim = config.hidden_size
        self.self_attention, self.cross_attention = Attention(dim), Attention(dim)
        self.feed_forward = FeedForward(dim, config.intermediate_size, dim, config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, x_mask, other, other_mask) -> torch.Tensor:
        """Returns `x` [B, X, d] after attention to `other` [B, Y, d]."""
        normed = self.norm1(x)
        x = x + self.dropout(self.self_attention(normed, *self.self_attention.project(normed), x_mask))
        x = x + self.dropout(self.cross_attention(self.norm2(x), *self.cross_attention.project(other), other_mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class CoAttention(nn.Module):
    """Co-attention of eq. 7 before pooling: the image attends to the text, then the text to the result."""

    def __init__(self, config: MmelConfig):
        super().__init__()
        if config.vision_config is not None:
            self.image = MCM(config)
        self.text = MCM(config)

    def forward(self, text, text_mask, image=None, image_mask=None):
        if image is None:
            return self.text(text, text_mask, text, text_mask), None
        image = self.image(image, image_mask, text, text_mask)
        return self.text(text, text_mask, image, image_mask), image


class MEncoder(nn.Module):
    """M-Encoder layer of MKGformer (Chen et al., SIGIR 2022), which the paper compares with MCM.

    Prefix-guided interaction: image tokens attend to themselves and to the keys and values of the text.
    Correlation-aware fusion: each word adds the image tokens that are most similar to it to the hidden layer of its
    feed-forward layer.
    """

    def __init__(self, config: MmelConfig):
        super().__init__()
        dim, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.text_attention, self.image_attention = Attention(dim, heads), Attention(dim, heads)
        self.text_feed_forward, self.image_feed_forward = (
            FeedForward(dim, inner, dim, config.dropout) for _ in range(2)
        )
        self.fc_aggregated = nn.Linear(dim, inner, bias=False)
        self.text_norm1, self.text_norm2, self.image_norm1, self.image_norm2 = (nn.LayerNorm(dim) for _ in range(4))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, text, text_mask, image, image_mask):
        t, v = self.text_norm1(text), self.image_norm1(image)
        t_key, t_value = self.text_attention.project(t)
        v_key, v_value = self.image_attention.project(v)
        text = text + self.dropout(self.text_attention(t, t_key, t_value, text_mask))
        key, value = torch.cat([v_key, t_key], 1), torch.cat([v_value, t_value], 1)
        mask = torch.cat([image_mask, text_mask], 1)
        image = image + self.dropout(self.image_attention(v, key, value, mask))

        t, v = self.text_norm2(text), self.image_norm2(image)
        weights = _softmax_or_zeros(t @ v.transpose(-1, -2), image_mask.unsqueeze(1))
        aggregated = weights.to(v.dtype) @ v
        text = text + self.dropout(self.text_feed_forward(t, self.fc_aggregated(aggregated)))
        return text, image + self.dropout(self.image_feed_forward(v))


class Similarity(nn.Module):
    """Similarity S(a, b) = σ(FFN(a, b)) of eq. 11.

    The first layer of FFN is stored as two halves, so that each entity passes it only once.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.fc_first = nn.Linear(dim, dim)
        self.fc_second = nn.Linear(dim, dim, bias=False)
        self.fc_out = nn.Linear(dim, 1)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Returns S [G, A, B] of `first` [G, A, d] and `second` [G, B, d], computed without autocast."""
        with torch.autocast(first.device.type, enabled=False):
            dtype = self.fc_out.weight.dtype
            first, second = self.fc_first(first.to(dtype)), self.fc_second(second.to(dtype))
            step = max(1, _budget(first) // max(1, second.numel()))
            parts = [
                self.fc_out(F.relu(part.unsqueeze(2) + second.unsqueeze(1))).squeeze(-1)
                for part in first.split(step, 1)
            ]
            return torch.cat(parts, 1).sigmoid()


class GivenScores(nn.Module):
    """Log-odds that a pair has before it is read: the score of the list and whether the name fits, each with a weight.

    Not in the paper. Each weight is that of the configuration times a learned scale.
    """

    def __init__(self, config):
        super().__init__()
        weights = {"pair_list_score": config.list_weight, "pair_name_match": config.name_weight}
        self.weights = {name: float(weight) for name, weight in weights.items() if weight is not None}
        self.scales = nn.Parameter(torch.ones(len(self.weights)))

    def forward(self, mask: torch.Tensor, **inputs: torch.Tensor | None) -> torch.Tensor:
        """Returns the log-odds [P] of the P pairs where `mask` [M, C] is True.

        Args:
            mask: The pairs.
            inputs: `pair_list_score` and `pair_name_match`, each [M, C].

        Raises:
            ValueError: An input with a weight is missing.
        """
        total = self.scales.new_zeros(int(mask.sum()))
        for scale, (name, weight) in zip(self.scales, self.weights.items(), strict=True):
            values = inputs[name]
            if values is None:
                raise ValueError(
                    f"The model reads {name}, but the batch has none. Give the processor name_match=True, and every "
                    "candidate row the list_score that a list with scores has."
                )
            total = total + scale * weight * values[mask].to(total.dtype)
        return total


class ImageMatch(nn.Module):
    """Log-odds that two images give before anything is fused: their cosine less a midpoint, with a weight.

    Not in the paper. Both features pass one linear projection, which starts as the identity. The weight is that of the
    configuration times a learned scale; the midpoint is learned and starts at 0.5.
    """

    def __init__(self, width: int, weight: float):
        super().__init__()
        self.weight = weight
        self.projection = nn.Linear(width, width, bias=False)
        self.projection.starts_as_identity = True  # type: ignore[assignment]
        self.scale, self.midpoint = nn.Parameter(torch.ones(())), nn.Parameter(torch.tensor(0.5))

    def forward(self, mention: torch.Tensor, entity: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Returns the log-odds [P] of P pairs; 0 where `present` is False.

        Args:
            mention, entity (`torch.Tensor` [P, d]): Image features.
            present (`torch.Tensor` [P]): True where both sides have an image.
        """
        dtype = self.projection.weight.dtype
        with torch.autocast(mention.device.type, enabled=False):  # half precision is too coarse to rank candidates
            mention, entity = self.projection(mention.to(dtype)), self.projection(entity.to(dtype))
            cosine = F.cosine_similarity(mention, entity, dim=-1)
        return (self.weight * self.scale * (cosine - self.midpoint)).masked_fill(~present, 0.0)


class MmelPreTrainedModel(PreTrainedModel):
    """Base class of MMEL: configuration, weight initialisation and supported attention implementations."""

    config: MmelConfig
    config_class = MmelConfig
    base_model_prefix = "mmel"
    main_input_name = "pair_input_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the encoders. The attentions of this model are over few tokens and have one implementation.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # PyTorch's default initialisation
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
            if getattr(module, "starts_at_zero", False):
                init.zeros_(module.weight)
                init.zeros_(module.bias)
            if getattr(module, "starts_as_identity", False):
                init.eye_(module.weight)
        elif isinstance(module, GivenScores):
            init.ones_(module.scales)
        elif isinstance(module, ImageMatch):
            init.ones_(module.scale)
            init.constant_(module.midpoint, 0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MmelModel(MmelPreTrainedModel):
    """MMEL as a reranker that reads context and candidate in one sequence and ranks the mentions of a context
    together.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/mmel-wikimel")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/mmel-wikimel")  # doctest: +SKIP
    >>> batch = processor(pairs=[(mention_row, entity_rows), (other_mention_row, other_entity_rows)])  # doctest: +SKIP
    >>> out = model(**batch)  # scores [M, C] # doctest: +SKIP
    >>> model.rank_jointly(out.scores, out.features, batch["pair_mask"], batch["pair_context"])  # doctest: +SKIP
    ```
    """

    #: Pretrained submodules. The trainer can give all other parameters another learning rate.
    backbone_names = ("text_model", "vision_model", "visual_projection")
    mentions_per_example = 2
    pairs_are_independent = True

    def __init__(self, config: MmelConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.text_model = _build_backbone(config.text_config)
        self.text_fc = nn.Linear(config.text_config.hidden_size, dim)  # type: ignore[union-attr]
        self.dropout = nn.Dropout(config.dropout)
        if config.vision_config is not None:
            self.vision_model = _build_backbone(config.vision_config)
            width = _last_width(config.vision_config)
            if config.projection_dim:
                self.visual_projection = nn.Linear(width, config.projection_dim, bias=False)
            self.image_fc = nn.Linear(config.projection_dim or width, config.num_image_tokens * dim)
            self.image_blocks = nn.ModuleList(ImageBlock(config) for _ in range(config.num_image_blocks))
            self.gate = FeedForward(2 * dim, dim, 2)
            if config.image_weight is not None:
                self.image_match = ImageMatch(self.image_fc.in_features, float(config.image_weight))
        self.fusion = MEncoder(config) if config.fusion == "m_encoder" else CoAttention(config)
        text_width: int = config.text_config.hidden_size  # type: ignore[union-attr]
        self.classifier = nn.Linear(2 * dim + (2 * text_width if config.pooled_sides else 0), 2)
        if config.list_weight is not None or config.name_weight is not None:
            self.given_scores = GivenScores(config)
        if hasattr(self, "given_scores") or hasattr(self, "image_match"):
            self.classifier.starts_at_zero = True  # type: ignore[assignment]
        if config.pairwise_loss_weight:
            self.similarity = Similarity(dim)
        self.post_init()
        self.train()

    @property
    def image_features_are_fixed(self) -> bool:
        """`True` if training does not change `encode_images`."""
        return self.config.freeze_vision

    @property
    def leaves_out_missing_images(self) -> bool | None:
        """`True` if no image counts for a mention without one, as [`hf_mel.protocols.leaves_out_missing_images`] asks."""
        return self.config.missing_images == "absent" or not hasattr(self, "vision_model") or None

    @property
    def example_unit(self) -> str:
        """The unit of a training example, as [`hf_mel.protocols.Reranker`] describes it."""
        return self.config.training_unit

    @property
    def reads_list_scores(self) -> bool:
        """Whether the scores need `pair_list_score`."""
        return self.config.list_weight is not None

    @property
    def ranks_jointly_by_default(self) -> bool:
        """Whether mentions are ranked jointly unless asked ([`hf_mel.protocols.ranks_jointly_by_default`])."""
        return self.config.joint_ranking

    def train(self, mode: bool = True) -> MmelModel:
        """Sets the training mode, except for a frozen image encoder."""
        super().train(mode)
        # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
        if self.image_features_are_fixed:
            for name in ("vision_model", "visual_projection"):
                if hasattr(self, name):
                    getattr(self, name).eval().requires_grad_(False)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> MmelModel:
        """Builds a model with pretrained encoders. All other parts are initialised.

        Args:
            text (`str`, *optional*): Hub id or folder of a text encoder like BERT. Without it, `text_config` describes
                an encoder to initialise.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image encoder
                and projection are used.
            config: Fields of [`MmelConfig`].
        """
        if text is None and config.get("text_config") is None:
            raise ValueError("from_backbones needs a text encoder. Give its Hub id or folder, or a text_config.")
        parts: dict[str, Any] = {} if text is None else {"text_model": AutoModel.from_pretrained(text)}
        if vision is not None and AutoConfig.from_pretrained(vision).model_type == "clip":
            clip = AutoModel.from_pretrained(vision)
            parts |= {"vision_model": clip.vision_model, "visual_projection": clip.visual_projection}
            config.setdefault("projection_dim", clip.config.projection_dim)
        elif vision is not None:
            parts["vision_model"] = AutoModel.from_pretrained(vision)
        for name in ("text_model", "vision_model"):
            if name in parts:
                encoder = parts[name].config.to_dict()
                encoder.pop("_name_or_path", None)  # may be a local path; the weights are saved with this model
                config.setdefault(name.replace("model", "config"), encoder)
        model = cls(MmelConfig(**config))
        for name, part in parts.items():
            target = getattr(model, name, None)
            if target is not None and (name.endswith("model") or config["projection_dim"]):
                names = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in names})
        return model

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns features f_v [I, d] of I images [I, 3, H, W] (§3.2.2)."""
        if not hasattr(self, "vision_model"):
            raise ValueError("This model sees no images. Give its configuration a vision_config.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_features_are_fixed):
            output = self.vision_model(pixel_values=pixel_values)
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                states = output.last_hidden_state
                pooled = states.mean((2, 3)) if states.dim() == 4 else states[:, 0]
            pooled = pooled.flatten(1)
            return self.visual_projection(pooled) if self.config.projection_dim else pooled

    def _image_features(
        self, side: str, features, pixel_values, mask, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns f_v [count, d] of one side, zeros for missing images, and the mask [count] of present images."""
        if mask is None:
            given = features if features is not None else pixel_values
            if given is None:
                raise ValueError(
                    f"The {side} images are missing, and this model reads them. Give pair_{side}_pixel_values or "
                    f"pair_{side}_image_features."
                )
            mask = torch.ones(count, dtype=torch.bool, device=self.device)
        mask = mask.bool().reshape(count)
        width = self.image_fc.in_features
        if features is not None:
            return features.reshape(count, width).masked_fill(~mask.unsqueeze(1), 0.0), mask
        empty = torch.zeros(count, width, dtype=self.image_fc.weight.dtype, device=mask.device)
        if pixel_values is None or not mask.any():
            return empty, mask
        encoded = self.encode_images(pixel_values.reshape(count, *pixel_values.shape[-3:])[mask])
        return empty.to(encoded.dtype).index_put((mask.nonzero()[:, 0],), encoded), mask

    def _joint_text(self, input_ids, attention_mask, context_mask, entity_mask):
        """Returns the states of context and of entity (eq. 1), each [P, L', d_t] with its mask [P, L']."""
        if self.config.joint_text:
            states = self._text_states(input_ids, attention_mask)
            sides = [_select_tokens(states, mask) for mask in (context_mask, entity_mask)]
        else:
            parts = [_select_tokens(input_ids, mask) for mask in (context_mask, entity_mask)]
            sides = [(self._text_states(x, m.long()), m) for x, m in parts]
        return sides

    def _words(self, states: torch.Tensor) -> torch.Tensor:
        """Returns words [P, L, d_v] of states [P, L, d_t] (eq. 4)."""
        return self.dropout(F.relu(self.text_fc(states)))

    def _text_states(self, input_ids, attention_mask) -> torch.Tensor:
        """Returns the last hidden states [P, L, d_t]. Sequences of similar length share a block, to save padding."""
        states = []
        order = attention_mask.sum(1).argsort()
        for part in order.split(_BLOCK_SEQUENCES[attention_mask.device.type == "cuda"]):
            used = attention_mask[part].any(0).nonzero()
            width = int(used[-1]) + 1 if len(used) else 1
            encoded = self.text_model(input_ids=input_ids[part, :width], attention_mask=attention_mask[part, :width])
            states.append(F.pad(encoded.last_hidden_state, (0, 0, 0, input_ids.shape[1] - width)))
        return torch.cat(states)[order.argsort()]

    def _joint_image(self, context, context_mask, entity, entity_mask):
        """Returns the image tokens of context and of entity (eq. 2-3), each [P, k, d_v] with its mask [P, k]."""
        k = self.config.num_image_tokens
        tokens = torch.cat([x.unflatten(-1, (k, -1)) for x in (context, entity)], 1)  # [P, 2k, d_v]
        present = torch.cat([m.unsqueeze(1).expand(-1, k) for m in (context_mask, entity_mask)], 1)
        mask = present
        if not self.config.joint_image:
            side = torch.arange(2 * k, device=tokens.device) // k
            mask = present.unsqueeze(1) & (side.unsqueeze(0) == side.unsqueeze(1))
        for block in self.image_blocks:
            tokens = block(tokens, mask)
        return (tokens[:, :k], present[:, :k]), (tokens[:, k:], present[:, k:])

    def _fuse(self, text, text_mask, image=None, image_mask=None) -> torch.Tensor:
        """Returns h [P, d_v] of one side (eq. 7-9)."""
        text, image = self.fusion(text, text_mask, image, image_mask)
        text = _masked_max(text, text_mask)
        if image is None:
            return text
        image = _masked_max(image, image_mask)
        logits = self.gate(torch.cat([text, image], -1))
        available = torch.stack([torch.ones_like(image_mask[:, 0]), image_mask[:, 0]], 1)
        gate = _softmax_or_zeros(logits, available).to(text.dtype)
        return gate[:, :1] * text + gate[:, 1:] * image

    def forward(
        self,
        pair_input_ids: torch.LongTensor | None = None,
        pair_attention_mask: torch.Tensor | None = None,
        pair_context_mask: torch.Tensor | None = None,
        pair_entity_mask: torch.Tensor | None = None,
        pair_mask: torch.Tensor | None = None,
        pair_context: torch.LongTensor | None = None,
        pair_mention_image_features: torch.Tensor | None = None,
        pair_entity_image_features: torch.Tensor | None = None,
        pair_mention_pixel_values: torch.Tensor | None = None,
        pair_entity_pixel_values: torch.Tensor | None = None,
        pair_mention_image_mask: torch.Tensor | None = None,
        pair_entity_image_mask: torch.Tensor | None = None,
        pair_list_score: torch.Tensor | None = None,
        pair_name_match: torch.Tensor | None = None,
        pair_entity: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> MmelOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_input_ids, pair_attention_mask (`torch.Tensor` [M, C, L]): Tokens of the filled template.
            pair_context_mask, pair_entity_mask (`torch.Tensor` [M, C, L]): True for the tokens of the context, and of
                the entity (eq. 1).
            pair_mask (`torch.Tensor` [M, C], *optional*): False where a mention has no C-th candidate.
            pair_context (`torch.LongTensor` [M], *optional*): Number of each mention's context, for the pairwise loss.
            pair_mention_image_features, pair_entity_image_features (`torch.Tensor` [M, d] and [M, C, d], *optional*):
                Outputs of `encode_images`.
            pair_mention_pixel_values, pair_entity_pixel_values (`torch.Tensor` [M, 3, H, W] and [M, C, 3, H, W],
                *optional*): The images, if their features are not given.
            pair_mention_image_mask, pair_entity_image_mask (`torch.Tensor` [M] and [M, C], *optional*): False for a
                missing image.
            pair_list_score, pair_name_match (`torch.Tensor` [M, C], *optional*): Score of the list, and 1 where the name
                fits the mention, for `list_weight` and `name_weight`.
            pair_entity (`torch.LongTensor` [M, C], *optional*): Equal for equal entities, for the pairwise loss.
            labels (`torch.LongTensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from
                the loss. All other columns are negatives; in eq. 11, those that are no gold of their context.

        Raises:
            ValueError: A required input is missing, or a label names a padding column.
        """
        if pair_input_ids is None or pair_context_mask is None or pair_entity_mask is None:
            raise ValueError(
                "The tokens are missing. Give pair_input_ids, pair_context_mask and pair_entity_mask, [M, C, L] each."
            )
        m, c, length = pair_input_ids.shape
        if pair_mask is None:
            pair_mask = torch.ones(m, c, dtype=torch.bool, device=pair_input_ids.device)
        pair_mask = pair_mask.bool()
        pairs = pair_mask.flatten().nonzero()[:, 0]  # padding is not computed
        dtype = self.classifier.weight.dtype
        scores = torch.full((m * c,), -torch.inf, dtype=dtype, device=pair_input_ids.device)
        features = torch.zeros(m * c, self.config.hidden_size, dtype=dtype, device=pair_input_ids.device)
        logits = features.new_zeros(m * c, 2)
        if len(pairs):
            context_mask, entity_mask = (
                x.reshape(-1, length)[pairs].bool() for x in (pair_context_mask, pair_entity_mask)
            )
            attended = context_mask | entity_mask
            if pair_attention_mask is not None:
                attended = pair_attention_mask.reshape(-1, length)[pairs]
            states = self._joint_text(
                pair_input_ids.reshape(-1, length)[pairs], attended.long(), context_mask, entity_mask
            )
            context, entity = ((self._words(x), mask) for x, mask in states)
            if hasattr(self, "vision_model"):
                mention_image, mention_present = self._image_features(
                    "mention", pair_mention_image_features, pair_mention_pixel_values, pair_mention_image_mask, m
                )
                entity_image, entity_present = self._image_features(
                    "entity", pair_entity_image_features, pair_entity_pixel_values, pair_entity_image_mask, m * c
                )
                compared = mention_image[pairs // c], entity_image[pairs]  # f_v of both sides
                mention_image = self.dropout(F.relu(self.image_fc(mention_image)))[pairs // c]
                entity_image = self.dropout(F.relu(self.image_fc(entity_image[pairs])))
                mention_present, entity_present = mention_present[pairs // c], entity_present[pairs]
                if self.config.missing_images == "absent":
                    entity_present = entity_present & mention_present
                if self.training and self.config.image_dropout:
                    drawn = torch.rand(entity_present.shape, device=entity_present.device)
                    entity_present = entity_present & (drawn >= self.config.image_dropout)
                images = self._joint_image(mention_image, mention_present, entity_image, entity_present)
                context, entity = (*context, *images[0]), (*entity, *images[1])
            h_context, h_entity = self._fuse(*context), self._fuse(*entity)
            with torch.autocast(self.device.type, enabled=False):  # half precision is too coarse to rank candidates
                h_context, h_entity = h_context.to(dtype), h_entity.to(dtype)
                sides = [h_context, h_entity]
                if self.config.pooled_sides:
                    first, second = (_standardised_mean(x.to(dtype), mask) for x, mask in states)
                    sides += [first * second, (first - second).abs()]
                pair_logits = self.classifier(self.dropout(torch.cat(sides, -1)))  # eq. 10
                if hasattr(self, "given_scores"):
                    given = self.given_scores(
                        pair_mask, pair_list_score=pair_list_score, pair_name_match=pair_name_match
                    )
                    pair_logits = pair_logits + torch.stack([torch.zeros_like(given), given], -1)
                if hasattr(self, "image_match"):
                    matched = self.image_match(*compared, mention_present & entity_present)
                    pair_logits = pair_logits + torch.stack([torch.zeros_like(matched), matched], -1)
            scores = scores.index_put((pairs,), pair_logits[:, 1] - pair_logits[:, 0])
            features = features.index_put((pairs,), h_entity)
            logits = logits.index_put((pairs,), pair_logits)
        scores, features = scores.view(m, c), features.view(m, c, -1)
        loss = None
        if labels is not None:
            loss = self._loss(logits.view(m, c, 2), features, pair_mask, pair_context, labels, pair_entity)
            if self.config.list_loss_weight:
                loss = loss + self.config.list_loss_weight * _list_loss(scores, labels)
        return MmelOutput(loss=loss, scores=scores, features=features)

    def _loss(self, logits, features, mask, contexts, labels, entities=None) -> torch.Tensor:
        """Returns the cross entropies of eq. 10 over positives and over negatives, plus λ times eq. 11."""
        rows = (labels >= 0).nonzero()[:, 0]
        gold = labels[rows]
        if (gold >= mask.shape[1]).any() or not mask[rows, gold].all():
            raise ValueError("A label names a column without a candidate. Give -100 for a mention without a gold.")
        positive = torch.zeros_like(mask)
        positive[rows, gold] = True
        negative = mask & ~positive & (labels >= 0).unsqueeze(1)
        log_m = F.log_softmax(logits, -1)
        loss = -_mean_where(log_m[..., 1], positive) - _mean_where(log_m[..., 0], negative)
        if not hasattr(self, "similarity"):
            return loss
        if contexts is None:
            raise ValueError("The pairwise loss needs pair_context. Give it, or set pairwise_loss_weight to 0.")
        if entities is not None:
            # A gold of another mention is a negative of eq. 10 only: eq. 11 asks for e1+ != e1- != e2+ != e2-.
            golds = entities[rows, gold]
            same_context = contexts.unsqueeze(1) == contexts[rows].unsqueeze(0)  # [M, K]
            is_gold = (entities.unsqueeze(2) == golds) & same_context.unsqueeze(1)  # [M, C, K]
            negative = negative & ~is_gold.any(2)
        return loss + self.config.pairwise_loss_weight * self._pairwise_loss(
            features, negative, contexts[rows], rows, gold
        )

    def _pairwise_loss(self, features, negative, contexts, rows, gold) -> torch.Tensor:
        """Returns L_p of eq. 11, a mean over the pairs of mentions of one context."""
        same = contexts.unsqueeze(0) == contexts.unsqueeze(1)
        first, second = torch.triu(same, 1).nonzero().unbind(1)
        anchor, other = torch.cat([first, second]), torch.cat([second, first])  # L_p1, L_p2
        anchors, columns = features[rows[anchor], gold[anchor]], features[rows[other]]  # [K, d], [K, C, d]
        similarity = self.similarity(anchors.unsqueeze(1), columns).squeeze(1)  # [K, C]
        to_positive = similarity.gather(1, gold[other].unsqueeze(1))
        hinge = F.relu(similarity - to_positive + self.config.margin)
        usable = negative[rows[other]]
        terms = (hinge * usable).sum(1) / usable.sum(1).clamp(min=1)
        return terms.sum() / max(1, len(first))

    @torch.no_grad()
    def rank_jointly(
        self,
        scores: torch.Tensor,
        features: torch.Tensor,
        mask: torch.Tensor,
        contexts: torch.Tensor,
        entities: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ranks the mentions of each context together (collaborative ranking, §3.5).

        With `joint_combination="log_odds"`, which is not in the paper, the result is the log-odds of a candidate plus, for
        each other mention, max(m' + w log-odds(S)) - max(m') over that mention's candidates. For two mentions these are the
        best sums that include the candidate, less a constant; for more, each mention adds what it would alone. With
        `distinct_entities`, the first maximum is over other entities only; a mention without another adds nothing.

        A context of n mentions takes (n - 1)·|E|² similarities. They are computed in blocks, which bounds the memory.

        Args:
            scores (`torch.Tensor` [M, C]): `scores` of [`MmelOutput`].
            features (`torch.Tensor` [M, C, d_v]): `features` of [`MmelOutput`].
            mask (`torch.Tensor` [M, C]): `pair_mask`.
            contexts (`torch.Tensor` [M]): `pair_context`. Mentions of a context can be in any rows.
            entities (`torch.Tensor` [M, C], *optional*): Equal for equal entities. `distinct_entities` needs it.

        Returns:
            `torch.Tensor` [M, C]: Log-odds of half of the paper's final score, which is m plus the best score of the
            combinations that include the candidate. The order is the same. A mention that is alone in its context
            keeps its scores. -inf where `mask` is False.
        """
        mask = mask.bool()
        scores = scores.masked_fill(~mask, -torch.inf)
        if self.config.joint_combination == "log_odds":
            return self._rank_by_log_odds(scores, features, mask, contexts, entities)
        if not hasattr(self, "similarity") or not scores.numel():
            return scores
        # In float64, because in float32 different probabilities near 1 and different sums become equal.
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        matching = scores.to(wide).sigmoid().masked_fill(~mask, -torch.inf)
        matching, candidates = matching.sort(dim=-1, descending=True, stable=True)

        _, contexts = contexts.unique(return_inverse=True)
        order = matching[:, 0].argsort(descending=True, stable=True)
        order = order[contexts[order].argsort(stable=True)]
        order = order[mask.any(1)[order]]
        counts = contexts[order].bincount()
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[contexts[order]]
        table = order.new_full((len(counts), int(counts.max()) if len(counts) else 0), -1)
        table[contexts[order], place] = order  # rows of each context, by falling confidence

        joint = scores.gather(1, candidates)
        width = matching.shape[1]
        several = (counts > 1).nonzero()[:, 0]
        several = several[counts[several].argsort()]
        start = 0
        while start < len(several):
            # A block has as many contexts with similar numbers of mentions as the budget allows.
            step = max(1, _budget(features) // max(1, width * features.shape[-1] * int(counts[several[start]])))
            block = several[start : start + step]
            start += step
            rows = table[block, : int(counts[block].max())]
            present = rows >= 0
            index = rows.clamp(min=0)
            sorted_features = features[index].gather(
                2, candidates[index].unsqueeze(-1).expand(-1, -1, -1, features.shape[-1])
            )
            added = self._best_combinations(matching[index], sorted_features, present)
            half = ((matching[rows[present]] + added[present]) / 2).clamp(max=1 - torch.finfo(wide).eps)
            # For padding, half is -inf, and so is the logarithm of tiny / inf.
            joint[rows[present]] = (half.clamp(min=torch.finfo(wide).tiny) / (1 - half)).log().to(joint.dtype)
        return torch.empty_like(joint).scatter_(1, candidates, joint)

    def _rank_by_log_odds(self, scores, features, mask, contexts, entities) -> torch.Tensor:
        """Ranks jointly with `joint_combination="log_odds"`, as described in [`MmelModel.rank_jointly`]."""
        distinct = self.config.distinct_entities
        if distinct and entities is None:
            raise ValueError("distinct_entities=True needs the numbers of the entities. Give entities, [M, C].")
        weight = self.config.similarity_weight if hasattr(self, "similarity") else 0
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        own = scores.to(wide)
        joint = own.clone()
        best = own.amax(1)
        same = contexts.unsqueeze(0) == contexts.unsqueeze(1)
        has_candidate = mask.any(1)
        same &= (
            has_candidate.unsqueeze(0) & has_candidate.unsqueeze(1) & ~torch.eye(len(own), dtype=torch.bool).to(same)
        )
        receivers, senders = same.nonzero().unbind(1)
        step = max(1, _budget(features) // max(1, own.shape[1] ** 2 + own.shape[1] * features.shape[-1]))
        for to, other in zip(receivers.split(step), senders.split(step), strict=True):
            sums = own[other].unsqueeze(1).expand(-1, own.shape[1], -1)  # [K, C, C'], of the other mention
            if weight:
                similarity = self.similarity(features[to], features[other]).to(wide)
                sums = sums + weight * similarity.clamp(1e-12, 1 - 1e-12).logit()
            if distinct:
                sums = sums.masked_fill(entities[to].unsqueeze(2) == entities[other].unsqueeze(1), -torch.inf)
            message = sums.amax(2) - best[other].unsqueeze(1)
            joint.index_add_(0, to, message.masked_fill(message == -torch.inf, 0.0))
        return joint.to(scores.dtype).masked_fill(~mask, -torch.inf)

    def _best_combinations(self, matching, features, present) -> torch.Tensor:
        """Computes what §3.5 adds to m: the best score of the combinations that include a candidate.

        Args:
            matching (`torch.Tensor` [G, T, C]): m of up to T mentions in G contexts, by falling confidence. It falls
                along C, so that a tie, which the position breaks, never puts a worse candidate first.
            features (`torch.Tensor` [G, T, C, d_v]): h^e.
            present (`torch.Tensor` [G, T]): True for real mentions.

        Returns:
            `torch.Tensor` [G, T, C]: The best scores; 0 for a candidate in no combination.
        """
        groups, mentions, width = matching.shape
        limit = (matching > -torch.inf).sum(-1).masked_fill(~present, 0).amax(1, keepdim=True)  # |E|, [G, 1]
        within = torch.arange(width, device=matching.device) < limit
        scores, combined = matching[:, 0], features[:, 0]
        chosen = [torch.arange(width, device=matching.device).expand(groups, -1)]
        for t in range(1, mentions):
            similarity = self.similarity(combined, features[:, t]).to(scores.dtype)
            weight = self.config.similarity_weight
            all_scores = (weight * similarity + scores.unsqueeze(2) + matching[:, t].unsqueeze(1)) / (weight + 2)
            best, index = all_scores.flatten(1).sort(descending=True, stable=True)
            best, index = best[:, :width].masked_fill(~within, -torch.inf), index[:, :width]
            first, second = index // width, index % width
            has_mention = present[:, t].unsqueeze(1)
            average = (_take_rows(combined, first) + _take_rows(features[:, t], second)) / 2
            combined = torch.where(has_mention.unsqueeze(2), average, combined)
            scores = torch.where(has_mention, best, scores)
            chosen = [torch.where(has_mention, earlier.gather(1, first), earlier) for earlier in chosen] + [second]
        added = torch.stack(
            [torch.full_like(scores, -torch.inf).scatter_reduce(1, column, scores, "amax") for column in chosen], 1
        )
        return added.masked_fill(added == -torch.inf, 0.0)


def _select_tokens(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the positions of `x` [P, L] or [P, L, d] where `mask` [P, L] is True to the front.

    Returns:
        `tuple` of `torch.Tensor`: `x` with L' ≤ L positions, and its mask [P, L'].
    """
    width = max(1, int(mask.sum(1).max()))
    order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    index = order if x.dim() == 2 else order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.gather(1, index), mask.gather(1, order)


def _take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns the rows `index` [G, B] of `x` [G, C, d]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _softmax_or_zeros(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. A row without any is zeros."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


def _masked_max(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the maximum of `x` [B, L, d] over positions where `mask` [B, L] is True; zeros if it is True nowhere."""
    mask = mask.unsqueeze(-1)
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).amax(1).masked_fill(~mask.any(1), 0.0)


def _standardised_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean of `x` [B, L, d] over positions where `mask` [B, L] is True, with mean 0 and variance 1 along d."""
    weights = mask.unsqueeze(-1).to(x.dtype)
    return F.layer_norm((x * weights).sum(1) / weights.sum(1).clamp(min=1), x.shape[-1:])


def _list_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross entropy of the golds among the candidates of their mentions; 0 if no mention has a gold.

    Args:
        scores (`torch.Tensor` [M, C]): Scores, -inf without a candidate.
        labels (`torch.Tensor` [M]): Column of the gold; -100 leaves a mention out.
    """
    rows = (labels >= 0).nonzero()[:, 0]
    if not len(rows):
        return scores.new_zeros(())
    return F.cross_entropy(scores[rows], labels[rows])


def _mean_where(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean of all values of `x` where `mask` is True; 0 if it is True nowhere."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _budget(x: torch.Tensor) -> int:
    """Returns the maximum number of values in a block on the device of `x`."""
    return _BLOCK_ELEMENTS.get(x.device.type, 2**24)


def _build_backbone(config) -> PreTrainedModel:
    """Builds an encoder, without a pooling layer if its class allows that."""
    try:
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # this encoder has no optional pooling layer
        return AutoModel.from_config(config)


# Copied from modeling/mimic/modeling_mimic.py
def _last_width(config) -> int:
    """Returns the width of an image encoder's last layer: `hidden_sizes[-1]` of a CNN, `hidden_size` of a ViT."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


__all__ = ["MmelModel", "MmelPreTrainedModel"]
