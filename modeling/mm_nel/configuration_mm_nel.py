"""Configuration of MM-nel (Gan et al., MM 2021)."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class MmNelConfig(PreTrainedConfig):
    r"""
    Configuration of an [`MmNelModel`]. The defaults are the paper's values. Where the paper gives none, they are those
    of the multi-relational model that it follows (Le & Titov, ACL 2018), or of the local model behind that (Ganea &
    Hofmann, EMNLP 2017).

    Rows of the paper's tables: "Naïve" is `joint="none"`; MulRel is that without images; Ganea and Hofmann's global model
    has `num_relations=1` and `uniform_relations=True` too; their local model, without coherence, is `num_relations=0`.

    Args:
        vocab_size, word_dim (`int`, *optional*, defaults to 30522 and 300):
            Shape of the table of word vectors.
        train_words (`bool`, *optional*, defaults to `False`):
            Whether to train the word vectors. Set it if they start untrained.
        hidden_size (`int`, *optional*, defaults to 300):
            d: width of mention embeddings, textual and visual.
        num_candidates (`int`, *optional*, defaults to 30):
            Number of candidates of a textual mention to consider, those with the highest prior.
        prior_candidates, context_candidates (`int`, *optional*, defaults to 4 and 3):
            Number of those to rank: the first by prior, and of the rest the first by similarity to the context.
        attention_words (`int`, *optional*, defaults to 25):
            R: number of context words that local attention keeps.
        local_scale (`int` or `float`, *optional*, defaults to 1):
            Value at which the diagonals A and B of local attention start. The paper's models start at 1, which suits word
            vectors of GloVe's length (about 6). Shorter ones need more, or else all beliefs start nearly equal: about 20
            for vectors of length 1.
        mention_in_context (`bool`, *optional*, defaults to `False`):
            Whether the words of a mention belong to its context. In the models that the paper follows they do not,
            because the prior says which entities have a name. Set it if the data have no prior.
        relation_window (`int`, *optional*, defaults to 6):
            Number of context words in a mention embedding, half of them on each side.
        num_relations (`int`, *optional*, defaults to 3):
            K of eq. 2. With 0, each mention is linked by its own context, without coherence.
        uniform_relations (`bool`, *optional*, defaults to `False`):
            Whether all other mentions of a document count alike, α = 1/(n - 1) in eq. 3, as in Ganea & Hofmann. The paper
            learns the weights.
        lbp_iterations (`int`, *optional*, defaults to 10):
            Number of rounds of belief propagation.
        lbp_damping (`int` or `float`, *optional*, defaults to 0.5):
            Weight of the new message in each round; 1 means no damping.
        score_hidden_size (`int`, *optional*, defaults to 100):
            Width of the layer that combines belief and prior.
        score_max_norm (`int` or `float`, *optional*):
            Largest norm of the incoming weights of a unit of that layer and of the output after it; 1 in Ganea & Hofmann.
            `None` does not limit it.
        min_prior (`int` or `float`, *optional*, defaults to 0.001):
            Lower bound of the prior, applied before its logarithm.
        dropout (`int` or `float`, *optional*, defaults to 0.3):
            Dropout of the textual part.
        gamma (`int` or `float`, *optional*, defaults to 0.01):
            Margin γ of eq. 6.
        image_size (`int`, *optional*, defaults to 64):
            Height and width of images, which are cut into 8 × 8 pieces. `None` without a `vision_config` makes a model
            without images.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of any image encoder. Its last feature map then gives the 8 × 8 pieces, in place of pixels.
        train_vision (`bool`, *optional*, defaults to `False`):
            Whether to train that encoder. The Transformer over the pieces is always trained.
        num_image_layers, num_attention_heads, intermediate_size (`int`, *optional*, defaults to 6, 6 and 1200):
            Sizes of that Transformer.
        image_dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout of that Transformer.
        margin (`int` or `float`, *optional*, defaults to 0.2):
            Margin of eq. 8. The paper does not give its value.
        triplet_reduction (`str`, *optional*, defaults to `"mean"`):
            Whether eq. 8 is the `"mean"` or the `"sum"` over the negatives of a mention. Eq. 5 is a sum, so that the sum
            brings both to one scale in eq. 11.
        joint (`str`, *optional*, defaults to `"transport"`):
            `"transport"` links the mentions of both modalities together (§4.3); `"none"` links each modality alone.
        beta (`int` or `float`, *optional*, defaults to 0.1):
            β of eq. 10.
        gw_weight (`int` or `float`, *optional*, defaults to 0.5):
            Weight of the cost of pairs (eq. 9); the rest is the weight of the cost of single mentions (eq. 10).
        sinkhorn_iterations, gw_iterations (`int`, *optional*, defaults to 500 and 50):
            Maximum number of iterations of one Sinkhorn problem, and of Sinkhorn problems for one plan.
        transport_tolerance (`int` or `float`, *optional*, defaults to 1e-5):
            Largest residual of a converged plan: the error of its marginals or its last change, each a sum of absolute
            differences.
        transport_weight (`int` or `float`, *optional*, defaults to 1.0):
            Weight of the transport cost in eq. 11. The paper has no weight there, which is 1.
        transport_matches (`int`, *optional*, defaults to 1):
            Number of mentions of the other modality that correct the scores of a mention; `None` means all.
        correction_weight (`int` or `float`, *optional*, defaults to 0.5):
            Weight of that correction, in units of the spread of the mention's scores.
        image_correction_weight (`int` or `float`, *optional*):
            That weight for visual mentions, which textual ones correct. The default is `correction_weight`.
        agreement_weight (`int` or `float`, *optional*, defaults to 0):
            Share of the candidates' agreement in the cost c(x, y) of a textual and a visual mention; the rest is the
            paper's cosine. They agree as far as both score an entity high. The paper has only the cosine, which is 0.
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
    local_scale: int | float = 1.0
    mention_in_context: bool = False
    relation_window: int = 6
    num_relations: int = 3
    uniform_relations: bool = False
    lbp_iterations: int = 10
    lbp_damping: int | float = 0.5
    score_hidden_size: int = 100
    score_max_norm: int | float | None = None
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
    triplet_reduction: str = "mean"
    joint: str = "transport"
    beta: int | float = 0.1
    gw_weight: int | float = 0.5
    sinkhorn_iterations: int = 500
    gw_iterations: int = 50
    transport_tolerance: int | float = 1e-5
    transport_weight: int | float = 1.0
    transport_matches: int | None = 1
    correction_weight: int | float = 0.5
    image_correction_weight: int | float | None = None
    agreement_weight: int | float = 0.0

    def __post_init__(self, **kwargs):
        self._ignore_transport_backend(kwargs.pop("transport_backend", "torch"))
        super().__post_init__(**kwargs)
        self._check()

    @property
    def sees_images(self) -> bool:
        """`True` if the model links visual mentions."""
        return self.image_size is not None or self.vision_config is not None

    @staticmethod
    def _ignore_transport_backend(backend: str) -> None:
        """Accepts a field of earlier versions, so that their config.json still loads."""
        if backend == "pot":
            warnings.warn(
                'transport_backend="pot" is ignored, because the POT solver was removed. The model uses its own '
                "solver, which finds the same plans. Remove the field from the configuration.",
                FutureWarning,
                stacklevel=2,
            )
        elif backend != "torch":
            raise ValueError(
                f"transport_backend={backend!r} is not one of 'torch', 'pot', the values of earlier versions. Remove "
                "the field from the configuration."
            )

    def _check(self) -> None:
        if self.joint not in ("transport", "none"):
            raise ValueError(f"joint={self.joint!r} is not one of 'transport', 'none'.")
        if self.triplet_reduction not in ("mean", "sum"):
            raise ValueError(f"triplet_reduction={self.triplet_reduction!r} is not one of 'mean', 'sum'.")
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
        if self.image_correction_weight is not None:
            not_negative.append("image_correction_weight")
        for field in not_negative:
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")
        if self.uniform_relations and not self.num_relations:
            raise ValueError("uniform_relations=True needs a relation. Set num_relations=1.")
        if self.prior_candidates + self.context_candidates < 1:
            raise ValueError(
                "prior_candidates and context_candidates are both 0, which leaves no candidate. Raise one of them."
            )
        for field in ("dropout", "image_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")
        for field in ("lbp_damping", "min_prior"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0 and at most 1.")
        for field in ("beta", "transport_tolerance", "local_scale"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be above 0.")
        if self.score_max_norm is not None and not self.score_max_norm > 0:
            raise ValueError(f"score_max_norm={self.score_max_norm} must be above 0.")
        for field in ("gw_weight", "agreement_weight"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} must be from 0 to 1.")
        if self.sees_images and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        if self.vision_config is None and self.image_size is not None and (self.image_size < 8 or self.image_size % 8):
            raise ValueError(f"image_size={self.image_size} cannot be cut into 8 × 8 pieces. Give a multiple of 8.")
        if self.train_vision and self.vision_config is None:
            raise ValueError("train_vision=True needs an image encoder. Give a vision_config.")


__all__ = ["MmNelConfig"]
