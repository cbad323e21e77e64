"""Prove a page: run its blocks and its copies, compare with what is recorded, or record anew."""

import base64
import datetime
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdproof import figures
from mdproof.block import Block
from mdproof.collect import Collected, collect, shown
from mdproof.compare import address_in, first_difference, images, same_figure, text_diff
from mdproof.copy import (
    Copy,
    candidates,
    is_recorded,
    plain_code,
    recorded_copy,
    stale_reasons,
)
from mdproof.device import Device, check_way, outdated, ways_of
from mdproof.device_run import run_on_device
from mdproof.errors import PageError
from mdproof.gpu import find_device
from mdproof.kernel_source import kernel_program
from mdproof.kernels import short_name, without_tensor_cores
from mdproof.proof import (
    Proof,
    base_page,
    block_code,
    block_key,
    canonical,
    damaged_figure,
    figure_folder,
    imported_names,
    load_proof,
    locked_versions,
    save_proof,
    used_libraries,
    write_text,
)
from mdproof.runner import Failure, Ran, Server, copy_job, module_name, page_job
from mdproof.site import Site

UPDATE = "run `pytest docs --update` and look at what changes"


class Servers:
    """The worker processes of a session: bare ones, and ones with the site's preloaded libraries.

    Pages run under one hash seed and copies under another, so what depends on the order of a set
    shows itself as a copy that prints something else.
    """

    def __init__(self, site: Site, device: Device | None = None) -> None:
        self.site = site
        self.told: Callable[[], None] | None = None  # called whenever a block is done
        self._device: list[Device | None] = [device] if device is not None else []
        self._open: dict[tuple[bool, int], Server] = {}

    @property
    def device(self) -> Device | None:
        """This machine's accelerator, looked for when it is first asked for."""
        if not self._device:
            self._device.append(find_device(self.site.preload))
        return self._device[0]

    @device.setter
    def device(self, device: Device | None) -> None:
        self._device = [device]

    def run(self, job: dict[str, Any], *, hash_seed: int = 0) -> list[Ran]:
        """Run a job in the worker that suits its imports."""
        wanted = {*self.site.preload, *self.site.packages}
        loaded = any(_imports(block["code"]) & wanted for block in job["blocks"])
        libraries = self.site.preload if loaded else ()
        if (loaded, hash_seed) not in self._open:
            self._open[loaded, hash_seed] = Server(libraries, hash_seed=hash_seed)
        server = self._open[loaded, hash_seed]
        server.told = self.told
        return server.run(job)

    def close(self) -> None:
        """End the workers."""
        for server in self._open.values():
            server.close()
        self._open.clear()
        for device in filter(None, self._device):
            device.close()


def _imports(code: str) -> set[str]:
    try:
        return imported_names(code)
    except (SyntaxError, RecursionError):
        return set()


