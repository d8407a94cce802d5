"""Inference algorithms of MM-nel, for G documents at once: belief propagation (eq. 1) and optimal transport (eq.
9-10).

These are plain functions of tensors. They know nothing of the model, so each can be compared with an independent
solver.
"""

from __future__ import annotations

import math

import torch

#: Stand-in for log(0). Infinities would put nan into gradients.
LOG_ZERO = -1e9


def distinct_pairs(present: torch.Tensor) -> torch.Tensor:
    """Returns the mask [G, n, n] of pairs (i, j), i ≠ j, whose two mentions are both `present` [G, n]."""
    n = present.shape[1]
    return present.unsqueeze(2) & present.unsqueeze(1) & ~torch.eye(n, dtype=torch.bool, device=present.device)


def max_product(
    local: torch.Tensor, pairs: torch.Tensor, mask: torch.Tensor, iterations: int, damping: float
) -> torch.Tensor:
    """Runs loopy max-product belief propagation in log space (Ganea & Hofmann, 2017).

    Without damping the result is exact on trees.

    Args:
        local (`torch.Tensor` [G, n, S]): Local scores Ψ.
        pairs (`torch.Tensor` [G, n, n, S, S]): Potential of mentions i and j, with the candidates of i before those of
            j; symmetric.
        mask (`torch.Tensor` [G, n, S]): True for real candidates. A mention without candidates sends no messages.
        iterations (`int`): Number of rounds. In a round, every mention sends a message to every other mention.
        damping (`float`): Weight of the new message; the rest is the weight of the previous message.

    Returns:
        `torch.Tensor` [G, n, S]: Log max-marginals, up to one constant per mention; 0 where masked.
    """
    present = mask.any(-1)
    sends = distinct_pairs(present).unsqueeze(-1)  # [G, n, n, 1], from i to j
    receives = sends & mask.unsqueeze(1)  # [G, n, n, S], about the candidates of j
    no_message, no_candidate = ~receives, ~mask.unsqueeze(2)
    log_uniform = -mask.sum(-1).clamp(min=1).to(local.dtype).log()
    messages = log_uniform[:, None, :, None].expand(receives.shape).masked_fill(no_message, 0.0)
    local = local.masked_fill(~mask, 0.0)
    lowest = torch.finfo(local.dtype).min / 4
    for _ in range(iterations):
        belief = (local + messages.sum(1)).unsqueeze(2) - messages.transpose(1, 2)  # of i without the message of j
        belief = belief.masked_fill(no_candidate, lowest)
        update = (belief.unsqueeze(-1) + pairs).max(3).values  # autograd keeps the indices of max, not the sums
        update = update.masked_fill(no_message, lowest).log_softmax(-1).masked_fill(no_message, 0.0)
        if damping < 1:
            mixed = torch.logaddexp(math.log(damping) + update, math.log(1 - damping) + messages)
            update = mixed.masked_fill(no_message, 0.0)
        messages = update
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
    """Solves eq. 10, optimal transport with an entropy term, in log space.

    A document that has converged is not updated further, so its plan does not depend on the rest of the batch.

    Args:
        cost (`torch.Tensor` [G, n, m]): Cost c.
        log_p, log_q (`torch.Tensor` [G, n], [G, m]): Log marginals; [`LOG_ZERO`] for padding.
        beta (`float`): Weight β of the entropy term.
        iterations (`int`): Maximum number of iterations.
        tolerance (`float`): Largest error of the marginals, a sum of absolute differences, that counts as converged.
        start (`torch.Tensor` [G, m], *optional*): Initial potential of the columns.

    Returns:
        `tuple` of `torch.Tensor`: The plan [G, n, m], the potential of its columns [G, m] and the error of its
        marginals [G].
    """
    kernel = -cost / beta
    kernel = kernel + torch.where(log_p > LOG_ZERO, 0.0, LOG_ZERO).unsqueeze(2)
    kernel = kernel + torch.where(log_q > LOG_ZERO, 0.0, LOG_ZERO).unsqueeze(1)
    f, g = torch.zeros_like(log_p), torch.zeros_like(log_q) if start is None else start
    rows = (kernel + g.unsqueeze(1)).logsumexp(2)
    error = torch.full_like(log_p[:, 0], torch.inf)
    for _ in range(iterations):
        running = error > tolerance  # False for nan, which further iterations cannot repair
        if not running.any():
            break
        new_f = log_p - rows
        new_g = log_q - (kernel + new_f.unsqueeze(2)).logsumexp(1)
        new_rows = (kernel + new_g.unsqueeze(1)).logsumexp(2)
        # The update of g makes the column sums exact, so only the row sums have an error.
        new_error = ((new_f + new_rows).exp() - log_p.exp()).abs().sum(1).detach()
        column = running.unsqueeze(1)
        f, g = torch.where(column, new_f, f), torch.where(column, new_g, g)
        rows, error = torch.where(column, new_rows, rows), torch.where(running, new_error, error)
    return (kernel + f.unsqueeze(2) + g.unsqueeze(1)).exp(), g, error


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
    """Minimises eq. 9 and 10 together by projected gradients; each step is one Sinkhorn problem.

    Gradients flow through all iterations.

    Args:
        cross (`torch.Tensor` [G, n, m]): Costs c(x, y) between the two modalities.
        within, within_other (`torch.Tensor` [G, n, n], [G, m, m]): Costs c(x, x') and c(y, y') within each modality.
        p, q (`torch.Tensor` [G, n], [G, m]): Marginals; 0 for padding.
        beta (`float`): Weight β of the entropy term.
        gw_weight (`float`): Weight of eq. 9; the rest is the weight of the cost in eq. 10.
        gw_iterations (`int`): Maximum number of steps.
        sinkhorn_iterations (`int`): Maximum number of Sinkhorn iterations in a step.
        tolerance (`float`): Largest residual that counts as converged.

    Returns:
        `tuple` of `torch.Tensor`: The plan [G, n, m] and its residual [G]: the error of its marginals or its change in
        the last step, whichever is larger. Both are sums of absolute differences.
    """
    log_p, log_q = (torch.where(x > 0, x, 1.0).log().masked_fill(x <= 0, LOG_ZERO) for x in (p, q))
    plan = p.unsqueeze(2) * q.unsqueeze(1)
    constant = _marginal_term(within, within_other, p, q)
    potential = None
    residual = torch.full_like(p[:, 0], torch.inf)
    for _ in range(gw_iterations):
        running = residual > tolerance
        if not running.any():
            break
        gradient = constant - 2 * within @ plan @ within_other
        cost = (1 - gw_weight) * cross + 2 * gw_weight * gradient
        # A tenth of the tolerance, because the remaining error of a Sinkhorn problem looks like a change of the plan.
        new_plan, g, error = sinkhorn(cost, log_p, log_q, beta, sinkhorn_iterations, tolerance / 10, potential)
        potential = g if potential is None else torch.where(running.unsqueeze(1), g, potential)
        change = torch.maximum((new_plan - plan).abs().sum((1, 2)), error).detach()
        residual = torch.where(running, change, residual)
        plan = torch.where(running[:, None, None], new_plan, plan)
    return plan, residual


def transport_cost(
    cross: torch.Tensor,
    within: torch.Tensor,
    within_other: torch.Tensor,
    plan: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    gw_weight: float,
) -> torch.Tensor:
    """Returns the cost [G] of plans [G, n, m]: the weighted sum of eq. 9 and of eq. 10 without its entropy.

    The other arguments are those of [`transport_plan`].
    """
    pairs = _marginal_term(within, within_other, p, q) - 2 * within @ plan @ within_other
    return (plan * ((1 - gw_weight) * cross + gw_weight * pairs)).sum((1, 2))


def _marginal_term(within, within_other, p, q) -> torch.Tensor:
    """Returns the part [G, n, m] of Σ T_i'j' (c₁ - c₂)² that depends on the plan through its marginals only."""
    return (within.square() @ p.unsqueeze(2)) + (within_other.square() @ q.unsqueeze(2)).transpose(1, 2)


__all__ = ["LOG_ZERO", "distinct_pairs", "max_product", "sinkhorn", "transport_cost", "transport_plan"]
