"""Tests of coding a knowledge base in several processes: the file is that of one, whatever stops a process."""

from __future__ import annotations

import shutil
import signal
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file

from hf_mel.kb import shared_work
from hf_mel.kb.indexes import build_index, certified
from hf_mel.kb.indexes.base import read_record
from hf_mel.kb.knowledge_base import KnowledgeBase
from tests.kb.test_certified import PROCESSOR, bounded
from tests.kb.test_shared_build import files, launch, outcomes
from tests.toy import toy_entities

PROGRAM = "tests.kb.shared_indexes"
ROWS = 70  # 18 units of four rows, the last of two


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Builds a knowledge base without codes."""
    folder = tmp_path_factory.mktemp("plain") / "kb"
    KnowledgeBase.build(toy_entities(ROWS), bounded(), PROCESSOR, output=folder, progress=False)
    return folder


@pytest.fixture
def root(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "kb")
    shutil.copytree(plain, tmp_path / "alone")
    return tmp_path


@pytest.fixture
def alone(root, monkeypatch):
    """Codes the copy of one process, in the chunks of the others and one unit, and returns its files."""
    monkeypatch.setattr(certified, "_CHUNK_ROWS", 4)
    build_index(KnowledgeBase(root / "alone"), "codes", bounded(), PROCESSOR, progress=False)
    return codes_of(root / "alone")


def codes_of(folder) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.startswith("index-codes")}


def test_codes_of_every_unit_are_at_their_rows(root, alone, monkeypatch):
    monkeypatch.setattr(certified, "_UNIT_ROWS", 8)
    model, kb = bounded(), KnowledgeBase(root / "kb")
    build_index(kb, "codes", model, PROCESSOR, progress=False)
    assert codes_of(kb.path) == alone
    record = read_record(kb.path, "codes")
    codes = load_file(kb.path / record.store["file"])
    vectors = model.bound_vectors(kb.encodings(range(ROWS)))[0].double().numpy()
    rotated = (vectors - np.array(record.mean)) @ codes["rotation"].T
    width = record.settings["head"]
    for part, integers, (step, error) in (
        (rotated[:, :width], codes["head"], codes["norms"][:2]),
        (rotated[:, width:], codes["tail"], codes["tail_norms"]),
    ):
        distance = np.linalg.norm(part - integers * step[:, None].astype(np.float64), axis=1)
        assert (distance <= error + 1e-9).all()
    assert record.settings["longest"][1] == pytest.approx(np.linalg.norm(vectors, axis=1).max())


def test_two_processes_write_the_codes_of_one(root, alone):
    shutil.copytree(root / "kb", root / "other")
    changed = KnowledgeBase(root / "other")
    changed.add(toy_entities(ROWS + 1).select([ROWS]), bounded(), PROCESSOR)
    done = launch(
        root,
        2,
        {"kind": "codes"},
        {"kind": "codes", "locked": True},
        {"kind": "codes", "kb": "other"},
        {"kind": "codes", "fails": 12},
        {"kind": "codes"},
        program=PROGRAM,
    )
    assert done.returncode == 0, done.stderr
    assert codes_of(root / "kb") == alone
    assert [outcome["num_seen"] for outcome in outcomes(root, 0)] == [36, 34]
    # Three units of the second process were finished before its error.
    assert sum(outcome["num_seen"] for outcome in outcomes(root, 4)) <= ROWS - 3 * 4
    for number in (0, 4):
        assert [outcome["has_index"] for outcome in outcomes(root, number)] == [True, False]
    for number, message in {
        1: "LockedError",
        2: "Process 1 has another knowledge base than process 0.",
        3: "RuntimeError: The lights went out.",
    }.items():
        for outcome in outcomes(root, number):
            assert message in outcome["error"]
    assert not list((root / "kb").glob(".index-codes.building"))


@pytest.mark.slow
def test_four_processes_write_the_codes_of_one_after_one_was_killed(root, alone):
    done = launch(root, 4, {"kind": "codes", "process": 3, "dies": 16}, program=PROGRAM)
    assert done.returncode != 0
    assert str(-signal.SIGKILL) in done.stderr
    assert not codes_of(root / "kb")
    kept = len(list((root / "kb" / ".index-codes.building" / "notes").glob("*.json")))
    assert kept >= 4  # of process 3, whose last unit of two rows is not finished
    done = launch(root, 4, {"kind": "codes"}, program=PROGRAM)
    assert done.returncode == 0, done.stderr
    assert sum(outcome["num_seen"] for outcome in outcomes(root, 0)) == ROWS - 4 * kept
    assert codes_of(root / "kb") == alone


@contextmanager
def interrupted_at(number: int):
    """Expects that a build of codes is interrupted where it finishes the unit `number`."""
    finish = shared_work.SharedFolder.finish

    def interrupted(self, unit, entry):
        if unit.number == number:
            raise KeyboardInterrupt
        finish(self, unit, entry)

    with mock.patch.object(shared_work.SharedFolder, "finish", interrupted), pytest.raises(KeyboardInterrupt):
        yield


def test_an_interrupted_build_of_one_process_goes_on_with_the_directions_of_its_units(root, alone, monkeypatch):
    monkeypatch.setattr(certified, "_UNIT_ROWS", 8)
    with interrupted_at(3):
        build_index(KnowledgeBase(root / "kb"), "codes", bounded(), PROCESSOR, progress=False)
    # Other directions, as those of another processor may be in their last digits, would not fit the finished units.
    monkeypatch.setattr(certified, "make_rotation", lambda sample, head: np.eye(sample.shape[1]))
    build_index(KnowledgeBase(root / "kb"), "codes", bounded(), PROCESSOR, progress=False)
    assert codes_of(root / "kb") == alone


def test_an_index_of_vectors_is_built_by_the_first_process_alone(root):
    pytest.importorskip("faiss")
    done = launch(root, 2, {"kind": "faiss-flat"}, {"kind": "faiss-flat", "locked": True}, program=PROGRAM)
    assert done.returncode == 0, done.stderr
    first, second = outcomes(root, 0)
    assert (first["has_index"], second["has_index"]) == (True, False)
    for outcome in outcomes(root, 1):
        assert outcome["error"].startswith("LockedError")
    build_index(KnowledgeBase(root / "alone"), "faiss-flat", bounded(), PROCESSOR, progress=False)
    built = [
        {name: content for name, content in files(root / folder).items() if name.startswith("index-faiss")}
        for folder in ("kb", "alone")
    ]
    assert len(built[0]) == 2
    assert built[0] == built[1]
