"""The cross-encoder, a reranker: one text encoder reads "[CLS] mention in context [SEP] entity [SEP]" and scores the pair.

BLINK's second stage and CHOLAN are of this kind. `README.md` in this folder says what each of them is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .configuration_cross_encoder import CrossEncoderConfig

logger = logging.get_logger(__name__)

#: Number of sequences that the text encoder reads at once, on a CPU and on a GPU.
_BLOCK_SEQUENCES = (16, 128)


@dataclass
class CrossEncoderOutput(ModelOutput):
    """Output of [`CrossEncoderModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): The loss of `config.loss`, if `labels` are given.
        scores (`torch.Tensor` [M, C]): Higher is better, -inf where a mention has no candidate.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


# Copied from modeling/mmel/modeling_mmel.py
class GivenScores(nn.Module):
    """Log-odds that a pair has before it is read: the score of the list and whether the name fits, each with a weight.

    Not in the papers. Each weight is that of the configuration times a learned scale.
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


class CrossEncoderModel(PreTrainedModel):
    """Cross-encoder, a reranker that reads each mention together with each of its candidates.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("runs/blink-cross_wikimel").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("runs/blink-cross_wikimel")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows)])).scores  # [1, C] # doctest: +SKIP
    ```
    """

    config: CrossEncoderConfig
    config_class = CrossEncoderConfig
    base_model_prefix = "cross_encoder"
    main_input_name = "pair_input_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the encoder.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    example_unit = "mention"
    pairs_are_independent = True
    #: Pretrained submodules. The trainer can give all other parameters another learning rate.
    backbone_names: tuple[str, ...] = ("text_model",)

    def __init__(self, config: CrossEncoderConfig):
        super().__init__(config)
        hidden: int = config.text_config.hidden_size  # type: ignore[union-attr]
        self.text_model = _build_backbone(config.text_config, config.pooling == "pooler")
        if config.pooling == "pooler" and getattr(self.text_model, "pooler", None) is None:
            raise ValueError(
                f"The text encoder {type(self.text_model).__name__} has no pooler. Set pooling to 'cls' or 'mean'."
            )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(hidden, 2 if config.loss == "pairwise" else 1)
        if config.pooled_sides:
            self.sides_head = nn.Linear(2 * hidden, self.head.out_features)
            self.sides_head.starts_at_zero = True  # type: ignore[assignment]
        if config.list_weight is not None or config.name_weight is not None:
            self.given_scores = GivenScores(config)
            self.head.starts_at_zero = True  # type: ignore[assignment]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # BERT's initialisation
            init.normal_(module.weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
            init.zeros_(module.bias)
            if getattr(module, "starts_at_zero", False):
                init.zeros_(module.weight)
        elif isinstance(module, GivenScores):
            init.ones_(module.scales)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> CrossEncoderModel:
        """Builds a model with a pretrained encoder and an untrained head.

        An encoder's pooler that was never trained is not read, unless `pooling` asks for it. A warning says so.

        Args:
            text (`str`): Hub id or folder of an encoder like BERT.
            vision: Not supported.
            config: Fields of [`CrossEncoderConfig`].

        Raises:
            `ValueError`: `text` is not given, or `vision` is.
        """
        if text is None or vision is not None:
            raise ValueError(
                "A cross-encoder reads text only. Give the Hub id or folder of a text encoder, and no other."
            )
        encoder = AutoModel.from_pretrained(text)
        if "pooling" not in config and _pooler_is_untrained(encoder):
            logger.warning("The pooler of %s was never trained. The mean of all states is read instead.", text)
            config["pooling"] = "mean"
        fields = encoder.config.to_dict()
        fields.pop("_name_or_path", None)  # it may be a local path, and the weights are saved with the model
        config.setdefault("text_config", fields)
        model = cls(CrossEncoderConfig(**config))
        names = model.text_model.state_dict()
        model.text_model.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in names})
        return model

    @property
    def reads_list_scores(self) -> bool:
        """Whether the scores need `pair_list_score`."""
        return self.config.list_weight is not None

    def _logits(self, input_ids, attention_mask, token_type_ids) -> torch.Tensor:
        """Returns the logits [S, 1], or [S, 2] for "no match" and "match", of S sequences [S, L]."""
        block = _BLOCK_SEQUENCES[attention_mask.device.type == "cuda"]
        if len(input_ids) > block:
            # Sequences of similar length share a block, because half of a batch would be padding otherwise.
            order = attention_mask.sum(1).argsort()
            parts = [
                self._logits(input_ids[part], attention_mask[part], token_type_ids[part])
                for part in order.split(block)
            ]
            return torch.cat(parts)[order.argsort()]
        used = attention_mask.any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 1
        mask, segments = attention_mask[:, :width], token_type_ids[:, :width]
        inputs = {"input_ids": input_ids[:, :width], "attention_mask": mask}
        if getattr(self.config.text_config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = segments
        output = self.text_model(**inputs)
        states = output.last_hidden_state
        if self.config.pooling == "mean":
            pooled = masked_mean(states, mask)
        else:
            pooled = states[:, 0] if self.config.pooling == "cls" else output.pooler_output
        dtype = self.head.weight.dtype
        with torch.autocast(pooled.device.type, enabled=False):  # half precision is too coarse to rank candidates
            logits = self.head(self.dropout(pooled.to(dtype)))
            if hasattr(self, "sides_head"):
                sides = (~segments.bool(), segments.bool())
                first, second = (_standardised_mean(states.to(dtype), mask.bool() & side) for side in sides)
                logits = logits + self.sides_head(torch.cat([first * second, (first - second).abs()], -1))
        return logits

    def forward(
        self,
        pair_input_ids: torch.LongTensor,
        pair_attention_mask: torch.Tensor,
        pair_token_type_ids: torch.LongTensor,
        pair_mask: torch.Tensor,
        pair_context: torch.Tensor | None = None,
        pair_list_score: torch.Tensor | None = None,
        pair_name_match: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> CrossEncoderOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_input_ids, pair_attention_mask, pair_token_type_ids (`torch.Tensor` [M, C, L]): The sequences.
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_context (`torch.Tensor` [M], *optional*): Ignored, because every pair is scored alone.
            pair_list_score, pair_name_match (`torch.Tensor` [M, C], *optional*): Score of the list, and 1 where the name
                fits the mention, for `list_weight` and `name_weight`.
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the loss.
        """
        mask = pair_mask.bool()
        logits = self.head.weight.new_zeros(0, self.head.out_features)
        if mask.any():  # padding is not computed
            logits = self._logits(pair_input_ids[mask], pair_attention_mask[mask], pair_token_type_ids[mask])
        logits = logits[:, 1] - logits[:, 0] if self.config.loss == "pairwise" else logits[:, 0]
        if hasattr(self, "given_scores"):
            given = self.given_scores(mask, pair_list_score=pair_list_score, pair_name_match=pair_name_match)
            logits = logits + given.to(logits.dtype)
        scores = torch.full(mask.shape, float("-inf"), dtype=logits.dtype, device=mask.device)
        scores[mask] = logits
        loss = None
        if labels is not None and self.config.loss == "listwise":
            loss = _list_loss(scores, labels)
        elif labels is not None:
            columns = torch.arange(mask.shape[1], device=mask.device)
            counted = mask & (labels >= 0).unsqueeze(1)
            matches = (columns == labels.unsqueeze(1))[counted].to(scores.dtype)
            # The cross entropy of two classes whose logits differ by the score.
            losses = F.binary_cross_entropy_with_logits(scores[counted], matches, reduction="sum")
            loss = losses / counted.sum().clamp(min=1)
        if loss is not None:
            loss = loss + self.head.weight.sum() * 0.0  # a batch without a gold has gradients, too
        return CrossEncoderOutput(loss=loss, scores=scores)


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


__all__ = ["CrossEncoderModel"]
