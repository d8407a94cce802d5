"""DZMNED (Moon et al., ACL 2018), JMEL (Adjali et al., ECIR 2020) and VELML (Zheng et al., 2022), as retrievers.

Text, image and characters of a mention become one vector each, which are fused into one; an entity likewise. The steps
D1–D7 are those of `README.md` in this folder, which says where each comes from: the papers were not readable for this
code, so they follow public notes and what other papers say about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_modal_fusion import ModalFusionConfig
from .glove_modal_fusion import glove_vectors


@dataclass
class ModalFusionEncodings(ModelOutput):
    """Encodings of B mentions or entities. All vectors have length 1.

    Args:
        label (`torch.Tensor` [B, hidden_size]): The vector that the modalities are fused into.
        lexical (`torch.Tensor` [B, 2 * char_hidden_size], *optional*): Of an entity, the characters of its name; of a
            mention, what the fused vector says about them.
        characters (`torch.Tensor` [B, C], *optional*): For the loss of edit distances, the characters of the mention or name.
        char_codes (`torch.Tensor` [B, S], *optional*): For this loss, their code points plus 1, padded with 0.
    """

    label: torch.Tensor | None = None
    lexical: torch.Tensor | None = None
    characters: torch.Tensor | None = None
    char_codes: torch.Tensor | None = None


@dataclass
class ModalFusionOutput(ModelOutput):
    """Output of [`ModalFusionModel`].

    Args:
        loss (`torch.Tensor` [], *optional*): The sum of `losses`. Returned if `labels` are given.
        scores (`torch.Tensor` [M, N]): The cosine, or the mean of the two units; higher is better.
        unit_scores (`dict[str, torch.Tensor]`): With characters, "label" and "lexical" [M, N], both cosines; else empty.
        losses (`dict[str, torch.Tensor]`, *optional*): "label", and with characters "lexical" (D5) and "edit" (D7).
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None
    losses: dict[str, torch.Tensor] | None = None


class _AlignedLinear(nn.Linear):
    """Linear map without a bias at first, whose weight starts as one orthogonal matrix for all maps of its shape."""


class _IdentityLinear(nn.Linear):
    """Linear map that starts as the identity."""


class LastStates(nn.Module):
    """Bi-LSTM over a sequence: the last states of both directions, joined (D1 and D3)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns [B, 2 * hidden] from `x` [B, L, d] whose first positions `mask` [B, L] are real; zeros for none."""
        lengths = mask.sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        _, (last, _) = self.lstm(packed)
        return torch.cat([last[0], last[1]], -1) * (lengths > 0).unsqueeze(1)


