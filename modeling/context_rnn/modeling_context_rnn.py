"""ARNN (Eshel et al., CoNLL 2017), IMN's "BERT" and Att (Zhang et al., DASFAA 2021), rerankers of single mentions.

The words left and right of a mention are read apart, and the candidate attends to them. The steps C1–C8 are those of
`README.md` in this folder, which says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_context_rnn import ContextRnnConfig
from .glove_context_rnn import glove_vectors

#: Parts of a text, as numbers in `pair_part`. 0 is padding and special tokens.
_LEFT, _MENTION, _RIGHT = 1, 2, 3
#: The contexts, with the names of their modules.
_SIDES = (("left", _LEFT), ("right", _RIGHT))
#: Number of images to encode at once, on a CPU and on a GPU.
_BLOCK_IMAGES = (64, 512)


@dataclass
class ContextRnnOutput(ModelOutput):
    """Output of [`ContextRnnModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): C8, if `labels` are given.
        scores (`torch.Tensor` [M, C]): Log-odds that a candidate is right, or a cosine; higher is better, -inf where a
            mention has no candidate.
        image_passes (`torch.Tensor` [M]): With images, whether the mention's image passes the filter (C6).
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    image_passes: torch.Tensor | None = None


# Copied from modeling/mm_nel/modeling_mm_nel.py
class WordMap(nn.Linear):
    """Linear map of word vectors that is initialised as the identity."""


# Copied from modeling/mm_nel/modeling_mm_nel.py
class EntityVectors(nn.Module):
    """Entity vectors, made of the mean word vectors of an entity's name and of its facts."""

    def __init__(self, config):
        super().__init__()
        self.name_map = WordMap(config.word_dim, config.word_dim)
        self.fact_map = WordMap(config.word_dim, config.word_dim, bias=False)

    def forward(self, names: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """Returns unit vectors [E, w] of entities, from the mean word vectors of their names and facts, both [E, w]."""
        return _unit(self.name_map(names) + self.fact_map(facts))


class CandidateAttention(nn.Module):
    """Sum of the states of a context, weighted by the sigmoid of their agreement with a candidate (C4)."""

    def __init__(self, entity_width: int, state_width: int):
        super().__init__()
        self.entity_map = nn.Linear(entity_width, state_width)

    def forward(self, entities: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns [M, C, d] from candidates [M, C, e], states [M, L, d] and their `mask` [M, L]; zeros for none."""
        weights = (self.entity_map(entities) @ states.transpose(1, 2)).sigmoid() * mask.unsqueeze(1)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
        return weights.to(states.dtype) @ states


class ContextRnnPreTrainedModel(PreTrainedModel):
    """Base class of the model: configuration, weight initialisation and supported attention implementations."""

    config: ContextRnnConfig
    config_class = ContextRnnConfig
    base_model_prefix = "context_rnn"
    main_input_name = "pair_word_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the encoders. The attention of this model has one implementation.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WordMap):
            init.eye_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # PyTorch's default initialisation
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)


class ContextRnnModel(ContextRnnPreTrainedModel):
    """A reranker that reads the words left and right of a mention, and lets each candidate attend to them.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/arnn-wikimel").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/arnn-wikimel")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows)])).scores  # [1, C] # doctest: +SKIP
    ```
    """

    #: Pretrained submodules. The trainer can give all other parameters another learning rate.
    backbone_names = ("word_embeddings", "text_model", "vision_model")
    example_unit = "mention"

    def __init__(self, config: ContextRnnConfig):
        super().__init__(config)
        if config.encoder == "words":
            self.word_embeddings = nn.Embedding(config.vocab_size, config.word_dim)
            self.entity_vectors = EntityVectors(config)
            width = config.word_dim
        else:
            self.text_model = _build_backbone(config.text_config, False)
            width: int = config.text_config.hidden_size  # type: ignore[union-attr, no-redef]
        entity_width, state_width = width, width * (2 if config.mention_in_states else 1)
        if config.images == "filtered":
            self.vision_model = _build_backbone(config.vision_config, False)
            image_width = _last_width(config.vision_config)
            self.image_map = nn.Linear(image_width, width)
            state_width, entity_width = state_width + width, entity_width + image_width
        if config.rnn is not None:
            rnn = nn.GRU if config.rnn == "gru" else nn.LSTM
            self.left_rnn, self.right_rnn = (rnn(state_width, config.hidden_size, batch_first=True) for _ in range(2))
            state_width = config.hidden_size
        if config.context_attention:
            self.left_attention, self.right_attention = (CandidateAttention(width, state_width) for _ in range(2))
        context_width = 2 * state_width + (width if config.use_mention else 0)
        self.dropout = nn.Dropout(config.dropout)
        if config.head == "mlp":
            self.hidden = nn.Linear(entity_width + context_width, config.hidden_size)
            self.classifier = nn.Linear(config.hidden_size, 2)
        else:
            self.mention_output = nn.Linear(context_width, config.output_size)
            self.entity_output = nn.Linear(entity_width, config.output_size)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> ContextRnnModel:
        """Sets the training mode, except for frozen word vectors and encoders."""
        super().train(mode)
        # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
        if hasattr(self, "word_embeddings"):
            self.word_embeddings.requires_grad_(self.config.train_words)
        for name, is_trained in (
            ("text_model", self.config.train_text),
            ("vision_model", not self.config.freeze_vision),
        ):
            if hasattr(self, name) and not is_trained:
                getattr(self, name).eval().requires_grad_(False)
        return self

    @property
    def pairs_are_independent(self) -> bool:
        """Whether the score of a pair depends on that pair alone: not if the filter looks at all candidates."""
        return self.config.images == "none"

    @property
    def image_features_are_fixed(self) -> bool:
        """`True` if training does not change `encode_images`."""
        return self.config.freeze_vision

    @property
    def leaves_out_missing_images(self) -> bool | None:
        """`True` for a model without images ([`hf_mel.protocols.leaves_out_missing_images`]); others read zeros."""
        return True if self.config.images == "none" else None

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> ContextRnnModel:
        """Builds a model with pretrained encoders. All other parts are initialised.

        Args:
            text (`str`, *optional*): Path of a file of word vectors in GloVe's format; or Hub id or folder of a text
                encoder, of which `encoder="words"` takes the input embeddings as word vectors. Without it, the
                configuration describes what to initialise.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image encoder is
                used.
            config: Fields of [`ContextRnnConfig`].
        """
        parts: dict[str, nn.Module] = {}
        if text is not None and config.get("encoder", "words") == "words":
            table = (
                glove_vectors(text)
                if Path(text).is_file()
                else AutoModel.from_pretrained(text).get_input_embeddings().weight.detach()
            )
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
        model = cls(ContextRnnConfig(**config))
        for name, part in parts.items():
            target = getattr(model, name)
            names = target.state_dict()
            target.load_state_dict({k: v for k, v in part.state_dict().items() if k in names})
        return model

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns features [I, d] of I images [I, 3, H, W]: the mean of the cells of a CNN, or the pooled output."""
        if not hasattr(self, "vision_model"):
            raise ValueError(
                "This model sees no images. Give its configuration images='filtered' and a vision_config."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            output = self.vision_model(pixel_values=pixel_values)
            states, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            if states.dim() == 4:  # a CNN's feature map [I, d, H, W]
                return states.mean((2, 3)) if pooled is None else pooled.flatten(1)
            return states[:, 0] if pooled is None else pooled

    def forward(
        self,
        pair_mask: torch.Tensor,
        pair_entity: torch.LongTensor,
        pair_word_ids: torch.LongTensor,
        pair_part: torch.LongTensor,
        pair_entity_ids: torch.LongTensor | None = None,
        pair_name_ids: torch.LongTensor | None = None,
        pair_fact_ids: torch.LongTensor | None = None,
        pair_mention_image: torch.LongTensor | None = None,
        pair_entity_image: torch.LongTensor | None = None,
        pair_pixel_values: torch.Tensor | None = None,
        pair_image_features: torch.Tensor | None = None,
        pair_context: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> ContextRnnOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_entity (`torch.Tensor` [M, C]): Number of each candidate among E entities; -1 for padding.
            pair_word_ids (`torch.Tensor` [M, L]): Words or tokens of the mentions' texts, padded with -1.
            pair_part (`torch.Tensor` [M, L]): 1 left of the mention, 2 in it, 3 right of it, 0 for padding and special tokens.
            pair_entity_ids (`torch.Tensor` [E, ·]): For a text encoder, tokens of the entities, padded with -1.
            pair_name_ids, pair_fact_ids (`torch.Tensor` [E, ·]): For word vectors, words of the entities, padded with -1.
            pair_mention_image, pair_entity_image (`torch.Tensor` [M] and [M, C], *optional*): Number among I images;
                -1 for a missing image.
            pair_pixel_values (`torch.Tensor` [I, 3, H, W], *optional*): The images.
            pair_image_features (`torch.Tensor` [I, d], *optional*): Outputs of `encode_images`, instead of the images.
            pair_context (`torch.Tensor` [M], *optional*): Ignored, because every mention is ranked alone.
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the
                loss.
        """
        mask = pair_mask.bool()
        if not mask.any():
            scores = torch.full(mask.shape, -torch.inf, device=mask.device)
            return ContextRnnOutput(
                loss=None if labels is None else next(self.parameters()).sum() * 0.0, scores=scores
            )
        states, pooled, entities = self._states(pair_word_ids, pair_entity_ids, pair_name_ids, pair_fact_ids)
        candidates = entities[pair_entity.clamp(min=0)]  # [M, C, e]
        mention = _masked_mean(states, pair_part == _MENTION)
        joined = [states]
        if self.config.mention_in_states:
            joined.append(mention.unsqueeze(1).expand_as(states))
        described, passes = candidates, None
        if hasattr(self, "vision_model"):
            image, images, passes = self._filtered_images(
                pooled, mask, pair_mention_image, pair_entity_image, pair_pixel_values, pair_image_features
            )
            joined.append(image.unsqueeze(1).expand(-1, states.shape[1], -1))
            described = torch.cat([candidates, images], -1)
        states = torch.cat(joined, -1)  # C2
        contexts = [self._context(name, states, pair_part == part, candidates) for name, part in _SIDES]
        if self.config.use_mention:
            contexts.append(mention.unsqueeze(1).expand(-1, mask.shape[1], -1))
        context = torch.cat(contexts, -1)
        if self.config.head == "mlp":  # C5
            hidden = F.relu(self.hidden(torch.cat([described, context], -1)))
            with torch.autocast(mask.device.type, enabled=False):  # half precision is too coarse to rank candidates
                logits = self.classifier(self.dropout(hidden).to(self.classifier.weight.dtype))
            scores = logits[..., 0] - logits[..., 1]
        else:  # C7
            sides = self.mention_output(self.dropout(context)), self.entity_output(self.dropout(described))
            with torch.autocast(mask.device.type, enabled=False):
                left, right = (F.normalize(_full_precision(side), dim=-1) for side in sides)
                scores = (left * right).sum(-1)
            logits = None
        loss = None if labels is None else self._loss(scores, logits, mask, labels)
        return ContextRnnOutput(loss=loss, scores=scores.masked_fill(~mask, -torch.inf), image_passes=passes)

    def _states(self, word_ids, entity_ids, name_ids, fact_ids):
        """Returns the states [M, L, d] of the mentions' texts, the texts pooled [M, d], and the entities' [E, d] (C1, C3)."""
        # Mentions are repeated where every pair is a row of its own.
        texts, place = torch.unique(word_ids, dim=0, return_inverse=True)
        if self.config.encoder == "words":
            if name_ids is None or fact_ids is None:
                raise ValueError(
                    "pair_name_ids or pair_fact_ids is missing. Give the processor special_tokens=False: this model reads "
                    "word vectors."
                )
            table = self.word_embeddings
            states = table(texts.clamp(min=0))
            entities = self.entity_vectors(_mean_words(table, name_ids), _mean_words(table, fact_ids))
            return states[place], states[place, 0], entities
        if entity_ids is None:
            raise ValueError(
                "pair_entity_ids is missing. Give the processor special_tokens=True: this model has a text encoder."
            )
        states, pooled = self._encode_text(texts)
        return states[place], pooled[place], self._encode_text(entity_ids)[1]

    def _encode_text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the states [B, L, d] of the text encoder and their pooled output [B, d]."""
        mask = (ids >= 0).long()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_text):
            states = self.text_model(input_ids=ids.clamp(min=0), attention_mask=mask).last_hidden_state
        return states, _masked_mean(states, mask) if self.config.text_pooling == "mean" else states[:, 0]

    def _context(self, name: str, states: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Returns the vector [M, C, d] of one context (C4), zeros if it has no word. `mask` [M, L] selects its states."""
        order = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # its states come first
        length = max(1, int(mask.sum(1).max()))
        order = order[:, :length]
        states = states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        mask = mask.gather(1, order)
        if self.config.rnn is not None:
            states = getattr(self, f"{name}_rnn")(states)[0]
        if self.config.context_attention:
            return getattr(self, f"{name}_attention")(candidates, states, mask)
        if self.config.rnn is None:
            context = _masked_mean(states, mask)
        else:
            last = (mask.sum(1) - 1).clamp(min=0)
            context = states[torch.arange(len(states), device=states.device), last] * mask.any(1, keepdim=True)
        return context.unsqueeze(1).expand(-1, candidates.shape[1], -1)

    def _filtered_images(self, text, mask, mention_image, entity_image, pixel_values, features):
        """Returns the mapped image [M, d] of a mention, the images [M, C, d'] of its candidates, and who passes [M] (C6).

        A missing image, and all images of a mention whose image does not pass, are zeros.
        """
        if mention_image is None or entity_image is None:
            raise ValueError("pair_mention_image or pair_entity_image is missing, and this model reads images.")
        if features is None and pixel_values is not None:
            size = _BLOCK_IMAGES[pixel_values.device.type == "cuda"]
            features = torch.cat([self.encode_images(part) for part in pixel_values.split(size)])
        if features is None:
            features = text.new_zeros(1, self.image_map.in_features)
        dtype = self.image_map.weight.dtype
        features = features.to(dtype)
        has_image, shown = mention_image >= 0, (entity_image >= 0) & mask
        image, images = features[mention_image.clamp(min=0)], features[entity_image.clamp(min=0)]
        mapped = self.image_map(image)
        with torch.no_grad(), torch.autocast(mask.device.type, enabled=False):
            agrees = F.cosine_similarity(_full_precision(text), _full_precision(mapped), dim=-1)
            similar = F.cosine_similarity(_full_precision(image).unsqueeze(1), _full_precision(images), dim=-1)
            passes = has_image & (agrees >= self.config.text_image_threshold)
            passes &= ((similar >= self.config.candidate_image_threshold) & shown).any(1)
        return mapped * passes.unsqueeze(1), images * (shown & passes.unsqueeze(1)).unsqueeze(-1), passes

    def _loss(self, scores, logits, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """C8: cross-entropy of right and wrong over all candidates, or the triplet loss averaged over the negatives."""
        is_gold = torch.arange(mask.shape[1], device=mask.device) == labels.unsqueeze(1)
        counted = mask & (labels >= 0).unsqueeze(1)
        if self.config.loss == "binary":
            targets = (~is_gold).long()[counted]  # 0 is right
            return F.cross_entropy(logits[counted], targets, reduction="sum") / counted.sum().clamp(min=1)
        gold = scores.gather(1, labels.clamp(min=0).unsqueeze(1))
        hinge = F.relu(self.config.margin - gold + scores)
        negative = counted & ~is_gold
        return hinge.masked_fill(~negative, 0.0).sum() / negative.sum().clamp(min=1)


# Copied from modeling/ghmfc/modeling_ghmfc.py
def _masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean [B, d] of `x` [B, L, d] over the positions where `mask` [B, L] is 1; zeros if there are none."""
    weights = mask.to(x.dtype).unsqueeze(-1)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1)


# Copied from modeling/ghmfc/modeling_ghmfc.py
def _full_precision(x: torch.Tensor) -> torch.Tensor:
    """Returns half-precision tensors (from autocast, or stored on disk) as float32, and others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Copied from modeling/mm_nel/modeling_mm_nel.py
def _mean_words(
    table: nn.Embedding, ids: torch.Tensor, mask: torch.Tensor | None = None, mean: bool = True
) -> torch.Tensor:
    """Returns the mean, or the sum, [R, w] of the word vectors of `ids` [R, L]; zeros for a row without words.

    Args:
        table: The word vectors.
        ids: Row numbers of the table, padded with -1.
        mask (`torch.Tensor` [R, L], *optional*): True for the words to use. The default is all words.
        mean: Whether to return the mean instead of the sum.
    """
    mask = ids >= 0 if mask is None else mask
    weights = mask.to(table.weight.dtype)
    if mean:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return F.embedding_bag(ids.clamp(min=0), table.weight, per_sample_weights=weights, mode="sum")


# Copied from modeling/mm_nel/modeling_mm_nel.py
def _unit(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` scaled to length 1; zeros stay zeros."""
    return F.normalize(x, dim=-1, eps=1e-6)


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


__all__ = ["ContextRnnModel", "ContextRnnPreTrainedModel"]
