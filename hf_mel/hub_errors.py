"""The Hub, seen from the library: what its client raises becomes one typed error, and no token gets into a message."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import errors

from hf_mel.errors import HubError

#: The client's transport errors have this base, whichever HTTP library it is built on.
_TRANSPORT = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_TOKEN = re.compile(r"\b(?:hf|api_org|hf_oauth)_[A-Za-z0-9]{8,}")


def check_repo_id(repo_id: str) -> str:
    """The id, if it can be one of a repository on the Hub: `name` or `owner/name`.

    Raises:
        HubError: It cannot.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is not an id of the Hub.",
            remedy="An id is OWNER/NAME, of letters, digits, '-', '_' and '.'.",
        ) from error
    return repo_id


def without_tokens(text: str) -> str:
    """The text with everything that is, or looks like, an access token blotted out."""
    token = huggingface_hub.get_token()
    if token:
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


def holds_token(content: bytes) -> bool:
    """Whether a file's content has this machine's access token, or something that looks like one, in it."""
    token = huggingface_hub.get_token()
    if token and token.encode() in content:
        return True
    return re.search(rb"\bhf_[A-Za-z0-9]{30,}\b", content) is not None


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns whatever the client raises inside into a [`~hf_mel.errors.HubError`] that says what to do.

    Args:
        repo_id (`str`): The repository it is about; named in the error.
        revision (`str`, *optional*): The revision that was asked for.
    """
    try:
        yield
    except Exception as error:
        translated = _translated(error, repo_id, revision)
        if translated is None:
            raise
        # The original may hold headers or addresses with secrets in them: it is not chained into a traceback.
        raise translated from None


def _translated(error: BaseException, repo_id: str, revision: str | None) -> HubError | None:
    login = "Log in (hf auth login) with an account that may see it, and check the spelling."
    if isinstance(error, errors.GatedRepoError):
        return HubError("is gated, and this account has no access.", file=repo_id, remedy="Ask for it on its page.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError("is not there, or is private and not yours to see.", file=repo_id, remedy=login)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"has no revision {revision!r}.", file=repo_id, remedy="Give a branch, a tag or a commit.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError("the Hub may not be asked: offline mode is on (HF_HUB_OFFLINE).", file=repo_id)
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = _cause(error)
        offline = reason is None or isinstance(reason, errors.OfflineModeIsEnabled)
        why = "and the Hub may not be asked (offline)" if offline else f"and the Hub did not answer ({_brief(reason)})"
        return HubError(
            f"{'revision ' + repr(revision) + ' ' if revision else ''}is not whole in the cache here, {why}.",
            file=repo_id,
            remedy="Download it once while online; a cache that was moved is found with HF_HOME or HF_HUB_CACHE."
            if offline
            else "Try again; what was downloaded is kept.",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"lacks a file ({_brief(error)}).", file=repo_id)
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            return HubError("refuses this access token.", file=repo_id, remedy="Log in again: hf auth login.")
        if status == 403:
            return HubError(
                f"does not let this account do that ({_brief(error)}).",
                file=repo_id,
                remedy="Use a token with write access to it: hf auth login.",
            )
        if status == 412:
            return HubError("was changed by somebody else meanwhile.", file=repo_id, remedy="Run the command again.")
        if status == 429:
            return HubError("The Hub asks to wait (too many requests).", file=repo_id, remedy="Try again later.")
        return HubError(f"the Hub answered {status}: {_brief(error)}.", file=repo_id, remedy="Try again later.")
    if isinstance(error, (_TRANSPORT, ConnectionError, TimeoutError)):
        return HubError(
            f"the connection to the Hub failed ({_brief(error)}).", file=repo_id, remedy="Run the command again."
        )
    if isinstance(error, RuntimeError) and (inner := _cause(error)) is not None:
        return _translated(inner, repo_id, revision)  # an upload in one of the client's threads
    return None


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or error.__context__


def _brief(error: BaseException | None) -> str:
    text = " ".join(without_tokens(str(error)).split())
    return f"{type(error).__name__}: {text[:200]}"
