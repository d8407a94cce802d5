"""Prints the benchmark results as tables and draws a plot.

python -m benchmarks.summary               # prints the tables and writes benchmarks/results/ranking.png
python -m benchmarks.summary --markdown    # prints the tables as Markdown, without the plot
python -m benchmarks.summary --docs        # also writes the tables into docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, ROOT

#: Page of the documentation with the tables, and the comments around them.
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

#: (title, columns, rows, caption)
Report = tuple[str, list[str], list[list[str]], str]


def report_ranking(result: dict[str, Any]) -> Report:
    """Returns a row for each size and form."""
    direct, floor = result["direct"], result["floor"]
    columns = [
        "entities",
        "form",
        "× direct",
        "pairs/s",
        "of the floor",
        "in full",
        "memory / direct",
        "peak memory",
        "kB/entity",
    ]
    lines = [
        [
            f"{row['entities']:,}",
            row["form"],
            f"{row['times_direct']:.1f}",
            f"{row['pairs_per_second']:,.0f}",
            f"{row['of_products_floor']:.2f}",
            f"{row['pairs_in_full']:.1%}",
            f"{row['share_of_direct_memory']:.3f}",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{row['stored_bytes_per_entity'] / 1e3:.1f}",
        ]
        for row in result["rows"]
    ]
    agreement = result["agreement_with_direct"]
    hits = ", ".join(f"{share:.2f} of {int(size):,}" for size, share in result["hits@1"].items())
    caption = (
        f"{result['source']}; {result['mentions']} mentions, H@1 {hits}. Direct: "
        f"{direct['pairs_per_second']:,.0f} pairs/s, {direct['block_peak_bytes'] / 1e9:.2f} GB for a block of "
        f"{direct['block'][0]} × {direct['block'][1]:,} in {direct['dtype']}, {direct['cached_bytes_per_entity'] / 1e3:.1f} kB "
        f"per entity. Floor of the whole form: {floor['operations_per_pair']:,} operations per pair, which at "
        f"{result['machine']['gemm_gflops']} GFLOP/s allow {floor['products_pairs_per_second']:,.0f} pairs/s, or with "
        f"{floor['exponentials_per_pair']:,} exponentials {floor['products_and_exponentials_pairs_per_second']:,.0f} pairs/s. "
        f"Share of golds with the same rank as in the direct form in float32: {agreement['whole']['same_gold_rank']:.3f} whole, "
        f"{agreement['pruned']['same_gold_rank']:.3f} pruned (stored as {agreement['stored_as']})."
    )
    return "Ranking the whole knowledge base", columns, lines, caption


def report_growth(result: dict[str, Any]) -> Report:
    """Returns a row for each point. The exponents are in the caption."""
    columns = ["grows", "entities", "mentions", "seconds", "peak memory", "own memory"]
    lines, fitted = [], []
    for axis, series in result["series"].items():
        for point in series["points"]:
            line = [axis, f"{point['entities']:,}", f"{point['mentions']:,}", f"{point['median_s']:.2f}"]
            lines.append([*line, *(f"{point[name] / 1e6:.0f} MB" for name in ("peak_bytes", "own_bytes"))])
        exponents = (series[f"exponent_{name}"] for name in ("median_s", "peak_bytes", "own_bytes"))
        fitted.append(", ".join("–" if value is None else f"{value:.2f}" for value in exponents) + f" in {axis}")
    caption = f"{result['source']}. Exponents of time, peak and own memory are {' and '.join(fitted)}."
    return "Growth", columns, lines, caption


def report_latency(result: dict[str, Any]) -> Report:
    """Returns a row for each size and index."""
    top_k = result.get("top_k", 64)
    recalls = [k for k in (1, 10, 64) if k <= top_k]
    has_cpu = all("cpu_p50_s" in row for row in result["rows"])
    columns = ["entities", "index", "faster than exact", "p50", "p95"]
    columns += [
        *(["CPU p50", "CPU p95"] if has_cpu else []),
        *(f"recall@{k}" for k in recalls),
        "build",
        "index kB/entity",
    ]
    steps = ("heads", "codes", "scored") if any("left" in row for row in result["rows"]) else ()
    columns += ["heads leave", "codes leave", "scored"][: len(steps)]
    exact = {row["entities"]: row["p50_s"] for row in result["rows"] if row["index"] == "exact"}
    times = ["p50_s", "p95_s", *(["cpu_p50_s", "cpu_p95_s"] if has_cpu else [])]
    lines = [
        [
            f"{row['entities']:,}",
            row["index"],
            f"{exact[row['entities']] / row['p50_s']:.1f}×" if row["entities"] in exact else "",
            *(f"{row[name] * 1e3:.1f} ms" for name in times),
            *(f"{row['recall'][str(k)]:.3f}" for k in recalls),
            f"{row['build_s']:.0f} s",
            f"{row['index_bytes'] / row['entities'] / 1e3:.1f}",
            *(_shares(row.get("left", {}).get(step)) for step in steps),
        ]
        for row in result["rows"]
    ]
    caption = (
        f"{result['source']}; the best {top_k} of {result['mentions']} encoded mentions (exact: fewer), one at a time and once "
        f"each; an index other than codes has {result['candidates']} candidates scored. "
        f"{' '.join(f'Left out: {reason}.' for reason in result['left_out'])}"
    ).strip()
    if steps:
        caption += " The last columns: shares of the entities that the steps of codes leave, p50 (p95)."
    return "One mention", columns, lines, caption


def _shares(share: Mapping[str, float] | None) -> str:
    percent = {name: 100 * value for name, value in (share or {}).items()}
    texts = {name: f"{value:.0f}" if value >= 10 else f"{value:.2g}" for name, value in percent.items()}
    return f"{texts['p50']}% ({texts['p95']}%)" if texts else ""


def report_building(result: dict[str, Any]) -> Report:
    """Returns one row."""
    columns = ["of the encoders alone", "in CPU time", "entities/s", "encoders alone, entities/s"]
    shares = (result["share_of_floor"], result["cpu_share_of_floor"])
    rates = (result["entities_per_second"], result["floor_entities_per_second"])
    caption = f"{result['model']}; {result['entities']} entities with text and image, {result['dtype']}."
    line = [*(f"{share:.2f}" for share in shares), *(f"{rate:.1f}" for rate in rates)]
    return "Building a KB", columns, [line], caption


def report_throughput(result: dict[str, Any]) -> Report:
    """Returns a row for each size, index and dtype."""
    columns = ["entities", "index", "dtype", "× plain loop, CPU", "of the encoder alone, CPU", "link, CPU"]
    columns += ["link, mentions/s", "evaluate, CPU", "encoder alone, CPU", "plain loop, CPU"]
    columns += ["other first entity", "other place of the gold", "H@1"]
    lines = [
        [
            f"{row['entities']:,}",
            row["index"],
            row["dtype"],
            f"{row['plain_cpu_s'] / row['link_cpu_s']:.1f}",
            f"{row['encoder_cpu_s'] / row['link_cpu_s']:.2f}",
            f"{row['link_cpu_s'] * 1e3:.1f} ms",
            f"{1 / row['link_s']:,.0f}",
            f"{row['evaluate_cpu_s'] * 1e3:.1f} ms" if "evaluate_cpu_s" in row else "",
            *(f"{row[name] * 1e3:.1f} ms" for name in ("encoder_cpu_s", "plain_cpu_s")),
            *(f"{row[name]:,}" for name in ("changed_first_places", "changed_gold_places")),
            f"{row['hits@1']:.3f}",
        ]
        for row in result["rows"]
    ]
    caption = (
        f"{result['source']}; {result['rows'][0]['mentions']:,} mentions, the best {result['top_k']} entities of each, encoding "
        f"included; CPU time of a mention, and mentions a second by the clock; the plain loop takes {result['plain_mentions']} "
        "mentions. The knowledge base is encoded. Changes are those from float32 among the linked candidates."
    )
    return "Throughput", columns, lines, caption


def report_training(result: dict[str, Any]) -> Report:
    """Returns one row."""
    columns = ["of a plain loop", "mentions/s", "plain loop, mentions/s", "pair scoring"]
    rates = (result["mentions_per_second"], result["plain_mentions_per_second"])
    line = [f"{result['share_of_plain_loop']:.2f}", *(f"{rate:.1f}" for rate in rates)]
    caption = f"{result['model']}; batch {result['batch_size']}, {result['dtype']}; pair scoring as a share of a step."
    return "Training", columns, [[*line, f"{result['share_of_pair_scoring']:.0%}"]], caption


def report_methods(result: dict[str, Any]) -> Report:
    """Returns a row for each recipe."""
    columns = ["recipe", "method", "batch", "waiting", "data", "pair scoring", "trainer / plain loop"]
    columns += ["step, CPU", "data, CPU", "pair scoring, CPU", "plain loop, CPU"]
    lines = [
        [
            row["recipe"],
            row["method"],
            f"{row['batch_size']}" + ("" if row["pairs"] is None else f" ({row['pairs']:,} pairs)"),
            f"{row['waiting_s'] / row['step_s']:.1%}",
            *(f"{row[name] / row['step_cpu_s']:.1%}" for name in ("data_cpu_s", "scoring_cpu_s")),
            f"{row['step_cpu_s'] / row['plain_cpu_s']:.2f}",
            *(f"{row[f'{name}_cpu_s'] * 1e3:,.0f} ms" for name in ("step", "data", "scoring", "plain")),
        ]
        for row in result["rows"]
    ]
    caption = (
        f"Recipes with {result['encoders']} encoders of random weights, {result['entities']} generated entities, {result['dtype']}. Waiting for "
        "data by the clock, preparing data and scoring pairs in CPU time, as shares of a step of the trainer."
    )
    return "Training, every method", columns, lines, caption


def report_precision(result: dict[str, Any]) -> Report:
    """Returns a row for each form. Only forms of knowledge bases have a CPU time."""
    timed = next((row["cpu_of_bfloat16"] for row in result["rows"] if "cpu_of_bfloat16" in row), {})
    columns = [
        "stored as",
        "smaller than float32",
        "bytes/entity",
        "ranks that change",
        "first places that change",
        "H@1",
        "MRR",
        "MR",
        "10 best of float32 among 64 best",
        *(f"CPU / bfloat16, {count} mention{'s' * (count != '1')}" for count in timed),
    ]
    lines = [
        [
            row["dtype"],
            f"{row['times_smaller']:.1f}×",
            f"{row['bytes_per_entity']:,}",
            f"{row['changed_ranks']:,}",
            f"{row['changed_first_places']:,}",
            f"{row['metrics']['hits@1']:.4f}",
            f"{row['metrics']['mrr']:.4f}",
            f"{row['metrics']['mr']:.3f}",
            f"{row['best_among_64']['10']:.4f}",
            *(f"{row['cpu_of_bfloat16'][count]:.2f}" if "cpu_of_bfloat16" in row else "–" for count in timed),
        ]
        for row in result["rows"]
    ]
    caption = (
        f"{result['model']}, {result['split']} of {result['dataset']}: {result['mentions']:,} mentions, {result['entities']:,} "
        "entities."
    )
    return "Encodings in few bits", columns, lines, caption


def report_relinking(result: dict[str, Any]) -> Report:
    """Returns one row."""
    columns = [
        "times faster",
        "relinking, CPU",
        "anew, CPU",
        "encoded",
        "ranked anew",
        "changed",
        "equal",
        "linking with traces",
    ]
    line = [
        f"{result['times_faster']:.1f}",
        f"{result['relink_cpu_s']:,.0f} s",
        f"{result['anew_cpu_s']:,.0f} s",
        *(f"{result[name] / result['stored_mentions']:.1%}" for name in ("encoded", "ranked", "changed", "equal")),
        f"{result['tracing']:.2f}",
    ]
    caption = (
        f"{result['source']}; {result['entities']:,} entities, {result['edits']:,} of which made way for new ones; "
        f"{result['stored_mentions']:,} stored mentions, {result['distinct_mentions']:,} of them distinct. Linking anew is "
        f"measured on these, and multiplied. Traces: {result['trace_bytes_per_mention']:,.0f} bytes a mention; the last "
        "column is the CPU time of linking with traces, as a ratio to linking without."
    )
    return "Relinking after edits", columns, [line], caption


def report_peers(result: dict[str, Any]) -> Report:
    """Returns a row for each form of vectors, size, system and setting."""
    columns = [
        "vectors",
        "entities",
        "system",
        "faster than exact, CPU",
        "recall@1",
        "recall@10",
        "recall@64",
        "CPU p50",
        "CPU p95",
        "p50",
        "p95",
        "build",
        "index kB/entity",
    ]
    steps = ("heads", "codes", "scored") if any("left" in row for row in result["rows"]) else ()
    columns += ["heads leave", "codes leave", "scored"][: len(steps)]
    exact = {(row["vectors"], row["entities"]): row["cpu_p50_s"] for row in result["rows"] if row["system"] == "exact"}
    lines = [
        [
            row["vectors"],
            f"{row['entities']:,}",
            row["system"] + (f", {row['setting']}" if row["setting"] else ""),
            f"{exact[key] / row['cpu_p50_s']:.2f}×" if key in exact else "",
            *(f"{row['recall'][str(k)]:.3f}" for k in (1, 10, 64)),
            *(f"{row[name] * 1e3:.1f} ms" for name in ("cpu_p50_s", "cpu_p95_s", "p50_s", "p95_s")),
            f"{row['build_cpu_s']:.1f} s",
            f"{row['index_bytes'] / row['entities'] / 1e3:.2f}",
        ]
        for row in result["rows"]
        for key in [(row["vectors"], row["entities"])]
    ]
    versions = "; ".join(f"{name}: {packages}" for name, packages in result["versions"].items())
    caption = (
        f"{result['source']}; the best {result['top_k']} of {result['mentions']} encoded mentions (systems that score every "
        f"entity: fewer), one at a time, in turns. {versions}. "
        f"{' '.join(f'Left out: {reason}.' for reason in result['left_out'])}"
    ).strip()
    return "Beside other packages", columns, lines, caption


_REPORTS: dict[str, Callable[[dict[str, Any]], Report]] = {
    "ranking": report_ranking,
    "growth": report_growth,
    "latency": report_latency,
    "throughput": report_throughput,
    "building": report_building,
    "training": report_training,
    "methods": report_methods,
    "precision": report_precision,
    "relinking": report_relinking,
    "peers": report_peers,
}


def reports(folder: Path, names: Sequence[str] | None = None) -> list[tuple[Report, dict[str, Any]]]:
    """Returns (report, result) of each result file in a folder, in the order of the benchmarks."""
    pairs = []
    for kind, report in _REPORTS.items():
        for path in sorted(folder.glob(f"{kind}*.json")):
            if names is None or path.stem in names:
                result = json.loads(path.read_text(encoding="utf-8"))
                pairs.append((report(result), result))
    return pairs


def conditions(result: dict[str, Any]) -> str:
    """Returns the machine and the number of repeats in one line."""
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    torch = machine["software"].get("torch", "?")
    repeated = f"; medians of {result['repeats']}" if "repeats" in result else ""
    return f"{device}; {machine['gemm_gflops']} GFLOP/s; load {machine['load_at_start']}; torch {torch}{repeated}."


def show(folder: Path, names: Sequence[str] | None = None) -> None:
    """Prints the results as tables."""
    console = Console(width=max(120, Console().width))
    for (title, columns, lines, caption), result in reports(folder, names):
        table = Table(title=title, caption=f"{caption} {conditions(result)}", caption_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 and len(lines) > 1 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(folder: Path) -> str:
    """Returns the tables as Markdown."""
    parts = []
    for (title, columns, lines, caption), result in reports(folder):
        rows = [columns, ["---"] * len(columns), *lines]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"**{title}.** {caption} {conditions(result)}\n\n{table}\n")
    return "\n".join(parts)


def replace_block(page: Path, text: str) -> None:
    """Replaces the text between the markers of a page.

    Raises:
        ValueError: The page lacks the markers.
    """
    content = page.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"The page {page} needs the comments {BEGIN} and {END}, once and in this order.")
    before, rest = content.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}", encoding="utf-8")


def plot(folder: Path, output: Path) -> None:
    """Plots pairs per second and peak memory of each form against the number of entities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((folder / "ranking.json").read_text(encoding="utf-8"))
    rows, direct = result["rows"], result["direct"]
    sizes = sorted({row["entities"] for row in rows})
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for form, colour in (("pruned", "#0b6e99"), ("whole", "#6aaed6")):
        points = [row for row in rows if row["form"] == form]
        speed.plot(sizes, [row["pairs_per_second"] for row in points], "o-", color=colour, label=f"hf_mel, {form}")
        memory.plot(sizes, [row["peak_bytes"] / 1e9 for row in points], "o-", color=colour, label=f"hf_mel, {form}")
    direct_memory = [next(row["direct_peak_bytes"] for row in rows if row["entities"] == size) for size in sizes]
    speed.plot(sizes, [direct["pairs_per_second"]] * len(sizes), "s--", color="#b03a2e", label="direct form")
    memory.plot(sizes, [size / 1e9 for size in direct_memory], "s--", color="#b03a2e", label="direct form")
    floor = result["floor"]["products_pairs_per_second"]
    speed.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label="matrix products alone")
    speed.set(title="pairs per second", yscale="log", xlabel="entities")
    memory.set(title="peak memory, GB", yscale="log", xlabel="entities")
    for axes in (speed, memory):
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size // 1000}k" if size >= 1000 else str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    speed.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0.01, 0.1))
    figure.savefig(output, dpi=110)
    plt.close(figure)


