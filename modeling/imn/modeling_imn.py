"""IMN: Multimodal Knowledge Learning for Named Entity Disambiguation (Zhang et al., Findings of EMNLP 2022).

A mention and an entity are each brought into three auxiliary spaces; co-attention between the spaces of both makes the
pair's fused embeddings, whose cosine is the score. Equation numbers are the paper's. Readings where it is silent,
ambiguous or misprinted:

- m' (§3.4.1): a mention's modality is the whole output sequence of its extractor (text tokens, patch tokens, the joint
  model's states), an entity's are its prototypes, most central first. Both sides have their own encoding network.
- Each modality has its own Dilated CNN and attention pooling (eq. 1–2). The Transformer (eq. 4) reads the outputs of all
  of them in one sequence, as "multimodal embeddings can be fully interacted" says; its states are then taken apart
  again, for pooling and Conv1D per modality, concatenated before eq. 3, 5 and 8. It has no positions of its own.
- Padding takes no part in anything. A modality that an item lacks (a post without an image) counts as zeros where it is
  concatenated. Windows of Conv1D (eq. 6) start at every token and meet zeros beyond the last one.
- Eq. 3, 5, 8: a training batch of one item has no variance, so it is normalised by the running statistics, like all
  items in evaluation.
- Eq. 9 is printed for mention-to-entity; entity-to-mention is the same with the sides exchanged and weights of its own.
  aux · ReLU(…) is the dot product.
- Eq. 11 makes u_m^i, "the representation of the mention", a combination of the *entity's* spaces, and so u_e^j one of the
  mention's. Followed as printed: f(u_m, u_e) compares what each side finds in the other.
- Eq. 13 has the two similarities the wrong way round: minimising it would push f(m, e⁺) below f(m, e⁻). Corrected to
  max(γ − f(m, e⁺) + f(m, e⁻), 0). Its sum is over the other entities of the batch; over mentions it is a mean.
- Table 4's rows without auxiliary spaces drop their losses; the fused space would be empty without the spaces.
- The extractors (§3.3) stay as they are when linking is trained; prototypes are made of them before.
- An entity without posts is the only post about itself: its name, description, attributes and first image.
- The mention embedding (§3.2) is made of the joint model's word embeddings, not of GloVe; images are made square for DETR.
- "Knowledge-guided" negatives are images of entities met in the batch under the same last word (the trainer's grouping).
- How the networks start is not told: at random, or by `encoder_init="aligned"` as one map of both sides.
- The post's own mention enters through the joint model alone (§3.2). Texts with several mentions need it in the text
  too: see the processor's `mention_template`.

What scoring costs: the encoders run once per item, and the cosine of a pair follows from 3 × 3 inner products once the
attention is known. Eq. 9 does not factorise, because of its ReLU: 9 d comparisons and multiplications per pair and
direction (about 1 µs per pair for d = 128 on one busy CPU core), in blocks of pairs, so that memory does not grow. With
ReLU(x + y) = max(x, −y) + y the second term does become a matrix product (where no gradient is asked for).

Pre-training (§3.2, "similar to" FashionBERT, Gao et al., SIGIR 2020) is described at [`ImnForKnowledgePreTraining`].
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_imn import ImnConfig

#: Mentions in a block of pairs, and numbers in their entities' three spaces; bound what the pairs of a block take.
_BLOCK_MENTIONS = 256
_BLOCK_ELEMENTS = {"cpu": 2**16, "cuda": 2**22}
#: Kernel sizes of the Conv1D blocks (eq. 6).
_KERNELS = (2, 3, 4, 5)
#: Parts of a batch, by length, that are padded apart, and from which size on.
_PARTS, _LEAST_PARTED = 4, 32

#: A sequence [B, S, d] and which of its positions there are [B, S].
Sequence = tuple[torch.Tensor, torch.Tensor]


@dataclass
class ImnEncodings(ModelOutput):
    """What scoring needs of B mentions or B entities.

    Args:
        aux (`torch.Tensor` [B, 3, d]): aux^1, aux^2, aux^3 (eq. 3, 5, 8).
        query (`torch.Tensor` [B, 3, d], *optional*): W_c^1 aux (eq. 9), where this side attends to the other.
        key (`torch.Tensor` [B, 3, d], *optional*): W_c^2 aux + b_c (eq. 9), where the other attends to this side.
    """

    aux: torch.Tensor | None = None
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None


@dataclass
class ImnOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` []): eq. 14, given `labels`.
        scores (`torch.Tensor` [M, N]): f(u_m, u_e), higher is better.
        unit_scores (`dict[str, torch.Tensor]`): empty, the score is in one part.
        space_scores (`dict[int, torch.Tensor]`): f in those auxiliary spaces that have a loss, each [M, N]; given `labels`.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    unit_scores: dict[str, torch.Tensor] | None = None
    space_scores: dict[int, torch.Tensor] | None = None


@dataclass
class ImnForKnowledgePreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` []): the adaptive sum of the task losses, given `labels`.
        task_losses (`dict[str, torch.Tensor]`): `language`, `patch`, `matching`, as far as the batch has examples.
        task_weights (`dict[str, torch.Tensor]`): their weights; they sum to 1.
        logits (`torch.Tensor` [P, 2]): of "text and image belong together" and "they do not"; `None` without images.
    """

    loss: torch.Tensor | None = None
    task_losses: dict[str, torch.Tensor] | None = None
    task_weights: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None


