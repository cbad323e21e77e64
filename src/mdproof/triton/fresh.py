"""Memory that was asked for and not written: `torch.empty` in a probe is watched byte by byte."""

from typing import Any

import numpy as np
import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mdproof.triton.addresses import byte_view

_EMPTY = {
    "empty",
    "empty_like",
    "empty_strided",
    "empty_permuted",
    "new_empty",
    "new_empty_strided",
}
_LOOKS_AT_NO_DATA = ("_like", "new_", "empty", "set_", "resize_", "is_", "sym_", "size", "stride")


class Fresh(TorchDispatchMode):
    """Knows which bytes of fresh memory have been written, and notes who reads others.

    Fresh storages are kept alive until the context ends, so that no address is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.notes: list[str] = []
        self._written: dict[int, tuple[Any, np.ndarray]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation of torch, and learn what it reads and writes."""
        kwargs = kwargs or {}
        if self.paused:  # the interpreter moves arguments about
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        written: list[torch.Tensor] = []
        for argument, given in self._arguments(func, args, kwargs):
            for tensor in _pytree.tree_leaves(given):
                if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
                    continue
                if argument.alias_info is None:
                    self._read(name, tensor)
                elif argument.alias_info.is_write and name not in ("set_", "resize_"):
                    written.append(tensor)
        out = func(*args, **kwargs)
        for tensor in written:
            flags = self._flags(tensor)
            if flags is not None:
                flags[...] = True
        if name in _EMPTY and out.device.type == "cpu" and out.numel():
            storage = out.untyped_storage()
            self._written[storage.data_ptr()] = storage, np.zeros(storage.nbytes(), bool)
        return out

    @staticmethod
    def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        named = {argument.name: argument for argument in func._schema.arguments}
        pairs = list(zip(func._schema.arguments, args, strict=False))
        return pairs + [(named[name], value) for name, value in kwargs.items() if name in named]

    def _flags(self, tensor: torch.Tensor) -> np.ndarray | None:
        if tensor.layout != torch.strided or not tensor.numel():
            return None
        low = tensor.untyped_storage().data_ptr()
        found = self._written.get(low)
        return byte_view(found[1], low, tensor) if found is not None else None

    def _read(self, name: str, tensor: torch.Tensor) -> None:
        if any(part in name for part in _LOOKS_AT_NO_DATA):
            return
        flags = self._flags(tensor)
        if flags is not None and not flags.all():
            count = int((~flags.all(-1)).sum())
            self.notes.append(f"{name} reads {count} elements that nothing has written")

    def unwritten(self, addresses: np.ndarray, width: int) -> int:
        """Return how many of these accesses read a byte that nothing has written."""
        count = 0
        for low, (storage, flags) in self._written.items():
            mine = (addresses >= np.uint64(low)) & (addresses < np.uint64(low + storage.nbytes()))
            if mine.any():
                offset = (addresses[mine] - np.uint64(low)).astype(np.int64)
                count += int((~flags[offset[:, None] + np.arange(width)].all(1)).sum())
        return count

    def write(self, addresses: np.ndarray, width: int) -> None:
        """Note that a kernel wrote here."""
        for low, (storage, flags) in self._written.items():
            mine = (addresses >= np.uint64(low)) & (addresses < np.uint64(low + storage.nbytes()))
            if mine.any():
                offset = (addresses[mine] - np.uint64(low)).astype(np.int64)
                flags[(offset[:, None] + np.arange(width)).ravel()] = True
