"""What launches moved and computed, to be printed and compared with a formula."""

from dataclasses import dataclass, field


@dataclass
class Traffic:
    """What one launch moved and computed.

    Attributes:
        kernel: Name of the kernel.
        programs: Number of programs that ran.
        bytes_loaded: Bytes that loads touched, masked-out elements not counted.
        bytes_stored: The same for stores.
        bytes_atomic: The same for atomic operations.
        distinct_loaded: Different bytes among those loaded: what a perfect cache would let through.
        distinct_stored: Different bytes among those stored.
        flops: Floating-point operations of `tl.dot`, 2MNK each.
        elementwise_flops: Additions, products, quotients, extrema of single elements, those of
            reductions too; a fused multiply-add is two. Masked lanes compute, so they count.
        special_flops: Exponentials, logarithms, roots, sines and their like.
    """

    kernel: str
    programs: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    bytes_atomic: int = 0
    distinct_loaded: int | None = None
    distinct_stored: int | None = None
    flops: int = 0
    elementwise_flops: int = 0
    special_flops: int = 0


@dataclass
class Trace:
    """What the launches inside one `probe` did; a count is the sum over them.

    Attributes:
        kernels: One entry a launch, in order.
        out_of_bounds: A sentence for each access outside the tensor its pointer was made from.
        races: A sentence for each access of a program that meets one of another program of the same
            launch, one of the two a store, and no atomic operation between them; and for each store
            of two values at one address.
        uninitialised: A sentence for each read of memory that came from `torch.empty` inside the
            probe and that nothing had written.
    """

    kernels: list[Traffic] = field(default_factory=list)
    out_of_bounds: list[str] = field(default_factory=list)
    races: list[str] = field(default_factory=list)
    uninitialised: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Number of kernel launches."""
        return len(self.kernels)

    @property
    def defects(self) -> list[str]:
        """All sentences."""
        return [*self.out_of_bounds, *self.races, *self.uninitialised]

    def __getattr__(self, name: str) -> int:
        """Return a count of `Traffic`, summed over the launches."""
        if name == "kernel" or name not in Traffic.__dataclass_fields__:
            raise AttributeError(f"a trace has no {name}")
        return sum(getattr(launch, name) for launch in self.kernels)

    def table(self) -> str:
        """Return a line for each launch: programs, bytes and operations."""
        names = ("programs", "bytes_loaded", "bytes_stored", "bytes_atomic", "flops")
        rows = [("kernel", *(name.replace("_", " ") for name in names))]
        rows += [(k.kernel, *(str(getattr(k, name)) for name in names)) for k in self.kernels]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )
