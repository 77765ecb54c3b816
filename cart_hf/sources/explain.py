"""The Hub client's errors, one message each: what, where, what to do; never a token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from cart_hf.errors import UserError
from cart_hf.recipe.reference import Reference

_HTTP_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2")


@contextmanager
def explained(name: str, reference: Reference | str) -> Iterator[None]:
    """Turn the Hub client's errors, and those of the disk it writes to, into one message each.

    :param name: what to call the model in messages.
    :raises UserError: instead of every error that is about the Hub or the cache.
    """
    try:
        yield
    except Exception as failure:
        explanation = _explanation(failure, reference if isinstance(reference, str) else reference.path)
        if explanation is None:
            raise
        raise UserError(without_secrets(f"{name}: {reference}{explanation}")) from failure


def without_secrets(text: str) -> str:
    """Return a message without the passwords and signatures that its addresses hold."""
    text = re.sub(r"//[^/@\s]+@", "//", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


def is_of_http_client(failure: BaseException | None) -> bool:
    """Whether an error is the HTTP client's own: a dropped connection reaches us so, and it is no OSError."""
    return type(failure).__module__.split(".")[0] in _HTTP_CLIENTS


def status_of(failure: BaseException | None) -> int | None:
    """Return the HTTP status that an error is about, if any."""
    status = getattr(getattr(failure, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def asked_to_wait(failure: BaseException | None) -> int | None:
    """Return for how many seconds an answer (429, 503) asks not to come back, if it does."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(failure, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return int(limit.reset_in_seconds)
    after = str(headers.get("retry-after", "")).strip()
    return int(after) if after.isdigit() else None


def _explanation(failure: Exception, repository: str) -> str | None:
    """Say what an error means and what to do, or return None when it is not about the Hub."""
    from huggingface_hub import constants, errors

    page, reason = f"{constants.ENDPOINT}/{repository}", _first_line(failure)
    missing = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    meanings: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (errors.GatedRepoError, f" is gated: accept its terms at {page} and log in (hf auth login)"),
        (
            errors.RepositoryNotFoundError,
            ": no such folder here and no such repository on the Hub; check the spelling, "
            "and for a private repository log in (hf auth login)",
        ),
        (errors.HFValidationError, f": no such folder here, and not a valid Hub id: {reason}"),
        (errors.RevisionNotFoundError, f": the repository has no such branch, tag or commit; see {page}/tree/main"),
        (missing, f": not in the local cache, and {_obstacle(failure)}"),
        (errors.SafetensorsParsingError, f" holds a damaged weight file: {reason}"),
        ((errors.HfHubHTTPError, OSError), f": {_answer(failure)}"),
        (
            json.JSONDecodeError,
            f": {constants.ENDPOINT} does not answer like a Hub; check HF_ENDPOINT and the network's proxy",
        ),
    ]
    if is_of_http_client(failure):
        return f": the connection to the Hub failed ({reason}); try again, what has arrived is kept"
    return next((meaning for kinds, meaning in meanings if isinstance(failure, kinds)), None)


def _obstacle(failure: Exception) -> str:
    """Say why something that is not in the cache could not be downloaded."""
    from huggingface_hub import constants, errors, is_offline_mode

    cause = failure.__cause__
    if is_offline_mode():
        return "HF_HUB_OFFLINE forbids downloading it; run once without HF_HUB_OFFLINE"
    if isinstance(cause, errors.HfHubHTTPError | errors.FileMetadataError):
        return _answer(cause)
    why = f" ({_first_line(cause)})" if isinstance(cause, Exception) else ""
    return f"{constants.ENDPOINT} cannot be reached{why}; check the connection and try again"


def _answer(failure: Exception) -> str:
    """Say what an answer of the Hub, or an error of this machine, means."""
    from huggingface_hub import constants

    status = status_of(failure)
    if status == 401:
        return "the Hub does not know the access token; log in again (hf auth login), or correct HF_TOKEN"
    if status == 429:
        wait = asked_to_wait(failure)
        when = f"in {wait} s" if wait else "in a few minutes"
        return f"the Hub limits how often it is asked (429); try again {when}, or log in for more (hf auth login)"
    if status is not None and status >= 500:
        said = f"{status} {getattr(failure.response, 'reason_phrase', '')}".strip()  # type: ignore[attr-defined]
        return f"the Hub is out of order ({said}), and asking again did not help; try again later"
    if isinstance(failure, OSError) and failure.errno is not None and not isinstance(failure, ConnectionError):
        return (
            f"the cache {constants.HF_HUB_CACHE} cannot be written ({failure.strerror}); "
            "make room or set HF_HOME, and try again: what has arrived is kept"
        )
    return f"the Hub could not be read: {_first_line(failure)}"


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
