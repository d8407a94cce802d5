"""Upper bounds of VDLU's scores (eq. 5 and 11–14) from inner products that are known up to an error.

Whatever a [`~modeling_mimic.DualGate`] computes of a pair comes from five inner products of vectors of the two sides, and
from numbers that each side has alone. With x̃ for x centred, A for the side that asks and B for the side that answers,
a = ṽ_A^G, p for the mean patch of B centred, k = ṽ_B^G, Q = Wγa, P = Wγp, and r for the factor of A in eq. 14 without the
bias of LayerNorm:

- ⟨a, p⟩ gives 1/σ₁ of the first LayerNorm, and with it the gate h_vg of eq. 13, as its argument is a sum over the sides;
- ⟨Q, P⟩ and ⟨Q, k⟩ give the length of y = u(P + Q) + h_vg·c' + k, the argument of the second LayerNorm, with u = h_vg/σ₁;
- ⟨r, P⟩ and ⟨r, k⟩ give ⟨r, y⟩.

S_V^A2B = ⟨r, y⟩ / √(|y|²/d + ε) and a constant of A. If each product is known up to a radius, 1/σ₁, h_vg and u are in
intervals, and [`highest_scores`] takes the largest ⟨r, y⟩ and, by its sign, the smallest or the largest |y| that they
allow. No score exceeds √d |r̃| and the constant ([`caps`]).

P is a linear map of p, and Q and r are linear maps of a, up to the scale of LayerNorm. So all products are those of three
vectors of an entity with vectors of a mention: "asking" (a), "patches" (p) and "key" (k).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch

from .scoring_mimic import centred

#: Inner products [n], and the radii [n] of the intervals around them that hold the true ones.
Products: TypeAlias = tuple[torch.Tensor, torch.Tensor]
#: A number of one mention (`float`), or of each of n entities (`torch.Tensor` [n]).
Number: TypeAlias = Any
#: Rounding of float32 sums, relative to the largest score, and to the terms of |y|².
_ROUNDING, _LENGTH_ROUNDING, _TOP_ROUNDING, _GATE_ROUNDING = 1e-4, 1e-5, 3e-6, 1e-6


class Asking(NamedTuple):
    """Numbers of A.

    Args:
        square, mapped_square (`Number`): |a|² and |Q|².
        gate (`Number`): A's part of the argument of the gate, before 1/σ₁.
        mapped_constant (`Number`): ⟨Q, c'⟩.
        factor_mapped, factor_constant (`Number`): ⟨r, Q⟩ and ⟨r, c'⟩.
        factor_length (`Number`): |r̃|.
        bias (`Number`): The product of LayerNorm's bias β with A's factor in eq. 14.
        scale, shift (`Number`): r = scale·slope∘a + shift·base, with the vectors of [`Gate`].
    """

    square: Number
    gate: Number
    mapped_square: Number
    mapped_constant: Number
    factor_mapped: Number
    factor_constant: Number
    factor_length: Number
    bias: Number
    scale: Number
    shift: Number


class Answering(NamedTuple):
    """Numbers of B.

    Args:
        square, mapped_square, key_square (`Number`): |p|², |P|² and |k|².
        gate (`Number`): B's part of the argument of the gate, before 1/σ₁.
        mapped_constant, key_constant (`Number`): ⟨P, c'⟩ and ⟨k, c'⟩.
        mapped_key (`Number`): ⟨P, k⟩.
        base_mapped, base_key (`Number`): ⟨base, P⟩ and ⟨base, k⟩, with the vector of [`Gate`].
    """

    square: Number
    gate: Number
    mapped_square: Number
    mapped_constant: Number
    mapped_key: Number
    key_square: Number
    key_constant: Number
    base_mapped: Number
    base_key: Number


class Constants(NamedTuple):
    """Numbers of a DualGate: d, ε of its two LayerNorms, the constant of the gate's argument, |c'|, and the rounding of the
    gate's argument: of its constant, and for each unit of |a| + |p|.
    """

    dim: float
    inner_eps: float
    outer_eps: float
    gate_bias: float
    length: float
    constant_rounding: float
    gate_rounding: float


class Gate:
    """The parameters of a [`~modeling_mimic.DualGate`], as the bounds read them.

    Attributes:
        map (`torch.Tensor` [d, d]): Wγ, centred, so that it maps a to Q̃ and p to P̃. Only these are needed.
        constant (`torch.Tensor` [d]): c' = Wβ + b, centred.
        gate (`torch.Tensor` [d]): The weights of the gate after Wγ, so that they multiply a and p.
        slope, base (`torch.Tensor` [d]): See [`Asking`].
        constants ([`Constants`]): Its numbers.
    """

    def __init__(self, dual_gate: Any):
        inner, outer, fc = dual_gate.add_layer_norm, dual_gate.layer_norm, dual_gate.fc
        weight, constant = fc.weight * inner.weight, fc.weight @ inner.bias + fc.bias
        gate = dual_gate.fc_gate.weight[0]
        self.query_norm, self.bias = dual_gate.query_norm, outer.bias
        self.map, self.constant, self.gate = weight - weight.mean(0), centred(constant), weight.T @ gate
        # With `query_norm`, A's factor is LayerNorm(v_A^G) = γ∘a/σ + β, and r = γ∘LayerNorm(v_A^G). Without it, A's factor
        # is v_A^G = a + mean.
        self.slope = outer.weight.square() if self.query_norm else outer.weight
        self.base = outer.weight * outer.bias if self.query_norm else outer.weight
        gate_bias = float(constant @ gate + dual_gate.fc_gate.bias[0])
        length = float(gate.norm())
        self.constants = Constants(
            len(self.map),
            inner.eps,
            outer.eps,
            gate_bias,
            float(self.constant.norm()),
            _GATE_ROUNDING * (float(constant.norm()) * length + abs(float(dual_gate.fc_gate.bias[0]))),
            _GATE_ROUNDING * float(weight.norm()) * length,
        )

    def asking(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Asking]:
        """Returns a [B, d], r [B, d] and the numbers [B] of A, from v_A^G [B, d]."""
        a = centred(query)
        if self.query_norm:
            scale = torch.rsqrt(a.square().mean(-1) + self.constants.outer_eps)
            shift = torch.ones_like(scale)
            bias = (a @ self.base) * scale + self.bias.square().sum()
        else:
            scale, shift = torch.ones_like(query[:, 0]), query.mean(-1)
            bias = query @ self.bias
        factor = scale[:, None] * self.slope * a + shift[:, None] * self.base
        # All that it multiplies is centred.
        factor, mapped = centred(factor), a @ self.map.T
        numbers = Asking(
            a.square().sum(-1),
            a @ self.gate,
            mapped.square().sum(-1),
            mapped @ self.constant,
            (factor * mapped).sum(-1),
            factor @ self.constant,
            factor.norm(dim=-1),
            bias,
            scale,
            shift,
        )
        return a, factor, numbers

    def answering(self, pooled: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Answering]:
        """Returns p [B, d], k [B, d] and the numbers [B] of B, from the mean patch and v_B^G, both [B, d]."""
        p, k = centred(pooled), centred(key)
        mapped = p @ self.map.T
        numbers = Answering(
            p.square().sum(-1),
            p @ self.gate,
            mapped.square().sum(-1),
            mapped @ self.constant,
            (mapped * k).sum(-1),
            k.square().sum(-1),
            k @ self.constant,
            mapped @ self.base,
            k @ self.base,
        )
        return p, k, numbers


def caps(dim: float, of_a: Asking) -> Number:
    """The score that A has with no B, rounding included: √d |r̃| and the constant."""
    reach = of_a.factor_length * math.sqrt(dim)
    return reach + of_a.bias + _ROUNDING * (reach + abs(of_a.bias))


def mention_products(vdlu: Any, mentions: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the vectors [M, K, d] to multiply with those of entities, and what [`highest_dual_scores`] reads of mentions [M, S]."""
    asks, answers = Gate(vdlu.mention_to_entity), Gate(vdlu.entity_to_mention)
    a, factor, of_a = asks.asking(mentions["vision_query"])
    p, k, of_b = answers.answering(mentions["vision_pooled"], mentions["vision_key"])
    mapped_a, mapped_p = a @ asks.map.T, p @ answers.map.T
    vectors = {
        "patches": [a, mapped_a @ asks.map, factor @ asks.map],
        "key": [mapped_a, factor],
        "asking": [p, mapped_p @ answers.map, k @ answers.map, answers.slope * mapped_p, answers.slope * k],
    }
    constants = a.new_tensor([*asks.constants, *answers.constants]).expand(len(a), -1)
    state = torch.cat([constants, torch.stack([*of_a, *of_b], 1)], 1)
    return {name: torch.stack(parts, 1) for name, parts in vectors.items()}, state


