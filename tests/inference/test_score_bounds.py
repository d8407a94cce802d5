"""Tests of bounds from codes: they are above the exact scores and above those of float32, whatever the vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_mel.inference import score_bounds
from hf_mel.inference.score_bounds import BoundCodes, encode, head_width, make_rotation, rounded_up

GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return GENERATOR.standard_normal(shape)


#: Vectors of entities, by what is odd about them.
WORLDS = {
    "plain": normal(300, 40),
    "narrow": normal(300, 3),
    "wide": normal(90, 300),
    "equal_norms": (x := normal(300, 40)) / np.linalg.norm(x, axis=1, keepdims=True),
    "uneven_norms": normal(300, 40) * 10.0 ** GENERATOR.uniform(-6, 6, (300, 1)),
    "duplicates": np.repeat(normal(10, 40), 30, axis=0),
    "dominant": normal(300, 40) * 0.01 + 100 * normal(300, 1) * normal(1, 40),
    "far_mean": normal(300, 40) * 0.01 + 1000,
    "zeros": np.zeros((300, 40)),
    "one_zero": np.concatenate([np.zeros((1, 40)), normal(299, 40)]),
    "single": normal(1, 40),
}


def codes_of(vectors, extras):
    vectors, extras = vectors.astype(np.float32), extras.astype(np.float32)
    mean, width = vectors.mean(0, dtype=np.float64), head_width(vectors.shape[1], extras.shape[1])
    rotation = make_rotation(vectors - mean, width)
    parts = encode(vectors, mean, rotation, width)
    norms = torch.from_numpy(np.concatenate([parts["norms"], extras.T]))
    head, tail, tail_norms = (torch.from_numpy(parts[name]) for name in ("head", "tail", "tail_norms"))
    return BoundCodes(mean, rotation, head, tail, norms, tail_norms, *parts["longest"])


@pytest.mark.parametrize("exact_integers", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_bounds_are_above_the_scores_and_the_second_ones_are_tighter(world, exact_integers, monkeypatch):
    monkeypatch.setattr(score_bounds, "_multiplies_exactly", lambda: exact_integers)
    monkeypatch.setattr(score_bounds, "_QUICK_ROWS", 64)
    monkeypatch.setattr(score_bounds, "_BLOCK_ROWS", 50)
    entities = WORLDS[world].astype(np.float32)
    count, dim = entities.shape
    extras = normal(count, 2).astype(np.float32)
    alike = entities[:: max(1, count // 5)][:5]
    queries = np.concatenate([normal(5, dim), alike, np.zeros((1, dim))]).astype(np.float32)
    weights = np.abs(normal(len(queries), 2)).astype(np.float32)
    constants = normal(len(queries)).astype(np.float32)
    exact = queries.astype(np.float64) @ entities.T.astype(np.float64)
    exact += weights.astype(np.float64) @ extras.T + constants[:, None]
    single = torch.from_numpy(queries) @ torch.from_numpy(entities).T + torch.from_numpy(weights @ extras.T)
    single = (single + torch.from_numpy(constants)[:, None]).numpy()

    codes = codes_of(entities, extras)
    asked = codes.queries(queries, weights, constants)
    quick = codes.quick_bounds(asked).numpy()
    assert quick.shape == exact.shape
    tight = np.stack([codes.bounds(asked[m : m + 1], torch.arange(count)).numpy() for m in range(len(queries))])
    of_all = np.stack([codes.bounds(asked[m : m + 1]).numpy() for m in range(len(queries))])
    for bounds in (quick, tight, of_all):
        assert (bounds >= exact).all()
        assert (bounds >= single).all()
    # A bound that is always infinite would pass, too: the second step is within a few per cent of the products.
    reach = (
        np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(entities, axis=1).max() + np.abs(constants)[:, None]
    )
    assert (tight - exact <= 0.05 * reach + 1e-6).all()
    assert (of_all - exact <= 0.05 * reach + 1e-6).all()
    assert tight.mean() <= quick.mean() + 1e-6 * reach.mean()
    alone = [codes.quick_bounds(asked[m : m + 1]).numpy()[0] for m in range(len(queries))]
    np.testing.assert_allclose(np.stack(alone), quick, rtol=1e-6, atol=1e-6 * reach.max())


def test_the_head_takes_no_more_than_200_bytes_of_an_entity():
    for dim, extras in ((8, 0), (176, 0), (384, 1), (4096, 3)):
        width = head_width(dim, extras)
        assert width <= dim
        assert width == dim or 184 <= width + 4 * (3 + extras) <= 200


def test_norms_are_rounded_up():
    values = np.concatenate([10.0 ** GENERATOR.uniform(-30, 30, 1000), [0.0, 1.0]])
    rounded = rounded_up(values)
    assert rounded.dtype == np.float32
    assert (rounded.astype(np.float64) >= values).all()
    np.testing.assert_allclose(rounded, values, rtol=1e-6)


def test_a_rotation_that_changes_lengths_is_refused():
    codes = codes_of(normal(50, 8), np.zeros((50, 0)))
    with pytest.raises(ValueError, match="not orthogonal"):
        BoundCodes(codes.mean, codes.rotation * 1.001, codes.head, codes.tail, codes.norms, codes.tail_norms, 1.0, 1.0)


def test_integer_products_are_exact():
    largest = torch.full((70, 1000), 127, dtype=torch.int8)
    random = torch.from_numpy(GENERATOR.integers(-127, 128, (70, 1000)).astype(np.int8))
    for codes in (largest, random, random[:, :7]):
        products = score_bounds.integer_products(codes, codes[:3])
        expected = codes[:3].long() @ codes.long().T
        assert all(torch.equal(row.long(), wanted) for row, wanted in zip(products, expected, strict=True))
