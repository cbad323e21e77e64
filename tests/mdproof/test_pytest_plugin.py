"""`pytest docs`, `--stale` and `--update`, as a user calls them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.mdproof.conftest import Sample

PAGE = "text\n\n```python\na = 1\n```\n\n```python\nprint(a + 1)\n```\n"


def run(sample: Sample, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    env = {name: value for name, value in os.environ.items() if name != "CI"} | environment
    return subprocess.run(
        command, cwd=sample.root, env=env, capture_output=True, text=True, check=False
    )


def last(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout.strip().splitlines()[-1]


def test_each_block_and_each_copy_is_a_test(sample: Sample) -> None:
    sample.write(PAGE)
    assert "4 passed" in last(run(sample, "docs", "--update"))
    names = run(sample, "docs", "--collect-only").stdout
    for name in ("block-1", "block-2", "copy-1", "copy-2"):
        assert f"docs/page.md::{name}" in names
    assert "4 passed" in last(run(sample, "docs"))


def test_an_unproven_page_fails_and_says_what_to_do(sample: Sample) -> None:
    sample.write(PAGE)
    result = run(sample, "docs")
    assert result.returncode == 1
    assert "docs/page.md:3: not proven yet: run `pytest docs --update`" in result.stdout


def test_a_broken_module_turns_the_page_red_with_file_and_line(sample: Sample) -> None:
    sample.write('```python\nfrom sample.shapes import area\nprint(f"{area(1):.3f}")\n```\n')
    assert run(sample, "docs", "--update").returncode == 0
    module = sample.root / "src/sample/shapes.py"
    module.write_text(module.read_text().replace("x * FACTOR", "-x * FACTOR"), encoding="utf-8")
    result = run(sample, "docs")
    assert "docs/page.md:1: the output changed: recorded '3.142', now '-3.142'" in result.stdout


def test_a_failure_report_has_at_most_15_lines(sample: Sample) -> None:
    code = "\n".join(f"x{n} = {n}" for n in range(60)) + "\n1 / 0"
    sample.write(f"```python\n{code}\n```\n")
    out = run(sample, "docs", "--update").stdout
    report = out[out.index("docs/page.md:62:") :]
    lines = re.split(r"\n(?:____|====)", report)[0].rstrip().splitlines()
    assert lines[0] == "docs/page.md:62: ZeroDivisionError: division by zero"
    assert any(line.startswith(">   62 1 / 0") for line in lines)
    assert len(lines) <= 15


def test_one_broken_page_leaves_the_others_to_go_on(sample: Sample) -> None:
    sample.write(PAGE)
    sample.write('```python nonsense="1"\na\n```\n', "wrong.md")
    (sample.root / "docs/bytes.md").write_bytes(b"text\n\xff\n")
    result = run(sample, "docs", "--update")
    assert "4 passed" in last(result)
    assert 'docs/wrong.md:1: unknown fence option "nonsense"' in result.stdout
    assert "docs/bytes.md:2: the file is not UTF-8" in result.stdout


def test_stale_runs_nothing_when_nothing_changed(
    sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("log") / "runs"
    code = f"with open({str(log)!r}, 'a') as file:\n    n = file.write('x')"
    sample.write(f"```python\n{code}\n```\n")
    assert run(sample, "docs", "--update").returncode == 0
    assert log.read_text() == "xx"  # the block, and its copy alone
    assert "2 passed" in last(run(sample, "docs", "--stale"))
    assert log.read_text() == "xx"
    assert "2 passed" in last(run(sample, "docs"))
    assert log.read_text() == "xxxx"


def test_stale_and_update_prove_only_what_changed(sample: Sample) -> None:
    sample.write(PAGE)
    sample.write(PAGE, "other.md")
    assert run(sample, "docs", "--update").returncode == 0
    proofs = {path: path.stat().st_mtime_ns for path in (sample.root / "docs/proofs").iterdir()}
    sample.write(PAGE.replace("a + 1", "a + 2"))
    assert run(sample, "docs", "--stale").returncode == 1
    assert run(sample, "docs", "--stale", "--update").returncode == 0
    changed = [path.name for path, time_ in proofs.items() if path.stat().st_mtime_ns != time_]
    assert changed == ["page.json"]


def test_update_says_what_it_recorded_anew(sample: Sample) -> None:
    sample.write(PAGE)
    first = run(sample, "docs", "--update")
    assert "recorded anew" not in first.stdout  # nothing was recorded before
    sample.write(PAGE.replace("a + 1", "a + 2"))
    out = run(sample, "docs", "--update", "-n", "2").stdout
    (shown,) = out.split("= recorded anew =")[1:]
    assert shown.strip("= \n").splitlines()[:4] == [
        "docs/page.md::block-2: shows something else now",
        "  @@ -1 +1 @@",
        "  -2",
        "  +3",
    ]
    assert "recorded anew" not in run(sample, "docs", "--update").stdout


def test_an_output_that_shows_an_address_is_not_recorded(sample: Sample) -> None:
    sample.write("```python\nprint(object())\n```\n")
    result = run(sample, "docs", "--update")
    assert "docs/page.md:1: the output shows an address, <object object at 0x" in result.stdout
    assert ">, which differs in every run" in result.stdout
    assert not (sample.root / "docs/proofs/page.json").exists()
    sample.write('```python varies="where it lies"\nprint(object())\n```\n')
    assert run(sample, "docs", "--update").returncode == 0


def test_update_is_refused_in_ci(sample: Sample) -> None:
    sample.write(PAGE)
    result = run(sample, "docs", "--update", CI="true")
    assert result.returncode == 4
    assert "--update records outputs; it is refused in CI" in result.stderr
    assert not (sample.root / "docs/proofs").exists()


def test_a_hand_edited_proof_fails_and_is_made_anew_by_update(sample: Sample) -> None:
    sample.write(PAGE)
    assert run(sample, "docs", "--update").returncode == 0
    file = sample.root / "docs/proofs/page.json"
    file.write_text(file.read_text().replace('"2\\n"', '"3\\n"'), encoding="utf-8")
    assert "it was edited by hand" in run(sample, "docs").stdout
    assert run(sample, "docs", "--update").returncode == 0
    assert run(sample, "docs").returncode == 0


def test_pages_outside_a_site_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("```python\nboom\n```\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path / "README.md")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "boom" not in result.stdout


@pytest.mark.parametrize("command", ["status", "prove"])
def test_the_command_line_outside_a_site_says_so_in_one_line(tmp_path: Path, command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mdproof", command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("no mkdocs.yml in ")
    assert len(result.stderr.splitlines()) == 1


def test_the_command_line_proves_and_reports(sample: Sample) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mdproof", *arguments]
        return subprocess.run(command, cwd=sample.root, capture_output=True, text=True, check=False)

    sample.write(PAGE)
    assert "2 stale" in call("status").stdout
    assert call("prove").returncode == 0
    assert "page.md: fresh" in call("prove").stdout
    result = call("status")
    assert result.returncode == 0
    assert "2 blocks, 0 excused; 0 pages need `mdproof prove`" in result.stdout
