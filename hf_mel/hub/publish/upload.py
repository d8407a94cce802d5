"""Publishing: a folder on disk → one commit in a repository of the Hub, or none.

[`model_publication`] and its siblings say what would go up; [`compare`] says what that changes; [`publish`] does it. Files
that are large are uploaded first (by the client, which skips those the Hub has), then one commit names everything: until
it is there the earlier revision is what everybody gets, and a run that was cut off is simply repeated.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm.auto import tqdm

from hf_mel.errors import PublishError
from hf_mel.files import file_sha256
from hf_mel.hub.publish.publication import Content, Publication, _read
from hf_mel.hub_errors import hub_errors

Gated = Literal["auto", "manual"]


@dataclass
class Change:
    """What a publication does to one file: `what` is "new", "changed", "unchanged" or "deleted"; `size` in bytes."""

    path: str
    what: str
    size: int


@dataclass
class Comparison:
    """A publication beside what the repository holds.

    Args:
        head (`str` or `None`): The commit compared with; `None` if there is no such repository yet, or none was asked.
        exists (`bool` or `None`): `None` if the Hub could not be asked.
        private, gated: The repository's settings as they are.
        changes (`list[Change]`): Each file, by path.
    """

    head: str | None
    exists: bool | None
    private: bool | None
    gated: str | bool | None
    changes: list[Change]

    @property
    def upload_bytes(self) -> int:
        """Bytes of new and changed files."""
        return sum(change.size for change in self.changes if change.what in ("new", "changed"))

    @property
    def is_empty(self) -> bool:
        """Whether no file would change."""
        return all(change.what == "unchanged" for change in self.changes)


@dataclass
class PublishResult:
    """What [`publish`] did: `commit` is `None` where nothing was left to do; `url` is the repository's page."""

    commit: str | None
    url: str
    comparison: Comparison


# -- what goes up ------------------------------------------------------------------------------------------------------


# -- what that changes, and doing it ----------------------------------------------------------------------------------


def compare(publication: Publication, *, api: HfApi | None = None) -> Comparison:
    """What the publication changes in its repository; asks the Hub, writes nothing.

    Raises:
        HubError: The Hub cannot be asked, or does not answer.
    """
    api = api or HfApi()
    repo_id, repo_type = publication.repo_id, publication.repo_type
    with hub_errors(repo_id):
        try:
            info = api.repo_info(repo_id, repo_type=repo_type)
        except RepositoryNotFoundError:
            return Comparison(None, False, None, None, _changes(publication, {}))
        tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha, repo_type=repo_type)
        remote = {item.path: item for item in tree if isinstance(item, RepoFile)}
    private, gated = (getattr(info, name, None) for name in ("private", "gated"))
    return Comparison(info.sha, True, private, gated, _changes(publication, remote))


def offline_comparison(publication: Publication) -> Comparison:
    """As [`compare`], with everything new: what can be said without asking the Hub."""
    return Comparison(None, None, None, None, _changes(publication, {}))


def publish(
    publication: Publication,
    *,
    private: bool = False,
    gated: Gated | None = None,
    message: str | None = None,
    api: HfApi | None = None,
) -> PublishResult:
    """Makes the repository hold the publication: one commit, or none if there is nothing to change.

    The repository is made if need be. It becomes private, or gated, before the first file is in it; one that is private
    or gated is never opened. The commit names the one it was compared with, so that it fails, and nothing changes, where
    somebody else was faster. The access token is the one of `hf auth login`, or `HF_TOKEN`.

    Args:
        publication ([`Publication`]): What goes up.
        private (`bool`): Only the owner, or the organisation, may see it.
        gated (`str`, *optional*): Readers have to ask: "auto" lets everybody in who asks, "manual" those you accept.
        message (`str`, *optional*): Title of the commit.

    Raises:
        HubError: No account, no right to write, a connection that failed, a repository that changed meanwhile. Nothing
            was committed, or (a connection that failed at the last moment) everything was: running it again tells.
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
            if change.what in ("new", "changed"):
                content = publication.files[change.path]
                operations.append(
                    CommitOperationAdd(change.path, content if isinstance(content, bytes) else str(content))
                )
            elif change.what == "deleted":
                operations.append(CommitOperationDelete(change.path, is_folder=False))
        url = f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if not operations:
            return PublishResult(None, url, comparison)
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
        except ValueError as error:  # the Hub checks the card's metadata before it takes anything
            raise PublishError(str(error), file="README.md", remedy="Correct the card's metadata.") from error
    return PublishResult(commit.oid, url, comparison)


def _changes(publication: Publication, remote: Mapping[str, RepoFile]) -> list[Change]:
    changes = []
    with tqdm(sorted(publication.files.items()), desc="Comparing", unit="file", delay=2) as bar:
        for path, content in bar:
            what = "new" if path not in remote else "unchanged" if _same(content, remote[path]) else "changed"
            changes.append(Change(path, what, publication.size(path)))
    stale = [
        path
        for path in remote
        if path not in publication.files and any(fnmatch.fnmatchcase(path, pattern) for pattern in publication.owned)
    ]
    changes += [Change(path, "deleted", remote[path].size) for path in sorted(stale)]
    return changes


def _same(content: Content, remote: RepoFile) -> bool:
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != remote.size:
        return False
    if remote.lfs is not None:
        sha256 = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)
        return sha256 == remote.lfs.sha256
    data = content if isinstance(content, bytes) else _read(content)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == remote.blob_id  # git's own name of a content


# -- checks ------------------------------------------------------------------------------------------------------------
