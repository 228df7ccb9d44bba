"""The toy model and examples of the evaluation's tests."""

from tests.evaluate.conftest import examples, toy

__all__ = ["examples", "toy"]
