"""Pre-training of IMN's joint model (§3.2), with the three losses of FashionBERT (Gao et al., SIGIR 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_imn import ImnConfig
from .modeling_imn import ImnPreTrainedModel


@dataclass
class ImnForKnowledgePreTrainingOutput(ModelOutput):
    """Output of [`ImnForKnowledgePreTraining`].

    Args:
        loss (`torch.Tensor` [], *optional*): Adaptive sum of the task losses. Returned if `labels` are given.
        task_losses (`dict[str, torch.Tensor]`, *optional*): Losses of those of the tasks `language`, `patch` and
            `matching` that the batch has examples of.
        task_weights (`dict[str, torch.Tensor]`, *optional*): Weights of these tasks, which sum to 1.
        logits (`torch.Tensor` [P, 2], *optional*): Logits of "text and image belong together" and "they do not". `None`
            for a model without images.
    """

    loss: torch.Tensor | None = None
    task_losses: dict[str, torch.Tensor] | None = None
    task_weights: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None


class _LanguageHead(nn.Module):
    """Predicts words from states; the output layer is tied to the word embeddings."""

    def __init__(self, hidden: int, words: int):
        super().__init__()
        self.fc, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] from states [n, h] and word embeddings [V, h]."""
        return F.linear(self.norm(F.gelu(self.fc(states))), embeddings, self.bias)


class ImnForKnowledgePreTraining(ImnPreTrainedModel):
    """Knowledge-guided pre-training of the joint model (§3.2).

    The extractors have the names that they have in [`ImnModel`], so that a checkpoint loads there. The input is texts,
    each with its own image or with that of a post about another entity. The tasks are:

    - language: cross entropy of the words that the processor masked, knowledge-guided or at random.
    - patch: masked patches are zeros; KL(softmax(patch feature) ‖ softmax(prediction)), averaged over them. The target is
      the output of the frozen vision model.
    - matching: cross entropy of "the image belongs to the text", predicted from the first token. The batch determines
      the other image; a knowledge-guided one is of a post about another entity with the mention's surface.

    The loss is an adaptive sum. FashionBERT minimises over the weights, which gives w_i ∝ 1 / (K − |∇l_i|²) for K tasks,
    and approximates |∇l_i| by softmax(l)_i. So does this class:

        w_i = (K − softmax(l)_i²)⁻¹ / Σ_j (K − softmax(l)_j²)⁻¹,   loss = Σ_i w_i l_i,

    where K is the number of tasks that the batch has examples of, and the weights get no gradient. As in FashionBERT,
    words and patches are also predicted for pairs that do not belong together. A model without images learns from words
    alone.
    """

    main_input_name = "input_ids"
    frozen_names = ("text_model", "vision_model")

    def __init__(self, config: ImnConfig):
        super().__init__(config)
        if "joint" not in config.modalities:
            raise ValueError(
                "The configuration has no joint model, which pre-training trains. Add 'joint' to mention_modalities or "
                "entity_modalities."
            )
        self._build_extractors(config)
        hidden = self.widths["joint"]
        embeddings: Any = self.joint_model.get_input_embeddings()
        self.language_head = _LanguageHead(hidden, embeddings.num_embeddings)
        if hasattr(self, "vision_model"):
            self.patch_head = nn.Sequential(
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, self.patch_width)
            )
            self.matching_head = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))
        self.post_init()
        self.train()  # freezes the other extractors

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _LanguageHead):
            init.zeros_(module.bias)

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
        """Predicts masked words, masked patches and matching for P posts.

        Args:
            input_ids, attention_mask (`torch.Tensor` [P, L]): The texts, with masked words.
            name_ids, name_mask (`torch.Tensor` [P, K], *optional*): The pieces of their mentions, masked where they are
                masked in the text.
            pixel_values (`torch.Tensor` [P, 3, H, W], *optional*): The images. Not needed if no post has one.
            image_mask (`torch.Tensor` [P], *optional*): True where a post has an image. Default: all or, without
                `pixel_values`, none.
            partners (`torch.LongTensor` [P], *optional*): Index of the post whose image each text is paired with.
                Default: the text's own.
            mask_seeds (`torch.LongTensor` [P], *optional*): Seeds that determine the masked patches. Default: none are
                masked.
            labels (`torch.LongTensor` [P, L], *optional*): The masked words; -100 elsewhere.
            matching_labels (`torch.LongTensor` [P], *optional*): 0 if the image is the text's own, 1 if it is another
                post's, -100 if text or image is missing.
        """
        text_mask = attention_mask.bool()
        name_mask = None if name_mask is None else name_mask.bool()
        patches, masked_patches = None, None
        if hasattr(self, "vision_model"):
            if image_mask is None:
                image_mask = torch.full_like(text_mask[:, 0], pixel_values is not None)
            features, patch_mask = self._patches(pixel_values, image_mask.bool())
            if partners is not None:
                features, patch_mask = features[partners], patch_mask[partners]
            masked_patches = self._draw_masked_patches(patch_mask, mask_seeds)
            patches = (features * ~masked_patches.unsqueeze(-1), patch_mask)
        states, _, order = self._joint(input_ids, text_mask, name_ids, name_mask, patches)
        logits = None if patches is None else self.matching_head(states[:, 0])
        # Undo the move of padding to the end, so that states align with `input_ids` and `features`.
        states = F.pad(states, (0, 0, 0, order.shape[1] - states.shape[1]))
        states = states.gather(1, order.argsort(1).unsqueeze(-1).expand_as(states))
        length = input_ids.shape[1]
        losses: dict[str, torch.Tensor] = {}
        if labels is not None:
            masked_words = labels >= 0
            if masked_words.any():
                embeddings = self.joint_model.get_input_embeddings().weight
                words = self.language_head(states[:, :length][masked_words], embeddings)
                losses["language"] = F.cross_entropy(words.float(), labels[masked_words])
            if masked_patches is not None and masked_patches.any():
                prediction = self.patch_head(states[:, length + 1 :][masked_patches]).float().log_softmax(-1)
                target = features[masked_patches].float().log_softmax(-1)
                losses["patch"] = F.kl_div(prediction, target, reduction="batchmean", log_target=True)
        if logits is not None and matching_labels is not None and (matching_labels >= 0).any():
            losses["matching"] = F.cross_entropy(logits.float(), matching_labels, ignore_index=-100)
        loss, weights = None, {}
        if labels is not None:
            loss = states.sum() * 0.0  # keeps the graph if the batch has examples of no task
            if losses:
                stacked = torch.stack(list(losses.values()))
                adaptive = _adaptive_weights(stacked.detach())
                weights = dict(zip(losses, adaptive, strict=True))
                loss = loss + (adaptive * stacked).sum()
        return ImnForKnowledgePreTrainingOutput(
            loss=loss, task_losses=losses or None, task_weights=weights or None, logits=logits
        )

    def _draw_masked_patches(self, patch_mask: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        """Masks each patch [P, n] with `config.patch_mask_probability`, by the seed of its post."""
        if seeds is None:
            return torch.zeros_like(patch_mask)
        draws = [
            torch.rand(patch_mask.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()
        ]
        return (torch.stack(draws) < self.config.patch_mask_probability).to(patch_mask.device) & patch_mask


def _adaptive_weights(losses: torch.Tensor) -> torch.Tensor:
    """Weights [K] of K losses [K]: (K − softmax(l)²)⁻¹, normalised to sum 1."""
    inverse = 1 / (len(losses) - losses.softmax(0).square()) if len(losses) > 1 else torch.ones_like(losses)
    return inverse / inverse.sum()


__all__ = ["ImnForKnowledgePreTraining"]
