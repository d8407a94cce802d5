"""From a raw release on disk to a folder that can be pushed to the Hub: Parquet, card, report.

The pipeline knows no data set by name. It finds the builders in `hf_mel.dataset_scripts` and asks of each module
`<name>/<name>.py` one thing, `BUILDER_CLASS`, a `datasets.GeneratorBasedBuilder` with the configurations `mentions`,
`entities` and possibly `posts` (and further ones with the columns of mentions), and the class attributes

- `NAME`, `TITLE`, `LICENSE` (a Hub licence id), `LANGUAGES`, `HOMEPAGE`, `CITATION`;
- `TASK`: what is linked to what, in a line; `DOWNLOAD`: what to fetch and where the release describes it;
- `REDISTRIBUTION`: why the built data may not be passed on under `LICENSE`; empty if it may;
- `NEEDS_RAW`: whether it reads a folder of raw files (its config then has `data_dir`, `images`, `entity_images`);
- `OFFICIAL_COUNTS`: `{config: {split: rows}}`, or `{layout: {config: {split: rows}}}` if it reads several layouts;
  `None` for a number nobody knows.

A builder some of whose configurations need files a user may not have offers a classmethod
`configs_in(data_dir, options)`: the names of those that can be built. Whatever else its `BuilderConfig` holds can be set
by a user (`--option key=value`). An image is `{"bytes": …, "path": None}`, or `{"bytes": None, "path": …}` to have it
read by the pipeline.

A builder that reads files sets, in `_split_generators`, an attribute `release` with `layout` (`str`), `sha256`
(`{file: digest}`) and `problems` (`{kind: [(file, row, detail)]}`): whatever it left out or could not find. Beside
the builder stands `README.template.md`, the body of the card, with these `$placeholders` (all optional):
`$title`, `$name`, `$homepage`, `$citation`, `$layout`, `$counts`, `$schema`, `$problems`, `$raw_files`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import string
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData
from tqdm.auto import tqdm

import hf_mel.dataset_scripts
from hf_mel.data.images import verify_image
from hf_mel.errors import (
    CountMismatchError,
    DataFormatError,
    DuplicateIdError,
    ImageError,
    KnowledgeBaseError,
    MelError,
    SpanError,
    UnknownDatasetError,
)
from hf_mel.schema import NIL

_REPORT = "report.json"
_ID_COLUMNS = {"mentions": "mention_id", "posts": "post_id", "entities": "entity_id"}
#: Fields of a configuration that are not options: those of `datasets`, and those with arguments of their own.
_NOT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "images", "entity_images", "seed", "kind"}
#: A row group is written when it holds this many rows or bytes of images; a file is closed at the second size.
_GROUP_ROWS, _GROUP_BYTES, _FILE_BYTES = 1_000, 32 << 20, 400 << 20


@dataclass
class BuildReport:
    """What a build wrote; `report.json` holds the same.

    Args:
        dataset (`str`): Name of the builder.
        layout (`str` or `None`): The raw layout found on disk.
        output (`Path`): The folder written (not in `report.json`).
        counts (`dict[str, dict[str, int]]`): Rows by configuration and split.
        images (`dict[str, dict[str, dict[str, int]]]`): By configuration and split: `images`, and `rows_without`.
        duplicates (`dict[str, int]`): `entities_sharing_their_text`: entities whose name, description and attributes
            another one has too; `mention_images_in_kb`: rows of `mentions` whose image is, byte for byte, in the KB.
        problems (`dict[str, list[tuple[str, str, str]]]`): By kind: (file, row, detail).
        raw_sha256 (`dict[str, str]`): Digest of each raw file read.
    """

    dataset: str
    layout: str | None
    output: Path
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    images: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    raw_sha256: dict[str, str] = field(default_factory=dict)

    def problem(self, kind: str, file: str, row: str, detail: str = "") -> None:
        """Lists one more problem."""
        self.problems.setdefault(kind, []).append((file, row, detail))

    def to_dict(self) -> dict[str, Any]:
        """As in `report.json`: problems counted, their entries [row, detail] by file."""
        problems: dict[str, Any] = {}
        for kind, entries in sorted(self.problems.items()):
            files: dict[str, list[list[str]]] = {}
            for file, row, detail in entries:
                files.setdefault(file, []).append([row, detail])
            problems[kind] = {"count": len(entries), "entries": files}
        return {
            "dataset": self.dataset,
            "layout": self.layout,
            "counts": self.counts,
            "images": self.images,
            "duplicates": self.duplicates,
            "raw_sha256": dict(sorted(self.raw_sha256.items())),
            "problems": problems,
        }


def known_datasets() -> list[str]:
    """Names of the data sets that can be built."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(hf_mel.dataset_scripts.__path__)
        if module.ispkg and find_spec(f"hf_mel.dataset_scripts.{module.name}.{module.name}")
    )


