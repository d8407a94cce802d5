"""Tables and a plot of the benchmark results.

python -m benchmarks.summary               # prints the tables, writes benchmarks/results/ranking.png
python -m benchmarks.summary --markdown    # prints the tables as Markdown, without the plot
python -m benchmarks.summary --docs        # writes the tables into docs/benchmarks.md, too
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, ROOT

#: Page of the documentation that holds the tables, and the comments that enclose them there.
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

#: (title, columns, rows, what stands below)
Report = tuple[str, list[str], list[list[str]], str]


def report_ranking(found: dict[str, Any]) -> Report:
    """One row per size and form, ratio first."""
    direct, floor = found["direct"], found["floor"]
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
        for row in found["rows"]
    ]
    agreed = found["agreement_with_direct"]
    hits = ", ".join(f"{share:.2f} of {int(size):,}" for size, share in found["hits@1"].items())
    below = (
        f"{found['source']}; {found['mentions']} mentions, H@1 {hits}. Direct: "
        f"{direct['pairs_per_second']:,.0f} pairs/s, {direct['block_peak_bytes'] / 1e9:.2f} GB for a block of "
        f"{direct['block'][0]} × {direct['block'][1]:,} in {direct['dtype']}, {direct['cached_bytes_per_entity'] / 1e3:.1f} kB "
        f"per entity. Floor of the whole form: {floor['operations_per_pair']:,} operations per pair at "
        f"{found['machine']['gemm_gflops']} GFLOP/s are {floor['products_pairs_per_second']:,.0f} pairs/s; with "
        f"{floor['exponentials_per_pair']:,} exponentials {floor['products_and_exponentials_pairs_per_second']:,.0f}. "
        f"Gold ranks as the direct form in float32: {agreed['whole']['same_gold_rank']:.3f} whole, "
        f"{agreed['pruned']['same_gold_rank']:.3f} pruned (stored as {agreed['stored_as']})."
    )
    return "Ranking the whole knowledge base", columns, lines, below


def report_growth(found: dict[str, Any]) -> Report:
    """One row per point, the exponents below."""
    columns = ["grows", "entities", "mentions", "seconds", "peak memory", "own memory"]
    lines, fitted = [], []
    for axis, series in found["series"].items():
        for point in series["points"]:
            line = [axis, f"{point['entities']:,}", f"{point['mentions']:,}", f"{point['median_s']:.2f}"]
            lines.append([*line, *(f"{point[name] / 1e6:.0f} MB" for name in ("peak_bytes", "own_bytes"))])
        exponents = (series[f"exponent_{name}"] for name in ("median_s", "peak_bytes", "own_bytes"))
        fitted.append(f"{axis}: " + ", ".join("–" if value is None else f"{value:.2f}" for value in exponents))
    below = f"{found['source']}. Exponents of time, peak and own memory in {'; in '.join(fitted)}."
    return "Growth", columns, lines, below


def report_latency(found: dict[str, Any]) -> Report:
    """One row per size and index."""
    columns = ["entities", "index", "p50", "p95", "recall@1", "recall@10", "recall@64", "build", "index kB/entity"]
    lines = [
        [
            f"{row['entities']:,}",
            row["index"],
            *(f"{row[name] * 1e3:.1f} ms" for name in ("p50_s", "p95_s")),
            *(f"{row['recall'][k]:.3f}" for k in ("1", "10", "64")),
            f"{row['build_s']:.0f} s",
            f"{row['index_bytes'] / row['entities'] / 1e3:.1f}",
        ]
        for row in found["rows"]
    ]
    below = (
        f"{found['source']}; one mention at a time, encoded; {found['mentions']} mentions (exact: fewer), each asked for "
        f"once; {found['candidates']} candidates scored. {' '.join(f'Left out: {why}.' for why in found['left_out'])}"
    ).strip()
    return "One mention", columns, lines, below


def report_building(found: dict[str, Any]) -> Report:
    """One row."""
    columns = ["of the encoders alone", "entities/s", "encoders alone, entities/s"]
    rates = (found["entities_per_second"], found["floor_entities_per_second"])
    below = f"{found['model']}; {found['entities']} entities with text and image, {found['dtype']}."
    return "Building a KB", columns, [[f"{found['share_of_floor']:.2f}", *(f"{rate:.1f}" for rate in rates)]], below


def report_training(found: dict[str, Any]) -> Report:
    """One row."""
    columns = ["of a plain loop", "mentions/s", "plain loop, mentions/s", "pair scoring"]
    rates = (found["mentions_per_second"], found["plain_mentions_per_second"])
    line = [f"{found['share_of_plain_loop']:.2f}", *(f"{rate:.1f}" for rate in rates)]
    below = f"{found['model']}; batch {found['batch_size']}, {found['dtype']}; pair scoring as a share of a step."
    return "Training", columns, [[*line, f"{found['share_of_pair_scoring']:.0%}"]], below


def report_precision(found: dict[str, Any]) -> Report:
    """One row per type."""
    columns = ["stored as", "kB/entity", "ranks that change", "first places that change", "H@1", "MRR", "MR"]
    lines = [
        [
            row["dtype"],
            f"{row['bytes_per_entity'] / 1e3:.1f}",
            f"{row['changed_ranks']:,}",
            f"{row['changed_first_places']:,}",
            f"{row['metrics']['hits@1']:.4f}",
            f"{row['metrics']['mrr']:.4f}",
            f"{row['metrics']['mr']:.3f}",
        ]
        for row in found["rows"]
    ]
    below = (
        f"{found['model']}, {found['split']} of {found['dataset']}: {found['mentions']:,} mentions, {found['entities']:,} "
        "entities."
    )
    return "Half precision", columns, lines, below


_REPORTS: dict[str, Callable[[dict[str, Any]], Report]] = {
    "ranking": report_ranking,
    "growth": report_growth,
    "latency": report_latency,
    "building": report_building,
    "training": report_training,
    "precision": report_precision,
}


def reports(folder: Path, names: Sequence[str] | None = None) -> list[tuple[Report, dict[str, Any]]]:
    """What stands in a folder of results, in the order of the benchmarks."""
    found = []
    for kind, report in _REPORTS.items():
        for path in sorted(folder.glob(f"{kind}*.json")):
            if names is None or path.stem in names:
                content = json.loads(path.read_text(encoding="utf-8"))
                found.append((report(content), content))
    return found


def conditions(found: dict[str, Any]) -> str:
    """The machine in one line."""
    machine = found["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    torch = machine["software"].get("torch", "?")
    repeated = f"; medians of {found['repeats']}" if "repeats" in found else ""
    return f"{device}; {machine['gemm_gflops']} GFLOP/s; load {machine['load_at_start']}; torch {torch}{repeated}."


def show(folder: Path, names: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    console = Console(width=max(120, Console().width))
    for (title, columns, lines, below), found in reports(folder, names):
        table = Table(title=title, caption=f"{below} {conditions(found)}", caption_justify="left")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number < 2 and len(lines) > 1 else "right")
        for line in lines:
            table.add_row(*line)
        console.print(table)


def markdown(folder: Path) -> str:
    """The tables as Markdown."""
    parts = []
    for (title, columns, lines, below), found in reports(folder):
        rows = [columns, ["---"] * len(columns), *lines]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"**{title}.** {below} {conditions(found)}\n\n{table}\n")
    return "\n".join(parts)


def put_into(page: Path, text: str) -> None:
    """Replaces the text between the markers of a page.

    Raises:
        `ValueError`: The page lacks the markers.
    """
    content = page.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{page} needs {BEGIN} and, after it, {END}, once each.")
    before, rest = content.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}", encoding="utf-8")


def plot(folder: Path, output: Path) -> None:
    """Pairs per second and peak memory against the number of entities, direct and ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads((folder / "ranking.json").read_text(encoding="utf-8"))
    rows, direct = found["rows"], found["direct"]
    sizes = sorted({row["entities"] for row in rows})
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for form, colour in (("pruned", "#0b6e99"), ("whole", "#6aaed6")):
        of_form = [row for row in rows if row["form"] == form]
        speed.plot(sizes, [row["pairs_per_second"] for row in of_form], "o-", color=colour, label=f"hf_mel, {form}")
        memory.plot(sizes, [row["peak_bytes"] / 1e9 for row in of_form], "o-", color=colour, label=f"hf_mel, {form}")
    direct_memory = [next(row["direct_peak_bytes"] for row in rows if row["entities"] == size) for size in sizes]
    speed.plot(sizes, [direct["pairs_per_second"]] * len(sizes), "s--", color="#b03a2e", label="direct form")
    memory.plot(sizes, [size / 1e9 for size in direct_memory], "s--", color="#b03a2e", label="direct form")
    floor = found["floor"]["products_pairs_per_second"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, no plot")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/benchmarks.md, and the plot")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(args.folder))
        return
    if args.docs:
        put_into(PAGE, markdown(args.folder))
    show(args.folder)
    if (args.folder / "ranking.json").exists():
        plot(args.folder, args.folder / "ranking.png")
        print(f"plot: {args.folder / 'ranking.png'}")


if __name__ == "__main__":
    main()
