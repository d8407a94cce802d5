"""The bi-encoder: each side becomes one vector (or one a modality, or one a token), and vectors are compared.

It is a family of baselines: BERT, RoBERTa, BLINK's first stage, CLIP, ViLT, ALBEF, METER and LXMERT differ only in their
encoder and a few options. `modeling/bi_encoder/README.md` says what each of them is, and which part nobody published.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_bi_encoder import JOINT_ENCODERS, BiEncoderConfig

#: Token similarities that `max_similarities` holds in memory at a time, and values of entities that a CPU converts from half
#: precision at a time: as many as stay in the cache of a core.
_BLOCK_SIMILARITIES, _BLOCK_VALUES = 2**20, 2**19
#: Lowest temperature that is learned: CLIP's logit scale is at most 100.
_LEAST_TEMPERATURE = 0.01
_HALF = (torch.float16, torch.bfloat16)
#: Interaction units of late fusion: name → vectors of the mention and of the entity.
_UNITS = {"text": ("text", "text"), "vision": ("vision", "vision")}
_CROSS_UNITS = {"text_to_vision": ("text", "vision"), "vision_to_text": ("vision", "text")}


@dataclass
class BiEncoderEncodings(ModelOutput):
    """Encodings of B mentions or entities. A field is `None` if the model lacks it.

    Args:
        text, vision (`torch.Tensor` [B, d]): Vectors of the modalities, with late fusion.
        fused (`torch.Tensor` [B, d]): The vector of text and image together.
        tokens (`torch.Tensor` [B, L, d]), token_mask (`torch.Tensor` [B, L]): Vectors of the tokens, and True where a token
            is not padding; with `config.interaction="maxsim"`.
        has_text, has_image (`torch.Tensor` [B]): True for a mention that has the modality; with late fusion of both and
            `config.missing_images="absent"`.
    """

    text: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    fused: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    token_mask: torch.Tensor | None = None
    has_text: torch.Tensor | None = None
    has_image: torch.Tensor | None = None


@dataclass
class BiEncoderOutput(ModelOutput):
    """Output of [`BiEncoderModel`].

    Args:
        loss (`torch.Tensor` [], *optional*): Cross entropy over the columns, if `labels` are given.
        scores (`torch.Tensor` [M, N]): Similarities. Higher is better.
        unit_scores (`dict[str, torch.Tensor]`): With late fusion, the similarity of every pair of modalities; nan for a
            mention that lacks its modality. Empty if there is one.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None


class _Attention(nn.Module):
    """Multi-head attention with a residual connection and a LayerNorm after it, as in BERT."""

    def __init__(self, size: int, context_size: int, heads: int, dropout: float):
        super().__init__()
        if size % heads:
            raise ValueError(f"fusion_heads={heads} does not divide the width {size} of the stream.")
        self.heads = heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(context_size, size)
        self.value = nn.Linear(context_size, size)
        self.output = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """States [B, L, d] after attention to `context` [B, S, c] where `mask` [B, S] is True; unread if nowhere."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(states), self.key(context), self.value(context))
        )
        readable = mask.any(1)
        # A row that may read nothing reads everything and then drops it, because its softmax would be nan.
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=(mask | ~readable[:, None])[:, None, None]
        )
        attended = self.output(attended.transpose(1, 2).flatten(2))
        attended = attended.masked_fill(~readable[:, None, None], 0)
        return self.norm(states + self.dropout(attended))


class _FusionLayer(nn.Module):
    """Self-attention, attention to the other modality, and a feed-forward part, each with a LayerNorm after it."""

    def __init__(self, size: int, context_size: int, heads: int, dropout: float):
        super().__init__()
        self.self_attention = _Attention(size, size, heads, dropout)
        self.cross_attention = _Attention(size, context_size, heads, dropout)
        self.inner = nn.Linear(size, 4 * size)
        self.outer = nn.Linear(4 * size, size)
        self.norm = nn.LayerNorm(size, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states, mask, context, context_mask) -> torch.Tensor:
        """Returns the states [B, L, d] of a layer, from states with `mask` [B, L] and a context [B, S, c] with its mask."""
        states = self.self_attention(states, states, mask)
        states = self.cross_attention(states, context, context_mask)
        return self.norm(states + self.dropout(self.outer(F.gelu(self.inner(states)))))


class TextStream(nn.Module):
    """ALBEF's scheme: layers on top of the text encoder, in which every text state reads all states of the image."""

    def __init__(self, config: BiEncoderConfig, text_size: int, image_size: int):
        super().__init__()
        self.size = text_size
        self.layers = nn.ModuleList(
            _FusionLayer(text_size, image_size, config.fusion_heads, config.fusion_dropout)
            for _ in range(config.num_fusion_layers)
        )

    def forward(self, text, text_mask, image, image_mask, pool) -> torch.Tensor:
        """Returns vectors [B, d].

        Args:
            text ([B, L, d]), text_mask ([B, L]): States of the text encoder, and True for a token.
            image ([B, S, c]), image_mask ([B, S]): States of the image encoder, and False if there is no image.
            pool: Function that pools text states.
        """
        for layer in self.layers:
            text = layer(text, text_mask, image, image_mask)
        return pool(text)


