"""Scores all pairs by TGLU's global-to-local half (eq. 9–10), fast and exactly.

[`global_to_local_scores`] computes every pair. [`global_to_local_scores_above`] skips the pairs that an upper bound
proves to be below a floor ([`pairs_above`]). All take the encodings of mentions and entities and TGLU's LayerNorm, and give what the
printed equations give, up to rounding (`tests/modeling/test_mimic.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

#: Attention weights in one block: bounds the memory, and on the CPU keeps a block in the L2 cache.
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**28}
_BLOCK_MENTIONS = 4
#: The softmax subtracts the largest exponent only if a sum of powers is below this or above 1 / this.
_SMALLEST_SUM = 2.0**-100
#: If more than this share of the pairs is left after the first bound, computing all pairs is faster.
_DENSE = 0.4
#: The bound by rays holds for a mention whose values have at least this component along their mean direction, relative
#: to the longest value.
_NARROW = 0.05
#: Relative margin added to a bound: many times the rounding error of float32 scores.
_ROUNDING = 1e-4
#: Rounding of values and of the basis of their span, relative to the longest value.
_SPAN_ROUNDING = 1e-6


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of [B, L, d] over the L positions where `mask` [B, L] is 1."""
    mask = mask.to(x.dtype).unsqueeze(-1)
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def centred(x: torch.Tensor) -> torch.Tensor:
    """Subtracts the mean over the last axis."""
    return x - x.mean(-1, keepdim=True)


