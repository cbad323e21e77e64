"""A proof holds as long as what decides it is unchanged, and cannot be made by hand."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.mdproof.conftest import Sample

from mdproof.proof import SCHEMA, ForgedError, Proof, load_proof, save_proof
from mdproof.prove import check_block

PAGE = """\
text

```python source="sample.shapes.area"
```

```python
print(f"{area(2):.4f}")
```

```python
a = 1
print(a)
```
"""
FRESH = ["", "", ""]
CHANGED = "changed since it was proven"


@pytest.fixture
def proven(sample: Sample) -> Sample:
    assert sample.prove(PAGE).failures == {}
    assert sample.open().stale == FRESH
    return sample


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_prose_comments_and_layout_leave_a_proof_fresh(proven: Sample) -> None:
    page = PAGE.replace("text", "other text\n\nmore").replace("a = 1", "# why\na   =   1")
    proven.write(page)
    assert proven.open().stale == FRESH


def test_a_docstring_of_an_imported_module_leaves_a_proof_fresh(proven: Sample) -> None:
    edit(proven.root / "src/sample/shapes.py", "Multiply.", "Multiply by the factor.")
    assert proven.open().stale == FRESH


def test_a_changed_block_makes_itself_and_what_follows_stale(proven: Sample) -> None:
    proven.write(PAGE.replace("area(2)", "area(3)"))
    assert proven.open().stale == ["", CHANGED, CHANGED]


def test_a_changed_module_makes_the_blocks_that_imported_it_stale(proven: Sample) -> None:
    edit(proven.root / "src/sample/shapes.py", "x * FACTOR", "x + FACTOR")
    assert proven.open().stale == [CHANGED] * 3


def test_a_module_nobody_imports_changes_nothing(proven: Sample) -> None:
    (proven.root / "src/sample/other.py").write_text("b = 1\n", encoding="utf-8")
    assert proven.open().stale == FRESH


def test_a_new_version_in_the_lock_makes_the_pages_that_use_it_stale(sample: Sample) -> None:
    lock = sample.root / "requirements.lock"
    lock.write_text("PyYAML==6.0.1\nclick==8.0\n", encoding="utf-8")
    assert sample.prove("```python\nimport yaml\n```\n").failures == {}
    assert sample.open().stale == [""]
    lock.write_text("PyYAML==6.0.1\nclick==9.0\n", encoding="utf-8")
    assert sample.open().stale == [""]
    lock.write_text("PyYAML==6.0.2\nclick==9.0\n", encoding="utf-8")
    assert sample.open().stale == [CHANGED]


def test_an_added_and_a_removed_block_are_noticed(proven: Sample) -> None:
    proven.write(PAGE + "\n```python\nb = 2\n```\n")
    assert proven.open().stale == [*FRESH, "not proven yet"]
    proven.write(PAGE[: PAGE.index("```python\na = 1")])
    assert proven.open().stale == ["", "blocks were removed since the page was proven"]


def test_an_excused_block_is_no_longer_fresh_once_it_is_to_be_run(sample: Sample) -> None:
    page = '```python norun="no"\na = 1\n```\n'
    assert sample.prove(page).failures == {}
    sample.write(page.replace(' norun="no"', ""))
    assert sample.open().stale == [CHANGED]


def test_proving_again_changes_not_a_byte(proven: Sample) -> None:
    file = proven.root / "docs/proofs/page.json"
    before = file.read_bytes()
    assert not proven.prove(PAGE).written
    assert file.read_bytes() == before
    file.unlink()
    assert proven.prove(PAGE).written
    timing = re.compile(rb'"seconds": [\d.]+|"seal": "\w+"')  # the seal is over the seconds, too
    assert timing.sub(b"", file.read_bytes()) == timing.sub(b"", before)


def test_a_translation_shares_the_proof(proven: Sample) -> None:
    proven.write(PAGE.replace("text", "English text"), "page.en.md")
    assert proven.open("page.en.md").stale == FRESH


def test_a_proof_edited_by_hand_is_refused(proven: Sample) -> None:
    edit(proven.root / "docs/proofs/page.json", "12.5664", "12.5665")
    with pytest.raises(ForgedError, match=r"^docs/proofs/page\.json: .* edited by hand$"):
        load_proof(proven.site, "page.md")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", f'{{"schema": {SCHEMA}}}', f'{{"schema": {SCHEMA}, "seal": ""}}']
)
def test_a_damaged_proof_is_refused(proven: Sample, text: str) -> None:
    (proven.root / "docs/proofs/page.json").write_text(text, encoding="utf-8")
    with pytest.raises(ForgedError, match=r"^docs/proofs/page\.json: "):
        load_proof(proven.site, "page.md")


FORGERIES = {
    "output": (lambda r: r["outputs"][0].update(text="12.6000\n"), "the output changed"),
    "no output": (lambda r: r.update(outputs=[]), "the output changed"),
    "names": (lambda r: r.update(names={}), "names are not what the run showed"),
    "modules": (lambda r: r.update(modules=[]), CHANGED),
    "libraries": (lambda r: r.update(libraries={"torch": "9.9"}), CHANGED),
    "device": (
        lambda r: r["verified"].append({"how": "device", "date": "2026-01-01"}),
        "the record of a device lacks device, triton, torch, key, launches",
    ),
    "excuse": (lambda r: r.update(status="excused"), "the record claims"),
    "key": (lambda r: r.update(key="0" * 32), CHANGED),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_proof_with_a_right_seal_is_found_by_running(proven: Sample, case: str) -> None:
    forge, message = FORGERIES[case]
    proof = load_proof(proven.site, "page.md")
    assert proof is not None
    forge(proof.blocks[1])
    save_proof(proven.site, Proof("page.md", proof.blocks))  # seals it
    run = proven.open()
    failure = check_block(run, run.blocks[1])
    assert failure is not None
    assert message in failure.message


def test_a_forged_figure_is_found(sample: Sample) -> None:
    code = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([0, 1], [0, 1])"
    assert sample.prove(f'```python alt="a line"\n{code}\n```\n').failures == {}
    figure = next((sample.root / "docs/proofs/page").glob("*.light.svg"))
    figure.write_text(figure.read_text().replace("#3b82f6", "#e5484d"))
    run = sample.open()
    failure = check_block(run, run.blocks[0])
    assert failure is not None
    assert failure.message == f"figure {figure.name} is not the recorded one"


def test_a_kill_at_any_moment_leaves_the_proof_whole(sample: Sample) -> None:
    sample.write("```python\nprint('x' * 90_000)\n```\n")
    program = (
        "from mdproof.proof import Proof, save_proof; from mdproof.site import load_site\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    save_proof(load_site(), Proof('page.md', [{'n': n, 'text': 'x' * 200_000}]))\n"
    )
    file = sample.root / "docs/proofs/page.json"
    for delay in (0.0, 0.013, 0.031, 0.057):
        child = subprocess.Popen([sys.executable, "-c", program])
        while not file.exists():
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        proof = load_proof(sample.site, "page.md")
        assert proof is not None
        assert len(proof.blocks[0]["text"]) == 200_000
        file.unlink()


def test_a_failing_page_leaves_the_old_proof_and_figures_alone(proven: Sample) -> None:
    file = proven.root / "docs/proofs/page.json"
    before = file.read_bytes()
    assert proven.prove(PAGE.replace("print(a)", "print(boom)")).failures
    assert file.read_bytes() == before


def test_records_hold_what_the_page_shows_and_nothing_of_the_machine(proven: Sample) -> None:
    text = (proven.root / "docs/proofs/page.json").read_text(encoding="utf-8")
    assert str(proven.root) not in text
    record = json.loads(text)["blocks"][1]
    assert record["modules"] == ["sample", "sample.shapes"]
    assert record["verified"] == [{"how": "cpu", "date": record["date"]}]
