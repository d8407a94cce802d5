"""Publications of data sets."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq

from hf_mel.errors import PublishError
from hf_mel.files import local_path
from hf_mel.hub.publish.publication import (
    Content,
    Publication,
    existing_folder,
    read_card_metadata,
    read_json_object,
    reason_to_skip,
)


def dataset_publication(
    folder: str | os.PathLike[str], repo_id: str, *, i_hold_the_rights: bool = False
) -> Publication:
    """Returns the publication of a folder written by `hf-mel data build`.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Repository id, `OWNER/NAME`.
        i_hold_the_rights (`bool`): Publish although the terms of the release restrict redistribution.

    Raises:
        HubError: `repo_id` is not valid.
        PublishError: The folder is not a built data set, a file is damaged, or the terms forbid redistribution.
    """
    folder = existing_folder(folder)
    report = read_json_object(folder / "report.json", "Give a folder written by hf-mel data build.")
    metadata = read_card_metadata(folder / "README.md")
    files: dict[str, Content] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if reason := reason_to_skip(path, name, (".parquet", ".json", ".md")):
            left_out[name] = reason
        else:
            files[name] = path
    parquet_files = [name for name in files if name.endswith(".parquet")]
    if not parquet_files:
        raise PublishError(
            "The folder holds no Parquet files.", file=folder, remedy="Build the data set with hf-mel data build."
        )
    for name in parquet_files:
        try:
            pq.ParquetFile(local_path(folder / name)).close()
        except (pa.ArrowException, OSError) as error:
            raise PublishError(
                f"The file is not a Parquet file ({error}).", file=name, remedy="Build the data set again."
            ) from error

    # A report without the key comes from an older version. Its silence is not a permission.
    terms = report.get("redistribution", "report.json does not say whether it may be. Build it again.")
    if terms is not None and not isinstance(terms, str):
        raise PublishError(
            f"'redistribution' is {terms!r}, not a string.",
            file=folder / "report.json",
            remedy="Build the data set again.",
        )
    notes = []
    if terms:
        if not i_hold_the_rights:
            raise PublishError(
                f"The data set may not be redistributed: {terms}",
                file=folder,
                remedy="If you hold the rights or have permission, add --i-hold-the-rights.",
            )
        notes.append(f"You stated that you hold the rights. The terms of the release: {terms}")
    builder = report.get("dataset")
    if isinstance(builder, str):
        card = (folder / "README.md").read_text(encoding="utf-8")
        files["README.md"] = card.replace(f"path/to/{builder}", repo_id).encode()
    if not metadata.get("license"):
        notes.append("The card names no licence.")
    return Publication(
        "data set",
        repo_id,
        "dataset",
        files,
        managed_patterns=("*.parquet",),
        left_out=left_out,
        notes=notes,
        license=metadata.get("license"),
    )
