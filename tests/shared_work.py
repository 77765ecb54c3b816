"""Work that several processes share, in a module of its own that they can import quickly."""

from __future__ import annotations

from cart_hf.errors import UserError
from cart_hf.processes import join


def squares(upto: int, fails: int | None = None, crashes: int | None = None) -> list[list[int]]:
    """Return every process's share of the squares below ``upto``.

    :param fails: rank of a process whose share is the user's mistake.
    :param crashes: rank of a process that has a bug.
    """
    processes = join("cpu")

    def share() -> list[int]:
        if processes.rank == fails:
            raise UserError(f"process {fails} found a mistake")
        if processes.rank == crashes:
            raise ZeroDivisionError("oops")
        return [number * number for number in range(processes.rank, upto, processes.count)]

    return processes.together(share)


def fail_crash_and_work(upto: int) -> None:
    """Let the second process fail, then crash, then work; raise what the others saw of it.

    :raises UserError: always, with what came of the three.
    """
    found = []
    for options in ({"fails": 1}, {"crashes": 1}, {}):
        try:
            found.append(str(squares(upto, **options)))
        except Exception as failure:
            found.append(f"{type(failure).__name__}: {failure}")
    raise UserError(found)
