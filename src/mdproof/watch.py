"""The processes of a page: how many there are, how much memory they hold, and their end."""

import contextlib
import ctypes
import os
import resource
import signal
import time
from pathlib import Path

PROCESSES = 200
"""Processes that a page may have at one time."""

_SUBREAPER, _PARENT_DEATH = 36, 1


def adopt_orphans() -> None:
    """Become the parent of whatever the processes started from here leave behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def _stat(pid: int) -> list[str]:
    """Return the fields of a process behind its name: state, parent, group, session, ..."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def descendants(root: int) -> dict[int, int]:
    """Return the processes that come from one, and the bytes of memory that each holds."""
    parents: dict[int, int] = {}
    resident: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = _stat(int(name))
                if fields[0] != "Z":
                    parents[int(name)] = int(fields[1])
                    resident[int(name)] = int(fields[21]) * resource.getpagesize()
    found: dict[int, int] = {}
    grown = {root}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown and pid not in found}
        found |= {pid: resident[pid] for pid in grown}
    return found


def _held(processes: dict[int, int]) -> int:
    """Return the bytes that processes hold together, pages that several share counted once."""
    total = 0
    for pid, resident in processes.items():
        share = resident
        with contextlib.suppress(OSError, StopIteration):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
            line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
            share = int(line.split()[1]) << 10
        total += share
    return total


def excess(worker: int, memory: int) -> str:
    """Return what a page has too much of, "" if it keeps within its limits.

    Args:
        worker: The page's worker, to which whatever the page disowns comes back.
        memory: MiB that the page's processes may hold together.
    """
    with contextlib.suppress(OSError):
        found = descendants(worker)
        if len(found) > PROCESSES:
            return f"starts more than {PROCESSES} processes"
        # What a process shares with the one that forked it counts once; asked only when it matters.
        if sum(found.values()) > memory << 20 and _held(found) > memory << 20:
            return f"its processes need more memory than the limit of {memory} MiB"
    return ""


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that forked it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL, 0, 0, 0)


def end_descendants(root: int, *, patience: float = 5.0, reap: bool = False) -> None:
    """Kill everything that comes from a process, and not the process itself, until none is left.

    Args:
        root: The process.
        patience: Seconds after which it is given up.
        reap: Whether to take the exit codes of this process's own children, whoever they are.
    """
    end, empty = time.monotonic() + patience, 0
    while empty < 2 and time.monotonic() <= end:
        found: dict[int, int] = {}
        with contextlib.suppress(OSError):
            found = descendants(root)
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while reap and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        # One whose parent died while we looked belongs to nobody just then: look twice.
        empty = 0 if found else empty + 1
        if found:
            time.sleep(0.001)
