"""The tasks by name, in the order they run. A new one is a file here and a line in this table."""

from ett.evaluate.base import Task
from ett.evaluate.tasks.answers import AnswersTask
from ett.evaluate.tasks.drift import DriftTask
from ett.evaluate.tasks.loss import LossTask
from ett.evaluate.tasks.naming import NamingTask
from ett.evaluate.tasks.reconstruction import ReconstructionTask

TASKS: dict[str, Task] = {
    task.name: task for task in (LossTask(), AnswersTask(), NamingTask(), ReconstructionTask(), DriftTask())
}
