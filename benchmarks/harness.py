"""What all benchmarks share: interleaved repeats, memory of a process of its own, growth exponents, the machine, files."""

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
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=5, help="of everything that is timed; the median is reported")
    made.add_argument("--threads", type=int, help="of PyTorch (default: what PyTorch takes)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    made.add_argument("--scratch", type=Path, default=ROOT / "artifacts" / "benchmarks", help="kept between runs")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return made


def start(args: argparse.Namespace) -> None:
    """Sets what the options say; called first, in children too."""
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
) -> dict[str, list[float]]:
    """Seconds of each case, `repeats` times, one after another in turn, so that a slow minute hits all of them.

    Args:
        cases: What to time by name.
        repeats (`int`): How often.
        device (`str`): "cuda" waits for the device before it reads the clock.
        warm_up (`bool`): Whether each runs once before.
        progress (`Callable`, *optional*): Told what runs.
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
            begin = time.perf_counter()
            case()
            wait()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of some times."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The b of values ≈ a·sizesᵇ, by least squares between the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - mean_x) ** 2 for a in x)


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the k rows that exact ranking puts first, [M, k], which are among those found, [M, ≥ k]."""
    return (found[:, None, :] == exact[:, :, None]).any(-1).double().mean().item()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"There is no {field} in /proc/self/status; memory is measured on Linux only.")


@contextmanager
def memory(device: str = "cpu") -> Iterator[dict[str, int]]:
    """Peak memory in bytes of what runs inside, above what was there when it began.

    `peak_bytes` counts all resident pages, those of memory-mapped files included, which the kernel can drop at any
    time; `own_bytes` counts the process's own (sampled every 10 ms). On a GPU both are PyTorch's peak there.
    """
    found: dict[str, int] = {}
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found["peak_bytes"] = found["own_bytes"] = torch.cuda.max_memory_allocated() - before
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    resident, own = _status("VmRSS"), _status("RssAnon")
    most, done = [own], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
    found["peak_bytes"] = max(0, _status("VmHWM") - resident)
    found["own_bytes"] = max(most[0], _status("RssAnon")) - own


def in_child(function: str, arguments: Mapping[str, Any]) -> Any:
    """What `module:function(**arguments)` returns in a process of its own; arguments and answer are JSON.

    Raises:
        `RuntimeError`: it failed, or was killed for memory; with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.harness", function, json.dumps(dict(arguments))]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if ran.returncode:
        raise RuntimeError(f"{function} ended with {ran.returncode}: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What ran this: processor, cores, threads, software, and the rate of a large matrix product measured now."""
    from hf_mel.evaluation.evaluator import software_versions  # slow to import, and children do not need it

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    described = {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "gemm_gflops": round(gemm_rate(device, dtype) / 1e9, 1),
        "exp_per_second": exp_rate(device),
        "software": software_versions(),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name()
    return described


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations per second of a `size`³ matrix product: the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"gemm": lambda: a @ b}, repeats, device=device)["gemm"]
    return 2 * size**3 / min(times)


def exp_rate(device: str = "cpu", repeats: int = 7) -> float:
    """Powers of two per second over a block that stays in the caches (a large one on a GPU): the best of `repeats`."""
    x = torch.rand(2**16 if device == "cpu" else 2**26, device=device)
    y, rounds = torch.empty_like(x), 200 if device == "cpu" else 5

    def run() -> None:
        for _ in range(rounds):
            torch.exp2(x, out=y)

    return rounds * x.numel() / min(interleaved({"exp": run}, repeats, device=device)["exp"])


def say(text: str) -> None:
    """One dim line on the error stream."""
    Console(stderr=True).print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)


def write(folder: Path, name: str, results: Mapping[str, Any]) -> Path:
    """Writes `name`.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    module, function = sys.argv[1].split(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
