"""Each notebook runs from top to bottom, and its checks say what is recorded in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").rglob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def checks(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("check: ")]


def recorded(path: Path) -> str:
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert all(output["output_type"] == "stream" for output in outputs)
    return "".join("".join(output["text"]) for output in outputs)


def test_there_is_a_notebook():
    assert "tiny_llama.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_says_what_it_said(path, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(
        "\n\n".join("".join(cell["source"]) for cell in code_cells(path)), encoding="utf-8"
    )
    known = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=known, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    assert len(checks(run.stdout)) >= 6
    assert checks(run.stdout) == checks(recorded(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_was_run_in_order_and_names_no_machine(path):
    counts = [cell["execution_count"] for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))
    text = path.read_text(encoding="utf-8")
    assert "/home/" not in text
    assert str(ROOT) not in text
