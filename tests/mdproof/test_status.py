"""`mdproof status` says of every page what holds, how it was verified and what is excused."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from tests.mdproof.conftest import Sample

from mdproof import cli
from mdproof.block import EXCUSES, Options, excuses
from mdproof.proof import load_proof, save_proof
from mdproof.standing import read_standing
from mdproof.status import age, shorten
from mdproof.tables import table, width

PAGE = "```python\na = 1\n```\n\n```python\nprint(a + 1)\n```\n"
EXCUSED = (
    '\n```python norun="needs a cluster"\nb\n```\n\n```python varies="a clock"\nprint(a)\n```\n'
)


def status(
    sample: Sample, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, list[str]]:
    code = cli.main(["status", *options])
    return code, capsys.readouterr().out.splitlines()


def redate(sample: Sample, days: int) -> None:
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    for record in proof.blocks:
        record["date"] = (datetime.now(UTC) - timedelta(days=days)).date().isoformat()
        record["seconds"] = 1.25
    save_proof(sample.site, proof)


def test_a_fresh_page_says_how_when_and_how_long(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.prove(PAGE + EXCUSED)
    redate(sample, 3)
    code, lines = status(sample, capsys)
    assert code == 0
    assert lines == [
        "page     blocks  state  verified  days  seconds  excuses",
        "page.md       4  fresh  cpu          3      3.8        2",
        "4 blocks, 2 excused; 0 pages need `mdproof prove`",
    ]


def test_stale_failed_and_forged_pages_and_orphans_fail(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    sample.prove(PAGE, "gone.md")
    sample.prove(PAGE, "forged.md")
    sample.prove(PAGE)
    (sample.root / "docs/gone.md").unlink()
    file = sample.root / "docs/proofs/forged.json"
    file.write_text(file.read_text().replace('"2\\n"', '"3\\n"'), encoding="utf-8")
    sample.write(PAGE.replace("a + 1", "a + 2"))
    sample.write('```python nonsense="1"\na\n```\n', "wrong.md")
    code, lines = status(sample, capsys)
    assert code == 1
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["forged.md", "2", "forged"],
        ["page.md", "2", "1", "stale"],
        ["wrong.md", "0", "failed"],
    ]
    assert lines[4:] == [
        "docs/proofs/forged.json: the proof does not match its seal: it was edited by hand",
        lines[5],
        "docs/proofs/gone.json: no page has these blocks: delete it",
        "4 blocks, 0 excused; 3 pages need `mdproof prove`",
    ]
    assert lines[5].startswith('docs/wrong.md:1: unknown fence option "nonsense"; known are ')


def test_a_page_whose_copy_is_another_is_stale(sample: Sample) -> None:
    sample.prove(PAGE)
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    proof.blocks[1]["copy"] |= {"sha256": "0" * 32, "code": "0" * 32}
    save_proof(sample.site, proof)
    standing = read_standing(sample.site, "page.md")
    assert standing is not None
    assert standing.stale == {2: "its runnable copy changed"}
    assert cli.main(["prove"]) == 0
    standing = read_standing(sample.site, "page.md")
    assert standing is not None
    assert standing.state == "fresh"


def test_json_is_for_programs(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    sample.prove(PAGE + EXCUSED)
    redate(sample, 2)
    sample.write(PAGE, "new.md")
    code, lines = status(sample, capsys, "--json")
    told = json.loads("\n".join(lines))
    assert code == 1
    assert told["summary"] == {
        "fresh": 1,
        "stale": 1,
        "failed": 0,
        "forged": 0,
        "blocks": 6,
        "excuses": 2,
    }
    new, page = told["pages"]
    assert new["stale"] == [{"block": n, "reason": "not proven yet"} for n in (1, 2)]
    assert new["age_days"] is None
    assert (page["page"], page["state"], page["age_days"]) == ("page.md", "fresh", 2)
    assert page["excuses"] == [
        {"block": 3, "line": 9, "kind": "norun", "reason": "needs a cluster"},
        {"block": 4, "line": 13, "kind": "varies", "reason": "a clock"},
    ]
    assert told["orphans"] == []


def test_a_site_without_pages_is_proven(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = status(sample, capsys)
    assert (code, lines) == (0, ["0 blocks, 0 excused; 0 pages need `mdproof prove`"])


def test_titles_line_up_although_they_are_chinese() -> None:
    rows = [("a", "b"), ("致知", "1"), ("x", "22")]
    assert table(rows, right=(1,)).split("\n") == ["a      b", "致知   1", "x     22"]
    assert width("致知e\u0301") == 5


def test_the_ways_of_verifying_are_one_phrase() -> None:
    assert shorten(("cpu", "interpreter", "sm_80", "sm_90", "sm_100", "H100")) == (
        "cpu, interpreter, sm_80/90/100, H100"
    )
    assert shorten(()) == ""


def test_the_age_of_a_day_is_in_days_and_never_negative() -> None:
    today = datetime.now(UTC).date()
    assert age((today - timedelta(days=40)).isoformat()) == 40
    assert age((today + timedelta(days=1)).isoformat()) == 0


def test_every_option_that_takes_a_reason_is_an_excuse() -> None:
    fields = Options.__dataclass_fields__
    known = [name for name in EXCUSES if name in fields]
    assert {"norun", "varies"} <= set(known)
    for name in known:
        assert excuses(Options(**{name: "why"})) == {name: "why"}
    others = fields.keys() - set(EXCUSES)
    assert others <= {"source", "tol", "raises", "alt", "caption", "timeout", "tensor_cores"}, (
        "is a new option an excuse? Then it belongs in EXCUSES; else name it here"
    )


def test_a_reader_who_leaves_is_no_error(sample: Sample) -> None:
    for n in range(60):
        sample.write("```python\nprint(1)\n```\n", f"page-{n}-{'long' * 40}.md")
    command = [sys.executable, "-m", "mdproof", "status"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=sample.root, **pipes) as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.stderr is not None
        said = run.stderr.read()
        assert (run.wait(timeout=60), said) == (141, b"")
