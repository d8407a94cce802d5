"""Turns errors of the Hub client into [`~hf_mel.errors.HubError`], and keeps access tokens out of messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

from hf_mel.errors import HubError

#: Base of the client's transport errors, taken from its classes so that it fits whichever HTTP library it uses.
_TRANSPORT = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_TOKEN = re.compile(r"\b(?:hf|api_org|hf_oauth)_[A-Za-z0-9]{8,}")


def check_repo_id(repo_id: str) -> str:
    """Returns a repository id (`name` or `owner/name`) after checking its form.

    Raises:
        HubError: The id is malformed.
    """
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is not a repository id.",
            remedy="Give OWNER/NAME, made of letters, digits, '-', '_' and '.'.",
        ) from error
    return repo_id


def without_tokens(text: str) -> str:
    """Replaces the access token of this machine, and everything that looks like one, by "<token>"."""
    token = huggingface_hub.get_token()
    if token:
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


def holds_token(content: bytes) -> bool:
    """Whether the content of a file contains the access token of this machine, or something that looks like one."""
    token = huggingface_hub.get_token()
    if token and token.encode() in content:
        return True
    return re.search(rb"\bhf_[A-Za-z0-9]{30,}\b", content) is not None


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns errors of the Hub client inside the block into [`~hf_mel.errors.HubError`] with a remedy.

    Args:
        repo_id (`str`): The repository, for the message.
        revision (`str`, *optional*): The requested revision, for the message.

    Raises:
        HubError: The client raised an error in the block. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        translated = _translate(error, repo_id, revision)
        if translated is None:
            raise
        # The original error may contain headers or URLs with secrets, so the traceback must not show it.
        raise translated from None


def _translate(error: BaseException, repo_id: str, revision: str | None) -> HubError | None:
    login = "Check the spelling, or log in with an account that has access: hf auth login."
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            "The repository is gated, and your account has no access.",
            file=repo_id,
            remedy="Request access on its page.",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            "The repository does not exist, or is private and your token has no access.", file=repo_id, remedy=login
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"The repository has no revision {revision!r}.", file=repo_id, remedy="Give a branch, a tag or a commit."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            "The Hub is not contacted, because offline mode is on.", file=repo_id, remedy="Unset HF_HUB_OFFLINE."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = _cause(error)
        is_offline = reason is None or isinstance(reason, errors.OfflineModeIsEnabled)
        subject = f"The revision {revision!r}" if revision else "The repository"
        obstacle = "the Hub is not contacted (offline)" if is_offline else f"the Hub did not answer ({_brief(reason)})"
        return HubError(
            f"{subject} is not completely in the cache, and {obstacle}.",
            file=repo_id,
            remedy="Download it once while online. If you moved the cache, set HF_HOME or HF_HUB_CACHE."
            if is_offline
            else "Try again; finished downloads are kept.",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(
            f"The repository lacks a file ({_brief(error)}).",
            file=repo_id,
            remedy="Check that it is a repository of the right kind.",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            return HubError("The Hub refuses your access token.", file=repo_id, remedy="Log in again: hf auth login.")
        if status == 403:
            return HubError(
                f"The Hub does not permit this to your account ({_brief(error)}).",
                file=repo_id,
                remedy="Use a token with write access to the repository: hf auth login.",
            )
        if status == 412:
            return HubError(
                "The repository was changed by someone else meanwhile.",
                file=repo_id,
                remedy="Run the command again.",
            )
        if status == 429:
            return HubError("The Hub asks to wait (too many requests).", file=repo_id, remedy="Try again later.")
        return HubError(f"The Hub answered {status}: {_brief(error)}.", file=repo_id, remedy="Try again later.")
    if isinstance(error, (_TRANSPORT, ConnectionError, TimeoutError)):
        return HubError(
            f"The connection to the Hub failed ({_brief(error)}).", file=repo_id, remedy="Run the command again."
        )
    if isinstance(error, RuntimeError) and (inner := _cause(error)) is not None:
        return _translate(inner, repo_id, revision)  # raised in an upload thread of the client
    return None


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or error.__context__


def _brief(error: BaseException | None) -> str:
    text = " ".join(without_tokens(str(error)).split())
    return f"{type(error).__name__}: {text[:200]}"
