"""What is asked and how it is scored."""

from sodfast.tasks.base import Question, Task
from sodfast.tasks.build import build_task

__all__ = ["Question", "Task", "build_task"]
