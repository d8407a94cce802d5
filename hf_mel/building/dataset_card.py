"""The card of a data set: metadata for the Hub and `load_dataset`, and a body from the builder's template."""

from __future__ import annotations

import importlib
import string
from pathlib import Path
from typing import Any

import datasets
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from hf_mel.building.markdown import markdown_table
from hf_mel.building.report import BuildReport

#: Leaks in the order of the tables: key of a leakage count → its words, and the key of the count it is a share of (by
#: default all mentions of the split).
_LEAKS: dict[str, tuple[str, str | None]] = {
    "gold_in_train": ("gold occurs in train", "with_gold"),
    "text_in_train": ("text occurs in train", None),
    "image_in_train": ("image occurs in train", "with_image"),
    "image_in_kb": ("image is one of the knowledge base", "with_image"),
    "image_of_gold": ("image is one of its gold", "with_image"),
}


def dataset_card(builder_class: Any, infos: dict[str, datasets.DatasetInfo], report: BuildReport) -> str:
    """Returns the README.md of a built data set.

    Args:
        builder_class (`type`): The builder. `README.template.md` beside its module is the body of the card. Its
            placeholders are `$title`, `$name`, `$homepage`, `$citation`, `$download`, `$redistribution`, `$layout`,
            `$options`, `$counts`, `$schema`, `$problems`, `$left_out`, `$leakage` and `$raw_files`, all optional.
        infos (`dict[str, datasets.DatasetInfo]`): Features and sizes of each configuration.
        report ([`~hf_mel.building.report.BuildReport`]): Report of the build.
    """
    data = DatasetCardData(
        pretty_name=builder_class.TITLE,
        language=list(builder_class.LANGUAGES),
        license=builder_class.LICENSE,
        task_categories=["text-retrieval"],
        task_ids=["entity-linking-retrieval"],
        tags=["entity-linking", "multimodal", "knowledge-base"],
        size_categories=_size_category(sum(sum(splits.values()) for splits in report.counts.values())),
    )
    datasets.info.DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(
        {
            config: {
                **({"default": True} if config == "mentions" else {}),
                "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in info.splits],
            }
            for config, info in infos.items()
        }
    ).to_dataset_card_data(data)
    module = importlib.import_module(builder_class.__module__)
    template = Path(str(module.__file__)).with_name("README.template.md")
    body = string.Template(template.read_text(encoding="utf-8")).substitute(
        title=builder_class.TITLE,
        name=builder_class.NAME,
        homepage=builder_class.HOMEPAGE,
        citation=f"```bibtex\n{builder_class.CITATION.strip()}\n```",
        download=builder_class.DOWNLOAD.rstrip(".") + ".",
        redistribution=_redistribution(builder_class),
        layout=report.layout or "",
        options=_options(report),
        counts=_counts_table(report),
        schema=_schema_tables(infos),
        problems=_problems_table(report),
        left_out=markdown_table(
            ["left out", "count"], [[kind.replace("_", " "), f"{n:,}"] for kind, n in report.left_out.items()]
        ),
        leakage=_leakage_table(report),
        raw_files=markdown_table(
            ["file", "sha256"], [[file, f"`{digest}`"] for file, digest in sorted(report.raw_sha256.items())]
        ),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"


def _size_category(rows: int) -> str:
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
    return names[min(max(len(str(rows)) - 3, 0), len(names) - 1)]


def _redistribution(builder_class: Any) -> str:
    if not builder_class.REDISTRIBUTION:
        return f"You may redistribute this copy under its licence, `{builder_class.LICENSE}`."
    return f"Do not redistribute this copy: {builder_class.REDISTRIBUTION.rstrip('.')}."


def _options(report: BuildReport) -> str:
    if not report.options:
        return "Images are stored exactly as released."
    options = ", ".join(f"`{key}={value}`" for key, value in report.options.items())
    images = "" if "resize" in report.options else " Images are stored exactly as released."
    return f"Built with {options}.{images}"


def _counts_table(report: BuildReport) -> str:
    header = ["configuration", "split", "rows", "images", "rows without image"]
    has_official = any(count is not None for splits in report.official.values() for count in splits.values())
    rows = []
    for config, splits in report.counts.items():
        for split, count in splits.items():
            images = report.images[config][split]
            rows.append([config, split, f"{count:,}", f"{images['images']:,}", f"{images['rows_without']:,}"])
            if has_official:
                expected = report.official.get(config, {}).get(split)
                rows[-1].append("unknown" if expected is None else f"{expected:,}")
    table = markdown_table(header + ["official rows"] * has_official, rows)
    # The cache of `datasets` distinguishes folders by their cards. The digest keeps it from returning rows of an earlier
    # build.
    return f"{table}\n\nsha256 of all Parquet files together: `{report.data_sha256}`"


def _schema_tables(infos: dict[str, datasets.DatasetInfo]) -> str:
    parts = []
    for config, info in infos.items():
        rows = [[f"`{column}`", _type_name(feature)] for column, feature in info.features.items()]
        parts.append(f"**{config}**\n\n{markdown_table(['column', 'type'], rows)}")
    return "\n\n".join(parts)


def _type_name(feature: Any) -> str:
    if (item := getattr(feature, "feature", None)) is not None:
        return f"list of {_type_name(item)}"
    return "image" if isinstance(feature, datasets.Image) else feature.dtype


def _problems_table(report: BuildReport) -> str:
    rows = [
        [kind.replace("_", " "), f"{len(entries):,}", f"{entries[0][0]}, row {entries[0][1]}"]
        for kind, entries in sorted(report.problems.items())
    ]
    rows += [[kind.replace("_", " "), f"{count:,}", ""] for kind, count in report.duplicates.items() if count]
    return markdown_table(["kind", "count", "first"], rows)


def leakage_rows(leakage: dict[str, dict[str, dict[str, int]]], counts: dict[str, dict[str, int]]) -> list[list[str]]:
    """Returns a row of words for each kind of leakage in each split: configuration, split, kind, and share of mentions.

    Args:
        leakage, counts (`dict`): As in [`~hf_mel.building.report.CheckReport`].
    """
    rows = []
    for config, splits in leakage.items():
        for split, values in splits.items():
            for key, (words, total_key) in _LEAKS.items():
                if count := values.get(key, 0):
                    total = values[total_key] if total_key else counts[config][split]
                    rows.append([config, split, words, f"{count:,} of {total:,} ({count / total:.1%})"])
    return rows


def _leakage_table(report: BuildReport) -> str:
    rows = leakage_rows(report.leakage, report.counts)
    return markdown_table(["configuration", "split", "mentions whose", "count"], rows)
