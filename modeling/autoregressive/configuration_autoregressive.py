"""Configuration of GENRE and "Autoregressive", which generate the name of an entity."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class AutoregressiveConfig(PreTrainedConfig):
    r"""
    Configuration of an [`AutoregressiveModel`]. The defaults are GENRE's, with BART base. "Autoregressive" has
    `name_decoder="lstm"` and `correction=True`.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            With `name_decoder="pretrained"`, configuration of a sequence-to-sequence model (BART, T5, encoder-decoder); with
            `"lstm"`, that of an encoder.
        name_decoder (`str`, *optional*, defaults to `"pretrained"`):
            `"pretrained"`: the decoder of the sequence-to-sequence model (GENRE). `"lstm"`: an LSTM that starts from the
            states of the mention's first and last token ("Autoregressive").
        correction (`bool`, *optional*, defaults to `False`):
            Whether a classifier on the final state of the LSTM corrects the score. It needs `name_decoder="lstm"`.
        label_smoothing (`int` or `float`, *optional*, defaults to 0.1):
            Share of the target probability that all tokens have alike.
        dropout (`int` or `float`, *optional*, defaults to 0.1):
            Dropout of the LSTM decoder's layers. The other parts have their own in `text_config`.
        num_encoder_layers (`int`, *optional*):
            Number of layers that [`AutoregressiveModel.from_backbones`] keeps of an encoder, the first ones. `None`: all.
        num_decoder_layers (`int`, *optional*, defaults to 2):
            Number of layers of the untrained decoder that [`AutoregressiveModel.from_backbones`] gives an encoder.
        nil_threshold (`int` or `float`, *optional*):
            Score below which the best candidate of a mention is rejected, so that the mention is NIL. `None` never
            predicts NIL.
    """

    model_type: ClassVar[str] = "autoregressive"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bart"),
    }

    text_config: PreTrainedConfig | dict | None = None
    name_decoder: str = "pretrained"
    correction: bool = False
    label_smoothing: int | float = 0.1
    dropout: int | float = 0.1
    num_encoder_layers: int | None = None
    num_decoder_layers: int = 2
    nil_threshold: int | float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.name_decoder not in ("pretrained", "lstm"):
            raise ValueError(f"name_decoder={self.name_decoder!r} is not one of 'pretrained', 'lstm'.")
        if self.correction and self.name_decoder != "lstm":
            raise ValueError('correction=True reads the state of an LSTM. Set name_decoder="lstm".')
        if (self.name_decoder == "pretrained") != bool(getattr(self.text_config, "is_encoder_decoder", False)):
            kind = getattr(self.text_config, "model_type", None)
            raise ValueError(
                f'text_config is of type {kind!r}. Give a sequence-to-sequence model for name_decoder="pretrained", and an encoder '
                'for name_decoder="lstm".'
            )
        for field in ("num_encoder_layers", "num_decoder_layers"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value} must be at least 1.")
        for field in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")


__all__ = ["AutoregressiveConfig"]