class RegionAttention(nn.Module):
    """Vector of an image from its cells, with the weights softmax(w·tanh(W x + W' t)) of a text t (D2, VELML's objects)."""

    def __init__(self, width: int, text_width: int, hidden: int):
        super().__init__()
        self.cells, self.text = nn.Linear(width, hidden), nn.Linear(text_width, hidden, bias=False)
        self.weight = nn.Linear(hidden, 1, bias=False)

    def forward(self, cells: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Returns [B, d] from cells [B, n, d] and texts [B, d']."""
        logits = self.weight(torch.tanh(self.cells(cells) + self.text(text).unsqueeze(1))).squeeze(-1)
        return (logits.softmax(-1).unsqueeze(1) @ cells).squeeze(1)


class ModalityFusion(nn.Module):
    """One side's maps of its modalities to `hidden_size`, and their fusion into one vector (D4)."""

    def __init__(self, config: ModalFusionConfig, widths: Mapping[str, int]):
        super().__init__()
        dim = config.hidden_size
        self.has_attention = config.fusion == "attention"
        linear = _AlignedLinear if config.aligned_start else nn.Linear
        self.maps = nn.ModuleDict({name: linear(width, dim) for name, width in widths.items()})
        self.dropout = nn.Dropout(config.dropout)
        if not self.has_attention:
            self.joint = linear(len(widths) * dim, dim)
        elif len(widths) > 1:
            self.attention = nn.Linear(len(widths) * dim, len(widths))

    def weights(self, mapped: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Attention [B, K] to K mapped modalities [B, K, d], of which `present` [B, K] are there: a softmax of sigmoids."""
        if not hasattr(self, "attention"):
            return present.to(mapped.dtype)
        return _softmax_or_zeros(self.attention(mapped.flatten(1)).sigmoid(), present).to(mapped.dtype)

    def forward(self, modalities: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns [B, d] from the vectors [B, ·] of the modalities. A missing one, `present` [B] False, counts as zeros."""
        mapped = [self.maps[name](vector) * present[name].unsqueeze(1) for name, vector in modalities.items()]
        if not self.has_attention:
            return torch.tanh(self.joint(self.dropout(torch.cat(mapped, -1))))
        stacked = self.dropout(torch.stack(mapped, 1))
        weights = self.weights(stacked, torch.stack(list(present.values()), 1))
        return (weights.unsqueeze(1) @ stacked).squeeze(1)


class ModalFusionPreTrainedModel(PreTrainedModel):
    """Base class of the model: configuration, weight initialisation and supported attention implementations."""

    config: ModalFusionConfig
    config_class = ModalFusionConfig
    base_model_prefix = "modal_fusion"
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
        if isinstance(module, _AlignedLinear):
            # One seed, so that both sides start as the same projection.
            shared = torch.empty(module.weight.shape)
            nn.init.orthogonal_(shared, generator=torch.Generator().manual_seed(0))
            init.copy_(module.weight, shared.to(module.weight))
            init.zeros_(module.bias)
        elif isinstance(module, _IdentityLinear):
            init.eye_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # PyTorch's default initialisation
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)


class ModalFusionModel(ModalFusionPreTrainedModel):
    """A retriever that fuses the modalities of a mention, and of an entity, into one vector each.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/dzmned-wikimel")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/dzmned-wikimel")  # doctest: +SKIP
    >>> mentions = model.encode_mentions(**processor(mentions=mention_rows))  # doctest: +SKIP
    >>> entities = model.encode_entities(**processor(entities=entity_rows))  # doctest: +SKIP
    >>> model.score(mentions, entities)  # [M, N] # doctest: +SKIP
    ```
    """

    #: Pretrained submodules. The trainer may give all other parameters another learning rate.
    backbone_names = ("text_model", "word_embeddings", "vision_model")
    #: A missing modality has no weight, or is zeros ([`hf_mel.protocols.leaves_out_missing_images`]).
    leaves_out_missing_images = True

    def __init__(self, config: ModalFusionConfig):
        super().__init__(config)
        dim = config.hidden_size
        if config.text_config is not None:
            self.text_model = _build_backbone(config.text_config, False)
            text_width: int = config.text_config.hidden_size  # type: ignore[union-attr]
        else:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.word_dim)  # type: ignore[arg-type]
            self.words = LastStates(config.word_dim, dim // 2)  # type: ignore[arg-type]
            text_width = dim
        mention_widths, entity_widths = {"text": text_width}, {"text": text_width}
        if config.vision_config is not None:
            self.vision_model = _build_backbone(config.vision_config, False)
            width = _last_width(config.vision_config)
            mention_widths["image"] = width
            if "image" in (config.entity_modalities or ()):
                entity_widths["image"] = width
            if config.image_regions == "grid":
                self.regions = RegionAttention(width, text_width, dim)
        if config.char_hidden_size is not None:
            self.char_embeddings = nn.Embedding(config.char_vocab_size, config.char_dim)
            self.characters = LastStates(config.char_dim, config.char_hidden_size)
            mention_widths["characters"] = 2 * config.char_hidden_size
            self.label_map = (_IdentityLinear if config.aligned_start else nn.Linear)(dim, dim)  # f of D5
            self.lexical_map = nn.Linear(dim, 2 * config.char_hidden_size)
        self.mention_fusion = ModalityFusion(config, mention_widths)
        self.entity_fusion = ModalityFusion(config, entity_widths)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> ModalFusionModel:
        """Sets the training mode, except for frozen word vectors and a frozen image encoder."""
        super().train(mode)
        # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
        if hasattr(self, "word_embeddings"):
            self.word_embeddings.requires_grad_(self.config.train_words)
        if hasattr(self, "vision_model") and self.config.freeze_vision:
            self.vision_model.eval().requires_grad_(False)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> ModalFusionModel:
        """Builds a model with pretrained encoders. All other parts are initialised.

        Args:
            text (`str`, *optional*): Hub id or folder of a text encoder like BERT, or path of a file of word vectors in
                GloVe's format. Without it, the configuration describes what to initialise.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image encoder is
                used.
            config: Fields of [`ModalFusionConfig`].
        """
        if text is None and config.get("text_config") is None and config.get("vocab_size") is None:
            raise ValueError(
                "from_backbones needs a text encoder or word vectors. Give its Hub id, folder or file, or a text_config."
            )
        parts: dict[str, nn.Module] = {}
        if text is not None and Path(text).is_file():
            table = glove_vectors(text)
            parts["word_embeddings"] = nn.Embedding.from_pretrained(table)
            config |= {"vocab_size": table.shape[0], "word_dim": table.shape[1]}
        elif text is not None:
            encoder = AutoModel.from_pretrained(text)
            parts["text_model"] = encoder
            config.setdefault("text_config", _portable_config(encoder.config))
        if vision is not None:
            encoder = AutoModel.from_pretrained(vision)
            encoder = getattr(encoder, "vision_model", encoder)  # the image half of a CLIP
            parts["vision_model"] = encoder
            config.setdefault("vision_config", _portable_config(encoder.config))
        model = cls(ModalFusionConfig(**config))
        for name, part in parts.items():
            if hasattr(model, name):
                target = getattr(model, name)
                names = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in names})
        return model

    # ---- modalities

    def _text(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the text vectors [B, d] (D1), and False [B] for a text without a word."""
        has_text = attention_mask.any(1)
        if hasattr(self, "word_embeddings"):
            return self.words(self.word_embeddings(input_ids), attention_mask), has_text
        states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.text_pooling == "mean":
            return _masked_mean(states, attention_mask), has_text
        return states[:, 0], has_text

    def _image(self, pixel_values: torch.Tensor, has_image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Returns the image vectors [B, d] (D2), zeros for a missing image."""
        width = _last_width(self.config.vision_config)
        every = text.new_zeros(len(has_image), width)
        if not has_image.any():
            return every
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            output = self.vision_model(pixel_values=pixel_values[has_image])
            states, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            if states.dim() == 4:  # the map [B, C, H, W] of a CNN
                states = states.flatten(2).transpose(1, 2)
                pooled = states.mean(1) if pooled is None else pooled.flatten(1)
            elif pooled is None:
                pooled = states[:, 0]
        image = self.regions(states, text[has_image]) if hasattr(self, "regions") else pooled
        return every.to(image.dtype).index_put((has_image.nonzero()[:, 0],), image)

    def _characters(self, char_ids: torch.Tensor) -> torch.Tensor:
        """Returns the character vectors [B, 2 * char_hidden_size] (D3) of code points [B, L], padded with -1."""
        mask = char_ids >= 0
        codes = char_ids.clamp(min=0) % self.config.char_vocab_size
        return self.characters(self.char_embeddings(codes), mask)

    def _side(self, side: str, input_ids, attention_mask, pixel_values, image_mask, characters=None) -> torch.Tensor:
        """Returns the fused vectors [B, d] (D4) of `side`, "mention" or "entity". `characters` [B, ·] join a mention's."""
        fusion = self.mention_fusion if side == "mention" else self.entity_fusion
        text, has_text = self._text(input_ids, attention_mask)
        modalities, present = {"text": text}, {"text": has_text}
        if "image" in fusion.maps:
            if pixel_values is None or image_mask is None:
                raise ValueError(
                    f"{side}_pixel_values or {side}_image_mask is missing. Pass both, as this model reads images."
                )
            present["image"] = image_mask.bool()
            modalities["image"] = self._image(pixel_values, present["image"], text)
        if characters is not None:
            modalities["characters"] = characters
            present["characters"] = torch.ones_like(has_text)
        return fusion(modalities, present)

    def _mention_vectors(
        self, input_ids, attention_mask, pixel_values, image_mask, char_ids
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Returns the encodings of mentions, and their character vectors for D7."""
        characters = None
        if hasattr(self, "characters"):
            characters = self._characters(_required("mention_char_ids", char_ids))
        linked = self._without_gradient(characters)
        fused = self._side("mention", input_ids, attention_mask, pixel_values, image_mask, linked)
        if characters is None:
            return {"label": F.normalize(fused, dim=-1)}, None
        maps = {"label": self.label_map, "lexical": self.lexical_map}  # f of D5
        return {name: F.normalize(layer(fused), dim=-1) for name, layer in maps.items()}, characters

    def _entity_vectors(
        self, input_ids, attention_mask, pixel_values, image_mask, char_ids
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Returns the encodings of entities, and their character vectors for D7."""
        encoded = {
            "label": F.normalize(self._side("entity", input_ids, attention_mask, pixel_values, image_mask), dim=-1)
        }
        characters = None
        if hasattr(self, "characters"):
            characters = self._characters(_required("entity_char_ids", char_ids))
            encoded["lexical"] = F.normalize(self._without_gradient(characters), dim=-1)
        return encoded, characters

    def _without_gradient(self, characters: Any) -> Any:
        """Character vectors that the linking losses do not change, if the edit loss trains them (D7)."""
        return characters.detach() if characters is not None and self.config.edit_loss_weight else characters

    # ---- the contract of a retriever

    def encode_mentions(
        self,
        mention_input_ids: torch.LongTensor,
        mention_attention_mask: torch.Tensor,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_char_ids: torch.LongTensor | None = None,
        for_loss: bool = False,
    ) -> ModalFusionEncodings:
        """Encodes M mentions.

        Args:
            mention_input_ids, mention_attention_mask (`torch.Tensor` [M, L]): The texts.
            mention_pixel_values (`torch.Tensor` [M, 3, H, W]), mention_image_mask (`torch.Tensor` [M]): The images, and
                False for a missing one. Needed if the model reads images.
            mention_char_ids (`torch.Tensor` [M, S]): Code points of the mention, padded with -1. Needed if the model reads
                characters.
            for_loss (`bool`, *optional*, defaults to `False`): Whether to return what the loss of edit distances needs, too.
        """
        vectors, characters = self._mention_vectors(
            mention_input_ids, mention_attention_mask, mention_pixel_values, mention_image_mask, mention_char_ids
        )
        return ModalFusionEncodings(**vectors, **self._of_edit_loss(characters, mention_char_ids, for_loss))

    def encode_entities(
        self,
        entity_input_ids: torch.LongTensor,
        entity_attention_mask: torch.Tensor,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
        entity_char_ids: torch.LongTensor | None = None,
        for_loss: bool = False,
    ) -> ModalFusionEncodings:
        """Encodes N entities; the arguments are as those of [`~ModalFusionModel.encode_mentions`]."""
        vectors, characters = self._entity_vectors(
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask, entity_char_ids
        )
        return ModalFusionEncodings(**vectors, **self._of_edit_loss(characters, entity_char_ids, for_loss))

    def _of_edit_loss(self, characters: Any, char_ids: torch.Tensor | None, for_loss: bool) -> dict[str, torch.Tensor]:
        """Returns what the loss of edit distances needs (D7); nothing without this loss."""
        if not for_loss or characters is None or not self.config.edit_loss_weight:
            return {}
        if char_ids is None:
            raise ValueError("Both sides need code points.")
        return {"characters": characters, "char_codes": char_ids + 1}

    def _all_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Cosines [M, N] of every unit (D6), in float32 even under autocast: half precision is too coarse for ranking."""
        units = ("label", "lexical") if hasattr(self, "characters") else ("label",)
        with torch.autocast(self.device.type, enabled=False):
            return {unit: _full_precision(mentions[unit]) @ _full_precision(entities[unit]).T for unit in units}

    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores [M, N] of every pair: the cosine, or the mean of the two units (D6)."""
        return _mean(self._all_scores(mentions, entities))

    def unit_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Scores [M, N] of the units "label" and "lexical"; empty for a model without characters."""
        scores = self._all_scores(mentions, entities)
        return scores if len(scores) > 1 else {}

    # Copied from modeling/ghmfc/modeling_ghmfc.py
    @torch.no_grad()
    def bound_queries(self, mentions: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [M, D], w [M, 0] and c [M] (float32). The score of an entity is ⟨q, x⟩, so there is no b, and c is 0."""
        vectors = self.query_vectors(mentions)
        return vectors, vectors.new_zeros(len(vectors), 0), vectors.new_zeros(len(vectors))

    # Copied from modeling/ghmfc/modeling_ghmfc.py
    @torch.no_grad()
    def bound_vectors(self, entities: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, D] and b [N, 0] (float32); see [`~ModalFusionModel.bound_queries`]."""
        vectors = self.index_vectors(entities)
        return vectors, vectors.new_zeros(len(vectors), 0)

    @torch.no_grad()
    def query_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [M, D] of mentions, whose inner products with those of entities are the scores."""
        parts = [_full_precision(mentions[unit]) for unit in ("label", "lexical") if mentions.get(unit) is not None]
        return torch.cat(parts, -1) / len(parts)

    @torch.no_grad()
    def index_vectors(self, entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Vectors [N, D] of entities."""
        parts = [_full_precision(entities[unit]) for unit in ("label", "lexical") if entities.get(unit) is not None]
        return torch.cat(parts, -1)

    def forward(
        self,
        mention_input_ids: torch.LongTensor,
        mention_attention_mask: torch.Tensor,
        entity_input_ids: torch.LongTensor,
        entity_attention_mask: torch.Tensor,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_char_ids: torch.LongTensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
        entity_char_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> ModalFusionOutput:
        """Scores M mentions against N entities and, given labels, computes the loss.

        Args:
            mention_input_ids, mention_attention_mask, mention_pixel_values, mention_image_mask, mention_char_ids: See
                [`~ModalFusionModel.encode_mentions`].
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask, entity_char_ids: See
                [`~ModalFusionModel.encode_entities`].
            labels (`torch.LongTensor` [M], *optional*): Column of each mention's gold among the N entities. All other
                columns are negatives, so every entity may have one column only.
        """
        mentions = self.encode_mentions(
            mention_input_ids,
            mention_attention_mask,
            mention_pixel_values,
            mention_image_mask,
            mention_char_ids,
            for_loss=labels is not None,
        )
        entities = self.encode_entities(
            entity_input_ids,
            entity_attention_mask,
            entity_pixel_values,
            entity_image_mask,
            entity_char_ids,
            for_loss=labels is not None,
        )
        units = self._all_scores(mentions, entities)
        scores, shown = _mean(units), units if len(units) > 1 else {}
        if labels is None:
            return ModalFusionOutput(scores=scores, unit_scores=shown)
        losses = {}
        for unit, unit_scores in units.items():
            if self.config.loss == "softmax":
                losses[unit] = F.cross_entropy(unit_scores / self.config.temperature, labels.long())
                continue
            margins: torch.Tensor | float = self.config.margin
            if self.config.loss == "adaptive_hinge":  # ỹ·y of the wrong and the right entity
                vectors = _full_precision(entities[unit])
                margins = vectors[labels.long()] @ vectors.T
            losses[unit] = _margin_loss(unit_scores, labels, margins, self.config.negatives)
        if mentions.characters is not None:
            a, b = (F.normalize(_full_precision(side["characters"]), dim=-1) for side in (mentions, entities))
            target = edit_similarity(mentions["char_codes"] - 1, entities["char_codes"] - 1)
            losses["edit"] = self.config.edit_loss_weight * F.mse_loss((a @ b.T + 1) / 2, target.to(a.dtype))  # D7
        return ModalFusionOutput(
            loss=torch.stack(list(losses.values())).sum(), scores=scores, unit_scores=shown, losses=losses
        )


@torch.no_grad()
def edit_similarity(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor:
    """Returns 1 − (edit distance / length of the longer string), [A, B], of A and B strings; 1 for two empty ones.

    A row of the table of distances is computed at once: the cost of an insertion is the running minimum of what the row
    would be without insertions, less the column.

    Args:
        first, second (`torch.Tensor` [A, S], [B, T]): Code points, padded with -1.
    """
    if first is None or second is None:
        raise ValueError("Both sides need code points.")
    a_lengths, b_lengths = (first >= 0).sum(1), (second >= 0).sum(1)
    columns = torch.arange(second.shape[1] + 1, device=first.device)
    row = columns.expand(len(first), len(second), -1)  # of the empty string
    distance = row.gather(2, b_lengths.expand(len(first), -1).unsqueeze(2)).squeeze(2)
    for k in range(first.shape[1]):
        differs = (first[:, k, None, None] != second[None]).to(row.dtype)
        best = torch.minimum(row[..., :-1] + differs, row[..., 1:] + 1)
        best = torch.cat([row[..., :1] + 1, best], -1)
        row = (best - columns).cummin(-1).values + columns
        at_end = row.gather(2, b_lengths.expand(len(first), -1).unsqueeze(2)).squeeze(2)
        distance = torch.where((k < a_lengths)[:, None], at_end, distance)
    longer = torch.maximum(a_lengths[:, None], b_lengths[None]).clamp(min=1)
    return 1 - distance / longer


def _margin_loss(
    scores: torch.Tensor, labels: torch.Tensor, margins: torch.Tensor | float, negatives: str
) -> torch.Tensor:
    """D5: the mean over mentions of max(0, margin − s⁺ + s⁻), averaged over the negatives or of the hardest; 0 without.

    Args:
        scores (`torch.Tensor` [M, N]): Scores.
        labels (`torch.Tensor` [M]): Column of each gold. All other columns are negatives.
        margins (`torch.Tensor` [M, N] or `float`): The margins.
        negatives (`str`): "mean" or "hardest".
    """
    columns = labels.long().unsqueeze(1)
    hinge = F.relu(margins - scores.gather(1, columns) + scores)
    hinge = hinge.scatter(1, columns, 0.0)
    losses = hinge.amax(1) if negatives == "hardest" else hinge.sum(1) / max(scores.shape[1] - 1, 1)
    return losses.mean()


def _mean(scores: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the scores of the units."""
    return torch.stack(list(scores.values())).mean(0) if len(scores) > 1 else next(iter(scores.values()))


def _required(name: str, tensor: torch.Tensor | None) -> torch.Tensor:
    """Returns the tensor, which a model with characters needs."""
    if tensor is None:
        raise ValueError(
            f"{name} is missing. Build the processor with use_characters=True: this model reads characters."
        )
    return tensor


# Copied from modeling/ghmfc/modeling_ghmfc.py
def _masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean [B, d] of `x` [B, L, d] over the positions where `mask` [B, L] is 1; zeros if there are none."""
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


# Copied from modeling/ghmfc/modeling_ghmfc.py
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


__all__ = ["ModalFusionModel", "ModalFusionPreTrainedModel", "edit_similarity"]
