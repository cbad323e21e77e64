"""Pages that try to lie, to lose something or to break the engine: each is told in one line."""

import html
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.mdproof.conftest import MKDOCS, PYPROJECT, Sample
from tests.mdproof.test_run import fences, records, texts

from mdproof import cli
from mdproof.collect import make_pipeline
from mdproof.compare import first_difference, same_figure
from mdproof.copy import payloads
from mdproof.errors import PageError
from mdproof.normal import file_digest
from mdproof.proof import imported_modules, imported_names, orphans
from mdproof.prove import check_block, check_copy
from mdproof.render import screen
from mdproof.runner import Server, page_job
from mdproof.site import load_site

CHANGED = "changed since it was proven"


def rendered(sample: Sample, page: str = "page.md") -> str:
    """Return a page as a builder renders it."""
    md = make_pipeline(sample.site)
    md.mdproof_collecting, md.mdproof_page = False, page  # type: ignore[attr-defined]
    return md.convert((sample.root / "docs" / page).read_text(encoding="utf-8"))


def states(text: str) -> list[str]:
    return re.findall(r'data-mdproof-state="(\w+)"', text)


# What a block does to its process.

MISDEEDS = {
    "closes stdout": ("import sys\nsys.stdout.close()", 4, "the block closes sys.stdout"),
    "prints after closing": ("import sys\nsys.stdout.close()\nprint(1)", 6, "closed file"),
    "writes past stdout": (
        "import os\nn = os.write(1, b'hi')",
        4,
        "a child process or C code prints past sys.stdout: 'hi'",
    ),
    "subprocess prints": (
        "import subprocess\nr = subprocess.run(['echo', 'hi'])",
        4,
        "prints past sys.stdout: 'hi'",
    ),
    "fork prints": (
        "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    s = os.wait()",
        4,
        "prints past sys.stdout: 'child'",
    ),
    "keyboard": ("raise KeyboardInterrupt", 4, "KeyboardInterrupt"),
    "interrupted": ("import signal\nsignal.raise_signal(2)", 5, "KeyboardInterrupt"),
    "killed": ("import os\nos.kill(os.getpid(), 9)", 4, "killed, perhaps for memory (SIGKILL)"),
    "recursion": ("def f():\n    f()\nf()", 5, "RecursionError: maximum recursion depth"),
    "repr recursion": (
        "class A:\n    def __repr__(self):\n        return repr(self)\nA()",
        6,
        "RecursionError: maximum recursion depth",
    ),
    "repr raises": (
        "class A:\n    def __repr__(self):\n        raise ValueError('no')\nA()",
        6,
        "ValueError: no",
    ),
    "message raises": (
        "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E",
        7,
        "E: (its message raises ValueError)",
    ),
    "surrogate": ("a = 1\nprint('\\ud800')", 5, "UnicodeEncodeError: 'utf-8' codec can't encode"),
    "surrogate in message": ("raise ValueError('\\ud800')", 4, r"ValueError: \ud800"),
    "too deep": (f"x = {'+'.join('1' * 3000)}", 4, "RecursionError: maximum recursion depth"),
    "late future": (
        "a = 1\nfrom __future__ import annotations",
        3,
        "from __future__ imports must occur at the beginning",
    ),
}


@pytest.mark.parametrize("case", MISDEEDS)
def test_a_misdeed_is_told_with_its_line(sample: Sample, case: str) -> None:
    code, line, message = MISDEEDS[case]
    failures = sample.prove(fences(code)).failures
    assert message in failures[1].message
    assert failures[1].line == line
    assert sample.prove(fences("print('fine')"), "other.md").failures == {}


FIGURE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nt = ax.set_title({!r})"


@pytest.mark.parametrize(
    ("title", "message"),
    [("损失", "drawing the figure warns: Glyph"), (r"$\frac$", "Expected \\frac{num}{den}")],
)
def test_a_figure_that_cannot_be_drawn_right_fails(
    sample: Sample, title: str, message: str
) -> None:
    failures = sample.prove(fences(FIGURE.format(title), alt="a")).failures
    assert message in failures[1].message


def test_a_figure_drawn_before_an_expected_exception_stays_with_its_block(sample: Sample) -> None:
    page = fences(FIGURE.format("a") + "\n1 / 0", alt="a", raises="ZeroDivisionError")
    assert sample.prove(page + fences("print(1)")).failures == {}
    kinds = [[out["type"] for out in record["outputs"]] for record in records(sample)]
    assert kinds == [["figure", "error"], ["stdout"]]


