"""Blocks run in order in one real module; what a block does wrong is told with file and line."""

import json
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.mdproof.conftest import Sample

from mdproof.copy import payloads
from mdproof.prove import check_block, check_copy


def fences(*blocks: str, **options: str) -> str:
    extra = "".join(f' {name}="{value}"' for name, value in options.items())
    parts = [f"```python{extra}\n{textwrap.dedent(block).strip()}\n```\n" for block in blocks]
    return "text\n\n" + "\n".join(parts)


def records(sample: Sample) -> list[dict]:
    return json.loads((sample.root / "docs/proofs/page.json").read_text(encoding="utf-8"))["blocks"]


def texts(sample: Sample) -> list[str]:
    return ["".join(out.get("text", "") for out in record["outputs"]) for record in records(sample)]


def test_blocks_share_one_namespace_and_outputs_are_recorded(sample: Sample) -> None:
    assert sample.prove(fences("a = 2\nprint('a is', a)", "a * 21")).failures == {}
    assert texts(sample) == ["a is 2\n", "42"]


def test_the_namespace_is_a_real_module(sample: Sample) -> None:
    page = fences(
        """
        import dataclasses, inspect, pickle, sys

        @dataclasses.dataclass
        class Point:
            x: int

        def shift(p):
            # a comment
            return Point(p.x + 1)

        print(pickle.loads(pickle.dumps(shift(Point(1)))))
        print(inspect.getsource(shift).splitlines()[1].strip())
        print(sys.modules[__name__].Point is Point)
        """
    )
    assert sample.prove(page).failures == {}
    assert texts(sample) == ["Point(x=2)\n# a comment\nTrue\n"]


def test_a_forked_worker_can_unpickle_what_a_block_defines(sample: Sample) -> None:
    page = fences(
        """
        import multiprocessing

        def double(x):
            return 2 * x

        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(double, [1, 2, 3]))
        """
    )
    assert sample.prove(page).failures == {}
    assert texts(sample) == ["[2, 4, 6]\n"]


