"""Checks that the Space starts and answers from its folder alone, in an environment with only its requirements.

    python -m tests.spaces.check_alone PYTHON [MODEL KB]

PYTHON is the interpreter of that environment (`make test-space` creates it). Without a model, an untrained one is used.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from gradio_client import Client, handle_file

from tests.spaces.small_model import small_model

SPACE = Path(__file__).parents[2] / "spaces" / "entity_linking"


def main(python: str, model: str | None = None, kb: str | None = None) -> None:
    """Copies the folder, runs its app.py with `python`, and sends requests to its API."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if model is None or kb is None:
            model = str(small_model(root / "model"))
            kb = f"{model}/kb"
        folder = root / "space"
        shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("__pycache__", "__init__.py"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # As on the Hub, neither the checkout nor other packages are available, and only the Space's variables are set.
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(root),
            "HF_HUB_OFFLINE": "1",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(root / "uploads"),
            "MEL_MODELS": json.dumps({"a model": os.path.abspath(model)}),
            "MEL_KBS": json.dumps({"a knowledge base": os.path.abspath(kb)}),
        }
        where = [python, "-c", "import hf_mel; print(hf_mel.__file__)"]
        place = subprocess.run(where, env=environment, cwd=folder, capture_output=True, text=True, check=True).stdout
        assert "site-packages" in place, f"hf_mel comes from {place}, not from the environment under test"
        server = subprocess.Popen([python, "app.py"], env=environment, cwd=folder)
        try:
            ask(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()
            server.wait(30)
    print("The Space starts and answers, alone.")


def ask(url: str, server: subprocess.Popen) -> None:
    """Sends one request to every endpoint once the app is up."""
    for _ in range(360):
        assert server.poll() is None, "the app ended"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.5)
    client = Client(url, verbose=False)
    example = json.loads((SPACE / "examples" / "examples.json").read_text("utf-8"))[0]
    mention = example["mentions"][0]
    photo = handle_file(str(SPACE / "examples" / example["image"]))
    answer = client.predict(example["text"], mention, photo, api_name="/link")
    assert answer["mention"] == mention
    assert len(answer["candidates"]) == 5
    print(json.dumps({key: answer[key] for key in ("mention", "entity_id", "seconds")}))
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "mentions.jsonl"
        table.write_text(json.dumps({"text": example["text"], "mention": mention}), "utf-8")
        (row,) = client.predict(handle_file(str(table)), api_name="/batch")
    assert row["entity_id"]


if __name__ == "__main__":
    main(*sys.argv[1:])
