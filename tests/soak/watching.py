"""Memory and open files of a process over time."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any


class Watch:
    """Samples of a process.

    Args:
        process (`int`): Its id.

    Attributes:
        samples (`list[dict]`): Minutes since the start, resident memory in MB, and numbers of open files and threads.
    """

    def __init__(self, process: int):
        self.process, self.samples, self._start = process, list[dict[str, float]](), time.monotonic()

    def look(self) -> None:
        """Adds a sample, and prints one of each minute."""
        status = Path(f"/proc/{self.process}/status").read_text()
        self.samples.append(
            {
                "minute": round((time.monotonic() - self._start) / 60, 2),
                "mb": round(int(status.split("VmRSS:")[1].split()[0]) / 1024, 1),
                "files": len(os.listdir(f"/proc/{self.process}/fd")),
                "threads": int(status.split("Threads:")[1].split()[0]),
            }
        )
        if int(self.samples[-1]["minute"]) > int(self.samples[-2]["minute"] if len(self.samples) > 1 else -1):
            print(json.dumps(self.samples[-1]), file=sys.stderr, flush=True)

    def growth(self) -> list[str]:
        """Returns what grew after the first sixth of the time: memory by more than a twentieth, or files by more than two.

        The medians of the first and the last quarter of that time are compared: connections and arrays come and go.
        """
        settled = self.samples[len(self.samples) // 6 :]
        quarter = max(1, len(settled) // 4)
        grown = []
        for name, allowed in (("mb", lambda before: 1.05 * before), ("files", lambda before: before + 2)):
            before, after = (
                statistics.median(sample[name] for sample in part) for part in (settled[:quarter], settled[-quarter:])
            )
            if after > allowed(before):
                grown.append(f"{name} grew from {before} to {after}")
        return grown

    def summary(self) -> dict[str, Any]:
        """Returns the samples at each sixth of the time, and the most memory and files."""
        last = len(self.samples) - 1
        return {
            "samples": [self.samples[last * part // 6] for part in range(7)],
            "most mb": max(sample["mb"] for sample in self.samples),
            "most files": max(sample["files"] for sample in self.samples),
        }
