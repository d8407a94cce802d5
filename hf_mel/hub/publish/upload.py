"""Uploading a publication as one commit.

[`compare`] shows what a publication would change in its repository, and [`publish`] changes it. Large files are uploaded
first; the client skips those that the Hub has already. One commit then makes all changes visible at once, so an
interrupted run leaves the old revision in place and can be repeated.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from hf_mel.errors import PublishError
from hf_mel.files import file_sha256
from hf_mel.hub.publish.publication import Content, Publication, content_bytes
from hf_mel.hub_errors import hub_errors

Gated = Literal["auto", "manual"]
GATED: tuple[str, ...] = get_args(Gated)


@dataclass
class Change:
    """The effect of a publication on one file.

    Args:
        path (`str`): Path in the repository.
        kind (`str`): "new", "changed", "unchanged" or "deleted".
        size (`int`): Size in bytes.
    """

    path: str
    kind: str
    size: int


@dataclass
class Comparison:
    """The difference between a publication and its repository.

    Args:
        changes (`list[Change]`): The effect on every file, by path; deleted files come last.
        exists (`bool`, *optional*): Whether the repository exists; `None` if the Hub could not be asked.
        head (`str`, *optional*): The commit that was compared with; `None` if the repository does not exist.
        private (`bool`, *optional*): The repository's current setting.
        gated (`str` or `bool`, *optional*): The repository's current setting.
    """

    changes: list[Change]
    exists: bool | None = None
    head: str | None = None
    private: bool | None = None
    gated: str | bool | None = None

    @property
    def upload_bytes(self) -> int:
        """Bytes of new and changed files."""
        return sum(change.size for change in self.changes if change.kind in ("new", "changed"))

    @property
    def is_empty(self) -> bool:
        """Whether no file would change."""
        return all(change.kind == "unchanged" for change in self.changes)


def compare(publication: Publication, *, api: HfApi | None = None) -> Comparison:
    """Compares a publication with its repository on the Hub. Nothing is written.

    Args:
        publication ([`Publication`]): The publication.
        api (`HfApi`, *optional*): The client to use.

    Raises:
        HubError: The Hub cannot be reached, or refuses the request.
    """
    api = api or HfApi()
    repo_id, repo_type = publication.repo_id, publication.repo_type
    with hub_errors(repo_id):
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            return Comparison(_changes(publication, {}), exists=False)
        tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha, repo_type=repo_type)
        remote = {item.path: item for item in tree if isinstance(item, RepoFile)}
    private, gated = (getattr(info, name, None) for name in ("private", "gated"))
    return Comparison(_changes(publication, remote), exists=True, head=info.sha, private=private, gated=gated)


def publish(
    publication: Publication,
    *,
    private: bool = False,
    gated: Gated | None = None,
    message: str | None = None,
    api: HfApi | None = None,
) -> tuple[str | None, Comparison]:
    """Uploads a publication in one commit, or does nothing if the repository already matches it.

    The repository is created if needed. It is made private or gated before the first file is uploaded, and never made
    more public than it is. The commit names the revision it was compared with as its parent, so it fails without any
    change if another commit came first. The access token is that of `hf auth login`, or `HF_TOKEN`.

    Args:
        publication ([`Publication`]): What to upload.
        private (`bool`): Make the repository private.
        gated (`str`, *optional*): Require readers to request access: "auto" grants every request, "manual" leaves the
            decision to you.
        message (`str`, *optional*): Title of the commit.
        api (`HfApi`, *optional*): The client to use.

    Returns:
        The sha of the commit (`None` if nothing had to change) and the [`Comparison`] it was made from.

    Raises:
        HubError: No account, no write access, a failed connection, or another commit in the meantime. Nothing was
            committed, except if the connection failed after the commit itself; running it again is safe in both cases.
        PublishError: The Hub rejects the card's metadata.
    """
    api = api or HfApi()
    repo_id, repo_type = publication.repo_id, publication.repo_type
    comparison = compare(publication, api=api)
    with hub_errors(repo_id):
        if not comparison.exists:
            api.create_repo(
                repo_id,
                repo_type=repo_type,
                private=private or None,
                exist_ok=True,
                space_sdk=publication.space_sdk if repo_type == "space" else None,
            )
            comparison = compare(publication, api=api)
        settings: dict[str, Any] = {}
        if private and not comparison.private:
            settings["private"] = True
        if gated is not None and comparison.gated != gated:
            settings["gated"] = gated
        if settings:
            api.update_repo_settings(repo_id, repo_type=repo_type, **settings)
        operations: list[Any] = []
        for change in comparison.changes:
            if change.kind in ("new", "changed"):
                content = publication.files[change.path]
                operations.append(
                    CommitOperationAdd(change.path, content if isinstance(content, bytes) else str(content))
                )
            elif change.kind == "deleted":
                operations.append(CommitOperationDelete(change.path, is_folder=False))
        if not operations:
            return None, comparison
        try:
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=message or f"Publish the {publication.kind} with hf_mel",
                repo_type=repo_type,
                parent_commit=comparison.head,
            )
        except HfHubHTTPError:
            raise
        except ValueError as error:  # the client has the Hub validate the card's metadata before it uploads
            raise PublishError(str(error), file="README.md", remedy="Correct the card's metadata.") from error
    return commit.oid, comparison


def _changes(publication: Publication, remote: Mapping[str, RepoFile]) -> list[Change]:
    changes = []
    with tqdm(sorted(publication.files.items()), desc="Comparing", unit="file", delay=2) as bar:
        for path, content in bar:
            if path not in remote:
                kind = "new"
            else:
                kind = "unchanged" if _is_same(content, publication.size(path), remote[path]) else "changed"
            changes.append(Change(path, kind, publication.size(path)))
    for path in sorted(remote.keys() - publication.files.keys()):
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in publication.managed_patterns):
            changes.append(Change(path, "deleted", remote[path].size))
    return changes


def _is_same(content: Content, size: int, remote: RepoFile) -> bool:
    if size != remote.size:
        return False
    if remote.lfs is not None:
        sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return sha256 == remote.lfs.sha256
    data = content_bytes(content)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob_id  # the id git gives a file