HOSTILE = {
    "error": ("a = 1\nb = 0\na / b", 6, "ZeroDivisionError: division by zero"),
    "syntax": ("a = 1\nb = = 2", 5, "SyntaxError: invalid syntax"),
    "exit": ("import sys\nsys.exit(3)", 5, "the block leaves the interpreter: SystemExit(3)"),
    "hard exit": ("import os\nos._exit(3)", 4, "the block ended its process with status 3"),
    "segmentation fault": (
        "import ctypes\nctypes.string_at(0)",
        4,
        "the interpreter crashed (SIGSEGV)",
    ),
    "memory": ("a = bytearray(20 << 30)", 4, "more memory than the limit allows"),
    "flood": ("print('x' * 200_000)", 4, "prints 200001 characters"),
    "deprecation": (
        "import warnings\nwarnings.warn('old', DeprecationWarning)",
        5,
        "warns: DeprecationWarning: old",
    ),
    "name": ("c", 4, "NameError: name 'c' is not defined"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_block_that_misbehaves_fails_alone_with_its_line(sample: Sample, case: str) -> None:
    code, line, message = HOSTILE[case]
    failures = sample.prove(fences(code, "print('next')")).failures
    assert failures[1].line == line
    assert message in failures[1].message
    assert "not run: block 1 failed before it" in failures[2].message
    assert not (sample.root / "docs/proofs/page.json").exists()
    assert sample.prove(fences("print('fine')"), "other.md").failures == {}  # the worker lives


@pytest.mark.parametrize("loop", ["while True:\n    pass", "import time\ntime.sleep(1000)"])
def test_a_block_that_hangs_is_ended_after_its_time(sample: Sample, loop: str) -> None:
    started = time.monotonic()
    failures = sample.prove(fences(loop, timeout="1.5")).failures
    assert failures[1].message == "takes longer than 1.5 s"
    assert time.monotonic() - started < 20


def test_what_a_block_leaves_running_is_ended_with_the_page(sample: Sample) -> None:
    code = "import subprocess\nprint(subprocess.Popen(['sleep', '1000']).pid)"
    assert sample.prove(fences(code, varies="a process id")).failures == {}
    pid = int(texts(sample)[0])
    time.sleep(0.3)
    status = Path(f"/proc/{pid}/stat")  # gone, or dead and waiting for init to notice
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_an_expected_exception_is_the_output(sample: Sample) -> None:
    assert sample.prove(fences("1 / 0", raises="ZeroDivisionError")).failures == {}
    assert records(sample)[0]["outputs"] == [
        {"type": "error", "text": "ZeroDivisionError: division by zero"}
    ]


def test_an_expected_exception_that_does_not_come_is_a_failure(sample: Sample) -> None:
    failures = sample.prove(fences("1 / 1", raises="ZeroDivisionError")).failures
    assert failures[1].message == "does not raise ZeroDivisionError"


def test_an_excused_block_is_recorded_with_its_reason_and_not_run(sample: Sample) -> None:
    page = fences("a = 1") + '\n```python norun="needs two machines"\nboom()\n```\n'
    assert sample.prove(page).failures == {}
    assert [record["status"] for record in records(sample)] == ["passed", "excused"]
    assert records(sample)[1]["reason"] == "needs two machines"


def test_a_doctest_block_is_checked_against_what_it_shows(sample: Sample) -> None:
    page = "```pycon\n>>> a = 1\n>>> a + 1\n2\n```\n"
    assert sample.prove(page).failures == {}
    failures = sample.prove(page.replace("\n2\n", "\n3\n")).failures
    assert "doctest" in failures[1].message


def test_a_figure_is_recorded_in_both_themes_and_needs_a_text_alternative(sample: Sample) -> None:
    code = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([0, 1], [0, 1])"
    assert 'alt="..."' in sample.prove(fences(code)).failures[1].message
    assert sample.prove(fences(code, alt="a rising line")).failures == {}
    (out,) = records(sample)[0]["outputs"]
    folder = sample.root / "docs/proofs/page"
    light, dark = ((folder / f"{out['name']}.{t}.svg").read_text() for t in ("light", "dark"))
    assert light != dark
    assert "#010203" not in light + dark
    assert check_block(sample.open(), sample.open().blocks[0]) is None


def test_a_source_fence_imports_the_object(sample: Sample) -> None:
    page = '```python source="sample.shapes.area"\n```\n\n```python\nprint(f"{area(2):.4f}")\n```\n'
    assert sample.prove(page).failures == {}
    assert texts(sample) == ["", "12.5664\n"]
    assert records(sample)[1]["names"] == {"area": "sample.shapes.area"}


def test_a_copy_is_closed_and_runs_alone(sample: Sample) -> None:
    page = '```python source="sample.shapes.area"\n```\n\n' + fences(
        "import os\nradius = 2\nother = 3\nprint(other)", 'print(f"{area(radius):.4f}")'
    )
    assert sample.prove(page).failures == {}
    texts_ = payloads("page.md", sample.site)
    assert "def scale(x):" in texts_[0]
    assert "FACTOR = 3" in texts_[0]
    assert texts_[0].startswith("# 样例 · page · 第 1 段\n# sample 1.0\n")
    assert texts_[2].split("\n", 3)[3] == (
        'from sample.shapes import area\nradius = 2\n\nprint(f"{area(radius):.4f}")\n'
    )
    for text in texts_:  # in an interpreter that knows nothing of the engine
        subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)


def test_a_slice_that_would_print_something_else_gives_way_to_a_larger_one(sample: Sample) -> None:
    page = fences("a = []\nb = a\nc = b.append(1)", "print(a)")
    assert sample.prove(page).failures == {}
    assert [record["copy"]["level"] for record in records(sample)] == ["tight", "all"]
    run = sample.open()
    assert check_copy(run, run.blocks[1]) is None


def test_the_repository_files_that_a_block_opens_are_part_of_its_proof(sample: Sample) -> None:
    data = sample.root / "docs/data.csv"
    data.write_text("1,2\n", encoding="utf-8")
    page = fences(f"print(open({str(data)!r}).read().strip())")
    assert sample.prove(page).failures == {}
    assert records(sample)[0]["files"] == ["docs/data.csv"]
    assert sample.open().stale == [""]
    data.write_text("1,3\n", encoding="utf-8")
    assert sample.open().stale == ["changed since it was proven"]


def test_an_output_that_varies_is_shown_and_not_compared(sample: Sample) -> None:
    page = fences("import time\nprint(time.perf_counter())", varies="a clock")
    assert sample.prove(page).failures == {}
    run = sample.open()
    assert check_block(run, run.blocks[0]) is None


def test_an_output_that_depends_on_the_order_of_a_set_is_no_proof(sample: Sample) -> None:
    names = [f"name{n}" for n in range(40)]
    failures = sample.prove(fences(f"print(list({{*{names!r}}}))")).failures
    assert failures[1].message.startswith("the runnable copy prints ")
    assert sample.prove(fences(f"print({{*{names!r}}})")).failures == {}  # a set has none
    assert sample.prove(fences(f"print(sorted({{*{names!r}}}))")).failures == {}


FILM = fences(
    """
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation

    fig, ax = plt.subplots(figsize=(2, 1))
    (dot,) = ax.plot([0], [0], "o")
    ax.set(xlim=(0, 3), ylim=(-1, 1), xlabel="place")
    film = FuncAnimation(fig, lambda i: dot.set_xdata([i]), frames=4, interval=250)
    """,
    alt="a dot that moves from left to right",
)


def test_an_animation_is_one_drawing_of_all_its_frames(sample: Sample) -> None:
    assert sample.prove(FILM).failures == {}
    (out,) = records(sample)[0]["outputs"]
    assert (out["frames"], out["width"], out["height"]) == (4, 192, 96)
    for theme in ("light", "dark"):
        text = (sample.root / f"docs/proofs/page/1-1.{theme}.svg").read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        frames = [group for group in root if group.get("class") == "frame"]
        delays = [frame.get("style") for frame in frames]
        assert delays == [*(f"animation-delay:{d}s" for d in ("0", "0.25", "0.5")), None]
        places = [
            next(u.get("x") for u in frame.iterfind(".//{*}use") if "3b82f6" in u.get("style", ""))
            for frame in frames
        ]
        assert [float(x) for x in places] == sorted(float(x) for x in places)
        glyphs = re.findall(r'<path id="(DejaVu[^"]*)"', text)
        assert sorted(set(glyphs)) == sorted(glyphs)  # each is defined once
        assert glyphs
        meant = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        assert meant <= set(re.findall(r'id="([^"]+)"', text))
        # What is defined in a hidden frame is hidden, too: a clip there blanks every other frame.
        assert all(frame.find(".//{*}defs") is None for frame in frames)
        assert "prefers-reduced-motion" in text
    run = sample.open()
    assert check_block(run, run.blocks[0]) is None


def test_an_animation_that_moves_otherwise_is_another_figure(sample: Sample) -> None:
    sample.prove(FILM)
    sample.write(FILM.replace("[i]", "[i / 2]"))
    run = sample.open()
    assert "figure" in str(check_block(run, run.blocks[0]))
