"""What the reference says of tests: read from their imports, and true when they are run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdproof import exercised, overview
from mdproof.exercised import Evidence
from mdproof.reference import read_module
from mdproof.site import Site, load_site

ROOT = Path(__file__).parents[2]

MODULE = '"""M."""\n\n\ndef one():\n    pass\n\n\ndef two():\n    pass\n\n\nclass Box:\n    pass\n'

TESTS = '''\
import pytest
import pack.m
import pack.m as m
from pack.m import one, two as second
from tests.helping import helped, LIMIT
from tests import helping


def helper():
    return one()


@pytest.fixture
def box():
    return pack.m.Box()


class Holder:
    def go(self):
        return second()


def test_by_name():
    """Of (eq:a-b)."""
    one()  # and of (eq:c)


def test_by_alias(): second()


def test_by_module(): m.one(), pack.m.two()


def test_by_helper(): helper()


def test_by_class(): Holder().go()


def test_by_fixture(box): pass


def test_by_fixture_of_the_folder(boxes): pass


@pytest.mark.usefixtures("boxes")
def test_by_a_mark(): pass


@pytest.mark.parametrize("f", [one, second])
def test_by_parameter(f): f()


def test_by_another_file(): helped()


def test_by_another_files_constant(): print(LIMIT)


def test_by_another_file_as_module(): helping.helped()


def test_by_its_own_import():
    from pack.m import Box
    Box()


def test_a_local_of_the_same_name(one): print("one", "pack.m.one")


def test_another_local():
    m = one = 3
    print(m, one)


def test_a_string(): print("one()", dict(one=1, second=2))


class TestInside:
    def test_method(self):
        one()

    def test_other(self): pass
'''


@pytest.fixture
def site(tmp_path: Path) -> Site:
    files = {
        "mkdocs.yml": "site_name: x\ntheme: {name: material}\n",
        "pyproject.toml": '[tool.mdproof]\nsource = ["src"]\npackages = ["pack"]\n',
        "docs/index.md": "# x\n",
        "src/pack/__init__.py": "",
        "src/pack/m.py": MODULE,
        "tests/helping.py": "from pack.m import two\nLIMIT = two\ndef helped():\n    two()\n",
        "tests/conftest.py": "from pack.m import Box\n\n\ndef boxes():\n    return [Box()]\n",
        "tests/a/test_m.py": TESTS,
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return load_site(tmp_path)


def test_imports_helpers_and_fixtures_are_followed_and_locals_are_not(site: Site) -> None:
    found = overview.tests_using(site, "pack.m")
    names = {
        owner.rpartition(".")[2]: {
            t.name.removeprefix("test_by_") for t in files["tests/a/test_m.py"]
        }
        for owner, files in found.items()
    }
    assert names == {
        "one": {"name", "module", "helper", "parameter", "test_method"},
        "two": {
            "alias", "module", "class", "parameter", "another_file", "another_files_constant",
            "another_file_as_module",
        },
        "Box": {"fixture", "fixture_of_the_folder", "a_mark", "its_own_import"},
    }  # fmt: skip


def test_the_equations_that_a_test_cites_are_known(site: Site) -> None:
    tests = {test.name: test for test in exercised.tests_in(site, site.root / "tests/a/test_m.py")}
    assert tests["test_by_name"].equations == ("eq:a-b", "eq:c")
    assert tests["test_by_alias"].equations == ()


def test_an_edited_file_is_read_again(site: Site) -> None:
    file = site.root / "tests/a/test_m.py"
    assert len(exercised.tests_in(site, file)) == 18
    file.write_text("def test_one():\n    pass\n", encoding="utf-8")
    assert exercised.tests_in(site, file) == [Evidence("test_one", frozenset(), ())]


def test_the_index_of_tests_follows_every_file_that_it_was_made_of(site: Site) -> None:
    def files(owner: str) -> set[str]:
        return set(overview.tests_using(site, "pack.m").get(f"pack.m.{owner}", {}))

    assert files("two") == {"tests/a/test_m.py"}
    helping = site.root / "tests/helping.py"
    helping.write_text("LIMIT = 3\ndef helped():\n    pass\n", encoding="utf-8")
    names = overview.tests_using(site, "pack.m")["pack.m.two"]["tests/a/test_m.py"]
    assert "test_by_another_file" not in {test.name for test in names}
    new = site.root / "tests/test_new.py"
    new.write_text("from pack.m import two\ndef test_two():\n    two()\n", encoding="utf-8")
    assert files("two") == {"tests/a/test_m.py", "tests/test_new.py"}
    new.unlink()
    assert files("two") == {"tests/a/test_m.py"}
    top = site.root / "conftest.py"
    (site.root / "tests/conftest.py").unlink()
    assert files("Box") == {"tests/a/test_m.py"}  # what imports it by itself
    before = len(overview.tests_using(site, "pack.m")["pack.m.Box"]["tests/a/test_m.py"])
    top.write_text("from pack.m import Box\n\n\ndef boxes():\n    return [Box()]\n", "utf-8")
    after = overview.tests_using(site, "pack.m")["pack.m.Box"]["tests/a/test_m.py"]
    assert len(after) > before


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        # Not test_ddp: what it uses runs in forked processes, which the profiler does not follow.
        (
            "tests/python/test_autograd.py",
            "tests/python/test_dual_numbers.py",
            "tests/reinforcement_learning/test_rl_basics.py",
            "tests/reinforcement_learning/test_grid_world.py",
            "tests/deep_learning/test_adamw.py",
        ),
        ("tests/large_models/test_dpo.py", "tests/large_models/test_attention.py"),
    ],
)
def test_what_a_test_is_said_to_use_it_runs(files: tuple[str, ...], tmp_path: Path) -> None:
    """Run tests under a profiler: no claim of the reference is one of names alone."""
    record = tmp_path / "ran.json"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"MDPROOF_RECORD": str(record), "PYTHONPATH": paths}
    options = ["-q", "-p", "tests.mdproof.recorder", "-p", "no:cacheprovider", "-m", "not gpu"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    ran = json.loads(record.read_text(encoding="utf-8"))
    site = load_site(ROOT)
    wrong, claims = [], 0
    for module in sorted((ROOT / "src/zhizhi").rglob("*.py")):
        dotted = ".".join(module.relative_to(ROOT / "src").with_suffix("").parts)
        definitions = read_module(module).definitions
        for owner, by_file in overview.tests_using(site, dotted).items():
            kind = definitions.get(owner.removeprefix(f"{dotted}."))
            if kind is None or kind.kind not in ("function", "class"):
                continue
            for file, tests in by_file.items():
                for test in tests:
                    calls = ran.get(f"{file}::{test.name}")
                    if calls is None:
                        continue
                    claims += 1
                    if not any(c == owner or c.startswith(f"{owner}.") for c in calls):
                        wrong.append(f"{file}::{test.name} does not run {owner}")
    assert claims > 20
    assert wrong == []
