"""Device proofs: recorded where a device is, kept and greyed where none is, forged nowhere."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.mdproof.conftest import MKDOCS, PYPROJECT, Sample

from mdproof import cli
from mdproof.benchmark import record_benchmark
from mdproof.compiled_page import check_compiled
from mdproof.device_run import check_device
from mdproof.errors import PageError
from mdproof.gpu import CudaDevice, find_device, run_benchmark
from mdproof.kernel_source import kernel_program
from mdproof.page_run import PageRun, Servers, open_page
from mdproof.proof import Proof, load_proof, save_proof
from mdproof.prove import check_block
from mdproof.record import update_page
from mdproof.runner import Ran, Server, environment
from mdproof.triton.compiling import compile_launches

KERNELS = '''\
"""Kernels."""

import torch
import triton
import triton.language as tl

BLOCK = 16


@triton.jit
def plus_one(x):
    return x + 1


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    # twice and one
    o = tl.arange(0, B)
    x = tl.load(x_ptr + o, mask=o < n)
    tl.store(y_ptr + o, plus_one(x * 2), mask=o < n)


def scale(x):
    """Return 2x + 1."""
    y = torch.empty_like(x)
    scale_kernel[(1,)](x, y, x.numel(), B=BLOCK)
    return y
'''

PAGE = """\
# Page

```python
import os
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from sample.kernels import scale

print(scale(torch.arange(4.0)).tolist())
```

```python
print("no kernel here")
```
"""


class FakeDevice:
    """A device that interprets: all that is not true of it is its name."""

    versions: dict[str, str] = {"torch": "9.0", "triton": "8.0"}  # noqa: RUF012

    def __init__(self, name: str = "FAKE 9000") -> None:
        self.name = name
        self.jobs = 0
        self.change: Callable[[Ran], None] = lambda ran: None
        self._server = Server(("numpy", "torch"))

    def run(self, job: dict[str, Any]) -> list[Ran]:
        self.jobs += 1
        done = self._server.run(job)
        for ran in done:
            self.change(ran)
        return done

    def close(self) -> None:
        self._server.close()


def fake_rows(launches, *, capabilities=(80, 90, 100), programs=None):
    """Stand in for the compiler, which other tests run."""
    facts = {
        "triton": "8.0", "registers": 20, "stack_bytes": 0, "spill_instructions": 0,
        "shared_bytes": 0, "tensor_core": {}, "ptx": {}, "cubin_sha256": "0" * 64, "error": None,
    }  # fmt: skip
    return [{**launch, "capability": cap, **facts} for launch in launches for cap in capabilities]


@pytest.fixture(scope="module")
def servant(site: "Pages") -> Iterator[FakeDevice]:
    found = FakeDevice()
    yield found
    found.close()


@pytest.fixture
def device(servant: FakeDevice) -> FakeDevice:
    servant.jobs, servant.change = 0, lambda ran: None
    return servant


class Pages:
    """A sample site with kernels, proven with or without a device; one for all tests."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.file = sample.root / "src/sample/kernels.py"
        self.servers = Servers(sample.site)

    def reset(self) -> None:
        """Begin anew."""
        shutil.rmtree(self.sample.root / "docs", ignore_errors=True)
        shutil.rmtree(self.sample.root / "examples", ignore_errors=True)
        self.file.write_text(KERNELS, encoding="utf-8")
        self.sample.write("# Home\n", "index.md")
        self.sample.write(PAGE)

    def open(self, device: FakeDevice | None = None) -> PageRun:
        """Open the page on a machine with or without a device."""
        self.servers.device = device
        return open_page(self.sample.site, "page.md", self.servers)

    def prove(self, device: FakeDevice | None = None) -> dict[int, str]:
        """Prove the page and return the messages of what failed."""
        updated = update_page(self.open(device))
        return {number: failure.message for number, failure in updated.failures.items()}

    def change(self, old: str, new: str) -> None:
        """Edit the module of the kernels."""
        text = self.file.read_text(encoding="utf-8")
        assert old in text
        self.file.write_text(text.replace(old, new), encoding="utf-8")

    def ways(self) -> list[list[dict[str, Any]]]:
        """Return the device proofs of each block."""
        proof = load_proof(self.sample.site, "page.md")
        assert proof is not None
        return [[w for w in r["verified"] if w["how"] == "device"] for r in proof.blocks]

    def check(self) -> str:
        """Check the first block on a machine without a device."""
        run = self.open()
        failure = check_block(run, run.blocks[0])
        return failure.message if failure is not None else ""

    def build(self) -> str:
        """Return the page as a reader sees it."""
        root = self.sample.root
        shutil.rmtree(root / "site", ignore_errors=True)
        command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", "site"]
        subprocess.run(command, cwd=root, check=True, capture_output=True)
        return (root / "site/page/index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    root = tmp_path_factory.mktemp("site")
    (root / "src/sample").mkdir(parents=True)
    (root / "docs").mkdir()
    (root / "mkdocs.yml").write_text(MKDOCS, encoding="utf-8")
    preload = 'preload = ["numpy", "torch"]\n'
    (root / "pyproject.toml").write_text(PYPROJECT + preload, encoding="utf-8")
    (root / "requirements.lock").write_text("", encoding="utf-8")
    (root / "src/sample/__init__.py").write_text("", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root / "src"), *filter(None, sys.path)]))
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        found = Pages(Sample(root, []))
        yield found
        found.servers.device = None
        found.servers.close()


