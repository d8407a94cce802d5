"""Two processes that share batches, against one process with whole batches."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_mel.training.augmentation import augmented_image, photographed_image, skip_image
from hf_mel.training.shared_batches import gathered_encodings, part_rows
from tests.training.shared_training import train_all


@pytest.mark.parametrize("count", [1, 2, 5, 9])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_have_every_row_once_unless_there_are_fewer_rows_than_parts(count, num_parts):
    rows = list(range(count))
    parts = [part_rows(rows, (number, num_parts)) for number in range(num_parts)]
    assert all(parts)
    if count >= num_parts:
        assert [row for part in parts for row in part] == rows
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("change", "strong"), [(augmented_image, False), (photographed_image, True)])
def test_a_skipped_image_takes_as_many_draws_as_a_changed_one(change, strong):
    first, second = random.Random(3), random.Random(3)
    change(Image.new("RGB", (7, 5)), first)
    skip_image(second, strong)
    assert first.random() == second.random()


def test_a_forward_pass_that_hides_its_encodings_is_an_error():
    class Hides(torch.nn.Module):
        def encode_mentions(self):
            return {}

        encode_entities = encode_mentions

    model = Hides()
    with (
        pytest.raises(RuntimeError, match=r"Hides\.forward does not call encode_mentions"),
        gathered_encodings(model, 2, 2),
    ):
        pass
    assert "encode_mentions" not in vars(model)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    words = [*launch, "-m", "tests.training.shared_training", str(tmp_path), "4"]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    expected = train_all(tmp_path / "one", 8)
    outcomes = [torch.load(tmp_path / f"{process}.pt") for process in range(2)]
    # Processes wait longer than their group allows, share an error, and open each its part of the images.
    for outcome in outcomes:
        assert outcome["made"] == {
            "slowly": "made by 0",
            "error": "Process 0 cannot make them. Give others.",
            "images": [0, 1, 1, 1, 0],
        }
    assert all(outcome["opened"] for outcome in outcomes)
    assert sum(outcome["opened"] for outcome in outcomes) == 5
    processes = [outcome["trained"] for outcome in outcomes]
    for name, one in expected.items():
        pairs = [shared[name]["pairs"] for shared in processes]
        assert sum(pairs) == one["pairs"], name
        assert all(pairs) == ("reranker" in name), name
    for process, shared in enumerate(processes):
        assert shared.keys() == expected.keys()
        for name, one in expected.items():
            two = shared[name]
            if process == 0:  # the first process keeps the log
                assert two["losses"] == pytest.approx(one["losses"], rel=1e-4), name
                for metrics, whole in zip(two["metrics"], one["metrics"], strict=True):
                    assert metrics == pytest.approx(whole, rel=1e-4), name
            for weight, value in one["weights"].items():
                torch.testing.assert_close(
                    two["weights"][weight], value, rtol=1e-5, atol=1e-5, msg=f"{name}: {weight} of process {process}"
                )
