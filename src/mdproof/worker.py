"""The process that runs blocks: `python -m mdproof.worker [library ...]`, jobs in, events out.

It imports the named libraries once and forks a child for each job, so that a page starts as from
an empty interpreter but does not wait for `import torch`. A job is a line of JSON on standard
input; the child answers with a line of JSON for each block it starts and ends, and the parent with
one when the child is gone, however it went. Only the standard library is imported here.
"""

import __future__

import ast
import contextlib
import doctest
import faulthandler
import importlib
import io
import json
import linecache
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdproof import figures
from mdproof.fingerprint import fingerprint
from mdproof.guard import CLOSED, Guard, leave_network, refusal
from mdproof.meanings import Meanings
from mdproof.names import read_program
from mdproof.reach import Recorder, audit_files
from mdproof.watch import adopt_orphans, die_with_parent, end_descendants

OUTPUT_LIMIT = 100_000
"""Characters that one block may print."""


_FADING = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class _FailedError(Exception):
    """A block did what it must not; the message says what."""


class _Output(io.StringIO):
    """What a block prints."""

    def write(self, text: str) -> int:
        """Take a text; a lone surrogate raises, as it does where Python prints."""
        text.encode()
        return super().write(text)


class Page:
    """One namespace, a real module, in which blocks run in order."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.file: str = job["file"]
        self.packages = tuple(job["packages"])
        self.recorder: Recorder | None = None
        if "log" in job:
            self.recorder = Recorder(Path(job["root"]), self.packages, Path(job["log"]))
            audit_files(self.recorder.root, self.recorder.opened)
        self.guard = Guard(job["root"], os.getcwd()) if job.get("offline") else None
        self._threads: dict[threading.Thread, int] = {}
        self._told: set[str] = set()
        self.state: dict[str, str] = {}
        self.launches: list[Any] | None = None
        self.origins: dict[str, tuple[Any, str]] = {}  # of the names that were imported
        self.meanings: Meanings | None = None
        self.pid = os.getpid()
        self.flags = 0  # of the `from __future__` imports so far
        self._stack = contextlib.ExitStack()
        module = types.ModuleType(job["name"])
        module.__file__ = self.file
        sys.modules[job["name"]] = module
        self.namespace = module.__dict__
        # Tracebacks, inspect.getsource and Triton read the page as if it were this program.
        lines = [f"{line}\n" for line in job["program"].removesuffix("\n").split("\n")]
        linecache.cache[self.file] = (len(job["program"]), None, lines, self.file)

    def run(self, block: dict[str, Any]) -> dict[str, Any]:
        """Run one block and return what it did."""
        out = _Output()
        started = time.perf_counter()
        past = _printed_past()
        outputs: list[dict[str, Any]] = []
        drawn: list[str] = []
        error: dict[str, Any] | None = None
        value_text = ""
        mark = 0
        self.meanings = self._meanings(block)
        told = _Output()
        if self.guard is not None:
            self.guard.allowed = bool(block.get("network"))
            self.guard.attempts.clear()
            os.environ[CLOSED] = "" if self.guard.allowed else "1"  # for Pythons that it starts
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(told),
        ):
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", ResourceWarning)  # as Python itself does
            try:
                value_text, mark = self._execute(block, out)
                if out.closed:
                    raise _FailedError("the block closes sys.stdout")
            except BaseException as raised:
                error = self._explain(raised, block)
            try:
                drawn = _draw()
            except Exception as raised:
                error = error or self._explain(raised, block)
        if os.getpid() != self.pid:  # the block forked, and this is the child
            os._exit(0 if error is None else 1)
        text = "" if out.closed else out.getvalue()[mark:]
        if error is None or _expected(error, block):
            printed = len(text) + len(value_text)
            error = self._complain(caught, printed, _printed_past()[len(past) :], block) or error
            error = self._overstepped(told, block) or error
        if text:
            outputs.append({"type": "stdout", "text": text})
        if value_text:
            outputs.append({"type": "value", "text": value_text})
        outputs += [{"type": "figure", "svg": svg} for svg in drawn]
        launches, self_launches = [], self.launches
        if self_launches:
            launches = [dict(launch) for launch in self_launches]
            self_launches.clear()
        return {
            "outputs": outputs,
            "error": error,
            "state": self.state,
            "seconds": time.perf_counter() - started,
            **self._reached(),
            "names": self._names(),
            "links": self._links(block),
            "launches": launches,
        }

    def _compile(self, tree: ast.Expression | ast.Module) -> types.CodeType:
        mode = "eval" if isinstance(tree, ast.Expression) else "exec"
        return compile(tree, self.file, mode, flags=self.flags, dont_inherit=True)

    def _execute(self, block: dict[str, Any], out: io.StringIO) -> tuple[str, int]:
        if "split" not in block:
            self._take_state(block)
        if block["kind"] == "doctest":
            self._doctest(block)
            return "", 0
        tree = ast.parse(block["code"], self.file)
        if "split" in block:
            self._compile(tree)  # a copy is one program: `from __future__` stands at its beginning
        ast.increment_lineno(tree, block["first"] - 1)
        mark, value = 0, None
        split = block.get("split", 0)
        for position, node in enumerate(tree.body):
            if split and node.lineno >= split and mark == 0:
                mark, split = out.tell(), 0
                figures.take()
                self._take_state(block)
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                features = [getattr(__future__, alias.name, None) for alias in node.names]
                self.flags |= sum(feature.compiler_flag for feature in features if feature)
            last = position == len(tree.body) - 1
            with self._reading(position):
                if last and isinstance(node, ast.Expr):
                    value = eval(self._compile(ast.Expression(node.value)), self.namespace)
                else:
                    exec(self._compile(ast.Module([node], [])), self.namespace)
            self._watch_triton()
        if value is None or _is_drawing(value):
            return "", mark
        text = repr(value)
        text.encode()
        return text, mark

    def _take_state(self, block: dict[str, Any]) -> None:
        """Learn what the names that a block reads stand for when it begins."""
        names = [name for name in block.get("reads", ()) if name in self.namespace]
        self.state = {name: fingerprint(self.namespace[name]) for name in names}

    def _watch_triton(self) -> None:
        if self.launches is None and self.job.get("device"):
            if "triton.runtime.jit" in sys.modules:
                from mdproof.triton import compiled

                self.launches = self._stack.enter_context(compiled.record())
        elif self.launches is None and "triton.runtime.interpreter" in sys.modules:
            with contextlib.suppress(ImportError):
                from mdproof.triton import launches

                self.launches = self._stack.enter_context(launches.record())

    def _doctest(self, block: dict[str, Any]) -> None:
        test = doctest.DocTestParser().get_doctest(
            block["code"], self.namespace, "block", self.file, block["first"] - 1
        )
        test.globs = self.namespace
        if not test.examples:
            raise _FailedError("this pycon fence has no >>> example that is run")
        if any(example.options.get(doctest.SKIP) for example in test.examples):
            raise _FailedError("doctest: +SKIP leaves an example out unseen; norun says why")
        report = io.StringIO()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF
        runner = _Examples(self, optionflags=flags, verbose=False)
        with contextlib.redirect_stdout(io.StringIO()):
            failed = runner.run(test, out=report.write, clear_globs=False).failed
        runner.finish()
        if failed:
            raise _FailedError("doctest: " + " ".join(report.getvalue().split("\n", 4)[-1].split()))

    def _explain(self, raised: BaseException, block: dict[str, Any]) -> dict[str, Any]:
        kinds = [base.__name__ for base in type(raised).__mro__]
        wanted = block.get("raises") in kinds
        if isinstance(raised, _FailedError):
            kinds = []
        if isinstance(raised, SystemExit) and not wanted:
            message = f"the block leaves the interpreter: SystemExit({raised.code!r})"
            raised = _FailedError(message).with_traceback(raised.__traceback__)
        if isinstance(raised, MemoryError) and not wanted:
            message = "the block needs more memory than the limit allows"
            raised = _FailedError(message).with_traceback(raised.__traceback__)
        frames = [
            (frame.filename, frame.lineno or 0, (frame.line or "").strip())
            for frame in traceback.extract_tb(raised.__traceback__)
        ]
        line = next((no for name, no, _ in reversed(frames) if name == self.file), 0)
        if isinstance(raised, SyntaxError) and raised.filename == self.file:
            # Parsed alone, so its line counts from the block's first.
            line = (raised.lineno or 1) + (block["first"] - 1 if not frames or not line else 0)
        root = self.job["root"] + os.sep
        kind = type(raised).__name__ if not isinstance(raised, _FailedError) else ""
        return {
            "type": kind,
            "kinds": kinds,
            "message": _message(raised),
            "line": line or block["first"],
            "frames": [
                [name.removeprefix(root), number, text]
                for name, number, text in frames
                if name.startswith(root) and f"{os.sep}mdproof{os.sep}" not in name
                if f"{os.sep}site-packages{os.sep}" not in name
            ],
        }

    def _complain(
        self,
        caught: list[warnings.WarningMessage],
        printed: int,
        past: bytes,
        block: dict[str, Any],
    ) -> dict[str, Any] | None:
        """Turn a warning that our own code caused, and output that is lost, into a failure."""
        if past:
            start = past[:80].decode(errors="replace").strip()
            message = f"a child process or C code prints past sys.stdout: {start!r}"
            return self._explain(_FailedError(message), block)
        if printed > OUTPUT_LIMIT:
            return self._explain(_FailedError(f"prints {printed} characters"), block)
        root = self.job["root"] + os.sep
        for warning in caught:
            ours = warning.filename == self.file or (
                warning.filename.startswith(root)
                and f"{os.sep}site-packages{os.sep}" not in warning.filename
            )
            # What is to go away breaks the page one day, whoever's code it is in.
            fading = issubclass(warning.category, _FADING)
            text = " ".join(f"{warning.category.__name__}: {warning.message}".split())
            excused = warning.category.__name__ in block.get("warns", ())
            if not ours and text.startswith(tuple(self.job.get("allowed", ()))):
                continue
            if (ours or fading) and not excused:
                explained = self._explain(_FailedError(f"warns: {text}"), block)
                if warning.filename == self.file:
                    explained["line"] = warning.lineno
                return explained
        return None

    def _overstepped(self, told: io.StringIO, block: dict[str, Any]) -> dict[str, Any] | None:
        """Turn what a block must not do, and did without an error, into a failure."""
        message = ""
        if self.guard is not None and self.guard.written:
            message = f"writes into the repository: {self.guard.written[0]}"
        if self.guard is not None and self.guard.attempts and not block.get("network"):
            message = refusal(self.guard.attempts[0])
        text = "" if told.closed else told.getvalue().strip()
        if text and "stderr" not in block.get("warns", ()):
            message = f"writes to sys.stderr: {text.splitlines()[0][:80]!r}"
        alive = [t for t in threading.enumerate() if not t.daemon]
        for thread in alive:
            self._threads.setdefault(thread, block["index"])
        if block is self.job["blocks"][-1]:
            left = [t for t in alive if t is not threading.main_thread()]
            if left:
                begun = f"block {self._threads[left[0]]}"
                message = f"leaves a thread running: {left[0].name}, begun in {begun}"
        return self._explain(_FailedError(message), block) if message else None

    def _reached(self) -> dict[str, list[str]]:
        """Return what of the repository the page has used so far, and what it entered newly."""
        recorder = self.recorder
        if recorder is None:
            return {"modules": [], "entered": [], "files": []}
        recorder.collect()
        unwatched = recorder.unwatched()
        modules = recorder.modules | {entry.partition(":")[0] for entry in unwatched}
        new = (recorder.entered | unwatched) - self._told
        self._told |= new
        return {
            "modules": sorted(modules),
            "entered": sorted(new),
            "files": sorted(recorder.files),
        }

    def _meanings(self, block: dict[str, Any]) -> Meanings | None:
        if "split" in block:  # of a copy nobody shows the names
            return None
        program = read_program(block["code"], kind=block["kind"])
        return Meanings(program, self.namespace, self.packages, self.origins)

    @contextlib.contextmanager
    def _reading(self, statement: int) -> Iterator[None]:
        """Learn what a statement's names mean while it runs."""
        meanings = self.meanings
        if meanings is None or statement >= len(meanings.program.statements):
            yield
            return
        meanings.before(statement)
        try:
            yield
        finally:
            meanings.after(statement)

    def _names(self) -> dict[str, str]:
        """Return the repository's objects that the block uses, by the name it has for them."""
        found: dict[str, str] = {}
        if self.meanings is not None:
            for number, dotted in self.meanings.result().items():
                text = self.meanings.program.references[number].text
                same = found.setdefault(text, dotted) == dotted
                if not same:
                    found[dotted] = dotted
        return dict(sorted(found.items()))

    def _links(self, block: dict[str, Any]) -> dict[str, str]:
        """Return what the names in the shown code mean, by the number of the reference."""
        meanings = self.meanings
        if meanings is not None and block.get("shown"):
            owner = block["source"]
            while owner and owner not in sys.modules:
                owner = owner.rpartition(".")[0]
            if not owner:
                return {}
            program = read_program(block["shown"], kind="source")
            names = vars(sys.modules[owner])
            constants = {
                name: (value, f"{owner}.{name}")
                for name, value in names.items()
                if not callable(value) and not isinstance(value, types.ModuleType)
            }
            meanings = Meanings(program, names, self.packages, constants)
            for statement in range(len(program.statements)):
                meanings.before(statement)
                meanings.after(statement)
        found = meanings.result() if meanings is not None else {}
        return {str(number): dotted for number, dotted in found.items()}


