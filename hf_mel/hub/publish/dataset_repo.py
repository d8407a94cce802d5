"""hf_mel.hub.publish.dataset_repo."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from hf_mel.errors import PublishError
from hf_mel.hub.publish.publication import Content, Publication, _card_metadata, _folder, _json_file, _unfit


def dataset_publication(
    folder: str | os.PathLike[str], repo_id: str, *, i_hold_the_rights: bool = False
) -> Publication:
    """A folder that `hf-mel data build` wrote, as a data-set repository.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Where to, `OWNER/NAME`.
        i_hold_the_rights (`bool`): Publish although the release's terms do not let everybody.

    Raises:
        PublishError: Not such a folder, or its terms forbid it.
    """
    folder = _folder(folder)
    report = _json_file(folder / "report.json", "Give a folder written by hf-mel data build.")
    metadata = _card_metadata(folder / "README.md")
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if reason := _unfit(path, name, (".parquet", ".json", ".md")):
            left_out[name] = reason
        else:
            files[name] = path
    rows = sum(name.endswith(".parquet") for name in files)
    if not rows:
        raise PublishError("holds no Parquet files.", file=folder, remedy="Build it: hf-mel data build.")
    _check_parquet(files)
    # A report that does not say was written by an older version: not knowing is no leave.
    terms = report.get("redistribution", "its report does not say whether it may (build it again)")
    if terms is not None and not isinstance(terms, str):
        raise PublishError(f"'redistribution' is {terms!r}, not a text.", file=folder / "report.json")
    notes = []
    if terms:
        if not i_hold_the_rights:
            raise PublishError(
                f"may not be passed on: {terms}",
                file=folder,
                remedy="If its rights are yours, or you were given leave, say --i-hold-the-rights.",
            )
        notes.append(f"Published because you say you hold the rights. The terms: {terms}")
    text = (folder / "README.md").read_text(encoding="utf-8")
    builder = report.get("dataset")
    if isinstance(builder, str):
        files["README.md"] = text.replace(f"path/to/{builder}", repo_id).encode()
    if not metadata.get("license"):
        notes.append("The card names no licence.")
    return Publication(
        "data set",
        repo_id,
        "dataset",
        files,
        owned=("*.parquet",),
        left_out=left_out,
        notes=notes,
        license=metadata.get("license"),
    )


def _check_parquet(files: Mapping[str, Content]) -> None:

    for name, content in files.items():
        if name.endswith(".parquet"):
            try:
                pq.ParquetFile(content).close()
            except (pa.ArrowException, OSError) as error:
                raise PublishError(f"is not a Parquet file ({error}).", file=name, remedy="Build it again.") from error
