"""`mdproof prove`: a line for each page, several pages at a time, reports for other programs."""

import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.mdproof.conftest import Sample
from tests.mdproof.test_pytest_plugin import run

from mdproof import cli
from mdproof.proof import load_proof
from mdproof.proving import Progress, prove
from mdproof.reports import BlockResult, PageResult, annotations, write_junit

PAGE = "text\n\n```python\na = 1\n```\n\n```python\nprint(a + 1)\n```\n"
BAD = PAGE.replace("a + 1", "a / 0")
EXCUSED = '```python norun="needs a cluster"\nb\n```\n'
WRONG = 'text\n\n```python nonsense="1"\na\n```\n'


def fill(sample: Sample) -> None:
    sample.write("no code\n", "index.md")
    sample.write(PAGE + "\n" + EXCUSED, "a.md")
    sample.write(BAD, "b.md")
    sample.write(PAGE, "c.md")
    sample.write(WRONG, "d.md")


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_each_page_has_a_line_and_a_failure_its_place(
    sample: Sample, capsys: pytest.CaptureFixture[str], jobs: str
) -> None:
    fill(sample)
    assert cli.main(["prove", "--jobs", jobs]) == 1
    lines = capsys.readouterr().out.splitlines()
    pages = [line for line in lines if line.startswith("[")]
    assert sorted(line[5:].strip().split(": ")[0] for line in pages) == [
        "docs/a.md",
        "docs/b.md",
        "docs/c.md",
        "docs/d.md",
    ]
    assert [line[:5] for line in pages] == [f"[{n}/4]" for n in (1, 2, 3, 4)]
    (a,) = (line for line in pages if "a.md" in line)
    assert "3 blocks, " in a
    assert a.endswith(" s, proven")
    assert "docs/b.md:8: ZeroDivisionError: division by zero" in lines
    assert "  at docs/b.md:8: print(a / 0)" in lines
    assert any(line.startswith('docs/d.md:3: unknown fence option "nonsense"') for line in lines)
    assert lines[-1].startswith("2 proven, 0 fresh, 2 failed in ")
    assert load_proof(sample.site, "a.md") is not None
    assert load_proof(sample.site, "b.md") is None


def test_several_at_a_time_record_what_one_after_another_records(sample: Sample) -> None:
    def records(name: str) -> list[dict]:
        proof = load_proof(sample.site, name)
        assert proof is not None
        return [{**record, "seconds": 0} for record in proof.blocks]

    for number in range(4):
        sample.write(PAGE.replace("a + 1", f"a + {number}"), f"p{number}.md")
    assert prove(sample.site, jobs=3, stream=io.StringIO()) == 0
    together = [records(f"p{number}.md") for number in range(4)]
    assert prove(sample.site, everything=True, stream=io.StringIO()) == 0
    assert [records(f"p{number}.md") for number in range(4)] == together


