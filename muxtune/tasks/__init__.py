"""Tasks of tenants: what they ask for, their data, and its tokens."""

from muxtune.tasks.dataset import TaskData, load_task_data, with_digest
from muxtune.tasks.examples import Example
from muxtune.tasks.tokenizer import load_tokenizer
from muxtune.tasks.workload import DatasetSpec, PeftTask, Workload, load_workload, workload_from

__all__ = [
    "DatasetSpec",
    "Example",
    "PeftTask",
    "TaskData",
    "Workload",
    "load_task_data",
    "load_tokenizer",
    "load_workload",
    "with_digest",
    "workload_from",
]
