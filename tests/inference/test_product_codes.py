"""Tests of products from codes: the true ones are within the radius, whatever the vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_mel.inference import product_codes, score_bounds
from hf_mel.inference.product_codes import EntityProducts, ProductCodes, encode_product_vectors
from tests.inference.test_score_bounds import WORLDS, normal


def codes_of(vectors: np.ndarray) -> ProductCodes:
    mean = vectors[: len(vectors) // 2 + 1].mean(0, dtype=np.float64)  # of a sample, not of all
    parts = encode_product_vectors(vectors, mean)
    return ProductCodes(mean, torch.from_numpy(parts["integers"]), torch.from_numpy(parts["norms"]))


@pytest.mark.parametrize("exact_integers", [True, False])
@pytest.mark.parametrize("world", WORLDS)
def test_products_are_within_the_radius(world, exact_integers, monkeypatch):
    monkeypatch.setattr(score_bounds, "_multiplies_exactly", lambda: exact_integers)
    entities = WORLDS[world].astype(np.float32)
    count, dim = entities.shape
    queries = np.concatenate([normal(3, dim), 1e4 * normal(1, dim), entities[:2], np.zeros((1, dim))])
    queries = queries.astype(np.float32)
    codes, rows = codes_of(entities), torch.arange(count).flip(0)
    values, radii = codes.products(codes.queries(queries), rows)
    exact = queries.astype(np.float64) @ entities[::-1].T.astype(np.float64)
    assert (np.abs(values.double().numpy() - exact) <= radii.double().numpy()).all()
    if world == "plain":  # codes of 8 bits are worth something
        lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(entities[::-1], axis=1)
        assert (radii.numpy() <= 0.03 * lengths + 1e-6).all()


def test_bounds_of_blocks_are_those_of_single_entities(monkeypatch):
    first, second = WORLDS["plain"].astype(np.float32), WORLDS["equal_norms"].astype(np.float32)
    numbers = torch.from_numpy(normal(2, len(first)).astype(np.float32))

    def bound(state, products, numbers):
        (a, a_radius), (b, b_radius) = products["first"], products["second"]
        return (a[0] - b[1] + state[0] * numbers[1] - a_radius[0] - b_radius[1]).clamp(max=0)

    entities = EntityProducts({"first": codes_of(first), "second": codes_of(second)}, numbers, bound)
    vectors = {"first": normal(2, 1, 40), "second": normal(2, 2, 40)}
    mentions = entities.mentions(vectors, np.array([[0.5], [2.0]]))
    rows = torch.tensor([4, 299, 0, 17, 18, 19])
    for mention in mentions:
        whole = entities.bounds(mention, rows)
        monkeypatch.setattr(product_codes, "_BLOCK_ROWS", 4)
        torch.testing.assert_close(entities.bounds(mention, rows), whole, rtol=1e-5, atol=1e-5)
        alone = torch.cat([entities.bounds(mention, rows[i : i + 1]) for i in range(len(rows))])
        torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)
        assert len(entities.bounds(mention, rows[:0])) == 0


def test_what_is_nan_proves_nothing():
    codes = codes_of(WORLDS["plain"].astype(np.float32))

    def bound(state, products, numbers):
        return torch.where(numbers[0] > 0, torch.nan, -1.0)

    numbers = torch.tensor([[0.0, 1.0] * 150])
    entities = EntityProducts({"only": codes}, numbers, bound)
    mention = entities.mentions({"only": normal(1, 2, 40)}, np.zeros((1, 1)))[0]
    assert entities.bounds(mention, torch.arange(4)).tolist() == [-1, 0, -1, 0]