def masked_softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis where `mask` is True; zeros elsewhere, and everywhere where it is True nowhere."""
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1) * mask


# Copied from modeling/mimic/scoring_mimic.py
def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [B, L, d] over the L positions where `mask` [B, L] is 1."""
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def _trimmed(states: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> Sequence:
    """Those rows of a sequence, without the columns that are padding in all of them at its end."""
    mask = mask[rows]
    width = max(1, int((mask.any(0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
    return states[rows, :width], mask[:, :width]


def _orthogonal(shape: torch.Size, gain: float = 1.0) -> torch.Tensor:
    """The same matrix for all of one shape."""
    return nn.init.orthogonal_(torch.empty(shape, device="cpu"), gain, generator=torch.Generator().manual_seed(0))


class _AlignedConv1d(nn.Conv1d):
    """Starts as a map of single tokens, which all others of its shape start as: one tap, orthogonal, scaled for the half
    that ReLU takes; the others are zero."""

    def aligned_weight(self) -> torch.Tensor:
        weight = torch.zeros(self.weight.shape, device="cpu")
        weight[:, :, self.kernel_size[0] // 2 if self.padding[0] else 0] = self._tap()
        return weight

    def _tap(self) -> torch.Tensor:
        return _orthogonal(self.weight.shape[:2], 2**0.5)


class _PassingConv1d(_AlignedConv1d):
    """Starts as the identity, which with ReLU passes on what came out of a ReLU."""

    def _tap(self) -> torch.Tensor:
        return torch.eye(len(self.weight), device="cpu")


class _AlignedLinear(nn.Linear):
    """Starts as the orthogonal projection that all others of its shape start as, without a bias."""

    def aligned_weight(self) -> torch.Tensor:
        return _orthogonal(self.weight.shape)


class _FaintLinear(nn.Linear):
    """Starts `scale` times as large as PyTorch's own, without a bias."""

    scale = 0.1


class _SilentLinear(_FaintLinear):
    """Starts as zeros."""

    scale = 0.0


class DilatedCNN(nn.Module):
    """Eq. 1: convolutions of kernel size 3 and growing dilation, each followed by ReLU; as many outputs as inputs."""

    def __init__(self, width: int, config: ImnConfig):
        super().__init__()
        aligned = config.encoder_init == "aligned"
        convolution = _AlignedConv1d if aligned else nn.Conv1d
        self.layers = nn.ModuleList()
        for dilation in config.dilations or ():
            self.layers.append(convolution(width, config.hidden_dim, 3, padding=dilation, dilation=dilation))
            width, convolution = config.hidden_dim, _PassingConv1d if aligned else nn.Conv1d

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, S, width] → g [B, S, h]; zeros where `mask` [B, S] is False."""
        there = mask.unsqueeze(1)
        x = x.transpose(1, 2) * there
        for layer in self.layers:
            x = F.relu(layer(x)) * there
        return x.transpose(1, 2)


class _BatchNorm(nn.BatchNorm1d):
    """Batch norm that takes a training batch of one item by its running statistics."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class HierarchicalEncoder(nn.Module):
    """The hierarchical encoding network of one side (§3.4.1): sequences of its modalities → three auxiliary spaces.

    Args:
        config ([`ImnConfig`]): the model's.
        widths: d of each modality's sequence; in the order in which they are concatenated.
    """

    def __init__(self, config: ImnConfig, widths: Mapping[str, int]):
        super().__init__()
        hidden, aux = config.hidden_dim, config.aux_dim
        aligned = config.encoder_init == "aligned"
        convolution, linear = (_AlignedConv1d, _AlignedLinear) if aligned else (nn.Conv1d, nn.Linear)
        self.cnn = nn.ModuleDict({name: DilatedCNN(width, config) for name, width in widths.items()})
        self.attention = nn.ModuleDict({name: nn.Linear(hidden, 1, bias=False) for name in widths})
        layer = nn.TransformerEncoderLayer(hidden, config.num_heads, 4 * hidden, config.dropout, batch_first=True)
        if aligned:
            layer.linear2 = _SilentLinear(4 * hidden, hidden)
        self.transformer = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.convolutions = nn.ModuleDict(
            {
                name: nn.ModuleList([convolution(hidden, config.conv_dim, kernel) for kernel in _KERNELS])
                for name in widths
            }
        )
        self.dropout = nn.Dropout(config.dropout)
        sizes = (hidden, hidden, len(_KERNELS) * config.conv_dim)
        self.fc = nn.ModuleList([linear(len(widths) * size, aux) for size in sizes])
        self.norm = nn.ModuleList([_BatchNorm(aux) for _ in sizes])

    def forward(self, sequences: Mapping[str, Sequence]) -> torch.Tensor:
        """aux [B, 3, d] of the sequence of each modality."""
        names = list(self.cnn)
        # About equally long ones together: most of a large batch need not be as long as the longest of all.
        length = torch.stack([sequences[name][1].sum(1) for name in names]).sum(0)
        order = length.argsort(descending=True, stable=True)
        parts = order.chunk(_PARTS if len(order) >= _LEAST_PARTED else 1)
        found = [self._levels({name: _trimmed(*sequences[name], part) for name in names}) for part in parts]
        back = order.argsort()
        levels = [torch.cat(level)[back] for level in zip(*found, strict=True)]
        aux = [norm(fc(self.dropout(x))) for x, fc, norm in zip(levels, self.fc, self.norm, strict=True)]
        return torch.stack(aux, 1)  # eq. 3, 5, 8

    def _levels(self, sequences: Mapping[str, Sequence]) -> list[torch.Tensor]:
        """What eq. 3, 5 and 8 map: of each level, its modalities' vectors side by side, [B, n · width]."""
        names = list(self.cnn)
        masks = [sequences[name][1] for name in names]
        locals_ = [self.cnn[name](*sequences[name]) for name in names]  # eq. 1
        first = [
            (masked_softmax(self.attention[name](g).squeeze(-1), mask).unsqueeze(1) @ g).squeeze(1)
            for name, g, mask in zip(names, locals_, masks, strict=True)
        ]  # eq. 2
        everything = torch.cat(masks, 1)
        # An item without a single token attends to its first padding; nothing reads what comes of it.
        blind = ~everything
        blind[:, 0] &= everything.any(1)
        states = self.transformer(torch.cat(locals_, 1), src_key_padding_mask=blind)  # eq. 4
        states = states * everything.unsqueeze(-1)
        parts = states.split([mask.shape[1] for mask in masks], 1)
        second = [masked_mean(t, mask) for t, mask in zip(parts, masks, strict=True)]
        third = [self._max_pooled(name, t, mask) for name, t, mask in zip(names, parts, masks, strict=True)]
        return [torch.cat(level, -1) for level in (first, second, third)]

    def _max_pooled(self, name: str, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """c [B, 4 · conv_dim] of t [B, S, h] (eq. 6–7). ReLU is never below 0, so 0 may stand for padding."""
        t, there = t.transpose(1, 2), mask.unsqueeze(1)
        layers: Any = self.convolutions[name]
        pooled = [
            (F.relu(layer(F.pad(t, (0, kernel - 1)))) * there).amax(-1)
            for kernel, layer in zip(_KERNELS, layers, strict=True)
        ]
        return torch.cat(pooled, -1)


class CoAttention(nn.Module):
    """W_c^1, W_c^2, b_c of one direction of eq. 9."""

    def __init__(self, config: ImnConfig):
        super().__init__()
        linear = _FaintLinear if config.encoder_init == "aligned" else nn.Linear  # faint: nearly even at first
        self.query = linear(config.aux_dim, config.aux_dim, bias=False)
        self.key = linear(config.aux_dim, config.aux_dim)


def _relu_of_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.relu(x + y)


def _attention(aux: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Eq. 9–10 and the mean of eq. 12: how much of each of the other side's three spaces goes into u.

    Args:
        aux, query [a, 3, d]: aux and W_c^1 aux of the side that attends.
        key [b, 3, d]: W_c^2 aux + b_c of the side that it attends to.

    Returns:
        [a, 3, b]: mean over i of β_{i,j}. As u = mean_i Σ_j β_{i,j} aux^j, this is all that eq. 11–12 need of β.
    """
    a, b = len(aux), len(key)
    aux, query, key = aux.flatten(0, 1), query.flatten(0, 1), key.transpose(0, 1).flatten(0, 1)
    # Row by row of one side: one [rows of the other, d] at a time stays in the caches.
    # ReLU(x + y) = max(x, −y) + y is one pass less, but the gradient of max takes eight times as long as ReLU's.
    learns = torch.is_grad_enabled()
    other, of_pair = (key, _relu_of_sum) if learns else (-key, torch.maximum)
    if a <= 2 * b:
        logits = torch.stack([of_pair(q, other) @ x for q, x in zip(query, aux, strict=True)])
    else:
        logits = torch.stack([(of_pair(query, k) * aux).sum(-1) for k in other], 1)
    if not learns:
        logits = logits + aux @ key.T
    return logits.view(a, 3, 3, b).softmax(2).mean(1)


def _fused_scores(mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """f(u_m, u_e) [m, n] of every pair of a block (eq. 9–12)."""
    aux_m, aux_e = mentions["aux"], entities["aux"]
    of_entity = _attention(aux_m, mentions["query"], entities["key"])  # [m, 3, n]; u_m = Σ_j of_entity_j aux_e^j
    of_mention = _attention(aux_e, entities["query"], mentions["key"])
    of_mention = of_mention.permute(2, 1, 0).contiguous()  # [m, 3, n]; u_e = Σ_i of_mention_i aux_m^i
    inner = (aux_m.flatten(0, 1) @ aux_e.transpose(0, 1).flatten(0, 1).T).view(len(aux_m), 3, 3, len(aux_e))
    product = ((inner * of_entity.unsqueeze(1)).sum(2) * of_mention).sum(1)
    gram_m, gram_e = aux_m @ aux_m.transpose(1, 2), aux_e @ aux_e.transpose(1, 2)
    length_m = ((gram_e.permute(1, 2, 0) * of_entity.unsqueeze(1)).sum(2) * of_entity).sum(1)  # |u_m|²
    length_e = ((gram_m @ of_mention) * of_mention).sum(1)  # |u_e|²
    return product * torch.rsqrt((length_m * length_e).clamp(min=1e-12))


class ImnPreTrainedModel(PreTrainedModel):
    """What both IMN models share: configuration, initialisation and the three feature extractors (§3.2–3.3)."""

    config: ImnConfig
    config_class = ImnConfig
    base_model_prefix = "imn"
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer must scale it when accumulating
    _no_split_modules = []
    # The model's own attention is PyTorch's; these flags let an implementation pass through to the backbones.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    #: Submodules that come pretrained; the trainer may give everything else its own learning rate.
    backbone_names = ("text_model", "vision_model", "joint_model")
    #: Submodules that training leaves as they are.
    frozen_names: tuple[str, ...] = ("text_model", "vision_model", "joint_model", "patch_projection")

    def _build_extractors(self, config: ImnConfig) -> None:
        self.widths: dict[str, int] = {}
        names = config.modalities
        if "text" in names:
            self.text_model = _build_backbone(config.text_config, False)
            self.widths["text"] = config.text_config.hidden_size  # type: ignore[union-attr]
        if config.vision_config is not None and {"image", "joint"} & set(names):
            self.vision_model = _build_backbone(config.vision_config, False)
            patch_dim = _last_width(config.vision_config)
            if "image" in names:
                self.widths["image"] = patch_dim
        if "joint" in names:
            self.joint_model = _build_backbone(config.joint_config, False)
            hidden: int = config.joint_config.hidden_size  # type: ignore[union-attr]
            if hasattr(self, "vision_model"):
                self.patch_projection = nn.Linear(patch_dim, hidden)
            self.widths["joint"] = hidden
            self._joint_inputs = set(inspect.signature(self.joint_model.forward).parameters)
            if getattr(config.joint_config, "type_vocab_size", 0) < 2:
                self._joint_inputs -= {"token_type_ids"}

    def train(self, mode: bool = True):
        """As every module's, but what stays as it is stays in evaluation too."""
        super().train(mode)
        for name in self.frozen_names:
            if hasattr(self, name):
                # Here and not only on construction: `from_pretrained` makes new parameters, then sets evaluation.
                getattr(self, name).eval().requires_grad_(False)
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _AlignedConv1d | _AlignedLinear):
            init.copy_(module.weight, module.aligned_weight().to(module.weight))
            init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, _FaintLinear):
            bound = module.scale * module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv1d):  # PyTorch's own start
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
            if self.config.encoder_init == "aligned":  # after its children
                init.zeros_(module.out_proj.weight)
                init.zeros_(module.out_proj.bias)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm1d):
                init.zeros_(module.running_mean)  # type: ignore[arg-type]
                init.ones_(module.running_var)  # type: ignore[arg-type]
                init.zeros_(module.num_batches_tracked)  # type: ignore[arg-type]
        elif isinstance(module, _LanguageHead):
            init.zeros_(module.bias)

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config):
        """A model whose extractors are pretrained; the joint model starts as a copy of the text encoder.

        Args:
            text (`str`, *optional*): Hub id or folder of a BERT-like encoder. Without it, `text_config` describes one that
                starts untrained.
            vision (`str`, *optional*): Hub id or folder of DETR or another image encoder. Without it, and without
                `vision_config`, there are no images.
            config: fields of [`ImnConfig`].

        Raises:
            `ValueError`: nothing to start from, or a text encoder that is none.
        """
        parts: dict[str, Any] = {}
        if text is not None:
            if not hasattr(AutoConfig.from_pretrained(text), "vocab_size"):
                raise ValueError(f"{text} is no text encoder; give the Hub id or folder of a BERT-like one.")
            parts["text_model"] = AutoModel.from_pretrained(text)
            config.setdefault("text_config", _portable_config(parts["text_model"].config))
        elif config.get("text_config") is None and vision is None:
            raise ValueError("from_backbones needs the Hub id or folder of a text encoder, a vision encoder, or both.")
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
                wanted = target.state_dict()
                target.load_state_dict({k: v for k, v in part.state_dict().items() if k in wanted})
        return model

    def _text(self, input_ids: torch.Tensor, mask: torch.Tensor) -> Sequence:
        """States [B, L, d] of the text encoder, zeros where `mask` [B, L] is False."""
        present = mask.any(1)
        out = self._zeros(*input_ids.shape, self.widths["text"])
        if present.any():
            states = self.text_model(input_ids=input_ids[present], attention_mask=mask[present].long())
            out = out.to(states.last_hidden_state.dtype)
            out[present] = states.last_hidden_state
        return out * mask.unsqueeze(-1), mask

    def _patches(self, pixel_values: torch.Tensor | None, image_mask: torch.Tensor) -> Sequence:
        """Patch tokens [B, n, d]: the output sequence of the vision model, zeros where `image_mask` [B] is False. n is 1
        in a batch without images."""
        width = _last_width(self.config.vision_config)
        if not image_mask.any():
            return self._zeros(len(image_mask), 1, width), image_mask.unsqueeze(1)
        if pixel_values is None:
            raise ValueError("This model sees images, and there are some: the pixel_values are missing.")
        patches = self.vision_model(pixel_values=pixel_values[image_mask]).last_hidden_state
        if patches.dim() == 4:  # a CNN's feature map [B, d, h, w]: every cell is a patch
            patches = patches.flatten(2).transpose(1, 2)
        out = patches.new_zeros(len(image_mask), *patches.shape[1:])
        out[image_mask] = patches
        return out, image_mask.unsqueeze(1).expand(-1, patches.shape[1])

    def _joint(self, input_ids, mask, name_ids, name_mask, patches: Sequence | None):
        """The joint model's states (§3.2) of "text tokens, mention embedding, patch tokens".

        The mention embedding is the mean of the word embeddings of the mention's pieces, one token after the text. (The
        paper starts it from GloVe, which has other words than the tokenizer.) Patches are numbered from 0 and of the
        second segment. What there is stands together, padding after it.

        Args:
            input_ids, mask [B, L]; name_ids, name_mask [B, K]: text and mention, or `None` for no mentions.
            patches: tokens [B, n, d] and which there are [B, n], or `None`.

        Returns:
            States [B, S, d], mask [B, S], and the order [B, L + 1 + n] that brought what there is together: position s
            of a row was its `order[s]`-th, text first, then mention, then patches.
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
        states, there, places = torch.cat(embedded, 1), torch.cat(masks, 1), torch.cat(positions, 1)
        segments = (torch.arange(there.shape[1], device=mask.device) > length).long().expand(rows, -1)
        order = (~there).long().argsort(dim=1, stable=True)
        width = max(1, int(there.sum(1).max()))
        kept = order[:, :width]
        there, places, segments = there.gather(1, kept), places.gather(1, kept), segments.gather(1, kept)
        limit = getattr(self.config.joint_config, "max_position_embeddings", None)
        if limit is not None and int((places * there).max()) >= limit:
            raise ValueError(
                f"A text of {length} tokens or an image of {states.shape[1] - length - 1} patches does not fit the {limit} "
                "positions of the joint model; give the processor a smaller max_length."
            )
        states = states.gather(1, kept.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        present = there.any(1)
        out = torch.zeros_like(states)
        if present.any():
            inputs = {"position_ids": (places * there)[present], "token_type_ids": (segments * there)[present]}
            inputs = {name: value for name, value in inputs.items() if name in self._joint_inputs}
            found = self.joint_model(
                inputs_embeds=states[present], attention_mask=there[present].long(), **inputs
            ).last_hidden_state
            out = out.to(found.dtype).index_put((present,), found)
        return out * there.unsqueeze(-1), there, order

    def _features(self, side, modalities, input_ids, mask, name_ids, name_mask, pixel_values, image_mask):
        """The sequence of each modality (§3.3) of B mentions or posts."""
        reads_text = {"text", "joint"} & set(modalities)
        if reads_text and input_ids is None:
            raise ValueError(f"This model reads text: {side}_input_ids is missing.")
        if input_ids is not None:
            mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        patches = None
        if hasattr(self, "vision_model") and {"image", "joint"} & set(modalities):
            if image_mask is None:
                if pixel_values is None:
                    raise ValueError(f"This model sees images: {side}_image_mask is missing.")
                image_mask = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
            patches = self._patches(pixel_values, image_mask.bool())
        found: dict[str, Sequence] = {}
        for modality in modalities:
            if modality == "text":
                found[modality] = self._text(input_ids, mask)
            elif modality == "image":
                found[modality] = patches
            else:
                name_mask = None if name_mask is None else name_mask.bool()
                found[modality] = self._joint(input_ids, mask, name_ids, name_mask, patches)[:2]
        return found

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class ImnModel(ImnPreTrainedModel):
    """IMN, a retriever: mentions and entities are encoded apart, each pair is scored by co-attention of their spaces.

    An entity is its prototypes (§3.3), rows of which are made beforehand of the posts about it, with [`encode_posts`].

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
        self.train()  # fixes the extractors

    @property
    def num_prototypes(self) -> int:
        """k, the most prototypes of an entity in one modality."""
        return self.config.num_prototypes

    @torch.no_grad()
    def encode_posts(
        self,
        post_input_ids: torch.LongTensor | None = None,
        post_attention_mask: torch.Tensor | None = None,
        post_name_ids: torch.LongTensor | None = None,
        post_name_mask: torch.Tensor | None = None,
        post_pixel_values: torch.Tensor | None = None,
        post_image_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The vertices of the similarity graphs (§3.3): one feature vector per post and modality of the entities.

        Args: as those of [`encode_mentions`], of P posts.

        Returns:
            `dict` of, for each of `config.entity_modalities`, a tensor [P, d] named like it, the mean of the extractor's
            states over what is not padding, and `<modality>_present` [P] (bool). Zeros where a post lacks the modality.
        """
        sequences = self._features(
            "post",
            self.config.entity_modalities,
            post_input_ids,
            post_attention_mask,
            post_name_ids,
            post_name_mask,
            post_pixel_values,
            post_image_mask,
        )
        found: dict[str, torch.Tensor] = {}
        for modality, (states, mask) in sequences.items():
            found[modality], found[f"{modality}_present"] = masked_mean(states, mask), mask.any(1)
        return found

    @torch.no_grad()
    def mention_features(self, **mention_inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the extractors, which training leaves as they are, make of M mentions.

        Args: as those of [`encode_mentions`].

        Returns:
            `dict` of, for each of `config.mention_modalities`, states [M, S, d] named like it, and `<modality>_mask` [M, S].
        """
        names = ("input_ids", "attention_mask", "name_ids", "name_mask", "pixel_values", "image_mask")
        inputs = (mention_inputs.get(f"mention_{name}") for name in names)
        found: dict[str, torch.Tensor] = {}
        for modality, (states, mask) in self._features("mention", self.config.mention_modalities, *inputs).items():
            found |= {modality: states, f"{modality}_mask": mask}
        return found

    def encode_mentions(
        self,
        mention_input_ids: torch.LongTensor | None = None,
        mention_attention_mask: torch.Tensor | None = None,
        mention_name_ids: torch.LongTensor | None = None,
        mention_name_mask: torch.Tensor | None = None,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_features_text: torch.Tensor | None = None,
        mention_features_text_mask: torch.Tensor | None = None,
        mention_features_image: torch.Tensor | None = None,
        mention_features_image_mask: torch.Tensor | None = None,
        mention_features_joint: torch.Tensor | None = None,
        mention_features_joint_mask: torch.Tensor | None = None,
    ) -> ImnEncodings:
        """Encodes M mentions.

        Args:
            mention_input_ids, mention_attention_mask ([M, L]): the text; a mask of zeros for none.
            mention_name_ids, mention_name_mask ([M, K], *optional*): the mention's pieces; a mask of zeros for none.
            mention_pixel_values ([M, 3, H, W], *optional*): not needed where no mention has an image.
            mention_image_mask ([M], *optional*): which have one. Default: all.
            mention_features_<modality>, mention_features_<modality>_mask ([M, S, d], [M, S], *optional*): what
                [`~ImnModel.mention_features`] gave, in place of all of the above.
        """
        sequences: dict[str, Sequence] = {}
        given = {
            "text": (mention_features_text, mention_features_text_mask),
            "image": (mention_features_image, mention_features_image_mask),
            "joint": (mention_features_joint, mention_features_joint_mask),
        }
        for modality, (states, states_mask) in given.items():
            if states is not None and states_mask is not None:
                sequences[modality] = (states, states_mask.bool())
        if not sequences:
            sequences = self._features(
                "mention",
                self.config.mention_modalities,
                mention_input_ids,
                mention_attention_mask,
                mention_name_ids,
                mention_name_mask,
                mention_pixel_values,
                mention_image_mask,
            )
        aux = self.mention_encoder(sequences)
        if not self.config.co_attention:
            return ImnEncodings(aux=aux)
        return ImnEncodings(aux=aux, query=self.mention_to_entity.query(aux), key=self.entity_to_mention.key(aux))

    def encode_entities(
        self,
        entity_prototypes_text: torch.Tensor | None = None,
        entity_prototypes_text_mask: torch.Tensor | None = None,
        entity_prototypes_image: torch.Tensor | None = None,
        entity_prototypes_image_mask: torch.Tensor | None = None,
        entity_prototypes_joint: torch.Tensor | None = None,
        entity_prototypes_joint_mask: torch.Tensor | None = None,
    ) -> ImnEncodings:
        """Encodes N entities: of each modality, prototypes [N, k, d] and which there are [N, k]."""
        given = {
            "text": (entity_prototypes_text, entity_prototypes_text_mask),
            "image": (entity_prototypes_image, entity_prototypes_image_mask),
            "joint": (entity_prototypes_joint, entity_prototypes_joint_mask),
        }
        sequences: dict[str, Sequence] = {}
        for modality in self.config.entity_modalities or ():
            prototypes, mask = given[modality]
            if prototypes is None or mask is None:
                raise ValueError(
                    f"This model has entities of {modality} prototypes: entity_prototypes_{modality} or its mask is missing."
                )
            if prototypes.shape[-1] != self.widths[modality]:
                raise ValueError(
                    f"entity_prototypes_{modality} are {prototypes.shape[-1]} wide, this model's extractor makes them "
                    f"{self.widths[modality]}; make them with encode_posts of this model."
                )
            sequences[modality] = (prototypes, mask.bool())
        aux = self.entity_encoder(sequences)
        if not self.config.co_attention:
            return ImnEncodings(aux=aux)
        return ImnEncodings(aux=aux, query=self.entity_to_mention.query(aux), key=self.mention_to_entity.key(aux))

    def unit_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Empty: "we only use the fusion space" (§3.4.3), which is one part."""
        return {}

    def space_scores(
        self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """f(aux_m^s, aux_e^s) of every pair, each [M, N], for the spaces s of `config.spaces`."""
        with torch.autocast(self.device.type, enabled=False):
            a, b = (F.normalize(_full(side["aux"]), dim=-1) for side in (mentions, entities))
            return {space: a[:, space - 1] @ b[:, space - 1].T for space in self.config.spaces or ()}

    def score(self, mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """f(u_m, u_e) [M, N] (eq. 9–12), the cosine in the fused space; float32 even under autocast."""
        mentions = {name: _full(tensor) for name, tensor in mentions.items()}
        entities = {name: _full(tensor) for name, tensor in entities.items()}
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
        mention_input_ids: torch.LongTensor | None = None,
        mention_attention_mask: torch.Tensor | None = None,
        mention_name_ids: torch.LongTensor | None = None,
        mention_name_mask: torch.Tensor | None = None,
        mention_pixel_values: torch.Tensor | None = None,
        mention_image_mask: torch.Tensor | None = None,
        mention_features_text: torch.Tensor | None = None,
        mention_features_text_mask: torch.Tensor | None = None,
        mention_features_image: torch.Tensor | None = None,
        mention_features_image_mask: torch.Tensor | None = None,
        mention_features_joint: torch.Tensor | None = None,
        mention_features_joint_mask: torch.Tensor | None = None,
        entity_prototypes_text: torch.Tensor | None = None,
        entity_prototypes_text_mask: torch.Tensor | None = None,
        entity_prototypes_image: torch.Tensor | None = None,
        entity_prototypes_image_mask: torch.Tensor | None = None,
        entity_prototypes_joint: torch.Tensor | None = None,
        entity_prototypes_joint_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> ImnOutput:
        """
        Args:
            labels (`torch.LongTensor` [M], *optional*): the column of each mention's gold among the N entities.
                Every other column is a negative, so an entity must not stand in two columns.
        """
        mentions = self.encode_mentions(
            mention_input_ids,
            mention_attention_mask,
            mention_name_ids,
            mention_name_mask,
            mention_pixel_values,
            mention_image_mask,
            mention_features_text,
            mention_features_text_mask,
            mention_features_image,
            mention_features_image_mask,
            mention_features_joint,
            mention_features_joint_mask,
        )
        entities = self.encode_entities(
            entity_prototypes_text,
            entity_prototypes_text_mask,
            entity_prototypes_image,
            entity_prototypes_image_mask,
            entity_prototypes_joint,
            entity_prototypes_joint_mask,
        )
        scores = self.score(mentions, entities)
        loss = space_scores = None
        if labels is not None:
            weights = list(self.config.loss_weights or ())
            space_scores = self.space_scores(mentions, entities)
            loss = weights[3] * self._margin_loss(scores, labels)
            for space, values in space_scores.items():
                loss = loss + weights[space - 1] * self._margin_loss(values, labels)  # eq. 14
        return ImnOutput(loss=loss, scores=scores, unit_scores={}, space_scores=space_scores)

    def _margin_loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Eq. 13, corrected: what comes within the margin of the gold, over all other entities; mean over mentions."""
        gold = scores.gather(1, labels.unsqueeze(1))
        columns = torch.arange(scores.shape[1], device=scores.device)
        return (F.relu(self.config.margin - gold + scores) * (columns != labels.unsqueeze(1))).sum(1).mean()


class _LanguageHead(nn.Module):
    """Vocabulary logits of states, by the word embeddings that they were made from."""

    def __init__(self, hidden: int, words: int):
        super().__init__()
        self.fc, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(F.gelu(self.fc(states))), embeddings, self.bias)


class ImnForKnowledgePreTraining(ImnPreTrainedModel):
    """Knowledge-guided pre-training of the joint model (§3.2), with the three losses of FashionBERT.

    Its extractors are those of an [`ImnModel`], by the same names: what it learned loads there. It learns from texts
    whose image is theirs or that of a post about another entity:

    - language: cross entropy of the words that the processor hid, knowledge-guided or at random;
    - patch: hidden patches are zeros; KL(softmax(patch feature) ‖ softmax(prediction)), mean over them. The target is the
      vision model's output;
    - matching: cross entropy of "the image is the text's own", from the first token. Which other image comes in its place
      is a matter of how batches are drawn: knowledge-guided, of a post whose entity shares the mention's surface.

    The sum is adaptive. FashionBERT minimises over the weights, which gives w_i ∝ 1 / (K − |∇l_i|²) for K tasks; its
    published form puts softmax(l)_i for |∇l_i|, which is followed here:

        w_i = (K − softmax(l)_i²)⁻¹ / Σ_j (K − softmax(l)_j²)⁻¹,   loss = Σ_i w_i l_i,

    K the number of tasks that the batch has examples of, and no gradient through w. As published, words and patches are
    predicted in pairs that do not belong together too. A model without images learns from words alone.
    """

    main_input_name = "input_ids"
    frozen_names = ("text_model", "vision_model")

    def __init__(self, config: ImnConfig):
        super().__init__(config)
        if "joint" not in config.modalities:
            raise ValueError(
                "Pre-training is of the joint model, which this configuration lacks; add 'joint' to mention_modalities or "
                "entity_modalities."
            )
        self._build_extractors(config)
        hidden = self.widths["joint"]
        embeddings: Any = self.joint_model.get_input_embeddings()
        self.language_head = _LanguageHead(hidden, embeddings.num_embeddings)
        if hasattr(self, "vision_model"):
            patch_dim = _last_width(config.vision_config)
            self.patch_head = nn.Sequential(
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, patch_dim)
            )
            self.matching_head = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.post_init()
        self.train()  # fixes the other extractors

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        name_ids: torch.LongTensor | None = None,
        name_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        partners: torch.LongTensor | None = None,
        mask_seeds: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        matching_labels: torch.LongTensor | None = None,
    ) -> ImnForKnowledgePreTrainingOutput:
        """
        Args:
            input_ids, attention_mask ([P, L]): the texts, words hidden.
            name_ids, name_mask ([P, K], *optional*): the pieces of their mentions, hidden where they are in the text.
            pixel_values ([P, 3, H, W], *optional*): the images; not needed where no post has one.
            image_mask ([P], *optional*): which posts have one.
            partners ([P], *optional*): the post whose image each text is read with. Default: its own.
            mask_seeds ([P], *optional*): seeds of which patches are hidden. Default: none are.
            labels ([P, L], *optional*): the hidden words; -100 elsewhere.
            matching_labels ([P], *optional*): 0 = the image is the text's own, 1 = another's, -100 = there is none.
        """
        mask = attention_mask.bool()
        name_mask = None if name_mask is None else name_mask.bool()
        patches, hidden_patches = None, None
        if hasattr(self, "vision_model"):
            if image_mask is None:
                image_mask = torch.full_like(mask[:, 0], pixel_values is not None)
            features, there = self._patches(pixel_values, image_mask.bool())
            if partners is not None:
                features, there = features[partners], there[partners]
            hidden_patches = self._hidden_patches(there, mask_seeds)
            patches = (features * ~hidden_patches.unsqueeze(-1), there)
        states, _, order = self._joint(input_ids, mask, name_ids, name_mask, patches)
        logits = None if patches is None else self.matching_head(states[:, 0])
        states = F.pad(states, (0, 0, 0, order.shape[1] - states.shape[1]))
        states = states.gather(1, order.argsort(1).unsqueeze(-1).expand_as(states))  # back to where each came from
        length = input_ids.shape[1]
        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            hidden_words = labels >= 0
            if hidden_words.any():
                embeddings = self.joint_model.get_input_embeddings().weight
                words = self.language_head(states[:, :length][hidden_words], embeddings)
                losses["language"] = F.cross_entropy(words.float(), labels[hidden_words])
            if hidden_patches is not None and hidden_patches.any():
                found = self.patch_head(states[:, length + 1 :][hidden_patches]).float().log_softmax(-1)
                target = features[hidden_patches].float().log_softmax(-1)
                losses["patch"] = F.kl_div(found, target, reduction="batchmean", log_target=True)
        if logits is not None and matching_labels is not None and (matching_labels >= 0).any():
            losses["matching"] = F.cross_entropy(logits.float(), matching_labels, ignore_index=-100)
        loss, weights = None, {}
        if labels is not None:
            loss = states.sum() * 0.0  # a batch may have examples of nothing
            if losses:
                stacked = torch.stack(list(losses.values()))
                adaptive = _adaptive_weights(stacked.detach())
                weights = dict(zip(losses, adaptive, strict=True))
                loss = loss + (adaptive * stacked).sum()
        return ImnForKnowledgePreTrainingOutput(
            loss=loss, task_losses=losses or None, task_weights=weights or None, logits=logits
        )

    def _hidden_patches(self, there: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        """Which patches [P, n] are hidden: each with `config.patch_mask_probability`, by the seed of its example."""
        if seeds is None:
            return torch.zeros_like(there)
        draws = [torch.rand(there.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
        return (torch.stack(draws) < self.config.patch_mask_probability).to(there.device) & there


def _adaptive_weights(losses: torch.Tensor) -> torch.Tensor:
    """Weights [K] of K losses [K]: (K − softmax(l)²)⁻¹, normalised to sum 1."""
    inverse = 1 / (len(losses) - losses.softmax(0).square()) if len(losses) > 1 else torch.ones_like(losses)
    return inverse / inverse.sum()


def _full(x: torch.Tensor) -> torch.Tensor:
    """Half precision (of an autocast, or of a knowledge base on disk) as float32; anything else as it is."""
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


__all__ = ["ImnForKnowledgePreTraining", "ImnModel", "ImnPreTrainedModel"]
