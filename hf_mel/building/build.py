"""Builds a data set from its raw release: a folder of Parquet files, card and report that can be pushed to the Hub.

The builders in `dataset_scripts` know the data sets ([`~hf_mel.building.builders`] describes what a builder has). The code
here treats them all alike.

During a build, finished Parquet files are kept in a hidden folder beside the output, each with a note of its rows. An
interrupted build continues from them and gives the same bytes, provided that nothing it depends on has changed. The
finished data set is checked as any repository is ([`~hf_mel.building.checks.check_tables`]) and renamed into place.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

import hf_mel.dataset_scripts
from hf_mel.building.builders import builder_options, find_builder, official_counts
from hf_mel.building.checks import check_tables
from hf_mel.building.columns import read_parquet
from hf_mel.building.dataset_card import dataset_card
from hf_mel.building.embedding import embed_images, image_threads
from hf_mel.building.id_set import IdSet
from hf_mel.building.report import MISSING_IMAGE, BuildReport, CheckReport
from hf_mel.building.writer import SplitWriter, staged_file
from hf_mel.errors import CountMismatchError, DataFormatError, ImageError, KnowledgeBaseError, MelError
from hf_mel.files import building_folder, link_target, local_path, parquet_sha256, replace_folder, write_text

logger = logging.getLogger(__name__)

#: File of a built data set that lists everything that is missing or was left out.
REPORT_FILE = "report.json"
#: File that lists the entities that an update has added, changed and removed.
CHANGES_FILE = "changes.json"


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
    strict: bool = False,
    update: bool = False,
    config_options: Mapping[str, Any] | None = None,
) -> BuildReport:
    """Builds a data set into a folder that `datasets.load_dataset` and the Hub can read.

    The folder is written completely or not at all, and the same raw files give the same bytes. Images are stored exactly
    as released unless `resize` is given. A missing or broken image becomes null. The report lists all of these images,
    and all rows that were left out. The same call continues a build that was interrupted (not one that failed).

    Args:
        name (`str`): Name of a builder: one of [`~hf_mel.building.builders.known_datasets`].
        output (`str` or `os.PathLike`): Folder to write. An earlier build of the same data set is replaced.
        raw_dir, images, entity_images (`str` or `os.PathLike`, *optional*): Folders of the raw files, of the mention
            images and of the entity images, for builders that read a release.
        allow_count_mismatch (`bool`): Build even if the number of rows differs from the official one.
        overwrite (`bool`): Replace `output` even if it contains other files.
        seed (`int`, *optional*): Random seed, for builders that generate their data.
        resize (`int`, *optional*): Scale images down to at most this many pixels on the longest side
            ([`~hf_mel.data.images.resize_image`]).
        strict (`bool`): Raise an error for the first missing or broken image instead.
        update (`bool`): Whether `raw_dir` is a newer release of the data set in `output`. Options that are not given
            are those of the earlier build, and `changes.json` in the folder lists the ids of entities that were added,
            changed (in any column but their images) and removed.
        config_options (mapping, *optional*): Other fields of the builder's configuration, by name.

    Returns:
        [`~hf_mel.building.report.BuildReport`]

    Raises:
        UnknownDatasetError: No builder has this name.
        DataFormatError: Raw files are missing or malformed, or `output` must not be replaced.
        CountMismatchError: A split does not have its official number of rows.
        DuplicateIdError: An id occurs twice in a configuration.
        KnowledgeBaseError: The knowledge base is empty.
        SpanError: The builder gives offsets at which the text is not the mention.
        ImageError: An image is missing or broken, and the build is `strict`.
        MelError: The builder lacks an option, another process builds into `output`, or the disk is full.
    """
    builder_class = find_builder(name)
    if update:
        earlier = _read_earlier(link_target(output), name)
        settings = {"seed": seed, "resize": resize}
        seed, resize = (earlier.options.get(key) if value is None else value for key, value in settings.items())
        kept = {key: value for key, value in earlier.options.items() if key not in settings}
        config_options = {**kept, **(config_options or {})}
    options = _builder_arguments(builder_class, raw_dir, images, entity_images, seed, config_options or {})
    if resize is not None and resize < 1:
        raise MelError(f"Images cannot be scaled to {resize} pixels.", remedy="Set resize to at least 1.")
    if builder_class.NEEDS_RAW and raw_dir is None:
        raise DataFormatError(
            f"{name!r} is built from the files of its release, but their folder was not given.",
            remedy=f"Give the folder as raw_dir (--raw-dir). It needs: {builder_class.DOWNLOAD}",
        )
    target = link_target(output)
    _check_replaceable(target, name, overwrite, [raw_dir, images, entity_images])
    report = BuildReport(
        dataset=name,
        output=target,
        license=builder_class.LICENSE,
        redistribution=builder_class.REDISTRIBUTION,
        options={
            **({} if seed is None else {"seed": seed}),
            **({} if resize is None else {"resize": resize}),
            # Only the file name is reported, because the path depends on this machine.
            **{k: Path(v).name if _is_path(v) else v for k, v in sorted((config_options or {}).items())},
        },
    )
    configs = [config.name for config in builder_class.BUILDER_CONFIGS]
    if hasattr(builder_class, "configs_in"):
        configs = builder_class.configs_in(raw_dir, options)
    fingerprint = _fingerprint(builder_class, {**options, "resize": resize})
    with building_folder(target, fingerprint) as stage, tempfile.TemporaryDirectory() as cache:
        if num_rows := _num_staged_rows(stage):
            logger.info("%s: an interrupted build continues after %s rows.", target, f"{num_rows:,}")
        builders = {config: builder_class(config_name=config, cache_dir=cache, **options) for config in configs}
        notes: dict[str, dict[str, Any]] = {}
        entity_ids = IdSet()
        with image_threads() as threads:
            # The knowledge base comes first, because rows are left out if it lacks their gold entity.
            for config in sorted(configs, key=lambda config: config != "entities"):
                notes[config] = _write_config(builders[config], config, stage, entity_ids, threads, resize, strict)
                if config == "entities":
                    entity_ids = _read_entity_ids(stage, notes[config])
        notes = {config: notes[config] for config in configs}
        _add_notes(report, notes)
        _check_staged_files(report, stage, notes)
        _check_counts(report, allow_count_mismatch)
        ready = stage / "ready"
        infos = {
            config: _move_files(builders[config], config, stage, ready, config_note)
            for config, config_note in notes.items()
        }
        write_report_and_card(ready, builder_class, infos, report)
        if update:
            changes = changed_entities(target, ready)
            write_text(ready / CHANGES_FILE, [json.dumps(changes, indent=1, ensure_ascii=False), "\n"])
        replace_folder(ready, target)
    return report


def write_report_and_card(
    folder: Path, builder_class: Any, infos: dict[str, datasets.DatasetInfo], report: BuildReport
) -> None:
    """Writes `report.json` and README.md beside the Parquet files of a data set, whose digest the report gets."""
    report.data_sha256 = parquet_sha256(folder)
    write_text(folder / REPORT_FILE, [_report_json(report.to_dict())])
    write_text(folder / "README.md", [dataset_card(builder_class, infos, report)])


def _read_earlier(target: Path, name: str) -> BuildReport:
    """Returns the report of the earlier build that is to be updated.

    Raises:
        DataFormatError: There is none.
    """
    try:
        report = BuildReport.from_dict(json.loads((target / REPORT_FILE).read_text(encoding="utf-8")), target)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        report = None
    if report is None or report.dataset != name:
        raise DataFormatError(
            f"The folder holds no build of {name!r} to update.",
            file=target,
            remedy="Give the output of an earlier build, or build without update (--raw-dir in place of --update).",
        )
    return report


def changed_entities(earlier: Path, newer: Path) -> dict[str, list[str]]:
    """Compares the entities of two builds in all columns of the newer one except images.

    Returns:
        `dict[str, list[str]]`: Ids that were `added` and `changed`, in the order of the newer build, and `removed`, in
        that of the earlier one.
    """
    files = [sorted((folder / "entities").glob("*.parquet")) for folder in (earlier, newer)]
    columns = [field.name for field in pq.read_schema(local_path(files[1][0])) if field.name != "images"]
    digests: dict[str, bytes] = {}
    for file in files[0]:
        there = set(pq.read_schema(local_path(file)).names)
        for table in read_parquet(file, [column for column in columns if column in there]):
            digests.update((row["entity_id"], _row_digest(row, columns)) for row in table.to_pylist())
    changes: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
    for file in files[1]:
        for table in read_parquet(file, columns):
            for row in table.to_pylist():
                before = digests.pop(row["entity_id"], None)
                if before is None:
                    changes["added"].append(row["entity_id"])
                elif before != _row_digest(row, columns):
                    changes["changed"].append(row["entity_id"])
    changes["removed"] = list(digests)
    return changes


def _row_digest(row: Mapping[str, Any], columns: list[str]) -> bytes:
    values = [row.get(column) for column in columns]
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).digest()


def _builder_arguments(
    builder_class: Any,
    raw_dir: str | os.PathLike[str] | None,
    images: str | os.PathLike[str] | None,
    entity_images: str | os.PathLike[str] | None,
    seed: int | None,
    config_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the fields of a builder's configuration that the arguments of [`build_dataset`] set.

    Raises:
        MelError: The builder lacks one of them.
    """
    name = builder_class.NAME
    folders = {"data_dir": raw_dir, "images": images, "entity_images": entity_images}
    fields: dict[str, Any] = {key: str(value) for key, value in folders.items() if value is not None}
    if seed is not None:
        fields["seed"] = seed
    for key in fields:
        if not hasattr(builder_class.BUILDER_CONFIGS[0], key) or (key == "data_dir" and not builder_class.NEEDS_RAW):
            argument = "raw_dir" if key == "data_dir" else key
            raise MelError(f"The builder {name!r} takes no {argument}.", remedy=f"Leave {argument} out.")
    available = builder_options(builder_class)
    for key, value in config_options.items():
        if key not in available:
            raise MelError(
                f"The builder {name!r} has no option {key!r}.",
                remedy=f"Choose from: {', '.join(available)}."
                if available
                else "Leave it out, because this builder has no options.",
            )
        fields[key] = value
    return fields


