"""Write the lock files: exact versions with the hashes of every file of each, and no hosts.

Run in the development environment, `python requirements/lock.py`, after changing a dependency in
`pyproject.toml`. It asks pip what the extras resolve to (torch pinned, so that no other build is
pulled in) and the configured indexes for the hashes, so that the lock serves other platforms too.
What is locked stays at its version; `--upgrade` takes the newest of everything.
"""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlparse

from pip._internal.commands import create_command

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
HEAD = "# Made by requirements/lock.py; do not edit. Install with --no-deps --require-hashes.\n"
MARKERS = {"triton": ' ; sys_platform == "linux"', "uvloop": ' ; sys_platform != "win32"'}
CUDA = re.compile(
    r"linux.*x86_64"
)  # PyPI's torch for Linux is the CUDA build; the lock is for the CPU's
NOT_LOCKED = {"pip", "setuptools", "wheel"}
# Only tests read these, and of them only modules that need torch and POT; what they name as
# dependencies (lightning, torchdyn, notebooks) is not installed.
WITHOUT_DEPENDENCIES = ["flow_matching", "torchcfm"]


def resolve(
    requirements: list[str], constraints: dict[str, str], *flags: str
) -> dict[str, tuple[str, set[str]]]:
    """Return version and known hashes of everything that the requirements need."""
    pins = "".join(f"{name}=={version}\n" for name, version in constraints.items())
    file = HERE / ".constraints"
    file.write_text(pins or TORCH + "\n", encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-"]
        command += ["--ignore-installed", "--constraint", str(file), *flags, *requirements]
        report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    finally:
        file.unlink()
    found: dict[str, tuple[str, set[str]]] = {}
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"].partition("+")[0]
        download = item["download_info"]
        sha = download.get("archive_info", {}).get("hashes", {}).get("sha256")
        if sha is None and download["url"].startswith("file:"):  # a folder of wheels
            sha = hashlib.sha256(
                Path(unquote(urlparse(download["url"]).path)).read_bytes()
            ).hexdigest()
        found[name.lower().replace("_", "-")] = version, {sha} if sha else set()
    return found


def all_hashes(name: str, version: str) -> set[str]:
    """Return the hashes of every file of a version on the configured indexes."""
    command = create_command("install")
    options, _ = command.parse_args([])
    with command.main_context():
        finder = command._build_package_finder(options, command.get_default_session(options))
        finder._target_python = None
        hashes: set[str] = set()
        sources = finder._link_collector.collect_sources(name, candidates_from_page=lambda link: [])
        for source in [*sources.index_urls, *sources.find_links]:
            link = source and source.link
            page = link and link.scheme != "file" and finder._link_collector.fetch_response(link)
            if not page:
                continue
            from pip._internal.index.collector import parse_links

            for file in parse_links(page):
                stem = file.filename.lower().replace("_", "-")
                exact = (f"-{version}-", f"-{version}.tar.gz", f"-{version}.zip")
                if name == "torch" and CUDA.search(file.filename):
                    continue
                right = stem.startswith(name.replace("_", "-")) and any(e in stem for e in exact)
                if right and file.hash_name == "sha256" and file.hash and not file.is_yanked:
                    hashes.add(file.hash)
    return hashes


def write(file: Path, found: dict[str, tuple[str, set[str]]]) -> None:
    """Write one lock file."""
    lines = [HEAD]
    for name, (version, known) in sorted(found.items()):
        if name in NOT_LOCKED or name == "zhizhi":
            continue
        hashes = sorted(known | all_hashes(name, version))
        print(f"{name}=={version}: {len(hashes)} files", flush=True)
        lines.append(f"{name}=={version}{MARKERS.get(name, '')} \\\n")
        lines.append(" \\\n".join(f"    --hash=sha256:{sha}" for sha in hashes) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def locked(file: Path) -> dict[str, str]:
    """Return the versions that a lock file names."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return dict(re.findall(r"^([\w.-]+)==([^ ;\\]+)", text, flags=re.MULTILINE))


def main() -> None:
    """Lock everything, then the subset that only shows the site."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    every = [*project["dependencies"], *(r for extra in extras.values() for r in extra)]
    held = {} if "--upgrade" in sys.argv[1:] else locked(HERE / "dev.lock")
    found = resolve([TORCH, *every], held) | resolve(WITHOUT_DEPENDENCIES, held, "--no-deps")
    write(HERE / "dev.lock", found)
    versions = {name: version for name, (version, _) in found.items()}
    names = resolve(extras["docs"], versions)
    write(HERE / "docs.lock", {name: found[name] for name in names if name in found})


if __name__ == "__main__":
    main()
