"""MM-nel, a reranker that links all mentions of a document together (Gan et al., MM 2021).

Belief propagation links the textual mentions, image similarity links the visual mentions, and a transport plan between
both corrects the scores of each. Equation numbers are the paper's. `README.md` in this folder describes where the
paper is open or misprinted, and how this code reads it.
"""

from __future__ import annotations

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
from .glove_mm_nel import glove_vectors
from .transport_mm_nel import distinct_pairs, max_product, transport_cost, transport_plan

#: Maximum number of pairwise potentials in one block of belief propagation, by device type.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
#: Number of images to encode at once, on a CPU and on a GPU.
_BLOCK_IMAGES = (64, 512)
#: An image is cut into this many pieces in height and in width.
_PIECES_PER_SIDE = 8


@dataclass
class MmNelOutput(ModelOutput):
    """Output of [`MmNelModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): Eq. 11, if `labels` are given.
        scores (`torch.Tensor` [M, C]): Higher is better; -inf where a mention has no candidate.
        losses (`dict[str, torch.Tensor]`): The terms of eq. 11, "ranking", "triplet" and "transport", if `labels` are
            given.
        plan (`torch.Tensor` [M, M]): With `joint="transport"`, the mass from textual mentions (rows) to visual
            mentions (columns). It sums to 1 in each document whose plan converged, and is 0 elsewhere.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    plan: torch.Tensor | None = None


@dataclass
class ModalityBatch:
    """The R mentions of one modality in a batch, with S candidates each.

    Args:
        scores (`torch.Tensor` [R, S]): Scores of the candidates.
        mask (`torch.Tensor` [R, S]): True for real candidates.
        entities (`torch.Tensor` [R, S]): The candidates' numbers among the entities of the batch.
        embeddings (`torch.Tensor` [R, d]): Embeddings of the mentions.
        has_embedding (`torch.Tensor` [R]): False for a visual mention without an image.
        columns (`torch.Tensor` [R, S]): The candidates' columns in the batch.
        image_mask (`torch.Tensor` [R, S], *optional*): For visual mentions, True where mention and candidate both have
            an image.
    """

    scores: torch.Tensor
    mask: torch.Tensor
    entities: torch.Tensor
    embeddings: torch.Tensor
    has_embedding: torch.Tensor
    columns: torch.Tensor
    image_mask: torch.Tensor | None = None

    @property
    def compared(self) -> torch.Tensor:
        """Mask [R, S] of the candidates whose score is comparable; the score of a missing image is not."""
        return self.mask if self.image_mask is None else self.image_mask

    def spread(self) -> torch.Tensor:
        """Returns the best score of each mention minus its worst, [R, 1]."""
        best = self.scores.masked_fill(~self.compared, -torch.inf).amax(1, keepdim=True)
        return best - self.scores.masked_fill(~self.compared, torch.inf).amin(1, keepdim=True)

    def scaled_scores(self) -> torch.Tensor:
        """Returns scores [R, S] from 0, a mention's worst candidate, to 1, its best; 0 if all its scores are equal."""
        lowest = self.scores.masked_fill(~self.compared, torch.inf).amin(1, keepdim=True)
        spread = self.spread()
        return ((self.scores - lowest) / torch.where(spread > 0, spread, 1.0)).clamp(min=0)


class WordMap(nn.Linear):
    """Linear map of word vectors that is initialised as the identity."""


