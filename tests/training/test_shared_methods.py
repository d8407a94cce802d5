"""Every shipped method by name: two processes with batches of B compute the loss and the gradients of one with 2·B."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from hf_mel.auto import _METHODS
from hf_mel.training.recipe import Recipe
from tests.recipes.test_rerankers import save_encoders
from tests.training.shared_methods import METHODS, steps


def test_every_method_is_here_but_the_one_that_is_fitted():
    assert {Recipe.load(name).model.type for name in METHODS} == set(_METHODS) - {"extra_trees"}


@pytest.mark.parametrize("method", sorted(_METHODS))
def test_the_forward_pass_of_a_retriever_encodes_by_its_methods_which_gather(method):
    """Otherwise several processes could not share the negatives. GHMFC and DZMNED once did not."""
    model_class = MODEL_MAPPING[CONFIG_MAPPING[method]]
    if hasattr(model_class, "encode_mentions"):
        names = _names(model_class.forward.__code__)
        assert {"encode_mentions", "encode_entities"} <= names


def _names(code) -> set[str]:
    inner = (constant for constant in code.co_consts if hasattr(constant, "co_names"))
    return set(code.co_names).union(*map(_names, inner))


@pytest.mark.slow
def test_two_processes_compute_the_gradients_of_one_with_twice_the_batch(tmp_path):
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    words = [*launch, "-m", "tests.training.shared_methods", str(tmp_path), "4"]
    save_encoders(tmp_path)
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    processes = [torch.load(tmp_path / f"{process}.pt") for process in range(2)]
    for name, one in steps(tmp_path, 8, METHODS).items():
        assert processes[0][name]["losses"] == pytest.approx(one["losses"], rel=1e-4), name
        assert any(gradient.any() for gradient in one["gradients"].values()), name
        for weight, gradient in one["gradients"].items():
            for process in processes:
                torch.testing.assert_close(
                    process[name]["gradients"][weight], gradient, rtol=1e-5, atol=1e-5, msg=f"{name}: {weight}"
                )