def find_builder(name: str) -> type[datasets.GeneratorBasedBuilder]:
    """The builder class of a data set.

    Raises:
        UnknownDatasetError: No builder has that name; the message lists those there are.
    """
    known = known_datasets()
    if name not in known:
        raise UnknownDatasetError(
            f"no builder is named {name!r}.", remedy=f"There are builders for: {', '.join(known)}."
        )
    return importlib.import_module(f"hf_mel.dataset_scripts.{name}.{name}").BUILDER_CLASS


def build_dataset(
    name: str,
    *,
    output: str | os.PathLike[str],
    raw_dir: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    entity_images: str | os.PathLike[str] | None = None,
    allow_count_mismatch: bool = False,
    overwrite: bool = False,
    seed: int | None = None,
    config_options: Mapping[str, Any] | None = None,
) -> BuildReport:
    """Builds a data set into a folder that `datasets.load_dataset` and the Hub read as they are.

    The folder appears whole or not at all, and the same raw files give the same bytes. Images are stored exactly as
    released; one that cannot be decoded becomes null and is listed in the report, and so is every row left out.

    Args:
        name (`str`): Name of a builder, one of [`known_datasets`].
        output (`str` or `os.PathLike`): The folder to write. An earlier build of the same data set is replaced.
        raw_dir, images, entity_images (`str` or `os.PathLike`, *optional*): The raw files, the folder of mention
            images and that of entity images, for builders that read a release.
        allow_count_mismatch (`bool`): Build although the number of rows is not the official one.
        overwrite (`bool`): Replace `output` whatever it holds.
        seed (`int`, *optional*): For builders that generate their data.
        config_options (mapping, *optional*): Further fields of the builder's configuration, by name.

    Returns:
        [`BuildReport`]

    Raises:
        UnknownDatasetError: No such builder.
        DataFormatError: Raw files are missing or malformed, or `output` is not ours to replace.
        CountMismatchError: A split does not have its official number of rows.
        DuplicateIdError: An id occurs twice in a configuration.
        KnowledgeBaseError: The knowledge base is empty.
        SpanError: A builder gives offsets at which the mention does not stand.
    """
    builder_class = find_builder(name)
    options = {"data_dir": raw_dir, "images": images, "entity_images": entity_images, "seed": seed}
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if not hasattr(builder_class.BUILDER_CONFIGS[0], key) or (key == "data_dir" and not builder_class.NEEDS_RAW):
            raise MelError(f"the builder {name!r} takes no {'raw_dir' if key == 'data_dir' else key}.")
    if builder_class.NEEDS_RAW and raw_dir is None:
        raise DataFormatError(
            f"{name!r} is built from its released files, and no folder of them was given.",
            remedy=f"Download the release ({builder_class.HOMEPAGE}) and pass its folder as raw_dir (--raw-dir).",
        )
    options = {key: value if key == "seed" else str(value) for key, value in options.items()}
    takes = sorted(set(vars(builder_class.BUILDER_CONFIGS[0])) - _NOT_OPTIONS)
    for key, value in (config_options or {}).items():
        if key not in takes:
            raise MelError(
                f"the builder {name!r} has no option {key!r}.",
                remedy=f"It has {', '.join(takes)}." if takes else "It has none.",
            )
        options[key] = value
    target = Path(output)
    _check_replaceable(target, name, overwrite, [raw_dir, images, entity_images])

    with _staging(target) as work, tempfile.TemporaryDirectory() as cache:
        report = BuildReport(name, None, target)
        infos: dict[str, datasets.DatasetInfo] = {}
        configs = [config.name for config in builder_class.BUILDER_CONFIGS]
        if hasattr(builder_class, "configs_in"):
            configs = builder_class.configs_in(raw_dir, options)
        state = _Checks(report)
        # The knowledge base first: golds are checked against it.
        for config in sorted(configs, key=lambda c: c != "entities"):
            builder = builder_class(config_name=config, cache_dir=cache, **options)
            infos[config] = _write_config(builder, config, work, report, state)
        state.finish()
        _check_counts(builder_class, report, allow_count_mismatch)
        report.counts = {config: report.counts[config] for config in configs}
        report.images = {config: report.images[config] for config in configs}
        (work / _REPORT).write_text(_dump(report.to_dict()), encoding="utf-8")
        (work / "README.md").write_text(
            _card(builder_class, {config: infos[config] for config in configs}, report), encoding="utf-8"
        )
    return report


