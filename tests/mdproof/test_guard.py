"""A page keeps to its machine, its processes, its streams and its channel."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.mdproof.conftest import Sample

from mdproof.block import Options, read_options
from mdproof.errors import PageError
from mdproof.guard import is_local, refusal
from mdproof.watch import PROCESSES, descendants, end_descendants, excess

SHUT = 'it runs offline, unless its fence says network="reason"'


def failure(sample: Sample, *codes: str, options: str = "") -> str:
    """Prove a page and return what is said of its only failing block."""
    page = "".join(f"```python {options}\n{code}\n```\n\n" for code in codes)
    failures = [
        f.message for f in sample.prove(page).failures.values() if "not run" not in f.message
    ]
    assert len(failures) <= 1
    return failures[0] if failures else ""


# The network


@pytest.mark.parametrize(
    ("host", "local"),
    [
        (None, True),
        ("", True),
        ("localhost", True),
        ("a.localhost", False),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("0.0.0.0", True),
        (b"127.0.0.1", True),
        (socket.gethostname(), True),
        ("example.org", False),
        ("10.0.0.1", False),
        ("192.0.2.1", False),
        ("fe80::1%eth0", False),
        ("2001:db8::1", False),
    ],
)
def test_this_machine_is_told_from_others(host: object, local: bool) -> None:
    assert is_local(host) == local


REACHING = {
    "connect": "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)",
    "name": "import socket\nsocket.getaddrinfo('example.org', 443)",
    "old name": "import socket\nsocket.gethostbyname('example.org')",
    "datagram": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('192.0.2.1', 9))",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://example.org/')",
    "caught": "import socket\ntry:\n    socket.getaddrinfo('example.org', 443)\n"
    "except OSError:\n    pass",
}


@pytest.mark.parametrize("way", REACHING)
def test_a_block_that_reaches_another_host_fails_even_if_it_catches_the_error(
    sample: Sample, way: str
) -> None:
    message = failure(sample, REACHING[way])
    assert "the page reaches for " in message
    assert SHUT in message
    assert ("example.org" in message) != ("192.0.2.1" in message)


def test_a_child_that_no_hook_watches_has_nothing_but_the_loopback(sample: Sample) -> None:
    code = (
        "import subprocess, sys\n"
        "program = 'import socket; print([name for _, name in socket.if_nameindex()])'\n"
        "run = subprocess.run([sys.executable, '-I', '-c', program], capture_output=True)\n"
        "print(run.stdout.decode())"
    )
    if not can_leave():
        pytest.skip("this kernel gives no process a network of its own")
    assert failure(sample, code) == ""
    (record,) = sample.open().proof.blocks  # type: ignore[union-attr]
    assert record["outputs"][0]["text"] == "['lo']\n\n"


def can_leave() -> bool:
    code = "from mdproof.guard import leave_network; print(leave_network())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout == "True\n"


def test_a_python_that_an_allowed_block_starts_is_allowed_too(sample: Sample) -> None:
    code = (
        "import subprocess, sys\n"
        "program = 'import socket\\ntry: socket.getaddrinfo(\"name.invalid\", 1)'\n"
        "program += '\\nexcept socket.gaierror: print(\"asked\")'\n"
        "run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)\n"
        "print(run.stdout or run.stderr)"
    )
    assert failure(sample, code, options='network="reason"') == ""
    (record,) = sample.open().proof.blocks  # type: ignore[union-attr]
    assert record["outputs"][0]["text"] == "asked\n\n"


def test_the_loopback_is_no_network(sample: Sample) -> None:
    code = (
        "import socket, threading\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "place = socket.getaddrinfo('localhost', server.getsockname()[1])[0][4][1]\n"
        "client = socket.create_connection(('127.0.0.1', place))\n"
        "peer, _ = server.accept()\n"
        "peer.sendall(b'hello')\nprint(client.recv(5))\n"
        "for each in (peer, client, server):\n    each.close()"
    )
    assert failure(sample, code) == ""


def test_a_fence_may_allow_the_network_and_the_excuse_is_counted(sample: Sample) -> None:
    from mdproof.standing import read_standing

    code = (
        "import socket\nreached = []\ntry:\n    socket.getaddrinfo('name.invalid', 1)\n"
        "except socket.gaierror:\n    reached.append('asked')\nprint(reached)"
    )
    assert failure(sample, code, options='network="asks a name server"') == ""
    standing = read_standing(sample.site, "page.md")
    assert standing is not None
    assert [(e.kind, e.reason) for e in standing.excuses] == [("network", "asks a name server")]


def test_the_permission_ends_with_the_block(sample: Sample) -> None:
    page = (
        '```python network="reason"\nimport socket\n```\n\n'
        "```python\nsocket.getaddrinfo('example.org', 1)\n```\n"
    )
    (failed,) = sample.prove(page).failures.values()
    assert failed.message.endswith(refusal("example.org:1"))


# Streams and warnings


def test_text_on_stderr_fails_unless_the_fence_says_why(sample: Sample) -> None:
    code = "import sys\nprint('careful', file=sys.stderr)"
    assert failure(sample, code) == "writes to sys.stderr: 'careful'"
    assert failure(sample, code, options='warns="stderr: a progress bar"') == ""


def test_logging_counts_as_stderr(sample: Sample) -> None:
    message = failure(sample, "import logging\nlogging.warning('look')")
    assert message == "writes to sys.stderr: 'WARNING:root:look'"


LIBRARY = (
    "import sys, types, warnings\n"
    "library = types.ModuleType('library')\n"
    "code = 'import warnings\\ndef old(): warnings.warn(\"gone soon\", {category}, stacklevel=1)'\n"
    "exec(compile(code, '/elsewhere/site-packages/library.py', 'exec'), library.__dict__)\n"
    "library.old()"
)


@pytest.mark.parametrize(
    "category", ["DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"]
)
def test_a_deprecation_inside_a_library_fails_unless_excused(sample: Sample, category: str) -> None:
    code = LIBRARY.format(category=category)
    assert failure(sample, code) == f"warns: {category}: gone soon"
    assert failure(sample, code, options=f'warns="{category}: fixed upstream"') == ""


def test_a_site_may_let_a_librarys_deprecation_pass_and_its_own_never(sample: Sample) -> None:
    from mdproof.site import load_site

    file = sample.root / "pyproject.toml"
    entry = 'allow_warnings = [{ warning = "FutureWarning: gone", reason = "upstream" }]\n'
    file.write_text(file.read_text(encoding="utf-8") + entry, encoding="utf-8")
    assert load_site(sample.root).allowed_warnings == (("FutureWarning: gone", "upstream"),)
    assert failure(sample, LIBRARY.format(category="FutureWarning")) == ""
    own = "import warnings\nwarnings.warn('gone', FutureWarning)"
    assert failure(sample, own) == "warns: FutureWarning: gone"


@pytest.mark.parametrize(
    "entry", ['"FutureWarning"', '{ warning = "a" }', '{ warning = "", reason = "b" }']
)
def test_an_allowed_warning_without_a_reason_is_refused(sample: Sample, entry: str) -> None:
    from mdproof.site import _read_project

    file = sample.root / "pyproject.toml"
    file.write_text(f"[tool.mdproof]\nallow_warnings = [{entry}]\n", encoding="utf-8")
    message = 'allow_warnings: each entry is { warning = "Category: text", reason = "..." }'
    with pytest.raises(PageError) as raised:
        _read_project(file)
    assert str(raised.value) == f"pyproject.toml:2: [tool.mdproof] {message}"


def test_another_warning_inside_a_library_is_the_librarys_business(sample: Sample) -> None:
    assert failure(sample, LIBRARY.format(category="RuntimeWarning")) == ""


@pytest.mark.parametrize(
    "text", ["DeprecationWarning", "no reason:", ": reason", "two words: reason"]
)
def test_an_excuse_for_a_warning_names_it_and_the_reason(text: str) -> None:
    message = rf'^docs/a.md:3: warns="{text}" is not "Category: reason" or "stderr: reason"$'
    with pytest.raises(PageError, match=message):
        read_options({"warns": text}, file="docs/a.md", line=3)
    assert read_options({"warns": "UserWarning: why"}, file="a", line=1) == Options(
        warns="UserWarning: why"
    )


# Processes


def test_a_fork_bomb_fails_its_block_and_leaves_nothing(sample: Sample) -> None:
    # It stops by itself at 600 processes, should the guard be broken.
    code = (
        "import os, time\n"
        "for _ in range(600):\n"
        "    if os.fork() == 0:\n        time.sleep(30)\n        os._exit(0)\n"
        "time.sleep(20)"
    )
    assert failure(sample, code) == f"starts more than {PROCESSES} processes"
    assert failure(sample, "print(1)") == ""


def test_what_left_the_group_of_the_page_is_ended_with_it(
    sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mark = tmp_path_factory.mktemp("marks") / "pid"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        open({str(mark)!r}, 'w').write(str(os.getpid()))\n        time.sleep(600)\n"
        "    os._exit(0)\n"
        f"while not os.path.exists({str(mark)!r}):\n    time.sleep(0.01)\n"
    )
    assert failure(sample, code) == ""
    assert not Path(f"/proc/{mark.read_text()}").exists()


def test_a_thread_that_outlives_the_page_is_told(sample: Sample) -> None:
    code = (
        "import threading, time\n"
        "t = threading.Thread(target=time.sleep, args=(9,), name='late')\nt.start()"
    )
    assert failure(sample, code) == "leaves a thread running: late, begun in block 1"
    assert failure(sample, code.replace("name='late'", "daemon=True")) == ""


def test_descendants_are_found_and_ended() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert sleeper.pid in descendants(os.getpid())
        assert excess(os.getpid(), memory=1 << 20) == ""
        assert "more memory than the limit of 0 MiB" in excess(os.getpid(), memory=0)
    finally:
        sleeper.kill()
        sleeper.wait()
    reaper = (
        "import os, subprocess, sys\n"
        "from mdproof.watch import adopt_orphans, descendants, end_descendants\n"
        "adopt_orphans()\n"
        "subprocess.Popen(['sh', '-c', 'setsid sleep 60 & setsid sleep 60 & wait'])\n"
        "import time\n"
        "while len(descendants(os.getpid())) < 3: time.sleep(0.01)\n"
        "end_descendants(os.getpid())\n"
        "print(len(descendants(os.getpid())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", reaper], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
    end_descendants(os.getpid(), patience=0.0)  # there are none, and it does not wait for them


# The channel


def test_events_that_a_block_invents_are_not_believed(sample: Sample) -> None:
    event = '{"event": "done", "block": 1, "error": null, "outputs": [], "seconds": 0}\\n'
    code = (
        "import os\n"
        "for number in range(3, 30):\n    try:\n"
        f"        n = os.write(number, b'{event}')\n    except OSError:\n        pass\n"
        "import time\ntime.sleep(9)"
    )
    assert failure(sample, code) == "the block writes into the channel of its results"
    assert failure(sample, "print(1)") == ""


def test_a_closed_channel_is_the_end_of_the_block(sample: Sample) -> None:
    message = failure(sample, "import os\nos.closerange(3, 256)")
    assert message.startswith("the block ended its process with status 1")


# Files


@pytest.mark.parametrize(
    "code",
    [
        "open({root!r} + '/docs/proofs/other.json', 'w')",
        "from pathlib import Path\nPath({root!r}, 'src/sample/shapes.py').write_text('')",
        "import os\nos.remove({root!r} + '/docs/page.md')",
        "import os\nos.rename({root!r} + '/mkdocs.yml', 'mine.yml')",
        "import os\ntry:\n    os.mkdir({root!r} + '/new')\nexcept OSError:\n    pass",
    ],
)
def test_a_page_does_not_write_into_the_repository(sample: Sample, code: str) -> None:
    before = {path: path.read_bytes() for path in sample.root.rglob("*") if path.is_file()}
    message = failure(sample, code.format(root=str(sample.root)))
    assert "the repository: " in message
    after = {path: path.read_bytes() for path in sample.root.rglob("*") if path.is_file()}
    page = sample.root / "docs/page.md"
    assert {**before, page: b""} == {**after, page: b""}


def test_a_page_writes_in_its_own_folder(sample: Sample) -> None:
    code = (
        "from pathlib import Path\nPath('a.txt').write_text('x')\nprint(Path('a.txt').read_text())"
    )
    assert failure(sample, code) == ""


# The engine's own processes


def test_a_block_that_ends_its_worker_fails(sample: Sample) -> None:
    code = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(5)"
    assert failure(sample, code) == "the block ended the process that runs its page"
    assert failure(sample, "print(1)") == ""


def test_disowned_processes_are_counted(sample: Sample) -> None:
    code = (
        "import os, time\n"
        "for _ in range(260):\n"
        "    if os.fork() == 0:\n        os.setsid()\n"
        "        if os.fork() == 0:\n            time.sleep(30)\n        os._exit(0)\n"
        "    os.wait()\n"
        "time.sleep(20)"
    )
    assert failure(sample, code) == f"starts more than {PROCESSES} processes"


def test_exit_codes_of_others_are_left_to_them() -> None:
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    time.sleep(0.5)
    end_descendants(os.getpid(), patience=0.0)
    assert other.wait() == 3


def test_when_the_engine_is_gone_its_page_ends(
    sample: Sample, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mark = tmp_path_factory.mktemp("marks") / "pid"
    code = f"import os, time\nos.system('echo ' + str(os.getpid()) + ' > {mark}')\ntime.sleep(50)"
    sample.write(f"```python\n{code}\n```\n")
    engine = subprocess.Popen([sys.executable, "-m", "mdproof", "prove"], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (mark.is_file() and mark.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    engine.kill()
    engine.wait()
    page = Path(f"/proc/{mark.read_text().strip()}")
    while page.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not page.exists()