def plot_peers(folder: Path) -> None:
    """Plots recall@64 against the CPU time of a mention: a line from p50 to p95 for each system and setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = json.loads((folder / "peers.json").read_text(encoding="utf-8"))["rows"]
    panels = list(dict.fromkeys((row["vectors"], row["entities"]) for row in rows))
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 3.4 * len(panels)), layout="constrained", sharex=True, squeeze=False
    )
    for (vectors, entities), panel in zip(panels, axes[:, 0], strict=True):
        shown = [row for row in rows if (row["vectors"], row["entities"]) == (vectors, entities)]
        systems = list(dict.fromkeys(row["system"] for row in shown))
        for system in systems:
            points = [row for row in shown if row["system"] == system]
            recalls = [row["recall"]["64"] for row in points]
            times = [[row[name] * 1e3 for row in points] for name in ("cpu_p50_s", "cpu_p95_s")]
            colour = f"C{systems.index(system)}"
            panel.hlines(recalls, *times, color=colour, linewidth=1)
            panel.plot(times[1], recalls, "|", color=colour)
            panel.plot(times[0], recalls, "o", color=colour, label=system)
        panel.set(title=f"vectors: {vectors}; {entities:,} entities", xscale="log", ylabel="recall@64")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes[-1, 0].set_xlabel("CPU time of a mention, ms: p50 (point) to p95 (bar)")
    figure.savefig(folder / "peers.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="folder of the result files")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, without the plot")
    parser.add_argument("--docs", action="store_true", help="also write the tables into docs/benchmarks.md")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(args.folder))
        return
    if args.docs:
        replace_block(PAGE, markdown(args.folder))
    show(args.folder)
    if (args.folder / "ranking.json").exists():
        plot(args.folder, args.folder / "ranking.png")
        print(f"Plot: {args.folder / 'ranking.png'}")
    if (args.folder / "peers.json").exists():
        plot_peers(args.folder)
        print(f"Plot: {args.folder / 'peers.png'}")


if __name__ == "__main__":
    main()
