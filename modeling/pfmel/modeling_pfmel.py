"""PFMEL, a cross-encoder that scores candidates by next sentence prediction (Li et al., Electronics 2022).

BERT reads "[CLS] text image [SEP] text image [SEP]", where an image is one token, and its next-sentence head decides
whether the second sentence, an entity, follows the first, a mention. `README.md` in this folder describes where the
paper is silent, ambiguous or misprinted, and how this code reads it.
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
from transformers.utils import ModelOutput, logging

from .configuration_pfmel import PfmelConfig

logger = logging.get_logger(__name__)

#: Pre-training tasks (§3.3), in the order of the `form_ids` of the processor. "mixed" has two forms.
TASKS = ("mixed", "text", "multimodal")

#: Number of sequences that the text encoder reads at once, on a CPU and on a GPU.
_BLOCK_SEQUENCES = (16, 128)


@dataclass
class PfmelOutput(ModelOutput):
    """Output of [`PfmelModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): L_linking (§3.4), if `labels` are given.
        scores (`torch.Tensor` [M, C]): Log-odds that the candidate is next; higher is better, -inf where a mention has
            no candidate.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass
class PfmelForPreTrainingOutput(ModelOutput):
    """Output of [`PfmelForPreTraining`], for S sequences.

    Args:
        loss (`torch.Tensor` []): L_pre (§3.3), if `labels` are given.
        task_losses (`dict[str, torch.Tensor]`): L_mix, L_text and L_multi, for the tasks that the batch has examples
            of.
        logits (`torch.Tensor` [S, 2]): Logits of "is next" and of "is not next".
    """

    loss: torch.Tensor | None = None
    task_losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None


# Copied from modeling/mmel/modeling_mmel.py
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


# Copied from modeling/mmel/modeling_mmel.py
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


class PfmelPreTrainedModel(PreTrainedModel):
    """Base class of both PFMEL models, which have the same weights: initialisation, image tokens and logits."""

    config: PfmelConfig
    config_class = PfmelConfig
    base_model_prefix = "pfmel"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the encoders. The other parts of the model have no attention.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    #: Pretrained submodules. The trainer can give all other parameters another learning rate.
    backbone_names: tuple[str, ...] = ("text_model", "vision_model", "nsp_head")

    def __init__(self, config: PfmelConfig):
        super().__init__(config)
        hidden: int = config.text_config.hidden_size  # type: ignore[union-attr]
        has_pooler = config.text_pooling == "pooler"
        self.text_model = _build_backbone(config.text_config, has_pooler)
        if has_pooler and getattr(self.text_model, "pooler", None) is None:
            raise ValueError(
                f"The text encoder {type(self.text_model).__name__} has no pooler, which next sentence prediction "
                'needs. Use an encoder like BERT, or text_pooling="mean".'
            )
        if config.vision_config is not None:
            self.vision_model = _build_backbone(config.vision_config, False)
            self.image_projection = nn.Linear(_last_width(config.vision_config), hidden)
            if config.image_weight is not None:
                self.image_match = ImageMatch(self.image_projection.in_features, float(config.image_weight))
        self.nsp_head = nn.Linear(hidden, 2)
        if config.pooled_sides:
            self.sides_head = nn.Linear(2 * hidden, 2)
            self.sides_head.starts_at_zero = True  # type: ignore[assignment]
        if config.list_weight is not None or config.name_weight is not None:
            self.given_scores = GivenScores(config)
        if self.starts_from_given:
            self.nsp_head.starts_at_zero = True  # type: ignore[assignment]
        self.post_init()
        self.train()  # freezes the image encoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # BERT's initialisation
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
            if module.bias is not None:
                init.zeros_(module.bias)
            if getattr(module, "starts_at_zero", False):
                init.zeros_(module.weight)
            if getattr(module, "starts_as_identity", False):
                init.eye_(module.weight)
        elif isinstance(module, GivenScores):
            init.ones_(module.scales)
        elif isinstance(module, ImageMatch):
            init.ones_(module.scale)
            init.constant_(module.midpoint, 0.5)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config):
        """Builds a model with pretrained encoders, and with the next-sentence head of a BERT checkpoint if it has one.

        A pooler that was never trained is not read, unless `text_pooling` asks for it or the checkpoint has a
        next-sentence head, which was trained with it. A warning says so.

        Args:
            text (`str`, *optional*): Hub id or folder of an encoder like BERT. Without it, `text_config` describes an
                encoder to initialise.
            vision (`str`, *optional*): Hub id or folder of an image encoder or of a CLIP model, whose image encoder is
                used. Without it and without `vision_config`, the model reads text only.
            config: Fields of [`PfmelConfig`].
        """
        if text is None and config.get("text_config") is None:
            raise ValueError(
                "from_backbones needs a text encoder. Give the Hub id or folder of one like BERT, or a text_config."
            )
        text_model, head = (None, None) if text is None else _next_sentence_parts(text)
        if text_model is not None:
            config.setdefault("text_config", _portable_config(text_model.config))
            if head is None and "text_pooling" not in config and _pooler_is_untrained(text_model):
                logger.warning("The pooler of %s was never trained. The mean of all states is read instead.", text)
                config["text_pooling"] = "mean"
        vision_model = None
        if vision is not None:
            vision_model = AutoModel.from_pretrained(vision)
            vision_model = getattr(vision_model, "vision_model", vision_model)  # the image half of a CLIP
            config.setdefault("vision_config", _portable_config(vision_model.config))
        model = cls(PfmelConfig(**config))
        if head is None:  # the head is initialised, so it is not one of the pretrained parts
            model.backbone_names = ("text_model", "vision_model")
        if model.starts_from_given:
            head = None  # it starts at zero, so that step 0 is what is given
            model.backbone_names = ("text_model", "vision_model")
        for name, part in (("text_model", text_model), ("vision_model", vision_model), ("nsp_head", head)):
            if part is not None:
                target = getattr(model, name)
                names = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in names})
        return model

    def train(self, mode: bool = True):
        """Sets the training mode, except for a frozen image encoder, whose batch norms must not be updated."""
        super().train(mode)
        if hasattr(self, "vision_model") and not self.config.train_vision:
            # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
            self.vision_model.eval().requires_grad_(False)
        return self

    @property
    def starts_from_given(self) -> bool:
        """Whether the first order is that of what a pair has before it is read: list, name, cosine of the images."""
        return hasattr(self, "given_scores") or hasattr(self, "image_match")

    @property
    def image_features_are_fixed(self) -> bool:
        """`True` if training does not change `encode_images`."""
        return not self.config.train_vision

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns features [I, d] of I images [I, 3, H, W], the pooled outputs of the image encoder."""
        if not hasattr(self, "vision_model"):
            raise ValueError(
                "This model reads text only and has no image encoder. Give its configuration a vision_config."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vision):
            output = self.vision_model(pixel_values=pixel_values)
            local, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            if local.dim() == 4:  # a CNN's feature map [I, d, H, W]
                return local.mean((2, 3)) if pooled is None else pooled.flatten(1)
            return local[:, 0] if pooled is None else pooled

    def _image_features(
        self,
        features: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        counts: torch.Tensor | None,
        present: torch.Tensor,
        names: str,
    ) -> torch.Tensor | None:
        """Returns Res of §3.2, the features of images.

        Args:
            features (`torch.Tensor` [*, d], *optional*): Image features.
            pixel_values (`torch.Tensor` [*, 3, H, W] or [*, K, 3, H, W], *optional*): Images, if there are no
                features.
            counts (`torch.Tensor` [*], *optional*): Number of real images among the K. Their features are averaged.
            present (`torch.Tensor` [*]): False where no image is needed.
            names: The names of the inputs, for an error message.

        Returns:
            `torch.Tensor` [*, d] or `None`: The features, zeros where `present` is False; `None` if no image is needed.
        """
        if not hasattr(self, "image_projection") or not present.any():
            return None
        if features is None:
            if pixel_values is None:
                raise ValueError(f"The batch has images, but not their pixels or features. Give {names}.")
            pixel_values = pixel_values[present]
            if counts is None:
                features = self.encode_images(pixel_values)
            else:  # T(e) of §3.2: the mean over the images of an entity
                counts = counts[present].unsqueeze(1)
                is_image = torch.arange(pixel_values.shape[1], device=counts.device) < counts
                encoded = self.encode_images(pixel_values[is_image])
                total = encoded.new_zeros(len(is_image), encoded.shape[1])
                features = total.index_add(0, is_image.nonzero()[:, 0], encoded) / counts
        else:
            features = features[present]
        features = features.to(self.image_projection.weight.dtype)
        out = features.new_zeros(*present.shape, features.shape[-1])
        out[present] = features
        return out

    def _image_tokens(self, features: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor | None:
        """Embeds the features [*, d] of images as tokens [*, hidden], "W · Res + b" of §3.2; zeros where not `present`."""
        if features is None:
            return None
        return self.image_projection(features).masked_fill(~present.unsqueeze(-1), 0.0)

    def _logits(self, input_ids, attention_mask, token_type_ids, image_positions, images) -> torch.Tensor:
        """Returns the logits [S, 2] of S sequences.

        Args:
            input_ids, attention_mask, token_type_ids ([S, L]): The sequences. The id at the position of an image is
                ignored.
            image_positions ([S, 2]): Positions of the images of mention and entity; -1 for none.
            images: For mention and entity, the image embeddings [S, hidden], or `None`.
        """
        block = _BLOCK_SEQUENCES[attention_mask.device.type == "cuda"]
        if len(input_ids) > block:
            # Sequences of similar length share a block, because half of a batch would be padding otherwise.
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
                f"A sequence of {width} tokens and images does not fit the {limit} positions of the text encoder. "
                f"Give the processor max_length={limit - 2}."
            )
        embeddings = self.text_model.get_input_embeddings()(input_ids[:, :width])
        for k, tokens in enumerate(images):
            if tokens is not None:
                rows = (image_positions[:, k] >= 0).nonzero().squeeze(1)
                place = (rows, image_positions[rows, k])
                embeddings = embeddings.index_put(place, tokens[rows].to(embeddings.dtype))
        output = self.text_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask[:, :width],
            token_type_ids=token_type_ids[:, :width],
        )
        if self.config.text_pooling == "mean":
            pooled = masked_mean(output.last_hidden_state, attention_mask[:, :width])
        else:
            pooled = output.pooler_output
        dtype = self.nsp_head.weight.dtype
        with torch.autocast(pooled.device.type, enabled=False):  # half precision is too coarse to rank candidates
            logits = self.nsp_head(pooled.to(dtype)).float()
            if hasattr(self, "sides_head"):
                mask, segment = attention_mask[:, :width].bool(), token_type_ids[:, :width].bool()
                states = output.last_hidden_state.to(dtype)
                first, second = (_standardised_mean(states, mask & side) for side in (~segment, segment))
                logits = logits + self.sides_head(torch.cat([first * second, (first - second).abs()], -1)).float()
            return logits


class PfmelModel(PfmelPreTrainedModel):
    """PFMEL as a reranker that reads each mention together with each of its candidates (§3.4, Figure 4).

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/pfmel-tweets").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/pfmel-tweets")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows)])).scores  # [1, C] # doctest: +SKIP
    ```
    """

    main_input_name = "pair_input_ids"
    example_unit = "mention"
    pairs_are_independent = True

    @property
    def reads_list_scores(self) -> bool:
        """Whether the scores need `pair_list_score`."""
        return self.config.list_weight is not None

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
        pair_list_score: torch.Tensor | None = None,
        pair_name_match: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> PfmelOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_input_ids, pair_attention_mask, pair_token_type_ids (`torch.Tensor` [M, C, L]): The sequences.
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_image_positions (`torch.Tensor` [M, C, 2], *optional*): Positions of the images of mention and entity
                in the sequence; -1 for none.
            pair_mention_image_features, pair_entity_image_features (`torch.Tensor` [M, d] and [M, C, d], *optional*):
                Outputs of `encode_images`.
            pair_mention_pixel_values, pair_entity_pixel_values (`torch.Tensor` [M, 3, H, W] and [M, C, 3, H, W],
                *optional*): The images, if their features are not given.
            pair_entity_image_counts (`torch.Tensor` [M, C], *optional*): With entity pixels [M, C, K, 3, H, W], the
                number of real images among the K. Their features are averaged.
            pair_context (`torch.Tensor` [M], *optional*): Ignored, because every pair is scored alone.
            pair_list_score, pair_name_match (`torch.Tensor` [M, C], *optional*): Score of the list, and 1 where the name
                fits the mention, for `list_weight` and `name_weight`.
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the
                loss.
        """
        mask = pair_mask.bool()
        mentions, _ = mask.nonzero(as_tuple=True)  # padding is not computed
        scores = torch.full(mask.shape, float("-inf"), dtype=torch.float32, device=mask.device)
        if not len(mentions):
            loss = None if labels is None else self.nsp_head.weight.sum() * 0.0
            return PfmelOutput(loss=loss, scores=scores)
        images: list[torch.Tensor | None] = [None, None]
        positions = torch.zeros(0)
        matched = None
        if pair_image_positions is not None:
            present = (pair_image_positions >= 0) & mask.unsqueeze(-1)
            mention_present, entity_present = present[..., 0].any(1), present[..., 1]
            mention_features = self._image_features(
                pair_mention_image_features,
                pair_mention_pixel_values,
                None,
                mention_present,
                "pair_mention_pixel_values or pair_mention_image_features",
            )
            entity_features = self._image_features(
                pair_entity_image_features,
                pair_entity_pixel_values,
                pair_entity_image_counts,
                entity_present,
                "pair_entity_pixel_values or pair_entity_image_features",
            )
            mention_tokens = self._image_tokens(mention_features, mention_present)
            entity_tokens = self._image_tokens(entity_features, entity_present)
            images = [
                None if mention_tokens is None else mention_tokens[mentions],
                None if entity_tokens is None else entity_tokens[mask],
            ]
            if hasattr(self, "image_match") and mention_features is not None and entity_features is not None:
                matched = self.image_match(mention_features[mentions], entity_features[mask], present[mask].all(1))
            positions = pair_image_positions[mask]
        logits = self._logits(
            pair_input_ids[mask], pair_attention_mask[mask], pair_token_type_ids[mask], positions, images
        )
        if hasattr(self, "given_scores"):
            given = self.given_scores(mask, pair_list_score=pair_list_score, pair_name_match=pair_name_match)
            logits = logits + torch.stack([given, torch.zeros_like(given)], -1).to(logits.dtype)
        if matched is not None:
            logits = logits + torch.stack([matched, torch.zeros_like(matched)], -1).to(logits.dtype)
        scores[mask] = logits[:, 0] - logits[:, 1]
        loss = None
        if labels is not None:
            columns = torch.arange(mask.shape[1], device=mask.device)
            targets = (columns != labels.unsqueeze(1)).long()  # 0 = is next
            targets = targets.masked_fill((labels < 0).unsqueeze(1), -100)[mask]
            num_targets = (targets >= 0).sum()
            loss = F.cross_entropy(logits, targets, reduction="sum") / num_targets.clamp(min=1)
            if self.config.list_loss_weight:
                loss = loss + self.config.list_loss_weight * _list_loss(scores, labels)
        return PfmelOutput(loss=loss, scores=scores)


class PfmelForPreTraining(PfmelPreTrainedModel):
    """PFMEL for pre-training: next sentence prediction between posts and entities, in up to three tasks (§3.3).

    The weights have the names of those of [`PfmelModel`], so a saved model loads as either class.
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
        """Predicts for S sequences whether the second sentence is next.

        Args:
            input_ids, attention_mask, token_type_ids (`torch.Tensor` [S, L]): The sequences of all forms and orders.
            image_positions (`torch.Tensor` [S, 2]): Positions of the images of post and entity; -1 for none.
            post_index, entity_index (`torch.Tensor` [S]): The post and the entity of each sequence, as rows of the
                images of P posts and P entities.
            form_ids (`torch.Tensor` [S]): 0 for a text with an entity image, 1 for an entity context with a post image
                (both mixed-modal), 2 for text-only, 3 for multimodal.
            post_image_features, entity_image_features (`torch.Tensor` [P, d], *optional*): Outputs of `encode_images`.
            post_pixel_values, entity_pixel_values (`torch.Tensor` [P, 3, H, W], *optional*): The images, if their
                features are not given.
            entity_image_counts (`torch.Tensor` [P], *optional*): With entity pixels [P, K, 3, H, W], the number of
                real images among the K. Their features are averaged.
            labels (`torch.Tensor` [S], *optional*): 0 if the second sentence is next, 1 if it is not.
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
            tokens = self._image_tokens(self._image_features(features, pixels, counts, needed, names), needed)
            images.append(None if tokens is None else tokens[index])
        if len(input_ids):
            logits = self._logits(input_ids, attention_mask, token_type_ids, image_positions, images)
        else:  # all tasks need images, and the batch has none
            logits = self.nsp_head.weight.new_zeros(0, 2)
        loss = None
        task_losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            losses = F.cross_entropy(logits, labels, reduction="none")
            for form in form_ids.unique().tolist():
                task = TASKS[max(form - 1, 0)]
                task_losses[task] = task_losses.get(task, losses.new_zeros(())) + losses[form_ids == form].mean()
            loss = sum(task_losses.values(), self.nsp_head.weight.sum() * 0.0)  # L_pre = L_mix + L_text + L_multi
        return PfmelForPreTrainingOutput(loss=loss, task_losses=task_losses or None, logits=logits)


def _next_sentence_parts(text: str) -> tuple[Any, nn.Module | None]:
    """Loads a pretrained encoder with its pooler, and its next-sentence head or `None` if the checkpoint has none."""
    try:
        model, report = AutoModelForNextSentencePrediction.from_pretrained(text, output_loading_info=True)
    except ValueError as error:
        kind = AutoConfig.from_pretrained(text).model_type
        raise ValueError(
            f"{text} is of type {kind!r}, which has no next sentence prediction. Use an encoder like BERT."
        ) from error
    head = model.cls.seq_relationship
    is_missing = any("seq_relationship" in name for name in report["missing_keys"])
    return model.base_model, None if is_missing else head


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
def _pooler_is_untrained(model: nn.Module) -> bool:
    """Whether an encoder has a pooler that was never trained: its bias is exactly zero, as it is initialised."""
    dense = getattr(getattr(model, "pooler", None), "dense", None)
    return isinstance(dense, nn.Linear) and dense.bias is not None and not dense.bias.any()


# Copied from modeling/mimic/scoring_mimic.py
def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [B, L, d] over the L positions where `mask` [B, L] is 1."""
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


# Copied from modeling/mmel/modeling_mmel.py
def _standardised_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean of `x` [B, L, d] over positions where `mask` [B, L] is True, with mean 0 and variance 1 along d."""
    weights = mask.unsqueeze(-1).to(x.dtype)
    return F.layer_norm((x * weights).sum(1) / weights.sum(1).clamp(min=1), x.shape[-1:])


# Copied from modeling/mmel/modeling_mmel.py
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


# Copied from modeling/mimic/modeling_mimic.py
def _last_width(config) -> int:
    """Returns the width of an image encoder's last layer: `hidden_sizes[-1]` of a CNN, `hidden_size` of a ViT."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


__all__ = ["PfmelForPreTraining", "PfmelModel", "PfmelPreTrainedModel"]