@pytest.fixture
def pages(site: Pages, monkeypatch: pytest.MonkeyPatch) -> Pages:
    monkeypatch.setattr("mdproof.triton.compiling.compile_launches", fake_rows)
    monkeypatch.chdir(site.sample.root)
    site.reset()
    return site


def test_without_a_device_nothing_of_one_is_recorded_or_demanded(pages: Pages) -> None:
    assert pages.prove() == {}
    assert pages.ways() == [[], []]
    assert pages.open().fresh
    assert pages.check() == ""


def test_what_ran_on_a_device_is_recorded_where_kernels_were_launched(
    pages: Pages, device: FakeDevice
) -> None:
    pages.prove()
    assert not pages.open(device).fresh  # here is a device, and nothing is proven on it
    assert pages.prove(device) == {}
    (way,), nothing = pages.ways()
    assert nothing == []
    assert (way["device"], way["torch"], way["triton"]) == ("FAKE 9000", "9.0", "8.0")
    assert [row["kernel"] for row in way["kernels"]] == ["sample.kernels:scale_kernel"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", way["date"])
    assert pages.open(device).fresh
    assert pages.check() == ""
    html = pages.build()
    assert f"FAKE 9000 实机（{way['date']}）" in html
    assert "mdproof-outdated" not in html


def test_the_same_run_again_gives_the_same_bytes(pages: Pages, device: FakeDevice) -> None:
    pages.prove(device)
    file = pages.sample.root / "docs/proofs/page.json"
    before = file.read_bytes()
    pages.prove(device)
    assert device.jobs == 2
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# twice and one", "# 2x + 1, another comment"),
        ('"""Return 2x + 1."""', '"""Return 2x + 1, as said."""'),
        (
            "    return y\n",
            "    result = y\n    return result\n",
        ),  # the host's code, not a kernel's
    ],
)
def test_a_device_proof_is_kept_while_the_kernel_is_the_same(
    pages: Pages, device: FakeDevice, old: str, new: str
) -> None:
    pages.prove(device)
    before = pages.ways()
    pages.change(old, new)
    assert pages.prove() == {}
    assert pages.ways() == before
    assert pages.check() == ""
    html = pages.build()
    assert "FAKE 9000 实机" in html
    assert "mdproof-outdated" not in html


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("plus_one(x * 2)", "plus_one(2 * x)"),
        ("return x + 1", "return 1 + x"),  # what the kernel calls
    ],
)
def test_a_device_proof_goes_grey_when_the_kernel_changes(
    pages: Pages, device: FakeDevice, old: str, new: str
) -> None:
    pages.prove(device)
    (way,), _ = pages.ways()
    pages.change(old, new)
    assert pages.prove() == {}
    assert pages.ways()[0] == [way]  # kept, and no longer claimed
    assert pages.check() == ""
    html = pages.build()
    assert f"FAKE 9000（{way['date']}）已过时" in html
    assert "FAKE 9000 实机" not in html
    assert not pages.open(device).fresh
    assert pages.prove(device) == {}
    assert "mdproof-outdated" not in pages.build()