@dataclass
class PageRun:
    """One page on its way to a proof.

    Attributes:
        site: The site.
        collected: The page's fences.
        servers: Where blocks run.
        proof: What is recorded now, or None.
        stale: Why each block's record does not hold, "" where it does.
        ran: What each block did, by its number; empty until `run`.
    """

    site: Site
    collected: Collected
    servers: Servers
    proof: Proof | None
    stale: list[str]
    ran: dict[int, Ran] = field(default_factory=dict)
    started: bool = False

    @property
    def page(self) -> str:
        """The page's path below `docs`."""
        return self.collected.page

    @property
    def file(self) -> str:
        """The page's path as messages show it."""
        return shown(self.site, self.page)

    @property
    def blocks(self) -> list[Block]:
        """The page's blocks."""
        return self.collected.blocks

    @property
    def fresh(self) -> bool:
        """Whether nothing is left to prove here, on the device of this machine neither."""
        if self.proof is None or any(self.stale):
            return False
        device = self.servers.device
        return device is None or not any(
            _launches(record)
            and not block.options.nodevice
            and not any(
                way["device"] == device.name
                and not outdated(self.site, self.blocks[: block.index], way)
                for way in ways_of(record)
            )
            for block, record in zip(self.blocks, self.proof.blocks, strict=True)
        )

    def record(self, block: Block) -> dict[str, Any] | None:
        """Return a block's record, fresh or not."""
        if self.proof is None or block.index > len(self.proof.blocks):
            return None
        return self.proof.blocks[block.index - 1]

    def run(self) -> None:
        """Run the page once."""
        if self.started:
            return
        self.started = True
        job = page_job(self.site, self.page, self.blocks)
        self.ran = {ran.block: ran for ran in self.servers.run(job)}

    def failure_of(self, block: Block) -> Failure | None:
        """Return why a block failed when the page ran, if it did."""
        if block.options.norun:
            return None
        self.run()
        ran = self.ran.get(block.index)
        if ran is None:
            broken = next((r for r in self.ran.values() if r.failure is not None), None)
            place = f"block {broken.block} failed before it" if broken else "it was not reached"
            return Failure(block.line, f"not run: {place}")
        if ran.failure is not None:
            return ran.failure
        if any(out["type"] == "figure" for out in ran.outputs) and not block.options.alt:
            return Failure(block.line, 'draws a figure: say in alt="..." what it shows')
        if any(out["type"] != "figure" for out in ran.outputs) and block.kind == "source":
            return Failure(block.line, "importing this object prints something")
        return None


def _launches(record: dict[str, Any]) -> bool:
    return any(way["how"] == "interpreter" for way in record["verified"])


def open_page(
    site: Site, page: str, servers: Servers, collected: Collected | None = None
) -> PageRun:
    """Collect a page and read its proof.

    Raises:
        PageError: If the page has a fence that makes no sense.
        ForgedError: If its proof was edited by hand.
    """
    collected = collected or collect(site, page)
    proof = load_proof(site, page)
    return PageRun(site, collected, servers, proof, stale_reasons(site, collected.blocks, proof))


def check_block(run: PageRun, block: Block) -> Failure | None:
    """Run a page if need be, and compare one block with its record."""
    failure = run.failure_of(block)
    if failure is not None:
        return failure
    reason = run.stale[block.index - 1]
    record = run.record(block)
    if record is None:
        return Failure(block.line, f"not proven yet: {UPDATE}")
    difference = "" if block.options.norun else _differs(run, block, record)
    if difference:
        return Failure(block.line, difference)
    if reason:
        return Failure(block.line, f"{reason}; the output is the same: run `pytest docs --update`")
    return _check_claims(run, block, record)


def _check_claims(run: PageRun, block: Block, record: dict[str, Any]) -> Failure | None:
    """Compare what a record says besides its outputs with what the run showed."""
    if block.options.norun:
        same = record["status"] == "excused" and record["outputs"] == []
        return None if same else Failure(block.line, "the record claims that this block was run")
    ran = run.ran[block.index]
    claims = {
        "modules": ran.modules,
        "entered": ran.entered,
        "files": ran.files,
        "names": ran.names,
        "links": ran.links,
        "libraries": _libraries(run, block, ran),
    }
    for name, seen in claims.items():
        if record.get(name) != seen:
            return Failure(block.line, f"the record's {name} are not what the run showed: {UPDATE}")
    for way in ways_of(record):
        wrong = check_way(run.site, run.blocks[: block.index], way, ran.launches)
        if wrong:
            return Failure(block.line, f"{wrong}: {UPDATE}")
    hows = {way["how"] for way in record["verified"]} - {"device"}
    expected = {"cpu", "interpreter", "compiled"} if ran.launches else {"cpu"}
    if record["status"] != "passed" or hows != expected:
        claim = ", ".join(sorted(hows))
        return Failure(
            block.line, f"the record claims {claim}; the run shows {', '.join(sorted(expected))}"
        )
    for name, version in record["libraries"].items():
        locked = locked_versions(run.site).get(canonical(name))
        if locked and locked.partition("+")[0] != version:
            message = f"{name} {version} is installed, the lock says {locked}: use the locked set"
            return Failure(block.line, message)
    return None