class EntityVectors(nn.Module):
    """Entity vectors, made of the mean word vectors of an entity's name and of its facts."""

    def __init__(self, config):
        super().__init__()
        self.name_map = WordMap(config.word_dim, config.word_dim)
        self.fact_map = WordMap(config.word_dim, config.word_dim, bias=False)

    def forward(self, names: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """Returns unit vectors [E, w] of entities, from the mean word vectors of their names and facts, both [E, w]."""
        return _unit(self.name_map(names) + self.fact_map(facts))


class LocalAttention(nn.Module):
    """Local score Ψ: attention over the context words that agree most with a candidate (Ganea & Hofmann, 2017)."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        self.num_words, self.scale = config.attention_words, config.local_scale  # R and the start of A and B
        self.attention = nn.Parameter(torch.full((config.word_dim,), float(self.scale)))  # A
        self.score = nn.Parameter(torch.full((config.word_dim,), float(self.scale)))  # B

    def forward(self, entities, mask, words, word_mask) -> torch.Tensor:
        """Scores candidates by the context of their mention.

        Args:
            entities (`torch.Tensor` [M, S, w]): Vectors of the candidates.
            mask (`torch.Tensor` [M, S]): True for real candidates.
            words (`torch.Tensor` [M, L, w]): Vectors of the context words.
            word_mask (`torch.Tensor` [M, L]): True for real words.

        Returns:
            `torch.Tensor` [M, S]: Ψ.
        """
        lowest = torch.finfo(words.dtype).min
        agreement = (entities * self.attention) @ words.transpose(1, 2)  # [M, S, L]
        best = agreement.masked_fill(~mask.unsqueeze(-1), lowest).amax(1).masked_fill(~word_mask, lowest)
        best, places = best.topk(min(self.num_words, best.shape[1]), dim=1)
        weights = _softmax_or_zeros(best, word_mask.gather(1, places))  # β [M, R]
        kept_words = words.gather(1, places.unsqueeze(-1).expand(-1, -1, words.shape[-1]))
        return ((entities * self.score) @ kept_words.transpose(1, 2) @ weights.unsqueeze(-1)).squeeze(-1)


class Relations(nn.Module):
    """K latent relations between mentions (eq. 2-4)."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        self.entity = nn.Parameter(torch.empty(config.num_relations, config.word_dim))  # R_k
        if not config.uniform_relations:
            self.mention = nn.Parameter(torch.empty(config.num_relations, config.hidden_size))  # D_k

    def weights(self, mentions: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Returns α [G, K, n, n] of eq. 3-4, from mention embeddings [G, n, d] and their mask `present` [G, n]."""
        if not hasattr(self, "mention"):  # Ganea & Hofmann, 2017
            pairs = distinct_pairs(present).to(mentions.dtype)
            alpha = pairs / pairs.sum(-1, keepdim=True).clamp(min=1)
            return alpha.unsqueeze(1).expand(-1, len(self.entity), -1, -1)
        d = mentions.shape[-1]
        logits = (mentions.unsqueeze(1) * self.mention.unsqueeze(1)) @ mentions.transpose(1, 2).unsqueeze(1) / d**0.5
        return _softmax_or_zeros(logits, distinct_pairs(present).unsqueeze(1))

    def forward(self, entities: torch.Tensor, mentions: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Returns the pairwise potentials Φ(e_i, e_j) + Φ(e_j, e_i), [G, n, n, S, S] (eq. 2).

        Args:
            entities (`torch.Tensor` [G, n, S, w]): Vectors of the candidates.
            mentions (`torch.Tensor` [G, n, d]): Embeddings of the mentions.
            present (`torch.Tensor` [G, n]): True for real mentions.
        """
        alpha = self.weights(mentions, present)
        alpha = alpha + alpha.transpose(2, 3)  # R_k is diagonal, so e_i·R_k·e_j equals e_j·R_k·e_i
        _, n, s, _ = entities.shape
        flat = entities.flatten(1, 2)
        total = None
        # One relation at a time, to hold n²·S² numbers and not K times as many.
        for k, relation in enumerate(self.entity):
            scores = ((flat * relation) @ flat.transpose(1, 2)).view(-1, n, s, n, s).transpose(2, 3)
            scores = scores * alpha[:, k, :, :, None, None]
            total = scores if total is None else total + scores
        return cast(torch.Tensor, total)


class ImageLayer(nn.Module):
    """Transformer layer of eq. 7."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, config.intermediate_size), nn.Linear(config.intermediate_size, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.image_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p if self.training else 0.0)
        o = self.norm1(x + self.dropout(self.output(attended.transpose(1, 2).flatten(2))))
        return self.norm2(o + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(o))))))


class ImageEncoder(nn.Module):
    """Transformer over the pieces of an image, followed by their mean (§4.2, eq. 7)."""

    def __init__(self, config: MmNelConfig):
        super().__init__()
        dim = config.hidden_size
        if config.vision_config is None:
            size = cast(int, config.image_size) // _PIECES_PER_SIDE
            self.pieces: nn.Module = nn.Conv2d(3, dim, size, stride=size)
        else:
            self.pieces = nn.Conv2d(_last_width(config.vision_config), dim, 1)
        self.position = nn.Embedding(_PIECES_PER_SIDE**2, dim)
        self.layers = nn.ModuleList(ImageLayer(config) for _ in range(config.num_image_layers))
        self.dropout = nn.Dropout(config.image_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns embeddings m^v [I, d] of I images or feature maps [I, channels, height, width]."""
        x = self.pieces(x).flatten(2).transpose(1, 2)
        x = self.dropout(x + self.position.weight)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class MmNelPreTrainedModel(PreTrainedModel):
    """Base class of MM-nel: configuration, weight initialisation and supported attention implementations."""

    config: MmNelConfig
    config_class = MmNelConfig
    base_model_prefix = "mm_nel"
    main_input_name = "pair_word_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []
    # For the image encoder. The attention of this model is over 64 pieces only and has one implementation.
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
        elif isinstance(module, (nn.Linear, nn.Conv2d)):  # PyTorch's default initialisation
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
            init.constant_(module.attention, module.scale)
            init.constant_(module.score, module.scale)
        elif isinstance(module, Relations):
            init.normal_(module.entity, std=0.1)
            if hasattr(module, "mention"):
                init.normal_(module.mention, std=0.1)


class MmNelModel(MmNelPreTrainedModel):
    """MM-nel as a reranker that reads all mentions of a document together.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("hf-mel/mm-nel-flags").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("hf-mel/mm-nel-flags")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows), …])).scores  # [M, C] # doctest: +SKIP
    ```
    """

    #: Pretrained submodules. The trainer can give all other parameters another learning rate.
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
                self.vision_model = _build_backbone(config.vision_config, False)
            self.image_encoder = ImageEncoder(config)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> MmNelModel:
        """Sets the training mode, except for frozen word vectors and a frozen image encoder."""
        super().train(mode)
        # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
        self.word_embeddings.requires_grad_(self.config.train_words)
        if hasattr(self, "vision_model") and not self.config.train_vision:
            self.vision_model.eval().requires_grad_(False)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, vision: str | None = None, **config) -> MmNelModel:
        """Builds a model with pretrained word vectors and, optionally, a pretrained image encoder.

        Args:
            text (`str`): Path of a file of word vectors in GloVe's format, or Hub id or folder of a transformers
                model, whose input embeddings become the word vectors.
            vision (`str`, *optional*): Hub id or folder of an image encoder or of a CLIP model, whose image encoder is
                used. Without it, the pieces of an image are its pixels.
            config: Fields of [`MmNelConfig`].
        """
        if text is None:
            raise ValueError(
                "from_backbones needs word vectors. Give a file in GloVe's format or a transformers model."
            )
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
            encoder.pop("_name_or_path", None)  # may be a local path; the weights are saved with this model
            config.setdefault("vision_config", encoder)
        model = cls(MmNelConfig(**config))
        model.word_embeddings.load_state_dict({"weight": table})
        if vision_model is not None:
            names = model.vision_model.state_dict()
            model.vision_model.load_state_dict({k: v for k, v in vision_model.state_dict().items() if k in names})
        return model

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns embeddings m^v [I, d] (eq. 7) of I images [I, 3, H, W]."""
        if not hasattr(self, "image_encoder"):
            raise ValueError("This model sees no images. Give its configuration an image_size or a vision_config.")
        if not hasattr(self, "vision_model"):
            size = self.config.image_size
            if pixel_values.shape[-2:] != (size, size):
                raise ValueError(
                    f"Images of {pixel_values.shape[-2]} × {pixel_values.shape[-1]} pixels do not fit "
                    f"image_size={size}. Set the size of the image processor, or image_size, accordingly."
                )
            return self.image_encoder(pixel_values)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vision):
            states = self.vision_model(pixel_values=pixel_values).last_hidden_state
        if states.dim() == 3:  # a Transformer, whose first tokens are no patches
            height = int(states.shape[1] ** 0.5)
            states = states[:, -height * height :].transpose(1, 2).unflatten(2, (height, height))
        return self.image_encoder(F.adaptive_avg_pool2d(states, _PIECES_PER_SIDE))

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
        """Scores the candidates of M mentions.

        Args:
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_context (`torch.Tensor` [M]): Number of each mention's document. Mentions of a document can be in any
                rows.
            pair_entity (`torch.Tensor` [M, C]): Number of each candidate among E entities; -1 for padding.
            pair_word_ids (`torch.Tensor` [M, L]): Words to the left of the mention, words of the mention and words to
                its right; then padding of -1.
            pair_span (`torch.Tensor` [M, 2]): Start and end of the mention in `pair_word_ids`.
            pair_name_ids, pair_fact_ids (`torch.Tensor` [E, ·]): Words of the entities, padded with -1.
            pair_prior (`torch.Tensor` [M, C], *optional*): p̂(e|m). The default is 0.
            pair_visual (`torch.Tensor` [M], *optional*): True for visual mentions. By default all mentions are
                textual.
            pair_mention_image, pair_entity_image (`torch.Tensor` [M] and [M, C], *optional*): Number among I images;
                -1 for a missing image.
            pair_pixel_values (`torch.Tensor` [I, 3, H, W], *optional*): The images.
            pair_image_features (`torch.Tensor` [I, d], *optional*): Outputs of `encode_images`, instead of the images.
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the
                loss.

        Raises:
            ValueError: A label names a padding column, or a visual mention comes without images or to a model that
                sees none.
        """
        mask = pair_mask.bool()
        m, c = mask.shape
        visual = torch.zeros_like(mask[:, 0]) if pair_visual is None else pair_visual.bool()
        if labels is not None:
            _check_labels(labels, mask)
        dtype = self.score_fc2.weight.dtype
        scores = torch.full((m, c), -torch.inf, dtype=dtype, device=mask.device)
        losses = {} if labels is None else {"ranking": self._zero_loss(), "triplet": self._zero_loss()}
        plan = None

        text_rows = (~visual & mask.any(1)).nonzero()[:, 0]
        text: ModalityBatch | None = None
        if len(text_rows):
            prior = torch.zeros_like(scores) if pair_prior is None else pair_prior.masked_fill(~mask, 0.0)
            gold = None if labels is None else labels[text_rows]
            with torch.autocast(mask.device.type, enabled=False):  # half precision is too coarse to rank candidates
                text, cut_rank = self._score_text(
                    mask[text_rows], pair_context[text_rows], pair_entity[text_rows], pair_word_ids[text_rows],
                    pair_span[text_rows], pair_name_ids, pair_fact_ids, prior[text_rows], gold,
                )  # fmt: skip
            if gold is not None:
                losses["ranking"] = self._ranking_loss(text, gold)

        image_rows = (visual & mask.any(1)).nonzero()[:, 0]
        images: ModalityBatch | None = None
        if len(image_rows):
            images = self._score_images(
                mask[image_rows], pair_entity[image_rows],
                None if pair_mention_image is None else pair_mention_image[image_rows],
                None if pair_entity_image is None else pair_entity_image[image_rows],
                pair_pixel_values, pair_image_features,
            )  # fmt: skip
            if labels is not None:
                losses["triplet"] = self._triplet_loss(images, labels[image_rows])

        if self.config.joint == "transport":
            plan = scores.new_zeros(m, m)
            if labels is not None:
                losses["transport"] = self._zero_loss()
            if text is not None and images is not None:
                with torch.autocast(mask.device.type, enabled=False):
                    mass, cost = self._transport(text, images, pair_context[text_rows], pair_context[image_rows])
                    self._correct(text, images, mass)
                plan[text_rows.unsqueeze(1), image_rows] = mass.to(dtype)
                if labels is not None and cost is not None:
                    losses["transport"] = self.config.transport_weight * cost

        if text is not None:
            whole = scores.new_full((len(text_rows), c), -torch.inf).scatter(
                1, text.columns, text.scores.masked_fill(~text.mask, -torch.inf).to(dtype)
            )
            lowest = text.scores.masked_fill(~text.mask, torch.inf).amin(1, keepdim=True)
            whole = torch.where(cut_rank > 0, (lowest - cut_rank).to(dtype), whole)
            scores = scores.index_put((text_rows,), whole)
        if images is not None:
            scores = scores.index_put((image_rows,), images.scores.masked_fill(~images.mask, -torch.inf).to(dtype))
        loss = None if labels is None else sum(losses.values(), self._zero_loss())
        return MmNelOutput(loss=loss, scores=scores, losses=losses or None, plan=plan)

    def _zero_loss(self) -> torch.Tensor:
        """Returns a loss of 0 that has a gradient."""
        return self.score_fc2.weight.sum() * 0.0

    # ---- textual mentions (§4.1)

    def _score_text(
        self, mask, context, entity, word_ids, span, name_ids, fact_ids, prior, gold
    ) -> tuple[ModalityBatch, torch.Tensor]:
        """Scores T textual mentions.

        Returns:
            `tuple`: The scored candidates, and the rank [T, C] of cut candidates after all others, from 1; 0 for
            candidates that are scored.
        """
        table = self.word_embeddings
        names, facts = _mean_words(table, name_ids), _mean_words(table, fact_ids)
        place = torch.arange(word_ids.shape[1], device=mask.device)
        start, stop = span[:, :1], span[:, 1:]
        is_word = word_ids >= 0
        in_mention = (place >= start) & (place < stop)
        in_context = is_word if self.config.mention_in_context else is_word & ~in_mention

        similarity = _mean_words(table, word_ids, in_context, mean=False) @ _unit(names + facts).T  # e·Σw
        similarity = similarity.gather(1, entity.clamp(min=0)).float()
        columns, cut_rank = self._select_candidates(mask, prior.float(), similarity, gold)
        selected = mask.gather(1, columns) & (cut_rank.gather(1, columns) == 0)
        entity = entity.gather(1, columns)
        candidates = self.entity_vectors(names, facts)[entity.clamp(min=0)]  # [T, S, w]

        words = table(word_ids.clamp(min=0))
        psi = self.local(candidates, selected, words, in_context)
        half = self.config.relation_window // 2
        left = (place < start) & (place >= start - half)
        right = (place >= stop) & (place < stop + half) & is_word
        means = [_mean_words(table, word_ids, part & is_word) for part in (left, in_mention, right)]
        mentions = self.dropout(torch.tanh(self.mention_map(torch.cat(means, -1))))  # f of eq. 3

        belief = self._beliefs(context, candidates, mentions, psi, selected)
        log_prior = prior.gather(1, columns).to(belief.dtype).clamp(min=self.config.min_prior).log()
        hidden = F.relu(self._score_layer(self.score_fc1, torch.stack([belief, log_prior], -1)))
        rho = self._score_layer(self.score_fc2, self.dropout(hidden)).squeeze(-1)
        return ModalityBatch(rho, selected, entity, mentions, torch.ones_like(selected[:, 0]), columns), cut_rank

    def _score_layer(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Applies a layer of ρ, the norm of the incoming weights of each unit being at most `score_max_norm`."""
        if self.config.score_max_norm is None:
            return layer(x)
        norm = layer.weight.norm(dim=1, keepdim=True)
        return F.linear(x, layer.weight / (norm / self.config.score_max_norm).clamp(min=1), layer.bias)

    def _select_candidates(self, mask, prior, similarity, gold) -> tuple[torch.Tensor, torch.Tensor]:
        """Selects the candidates to rank: the first by prior, then the first of the rest by similarity.

        Returns:
            `tuple` of `torch.Tensor`: Columns [T, S] of the selected candidates, padded with other columns; and the
            rank [T, C] of the cut candidates among themselves, from 1, or 0 if selected.
        """
        config = self.config
        lowest = -torch.inf
        by_similarity = similarity.masked_fill(~mask, lowest).argsort(dim=1, descending=True, stable=True)
        order = prior.gather(1, by_similarity).masked_fill(~mask.gather(1, by_similarity), lowest)
        by_prior = by_similarity.gather(1, order.argsort(dim=1, descending=True, stable=True))
        prior_rank = by_prior.argsort(1)  # ties in the order of similarity
        first = mask & (prior_rank < config.prior_candidates)
        pool = mask & (prior_rank < config.num_candidates) & ~first
        pool_order = similarity.masked_fill(~pool, lowest).gather(1, by_prior)
        pool_order = pool_order.argsort(dim=1, descending=True, stable=True)
        similarity_rank = by_prior.gather(1, pool_order).argsort(1)  # in the pool; ties in the order of the prior
        selected = first | (pool & (similarity_rank < config.context_candidates))
        if gold is not None and self.training:
            has_gold = selected.gather(1, gold.clamp(min=0).unsqueeze(1)).squeeze(1)
            missing = ((gold >= 0) & ~has_gold).nonzero()[:, 0]
            rank = torch.where(first, prior_rank, config.prior_candidates + similarity_rank)
            last = rank.masked_fill(~selected, -1).argmax(1)
            selected[missing, last[missing]] = False
            selected[missing, gold[missing]] = True
        cut = mask & ~selected
        cut_rank = prior_rank.masked_fill(~cut, mask.shape[1]).argsort(1).argsort(1) + 1
        width = max(1, int(selected.sum(1).max()))
        columns = selected.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        return columns, cut_rank.masked_fill(~cut, 0)

    def _beliefs(self, context, candidates, mentions, psi, mask) -> torch.Tensor:
        """Returns approximate max-marginals of eq. 1 as probabilities [T, S], or a softmax of Ψ without relations."""
        if not hasattr(self, "relations"):
            return _softmax_or_zeros(psi, mask)
        beliefs = torch.zeros_like(psi)
        table = _rows_by_document(context)
        counts = (table >= 0).sum(1)
        order = counts.argsort()
        budget = _BLOCK_ELEMENTS.get(psi.device.type, 2**24)
        sizes = (counts[order] * psi.shape[1]).square().tolist()
        begin = 0
        while begin < len(order):  # a block has as many documents of similar size as the budget allows
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * sizes[end] <= budget:
                end += 1
            block = table[order[begin:end]]
            block = block[:, : int(counts[order[end - 1]])]
            present, rows = block >= 0, block.clamp(min=0)
            pairs = self.relations(candidates[rows], mentions[rows], present)
            log_marginals = max_product(
                psi[rows],
                pairs,
                mask[rows] & present.unsqueeze(-1),
                self.config.lbp_iterations,
                self.config.lbp_damping,
            )
            probabilities = _softmax_or_zeros(log_marginals, mask[rows])
            beliefs = beliefs.index_put((block[present],), probabilities[present])
            begin = end
        return beliefs

    def _ranking_loss(self, text: ModalityBatch, gold: torch.Tensor) -> torch.Tensor:
        """Returns eq. 5-6 as a mean over mentions."""
        positive = text.mask & (text.columns == gold.unsqueeze(1))
        usable = positive.any(1)
        gold_scores = text.scores.masked_fill(~positive, 0.0).sum(1, keepdim=True)
        hinge = F.relu(self.config.gamma - gold_scores + text.scores)
        negative = text.mask & ~positive & usable.unsqueeze(1)
        return hinge.masked_fill(~negative, 0.0).sum() / usable.sum().clamp(min=1)

    # ---- visual mentions (§4.2)

    def _score_images(self, mask, entity, mention_image, entity_image, pixel_values, features) -> ModalityBatch:
        """Scores V visual mentions by the image similarities S^v."""
        if not hasattr(self, "image_encoder"):
            raise ValueError(
                "The batch has visual mentions, but this model sees no images. Give its configuration an image_size or "
                "a vision_config."
            )
        if mention_image is None or entity_image is None:
            raise ValueError(
                "The batch has visual mentions, but not pair_mention_image and pair_entity_image. Make it with a "
                "processor that has use_images=True."
            )
        num_images = int(torch.cat([mention_image, entity_image[mask]]).max()) + 1
        if features is None and pixel_values is None:
            if num_images:
                raise ValueError(
                    "The images of visual mentions are missing. Give pair_pixel_values or pair_image_features."
                )
            features = self.score_fc2.weight.new_zeros(1, self.config.hidden_size)
        if features is None:
            size = _BLOCK_IMAGES[pixel_values.device.type == "cuda"]
            features = torch.cat([self.encode_images(part) for part in pixel_values.split(size)])
        with torch.autocast(mask.device.type, enabled=False):
            features = features.to(self.score_fc2.weight.dtype)
            unit = _unit(features)
            mention, candidate = unit[mention_image.clamp(min=0)], unit[entity_image.clamp(min=0)]
            similarity = (candidate @ mention.unsqueeze(-1)).squeeze(-1)
            has_image = (mention_image >= 0).unsqueeze(1)
            image_mask = mask & (entity_image >= 0) & has_image
            similarity = torch.where(image_mask, similarity, torch.where(has_image, -1.0, 0.0).to(similarity.dtype))
        columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        embeddings = features[mention_image.clamp(min=0)]
        return ModalityBatch(similarity, mask, entity, embeddings, has_image[:, 0], columns, image_mask)

    def _triplet_loss(self, images: ModalityBatch, gold: torch.Tensor) -> torch.Tensor:
        """Returns eq. 8 as a mean or sum over the negatives of a mention, then as a mean over mentions."""
        image_mask = cast(torch.Tensor, images.image_mask)
        positive = image_mask & (images.columns == gold.unsqueeze(1))
        negative = image_mask & ~positive & positive.any(1, keepdim=True)
        gold_scores = images.scores.masked_fill(~positive, 0.0).sum(1, keepdim=True)
        hinge = F.relu(self.config.margin - gold_scores + images.scores).masked_fill(~negative, 0.0)
        usable = negative.any(1)
        loss = hinge.sum(1)
        if self.config.triplet_reduction == "mean":
            loss = loss / negative.sum(1).clamp(min=1)
        return loss.sum() / usable.sum().clamp(min=1)

    # ---- joint disambiguation (§4.3)

    def _transport(
        self,
        text: ModalityBatch,
        images: ModalityBatch,
        text_documents: torch.Tensor,
        image_documents: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the transport plan of every document.

        Args:
            text, images: The mentions of both modalities.
            text_documents, image_documents (`torch.Tensor` [T], [V]): The documents of the mentions.

        Returns:
            `tuple`: The plan [T, V], 0 between documents and where it did not converge; and the mean cost over
            documents, or `None` if no plan converged.
        """
        plan = images.scores.new_zeros(len(text_documents), len(image_documents))
        documents = text_documents[torch.isin(text_documents, image_documents[images.has_embedding])].unique()
        if not len(documents):
            return plan, None
        rows = _rows_by_document(text_documents, documents, text.has_embedding)
        columns = _rows_by_document(image_documents, documents, images.has_embedding)
        # The tolerance is out of reach in float32, but MPS has no float64.
        wide = torch.float32 if plan.device.type == "mps" else torch.float64
        text_present, image_present = rows >= 0, columns >= 0
        x = _unit(text.embeddings.to(wide)[rows.clamp(min=0)])
        y = _unit(images.embeddings.to(wide)[columns.clamp(min=0)])
        across = 1 - x @ y.transpose(1, 2)
        weight = self.config.agreement_weight
        if weight:
            agreement = _agreement(text, images, rows.clamp(min=0), columns.clamp(min=0))
            across = (1 - weight) * across + weight * (1 - agreement.to(wide))
        costs = across, 1 - x @ x.transpose(1, 2), 1 - y @ y.transpose(1, 2)
        p, q = (mask.to(wide) / mask.sum(1, keepdim=True) for mask in (text_present, image_present))
        config = self.config
        limits = (config.gw_iterations, config.sinkhorn_iterations, config.transport_tolerance)
        plans, residual = transport_plan(*costs, p, q, config.beta, config.gw_weight, *limits)
        converged = residual <= config.transport_tolerance
        if not converged.all():
            warnings.warn(
                f"The transport plans of {int((~converged).sum())} of {len(documents)} documents did not converge and "
                f"are not used (residual up to {residual.max().item():.2g}, tolerance {config.transport_tolerance:g}). "
                "Raise sinkhorn_iterations, gw_iterations or beta.",
                RuntimeWarning,
                stacklevel=2,
            )
        if not converged.any():
            return plan, None
        cost = transport_cost(*costs, plans, p, q, config.gw_weight)[converged].mean()
        cells = text_present.unsqueeze(2) & image_present.unsqueeze(1) & converged[:, None, None]
        d, i, j = cells.nonzero(as_tuple=True)
        plan[rows[d, i], columns[d, j]] = plans.detach()[d, i, j].to(plan.dtype)
        return plan, cost.to(plan.dtype)

    def _correct(self, text: ModalityBatch, images: ModalityBatch, plan: torch.Tensor) -> None:
        """Adds to the scores of each modality the scaled scores of the mentions it is matched with (Algorithm 1)."""
        scaled_text, scaled_images = text.scaled_scores(), images.scaled_scores()
        image_weight = self.config.image_correction_weight
        image_weight = self.config.correction_weight if image_weight is None else image_weight
        for side, other, other_scores, mass, weight in (
            (text, images, scaled_images, plan, self.config.correction_weight),
            (images, text, scaled_text, plan.T, image_weight),
        ):
            count = min(mass.shape[1], self.config.transport_matches or mass.shape[1])
            mass, matched = mass.topk(count, dim=1)
            share = mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
            correction = torch.zeros_like(side.scores)
            for k in range(count):  # one match at a time, to hold [·, S, S'] numbers and not `count` times as many
                if not mass[:, k].any():
                    break
                same = side.entities.unsqueeze(2) == other.entities[matched[:, k]].unsqueeze(1)
                matched_scores = other_scores[matched[:, k]] * other.mask[matched[:, k]]
                term = share[:, k : k + 1] * (same.to(matched_scores.dtype) @ matched_scores.unsqueeze(-1)).squeeze(-1)
                correction = correction + torch.where(mass[:, k : k + 1] > 0, term, 0.0)  # 0 · nan would be nan
            spread = side.spread()
            unit = torch.where(spread > 0, spread, 1.0)
            side.scores = side.scores + weight * unit * correction.to(side.scores.dtype)


@torch.no_grad()
def _agreement(text: ModalityBatch, images: ModalityBatch, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns how far candidates of textual and visual mentions agree, from 0 to 1.

    It is the largest product of the scaled scores of both mentions among the candidates that they share; 0 without one.

    Args:
        text, images: The mentions of both modalities.
        rows, columns (`torch.Tensor` [D, n], [D, k]): The mentions of D documents in `text` and `images`.

    Returns:
        `torch.Tensor` [D, n, k].
    """
    text_scores = text.scaled_scores().masked_fill(~text.mask, 0.0)
    image_scores = images.scaled_scores().masked_fill(~images.compared, 0.0)
    agreement = text_scores.new_zeros(*rows.shape, columns.shape[1])
    for place in range(
        text.mask.shape[1]
    ):  # one candidate at a time, to hold [D, n, k, S] numbers and not S times as many
        entities = text.entities[rows, place]
        same = entities[:, :, None, None] == images.entities[columns].unsqueeze(1)
        same &= (text.mask[rows, place][:, :, None, None]) & images.compared[columns].unsqueeze(1)
        best = torch.where(same, image_scores[columns].unsqueeze(1), 0.0).amax(-1)
        agreement = torch.maximum(agreement, text_scores[rows, place].unsqueeze(2) * best)
    return agreement


def _rows_by_document(
    context: torch.Tensor, documents: torch.Tensor | None = None, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the rows of each document, [D, n], padded with -1.

    Args:
        context (`torch.Tensor` [R]): The document of each row.
        documents (`torch.Tensor` [D], *optional*): Sorted documents to look up. The default is all documents.
        keep (`torch.Tensor` [R], *optional*): False for rows to leave out.
    """
    documents = context.unique() if documents is None else documents
    listed = torch.isin(context, documents)
    rows = (listed if keep is None else listed & keep).nonzero()[:, 0]
    number = torch.searchsorted(documents, context[rows])
    order = number.argsort(stable=True)
    rows, number = rows[order], number[order]
    counts = number.bincount(minlength=len(documents))
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[number]
    table = rows.new_full((len(documents), int(counts.max()) if len(counts) else 0), -1)
    table[number, place] = rows
    return table


def _mean_words(
    table: nn.Embedding, ids: torch.Tensor, mask: torch.Tensor | None = None, mean: bool = True
) -> torch.Tensor:
    """Returns the mean, or the sum, [R, w] of the word vectors of `ids` [R, L]; zeros for a row without words.

    Args:
        table: The word vectors.
        ids: Row numbers of the table, padded with -1.
        mask (`torch.Tensor` [R, L], *optional*): True for the words to use. The default is all words.
        mean: Whether to return the mean instead of the sum.
    """
    mask = ids >= 0 if mask is None else mask
    weights = mask.to(table.weight.dtype)
    if mean:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    return F.embedding_bag(ids.clamp(min=0), table.weight, per_sample_weights=weights, mode="sum")


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` scaled to length 1; zeros stay zeros."""
    return F.normalize(x, dim=-1, eps=1e-6)


# Copied from modeling/mmel/modeling_mmel.py
def _softmax_or_zeros(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. A row without any is zeros."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


def _check_labels(labels: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises a `ValueError` if a label [M] names a column that `mask` [M, C] excludes."""
    rows = (labels >= 0).nonzero()[:, 0]
    if (labels[rows] >= mask.shape[1]).any() or not mask[rows, labels[rows]].all():
        raise ValueError("A label names a column without a candidate. Give -100 for a mention without a gold.")


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


__all__ = ["MmNelModel", "MmNelPreTrainedModel"]
