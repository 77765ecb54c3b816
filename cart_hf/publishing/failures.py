"""What an error means while a model is pushed, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cart_hf.errors import UserError
from cart_hf.sources.explain import is_of_http_client, status_of, without_secrets

_AGAIN = "push again: what the Hub already has is not sent twice"


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn the errors of a push into one message each; never a token."""
    try:
        yield
    except UserError:
        raise
    except Exception as failure:
        explanation = next((text for cause in _causes(failure) if (text := _explanation(cause, repo))), None)
        if explanation is None:
            raise
        raise UserError(without_secrets(f"{repo}: {explanation}")) from failure


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from: the library wraps what goes wrong in its upload threads."""
    cause: BaseException | None = failure
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _explanation(failure: BaseException, repo: str) -> str | None:
    from huggingface_hub import constants, errors

    reason = _first_line(failure)
    if isinstance(failure, errors.LocalTokenNotFoundError):
        return "no access token: log in (hf auth login) or set HF_TOKEN; the token needs the write role"
    if isinstance(failure, errors.HfHubHTTPError):
        return _answer(status_of(failure) or 0, reason, repo)
    if is_of_http_client(failure):
        return f"the connection to {constants.ENDPOINT} failed ({reason}); {_AGAIN}"
    if isinstance(failure, OSError) and failure.filename is not None:
        return f"cannot read {failure.filename}: {failure.strerror}"
    if type(failure).__module__.startswith("hf_xet") or "xet" in str(failure).lower():
        return f"uploading by Xet failed ({reason}); set HF_HUB_DISABLE_XET=1 if this Hub has no Xet, and {_AGAIN}"
    if isinstance(failure, ConnectionError | TimeoutError):
        return f"the upload broke off ({reason}); {_AGAIN} (with HF_HUB_DISABLE_XET=1 if this Hub has no Xet)"
    return None


def _answer(status: int, reason: str, repo: str) -> str:
    from huggingface_hub import constants

    if status == 401:
        return "the Hub does not know the access token; log in again (hf auth login), or correct HF_TOKEN"
    if status == 403:
        return f"the token may not write there; it needs the write role for '{repo.split('/')[0]}' ({reason})"
    if status == 404:
        return f"no such repository, or the token may not see it ({reason})"
    if status == 412:
        return "somebody else has committed to it just now; look at their commit, then push again"
    if status in (408, 429) or status >= 500:
        return f"{constants.ENDPOINT} is out of order or busy ({reason}); {_AGAIN}"
    return f"the Hub refuses: {reason}"


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