class _Checks:
    """What has to be remembered from row to row, across configurations."""

    def __init__(self, report: BuildReport):
        self.report = report
        self.entity_ids: set[str] = set()
        self.entity_texts: dict[bytes, int] = {}
        self.kb_images: set[bytes] = set()
        self.mention_images: list[bytes] = []
        self.verdicts: dict[bytes, str | None] = {}

    def row(self, config: str, where: str, row: dict[str, Any]) -> bool:
        """Checks one encoded row and lists its problems; `False` if it has to be left out."""
        kind = _kind(row)
        row_id = row[_ID_COLUMNS[kind]]
        if kind == "entities":
            self.entity_ids.add(row_id)
            text = hashlib.sha256("\0".join((row["name"], row["description"], row["attributes"])).encode()).digest()
            self.entity_texts[text] = self.entity_texts.get(text, 0) + 1
            return True
        if row["entity_id"] != NIL and row["entity_id"] not in self.entity_ids:
            self.report.problem("gold_not_in_kb", where, row_id, row["entity_id"])
            return False
        if kind == "mentions":
            start, end = row["start"], row["end"]
            if row.get("modality") == "image" and not row["mention"]:
                pass  # a thing in the picture has no place in the text
            elif start < 0:  # two kinds: the text lacks it, or an earlier mention has its only place
                absent = row["mention"] not in row["text"]
                self.report.problem(
                    "mention_not_in_text" if absent else "mention_not_located", where, row_id, row["mention"]
                )
            elif row["text"][start:end] != row["mention"]:
                raise SpanError(
                    f"{row['text'][start:end]!r} stands at {start}:{end}, not the mention {row['mention']!r}.",
                    file=where,
                    row=row_id,
                    remedy="This is a bug of the builder.",
                )
            for candidate in row["candidates"] or []:
                if candidate not in self.entity_ids:
                    self.report.problem("candidate_not_in_kb", where, row_id, candidate)
        return True

    def image(self, config: str, where: str, row_id: str, image: dict[str, Any]) -> dict[str, Any] | None:
        """The image with its bytes and without its file name, or `None` (and a problem) if it cannot be decoded."""
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest not in self.verdicts:
            try:
                verify_image(data)
                self.verdicts[digest] = None
            except ImageError as error:
                self.verdicts[digest] = error.message
        if (verdict := self.verdicts[digest]) is not None:
            self.report.problem("broken_image", where, row_id, verdict)
            return None
        if config == "entities":
            self.kb_images.add(digest)
        elif config != "posts":
            self.mention_images.append(digest)
        return {"bytes": data, "path": None}

    def finish(self) -> None:
        self.report.duplicates = {
            "entities_sharing_their_text": sum(n for n in self.entity_texts.values() if n > 1),
            "mention_images_in_kb": sum(digest in self.kb_images for digest in self.mention_images),
        }