def global_to_local_scores(
    mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor], layer_norm: nn.LayerNorm
) -> torch.Tensor:
    """S_T^G2L [M, N] (eq. 9–10) of every pair.

    H_t = softmax(QK^T)V is needed only as its mean over the entity's tokens. So the attention weights are averaged
    first and multiply the values once per pair. Items are sorted by length and scored in blocks, and each block is as
    long as its longest text.

    Args:
        mentions (`dict`): `text_keys`, `text_values` [M, L, d_t] and, with masked padding, `text_mask` [M, L].
        entities (`dict`): `text_query_global` [N, d_t], `text_queries` [N, L', d_t] and, with masked padding,
            `text_mask` [N, L'].
        layer_norm (`nn.LayerNorm`): The LayerNorm of h_t (eq. 10).
    """
    keys, values, key_mask = _keys_and_values(mentions)
    queries = entities["text_queries"]
    token_weights = _token_weights(queries.shape[:2], entities.get("text_mask"), keys)
    # LayerNorm is γ·h̃/σ + β with h̃ = h centred. Centring is linear, so `_keys_and_values` centres the values.
    target = entities["text_query_global"] * layer_norm.weight
    offset = entities["text_query_global"] @ layer_norm.bias

    m_lengths, m_order = _lengths(keys, key_mask).sort()
    n_lengths, n_order = _lengths(queries, entities.get("text_mask")).sort()
    pairs = max(1, _BLOCK_ELEMENTS.get(keys.device.type, 2**24) // (keys.shape[1] * queries.shape[1]))
    m_step = max(1, min(_BLOCK_MENTIONS, pairs))
    n_step = max(1, pairs // m_step)
    mention_blocks = []
    for m in range(0, len(keys), m_step):
        block, width = m_order[m : m + m_step], int(m_lengths[m : m + m_step][-1])
        mask = None if key_mask is None else key_mask[block, :width]
        mention_blocks.append((keys[block, :width], mask, values[block, :width]))
    columns = []
    for n in range(0, len(queries), n_step):
        block, height = n_order[n : n + n_step], int(n_lengths[n : n + n_step][-1])
        # Entities are the last axis, so that softmax, means and sums run along memory whatever the lengths.
        block_queries = queries[block, :height].to(keys.dtype).transpose(0, 1).contiguous()
        block_weights = token_weights[block, :height].T.contiguous()
        block_target, block_offset = target[block].T, offset[block]
        rows = []
        for block_keys, mask, block_values in mention_blocks:
            attention = _mean_attention(block_queries, block_weights, block_keys, mask)
            rows.append(_context_scores(attention, block_values, block_target, layer_norm.eps) + block_offset)
        columns.append(torch.cat(rows))
    return torch.cat(columns, 1)[m_order.argsort()][:, n_order.argsort()]


def global_to_local_scores_above(
    mentions: Mapping[str, torch.Tensor],
    entities: Mapping[str, torch.Tensor],
    floor: torch.Tensor,
    layer_norm: nn.LayerNorm,
) -> torch.Tensor:
    """S_T^G2L [M, N] (eq. 9–10) wherever [`pairs_above`] says that it may reach `floor` [M, N], and -inf where it cannot.

    If most pairs may, all are computed.

    Args:
        mentions, entities, layer_norm: See [`global_to_local_scores`]. `text_queries` may be in half precision: few of
            them are read.
        floor (`torch.Tensor` [M, N]): Scores below it are not needed.
    """
    candidates = pairs_above(mentions, entities, floor, layer_norm)
    if candidates.sum() > _DENSE * candidates.numel():
        return _infinite_to_nan(global_to_local_scores(mentions, entities, layer_norm))

    target, offset, _, _ = _reach(entities, layer_norm)
    keys, values, key_mask = _keys_and_values(mentions)
    queries, query_mask = entities["text_queries"], entities.get("text_mask")
    lengths, tokens = _lengths(queries, query_mask), queries.flatten(0, 1)
    positions = torch.arange(queries.shape[1], device=queries.device)[:, None]
    step = max(1, _BLOCK_ELEMENTS.get(keys.device.type, 2**24) // (keys.shape[1] * queries.shape[1]))
    scores = torch.full_like(floor, -torch.inf)
    for m in candidates.any(1).nonzero()[:, 0].tolist():
        k, v = (keys[m], values[m]) if key_mask is None else (keys[m, key_mask[m]], values[m, key_mask[m]])
        columns = candidates[m].nonzero()[:, 0]
        columns = columns[lengths[columns].argsort()]
        for first in range(0, len(columns), step):
            rows = columns[first : first + step]
            height = int(lengths[rows[-1]])
            q = tokens.index_select(0, (rows * queries.shape[1] + positions[:height]).flatten())
            mask = None if query_mask is None else query_mask[rows]
            weights = _token_weights((len(rows), queries.shape[1]), mask, k)[:, :height].T
            attention = _mean_attention(q.view(height, len(rows), -1).to(k.dtype), weights, k[None], None)
            exact = _context_scores(attention, v[None], target[rows].T, layer_norm.eps)[0] + offset[rows]
            scores[m, rows] = _infinite_to_nan(exact)
    return scores


def pairs_above(
    mentions: Mapping[str, torch.Tensor],
    entities: Mapping[str, torch.Tensor],
    floor: torch.Tensor,
    layer_norm: nn.LayerNorm,
) -> torch.Tensor:
    """Whether S_T^G2L of a pair (eq. 9–10) may reach `floor` [M, N]: a mask [M, N], without the tokens of entities.

    Upper bounds spare the attention. They bound h·q', where h is the context of eq. 10 after LayerNorm without γ and β,
    and q' = γ·FC(t_E^G), centred like h:

    - |h| ≤ √d_t, so h·q' ≤ √d_t |q'| for every mention.
    - h is parallel to a mean Σ wₗvₗ of the centred values. For a unit vector c with vₗ·c > 0 for all l,
      |Σ wₗvₗ| ≥ Σ wₗ(vₗ·c), so h·q' ≤ √d_t max(0, maxₗ (vₗ·q')/(vₗ·c)). The direction of the mean of the values is c.
    - Where there is no such c, h is at least in the span of the values: h·q' ≤ √d_t |U q'|, with an orthonormal basis U.

    If the first leaves most pairs, the others are not computed.

    Args: as in [`global_to_local_scores_above`]; `text_queries` is not needed.
    """
    target, _, reach, margin = _reach(entities, layer_norm)
    candidates = ~(reach + margin < floor)  # also True where either is nan
    if candidates.sum() > _DENSE * candidates.numel():
        return candidates
    _, values, key_mask = _keys_and_values(mentions)
    bounds_of = _closer_bounds(values, key_mask, layer_norm.eps)
    for m in candidates.any(1).nonzero()[:, 0].tolist():
        columns = candidates[m].nonzero()[:, 0]
        highest = bounds_of(m, target.index_select(0, columns))
        if highest is not None:
            candidates[m, columns] = ~(highest + margin[columns] < floor[m, columns])
    return candidates


def highest_global_to_local_scores(entities: Mapping[str, torch.Tensor], layer_norm: nn.LayerNorm) -> torch.Tensor:
    """The first bound of [`pairs_above`]: scores [N] that no mention exceeds, rounding included."""
    _, _, reach, margin = _reach(entities, layer_norm)
    return reach + margin


def global_to_local_bounds(
    mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor], layer_norm: nn.LayerNorm
) -> torch.Tensor:
    """Upper bounds of S_T^G2L [M, N] without the tokens of entities: those of [`pairs_above`].

    Args: as there; `text_queries` is not needed.
    """
    target, _, reach, margin = _reach(entities, layer_norm)
    _, values, key_mask = _keys_and_values(mentions)
    bounds_of = _closer_bounds(values, key_mask, layer_norm.eps)
    closer = (bounds_of(m, target) for m in range(len(values)))
    rows = [reach if highest is None else torch.minimum(reach, highest) for highest in closer]
    return torch.stack(rows) + margin if rows else target.new_zeros(0, len(target))


def _reach(
    entities: Mapping[str, torch.Tensor], layer_norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q' [N, d_t] of [`pairs_above`], the constant of LayerNorm [N], √d_t |q'| [N], and the constant with
    the margin for rounding [N].
    """
    target = centred(entities["text_query_global"] * layer_norm.weight)
    offset = entities["text_query_global"] @ layer_norm.bias
    reach = target.norm(dim=-1) * target.shape[-1] ** 0.5
    return target, offset, reach, offset + (reach + offset.abs()) * _ROUNDING


def mention_attention(mentions: Mapping[str, torch.Tensor], entities: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Attention [M, N, L] of an entity over the tokens of a mention (eq. 9), averaged over the entity's tokens."""
    keys, _, mask = _keys_and_values(mentions)
    queries = entities["text_queries"]
    token_weights = _token_weights(queries.shape[:2], entities.get("text_mask"), keys)
    return _mean_attention(queries.transpose(0, 1), token_weights.T, keys, mask).transpose(1, 2)


def _keys_and_values(
    mentions: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys scaled as in eq. 9 and divided by ln 2, centred values, and the mask of the keys."""
    keys, mask = mentions["text_keys"], mentions.get("text_mask")
    keys = keys * (keys.shape[-1] ** -0.5 / math.log(2))  # 2^x takes a third of the time of e^x
    if mask is not None and not mask.any(1).all():  # in an empty text, the first position gets all attention
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask | (first & ~mask.any(1, keepdim=True))
    return keys, centred(mentions["text_values"]), mask


def _mean_attention(
    queries: torch.Tensor, token_weights: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention of every entity token over the mention's tokens (eq. 9), averaged over entity tokens: [m, L, n].

    Args:
        queries, token_weights: [L', n, d_t], and the weight of each token in the average, [L', n].
        keys, key_mask: [m, L, d_t] from `_keys_and_values`, and [m, L] or `None`.
    """
    height, n, dim = queries.shape
    m, width, _ = keys.shape
    keys, queries = keys.reshape(m * width, dim), queries.reshape(height * n, dim)

    def exponents() -> torch.Tensor:
        x = (keys @ queries.T).view(m, width, height * n)
        return x if key_mask is None or key_mask.all() else x.masked_fill(~key_mask[..., None], -torch.inf)

    powers = exponents().exp2_()
    total = powers.sum(1)
    low, high = torch.aminmax(total.detach())
    if not (low > _SMALLEST_SUM and high < 1 / _SMALLEST_SUM):  # near the limits of float32: repeat, shifted
        x = exponents()
        powers = (x - x.detach().amax(1, keepdim=True)).exp2_()
        total = powers.sum(1)
    weights = powers * (token_weights.reshape(-1) / total)[:, None]
    return weights.view(m, width, height, n).sum(2)


def _context_scores(attention: torch.Tensor, values: torch.Tensor, target: torch.Tensor, eps: float) -> torch.Tensor:
    """LayerNorm(h_t)·FC(t_E^G) without its constant (eq. 10): [m, n].

    Args:
        attention: [m, L, n] from `_mean_attention`.
        values: Centred, [m, L, d_t].
        target: γ·FC(t_E^G), [d_t, n].
        eps: That of the LayerNorm.
    """
    context = values.transpose(1, 2) @ attention  # h̃_t [m, d_t, n]
    return (context * target).sum(1) * torch.rsqrt(context.square().mean(1) + eps)


def _closer_bounds(
    values: torch.Tensor, mask: torch.Tensor | None, eps: float
) -> Callable[[int, torch.Tensor], torch.Tensor | None]:
    """Returns a function that bounds h·q' of [`pairs_above`] by the values of one mention.

    It takes the number of the mention and q' [n, d_t], and returns the bounds [n], or `None` if the values bound nothing.
    """
    rays, is_narrow = _rays(values, mask)
    dim = values.shape[-1]

    def bounds_of(m: int, target: torch.Tensor) -> torch.Tensor | None:
        if is_narrow[m]:
            return (target @ rays[m].T).amax(1).clamp(min=0)
        of_mention = values[m] if mask is None else values[m, mask[m]]
        if len(of_mention) >= dim - 1:  # centred vectors are in dim - 1 dimensions
            return None
        # The columns of Q span the values whatever their rank, up to rounding. A context that is a small difference of
        # values has that of the values, which LayerNorm divides by no less than √ε.
        basis = torch.linalg.qr(of_mention.T)[0]
        outside = of_mention.norm(dim=-1).amax() * (_SPAN_ROUNDING / eps**0.5)
        return (target @ basis).norm(dim=-1) * dim**0.5 + target.norm(dim=-1) * outside

    return bounds_of


def _rays(values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, list[bool]]:
    """√d_t vₗ/(vₗ·c) [M, L, d_t] of centred values, and per mention whether all vₗ·c are well above zero."""
    mask = torch.ones_like(values[..., 0], dtype=torch.bool) if mask is None else mask
    axis = F.normalize(masked_mean(values, mask), dim=-1)
    along = (values @ axis[..., None])[..., 0]
    longest = values.norm(dim=-1).masked_fill(~mask, 0).amax(1)
    bounded = along.masked_fill(~mask, torch.inf).amin(1) > _NARROW * longest
    first = values[:, :1] / along[:, :1, None]  # padding repeats the first token, which changes no maximum
    rays = torch.where(mask[..., None], values / along[..., None], first)
    return rays * values.shape[-1] ** 0.5, bounded.tolist()


def _token_weights(shape: Sequence[int], mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Weight of each of an entity's tokens in their mean, of `shape` [N, L], in the dtype and on the device of `like`."""
    if mask is None:
        return like.new_full(shape, 1 / shape[1])
    return mask.to(like.dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def _lengths(tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Number of positions up to the last token of each text, [B], at least 1."""
    if mask is None:
        return torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp(min=1)


def _infinite_to_nan(scores: torch.Tensor) -> torch.Tensor:
    """Replaces infinite scores by nan, because -inf marks a pair that was not computed."""
    return torch.where(scores.isfinite(), scores, torch.nan)
