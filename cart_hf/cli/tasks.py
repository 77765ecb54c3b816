"""`cart-hf tasks`."""

from __future__ import annotations

from pathlib import Path


def tasks(*names: str, tasks_file: Path | None = None) -> None:
    """List the tasks and suites, or print declarations to start your own tasks file from.

    **Examples**

    ```text
    cart-hf tasks                      # what there is
    cart-hf tasks mnli eurosat         # how these are declared
    cart-hf tasks sst2 > mine.yaml     # the beginning of a tasks file
    ```

    Parameters
    ----------
    names:
        Tasks whose declaration to print, as a tasks file.
    tasks_file:
        Check a tasks file, and print its tasks.
    """
    from cart_hf.cli.console import out, print_table
    from cart_hf.tables import Table
    from cart_hf.tasks import find_tasks, suites
    from cart_hf.tasks import tasks as builtin

    if names or tasks_file is not None:
        import yaml

        bodies = {
            task.name: task.model_dump(mode="json", exclude={"name"}, exclude_unset=True)
            for task in find_tasks(names, tasks_file=tasks_file)
        }
        text = yaml.safe_dump(
            {"tasks": bodies}, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
        )
        print(text, end="")  # noqa: T201
        return
    rows = []
    for name, task in builtin().items():
        source = "--data" if task.dataset is None else task.dataset.path
        config = f" ({task.dataset.name})" if task.dataset is not None and task.dataset.name else ""
        rows.append([name, task.kind.removesuffix("-classification"), source + config, task.split, task.scored_by])
    print_table(Table(["task", "kind", "dataset", "split", "score"], rows, words=4))
    out.print()
    print_table(Table(["suite", "tasks"], [[name, " ".join(of)] for name, of in suites().items()], words=1))