def _libraries(run: PageRun, block: Block, ran: Ran) -> dict[str, str]:
    codes = [plain_code(b) for b in run.blocks[: block.index] if not b.options.norun]
    return used_libraries(run.site, codes, ran.modules)


def _differs(run: PageRun, block: Block, record: dict[str, Any]) -> str:
    """Return how a block's outputs differ from the recorded ones, "" if they agree."""
    ran = run.ran[block.index]
    old, new = record["outputs"], ran.outputs
    if not block.options.varies:
        difference = first_difference(_text(old), ran.text(), rtol=block.options.tol)
        if difference is not None:
            return f"the output changed: recorded {difference[0]!r}, now {difference[1]!r}"
    drawn_old = [out for out in old if out["type"] == "figure"]
    drawn_new = [out["svg"] for out in new if out["type"] == "figure"]
    if len(drawn_old) != len(drawn_new):
        return f"{len(drawn_new)} figures, {len(drawn_old)} recorded"
    damaged = damaged_figure(run.site, run.page, record)
    if damaged:
        return f"figure {damaged} is not the recorded one"
    folder = figure_folder(run.site, run.page)
    for out, svg in zip(drawn_old, drawn_new, strict=True):
        for theme in out["sha256"] if not block.options.varies else ():
            file = folder / f"{out['name']}.{theme}.svg"
            text = file.read_text(encoding="utf-8")
            if not same_figure(text, figures.themed(svg, theme)) or not _same_images(text, svg):
                return f"figure {file.name} changed: {UPDATE}"
    return ""


def _text(outputs: Sequence[dict[str, Any]]) -> str:
    return Ran(0, outputs=list(outputs)).text()


def _same_images(recorded: str, new: str) -> bool:
    """Tell whether the pictures inside two drawings agree, pixel by pixel within a few levels."""
    pairs = list(zip(images(recorded), images(new), strict=False))
    if len(images(recorded)) != len(images(new)):
        return False
    if all(a == b for a, b in pairs):
        return True
    import io

    from PIL import Image, ImageChops

    for a, b in pairs:
        one, two = (Image.open(io.BytesIO(base64.b64decode(x))).convert("RGBA") for x in (a, b))
        if one.size != two.size:
            return False
        extrema = ImageChops.difference(one, two).getextrema()
        if max(high for _, high in extrema) > 8:  # type: ignore[operator,misc]
            return False
    return True


def run_copy(
    run: PageRun, block: Block, copy: Copy, recorded: Sequence[dict[str, Any]]
) -> Failure | None:
    """Run a copy alone, and compare what its block prints and draws with what the page records."""
    return _try_copy(run, block, copy, recorded)[0]


def _try_copy(
    run: PageRun, block: Block, copy: Copy, recorded: Sequence[dict[str, Any]]
) -> tuple[Failure | None, Ran]:
    with tempfile.TemporaryDirectory(prefix="mdproof-") as folder:
        job = copy_job(run.site, copy.text, copy.split, block, Path(folder))
        ran = run.servers.run(job, hash_seed=1)[0]
    if ran.failure is not None:
        message = f"the runnable copy fails alone: {ran.failure.message}"
        return Failure(block.line, message), ran
    if block.kind == "doctest" or block.options.varies:
        return None, ran
    difference = first_difference(_text(recorded), ran.text(), rtol=block.options.tol)
    if difference is not None:
        message = f"the runnable copy prints {difference[1]!r}, the page {difference[0]!r}"
        return Failure(block.line, message), ran
    drawn = [out["svg"] for out in ran.outputs if out["type"] == "figure"]
    kept = [out for out in recorded if out["type"] == "figure"]
    if len(kept) != len(drawn):
        message = f"the runnable copy draws {len(drawn)} figures, the page {len(kept)}"
        return Failure(block.line, message), ran
    return None, ran


