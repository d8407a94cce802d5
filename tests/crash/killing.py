"""Processes that end as by `kill -9`, or whose disk becomes full, at a moment that is named exactly.

A moment is either the n-th operation on files in the job's folder (opening one for writing, making or removing one,
renaming), just before it happens; or a number of seconds of processor time, which falls into any code, native code too. From the
moment of a full disk on, the system cuts every file off after a few bytes, in the middle of a write, in native code too.
All processes are forks of one that has imported everything.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hf_mel.errors import MelError

#: Bytes of a file that a full disk takes.
_FULL_DISK_BYTES = 1000
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.crash.jobs"])


class Moment(NamedTuple):
    """A moment of a job: before the `number`-th operation on files, or after `number` seconds of processor time.

    With the kind "full", the disk is full from the `number`-th operation on.
    """

    kind: Literal["operation", "seconds", "full"]
    number: float


class Course(NamedTuple):
    """The course of a job that was not killed: its operations on files, its processor time, and its result."""

    operations: int
    seconds: float
    result: dict[str, Any]


def run_job(name: str, folder: Path, moment: Moment | None = None) -> Course | None:
    """Runs a job in a process. Returns its course, or `None` if it was killed, or refused to go on with a full disk.

    Raises:
        AssertionError: The job failed in another way, or what was left is half of an output.
    """
    report = folder.parent / f"{folder.name}.report"
    report.unlink(missing_ok=True)
    process = _context.Process(target=_work, args=(name, str(folder), moment, str(report)))
    process.start()
    process.join()
    if report.exists():
        content = json.loads(report.read_text())
        assert "error" not in content, content["error"]
        if "full" in content:
            return None
        if "operations" in content:
            return Course(content["operations"], content["seconds"], content["result"])
    killed = -signal.SIGPROF if moment is not None and moment.kind == "seconds" else -signal.SIGKILL
    assert moment is not None
    assert process.exitcode == killed, f"exit status {process.exitcode}"
    return None


def prepare(name: str, folder: Path) -> None:
    """Writes what a job reads, in a process."""
    folder.mkdir()
    report = folder.parent / f"{folder.name}.report"
    process = _context.Process(target=_work, args=(name, str(folder), "prepare", str(report)))
    process.start()
    process.join()
    assert json.loads(report.read_text()) == {}


def _work(name: str, folder: str, moment: Moment | str | None, report: str) -> None:
    from tests.crash.jobs import JOBS

    content: dict[str, Any] = {}
    job, operations, started = JOBS[name], 0, time.process_time()
    is_full = isinstance(moment, Moment) and moment.kind == "full"
    output = os.open(os.devnull if is_full else f"{report}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def count(event: str, arguments: tuple) -> None:
        nonlocal operations
        writes = event in _CHANGES or (event == "open" and _opens_for_writing(arguments))
        if (
            not writes
            or not isinstance(arguments[0], str | os.PathLike)
            or not os.fspath(arguments[0]).startswith(folder)
        ):
            return
        operations += 1
        if isinstance(moment, Moment) and operations == moment.number:
            if moment.kind == "operation":
                os.kill(os.getpid(), signal.SIGKILL)
            elif moment.kind == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_DISK_BYTES, unlimited[1]))

    try:
        if moment == "prepare":
            job.prepare(Path(folder))
        else:
            if moment is not None:
                job.check(Path(folder))  # what a kill before has left
            sys.addaudithook(count)
            if isinstance(moment, Moment) and moment.kind == "seconds":
                signal.setitimer(signal.ITIMER_PROF, moment.number)
            job.run(Path(folder))
            signal.setitimer(signal.ITIMER_PROF, 0)
            moment = None
            content = {"operations": operations, "seconds": time.process_time() - started}
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            content["result"] = job.result(Path(folder))
    except BaseException as error:
        refuses = is_full and isinstance(error, MelError | OSError)
        content = {"full" if refuses else "error": traceback.format_exc()}
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    Path(report).write_text(json.dumps(content))
    os._exit(0)


def _opens_for_writing(arguments: tuple) -> bool:
    _, mode, flags = arguments
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def survives(name: str, folder: Path, course: Course, moments: list[Moment]) -> int:
    """Kills a job at moments, one after the other, and then lets it finish. Returns how often it was killed.

    Raises:
        AssertionError: Something half-written was left, the job could not be continued, or its result is another one.
    """
    prepare(name, folder)
    kills = 0
    for moment in moments:
        finished = run_job(name, folder, moment)
        if finished is not None:
            break
        kills += 1
    else:
        check_left(name, folder)
        finished = run_job(name, folder)
    assert finished is not None
    differing = [
        name for name in {**course.result, **finished.result} if finished.result.get(name) != course.result.get(name)
    ]
    assert not differing, "\n".join(
        f"{name}: {course.result.get(name)} became {finished.result.get(name)}" for name in differing
    )
    return kills


def check_left(name: str, folder: Path) -> None:
    """Checks what a kill has left."""
    report = folder.parent / f"{folder.name}.report"
    process = _context.Process(target=_check, args=(name, str(folder), str(report)))
    process.start()
    process.join()
    assert json.loads(report.read_text()) == {}


def _check(name: str, folder: str, report: str) -> None:
    from tests.crash.jobs import JOBS

    content = {}
    try:
        JOBS[name].check(Path(folder))
    except BaseException:
        content = {"error": traceback.format_exc()}
    Path(report).write_text(json.dumps(content))
    os._exit(0)
