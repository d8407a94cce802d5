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
the builder stands `README.template.md`, the body of the card ([`~hf_mel.building.dataset_card.dataset_card`]).

While a build runs, finished files lie in a hidden folder beside the output, each with a note of what it holds. A build
that was killed goes on from there, to the same bytes, if nothing it depends on has changed. The finished folder is
checked as any repository is ([`~hf_mel.building.checks.check_tables`]) and renamed into place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm.auto import tqdm

import hf_mel.dataset_scripts
from hf_mel.building.builders import builder_options, find_builder
from hf_mel.building.checks import IdSet, check_tables, read_parquet
from hf_mel.building.dataset_card import dataset_card
from hf_mel.building.report import BuildReport, CheckReport
from hf_mel.building.writer import _pool, _prepared, _shard, _Writer
from hf_mel.errors import (
    CountMismatchError,
    DataFormatError,
    KnowledgeBaseError,
    MelError,
)
from hf_mel.files import building_folder, parquet_sha256, replace_folder, write_text

_REPORT = "report.json"
_BROKEN_BUILDER = "This is a bug of the builder."


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
    resize: int | None = None,
    config_options: Mapping[str, Any] | None = None,
) -> BuildReport:
    """Builds a data set into a folder that `datasets.load_dataset` and the Hub read as they are.

    The folder appears whole or not at all, and the same raw files give the same bytes. Images are stored exactly as
    released unless `resize` is given; one that cannot be decoded becomes null and is listed in the report, and so is
    every row left out. A build that is interrupted (not one that fails) is continued by the same call.

    Args:
        name (`str`): Name of a builder, one of [`known_datasets`].
        output (`str` or `os.PathLike`): The folder to write. An earlier build of the same data set is replaced.
        raw_dir, images, entity_images (`str` or `os.PathLike`, *optional*): The raw files, the folder of mention
            images and that of entity images, for builders that read a release.
        allow_count_mismatch (`bool`): Build although the number of rows is not the official one.
        overwrite (`bool`): Replace `output` whatever it holds.
        seed (`int`, *optional*): For builders that generate their data.
        resize (`int`, *optional*): Scale images down to at most this many pixels on the longest side
            ([`~hf_mel.data.images.resize_image`]).
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
        MelError: An option the builder does not have; another process builds into `output`; the disk is full.
    """
    builder_class = find_builder(name)
    folders = {"data_dir": raw_dir, "images": images, "entity_images": entity_images}
    options: dict[str, Any] = {key: str(value) for key, value in folders.items() if value is not None}
    options |= {} if seed is None else {"seed": seed}
    for key in options:
        if not hasattr(builder_class.BUILDER_CONFIGS[0], key) or (key == "data_dir" and not builder_class.NEEDS_RAW):
            raise MelError(f"the builder {name!r} takes no {'raw_dir' if key == 'data_dir' else key}.")
    takes = builder_options(builder_class)
    for key, value in (config_options or {}).items():
        if key not in takes:
            raise MelError(
                f"the builder {name!r} has no option {key!r}.",
                remedy=f"It has {', '.join(takes)}." if takes else "It has none.",
            )
        options[key] = value
    if resize is not None and resize < 1:
        raise MelError(f"images cannot be scaled to {resize} pixels.", remedy="Give resize a number of at least 1.")
    if builder_class.NEEDS_RAW and raw_dir is None:
        raise DataFormatError(
            f"{name!r} is built from its released files, and no folder of them was given.",
            remedy=f"Pass it as raw_dir (--raw-dir). To fetch: {builder_class.DOWNLOAD}",
        )
    target = Path(output)
    _check_replaceable(target, name, overwrite, [raw_dir, images, entity_images])
    report = BuildReport(
        dataset=name,
        output=target,
        license=builder_class.LICENSE,
        redistribution=builder_class.REDISTRIBUTION,
        options={
            **({} if seed is None else {"seed": seed}),
            **({} if resize is None else {"resize": resize}),
            # A path says where something lay on this machine; its name is enough.
            **{k: Path(v).name if _is_path(v) else v for k, v in sorted((config_options or {}).items())},
        },
    )
    configs = [config.name for config in builder_class.BUILDER_CONFIGS]
    if hasattr(builder_class, "configs_in"):
        configs = builder_class.configs_in(raw_dir, options)
    fingerprint = _fingerprint(builder_class, {**options, "resize": resize})
    with _staging(target, fingerprint) as stage, tempfile.TemporaryDirectory() as cache:
        builders = {config: builder_class(config_name=config, cache_dir=cache, **options) for config in configs}
        written: dict[str, dict[str, Any]] = {}
        known = IdSet()
        with _pool() as pool:
            # The knowledge base first: rows whose gold it lacks are left out.
            for config in sorted(configs, key=lambda c: c != "entities"):
                written[config] = _write_config(builders[config], config, stage, known, pool, resize)
                if config == "entities":
                    known = _ids(stage, config, written[config])
        written = {config: written[config] for config in configs}
        _collect(report, written)
        _check(report, stage, written)
        _check_counts(report, allow_count_mismatch)
        work = stage / "ready"
        infos = {config: _finish(builders[config], config, stage, work, written[config]) for config in configs}
        report.data_sha256 = parquet_sha256(work)
        write_text(work / _REPORT, [_dump(report.to_dict())])
        write_text(work / "README.md", [dataset_card(builder_class, infos, report)])
        replace_folder(work, target)
    return report


