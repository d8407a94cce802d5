"""MM-nel: Multimodal Entity Linking: A New Dataset and A Baseline (Gan et al., MM 2021).

A document's textual mentions are linked together by belief propagation, its visual ones by their images, and a transport
plan between both corrects the scores of each. Equation numbers are the paper's. For its textual half the paper follows Le
and Titov, "Improving Entity Linking by Modeling Latent Relations between Mentions" (ACL 2018, the variant normalised over
mentions), and with it the local model of Ganea and Hofmann, "Deep Joint Entity Disambiguation with Local Neural Attention"
(EMNLP 2017); what is said below to be "theirs" is from these. What the paper leaves open or misprints, and the reading
followed:

Words and entities
- The entity vectors of Ganea and Hofmann, trained on Wikipedia, are not to be had for another knowledge base. Here an
  entity's vector is made of word vectors: the mean over its name through one learned map, plus the mean over description
  and attributes through another, at length 1 as theirs. Both maps start as the identity, so training starts from the sum
  of the means; the same sum is what "fixed embeddings" are where candidates are reduced.
- Word vectors stay as they are unless the configuration says so. An unknown word is left out.

Textual mentions (§4.1)
- Candidates: of the 30 with the highest prior, the 4 highest and of the rest the 3 with the highest e·Σw. (§5.1 says "the
  top 7 with highest prior", against §4.1 and both models.) Equal priors go by e·Σw, equal ones of these by place. In
  training the gold, if it is not among the 7, takes the place of the last. A candidate that is cut ranks after all that
  are not, in the order of the priors: its score is the lowest of those minus 1, minus 2, … So results are end to end.
- Ψ is theirs: a word weighs as much as it agrees (diagonal A) with the candidate it agrees with best; the R best words go
  into a softmax; Ψ = Σ β e·B·w (diagonal B).
- f of eq. 3 is theirs: tanh of a linear map of three means, of the words to the left, of the mention, to the right. "The
  window size of local contexts is 6" is read as its window (theirs is 6), that of Ψ as theirs, 100; half on either side.
- R_k and D_k are diagonal, as theirs ("the diagonal matrix representing relations"), drawn from N(0, 0.1²).
- Eq. 1 sums over ordered pairs, so a pair's potential is Φ(e_i, e_j) + Φ(e_j, e_i); α_ijk and α_jik differ.
- The condition under the sum of eq. 4, "j ≠ i", is read j' ≠ i. There is no padding mention, which theirs adds.
- Eq. 1 is approximated as theirs: max-product loopy belief propagation in log space, T rounds, damped. Messages start
  uniform. What comes out, as a probability, and log p̂(e|m) go through two layers to ρ of eq. 6.
- Eq. 6: e is the gold, ê another candidate; the sum of eq. 5 leaves the gold out, for which h would be γ.

Visual mentions (§4.2)
- Positional encodings are learned. With an image encoder, its last feature map is averaged to 8 × 8 pieces.
- S^v is the cosine similarity, higher is better. Eq. 8 is the mean over all negatives that have an image, for mentions
  whose gold has one.
- A candidate without an image has similarity -1. A visual mention without an image says nothing: all its scores are 0.

Joint disambiguation (§4.3)
- c(a, b) is 1 - cosine, the cost between nodes of graph optimal transport (Chen et al., ICML 2020), which the paper
  follows; x is f of a textual mention, y the embedding of a visual one, each with mass 1/n and 1/m.
- Eq. 9 prints ‖c₁ - c₂‖; here it is squared, which lets the sum over four indices factorise.
- Eq. 9 and 10 share one plan, as there: it minimises (1 - a)·Σ T c(x, y) + a·eq. 9 + β·H(T), a being `gw_weight`, by
  projected gradients: the gradient at the plan is the cost of a Sinkhorn problem, whose solution is the next plan. The
  start is the product of both distributions. The third term of eq. 11 is that cost without H.
- A plan that does not converge within its limits is not used, neither in the loss nor for scores, and there is a warning.
- Algorithm 1 is read from its description: for each visual mention, the textual mention that costs least (the most of
  the plan's mass) adds its weighted score for the same entity, and the other way round, both at once. As the two
  matrices have no common unit, what is added is scaled: from 0 for a mention's worst candidate, or an entity that is no
  candidate of it, to 1 for its best; times the receiving mention's own spread. Candidates without an image are 0 in what
  images say, and do not count in their spread. Losses are those of uncorrected scores.

Training documents are without their NIL mentions, which have no gold to learn from; those that are linked have them.

Losses are printed as sums over a document. Here each is a mean over mentions (eq. 5: of the sum over candidates) or
documents (eq. 9), so that the learning rate does not depend on the batch.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_mm_nel import MmNelConfig
from .processing_mm_nel import glove_vectors

#: Numbers in the pairwise potentials of the documents that go through belief propagation together.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
#: Images that are encoded together, on a CPU and on a GPU.
_BLOCK_IMAGES = (64, 512)
_SIDE = 8  # an image is cut into 8 × 8 pieces
_NEVER = -1e9  # log of a mass that is 0, without the nan that infinities leave in gradients


@dataclass
class MmNelOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` []): eq. 11, given `labels`.
        scores (`torch.Tensor` [M, C]): higher is better; -inf where there is no candidate.
        losses (`dict[str, torch.Tensor]`): "ranking", "triplet" and "transport", the terms of eq. 11, given `labels`.
        plan (`torch.Tensor` [M, M]): with `joint="transport"`, mass from textual (rows) to visual mentions (columns), a
            total of 1 in each document whose plan converged; 0 elsewhere.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    plan: torch.Tensor | None = None


class WordMap(nn.Linear):
    """A map of word vectors that starts as the identity."""


class EntityVectors(nn.Module):
    """Entity vectors from the mean word vectors of name and of facts."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        self.name_map = WordMap(config.word_dim, config.word_dim)
        self.fact_map = WordMap(config.word_dim, config.word_dim, bias=False)

    def forward(self, names: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """[E, w] of means [E, w]."""
        return _unit(self.name_map(names) + self.fact_map(facts))


class LocalAttention(nn.Module):
    """Ψ: attention over the words that some candidate agrees with most (Ganea & Hofmann 2017)."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        self.kept = config.attention_words
        self.attention = nn.Parameter(torch.ones(config.word_dim))  # A
        self.score = nn.Parameter(torch.ones(config.word_dim))  # B

    def forward(self, entities, mask, words, word_mask) -> torch.Tensor:
        """Ψ [M, S] of candidates [M, S, w] (`mask` [M, S]) and context words [M, L, w] (`word_mask` [M, L])."""
        lowest = torch.finfo(words.dtype).min
        agreement = (entities * self.attention) @ words.transpose(1, 2)  # [M, S, L]
        best = agreement.masked_fill(~mask.unsqueeze(-1), lowest).amax(1).masked_fill(~word_mask, lowest)
        best, kept = best.topk(min(self.kept, best.shape[1]), dim=1)
        weights = _masked_softmax(best, word_mask.gather(1, kept))  # β [M, R]
        found = words.gather(1, kept.unsqueeze(-1).expand(-1, -1, words.shape[-1]))
        return ((entities * self.score) @ found.transpose(1, 2) @ weights.unsqueeze(-1)).squeeze(-1)


class Relations(nn.Module):
    """K latent relations between mentions: eq. 2–4."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        self.entity = nn.Parameter(torch.empty(config.num_relations, config.word_dim))  # R_k
        self.mention = nn.Parameter(torch.empty(config.num_relations, config.hidden_size))  # D_k

    def weights(self, mentions: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """α [G, K, n, n] (eq. 3–4) of mention embeddings [G, n, d], of which those where `there` [G, n] are real."""
        d = mentions.shape[-1]
        logits = (mentions.unsqueeze(1) * self.mention.unsqueeze(1)) @ mentions.transpose(1, 2).unsqueeze(1) / d**0.5
        return _masked_softmax(logits, _others(there).unsqueeze(1))

    def forward(self, entities: torch.Tensor, mentions: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Φ(e_i, e_j) + Φ(e_j, e_i), [G, n, n, S, S], of candidates [G, n, S, w] (eq. 2)."""
        alpha = self.weights(mentions, there)
        alpha = alpha + alpha.transpose(2, 3)  # R_k is diagonal, so e_i·R_k·e_j is e_j·R_k·e_i
        _, n, s, _ = entities.shape
        flat = entities.flatten(1, 2)
        total = None
        for k, relation in enumerate(self.entity):  # one after the other: n²·S² numbers are enough at a time
            scores = ((flat * relation) @ flat.transpose(1, 2)).view(-1, n, s, n, s).transpose(2, 3)
            scores = scores * alpha[:, k, :, :, None, None]
            total = scores if total is None else total + scores
        return cast(torch.Tensor, total)


class ImageLayer(nn.Module):
    """A layer of eq. 7."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.image_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        o = self.norm1(x + self.dropout(self.output(attended.transpose(1, 2).flatten(2))))
        return self.norm2(o + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(o))))))