def test_what_the_engine_refuses_is_no_expected_exception(sample: Sample) -> None:
    page = fences("import warnings\nwarnings.warn('old')", raises="Exception")
    assert "warns: UserWarning: old" in sample.prove(page).failures[1].message
    page = fences("print('x' * 200_000)\n1 / 0", raises="ZeroDivisionError")
    assert "prints 200001 characters" in sample.prove(page).failures[1].message


def test_leaving_the_interpreter_may_be_expected(sample: Sample) -> None:
    assert sample.prove(fences("import sys\nsys.exit(2)", raises="SystemExit")).failures == {}
    assert records(sample)[0]["outputs"] == [{"type": "error", "text": "SystemExit: 2"}]


@pytest.mark.parametrize(
    ("code", "message"),
    [("print(1)", "no >>> example"), (">>> 1 + 1  # doctest: +SKIP\n3", "norun says why")],
)
def test_a_doctest_that_runs_nothing_fails(sample: Sample, code: str, message: str) -> None:
    assert message in sample.prove(f"```pycon\n{code}\n```\n").failures[1].message


def test_an_object_that_answers_every_getattr_does_no_harm(sample: Sample) -> None:
    code = "class A(dict):\n    __getattr__ = dict.__getitem__\na = A(x=1)\nprint(a.x)"
    assert sample.prove(fences(code)).failures == {}


def test_a_stdout_put_in_its_place_lasts_as_long_as_the_block(sample: Sample) -> None:
    page = fences("import io, sys\nsys.stdout = io.StringIO()\nprint('gone')", "print('here')")
    assert sample.prove(page).failures == {}
    assert texts(sample) == ["", "here\n"]


def test_a_block_may_delete_its_folder(sample: Sample) -> None:
    page = fences("import os, shutil\nshutil.rmtree(os.getcwd())\nprint(1)", "print(2)")
    assert sample.prove(page).failures == {}


def test_a_worker_killed_from_outside_fails_one_job(sample: Sample) -> None:
    sample.write(fences("import time\ntime.sleep(30)"))
    job = page_job(sample.site, "page.md", sample.collect_written().blocks)
    with Server() as server:
        server._start()
        assert server._process is not None
        worker = server._process.pid
        threading.Timer(0.5, os.kill, (worker, signal.SIGSTOP)).start()
        threading.Timer(0.6, os.kill, (worker, signal.SIGKILL)).start()
        assert server.run(job)[0].failure is not None
        job["blocks"][0]["code"] = "print(1)"
        assert server.run(job)[0].failure is None
        os.kill(server._process.pid, signal.SIGKILL)  # before a job, perhaps unnoticed as yet
        assert len(server.run(job)) == 1
        assert server.run(job)[0].failure is None


