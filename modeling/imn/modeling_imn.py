"""IMN: Multimodal Knowledge Learning for Named Entity Disambiguation (Zhang et al., Findings of EMNLP 2022).

Equation numbers are the paper's. No published code is known: `modeling/imn/README.md` lists how the parts that it leaves
open, or misprints, are read here. A mention and an entity are each encoded into three auxiliary spaces. Co-attention
between the spaces of both gives the fused embeddings of the pair, and their cosine is the score.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_imn import ImnConfig

#: Mentions in a block of pairs, and elements of its entities' three spaces: bound the memory of co-attention.
_BLOCK_MENTIONS = 256
_BLOCK_ELEMENTS = {"cpu": 2**16, "cuda": 2**22}
#: Kernel sizes of the Conv1D blocks (eq. 6).
_KERNELS = (2, 3, 4, 5)
#: A batch of at least `_MIN_BATCH_TO_GROUP` items is encoded in `_LENGTH_GROUPS` groups by length, to save padding.
_LENGTH_GROUPS, _MIN_BATCH_TO_GROUP = 4, 32

#: A padded sequence [B, S, d] and its mask [B, S], True where a position is not padding.
MaskedSequence = tuple[torch.Tensor, torch.Tensor]


@dataclass
class PostInputs:
    """Inputs of B mentions or posts; as arguments of [`ImnModel`], with the prefix `mention_` or `post_`.

    Args:
        input_ids, attention_mask (`torch.Tensor` [B, L], *optional*): The text. A missing text has a mask of zeros.
            Default mask: ones.
        name_ids, name_mask (`torch.Tensor` [B, K], *optional*): The word pieces of the mention. A missing mention has a
            mask of zeros.
        pixel_values (`torch.Tensor` [B, 3, H, W], *optional*): The images. Not needed if no item has one.
        image_mask (`torch.Tensor` [B], *optional*): True where an item has an image. Default: all have one.
    """

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    name_ids: torch.Tensor | None = None
    name_mask: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_mask: torch.Tensor | None = None


@dataclass
class ImnEncodings(ModelOutput):
    """Encodings of B mentions or B entities, complete for scoring.

    Args:
        aux (`torch.Tensor` [B, 3, d]): aux^1, aux^2, aux^3 (eq. 3, 5, 8).
        query (`torch.Tensor` [B, 3, d], *optional*): W_c^1 aux (eq. 9), for the attention of this side to the other.
        key (`torch.Tensor` [B, 3, d], *optional*): W_c^2 aux + b_c (eq. 9), for the attention of the other side to this.
    """

    aux: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None


@dataclass
class ImnOutput(ModelOutput):
    """Output of [`ImnModel`].

    Args:
        loss (`torch.Tensor` [], *optional*): Eq. 14. Returned if `labels` are given.
        scores (`torch.Tensor` [M, N]): f(u_m, u_e). Higher is better.
        unit_scores (`dict[str, torch.Tensor]`): Empty, because the score has one part.
        space_scores (`dict[int, torch.Tensor]`, *optional*): f in the auxiliary spaces that have a loss, space → [M, N].
            Returned if `labels` are given.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None
    space_scores: dict[int, torch.Tensor] | None = None


def masked_softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. All other positions are zeros."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1) * mask


