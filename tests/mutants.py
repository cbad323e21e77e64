"""Seeded bugs: a module with one line changed, imported under another name."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def mutant(module: ModuleType, change: tuple[str, str], folder: Path) -> Iterator[ModuleType]:
    """Import a module whose source has one text replaced by another.

    Raises:
        AssertionError: If the text is not in the source: the mutant no longer applies.
    """
    source = Path(module.__file__).read_text(encoding="utf-8")
    old, new = change
    assert old in source, f"{old!r} is not in {module.__name__}"
    name = f"{module.__name__.rpartition('.')[2]}_mutant"
    file = folder / f"{name}.py"
    file.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    changed = importlib.util.module_from_spec(spec)
    sys.modules[name] = changed
    try:
        spec.loader.exec_module(changed)
        yield changed
    finally:
        sys.modules.pop(name, None)
