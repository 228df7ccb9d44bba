import os
import platform
import subprocess
import sys

import pytest

from ett.allocator import keep_freed_memory

PROGRAM = """
import ctypes, resource, sys
import torch
# pages of one size, whatever the machine does with large blocks (PR_SET_THP_DISABLE)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
from ett.allocator import keep_freed_memory
told = sys.argv[1] == "keep" and keep_freed_memory()

def turn():
    kept = [torch.ones(2**21) for _ in range(8)]
    return [each * 2 for each in kept]

turn()
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    turn()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")


def page_faults(argument: str, **environment: str) -> tuple[bool, int]:
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"
    }
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], check=True, capture_output=True, text=True, env=own | environment
    ).stdout.split()
    return printed[0] == "True", int(printed[1])


@glibc
def test_freed_memory_is_used_again() -> None:
    told, kept = page_faults("keep")
    assert told
    # 8 turns of 16 blocks of 8 MiB are 262,144 pages of 4 KiB. Left alone, malloc asks for nearly all of them anew in most
    # runs, and in some for few, as blocks happen to fall: nothing to compare with
    assert 20 * kept < 262_144


@glibc
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=7")]
)
def test_settings_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda *_arguments: ("", ""))
    assert not keep_freed_memory()
