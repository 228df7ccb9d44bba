"""What a recipe will take, before it is run: `ett plan` (docs/plan.md).

A stage's own loop goes through two steps on tensors without values (`rehearsal`), and every byte and operation is counted
(`tracker`). Nothing is loaded but configurations, a few examples and text tokenizers.
"""

from ett.experiments.plan.estimate import StagePlan, Target, plan
from ett.experiments.plan.hardware import HARDWARE, Hardware, find_hardware, parse_memory
from ett.experiments.plan.show import as_text, as_values
from ett.experiments.plan.skeleton import recipes_of

__all__ = [
    "HARDWARE",
    "Hardware",
    "StagePlan",
    "Target",
    "as_text",
    "as_values",
    "find_hardware",
    "parse_memory",
    "plan",
    "recipes_of",
]
