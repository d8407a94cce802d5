"""Tests of building a knowledge base in several processes: the files are those of one, whatever stops a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_mel.inference import encode
from hf_mel.kb import build_index, shards
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.kb.shared_work import work_units
from hf_mel.linking.linker import EntityLinker
from tests.kb.shared_builds import WatchedProcessor, token_model
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model

ROOT = Path(__file__).parents[2]


def launch(
    folder: Path, processes: int, *builds: dict, program: str = "tests.kb.shared_builds", **variables: str
) -> subprocess.CompletedProcess:
    """Runs a program, by default that of `shared_builds`, in processes, with variables in their environment."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", program, json.dumps(builds), str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    } | variables
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def start_as_hosts_do(folder: Path, processes: int, *builds: dict) -> None:
    """Runs the program in processes without a launcher that would end them all when one is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "tests.kb.shared_builds", json.dumps(builds), str(folder)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    try:
        for process in started:
            process.wait(timeout=600)
    finally:
        for process in started:
            process.kill()


def outcomes(folder: Path, number: int) -> list[dict]:
    """Returns what became of a build in each process."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"outcome-{number}-*.json"))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    """Makes shards of eight entities and windows of one batch, as the program of the processes does."""
    monkeypatch.setattr(shards, "_SHARD_BYTES", 8 * 2 * 16 * 4)
    monkeypatch.setattr(shards, "_GROUP_ROWS", 4)
    monkeypatch.setattr(encode, "_WINDOW_BATCHES", 1)


def build_alone(folder: Path, **options) -> KnowledgeBase:
    entities = options.pop("entities", None) or toy_entities(30)
    options = {"model": toy_model(), "batch_size": 4, "progress": False} | options
    return KnowledgeBase.build(entities, processor=WatchedProcessor(), output=folder, **options)


@given(st.integers(1, 400), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_units_hold_every_row_once_in_windows_of_one_process(num_rows, step, windows_per_shard):
    shard_rows = step * windows_per_shard
    units = work_units(num_rows, shard_rows, step)
    assert [row for unit in units for row in unit.rows] == list(range(num_rows))
    assert [unit.number for unit in units] == list(range(len(units)))
    for unit in units:
        assert unit.rows.start % step == 0
        assert {row // shard_rows for row in unit.rows} == {unit.shard}
        whole = range(unit.shard * shard_rows, min((unit.shard + 1) * shard_rows, num_rows))
        assert unit.is_shard == (unit.rows == whole)
    full = -(-num_rows // shard_rows) * shard_rows  # the last shard may have fewer batches than the others have units
    assert len(work_units(full, shard_rows, step)) >= min(64, full // step)


def test_two_processes_write_the_files_of_one(tmp_path, small_shards, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    done = launch(
        tmp_path,
        2,
        {"output": "parts"},
        {"output": "shards", "units": 1},
        {"output": "half", "dtype": "bfloat16"},
        {"output": "type", "change": {"dtype": "float16"}},
        {"output": "batch", "change": {"batch_size": 8}},
        {"output": "other", "change": {"model": 1, "entities": 29}},
        {"output": "unseen", "change": {"folder": str(tmp_path / "elsewhere")}},
        {"output": "reranker", "reranker": True},
        {"output": "failed", "process": 0, "change": {"fails": "Q2"}},
        {"output": "failed"},
        {"output": "few_bits", "dtype": "int4"},
        {"output": "windows", "window": 2, "shard": 20},
        {"output": "tokens", "dtype": "int4", "tokens": True},
        {"output": "token_shards", "dtype": "int4", "tokens": True, "units": 1},
    )
    assert done.returncode == 0, done.stderr
    whole = files(build_alone(tmp_path / "whole").path)
    assert len(whole) == 9
    assert files(tmp_path / "parts") == files(tmp_path / "shards") == files(tmp_path / "failed") == whole
    assert files(tmp_path / "half") == files(build_alone(tmp_path / "half_alone", dtype="bfloat16").path)
    assert files(tmp_path / "few_bits") == files(build_alone(tmp_path / "few_bits_alone", dtype="int4").path)
    tokens = files(build_alone(tmp_path / "tokens_alone", dtype="int4", model=token_model()).path)
    assert files(tmp_path / "tokens") == files(tmp_path / "token_shards") == tokens
    monkeypatch.setattr(encode, "_WINDOW_BATCHES", 2)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 20 * 2 * 16 * 4)
    windows = build_alone(tmp_path / "windows_alone")
    assert windows.info()["shards"] == 2  # of 24 and 6 entities: three windows, and one that is not full
    assert files(tmp_path / "windows") == files(windows.path)
    for number in (0, 1, 2, 11):
        assert all(0 < outcome["num_seen"] < 30 for outcome in outcomes(tmp_path, number))
        assert sum(outcome["num_seen"] for outcome in outcomes(tmp_path, number)) == 30
    for number, (error, message) in {
        3: (
            "KnowledgeBaseError",
            "Process 1 has another dtype than process 0. Start all processes with the same command",
        ),
        4: ("KnowledgeBaseError", "Process 1 has another batch size than process 0."),
        5: ("KnowledgeBaseError", "Process 1 has another entities and model than process 0."),
        6: ("KnowledgeBaseError", "The folder of the first process is not seen by this one. Give an output on a disk"),
        7: ("KnowledgeBaseError", "ToyReranker cannot encode entities without a mention. Give a retriever;"),
        8: ("RuntimeError", "The lights went out."),
    }.items():
        for outcome in outcomes(tmp_path, number):
            assert outcome["error"].startswith(error)
            assert message in outcome["error"]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        *("parts", "shards", "half", "half_alone", "whole", "failed", "elsewhere", "few_bits", "few_bits_alone"),
        *("windows", "windows_alone"),
        *("tokens", "token_shards", "tokens_alone"),
    }
    linker = EntityLinker(toy_model(), WatchedProcessor(), tmp_path / "whole", name_weight=0.5)
    expected = []
    for where in (None, "name = 'Entity a' or name = 'Entity dd'", "name = 'Entity z'"):
        linker.where = where
        expected += linker(list(toy_mentions(11)), top_k=4, batch_size=3)
        expected += linker(list(toy_mentions(3)), top_k=4, units=["text"])
    first, second = (json.loads((tmp_path / f"linked-{number}.json").read_text()) for number in range(2))
    assert second == []
    for result, alone in zip(first, expected, strict=True):
        for mine, whole in zip(result["candidates"], alone.to_dict()["candidates"], strict=True):
            assert mine.pop("score") == pytest.approx(whole.pop("score"), rel=1e-5)
            assert mine == whole
        assert result["certified"]
        assert result["num_tied"] == alone.num_tied
    for number, half in enumerate([range(15), range(15, 30)]):
        ties, first_read, last_read = json.loads((tmp_path / f"ties-{number}.json").read_text())
        assert ties == ({} if number else {"None": [30] * 3, "name != 'Entity c'": [29] * 3})
        assert first_read >= half.start
        assert last_read <= half.stop
    for number in range(2):
        assert "is nan" in json.loads((tmp_path / f"error-{number}.json").read_text())


def test_every_image_is_opened_by_one_process(tmp_path, small_shards):
    lines = []
    for number in range(30):
        Image.new("RGB", (4, 4), (8 * number, 0, 0)).save(tmp_path / f"{number}.png")
        names = [f"{number}.png", *["7.png"] * (number == 5)]
        lines.append({"id": f"Q{number}", "name": f"Entity {number}", "image": names})
    for number in (3, 4, 20):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:10]))
    done = launch(
        tmp_path,
        2,
        {"output": "made"},
        {"output": "file", "file": str(mine)},
        {"output": "strict", "file": str(mine), "strict": True},
        {"output": "lost", "file": str(mine), "change": {"file": str(tmp_path / "lost.jsonl")}},
        {"output": "fewer", "file": str(mine), "change": {"file": str(tmp_path / "fewer.jsonl")}},
        {"output": "kind", "change": {"file": str(mine)}},
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "made") == files(build_alone(tmp_path / "made_alone").path)
    alone = build_alone(tmp_path / "file_alone", entities=mine)
    assert files(tmp_path / "file") == files(alone.path)
    assert [entry["row"] for entry in alone.left_out_images] == [4, 5, 21]
    assert [outcome["num_opened"] for outcome in outcomes(tmp_path, 0)] == [12, 12]  # 24 have one
    assert [outcome["num_opened"] for outcome in outcomes(tmp_path, 1)] == [15, 16]
    for number, message in {
        2: "row 4: 3.png: ",
        3: "lost.jsonl",
        4: "Process 1 has another entities than process 0",
        5: "Process 1 has another entities than process 0",
    }.items():
        for outcome in outcomes(tmp_path, number):
            assert message in outcome["error"]


def test_finished_units_survive_an_error_and_the_same_call_goes_on(tmp_path, small_shards):
    failing = {"fails": "Q30"}
    done = launch(
        tmp_path,
        2,
        {"output": "failed", "change": failing},
        {"output": "failed"},
        {"output": "full", "change": {"full": "Q30"}},
        {"output": "full"},
        {"output": "again", "dtype": "float16"},
        {"output": "again", "change": failing},
        {"output": "again", "change": {"locked": True}},
        {"output": "again"},
    )
    assert done.returncode == 0, done.stderr
    whole = files(build_alone(tmp_path / "whole").path)
    assert files(tmp_path / "failed") == files(tmp_path / "full") == whole
    rows = range(30)
    again, alone = (KnowledgeBase(tmp_path / name).encodings(rows) for name in ("again", "whole"))
    assert all(torch.equal(again[name], alone[name]) for name in alone)
    for number, message in {0: "The lights went out.", 2: "No space left", 5: "The lights went out."}.items():
        for outcome in outcomes(tmp_path, number):
            assert message in outcome["error"]
            assert "is kept: repeat the command to go on, or delete" in outcome["error"]
    for outcome in outcomes(tmp_path, 6):
        assert outcome["error"].startswith("LockedError")
    # Before its error in its last unit, the second process had finished two units of four entities, or more.
    for number in (1, 3, 7):
        assert 0 < sum(outcome["num_seen"] for outcome in outcomes(tmp_path, number)) <= 30 - 8
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"failed", "full", "again", "whole"}


def test_a_killed_process_is_found_out_by_the_others_and_one_that_works_long_is_not(tmp_path, small_shards):
    slow = {"output": "slow", "lost": 5, "change": {"sleeps": "Q30"}}
    start_as_hosts_do(tmp_path, 2, slow, {"output": "kb", "lost": 5, "change": {"dies": "Q30"}})
    assert [outcome.get("error") for outcome in outcomes(tmp_path, 0)] == [None, None]
    assert files(tmp_path / "slow") == files(build_alone(tmp_path / "whole").path)
    (outcome,) = outcomes(tmp_path, 1)
    assert outcome["error"].startswith("LostProcessError")
    assert "Process 1 has given no sign" in outcome["error"]
    assert "is kept: repeat the command" in outcome["error"]
    assert not (tmp_path / "kb").exists()
    assert len(list((tmp_path / ".kb.building" / "notes").glob("*.json"))) >= 6  # of eight; the last had begun


@pytest.mark.slow
def test_a_process_waits_longer_for_another_than_the_limit_of_collective_calls(tmp_path, small_shards):
    done = launch(tmp_path, 2, {"output": "parts", "change": {"reads": 14}}, LIMIT="10", IDLE="14")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "parts") == files(build_alone(tmp_path / "whole").path)
    assert len(json.loads((tmp_path / "linked-0.json").read_text())) == 42


@pytest.mark.slow
def test_the_commands_of_two_processes_write_what_those_of_one_write(tmp_path):
    pytest.importorskip("faiss")
    register()
    toy_model().save_pretrained(tmp_path / "model")
    mentions = [{"text": f"Here Entity {letter} met b.", "mention": f"Entity {letter}"} for letter in "abcdefgh"]
    (tmp_path / "mentions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mentions))
    starts = {"one": [sys.executable], "two": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    starts["two"] += ["--nproc-per-node", "2"]
    program = "from hf_mel.cli import main; from tests.toy import register; register(); main()"
    (tmp_path / "program.py").write_text(program)
    ToyProcessor().save_pretrained(tmp_path / "model")
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"id": f"Q{k}", "name": f"Entity {chr(97 + k)}"}) + "\n" for k in range(20))
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    for name, start in starts.items():
        for words in (
            ["kb", "build", "model", "--entities", "mine.jsonl", "--output", name, "--batch-size", "3"],
            ["kb", "index", name, "--model", "model", "--kind", "faiss-flat"],
            ["link", "model", "--kb", name, "--input", "mentions.jsonl", "--output", f"{name}.jsonl"],
        ):
            command = [*start, "program.py", *words, "--device", "cpu"]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Next: ") + done.stdout.count("mentions linked") == 1
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for one, two in zip(*((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in starts), strict=True):
        ids = [[c["entity_id"] for c in json.loads(line)["linked"]["candidates"]] for line in (one, two)]
        assert ids[0] == ids[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_a_build_goes_on_after_a_process_was_killed_with_another_number_of_them(tmp_path, small_shards, victim):
    done = launch(tmp_path, 4, {"output": "kb", "process": victim, "change": {"dies": "Q6" if victim == 0 else "Q29"}})
    assert done.returncode != 0
    assert str(-signal.SIGKILL) in done.stderr
    assert not (tmp_path / "kb").exists()
    notes = list((tmp_path / ".kb.building" / "notes").glob("*.json"))
    kept = len(notes)
    assert kept > 0
    damaged = tmp_path / ".kb.building" / "parts" / json.loads(notes[0].read_text())["encodings"]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = launch(tmp_path, 2, {"output": "kb"})
    assert done.returncode == 0, done.stderr
    # 30 entities are eight units of four; the last one has two.
    assert sum(outcome["num_seen"] for outcome in outcomes(tmp_path, 0)) in {
        4 * (8 - kept + 1),
        4 * (8 - kept + 1) - 2,
    }
    assert files(tmp_path / "kb") == files(build_alone(tmp_path / "whole").path)
    assert not (tmp_path / ".kb.building").exists()
    build = (tmp_path / "kb", tmp_path / "whole")
    for folder in build:
        build_index(KnowledgeBase(folder), "faiss-flat", toy_model(), WatchedProcessor())
    indexes = [{name: data for name, data in files(folder).items() if name.startswith("index-")} for folder in build]
    assert len(indexes[0]) == 2
    assert [len(data) for data in indexes[0].values()] == [len(data) for data in indexes[1].values()]