def entity_products(vdlu: Any, entities: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the vectors [N, d] and the numbers [N, R] of entities."""
    p, k, of_b = Gate(vdlu.mention_to_entity).answering(entities["vision_pooled"], entities["vision_key"])
    a, _, of_a = Gate(vdlu.entity_to_mention).asking(entities["vision_query"])
    return {"patches": p, "key": k, "asking": a}, torch.stack([*of_b, *of_a], 1)


def highest_dual_scores(
    state: torch.Tensor, products: Mapping[str, Products], numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper bounds of S_V (eq. 5) of one mention and n entities, and the caps, [n] each.

    Args:
        state (`torch.Tensor` [S]): Of the mention, by [`mention_products`].
        products (`dict`): Inner products [K, n] of the vectors of [`mention_products`] and [`entity_products`], and radii
            [K, n].
        numbers (`torch.Tensor` [R, n]): Of the entities, by [`entity_products`].
    """
    of_mention = state.tolist()
    width = len(Constants._fields)
    asks, answers = Constants(*of_mention[:width]), Constants(*of_mention[width : 2 * width])
    of_mention = of_mention[2 * width :]
    mention_a, mention_b = Asking(*of_mention[: len(Asking._fields)]), Answering(*of_mention[len(Asking._fields) :])
    entity_b, entity_a = Answering(*numbers[: len(Answering._fields)]), Asking(*numbers[len(Answering._fields) :])
    patches, key, asking = (list(zip(*products[name], strict=True)) for name in ("patches", "key", "asking"))
    one = highest_scores(asks, mention_a, entity_b, patches[0], patches[1], key[0], patches[2], key[1])
    # The products of r are made from those of slope∘a, because the scale of a is a number of the entity.
    factors = [
        (value * entity_a.scale + entity_a.shift * base, radius * entity_a.scale.abs())
        for (value, radius), base in zip(asking[3:], (mention_b.base_mapped, mention_b.base_key), strict=True)
    ]
    other = highest_scores(answers, entity_a, mention_b, *asking[:3], *factors)
    return (one + other) / 2, (caps(asks.dim, mention_a) + caps(answers.dim, entity_a)) / 2


def highest_scores(
    gate: Constants,
    of_a: Asking,
    of_b: Answering,
    ap: Products,
    qp: Products,
    qk: Products,
    rp: Products,
    rk: Products,
) -> torch.Tensor:
    """Upper bounds of S_V^A2B [n] of n pairs whose products are known up to a radius; see the module.

    Args:
        gate, of_a, of_b: The numbers of the DualGate and of both sides.
        ap, qp, qk, rp, rk: ⟨a, p⟩, ⟨Q, P⟩, ⟨Q, k⟩, ⟨r, P⟩ and ⟨r, k⟩.
    """
    dim = gate.dim
    # 1/σ₁ (eq. 12), the gate h_vg (eq. 13) and u in intervals.
    variance = (of_a.square + of_b.square + 2 * ap[0]) / dim + gate.inner_eps
    spread = ap[1] * (2 / dim) + (of_a.square + of_b.square) * (_LENGTH_ROUNDING / dim)
    largest = torch.rsqrt((variance - spread).clamp(min=gate.inner_eps))
    smallest = torch.rsqrt((variance + spread).clamp(min=gate.inner_eps))
    argument = of_a.gate + of_b.gate
    ends = [inverse * argument + gate.gate_bias for inverse in (largest, smallest)]
    margin = largest * gate.gate_rounding * (of_a.square**0.5 + of_b.square**0.5) + gate.constant_rounding
    low, high = torch.tanh(torch.minimum(*ends) - margin), torch.tanh(torch.maximum(*ends) + margin)
    gated, gated_radius = (high + low) / 2, (high - low) / 2
    inverse, inverse_radius = (largest + smallest) / 2, (largest - smallest) / 2
    u, u_radius = gated * inverse, gated.abs() * inverse_radius + gated_radius * largest
    size = u.abs()
    # ⟨r, y⟩ at most.
    along = of_a.factor_mapped + rp[0]
    top = u * along + gated * of_a.factor_constant + rk[0]
    top = top + u_radius * along.abs() + gated_radius * abs(of_a.factor_constant)
    top = top + (size + u_radius) * rp[1] + rk[1]
    # |y| at least and at most. `y` moves by no more than `moved` while u and h_vg go through their intervals.
    mapped = of_a.mapped_square + of_b.mapped_square
    both = mapped + 2 * qp[0]
    keys, constants = of_b.mapped_key + qk[0], of_a.mapped_constant + of_b.mapped_constant
    squared = u * (u * both + 2 * (gated * constants + keys)) + gated * (
        gated * gate.length**2 + 2 * of_b.key_constant
    )
    squared = squared + of_b.key_square
    terms = size.square() * mapped + of_b.key_square + gate.length**2
    top = top + _TOP_ROUNDING * of_a.factor_length * terms.sqrt()
    squared_radius = 2 * size * (size * qp[1] + qk[1]) + _LENGTH_ROUNDING * terms
    moved = u_radius * (both + 2 * qp[1]).clamp(min=0).sqrt() + gated_radius * gate.length
    shortest = ((squared - squared_radius).clamp(min=0).sqrt() - moved).clamp(min=0)
    longest = (squared + squared_radius).clamp(min=0).sqrt() + moved
    scores = top * torch.rsqrt(torch.where(top > 0, shortest, longest).square() / dim + gate.outer_eps)
    reach = of_a.factor_length * math.sqrt(dim)
    return scores.clamp(max=reach) + (of_a.bias + _ROUNDING * (reach + abs(of_a.bias)))
