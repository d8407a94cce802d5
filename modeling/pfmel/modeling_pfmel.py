"""PFMEL: Pre-Training and Fine-Tuning with Next Sentence Prediction for Multimodal Entity Linking (Li et al., 2022).

A cross-encoder: BERT reads "[CLS] text image [SEP] text image [SEP]" and its next-sentence head says whether the second
sentence belongs to the first. Readings where the paper is silent, ambiguous or misprinted:

- An image is one token. Its feature passes the linear layer "W · Res + b" of §3.2, the same for both sides; segment and
  position embeddings are then added as for a word (Figure 2). It stands after the text of its sentence, before the
  [SEP]; a sentence of an image alone (mixed-modal tasks) is that one token.
- Labels are those of BERT's own head, 0 = is next, so a BERT checkpoint brings its head along. The paper's `isNext` is
  1 for a random sentence, which is the same numbering. Its losses are printed without the minus sign of a cross-entropy.
- The losses are sums over examples. Here each is a mean, so that the learning rate does not depend on the batch: over
  pairs when linking; in pre-training over the examples of each form, summed over forms (mixed-modal has two).
- "The roles of sentence and next sentence are exchanged": the two segments change places. Read instead as an exchange of
  the tweets, it would repeat every positive example and draw a second negative from the same distribution.
- The score of a pair is the log-odds of "is next", monotone in the probability.
- T(e), the images of an entity's timeline: features are averaged, then projected. Who has no image has no image token.
- A mention without a gold among its candidates (label -100) takes no part in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForNextSentencePrediction,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_pfmel import PfmelConfig

#: The pre-training tasks (§3.3), in the order of the numbers that the processor gives them.
TASKS = ("mixed", "text", "multimodal")

#: Sequences that run together, on a CPU and on a GPU.
_BLOCK_SEQUENCES = (16, 128)


@dataclass
class PfmelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` []): L_linking (§3.4), given `labels`.
        scores (`torch.Tensor` [M, C]): log-odds that the candidate is next, higher is better; -inf where masked.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass
class PfmelForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` []): L_pre (§3.3), given `labels`.
        task_losses (`dict[str, torch.Tensor]`): L_mix, L_text, L_multi, as far as the batch has examples of the task.
        logits (`torch.Tensor` [S, 2]): of "is next" and "is not".
    """

    loss: torch.Tensor | None = None
    task_losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None


