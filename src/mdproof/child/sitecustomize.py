"""Runs when a Python starts that a page has started: what it enters and opens counts too."""

import contextlib
import importlib
import os
import sys

with contextlib.suppress(ImportError):
    from mdproof.reach import follow

    follow()

# The sitecustomize that this one hides, if there is one.
_here = os.path.dirname(os.path.abspath(__file__))
_path = list(sys.path)
sys.path[:] = [entry for entry in _path if os.path.abspath(entry) != _here]
_own = sys.modules.pop("sitecustomize", None)
with contextlib.suppress(ImportError):
    importlib.import_module("sitecustomize")
if _own is not None:
    sys.modules.setdefault("sitecustomize", _own)
