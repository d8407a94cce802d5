"""GHMFC (Wang et al., SIGIR 2022), its text-only form, and HieCoATT-Alter (Lu et al., NeurIPS 2016), as retrievers.

A mention's text is fused with the cells of its image on several levels (words, phrases, sentence) into one vector. The
steps G1–G9 and H1–H2 are those of `README.md` in this folder, which says where each comes from: GHMFC's paper was not
readable for this code, so they follow descriptions of its published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_ghmfc import GhmfcConfig

#: Widths of the convolutions that make phrases (G3).
_PHRASE_WIDTHS = (1, 2, 3)


@dataclass
class GhmfcEncodings(ModelOutput):
    """Encodings of B mentions or entities.

    Args:
        vector (`torch.Tensor` [B, output_size]): Vectors of length 1.
        mean_word, mean_cell (`torch.Tensor` [B, d], *optional*): For the contrastive loss, the means of words and cells.
        has_image (`torch.Tensor` [B], *optional*): For this loss, False for a missing image.
    """

    vector: torch.Tensor | None = None
    mean_word: torch.Tensor | None = None
    mean_cell: torch.Tensor | None = None
    has_image: torch.Tensor | None = None


@dataclass
class GhmfcOutput(ModelOutput):
    """Output of [`GhmfcModel`].

    Args:
        loss (`torch.Tensor` [], *optional*): G8 plus `contrastive_weight` times G9. Returned if `labels` are given.
        scores (`torch.Tensor` [M, N]): Cosines; higher is better.
        unit_scores (`dict`): Empty, because the score has a single part.
        losses (`dict[str, torch.Tensor]`, *optional*): "ranking" (G8) and, with images, "contrastive" (G9).
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None
    losses: dict[str, torch.Tensor] | None = None


class ModalityMap(nn.Module):
    """Map of the states of a modality to `hidden_size` (G1 and G2): linear, ReLU, LayerNorm; in HieCoATT linear, tanh."""

    def __init__(self, config: GhmfcConfig, width: int):
        super().__init__()
        self.linear = nn.Linear(width, config.hidden_size)
        self.is_alternating = config.attention == "alternating"
        if not self.is_alternating:
            self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = self.linear(states)
        return self.dropout(torch.tanh(x) if self.is_alternating else self.norm(F.relu(x)))


class Phrases(nn.Module):
    """Phrases (G3): at each position, the maximum of convolutions of width 1, 2 and 3 over the words.

    A convolution of width 2 reads a word and the next, one of width 3 a word and its neighbours. Zeros follow the text.
    """

    def __init__(self, config: GhmfcConfig):
        super().__init__()
        dim = config.hidden_size
        self.is_alternating = config.attention == "alternating"
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, dim, width) for width in _PHRASE_WIDTHS)
        if not self.is_alternating:
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in _PHRASE_WIDTHS)

    def forward(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns phrases [B, L, d] of words [B, L, d] with `mask` [B, L]."""
        words = (words * mask.unsqueeze(-1)).transpose(1, 2)
        outputs = []
        for k, convolution in enumerate(self.convolutions):
            width = _PHRASE_WIDTHS[k]
            x = convolution(F.pad(words, ((width - 1) // 2, width // 2))).transpose(1, 2)
            outputs.append(x if self.is_alternating else self.norms[k](F.relu(x)))
        phrases = torch.stack(outputs).amax(0)
        return torch.tanh(phrases) if self.is_alternating else phrases


class MultiHeadAttention(nn.Module):
    """Multi-head attention with masks."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attends from `query` [B, Q, d] to `states` [B, K, d] where `mask` [B, K] is True; zeros if it is nowhere."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (self.query(query), self.key(states), self.value(states))
        )
        logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = _softmax_or_zeros(logits, mask[:, None, None])
        attended = self.output((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return attended * mask.any(1)[:, None, None]


class FusionLayer(nn.Module):
    """Layer of a stack (G4): self-attention, attention to the other modality, feed-forward; each reads a LayerNorm."""

    def __init__(self, config: GhmfcConfig, has_cross: bool):
        super().__init__()
        dim = config.hidden_size
        self.from_input = config.residual == "input"
        self.self_norm, self.self_attention = nn.LayerNorm(dim), MultiHeadAttention(dim, config.num_heads)
        if has_cross:
            self.cross_norm, self.cross_attention = nn.LayerNorm(dim), MultiHeadAttention(dim, config.num_heads)
        self.inner_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, other=None, other_mask=None) -> torch.Tensor:
        normed = self.self_norm(x)
        state = x + self.dropout(self.self_attention(normed, normed, mask))
        if other is not None:
            attended = self.dropout(self.cross_attention(self.cross_norm(state), other, other_mask))
            if self.from_input:  # where nothing is attended to, the self-attended state stays
                state = torch.where(other_mask.any(1)[:, None, None], x, state)
            state = state + attended
        return state + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(self.inner_norm(state))))))


