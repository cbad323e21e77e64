"""The one error a page can cause: a sentence with file and line."""

import sys


class PageError(Exception):
    """Something on a page is wrong; `str()` is one line, `file:line: what`."""

    def __init__(self, file: str, line: int, message: str) -> None:
        super().__init__(f"{file}:{line}: {message}")
        self.file, self.line, self.message = file, line, message


def _keep(self: PageError, error: PageError) -> None:
    Exception.__init__(self, str(error))
    self.file, self.line = error.file, error.line
    self.message = str(error)  # click, under MkDocs, prints this one


def _whole(self: PageError) -> str:
    return self.message


def build_error(error: PageError) -> Exception:
    """Return the same error in the form that stops the running builder with one line.

    MkDocs prints a traceback for every exception but its own `BuildError`, and superfences swallows
    every exception of a validator but its own; so the error we raise there is all three.
    """
    bases: list[type] = [PageError]
    fences = sys.modules.get("pymdownx.superfences")
    if fences is not None:
        bases.append(fences.SuperFencesException)
    mkdocs = sys.modules.get("mkdocs.exceptions")
    if mkdocs is not None:
        bases.append(mkdocs.BuildError)
    if len(bases) == 1:
        return error
    kind = type("PageError", tuple(bases), {"__init__": _keep, "__str__": _whole})
    return kind(error)
