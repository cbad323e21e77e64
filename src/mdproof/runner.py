"""Run blocks in a process of their own, and learn what happened whatever happens to it."""

import contextlib
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdproof import figures
from mdproof.block import Block
from mdproof.errors import PageError
from mdproof.proof import base_page
from mdproof.site import Site
from mdproof.slicing import needed_before, read_statements
from mdproof.watch import end_descendants, excess

PAGE_TIMEOUT = 300.0
"""Seconds a whole page may take."""

MEMORY = 6144
"""MiB that a page may allocate beyond what its process starts with."""

_GRACE = 5.0
_WORKER_ENDED = "the block ended the process that runs its page"
_LOOK = 0.3
"""Seconds between two looks at the processes of a page that says nothing."""


@dataclass(frozen=True)
class Failure:
    """Why a block failed: one line of cause, and where.

    Attributes:
        line: Line of the page.
        message: One line.
        frames: Further places inside the repository, as "file:line: text".
    """

    line: int
    message: str
    frames: tuple[str, ...] = ()


@dataclass
class Ran:
    """What one block did."""

    block: int
    outputs: list[dict[str, Any]] = field(default_factory=list)
    failure: Failure | None = None
    seconds: float = 0.0
    modules: list[str] = field(default_factory=list)
    entered: list[str] = field(default_factory=list)
    state: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    launches: list[dict[str, Any]] = field(default_factory=list)

    def text(self) -> str:
        """Return what the block printed and the value it ended with."""
        return "".join(
            out["text"] if out["text"].endswith("\n") else out["text"] + "\n"
            for out in self.outputs
            if "text" in out
        )


_DEVICE = {
    "TRITON_INTERPRET": "0",
    "TRITON_DISABLE_LINE_INFO": "1",
    "TRITON_DEFAULT_FP_FUSION": "1",
}
"""Kernels are compiled, to the same binaries whatever their lines are called."""


def environment(hash_seed: int = 0, *, device: bool = False) -> dict[str, str]:
    """Return the environment that blocks run in: this one's tools, and nothing that varies.

    Only where a device is asked for is one seen; elsewhere a machine with a GPU gives what every
    other machine gives.
    """
    keep = ("PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR", "SYSTEMROOT")
    if device:
        keep += ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TRITON_CACHE_DIR")
    fixed = {
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": str(hash_seed),
        "PYTHONIOENCODING": "utf-8",
        "MPLBACKEND": "agg",
        "MATPLOTLIBRC": str(figures.STYLE),
        "COLUMNS": "100",
    }
    threads = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
    fixed |= {f"{name}_NUM_THREADS": "1" for name in threads}
    fixed |= _DEVICE if device else {"CUDA_VISIBLE_DEVICES": ""}
    return {name: os.environ[name] for name in keep if name in os.environ} | fixed


