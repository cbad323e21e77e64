"""Editing one function makes stale what entered it, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.mdproof.conftest import Sample

from mdproof.proof import load_proof, staleness
from mdproof.reach import MARK, watched
from mdproof.skeleton import read_skeleton

MODULE = '''\
"""A module."""

import functools

FACTOR = 3


def used(x, scale=2):
    """Docstring."""
    return helper(x) * scale  # a comment


def helper(x):
    return x + FACTOR


def unused(x):
    return x - 1


class Shape:
    sides = 4

    def __init__(self, side):
        self.side = side

    @property
    def area(self):
        return self.side**2

    def perimeter(self):
        return self.sides * self.side

    def unused(self):
        return None


class Named(Shape):
    def __init_subclass__(cls):
        cls.name = "given"


def squares(n):
    for i in range(n):
        yield i * i


@functools.cache
def cached(x):
    return x + 100


def outer(x):
    def inner(y):
        return y * 10

    return (lambda z: inner(z) + 1)(x)


def lazily():
    from sample import later

    return later.value()


def by_name(name):
    import importlib

    return importlib.import_module(name).value()
'''

LATER = "def value():\n    return 7\n\n\ndef other():\n    return 8\n"


def prepare(sample: Sample, code: str, module: str = MODULE) -> None:
    """Prove a page of two blocks, the first of which imports the module only."""
    (sample.root / "src/sample/things.py").write_text(module, encoding="utf-8")
    (sample.root / "src/sample/later.py").write_text(LATER, encoding="utf-8")
    page = f"```python\nfrom sample import things\n```\n\n```python\n{code}\n```\n"
    updated = sample.prove(page)
    assert not updated.failures, updated.failures


def stale(sample: Sample) -> list[bool]:
    """Tell for each block whether it is stale now, by a process that has cached nothing."""
    blocks = sample.collect_written().blocks
    return [
        bool(reason)
        for reason in staleness(sample.site, blocks, load_proof(sample.site, "page.md"))
    ]


def edit(sample: Sample, old: str, new: str, file: str = "things.py") -> None:
    path = sample.root / "src/sample" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands there {text.count(old)} times"
    path.write_text(text.replace(old, new), encoding="utf-8")


CODE = "print(things.used(1), things.Shape(2).area, list(things.squares(3)))"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("helper(x) * scale", "helper(x) + scale"),
        ("x + FACTOR", "x - FACTOR"),
        ("self.side = side", "self.side = -side"),
        ("self.side**2", "self.side**3"),
        ("yield i * i", "yield i"),
    ],
    ids=["called", "called by what is called", "constructor", "property", "generator"],
)
def test_the_body_of_an_entered_function_makes_stale_the_block_that_entered_it(
    sample: Sample, old: str, new: str
) -> None:
    prepare(sample, CODE)
    edit(sample, old, new)
    assert stale(sample) == [False, True]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return x - 1", "return x - 2"),
        ("self.sides * self.side", "0"),
        ("return None", "return 1"),
        ("x + 100", "x + 101"),
        ("y * 10", "y * 11"),
        ("cls.name = ", "cls.title = "),
    ],
    ids=["function", "method", "same name as a method", "cached", "nested", "hook"],
)
def test_the_body_of_a_function_that_is_not_entered_makes_nothing_stale(
    sample: Sample, old: str, new: str
) -> None:
    prepare(sample, CODE)
    edit(sample, old, new)
    assert stale(sample) == [False, False]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a comment", "# another"),
        ('"""Docstring."""', '"""Other words."""'),
        ("FACTOR = 3", "FACTOR  =  3"),
    ],
    ids=["comment", "docstring", "layout"],
)
def test_what_is_no_code_makes_nothing_stale(sample: Sample, old: str, new: str) -> None:
    prepare(sample, CODE)
    edit(sample, old, new)
    assert stale(sample) == [False, False]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FACTOR = 3", "FACTOR = 4"),
        ("scale=2", "scale=3"),
        ("sides = 4", "sides = 5"),
        ("def unused(self):", "def renamed(self):"),
        ("class Named(Shape):", "class Named:"),
        ("@functools.cache\n", ""),
        ("    def perimeter", "    def __len__(self):\n        return 1\n\n    def perimeter"),
    ],
    ids=["constant", "default", "attribute", "name", "base", "decorator", "new method"],
)
def test_what_an_import_runs_makes_every_block_stale(sample: Sample, old: str, new: str) -> None:
    prepare(sample, CODE)
    edit(sample, old, new)
    assert stale(sample) == [True, True]


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        ("print(things.outer(1))", "y * 10", "y * 11"),
        ("print(things.cached(1))", "x + 100", "x + 101"),
        ("class Own(things.Named):\n    pass\nprint(Own.name)", '"given"', '"other"'),
        ("things.used = things.unused\nprint(things.used(1))", "return x - 1", "return x - 2"),
        (
            "import threading\nfound = []\n"
            "t = threading.Thread(target=lambda: found.append(things.unused(1)))\n"
            "t.start()\nt.join()\nprint(found)",
            "return x - 1",
            "return x - 2",
        ),
        (
            "import os\nr, w = os.pipe()\npid = os.fork()\nif pid == 0:\n"
            "    os.write(w, b'%d' % things.unused(4))\n    os._exit(0)\n"
            "done = os.waitpid(pid, 0)\nprint(os.read(r, 9))",
            "return x - 1",
            "return x - 2",
        ),
        (
            "import subprocess, sys\n"
            "program = 'from sample.things import unused; print(unused(4))'\n"
            "done = subprocess.run([sys.executable, '-c', program], capture_output=True)\n"
            "print(done.stdout)",
            "return x - 1",
            "return x - 2",
        ),
    ],
    ids=["nested", "cached", "hook", "patched", "thread", "fork", "Python"],
)
def test_however_a_function_is_entered_it_counts(
    sample: Sample, code: str, old: str, new: str
) -> None:
    prepare(sample, code)
    edit(sample, old, new)
    assert stale(sample) == [False, True]


@pytest.mark.parametrize(
    "code", ["print(things.lazily())", "print(things.by_name('sample.later'))"]
)
def test_a_module_that_is_imported_late_counts_from_then_on(sample: Sample, code: str) -> None:
    prepare(sample, code)
    edit(sample, "return 8", "return 9", "later.py")
    assert stale(sample) == [False, False]
    edit(sample, "return 7", "return 70", "later.py")
    assert stale(sample) == [False, True]


def test_star_imports_and_packages_that_import_their_modules_count(sample: Sample) -> None:
    (sample.root / "src/sample/__init__.py").write_text("from sample.things import *\n")
    prepare(sample, "from sample import *\nprint(used(1))")
    edit(sample, "x + FACTOR", "x - FACTOR")
    assert stale(sample) == [False, True]
    edit(sample, "x - FACTOR", "x + FACTOR")
    (sample.root / "src/sample/__init__.py").write_text("from sample.things import used\n")
    assert stale(sample) == [True, True]


def test_a_decorator_that_may_read_the_body_makes_it_part_of_the_import(sample: Sample) -> None:
    module = (
        "import inspect\n\n\ndef reads(f):\n    f.text = inspect.getsource(f)\n    return f\n\n\n"
        "@reads\ndef kernel():\n    return 1\n"
    )
    prepare(sample, "print(len(things.kernel.text))", module)
    edit(sample, "return 1", "return 10")
    assert stale(sample) == [True, True]


def test_a_page_that_reads_source_text_depends_on_every_character(sample: Sample) -> None:
    prepare(sample, "import inspect\nprint(inspect.getsource(things.unused))")
    edit(sample, "return x - 1", "return x - 1  # said")
    assert stale(sample)[1]


def test_a_module_that_was_not_watched_counts_whole(sample: Sample) -> None:
    text = (sample.root / "pyproject.toml").read_text(encoding="utf-8")
    (sample.root / "src/sample/things.py").write_text(MODULE, encoding="utf-8")
    (sample.root / "pyproject.toml").write_text(
        text + 'preload = ["sample.things"]\n', encoding="utf-8"
    )
    prepare(sample, CODE)
    edit(sample, "return x - 1", "return x - 2")
    assert stale(sample) == [True, True]


@pytest.mark.parametrize(
    "code",
    [
        "from pathlib import Path\nprint(Path('{data}').read_text())",
        "import os\npid = os.fork()\nif pid == 0:\n    open('{data}').read()\n    os._exit(0)\n"
        "print(os.waitpid(pid, 0)[1])",
        "import subprocess, sys\nprogram = \"open('{data}').read()\"\n"
        "print(subprocess.run([sys.executable, '-c', program]).returncode)",
    ],
    ids=["page", "fork", "Python"],
)
def test_data_files_count_whoever_reads_them(sample: Sample, code: str) -> None:
    data = sample.root / "data.txt"
    data.write_text("one", encoding="utf-8")
    prepare(sample, code.format(data=data))
    data.write_text("two", encoding="utf-8")
    assert stale(sample) == [False, True]


def test_a_source_fence_depends_on_what_it_shows_and_what_that_needs(sample: Sample) -> None:
    (sample.root / "src/sample/things.py").write_text(MODULE, encoding="utf-8")
    updated = sample.prove('```python source="sample.things.used"\n```\n')
    assert not updated.failures
    edit(sample, "x - 1", "x - 2")
    assert stale(sample) == [False]
    edit(sample, "x + FACTOR", "x - FACTOR")
    assert stale(sample) == [True]


def test_a_proof_lists_what_was_entered_block_by_block(sample: Sample) -> None:
    prepare(sample, "print(things.used(1))")
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    assert [record["entered"] for record in proof.blocks] == [
        [],
        ["sample.things:helper", "sample.things:used"],
    ]


def test_a_forged_list_of_functions_is_found_by_running_the_page(sample: Sample) -> None:
    from mdproof.proof import save_proof
    from mdproof.prove import check_block

    prepare(sample, "print(things.used(1))")
    proof = load_proof(sample.site, "page.md")
    assert proof is not None
    proof.blocks[1]["entered"] = ["sample.things:used"]
    from mdproof.proof import block_key

    run = sample.open()
    proof.blocks[1]["key"] = block_key(
        sample.site,
        run.blocks,
        modules=proof.blocks[1]["modules"],
        entered=["sample.things:used"],
        files=[],
        libraries={},
    )
    save_proof(sample.site, proof)
    run = sample.open()
    assert run.stale == ["", ""]
    failure = check_block(run, run.blocks[1])
    assert failure is not None
    assert failure.message.startswith("the record's entered are not what the run showed")


# What is watched


def test_watching_keeps_lines_docstrings_signatures_and_source() -> None:
    namespace: dict[str, object] = {MARK: lambda name: None}
    code = (
        'def f(x, *, y=1):\n    """Doc."""\n    raise ValueError\n\n\ndef g():\n    "Only this."\n'
    )
    exec(watched(code, "module.py"), namespace)
    f, g = namespace["f"], namespace["g"]
    assert f.__doc__ == "Doc."  # type: ignore[attr-defined]
    assert g.__doc__ == "Only this."  # type: ignore[attr-defined]
    assert g() is None  # type: ignore[operator]
    with pytest.raises(ValueError) as raised:
        f(1)  # type: ignore[operator]
    assert raised.traceback[-1].lineno == 2  # counted from 0


def test_definitions_of_one_name_share_an_entry_and_both_count() -> None:
    def bodies(first: str, second: str) -> dict[str, str]:
        one, two = (f"    def f():\n        return {value}\n" for value in (first, second))
        return read_skeleton(f"if x:\n{one}else:\n{two}").bodies

    assert set(bodies("1", "2")) == {"f"}
    assert len({bodies(a, b)["f"] for a, b in (("1", "2"), ("3", "2"), ("1", "3"))}) == 3


def test_the_frame_holds_everything_but_bodies() -> None:
    frames = {
        read_skeleton(code).frame
        for code in (
            "def f():\n    return 1",
            "def f(x):\n    return 1",
            "def f(x=1):\n    return 1",
            "@cache\ndef f(x=1):\n    return 1",
            "async def f():\n    return 1",
            "def f() -> int:\n    return 1",
            "g = lambda: 1",
            "g = lambda: 2",
        )
    }
    assert len(frames) == 8
    assert (
        read_skeleton("def f():\n    return 1").frame == read_skeleton("def f():\n    x = 2").frame
    )


def test_a_python_started_outside_of_a_page_is_not_watched(tmp_path: Path) -> None:
    hook = Path(sys.modules["mdproof.reach"].__file__ or "").parent / "child"
    own = tmp_path / "sitecustomize.py"
    own.write_text("print('own')\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.meta_path[0])"],
        env={"PYTHONPATH": f"{hook}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("own\n")
    assert "Recorder" not in done.stdout