def _write_config(
    builder: Any, config: str, stage: Path, known: IdSet, pool: ThreadPoolExecutor, resize: int | None
) -> dict[str, Any]:
    """Writes what is missing of one configuration's files; returns what is noted about it, as JSON has it.

    The note of a configuration holds the builder's findings (`layout`, `sha256`, `problems`), `official` counts and
    `splits`: by name the list of its files' notes.
    """
    note = stage / "notes" / f"{config}.json"
    if note.exists():
        return json.loads(note.read_text(encoding="utf-8"))
    generators = builder._split_generators(datasets.DownloadManager())
    release = getattr(builder, "release", None)
    official = _official(builder, getattr(release, "layout", None)).get(config, {})
    splits = {}
    for generator in generators:
        split = str(generator.name)
        writer = _Writer(stage, config, split, builder.info.features.arrow_schema)
        examples = (example for _, example in builder._generate_examples(**generator.gen_kwargs))
        bar = tqdm(examples, desc=f"{builder.NAME} {config}/{split}", unit=" rows", total=official.get(split))
        # What is in finished files is generated again, and not read, decoded and written again.
        todo = itertools.islice(bar, writer.consumed, None)
        for row, problems in _prepared(todo, builder.info.features, f"{config}/{split}", known, pool, resize):
            writer.write(row, problems)
        writer.close()
        splits[split] = writer.notes
        if not sum(file["rows"] for file in writer.notes):
            error = KnowledgeBaseError if config == "entities" else DataFormatError
            what = "the knowledge base" if config == "entities" else "the split"
            raise error(f"{what} is empty.", file=f"{config}/{split}", remedy="Check the raw files.")
    written = {
        "layout": getattr(release, "layout", None),
        "sha256": dict(getattr(release, "sha256", {})),
        "problems": {kind: [list(entry) for entry in e] for kind, e in getattr(release, "problems", {}).items()},
        "official": official,
        "splits": splits,
    }
    write_text(note, [json.dumps(written)])
    return written


def _files(stage: Path, config: str, written: Mapping[str, Any]) -> dict[str, list[Path]]:
    return {
        split: [_shard(stage, config, split, k) for k in range(len(notes))]
        for split, notes in written["splits"].items()
    }


def _ids(stage: Path, config: str, written: Mapping[str, Any]) -> IdSet:
    hashes = array("q")
    for files in _files(stage, config, written).values():
        for file in files:
            for table in read_parquet(file, ["entity_id"]):
                hashes.extend(map(hash, table["entity_id"].to_pylist()))
    return IdSet(hashes)


