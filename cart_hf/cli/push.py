"""`cart-hf push`, and what `--push-to-hub` does after a merge or a compression."""

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
    family: bool = True,
    licence: Annotated[str | None, Parameter(name=["--licence", "--license"])] = None,
    name_private_sources: Annotated[bool, Parameter(negative=())] = False,
    message: str | None = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    format: Literal["human", "json"] = "human",
) -> None:
    """Push a merged or compressed folder to the Hub, with model cards.

    One commit; the backbone that the tasks share is sent once. What the repository already has is not sent again: a
    push that was interrupted goes on when it is repeated. A `results.json` in the folder goes into the card.

    Of a compressed folder, each adapter also gets a repository of its own, REPO-TASK, which the Hub shows among the
    adapters of REPO.

    **Examples**

    ```text
    cart-hf push merged me/roberta-glue --dry-run
    cart-hf evaluate merged --suite glue --output merged/results.json
    cart-hf push merged me/roberta-glue --private
    cart-hf push compressed me/roberta-glue-lora --no-family
    ```

    Parameters
    ----------
    folder:
        A folder that `cart-hf merge` or `cart-hf compress` wrote.
    repo:
        `ORG/NAME`, or a name in your own namespace.
    private:
        Make new repositories private or public; default: the Hub's default for you or the organisation.
    family:
        Give each adapter of a compressed folder a repository of its own.
    licence:
        The cards' licence, by the Hub's name (mit, apache-2.0 ...); default: the one all sources share, or `other`.
    name_private_sources:
        Name private sources in a public repository.
    message:
        The commit's message.
    overwrite:
        Write into repositories that cart-hf did not write, and replace cards that people have edited.
    dry_run:
        List what would be sent, and send nothing.
    format:
        What stdout gets: a summary for people, or JSON.
    """
    import cart_hf

    with interruptible(folder, repo, *([] if family else ["--no-family"])):
        pushed = cart_hf.push(
            folder,
            repo,
            private=private,
            family=family,
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
    """Print what was pushed, the pages and how to load it; notes go to stderr.

    :param silent: print the notes only.
    """
    from cart_hf.cli.console import out, warn

    everything = [pushed, *pushed.members]
    for note in dict.fromkeys(note for one in everything for note in one.notes):
        warn(note)
    if silent:
        return
    for one in everything:
        _show_repository(one)
    if pushed.commit is not None:
        for line in pushed.loading:
            out.print(f"    {line}")


def _show_repository(pushed: Pushed) -> None:
    """Print what one repository got, or would get."""
    from cart_hf.cli.console import out, size

    if pushed.commit is None:
        for path, nbytes in sorted(pushed.files.items()):
            out.print(f"{size(nbytes):>10}  {path}")
        for path in pushed.deleted:
            out.print(f"{'delete':>10}  {path}")
        out.print(
            f"{len(pushed.files)} files, {size(pushed.nbytes)} to send to {pushed.url}; dry run: nothing was sent"
        )
    elif pushed.files or pushed.deleted:
        out.print(f"pushed {len(pushed.files)} files ({size(pushed.nbytes)}) to {pushed.url}")
    else:
        out.print(f"{pushed.url} has all of it already")


def push_merged(folder: Path, repo: str, *, private: bool | None) -> Pushed:
    """Push what was made just now; if that fails, the folder stays and the message says how to go on.

    :raises UserError: when the Hub refuses.
    """
    import cart_hf

    try:
        with interruptible(folder, repo):
            return cart_hf.push(folder, repo, private=private)
    except UserError as failure:
        *first, last = failure.problems
        again = _command(folder, repo, *(["--private"] if private else []))
        raise UserError([*first, f"{last} ({folder} is complete: `{again}` sends it)"]) from failure


@contextmanager
def interruptible(folder: Path, repo: str, *flags: str) -> Iterator[None]:
    """Say on Ctrl-C how the push goes on.

    :param flags: what else it was told.
    """
    from cart_hf.cli.console import err

    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted; `{_command(folder, repo, *flags)}` sends what is missing")
        sys.exit(130)


def _command(folder: Path, repo: str, *flags: str) -> str:
    return shlex.join(["cart-hf", "push", str(folder), repo, *flags])
