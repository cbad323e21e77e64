"""KaTeX in the embedded engine: what it sets, what it refuses, and what is kept."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mdproof import katex

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(katex, "_kept", {})


def test_a_formula_is_set_as_html_with_mathml_beside_it():
    text = katex.render(r"\bar\alpha_t")
    assert text.startswith('<span class="katex"><span class="katex-mathml"><math>')
    assert 'class="katex-html" aria-hidden="true"' in text
    assert "katex-display" not in text
    assert katex.render("x", display=True).startswith('<span class="katex-display">')


def test_the_source_of_a_formula_is_not_in_the_page():
    assert "annotation" not in katex.render("a\n+ b")
    assert "semantics" not in katex.render("a + b")


@pytest.mark.parametrize(
    ("tex", "message", "position"),
    [
        (r"a + \foo", r"Undefined control sequence: \foo", 4),
        (r"\frac{a}", "Unexpected end of input in a macro argument, expected '}'", 8),
        ("a_b_c", "Double subscript", 3),
    ],
)
def test_a_mistake_raises_with_the_message_of_katex(tex, message, position):
    with pytest.raises(katex.TexError) as caught:
        katex.render(tex)
    assert str(caught.value) == message
    assert caught.value.position == position


def test_a_line_break_without_effect_is_a_mistake():
    with pytest.raises(katex.TexError, match="line break needs aligned"):
        katex.render(r"a \\ b", display=True)


def test_chinese_in_a_formula_is_none():
    assert "若" in katex.render(r"x \text{若} y 则")


def test_macros_are_given_and_are_part_of_the_key():
    assert katex.render(r"\E", macros={r"\E": "X"}) == katex.render("X")
    with pytest.raises(katex.TexError):
        katex.render(r"\E")


def test_what_is_on_the_disk_is_not_set_again(tmp_path, monkeypatch):
    first = katex.render("x^2", cache=tmp_path)
    (file,) = tmp_path.rglob("*.html")
    assert file.read_text() == first
    katex._kept.clear()
    monkeypatch.setattr(katex._engine, "call", lambda *_: pytest.fail("set again"))
    assert katex.render("x^2", cache=tmp_path) == first


def test_the_key_knows_display_macros_and_the_version(tmp_path, monkeypatch):
    katex.render("x", cache=tmp_path)
    katex.render("x", display=True, cache=tmp_path)
    katex.render("x", macros={r"\a": "b"}, cache=tmp_path)
    monkeypatch.setattr(katex, "version", lambda: "another")
    katex.render("x", cache=tmp_path)
    assert len(list(tmp_path.rglob("*.html"))) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "katex" in katex.render("x", cache=file)


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"\beta", "β"),
        (r"\pi_\theta(y\mid x)", "π_θ(y∣x)"),
        (r"\frac{\pi_\theta}{2}", "(π_θ)/2"),
        (r"\hat A_t", "A\u0302_t"),
        ("10^{-3}", "10^(−3)"),
        ("x' = W^\\top", "x′ = W⊤"),
        (r"\sqrt{2}\,\log x", "√2 log x"),
    ],
)
def test_a_formula_as_plain_text(tex, text):
    assert katex.plain(tex) == text


def test_no_line_begins_with_the_punctuation_behind_a_formula():
    rendered = katex.render(r"a = \sqrt{2}")
    joined = katex.joined(rendered, "，")
    assert '<span class="mdproof-joined"><span class="base">' in joined
    assert joined.replace('<span class="mdproof-joined">', "", 1).count("</span>") == (
        rendered.count("</span>") + 1
    )
    assert "\u2060</span></span></span>" in katex.joined(rendered, "；")
    assert katex.joined(rendered, "的") == katex.joined(rendered, "") == rendered


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(1)", "raise KeyError"])
def test_a_process_that_used_it_ends(end):
    code = f"from mdproof import katex; katex.render('x'); {end}"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, stderr=-3)
    assert done.returncode == (end != "pass")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_its_own_and_ends():
    code = """
import os
from mdproof import katex
katex.render("x")
child = os.fork()
if child == 0:
    katex.render("y")
else:
    assert os.waitpid(child, 0)[1] == 0
    katex.render("z")
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_importing_starts_nothing_and_needs_no_library_of_the_site():
    code = """
import sys
import mdproof.maths
heavy = {"py_mini_racer", "mkdocs", "torch", "zhizhi", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_style_is_of_the_version_of_the_script():
    script = katex.SCRIPT.read_text()
    style = (ROOT / "docs" / "assets" / "maths" / "maths.css").read_text()
    name = style.split("---- KaTeX ")[1].split(",")[0]
    assert f'version:"{name}"' in script or f'"{name}"' in script
    folder = ROOT / "docs" / "assets" / "maths" / "fonts"
    used = set(re.findall(r"url\(fonts/([^)]+)\)", style))
    assert used == {file.name for file in folder.glob("*.woff2")}
    assert (folder / "LICENSE").read_text() == (katex.SCRIPT.parent / "LICENSE").read_text()
