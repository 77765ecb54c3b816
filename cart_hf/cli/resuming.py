"""What people are told about work that was interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cart_hf.errors import UserError


@contextmanager
def resumable(target: Path, *, resume: bool, what: str) -> Iterator[None]:
    """Say before the work that there is something to continue, and after an interruption how.

    :param resume: whether it is being continued.
    :param what: the work, such as "a merge".
    """
    from cart_hf.api import resolved_target
    from cart_hf.cli.console import err, warn
    from cart_hf.output import unfinished
    from cart_hf.processes import is_main

    place = resolved_target(target)
    if is_main() and not resume and unfinished(place):
        warn(f"{what} to {place} was interrupted: --resume would continue it; this one starts afresh")
    try:
        yield
    except (KeyboardInterrupt, Exception) as failure:
        if not isinstance(failure, UserError) and is_main() and unfinished(place):
            err.print("interrupted; the same command with --resume continues")
            if isinstance(failure, KeyboardInterrupt):
                sys.exit(130)
        raise