class TwoStreams(nn.Module):
    """METER's scheme: a stream of layers for each modality, each of which reads the other's input of the same layer."""

    def __init__(self, config: BiEncoderConfig, text_size: int, image_size: int):
        super().__init__()
        size, heads, dropout = config.fusion_size, config.fusion_heads, config.fusion_dropout
        self.size = 2 * size
        self.text_map, self.image_map = nn.Linear(text_size, size), nn.Linear(image_size, size)
        self.modality = nn.Embedding(2, size)
        self.text_layers, self.image_layers = (
            nn.ModuleList(_FusionLayer(size, size, heads, dropout) for _ in range(config.num_fusion_layers))
            for _ in range(2)
        )
        self.text_pooler, self.image_pooler = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, text, text_mask, image, image_mask, pool) -> torch.Tensor:
        """Returns vectors [B, 2 d], text first; its second half is zero without an image. Arguments as [`TextStream`]."""
        text = self.text_map(text) + self.modality.weight[0]
        image = self.image_map(image) + self.modality.weight[1]
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            text, image = (
                text_layer(text, text_mask, image, image_mask),
                image_layer(image, image_mask, text, text_mask),
            )
        image_vector = torch.tanh(self.image_pooler(image[:, 0])) * image_mask.any(1, keepdim=True)
        return torch.cat([torch.tanh(self.text_pooler(pool(text))), image_vector], -1)


