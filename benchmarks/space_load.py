"""Load test of the Space: many clients send requests to its API on this machine.

    python -m benchmarks.space_load runs/mimic_flags kb/flags_mel --clients 50 --seconds 120

Starts the Space as `hf-mel space` does. Each client sends one request after another, every other one with a photo. A
request uploads the photo, asks the question and waits for the answer. Prints requests per second, latencies, failures, and
the memory of the server at the start, in the middle and at the end. The exit status is 1 if a request failed, or if memory
grew by more than a tenth after the first quarter.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

EXAMPLES = Path(__file__).parents[1] / "spaces" / "entity_linking" / "examples"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder of a retriever")
    parser.add_argument("kb", help="folder of a knowledge base that the run has built")
    parser.add_argument("--clients", type=int, default=50, help="number of clients at the same time")
    parser.add_argument("--seconds", type=float, default=120, help="duration of the test")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [
            sys.executable,
            "-c",
            "from hf_mel.cli import main; main()",
            "space",
            args.model,
            args.kb,
            "--port",
            str(port),
        ]
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            if not wait_for_server(url, server):
                log.seek(0)
                print(log.read(), file=sys.stderr)
                return 1
            figures = run(url, server.pid, args.clients, args.seconds)
        finally:
            server.terminate()
            server.wait(30)
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(figures["failed"] != {} or figures["memory_mb"]["growth_after_first_quarter"] > 0.1)


def wait_for_server(url: str, server: subprocess.Popen) -> bool:
    """Waits up to two minutes for the server. Returns whether it answers."""
    for _ in range(240):
        if server.poll() is not None:
            return False
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return True
        except httpx.TransportError:
            time.sleep(0.5)
    return False


def resident_mb(pid: int) -> float:
    """Returns the resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def link(client: httpx.Client, example: dict, options: list, *, photo: bool) -> dict:
    """Sends one request to /link and returns the answer.

    Raises:
        RuntimeError: The Space answered with an error.
    """
    image = None
    if photo:
        path = EXAMPLES / example["image"]
        uploaded = client.post("/upload", files={"files": (path.name, path.read_bytes())}).raise_for_status()
        image = {"path": uploaded.json()[0], "meta": {"_type": "gradio.FileData"}}
    response = client.post("/call/link", json={"data": [example["text"], example["mentions"][0], image, *options]})
    event = response.raise_for_status().json()["event_id"]
    events = client.get(f"/call/link/{event}").raise_for_status().text
    if "event: complete" not in events:
        raise RuntimeError(events)
    return json.loads(events.split("event: complete\ndata: ")[1].split("\n")[0])[0]


def run(url: str, pid: int, clients: int, seconds: float) -> dict:
    """Runs the clients for `seconds` and returns the measurements."""
    examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
    parameters = httpx.get(f"{url}/gradio_api/info", timeout=30).json()["named_endpoints"]["/link"]["parameters"]
    options = [parameter["parameter_default"] for parameter in parameters[3:]]
    latencies: list[float] = []
    failed: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        with httpx.Client(base_url=f"{url}/gradio_api", timeout=60) as client:
            turn = number
            while time.monotonic() < end:
                example, turn = examples[turn % len(examples)], turn + 1
                start = time.monotonic()
                try:
                    answer = link(client, example, options, photo=bool((turn + number) % 2))
                    assert answer["mention"] == example["mentions"][0]
                    latencies.append(time.monotonic() - start)
                except Exception as error:
                    failed[f"{type(error).__name__}: {error}"[:200]] += 1

    samples = [resident_mb(pid)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        samples.append(resident_mb(pid))
    duration = time.monotonic() - begin
    after_first_quarter = samples[len(samples) // 4 :]
    return {
        "clients": clients,
        "seconds": round(duration, 1),
        "requests": len(latencies),
        "requests_per_second": round(len(latencies) / duration, 2),
        "latency_s": {f"p{q}": round(float(np.percentile(latencies or [np.nan], q)), 2) for q in (50, 95, 99)},
        "failed": dict(failed),
        "memory_mb": {
            "start": round(samples[0]),
            "quarter": round(after_first_quarter[0]),
            "middle": round(samples[len(samples) // 2]),
            "end": round(samples[-1]),
            "most": round(max(samples)),
            "growth_after_first_quarter": round(max(after_first_quarter) / after_first_quarter[0] - 1, 3),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