class _Examples(doctest.DocTestRunner):
    """Runs the examples of a doctest and learns what their names mean."""

    def __init__(self, page: Page, **options: Any) -> None:
        super().__init__(**options)
        self.page = page
        self.count = 0
        self.reading: Any = None

    def report_start(self, out: Any, test: Any, example: Any) -> None:
        self.finish()
        self.reading = self.page._reading(self.count)
        self.reading.__enter__()
        self.count += 1

    def finish(self) -> None:
        """End the example that is running."""
        if self.reading is not None:
            self.reading.__exit__(None, None, None)
        self.reading = None


def _is_drawing(value: Any) -> bool:
    """Tell whether a final expression's value is only a handle of something drawn."""
    values = value if isinstance(value, list | tuple) and value else [value]
    return all(type(item).__module__.startswith("matplotlib.") for item in values)


def _draw() -> list[str]:
    """Return the open figures; what matplotlib warns of then (a character it lacks) shows there."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        drawn = figures.take()
    told = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if told:
        raise _FailedError(f"drawing the figure warns: {told[0]}")
    return drawn


def _message(raised: BaseException) -> str:
    try:
        text = str(raised)
    except Exception as error:
        text = f"(its message raises {type(error).__name__})"
    return text.encode(errors="backslashreplace").decode()


def _printed_past() -> bytes:
    """Return what stands in the file that is this process's real standard output."""
    with contextlib.suppress(OSError, ValueError):  # closed, or put to another use
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
        return os.pread(1, OUTPUT_LIMIT, 0)
    return b""


