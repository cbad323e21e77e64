"""What the site shows: rendered = collected = run + excused, and nothing stale as verified."""

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from tests.mdproof.conftest import Sample

from mdproof.collect import collect
from mdproof.copy import payloads
from mdproof.proof import load_proof

PAGE = """\
# Page

```python title="first"
a = 1
print(a < 2)
```

!!! note

    ```python alt="a line"
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.plot([0, a], [0, 1])
    ```

=== "tab"

    ```py raises="ZeroDivisionError"
    1 / 0
    ```

- item

    ```python norun="needs a cluster"
    a = 2
    ```

```python source="sample.shapes.area"
```

```pycon
>>> a
1
```

```bash
echo "<b>"
```
"""


class Blocks(HTMLParser):
    """Reads the blocks, copy texts and listings of a built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.states: list[str] = []
        self.copies: list[str] = []
        self.bare: list[str] = []
        self.highlights = 0
        self.images: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        classes = (given.get("class") or "").split()
        if "mdproof" in classes:
            self.states.append(given["data-mdproof-state"] or "")
        if "mdproof-copy--bare" in classes:
            self.bare.append(given["data-mdproof-copy"] or "")
        elif "mdproof-copy" in classes:
            self.copies.append(given["data-mdproof-copy"] or "")
        if "highlight" in classes:
            self.highlights += 1
        if tag == "img":
            self.images.append(given["src"] or "")


def build(sample: Sample, builder: str, **environment: str) -> tuple[int, str, str]:
    commands = {
        "mkdocs": [sys.executable, "-m", "mkdocs", "build", "--strict"],
        "zensical": [sys.executable, "-m", "zensical", "build", "--clean"],
    }
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"} | environment
    done = subprocess.run(
        commands[builder], cwd=sample.root, env=env, capture_output=True, text=True, check=False
    )
    page = sample.root / "site/page/index.html"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    return done.returncode, done.stdout + done.stderr, text


@pytest.mark.parametrize("builder", ["mkdocs", "zensical"])
def test_rendered_is_collected_is_run_plus_excused(sample: Sample, builder: str) -> None:
    sample.write("# Home\n", "index.md")
    assert sample.prove(PAGE).failures == {}
    code, output, text = build(sample, builder, MDPROOF_STRICT="1")
    assert code == 0, output
    built = Blocks(text)
    blocks = collect(sample.site, "page.md").blocks
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    excused = [record for record in proof.blocks if record["status"] == "excused"]
    run = [record for record in proof.blocks if record["status"] == "passed"]
    assert len(built.states) == len(blocks) == len(run) + len(excused) == 6
    assert built.states.count("verified") == len(run)
    assert built.highlights == len(blocks) + 1  # and one listing in bash
    # What the button copies is the text that was run, to the letter.
    assert built.copies == payloads("page.md", sample.site)
    assert built.bare == [block.shown or block.code for block in blocks]
    assert all((sample.root / "site/page" / src).resolve().is_file() for src in built.images)
    assert len(built.images) == 2
    assert "<code>True</code>" in text
    assert "ZeroDivisionError: division by zero" in html.unescape(text)
    assert "needs a cluster" in text


def test_a_source_fence_folds_the_docstring_and_shows_the_code(sample: Sample) -> None:
    sample.write("# Home\n", "index.md")
    assert sample.prove(PAGE).failures == {}
    _, _, text = build(sample, "mkdocs")
    details = text[text.index('<details class="mdproof-doc">') :]
    assert "More words." in details[: details.index("</details>")]
    shown = re.sub(r"<[^>]+>", "", text[: text.index('<details class="mdproof-doc">')])
    assert "Return the area of a disc. …" in html.unescape(shown)
    assert "More words." not in shown


@pytest.mark.parametrize("builder", ["mkdocs", "zensical"])
def test_an_edited_block_makes_the_strict_build_fail_with_file_and_line(
    sample: Sample, builder: str
) -> None:
    sample.write("# Home\n", "index.md")
    assert sample.prove(PAGE).failures == {}
    sample.write(PAGE.replace("a = 1\n", "a = 1.5\n"))
    code, output, _ = build(sample, builder, MDPROOF_STRICT="1" if builder == "zensical" else "0")
    assert code != 0
    assert "docs/page.md:3: stale proof (block 1 changed since it was proven)" in output


def test_a_preview_shows_a_stale_block_grey_and_never_as_verified(sample: Sample) -> None:
    sample.write("# Home\n", "index.md")
    assert sample.prove(PAGE).failures == {}
    sample.write(PAGE.replace("a = 1\n", "a = 1.5\n"))
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q"],
        cwd=sample.root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
        capture_output=True,
    )
    built = Blocks((sample.root / "site/page/index.html").read_text(encoding="utf-8"))
    assert built.states == ["stale", "stale", "stale", "excused", "stale", "stale"]
    assert built.copies == []


def test_a_forged_proof_makes_the_build_fail_in_one_line(sample: Sample) -> None:
    sample.write("# Home\n", "index.md")
    assert sample.prove(PAGE).failures == {}
    file = sample.root / "docs/proofs/page.json"
    file.write_text(file.read_text().replace("True", "Rue!"), encoding="utf-8")
    code, output, _ = build(sample, "mkdocs")
    assert code != 0
    assert "docs/proofs/page.json: the proof does not match its seal" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("text", ['```python x="1"\na\n```\n', '```python source="a.b"\n```\n'])
def test_bad_input_stops_the_build_with_one_line(sample: Sample, text: str) -> None:
    sample.write("# Home\n", "index.md")
    sample.write("# Page\n\n" + text)
    code, output, _ = build(sample, "mkdocs")
    assert code != 0
    assert "docs/page.md:3: " in output
    assert "Traceback" not in output


def test_names_of_the_repository_link_to_their_reference_page(sample: Sample) -> None:
    sample.write("# Home\n", "index.md")
    sample.write("# Shapes\n\n## area {#sample.shapes.area}\n", "reference/shapes.md")
    page = "# Page\n\n```python\nfrom sample.shapes import area\nprint(area(0))\n```\n"
    assert sample.prove(page).failures == {}
    code, output, text = build(sample, "mkdocs")
    assert code == 0, output
    link = '<a class="mdproof-ref" href="../reference/shapes/#sample.shapes.area"'
    assert text.count(link) == 2


def test_a_page_that_is_not_utf_8_stops_the_build_with_one_line(sample: Sample) -> None:
    sample.write("# Home\n", "index.md")
    (sample.root / "docs/zebra.md").write_bytes(b"# Zebra\n\n\xff\n")
    code, output, _ = build(sample, "mkdocs")
    assert code != 0
    assert "docs/zebra.md:3: the file is not UTF-8" in output
    assert "Traceback" not in output
    assert not (sample.root / "site").exists()


def test_an_article_without_a_field_stops_the_build_with_one_line(sample: Sample) -> None:
    sample.write("# Home\n", "index.md")
    sample.write("---\ntitle: A\n---\n\n# A\n", "articles/a.md")
    code, output, _ = build(sample, "mkdocs")
    assert code != 0
    assert re.search(r"docs/articles/a\.md:\d+: .*`date`", output)
    assert "Traceback" not in output