def test_a_device_proof_goes_grey_when_the_kernel_is_launched_otherwise(
    pages: Pages, device: FakeDevice
) -> None:
    pages.prove(device)
    pages.change("BLOCK = 16", "BLOCK = 32")
    assert pages.prove() == {}
    assert pages.ways()[0][0]["outdated"] == "the launches changed"
    assert pages.check() == ""
    assert "已过时" in pages.build()
    pages.change("BLOCK = 32", "BLOCK = 16")
    assert pages.prove() == {}
    assert "outdated" not in pages.ways()[0][0]


def test_a_proof_follows_its_block_to_another_place(pages: Pages, device: FakeDevice) -> None:
    pages.prove(device)
    (way,), _ = pages.ways()
    head, _, tail = PAGE.partition("```python\nimport os")
    pages.sample.write(f"{head}```python\nprint('first')\n```\n\n```python\nimport os{tail}")
    assert pages.prove() == {}
    assert pages.ways() == [[], [way], []]


def test_two_devices_stand_side_by_side(pages: Pages, device: FakeDevice) -> None:
    other = FakeDevice("FAKE 9001")
    try:
        pages.prove(device)
        assert not pages.open(other).fresh
        assert pages.prove(other) == {}
    finally:
        other.close()
    assert [way["device"] for way in pages.ways()[0]] == ["FAKE 9000", "FAKE 9001"]


def wrong_number(ran: Ran) -> None:
    for out in ran.outputs:
        out["text"] = out["text"].replace("3.0", "3.5")


def other_kernel(ran: Ran) -> None:
    ran.launches = [{**row, "kernel": "sample.kernels:other"} for row in ran.launches]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            wrong_number,
            "on FAKE 9000 it prints '[1.0, 3.5, 5.0, 7.0]', interpreted '[1.0, 3.0, 5.0, 7.0]'",
        ),
        (
            other_kernel,
            "on FAKE 9000 it launches other kernels than interpreted: "
            "sample.kernels:other, sample.kernels:scale_kernel",
        ),
        (
            lambda ran: ran.launches.clear(),
            "on FAKE 9000 it launches other kernels than interpreted: sample.kernels:scale_kernel",
        ),
    ],
)
def test_what_differs_on_the_device_fails_and_nothing_is_written(
    pages: Pages, device: FakeDevice, change: Callable[[Ran], None], message: str
) -> None:
    device.change = change
    assert pages.prove(device) == {1: message}
    assert load_proof(pages.sample.site, "page.md") is None


def test_what_raises_on_the_device_fails_with_its_line(pages: Pages, device: FakeDevice) -> None:
    from mdproof.runner import Failure

    def fail(ran: Ran) -> None:
        ran.failure = Failure(11, "OutOfResources: shared memory")

    device.change = fail
    assert pages.prove(device) == {1: "on FAKE 9000: OutOfResources: shared memory"}


