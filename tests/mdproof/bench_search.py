"""Measure the search index at 60, 600 and 6,000 pages.

    mkdocs build -q -d SITE && python tests/mdproof/bench_search.py SITE [60 600 6000]

Pages are made from the site's own: each takes a page's sections and fills them with sentences of
the whole site, drawn at random, and with identifiers that no other page has. The golden queries are
then asked of the worker's script in an embedded engine, each with nothing loaded before. Printed:
the index on disk and Material's index of the same documents, both gzipped; what a query loads,
gzipped; its time (engine and disk, no network); and the seconds to write the index.
"""

import argparse
import gzip
import json
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.mdproof.search_worker import Worker

from mdproof.search import VERSION, write

QUERIES = Path(__file__).parents[1] / "site" / "queries.yml"
_SENTENCE = re.compile(r"[^。！？]+[。！？]?")


def documents(site: Path) -> list[list[list[str]]]:
    """Return the sections of each page of a built site: [anchor, title, text]."""
    folder = site / "search" / VERSION
    pages = json.loads((folder / "pages.json").read_text(encoding="utf-8"))["pages"]
    texts = [(folder / "text" / f"{number}.json") for number in range(len(pages))]
    return [json.loads(text.read_text(encoding="utf-8")) for text in texts]


def grown(pages: list[list[list[str]]], count: int) -> list[dict[str, Any]]:
    """Return Material's documents of `count` pages made from these."""
    chance = random.Random(count)
    sentences = [s for page in pages for _, _, text in page for s in _SENTENCE.findall(text)]
    docs = []
    for number in range(count):
        for position, (_, title, text) in enumerate(pages[number % len(pages)]):
            drawn = "".join(chance.choices(sentences, k=len(_SENTENCE.findall(text))))
            own = f" {title.split()[0] if title else 'x'}_{number}_{position % 4}"
            where = f"wing/page-{number}/" + (f"#s{position}" if position else "")
            docs.append({"location": where, "title": f"{title} {number}", "text": drawn + own})
    return docs


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("counts", nargs="*", type=int, default=[60, 600, 6000])
    options = parser.parse_args()
    pages = documents(options.site)
    queries = [case["query"] for case in yaml.safe_load(QUERIES.read_text(encoding="utf-8"))]
    for count in options.counts:
        docs = grown(pages, count)
        whole = len(gzip.compress(json.dumps({"docs": docs}, ensure_ascii=False).encode()))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            begun = time.perf_counter()
            write(docs, folder)
            seconds = time.perf_counter() - begun
            size = sum(len(gzip.compress(f.read_bytes())) for f in folder.rglob("*.json"))
            worker = Worker()
            worker.open(folder)
            costs = [worker.cost(query, folder) for query in queries]
            worker.engine.close()
            first = len(gzip.compress((folder / "pages.json").read_bytes()))
        loads = sorted(cost for cost, _ in costs)
        times = sorted(1000 * took for _, took in costs)
        most = round(0.95 * (len(costs) - 1))
        print(
            f"{count} pages, {len(docs)} sections: index {size / 1e6:.2f} MB in {seconds:.1f} s "
            f"(one file: {whole / 1e6:.2f} MB); to open {first / 1e3:.0f} kB; a first query loads "
            f"median {statistics.median(loads) / 1e3:.0f} kB, 95% {loads[most] / 1e3:.0f} kB, "
            f"takes median {statistics.median(times):.0f} ms, 95% {times[most]:.0f} ms"
        )


if __name__ == "__main__":
    main()
