"""NCEL and DGCN, rerankers that link all mentions of a document together by graph convolutions over their candidates.

A node is a candidate of a mention, and only candidates of different mentions are connected. `README.md` in this folder says
what of both originals is known, and where this code differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_candidate_graph import CandidateGraphConfig
from .glove_candidate_graph import glove_vectors

#: Number of features that the processor makes.
NUM_PAIR_FEATURES = 11
#: Maximum number of entries of the adjacency matrices in one block of documents, by device type.
_BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}


@dataclass
class CandidateGraphOutput(ModelOutput):
    """Output of [`CandidateGraphModel`], for M mentions with up to C candidates.

    Args:
        loss (`torch.Tensor` []): Mean over the mentions with a gold, if `labels` are given.
        scores (`torch.Tensor` [M, C]): Higher is better; -inf where a mention has no candidate.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


# Copied from modeling/mm_nel/modeling_mm_nel.py
class WordMap(nn.Linear):
    """Linear map of word vectors that is initialised as the identity."""


class NodeMap(nn.Linear):
    """Linear map of nodes that is initialised as the identity: ReLU would make nodes of width 1 zero if it were negative."""


class EntityVectors(nn.Module):
    """Entity vectors, made of the mean word vectors of an entity's name and of its facts."""

    def __init__(self, config: CandidateGraphConfig):
        super().__init__()
        self.name_map = WordMap(config.word_dim, config.word_dim)
        self.fact_map = WordMap(config.word_dim, config.word_dim, bias=False)

    def forward(self, names: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
        """Returns unit vectors [E, w] of entities, from the mean word vectors of their names and facts, both [E, w]."""
        return _unit(self.name_map(names) + self.fact_map(facts))


class ContextAttention(nn.Module):
    """Attention of a candidate over context words, by their inner product with diagonal weights."""

    def __init__(self, config: CandidateGraphConfig):
        super().__init__()
        self.scale = config.local_scale
        self.weight = nn.Parameter(torch.full((config.word_dim,), float(self.scale)))

    def forward(self, entities: torch.Tensor, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the attended words [M, C, w] of candidates [M, C, w] over words [M, L, w]; zeros without a word in `mask`
        [M, L]."""
        logits = (entities * self.weight) @ words.transpose(1, 2)
        return _softmax_or_zeros(logits, mask.unsqueeze(1).expand_as(logits)) @ words


class DynamicEdges(nn.Module):
    """Edges of DGCN: two similarities of a pair of nodes, merged by two layers."""

    def __init__(self, config: CandidateGraphConfig):
        super().__init__()
        self.bilinear = nn.Parameter(torch.empty(config.graph_size, config.graph_size))
        self.entity = nn.Parameter(torch.empty(config.word_dim))
        self.fc1 = nn.Linear(2, config.similarity_hidden_size)
        self.fc2 = nn.Linear(config.similarity_hidden_size, 1)

    def forward(self, nodes: torch.Tensor, entities: torch.Tensor) -> torch.Tensor:
        """Returns weights [D, N, N] from 0 to 1 of nodes [D, N, g] whose entities have vectors [D, N, w]."""
        learned = nodes @ self.bilinear @ nodes.transpose(1, 2)
        fixed = (entities * self.entity) @ entities.transpose(1, 2)
        return torch.sigmoid(self.fc2(torch.tanh(self.fc1(torch.stack([learned, fixed], -1))))).squeeze(-1)


class GraphLayer(nn.Module):
    """H ← ReLU(LayerNorm(A H V + b)), without LayerNorm for nodes of width 1."""

    def __init__(self, config: CandidateGraphConfig):
        super().__init__()
        self.linear = NodeMap(config.graph_size, config.graph_size)
        if config.graph_size > 1:
            self.norm = nn.LayerNorm(config.graph_size)

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """Returns nodes [D, N, g], from nodes and a normalised adjacency matrix [D, N, N]."""
        x = adjacency @ F.linear(nodes, self.linear.weight) + self.linear.bias
        return F.relu(self.norm(x) if hasattr(self, "norm") else x)


class CandidateGraphPreTrainedModel(PreTrainedModel):
    """Base class: configuration and weight initialisation."""

    config: CandidateGraphConfig
    config_class = CandidateGraphConfig
    base_model_prefix = "candidate_graph"
    main_input_name = "pair_word_ids"
    accepts_loss_kwargs = False  # the loss is a batch mean, which the Trainer must scale for gradient accumulation
    _no_split_modules = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (WordMap, NodeMap)):
            init.eye_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
        elif isinstance(module, ContextAttention):
            init.constant_(module.weight, module.scale)
        elif isinstance(module, DynamicEdges):
            init.xavier_uniform_(module.bilinear)
            init.ones_(module.entity)


class CandidateGraphModel(CandidateGraphPreTrainedModel):
    """NCEL or DGCN as a reranker that reads all mentions of a document together.

    ```python
    >>> from transformers import AutoModel, AutoProcessor
    >>> model = AutoModel.from_pretrained("runs/ncel-text_wikimel").eval()  # doctest: +SKIP
    >>> processor = AutoProcessor.from_pretrained("runs/ncel-text_wikimel")  # doctest: +SKIP
    >>> model(**processor(pairs=[(mention_row, candidate_rows), …])).scores  # [M, C] # doctest: +SKIP
    ```
    """

    #: Pretrained parameters. The trainer can give all others another learning rate.
    backbone_names = ("word_embeddings",)
    example_unit = "document"
    pairs_are_independent = False

    def __init__(self, config: CandidateGraphConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.word_dim)
        self.entity_vectors = EntityVectors(config)
        self.attention = ContextAttention(config)
        # Numbers of the processor, four similarities, and the five vectors that they compare.
        sizes = [NUM_PAIR_FEATURES + 4 + 5 * config.word_dim, *config.mlp_sizes, config.graph_size]
        self.mlp = nn.ModuleList(nn.Linear(*shape) for shape in pairwise(sizes))
        self.dropout = nn.Dropout(config.dropout)
        count = min(config.num_graph_layers, 1) if config.share_layers else config.num_graph_layers
        self.layers = nn.ModuleList(GraphLayer(config) for _ in range(count))
        if config.graph == "dynamic":
            self.edges = DynamicEdges(config)
        if config.graph_size > 1:
            self.head = nn.Linear(config.graph_size, 1)
        self.post_init()
        self.train()

    def train(self, mode: bool = True) -> CandidateGraphModel:
        """Sets the training mode, except for frozen word vectors."""
        super().train(mode)
        # Not in `__init__` alone: `from_pretrained` replaces the parameters, then calls `eval()`.
        self.word_embeddings.requires_grad_(self.config.train_words)
        return self

    @classmethod
    def from_backbones(cls, text: str | None = None, **config) -> CandidateGraphModel:
        """Builds a model with pretrained word vectors.

        Args:
            text (`str`): Path of a file of word vectors in GloVe's format, or Hub id or folder of a transformers
                model, whose input embeddings become the word vectors.
            config: Fields of [`CandidateGraphConfig`].
        """
        if text is None:
            raise ValueError(
                "from_backbones needs word vectors. Give a file in GloVe's format or a transformers model."
            )
        if Path(text).is_file():
            table = glove_vectors(text)
        else:
            table = AutoModel.from_pretrained(text).get_input_embeddings().weight.detach()
        model = cls(CandidateGraphConfig(**config | {"vocab_size": table.shape[0], "word_dim": table.shape[1]}))
        model.word_embeddings.load_state_dict({"weight": table})
        return model

    def forward(
        self,
        pair_features: torch.Tensor,
        pair_mask: torch.Tensor,
        pair_context: torch.Tensor,
        pair_entity: torch.LongTensor,
        pair_word_ids: torch.LongTensor,
        pair_span: torch.LongTensor,
        pair_name_ids: torch.LongTensor,
        pair_fact_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
    ) -> CandidateGraphOutput:
        """Scores the candidates of M mentions.

        Args:
            pair_features (`torch.Tensor` [M, C, 11]): Numbers that describe the pairs.
            pair_mask (`torch.Tensor` [M, C]): False where a mention has no C-th candidate.
            pair_context (`torch.Tensor` [M]): Number of each mention's document. The mentions of a document are in its order.
            pair_entity (`torch.Tensor` [M, C]): Number of each candidate among E entities; -1 for padding.
            pair_word_ids (`torch.Tensor` [M, L]): Words to the left of the mention, words of the mention and words to its
                right; then padding of -1.
            pair_span (`torch.Tensor` [M, 2]): Start and end of the mention in `pair_word_ids`.
            pair_name_ids, pair_fact_ids (`torch.Tensor` [E, ·]): Words of the entities, padded with -1.
            labels (`torch.Tensor` [M], *optional*): Column of each mention's gold; -100 excludes a mention from the
                loss.

        Raises:
            ValueError: A label names a padding column.
        """
        mask = pair_mask.bool()
        if labels is not None:
            _check_labels(labels, mask)
        with torch.autocast(mask.device.type, enabled=False):  # half precision is too coarse to rank candidates
            table = self.word_embeddings
            names, facts = _mean_words(table, pair_name_ids), _mean_words(table, pair_fact_ids)
            numbers = pair_entity.clamp(min=0)
            nodes = self._nodes(
                pair_features.to(names.dtype).masked_fill(~mask.unsqueeze(-1), 0.0),
                self.entity_vectors(names, facts)[numbers],
                pair_word_ids,
                pair_span,
                pair_context,
            )
            nodes = self._propagate(nodes, _unit(names + facts)[numbers], mask, pair_context)
            scores = self.head(nodes) if hasattr(self, "head") else nodes
        scores = scores.squeeze(-1).masked_fill(~mask, -torch.inf)
        loss = None if labels is None else self._loss(scores, labels)
        return CandidateGraphOutput(loss=loss, scores=scores)

    def _nodes(self, features, entities, word_ids, span, context) -> torch.Tensor:
        """Returns the nodes [M, C, g] of candidates with features [M, C, 11] and vectors [M, C, w], before the graph."""
        table, shape = self.word_embeddings, entities.shape
        place = torch.arange(word_ids.shape[1], device=word_ids.device)
        is_word = word_ids >= 0
        start, stop = span[:, :1], span[:, 1:]
        words = table(word_ids.clamp(min=0))
        mention = _mean_words(table, word_ids, is_word & (place >= start) & (place < stop))  # [M, w]
        neighbours = _neighbours(context, self.config.window).to(mention.dtype)
        around = neighbours @ mention / neighbours.sum(1, keepdim=True).clamp(min=1)
        vectors = [
            entities,
            self.attention(entities, words, is_word & (place < start)),
            self.attention(entities, words, is_word & (place >= stop)),
            mention.unsqueeze(1).expand(shape),
            around.unsqueeze(1).expand(shape),
        ]
        similarities = torch.stack([(entities * _unit(vector)).sum(-1) for vector in vectors[1:]], -1)
        x = torch.cat([features, similarities, *vectors], -1)
        for layer in self.mlp[:-1]:
            x = self.dropout(F.relu(layer(x)))
        return self.config.mlp_scale * self.mlp[-1](x)

    def _propagate(self, nodes, entities, mask, context) -> torch.Tensor:
        """Applies the graph layers to nodes [M, C, g] whose entities have the fixed vectors [M, C, w]."""
        if not len(self.layers):
            return nodes
        out = torch.zeros_like(nodes)
        documents = _rows_by_document(context)
        counts = (documents >= 0).sum(1)
        order = counts.argsort()
        budget = _BLOCK_ELEMENTS.get(nodes.device.type, 2**24)
        sizes = (counts[order] * nodes.shape[1]).square().tolist()
        begin = 0
        while begin < len(order):  # a block has as many documents of similar size as the budget allows
            end = begin + 1
            while end < len(order) and (end + 1 - begin) * sizes[end] <= budget:
                end += 1
            block = documents[order[begin:end], : int(counts[order[end - 1]])]
            present, rows = block >= 0, block.clamp(min=0)
            result = self._convolve(nodes[rows], entities[rows], mask[rows] & present.unsqueeze(-1))
            out = out.index_put((block[present],), result[present])
            begin = end
        return out

    def _convolve(self, nodes, entities, mask) -> torch.Tensor:
        """Applies the graph layers to the nodes [D, n, C, g] of D documents with up to n mentions."""
        config, (n, c) = self.config, nodes.shape[1:3]
        mention = torch.arange(n, device=nodes.device).repeat_interleave(c)
        distance = (mention.unsqueeze(1) - mention).abs()
        linked = (distance > 0) & (distance <= (n if config.window is None else config.window))
        real = mask.flatten(1)
        linked = linked & real.unsqueeze(1) & real.unsqueeze(2)  # [D, N, N]
        x, vectors = nodes.flatten(1, 2), entities.flatten(1, 2)
        adjacency = self._static_adjacency(vectors, linked)
        previous = x
        for k in range(config.num_graph_layers):
            layer = cast(GraphLayer, self.layers[0 if config.share_layers else k])
            if config.graph == "dynamic":
                adjacency = self._dynamic_adjacency(x, vectors, linked, n)
            x = layer(x, adjacency)
            if k % 2:
                x = previous = x + previous
        return x.unflatten(1, (n, c))

    def _static_adjacency(self, vectors: torch.Tensor, linked: torch.Tensor) -> torch.Tensor:
        """Returns NCEL's adjacency [D, N, N], whose rows sum to 1: cosines of at least the threshold, and a self-loop."""
        cosine = vectors @ vectors.transpose(1, 2)
        kept = linked & (cosine >= self.config.threshold) & (self.config.graph == "static")
        adjacency = self.config.rho * torch.where(kept, cosine, 0.0) + _identity(linked, cosine.dtype)
        return adjacency / adjacency.sum(-1, keepdim=True)

    def _dynamic_adjacency(self, nodes, vectors, linked: torch.Tensor, num_mentions: int) -> torch.Tensor:
        """Returns DGCN's adjacency D^-½ A D^-½ [D, N, N]: of each mention, a node keeps its best candidate; and a self-loop."""
        weights = self.edges(nodes, vectors).masked_fill(~linked, 0.0)
        by_mention = weights.unflatten(2, (num_mentions, -1))
        best = by_mention.argmax(-1, keepdim=True)
        kept = torch.zeros_like(by_mention).scatter(-1, best, by_mention.gather(-1, best)).flatten(2)
        adjacency = kept + _identity(linked, kept.dtype)
        scale = adjacency.sum(-1).rsqrt()
        return scale.unsqueeze(2) * adjacency * scale.unsqueeze(1)

    def _loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of the mentions with a gold."""
        rows = (labels >= 0).nonzero()[:, 0]
        if not len(rows):
            return self.attention.weight.sum() * 0.0  # has a gradient
        scores, labels = scores[rows], labels[rows]
        if self.config.loss == "softmax":
            return F.cross_entropy(scores, labels)
        gold = scores.gather(1, labels.unsqueeze(1))
        negative = scores.isfinite()
        negative[torch.arange(len(rows), device=rows.device), labels] = False
        hinge = F.relu(self.config.margin - gold + scores.masked_fill(~negative, 0.0)) * negative
        return (hinge.sum(1) / negative.sum(1).clamp(min=1)).mean()


def _identity(linked: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the identity matrix [N, N] for `linked` [D, N, N]."""
    return torch.eye(linked.shape[-1], dtype=dtype, device=linked.device)


def _neighbours(context: torch.Tensor, window: int | None) -> torch.Tensor:
    """Returns the mask [M, M] of the other mentions of a mention's document that are at most `window` mentions away."""
    same = context.unsqueeze(1) == context
    place = same.tril(-1).sum(1)  # number of mentions before it in its document
    distance = (place.unsqueeze(1) - place).abs()
    return same & (distance > 0) & (distance <= (len(context) if window is None else window))


# Copied from modeling/mm_nel/modeling_mm_nel.py
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


# Copied from modeling/mm_nel/modeling_mm_nel.py
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


# Copied from modeling/mm_nel/modeling_mm_nel.py
def _unit(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` scaled to length 1; zeros stay zeros."""
    return F.normalize(x, dim=-1, eps=1e-6)


# Copied from modeling/mmel/modeling_mmel.py
def _softmax_or_zeros(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis, among the positions where `mask` is True. A row without any is zeros."""
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1)
    return weights * mask.any(-1, keepdim=True)


# Copied from modeling/mm_nel/modeling_mm_nel.py
def _check_labels(labels: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises a `ValueError` if a label [M] names a column that `mask` [M, C] excludes."""
    rows = (labels >= 0).nonzero()[:, 0]
    if (labels[rows] >= mask.shape[1]).any() or not mask[rows, labels[rows]].all():
        raise ValueError("A label names a column without a candidate. Give -100 for a mention without a gold.")


__all__ = ["CandidateGraphModel", "CandidateGraphPreTrainedModel"]
