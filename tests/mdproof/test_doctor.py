"""`mdproof doctor` tells which pages are proven for what is installed, and what is amiss."""

import importlib.metadata
import shutil

import pytest
from tests.mdproof.conftest import PYPROJECT, Sample

from mdproof import cli, doctor, tools
from mdproof.proof import load_proof, save_proof
from mdproof.site import load_site

PAGE = "```python\nimport yaml\n\nprint(yaml.safe_load('1'))\n```\n\n```python\nprint(2)\n```\n"
YAML = importlib.metadata.version("PyYAML")


def examine(sample: Sample, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    (sample.root / "docs/articles").mkdir(exist_ok=True)
    code = cli.main(["doctor"])
    return code, capsys.readouterr().out.splitlines()


def lock(sample: Sample, text: str) -> None:
    (sample.root / "requirements.lock").write_text(text, encoding="utf-8")


def test_a_healthy_site_is_well(sample: Sample, capsys: pytest.CaptureFixture[str]) -> None:
    lock(sample, f"PyYAML=={YAML}\n")
    sample.prove(PAGE)
    code, lines = examine(sample, capsys)
    assert code == 0
    assert lines[:2] == [
        "page     state  here",
        "page.md  fresh  proven for what is installed here",
    ]
    assert lines[-1] == "all is well"


def test_versions_that_differ_are_told_with_all_three(
    sample: Sample, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(sample, f"PyYAML=={YAML}\n")
    sample.prove(PAGE)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.0")
    code, lines = examine(sample, capsys)
    assert code == 1
    assert lines[1] == "page.md  fresh  1 versions differ"
    assert f"wrong: docs/page.md: pyyaml: recorded {YAML}, locked {YAML}, installed 1.0" in lines
    monkeypatch.setattr(doctor, "installed_version", lambda name: "")
    _, lines = examine(sample, capsys)
    assert f"wrong: docs/page.md: pyyaml: recorded {YAML}, locked {YAML}, not installed" in lines


def test_without_a_lock_recorded_and_installed_are_compared(
    sample: Sample, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sample.root / "pyproject.toml"
    file.write_text(PYPROJECT.replace('lock = "requirements.lock"\n', ""), encoding="utf-8")
    sample.prove(PAGE)
    code, lines = examine(sample, capsys)
    assert code == 0
    assert "note: no lock file: a proof is bound to the versions it was recorded with" in lines
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.0")
    _, lines = examine(sample, capsys)
    assert f"wrong: docs/page.md: pyyaml: recorded {YAML}, installed 1.0" in lines


def test_another_python_is_told(
    sample: Sample, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.prove(PAGE)
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    for record in proof.blocks:
        record["python"] = "3.9.1"
    save_proof(sample.site, proof)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.11.2")
    code, lines = examine(sample, capsys)
    assert code == 1
    assert "wrong: docs/page.md: Python: recorded 3.9.1, running 3.11.2" in lines


def test_stale_blocks_damaged_figures_and_orphans_are_told(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = "import matplotlib.pyplot as plt\n\nfig, ax = plt.subplots()\nline = ax.plot([1])"
    sample.prove(f'```python alt="a point"\n{figure}\n```\n', "drawn.md")
    (sample.root / "docs/proofs/drawn/1-1.dark.svg").write_text("<svg/>", encoding="utf-8")
    sample.prove(PAGE, "gone.md")
    (sample.root / "docs/gone.md").unlink()
    sample.prove(PAGE)
    sample.write(PAGE.replace("import yaml\n", "import yaml\n\na = 1\n"))
    code, lines = examine(sample, capsys)
    assert code == 1
    assert [line for line in lines if line.startswith("wrong")] == [
        "wrong: docs/drawn.md: block 1: figure 1-1.dark.svg is not the recorded one",
        "wrong: docs/page.md: blocks 1, 2: changed since it was proven",
        "wrong: docs/proofs/gone.json: no page has these blocks: delete it",
    ]
    assert lines[-1] == "3 things are wrong"


def test_settings_that_name_what_is_not_there_are_told(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PYPROJECT.replace('"src"', '"lib"').replace("requirements.lock", "no.lock")
    text += 'preload = ["no_such_library"]\n'
    (sample.root / "pyproject.toml").write_text(text, encoding="utf-8")
    code = cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert [line for line in lines if line.startswith("wrong")] == [
        "wrong: [tool.mdproof] preload names no_such_library, which is not installed",
        "wrong: [tool.mdproof] lock: there is no file no.lock",
        "wrong: [tool.mdproof] source: there is no folder lib",
        "wrong: [tool.mdproof] packages: no source folder holds sample",
        "wrong: [tool.mdproof] articles: there is no folder docs/articles",
    ]


def test_an_unknown_setting_is_an_error_with_its_line(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[tool.other]\nsauce = 1\n\n" + PYPROJECT + 'sauce = ["src"]\n'
    (sample.root / "pyproject.toml").write_text(text, encoding="utf-8")
    line = text.rstrip("\n").count("\n") + 1
    assert cli.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pyproject.toml:{line}: [tool.mdproof] has no 'sauce'; known are ")
    assert error.count("\n") == 1
    load_site.__globals__["_load_site"].cache_clear()
    (sample.root / "pyproject.toml").write_text(PYPROJECT.replace('["src"]', '"src"'))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "pyproject.toml:6: [tool.mdproof] source is 'src', not a list\n"
    )


def test_missing_tools_are_notes(
    sample: Sample, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.sys, "executable", str(sample.root / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (sample.root / "pyproject.toml").write_text(PYPROJECT + 'types = "pyrefly"\n')
    code, lines = examine(sample, capsys)
    assert code == 0
    assert lines[1:] == [
        "note: ruff is not installed: mdproof lint and format needs it (pip install ruff)",
        "note: pyrefly is not installed: mdproof lint with types needs it (pip install pyrefly)",
        "all is well",
    ]