def test_a_fence_says_why_it_is_not_compared_on_a_device(pages: Pages, device: FakeDevice) -> None:
    pages.sample.write(PAGE.replace("```python\nimport", '```python nodevice="counts"\nimport'))
    assert pages.prove(device) == {}
    assert device.jobs == 0
    assert pages.ways() == [[], []]
    assert pages.open(device).fresh


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no kernels": (lambda w: w.pop("kernels"), "the record of a device lacks its kernels"),
    "no key": (lambda w: w.pop("key"), "the record of a device lacks key"),
    "no name": (lambda w: w.update(device=""), "the record of a device lacks device"),
    "no date": (lambda w: w.update(date="soon"), "the record of FAKE 9000 is dated 'soon'"),
    "tomorrow": (
        lambda w: w.update(date="2999-01-01"),
        "the record of FAKE 9000 is dated in the future, 2999-01-01",
    ),
    "other launches": (
        lambda w: w.update(launches="0" * 32), "the record of FAKE 9000 is of other launches",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_device_proof_with_a_right_seal_is_refused(
    pages: Pages, device: FakeDevice, case: str
) -> None:
    pages.prove(device)
    proof = load_proof(pages.sample.site, "page.md")
    assert proof is not None
    forge, message = FORGERIES[case]
    forge(proof.blocks[0]["verified"][-1])
    save_proof(pages.sample.site, Proof("page.md", proof.blocks))
    assert pages.check() == f"{message}: run `pytest docs --update` and look at what changes"


def test_a_device_proof_of_a_block_without_kernels_is_refused(
    pages: Pages, device: FakeDevice
) -> None:
    pages.prove(device)
    proof = load_proof(pages.sample.site, "page.md")
    assert proof is not None
    proof.blocks[1]["verified"].append(proof.blocks[0]["verified"][-1])
    save_proof(pages.sample.site, Proof("page.md", proof.blocks))
    run = pages.open()
    failure = check_block(run, run.blocks[1])
    assert failure is not None
    assert failure.message.startswith(
        "the record claims FAKE 9000; the block launches no kernel: run"
    )


def test_a_claimed_kernel_that_is_not_launched_is_refused(pages: Pages, device: FakeDevice) -> None:
    from mdproof.device import device_key

    pages.prove(device)
    proof = load_proof(pages.sample.site, "page.md")
    assert proof is not None
    way = proof.blocks[0]["verified"][-1]
    way["kernels"][0]["kernel"] = name = "sample.kernels:plus_one"
    way["key"] = device_key(pages.sample.site, pages.open().blocks[:1], [name])
    save_proof(pages.sample.site, Proof("page.md", proof.blocks))
    message = f"the record claims FAKE 9000 for {name}, which the block does not launch: "
    assert pages.check().startswith(message)


def test_on_a_machine_with_the_device_its_record_is_run_again(
    pages: Pages, device: FakeDevice
) -> None:
    pages.prove(device)
    assert check_device(pages.open(device)) is None
    proof = load_proof(pages.sample.site, "page.md")
    assert proof is not None
    proof.blocks[0]["verified"][-1]["kernels"][0]["num_warps"] = 8
    save_proof(pages.sample.site, Proof("page.md", proof.blocks))
    assert pages.check() == ""  # without a device nobody can tell
    failure = check_device(pages.open(device))
    assert failure is not None
    assert failure.message.startswith("what ran on FAKE 9000 is not what is recorded: ")
    device.change = wrong_number
    failure = check_device(pages.open(device))
    assert failure is not None
    assert failure.message.startswith("on FAKE 9000 it prints ")


def test_only_where_a_device_is_asked_for_is_one_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert "TRITON_INTERPRET" not in environment()
    there = environment(device=True)
    assert (there["CUDA_VISIBLE_DEVICES"], there["TRITON_INTERPRET"]) == ("3", "0")


def test_a_machine_without_a_driver_has_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdproof.gpu._SIGNS", ("/no/such/driver",))
    assert find_device() is None


def test_a_driver_that_torch_cannot_use_is_no_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mdproof.gpu._SIGNS", (str(tmp_path),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_device() is None


BENCH = """\
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("--out")
rows = [{"case": {"n": 8}, "pass": "fwd", "ours": {"ms": 0.5, "tflops": 12.4}, "peer": {"ms": 1}}]
with open(parser.parse_args().out, "w") as file:
    json.dump({"machine": {"driver": "1.2"}, "results": rows}, file)
"""


def test_benchmark_rows_are_recorded_shown_and_greyed(pages: Pages, device: FakeDevice) -> None:
    script = pages.sample.root / "examples/page_bench.py"
    with pytest.raises(
        PageError, match=r"^docs/page\.md:1: has no benchmark: there is no examples"
    ):
        record_benchmark(pages.open(), device)
    script.parent.mkdir()
    script.write_text(BENCH, encoding="utf-8")
    pages.prove()
    message = r"^docs/page\.md:1: nothing is proven on FAKE 9000: run `mdproof prove`$"
    with pytest.raises(PageError, match=message):
        record_benchmark(pages.open(), device)
    pages.prove(device)
    assert record_benchmark(pages.open(), device) == 1
    assert pages.check() == ""
    html = pages.build()
    assert "实测：FAKE 9000，" in html
    assert "<td>n=8 fwd</td><td>0.500 ms · 12 TFLOP/s</td><td>1.000 ms</td>" in html
    pages.prove(device)  # running again measures nothing, and forgets nothing
    assert "benchmark" in pages.ways()[0][0]
    script.write_text(BENCH.replace("0.5", "0.25"), encoding="utf-8")
    assert "（已过时）" in pages.build()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no clock')", "page_bench.py failed: no clock"),
        ("pass", "page_bench.py wrote no JSON to --out"),
    ],
)
def test_a_benchmark_that_fails_is_told(tmp_path: Path, program: str, message: str) -> None:
    script = tmp_path / "page_bench.py"
    script.write_text(program, encoding="utf-8")
    with pytest.raises(RuntimeError, match=re.escape(message)):
        run_benchmark(script)


