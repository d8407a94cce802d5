"""Configuration of MM-nel (Gan et al., MM 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class MmNelConfig(PreTrainedConfig):
    r"""
    Configuration of an [`MmNelModel`]. The defaults are the paper's numbers where it has them, then those of the
    multi-relational model it follows (Le & Titov, ACL 2018) and of the local model under that (Ganea & Hofmann, EMNLP
    2017).

    Rows of the paper's tables: Naïve is `joint="none"`; a local model without coherence is `num_relations=0`.

    Args:
        vocab_size, word_dim (`int`, *optional*, defaults to 30522 and 300):
            Shape of the table of word vectors.
        train_words (`bool`, *optional*, defaults to `False`):
            Whether the word vectors learn too; for those that start untrained.
        hidden_size (`int`, *optional*, defaults to 300):
            d: width of a mention's embedding, textual and visual alike.
        num_candidates (`int`, *optional*, defaults to 30):
            Candidates of a textual mention with the highest prior that are looked at.
        prior_candidates, context_candidates (`int`, *optional*, defaults to 4 and 3):
            How many of those are linked among: by prior, and of the rest by similarity to the context.
        attention_words (`int`, *optional*, defaults to 25):
            R: words of the context that local attention keeps.
        mention_in_context (`bool`, *optional*, defaults to `False`):
            Whether a mention's own words are words of its context too. In the models that the paper follows they are
            not: there, what a name says about an entity is in the prior. For data without one.
        relation_window (`int`, *optional*, defaults to 6):
            Words of the context that a mention's embedding is made of, half of them on either side.
        num_relations (`int`, *optional*, defaults to 3):
            K of eq. 2. 0: no coherence, each mention is linked by its own context.
        lbp_iterations (`int`, *optional*, defaults to 10):
            Rounds of belief propagation.
        lbp_damping (`int` or `float`, *optional*, defaults to 0.5):
            Share of the new message in each round; 1: no damping.
        score_hidden_size (`int`, *optional*, defaults to 100):
            Width of the layer that combines belief and prior.
        min_prior (`int` or `float`, *optional*, defaults to 0.001):
            A prior below it counts as it, for its logarithm is taken.
        dropout (`int` or `float`, *optional*, defaults to 0.3):
            Dropout in the textual half.
        gamma (`int` or `float`, *optional*, defaults to 0.01):
            γ of eq. 6.
        image_size (`int`, *optional*, defaults to 64):
            Side of the images that are cut into 8 × 8 pieces. `None` without a `vision_config`: a model without images.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Any image encoder whose last feature map gives the 8 × 8 pieces, in place of pixels.
        train_vision (`bool`, *optional*, defaults to `False`):
            Whether that encoder learns too. The Transformer over the pieces always does.
        num_image_layers, num_attention_heads, intermediate_size (`int`, *optional*, defaults to 6, 6 and 1200):
            Of that Transformer.
        image_dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout in it.
        margin (`int` or `float`, *optional*, defaults to 0.2):
            Margin of eq. 8, which the paper leaves open.
        joint (`str`, *optional*, defaults to `"transport"`):
            `"transport"`: mentions of both modalities are linked together (§4.3); `"none"`: apart.
        transport_backend (`str`, *optional*, defaults to `"torch"`):
            `"torch"`: all documents of a batch at once, with gradients through the plan; `"pot"`: the POT library's
            solver, one document after the other, with gradients through the costs alone.
        beta (`int` or `float`, *optional*, defaults to 0.1):
            β of eq. 10.
        gw_weight (`int` or `float`, *optional*, defaults to 0.5):
            Weight of the cost between pairs (eq. 9); the rest is that of the cost between nodes (eq. 10).
        sinkhorn_iterations, gw_iterations (`int`, *optional*, defaults to 500 and 50):
            Limits: of one Sinkhorn problem, and of such problems for a plan.
        transport_tolerance (`int` or `float`, *optional*, defaults to 1e-5):
            A plan has converged when neither its margins nor itself are further off, in summed absolute difference.
        transport_weight (`int` or `float`, *optional*, defaults to 1.0):
            Weight of the transport cost in eq. 11, which has it as 1.
        transport_matches (`int`, *optional*, defaults to 1):
            By how many mentions of the other modality the plan corrects a mention's scores; `None`: by all.
        correction_weight (`int` or `float`, *optional*, defaults to 0.5):
            Weight of that correction, in units of the mention's own spread of scores.
    """

    model_type: ClassVar[str] = "mm_nel"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet", optional=True),
    }

    vocab_size: int = 30522
    word_dim: int = 300
    train_words: bool = False
    hidden_size: int = 300
    num_candidates: int = 30
    prior_candidates: int = 4
    context_candidates: int = 3
    attention_words: int = 25
    mention_in_context: bool = False
    relation_window: int = 6
    num_relations: int = 3
    lbp_iterations: int = 10
    lbp_damping: int | float = 0.5
    score_hidden_size: int = 100
    min_prior: int | float = 0.001
    dropout: int | float = 0.3
    gamma: int | float = 0.01
    image_size: int | None = 64
    vision_config: PreTrainedConfig | dict | None = None
    train_vision: bool = False
    num_image_layers: int = 6
    num_attention_heads: int = 6
    intermediate_size: int = 1200
    image_dropout: int | float = 0.1
    margin: int | float = 0.2
    joint: str = "transport"
    transport_backend: str = "torch"
    beta: int | float = 0.1
    gw_weight: int | float = 0.5
    sinkhorn_iterations: int = 500
    gw_iterations: int = 50
    transport_tolerance: int | float = 1e-5
    transport_weight: int | float = 1.0
    transport_matches: int | None = 1
    correction_weight: int | float = 0.5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check()

    @property
    def sees_images(self) -> bool:
        """Whether the model links visual mentions."""
        return self.image_size is not None or self.vision_config is not None

    def _check(self) -> None:
        for field, allowed in (("joint", ("transport", "none")), ("transport_backend", ("torch", "pot"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, allowed))}.")
        positive = ["vocab_size", "word_dim", "hidden_size", "num_candidates", "attention_words", "lbp_iterations"]
        positive += ["score_hidden_size", "num_image_layers", "num_attention_heads", "intermediate_size"]
        positive += ["sinkhorn_iterations", "gw_iterations"]
        if self.transport_matches is not None:
            positive.append("transport_matches")
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        not_negative = ["prior_candidates", "context_candidates", "relation_window", "num_relations", "gamma"]
        not_negative += ["margin", "transport_weight", "correction_weight"]
        for field in not_negative:
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if self.prior_candidates + self.context_candidates < 1:
            raise ValueError("prior_candidates and context_candidates are both 0: there is nothing to link among.")
        for field in ("dropout", "image_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")
        for field in ("lbp_damping", "min_prior"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0 and at most 1.")
        for field in ("beta", "transport_tolerance"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0.")
        if not 0 <= self.gw_weight <= 1:
            raise ValueError(f"gw_weight={self.gw_weight} must be from 0 to 1.")
        if self.sees_images and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.vision_config is None and self.image_size is not None and (self.image_size < 8 or self.image_size % 8):
            raise ValueError(f"image_size={self.image_size} cannot be cut into 8 × 8 pieces; give a multiple of 8.")
        if self.train_vision and self.vision_config is None:
            raise ValueError("train_vision=True needs a vision_config.")


__all__ = ["MmNelConfig"]
