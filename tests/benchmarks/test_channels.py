"""The places of golds by names alone, and the names of a grown knowledge base."""

import numpy as np
import pytest

from benchmarks.channels import grown_names, place_by_names, recalls


@pytest.mark.parametrize(
    ("scores", "gold", "place"),
    [
        ({1: 1.0, 2: 0.75, 3: 0.75}, 1, 1),
        ({1: 1.0, 2: 0.75, 3: 0.75}, 2, 2.5),
        ({1: 1.0, 2: 0.75, 3: 0.75}, 0, 3 + (1 + 7) / 2),  # one of seven without a score
        ({}, 4, 5.5),
    ],
)
def test_a_gold_has_the_mean_of_its_best_and_worst_place(scores, gold, place):
    rows, values = np.array([*scores], dtype=int), np.array([*scores.values()], dtype=float)
    assert place_by_names((rows, values), gold, 10) == place


def test_grown_names_start_with_the_real_ones_and_mix_their_words():
    names = ["Ann Lee", "Bo de Vries", "Cleo"]
    grown = [name for (name,) in grown_names(names, 200)]
    assert grown[:3] == names
    assert len(grown) == 200
    assert {name.split()[-1] for name in grown} == {"Lee", "Vries", "Cleo"}
    assert "Bo de Lee" in grown
    assert [name for (name,) in grown_names(names, 50)] == [name for (name,) in grown_names(names, 50)]
    assert recalls([1, 1.5, 8, 65]) == {"recall@1": 0.25, "recall@8": 0.75, "recall@64": 0.75}