def test_without_a_device_the_command_says_so(
    pages: Pages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdproof.gpu._SIGNS", ())
    assert cli.main(["bench", "docs/page.md"]) == 1
    assert capsys.readouterr().out == "there is no CUDA device on this machine\n"


def test_a_binary_is_described_by_what_the_driver_says() -> None:
    from mdproof.triton.compiled import describe

    kernel = SimpleNamespace(fn=describe)
    metadata = SimpleNamespace(shared=1024, num_warps=4)
    compiled = SimpleNamespace(asm={"cubin": b"x"}, n_regs=32, n_spills=0, metadata=metadata)
    assert describe(kernel, compiled) == {
        "kernel": "mdproof.triton.compiled:describe",
        "cubin_sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
        "registers": 32,
        "spills": 0,
        "shared_bytes": 1024,
        "num_warps": 4,
    }


def test_launches_on_a_device_are_recorded_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.mdproof import triton_canaries
    from triton.runtime.jit import JITFunction

    from mdproof.triton.compiled import record

    metadata = SimpleNamespace(shared=0, num_warps=4)
    binary = SimpleNamespace(asm={"cubin": b"x"}, n_regs=32, n_spills=0, metadata=metadata)
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: binary)
    before = JITFunction.run
    kernel = JITFunction(triton_canaries.cast.fn)
    with record() as launches:
        kernel[(1,)](1)
        kernel[(2,)](2)
        kernel.run(1, grid=(1,), warmup=True)  # compiles, and launches nothing
    assert [row["kernel"] for row in launches] == ["tests.mdproof.triton_canaries:cast"]
    assert JITFunction.run is before


def test_a_device_that_only_interprets_is_found_out(pages: Pages) -> None:
    nowhere = CudaDevice("NOT THERE", {"torch": "9.0", "triton": "8.0"}, ())
    try:
        assert pages.prove(nowhere) == {
            1: "on NOT THERE it launches other kernels than interpreted: "
            "sample.kernels:scale_kernel"
        }
    finally:
        nowhere.close()


def test_the_program_of_a_kernel_is_what_it_reaches() -> None:
    page = (
        "import torch\nimport triton\nB = 16\nC = 3\nprint('run')\n"
        "def helper(x):\n    return x * B\n"
        "@triton.jit\ndef kernel(x):\n    return helper(x)\n"
        "def unused():\n    return C\n"
    )
    program = kernel_program(page, ["kernel"])
    assert "B = 16" in program
    assert "def helper" in program
    assert "@triton.jit\ndef kernel" in program
    assert not {"print", "unused", "C = 3"} & set(re.findall(r"\w+(?: = 3)?", program))