def _write_config(builder: Any, config: str, work: Path, report: BuildReport, checks: _Checks) -> datasets.DatasetInfo:
    """Writes the Parquet files of one configuration; returns its info with features and sizes."""
    features = builder.info.features
    generators = builder._split_generators(datasets.DownloadManager())
    release = getattr(builder, "release", None)
    if release is not None:
        report.layout = release.layout
    official = _official(builder, report.layout).get(config, {})
    infos: dict[str, datasets.SplitInfo] = {}
    seen: set[str] = set()
    for generator in generators:
        split = str(generator.name)
        where = f"{config}/{split}"
        writer = _Writer(work / config, split, features.arrow_schema)
        stats = {"images": 0, "rows_without": 0}
        examples = builder._generate_examples(**generator.gen_kwargs)
        for _, example in tqdm(examples, desc=f"{builder.NAME} {where}", unit=" rows", total=official.get(split)):
            row = features.encode_example(example)
            row_id = row[_ID_COLUMNS[_kind(row)]]
            if row_id in seen:
                raise DuplicateIdError(f"the id {row_id!r} occurs twice.", file=where, row=row_id)
            seen.add(row_id)
            if not checks.row(config, where, row):
                continue
            pictures = 0
            for column, kind in features.items():
                if isinstance(kind, datasets.Image) and row[column] is not None:
                    row[column] = checks.image(config, where, row_id, row[column])
                    pictures += row[column] is not None
                elif isinstance(getattr(kind, "feature", None), datasets.Image):
                    kept = [checks.image(config, where, row_id, image) for image in row[column] or []]
                    row[column] = [image for image in kept if image is not None]
                    pictures += len(row[column])
            stats["images"] += pictures
            stats["rows_without"] += pictures == 0
            writer.write(row)
        if not writer.rows:
            if config == "entities":
                raise KnowledgeBaseError("the knowledge base is empty.", file=where, remedy="Check the raw files.")
            raise DataFormatError("the split is empty.", file=where, remedy="Check the raw files.")
        writer.close()
        report.counts.setdefault(config, {})[split] = writer.rows
        report.images.setdefault(config, {})[split] = stats
        infos[split] = datasets.SplitInfo(name=split, num_bytes=writer.bytes, num_examples=writer.rows)
    if release is not None:
        report.raw_sha256.update(release.sha256)
        for kind, entries in release.problems.items():
            report.problems.setdefault(kind, []).extend(entries)
    return datasets.DatasetInfo(
        features=features,
        splits=datasets.SplitDict(infos),
        download_size=sum(path.stat().st_size for path in (work / config).iterdir()),
        dataset_size=sum(info.num_bytes for info in infos.values()),
    )


