"""The one error that is the user's to fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in a recipe, a flag or an input. The command line prints it without a traceback and exits with 2.

    :param problems: one message, or all the messages that were collected; each says what, where and what to do.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say what could not be done when the system refuses it: what the system or safetensors raises does not.

    :param what: such as "cannot write FILE".
    :raises UserError: instead of an OSError.
    """
    from safetensors import SafetensorError  # which wraps a full disk in an error of its own

    try:
        yield
    except (OSError, SafetensorError) as failure:
        raise UserError(f"{what}: {getattr(failure, 'strerror', None) or failure}") from failure


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` - did you mean 'x'?`` for the closest known word, or a list of the known words when none is close."""
    known = list(known)
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    if close:
        return f" - did you mean '{lowered[close[0]]}'?"
    return f" (known: {', '.join(known)})" if known else ""


def shorten(names: Sequence[str], most: int = 4) -> str:
    """Join ``names`` with commas, naming at most ``most`` and counting the rest."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