OWN_KERNEL = """\
# Page

```python tensor_cores="square_kernel"
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl
from mdproof.triton.interpreter import install

install()
N = 16


@triton.jit
def square_kernel(x_ptr, y_ptr, B: tl.constexpr):
    o = tl.arange(0, B)
    tile = o[:, None] * B + o[None, :]
    x = tl.load(x_ptr + tile)
    tl.store(y_ptr + tile, tl.dot(x, x, input_precision="ieee"))


x = torch.eye(N, dtype=torch.bfloat16) * 3
y = torch.empty(N, N)
square_kernel[(1,)](x, y, B=N)
print(y.diagonal().sum().item())
```
"""


def test_a_kernel_written_on_the_page_is_compiled_and_has_its_tensor_cores(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdproof.triton.compiling.compile_launches", compile_launches)
    pages.sample.write(OWN_KERNEL)
    assert pages.prove() == {}
    proof = load_proof(pages.sample.site, "page.md")
    assert proof is not None
    compiled = [way for way in proof.blocks[0]["verified"] if way["how"] == "compiled"]
    assert [way["target"] for way in compiled] == ["sm_80", "sm_90", "sm_100"]
    assert all(way["kernels"][0]["tensor_core"]["HMMA"] > 0 for way in compiled)
    assert check_compiled(pages.open()) is None
    html = pages.build()
    assert re.search(r"<td>square_kernel</td><td>sm_90</td><td>\d+</td><td>0 B</td>", html)
    assert re.search(r"<td>\d+ HMMA</td>", html)

    pages.sample.write(OWN_KERNEL.replace("dtype=torch.bfloat16", "dtype=torch.float32"))
    assert pages.prove() == {1: "square_kernel has no tensor-core instruction on sm_80"}
    pages.sample.write(OWN_KERNEL.replace('tensor_cores="square_kernel"', 'tensor_cores="cube"'))
    assert pages.prove() == {1: "tensor_cores names cube; the block launches square_kernel"}


def test_a_page_that_the_plain_interpreter_gets_wrong_fails(pages: Pages) -> None:
    pages.sample.write(OWN_KERNEL.replace("install()\n", ""))
    message = (
        "RuntimeError: the kernel takes bf16: Triton's own interpreter gets it wrong. "
        "Call mdproof.triton.interpreter.install() before the launch."
    )
    assert pages.prove() == {1: message}


def test_a_kernel_on_the_page_takes_the_blocks_before_it_into_its_key(
    pages: Pages, device: FakeDevice
) -> None:
    head, _, tail = OWN_KERNEL.partition("\nx = torch.eye")
    text = f"{head}```\n\n```python\nx = torch.eye{tail}"
    pages.sample.write(text.replace('tensor_cores="square_kernel"', ""))
    assert pages.prove(device) == {}
    pages.sample.write(text.replace('tensor_cores="square_kernel"', "").replace("o[None, :]", "o"))
    assert pages.prove() == {}
    assert "已过时" in pages.build()


@pytest.mark.gpu
def test_the_device_of_this_machine_proves_a_page(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The true thing: kernels compiled, launched and compared on the GPU of this machine."""
    real = find_device(("numpy", "torch"))
    if real is None:
        pytest.skip("this machine has no CUDA device that torch can use")
    monkeypatch.setattr("mdproof.triton.compiling.compile_launches", compile_launches)
    pages.sample.write(
        PAGE.replace("torch.arange(4.0)", "torch.arange(4.0, device=DEVICE)").replace(
            "from sample", 'DEVICE = "cuda" if torch.cuda.is_available() else "cpu"\nfrom sample'
        )
    )
    try:
        assert pages.prove(real) == {}
        (way,), nothing = pages.ways()
        assert nothing == []
        assert way["device"] == real.name
        kernel = way["kernels"][0]
        assert kernel["kernel"] == "sample.kernels:scale_kernel"
        assert kernel["registers"] > 0
        assert len(kernel["cubin_sha256"]) == 64
        assert check_device(pages.open(real)) is None
    finally:
        real.close()