class _Writer:
    """Parquet files `<split>-00000-of-0000n.parquet`, in row groups small enough to page through images."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema):
        self.folder, self.split, self.schema = folder, split, schema
        folder.mkdir(parents=True, exist_ok=True)
        self.files: list[Path] = []
        self.rows = self.bytes = 0
        self._group: list[dict[str, Any]] = []
        self._group_bytes = self._file_bytes = 0
        self._parquet: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        self._group.append(row)
        self.rows += 1
        self._group_bytes += sum(len(image["bytes"]) for image in _images_of(row))
        if len(self._group) >= _GROUP_ROWS or self._group_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._group:
            return
        table = pa.Table.from_pylist(self._group, schema=self.schema)
        if self._parquet is None:
            self.files.append(self.folder / f".{self.split}-{len(self.files)}")
            self._parquet = pq.ParquetWriter(self.files[-1], self.schema, compression="zstd")
        self._parquet.write_table(table)
        self.bytes += table.nbytes
        self._file_bytes += self._group_bytes
        self._group, self._group_bytes = [], 0
        if self._file_bytes >= _FILE_BYTES:
            self._close_file()

    def _close_file(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
            self._parquet, self._file_bytes = None, 0

    def close(self) -> None:
        self._flush()
        self._close_file()
        for k, path in enumerate(self.files):
            path.rename(self.folder / f"{self.split}-{k:05d}-of-{len(self.files):05d}.parquet")


def _images_of(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for value in row.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "bytes" in item:
                yield item


def _kind(columns: Iterable[str]) -> str:
    """What the rows of a configuration are: "mentions", "posts" or "entities"."""
    return next(kind for kind, column in _ID_COLUMNS.items() if column in columns)


def _official(builder: Any, layout: str | None) -> dict[str, dict[str, int | None]]:
    counts = builder.OFFICIAL_COUNTS
    if layout is None or "entities" in counts:
        return counts
    return counts.get(layout, {})


def _check_counts(builder_class: Any, report: BuildReport, allow: bool) -> None:
    wrong = []
    for config, splits in _official(builder_class, report.layout).items():
        if config not in report.counts:  # left out, its files are not there
            continue
        built = report.counts[config]
        wrong += [
            f"{config}/{split}: expected {expected:,} rows, found {built.get(split, 0):,}"
            for split, expected in splits.items()
            if expected is not None and built.get(split, 0) != expected
        ]
    if wrong and not allow:
        dropped = {kind: len(entries) for kind, entries in report.problems.items()}
        raise CountMismatchError(
            f"{report.dataset} is not the official release. {'; '.join(wrong)}."
            + (
                f" Found on the way: {', '.join(f'{k} {n:,}' for k, n in sorted(dropped.items()))}." if dropped else ""
            ),
            remedy="Check the raw files, or build what is there with allow_count_mismatch (--allow-count-mismatch).",
        )


def _check_replaceable(target: Path, name: str, overwrite: bool, sources: list[Any]) -> None:
    resolved = target.resolve()
    for source in [*(Path(s) for s in sources if s is not None), Path.cwd(), Path.home()]:
        if source.resolve() == resolved or resolved in source.resolve().parents:
            raise DataFormatError(
                f"cannot be the output: building replaces it, and it holds {source}.",
                file=target,
                remedy="Give a folder of its own.",
            )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DataFormatError("is there and is not a folder.", file=target, remedy="Choose another output.")
    if overwrite or not target.exists() or not any(target.iterdir()):
        return
    try:
        earlier = json.loads((target / _REPORT).read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = None
    if earlier != name:
        raise DataFormatError(
            f"is not empty and is not an earlier build of {name}.",
            file=target,
            remedy="Choose another output, or replace it with overwrite (--overwrite).",
        )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place if the block succeeds, and vanishes if it does not."""
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    old = work.with_name(f"{work.name}.old")
    try:
        work.mkdir(parents=True)
        yield work
        if target.exists():
            target.rename(old)
        work.rename(target)
    except OSError as error:
        raise MelError(
            f"cannot be built ({error}).", file=target, remedy="Check the paths, permissions and free space."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if old.exists() and not target.exists():  # interrupted between the two renames
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _dump(report: dict[str, Any]) -> str:
    """JSON with one problem entry a line: readable, and small enough for tens of thousands of them."""
    head = json.dumps({k: v for k, v in report.items() if k != "problems"}, indent=2, ensure_ascii=False)
    kinds = []
    for kind, found in report["problems"].items():
        files = ",\n".join(
            f"      {json.dumps(file, ensure_ascii=False)}: [\n"
            + ",\n".join(f"        {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
            + "\n      ]"
            for file, entries in found["entries"].items()
        )
        kinds.append(
            f'    {json.dumps(kind)}: {{\n    "count": {found["count"]},\n    "entries": {{\n{files}\n    }}}}'
        )
    return head[:-2] + ',\n  "problems": {\n' + ",\n".join(kinds) + "\n  }\n}\n"


def _card(builder_class: Any, infos: dict[str, datasets.DatasetInfo], report: BuildReport) -> str:
    """README.md: YAML metadata the Hub and `load_dataset` read, then the body from the builder's template."""
    data = DatasetCardData(
        pretty_name=builder_class.TITLE,
        language=list(builder_class.LANGUAGES),
        license=builder_class.LICENSE,
        task_categories=["text-retrieval"],
        task_ids=["entity-linking-retrieval"],
        tags=["entity-linking", "multimodal", "knowledge-base"],
        size_categories=_size_category(sum(n for splits in report.counts.values() for n in splits.values())),
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
        layout=report.layout or "",
        counts=_counts_table(report),
        schema=_schema_tables(infos),
        problems=_problems_table(report),
        raw_files=_table(["file", "sha256"], [[f, f"`{h}`"] for f, h in sorted(report.raw_sha256.items())]),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"


def _size_category(rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < limit:
            return name
    return "1M<n<10M"


def _counts_table(report: BuildReport) -> str:
    rows = []
    for config, splits in report.counts.items():
        for split, n in splits.items():
            images = report.images[config][split]
            rows.append([config, split, f"{n:,}", f"{images['images']:,}", f"{images['rows_without']:,}"])
    return _table(["configuration", "split", "rows", "images", "rows without image"], rows)


def _schema_tables(infos: dict[str, datasets.DatasetInfo]) -> str:
    parts = []
    for config, info in infos.items():
        rows = [[f"`{column}`", _type_name(kind)] for column, kind in info.features.items()]
        parts.append(f"**{config}**\n\n{_table(['column', 'type'], rows)}")
    return "\n\n".join(parts)


def _type_name(kind: Any) -> str:
    if (item := getattr(kind, "feature", None)) is not None:
        return f"list of {_type_name(item)}"
    return "image" if isinstance(kind, datasets.Image) else kind.dtype


def _problems_table(report: BuildReport) -> str:
    rows = [
        [kind.replace("_", " "), f"{len(entries):,}", f"{entries[0][0]}, row {entries[0][1]}"]
        for kind, entries in sorted(report.problems.items())
    ]
    rows += [[kind.replace("_", " "), f"{n:,}", ""] for kind, n in report.duplicates.items() if n]
    return _table(["kind", "count", "first"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "None."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
