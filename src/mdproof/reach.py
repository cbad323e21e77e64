"""Which functions of the repository a page enters: each reports itself when its body begins.

The repository's modules are compiled with one more call at the head of every function, so that
only their own functions pay for being watched. Processes that a page forks, and Pythons that it
starts, report through a file. Only the standard library is imported here.
"""

import ast
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from mdproof.guard import CLOSED, NetworkGuard
from mdproof.skeleton import WHOLE, functions

MARK = "__mdproof_entered__"
"""The global name, in a watched module, of what its functions call."""

_open = open  # a page may put something else in its place
_LOG, _ROOT, _PACKAGES = "MDPROOF_REACH", "MDPROOF_ROOT", "MDPROOF_PACKAGES"
_HOOK = str(Path(__file__).parent / "child")


def watched(code: bytes | str, path: str) -> CodeType:
    """Compile a module so that its functions report themselves; lines and docstrings are kept."""
    tree = ast.parse(code, path)
    for name, function in functions(tree):
        body = function.body
        at = 1 if ast.get_docstring(function, clean=False) is not None else 0
        anchor = body[min(at, len(body) - 1)]
        call = ast.Call(ast.Name(MARK, ast.Load()), [ast.Constant(name)], [])
        body.insert(at, ast.copy_location(ast.Expr(call), anchor))
        ast.fix_missing_locations(body[at])
    return compile(tree, path, "exec", dont_inherit=True)


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, recorder: "Recorder") -> None:
        super().__init__(name, path)
        self._recorder = recorder

    def get_code(self, fullname: str) -> CodeType:
        return watched(self.get_data(self.path), self.path)  # bytecode caches hold the plain code

    def exec_module(self, module: ModuleType) -> None:
        self._recorder.watch(module)
        super().exec_module(module)


class Recorder:
    """Watches the repository's modules from now on; one to a process.

    Attributes:
        entered: The functions that were entered, as "module:function".
        modules: The modules that were imported and are watched.
        files: Data files that processes started by this one opened; who started it adds its own.
    """

    def __init__(
        self, root: Path, packages: Sequence[str], log: Path, *, child: bool = False
    ) -> None:
        self.root, self.packages, self._log = f"{root}{os.sep}", tuple(packages), log
        self.entered: set[str] = set()
        self.modules: set[str] = set()
        self.files: set[str] = set()
        self._child = child
        self._watched: list[ModuleType] = []
        self._read = 0
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        if not child:
            os.register_at_fork(after_in_child=self._forked)
            here = {_LOG: str(log), _ROOT: str(root), _PACKAGES: ",".join(packages)}
            path = [_HOOK, *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ.update(here, PYTHONPATH=os.pathsep.join(path))

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find a module of the repository, to be watched."""
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        origin = os.path.realpath(spec.origin) if spec is not None and spec.origin else ""
        if spec is not None and type(spec.loader) is SourceFileLoader and self._ours(origin):
            spec.loader = _Loader(fullname, spec.origin or "", self)
        return spec

    def _ours(self, path: str) -> bool:
        return path.startswith((self.root, os.path.realpath(self.root) + os.sep))

    def watch(self, module: ModuleType) -> None:
        """Let a module's functions report to this recorder."""
        self.modules.add(module.__name__)
        self._watched.append(module)
        self._bind(module)
        if self._child:
            self._tell("module", module.__name__)

    def _bind(self, module: ModuleType) -> None:
        prefix, entered = f"{module.__name__}:", self.entered

        def enter(name: str) -> None:
            entered.add(prefix + name)

        def enter_and_tell(name: str) -> None:
            if prefix + name not in entered:
                entered.add(prefix + name)
                self._tell("function", prefix + name)

        vars(module)[MARK] = enter_and_tell if self._child else enter

    def _forked(self) -> None:
        self._child = True
        for module in self._watched:
            self._bind(module)

    def opened(self, file: str) -> None:
        """Take note of a data file."""
        if self._child and file not in self.files:
            self._tell("file", file)
        self.files.add(file)

    def _tell(self, kind: str, text: str) -> None:
        with contextlib.suppress(OSError):
            handle = os.open(self._log, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(handle, f"{kind}\t{text}\n".encode())
            finally:
                os.close(handle)

    def collect(self) -> None:
        """Take in what other processes have reported since the last call."""
        with contextlib.suppress(OSError), _open(self._log, "rb") as stream:
            stream.seek(self._read)
            data = stream.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            kinds = {"function": self.entered, "module": self.modules, "file": self.files}
            for line in whole.decode(errors="replace").splitlines():
                kind, _, text = line.partition("\t")
                kinds.get(kind, set()).add(text)

    def unwatched(self) -> set[str]:
        """Return an entry for every module of the repository that was imported and not watched."""
        return {
            f"{name}:{WHOLE}"
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] in self.packages
            and name not in self.modules
            and getattr(module, "__file__", None)
        }


def data_file(path: Any, root: str) -> str:
    """Return a data file's name below the repository's root, "" for what is none.

    Args:
        path: What was opened.
        root: The repository's root, with a separator at its end.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        return ""
    full = os.path.abspath(os.fsdecode(path))
    if not full.startswith(root):
        full = os.path.realpath(full)
    if not full.startswith(root) or full.endswith((".py", ".pyc", ".md")):
        return ""
    below = full[len(root) :]
    if below.startswith((".", "src" + os.sep + "mdproof")) or not os.path.isfile(full):
        return ""
    return below.replace(os.sep, "/")


def audit_files(root: str, opened: Callable[[str], None]) -> None:
    """Call `opened` with every data file of the repository that this process opens from now on."""

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            name = data_file(args[0], root)
            if name:
                opened(name)

    sys.addaudithook(audit)


def follow() -> None:
    """Watch in a Python that a page has started; called when that Python starts."""
    if os.environ.get(CLOSED):
        NetworkGuard()
    log, root = os.environ.get(_LOG), os.environ.get(_ROOT)
    if log and root and os.path.exists(log):
        packages = os.environ.get(_PACKAGES, "").split(",")
        recorder = Recorder(Path(root), packages, Path(log), child=True)
        audit_files(recorder.root, recorder.opened)