def test_an_interrupted_run_leaves_no_process(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.write(fences("while True:\n    pass"))
    job = page_job(sample.site, "page.md", sample.collect_written().blocks)
    with Server() as server:
        seen: list[int] = []
        event = server._event

        def interrupt(seconds: float) -> dict[str, object] | None:
            if server._job:
                seen.append(server._job)
                raise KeyboardInterrupt
            return event(seconds)

        monkeypatch.setattr(server, "_event", interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.run(job)
    stat = Path(f"/proc/{seen[0]}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the block is still running")


# What is run, and what the reader sees and copies.

PROGRAMS = {
    "future": ("from __future__ import annotations\na = 1", "def f(x: Nope): pass\nprint(a)"),
    "line separators in strings": ("s = 'a\u2028b\x0c\x85'\nt = 'c'", "print(len(s), t)"),
    "form feed": ("s = 1\n\x0ct = 2\nu = 3", "print(t, u)"),
    "blank lines in a string": ('s = """a\n\n\n\n\nb"""\nt = 1', "print(len(s))"),
    "spaces in a string": ('s = """a\n   \n  b"""\nt = 1', "print(repr(s))"),
    "hash in a string": ('s = """\n# no comment\n"""\nt = 1', "print(s)"),
    "comment before a string": ("def f():\n    pass\n    # inside\na = 1", "print(a)"),
    "class body": ("x = 1\ny = 2", "class C:\n    x = x + 1\nprint(C.x)"),
    "nested comprehension": ("n = 2\nm = [1]", "print([[i * n for i in m] for m in [m]])"),
    "decorator": ("def twice(f):\n    return lambda: 2 * f()", "@twice\ndef f(): return 1\nf()"),
    "del": ("a = 1\nb = a\ndel a", "try:\n    a\nexcept NameError:\n    print(b)"),
    "try import": ("try:\n    import tomllib\nexcept ImportError:\n    tomllib = 0", "tomllib"),
    "condition": ("if 1:\n    def f(): return 1\nelse:\n    f = 0", "print(f())"),
    "shadowed builtins": ("list = [1]\nsum = 3", "print(list, sum)"),
    "star import": ("from math import *\npi = 3", "print(pi, e > 2)"),
    "nested global": (
        "n = 0\ndef f():\n    def g():\n        global n\n        n += 1\n    g()\nf()",
        "print(n)",
    ),
    "annotation": ("T = int\nx: T = 1\ny: T", "def f(a: T) -> T: return a\nprint(f(x))"),
    "semicolons": ("a = 1; b = 2; c = 3;", "d = b; print(d);"),
    "continued lines": ("a = 1 + \\\n    2\nb = a", "print(a, \\\n  b)"),
    "quotes in f-strings": ("d = {'k': 1}", "print(f\"{d['k']!r:>4} {'{'}\")"),
    "identifiers": ("变量 = 1\nﬁ = 2", "print(变量, fi)"),
    "tabs": ("def f():\n\treturn 'a\\tb'", "if 1:\n\tprint(f())"),
    "only a string": ("a = 1", "'hello'"),
    "submodules": ("import os.path as p, xml.dom", "print(p.sep, xml.dom.__name__)"),
    "html": ("s = '</script>\"&amp;&lt; \\\\ <b>'  # (eq:none) </code></pre>", "print(s)"),
    "long line": (f"s = '{'x' * 5000}'", "print(len(s))"),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_copy_prints_in_a_bare_interpreter_what_the_page_prints(
    sample: Sample, case: str
) -> None:
    page = fences(*PROGRAMS[case])
    assert sample.prove(page).failures == {}
    first, copy = payloads("page.md", sample.site)
    for text in (first, copy):
        compile(text, "copy", "exec", dont_inherit=True)
    bare = subprocess.run([sys.executable, "-I", "-c", copy], capture_output=True, text=True)
    assert bare.returncode == 0, bare.stderr
    shown = [out["text"] for out in records(sample)[1]["outputs"] if out["type"] == "stdout"]
    assert bare.stdout == "".join(shown)
    found = re.findall(r'data-mdproof-copy="([^"]*)"', rendered(sample))
    blocks = sample.collect_written().blocks
    expected = [first, blocks[0].code, copy, blocks[1].code]
    assert [html.unescape(text) for text in found] == expected


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("lead", ["1. a\n\n    - b\n\n{}", '=== "tab"\n\n{}', "> q\n>\n{}"])
def test_a_fence_inside_something_keeps_its_lines(sample: Sample, lead: str, ending: str) -> None:
    code = "```python\ndef f():\n\n    return '''a\n\n      b'''\n\nprint(repr(f()))\n```\n"
    margin = "> " if lead.startswith(">") else "        " if "- b" in lead else "    "
    body = "".join(f"{margin}{line}\n" for line in code.split("\n"))
    page = lead.format(body).replace("\n", ending)
    assert sample.prove(page).failures == {}
    assert texts(sample) == ["'a\\n\\n      b'\n"]


@pytest.mark.parametrize("language", ["Python", "PYTHON", "py3", "pyi", "ipython"])
def test_a_fence_that_looks_like_python_is_not_shown_unrun(sample: Sample, language: str) -> None:
    with pytest.raises(PageError, match=rf"^docs/page.md:3: ```{language} is shown and not run"):
        sample.collect(f"text\n\n```{language}\nprint(1)\n```\n")


def test_fences_that_only_a_snippet_brings_are_collected(sample: Sample) -> None:
    part = "```python\ndef f():\n    return 1\n```\n\n```python\nimport inspect\n"
    part += "print(inspect.getsource(f))\n```\n"
    (sample.root / "part.md").write_text(part, encoding="utf-8")
    assert sample.prove('--8<-- "part.md"\n').failures == {}
    assert texts(sample) == ["", "def f():\n    return 1\n\n"]


def test_a_snippet_that_is_missing_is_told_in_one_line(sample: Sample) -> None:
    with pytest.raises(PageError, match=r"^docs/page.md:1: the page cannot be rendered: Snippet"):
        sample.collect('```python\n--8<-- "nowhere.py"\n```\n')


def test_a_fence_in_a_comment_is_refused(sample: Sample) -> None:
    with pytest.raises(PageError, match=r"^docs/page.md:4: this fence is not shown as code"):
        sample.collect("a\n\n<!--\n```python\nprint(1)\n```\n-->\n")


def test_a_page_named_like_a_library_does_not_stand_in_its_place(sample: Sample) -> None:
    assert sample.prove(fences("import json\nprint(json.dumps([1]))"), "json.md").failures == {}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[1;31mred\x1b[0m \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "red link"),
        ("10%\r50%\r100%\ndone\r\n", "100%\ndone\n"),
        ("a\0b\x02c\x7f\ttab\n", "a␀b␂c␡\ttab\n"),
    ],
)
def test_an_output_is_shown_as_a_terminal_leaves_it(text: str, seen: str) -> None:
    assert screen(text) == seen


# What is compared.


@pytest.mark.parametrize(
    ("recorded", "new", "same"),
    [
        ("1", "1.9", False),
        ("1", "1.00001", True),
        ("1.0", "1", True),
        ("1" * 5000, "1" * 4999 + "2", False),
        ("n " + "1" * 5000, "n  +" + "1" * 5000, True),
        ("-0", "0", True),
        ("-1", "1", False),
    ],
)
def test_an_integer_shows_no_digit_that_may_differ(recorded: str, new: str, same: bool) -> None:
    assert (first_difference(recorded, new, rtol=1e-4) is None) == same


def test_a_figure_whose_text_changed_is_another_figure() -> None:
    old = '<g><use xlink:href="#DejaVuSans-31"/><use xlink:href="#DejaVuSans-32" x="9"/></g>'
    new = '<g><use xlink:href="#DejaVuSans-32"/><use xlink:href="#DejaVuSans-31" x="9"/></g>'
    assert same_figure(old, old)
    assert not same_figure(old, new)


def test_a_figure_put_in_the_place_of_the_recorded_one_is_stale(sample: Sample) -> None:
    assert sample.prove(fences(FIGURE.format("a"), alt="a title")).failures == {}
    assert states(rendered(sample)) == ["verified"]
    file = sample.root / "docs/proofs/page/1-1.light.svg"
    file.write_text(file.read_text().replace("#1f2328", "#ff0000"), encoding="utf-8")
    assert sample.open().stale == ["figure 1-1.light.svg is not the recorded one"]
    assert states(rendered(sample)) == ["stale"]
    file.unlink()
    assert sample.open().stale == ["figure 1-1.light.svg is not the recorded one"]
    assert sample.prove(fences(FIGURE.format("a"), alt="a title")).failures == {}
    assert sample.open().stale == [""]


# What a key covers.


def test_a_string_that_is_the_block_is_its_value_and_no_docstring(sample: Sample) -> None:
    assert sample.prove(fences("'hello'")).failures == {}
    sample.write(fences("'there'"))
    assert sample.open().stale == [CHANGED]


@pytest.mark.parametrize("reading", ["f.__doc__", "inspect.getsource(f)", "inspect.getdoc(f)"])
def test_a_page_that_reads_its_docstrings_depends_on_them(sample: Sample, reading: str) -> None:
    page = fences('import inspect\ndef f():\n    """One."""', f"print({reading})")
    assert sample.prove(page).failures == {}
    sample.write(page.replace("One.", "Two."))
    assert sample.open().stale == ["", CHANGED]


IMPORTS = {
    "lazy": "from sample import top\ntop.run()",
    "by name": "import importlib\nimportlib.import_module('sample.deep')",
    "alias": "import sample.deep as d",
    "from the package": "from sample import deep",
    "relative": "from sample import relative",
    "at the end of a chain": "import sample.chain",
}


@pytest.mark.parametrize("case", IMPORTS)
def test_a_module_is_part_of_the_key_however_it_is_imported(sample: Sample, case: str) -> None:
    package = sample.root / "src/sample"
    (package / "deep.py").write_text(
        "from pathlib import Path\nX = Path(__file__).with_name('x.txt').read_text()\n"
    )
    (package / "x.txt").write_text("1")
    (package / "top.py").write_text(
        "def run():\n    import sample.deep\n    return sample.deep.X\n"
    )
    (package / "relative.py").write_text("from .deep import X\n")
    (package / "chain.py").write_text("from . import relative\n")
    assert sample.prove(fences(IMPORTS[case])).failures == {}
    (record,) = records(sample)
    assert "sample.deep" in record["modules"]
    assert record["files"] == ["src/sample/x.txt"]
    assert sample.open().stale == [""]
    (package / "x.txt").write_text("22")
    assert sample.open().stale == [CHANGED]


def test_imports_are_read_as_python_reads_them(sample: Sample) -> None:
    package = sample.root / "src/sample"
    (package / "relative.py").write_text("from .shapes import area\nfrom . import top\n")
    (package / "top.py").write_text("import importlib\nx = importlib.import_module('json')\n")
    found = imported_modules(sample.site, "from sample import relative")
    assert found == {"sample", "sample.relative", "sample.shapes", "sample.top"}
    code = "import a.b, c as d\nfrom e.f import g\nfrom . import h\n__import__('i')"
    assert imported_names(code) == {"a", "c", "e", "i"}


@pytest.mark.parametrize(
    "reading",
    [
        "open({!r}).read()",
        "open({!r}.encode()).read()",
        "__import__('os').read(__import__('os').open({!r}, 0), 9)",
        "__import__('pathlib').Path({!r}).read_bytes()",
        "__import__('numpy').loadtxt({!r})",
    ],
)
def test_a_data_file_is_part_of_the_key_however_it_is_opened(sample: Sample, reading: str) -> None:
    other = sample.root.with_name(sample.root.name + "-link")
    other.symlink_to(sample.root)
    data = sample.root / "docs/data.csv"
    data.write_text("1\n", encoding="utf-8")
    for path in (data, other / "docs/data.csv"):
        assert sample.prove(fences("x = " + reading.format(str(path)))).failures == {}
        assert records(sample)[0]["files"] == ["docs/data.csv"]


def test_a_file_that_changes_within_a_tick_of_the_clock_is_another(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("1")
    stat, before = file.stat(), file_digest(file)
    file.write_text("22")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(file) != before


# Proofs and pages that do not belong together.


def test_a_translation_is_verified_by_the_page_it_translates(sample: Sample) -> None:
    page = fences("# 注释\na = 1", "# 打印\nprint(a)\nclass A: pass\nprint(A.__name__)")
    assert sample.prove(page).failures == {}
    before = (sample.root / "docs/proofs/page.json").read_bytes()
    sample.write(page.replace("注释", "a comment").replace("打印", "print"), "page.en.md")
    assert sample.open("page.en.md").stale == ["", ""]
    text = rendered(sample, "page.en.md")
    assert states(text) == ["verified", "verified"]
    assert text.count('class="mdproof-copy"') == 2
    run = sample.open("page.en.md")
    for block in run.blocks:
        assert check_block(run, block) is None
        assert check_copy(run, block) is None
    english = page.replace("注释", "a comment")
    assert sample.prove(english, "page.en.md").failures == {}
    assert (sample.root / "docs/proofs/page.json").read_bytes() == before
    failures = sample.prove(english.replace("print(a)", "print(2)"), "page.en.md").failures
    assert failures[2].message == "the code is not that of page.md, whose proof this page shares"
    assert (sample.root / "docs/proofs/page.json").read_bytes() == before


def test_proofs_without_a_page_are_named(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    page = fences(FIGURE.format("a"), alt="a title")
    assert sample.prove(page, "a/kept.md").failures == {}
    assert cli.main(["status"]) == 0
    assert sample.prove(page, "a/gone.md").failures == {}
    assert sample.prove(fences("a = 1"), "words.md").failures == {}
    (sample.root / "docs/a/gone.md").unlink()
    sample.write("Only words.\n", "words.md")
    left = [file.name for file in orphans(sample.site, ["a/kept.md"])]
    assert left == ["1-1.dark.svg", "1-1.light.svg", "gone.json", "words.json"]
    capsys.readouterr()
    assert cli.main(["status"]) == 1
    assert "docs/proofs/a/gone.json: no page has these blocks: delete it" in capsys.readouterr().out


def test_a_proof_that_cannot_be_written_is_told_in_one_line(
    sample: Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    (sample.root / "docs/proofs").write_text("in the way", encoding="utf-8")
    sample.write(fences("a = 1"))
    assert cli.main(["prove"]) == 1
    assert "docs/page.md:1: its proof cannot be written: " in capsys.readouterr().out


def test_a_page_that_is_not_there_is_told_in_one_line(
    sample: Sample, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.write(fences("a = 1"), "a/page.md")
    assert cli.main(["prove", "nope.md"]) == 2
    assert capsys.readouterr().err == "nope.md:1: no such page below docs\n"
    monkeypatch.chdir(sample.root / "docs/a")
    for name in ("page.md", "a/page.md", str(sample.root / "docs/a/page.md")):
        assert cli.main(["prove", name]) == 0


def test_two_that_record_at_once_leave_one_whole_proof(sample: Sample) -> None:
    sample.write(fences(FIGURE.format("a") + "\nprint(1)", alt="a title"))
    command = [sys.executable, "-m", "mdproof", "prove", "page.md"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    run = sample.open()
    assert run.stale == [""]
    assert check_block(run, run.blocks[0]) is None
    assert not list((sample.root / "docs/proofs").rglob(".*"))


# Sites.

SETTINGS = {
    "unknown key": ('nonsense = "1"\n', r"^pyproject.toml:11: \[tool.mdproof\] has no 'nonsense'"),
    "wrong kind": (
        'preload = "numpy"\n',
        r"^pyproject.toml:11: \[tool.mdproof\] preload is 'numpy', not a list",
    ),
    "not TOML": ("a = = 1\n", r"^pyproject.toml:1: not TOML: "),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_make_no_sense_are_told_in_one_line(
    sample: Sample, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = SETTINGS[case]
    (sample.root / "pyproject.toml").write_text(PYPROJECT + more, encoding="utf-8")
    with pytest.raises(PageError, match=message):
        load_site(sample.root)
    assert cli.main(["status"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


FENCES = MKDOCS[MKDOCS.index("  - pymdownx.superfences") : MKDOCS.index("  - pymdownx.tabbed")]
CONFIGS = {
    "no superfences": (MKDOCS.replace(FENCES, ""), "list pymdownx.superfences before mdproof"),
    "superfences after": (
        MKDOCS.replace(FENCES, "") + FENCES,
        "list pymdownx.superfences before mdproof",
    ),
    "no engine": (MKDOCS.replace("  - mdproof.markdown\n", ""), "mdproof.markdown is not listed"),
    "no such extension": (MKDOCS + "  - nowhere\n", "a Markdown extension is missing"),
    "not YAML": (MKDOCS + "a: [", "expected the node content"),
    "no such name": (MKDOCS + "a: !!python/name:os.nothing\n", "has no attribute 'nothing'"),
    "no parent": (MKDOCS + "INHERIT: nowhere.yml\n", "No such file"),
    "no settings": ("- a\n", "not a table of settings"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_cannot_work_is_told_in_one_line(
    sample: Sample, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = CONFIGS[case]
    (sample.root / "mkdocs.yml").write_text(text, encoding="utf-8")
    assert cli.main(["status"]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(rf"mkdocs.yml:\d+: .*{re.escape(message)}.*\n", told)


@pytest.mark.parametrize("project", [None, '[project]\nname = "a"\n'])
def test_a_site_needs_no_settings_of_ours(sample: Sample, project: str | None) -> None:
    file = sample.root / "pyproject.toml"
    file.unlink()
    if project is not None:
        file.write_text(project, encoding="utf-8")
    assert sample.prove(fences("print(1)")).failures == {}
    assert states(rendered(sample)) == ["verified"]


@pytest.mark.parametrize("builder", ["mkdocs", "zensical"])
def test_a_site_may_be_built_from_another_folder(
    sample: Sample, builder: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sample.write("# Home\n", "index.md")
    assert sample.prove(fences("print(1)")).failures == {}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mkdocs.yml").write_text("site_name: other\n", encoding="utf-8")
    command = [sys.executable, "-m", builder, "build", "-f", str(sample.root / "mkdocs.yml")]
    done = subprocess.run(
        command,
        cwd=elsewhere,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "MDPROOF_STRICT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (sample.root / "site/page/index.html").read_text(encoding="utf-8")
    assert states(text) == ["verified"]
