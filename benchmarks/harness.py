"""Shared parts of the benchmarks: options, timing, memory in a child process, growth exponents, machine and files."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options of every benchmark."""
    shared = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("--repeats", type=int, default=5, help="how often to time each case; the median is reported")
    shared.add_argument("--threads", type=int, help="threads of PyTorch (default: PyTorch decides)")
    shared.add_argument("--device", default="cpu", help="device to run on: cpu or cuda")
    shared.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of the weights"
    )
    shared.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "artifacts" / "benchmarks",
        help="folder of models and knowledge bases, reused by later runs",
    )
    shared.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    return shared


def start(args: argparse.Namespace) -> None:
    """Applies the options to this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    device: str = "cpu",
    warm_up: bool = True,
    progress: Callable[[str], None] | None = None,
    cpu_seconds: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Times each case `repeats` times. The cases take turns, so that a slow minute affects all of them.

    Args:
        cases (mapping of `str` to callable): Cases to time, by name.
        repeats (`int`): Number of timed calls of each case.
        device (`str`): With "cuda", the clock is read after the device has finished.
        warm_up (`bool`): Call each case once before it is timed.
        progress (callable, *optional*): Called with a line before each call.
        cpu_seconds (`dict`, *optional*): Filled with the CPU seconds of all threads, as the result is with seconds.

    Returns:
        `dict[str, list[float]]`: Seconds of each timed call, by name.
    """

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-1 if warm_up else 0, repeats):
        for name, case in cases.items():
            if progress:
                progress(f"{name}, {'warm-up' if turn < 0 else f'{turn + 1} of {repeats}'}")
            wait()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            case()
            wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
                if cpu_seconds is not None:
                    cpu_seconds.setdefault(name, []).append(time.process_time() - cpu_begin)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Returns median, minimum and maximum of times in seconds."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Returns b of values ≈ a·sizesᵇ, fitted by least squares to the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def recall(retrieved: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the share of the best k rows of the exact ranking that are among the retrieved rows.

    Args:
        retrieved (`torch.Tensor` of shape `[M, ≥ k]`): Rows of an index for each mention.
        exact (`torch.Tensor` of shape `[M, k]`): Rows of the exact ranking.
    """
    return (retrieved[:, None, :] == exact[:, :, None]).any(-1).double().mean().item()


def _process_status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no field {field}. Memory can be measured on Linux only.")


@contextmanager
def memory(device: str = "cpu") -> Iterator[dict[str, int]]:
    """Measures the peak memory of the block in bytes, minus the memory in use at its start.

    Yields:
        `dict[str, int]`: Filled in at the end of the block. `peak_bytes` counts all resident pages, including those of
        memory-mapped files, which the kernel can drop at any time. `own_bytes` counts anonymous pages only (sampled
        every 10 ms). On a GPU both are the peak of PyTorch's allocator.
    """
    used: dict[str, int] = {}
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield used
        torch.cuda.synchronize()
        used["peak_bytes"] = used["own_bytes"] = torch.cuda.max_memory_allocated() - before
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident, anonymous = _process_status("VmRSS"), _process_status("RssAnon")
    highest, done = [anonymous], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], _process_status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield used
    finally:
        done.set()
        watcher.join()
    used["peak_bytes"] = max(0, _process_status("VmHWM") - resident)
    used["own_bytes"] = max(highest[0], _process_status("RssAnon")) - anonymous


def in_child(function: str, arguments: Mapping[str, Any]) -> Any:
    """Calls `module:function(**arguments)` in a child process and returns its result.

    Args:
        function (`str`): "module:function".
        arguments (mapping): JSON values, as is the result.

    Raises:
        RuntimeError: The child failed, or was killed because memory ran out. The message ends with its last output.
    """
    command = [sys.executable, "-m", "benchmarks.harness", function, json.dumps(dict(arguments))]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        raise RuntimeError(f"{function} ended with {child.returncode}: {child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Describes the machine: processor, cores, threads, software, and the measured rate of a large matrix product."""
    from hf_mel.evaluation.evaluator import software_versions  # a slow import that children do not need

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    description = {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "gemm_gflops": round(gemm_rate(device, dtype) / 1e9, 1),
        "exp_per_second": exp_rate(device),
        "software": software_versions(),
    }
    if device.startswith("cuda"):
        description["gpu"] = torch.cuda.get_device_name()
    return description


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 7) -> float:
    """Returns floating-point operations per second of a `size`³ matrix product, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"gemm": lambda: a @ b}, repeats, device=device)["gemm"]
    return 2 * size**3 / min(times)


def exp_rate(device: str = "cpu", repeats: int = 7) -> float:
    """Returns powers of two per second, the best of `repeats`.

    The block fits into the caches of a CPU. On a GPU it is large.
    """
    x = torch.rand(2**16 if device == "cpu" else 2**26, device=device)
    y, rounds = torch.empty_like(x), 200 if device == "cpu" else 5

    def run() -> None:
        for _ in range(rounds):
            torch.exp2(x, out=y)

    return rounds * x.numel() / min(interleaved({"exp": run}, repeats, device=device)["exp"])


def say(text: str) -> None:
    """Prints a line with the time on standard error."""
    Console(stderr=True).print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)


def write(folder: Path, name: str, results: Mapping[str, Any]) -> Path:
    """Writes results to `folder/name.json` and returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    module, function = sys.argv[1].split(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
