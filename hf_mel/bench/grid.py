"""Runs the cells of a suite one after the other, and takes up an interrupted suite where it stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_mel.bench.cells import (
    CELL,
    EVALUATION,
    LOG,
    PREDICTIONS,
    RUN,
    Cell,
    PreparedCell,
    RowKey,
    empty_reason,
    grid_cells,
    inputs_digest,
    prepared_cells,
    read_record,
    shown_command,
)
from hf_mel.bench.suite import Suite
from hf_mel.data.loading import dataset_version
from hf_mel.errors import LockedError, MelError, StoppedError
from hf_mel.evaluation.tables import display_value, write_results
from hf_mel.files import read_json
from hf_mel.locks import writer_lock
from hf_mel.training.environment import code_version, machine

#: Written before anything runs, so that what an interrupted cell has left is not taken for that of other inputs.
_INPUTS = "inputs.json"
_LOCK = ".writer.lock"
#: Exit statuses of a command that was asked to stop.
_STOPPED = (StoppedError.exit_status, -signal.SIGTERM, -signal.SIGINT)
#: Name of the environment variable that silences progress bars, which would fill the log.
_SILENT = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


#: Why a cell is empty whose model gives every entity the same score.
_TIED = (
    "Every entity has the same score for every mention, so the system reads nothing of this data set, as one of images "
    "alone reads no texts. Give it a recipe for the other data sets alone."
)


@dataclass
class Spent:
    """Time and memory that a command took, and its end.

    Args:
        seconds, cpu_seconds (`float`): Wall-clock time, and time of all its processes on all cores.
        peak_bytes (`int`): Largest memory of one of its processes.
        error (`str`, *optional*): Why it failed.
        stopped (`bool`): Whether it is to be run again, because it was asked to stop, or another process writes to the same
            folder.
    """

    seconds: float
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    error: str | None = None
    stopped: bool = False


#: Runs `hf-mel` with arguments, appends its output to a file, and says what it took. The last argument says whether it must be
#: one process.
RunCommand = Callable[[Sequence[str], Path, bool], Spent]


def run_command(launcher: Sequence[str] = ()) -> RunCommand:
    """Returns the function that runs a command of `hf-mel` in a process of its own.

    Args:
        launcher (sequence of `str`): Words before `-m hf_mel`, such as `accelerate launch --num_processes 2`. Default:
            Python; with several GPUs, `accelerate launch` with a process for each. A command that must be one process is
            started by Python.
    """
    words = list(launcher) or _default_launcher()

    def run(arguments: Sequence[str], log: Path, alone: bool = False) -> Spent:
        start = time.perf_counter()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"$ {shown_command(arguments)}\n".encode())
            output.flush()
            position = output.tell()
            process = subprocess.Popen(
                [*([sys.executable] if alone else words), "-m", "hf_mel", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_SILENT},
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            except BaseException:
                process.terminate()
                process.wait()
                raise
        seconds, code = time.perf_counter() - start, process.returncode
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        spent = Spent(round(seconds, 1), round(usage.ru_utime + usage.ru_stime, 1), peak)
        if code:
            with log.open("rb") as file:
                file.seek(position)
                printed = file.read().decode(errors="replace")
            spent.error = failure_reason(printed, code)
            spent.stopped = spent.error.startswith(LockedError.__name__) or code in _STOPPED
        return spent

    return run


def failure_reason(printed: str, code: int) -> str:
    """Returns why a command failed: its last error, or the signal that ended it.

    Args:
        printed (`str`): What it printed.
        code (`int`): Its exit status, below 0 for a signal.
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"The process was ended by {name}" + (", perhaps for lack of memory." if name == "SIGKILL" else ".")
    lines = [line.strip("│ ") for line in printed.splitlines()]  # of a box around an error of usage
    lines = [line for line in lines if line and not re.fullmatch(r"[╭╰].*[╮╯]", line)]
    errors = [
        number for number, line in enumerate(lines) if re.match(r"^[A-Za-z_.]*(Error|Exception|Interrupt)\b:?", line)
    ]
    if errors:
        return " ".join(lines[errors[-1] : errors[-1] + 4])[:600]
    return (lines[-1] if lines else f"The command ended with status {code}.")[:600]


@dataclass
class Progress:
    """Numbers of cells of a suite: finished, empty because they failed, and left, that is stopped or run by another process."""

    finished: int = 0
    failed: int = 0
    left: int = 0