def _write_config(
    builder: Any,
    config: str,
    stage: Path,
    entity_ids: IdSet,
    threads: ThreadPoolExecutor,
    resize: int | None,
    strict: bool,
) -> dict[str, Any]:
    """Writes the files of one configuration that an interrupted build has not finished yet.

    Returns:
        `dict`: Note of the configuration, as JSON values: `layout`, `sha256`, `problems` and `left_out` of the release,
        the `official` counts, and `splits` with the notes of the files of each split.

    Raises:
        ImageError: An image is missing or broken, and the build is `strict`.
    """
    note_file = stage / "notes" / f"{config}.json"
    if note_file.exists():
        note = json.loads(note_file.read_text(encoding="utf-8"))
        if strict:
            _refuse_left_out_images(_problems(note))
        return note
    builder.work_folder = stage / "notes" / f"{config}.work"
    generators = builder._split_generators(datasets.DownloadManager())
    release = getattr(builder, "release", None)
    layout = getattr(release, "layout", None)
    official = official_counts(builder, layout).get(config, {})
    splits = {}
    for generator in generators:
        split = str(generator.name)
        writer = SplitWriter(stage, config, split, builder.info.features.arrow_schema)
        examples = (example for _, example in builder._generate_examples(**generator.gen_kwargs))
        bar = tqdm(examples, desc=f"{builder.NAME} {config}/{split}", unit=" rows", total=official.get(split))
        # Examples of finished files are generated again, but their images are not read again.
        remaining = itertools.islice(bar, writer.consumed, None)
        origins = getattr(builder, "origins", {})
        for row, problems in embed_images(remaining, builder.info.features, entity_ids, threads, resize):
            located = [
                (kind, *origins.get(row_id, (f"{config}/{split}", row_id)), detail)
                for kind, row_id, detail in problems
            ]
            writer.write(row, located)
            if strict:
                listed = getattr(release, "problems", {})  # by the builder, which reads ahead
                missing = [(kind, *entry) for kind in MISSING_IMAGE for entry in listed.get(kind, ())]
                _refuse_left_out_images([*missing, *located])
        writer.close()
        splits[split] = writer.notes
        if not sum(file_note["rows"] for file_note in writer.notes):
            is_kb = config == "entities"
            raise (KnowledgeBaseError if is_kb else DataFormatError)(
                f"The {'knowledge base' if is_kb else 'split'} is empty.",
                file=f"{config}/{split}",
                remedy="Check the raw files.",
            )
    problems_by_kind = getattr(release, "problems", {})
    note = {
        "layout": layout,
        "sha256": dict(getattr(release, "sha256", {})),
        "problems": {kind: [list(entry) for entry in entries] for kind, entries in problems_by_kind.items()},
        "left_out": dict(sorted(getattr(release, "left_out", {}).items())),
        "official": official,
        "splits": splits,
    }
    if strict:
        _refuse_left_out_images(_problems(note))
    write_text(note_file, [json.dumps(note)])
    return note


