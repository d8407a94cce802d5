"""Searches with another package, in a process of its own. `python -m benchmarks.peers` starts it with the Python of that package's
environment, which has no hf_mel, so this file imports only that package and NumPy.

    python benchmarks/peer_search.py maxsim-cpu FOLDER THREADS

The folder has `tokens.npy` [T, d], the token vectors of all entities one after another, `starts.npy` [N + 1], where each entity starts,
and the same of the mentions as `mention_tokens.npy` and `mention_starts.npy` (float32). An index is built in the folder. The first line
on standard output is a JSON object about it. Then each line on standard input, `{"mention": 3, "k": 64, "setting": {…}}`, is answered
by a line with the rows of the best entities, and the seconds and CPU seconds that it took.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np


class MaxsimCpu:
    """Brute force: the score of every entity."""

    module, packages = "maxsim_cpu", ("maxsim-cpu",)

    def __init__(self, entities: list[np.ndarray], folder: Path):
        import maxsim_cpu

        self.score, self.entities = maxsim_cpu.maxsim_scores_variable, entities

    def find(self, mention: np.ndarray, k: int) -> list[int]:
        """Returns the rows of the k best entities, as the other classes do."""
        scores = np.asarray(self.score(mention, self.entities))
        best = np.argpartition(-scores, k - 1)[:k]
        return best[np.argsort(-scores[best])].tolist()


class FastPlaid:
    """An index of centroids and residuals of 4 bits, with the defaults of its release."""

    module, packages = "fast_plaid.search", ("fast-plaid", "torch")

    def __init__(self, entities: list[np.ndarray], folder: Path):
        import torch
        from fast_plaid.search import FastPlaid as Engine

        self.torch, self.engine = torch, Engine(index=str(folder / "fast-plaid"), device="cpu")
        self.engine.create(documents_embeddings=[torch.from_numpy(entity) for entity in entities])

    def find(self, mention: np.ndarray, k: int, **setting: Any) -> list[int]:
        """As in [`MaxsimCpu`]."""
        queries = self.torch.from_numpy(mention)[None]
        return [row for row, _ in self.engine.search(queries, top_k=k, show_progress=False, **setting)[0]]


class PylatePlaid:
    """PyLate's retriever over its PLAID index."""

    module, packages = "pylate.indexes", ("pylate", "fast-plaid", "torch")

    def __init__(self, entities: list[np.ndarray], folder: Path):
        from pylate import indexes, retrieve

        index = indexes.PLAID(index_folder=str(folder / "pylate"), override=True, device="cpu", show_progress=False)
        index.add_documents([str(row) for row in range(len(entities))], entities)
        self.index, self.retriever = index, retrieve.ColBERT(index=index)

    def find(self, mention: np.ndarray, k: int, n_ivf_probe: int = 8) -> list[int]:
        """As in [`MaxsimCpu`]."""
        self.index._index.n_ivf_probe = n_ivf_probe
        return [int(found["id"]) for found in self.retriever.retrieve(mention[None], k=k, device="cpu")[0]]


class PylateRerank:
    """PyLate's reranking of all entities: brute force."""

    module, packages = "pylate.rank", ("pylate", "torch")

    def __init__(self, entities: list[np.ndarray], folder: Path):
        import torch
        from pylate import rank

        self.torch, self.rank = torch, rank
        self.entities, self.rows = [torch.from_numpy(entity) for entity in entities], list(range(len(entities)))

    def find(self, mention: np.ndarray, k: int) -> list[int]:
        """As in [`MaxsimCpu`]."""
        ranked = self.rank.rerank([self.rows], [self.torch.from_numpy(mention)], [self.entities], device="cpu")
        return [found["id"] for found in ranked[0][:k]]


PEERS = {
    "maxsim-cpu": MaxsimCpu,
    "fast-plaid": FastPlaid,
    "pylate PLAID": PylatePlaid,
    "pylate rerank": PylateRerank,
}


def read_vectors(folder: Path, prefix: str = "") -> list[np.ndarray]:
    """Returns an array [L, d] of each entity, or with "mention_" of each mention.

    Each has memory of its own: maxsim-cpu takes up to four times as long for parts of one large array.
    """
    tokens, starts = (np.load(folder / f"{prefix}{name}.npy") for name in ("tokens", "starts"))
    return [tokens[first:last].copy() for first, last in pairwise(starts)]


def main() -> None:
    """Builds, and then answers standard input line by line."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the packages print is no answer
    peer = PEERS[name]
    if "torch" in peer.packages:
        import torch

        torch.set_num_threads(threads)
    import_module(peer.module)  # its seconds are not those of a build
    entities, mentions = read_vectors(folder), read_vectors(folder, "mention_")
    place = folder / f"index-{name.replace(' ', '-')}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    begin = time.process_time()
    engine = peer(entities, place)
    seconds = time.process_time() - begin
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    versions = {package: version(package) for package in peer.packages}
    print(json.dumps({"build_cpu_s": seconds, "index_bytes": size, "versions": versions}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        rows = engine.find(mentions[asked["mention"]], asked["k"], **asked["setting"])
        seconds = {"s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu_begin}
        print(json.dumps({"rows": rows, **seconds}), file=answers)
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