class Server:
    """A worker process that forks a child for each job; use as a context manager."""

    def __init__(
        self, libraries: Sequence[str] = (), *, hash_seed: int = 0, device: bool = False
    ) -> None:
        self._libraries = tuple(libraries)
        self._environment = environment(hash_seed, device=device)
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._job = 0
        self.told: Callable[[], None] | None = None  # called whenever a block is done
        self._folder = tempfile.TemporaryDirectory(prefix="mdproof-")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker."""
        self._end(_GRACE)
        self._folder.cleanup()

    def _end(self, grace: float = 0.0) -> None:
        """End the job that is running, and the worker; the next job starts another."""
        self._end_job()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mdproof.worker", *self._libraries],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
            )
            self._buffer = b""
        return self._process

    def _event(self, seconds: float) -> dict[str, Any] | None:
        """Return the next event, or None if none comes in time or the worker is gone."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if not select.select([self._process.stdout], [], [], min(left, _LOOK))[0]:
                if self._process.poll() is not None:
                    return {"event": "excess", "cause": _WORKER_ENDED}
                too_much = excess(self._process.pid, MEMORY) if self._job else ""
                if too_much:
                    return {"event": "excess", "cause": too_much}
                continue
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                return {"event": "lost"}
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.pop("token", None) == self._token:
                if event["event"] == "done" and self._process.poll() is not None:
                    return {"event": "excess", "cause": _WORKER_ENDED}
                return event
        return {"event": "excess", "cause": "the block writes into the channel of its results"}

    def _end_job(self) -> None:
        """End the process of the job that is running, and what it has started."""
        for end in (os.killpg, os.kill) if self._job else ():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end(self._job, signal.SIGKILL)
        self._job = 0

    def run(self, job: dict[str, Any]) -> list[Ran]:
        """Run a job; return what became of each block that was started.

        A block that hangs, exits, crashes or exhausts memory is a failure of that block; the blocks
        after it are not started.
        """
        try:
            return self._run(job)
        except BaseException:
            self._end()
            raise

    def _run(self, job: dict[str, Any]) -> list[Ran]:
        process = self._start()
        stderr = Path(self._folder.name, "stderr")
        memory = 0 if job.get("device") else MEMORY  # CUDA maps more addresses than there is memory
        limits = {"memory": memory, "seconds": PAGE_TIMEOUT + 2 * _GRACE}
        self._token = secrets.token_hex(16)
        job = {**job, **limits, "stderr": str(stderr), "token": self._token}
        if job.pop("record", False):
            log = Path(self._folder.name, "reach")
            log.write_bytes(b"")
            job["log"] = str(log)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died just now: the first event says so
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        blocks = {block["index"]: block for block in job["blocks"]}
        done: list[Ran] = []
        current: int | None = None
        page_end = time.monotonic() + PAGE_TIMEOUT + 60
        deadline = page_end
        cause = ""
        while True:
            event = self._event(max(0.0, min(deadline, page_end) - time.monotonic()))
            if event is None:
                whole = time.monotonic() >= page_end
                limit = PAGE_TIMEOUT if whole else blocks[current]["timeout"] if current else 0
                late = f"takes longer than {limit:g} s" + (" (the page)" if whole else "")
                cause = cause or late
                if not self._job:
                    process.kill()
                self._end_job()
                deadline = page_end = time.monotonic() + _GRACE
                continue
            if event["event"] == "excess":
                cause = cause or event["cause"]
                end_descendants(process.pid)
                self._end_job()
                if process.poll() is not None:
                    self._end()
                    break
                deadline = page_end = time.monotonic() + _GRACE
            elif event["event"] == "forked":
                self._job = event["pid"]
                page_end = time.monotonic() + PAGE_TIMEOUT
            elif event["event"] == "start":
                current = event["block"]
                deadline = time.monotonic() + blocks[current]["timeout"]
            elif event["event"] == "done":
                done.append(_ran(event, blocks[event["block"]]))
                if self.told is not None:
                    self.told()
                current, deadline = None, page_end
            elif event["event"] == "exit":
                self._job = 0
                break
            elif event["event"] == "lost":
                cause = cause or (_WORKER_ENDED if current is not None else "")
                self._end()
                break
        if current is None and not done and blocks:
            current = next(iter(blocks))
            cause = cause or "the worker process was lost before the block began"
        if current is not None:
            status = event.get("status", 0)
            cause = cause or _death(status, stderr)
            done.append(Ran(current, failure=Failure(blocks[current]["first"], cause)))
        return done


def _death(status: int, stderr: Path) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        why = "killed, perhaps for memory" if name == "SIGKILL" else "the interpreter crashed"
        return f"{why} ({name})"
    text = stderr.read_text(encoding="utf-8", errors="replace") if stderr.exists() else ""
    last = text.strip().splitlines()[-1:] or [""]
    return f"the block ended its process with status {status} {last[0]}".strip()