class ImageEncoder(nn.Module):
    """A Transformer over the pieces of an image, and their mean (§4.2)."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        dim = config.hidden_size
        if config.vision_config is None:
            size = cast(int, config.image_size) // _SIDE
            self.pieces: nn.Module = nn.Conv2d(3, dim, size, stride=size)
        else:
            self.pieces = nn.Conv2d(_last_width(config.vision_config), dim, 1)
        self.position = nn.Embedding(_SIDE * _SIDE, dim)
        self.layers = nn.ModuleList(ImageLayer(config) for _ in range(config.num_image_layers))
        self.dropout = nn.Dropout(config.image_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """m^v [I, d] of images or feature maps [I, channels, ·, ·]."""
        x = self.pieces(x).flatten(2).transpose(1, 2)
        x = self.dropout(x + self.position.weight)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class MmNelPreTrainedModel(PreTrainedModel):
    """Configuration, weight initialisation, and what the image encoder supports."""

    config: MmNelConfig
    config_class = MmNelConfig
    base_model_prefix = "mm_nel"
    main_input_name = "pair_word_ids"
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer must scale it when accumulating
    _no_split_modules = []
    # The model's own attention is over 64 pieces; these flags let an implementation pass through to the image encoder.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WordMap):
            init.eye_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):  # PyTorch's own start
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1 if module is getattr(self, "word_embeddings", None) else 0.02)
        elif isinstance(module, LocalAttention):
            init.ones_(module.attention)
            init.ones_(module.score)
        elif isinstance(module, Relations):
            init.normal_(module.entity, std=0.1)
            init.normal_(module.mention, std=0.1)


class MmNelModel(MmNelPreTrainedModel):
    """MM-nel, a reranker that reads all mentions of a document together.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/mm-nel-flags").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/mm-nel-flags")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows), …])).scores  # [M, C] # doctest: +SKIP
    ```
    """

    #: Submodules that come pretrained; the trainer may give everything else its own learning rate.
    backbone_names = ("word_embeddings", "vision_model")
    example_unit = "document"
    pairs_are_independent = False

    def __init__(self, config: MmNelConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.word_dim)
        self.entity_vectors = EntityVectors(config)
        self.local = LocalAttention(config)
        self.mention_map = nn.Linear(3 * config.word_dim, config.hidden_size)  # f of eq. 3
        if config.num_relations:
            self.relations = Relations(config)
        self.score_fc1 = nn.Linear(2, config.score_hidden_size)
        self.score_fc2 = nn.Linear(config.score_hidden_size, 1)
        self.dropout = nn.Dropout(config.dropout)
        if config.sees_images:
            if config.vision_config is not None:
                self.vision_model = _build_vision(config.vision_config)
            self.image_encoder = ImageEncoder(config)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> MmNelModel:
        """As of any module; word vectors and image encoder that are fixed stay so."""
        super().train(mode)
        # Here and not only on construction: `from_pretrained` makes new parameters, then sets evaluation.
        self.word_embeddings.requires_grad_(self.config.train_words)
        if hasattr(self, "vision_model") and not self.config.train_vision:
            self.vision_model.eval().requires_grad_(False)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> MmNelModel:
        """A model with pretrained word vectors, and an image encoder if it is given.

        Args:
            text (`str`): A file of word vectors in GloVe's format, or the Hub id or folder of a transformers model, whose
                table of input embeddings is taken.
            vision (`str`, *optional*): Hub id or folder of an image encoder, or of a CLIP model, whose image half is
                taken. Without it, the pieces of an image are its pixels.
            config: fields of [`MmNelConfig`].
        """
        if text is None:
            raise ValueError("from_backbones needs word vectors: a file in GloVe's format or a transformers model.")
        if Path(text).is_file():
            table = glove_vectors(text)
        else:
            table = AutoModel.from_pretrained(text).get_input_embeddings().weight.detach()
        config |= {"vocab_size": table.shape[0], "word_dim": table.shape[1]}
        vision_model = None
        if vision is not None:
            vision_model = AutoModel.from_pretrained(vision)
            vision_model = getattr(vision_model, "vision_model", vision_model)
            encoder = vision_model.config.to_dict()
            encoder.pop("_name_or_path", None)  # may be a path of this machine, and the weights travel with us
            config.setdefault("vision_config", encoder)
        model = cls(MmNelConfig(**config))
        model.word_embeddings.load_state_dict({"weight": table})
        if vision_model is not None:
            wanted = model.vision_model.state_dict()
            model.vision_model.load_state_dict({k: v for k, v in vision_model.state_dict().items() if k in wanted})
        return model

    @property
    def image_features_are_fixed(self) -> bool:
        """Whether training leaves `encode_images` as it is: it does not."""
        return False

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """m^v [I, d] (eq. 7) of I images [I, 3, H, W]."""
        if not hasattr(self, "image_encoder"):
            raise ValueError("This model sees no images; its configuration has neither image_size nor vision_config.")
        if not hasattr(self, "vision_model"):
            size = self.config.image_size
            if pixel_values.shape[-2:] != (size, size):
                raise ValueError(
                    f"Images of {pixel_values.shape[-2]} × {pixel_values.shape[-1]} pixels do not fit "
                    f"image_size={size}; set the processor's size, or image_size, accordingly."
                )
            return self.image_encoder(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vision):
            states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        if states.dim() == 3:  # of a transformer: tokens that are no patches come first
            side = int(states.shape[1] ** 0.5)
            states = states[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return self.image_encoder(F.adaptive_avg_pool2d(states, _SIDE))

    def forward(
        self,
        pair_mask: torch.Tensor,
        pair_context: torch.Tensor,
        pair_entity: torch.Tensor,
        pair_word_ids: torch.Tensor,
        pair_span: torch.Tensor,
        pair_name_ids: torch.Tensor,
        pair_fact_ids: torch.Tensor,
        pair_prior: torch.Tensor | None = None,
        pair_visual: torch.Tensor | None = None,
        pair_mention_image: torch.Tensor | None = None,
        pair_entity_image: torch.Tensor | None = None,
        pair_pixel_values: torch.Tensor | None = None,
        pair_image_features: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> MmNelOutput:
        """
        Args:
            pair_mask ([M, C]): False where a mention has no C-th candidate.
            pair_context ([M]): equal for the mentions of one document, which need not be neighbours.
            pair_entity ([M, C]): which of E entities; -1 for none.
            pair_word_ids ([M, L]): words left of a mention, its own, those to its right; -1 after the last.
            pair_span ([M, 2]): where among them its own begin and end.
            pair_name_ids, pair_fact_ids ([E, ·]): words of the entities; -1 after the last.
            pair_prior ([M, C], *optional*): p̂(e|m); without it 0.
            pair_visual ([M], *optional*): True for a visual mention; without it all are textual.
            pair_mention_image, pair_entity_image ([M], [M, C], *optional*): which of I images; -1 for none.
            pair_pixel_values ([I, 3, H, W], *optional*): these images, or
            pair_image_features ([I, d], *optional*): what `encode_images` gave.
            labels ([M], *optional*): the column of each mention's gold, -100 for a mention to leave out of the loss.
        """
        mask = pair_mask.bool()
        m, c = mask.shape
        visual = torch.zeros_like(mask[:, 0]) if pair_visual is None else pair_visual.bool()
        if labels is not None:
            _check_labels(labels, mask)
        dtype = self.score_fc2.weight.dtype
        scores = torch.full((m, c), -torch.inf, dtype=dtype, device=mask.device)
        losses = {} if labels is None else {"ranking": self._nothing(), "triplet": self._nothing()}
        plan = None

        rows = (~visual & mask.any(1)).nonzero()[:, 0]
        text: _Side | None = None
        if len(rows):
            prior = torch.zeros_like(scores) if pair_prior is None else pair_prior.masked_fill(~mask, 0.0)
            gold = None if labels is None else labels[rows]
            with torch.autocast(mask.device.type, enabled=False):  # half precision has too few digits to rank by
                text, cut = self._text(
                    mask[rows], pair_context[rows], pair_entity[rows], pair_word_ids[rows], pair_span[rows],
                    pair_name_ids, pair_fact_ids, prior[rows], gold,
                )  # fmt: skip
            if gold is not None:
                losses["ranking"] = self._ranking_loss(text, gold)

        seen = (visual & mask.any(1)).nonzero()[:, 0]
        images: _Side | None = None
        if len(seen):
            images = self._visual(
                mask[seen], pair_entity[seen],
                None if pair_mention_image is None else pair_mention_image[seen],
                None if pair_entity_image is None else pair_entity_image[seen],
                pair_pixel_values, pair_image_features,
            )  # fmt: skip
            if labels is not None:
                losses["triplet"] = self._triplet_loss(images, labels[seen])

        if self.config.joint == "transport":
            plan = scores.new_zeros(m, m)
            if labels is not None:
                losses["transport"] = self._nothing()
            if text is not None and images is not None:
                with torch.autocast(mask.device.type, enabled=False):
                    found, cost = self._transport(text, images, pair_context[rows], pair_context[seen])
                    self._correct(text, images, found)
                plan[rows.unsqueeze(1), seen] = found.to(dtype)
                if labels is not None and cost is not None:
                    losses["transport"] = self.config.transport_weight * cost

        if text is not None:
            whole = scores.new_full((len(rows), c), -torch.inf).scatter(
                1, text.columns, text.scores.masked_fill(~text.mask, -torch.inf).to(dtype)
            )
            lowest = text.scores.masked_fill(~text.mask, torch.inf).amin(1, keepdim=True)
            scores = scores.index_put((rows,), torch.where(cut > 0, (lowest - cut).to(dtype), whole))
        if images is not None:
            scores = scores.index_put((seen,), images.scores.masked_fill(~images.mask, -torch.inf).to(dtype))
        loss = None if labels is None else sum(losses.values(), self._nothing())
        return MmNelOutput(loss=loss, scores=scores, losses=losses or None, plan=plan)

    def _nothing(self) -> torch.Tensor:
        """A loss of 0 that gradients can be taken of."""
        return self.score_fc2.weight.sum() * 0.0

    # ---- textual mentions (§4.1)

    def _text(
        self, mask, context, entity, word_ids, span, name_ids, fact_ids, prior, gold
    ) -> tuple[_Side, torch.Tensor]:
        """Scores of T textual mentions; and, for candidates that were cut, their place after the others from 1, else 0."""
        vectors = self.word_embeddings
        names, facts = _mean_words(vectors, name_ids), _mean_words(vectors, fact_ids)
        place = torch.arange(word_ids.shape[1], device=mask.device)
        start, stop = span[:, :1], span[:, 1:]
        known = word_ids >= 0
        own = (place >= start) & (place < stop)
        around = known if self.config.mention_in_context else known & ~own

        similarity = _mean_words(vectors, word_ids, around, mean=False) @ _unit(names + facts).T  # e·Σw
        similarity = similarity.gather(1, entity.clamp(min=0)).float()
        columns, cut = self._selected(mask, prior.float(), similarity, gold)
        chosen, entity = mask.gather(1, columns) & (cut.gather(1, columns) == 0), entity.gather(1, columns)
        candidates = self.entity_vectors(names, facts)[entity.clamp(min=0)]  # [T, S, w]

        words = vectors(word_ids.clamp(min=0))
        psi = self.local(candidates, chosen, words, around)
        half = self.config.relation_window // 2
        sides = ((place < start) & (place >= start - half), own, (place >= stop) & (place < stop + half) & known)
        means = [_mean_words(vectors, word_ids, side & known) for side in sides]
        mentions = self.dropout(torch.tanh(self.mention_map(torch.cat(means, -1))))  # f of eq. 3

        belief = self._beliefs(context, candidates, mentions, psi, chosen)
        log_prior = prior.gather(1, columns).to(belief.dtype).clamp(min=self.config.min_prior).log()
        hidden = F.relu(self.score_fc1(torch.stack([belief, log_prior], -1)))
        rho = self.score_fc2(self.dropout(hidden)).squeeze(-1)
        return _Side(rho, chosen, entity, mentions, torch.ones_like(chosen[:, 0]), columns), cut

    def _selected(self, mask, prior, similarity, gold) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns [T, S] of the candidates to link among, others after them; and the order of those cut, from 1 [T, C]."""
        config = self.config
        lowest = -torch.inf
        by_similarity = similarity.masked_fill(~mask, lowest).argsort(dim=1, descending=True, stable=True)
        order = prior.gather(1, by_similarity).masked_fill(~mask.gather(1, by_similarity), lowest)
        by_prior = by_similarity.gather(1, order.argsort(dim=1, descending=True, stable=True))
        rank = by_prior.argsort(1)  # place of each candidate by prior, then by similarity
        first = mask & (rank < config.prior_candidates)
        pool = mask & (rank < config.num_candidates) & ~first
        near = similarity.masked_fill(~pool, lowest).gather(1, by_prior).argsort(dim=1, descending=True, stable=True)
        near = by_prior.gather(1, near).argsort(1)  # place in the pool by similarity, then by prior
        chosen = first | (pool & (near < config.context_candidates))
        if gold is not None and self.training:
            found = chosen.gather(1, gold.clamp(min=0).unsqueeze(1)).squeeze(1)
            missing = ((gold >= 0) & ~found).nonzero()[:, 0]
            last = torch.where(first, rank, config.prior_candidates + near).masked_fill(~chosen, -1).argmax(1)
            chosen[missing, last[missing]] = False
            chosen[missing, gold[missing]] = True
        left = mask & ~chosen
        after = rank.masked_fill(~left, mask.shape[1]).argsort(1).argsort(1) + 1
        width = max(1, int(chosen.sum(1).max()))
        columns = chosen.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        return columns, after.masked_fill(~left, 0)

    def _beliefs(self, context, candidates, mentions, psi, mask) -> torch.Tensor:
        """Approximate max-marginals of eq. 1 as probabilities [T, S]; the local model's alone without relations."""
        if not hasattr(self, "relations"):
            return _masked_softmax(psi, mask)
        beliefs = torch.zeros_like(psi)
        table = _by_document(context)
        counts = (table >= 0).sum(1)
        order = counts.argsort()
        budget = _BLOCK_ELEMENTS.get(psi.device.type, 2**24)
        sizes = (counts[order] * psi.shape[1]).square().tolist()
        begin = 0
        while begin < len(order):  # documents of like size together, as many as fit
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * sizes[end] <= budget:
                end += 1
            block = table[order[begin:end]]
            block = block[:, : int(counts[order[end - 1]])]
            there, index = block >= 0, block.clamp(min=0)
            pairs = self.relations(candidates[index], mentions[index], there)
            found = max_product(
                psi[index],
                pairs,
                mask[index] & there.unsqueeze(-1),
                self.config.lbp_iterations,
                self.config.lbp_damping,
            )
            beliefs = beliefs.index_put((block[there],), _masked_softmax(found, mask[index])[there])
            begin = end
        return beliefs

    def _ranking_loss(self, text: _Side, gold: torch.Tensor) -> torch.Tensor:
        """Eq. 5–6, a mean over mentions."""
        positive = text.mask & (text.columns == gold.unsqueeze(1))
        usable = positive.any(1)
        golds = text.scores.masked_fill(~positive, 0.0).sum(1, keepdim=True)
        hinge = F.relu(self.config.gamma - golds + text.scores)
        return hinge.masked_fill(~(text.mask & ~positive & usable.unsqueeze(1)), 0.0).sum() / usable.sum().clamp(min=1)

    # ---- visual mentions (§4.2)

    def _visual(self, mask, entity, mention_image, entity_image, pixel_values, features) -> _Side:
        """Scores of V visual mentions, S^v."""
        if not hasattr(self, "image_encoder"):
            raise ValueError(
                "The batch has visual mentions, and this model sees no images; give it image_size or a vision_config."
            )
        if mention_image is None or entity_image is None:
            raise ValueError(
                "The batch has visual mentions: pair_mention_image and pair_entity_image are "
                "missing. The processor makes them with use_images=True."
            )
        wanted = int(torch.cat([mention_image, entity_image[mask]]).max()) + 1
        if features is None and pixel_values is None:
            if wanted:
                raise ValueError("Visual mentions need pair_pixel_values or pair_image_features.")
            features = self.score_fc2.weight.new_zeros(1, self.config.hidden_size)
        if features is None:
            size = _BLOCK_IMAGES[pixel_values.device.type == "cuda"]
            features = torch.cat([self.encode_images(part) for part in pixel_values.split(size)])
        with torch.autocast(mask.device.type, enabled=False):
            features = features.to(self.score_fc2.weight.dtype)
            unit = _unit(features)
            mention, candidate = unit[mention_image.clamp(min=0)], unit[entity_image.clamp(min=0)]
            similarity = (candidate @ mention.unsqueeze(-1)).squeeze(-1)
            there = (mention_image >= 0).unsqueeze(1)
            shown = mask & (entity_image >= 0) & there
            similarity = torch.where(shown, similarity, torch.where(there, -1.0, 0.0).to(similarity.dtype))
        columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return _Side(similarity, mask, entity, features[mention_image.clamp(min=0)], there[:, 0], columns, shown)

    def _triplet_loss(self, images: _Side, gold: torch.Tensor) -> torch.Tensor:
        """Eq. 8, a mean over negatives, then over mentions."""
        shown = cast(torch.Tensor, images.shown)
        positive = shown & (images.columns == gold.unsqueeze(1))
        negative = shown & ~positive & positive.any(1, keepdim=True)
        golds = images.scores.masked_fill(~positive, 0.0).sum(1, keepdim=True)
        hinge = F.relu(self.config.margin - golds + images.scores).masked_fill(~negative, 0.0)
        usable = negative.any(1)
        return (hinge.sum(1) / negative.sum(1).clamp(min=1)).sum() / usable.sum().clamp(min=1)

    # ---- joint disambiguation (§4.3)

    def _transport(self, text, images, of_text, of_images) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The plan [T, V], 0 between documents and where it did not converge; and the mean cost over documents."""
        plan = images.scores.new_zeros(len(of_text), len(of_images))
        both = of_text[torch.isin(of_text, of_images[images.there])].unique()
        if not len(both):
            return plan, None
        rows, columns = (
            _by_document(of, both, keep) for of, keep in ((of_text, text.there), (of_images, images.there))
        )
        wide = torch.float32 if plan.device.type == "mps" else torch.float64  # or the tolerance is out of reach
        there, seen = rows >= 0, columns >= 0
        x, y = _unit(text.vectors.to(wide)[rows.clamp(min=0)]), _unit(images.vectors.to(wide)[columns.clamp(min=0)])
        costs = 1 - x @ y.transpose(1, 2), 1 - x @ x.transpose(1, 2), 1 - y @ y.transpose(1, 2)
        p, q = (mask.to(wide) / mask.sum(1, keepdim=True) for mask in (there, seen))
        config = self.config
        limits = (config.gw_iterations, config.sinkhorn_iterations, config.transport_tolerance)
        solve = pot_plan if config.transport_backend == "pot" else transport_plan
        plans, residual = solve(*costs, p, q, config.beta, config.gw_weight, *limits)
        converged = residual <= config.transport_tolerance
        if not converged.all():
            warnings.warn(
                f"The transport plan of {int((~converged).sum())} of {len(both)} documents did not converge (residual up "
                f"to {residual.max().item():.2g}, tolerance {config.transport_tolerance:g}) and is not used. Raise "
                "sinkhorn_iterations or gw_iterations, or beta.",
                RuntimeWarning,
                stacklevel=2,
            )
        if not converged.any():
            return plan, None
        cost = transport_cost(*costs, plans, p, q, config.gw_weight)[converged].mean()
        cells = there.unsqueeze(2) & seen.unsqueeze(1) & converged[:, None, None]
        d, i, j = cells.nonzero(as_tuple=True)
        plan[rows[d, i], columns[d, j]] = plans.detach()[d, i, j].to(plan.dtype)
        return plan, cost.to(plan.dtype)

    def _correct(self, text: _Side, images: _Side, plan: torch.Tensor) -> None:
        """Algorithm 1: adds to the scores of each side what the mentions it is matched with say."""
        opinions = [_scaled(side) for side in (text, images)]
        for side, other, said, mass in ((text, images, opinions[1], plan), (images, text, opinions[0], plan.T)):
            count = min(mass.shape[1], self.config.transport_matches or mass.shape[1])
            mass, matched = mass.topk(count, dim=1)
            share = mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
            added = torch.zeros_like(side.scores)
            for k in range(count):  # [·, S, S'] at a time, not times the mentions that are matched
                if not mass[:, k].any():
                    break
                same = side.entities.unsqueeze(2) == other.entities[matched[:, k]].unsqueeze(1)
                opinion = said[matched[:, k]] * other.mask[matched[:, k]]
                heard = share[:, k : k + 1] * (same.to(opinion.dtype) @ opinion.unsqueeze(-1)).squeeze(-1)
                added = added + torch.where(mass[:, k : k + 1] > 0, heard, 0.0)  # or nan would spread by a mass of 0
            spread = _spread(side)
            unit = torch.where(spread > 0, spread, 1.0)
            side.scores = side.scores + self.config.correction_weight * unit * added.to(side.scores.dtype)


@dataclass
class _Side:
    """R mentions of one modality with S candidates each: scores, which are real, their entities, the mentions' embeddings
    and which of these say something, the candidates' columns in the batch, and which pairs have both images."""

    scores: torch.Tensor
    mask: torch.Tensor
    entities: torch.Tensor
    vectors: torch.Tensor
    there: torch.Tensor
    columns: torch.Tensor
    shown: torch.Tensor | None = None


def max_product(
    local: torch.Tensor, pairs: torch.Tensor, mask: torch.Tensor, iterations: int, damping: float
) -> torch.Tensor:
    """Loopy max-product belief propagation in log space (Ganea & Hofmann 2017), exact on trees without damping.

    Args:
        local (`torch.Tensor` [G, n, S]): Ψ.
        pairs (`torch.Tensor` [G, n, n, S, S]): potential of the pair (i, j), candidates of i first; symmetric.
        mask (`torch.Tensor` [G, n, S]): which candidates are real. A mention without any says nothing.
        iterations (`int`): Rounds of messages between all pairs.
        damping (`float`): Share of the new message.

    Returns:
        `torch.Tensor` [G, n, S]: log of the max-marginals, up to a constant for each mention; 0 where masked.
    """
    there = mask.any(-1)
    talk = _others(there).unsqueeze(-1)  # [G, n, n, 1], from i to j
    heard = talk & mask.unsqueeze(1)  # [G, n, n, S], about the candidates of j
    silent, unreal = ~heard, ~mask.unsqueeze(2)
    log_uniform = -mask.sum(-1).clamp(min=1).to(local.dtype).log()
    messages = log_uniform[:, None, :, None].expand(heard.shape).masked_fill(silent, 0.0)
    local = local.masked_fill(~mask, 0.0)
    lowest = torch.finfo(local.dtype).min / 4
    for _ in range(iterations):
        belief = (local + messages.sum(1)).unsqueeze(2) - messages.transpose(1, 2)  # of i without what j said
        belief = belief.masked_fill(unreal, lowest)
        new = (belief.unsqueeze(-1) + pairs).max(3).values  # max keeps indices for the gradient, not the sums
        new = new.masked_fill(silent, lowest).log_softmax(-1).masked_fill(silent, 0.0)
        if damping < 1:
            mixed = torch.logaddexp(math.log(damping) + new, math.log(1 - damping) + messages)
            new = mixed.masked_fill(silent, 0.0)
        messages = new
    return local + messages.sum(1)


def sinkhorn(
    cost: torch.Tensor,
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    beta: float,
    iterations: int,
    tolerance: float,
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eq. 10 for G documents at once, in log space; one that has converged stays as it is.

    Args:
        cost (`torch.Tensor` [G, n, m]): c.
        log_p, log_q (`torch.Tensor` [G, n], [G, m]): log of the distributions; very low where there is no mention.
        beta (`float`): β.
        iterations (`int`), tolerance (`float`): until the margins are no further off, at most so often.
        start (`torch.Tensor` [G, m], *optional*): the potential of the columns to start from.

    Returns:
        the plan [G, n, m], the potential of its columns [G, m], and how far its margins are off [G].
    """
    kernel = -cost / beta
    kernel = kernel + torch.where(log_p > _NEVER, 0.0, _NEVER).unsqueeze(2)
    kernel = kernel + torch.where(log_q > _NEVER, 0.0, _NEVER).unsqueeze(1)
    f, g = torch.zeros_like(log_p), torch.zeros_like(log_q) if start is None else start
    rows = (kernel + g.unsqueeze(1)).logsumexp(2)
    off = torch.full_like(log_p[:, 0], torch.inf)
    for _ in range(iterations):
        going = off > tolerance  # not of nan, which no iteration mends
        if not going.any():
            break
        new_f = log_p - rows
        new_g = log_q - (kernel + new_f.unsqueeze(2)).logsumexp(1)
        new_rows = (kernel + new_g.unsqueeze(1)).logsumexp(2)
        # The columns are met exactly; only the rows can be off.
        new_off = ((new_f + new_rows).exp() - log_p.exp()).abs().sum(1).detach()
        column = going.unsqueeze(1)
        f, g = torch.where(column, new_f, f), torch.where(column, new_g, g)
        rows, off = torch.where(column, new_rows, rows), torch.where(going, new_off, off)
    return (kernel + f.unsqueeze(2) + g.unsqueeze(1)).exp(), g, off


def transport_plan(
    cross: torch.Tensor,
    within: torch.Tensor,
    within_other: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    beta: float,
    gw_weight: float,
    gw_iterations: int,
    sinkhorn_iterations: int,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plan of eq. 9 and 10 together, for G documents at once, with gradients through all iterations.

    Args:
        cross, within, within_other (`torch.Tensor` [G, n, m], [G, n, n], [G, m, m]): c(x, y), c(x, x'), c(y, y').
        p, q (`torch.Tensor` [G, n], [G, m]): distributions; 0 where there is no mention.
        beta, gw_weight (`float`): β, and the share of eq. 9.
        gw_iterations, sinkhorn_iterations (`int`), tolerance (`float`): limits.

    Returns:
        the plan [G, n, m], and how far it is from converged [G]: the greater of what its margins are off and of its
        last change, each a sum of absolute differences.
    """
    log_p, log_q = (torch.where(x > 0, x, 1.0).log().masked_fill(x <= 0, _NEVER) for x in (p, q))
    plan = p.unsqueeze(2) * q.unsqueeze(1)
    constant = _constant(within, within_other, p, q)
    potential = None
    residual = torch.full_like(p[:, 0], torch.inf)
    for _ in range(gw_iterations):
        going = residual > tolerance
        if not going.any():
            break
        gradient = constant - 2 * within @ plan @ within_other
        cost = (1 - gw_weight) * cross + 2 * gw_weight * gradient
        # Tighter than asked for, or what is left over would look like a change of the plan.
        new, g, off = sinkhorn(cost, log_p, log_q, beta, sinkhorn_iterations, tolerance / 10, potential)
        potential = g if potential is None else torch.where(going.unsqueeze(1), g, potential)
        change = torch.maximum((new - plan).abs().sum((1, 2)), off).detach()
        residual = torch.where(going, change, residual)
        plan = torch.where(going[:, None, None], new, plan)
    return plan, residual


def pot_plan(
    cross, within, within_other, p, q, beta, gw_weight, gw_iterations, sinkhorn_iterations, tolerance
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`transport_plan`] by the POT library, one document after the other, without gradients.

    Raises:
        ImportError: POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            'transport_backend="pot" needs POT; run pip install "hf_mel[ot]" or pip install pot.'
        ) from error
    plan, residual = torch.zeros_like(cross), torch.zeros_like(p[:, 0])
    for k in range(len(cross)):
        i, j = p[k] > 0, q[k] > 0
        c, c1, c2 = cross[k][i][:, j], within[k][i][:, i], within_other[k][j][:, j]
        c, c1, c2, a, b = (x.detach().cpu().double().numpy() for x in (c, c1, c2, p[k][i], q[k][j]))
        options = {"symmetric": True, "numItermax": sinkhorn_iterations, "stopThr": tolerance / 10, "warn": False}
        problem = (c, c1, c2, a, b, "square_loss", beta)
        solve = ot.gromov.entropic_fused_gromov_wasserstein
        found = solve(*problem, alpha=gw_weight, max_iter=gw_iterations, tol=tolerance, **options)
        again = solve(*problem, alpha=gw_weight, max_iter=1, G0=found, **options)  # for it tells its error not always
        plan[k][i.unsqueeze(1) & j] = torch.from_numpy(found).to(plan).flatten()
        off = (abs(found.sum(1) - a).sum(), abs(found.sum(0) - b).sum(), abs(again - found).sum())
        residual[k] = float(sum(off)) if any(map(math.isnan, off)) else float(max(off))
    return plan, residual


def transport_cost(cross, within, within_other, plan, p, q, gw_weight: float) -> torch.Tensor:
    """Cost [G] of a plan: its share of eq. 9, and the rest of the sum of eq. 10 without its entropy."""
    pairs = _constant(within, within_other, p, q) - 2 * within @ plan @ within_other
    return (plan * ((1 - gw_weight) * cross + gw_weight * pairs)).sum((1, 2))


def _constant(within, within_other, p, q) -> torch.Tensor:
    """What of Σ T_i'j' (c₁ - c₂)² [G, n, m] does not depend on the plan, but on its margins."""
    return (within.square() @ p.unsqueeze(2)) + (within_other.square() @ q.unsqueeze(2)).transpose(1, 2)


def _scaled(side: _Side) -> torch.Tensor:
    """Scores from 0, a mention's worst candidate, to 1, its best [R, S]; 0 if all are equal, or without an image."""
    lowest = side.scores.masked_fill(~_compared(side), torch.inf).amin(1, keepdim=True)
    spread = _spread(side)
    return ((side.scores - lowest) / torch.where(spread > 0, spread, 1.0)).clamp(min=0)


def _spread(side: _Side) -> torch.Tensor:
    """The best score of each mention minus the worst [R, 1]."""
    best = side.scores.masked_fill(~_compared(side), -torch.inf).amax(1, keepdim=True)
    return best - side.scores.masked_fill(~_compared(side), torch.inf).amin(1, keepdim=True)


def _compared(side: _Side) -> torch.Tensor:
    """The candidates whose scores say how alike they are: an image that is missing is no measure of others."""
    return side.mask if side.shown is None else side.shown


def _by_document(
    context: torch.Tensor, documents: torch.Tensor | None = None, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Places in `context` [R] of each document's rows, [D, n], -1 after the last.

    Args:
        context: the document of each row.
        documents ([D], *optional*): sorted; which ones. Default: all.
        keep ([R], *optional*): rows to leave out are False.
    """
    documents = context.unique() if documents is None else documents
    wanted = torch.isin(context, documents)
    rows = (wanted if keep is None else wanted & keep).nonzero()[:, 0]
    number = torch.searchsorted(documents, context[rows])
    order = number.argsort(stable=True)
    rows, number = rows[order], number[order]
    counts = number.bincount(minlength=len(documents))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[number]
    table = rows.new_full((len(documents), int(counts.max()) if len(counts) else 0), -1)
    table[number, place] = rows
    return table


def _others(there: torch.Tensor) -> torch.Tensor:
    """[G, n, n]: whether i and j are two mentions that are there [G, n]."""
    n = there.shape[1]
    return there.unsqueeze(2) & there.unsqueeze(1) & ~torch.eye(n, dtype=torch.bool, device=there.device)


def _mean_words(table: nn.Embedding, ids: torch.Tensor, mask: torch.Tensor | None = None, mean: bool = True):
    """Mean, or sum, of the word vectors [R, w] of `ids` [R, L] where `mask` is True (default: where one is); 0 of none."""
    mask = ids >= 0 if mask is None else mask
    weights = mask.to(table.weight.dtype)
    if mean:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return F.embedding_bag(ids.clamp(min=0), table.weight, per_sample_weights=weights, mode="sum")


def _unit(x: torch.Tensor) -> torch.Tensor:
    """`x` at length 1; zeros stay zeros."""
    return F.normalize(x, dim=-1, eps=1e-6)


# Copied from modeling/mmel/modeling_mmel.py
def _masked_softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. A row without any is zeros."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


def _check_labels(labels: torch.Tensor, mask: torch.Tensor) -> None:
    rows = (labels >= 0).nonzero()[:, 0]
    if (labels[rows] >= mask.shape[1]).any() or not mask[rows, labels[rows]].all():
        raise ValueError("A label names a column without a candidate; give -100 for a mention without a gold.")


# Copied from modeling/pfmel/modeling_pfmel.py
def _build_vision(config) -> PreTrainedModel:
    """Builds an untrained image encoder, without a pooling layer where that is optional."""
    try:  # most ViT checkpoints have no pooler, and the feature used is the first token
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # the encoder has no argument `add_pooling_layer`
        return AutoModel.from_config(config)


# Copied from modeling/mimic/modeling_mimic.py
def _last_width(config) -> int:
    """Returns the width of an image encoder's last layer: `hidden_sizes[-1]` of a CNN, `hidden_size` of a ViT."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else config.hidden_size


__all__ = ["MmNelModel", "MmNelPreTrainedModel"]
