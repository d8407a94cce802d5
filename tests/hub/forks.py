"""Reads jobs, one JSON object per line, and runs each in a fork, so that the libraries are imported only once.

A job has `arguments` of `hf-mel`, a file `output` for exit status and output, and optionally a `token` and a folder `cache`
for downloads.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback

sys.argv[0] = "hf-mel"

# ruff: noqa: E402, F401
import huggingface_hub.constants
import huggingface_hub.hf_api
import pyarrow.parquet
import rich.table
import safetensors.numpy
import yaml

import hf_mel.hub.publish.model_repo
import hf_mel.hub.publish.upload
from hf_mel.cli import main

if "kb" in sys.argv[1:]:
    import torch

    from hf_mel.hub_errors import HubError
    from hf_mel.kb.knowledge_base import KnowledgeBase


def open_kb(name: str) -> None:
    """Prints the ids of a knowledge base after verifying its files."""
    try:
        kb = KnowledgeBase.from_pretrained(name, verify=True)
    except HubError as error:
        print("HubError", error)
        sys.exit(1)
    print(json.dumps(kb.entity_ids))


def child(job: dict) -> None:
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = 0
        try:
            if job["cache"]:
                huggingface_hub.constants.HF_HUB_CACHE = job["cache"]
            if job["token"]:
                os.environ["HF_TOKEN"] = job["token"]
            if job["arguments"][0] == "open_kb":
                open_kb(job["arguments"][1])
            else:
                sys.argv[1:] = job["arguments"]
                main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        file.seek(0)
        done = {"code": code, "output": file.read()}
    with open(job["output"] + ".part", "w") as result:
        json.dump(done, result)
    os.rename(job["output"] + ".part", job["output"])


for line in sys.stdin:
    if os.fork() == 0:
        try:
            child(json.loads(line))
        finally:
            os._exit(0)
    while True:  # reap finished children
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break