def check_copy(run: PageRun, block: Block) -> Failure | None:
    """Run a block's recorded copy alone."""
    record = run.record(block)
    copy = recorded_copy(run.site, run.blocks[: block.index], record) if record else None
    if record is None or copy is None:
        return Failure(block.line, f"no runnable copy is recorded: {UPDATE}")
    if not is_recorded(run.site, run.blocks[: block.index], record, copy):
        return Failure(block.line, f"the runnable copy is not the recorded one: {UPDATE}")
    return run_copy(run, block, copy, record["outputs"])


@dataclass(frozen=True)
class Updated:
    """What proving anew led to.

    Attributes:
        failures: By block, why it could not be proven; the proof is written only if there are none.
        written: Whether the proof file changed.
        changes: By block, how what it shows differs from what was recorded: a diff of its text, and
            the names of figures drawn anew. A block recorded for the first time is not among them.
    """

    failures: dict[int, Failure]
    written: bool = False
    changes: dict[int, str] = field(default_factory=dict)


def update_page(run: PageRun) -> Updated:
    """Run a page and its copies and record what was seen; nothing is written if anything fails.

    A translation has no proof of its own: its code must be that of the page it translates.

    Raises:
        PageError: If the proof cannot be written.
    """
    if base_page(run.site, run.page) != run.page:
        return Updated(_compare_translation(run))
    failures = {
        block.index: failure
        for block in run.blocks
        if (failure := run.failure_of(block)) is not None
    }
    failures |= _with_addresses(run) if not failures else {}
    if failures:
        return Updated(failures)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    compiled = _compile(run, today)
    devices, failures = run_on_device(run, today)
    failures = _without_tensor_cores(run, compiled) | failures
    if failures:
        return Updated(failures)
    records: list[dict[str, Any]] = []
    drawings: dict[str, str] = {}
    for block in run.blocks:
        record, drawn = _new_record(run, block, today, compiled)
        record["verified"] += devices.get(block.index, [])
        old = run.record(block)
        if old is not None and _same_record(run, block, old, record):
            record = {
                **record,
                "outputs": old["outputs"],
                "seconds": old["seconds"],
                "date": old["date"],
            }
            record["verified"] = _keep_dates(old["verified"], record["verified"])
            drawn = {}
        if not block.options.norun:
            found = _find_copy(run, block, record)
            if isinstance(found, Failure):
                failures[block.index] = found
                continue
            record["copy"] = found
        records.append(record)
        drawings |= drawn
    if failures:
        return Updated(failures)
    proof = Proof(run.page, records)
    if run.proof is not None and run.proof.blocks == records and not drawings:
        return Updated({})
    folder = figure_folder(run.site, run.page)
    try:
        for name, svg in drawings.items():
            write_text(folder / name, svg)
        save_proof(run.site, proof)
        _remove_orphans(folder, records)
    except OSError as error:
        raise PageError(run.file, 1, f"its proof cannot be written: {error}") from None
    return Updated({}, written=True, changes=_changes(run, records, drawings))


def _with_addresses(run: PageRun) -> dict[int, Failure]:
    """Return a failure for each block whose output shows where an object lies in memory."""
    failures: dict[int, Failure] = {}
    for block in run.blocks:
        shows = "" if block.options.norun else address_in(run.ran[block.index].text())
        if shows and not block.options.varies:
            message = f"the output shows an address, {shows}, which differs in every run"
            failures[block.index] = Failure(block.line, message)
    return failures


def _changes(
    run: PageRun, records: Sequence[dict[str, Any]], drawings: dict[str, str]
) -> dict[int, str]:
    changes: dict[int, str] = {}
    for block, record in zip(run.blocks, records, strict=True):
        old = run.record(block)
        if old is None:
            continue
        names = [out["name"] for out in record["outputs"] if out["type"] == "figure"]
        drawn = [name for name in names if any(file.startswith(f"{name}.") for file in drawings)]
        told = [text_diff(_text(old["outputs"]), _text(record["outputs"]))]
        told += [f"figure {name} is drawn anew" for name in drawn]
        if any(told):
            changes[block.index] = "\n".join(part for part in told if part)
    return changes


