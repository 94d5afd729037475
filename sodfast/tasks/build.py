"""From a task's configuration to the task: the only place that knows all tasks."""

from sodfast.config import (
    ArithmeticConfig,
    CodeConfig,
    MathConfig,
    MultipleChoiceConfig,
    PythonConfig,
    TaskConfig,
    ToolUseConfig,
)
from sodfast.tasks.arithmetic import ArithmeticTask
from sodfast.tasks.base import Task
from sodfast.tasks.code import CodeTask
from sodfast.tasks.math import MathTask
from sodfast.tasks.multiple_choice import MultipleChoiceTask
from sodfast.tasks.python import python_task
from sodfast.tasks.tool_use import ToolUseTask


def build_task(config: TaskConfig) -> Task:
    """Load or generate the questions of `config`.

    Raises:
        UsageError: a file, row or hub id cannot be used; the message says what to change.
    """
    match config:
        case ArithmeticConfig():
            return ArithmeticTask(config)
        case MultipleChoiceConfig():
            return MultipleChoiceTask(config)
        case ToolUseConfig():
            return ToolUseTask(config)
        case MathConfig():
            return MathTask(config)
        case CodeConfig():
            return CodeTask(config)
        case PythonConfig():
            return python_task(config)