def run_suite(
    suite: Suite,
    runs: Path,
    *,
    run: RunCommand | None = None,
    retry: bool = False,
    delete_models: bool = False,
    kept: Collection[RowKey] = (),
    log: Callable[[str], None] = print,
) -> Progress:
    """Trains and evaluates every cell of a suite that is not finished.

    A finished cell is not run again unless its inputs have changed: the values of its recipe, the options of its
    evaluation, the data, and the files and models that these name. An interrupted training goes on from its last
    checkpoint. A cell that fails stays empty, with the reason, and the others go on. Several processes can work on one
    suite: a cell on which another one works is left to it.

    Args:
        suite ([`~hf_mel.bench.suite.Suite`]): The suite.
        runs (`Path`): The folder of its runs.
        run (`Callable`, *optional*): Runs a command. Default: [`run_command`].
        retry (`bool`): Whether cells that failed before are run again.
        delete_models (`bool`): Whether the weights of a cell's model are deleted after its evaluation.
        kept (collection of [`~hf_mel.bench.cells.RowKey`]): Rows that earlier results have, whose cells are not run.
        log (`Callable`): Takes messages.

    Returns:
        [`Progress`]: The number of finished and of failed cells.

    Raises:
        SuiteError: A data set of the suite cannot be read.
    """
    run = run_command() if run is None else run
    versions = data_versions(suite)
    failed: dict[Path, str] = {}
    grid = grid_cells(suite, runs)
    prepared = prepared_cells(suite, runs)
    if kept:  # a prepared run serves only the rows that are run
        running = [cell for cell in grid if cell.row not in kept and empty_reason(cell) is None]
        wanted = {name for cell in running for name in cell.references}
        for before in reversed(prepared):
            wanted |= set(before.references) if before.prepared.name in wanted else set()
        prepared = [cell for cell in prepared if cell.prepared.name in wanted]
    cells: list[PreparedCell | Cell] = [*prepared, *grid]
    progress = Progress()
    for number, cell in enumerate(cells, 1):
        prefix = f"[{number}/{len(cells)}] {cell.label}: "
        if isinstance(cell, Cell) and cell.row in kept:
            log(f"{prefix}kept from earlier results")
            progress.finished += 1
            continue
        needed = cell.prepared if isinstance(cell, Cell) else cell.runs
        reason = empty_reason(cell) if isinstance(cell, Cell) else None
        if reason is None:
            broken = [name for name in cell.references if needed[name].parent in failed]
            if broken:
                reason = f"It needs the prepared run {broken[0]!r}, which failed: {failed[needed[broken[0]].parent]}"
        try:
            cell.folder.mkdir(parents=True, exist_ok=True)
            with writer_lock(
                cell.folder / _LOCK, busy="The cell is being run", remedy="Wait for it.", target=cell.folder
            ):
                record = _run_cell(cell, versions, run, reason, retry, delete_models, partial(_log_with, log, prefix))
        except LockedError as error:
            log(f"{prefix}left: {error.message}")
            progress.left += 1
            continue
        if record["state"] == "finished":
            progress.finished += isinstance(cell, Cell)
        else:
            progress.failed += isinstance(cell, Cell)
            if isinstance(cell, PreparedCell):
                failed[cell.folder] = record["reason"]
    return progress


def _log_with(log: Callable[[str], None], prefix: str, text: str) -> None:
    log(prefix + text)


def data_versions(suite: Suite) -> dict[str, Any]:
    """Returns what identifies the data sets of a suite, by their names in the suite.

    Raises:
        SuiteError: A data set does not exist.
    """
    versions = {}
    for name, data in suite.data.items():
        try:
            versions[name] = dataset_version(data.dataset, revision=data.revision)
        except MelError as error:
            raise suite.error(
                f"The data set {name!r} cannot be read ({error}).",
                ("data", name),
                f"Build it, or give its place: --set data.{name}.dataset=FOLDER",
            ) from error
    return versions


def cell_state(cell: PreparedCell | Cell, versions: dict[str, Any]) -> str:
    """Returns "finished", "failed", "changed" (finished with other inputs), "interrupted" or "to do"."""
    record = read_record(cell)
    if record is None:
        return "interrupted" if (cell.folder / _INPUTS).exists() else "to do"
    if isinstance(cell, Cell) and empty_reason(cell) is not None:
        return "failed"
    return record["state"] if record["inputs"] == inputs_digest(cell.inputs(versions.__getitem__)) else "changed"


