"""Device proofs: a page's kernels run on a GPU, what they printed is what is recorded, and by whom.

A record that names a device is made only by running there. On a machine without one it is kept: it
holds as long as the kernels, the block and the launches are the same, and is shown as outdated
afterwards. What a device is stands behind two methods, so that the rest can be tested without one.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mdproof.block import Block
from mdproof.kernel_source import kernel_sources
from mdproof.normal import digest
from mdproof.proof import block_code, module_file
from mdproof.runner import Ran
from mdproof.site import Site

_TEXTS = ("device", "triton", "torch", "date", "key", "launches")
_KERNEL = ("kernel", "cubin_sha256", "registers", "spills", "shared_bytes", "num_warps")


class Device(Protocol):
    """A machine's accelerator.

    Attributes:
        name: What the driver calls it.
        versions: Versions of `torch` and `triton` there.
    """

    name: str
    versions: Mapping[str, str]

    def run(self, job: dict[str, Any]) -> list[Ran]:
        """Run a page's blocks where kernels are compiled for the device."""
        ...

    def close(self) -> None:
        """End what runs there."""
        ...


def device_key(site: Site, blocks: Sequence[Block], kernels: Sequence[str]) -> str:
    """Return what a device proof stands and falls with; nothing is imported for it.

    Args:
        site: The site.
        blocks: The page's blocks up to the one that the proof is of.
        kernels: The kernels that it launches. If one is written on the page, all these blocks
            count, and otherwise only the last.
    """
    here = all(module_file(name.partition(":")[0], site) is not None for name in kernels)
    codes = [block_code(block) for block in (blocks[-1:] if here else blocks)]
    return digest("device", *codes, kernel_sources(site, kernels))


def launch_digest(launches: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of what was launched, with which types, constants and options."""
    return digest(*sorted(json.dumps(launch, sort_keys=True) for launch in launches))


def kernels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of kernels, "module:name", each once."""
    return sorted({row["kernel"] for row in rows})


def ways_of(record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the device proofs of a record."""
    return [way for way in (record or {}).get("verified", ()) if way["how"] == "device"]


def outdated(site: Site, blocks: Sequence[Block], way: Mapping[str, Any]) -> str:
    """Return why a device proof no longer holds, "" if it does."""
    if device_key(site, blocks, kernels_of(way.get("kernels", ()))) != way.get("key"):
        return "the kernel or its block changed"
    return way.get("outdated", "")


def new_way(
    site: Site,
    blocks: Sequence[Block],
    device: Device,
    launches: Sequence[Mapping[str, Any]],
    ran: Ran,
    today: str,
) -> dict[str, Any]:
    """Return the proof that a block ran on a device.

    Args:
        site: The site.
        blocks: The page's blocks up to this one.
        device: Where it ran.
        launches: What the interpreter launched, which is what the proof holds for.
        ran: What the block did on the device.
        today: The date.
    """
    kernels = [{name: row[name] for name in _KERNEL if name in row} for row in ran.launches]
    kernels.sort(key=lambda row: json.dumps(row, sort_keys=True))
    return {
        "how": "device",
        "device": device.name,
        "triton": device.versions["triton"],
        "torch": device.versions["torch"],
        "date": today,
        "key": device_key(site, blocks, kernels_of(kernels)),
        "launches": launch_digest(launches),
        "kernels": kernels,
    }


def kept_ways(
    site: Site,
    blocks: Sequence[Block],
    launches: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return the device proofs that the last of `blocks` keeps where no device is at hand.

    One that holds for the block is found wherever the page's old records have it; else those that
    stood at the block's place stay, and are shown as outdated.
    """
    if not launches:
        return []
    kernels = kernels_of(launches)
    key, now = device_key(site, blocks, kernels), launch_digest(launches)
    found = [way for record in records for way in ways_of(record) if way["key"] == key]
    if not found and len(blocks) <= len(records):
        found = ways_of(records[len(blocks) - 1])
    kept: dict[str, dict[str, Any]] = {}
    for way in found:
        way = {name: value for name, value in way.items() if name != "outdated"}
        if way["launches"] != now:
            way["outdated"] = "the launches changed"
        kept.setdefault(way["device"], way)
    return list(kept.values())


def check_way(
    site: Site,
    blocks: Sequence[Block],
    way: Mapping[str, Any],
    launches: Sequence[Mapping[str, Any]],
) -> str:
    """Return what is wrong with a recorded device proof, as far as it can be told without a device.

    That a kernel gave these numbers there, only the device can tell; that the record is about this
    block, these kernels and these launches can be told anywhere.
    """
    missing = [name for name in _TEXTS if not isinstance(way.get(name), str) or not way[name]]
    if missing or not way.get("kernels"):
        return f"the record of a device lacks {', '.join(missing) or 'its kernels'}"
    try:
        day = datetime.date.fromisoformat(way["date"])
    except ValueError:
        return f"the record of {way['device']} is dated {way['date']!r}"
    if day > datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=1):
        return f"the record of {way['device']} is dated in the future, {way['date']}"
    if not launches:
        return f"the record claims {way['device']}; the block launches no kernel"
    if outdated(site, blocks, way):
        return ""  # it claims nothing any more
    if kernels_of(way["kernels"]) != kernels_of(launches):
        claimed = ", ".join(kernels_of(way["kernels"]))
        return f"the record claims {way['device']} for {claimed}, which the block does not launch"
    if way["launches"] != launch_digest(launches):
        return f"the record of {way['device']} is of other launches"
    return ""
