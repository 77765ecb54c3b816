"""Asking the Hub again: after dropped connections, server errors and rate limits, a bounded number of times.

The client asks again in some places and not in others (not after a 5xx to a GET, nor a dropped HEAD): this is for all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from cart_hf.sources.explain import asked_to_wait, is_of_http_client, status_of

Result = TypeVar("Result")

TRIES = 5
LONGEST = 300  # seconds: the Hub counts requests over five minutes, so to wait longer cannot help
_WORTH_SAYING = 5  # seconds
_PASSING = {"TimeoutException", "NetworkError", "RemoteProtocolError"}  # the HTTP client's errors that may pass


class Patience:
    """Counts how often one question to the Hub failed.

    :param name: what to call the model in messages.
    :param stop: when set, nobody waits for the answer any more.
    """

    def __init__(self, name: str, stop: Event | None = None) -> None:
        self._name, self._stop = name, stop or Event()
        self.renew()

    def renew(self) -> None:
        """Start counting again, since there was progress."""
        self._failures, self._since = 0, time.monotonic()

    def wait(self, failure: Exception) -> None:
        """Wait until the question may be asked again.

        :raises Exception: the ``failure`` itself, when it will not pass, or came too often.
        """
        self._failures += 1
        cause = _cause(failure)
        told = asked_to_wait(cause)
        seconds = float(2 ** (self._failures - 1) if told is None else told + 1)  # told in whole seconds
        over = time.monotonic() - self._since + seconds > LONGEST
        if not may_pass(failure) or self._failures >= TRIES or over or self._stop.is_set():
            raise failure
        if seconds >= _WORTH_SAYING:
            status = status_of(cause)
            reason = f"answered {status}" if status else "dropped the connection"
            logging.getLogger("cart_hf").warning(
                "%s: the Hub %s; asking again in %.0f s (try %d of %d)",
                self._name, reason, seconds, self._failures + 1, TRIES,
            )  # fmt: skip
        while seconds > 0 and not self._stop.is_set():
            time.sleep(min(seconds, 1))
            seconds -= 1


def patiently(name: str, ask: Callable[[], Result], stop: Event | None = None) -> Result:
    """Return what ``ask`` returns, asking again when it fails for a reason that may pass.

    :param name: what to call the model in messages.
    :param ask: may be called several times.
    :param stop: when set, the first failure is raised.
    """
    patience = Patience(name, stop)
    while True:
        try:
            return ask()
        except Exception as failure:
            patience.wait(failure)


def may_pass(failure: Exception) -> bool:
    """Whether an error may be gone when the same is asked again.

    ``LocalEntryNotFoundError`` is not among them: the client raises it after having asked again itself.
    """
    cause = _cause(failure)
    kinds = {kind.__name__ for kind in type(cause).__mro__}
    if cause is not failure and kinds & {"ConnectError", "ConnectTimeout"}:
        return False  # the first request of all: there is no network, or no hub at this address
    status = status_of(cause)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(cause, ConnectionError) or (is_of_http_client(cause) and bool(kinds & _PASSING))


def _cause(failure: Exception) -> BaseException | None:
    """Return what made a request fail, where the client wraps it."""
    from huggingface_hub.errors import RevisionResolutionError

    return failure.__cause__ if isinstance(failure, RevisionResolutionError) else failure
