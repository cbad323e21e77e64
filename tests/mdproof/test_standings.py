"""A remembered standing is the one that would be worked out now, whatever changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.mdproof.conftest import Sample

from mdproof import standings
from mdproof.standing import read_standing
from mdproof.standings import read_standings

PAGE = """\
```python source="sample.shapes.area"
```

```python
from pathlib import Path

print(f"{area(2):.4f}", Path("DATA").read_text())
```

```python alt="a line"
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
_ = ax.plot([0, 1], [0, 1])
```
"""


@pytest.fixture
def proven(sample: Sample) -> Sample:
    """A site: a proven page that reads a module and a file, one unproven, one of words."""
    data = sample.root / "data.txt"
    data.write_text("seven\n", encoding="utf-8")
    assert sample.prove(PAGE.replace("DATA", str(data))).failures == {}
    sample.write("```python\nprint(1)\n```\n", "other.md")
    sample.write("# Words\n", "words.md")
    return sample


def fresh(sample: Sample) -> list:
    site = sample.site
    found = (read_standing(site, page) for page in site.pages())
    return [standing for standing in found if standing is not None]


def later(path: Path) -> None:
    """Move a file's time of change, as an edit of the same second does at least by nanoseconds."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))


def edit(name: str, old: str, new: str) -> Callable[[Sample], None]:
    def change(sample: Sample) -> None:
        path = sample.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
        later(path)

    return change


CHANGES: dict[str, Callable[[Sample], None]] = {
    "nothing": lambda sample: None,
    "the page": edit("docs/page.md", ":.4f", ":.3f"),
    "its words": edit("docs/page.md", "```python\nfrom", "Words.\n\n```python\nfrom"),
    "the module": edit("src/sample/shapes.py", "math.pi", "math.e"),
    "the data": edit("data.txt", "seven", "eight"),
    "a figure": edit("docs/proofs/page/3-1.light.svg", "<svg", "<svg "),
    "the proof": edit("docs/proofs/page.json", '"date"', '"date" '),
    "a forged proof": edit("docs/proofs/page.json", "12.5664", "99.0000"),
    "the settings": edit("pyproject.toml", "[tool.mdproof]", "[tool.mdproof]\nlenient = true"),
    "no proof": lambda sample: (sample.root / "docs/proofs/page.json").unlink(),
    "no figure": lambda sample: (sample.root / "docs/proofs/page/3-1.dark.svg").unlink(),
    "no module": lambda sample: (sample.root / "src/sample/shapes.py").unlink(),
    "no page": lambda sample: (sample.root / "docs/other.md").unlink(),
    "a new page": lambda sample: sample.write("```python\n2\n```\n", "new.md") and None,
    "a page gets blocks": lambda sample: sample.write("```python\n2\n```\n", "words.md") and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_remembered_is_what_is_true(proven: Sample, change: str) -> None:
    first = read_standings(proven.site)
    assert first == fresh(proven)
    assert [standing.state for standing in first] == ["stale", "fresh"]
    CHANGES[change](proven)
    now = read_standings(proven.site)
    assert now == fresh(proven)
    assert read_standings(proven.site) == now
    states = {standing.page: standing.state for standing in now}
    proven_still = change in {"nothing", "its words", "the settings", "no page", "a new page"}
    if proven_still or change == "a page gets blocks":
        assert states["page.md"] == "fresh"
    elif change != "the proof":  # blanks do not count
        assert states["page.md"] != "fresh"


def test_only_what_changed_is_read_again(proven: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    read_standings(proven.site)
    read: list[str] = []

    def counting(site, page, md=None):
        read.append(page)
        return read_standing(site, page, md)

    monkeypatch.setattr(standings, "read_standing", counting)
    read_standings(proven.site)
    assert "page.md" not in read
    assert "words.md" not in read
    read.clear()
    edit("src/sample/shapes.py", "math.pi", "math.e")(proven)
    read_standings(proven.site)
    assert "page.md" in read


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"setting": 1, "pages": 2}', '{"pages": {"page.md": {}}}']
)
def test_a_broken_memory_is_no_memory(proven: Sample, text: str) -> None:
    wanted = read_standings(proven.site)
    file = proven.root / ".cache/mdproof/standings.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(text.replace('"setting": 1', json.dumps(kept["setting"])), encoding="utf-8")
    assert read_standings(proven.site) == wanted
    file.write_text(json.dumps(kept | {"pages": {"page.md": {"files": {}}}}), encoding="utf-8")
    assert read_standings(proven.site) == wanted


def test_a_page_that_includes_others_is_always_read(proven: Sample) -> None:
    proven.write('--8<-- "part.md"\n', "words.md")
    read_standings(proven.site)
    kept = json.loads((proven.root / ".cache/mdproof/standings.json").read_text(encoding="utf-8"))
    assert list(kept["pages"]) == ["page.md"]
