"""The environment of a run: the code, the packages and the machine that its results and its time depend on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path
from typing import Any


def code_version() -> dict[str, Any]:
    """Returns the commit of the source tree that runs, and whether files differ from it; `None` outside a repository."""
    file = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(file.parent), *words], capture_output=True, text=True, timeout=30, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    # An installed package may lie in the repository of another project, which does not track it.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", file.name) else None
    changed = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "changed": bool(changed)}


def machine() -> dict[str, Any]:
    """Returns the parts of the machine that the time of a run depends on: processor, cores, and threads of each process."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": int(threads) if threads and threads.isdigit() else os.cpu_count(),
    }


def environment() -> dict[str, Any]:
    """Returns the code, the machine and the versions of all installed packages.

    Returns:
        `dict`: "code" ([`code_version`]), "machine" ([`machine`], with "memory_gb", "system" and "gpus"), "python", and
        "packages", versions by name.
    """
    import torch

    try:
        memory: float | None = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, ValueError):  # not on this system
        memory = None
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    packages = {str(package.metadata["Name"]): package.version for package in distributions()}
    return {
        "code": code_version(),
        "machine": {**machine(), "memory_gb": memory, "system": platform.platform(), "gpus": gpus},
        "python": platform.python_version(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].casefold())),
    }


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return Counter(names).most_common(1)[0][0] if names else platform.processor() or platform.machine()