def _run_cell(
    cell: PreparedCell | Cell,
    versions: dict[str, Any],
    run: RunCommand,
    reason: str | None,
    retry: bool,
    delete_models: bool,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Runs a cell if it is not finished, and returns the content of its `cell.json`."""
    inputs = {} if reason is not None else cell.inputs(versions.__getitem__)
    digest = inputs_digest(inputs)
    done = read_record(cell)
    if (
        done is not None
        and done["inputs"] == digest
        and (done["state"] == "finished" or (not retry and reason is None))
    ):
        log(done["state"] + (f", {done['reason']}" if done["state"] == "failed" else ""))
        return done
    started = read_json(cell.folder / _INPUTS)
    started = {} if started is None and (cell.folder / _INPUTS).exists() else started  # damaged
    if started is not None and (not isinstance(started, dict) or started.get("digest") != digest):
        before = started.get("inputs") if isinstance(started, dict) else None
        changed = [key for key in inputs if (before or {}).get(key) != inputs[key]]
        log(f"its inputs have changed ({', '.join(changed) or 'all'}), so it is run again")
        _clear(cell.folder)
    elif done is not None:
        _clear(cell.folder)  # failed before
    (cell.folder / CELL).unlink(missing_ok=True)
    record: dict[str, Any] = {"state": "failed", "inputs": digest, "reason": reason, "stage": None, "spent": {}}
    if reason is None:
        write_results({"digest": digest, "inputs": inputs}, cell.folder / _INPUTS)
        commands = cell.commands()
        record["commands"] = [shown_command(arguments) for arguments in commands]
        for arguments in commands:
            stage = arguments[0]
            finished = cell.folder / (f"{RUN}/results.json" if stage == "train" else EVALUATION)
            if stage == "train" and finished.exists():
                record["spent"][stage] = asdict(_recorded_time(finished))
                continue
            log("training …" if stage == "train" else "evaluating …")
            was_started = (cell.folder / RUN / "recipe.yaml").exists()
            # Several processes share the entities of a retriever. A reranker's candidates are ranked by one.
            spent = run(arguments, cell.folder / LOG, stage == "evaluate" and isinstance(cell, Cell) and cell.reranks)
            if spent.stopped:
                raise LockedError(spent.error or "It was stopped.", file=cell.folder)
            record["spent"][stage] = asdict(spent) | ({"resumed": True} if stage == "train" and was_started else {})
            if spent.error is not None or not finished.exists():
                record |= {"stage": stage, "reason": spent.error or f"The command wrote no {finished.name}."}
                break
        else:
            if isinstance(cell, Cell) and cell.system.order is None and _is_tied(cell.folder):
                record |= {"stage": "evaluate", "reason": _TIED}
            else:
                record["state"] = "finished"
    record["code"] = code_version()
    record["machine"] = machine()
    write_results(record, cell.folder / CELL)
    if record["state"] == "finished":
        if delete_models and isinstance(cell, Cell):
            for file in (cell.folder / RUN).glob("*.safetensors"):
                file.unlink()
        log(_summary(cell, record))
    else:
        log(f"empty: {record['reason']}")
    return record


def _summary(cell: PreparedCell | Cell, record: dict[str, Any]) -> str:
    minutes = sum(spent["seconds"] for spent in record["spent"].values()) / 60
    results = read_json(cell.folder / EVALUATION)
    if results is None:
        return f"finished in {minutes:.1f} minutes"
    metrics = results["metrics"]
    shown = [f"{name} {display_value(key, metrics.get(key))}" for name, key in (("H@1", "hits@1"), ("MRR", "mrr"))]
    return f"{', '.join(shown)}, {minutes:.1f} minutes"


def _is_tied(folder: Path) -> bool:
    """Returns whether all entities share a rank for every mention of an evaluation that ranks all of them."""
    results = read_json(folder / EVALUATION)
    size = results.get("kb_size") if isinstance(results, dict) and results.get("protocol") == "full" else None
    if size is None or size < 2:
        return False
    with (folder / PREDICTIONS).open(encoding="utf-8") as lines:
        ranks = {(row["best_rank"], row["worst_rank"]) for row in map(json.loads, lines) if row["rank"] is not None}
    return ranks == {(1, size)}


def _recorded_time(results: Path) -> Spent:
    """Returns what a run took that was finished before the harness could record it."""
    content = read_json(results) or {}
    return Spent(float((content.get("run") or {}).get("seconds") or 0))


def _clear(folder: Path) -> None:
    """Deletes what an earlier run of a cell has left."""
    shutil.rmtree(folder / RUN, ignore_errors=True)
    for name in (CELL, _INPUTS, EVALUATION, PREDICTIONS, LOG):
        (folder / name).unlink(missing_ok=True)


def _default_launcher() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return [sys.executable]
    return [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]


def launcher_words(command: str | None) -> list[str]:
    """Returns the words of a launcher that was given as a command line."""
    return [] if command is None else shlex.split(command)


def _end_with_parent() -> None:
    """Lets the kernel end this process when its parent ends, even if that was killed (Linux)."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
