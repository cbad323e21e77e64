"""One page on its way to a proof: its fences, where they run, what they did, what is recorded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mdproof.block import Block
from mdproof.collect import Collected, collect, shown
from mdproof.copy import stale_reasons
from mdproof.device import Device, outdated, ways_of
from mdproof.gpu import find_device
from mdproof.proof import Proof, imported_names, load_proof
from mdproof.runner import Failure, Ran, Server, page_job
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