class _MissingImage(nn.Module):
    """Learned vector in place of that of a missing image."""

    def __init__(self, dim: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(dim))

    def forward(self, vectors: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return torch.where(present[:, None], vectors, self.vector.to(vectors.dtype))


class _Temperature(nn.Module):
    """Learned temperature, as its logarithm."""

    def __init__(self, initial: float):
        super().__init__()
        self.initial = initial
        self.logarithm = nn.Parameter(torch.tensor(0.0))

    def forward(self) -> torch.Tensor:
        return self.logarithm.exp().clamp(min=_LEAST_TEMPERATURE)


class SideEncoder(nn.Module):
    """Encoder of one side, or of both sides if they share it."""

    # Present as far as the configuration asks for them.
    text_model: PreTrainedModel
    vision_model: PreTrainedModel
    joint_model: PreTrainedModel
    stream: nn.Module
    visual_projection: nn.Module
    missing_image: nn.Module

    def __init__(self, config: BiEncoderConfig):
        super().__init__()
        self.config = config
        has_pooler = config.pooling == "pooler"
        text, vision, joint = config.text_config, config.vision_config, config.joint_config
        if joint is not None:
            self.joint_model = _build_backbone(joint, config.pooling in ("pooler", "mention"))
        if text is not None:
            self.text_model = _build_backbone(text, has_pooler)
        if vision is not None:
            self.vision_model = _build_backbone(vision, False)
        if config.fuses:
            if joint is not None:
                size: int = joint.hidden_size * (2 if joint.model_type == "bridgetower" and has_pooler else 1)  # type: ignore[union-attr]
            else:
                stream = TextStream if config.fusion == "text_stream" else TwoStreams
                self.stream = stream(config, text.hidden_size, _last_width(vision))  # type: ignore[union-attr]
                size = self.stream.size
            self._add_projection("projection", size)
        else:
            if text is not None:
                self._add_projection("text_projection", text.hidden_size)  # type: ignore[union-attr]
            if vision is not None:
                size = self._add_projection("visual_projection", _last_width(vision))
                if config.missing_images == "absent":
                    self.missing_image = _MissingImage(size)

    def _add_projection(self, name: str, size: int) -> int:
        if self.config.projection_dim is None:
            return size
        setattr(self, name, nn.Linear(size, self.config.projection_dim, bias=False))
        return self.config.projection_dim

    def _project(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., d] after a projection, if the model has it, and ready to be compared."""
        if self.config.projection_dim is not None:
            vectors = getattr(self, name)(vectors)
        return self._comparable(vectors)

    def _comparable(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., d] in full precision, of length 1 if they are compared by cosines."""
        vectors = vectors.float() if vectors.dtype in _HALF else vectors
        return F.normalize(vectors, dim=-1) if self.config.similarity == "cosine" else vectors

    def _pool(self, states, mask, mention_mask, pooled) -> torch.Tensor:
        """Vectors [B, d] of states [B, L, d].

        Args:
            states: States of the tokens, and perhaps of other things after them.
            mask ([B, L]): The tokens.
            mention_mask ([B, L], *optional*): The tokens of the mention, for pooling "mention" on the side of mentions.
            pooled ([B, d], *optional*): What the encoder's pooler gives.
        """
        pooling = self.config.pooling
        if pooling == "mean":
            return masked_mean(states[:, : mask.shape[1]], mask)
        if pooling == "mention" and mention_mask is not None:
            named = mention_mask.any(1)
            # A mention without tokens, such as a visual one, has the first state.
            mention_mask = torch.cat([mention_mask[:, :1] | ~named[:, None], mention_mask[:, 1:]], 1)
            return masked_mean(states[:, : mask.shape[1]], mention_mask)
        if pooling == "pooler":
            if pooled is None:
                raise ValueError("The encoder has no pooler. Set pooling to 'cls' or 'mean'.")
            return pooled
        if pooling == "mention" and pooled is not None and pooled.shape[-1] == states.shape[-1]:
            return pooled
        return states[:, 0]

    def _image_states(self, pixel_values) -> tuple[torch.Tensor, torch.Tensor]:
        """States [B, n, d] of the patches or cells, and pooled vectors [B, d], of images."""
        output = self.vision_model(pixel_values=pixel_values)
        states, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if states.dim() == 4:  # the feature map [B, d, h, w] of a CNN: every cell is a patch
            return states.flatten(2).transpose(1, 2), states.mean((2, 3)) if pooled is None else pooled.flatten(1)
        return states, states[:, 0] if pooled is None else pooled

    def _joint_states(self, input_ids, mask, pixel_values) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States [B, L, d] of a joint encoder, those of the text first, and what its pooler gives [B, d']."""
        if self.config.joint_config.model_type == "lxmert":  # type: ignore[union-attr]
            cells = self.vision_model(pixel_values=pixel_values).last_hidden_state
            if cells.dim() != 4:
                raise ValueError("LXMERT reads the cells of a CNN as objects. Give a vision_config like 'resnet'.")
            boxes = cell_boxes(*cells.shape[2:]).to(cells)
            cells = cells.flatten(2).transpose(1, 2)
            output = self.joint_model(
                input_ids=input_ids,
                attention_mask=mask,
                visual_feats=cells,
                visual_pos=boxes.expand(len(cells), -1, -1),
            )
            return output.language_output, output.pooled_output
        output = self.joint_model(input_ids=input_ids, attention_mask=mask, pixel_values=pixel_values)
        states = getattr(output, "text_features", None)
        return output.last_hidden_state if states is None else states, output.pooler_output

    def forward(
        self,
        side: str,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_mask: torch.Tensor | None,
        mention_mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Returns the encodings of B rows of `side`, "mention" or "entity", for [`BiEncoderEncodings`]."""
        config = self.config
        absent = config.missing_images == "absent" and hasattr(self, "vision_model")
        reads_text = config.text_config is not None or config.joint_config is not None
        if reads_text and input_ids is None:
            raise ValueError(f"{side}_input_ids is missing. Pass it, as this model reads text.")
        if (config.vision_config is not None or config.joint_config is not None) and pixel_values is None:
            raise ValueError(f"{side}_pixel_values is missing. Pass it, as this model reads images.")
        present = None
        if absent:
            if image_mask is None:
                raise ValueError(
                    f"{side}_image_mask is missing. Pass it, or build the processor with modality_masks=True: this model "
                    "leaves missing images out (missing_images='absent')."
                )
            present = image_mask.bool()
            if side == "entity" and self.training and config.image_dropout:
                present = present & (torch.rand(present.shape, device=present.device) >= config.image_dropout)
        length = 0
        if reads_text:
            assert input_ids is not None
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            length = input_ids.shape[1]
            # Padding changes no score, so columns that are padding in every row are left out of the forward pass.
            used = mask.any(0).nonzero()
            width = int(used[-1]) + 1 if len(used) else 1
            input_ids, mask = input_ids[:, :width], mask[:, :width]
            mention_mask = None if mention_mask is None else mention_mask[:, :width].bool()
            if side == "mention" and config.pooling == "mention" and mention_mask is None:
                raise ValueError(
                    "mention_token_mask is missing. Pass it, as this model pools the tokens of the mention."
                )
        if config.joint_config is not None:
            states, pooled = self._joint_states(input_ids, mask, pixel_values)
            return {"fused": self._project("projection", self._pool(states, mask, mention_mask, pooled))}
        encoded: dict[str, torch.Tensor] = {}
        if reads_text:
            output = self.text_model(input_ids=input_ids, attention_mask=mask)
            states, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            pooled = pooled if config.pooling == "pooler" else None
        if hasattr(self, "vision_model"):
            patches, image = self._image_states(pixel_values)
        if hasattr(self, "stream"):
            shown = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
            if present is not None:
                shown = shown & present[:, None]
            fused = self.stream(
                states, mask.bool(), patches, shown, lambda text: self._pool(text, mask, mention_mask, None)
            )
            return {"fused": self._project("projection", fused)}
        if config.interaction == "maxsim":
            tokens = F.pad(self._project("text_projection", states), (0, 0, 0, length - width))
            return {"tokens": tokens, "token_mask": F.pad(mask.bool(), (0, length - width))}
        if reads_text:
            encoded["text"] = self._project("text_projection", self._pool(states, mask, mention_mask, pooled))
        if hasattr(self, "vision_model"):
            if config.projection_dim is not None:
                image = self.visual_projection(image)
            if present is not None:
                image = self.missing_image(image, present)
            encoded["vision"] = self._comparable(image)
            if present is not None and side == "mention":
                encoded["has_image"] = present
        return encoded


class BiEncoderModel(PreTrainedModel):
    """Bi-encoder, a retriever: encodes mentions and entities apart, and scores pairs by cosines or inner products.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("runs/bi-encoder-text_wikimel")  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("runs/bi-encoder-text_wikimel")  # doctest: +SKIP
    >>> mentions = model.encode_mentions(**processor(mentions=mention_rows))  # doctest: +SKIP
    >>> entities = model.encode_entities(**processor(entities=entity_rows))  # doctest: +SKIP
    >>> model.score(mentions, entities)  # [M, N] # doctest: +SKIP
    ```
    """

    config: BiEncoderConfig
    config_class = BiEncoderConfig
    base_model_prefix = "bi_encoder"
    main_input_name = "mention_input_ids"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, so the Trainer must scale it when accumulating
    _no_split_modules = []
    # For the encoders.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    #: Pretrained submodules. The trainer may give all other parameters another learning rate.
    backbone_names: tuple[str, ...] = tuple(
        f"{side}.{part}"
        for side in ("encoder", "entity_encoder")
        for part in ("text_model", "vision_model", "joint_model")
    )

    def __init__(self, config: BiEncoderConfig):
        super().__init__(config)
        self.encoder = SideEncoder(config)
        if not config.shared:
            self.entity_encoder = SideEncoder(config)
        if config.learn_temperature:
            self.temperature = _Temperature(config.temperature)
        units = {**_UNITS, **(_CROSS_UNITS if config.cross_modal else {})}
        sides = {"text": config.text_config, "vision": config.vision_config}
        #: Units of late fusion; empty if one vector stands for a side.
        self.units = {name: pair for name, pair in units.items() if all(sides[part] is not None for part in pair)}
        if config.fuses or config.interaction == "maxsim":
            self.units = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):  # BERT's initialisation
            init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, _MissingImage):
            init.normal_(module.vector, std=0.02)
        elif isinstance(module, _Temperature):
            init.constant_(module.logarithm, math.log(module.initial))

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> BiEncoderModel:
        """Builds a model with pretrained encoders. Layers of a stream are untrained.

        Args:
            text (`str`, *optional*): Hub id or folder of a text encoder; of a CLIP model, which provides both encoders and
                the joint space; or of a joint encoder.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image encoder is used.
            config: Fields of [`BiEncoderConfig`]. `text_config` may hold a part of the fields, such as a smaller
                `num_hidden_layers`, which change those of the pretrained encoder: later layers are then left out.

        Raises:
            `ValueError`: Neither `text` nor `vision` is given.
        """
        if text is None and vision is None:
            raise ValueError(
                "No encoder is given. Pass the Hub id or folder of a text encoder, a vision encoder, or both."
            )
        parts: dict[str, Any] = {}
        kind = "" if text is None else AutoConfig.from_pretrained(text).model_type
        if text is not None and kind == "clip":
            clip = AutoModel.from_pretrained(text)
            names = ("text_model", "vision_model", "text_projection", "visual_projection")
            parts = {name: getattr(clip, name) for name in names}
            if config.get("fusion", "late") == "late":
                config.setdefault("projection_dim", clip.config.projection_dim)
                config.setdefault("pooling", "pooler")
        elif text is not None:
            parts["joint_model" if kind in JOINT_ENCODERS else "text_model"] = AutoModel.from_pretrained(text)
        if vision is not None:
            vision_model = AutoModel.from_pretrained(vision)
            parts["vision_model"] = getattr(vision_model, "vision_model", vision_model)  # the image half of a CLIP
            parts.pop("visual_projection", None)
        for name in ("text_model", "vision_model", "joint_model"):
            if name in parts:
                fields = parts[name].config.to_dict()
                fields.pop("_name_or_path", None)  # it may be a local path, and the weights are saved with the model
                field = name.replace("model", "config")
                config[field] = {**fields, **(config.get(field) or {})}
        model = cls(BiEncoderConfig(**config))
        loaded = []
        for side in ("encoder", "entity_encoder"):
            for name, part in parts.items():
                target, weights = getattr(getattr(model, side, None), name, None), part.state_dict()
                if target is None or (name.endswith("projection") and target.weight.shape != weights["weight"].shape):
                    continue
                target_keys = target.state_dict().keys()
                target.load_state_dict({key: weights[key] for key in target_keys if key in weights})
                loaded.append(f"{side}.{name}")
        model.backbone_names = tuple(loaded)
        return model

    @property
    def text_model(self) -> PreTrainedModel:
        """The text encoder of the mentions."""
        return self.encoder.text_model

    @property
    def leaves_out_missing_images(self) -> bool:
        """Whether a missing image is absent from the score, as [`hf_mel.protocols.leaves_out_missing_images`] asks."""
        config = self.config
        return config.missing_images == "absent" or (config.vision_config is None and config.joint_config is None)

    def encode_mentions(
        self,
        mention_input_ids: torch.LongTensor | None = None,
        mention_attention_mask: torch.Tensor | None = None,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_text_mask: torch.Tensor | None = None,
        mention_token_mask: torch.Tensor | None = None,
    ) -> BiEncoderEncodings:
        """Encodes M mentions.

        Args:
            mention_input_ids, mention_attention_mask (`torch.Tensor` [M, L]): The texts.
            mention_pixel_values (`torch.Tensor` [M, 3, H, W]): The images.
            mention_image_mask, mention_text_mask (`torch.Tensor` [M]): True for a mention that has an image or a text.
                Needed with `config.missing_images="absent"`, otherwise ignored.
            mention_token_mask (`torch.Tensor` [M, L]): True for a token of the mention. Needed with
                `config.pooling="mention"`, otherwise ignored.
        """
        encoded = self.encoder(
            "mention",
            mention_input_ids,
            mention_attention_mask,
            mention_pixel_values,
            mention_image_mask,
            mention_token_mask,
        )
        if "has_image" in encoded and "text" in encoded:
            if mention_text_mask is None:
                raise ValueError("mention_text_mask is missing. Build the processor with modality_masks=True.")
            encoded["has_text"] = mention_text_mask.bool()
        return BiEncoderEncodings(**encoded)

    def encode_entities(
        self,
        entity_input_ids: torch.LongTensor | None = None,
        entity_attention_mask: torch.Tensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
    ) -> BiEncoderEncodings:
        """Encodes N entities: `input_ids` and `attention_mask` [N, L], `pixel_values` [N, 3, H, W], `image_mask` [N]."""
        encoder = self.encoder if self.config.shared else self.entity_encoder
        return BiEncoderEncodings(
            **encoder("entity", entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask, None)
        )

    def unit_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns the similarities [M, N] of the modalities with late fusion of several, else nothing.

        The row of a mention that lacks the modality is nan (`config.missing_images="absent"`).
        """
        if len(self.units) < 2:
            return {}
        mentions, entities = _to_float32(mentions), _to_float32(entities)
        present = self._present(mentions)
        with torch.autocast(self.device.type, enabled=False):
            scores = {name: mentions[first] @ entities[second].T for name, (first, second) in self.units.items()}
        return {
            name: score if present[name] is None else score.masked_fill(~present[name][:, None], torch.nan)  # type: ignore[index]
            for name, score in scores.items()
        }

    def _present(self, mentions: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """Returns a mask [M] of the mentions that have the modality of each unit, `None` if all have it."""
        masks = {"text": mentions.get("has_text"), "vision": mentions.get("has_image")}
        return {name: None if masks[first] is None else masks[first].bool() for name, (first, _) in self.units.items()}  # type: ignore[union-attr]

    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scores [M, N] in float32: similarities, or with late fusion the mean over a mention's units."""
        mentions = _to_float32(mentions)
        with torch.autocast(self.device.type, enabled=False):
            if self.config.interaction == "maxsim":
                return max_similarities(
                    mentions["tokens"],
                    mentions["token_mask"].bool(),
                    entities["tokens"],
                    entities["token_mask"].bool(),
                )
            queries = self._query_vectors(mentions)
            return _joined([queries @ self._index_vectors(block).T for block in _float32_blocks(entities)])

    #: [`~BiEncoderModel.score`] converts half precision itself.
    takes_half_precision = True

    @property
    def entity_token_masks(self) -> dict[str, str]:
        """The mask of the tokens that MaxSim compares."""
        return {"tokens": "token_mask"} if self.config.interaction == "maxsim" else {}

    @torch.no_grad()
    def query_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns vectors [M, D] (float32), whose inner products with the [`~BiEncoderModel.index_vectors`] are the scores.

        With "maxsim" they are the sums of the mentions' token vectors, and the inner products are only alike: the mean
        takes the place of the maximum over the tokens of an entity.
        """
        return self._query_vectors(_to_float32(mentions))

    @torch.no_grad()
    def index_vectors(self, entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns vectors [N, D] (float32) of entities; see [`~BiEncoderModel.query_vectors`]."""
        return self._index_vectors(_to_float32(entities))

    @torch.no_grad()
    def bound_queries(self, mentions: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [M, D], w [M, R] and c [M] (float32): with x and b of an entity, its score is at most ⟨q, x⟩ + ⟨w, b⟩ + c.

        A score that is an inner product needs no b, and c is 0. With "maxsim", let x be the mean of an entity's tokens
        and b the largest distance of one from it. Then max_j ⟨t, x_j⟩ ≤ ⟨t, x⟩ + |t| b for every token t of the mention,
        so q is the sum of the tokens and w the sum of their lengths.
        """
        mentions = _to_float32(mentions)
        vectors = self._query_vectors(mentions)
        weights = vectors.new_zeros(len(vectors), 0)
        if self.config.interaction == "maxsim":
            weights = (mentions["tokens"].norm(dim=-1) * mentions["token_mask"]).sum(1, keepdim=True)
        return vectors, weights, vectors.new_zeros(len(vectors))

    @torch.no_grad()
    def bound_vectors(self, entities: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, D] and b [N, R] (float32); see [`~BiEncoderModel.bound_queries`]."""
        entities = _to_float32(entities)
        vectors = self._index_vectors(entities)
        if self.config.interaction != "maxsim":
            return vectors, vectors.new_zeros(len(vectors), 0)
        distances = (entities["tokens"] - vectors[:, None]).norm(dim=-1) * entities["token_mask"]
        return vectors, distances.amax(1, keepdim=True) * (1 + 1e-5)  # the mean is rounded

    def _query_vectors(self, mentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.config.interaction == "maxsim":
            return (mentions["tokens"] * mentions["token_mask"].unsqueeze(-1)).sum(1)
        if not self.units:
            return mentions["fused"]
        present = self._present(mentions)
        shares: dict[str, Any] = dict.fromkeys(self.units, 1 / len(self.units))
        if any(mask is not None for mask in present.values()):
            columns = {name: mask.float() for name, mask in present.items() if mask is not None}
            total = sum(columns.values()) + len(self.units) - len(columns)
            shares = {name: columns.get(name, 1.0) / total.clamp(min=1) for name in self.units}  # type: ignore[union-attr]
            shares = {name: share[:, None] for name, share in shares.items()}
        parts: dict[str, Any] = {}
        for name, (first, second) in self.units.items():
            parts[second] = parts.get(second, 0) + shares[name] * mentions[first]
        return _joined([parts[name] for name in sorted(parts)])

    def _index_vectors(self, entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.config.interaction == "maxsim":
            return masked_mean(entities["tokens"], entities["token_mask"])
        if not self.units:
            return entities["fused"]
        return _joined([entities[name] for name in sorted({second for _, second in self.units.values()})])

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
        mention_token_mask: torch.Tensor | None = None,
        entity_image_mask: torch.Tensor | None = None,
        entity_log_prior: torch.Tensor | None = None,
    ) -> BiEncoderOutput:
        """Scores M mentions against N entities and, given labels, computes the loss.

        Args:
            mention_input_ids, mention_attention_mask, mention_pixel_values, mention_image_mask, mention_text_mask,
                mention_token_mask: See [`~BiEncoderModel.encode_mentions`].
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask: See
                [`~BiEncoderModel.encode_entities`].
            labels (`torch.LongTensor` [M], *optional*): Column of each mention's gold among the N entities. All other
                columns are negatives, so every entity may have one column only.
            entity_log_prior (`torch.Tensor` [N], *optional*): Logarithm of how often each entity is a gold in training. It
                is added to the scores inside the loss, so that the scores themselves do not learn it.
        """
        mentions = self.encode_mentions(
            mention_input_ids,
            mention_attention_mask,
            mention_pixel_values,
            mention_image_mask,
            mention_text_mask,
            mention_token_mask,
        )
        entities = self.encode_entities(
            entity_input_ids, entity_attention_mask, entity_pixel_values, entity_image_mask
        )
        scores, loss = self.score(mentions, entities), None
        if labels is not None:
            logits = scores / (self.temperature() if self.config.learn_temperature else self.config.temperature)
            if entity_log_prior is not None:
                logits = logits + entity_log_prior.float()
            loss = F.cross_entropy(logits, labels)
        return BiEncoderOutput(loss=loss, scores=scores, unit_scores=self.unit_scores(mentions, entities))


def max_similarities(
    mention_tokens: torch.Tensor, mention_mask: torch.Tensor, entity_tokens: torch.Tensor, entity_mask: torch.Tensor
) -> torch.Tensor:
    """Sums over the tokens of a mention of their best similarity with a token of an entity, [M, N] (ColBERT's MaxSim).

    Args:
        mention_tokens ([M, L, d]), entity_tokens ([N, K, d]): Vectors of the tokens; those of the entities also in half
            precision.
        mention_mask ([M, L]), entity_mask ([N, K]): True for a token.
    """
    lengths = mention_mask.sum(1)
    flat = mention_tokens[mention_mask]  # the tokens of all mentions one after another, without padding
    mention_of = torch.arange(len(lengths), device=flat.device).repeat_interleave(lengths)
    columns = []
    step = max(1, _BLOCK_SIMILARITIES // max(1, len(flat) * entity_tokens.shape[1]))
    for block in _float32_blocks({"tokens": entity_tokens, "mask": entity_mask}):
        padding = flat.new_zeros(block["mask"].shape).masked_fill(~block["mask"], -torch.inf)
        for first in range(0, max(1, len(padding)), step):
            tokens, out = block["tokens"][first : first + step], padding[first : first + step]
            similarities = torch.addmm(out.flatten(), flat, tokens.flatten(0, 1).T)
            best = similarities.unflatten(1, out.shape).amax(-1)
            columns.append(best.new_zeros(len(lengths), len(tokens)).index_add(0, mention_of, best))
    return _joined(columns)


def cell_boxes(height: int, width: int) -> torch.Tensor:
    """Boxes [height * width, 4] of the cells of a grid, row by row: left, top, right, bottom as shares of the image."""
    top, left = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return torch.stack([left, top, left + 1 / width, top + 1 / height], -1).flatten(0, 1)


def _to_float32(encodings: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Casts half-precision tensors (from autocast, or stored on disk) to float32 and drops `None`."""
    return {
        name: tensor.float() if tensor.dtype in _HALF else tensor
        for name, tensor in encodings.items()
        if tensor is not None
    }


def _float32_blocks(entities: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the encodings of N entities as float32: all at once, or what a CPU converts from half precision in blocks.

    To convert all at once takes longer than to compare them with a mention. A block is valid until the next one.
    """
    given = {name: tensor for name, tensor in entities.items() if tensor is not None}
    halves = {name: tensor for name, tensor in given.items() if tensor.dtype in _HALF}
    values = sum(tensor[:1].numel() for tensor in halves.values())
    if not values or any(tensor.device.type != "cpu" or tensor.requires_grad for tensor in halves.values()):
        yield _to_float32(given)
        return
    count = len(next(iter(halves.values())))
    step = min(count, max(1, _BLOCK_VALUES // values))
    converted = {
        name: tensor.new_empty(step, *tensor.shape[1:], dtype=torch.float32) for name, tensor in halves.items()
    }
    for first in range(0, count, step):
        block = {name: tensor[first : first + step] for name, tensor in given.items()}
        yield block | {name: converted[name][: len(block[name])].copy_(block[name]) for name in halves}


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Joins matrices with the same rows. One alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


# Copied from modeling/mimic/scoring_mimic.py
def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [B, L, d] over the L positions where `mask` [B, L] is 1."""
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


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


__all__ = ["BiEncoderModel"]
