"""The books of one launch: where its arguments lie, who touched which byte, what orders whom."""

from typing import Any

import numpy as np
import torch

KEY = "mdproof.region"
"""Under this name a pointer carries the region of the argument that it was made from."""


def byte_view(flags: np.ndarray, low: int, tensor: torch.Tensor) -> np.ndarray:
    """Return the entries of `flags`, one a byte from address `low` on, that a tensor covers."""
    width = tensor.element_size()
    strides = [stride * width for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(
        flags[tensor.data_ptr() - low :],
        shape=(*tensor.shape, width),
        strides=(*strides, 1),
    )


DOES = {"load": "loads", "store": "stores", "atomic": "updates"}


class Region:
    """The bytes that one tensor covers: a range, and a mask where its strides leave holes."""

    def __init__(self, tensor: torch.Tensor, *, whole_storage: bool) -> None:
        storage = tensor.untyped_storage()
        self.base = storage.data_ptr()
        self.end = self.base + storage.nbytes()
        self.low, self.high, self.mask = self.base, self.end, None
        if whole_storage or not tensor.numel():
            self.high = self.end if whole_storage else self.low
            return
        self.low = tensor.data_ptr()
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.high = self.low + (last + 1) * tensor.element_size()
        if (last + 1) != tensor.numel():
            self.mask = np.zeros(self.high - self.low, dtype=bool)  # committed where it is touched
            byte_view(self.mask, self.low, tensor)[...] = True

    def holds(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Tell for each address whether the access of `width` bytes stays inside."""
        inside = (addresses >= np.uint64(self.low)) & (addresses + np.uint64(width) <= self.high)
        if self.mask is not None and inside.any():
            first = (addresses[inside] - np.uint64(self.low)).astype(np.int64)
            inside[inside] = self.mask[first] & self.mask[first + width - 1]
        return inside


class _Storage:
    """For each byte the moment of the last access of a kind, 0 if there was none."""

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.last = {kind: np.zeros(high - low, np.int32) for kind in ("load", "store", "atomic")}
        self.several = np.zeros(high - low, bool)  # more than one program has loaded it


_AGAINST = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("store", "load"),
}


class Books:
    """The regions of a launch, and who touched them.

    Programs run one after the other, so a moment before the current program began belongs to
    another one. That is a race unless an atomic operation orders the two: what a program did before
    it released an address (an atomic on one element, as in a semaphore) is seen by each program
    that acquires this address later.
    """

    def __init__(self, name: str, *, races: bool) -> None:
        self.name, self.races = name, races
        self.program = 0
        self.regions: list[Region] = []
        self._storages: dict[int, _Storage] = {}
        self._now = 0
        self._begun: list[int] = []  # the first moment of each program, in order
        self._ran: list[int] = []
        self._seen: dict[int, int] = {}  # by position in `_ran`, up to which moment
        self._released: dict[int, dict[int, int]] = {}

    def begin(self, program: int) -> None:
        """Open the account of the next program."""
        self.program = program
        self._begun.append(self._now + 1)
        self._ran.append(program)
        self._seen = {}

    def inside(self, region: Region | None, addresses: np.ndarray, width: int) -> np.ndarray:
        """Tell for each address whether it lies in its region, or in any if that is unknown."""
        if region is not None:
            return region.holds(addresses, width)
        inside = np.zeros(addresses.shape, bool)
        for known in self.regions:
            inside |= known.holds(addresses, width)
        return inside

    def enter(self, kind: str, addresses: np.ndarray, width: int) -> str:
        """Enter one access into the books; return the sentence of a race, or ""."""
        self._now += 1
        sentence = ""
        for low, high in {(region.base, region.end) for region in self.regions}:
            mine = (addresses >= np.uint64(low)) & (addresses < np.uint64(high))
            if not mine.any():
                continue
            if low not in self._storages:
                self._storages[low] = _Storage(low, high)
            offset = (addresses[mine] - np.uint64(low)).astype(np.int64)
            offset = (offset[:, None] + np.arange(width)).ravel()
            sentence = self._conflict(self._storages[low], kind, offset) or sentence
        return sentence

    def _conflict(self, storage: _Storage, kind: str, offset: np.ndarray) -> str:
        begun, sentence = self._begun[-1], ""
        for other in _AGAINST[kind]:
            moments = storage.last[other][offset]
            several = storage.several[offset] if other == "load" else np.zeros(len(offset), bool)
            foreign = ((moments != 0) & (moments < begun)) | several
            if not foreign.any():
                continue
            racing = foreign & ~self._ordered(moments, several)
            if racing.any():
                first = int(np.argmax(racing))
                who = f"program {self._who(moments[first])}"
                who = "several programs" if several[first] else who
                does = f"{DOES[kind]} where {who} {DOES[other]}"
                sentence = f"{self.name}: program {self.program} {does}"
        if kind == "load":
            before = storage.last["load"][offset]
            storage.several[offset] |= (before != 0) & (before < begun)
        storage.last[kind][offset] = self._now
        return sentence

    def _position(self, moments: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._begun, moments, side="right") - 1

    def _who(self, moment: int) -> int:
        return self._ran[int(self._position(np.array([moment]))[0])]

    def _ordered(self, moments: np.ndarray, several: np.ndarray) -> np.ndarray:
        if not self._seen:
            return np.zeros(len(moments), bool)
        limits = np.array([self._seen.get(i, -1) for i in range(len(self._begun))])
        everyone = len(self._seen) >= len(self._begun) - 1
        before = (moments >= self._begun[-1]) | (moments <= limits[self._position(moments)])
        return before & (~several | everyone)

    def synchronise(self, address: int, *, acquires: bool, releases: bool) -> None:
        """Let an atomic operation order this program after those that released the address."""
        if acquires:
            for position, moment in self._released.get(address, {}).items():
                self._seen[position] = max(self._seen.get(position, 0), moment)
        if releases:
            mine = {**self._seen, len(self._begun) - 1: self._now}
            known = self._released.setdefault(address, {})
            for position, moment in mine.items():
                known[position] = max(known.get(position, 0), moment)

    def distinct(self, kind: str) -> int:
        """Return how many different bytes were loaded or stored."""
        return sum(int(np.count_nonzero(s.last[kind])) for s in self._storages.values())


def tensors_in(arguments: Any) -> list[torch.Tensor]:
    """Return the tensors among arguments, those of descriptors and tuples too."""
    if isinstance(arguments, tuple | list):
        return [tensor for argument in arguments for tensor in tensors_in(argument)]
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    base = getattr(arguments, "base", None)  # of a tensor descriptor, or of a reinterpreted tensor
    return tensors_in(base) if base is not None else []