def _compare_translation(run: PageRun) -> dict[int, Failure]:
    base = base_page(run.site, run.page)
    originals = [block_code(block) for block in collect(run.site, base).blocks]
    theirs = [block_code(block) for block in run.blocks]
    if originals == theirs:
        return {}
    pairs = zip(run.blocks, [*originals, *([None] * len(theirs))], theirs, strict=False)
    differ = next((block for block, one, two in pairs if one != two), run.blocks[-1])
    message = f"the code is not that of {base}, whose proof this page shares"
    return {differ.index: Failure(differ.line, message)}


def _same_record(run: PageRun, block: Block, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if old["key"] != new["key"] or old["status"] != new["status"]:
        return False
    return block.options.norun != "" or not _differs(run, block, old)


def _keep_dates(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def undated(way: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in way.items() if name != "date"}

    known = {repr(undated(way)): way for way in old}
    return [known.get(repr(undated(way)), way) for way in new]


def _new_record(
    run: PageRun, block: Block, today: str, compiled: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a block's record, and its drawings by file name."""
    if block.options.norun:
        key = block_key(
            run.site, run.blocks[: block.index], modules=(), entered=(), files=(), libraries={}
        )
        return {
            "key": key,
            "kind": block.kind,
            "status": "excused",
            "reason": block.options.norun,
            "date": today,
            "seconds": 0.0,
            "verified": [],
            "outputs": [],
            "libraries": {},
            "modules": [],
            "entered": [],
            "files": [],
            "names": {},
            "links": {},
        }, {}
    ran = run.ran[block.index]
    outputs: list[dict[str, Any]] = []
    drawings: dict[str, str] = {}
    for out in ran.outputs:
        if out["type"] != "figure":
            outputs.append(out)
            continue
        name = f"{block.index}-{1 + sum(o['type'] == 'figure' for o in outputs)}"
        width, height = figures.size(out["svg"])
        hashes = {}
        for theme in figures.THEMES:
            drawings[f"{name}.{theme}.svg"] = text = figures.themed(out["svg"], theme)
            hashes[theme] = hashlib.sha256(text.encode()).hexdigest()[:32]
        outputs.append(
            {"type": "figure", "name": name, "width": width, "height": height, "sha256": hashes}
        )
    libraries = _libraries(run, block, ran)
    key = block_key(
        run.site,
        run.blocks[: block.index],
        modules=ran.modules,
        entered=[name for i, each in run.ran.items() if i <= block.index for name in each.entered],
        files=ran.files,
        libraries=libraries,
    )
    verified: list[dict[str, Any]] = [{"how": "cpu", "date": today}]
    if ran.launches:
        verified.append({"how": "interpreter", "date": today})
        verified += compiled[str(block.index)]
    record = {
        "key": key,
        "kind": block.kind,
        "status": "passed",
        "date": today,
        "seconds": round(ran.seconds, 2),
        "verified": verified,
        "outputs": outputs,
        "libraries": libraries,
        "modules": ran.modules,
        "entered": ran.entered,
        "files": ran.files,
        "names": ran.names,
        "links": ran.links,
    }
    return record, drawings


def _find_copy(run: PageRun, block: Block, record: dict[str, Any]) -> dict[str, Any] | Failure:
    """Return the record of the smallest copy that runs alone and does what the page does.

    It must print what the page prints, and at its block's beginning the names that the block reads
    must stand for what they stand for on the page. Where no copy does the latter (a set in another
    order, say), the first that prints the same is taken.
    """
    failure: Failure | None = None
    prints_the_same: dict[str, Any] | None = None
    state = run.ran[block.index].state
    for copy, libraries in candidates(run.site, run.blocks[: block.index]):
        found = {
            "level": copy.level,
            "sha256": copy.sha256,
            "code": copy.code,
            "libraries": libraries,
        }
        failed, ran = _try_copy(run, block, copy, record["outputs"])
        if failed is None and (ran.state == state or block.kind != "code"):
            return found
        failure = failed or failure
        if failed is None:
            prints_the_same = prints_the_same or found
    if prints_the_same is not None:
        return prints_the_same
    assert failure is not None
    return failure


def _compile(run: PageRun, today: str) -> dict[str, list[dict[str, Any]]]:
    """Return for each block that launched kernels how these compile, target by target.

    A target that refuses one of a block's kernels (fp8 on sm_80) is not claimed for the block.
    """
    every: list[dict[str, Any]] = []
    for ran in run.ran.values():
        every += [launch for launch in ran.launches if launch not in every]
    if not every:
        return {}
    from mdproof.triton import compiling

    rows = compiling.compile_launches(every, programs=_own_kernels(run, every))
    found: dict[str, list[dict[str, Any]]] = {}
    for index, ran in run.ran.items():
        ways = []
        for capability in sorted({row["capability"] for row in rows}):
            mine = [
                row
                for row in rows
                if row["capability"] == capability
                and any(all(row[n] == launch[n] for n in launch) for launch in ran.launches)
            ]
            if mine and not any(row["error"] for row in mine):
                kernels = [{name: row[name] for name in _COMPILED} for row in mine]
                target = f"sm_{capability}"
                ways.append(
                    {"how": "compiled", "target": target, "kernels": kernels, "date": today}
                )
        found[str(index)] = ways
    return found


def _own_kernels(run: PageRun, launches: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the program of the kernels that are written on the page, by the page's module name."""
    name = module_name(run.site, run.page)
    own = [
        short_name(launch["kernel"])
        for launch in launches
        if launch["kernel"].partition(":")[0] == name
    ]
    codes = [b.code for b in run.blocks if not b.options.norun and b.kind == "code"]
    return {name: kernel_program("\n".join(codes), own)} if own else {}


def _without_tensor_cores(
    run: PageRun, compiled: dict[str, list[dict[str, Any]]]
) -> dict[int, Failure]:
    """Return where a kernel that a fence says to run on tensor cores does not."""
    failures = {}
    for block in run.blocks:
        ways = compiled.get(str(block.index), [])
        rows = [{**row, "target": way["target"]} for way in ways for row in way["kernels"]]
        for kernel in block.options.tensor_cores.split():
            for sentence in without_tensor_cores(rows, kernel)[:1]:
                failures[block.index] = Failure(block.line, sentence)
    return failures


_COMPILED = (
    "kernel",
    "triton",
    "num_warps",
    "num_stages",
    "registers",
    "stack_bytes",
    "spill_instructions",
    "shared_bytes",
    "tensor_core",
    "ptx",
    "cubin_sha256",
)
"""What a proof keeps of a compiled kernel."""


def check_compiled(run: PageRun) -> Failure | None:
    """Compile the kernels that the page launched, and compare them with the recorded ones."""
    for block in run.blocks:
        failure = run.failure_of(block)
        if failure is not None:
            return failure
    now = _compile(run, "")
    for failure in _without_tensor_cores(run, now).values():
        return failure
    for block in run.blocks:
        record = run.record(block)
        if record is None:
            return Failure(block.line, f"not proven yet: {UPDATE}")
        old = [{**way, "date": ""} for way in record["verified"] if way["how"] == "compiled"]
        if old != now.get(str(block.index), []):
            return Failure(block.line, f"the compiled kernels are not the recorded ones: {UPDATE}")
    return None


def _remove_orphans(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    kept = {
        f"{out['name']}.{theme}.svg"
        for record in records
        for out in record["outputs"]
        if out["type"] == "figure"
        for theme in out["sha256"]
    }
    for file in folder.glob("*.svg") if folder.is_dir() else ():
        if file.name not in kept:
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