# Copied from modeling/mimic/scoring_mimic.py
def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [B, L, d] over the L positions where `mask` [B, L] is 1."""
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def _select_rows(states: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> MaskedSequence:
    """Selects rows of a sequence and cuts off the columns at its end that are padding in all of them."""
    mask = mask[rows]
    width = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
    return states[rows, :width], mask[:, :width]


def _orthogonal(shape: torch.Size, gain: float = 1.0) -> torch.Tensor:
    """Returns an orthogonal matrix, always the same for one shape."""
    return nn.init.orthogonal_(torch.empty(shape, device="cpu"), gain, generator=torch.Generator().manual_seed(0))


class _AlignedConv1d(nn.Conv1d):
    """Convolution that starts as a map of single tokens, the same for all convolutions of its shape.

    One tap is orthogonal, scaled by √2 to make up for the half that ReLU cuts off. The other taps are zero.
    """

    def aligned_weight(self) -> torch.Tensor:
        weight = torch.zeros(self.weight.shape, device="cpu")
        weight[:, :, self.kernel_size[0] // 2 if self.padding[0] else 0] = self._tap()
        return weight

    def _tap(self) -> torch.Tensor:
        return _orthogonal(self.weight.shape[:2], 2**0.5)


class _IdentityConv1d(_AlignedConv1d):
    """Convolution that starts as the identity, which passes on the output of a ReLU unchanged."""

    def _tap(self) -> torch.Tensor:
        return torch.eye(len(self.weight), device="cpu")


class _AlignedLinear(nn.Linear):
    """Linear map without a bias at first, whose weight starts as one orthogonal matrix for all maps of its shape."""

    def aligned_weight(self) -> torch.Tensor:
        return _orthogonal(self.weight.shape)


class _PairedConv1d(_AlignedConv1d):
    """Convolution that starts as the map x → [Wx; −Wx] of single tokens: ReLU cuts nothing off the pair.

    Args:
        reads_pairs (`bool`): The input already is pairs [ReLU(x); ReLU(−x)], of which W maps the difference, x.
        place (`int`): Number of this convolution among those that read the same input: each takes other rows of W.
    """

    def __init__(self, *args, reads_pairs: bool = False, place: int = 0, **options):
        super().__init__(*args, **options)
        self.reads_pairs, self.place = reads_pairs, place

    def _tap(self) -> torch.Tensor:
        half, width = len(self.weight) // 2, self.in_channels // (2 if self.reads_pairs else 1)
        rows = half * (self.place + 1)
        whole = _orthogonal(torch.Size([half * (len(_KERNELS) if self.reads_pairs else 1), width]))
        tap = whole[rows - half : rows]
        tap = torch.cat([tap, -tap], 1) if self.reads_pairs else tap
        return torch.cat([tap, -tap])


class _PairedLinear(nn.Linear):
    """Linear map that starts by taking the differences of pairs and projecting each modality to its own outputs.

    The input is, for each modality, `groups` vectors [x⁺; x⁻] of the same width. The outputs are shared out evenly.
    """

    def __init__(self, in_features: int, out_features: int, modalities: int, groups: int = 1):
        super().__init__(in_features, out_features)
        self.modalities, self.groups = modalities, groups

    def aligned_weight(self) -> torch.Tensor:
        half = self.in_features // self.modalities // self.groups // 2
        blocks = []
        for rows in torch.arange(self.out_features).tensor_split(self.modalities):
            projection = _orthogonal(torch.Size([len(rows), self.groups * half])).view(len(rows), self.groups, half)
            blocks.append(torch.cat([projection, -projection], 2).flatten(1))
        return torch.block_diag(*blocks)


class _SmallLinear(nn.Linear):
    """Linear map that starts at `scale` times PyTorch's default, without a bias."""

    scale = 0.1


class _ZeroLinear(_SmallLinear):
    """Linear map that starts as zeros."""

    scale = 0.0


class DilatedCNN(nn.Module):
    """Dilated CNN of eq. 1: convolutions of kernel size 3, each followed by ReLU, that keep the sequence length."""

    def __init__(self, width: int, config: ImnConfig):
        super().__init__()
        random = config.encoder_init == "default"
        convolution = {"aligned": _AlignedConv1d, "paired": _PairedConv1d}.get(config.encoder_init, nn.Conv1d)
        self.layers = nn.ModuleList()
        for dilation in config.dilations or ():
            self.layers.append(convolution(width, config.hidden_dim, 3, padding=dilation, dilation=dilation))
            width, convolution = config.hidden_dim, nn.Conv1d if random else _IdentityConv1d

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """g [B, S, h] of [B, S, width]; zeros where `mask` [B, S] is False."""
        mask = mask.unsqueeze(1)
        x = x.transpose(1, 2) * mask
        for layer in self.layers:
            x = F.relu(layer(x)) * mask
        return x.transpose(1, 2)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics for a training batch of one item, which has no variance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class _FaintBatchNorm(_BatchNorm):
    """Batch normalisation whose weight starts at 0.1, so that its space has little part in the fused one at first."""

    first_weight = 0.1


