"""A pytest plugin for a test: writes down which functions of the repository each test runs."""

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = f"{ROOT / 'src' / 'zhizhi'}{os.sep}"
RAN: dict[str, set[str]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, None]:
    """Note every call into the sources, from set-up to tear-down."""
    place = f"{item.path.relative_to(ROOT).as_posix()}::{getattr(item, 'originalname', item.name)}"
    ran = RAN.setdefault(place, set())

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            ran.add(f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}")

    sys.setprofile(note)
    yield
    sys.setprofile(None)


def pytest_sessionfinish() -> None:
    """Write the file that the environment names."""
    text = json.dumps({place: sorted(ran) for place, ran in RAN.items()})
    Path(os.environ["MDPROOF_RECORD"]).write_text(text, encoding="utf-8")
