"""What ends a run from outside, said in a sentence: a full disk, a lost process, a loader that was killed."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed import DistError

from ett.errors import UserError

GO_ON = "Continue with --resume: from the last checkpoint, or from the beginning of the stage where it has none yet."

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# how gloo and NCCL name a peer that is gone; neither has a type of its own for it on every road
_LOST = re.compile(
    r"closed by peer|connection reset|broken pipe|timed? ?out|connection refused|remote process exited", re.I
)
_WAITED = re.compile(r"timed? ?out", re.I)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class RunFailure(UserError):
    """The run ended for a reason that lies outside of it."""


@contextmanager
def explained(out: Path, world_size: int) -> Iterator[None]:
    """Failures from outside become a `RunFailure` that says what to do.

    Args:
        out: the run's folder. world_size: number of its processes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise RunFailure(_disk(out, error.strerror or str(error))) from error
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None or int(number[1]) not in _DISK:
            raise
        raise RunFailure(_disk(out, str(error))) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RunFailure(
                f"A process that reads pictures ended by itself ({str(error).splitlines()[0][:200]}): memory ran out, it was "
                f"killed, or a file crashed its decoder. {GO_ON} With num_workers=0 the picture at fault is read in the open."
            ) from error
        if world_size > 1 and (isinstance(error, DistError) or _LOST.search(str(error))):
            reason = str(error).splitlines()[0][:200]
            slow = " Or it was only slow: the recipe's rank_timeout says how long it is waited for."
            raise RunFailure(
                f"Another process of this run ended or is out of reach ({reason}). Its own message says why; without one it "
                f"was killed, or its machine is lost.{slow if _WAITED.search(str(error)) else ''} {GO_ON}"
            ) from error
        raise


def _disk(out: Path, reason: str) -> str:
    return f"{out} cannot be written: {reason}. Make room there. {GO_ON}"
