"""What a page may not do while it runs: reach the network, or write into the repository.

Two fences keep off the network: an audit hook names the host and the block, and where the kernel
allows it the page's process has a network of its own in which only the loopback exists, which holds
for programs that it starts, in whatever language. Only the standard library is used here.
"""

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import sys
from typing import Any

_NEWNET, _NEWUSER = 0x40000000, 0x10000000
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1
_BY_ADDRESS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg"})
_BY_NAME = frozenset({"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"})

_CHANGING = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.link": 2,
    "os.symlink": 2, "os.chmod": 1, "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip
"""Events that change files, and how many of their arguments are paths."""

CLOSED = "MDPROOF_OFFLINE"
"""The variable that tells a Python that a page starts to keep off the network, too."""


class NetworkError(OSError):
    """A page reached for another host."""


def is_local(host: Any) -> bool:
    """Tell whether a host is this machine, as far as its name says."""
    if host is None or host in ("", b"", "localhost", "<broadcast>"):
        return True
    text = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    if text.partition(".")[0].lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text.lower() in {socket.gethostname().lower(), "localhost.localdomain"}
    return address.is_loopback or address.is_unspecified


class NetworkGuard:
    """Refuses what leaves this machine, and remembers it.

    Attributes:
        allowed: Whether the network is open just now.
        attempts: "host:port" of everything that was refused.
    """

    def __init__(self) -> None:
        self.allowed = False
        self.attempts: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed or event not in _BY_ADDRESS | _BY_NAME:
            return
        if event in _BY_NAME:
            host, port = args[0], args[1] if event == "socket.getaddrinfo" else None
        else:
            address = args[1]
            if not isinstance(address, tuple) or len(address) < 2:
                return  # a socket in the file system, or one that needs no address
            host, port = address[0], address[1]
        if not is_local(host):
            name = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
            self.attempts.append(name + (f":{port}" if port is not None else ""))
            raise NetworkError(refusal(self.attempts[-1]))


class Guard(NetworkGuard):
    """Refuses the network, and writing below a folder; remembers both.

    Args:
        root: The repository, which a page may read.
        folder: The page's own folder, in which it may write wherever it lies.
    """

    def __init__(self, root: str, folder: str) -> None:
        self.written: list[str] = []
        self._roots = tuple({f"{root}{os.sep}", os.path.realpath(root) + os.sep})
        self._folder = os.path.realpath(folder) + os.sep
        super().__init__()

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        super()._audit(event, args)
        if event == "open":
            flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
            paths = args[:1] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ()
        else:
            paths = args[: _CHANGING.get(event, 0)]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                full = os.path.realpath(os.fsdecode(path))
                ours = full.startswith(self._roots) and not f"{full}{os.sep}".startswith(
                    self._folder
                )
                if ours and f"{os.sep}__pycache__" not in full:  # Python keeps bytecode there
                    self.written.append(full[len(self._roots[0]) :])
                    raise PermissionError(f"a page does not write into the repository: {full}")


def refusal(place: str) -> str:
    """Return what is said to a block that reached for another host."""
    return f'the page reaches for {place}: it runs offline, unless its fence says network="reason"'


def leave_network() -> bool:
    """Give this process a network that has nothing but the loopback; tell whether it could be.

    It must have one thread only. Root needs nothing else; another user becomes itself in a user
    namespace, which some systems forbid.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.getuid(), os.getgid()
        if libc.unshare(_NEWNET) != 0:
            if libc.unshare(_NEWUSER | _NEWNET) != 0:
                return False
            for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                               ("gid_map", f"{group} {group} 1")):  # fmt: skip
                with open(f"/proc/self/{name}", "w", encoding="ascii") as stream:
                    stream.write(text)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = struct.pack("16sh14s", b"lo", 0, b"")
            flags = struct.unpack("16sh14s", fcntl.ioctl(control, _GET_FLAGS, request))[1]
            fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh14s", b"lo", flags | _UP, b""))
        return True
    return False