class HierarchicalEncoder(nn.Module):
    """Hierarchical encoding network of one side (§3.4.1), from its modalities to the three auxiliary spaces.

    Args:
        config ([`ImnConfig`]): The model's configuration.
        widths (`dict[str, int]`): Modality → width of its sequence, in the order of concatenation.
    """

    def __init__(self, config: ImnConfig, widths: Mapping[str, int]):
        super().__init__()
        hidden, aux = config.hidden_dim, config.aux_dim
        paired = config.encoder_init == "paired"
        self.cnn = nn.ModuleDict({name: DilatedCNN(width, config) for name, width in widths.items()})
        # Zeros pool a sequence to its mean.
        attention = _ZeroLinear if paired else nn.Linear
        self.attention = nn.ModuleDict({name: attention(hidden, 1, bias=False) for name in widths})
        layer = nn.TransformerEncoderLayer(hidden, config.num_heads, 4 * hidden, config.dropout, batch_first=True)
        if config.encoder_init != "default":
            layer.linear2 = _ZeroLinear(4 * hidden, hidden)
        self.transformer = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.convolutions = nn.ModuleDict({name: nn.ModuleList(_convolutions(config)) for name in widths})
        self.dropout = nn.Dropout(config.dropout)
        sizes = (hidden, hidden, len(_KERNELS) * config.conv_dim)
        self.fc = nn.ModuleList()
        for size, groups in zip(sizes, (1, 1, len(_KERNELS)), strict=True):
            if paired:
                self.fc.append(_PairedLinear(len(widths) * size, aux, len(widths), groups))
            else:
                linear = _AlignedLinear if config.encoder_init == "aligned" else nn.Linear
                self.fc.append(linear(len(widths) * size, aux))
        self.norm = nn.ModuleList([_BatchNorm(aux), _BatchNorm(aux), (_FaintBatchNorm if paired else _BatchNorm)(aux)])

    def forward(self, sequences: Mapping[str, MaskedSequence]) -> torch.Tensor:
        """aux [B, 3, d] of the sequences of all modalities."""
        names = list(self.cnn)
        # Items of similar length are encoded together, so that a large batch is not padded to its longest item.
        length = torch.stack([sequences[name][1].sum(1) for name in names]).sum(0)
        order = length.argsort(descending=True, stable=True)
        groups = order.chunk(_LENGTH_GROUPS if len(order) >= _MIN_BATCH_TO_GROUP else 1)
        group_levels = [
            self._levels({name: _select_rows(*sequences[name], rows) for name in names}) for rows in groups
        ]
        original_order = order.argsort()
        levels = [torch.cat(level)[original_order] for level in zip(*group_levels, strict=True)]
        aux = [norm(fc(self.dropout(x))) for x, fc, norm in zip(levels, self.fc, self.norm, strict=True)]
        return torch.stack(aux, 1)  # eq. 3, 5, 8

    def _levels(self, sequences: Mapping[str, MaskedSequence]) -> list[torch.Tensor]:
        """Inputs of the linear maps of eq. 3, 5 and 8: per level, the modalities' vectors concatenated [B, n · width]."""
        names = list(self.cnn)
        masks = [sequences[name][1] for name in names]
        locals_ = [self.cnn[name](*sequences[name]) for name in names]  # eq. 1
        first = [
            (masked_softmax(self.attention[name](g).squeeze(-1), mask).unsqueeze(1) @ g).squeeze(1)
            for name, g, mask in zip(names, locals_, masks, strict=True)
        ]  # eq. 2
        joint_mask = torch.cat(masks, 1)
        # An item without any token attends to its first padding, so that its softmax is defined. Its states are zeroed.
        padding = ~joint_mask
        padding[:, 0] &= joint_mask.any(1)
        states = self.transformer(torch.cat(locals_, 1), src_key_padding_mask=padding)  # eq. 4
        states = states * joint_mask.unsqueeze(-1)
        parts = states.split([mask.shape[1] for mask in masks], 1)
        second = [masked_mean(t, mask) for t, mask in zip(parts, masks, strict=True)]
        third = [self._max_pooled(name, t, mask) for name, t, mask in zip(names, parts, masks, strict=True)]
        return [torch.cat(level, -1) for level in (first, second, third)]

    def _max_pooled(self, name: str, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """c [B, 4 · conv_dim] of t [B, S, h] (eq. 6–7). Padding counts as 0, which no output of ReLU is below."""
        t, mask = t.transpose(1, 2), mask.unsqueeze(1)
        layers: Any = self.convolutions[name]
        pooled = [
            (F.relu(layer(F.pad(t, (0, kernel - 1)))) * mask).amax(-1)
            for kernel, layer in zip(_KERNELS, layers, strict=True)
        ]
        return torch.cat(pooled, -1)


def _convolutions(config: ImnConfig) -> list[nn.Conv1d]:
    """The Conv1D blocks of eq. 6 for one modality."""
    sizes = (config.hidden_dim, config.conv_dim)
    if config.encoder_init == "paired":
        return [_PairedConv1d(*sizes, kernel, reads_pairs=True, place=k) for k, kernel in enumerate(_KERNELS)]
    convolution = _AlignedConv1d if config.encoder_init == "aligned" else nn.Conv1d
    return [convolution(*sizes, kernel) for kernel in _KERNELS]


class CoAttention(nn.Module):
    """Weights W_c^1, W_c^2, b_c of one direction of eq. 9."""

    def __init__(self, config: ImnConfig):
        super().__init__()
        # Small weights make the attention nearly uniform at first.
        linear = nn.Linear if config.encoder_init == "default" else _SmallLinear
        self.query = linear(config.aux_dim, config.aux_dim, bias=False)
        self.key = linear(config.aux_dim, config.aux_dim)


def _relu_of_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.relu(x + y)


def _co_attention(aux: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Weight of each of the other side's three spaces in u (eq. 9–10 and the mean of eq. 12).

    Because of its ReLU, eq. 9 does not factorise: it takes 9 d comparisons and multiplications per pair and direction.

    Args:
        aux, query: [a, 3, d], aux and W_c^1 aux of the attending side.
        key: [b, 3, d], W_c^2 aux + b_c of the attended side.

    Returns:
        [a, 3, b]: β_{i,j}, averaged over i. Since u = mean_i Σ_j β_{i,j} aux^j, eq. 11–12 need no more of β.
    """
    a, b = len(aux), len(key)
    aux, query, key = aux.flatten(0, 1), query.flatten(0, 1), key.transpose(0, 1).flatten(0, 1)
    # Row by row of one side, so that one [rows of the other side, d] at a time stays in the cache. With
    # ReLU(x + y) = max(x, −y) + y, the second term becomes a matrix product and each row takes one pass less. Training
    # does not use this, as the gradient of max takes eight times as long as that of ReLU.
    training = torch.is_grad_enabled()
    operand, pair_term = (key, _relu_of_sum) if training else (-key, torch.maximum)
    if a <= 2 * b:
        logits = torch.stack([pair_term(q, operand) @ x for q, x in zip(query, aux, strict=True)])
    else:
        logits = torch.stack([(pair_term(query, k) * aux).sum(-1) for k in operand], 1)
    if not training:
        logits = logits + aux @ key.T
    return logits.view(a, 3, 3, b).softmax(2).mean(1)


def _fused_scores(mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """f(u_m, u_e) [m, n] of every pair of a block (eq. 9–12), from the 3 × 3 inner products of its spaces."""
    aux_m, aux_e = mentions["aux"], entities["aux"]
    entity_weights = _co_attention(aux_m, mentions["query"], entities["key"])  # [m, 3, n]; u_m = Σ_j weight_j aux_e^j
    mention_weights = _co_attention(aux_e, entities["query"], mentions["key"])
    mention_weights = mention_weights.permute(2, 1, 0).contiguous()  # [m, 3, n]; u_e = Σ_i weight_i aux_m^i
    inner = (aux_m.flatten(0, 1) @ aux_e.transpose(0, 1).flatten(0, 1).T).view(len(aux_m), 3, 3, len(aux_e))
    product = ((inner * entity_weights.unsqueeze(1)).sum(2) * mention_weights).sum(1)
    gram_m, gram_e = aux_m @ aux_m.transpose(1, 2), aux_e @ aux_e.transpose(1, 2)
    norm_m = ((gram_e.permute(1, 2, 0) * entity_weights.unsqueeze(1)).sum(2) * entity_weights).sum(1)  # |u_m|²
    norm_e = ((gram_m @ mention_weights) * mention_weights).sum(1)  # |u_e|²
    return product * torch.rsqrt((norm_m * norm_e).clamp(min=1e-12))


class ImnPreTrainedModel(PreTrainedModel):
    """Base class of the IMN models: configuration, initialisation and the three feature extractors (§3.2–3.3)."""

    config: ImnConfig
    config_class = ImnConfig
    base_model_prefix = "imn"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, so the Trainer must scale it when accumulating
    _no_split_modules = []
    # IMN's Transformer is PyTorch's. These flags let an attention implementation reach the backbones.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    #: Pretrained submodules. The trainer may give all other parameters another learning rate.
    backbone_names = ("text_model", "vision_model", "joint_model")
    #: Frozen submodules.
    frozen_names: tuple[str, ...] = ("text_model", "vision_model", "joint_model", "patch_projection")

    def _build_extractors(self, config: ImnConfig) -> None:
        """Builds the encoders that the modalities need; sets `widths` (by modality) and `patch_width`."""
        self.widths: dict[str, int] = {}
        names = config.modalities
        if "text" in names:
            self.text_model = _build_backbone(config.text_config, False)
            self.widths["text"] = config.text_config.hidden_size  # type: ignore[union-attr]
        if config.vision_config is not None and {"image", "joint"} & set(names):
            self.vision_model = _build_backbone(config.vision_config, False)
            self.patch_width = _last_width(config.vision_config)
            if "image" in names:
                self.widths["image"] = self.patch_width
        if "joint" in names:
            self.joint_model = _build_backbone(config.joint_config, False)
            hidden: int = config.joint_config.hidden_size  # type: ignore[union-attr]
            if hasattr(self, "vision_model"):
                self.patch_projection = nn.Linear(self.patch_width, hidden)
            self.widths["joint"] = hidden
            self._joint_inputs = set(inspect.signature(self.joint_model.forward).parameters)
            if getattr(config.joint_config, "type_vocab_size", 0) < 2:
                self._joint_inputs -= {"token_type_ids"}

    def train(self, mode: bool = True):
        """Sets the training mode; frozen submodules stay in evaluation mode and require no gradient."""
        super().train(mode)
        for name in self.frozen_names:
            if hasattr(self, name):
                # Not only on construction, because `from_pretrained` replaces the parameters and then calls `eval`.
                getattr(self, name).eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _AlignedConv1d | _AlignedLinear | _PairedLinear):
            init.copy_(module.weight, module.aligned_weight().to(module.weight))
            init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, _SmallLinear):
            bound = module.scale * module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv1d):  # PyTorch's default
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            if self.config.encoder_init != "default":  # overrides out_proj, which was initialised before
                init.zeros_(module.out_proj.weight)
                init.zeros_(module.out_proj.bias)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            init.constant_(module.weight, getattr(module, "first_weight", 1.0))
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm1d):
                init.zeros_(module.running_mean)  # type: ignore[arg-type]
                init.ones_(module.running_var)  # type: ignore[arg-type]
                init.zeros_(module.num_batches_tracked)  # type: ignore[arg-type]

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config):
        """Builds a model with pretrained extractors. The joint model starts as a copy of the text encoder.

        Args:
            text (`str`, *optional*): Hub id or folder of a BERT-like encoder. Default: an untrained encoder of
                `text_config`.
            vision (`str`, *optional*): Hub id or folder of DETR or another image encoder. Without it, and without
                `vision_config`, the model reads no images.
            config: Fields of [`ImnConfig`].

        Raises:
            `ValueError`: No encoder is given, or `text` is not a text encoder.
        """
        parts: dict[str, Any] = {}
        if text is not None:
            if not hasattr(AutoConfig.from_pretrained(text), "vocab_size"):
                raise ValueError(f"{text} is not a text encoder. Pass the Hub id or folder of a BERT-like one.")
            parts["text_model"] = AutoModel.from_pretrained(text)
            config.setdefault("text_config", _portable_config(parts["text_model"].config))
        elif config.get("text_config") is None and vision is None:
            raise ValueError(
                "No encoder is given. Pass the Hub id or folder of a text encoder, a vision encoder, or both."
            )
        if vision is not None:
            model = AutoModel.from_pretrained(vision)
            parts["vision_model"] = getattr(model, "vision_model", model)  # the image half of a CLIP
            config.setdefault("vision_config", _portable_config(parts["vision_model"].config))
        if "text_model" in parts and config.get("joint_config") is None:
            parts["joint_model"] = parts["text_model"]
        model = cls(ImnConfig(**config))
        for name, part in parts.items():
            target = getattr(model, name, None)
            if target is not None:
                target_keys = target.state_dict().keys()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in target_keys})
        return model

    def _text(self, input_ids: torch.Tensor, mask: torch.Tensor) -> MaskedSequence:
        """States [B, L, d] of the text encoder, zeros where `mask` [B, L] is False, and the mask."""
        present = mask.any(1)
        out = self._zeros(*input_ids.shape, self.widths["text"])
        if present.any():
            states = self.text_model(input_ids=input_ids[present], attention_mask=mask[present].long())
            out = out.to(states.last_hidden_state.dtype)
            out[present] = states.last_hidden_state
        return out * mask.unsqueeze(-1), mask

    def _patches(self, pixel_values: torch.Tensor | None, image_mask: torch.Tensor) -> MaskedSequence:
        """Patch tokens [B, n, d], the output sequence of the vision model, and their mask [B, n].

        Patches are zeros where `image_mask` [B] is False. In a batch without images, n is 1.
        """
        if not image_mask.any():
            return self._zeros(len(image_mask), 1, self.patch_width), image_mask.unsqueeze(1)
        if pixel_values is None:
            raise ValueError("The image mask marks images, but pixel_values are missing. Pass them.")
        patches = self.vision_model(pixel_values=pixel_values[image_mask]).last_hidden_state
        if patches.dim() == 4:  # the feature map [B, d, h, w] of a CNN: every cell is a patch
            patches = patches.flatten(2).transpose(1, 2)
        out = patches.new_zeros(len(image_mask), *patches.shape[1:])
        out[image_mask] = patches
        return out, image_mask.unsqueeze(1).expand(-1, patches.shape[1])

    def _joint(self, input_ids, mask, name_ids, name_mask, patches: MaskedSequence | None):
        """States of the joint model (§3.2), which reads text tokens, mention embedding and patch tokens.

        The mention embedding is the mean of the word embeddings of the mention's pieces, one token after the text.
        Patches are numbered from 0 and belong to the second segment. Padding is moved to the end of each row.

        Args:
            input_ids, mask: [B, L], the text.
            name_ids, name_mask: [B, K], the mention, or `None` for no mentions.
            patches: Tokens [B, n, d] and mask [B, n], or `None`.

        Returns:
            States [B, S, d], mask [B, S], and the order [B, L + 1 + n] that moves padding to the end: position s of a
            row is its `order[s]`-th of text, then mention, then patches.
        """
        words = self.joint_model.get_input_embeddings()
        rows, length = input_ids.shape
        embedded, masks = [words(input_ids)], [mask]
        positions = [torch.arange(length, device=mask.device).expand(rows, -1), mask.sum(1, keepdim=True)]
        if name_ids is None:
            name_ids, name_mask = input_ids[:, :1], torch.zeros_like(mask[:, :1])
        embedded.append(masked_mean(words(name_ids), name_mask).unsqueeze(1))
        masks.append(name_mask.any(1, keepdim=True))
        if patches is not None:
            embedded.append(self.patch_projection(patches[0].to(self.patch_projection.weight.dtype)))
            masks.append(patches[1])
            positions.append(torch.arange(patches[1].shape[1], device=mask.device).expand(rows, -1))
        states, mask, places = torch.cat(embedded, 1), torch.cat(masks, 1), torch.cat(positions, 1)
        segments = (torch.arange(mask.shape[1], device=mask.device) > length).long().expand(rows, -1)
        order = (~mask).long().argsort(dim=1, stable=True)
        kept = order[:, : max(1, int(mask.sum(1).max()))]
        mask, places, segments = mask.gather(1, kept), places.gather(1, kept), segments.gather(1, kept)
        limit = getattr(self.config.joint_config, "max_position_embeddings", None)
        if limit is not None and int((places * mask).max()) >= limit:
            raise ValueError(
                f"A text of {length} tokens or an image of {states.shape[1] - length - 1} patches exceeds the {limit} "
                "positions of the joint model. Set a smaller max_length in the processor."
            )
        states = states.gather(1, kept.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        present = mask.any(1)
        out = torch.zeros_like(states)
        if present.any():
            inputs = {"position_ids": (places * mask)[present], "token_type_ids": (segments * mask)[present]}
            inputs = {name: value for name, value in inputs.items() if name in self._joint_inputs}
            present_states = self.joint_model(
                inputs_embeds=states[present], attention_mask=mask[present].long(), **inputs
            ).last_hidden_state
            out = out.to(present_states.dtype).index_put((present,), present_states)
        return out * mask.unsqueeze(-1), mask, order

    def _extract(
        self, side: str, modalities: Iterable[str], inputs: Mapping[str, torch.Tensor | None]
    ) -> dict[str, MaskedSequence]:
        """Runs the feature extractors (§3.3) on B mentions or posts.

        Args:
            side: "mention" or "post", the prefix of the inputs.
            modalities: The modalities to extract.
            inputs: Fields of [`PostInputs`], with the prefix.

        Returns:
            `dict` of modality → sequence.
        """
        post = PostInputs(**{name.removeprefix(f"{side}_"): tensor for name, tensor in inputs.items()})
        input_ids: Any = post.input_ids
        text_mask: Any = post.attention_mask
        patches: Any = None
        if input_ids is not None:
            text_mask = torch.ones_like(input_ids, dtype=torch.bool) if text_mask is None else text_mask.bool()
        elif {"text", "joint"} & set(modalities):
            raise ValueError(f"{side}_input_ids is missing. Pass it, as this model reads text.")
        if hasattr(self, "vision_model") and {"image", "joint"} & set(modalities):
            image_mask = post.image_mask
            if image_mask is None:
                if post.pixel_values is None:
                    raise ValueError(f"{side}_image_mask is missing. Pass it, as this model reads images.")
                image_mask = torch.ones(len(post.pixel_values), dtype=torch.bool, device=post.pixel_values.device)
            patches = self._patches(post.pixel_values, image_mask.bool())
        sequences: dict[str, MaskedSequence] = {}
        for modality in modalities:
            if modality == "text":
                sequences[modality] = self._text(input_ids, text_mask)
            elif modality == "image":
                sequences[modality] = patches
            else:
                name_mask = None if post.name_mask is None else post.name_mask.bool()
                sequences[modality] = self._joint(input_ids, text_mask, post.name_ids, name_mask, patches)[:2]
        return sequences

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class ImnModel(ImnPreTrainedModel):
    """IMN, a retriever: encodes mentions and entities apart and scores every pair by co-attention of their spaces.

    An entity is represented by its prototypes (§3.3), which are chosen beforehand among the features that
    [`~ImnModel.encode_posts`] returns for the posts about it.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/imn-tweets").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/imn-tweets")  # doctest: +SKIP
    >>> mentions = model.encode_mentions(**processor(mentions=mention_rows))  # doctest: +SKIP
    >>> entities = model.encode_entities(**processor(entities=rows_with_prototypes))  # doctest: +SKIP
    >>> model.score(mentions, entities)  # [M, N] # doctest: +SKIP
    ```
    """

    main_input_name = "mention_input_ids"

    def __init__(self, config: ImnConfig):
        super().__init__(config)
        self._build_extractors(config)
        self.mention_encoder = HierarchicalEncoder(
            config, {name: self.widths[name] for name in config.mention_modalities or ()}
        )
        self.entity_encoder = HierarchicalEncoder(
            config, {name: self.widths[name] for name in config.entity_modalities or ()}
        )
        if config.co_attention:
            self.mention_to_entity = CoAttention(config)
            self.entity_to_mention = CoAttention(config)
        self.post_init()
        self.train()  # freezes the extractors

    @property
    def num_prototypes(self) -> int:
        """Maximal number k of prototypes of an entity in one modality."""
        return self.config.num_prototypes

    @torch.no_grad()
    def encode_posts(self, **post_inputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Encodes P posts for the similarity graphs (§3.3): one feature vector per post and modality of the entities.

        Args:
            post_inputs: Fields of [`PostInputs`], with the prefix `post_`.

        Returns:
            `dict` with, for each of `config.entity_modalities`, the mean of the extractor's states [P, d] by the name of
            the modality, zeros if a post lacks it, and `<modality>_present` [P] (bool).
        """
        features: dict[str, torch.Tensor] = {}
        for modality, (states, mask) in self._extract(
            "post", self.config.entity_modalities or (), post_inputs
        ).items():
            features[modality], features[f"{modality}_present"] = masked_mean(states, mask), mask.any(1)
        return features

    @torch.no_grad()
    def mention_features(self, **mention_inputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Returns the states of the frozen extractors for M mentions, for caching.

        Args:
            mention_inputs: Fields of [`PostInputs`], with the prefix `mention_`.

        Returns:
            `dict` with, for each of `config.mention_modalities`, states [M, S, d] by the name of the modality and
            `<modality>_mask` [M, S].
        """
        features: dict[str, torch.Tensor] = {}
        for modality, (states, mask) in self._extract(
            "mention", self.config.mention_modalities or (), mention_inputs
        ).items():
            features |= {modality: states, f"{modality}_mask": mask}
        return features

    def encode_mentions(self, **mention_inputs: torch.Tensor | None) -> ImnEncodings:
        """Encodes M mentions.

        Args:
            mention_inputs: Fields of [`PostInputs`], with the prefix `mention_`. Or, in their place, the cached result of
                [`~ImnModel.mention_features`]: `mention_features_<modality>` [M, S, d] and
                `mention_features_<modality>_mask` [M, S].
        """
        sequences: dict[str, MaskedSequence] = {}
        for modality in self.config.mention_modalities or ():
            states = mention_inputs.get(f"mention_features_{modality}")
            mask = mention_inputs.get(f"mention_features_{modality}_mask")
            if states is not None and mask is not None:
                sequences[modality] = (states, mask.bool())
        if not sequences:
            sequences = self._extract("mention", self.config.mention_modalities or (), mention_inputs)
        aux = self.mention_encoder(sequences)
        if not self.config.co_attention:
            return ImnEncodings(aux=aux)
        return ImnEncodings(aux=aux, query=self.mention_to_entity.query(aux), key=self.entity_to_mention.key(aux))

    def encode_entities(self, **entity_inputs: torch.Tensor | None) -> ImnEncodings:
        """Encodes N entities.

        Args:
            entity_inputs: For each of `config.entity_modalities`, the prototypes `entity_prototypes_<modality>` [N, k, d]
                and `entity_prototypes_<modality>_mask` [N, k].
        """
        sequences: dict[str, MaskedSequence] = {}
        for modality in self.config.entity_modalities or ():
            name = f"entity_prototypes_{modality}"
            prototypes, mask = entity_inputs.get(name), entity_inputs.get(f"{name}_mask")
            if prototypes is None or mask is None:
                raise ValueError(
                    f"{name} or its mask is missing. Pass both, as this model reads {modality} prototypes."
                )
            if prototypes.shape[-1] != self.widths[modality]:
                raise ValueError(
                    f"{name} are {prototypes.shape[-1]} wide, but this model's features are {self.widths[modality]} wide. "
                    "Compute them with encode_posts of this model."
                )
            sequences[modality] = (prototypes, mask.bool())
        aux = self.entity_encoder(sequences)
        if not self.config.co_attention:
            return ImnEncodings(aux=aux)
        return ImnEncodings(aux=aux, query=self.entity_to_mention.query(aux), key=self.mention_to_entity.key(aux))

    def unit_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns an empty `dict`: inference uses the fused space alone (§3.4.3), so the score has one part."""
        return {}

    def space_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """f(aux_m^s, aux_e^s) of every pair, s → [M, N], for the spaces s of `config.spaces`."""
        with torch.autocast(self.device.type, enabled=False):
            a, b = (F.normalize(_to_float32(side["aux"]), dim=-1) for side in (mentions, entities))
            return {space: a[:, space - 1] @ b[:, space - 1].T for space in self.config.spaces or ()}

    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """f(u_m, u_e) [M, N] (eq. 9–12), the cosine in the fused space, in float32 even under autocast."""
        mentions = {name: _to_float32(tensor) for name, tensor in mentions.items()}
        entities = {name: _to_float32(tensor) for name, tensor in entities.items()}
        aux = mentions["aux"]
        if not self.config.co_attention:
            with torch.autocast(aux.device.type, enabled=False):
                return F.normalize(aux.mean(1), dim=-1) @ F.normalize(entities["aux"].mean(1), dim=-1).T
        m_step = _BLOCK_MENTIONS
        n_step = max(1, _BLOCK_ELEMENTS.get(aux.device.type, 2**22) // aux[:1].numel())
        with torch.autocast(aux.device.type, enabled=False):
            rows = []
            for m in range(0, len(aux), m_step):
                block = {name: tensor[m : m + m_step] for name, tensor in mentions.items()}
                columns = [
                    _fused_scores(block, {name: tensor[n : n + n_step] for name, tensor in entities.items()})
                    for n in range(0, len(entities["aux"]), n_step)
                ]
                rows.append(torch.cat(columns, 1))
            return torch.cat(rows)

    def forward(
        self,
        *,
        labels: torch.LongTensor | None = None,
        entity_log_prior: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> ImnOutput:
        """Scores M mentions against N entities and, given labels, computes the loss.

        Args:
            labels (`torch.LongTensor` [M], *optional*): Column of each mention's gold among the N entities. All other
                columns are negatives, so every entity may have one column only.
            entity_log_prior (`torch.Tensor` [N], *optional*): Added to the scores inside the loss, so that the scores need
                not learn which entities are frequent (not in the paper).
            inputs: Arguments of [`~ImnModel.encode_mentions`] and [`~ImnModel.encode_entities`].
        """
        sides: dict[str, dict[str, torch.Tensor | None]] = {"mention": {}, "entity": {}}
        for name, tensor in inputs.items():
            side = name.partition("_")[0]
            if side not in sides:
                raise TypeError(f"{type(self).__name__}.forward has no argument {name!r}.")
            sides[side][name] = tensor
        mentions = self.encode_mentions(**sides["mention"])
        entities = self.encode_entities(**sides["entity"])
        scores = self.score(mentions, entities)
        loss = space_scores = None
        if labels is not None:
            weights = list(self.config.loss_weights or ())
            space_scores = self.space_scores(mentions, entities)
            prior = 0.0 if entity_log_prior is None else entity_log_prior
            loss = weights[3] * self._margin_loss(scores + prior, labels)
            for space, values in space_scores.items():
                loss = loss + weights[space - 1] * self._margin_loss(values + prior, labels)  # eq. 14
        return ImnOutput(loss=loss, scores=scores, unit_scores={}, space_scores=space_scores)

    def _margin_loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Margin loss (eq. 13, corrected): summed over all other entities, averaged over mentions."""
        gold = scores.gather(1, labels.unsqueeze(1))
        columns = torch.arange(scores.shape[1], device=scores.device)
        return (F.relu(self.config.margin - gold + scores) * (columns != labels.unsqueeze(1))).sum(1).mean()


def _to_float32(x: torch.Tensor) -> torch.Tensor:
    """Casts half precision (from autocast, or stored on disk) to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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


__all__ = ["ImnModel", "ImnPreTrainedModel"]
