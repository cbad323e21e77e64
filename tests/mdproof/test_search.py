"""The index in shards, and the worker that answers from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mkdocs.exceptions import PluginError

from mdproof.search import (
    VERSION,
    SearchPlugin,
    plain,
    shard,
    weights,
    without_excluded,
    words,
    write,
)

from .search_worker import Worker

DOCS: list[dict[str, Any]] = [
    {
        "location": location,
        "title": title,
        "text": text,
        **({"tags": ["对齐"]} if location == "dpo/" else {}),
    }
    for location, title, text in [
        ("dpo/", "DPO：\u200b把\u200b奖励\u200b模型藏起来", "<p>偏好优化</p>"),
        ("dpo/#loss", "损失", "<p><code>dpo_loss</code> 是 <b>对偶</b> 的 a &lt; b</p>"),
        ("flash/", "FlashAttention", "<p>分块的 softmax，注意力矩阵不落显存。</p>"),
        ("flash/#online", "在线 softmax", "<p>" + "合并两块。" * 60 + "对数尺度</p>"),
        ("dual/", "对偶数", "<p>前向模式与 β 方向</p>"),
        ("empty/", "", ""),
    ]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of DOCS."""
    path = tmp_path_factory.mktemp("index")
    write(DOCS, path)
    return path


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    """The worker, with the index of DOCS."""
    worker = Worker()
    worker.open(folder)
    yield worker
    worker.engine.close()


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("注意力", [["注意", "意力"]]),
        ("熵，值", [["熵"], ["值"]]),
        ("grouped_query", [["grouped_query", "grouped", "query"]]),
        ("FlashAttention2", [["flashattention2", "flash", "attention", "2"]]),
        ("KV缓存", [["kv"], ["缓存"]]),
        ("log-sum-exp", [["log-sum-exp", "log", "sum", "exp"]]),
        ("β_1 = 0.9", [["β_1", "β", "1"], ["0.9", "0", "9"]]),
        ("（）《》 ", []),
    ],
)
def test_words_and_their_terms(text: str, terms: list[list[str]], worker: Worker) -> None:
    assert [found for _, found in words(text)] == terms
    assert [found for _, found in worker.call(f"words({json.dumps(text)})")] == terms


@given(st.text("aB9_-. 注意β，\u3400\u9fff😀ZZd:", max_size=30))
def test_query_and_index_are_split_alike(worker: Worker, text: str) -> None:
    expected = [[word, terms] for word, terms in words(text)]
    assert worker.call(f"words({json.dumps(text)})") == expected
    for _, terms in expected:
        for term in terms:
            assert worker.call(f"shardOf({json.dumps(term)}, 16)") == shard(term, 16)


def test_shards_are_fnv(worker: Worker) -> None:
    # FNV-1a of "a" and of "foobar", from the authors' list of test vectors
    assert shard("a", 1 << 32) == 0xE40C292C
    assert shard("foobar", 1 << 32) == 0xBF9CF968


def test_a_posting_is_read_back_as_it_was_weighed(folder: Path, worker: Worker) -> None:
    expected: dict[str, dict[int, int]] = {}
    seen: set[str] = set()
    for number, doc in enumerate(DOCS):
        page = doc["location"].partition("#")[0]
        found = weights(
            plain(doc["title"]), plain(doc["text"]), doc.get("tags", []), first=page not in seen
        )
        seen.add(page)
        for term, weight in found.items():
            expected.setdefault(term, {})[number] = weight
    for term, sections in expected.items():
        found = worker.call(f"index.find({json.dumps(term)}).then((map) => [...map])")
        numbers = [number for number, _ in found]
        assert numbers == sorted(sections)
        ratios = {value / sections[number] for number, value in found}
        assert max(ratios) == pytest.approx(min(ratios))  # the rarity, the same everywhere


def test_a_title_weighs_more_than_a_text_and_a_long_section_less() -> None:
    assert weights("奖励", "", [], first=True)["奖励"] > weights("", "奖励", [], first=True)["奖励"]
    inner, text = (weights(*both, [], first=False)["奖励"] for both in (("奖励", ""), ("", "奖励")))
    assert inner > text
    short, long = "奖励", "奖励" + "。值" * 400
    assert weights("", short, [], first=False)["奖励"] > weights("", long, [], first=False)["奖励"]
    assert weights("熵", "", [], first=True)["熵"] > 1
    half = weights("奖励", "", [], first=True, boost=0.5)["奖励"]
    assert half == pytest.approx(weights("奖励", "", [], first=True)["奖励"] / 2, abs=0.5)
    assert "熵" not in weights("", "交叉熵", [], first=True)
    assert all(1 <= w <= 63 for w in weights("熵" * 90, "值" * 9000, ["熵"], first=True).values())


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("奖励模型", "dpo/"),
        ("对偶数", "dual/"),
        ("对齐", "dpo/"),
        ("齐", "dpo/"),
        ("dpo", "dpo/"),
        ("loss", "dpo/"),
        ("dpo_los", "dpo/"),
        ("flash attention", "flash/"),
        ("flashattention", "flash/"),
        ("flashatention", "flash/"),
        ("flashatt", "flash/"),
        ("sofmtax", "flash/"),
        ("attn 注意力", "flash/"),
        ("β", "dual/"),
    ],
)
def test_the_page_that_is_meant_comes_first(worker: Worker, query: str, page: str) -> None:
    assert worker.pages(query)[0] == page


@pytest.mark.parametrize("query", ["", "，", "量子", "zzzzzz", "__proto__", "toString", "<b>"])
def test_no_answer_where_there_is_none(worker: Worker, query: str) -> None:
    assert [page for page in worker.pages(query) if page != "dpo/"] == []


