"""The search worker's script in an embedded engine, with the index read from a folder."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

from py_mini_racer import MiniRacer

from mdproof.installing import asset

OUTSIDE = """\
const self = {location: {href: "https://example.org/assets/javascripts/workers/search.js"}};
const addEventListener = () => {};
const FILES = {};
let asked = [];
const disk = async (name) => {
  asked.push(name);
  if (!(name in FILES)) throw new Error("no file " + name);
  return JSON.parse(FILES[name]);
};
"""


class Worker:
    """The worker's functions, called from Python."""

    def __init__(self) -> None:
        self.engine = MiniRacer()
        self.engine.eval(OUTSIDE)
        self.engine.eval(asset("search-worker.js").read_text(encoding="utf-8"))

    def call(self, expression: str) -> Any:
        """Return the value of an expression, by JSON; a promise is waited for."""
        promise = self.engine.eval(f"(async () => JSON.stringify(await ({expression})))()")
        return json.loads(promise.get(timeout=60))

    def open(self, folder: Path) -> None:
        """Give the worker the index of a folder."""
        for file in folder.rglob("*.json"):
            name = json.dumps(file.relative_to(folder).as_posix())
            text = json.dumps(file.read_text(encoding="utf-8"))
            self.engine.eval(f"FILES[{name}] = {text}; 0")
        self.engine.eval("asked = []; index = new Index('', disk); 0")
        self.call("index.open().then(() => 0)")

    def pages(self, query: str) -> list[str]:
        """Return the addresses of the pages that answer a query, best first."""
        found = f"index.search({json.dumps(query)})"
        return self.call(
            f"{found}.then(({{ranked}}) => ranked.map(([page]) => index.pages[page][0]))"
        )

    def answer(self, query: str) -> list[list[dict[str, Any]]]:
        """Return what Material is told."""
        return self.call(f"index.answer({json.dumps(query)})")

    def cost(self, query: str, folder: Path) -> tuple[int, float]:
        """Return the gzipped bytes that a first query loads, and the seconds it takes."""
        self.engine.eval("asked = []; index = new Index('', disk); 0")
        begun = time.perf_counter()
        self.call(f"index.open().then(() => index.answer({json.dumps(query)})).then(() => 0)")
        seconds = time.perf_counter() - begun
        names = self.call("asked")
        return sum(len(gzip.compress((folder / name).read_bytes())) for name in names), seconds
