"""Numbers, labels and references of equations, over all pages and all sources of a site."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from markdown import Markdown

from mdproof import equations
from mdproof.errors import PageError
from mdproof.site import load_site

DPO = r"""---
title: DPO：把奖励模型藏进语言模型
---
# DPO

```text
$$
\label{eq:in-a-fence}
$$
```

<!--
$$ \label{eq:in-a-comment} $$
-->

$$
a \label{eq:dpo-first}
$$

$$
passing
$$

- 项

    $$
    b
    \label{eq:dpo-loss}
    $$

> $$ c \label{eq:dpo-quote} $$

式 (eq:dpo-loss) 来自式 (eq:rlhf-kl)。
"""
RLHF = r"""# 从人类反馈中学习的强化学习方法

$$
d
\label{eq:rlhf-kl}
$$
"""
CODE = '''r"""About (eq:rlhf-kl)."""


def dpo_loss(x):
    r"""Return Eq. (eq:dpo-loss)."""
    text = "(eq:only-a-string)"
    return text  # (eq:dpo-loss)


class Trainer:
    def __init__(self):
        pass  # (eq:dpo-loss)


def _helper():
    # (eq:dpo-first)
    ...
'''
TESTS = '''def test_one():
    assert True  # (eq:dpo-loss)


def test_two():
    """Two cites (eq:dpo-first)."""


def test_three():
    """Three cites (eq:dpo-first)."""
'''


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    write(
        tmp_path,
        {
            "mkdocs.yml": "site_name: x\ntheme: {language: zh}\n",
            "pyproject.toml": '[tool.mdproof]\nsource = ["src"]\npackages = ["shop"]\n',
            "docs/large-models/dpo.md": DPO,
            "docs/large-models/rlhf.md": RLHF,
            "src/shop/__init__.py": "",
            "src/shop/large_models/__init__.py": "",
            "src/shop/large_models/dpo.py": CODE,
            "tests/large_models/test_dpo.py": TESTS,
        },
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(root: Path, text: str, page: str) -> str:
    write(root, {f"docs/{page}": text})
    extensions = ["tables", "toc", "pymdownx.superfences", "pymdownx.highlight", "mdproof.maths"]
    md = Markdown(extensions=extensions)
    md.mdproof_page = page
    return md.convert(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))


def links(text: str) -> list[tuple[str, str]]:
    return re.findall(r'<a class="mdproof-eqref" href="([^"]*)"[^>]*>([^<]*)</a>', text)


def test_equations_are_numbered_in_order_of_appearance(root):
    known = equations.read_registry(load_site())
    found = {key: (one.number, one.line, one.anchor) for (_, key), one in known.equations.items()}
    assert found == {
        "eq:dpo-first": (1, 17, "eq-dpo-first"),
        "eq:dpo-loss": (2, 28, "eq-dpo-loss"),
        "eq:dpo-quote": (3, 31, "eq-dpo-quote"),
        "eq:rlhf-kl": (1, 5, "eq-rlhf-kl"),
    }


def test_the_page_shows_the_numbers_of_the_registry(root):
    done = convert(root, DPO, "large-models/dpo.md")
    shown = re.findall(
        r'id="(eq-[^"]+)".*?mdproof-eq__number" href="#\1">\((\d)\)', done, re.DOTALL
    )
    assert shown == [("eq-dpo-first", "1"), ("eq-dpo-loss", "2"), ("eq-dpo-quote", "3")]
    assert r"\label{eq:dpo" not in done


def test_a_reference_is_a_number_here_and_names_the_room_elsewhere(root):
    done = convert(root, DPO, "large-models/dpo.md")
    assert links(done) == [("#eq-dpo-loss", "(2)"), ("rlhf.md#eq-rlhf-kl", "(rlhf 1)")]
    done = convert(root, "见式 (eq:dpo-loss)。", "python/other.md")
    assert links(done) == [("../large-models/dpo.md#eq-dpo-loss", "(DPO 2)")]


@pytest.mark.parametrize(
    "text",
    ["(eq:dpo-loss)", "- (eq:dpo-loss)", "| (eq:dpo-loss) |\n| --- |\n| x |", "**(eq:dpo-loss)**"],
)
def test_a_reference_may_stand_anywhere_in_prose(root, text):
    assert len(links(convert(root, text, "other.md"))) == 1


def test_in_code_only_comments_and_docstrings_refer(root):
    text = '''\
        ```python
        def f():
            """Cites (eq:dpo-loss)."""
            g("(eq:nothing)")  # (eq:dpo-first)
        ```

        ```text
        (eq:nothing)
        ```

        `(eq:nothing)`
        '''
    done = convert(root, textwrap.dedent(text), "other.md")
    assert [shown for _, shown in links(done)] == ["(DPO 2)", "(DPO 1)"]
    assert done.count("(eq:nothing)") == 3


def test_attributes_scripts_and_recorded_output_are_left_alone():
    known = equations.Registry(None)
    for text in (
        '<button data-copy="# (eq:a) > &lt;">x</button>',
        "<input value='(eq:a)'>",
        "<script>s = '<b>(eq:a)</b>'</script>",
        "<!-- (eq:a) -->",
        '<div class="x mdproof-output"><pre><i class="c1">(eq:a)</i></pre><p>(eq:a)</p></div>',
        "<p><code>(eq:a)</code></p>",
    ):
        assert equations.link_references(text, known, "p.md", str, ValueError) == text
    for text in (
        '<div class="mdproof-output"><br><p>x</p></div>(eq:a)',
        "<pre>x</pre><p>a<br>b</p> (eq:a)",
        '<pre><span></span><code><span class="c1"># (eq:a)</span></code></pre>',
    ):
        with pytest.raises(ValueError, match=r"^eq:a$"):
            equations.link_references(text, known, "p.md", str, ValueError)


def test_no_link_stands_in_a_link(root):
    done = convert(root, "[看式 (eq:dpo-loss)](x.md)", "other.md")
    assert 'href="x.md">看式 (DPO 2)</a>' in done


def test_beside_an_equation_stand_its_functions_and_tests(root):
    done = convert(root, DPO, "large-models/dpo.md")
    first, loss = re.findall(r'<div class="mdproof-eq__code"[^>]*>(.*?)</div>', done)
    target = "../reference/large-models/dpo.md#shop.large_models.dpo"
    assert loss == (
        f'<span>实现：<a href="{target}.dpo_loss" title="src/shop/large_models/dpo.py:5">'
        "<code>dpo_loss</code></a>、"
        f'<a href="{target}.Trainer" title="src/shop/large_models/dpo.py:12">'
        "<code>Trainer</code></a></span>"
        '<span>测试：<span title="tests/large_models/test_dpo.py:2">'
        "<code>test_one</code></span></span>"
    )
    assert re.sub("<[^>]+>", "", first) == "实现：_helper测试：test_dpo.py 中的 2 项"
    assert "href" not in first


def test_a_test_of_a_room_leads_to_where_the_reference_lists_it(root):
    write(root, {"docs/reference/large-models/dpo.md": "# x\n\n## 出现在 {#used-by}\n"})
    done = convert(root, DPO, "large-models/dpo.md")
    first, loss = re.findall(r'<div class="mdproof-eq__code"[^>]*>(.*?)</div>', done)
    target = '<a href="../reference/large-models/dpo.md#used-by" title="tests/large_models/test_dpo'
    assert loss.endswith(f'{target}.py:2"><code>test_one</code></a></span>')
    assert f'{target}.py:6"><code>test_dpo.py</code></a> 中的 2 项' in first


def test_a_module_that_cites_an_equation_in_its_docstring_is_named(root):
    done = convert(root, RLHF, "large-models/rlhf.md")
    assert 'dpo.md#shop.large_models.dpo" title="src/shop/large_models/dpo.py:1"' in done


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (
            {"docs/b.md": "x\n\n式 (eq:dpo-los)"},
            "docs/b.md:3: no equation is labelled eq:dpo-los; did you mean eq:dpo-loss?",
        ),
        (
            {"docs/b.md": "x\n\n```python\n# (eq:zzz)\n```\n"},
            "docs/b.md:4: no equation is labelled eq:zzz",
        ),
        (
            {"docs/b.md": "$$\n\\label{eq:rlhf-kl}\n$$"},
            "docs/large-models/rlhf.md:5: the label eq:rlhf-kl is already used at docs/b.md:2",
        ),
        (
            {"docs/b.md": "$$\na \\label{loss}\n$$"},
            "docs/b.md:2: a label is written eq:name, not 'loss'",
        ),
        (
            {"docs/b.md": "x", "src/shop/new.py": "x = 1\n# (eq:zzz)\n"},
            "src/shop/new.py:2: no equation is labelled eq:zzz",
        ),
        (
            {"docs/b.md": "x", "tests/test_new.py": 'def test_x():\n    """Of (eq:zzz)."""\n'},
            "tests/test_new.py:2: no equation is labelled eq:zzz",
        ),
        (
            {"docs/b.md": "x", "examples/run.py": "x = 1\n\n# (eq:zzz)\n"},
            "examples/run.py:3: no equation is labelled eq:zzz",
        ),
    ],
)
def test_a_label_that_is_unknown_or_used_twice_is_an_error_with_its_place(root, files, error):
    write(root, files)
    with pytest.raises(PageError) as caught:
        convert(root, files["docs/b.md"] + "\n\n(eq:dpo-first)", "b.md")
    assert str(caught.value) == error


def test_an_edited_page_is_read_again(root):
    assert 'id="eq-dpo-quote"' in convert(root, DPO, "large-models/dpo.md")
    edited = DPO.replace("dpo-quote", "dpo-new-name")
    assert 'id="eq-dpo-new-name"' in convert(root, edited, "large-models/dpo.md")


def test_a_translation_shares_the_labels(root):
    convert(root, DPO, "large-models/dpo.en.md")
    write(root, {"docs/large-models/dpo.en.md": DPO.replace("把奖励模型藏进语言模型", "")})
    known = equations.read_registry(load_site())
    assert known.find("eq:dpo-loss", "large-models/dpo.md").page == "large-models/dpo.md"
    assert known.find("eq:dpo-loss", "x.en.md").page == "large-models/dpo.en.md"
    assert known.find("eq:rlhf-kl", "x.en.md").page == "large-models/rlhf.md"


def test_a_line_is_found_through_indents_and_quotes(root):
    write(root, {"docs/b.md": "x\n\n> $$\n> a +\n> b\n> $$\n"})
    site = load_site()
    assert equations.locate(site, "b.md", "a +\nb") == ("docs/b.md", 4)
    assert equations.locate(site, "b.md", "a +\nb", 4) == ("docs/b.md", 5)
    assert equations.locate(site, "b.md", "Return Eq.") == ("src/shop/large_models/dpo.py", 5)
    assert equations.locate(site, "b.md", "nowhere") == ("docs/b.md", 1)


MKDOCS = """\
site_name: x
theme: {name: material, language: zh, font: false}
plugins: []
markdown_extensions: [pymdownx.highlight, pymdownx.superfences, mdproof.maths]
"""


def build(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        timeout=120,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


BUILDERS = {"mkdocs": ["mkdocs", "build", "-q"], "zensical": ["zensical", "build", "-c"]}


@pytest.mark.parametrize("builder", BUILDERS)
def test_both_builders_link_alike(root, builder):
    pytest.importorskip(builder)
    write(root, {"mkdocs.yml": MKDOCS, "docs/index.md": "# 首页\n\n式 (eq:dpo-loss)。\n"})
    done = build(root, *BUILDERS[builder])
    assert done.returncode == 0, done.stdout
    home = (root / "site" / "index.html").read_text()
    assert links(home) == [("large-models/dpo/#eq-dpo-loss", "(DPO 2)")]
    page = (root / "site" / "large-models" / "dpo" / "index.html").read_text()
    assert links(page) == [("#eq-dpo-loss", "(2)"), ("../rlhf/#eq-rlhf-kl", "(rlhf 1)")]
    assert 'href="../../reference/large-models/dpo/#shop.large_models.dpo.dpo_loss"' in page


@pytest.mark.parametrize("builder", BUILDERS)
def test_both_builders_stop_with_the_line(root, builder):
    pytest.importorskip(builder)
    write(root, {"mkdocs.yml": MKDOCS, "docs/index.md": "# 首页\n\n$\\foo$\n"})
    done = build(root, *BUILDERS[builder])
    assert done.returncode == 1
    assert "docs/index.md:3: KaTeX: Undefined control sequence: \\foo\n" in done.stdout
    if builder == "mkdocs":
        assert "Traceback" not in done.stdout
