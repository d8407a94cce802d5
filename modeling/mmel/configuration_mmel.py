"""Configuration of MMEL (Yang et al., UAI 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class MmelConfig(PreTrainedConfig):
    r"""
    Configuration of an [`MmelModel`]. The defaults describe the paper's network, with BERT base and CLIP ViT-B/32.

    Rows of the paper's tables: MMEL-onlytext has no `vision_config`; MMEL-k1 is `num_image_tokens=1`; MMEL-M-Encoder
    is `fusion="m_encoder"`; "- JL_t" is `joint_text=False`, "- JL_v" is `joint_image=False`, "- JL" is both; "- PT&CR"
    is `pairwise_loss_weight=0`.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of a text encoder like BERT.
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of an image encoder that gives one vector per image: a CLIP vision model, a model like ViT or
            a CNN. `None` makes a model without images. Without both configurations, the model is the paper's.
        projection_dim (`int`, *optional*):
            Width of CLIP's linear projection after the image encoder (512 for ViT-B/32). `None` uses the pooled output
            of the encoder without a projection.
        freeze_vision (`bool`, *optional*, defaults to `True`):
            Whether to freeze the image encoder, as in the paper. Each image is then encoded only once.
        hidden_size (`int`, *optional*, defaults to 512):
            d_v of the paper: width of all layers after the encoders.
        num_image_tokens (`int`, *optional*, defaults to 4):
            k: number of tokens that represent an image (eq. 2).
        num_image_blocks (`int`, *optional*, defaults to 2):
            q: number of blocks that process the image tokens of context and entity together (eq. 3).
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of heads in the self-attentions of those blocks; a divisor of `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 2048):
            Hidden width of the feed-forward layers in those blocks and in the fusion module (eq. 6).
        dropout (`int` or `float`, *optional*, defaults to 0.2):
            Dropout outside the encoders. The encoders have their own configurations.
        fusion (`str`, *optional*, defaults to `"mcm"`):
            Module that fuses text and image of one side: `"mcm"` is the co-attention of eq. 5-7, `"m_encoder"` the
            layer of MKGformer that the paper compares with. A model without images needs `"mcm"`, and uses the text on
            both sides of the co-attention.
        joint_text (`bool`, *optional*, defaults to `True`):
            Whether the text encoder reads context and entity in one sequence.
        joint_image (`bool`, *optional*, defaults to `True`):
            Whether the image tokens of context and entity attend to each other.
        pairwise_loss_weight (`int` or `float`, *optional*, defaults to 0.5):
            λ: weight of the pairwise loss (eq. 11), relative to that of eq. 10. The paper gives no value; 0.5 is that
            of the published network. With 0, the model has no similarity S, and hence no collaborative ranking.
        margin (`int` or `float`, *optional*, defaults to 0.3):
            Margin γ of eq. 11. The value is that of the published network.
        similarity_weight (`int` or `float`, *optional*, defaults to 1):
            Weight of S in the averages of collaborative ranking (§3.5). 1 is the average of the paper. With a lower
            weight, S decides only between candidates of similar m; with 0, the order of each mention's candidates
            stays. Training does not use it, so it can be changed in a trained model.
        training_unit (`str`, *optional*, defaults to `"context"`):
            What a training example is. `"context"` draws two mentions of a context, and one twice if it is alone, as in the
            paper (§3.4). `"mention"` is each mention by itself, which costs half; without a pairwise loss only.
        list_weight (`int` or `float`, *optional*):
            With a weight, the log-odds of m are those of eq. 10 plus this weight times the score of the list that the
            model reranks, times a learned scale that starts at 1. The classifier of eq. 10 then starts at zero, so that
            training starts from the order of the list. Rows need a `list_score`. `None`, as in the paper: not read.
        name_weight (`int` or `float`, *optional*):
            As `list_weight`, for a bit that says whether a name or alias of the entity has all words of the mention.
        image_weight (`int` or `float`, *optional*):
            With a weight, the log-odds also have this weight times the cosine of the two images, less a learned midpoint, times
            a learned scale that starts at 1. The features are projected linearly first, and the projection starts as the
            identity, so images are compared by what the encoder knows from the first step. A pair without both images has 0
            here. As with `list_weight`, the classifier then starts at zero. `None`, as in the paper: not compared.
        pooled_sides (`bool`, *optional*, defaults to `False`):
            Whether the classifier also reads how the two texts compare: product and absolute difference of the means of
            their states, of which each has mean 0 and variance 1.
        list_loss_weight (`int` or `float`, *optional*, defaults to 0):
            Weight of a further loss, the cross entropy of the gold among all candidates of its mention. 0, as in the paper,
            leaves it out.
        joint_combination (`str`, *optional*, defaults to `"probabilities"`):
            What ranking jointly combines: `"probabilities"` are the averages of §3.5. With `"log_odds"`, a candidate's
            log-odds are increased by what the best candidate of each other mention would then add, less what it adds alone:
            its own log-odds plus `similarity_weight` times the log-odds of S.
        distinct_entities (`bool`, *optional*, defaults to `False`):
            Whether two mentions of a context never mean the same entity when they are ranked jointly. Only with
            `joint_combination="log_odds"`.
        joint_ranking (`bool`, *optional*, defaults to `True`):
            Whether mentions are ranked jointly unless asked. Training does not use it.
        missing_images (`str`, *optional*, defaults to `"masked"`):
            Treatment of a missing image. `"masked"` leaves it out of every attention, as the paper does; the image of a
            candidate is read even if the mention has none. `"absent"` reads it only if the mention has an image, so that
            a mention without one is scored by texts alone.
        image_dropout (`int` or `float`, *optional*, defaults to 0.0):
            Probability that training treats the image of a candidate as missing, which teaches how a candidate without an
            image compares with others. Only with `missing_images="absent"`.
    """

    model_type: ClassVar[str] = "mmel"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
    }

    text_config: PreTrainedConfig | dict | None = None
    vision_config: PreTrainedConfig | dict | None = None
    projection_dim: int | None = None
    freeze_vision: bool = True
    hidden_size: int = 512
    num_image_tokens: int = 4
    num_image_blocks: int = 2
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    dropout: int | float = 0.2
    fusion: str = "mcm"
    joint_text: bool = True
    joint_image: bool = True
    pairwise_loss_weight: int | float = 0.5
    margin: int | float = 0.3
    similarity_weight: int | float = 1
    training_unit: str = "context"
    list_weight: int | float | None = None
    name_weight: int | float | None = None
    image_weight: int | float | None = None
    pooled_sides: bool = False
    list_loss_weight: int | float = 0
    joint_combination: str = "probabilities"
    distinct_entities: bool = False
    joint_ranking: bool = True
    missing_images: str = "masked"
    image_dropout: int | float = 0.0

    def __post_init__(self, **kwargs):
        if self.text_config is None and self.vision_config is None:
            self.text_config, self.vision_config, self.projection_dim = {}, {}, 512
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        if self.text_config is None:
            raise ValueError("text_config is missing, but MMEL reads text. Give the configuration of a text encoder.")
        if self.fusion not in ("mcm", "m_encoder"):
            raise ValueError(f"fusion={self.fusion!r} is not one of 'mcm', 'm_encoder'.")
        if self.missing_images not in ("masked", "absent"):
            raise ValueError(f"missing_images={self.missing_images!r} is not one of 'masked', 'absent'.")
        if self.joint_combination not in ("probabilities", "log_odds"):
            raise ValueError(
                f"joint_combination={self.joint_combination!r} is not one of 'probabilities', 'log_odds'."
            )
        if self.training_unit not in ("context", "mention"):
            raise ValueError(f"training_unit={self.training_unit!r} is not one of 'context', 'mention'.")
        if self.training_unit == "mention" and self.pairwise_loss_weight:
            raise ValueError("training_unit='mention' has no pairs for eq. 11. Set pairwise_loss_weight=0.")
        if self.distinct_entities and self.joint_combination != "log_odds":
            raise ValueError("distinct_entities=True needs joint_combination='log_odds'.")
        if self.image_dropout and self.missing_images != "absent":
            raise ValueError(f"image_dropout={self.image_dropout} needs missing_images='absent'.")
        if self.vision_config is None:
            for field, default in (
                ("fusion", "mcm"),
                ("joint_image", True),
                ("projection_dim", None),
                ("image_weight", None),
            ):
                if getattr(self, field) != default:
                    raise ValueError(f"{field}={getattr(self, field)!r} needs an image encoder. Give a vision_config.")
        for field in (
            "hidden_size",
            "num_image_tokens",
            "num_image_blocks",
            "num_attention_heads",
            "intermediate_size",
        ):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        if self.vision_config is not None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}."
            )
        for field in ("dropout", "image_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")
        for field in (
            "pairwise_loss_weight",
            "margin",
            "similarity_weight",
            "list_weight",
            "name_weight",
            "image_weight",
            "list_loss_weight",
        ):
            if (getattr(self, field) or 0) < 0:
                raise ValueError(f"{field}={getattr(self, field)} must not be negative.")


__all__ = ["MmelConfig"]