class Stack(nn.Module):
    """Stack of layers of one modality, with a LayerNorm at its end."""

    def __init__(self, config: GhmfcConfig, has_cross: bool):
        super().__init__()
        self.layers = nn.ModuleList(FusionLayer(config, has_cross) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x, mask, other=None, other_mask=None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask, other, other_mask)
        return self.norm(x)


class TransformerLevel(nn.Module):
    """One level of GHMFC (G4–G5): image cells attend to the text, then the text attends to the attended cells."""

    def __init__(self, config: GhmfcConfig):
        super().__init__()
        has_images = config.vision_config is not None
        self.text = Stack(config, has_images)
        if has_images:
            self.image = Stack(config, True)

    def forward(self, text, text_mask, cells=None, cell_mask=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the vectors [B, d] of text and image; that of the image is `None` in a model without images."""
        attended = None if cells is None else self.image(cells, cell_mask, text, text_mask)
        text = self.text(text, text_mask, attended, cell_mask)
        image = None if attended is None else _masked_max(attended, cell_mask)
        return _masked_max(text, text_mask), image


class GuidedAttention(nn.Module):
    """Sum of states with the weights softmax(w·tanh(W x + W' g)) of a guide g (H1)."""

    def __init__(self, config: GhmfcConfig, is_guided: bool):
        super().__init__()
        dim = config.hidden_size
        self.states = nn.Linear(dim, dim)
        if is_guided:
            self.guide = nn.Linear(dim, dim, bias=False)
        self.weight = nn.Linear(dim, 1, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, guide: torch.Tensor | None = None) -> torch.Tensor:
        """Returns [B, d] from states `x` [B, L, d], their `mask` [B, L] and, if guided, `guide` [B, d]."""
        hidden = self.states(x)
        if guide is not None:
            hidden = hidden + self.guide(guide).unsqueeze(1)
        logits = self.weight(self.dropout(torch.tanh(hidden))).squeeze(-1)
        weights = _softmax_or_zeros(logits, mask).to(x.dtype)
        return (weights.unsqueeze(1) @ x).squeeze(1)


class AlternatingLevel(nn.Module):
    """One level of HieCoATT-Alter (H1): text, then cells guided by the text, then text guided by the cells."""

    def __init__(self, config: GhmfcConfig):
        super().__init__()
        self.summary = GuidedAttention(config, False)
        if config.vision_config is not None:
            self.image, self.text = GuidedAttention(config, True), GuidedAttention(config, True)

    def forward(self, text, text_mask, cells=None, cell_mask=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the vectors [B, d] of text and image; that of the image is `None` in a model without images."""
        summary = self.summary(text, text_mask)
        if cells is None:
            return summary, None
        image = self.image(cells, cell_mask, summary)
        return self.text(text, text_mask, image), image


class GatedFusion(nn.Module):
    """Fusion of the levels in GHMFC (G6–G7): sums over the levels, a gate between text and image, a hidden layer."""

    def __init__(self, config: GhmfcConfig):
        super().__init__()
        dim = config.hidden_size
        has_images = config.vision_config is not None
        self.text_norm = nn.LayerNorm(dim)
        if has_images:
            self.image_norm, self.gate = nn.LayerNorm(dim), nn.Linear(dim, 1, bias=False)
        self.hidden = nn.Linear(2 * dim if has_images else dim, dim)
        self.output = nn.Linear(dim, config.output_size)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, texts: list[torch.Tensor], images: list[torch.Tensor], has_image) -> torch.Tensor:
        """Returns [B, output_size] from the vectors [B, d] of every level. `has_image` [B] is False for a missing image."""
        text = self.dropout(self.text_norm(torch.stack(texts).sum(0)))
        features = text
        if images:
            image = self.dropout(self.image_norm(torch.stack(images).sum(0)))
            both = torch.stack([text, image], 1)
            present = torch.stack([torch.ones_like(has_image), has_image], 1)
            weights = _softmax_or_zeros(self.gate(both).squeeze(-1), present).to(both.dtype)
            features = torch.cat([text, (weights.unsqueeze(1) @ both).squeeze(1)], -1)
        return self.output(self.dropout(F.relu(self.hidden(features))))


class RecursiveFusion(nn.Module):
    """Fusion of the levels in HieCoATT (H2): each level's sum of text and image, joined with the level before.

    The last level is twice as wide as the others.
    """

    def __init__(self, config: GhmfcConfig):
        super().__init__()
        dim, count = config.hidden_size, len(config.levels or ())
        widths = [*([dim] * (count - 1)), 2 * dim]
        self.levels = nn.ModuleList(
            nn.Linear(dim if k == 0 else dim + widths[k - 1], width) for k, width in enumerate(widths)
        )
        self.output = nn.Linear(2 * dim, config.output_size)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, texts: list[torch.Tensor], images: list[torch.Tensor], has_image) -> torch.Tensor:
        """As [`GatedFusion`]. The vector of a missing image is zeros already."""
        hidden: torch.Tensor | None = None
        for k, layer in enumerate(self.levels):
            both = texts[k] + images[k] if images else texts[k]
            hidden = torch.tanh(layer(self.dropout(both if hidden is None else torch.cat([both, hidden], -1))))
        return self.output(self.dropout(hidden))


class GhmfcPreTrainedModel(PreTrainedModel):
    """Base class of GHMFC: configuration, weight initialisation and supported attention implementations."""

    config: GhmfcConfig
    config_class = GhmfcConfig
    base_model_prefix = "ghmfc"
    main_input_name = "mention_input_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the encoders. The attentions of this model are over few states and have one implementation.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d):  # PyTorch's default initialisation
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class GhmfcModel(GhmfcPreTrainedModel):
    """GHMFC, a retriever: one vector of text and image for a mention, one vector for an entity, scored by their cosine.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/ghmfc-wikimel")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/ghmfc-wikimel")  # doctest: +SKIP
    >>> mentions = model.encode_mentions(**processor(mentions=mention_rows))  # doctest: +SKIP
    >>> entities = model.encode_entities(**processor(entities=entity_rows))  # doctest: +SKIP
    >>> model.score(mentions, entities)  # [M, N] # doctest: +SKIP
    ```
    """

    #: Pretrained submodules. The trainer may give all other parameters another learning rate.
    backbone_names = ("text_model", "vision_model", "entity_text_model")
    #: No token stands for a missing image, and the gate leaves it out ([`hf_mel.protocols.leaves_out_missing_images`]).
    leaves_out_missing_images = True

    def __init__(self, config: GhmfcConfig):
        super().__init__(config)
        self.text_model = _build_backbone(config.text_config, False)
        self.text_map = ModalityMap(config, config.text_config.hidden_size)  # type: ignore[union-attr]
        if config.vision_config is not None:
            self.vision_model = _build_backbone(config.vision_config, False)
            self.image_map = ModalityMap(config, _last_width(config.vision_config))
        levels = config.levels or []
        if "phrase" in levels:
            self.phrases = Phrases(config)
        if "sentence" in levels:
            self.sentence = nn.LSTM(
                config.hidden_size, config.hidden_size, num_layers=config.lstm_layers, batch_first=True
            )
        level = TransformerLevel if config.attention == "transformer" else AlternatingLevel
        self.levels = nn.ModuleDict({name: level(config) for name in levels})
        self.fusion = GatedFusion(config) if config.fusion == "gated" else RecursiveFusion(config)
        if config.entity_network == "text_encoder":
            self.entity_text_model = _build_backbone(config.text_config, False)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> GhmfcModel:
        """Sets the training mode, except for frozen encoders."""
        super().train(mode)
        # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
        for name, is_frozen in (
            ("vision_model", self.config.freeze_vision),
            ("entity_text_model", not self.config.train_entity_text),
        ):
            if is_frozen and hasattr(self, name):
                getattr(self, name).eval().requires_grad_(False)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> GhmfcModel:
        """Builds a model with pretrained encoders. All other parts are initialised.

        Args:
            text (`str`, *optional*): Hub id or folder of a text encoder like BERT, for mentions and for entities. Without
                it, `text_config` describes an encoder to initialise.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image encoder is
                used.
            config: Fields of [`GhmfcConfig`].
        """
        if text is None and config.get("text_config") is None:
            raise ValueError("from_backbones needs a text encoder. Give its Hub id or folder, or a text_config.")
        parts: dict[str, Any] = {}
        if text is not None:
            parts["text_model"] = parts["entity_text_model"] = AutoModel.from_pretrained(text)
            config.setdefault("text_config", _portable_config(parts["text_model"].config))
        if vision is not None:
            encoder = AutoModel.from_pretrained(vision)
            parts["vision_model"] = getattr(encoder, "vision_model", encoder)  # the image half of a CLIP
            config.setdefault("vision_config", _portable_config(parts["vision_model"].config))
        model = cls(GhmfcConfig(**config))
        for name, part in parts.items():
            if hasattr(model, name):
                target = getattr(model, name)
                names = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in names})
        return model

    # ---- the network of the mentions

    def _words(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the words [B, L-1, d] (G1) without the first position, and their mask [B, L-1]."""
        if input_ids.shape[1] == 1:  # empty texts still have a word, which is masked
            input_ids, attention_mask = F.pad(input_ids, (0, 1)), F.pad(attention_mask, (0, 1))
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.text_map(states[:, 1:]), attention_mask[:, 1:].bool()

    def _cells(self, pixel_values: torch.Tensor, image_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the cells [B, n, d] (G2) of B images, zeros for a missing one, and their mask [B, n]."""
        is_trained = torch.is_grad_enabled() and not self.config.freeze_vision
        with torch.set_grad_enabled(is_trained):
            # One image at least is encoded, so that the number of cells is known.
            shown = image_mask if image_mask.any() else torch.arange(len(image_mask), device=image_mask.device) == 0
            states = self.vision_model(pixel_values=pixel_values[shown]).last_hidden_state
            if states.dim() == 4:  # the map [B, C, H, W] of a CNN
                states = states.flatten(2).transpose(1, 2)
        cells = self.image_map(states)
        every = cells.new_zeros(len(image_mask), *cells.shape[1:])
        every[shown] = cells
        mask = image_mask.unsqueeze(1).expand(-1, cells.shape[1])
        return every * mask.unsqueeze(-1), mask

    def _fused(self, side: str, input_ids, attention_mask, pixel_values, image_mask):
        """Returns vectors [B, output_size] of length 1, and for the contrastive loss the mean word and cell (G9)."""
        words, mask = self._words(input_ids, attention_mask)
        cells: torch.Tensor | None = None
        cell_mask: Any = None
        has_image: Any = None
        if hasattr(self, "vision_model"):
            if pixel_values is None or image_mask is None:
                raise ValueError(
                    f"{side}_pixel_values or {side}_image_mask is missing. Pass both, as this model reads images."
                )
            has_image = image_mask.bool()
            cells, cell_mask = self._cells(pixel_values, has_image)
        states, texts, images = words, [], []
        for name, level in self.levels.items():
            if name == "phrase":  # G3
                states = self.phrases(words, mask)
            elif name == "sentence":
                states = self.sentence(states)[0]  # of the phrases; the padding comes after the text
            text, image = level(states, mask, cells, cell_mask)
            texts.append(text)
            if image is not None:
                images.append(image)
        vector = F.normalize(self.fusion(texts, images, has_image), dim=-1)
        means = None
        if cells is not None:
            means = _masked_mean(words, mask), _masked_mean(cells, cell_mask), has_image
        return vector, means

    def _entity_vectors(self, input_ids, attention_mask, pixel_values, image_mask) -> torch.Tensor:
        """Returns vectors [N, output_size] of entities, of length 1."""
        if self.config.entity_network == "shared":
            return self._fused("entity", input_ids, attention_mask, pixel_values, image_mask)[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_entity_text):
            states = self.entity_text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            pooled = _masked_mean(states, attention_mask) if self.config.entity_pooling == "mean" else states[:, 0]
            return F.normalize(pooled, dim=-1)

    # ---- the contract of a retriever

    def encode_mentions(
        self,
        mention_input_ids: torch.LongTensor,
        mention_attention_mask: torch.Tensor,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        for_loss: bool = False,
    ) -> GhmfcEncodings:
        """Encodes M mentions.

        Args:
            mention_input_ids, mention_attention_mask (`torch.Tensor` [M, L]): The texts.
            mention_pixel_values (`torch.Tensor` [M, 3, H, W]), mention_image_mask (`torch.Tensor` [M]): The images, and
                False for a missing one. Needed if the model reads images.
            for_loss (`bool`, *optional*, defaults to `False`): Whether to return what the contrastive loss needs, too.
        """
        inputs = mention_input_ids, mention_attention_mask, mention_pixel_values, mention_image_mask
        vector, means = self._fused("mention", *inputs)
        if not for_loss or means is None or not self.config.contrastive_weight:
            return GhmfcEncodings(vector=vector)
        return GhmfcEncodings(vector, *means)

    def encode_entities(
        self,
        entity_input_ids: torch.LongTensor,
        entity_attention_mask: torch.Tensor,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
    ) -> GhmfcEncodings:
        """Encodes N entities; the arguments are as those of [`~GhmfcModel.encode_mentions`].

        With `entity_network="text_encoder"`, images are not read.
        """
        inputs = entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask
        return GhmfcEncodings(vector=self._entity_vectors(*inputs))

    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cosines [M, N] of every pair, in float32 even under autocast: half precision has too few digits for ranking."""
        with torch.autocast(self.device.type, enabled=False):
            return _full_precision(mentions["vector"]) @ _full_precision(entities["vector"]).T

    def unit_scores(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> dict:
        """Empty: the score has a single part."""
        return {}

    @torch.no_grad()
    def bound_queries(self, mentions: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [M, D], w [M, 0] and c [M] (float32). The score of an entity is ⟨q, x⟩, so there is no b, and c is 0."""
        vectors = self.query_vectors(mentions)
        return vectors, vectors.new_zeros(len(vectors), 0), vectors.new_zeros(len(vectors))

    @torch.no_grad()
    def bound_vectors(self, entities: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, D] and b [N, 0] (float32); see [`~GhmfcModel.bound_queries`]."""
        vectors = self.index_vectors(entities)
        return vectors, vectors.new_zeros(len(vectors), 0)

    @torch.no_grad()
    def query_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [M, D] of mentions, whose inner products with those of entities are the scores."""
        return _full_precision(mentions["vector"])

    @torch.no_grad()
    def index_vectors(self, entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [N, D] of entities."""
        return _full_precision(entities["vector"])

    def forward(
        self,
        mention_input_ids: torch.LongTensor,
        mention_attention_mask: torch.Tensor,
        entity_input_ids: torch.LongTensor,
        entity_attention_mask: torch.Tensor,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> GhmfcOutput:
        """Scores M mentions against N entities and, given labels, computes the loss.

        Args:
            mention_input_ids, mention_attention_mask, mention_pixel_values, mention_image_mask: See
                [`~GhmfcModel.encode_mentions`].
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask: See
                [`~GhmfcModel.encode_entities`].
            labels (`torch.LongTensor` [M], *optional*): Column of each mention's gold among the N entities. All other
                columns are negatives, so every entity may have one column only.
        """
        mentions = self.encode_mentions(
            mention_input_ids,
            mention_attention_mask,
            mention_pixel_values,
            mention_image_mask,
            for_loss=labels is not None,
        )
        entities = self.encode_entities(
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask
        )
        scores = self.score(mentions, entities)
        if labels is None:
            return GhmfcOutput(scores=scores, unit_scores={})
        loss = _margin_loss(scores, labels, self.config.margin, self.config.negatives)
        losses = {"ranking": loss}
        if mentions.mean_word is not None:
            losses["contrastive"] = self._contrastive_loss(
                mentions["mean_word"], mentions["mean_cell"], mentions["has_image"]
            )
            loss = loss + self.config.contrastive_weight * losses["contrastive"]
        return GhmfcOutput(loss=loss, scores=scores, unit_scores={}, losses=losses)

    def _contrastive_loss(self, text: torch.Tensor, image: torch.Tensor, has_image: torch.Tensor) -> torch.Tensor:
        """G9: the image of a mention among those of the batch, given its text.

        Args:
            text, image (`torch.Tensor` [M, d]): Mean words and mean cells.
            has_image (`torch.Tensor` [M]): False for a missing image, which takes no part.
        """
        text, image = (F.normalize(_full_precision(x[has_image]), dim=-1) for x in (text, image))
        with torch.autocast(self.device.type, enabled=False):
            logits = text @ image.T / self.config.contrastive_temperature
        if len(logits) < 2:  # nothing to tell apart
            return logits.sum() * 0.0
        positive = logits.diagonal()
        if not self.config.contrastive_includes_positive:
            itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(itself, -torch.inf)
        return (logits.logsumexp(1) - positive).mean()


def _margin_loss(scores: torch.Tensor, labels: torch.Tensor, margin: float, negatives: str) -> torch.Tensor:
    """G8: the mean over mentions of max(0, margin − s⁺ + s⁻), averaged over the negatives or of the hardest; 0 without.

    Args:
        scores (`torch.Tensor` [M, N]): Scores.
        labels (`torch.Tensor` [M]): Column of each gold. All other columns are negatives.
        margin (`float`): The margin.
        negatives (`str`): "mean" or "hardest".
    """
    columns = labels.long().unsqueeze(1)
    hinge = F.relu(margin - scores.gather(1, columns) + scores)
    hinge = hinge.scatter(1, columns, 0.0)
    losses = hinge.amax(1) if negatives == "hardest" else hinge.sum(1) / max(scores.shape[1] - 1, 1)
    return losses.mean()


def _masked_max(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Maximum [B, d] of `x` [B, L, d] over the positions where `mask` [B, L] is True (G5); zeros if there are none."""
    if not x.shape[1]:
        return x.new_zeros(len(x), x.shape[2])
    best = x.masked_fill(~mask.unsqueeze(-1), torch.finfo(x.dtype).min).amax(1)
    return best.masked_fill(~mask.any(1, keepdim=True), 0.0)


def _masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean [B, d] of `x` [B, L, d] over the positions where `mask` [B, L] is 1; zeros if there are none."""
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


def _full_precision(x: torch.Tensor) -> torch.Tensor:
    """Returns half-precision tensors (from autocast, or stored on disk) as float32, and others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Copied from modeling/mmel/modeling_mmel.py
def _softmax_or_zeros(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. A row without any is zeros."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


# Copied from modeling/pfmel/modeling_pfmel.py
def _portable_config(config) -> dict[str, Any]:
    """Returns the fields of an encoder's configuration without the name or path that it was loaded from."""
    fields = config.to_dict()
    fields.pop("_name_or_path", None)  # it may be a local path, and the weights are saved with the whole model
    return fields


# Copied from modeling/mimic/modeling_mimic.py
def _build_backbone(config, pooling_layer: bool) -> PreTrainedModel:
    """Builds an untrained encoder; `pooling_layer` is ignored by encoders whose pooling layer is not optional."""
    try:
        return AutoModel.from_config(config, add_pooling_layer=pooling_layer)
    except TypeError:  # the encoder has no argument `add_pooling_layer`
        return AutoModel.from_config(config)


# Copied from modeling/mimic/modeling_mimic.py
def _last_width(config) -> int:
    """Returns the width of an image encoder's last layer: `hidden_sizes[-1]` of a CNN, `hidden_size` of a ViT."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


__all__ = ["GhmfcModel", "GhmfcPreTrainedModel"]
