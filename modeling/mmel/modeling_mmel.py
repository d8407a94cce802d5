"""MMEL: A Joint Learning Framework for Multi-Mention Entity Linking (Yang et al., UAI 2023).

Equation numbers are the paper's. What it leaves open, misprints or contradicts, and the reading followed:

- Eq. 1 multiplies token states by masks of zeros and ones. A zeroed token would still take its share of attention
  (eq. 5) and of the maximum (eq. 7), and padding would change scores; so the masks split the tokens, and each side
  goes on with its own ones alone.
- Eq. 5 gives W_k and W_v d_t rows, but eq. 4 has brought the text to d_v: all three are d_v × d_v. It has one head, no
  bias and no output map. Self-attention of the query comes first, as the sentence before it says.
- Eq. 6 has one residual connection, around FFN. With eq. 7, where V is text, the content of an image would then never
  reach h: it would only weigh words. So both attentions have their residual connection too, as in the published
  network, with LayerNorm before each layer, as eq. 6 has it.
- Eq. 7 names the query second in its first line, against eq. 5 and the text ("visual features as the query, textual
  features as key and value"), and makes the pooled f_v,att the query of its second line, whose maximum would then be
  over one vector. Read as co-attention, as the published network is: image tokens attend to words; words attend to what
  came out of that, before pooling; each is pooled over its own tokens.
- FFN of eq. 8 and 11 is FC-ReLU-FC, as defined after eq. 6, with d_v hidden units.
- Eq. 10: m is the second of the two probabilities. The loss is the mean cross entropy of positives plus that of
  negatives, as in the published network. `scores` are its log-odds, which rank as m does and do not saturate.
- Eq. 11: S takes the anchor first. With several negatives in a batch each term is their mean. "e1⁺ ≠ e1⁻ ≠ e2⁺ ≠ e2⁻"
  is for whoever samples negatives.
- Text only, which the paper does not describe: eq. 5–7 with the text in place of the image, and no gate.
- An image that is missing is left out of every attention, and eq. 8 gives all weight to the text.
- "- JL_t", "- JL_v": the encoder (the image blocks) see context and entity apart, everything else stays.

Collaborative ranking (§3.5), for a context with mentions x_1, x_2, … by falling best m:

- the pairs of a combination and a candidate of the next mention get (S + score of the combination + m) / 3, S taking the
  combination first; the |E| best go on, their features averaged, (h + h') / 2. "Select the top-|E| similarity scores and
  then average" could also mean to select by S alone, but what goes on are "the top-|E| new ranking scores". With
  `similarity_weight` w it is (w S + score of the combination + m) / (w + 2);
- |E| is the most candidates a mention of the context has;
- a candidate's final score is m plus the best score of the combinations it is in at the end, m alone if in none. "The
  maximum value of similarity scores" could also mean S; Figure 5 agrees with both, the published network with this.
  With a constant S the order of no mention changes: better candidates are in better combinations;
- keeping |E| is exact for two mentions and for a constant S; with three and more, combinations that a later mention
  would have lifted can be lost;
- S is the one trained by eq. 11 (the published ranking makes a new one, untrained). Eq. 11 teaches it to tell positives
  from negatives, which m is taught too, while m is close to 0 or 1 for most candidates: in the average, S can then outvote
  differences of m that are small as probabilities and large as odds. An untrained S hardly varies and cannot; a low
  `similarity_weight` is between the two.
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

#: Numbers in one block of collaborative ranking: bounds its memory.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
#: Sequences that the text encoder reads at a time, on a CPU and on a GPU.
_BLOCK_SEQUENCES = (16, 256)


@dataclass
class MmelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` []): cross entropy of eq. 10 plus λ times eq. 11, given `labels`.
        scores (`torch.Tensor` [M, C]): log-odds of m (eq. 10), higher is better; -inf where there is no candidate.
        features (`torch.Tensor` [M, C, d_v]): h^e, what `rank_jointly` compares; 0 where there is no candidate.
        unit_scores (`dict[str, torch.Tensor]`): empty, the score is in one part.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    features: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None


class FeedForward(nn.Module):
    """FFN of eq. 6 and 8: FC-ReLU-FC."""

    def __init__(self, dim: int, inner: int, out: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, more: torch.Tensor | float = 0.0) -> torch.Tensor:
        """FFN(x); `more` joins the hidden layer."""
        return self.fc2(self.dropout(F.relu(self.fc1(x) + more)))


class Attention(nn.Module):
    """A of eq. 5 if it has one head; with more, they are mixed by an output map."""

    def __init__(self, dim: int, heads: int = 1):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim) if heads > 1 else nn.Identity()

    def forward(self, query, key, value, mask) -> torch.Tensor:
        """What `query` [B, Q, d] finds among `key` and `value` [B, K, d], which are projected already: [B, Q, d].

        `mask` [B, K] or [B, Q, K] is True where a query may look; one that may look nowhere finds zeros.
        """
        if mask.dim() == 2:
            mask = mask.unsqueeze(1)
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(query), key, value)
        )  # [B, heads, ·, d / heads]
        logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = _softmax_or_zeros(logits, mask.unsqueeze(1))
        return self.output((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` as key and value."""
        return self.key(x), self.value(x)


