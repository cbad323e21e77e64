"""Names are found in sources without importing them, and errors say what there is."""

import sys
from pathlib import Path

import pytest

from mdproof.reference import (
    UnknownNameError,
    dotted_name,
    find_source,
    read_module,
    reference_target,
)
from mdproof.site import Site

SOURCE = '''"""A room."""

from dataclasses import dataclass
from elsewhere import helper

BETA = 0.1
"""How far the policy may go."""
_HIDDEN = 1
if True:
    LATE = 2

raise RuntimeError("this module must not be imported")


@dataclass
class Loss:
    """A class."""

    beta: float = 0.1

    @property
    def scale(self):
        r"""Read it.

        $$ x $$
        """
        return self.beta

    @scale.setter
    def scale(self, value):
        pass

    async def later(self): ...


@helper
@helper
def dpo_loss(
    x,
):
    # (eq:dpo-loss)
    return x


def _private(): ...
'''


@pytest.fixture
def site(tmp_path: Path) -> Site:
    wing = tmp_path / "src" / "shop" / "large_models"
    wing.mkdir(parents=True)
    (wing.parent / "__init__.py").write_text("")
    (wing / "__init__.py").write_text('"""A wing."""\n')
    (wing / "dpo_loss.py").write_text(SOURCE)
    (wing / "rl_basics.py").write_text("")
    (tmp_path / "src" / "tool.py").write_text("def main(): ...\n")
    return Site(
        tmp_path, tmp_path / "docs", source=(tmp_path / "src",), packages=("shop",), language="zh"
    )


ROOM = "shop.large_models.dpo_loss"


def test_a_function_starts_at_its_first_decorator(site):
    source = find_source(f"{ROOM}.dpo_loss", site)
    assert source.kind == "function"
    assert source.text.startswith("@helper\n@helper\ndef dpo_loss(")
    assert source.text.endswith("    return x\n")
    lines = source.file.read_text().splitlines(keepends=True)
    assert "".join(lines[source.first_line - 1 : source.last_line]) == source.text
    assert source.docstring_span is None


def test_nothing_is_imported(site):
    find_source(f"{ROOM}.dpo_loss", site)
    assert not any(name.startswith("shop") for name in sys.modules)


@pytest.mark.parametrize(
    ("name", "kind", "start", "documented"),
    [
        ("", "module", '"""A room."""', True),
        (".BETA", "constant", "BETA = 0.1", True),
        (".LATE", "constant", "    LATE = 2", False),
        (".Loss", "class", "@dataclass\nclass Loss", True),
        (".Loss.beta", "constant", "    beta: float", False),
        (".Loss.scale", "method", "    @property\n    def scale(self)", True),
        (".Loss.later", "method", "    async def later", False),
    ],
)
def test_every_kind_is_found(site, name, kind, start, documented):
    source = find_source(ROOM + name, site)
    assert source.kind == kind
    assert source.text.startswith(start)
    assert (source.docstring_span is not None) == documented


def test_the_span_of_a_docstring_is_counted_in_the_file(site):
    source = find_source(f"{ROOM}.Loss.scale", site)
    lines = source.file.read_text().splitlines()
    first, last = source.docstring_span
    assert lines[first - 1].strip() == 'r"""Read it.'
    assert lines[last - 1].strip() == '"""'


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{ROOM}.dpo_los", f"{ROOM} has no dpo_los; did you mean dpo_loss? {ROOM} has: BETA"),
        (f"{ROOM}.Loss.gamma", f"{ROOM}.Loss has no gamma; {ROOM}.Loss has: beta, scale, later"),
        (f"{ROOM}.helper", f"{ROOM} only imports helper: write elsewhere.helper"),
        ("shop.large_models.ppo.loss", "no module shop.large_models.ppo; shop.large_models has"),
        ("shopping.x", "no module shopping; did you mean shop? the repository has: shop, tool"),
    ],
)
def test_an_unknown_name_says_what_there_is(site, name, message):
    with pytest.raises(UnknownNameError) as caught:
        find_source(name, site)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_reference_page_of_a_public_name(site):
    page = "reference/large-models/dpo-loss.md"
    assert reference_target(f"{ROOM}.dpo_loss", site) == f"{page}#{ROOM}.dpo_loss"
    assert reference_target(f"{ROOM}.Loss.scale", site) == f"{page}#{ROOM}.Loss.scale"
    assert reference_target(ROOM, site) == f"{page}#{ROOM}"


@pytest.mark.parametrize(
    "name",
    [f"{ROOM}._private", f"{ROOM}.nothing", f"{ROOM}.helper", "shop", "tool.main", "os.path"],
)
def test_what_is_private_or_absent_or_foreign_has_no_page(site, name):
    assert reference_target(name, site) is None


def test_an_edited_file_is_read_again(site):
    file = site.source[0] / "shop" / "large_models" / "rl_basics.py"
    with pytest.raises(UnknownNameError):
        find_source("shop.large_models.rl_basics.new", site)
    file.write_text("def new(): ...\n")
    assert find_source("shop.large_models.rl_basics.new", site).kind == "function"


def test_a_line_belongs_to_the_innermost_definition(site):
    file = site.source[0] / "shop" / "large_models" / "dpo_loss.py"
    module = read_module(file)
    line = 1 + file.read_text().splitlines().index("    # (eq:dpo-loss)")
    assert module.enclosing(line).name == "dpo_loss"
    assert module.enclosing(1) is None
    assert dotted_name(file, site) == ROOM