def _problems(note: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yields (kind, file, row, detail) of every problem in the note of a configuration."""
    for file_note in itertools.chain.from_iterable(note["splits"].values()):
        yield from map(tuple, file_note["problems"])
    for kind, entries in note["problems"].items():
        yield from ((kind, *entry) for entry in entries)


def _refuse_left_out_images(problems: Iterable[tuple[str, str, str, str]]) -> None:
    """Raises an error for the first of the problems that is a missing or broken image.

    Raises:
        ImageError: There is one.
    """
    for kind, file, row, detail in problems:
        if kind in MISSING_IMAGE or kind == "broken_image":
            raise ImageError(
                detail if kind == "broken_image" else f"An image is missing ({detail}).",
                file=file,
                row=row or None,
                remedy="Correct it, or build without strict (--strict): the row then goes on without the image.",
            )


def _staged_files(stage: Path, config: str, note: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Returns the Parquet files of a configuration by split."""
    return {
        split: [staged_file(stage, config, split, number) for number in range(len(file_notes))]
        for split, file_notes in note["splits"].items()
    }


def _read_entity_ids(stage: Path, note: Mapping[str, Any]) -> IdSet:
    hashes = array("q")
    for file in itertools.chain.from_iterable(_staged_files(stage, "entities", note).values()):
        for table in read_parquet(file, ["entity_id"]):
            hashes.extend(map(hash, table["entity_id"].to_pylist()))
    return IdSet(hashes)


def _add_notes(report: BuildReport, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds the notes of all configurations to the report, those of the knowledge base first."""
    for note in (notes[config] for config in sorted(notes, key=lambda config: config != "entities")):
        report.layout = note["layout"] or report.layout
        report.raw_sha256.update(note["sha256"])
        for kind, file, row, detail in _problems(note):
            report.problem(kind, file, row, detail)
        for kind, count in note["left_out"].items():
            report.left_out[kind] = report.left_out.get(kind, 0) + count
    report.official = {config: note["official"] for config, note in notes.items() if note["official"]}


def _check_staged_files(report: BuildReport, stage: Path, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Runs the checks of any data set on the new files. Their images were verified before they were written."""

    def read(files: list[Path]) -> Iterator[pa.Table]:
        for file in files:
            yield from read_parquet(file)

    tables = {
        config: {split: partial(read, files) for split, files in _staged_files(stage, config, note).items()}
        for config, note in notes.items()
    }
    checks = CheckReport(dataset=report.dataset)
    check_tables(tables, checks, verify_images=False)
    checks.raise_fatal(remedy="Report this as a bug of the builder.")
    for kind, entries in checks.problems.items():
        report.problems.setdefault(kind, []).extend(entries)
    report.duplicates, report.leakage = checks.duplicates, checks.leakage
    report.counts, report.images = checks.counts, checks.images


def _check_counts(report: BuildReport, allow_mismatch: bool) -> None:
    mismatches = []
    for config, splits in report.official.items():
        counts = report.counts.get(config, {})
        mismatches += [
            f"{config}/{split}: expected {expected:,} rows, found {counts.get(split, 0):,}"
            for split, expected in splits.items()
            if expected is not None and counts.get(split, 0) != expected
        ]
    if mismatches and not allow_mismatch:
        problems = ", ".join(f"{kind} {len(entries):,}" for kind, entries in sorted(report.problems.items()))
        raise CountMismatchError(
            f"{report.dataset} differs from the official release. {'; '.join(mismatches)}."
            + (f" Problems by kind: {problems}." if problems else ""),
            remedy="Check the raw files, or build them anyway with allow_count_mismatch (--allow-count-mismatch).",
        )


def _move_files(builder: Any, config: str, stage: Path, ready: Path, note: Mapping[str, Any]) -> datasets.DatasetInfo:
    """Moves the files of a configuration to their final names in `ready`. Returns its features and sizes."""
    (ready / config).mkdir(parents=True)
    download_size = 0
    splits = {}
    for split, files in _staged_files(stage, config, note).items():
        for number, file in enumerate(files):
            download_size += file.stat().st_size
            file.rename(ready / config / f"{split}-{number:05d}-of-{len(files):05d}.parquet")
        file_notes = note["splits"][split]
        splits[split] = datasets.SplitInfo(
            name=split,
            num_bytes=sum(file_note["bytes"] for file_note in file_notes),
            num_examples=sum(file_note["rows"] for file_note in file_notes),
        )
    return datasets.DatasetInfo(
        features=builder.info.features,
        splits=datasets.SplitDict(splits),
        download_size=download_size,
        dataset_size=sum(info.num_bytes for info in splits.values()),
    )


def _check_replaceable(target: Path, name: str, overwrite: bool, sources: list[Any]) -> None:
    """Refuses an output folder that contains other data than an earlier build of the data set `name`."""
    resolved = target.resolve()
    for source in [*(Path(source) for source in sources if source is not None), Path.cwd(), Path.home()]:
        if source.resolve() == resolved or resolved in source.resolve().parents:
            raise DataFormatError(
                f"This folder cannot be the output, because a build would replace it with {source} in it.",
                file=target,
                remedy="Choose another folder.",
            )
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise DataFormatError("This path exists and is not a folder.", file=target, remedy="Choose another output.")
    if overwrite or not target.exists() or not any(target.iterdir()):
        return
    try:
        built_dataset = json.loads((target / REPORT_FILE).read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        built_dataset = None
    if built_dataset != name:
        content = "other files" if built_dataset is None else f"the data set {built_dataset!r}"
        raise DataFormatError(
            f"The folder holds {content}; only an earlier build of {name!r} would be replaced.",
            file=target,
            remedy="Choose another output. To delete the content, add overwrite=True (--overwrite).",
        )


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and value != "" and Path(value).exists())


def _fingerprint(builder_class: Any, options: Mapping[str, Any]) -> str:
    """Returns a digest of everything that the bytes of a build depend on.

    These are the code, the versions of libraries, the options, and names, sizes and times of the raw files.
    """
    folders = [Path(str(sys.modules[builder_class.__module__].__file__)).parent, Path(__file__).parent]
    folders += [Path(folder, part) for folder in hf_mel.dataset_scripts.__path__ for part in ("", "layouts")]
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        digest.update(file.read_bytes())
    for package in ("datasets", "pyarrow", "pillow"):
        digest.update(version(package).encode())
    for key, value in sorted(options.items()):
        digest.update(f"{key}={value!r}\n".encode())
        if _is_path(value):
            for name, size, time in sorted(_file_stats(Path(value))):
                digest.update(f"{name} {size} {time}\n".encode())
    return digest.hexdigest()


def _file_stats(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields (path, size, modification time in ns) of a file, or of all files below a folder."""
    files = [path] if path.is_file() else (Path(top, name) for top, _, names in os.walk(path) for name in names)
    for file in files:
        stat = file.lstat()
        yield os.fspath(file), stat.st_size, stat.st_mtime_ns


def _num_staged_rows(stage: Path) -> int:
    """Returns the number of rows that an interrupted build has left in finished files."""
    note_files = (stage / "notes").glob("*.?????.json")
    return sum(json.loads(file.read_text(encoding="utf-8"))["rows"] for file in note_files)


def _report_json(report: dict[str, Any]) -> str:
    """Formats a report as JSON with one problem a line, which stays readable and small with many problems."""
    head = json.dumps({k: v for k, v in report.items() if k != "problems"}, indent=2, ensure_ascii=False)
    kinds = []
    for kind, listed in report["problems"].items():
        files = ",\n".join(
            f"      {json.dumps(file, ensure_ascii=False)}: [\n"
            + ",\n".join(f"        {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
            + "\n      ]"
            for file, entries in listed["entries"].items()
        )
        kinds.append(
            f'    {json.dumps(kind)}: {{\n    "count": {listed["count"]},\n    "entries": {{\n{files}\n    }}}}'
        )
    return head[:-2] + ',\n  "problems": {\n' + ",\n".join(kinds) + "\n  }\n}\n"