def test_what_every_object_has_is_no_term(worker: Worker) -> None:
    assert worker.call("index.find('constructor').then((map) => [...map])") == []


def opened(tmp_path: Path, *pages: tuple[str, str, str]) -> Worker:
    """Return a worker with an index of pages: location, title, text."""
    write([dict(zip(("location", "title", "text"), page, strict=True)) for page in pages], tmp_path)
    worker = Worker()
    worker.open(tmp_path)
    return worker


def test_a_section_with_little_of_the_query_is_no_answer(worker: Worker) -> None:
    assert worker.pages("奖励甲乙丙丁戊己庚") == []


def test_all_words_in_a_text_beat_one_word_in_a_title(tmp_path: Path) -> None:
    long = "alpha beta " + "其余。" * 400
    worker = opened(tmp_path, ("title/", "alpha", ""), ("text/", "", long), ("other/", "", "beta"))
    assert worker.pages("alpha beta")[0] == "text/"


def test_a_rare_word_counts_more_than_a_common_one(tmp_path: Path) -> None:
    many = [(f"p{number}/", "", "common") for number in range(9)]
    worker = opened(tmp_path, ("usual/", "common", ""), *many, ("special/", "rare", ""))
    assert worker.pages("common rare")[0] == "special/"


def test_an_answer_is_sections_with_marked_excerpts(worker: Worker) -> None:
    [[section, page]] = worker.answer("dpo_loss")
    assert (section["location"], page["location"]) == ("dpo/#loss", "dpo/")
    assert "<mark data-md-highlight>dpo_loss</mark>" in section["text"]
    assert "a &lt; b" in section["text"]
    assert section["terms"] == {"dpo_loss": True}
    [[section, *_]] = worker.answer("对数尺度")
    assert section["text"].startswith("…")
    assert section["text"].endswith("<mark data-md-highlight>对数尺度</mark>")


def test_a_misspelt_word_marks_what_it_may_mean(worker: Worker) -> None:
    [[first, *_]] = worker.answer("flashatention")
    assert first["title"] == "<mark data-md-highlight>FlashAttention</mark>"
    assert first["terms"] == {"flashattention": True}


def test_what_the_section_lacks_is_said(worker: Worker) -> None:
    [[first, *_], *_] = worker.answer("FlashAttention 奖励")
    assert first["terms"] == {"FlashAttention": True, "奖励": False}


@pytest.mark.parametrize(
    ("a", "b", "far"),
    [("adamw", "adamw", 0), ("adamw", "admaw", 1), ("adam", "adamw", 1), ("ab", "cd", 2)],
)
def test_distance(worker: Worker, a: str, b: str, far: int) -> None:
    assert worker.call(f"distance({a!r}, {b!r})") == far


def test_a_file_that_failed_is_asked_for_again(folder: Path) -> None:
    worker = Worker()
    worker.open(folder)
    name = f"terms/{shard('奖励', worker.call('index.shards'))}.json"
    worker.engine.eval(f"const kept = FILES['{name}']; delete FILES['{name}']; 0")
    assert worker.call("index.search('奖励').catch((error) => String(error))").startswith("Error")
    worker.engine.eval(f"FILES['{name}'] = kept; 0")
    assert worker.pages("奖励") == ["dpo/"]


def site(tmp_path: Path) -> Path:
    """Write what Material writes, as far as the plugin reads it."""
    workers = tmp_path / "assets" / "javascripts" / "workers"
    workers.mkdir(parents=True)
    (workers / "search.0123abcd.min.js").write_text("material")
    (tmp_path / "search").mkdir()
    index = {"config": {"separator": " "}, "docs": DOCS}
    (tmp_path / "search" / "search_index.json").write_text(json.dumps(index))
    return tmp_path


def build(folder: Path) -> None:
    """Do what the plugin does when the site is built."""
    SearchPlugin().on_post_build(config=SimpleNamespace(site_dir=str(folder)))  # type: ignore


def test_the_plugin_replaces_index_and_worker(tmp_path: Path) -> None:
    build(site(tmp_path))
    left = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert left == {"config": {"separator": " "}, "docs": []}
    [worker] = (tmp_path / "assets" / "javascripts" / "workers").iterdir()
    assert "class Index" in worker.read_text()
    assert (tmp_path / "search" / VERSION / "pages.json").is_file()


@pytest.mark.parametrize(
    "missing",
    ["search/search_index.json", "assets/javascripts/workers/search.0123abcd.min.js"],
)
def test_without_materials_search_it_refuses(tmp_path: Path, missing: str) -> None:
    (site(tmp_path) / missing).unlink()
    with pytest.raises(PluginError, match="Material's search plugin"):
        build(tmp_path)
    assert not (tmp_path / "search" / VERSION).exists()


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("<p>a <span data-search-exclude>b</span> c</p>", "<p>a  c</p>"),
        ('<span class="k" data-search-exclude x="1">a<span>b</span>c</span>d', "d"),
        ("<div data-search-exclude><div>a</div><span>b</span></div><div>c</div>", "<div>c</div>"),
        ("<p data-search-exclude>a<pre>b</pre></p>c", "c"),
        ("<div data-search-exclude=''>never closed", ""),
        ("<p title='data-search-exclude'>a</p>", "<p title='data-search-exclude'>a</p>"),
        ("<p data-search-excluded>a</p>", "<p data-search-excluded>a</p>"),
    ],
)
def test_what_is_excluded_is_cut_to_its_own_end(content: str, kept: str) -> None:
    assert without_excluded(content) == kept