def test_the_workers_of_the_pool_end_with_it_and_leave_no_files(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(sample)
    scratch = sample.root / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    command = [sys.executable, "-m", "mdproof", "prove", "--jobs", "2"]
    done = subprocess.run(command, cwd=sample.root, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].startswith("2 proven, 0 fresh, 2 failed in "), done.stderr
    left = [
        path
        for path in Path("/proc").glob("[0-9]*/environ")
        if _reads(path).find(str(sample.root / "src").encode()) >= 0
        and b"mdproof" in _reads(path.parent / "cmdline")
    ]
    assert left == []
    assert list(scratch.iterdir()) == []


def _reads(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_reports_hold_every_block_with_its_line(sample: Sample) -> None:
    fill(sample)
    assert cli.main(["prove", "--junit", "out/junit.xml", "--json", "out/report.json"]) == 1
    pages = json.loads((sample.root / "out/report.json").read_text(encoding="utf-8"))["pages"]
    assert [(page["file"], page["state"]) for page in pages] == [
        ("docs/a.md", "proven"),
        ("docs/b.md", "failed"),
        ("docs/c.md", "proven"),
        ("docs/d.md", "error"),
    ]
    states = [(block["line"], block["state"]) for block in pages[0]["blocks"]]
    assert states == [(3, "passed"), (7, "passed"), (11, "excused")]
    assert pages[1]["blocks"][1]["message"] == "ZeroDivisionError: division by zero"
    root = ElementTree.parse(sample.root / "out/junit.xml").getroot()
    counts = {
        suite.get("name"): [suite.get(key) for key in ("tests", "failures", "errors", "skipped")]
        for suite in root
    }
    assert counts == {
        "docs/a.md": ["3", "0", "0", "1"],
        "docs/b.md": ["2", "1", "0", "0"],
        "docs/c.md": ["2", "0", "0", "0"],
        "docs/d.md": ["1", "0", "1", "0"],
    }
    (failure,) = root.iter("failure")
    assert failure.text == (
        "docs/b.md:8: ZeroDivisionError: division by zero\n  at docs/b.md:8: print(a / 0)"
    )
    case = root.find(".//testcase[failure]")
    assert case is not None
    assert (case.get("file"), case.get("line"), case.get("name")) == ("docs/b.md", "8", "block-2")
    (skipped,) = root.iter("skipped")
    assert skipped.get("message") == "norun: needs a cluster"


def test_fresh_pages_are_skipped_in_the_report(sample: Sample) -> None:
    sample.prove(PAGE)
    assert cli.main(["prove", "--junit", "junit.xml"]) == 0
    root = ElementTree.parse(sample.root / "junit.xml").getroot()
    assert [skipped.get("message") for skipped in root.iter("skipped")] == [
        "its proof is fresh",
        "its proof is fresh",
    ]


def test_what_xml_cannot_hold_is_replaced(tmp_path: Path) -> None:
    block = BlockResult(1, 3, "failed", message="a \x1b[31m <b> & \x00 \ud800 \ufffe 致")
    write_junit(tmp_path / "j.xml", [PageResult("a.md", "docs/a.md", "failed", blocks=(block,))])
    (failure,) = ElementTree.parse(tmp_path / "j.xml").getroot().iter("failure")
    assert failure.get("message") == "a \ufffd[31m <b> & \ufffd \ufffd \ufffd 致"


def test_annotations_are_escaped() -> None:
    block = BlockResult(1, 3, "failed", message="100%\r\nof it")
    result = PageResult("a,b.md", "docs/a,b.md", "failed", blocks=(block,))
    assert annotations([result]) == ["::error file=docs/a%2Cb.md,line=3::100%25%0D%0Aof it"]


def test_annotations_are_printed_when_asked_for(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.write(BAD)
    assert cli.main(["prove", "--annotate"]) == 1
    wanted = "::error file=docs/page.md,line=8::ZeroDivisionError: division by zero"
    assert wanted in capsys.readouterr().out.splitlines()


def test_a_number_of_jobs_below_one_is_refused(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    for jobs in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["prove", f"--jobs={jobs}"])
        assert caught.value.code == 2
        assert f"'{jobs}' is not a number of pages, from 1" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_runs_now(sample: Sample) -> None:
    sample.write(PAGE)
    stream = _Terminal()
    assert prove(sample.site, stream=stream) == 0
    drawn = [part.rpartition(",")[0] for part in stream.getvalue().split("\r\x1b[K")[1:-1]]
    assert drawn == [
        "[1/1] docs/page.md: 0/2 blocks",
        "[1/1] docs/page.md: 1/2 blocks",
        "[1/1] docs/page.md: 2/2 blocks",
        "[1/1] docs/page.md: 2/2 blocks, 1 copies",
        "[1/1] docs/page.md: 2/2 blocks, 2 copies",
    ]


def test_a_file_gets_no_control_characters() -> None:
    stream = io.StringIO()
    progress = Progress(10, stream)
    progress.start("docs/a.md", 2)
    progress.block()
    progress.finish(PageResult("a.md", "docs/a.md", "fresh"))
    assert stream.getvalue() == "[ 1/10] docs/a.md: fresh\n"


def test_pytests_own_junit_report_names_page_and_line(sample: Sample) -> None:
    sample.write(BAD)
    run(sample, "docs", "--update", "--junitxml=j.xml", "-o", "junit_family=xunit1")
    cases = list(ElementTree.parse(sample.root / "j.xml").getroot().iter("testcase"))
    found = {case.get("name"): case for case in cases}
    assert found.keys() == {"block-1", "block-2", "copy-1", "copy-2"}
    case = found["block-2"]
    assert case.get("classname") == "docs.page.md"
    assert case.get("file") == "docs/page.md"
    assert case.get("line") == "6"  # pytest counts from 0
    failure = case.find("failure")
    assert failure is not None
    assert (failure.text or "").startswith("docs/page.md:8: ZeroDivisionError: division by zero")


FIGURE = """```python alt="A line"
import matplotlib.pyplot as plt

figure, axes = plt.subplots()
line = axes.plot([0, 1], [0, 1])
figure
```
"""


def test_what_is_recorded_anew_is_told(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    sample.write(PAGE)
    assert cli.main(["prove"]) == 0
    assert "shows something else" not in capsys.readouterr().out
    sample.write(PAGE.replace("a + 1", "'\\n'.join(map(str, range(30, 50)))"))
    assert cli.main(["prove"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("docs/page.md:7: shows something else now")
    assert lines[at + 1 : at + 4] == ["  @@ -1 +1,20 @@", "  -2", "  +30"]
    assert lines[at + 13] == "  … 10 more lines"
    assert lines[at + 14].startswith("1 proven, ")
    sample.write(FIGURE)
    assert cli.main(["prove"]) == 0
    sample.write(FIGURE.replace("[0, 1])", "[1, 0])"))
    capsys.readouterr()
    assert cli.main(["prove"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("docs/page.md:1: shows something else now")
    assert lines[at + 1].startswith("  figure ")
    assert lines[at + 1].endswith(" is drawn anew")