class ImageBlock(nn.Module):
    """One of the q blocks of §3.2.2: two multi-head self-attentions and a feed-forward layer."""

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
            x = x + self.dropout(attention(normed, *attention.of(normed), mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class MCM(nn.Module):
    """Eq. 5–6: tokens attend to themselves, then to the other modality, then pass a feed-forward layer."""

    def __init__(self, config: MmelConfig):
        super().__init__()
        dim = config.hidden_size
        self.self_attention, self.cross_attention = Attention(dim), Attention(dim)
        self.feed_forward = FeedForward(dim, config.intermediate_size, dim, config.dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, x_mask, other, other_mask) -> torch.Tensor:
        """[B, X, d] that has looked at `other` [B, Y, d]."""
        normed = self.norm1(x)
        x = x + self.dropout(self.self_attention(normed, *self.self_attention.of(normed), x_mask))
        found = self.cross_attention(self.norm2(x), *self.cross_attention.of(other), other_mask)
        x = x + self.dropout(found)
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class CoAttention(nn.Module):
    """Eq. 7 before pooling: the image looks at the text, the text at what came out."""

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
    """The M-Encoder layer of MKGformer (Chen et al., SIGIR 2022), which the paper tries in place of MCM.

    Prefix-guided interaction: image tokens attend to themselves and to the keys and values of the text.
    Correlation-aware fusion: each word adds the image tokens most like it to the hidden layer of its feed-forward.
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
        t_key, t_value = self.text_attention.of(t)
        v_key, v_value = self.image_attention.of(v)
        text = text + self.dropout(self.text_attention(t, t_key, t_value, text_mask))
        key, value = torch.cat([v_key, t_key], 1), torch.cat([v_value, t_value], 1)
        mask = torch.cat([image_mask, text_mask], 1)
        image = image + self.dropout(self.image_attention(v, key, value, mask))

        t, v = self.text_norm2(text), self.image_norm2(image)
        alike = _softmax_or_zeros(t @ v.transpose(-1, -2), image_mask.unsqueeze(1))
        aggregated = alike.to(v.dtype) @ v
        text = text + self.dropout(self.text_feed_forward(t, self.fc_aggregated(aggregated)))
        return text, image + self.dropout(self.image_feed_forward(v))


class Similarity(nn.Module):
    """S(a, b) = σ(FFN(a, b)) of eq. 11; FFN's first layer is kept in two halves, so that each entity passes it once."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc_first = nn.Linear(dim, dim)
        self.fc_second = nn.Linear(dim, dim, bias=False)
        self.fc_out = nn.Linear(dim, 1)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[G, A, B] of `first` [G, A, d] and `second` [G, B, d], in float32 even under autocast."""
        with torch.autocast(first.device.type, enabled=False):
            dtype = self.fc_out.weight.dtype
            first, second = self.fc_first(first.to(dtype)), self.fc_second(second.to(dtype))
            step = max(1, _budget(first) // max(1, second.numel()))
            parts = [
                self.fc_out(F.relu(part.unsqueeze(2) + second.unsqueeze(1))).squeeze(-1)
                for part in first.split(step, 1)
            ]
            return torch.cat(parts, 1).sigmoid()


class MmelPreTrainedModel(PreTrainedModel):
    """What every MMEL model shares: configuration, weight initialisation, and what the backbones support."""

    config: MmelConfig
    config_class = MmelConfig
    base_model_prefix = "mmel"
    main_input_name = "pair_input_ids"
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer must scale it when accumulating
    _no_split_modules = []
    # The model's own attentions are few tokens wide; these flags let an implementation pass through to the backbones.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # PyTorch's own start
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MmelModel(MmelPreTrainedModel):
    """MMEL, a reranker: reads a context and a candidate in one sequence, and ranks the mentions of a context together.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/mmel-wikimel")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/mmel-wikimel")  # doctest: +SKIP
    >>> batch = processor(pairs=[(mention_row, entity_rows), (other_mention_row, other_entity_rows)])  # doctest: +SKIP
    >>> out = model(**batch)  # scores [M, C] # doctest: +SKIP
    >>> model.rank_jointly(out.scores, out.features, batch["pair_mask"], batch["pair_context"])  # doctest: +SKIP
    ```
    """

    #: Submodules that come pretrained; the trainer may give everything else its own learning rate.
    backbone_names = ("text_model", "vision_model", "visual_projection")
    example_unit = "context"
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
        self.fusion = MEncoder(config) if config.fusion == "m_encoder" else CoAttention(config)
        self.classifier = nn.Linear(2 * dim, 2)
        if config.pairwise_loss_weight:
            self.similarity = Similarity(dim)
        self.post_init()
        self.train()

    @property
    def image_features_are_fixed(self) -> bool:
        """Whether training leaves `encode_images` as it is."""
        return self.config.freeze_vision

    def train(self, mode: bool = True) -> MmelModel:
        """As of any module; a fixed image encoder stays in evaluation mode and without gradients."""
        super().train(mode)
        if self.image_features_are_fixed:  # set here, since loading ends with eval() and forgets requires_grad
            for name in ("vision_model", "visual_projection"):
                if hasattr(self, name):
                    getattr(self, name).eval().requires_grad_(False)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> MmelModel:
        """A model whose encoders are pretrained and whose other parts start untrained.

        Args:
            text (`str`, *optional*): Hub id or folder of a BERT-like text encoder. Without it, `text_config` describes one
                that starts untrained.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image half and
                projection are taken.
            config: fields of [`MmelConfig`].
        """
        if text is None and config.get("text_config") is None:
            raise ValueError("from_backbones needs the Hub id or folder of a text encoder, or a text_config.")
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
                encoder.pop("_name_or_path", None)  # may be a path of this machine, and the weights travel with us
                config.setdefault(name.replace("model", "config"), encoder)
        model = cls(MmelConfig(**config))
        for name, part in parts.items():
            target = getattr(model, name, None)
            if target is not None and (name.endswith("model") or config["projection_dim"]):
                wanted = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in wanted})
        return model

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """f_v [I, d] of I images [I, 3, H, W] (§3.2.2)."""
        if not hasattr(self, "vision_model"):
            raise ValueError("This model sees no images; its configuration has no vision_config.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_features_are_fixed):
            output = self.vision_model(pixel_values=pixel_values)
            pooled = getattr(output, "pooler_output", None)
            if pooled is None:
                states = output.last_hidden_state
                pooled = states.mean((2, 3)) if states.dim() == 4 else states[:, 0]
            pooled = pooled.flatten(1)
            return self.visual_projection(pooled) if self.config.projection_dim else pooled

    def _images(self, side: str, features, pixel_values, mask, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """f_v [count, d] of one side, zero where missing, and where it is there [count]."""
        if mask is None:
            given = features if features is not None else pixel_values
            if given is None:
                raise ValueError(
                    f"This model sees images: pair_{side}_image_features or pair_{side}_pixel_values is missing."
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
        """Eq. 1 and 4: words of context and of entity, each [P, L', d_v] with its mask [P, L']."""
        if self.config.joint_text:
            states = self._states(input_ids, attention_mask)
            sides = [_select(states, mask) for mask in (context_mask, entity_mask)]
        else:
            parts = [_select(input_ids, mask) for mask in (context_mask, entity_mask)]
            sides = [(self._states(x, m.long()), m) for x, m in parts]
        return [(self.dropout(F.relu(self.text_fc(x))), mask) for x, mask in sides]

    def _states(self, input_ids, attention_mask) -> torch.Tensor:
        """Last hidden states [P, L, d_t]; sequences of like length run together, for half of a batch is padding."""
        states = []
        order = attention_mask.sum(1).argsort()
        for part in order.split(_BLOCK_SEQUENCES[attention_mask.device.type == "cuda"]):
            used = attention_mask[part].any(0).nonzero()
            width = int(used[-1]) + 1 if len(used) else 1
            encoded = self.text_model(input_ids=input_ids[part, :width], attention_mask=attention_mask[part, :width])
            states.append(F.pad(encoded.last_hidden_state, (0, 0, 0, input_ids.shape[1] - width)))
        return torch.cat(states)[order.argsort()]

    def _joint_image(self, context, context_mask, entity, entity_mask):
        """Eq. 2–3: image tokens of context and of entity, each [P, k, d_v] with its mask [P, k]."""
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
        """Eq. 7–9: h [P, d_v] of one side."""
        text, image = self.fusion(text, text_mask, image, image_mask)
        text = _masked_max(text, text_mask)
        if image is None:
            return text
        image = _masked_max(image, image_mask)
        logits = self.gate(torch.cat([text, image], -1))
        seen = torch.stack([torch.ones_like(image_mask[:, 0]), image_mask[:, 0]], 1)
        gate = _softmax_or_zeros(logits, seen).to(text.dtype)
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
        labels: torch.LongTensor | None = None,
    ) -> MmelOutput:
        """
        Args:
            pair_input_ids, pair_attention_mask (`torch.Tensor` [M, C, L]): the template, filled.
            pair_context_mask, pair_entity_mask (`torch.Tensor` [M, C, L]): which tokens are whose (eq. 1).
            pair_mask (`torch.Tensor` [M, C], *optional*): False where a mention has no such candidate.
            pair_context (`torch.LongTensor` [M], *optional*): equal for mentions of one context; the pairwise loss
                needs it.
            pair_mention_image_features, pair_entity_image_features (`torch.Tensor` [M, d], [M, C, d], *optional*): what
                `encode_images` gave.
            pair_mention_pixel_values, pair_entity_pixel_values (`torch.Tensor` [M, 3, H, W], [M, C, 3, H, W],
                *optional*): the images themselves, where there are no features.
            pair_mention_image_mask, pair_entity_image_mask (`torch.Tensor` [M], [M, C], *optional*): False where an
                image is missing.
            labels (`torch.LongTensor` [M], *optional*): the column of each mention's gold, -100 for a mention to leave
                out of the loss. All other columns are negatives.
        """
        if pair_input_ids is None or pair_context_mask is None or pair_entity_mask is None:
            raise ValueError("MMEL needs pair_input_ids, pair_context_mask and pair_entity_mask, [M, C, L] each.")
        m, c, length = pair_input_ids.shape
        if pair_mask is None:
            pair_mask = torch.ones(m, c, dtype=torch.bool, device=pair_input_ids.device)
        pair_mask = pair_mask.bool()
        pairs = pair_mask.flatten().nonzero()[:, 0]  # only these are computed
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
            context, entity = self._joint_text(
                pair_input_ids.reshape(-1, length)[pairs], attended.long(), context_mask, entity_mask
            )
            if hasattr(self, "vision_model"):
                mention_image, mention_seen = self._images(
                    "mention", pair_mention_image_features, pair_mention_pixel_values, pair_mention_image_mask, m
                )
                entity_image, entity_seen = self._images(
                    "entity", pair_entity_image_features, pair_entity_pixel_values, pair_entity_image_mask, m * c
                )
                mention_image = self.dropout(F.relu(self.image_fc(mention_image)))[pairs // c]
                entity_image = self.dropout(F.relu(self.image_fc(entity_image[pairs])))
                images = self._joint_image(mention_image, mention_seen[pairs // c], entity_image, entity_seen[pairs])
                context, entity = (*context, *images[0]), (*entity, *images[1])
            h_context, h_entity = self._fuse(*context), self._fuse(*entity)
            with torch.autocast(self.device.type, enabled=False):  # half precision has too few digits to rank by
                h_context, h_entity = h_context.to(dtype), h_entity.to(dtype)
                pair_logits = self.classifier(self.dropout(torch.cat([h_context, h_entity], -1)))  # eq. 10
            scores = scores.index_put((pairs,), pair_logits[:, 1] - pair_logits[:, 0])
            features = features.index_put((pairs,), h_entity)
            logits = logits.index_put((pairs,), pair_logits)
        scores, features = scores.view(m, c), features.view(m, c, -1)
        loss = None
        if labels is not None:
            loss = self._loss(logits.view(m, c, 2), features, pair_mask, pair_context, labels)
        return MmelOutput(loss=loss, scores=scores, features=features, unit_scores={})

    def _loss(self, logits, features, mask, contexts, labels) -> torch.Tensor:
        """Cross entropy of eq. 10 over positives plus that over negatives, and λ times eq. 11."""
        rows = (labels >= 0).nonzero()[:, 0]
        gold = labels[rows]
        if (gold >= mask.shape[1]).any() or not mask[rows, gold].all():
            raise ValueError("A label names a column without a candidate; give -100 for a mention without a gold.")
        positive = torch.zeros_like(mask)
        positive[rows, gold] = True
        negative = mask & ~positive & (labels >= 0).unsqueeze(1)
        log_m = F.log_softmax(logits, -1)
        loss = -_mean_where(log_m[..., 1], positive) - _mean_where(log_m[..., 0], negative)
        if not hasattr(self, "similarity"):
            return loss
        if contexts is None:
            raise ValueError("The pairwise loss needs pair_context; without it set pairwise_loss_weight to 0.")
        return loss + self.config.pairwise_loss_weight * self._pairwise_loss(
            features, negative, contexts[rows], rows, gold
        )

    def _pairwise_loss(self, features, negative, contexts, rows, gold) -> torch.Tensor:
        """L_p of eq. 11: the mean over pairs of mentions of one context."""
        same = contexts.unsqueeze(0) == contexts.unsqueeze(1)
        one, two = torch.triu(same, 1).nonzero().unbind(1)
        anchor, other = torch.cat([one, two]), torch.cat([two, one])  # L_p1, L_p2
        anchors, columns = features[rows[anchor], gold[anchor]], features[rows[other]]  # [K, d], [K, C, d]
        similarity = self.similarity(anchors.unsqueeze(1), columns).squeeze(1)  # [K, C]
        to_positive = similarity.gather(1, gold[other].unsqueeze(1))
        hinge = F.relu(similarity - to_positive + self.config.margin)
        usable = negative[rows[other]]
        terms = (hinge * usable).sum(1) / usable.sum(1).clamp(min=1)
        return terms.sum() / max(1, len(one))

    @torch.no_grad()
    def rank_jointly(
        self, scores: torch.Tensor, features: torch.Tensor, mask: torch.Tensor, contexts: torch.Tensor
    ) -> torch.Tensor:
        """Multi-mention collaborative ranking (§3.5).

        A context of n mentions costs (n - 1)·|E|² similarities; memory is bounded by working in blocks.

        Args:
            scores (`torch.Tensor` [M, C]): `scores` of [`MmelOutput`].
            features (`torch.Tensor` [M, C, d_v]): `features` of [`MmelOutput`].
            mask (`torch.Tensor` [M, C]): `pair_mask`.
            contexts (`torch.Tensor` [M]): `pair_context`; rows of one context need not be neighbours.

        Returns:
            `torch.Tensor` [M, C]: log-odds of half of what the paper ranks by, m plus the best score of the combinations
            that a candidate is in; they order alike. A mention that is alone in its context keeps its scores. -inf where
            `mask` is False.
        """
        mask = mask.bool()
        scores = scores.masked_fill(~mask, -torch.inf)
        if not hasattr(self, "similarity") or not scores.numel():
            return scores
        # In float64, neither probabilities near one nor sums with very small ones become equal.
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
        table[contexts[order], place] = order  # rows of each context, the most confident first

        joint = scores.gather(1, candidates)
        width = matching.shape[1]
        several = (counts > 1).nonzero()[:, 0]
        several = several[counts[several].argsort()]
        start = 0
        while start < len(several):
            # Contexts with like numbers of mentions together, as many as fit.
            step = max(1, _budget(features) // max(1, width * features.shape[-1] * int(counts[several[start]])))
            block = several[start : start + step]
            start += step
            rows = table[block, : int(counts[block].max())]
            there = rows >= 0
            index = rows.clamp(min=0)
            found = features[index].gather(2, candidates[index].unsqueeze(-1).expand(-1, -1, -1, features.shape[-1]))
            added = self._best_combinations(matching[index], found, there)
            half = ((matching[rows[there]] + added[there]) / 2).clamp(max=1 - torch.finfo(wide).eps)
            # Where there is no candidate, half is -inf, and so is the logarithm of tiny / inf.
            joint[rows[there]] = (half.clamp(min=torch.finfo(wide).tiny) / (1 - half)).log().to(joint.dtype)
        return torch.empty_like(joint).scatter_(1, candidates, joint)

    def _best_combinations(self, matching, features, there) -> torch.Tensor:
        """What §3.5 adds to m: [G, T, C] for G contexts of up to T mentions (`there` [G, T]), in order of confidence.

        `matching` [G, T, C] falls along C; so ties, broken by place, never put a worse candidate before a better one.
        """
        groups, mentions, width = matching.shape
        limit = (matching > -torch.inf).sum(-1).masked_fill(~there, 0).amax(1, keepdim=True)  # |E|, [G, 1]
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
            goes_on = there[:, t].unsqueeze(1)
            average = (_take(combined, first) + _take(features[:, t], second)) / 2
            combined = torch.where(goes_on.unsqueeze(2), average, combined)
            scores = torch.where(goes_on, best, scores)
            chosen = [torch.where(goes_on, before.gather(1, first), before) for before in chosen] + [second]
        added = torch.stack(
            [torch.full_like(scores, -torch.inf).scatter_reduce(1, column, scores, "amax") for column in chosen], 1
        )
        return added.masked_fill(added == -torch.inf, 0.0)


def _select(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of `x` [P, L] or [P, L, d] where `mask` [P, L] is True, moved to the front: x [P, L'], mask."""
    width = max(1, int(mask.sum(1).max()))
    order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    index = order if x.dim() == 2 else order.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.gather(1, index), mask.gather(1, order)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` [G, B] of `x` [G, C, d]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _softmax_or_zeros(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. A row without any is zeros."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


def _masked_max(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Maximum of [B, L, d] over the L positions where `mask` [B, L] is True; zero where it is True nowhere."""
    mask = mask.unsqueeze(-1)
    return x.masked_fill(~mask, torch.finfo(x.dtype).min).amax(1).masked_fill(~mask.any(1), 0.0)


def _mean_where(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `x` where `mask` is True; zero if that is nowhere."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _budget(x: torch.Tensor) -> int:
    return _BLOCK_ELEMENTS.get(x.device.type, 2**24)


def _build_backbone(config) -> PreTrainedModel:
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
