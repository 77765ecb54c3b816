"""What a task is: data, columns, labels, prompts and metrics, declared in YAML. Nothing here knows a model."""

from cart_hf.tasks.catalogue import evaluation_of, find_tasks, known_among, suites, tasks
from cart_hf.tasks.data import Keep, TaskData, load_split
from cart_hf.tasks.task import IMAGE, MEAN, REGRESSION, TEXT, DatasetSource, Task

__all__ = [
    "IMAGE",
    "MEAN",
    "REGRESSION",
    "TEXT",
    "DatasetSource",
    "Keep",
    "Task",
    "TaskData",
    "evaluation_of",
    "find_tasks",
    "known_among",
    "load_split",
    "suites",
    "tasks",
]