class PfmelPreTrainedModel(PreTrainedModel):
    """The network of both PFMEL models, which share all weights: configuration, initialisation, sequences to logits."""

    config: PfmelConfig
    config_class = PfmelConfig
    base_model_prefix = "pfmel"
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer must scale it when accumulating
    _no_split_modules = []
    # The model's own parts have no self-attention; these flags let an implementation pass through to the backbones.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    #: Submodules that come pretrained; the trainer may give everything else its own learning rate.
    backbone_names: tuple[str, ...] = ("text_model", "vision_model", "nsp_head")

    def __init__(self, config: PfmelConfig):
        super().__init__(config)
        hidden: int = config.text_config.hidden_size  # type: ignore[union-attr]
        self.text_model = AutoModel.from_config(config.text_config)
        if getattr(self.text_model, "pooler", None) is None:
            raise ValueError(
                f"The text encoder {type(self.text_model).__name__} has no pooler, which next sentence prediction reads; "
                "take a BERT-like encoder."
            )
        if config.vision_config is not None:
            self.vision_model = _build_vision(config.vision_config)
            self.image_projection = nn.Linear(_last_width(config.vision_config), hidden)
        self.nsp_head = nn.Linear(hidden, 2)
        self.post_init()
        self.train()  # fixes the image encoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # as BERT starts its linear layers
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
            init.zeros_(module.bias)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config):
        """A model whose encoders are pretrained. A BERT checkpoint that has a next-sentence head keeps it.

        Args:
            text (`str`, *optional*): Hub id or folder of a BERT-like encoder. Without it, `text_config` describes one that
                starts untrained.
            vision (`str`, *optional*): Hub id or folder of an image encoder. Without it, and without `vision_config`,
                the model reads text only.
            config: fields of [`PfmelConfig`].
        """
        if text is None and config.get("text_config") is None:
            raise ValueError(
                "from_backbones needs the Hub id or folder of a BERT-like text encoder, or a text_config."
            )
        text_model, head = (None, None) if text is None else _next_sentence_parts(text)
        if text_model is not None:
            config.setdefault("text_config", _portable_config(text_model.config))
        vision_model = None
        if vision is not None:
            vision_model = AutoModel.from_pretrained(vision)
            vision_model = getattr(vision_model, "vision_model", vision_model)  # the image half of a CLIP
            config.setdefault("vision_config", _portable_config(vision_model.config))
        model = cls(PfmelConfig(**config))
        if head is None:  # it starts fresh, so it learns like what is new
            model.backbone_names = ("text_model", "vision_model")
        for name, part in (("text_model", text_model), ("vision_model", vision_model), ("nsp_head", head)):
            if part is not None:
                target = getattr(model, name)
                wanted = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in wanted})
        return model

    def train(self, mode: bool = True):
        """As every module's, but a fixed image encoder stays in evaluation: its batch norms must not move."""
        super().train(mode)
        if hasattr(self, "vision_model") and not self.config.train_vision:
            # Here and not only on construction: `from_pretrained` makes new parameters, then sets evaluation.
            self.vision_model.eval().requires_grad_(False)
        return self

    @property
    def image_features_are_fixed(self) -> bool:
        """Whether training leaves [`encode_images`] as it is."""
        return not self.config.train_vision

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of I images, [I, 3, H, W] → [I, d]: the pooled output of the image encoder (2048 for ResNet-50)."""
        if not hasattr(self, "vision_model"):
            raise ValueError("This model reads text only; it has no image encoder.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vision):
            output = self.vision_model(pixel_values=pixel_values)
            local, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            if local.dim() == 4:  # a CNN's feature map [I, d, H, W]
                return local.mean((2, 3)) if pooled is None else pooled.flatten(1)
            return local[:, 0] if pooled is None else pooled

    def _image_tokens(
        self,
        features: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        counts: torch.Tensor | None,
        present: torch.Tensor,
        names: str,
    ) -> torch.Tensor | None:
        """Embeddings of images as tokens, [*, hidden] ("W · Res + b", §3.2), of features [*, d] or pixels
        [*, 3, H, W], or of `counts` [*] images each in pixels [*, K, 3, H, W]; zeros where `present` [*] is False, `None`
        where no image is needed."""
        if not hasattr(self, "image_projection") or not present.any():
            return None
        if features is None:
            if pixel_values is None:
                raise ValueError(f"This model sees images, and there are some: {names} is missing.")
            pixel_values = pixel_values[present]
            if counts is None:
                features = self.encode_images(pixel_values)
            else:  # T(e) of §3.2: the mean over the images of an entity
                counts = counts[present].unsqueeze(1)
                there = torch.arange(pixel_values.shape[1], device=counts.device) < counts
                each = self.encode_images(pixel_values[there])
                features = each.new_zeros(len(there), each.shape[1]).index_add(0, there.nonzero()[:, 0], each) / counts
        else:
            features = features[present]
        tokens = self.image_projection(features.to(self.image_projection.weight.dtype))
        out = tokens.new_zeros(*present.shape, tokens.shape[-1])
        out[present] = tokens
        return out

    def _logits(self, input_ids, attention_mask, token_type_ids, image_positions, images) -> torch.Tensor:
        """Logits [S, 2] of S sequences.

        Args:
            input_ids, attention_mask, token_type_ids [S, L]: at the position of an image any id may stand.
            image_positions [S, 2]: where the image of the mention and of the entity stands; -1 for none.
            images: for each of the two, embeddings [S, hidden], or `None`.
        """
        block = _BLOCK_SEQUENCES[attention_mask.device.type == "cuda"]
        if len(input_ids) > block:
            # Sequences of like length run together: half of a batch is padding otherwise.
            order = attention_mask.sum(1).argsort()
            parts = [
                self._logits(
                    input_ids[part],
                    attention_mask[part],
                    token_type_ids[part],
                    image_positions[part] if len(image_positions) else image_positions,
                    [None if tokens is None else tokens[part] for tokens in images],
                )
                for part in order.split(block)
            ]
            return torch.cat(parts)[order.argsort()]
        used = attention_mask.any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1
        limit = self.config.text_config.max_position_embeddings  # type: ignore[union-attr]
        if width > limit:
            raise ValueError(
                f"A sequence of {width} tokens and images does not fit the {limit} positions of the text encoder; give "
                f"the processor max_length={limit - 2}."
            )
        embeddings = self.text_model.get_input_embeddings()(input_ids[:, :width])
        for k, tokens in enumerate(images):
            if tokens is not None:
                rows = (image_positions[:, k] >= 0).nonzero().squeeze(1)
                place = (rows, image_positions[rows, k])
                embeddings = embeddings.index_put(place, tokens[rows].to(embeddings.dtype))
        pooled = self.text_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask[:, :width],
            token_type_ids=token_type_ids[:, :width],
        ).pooler_output
        with torch.autocast(pooled.device.type, enabled=False):  # half precision has too few digits to rank by
            return self.nsp_head(pooled.to(self.nsp_head.weight.dtype)).float()


class PfmelModel(PfmelPreTrainedModel):
    """PFMEL as a reranker: reads each mention together with each of its candidates (§3.4, Figure 4).

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/pfmel-tweets").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/pfmel-tweets")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows)])).scores  # [1, C] # doctest: +SKIP
    ```
    """

    main_input_name = "pair_input_ids"
    #: What one example is.
    example_unit = "mention"
    #: The score of a pair depends on that pair alone.
    pairs_are_independent = True

    def forward(
        self,
        pair_input_ids: torch.LongTensor,
        pair_attention_mask: torch.Tensor,
        pair_token_type_ids: torch.LongTensor,
        pair_mask: torch.Tensor,
        pair_image_positions: torch.LongTensor | None = None,
        pair_mention_image_features: torch.Tensor | None = None,
        pair_entity_image_features: torch.Tensor | None = None,
        pair_mention_pixel_values: torch.Tensor | None = None,
        pair_entity_pixel_values: torch.Tensor | None = None,
        pair_entity_image_counts: torch.LongTensor | None = None,
        pair_context: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> PfmelOutput:
        """
        Args:
            pair_input_ids, pair_attention_mask, pair_token_type_ids ([M, C, L]): the sequences.
            pair_mask ([M, C]): False where a mention has no C-th candidate.
            pair_image_positions ([M, C, 2], *optional*): where in the sequence the images of mention and entity stand;
                -1 for none.
            pair_mention_image_features, pair_entity_image_features ([M, d], [M, C, d], *optional*): what
                `encode_images` gave, or
            pair_mention_pixel_values, pair_entity_pixel_values ([M, 3, H, W], [M, C, 3, H, W], *optional*): the images.
            pair_entity_image_counts ([M, C], *optional*): with entity pixels [M, C, K, 3, H, W], how many of the K images
                there are, whose features are averaged.
            pair_context ([M], *optional*): not used; pairs are scored each for itself.
            labels ([M], *optional*): the column of each mention's gold; -100 if it has none.
        """
        mask = pair_mask.bool()
        mentions, _ = mask.nonzero(as_tuple=True)  # padding of the candidate lists is not run
        scores = torch.full(mask.shape, float("-inf"), dtype=torch.float32, device=mask.device)
        if not len(mentions):
            loss = None if labels is None else self.nsp_head.weight.sum() * 0.0
            return PfmelOutput(loss=loss, scores=scores)
        images: list[torch.Tensor | None] = [None, None]
        positions = torch.zeros(0)
        if pair_image_positions is not None:
            present = (pair_image_positions >= 0) & mask.unsqueeze(-1)
            of_mentions = self._image_tokens(
                pair_mention_image_features,
                pair_mention_pixel_values,
                None,
                present[..., 0].any(1),
                "pair_mention_pixel_values or pair_mention_image_features",
            )
            of_entities = self._image_tokens(
                pair_entity_image_features,
                pair_entity_pixel_values,
                pair_entity_image_counts,
                present[..., 1],
                "pair_entity_pixel_values or pair_entity_image_features",
            )
            images = [
                None if of_mentions is None else of_mentions[mentions],
                None if of_entities is None else of_entities[mask],
            ]
            positions = pair_image_positions[mask]
        logits = self._logits(
            pair_input_ids[mask], pair_attention_mask[mask], pair_token_type_ids[mask], positions, images
        )
        scores[mask] = logits[:, 0] - logits[:, 1]
        loss = None
        if labels is not None:
            columns = torch.arange(mask.shape[1], device=mask.device)
            targets = (columns != labels.unsqueeze(1)).long()  # 0 = is next
            targets = targets.masked_fill((labels < 0).unsqueeze(1), -100)[mask]
            known = (targets >= 0).sum()
            loss = F.cross_entropy(logits, targets, reduction="sum") / known.clamp(min=1)
        return PfmelOutput(loss=loss, scores=scores)


class PfmelForPreTraining(PfmelPreTrainedModel):
    """PFMEL's pre-training (§3.3): next sentence prediction between posts and entities, in up to three modalities.

    Its weights are those of a [`PfmelModel`], by the same names: a saved one loads as the other.
    """

    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.LongTensor,
        image_positions: torch.LongTensor,
        post_index: torch.LongTensor,
        entity_index: torch.LongTensor,
        form_ids: torch.LongTensor,
        post_image_features: torch.Tensor | None = None,
        entity_image_features: torch.Tensor | None = None,
        post_pixel_values: torch.Tensor | None = None,
        entity_pixel_values: torch.Tensor | None = None,
        entity_image_counts: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> PfmelForPreTrainingOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids ([S, L]): the sequences of all forms and orders.
            image_positions ([S, 2]): where the images of post and entity stand; -1 for none.
            post_index, entity_index ([S]): whose images: a row of P posts, of P entities.
            form_ids ([S]): 0 text with entity image, 1 entity context with post image (both mixed-modal), 2 text-only,
                3 multimodal.
            post_image_features, entity_image_features ([P, d], *optional*): what `encode_images` gave, or
            post_pixel_values, entity_pixel_values ([P, 3, H, W], *optional*): the images.
            entity_image_counts ([P], *optional*): with entity pixels [P, K, 3, H, W], how many of the K images there are.
            labels ([S], *optional*): 0 = is next, 1 = is not.
        """
        sides = (
            (post_index, post_image_features, post_pixel_values, None, "post"),
            (entity_index, entity_image_features, entity_pixel_values, entity_image_counts, "entity"),
        )
        images = []
        for k, (index, features, pixels, counts, side) in enumerate(sides):
            given = features if features is not None else pixels
            count = len(given) if given is not None else int(index.max()) + 1 if len(index) else 0
            needed = torch.zeros(count, dtype=torch.bool, device=index.device)
            needed[index[image_positions[:, k] >= 0]] = True
            names = f"{side}_pixel_values or {side}_image_features"
            tokens = self._image_tokens(features, pixels, counts, needed, names)
            images.append(None if tokens is None else tokens[index])
        if len(input_ids):
            logits = self._logits(input_ids, attention_mask, token_type_ids, image_positions, images)
        else:  # tasks about images, and a batch that has none
            logits = self.nsp_head.weight.new_zeros(0, 2)
        loss = None
        task_losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            each = F.cross_entropy(logits, labels, reduction="none")
            for form in form_ids.unique().tolist():
                task = TASKS[max(form - 1, 0)]
                task_losses[task] = task_losses.get(task, each.new_zeros(())) + each[form_ids == form].mean()
            loss = sum(task_losses.values(), self.nsp_head.weight.sum() * 0.0)  # L_pre = L_mix + L_text + L_multi
        return PfmelForPreTrainingOutput(loss=loss, task_losses=task_losses or None, logits=logits)


def _next_sentence_parts(text: str) -> tuple[Any, nn.Module | None]:
    """A pretrained encoder with its pooler, and its next-sentence head if the checkpoint has one."""
    try:
        model, report = AutoModelForNextSentencePrediction.from_pretrained(text, output_loading_info=True)
    except ValueError as error:
        kind = AutoConfig.from_pretrained(text).model_type
        raise ValueError(
            f"{text} is of type {kind!r}, which has no next sentence prediction; take a BERT-like encoder."
        ) from error
    head = model.cls.seq_relationship
    fresh = any("seq_relationship" in name for name in report["missing_keys"])
    return model.base_model, None if fresh else head


def _portable_config(config) -> dict[str, Any]:
    """Returns the fields of an encoder's configuration without the name or path that it was loaded from."""
    fields = config.to_dict()
    fields.pop("_name_or_path", None)  # it may be a local path, and the weights are saved with the whole model
    return fields


def _build_vision(config) -> PreTrainedModel:
    """Builds an untrained image encoder, without a pooling layer where that is optional."""
    try:  # most ViT checkpoints have no pooler, and the feature used is the first token
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # the encoder has no argument `add_pooling_layer`
        return AutoModel.from_config(config)


# Copied from modeling/mimic/modeling_mimic.py
def _last_width(config) -> int:
    """Returns the width of an image encoder's last layer: `hidden_sizes[-1]` of a CNN, `hidden_size` of a ViT."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


__all__ = ["PfmelForPreTraining", "PfmelModel", "PfmelPreTrainedModel"]
