"""What a `DataLoader`'s worker process does before its first example."""

from __future__ import annotations

import gc

from ett.signals import leave_signals_to_the_parent


def begin_worker(_worker: int) -> None:
    """Leave signals to the parent, and share the parent's memory for good.

    A worker begins as a fork and shares the parent's pages until one of the two writes to them. A full garbage collection
    writes to every object that it looks through, so the first one, after tens of thousands of examples, would copy the Python
    heap into each worker. Frozen objects are passed over (`gc.freeze`); what the worker makes itself is collected as ever.
    """
    leave_signals_to_the_parent()
    gc.freeze()
