"""The tasks by name, in the order they run. A new one is a file here and a line in this table."""

from ett.evaluate.base import Task
from ett.evaluate.tasks.answers import AnswersTask
from ett.evaluate.tasks.captions import CaptionsTask
from ett.evaluate.tasks.choices import ChoicesTask
from ett.evaluate.tasks.drift import DriftTask
from ett.evaluate.tasks.letters import LettersTask
from ett.evaluate.tasks.loss import LossTask
from ett.evaluate.tasks.naming import NamingTask
from ett.evaluate.tasks.reading import ReadingTask
from ett.evaluate.tasks.reconstruction import ReconstructionTask
from ett.evaluate.tasks.text import TextTask
from ett.evaluate.tasks.vqa import VqaTask
from ett.evaluate.tasks.yes_no import YesNoTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        LossTask(),
        AnswersTask(),
        VqaTask(),
        YesNoTask(),
        ReadingTask(),
        CaptionsTask(),
        ChoicesTask(),
        LettersTask(),
        NamingTask(),
        TextTask(),
        ReconstructionTask(),
        DriftTask(),
    )
}
