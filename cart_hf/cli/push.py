"""`cart-hf push`, and what `cart-hf merge --push-to-hub` does after the merge."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from cart_hf.errors import UserError

if TYPE_CHECKING:
    from cart_hf.publishing import Pushed


def push(
    folder: Path,
    repo: str,
    /,
    *,
    private: Annotated[bool | None, Parameter(negative="--public")] = None,
    licence: Annotated[str | None, Parameter(name=["--licence", "--license"])] = None,
    name_private_sources: Annotated[bool, Parameter(negative=())] = False,
    message: str | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    format: Literal["human", "json"] = "human",
) -> None:
    """Push a merged folder to the Hub, with a model card.

    One commit; the backbone that the tasks share is sent once. What the repository already has is not sent again: a
    push that was interrupted goes on when it is repeated. A `results.json` in the folder goes into the card.

    **Examples**

    ```text
    cart-hf push merged me/roberta-glue --dry-run
    cart-hf evaluate merged --suite glue --output merged/results.json
    cart-hf push merged me/roberta-glue --private
    ```

    Parameters
    ----------
    folder:
        A folder that `cart-hf merge` wrote.
    repo:
        `ORG/NAME`, or a name in your own namespace.
    private:
        Make a new repository private or public; default: the Hub's default for you or the organisation.
    licence:
        The card's licence, by the Hub's name (mit, apache-2.0 ...); default: the one all sources share, or `other`.
    name_private_sources:
        Name private sources in a public repository.
    message:
        The commit's message.
    overwrite:
        Write into a repository that cart-hf did not write, and replace a card that people have edited.
    dry_run:
        List what would be sent, and send nothing.
    format:
        What stdout gets: a summary for people, or JSON.
    """
    import cart_hf

    with interruptible(folder, repo):
        pushed = cart_hf.push(
            folder,
            repo,
            private=private,
            overwrite=overwrite,
            dry_run=dry_run,
            licence=licence,
            name_private_sources=name_private_sources,
            commit_message=message,
        )
    if format == "json":
        print(json.dumps(asdict(pushed), indent=2))  # noqa: T201
    show(pushed, silent=format == "json")


def show(pushed: Pushed, *, silent: bool = False) -> None:
    """Print what was pushed, its page and how to load it; notes go to stderr.

    :param silent: print the notes only.
    """
    from cart_hf.cli.console import out, size, warn

    for note in pushed.notes:
        warn(note)
    if silent:
        return
    if pushed.commit is None:
        for path, nbytes in pushed.files.items():
            out.print(f"{size(nbytes):>10}  {path}")
        for path in pushed.deleted:
            out.print(f"{'delete':>10}  {path}")
        out.print(
            f"{len(pushed.files)} files, {size(pushed.nbytes)} to send to {pushed.url}; dry run: nothing was sent"
        )
        return
    if pushed.files or pushed.deleted:
        out.print(f"pushed {len(pushed.files)} files ({size(pushed.nbytes)}) to {pushed.url}")
    else:
        out.print(f"{pushed.url} has all of it already")
    for line in pushed.loading:
        out.print(f"    {line}")


def push_merged(folder: Path, repo: str, *, private: bool | None) -> Pushed:
    """Push what was merged just now; if that fails, the folder stays and the message says how to go on.

    :raises UserError: when the Hub refuses.
    """
    import cart_hf

    try:
        with interruptible(folder, repo):
            return cart_hf.push(folder, repo, private=private)
    except UserError as failure:
        *first, last = failure.problems
        again = _command(folder, repo) + (" --private" if private else "")
        raise UserError([*first, f"{last} (the merge is complete: `{again}` sends it)"]) from failure


@contextmanager
def interruptible(folder: Path, repo: str) -> Iterator[None]:
    """Say on Ctrl-C how the push goes on."""
    from cart_hf.cli.console import err

    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted; `{_command(folder, repo)}` sends what is missing")
        sys.exit(130)


def _command(folder: Path, repo: str) -> str:
    return shlex.join(["cart-hf", "push", str(folder), repo])
