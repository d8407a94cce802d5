"""Configuration of the cross-encoder, which covers BLINK's second stage (Wu et al., 2020) and CHOLAN (Ravi et al., 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class CrossEncoderConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CrossEncoderModel`]. The defaults are BLINK's second stage with BERT base.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            An encoder like BERT. Default: BERT base. With two segments, the mention is the first and the entity the second.
        loss (`str`, *optional*, defaults to `"listwise"`):
            `"listwise"`: cross entropy of the gold among the candidates of its mention, as BLINK. `"pairwise"`: every pair
            is classified as a match or not, as CHOLAN; the score is the log-odds of a match.
        pooling (`str`, *optional*, defaults to `"pooler"`):
            The state of a sequence that the head reads: `"pooler"` (BERT's pooled first state), `"cls"` (the first state) or
            `"mean"` (the mean of all states).
        dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout of that state.
        list_weight (`int` or `float`, *optional*):
            With a weight, the score of a pair is that of the head plus this weight times the score of the list that the model
            reranks, times a learned scale that starts at 1. The head then starts at zero, so that training starts from the
            order of the list. Rows need a `list_score`. `None`, as in the papers: not read.
        name_weight (`int` or `float`, *optional*):
            As `list_weight`, for a bit that says whether a name or alias of the entity has all words of the mention.
        pooled_sides (`bool`, *optional*, defaults to `False`):
            Whether a further linear layer reads how the two segments compare: product and absolute difference of the means of
            their states, of which each has mean 0 and variance 1. It starts at zero.
        nil_threshold (`int` or `float`, *optional*):
            Score below which the best candidate of a mention is rejected, so that the mention is NIL. `None`: never.
    """

    model_type: ClassVar[str] = "cross_encoder"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    loss: str = "listwise"
    pooling: str = "pooler"
    dropout: int | float = 0.1
    list_weight: int | float | None = None
    name_weight: int | float | None = None
    pooled_sides: bool = False
    nil_threshold: int | float | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = {}
        super().__post_init__(**kwargs)
        for field, allowed in (("loss", ("listwise", "pairwise")), ("pooling", ("pooler", "cls", "mean"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")
        for field in ("list_weight", "name_weight"):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")


__all__ = ["CrossEncoderConfig"]