def _ran(event: dict[str, Any], block: dict[str, Any]) -> Ran:
    error, raises = event["error"], block.get("raises")
    failure: Failure | None = None
    outputs = event["outputs"]
    if error is not None and raises and raises in error["kinds"]:
        outputs = [*outputs, {"type": "error", "text": f"{error['type']}: {error['message']}"}]
    elif error is not None:
        message = " ".join(f"{error['type']}: {error['message']}".removeprefix(": ").split())
        frames = tuple(f"{name}:{line}: {text}" for name, line, text in error["frames"])
        failure = Failure(error["line"], message, frames)
    elif raises:
        failure = Failure(block["first"], f"does not raise {raises}")
    return Ran(
        block=event["block"],
        outputs=outputs,
        failure=failure,
        seconds=event["seconds"],
        modules=event["modules"],
        entered=event["entered"],
        state=event["state"],
        files=event["files"],
        names=event["names"],
        links=event["links"],
        launches=event["launches"],
    )


def page_job(site: Site, page: str, blocks: Sequence[Block]) -> dict[str, Any]:
    """Return the job that runs a page's blocks in order, excused ones left out."""
    run = [block for block in blocks if not block.options.norun]
    file = site.docs / page
    lines: list[str] = []
    first: dict[int, int] = {}
    for block in run:
        lines += [""] * (block.first - 1 - len(lines))
        first[block.index] = len(lines) + 1  # later than block.first if a snippet brought it
        lines += block.code.split("\n")
    return {
        "file": str(file),
        "name": module_name(site, page),
        "program": "\n".join(lines) + "\n",
        "root": str(site.root),
        "packages": list(site.packages),
        "record": True,
        "offline": True,
        "allowed": [warning for warning, _ in site.allowed_warnings],
        "blocks": [
            {
                "index": block.index,
                "first": first[block.index],
                "code": block.code,
                "kind": "doctest" if block.kind == "doctest" else "code",
                "reads": names_read(block),
                **_allowances(block),
                "raises": block.options.raises,
                "timeout": block.options.timeout,
                "shown": block.shown,
                "source": block.options.source,
            }
            for block in run
        ],
    }


def module_name(site: Site, page: str) -> str:
    """Return a name that no other module has, and that a page shares with its translations."""
    name = re.sub(r"[/.-]", "_", base_page(site, page).removesuffix(".md"))
    return name if "_" in name else f"page_{name}"


def _allowances(block: Block) -> dict[str, Any]:
    """Return what a block is allowed that others are not."""
    excused = [block.options.warns.partition(":")[0].strip()] if block.options.warns else []
    return {"network": bool(block.options.network), "warns": excused}


def names_read(block: Block) -> list[str]:
    """Return the names that a block looks up before it binds them."""
    if block.kind != "code":
        return []
    try:
        return sorted(needed_before(read_statements(block.code, block.index)))
    except (SyntaxError, RecursionError):
        return []


def copy_job(site: Site, text: str, split: int, block: Block, folder: Path) -> dict[str, Any]:
    """Return the job that runs a runnable copy as a file of its own, `python copied.py`.

    Args:
        site: The site.
        text: The program.
        split: Its first line that belongs to the block itself; output before it is not returned.
        block: The block it is a copy of.
        folder: Where the file is written.
    """
    file = folder / "copied.py"
    file.write_text(text, encoding="utf-8")
    return {
        "file": str(file),
        "name": "__main__",
        "program": text,
        "root": str(site.root),
        "packages": list(site.packages),
        "offline": True,
        "allowed": [warning for warning, _ in site.allowed_warnings],
        "blocks": [
            {
                "index": block.index,
                "first": 1,
                "code": text,
                "kind": "code",
                "reads": names_read(block),
                **_allowances(block),
                "raises": block.options.raises,
                "timeout": PAGE_TIMEOUT,
                "split": split,
            }
        ],
    }


def located(page_file: str, failure: Failure) -> PageError:
    """Return a failure as the error with file and line."""
    return PageError(page_file, failure.line, failure.message)
