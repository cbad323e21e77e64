"""The CUDA device of this machine, behind the interface of `mdproof.device`."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdproof.runner import Ran, Server, environment

_SIGNS = ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")
"""One of these exists where a driver is loaded; without it nobody need import torch to ask."""

_ASK = """
import json, torch
if torch.cuda.is_available():
    import triton
    versions = {"torch": torch.__version__.partition("+")[0], "triton": triton.__version__}
    print(json.dumps({"name": torch.cuda.get_device_name(0), "versions": versions}))
"""

COMPILE_SECONDS = 240.0
"""What a block may take longer on a device than here: its kernels are compiled there first."""


class CudaDevice:
    """The first CUDA device."""

    def __init__(self, name: str, versions: dict[str, str], libraries: tuple[str, ...]) -> None:
        self.name = name
        self.versions: Mapping[str, str] = versions
        self._server = Server(libraries, device=True)

    def run(self, job: dict[str, Any]) -> list[Ran]:
        """Run a page's blocks in a process that compiles its kernels."""
        blocks = [{**b, "timeout": b["timeout"] + COMPILE_SECONDS} for b in job["blocks"]]
        return self._server.run({**job, "blocks": blocks, "device": True})

    def close(self) -> None:
        """End the worker."""
        self._server.close()


def find_device(libraries: tuple[str, ...] = ()) -> CudaDevice | None:
    """Return the CUDA device of this machine, or None if there is none that torch can use."""
    if not any(Path(sign).exists() for sign in _SIGNS):
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            env=environment(device=True),
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return CudaDevice(found["name"], found["versions"], libraries)


def run_benchmark(script: Path) -> dict[str, Any]:
    """Run a benchmark, `script --out FILE`, and return what it wrote.

    Raises:
        RuntimeError: If it fails, or writes nothing that can be read.
    """
    with tempfile.TemporaryDirectory(prefix="mdproof-") as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, str(script), "--out", str(out)]
        done = subprocess.run(
            command, env=environment(device=True), text=True, stderr=subprocess.PIPE
        )
        if done.returncode:
            last = (done.stderr or "").strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise RuntimeError(f"{script.name} failed: {last[0]}")
        try:
            return json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{script.name} wrote no JSON to --out: {error}") from None