def _collect(report: BuildReport, written: Mapping[str, Mapping[str, Any]]) -> None:
    """What was found while writing, into the report."""
    for config, note in sorted(written.items(), key=lambda item: item[0] != "entities"):
        report.layout = note["layout"] or report.layout
        report.raw_sha256.update(note["sha256"])
        for split, files in note["splits"].items():
            for kind, row, detail in itertools.chain.from_iterable(file["problems"] for file in files):
                report.problem(kind, f"{config}/{split}", row, detail)
        for kind, entries in note["problems"].items():
            report.problems.setdefault(kind, []).extend((file, row, detail) for file, row, detail in entries)
    report.official = {config: note["official"] for config, note in written.items() if note["official"]}


def _check(report: BuildReport, stage: Path, written: Mapping[str, Mapping[str, Any]]) -> None:
    """The checks of any repository, on the files just written; their images were decoded while writing."""
    found = CheckReport(dataset=report.dataset)

    def read(files: list[Path]) -> Iterator[pa.Table]:
        for file in files:
            yield from read_parquet(file)

    tables = {
        config: {split: partial(read, files) for split, files in _files(stage, config, note).items()}
        for config, note in written.items()
    }
    check_tables(tables, found, verify_images=False)
    found.raise_fatal(_BROKEN_BUILDER)
    for kind, entries in found.problems.items():
        report.problems.setdefault(kind, []).extend(entries)
    report.duplicates, report.leakage = found.duplicates, found.leakage
    report.counts, report.images = found.counts, found.images


def _finish(builder: Any, config: str, stage: Path, work: Path, written: Mapping[str, Any]) -> datasets.DatasetInfo:
    """Moves the files of a configuration to where they belong; returns its info with features and sizes."""
    (work / config).mkdir(parents=True)
    size = 0
    infos = {}
    for split, files in _files(stage, config, written).items():
        for k, file in enumerate(files):
            size += file.stat().st_size
            file.rename(work / config / f"{split}-{k:05d}-of-{len(files):05d}.parquet")
        notes = written["splits"][split]
        infos[split] = datasets.SplitInfo(
            name=split, num_bytes=sum(n["bytes"] for n in notes), num_examples=sum(n["rows"] for n in notes)
        )
    return datasets.DatasetInfo(
        features=builder.info.features,
        splits=datasets.SplitDict(infos),
        download_size=size,
        dataset_size=sum(info.num_bytes for info in infos.values()),
    )


def _official(builder: Any, layout: str | None) -> dict[str, dict[str, int | None]]:
    counts = builder.OFFICIAL_COUNTS
    if layout is None or "entities" in counts:
        return counts
    return counts.get(layout, {})


def _check_counts(report: BuildReport, allow: bool) -> None:
    wrong = []
    for config, splits in report.official.items():
        built = report.counts.get(config, {})
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


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and value != "" and Path(value).exists())


def _fingerprint(builder_class: Any, options: Mapping[str, Any]) -> str:
    """What the bytes of a build depend on: the code, the options, and names, sizes and times of the raw files."""
    code = [Path(str(sys.modules[builder_class.__module__].__file__)).parent, Path(__file__).parent]
    code += [Path(folder, part) for folder in hf_mel.dataset_scripts.__path__ for part in ("", "layouts")]
    digest = hashlib.sha256()
    for file in sorted(file for folder in code for file in folder.glob("*.py")):
        digest.update(file.read_bytes())
    for package in ("datasets", "pyarrow", "pillow"):
        digest.update(version(package).encode())
    for key, value in sorted(options.items()):
        digest.update(f"{key}={value!r}\n".encode())
        if _is_path(value):
            for name, size, time in sorted(_stats(Path(value))):
                digest.update(f"{name} {size} {time}\n".encode())
    return digest.hexdigest()


def _stats(path: Path) -> Iterator[tuple[str, int, int]]:
    files = [path] if path.is_file() else (Path(top, name) for top, _, names in os.walk(path) for name in names)
    for file in files:
        stat = file.lstat()
        yield os.fspath(file), stat.st_size, stat.st_mtime_ns


@contextmanager
def _staging(target: Path, fingerprint: str) -> Iterator[Path]:
    """[`building_folder`], which says how much of an interrupted build is there."""
    with building_folder(target, fingerprint) as stage:
        if files := sorted((stage / "notes").glob("*.?????.json")):
            rows = sum(json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files)
            tqdm.write(f"{target}: an interrupted build goes on; {rows:,} rows are there.", file=sys.stderr)
        yield stage


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
