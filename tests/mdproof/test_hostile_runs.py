"""Pages that try to hurt: each is a file, and says in its first line what must become of it."""

import re
from pathlib import Path

import pytest
from tests.mdproof.conftest import Sample

from mdproof import runner

PAGES = sorted((Path(__file__).parent / "hostile").glob("run-*.md"))
EXPECT = re.compile(r"<!-- expect: (?:passes|block (\d+): (.*)) -->\n")


def test_there_are_many() -> None:
    assert len(PAGES) >= 50


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_what_a_hostile_page_does_is_told_and_harms_no_other(
    sample: Sample, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MEMORY", 1024)  # several of these may run at one time
    text = file.read_text(encoding="utf-8")
    found = EXPECT.match(text)
    assert found is not None, "the first line says what is expected"
    failures = sample.prove(text).failures
    if found[1] is None:
        assert failures == {}
    else:
        assert list(failures) == [int(found[1])]
        failure = failures[int(found[1])]
        assert found[2] in failure.message
        assert failure.line >= 5
    assert sample.prove("```python\nprint('fine')\n```\n", "other.md").failures == {}
