"""Processes that tests start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLD = """
import sys
from hf_mel.locks import writer_lock
with writer_lock(sys.argv[1], busy="", remedy="", target=""):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def lock_holder(path: Path) -> Iterator[subprocess.Popen]:
    """Runs a process that holds the lock file `path` until its input is closed, at the latest after the block."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