def _limit_memory(mebibytes: int) -> None:
    with contextlib.suppress(OSError, ValueError, FileNotFoundError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _child(job: dict[str, Any], channel: int, stderr: int) -> None:
    os.setsid()
    die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(int(job["seconds"]))  # should whoever watches the time be gone
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(stderr, 2)
    with tempfile.TemporaryFile(prefix="mdproof-") as past:
        os.dup2(past.fileno(), 1)
    faulthandler.enable()
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        os.fdopen(1, "wb", buffering=0, closefd=False), encoding="utf-8", write_through=True
    )
    terminal = sys.stdout

    def print_past() -> None:
        if isinstance(sys.stdout, _Output):  # a forked process prints where nobody collects
            sys.stdout = terminal

    os.register_at_fork(after_in_child=print_past)

    token = job.pop("token", "")  # a block that writes into the channel does not know it
    dumps, write = json.dumps, os.write  # a block may put others in their place

    def say(**event: Any) -> None:
        event["token"] = token
        data = (dumps(event, ensure_ascii=False) + "\n").encode(errors="replace")
        while data:
            data = data[write(channel, data) :]

    with tempfile.TemporaryDirectory(prefix="mdproof-") as folder:
        os.chdir(folder)
        if job.get("offline") and not any(block.get("network") for block in job["blocks"]):
            leave_network()
        if job["memory"]:
            _limit_memory(job["memory"])
        sys.argv = [job["file"]]
        page = Page(job)
        for block in job["blocks"]:
            say(event="start", block=block["index"])
            result = page.run(block)
            say(event="done", block=block["index"], **result)
            if result["error"] is not None and not _expected(result["error"], block):
                break
        os.chdir("/")
    say(event="end")


def _expected(error: dict[str, Any], block: dict[str, Any]) -> bool:
    return bool(block.get("raises")) and block["raises"] in error["kinds"]


def _wait(pid: int) -> int:
    """Return the status that a page ends with; end it, and this process, if the engine is gone."""
    engine = os.getppid()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if os.getppid() != engine:
            end_descendants(os.getpid(), reap=True)
            os._exit(1)
        signal.sigtimedwait({signal.SIGCHLD}, 1.0)


def _announce(channel: int, job: dict[str, Any], **event: Any) -> None:
    event["token"] = job.get("token", "")
    os.write(channel, json.dumps(event).encode() + b"\n")


def serve(libraries: list[str]) -> None:
    """Read jobs until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever gives the jobs ends them
    adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # `_wait` waits for it
    channel = os.dup(1)
    os.dup2(2, 1)
    for name in libraries:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        stderr = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(job, channel, stderr)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(stderr)
        _announce(channel, job, event="forked", pid=pid)
        status = _wait(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what the page left running
        end_descendants(os.getpid(), reap=True)  # and what has left its group
        code = os.waitstatus_to_exitcode(status)
        _announce(channel, job, event="exit", status=code)


if __name__ == "__main__":
    serve(sys.argv[1:])
