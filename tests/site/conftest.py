"""Build the site once, serve it, and open it in Chromium; watch what it asks for and says."""

import contextlib
import fcntl
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FIELDS = {"title": {"boost": 1000.0}, "text": {"boost": 1.0}, "tags": {"boost": 1000000.0}}
NO_INDEX = {
    "config": {"lang": ["en"], "separator": " ", "pipeline": [], "fields": FIELDS},
    "docs": [],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.site)


def _cannot(reason: str) -> NoReturn:
    """Skip here, but fail where the checks must run."""
    if os.environ.get("CI", "") not in ("", "0", "false"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built strictly by MkDocs; once, also for several workers."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    site = folder / "site"
    with (folder / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (site / "index.html").is_file():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(site)]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                shutil.rmtree(site, ignore_errors=True)
                pytest.fail(f"the strict build failed:\n{done.stderr[-3000:]}", pytrace=False)
    return site


@pytest.fixture(scope="session")
def paths(built: Path) -> list[str]:
    """Every page of the site, as the path of its address."""
    found = (path.relative_to(built).as_posix() for path in built.rglob("index.html"))
    return sorted(path.removesuffix("index.html") for path in found)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        """Answer; in the site map, which instant navigation reads, the site has our port."""
        if self.path != "/sitemap.xml":
            return super().do_GET()
        text = Path(self.directory, "sitemap.xml").read_text(encoding="utf-8")
        here = f"<loc>http://{self.headers['Host']}/"
        body = re.sub(r"<loc>https?://[^/]+/", here, text).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # the browser left
            super().handle_one_request()


@pytest.fixture(scope="session")
def served(built: Path) -> Iterator[str]:
    """The address of the site, ending in a slash."""
    handler = functools.partial(_Handler, directory=str(built))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _cannot("playwright is not installed (the test extra has it)")
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
        if found is None and own.is_file():
            found = str(own)
        if found is None:
            _cannot("no Chromium: set CHROMIUM, or put chromium on the PATH")
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, served: str) -> Iterator[Callable[..., Any]]:
    """Open a page in a context of its own: `open_page("about/", width=390, search=True)`.

    When the test ends, no page may have asked another host for anything, failed to load something,
    or written an error to the console.
    """
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_page(
        path: str = "",
        *,
        width: int = 1280,
        height: int = 900,
        search: bool = False,
        **options: Any,
    ) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": height}, locale="zh-CN", **options
        )
        context.set_default_timeout(15_000)
        contexts.append(context)
        if not search:  # every page would load the whole index
            context.route("**/search_index.json", lambda route: route.fulfill(json=NO_INDEX))
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and complaints.append(f"console: {m.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))

        def ask(request: Any) -> None:
            if not request.url.startswith((served, "data:", "blob:")):
                complaints.append(f"foreign request: {request.url}")

        def answer(response: Any) -> None:
            if response.status >= 400:
                complaints.append(f"{response.status}: {response.url}")

        context.on("request", ask)
        context.on("response", answer)
        page.goto(served + path)
        page.wait_for_load_state("networkidle")  # the site map is there: navigation is instant
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
