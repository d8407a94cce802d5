"""Tests of writer locks with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from hf_mel import locks
from hf_mel.errors import LockedError, MelError
from hf_mel.locks import writer_lock
from tests.processes import lock_holder


def take(path: Path, wait: float = 0.0):
    return writer_lock(path, busy="It is being written", remedy="Wait.", target=path.parent, wait=wait)


def record(**changes) -> str:
    fields = {"host": socket.gethostname(), "boot": None, "pid": os.getpid(), "started": None, "since": "yesterday"}
    return json.dumps(fields | changes)


def ended_process() -> int:
    """Returns the id of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    path = tmp_path / "lock"
    with lock_holder(path) as process:
        with pytest.raises(LockedError) as refused, take(path):
            pass
        message = str(refused.value)
        assert f"by process {process.pid} on this host ({socket.gethostname()}) since 20" in message
        assert refused.value.file == tmp_path
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists()  # a killed process cannot delete it
    with take(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_writer_waits_for_another(tmp_path):
    path = tmp_path / "lock"
    with lock_holder(path) as process:
        threading.Timer(0.3, process.stdin.close).start()
        with take(path, wait=60):
            assert process.wait() == 0
    with lock_holder(path), pytest.raises(LockedError), take(path, wait=0.2):
        pass


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    with take(tmp_path / "lock"), pytest.raises(LockedError, match=f"process {os.getpid()} "), take(tmp_path / "lock"):
        pass


COUNT = """
import sys
from pathlib import Path
from hf_mel import locks
locks._POLL_SECONDS = 0.001
if sys.argv[2] == "without":
    locks._flock = lambda descriptor: None
folder = Path(sys.argv[1])
for _ in range(30):
    with locks.writer_lock(folder / "lock", busy="", remedy="", target=folder, wait=60):
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
"""


@pytest.mark.parametrize("flock", ["with", "without"])
def test_processes_that_count_together_lose_no_step(tmp_path, flock):
    """Without flock, as on some shared file systems, the creation of the file alone must exclude."""
    (tmp_path / "count").write_text("0")
    commands = [[sys.executable, "-c", COUNT, str(tmp_path), flock]] * 3
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "90"
    assert os.listdir(tmp_path) == ["count"]


def test_the_lock_of_another_host_is_respected_even_if_its_process_has_ended(tmp_path):
    path = tmp_path / "lock"
    path.write_text(record(host="node7", boot="other", pid=ended_process()))
    with pytest.raises(LockedError, match=rf"on the host node7 since yesterday.*delete {path}"), take(path):
        pass
    assert json.loads(path.read_text())["host"] == "node7"


@pytest.mark.parametrize("has_flock", [True, False])
@pytest.mark.parametrize("change", ["ended", "restarted", "reused", "container"])
def test_the_lock_of_an_ended_process_of_this_host_is_taken_over(tmp_path, monkeypatch, has_flock, change):
    if not has_flock:
        monkeypatch.setattr(locks, "_flock", lambda descriptor: None)
    changes = {"boot": locks._boot_id()}
    if change == "ended":
        changes |= {"pid": ended_process(), "started": "1"}
    elif change == "restarted":
        changes |= {"boot": "before"}
    elif change == "reused":  # another process has the id now
        changes |= {"started": "1"}
    else:
        changes |= {"host": "3f2a6c", "pid": ended_process(), "started": "1"}
    (tmp_path / "lock").write_text(record(**changes))
    with take(tmp_path / "lock"):
        pass
    assert os.listdir(tmp_path) == []


def test_without_flock_the_lock_of_a_running_process_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_flock", lambda descriptor: None)
    for started in (locks._process_start(os.getpid()), None):
        (tmp_path / "lock").write_text(record(boot=locks._boot_id(), started=started))
        with pytest.raises(LockedError), take(tmp_path / "lock"):
            pass


def test_a_file_without_a_holder_is_taken_only_after_a_while(tmp_path, monkeypatch):
    """Its process may be about to write it, or may have been killed before."""
    path = tmp_path / "lock"
    path.touch()
    lock = locks._LockFile(path)
    assert not lock.try_acquire()
    monkeypatch.setattr(locks, "_EMPTY_SECONDS", -1)
    assert lock.try_acquire()
    lock.release()


def test_a_lock_that_was_deleted_by_hand_is_not_taken_from_its_next_holder(tmp_path):
    path = tmp_path / "lock"
    with ExitStack() as stack:
        with take(path):
            path.unlink()
            process = stack.enter_context(lock_holder(path))
        assert json.loads(path.read_text())["pid"] == process.pid


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    missing = tmp_path / "missing"
    with (
        pytest.raises(MelError, match=r"missing: The folder cannot be written \(No such file"),
        take(missing / "lock"),
    ):
        pass
