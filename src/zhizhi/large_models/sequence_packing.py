"""Packing fills rows with several texts; unpadding drops the filling; attention must stay apart."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from zhizhi.large_models.flash_attention import flash_attention_varlen


class Packed(NamedTuple):
    """Texts that lie end to end in one row."""

    ids: Int[Tensor, " N"]
    labels: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    documents: Int[Tensor, " N"]
    cu_seqlens: Int[Tensor, " J"]


class Unpadded(NamedTuple):
    """What is left of padded rows, and what puts it back."""

    x: Shaped[Tensor, "N *rest"]
    indices: Int[Tensor, " N"]
    cu_seqlens: Int[Tensor, " J"]
    max_length: int


def next_fit(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    r"""Take texts as they come; what does not fit any more opens the next row.

    Args:
        lengths: Of the texts.
        capacity: Of a row.

    Returns:
        Indices of the texts of each row, in order: at most twice as many rows as the best packing.

    Raises:
        ValueError: If a text is empty or longer than a row.

    Example:
        >>> next_fit([4, 3, 5, 2], capacity=8)
        [[0, 1], [2, 3]]

    Reference:
        Johnson (1973), Near-optimal bin packing algorithms.
    """
    _check_lengths(lengths, capacity)
    rows: list[list[int]] = []
    used = capacity
    for i, length in enumerate(lengths):
        if used + length > capacity:
            rows.append([])
            used = 0
        rows[-1].append(i)
        used += length
    return rows


def first_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    r"""Take the longest first and put each into the oldest row that has room.

    Args:
        lengths: Of the texts.
        capacity: Of a row.

    Returns:
        Indices of the texts of each row: at most 11/9 of the best packing and 6/9 of a row more.

    Raises:
        ValueError: If a text is empty or longer than a row.

    Example:
        >>> first_fit_decreasing([4, 3, 5, 2], capacity=8)
        [[2, 1], [0, 3]]

    Reference:
        Johnson (1973); Dosa (2007) for the constant.
    """
    _check_lengths(lengths, capacity)
    rows: list[list[int]] = []
    room: list[int] = []
    for i in _longest_first(lengths):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def best_fit_decreasing(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    r"""Take the longest first and put each into the fullest row that has room.

    Args:
        lengths: Of the texts.
        capacity: Of a row.

    Returns:
        Indices of the texts of each row.

    Raises:
        ValueError: If a text is empty or longer than a row.

    Example:
        >>> best_fit_decreasing([4, 3, 5, 2], capacity=8)
        [[2, 1], [0, 3]]

    Reference:
        Johnson (1973); Krell et al. (2021), arXiv:2107.02027, for packing of language data.
    """
    _check_lengths(lengths, capacity)
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # room left, row; ascending
    for i in _longest_first(lengths):
        place = bisect_left(by_room, (lengths[i], 0))
        if place == len(by_room):
            row, left = len(rows), capacity
            rows.append([])
        else:
            left, row = by_room.pop(place)
        rows[row].append(i)
        insort(by_room, (left - lengths[i], row))
    return rows


def packing_efficiency(
    lengths: Sequence[int], rows: Sequence[Sequence[int]], *, capacity: int
) -> float:
    r"""Return the part of all positions that holds text.

    $$
    \eta = \frac{\sum_i \ell_i}{n_{\text{rows}}\, C}
    $$

    Args:
        lengths: Of the texts.
        rows: Of a packing.
        capacity: Of a row.

    Returns:
        From 0 to 1.

    Example:
        >>> packing_efficiency([4, 3, 5, 2], [[0, 1], [2, 3]], capacity=8)
        0.875
    """
    return sum(lengths) / (len(rows) * capacity)


def pack(
    texts: Sequence[Int[Tensor, "_"]],
    *,
    labels: Sequence[Int[Tensor, "_"]] | None = None,
    ignore_index: int = -100,
) -> Packed:
    r"""Lay texts end to end; no label asks one text for the first token of the next.

    Args:
        texts: Token ids of each.
        labels: Of each, as long as its text; None takes the ids.
        ignore_index: Label that is not counted.

    Returns:
        One row, with positions that begin again in each text.

    Raises:
        ValueError: If there is no text, one is empty, or labels are of another length.

    Example:
        >>> row = pack([torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
        >>> row.labels.tolist(), row.positions.tolist(), row.cu_seqlens.tolist()
        ([-100, 6, 7, -100, 9], [0, 1, 2, 0, 1], [0, 3, 5])

    Reference:
        Hugging Face transformers, `DataCollatorWithFlattening`.
    """
    lengths = [len(text) for text in texts]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"The texts have lengths {lengths}: each needs a token.")
    targets = texts if labels is None else labels
    if [len(t) for t in targets] != lengths:
        raise ValueError(f"Labels of {[len(t) for t in targets]} for texts of {lengths}.")
    cut = [torch.cat([t.new_full((1,), ignore_index), t[1:]]) for t in targets]
    return Packed(
        torch.cat(list(texts)),
        torch.cat(cut),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        torch.tensor([0, *lengths]).cumsum(0),
    )


def unpad(x: Shaped[Tensor, "B T *rest"], mask: Bool[Tensor, "B T"]) -> Unpadded:
    r"""Keep the positions that hold text, row after row.

    Args:
        x: Padded rows.
        mask: True where there is text; what stands on which side does not matter.

    Returns:
        The kept positions, their places in the flattened rows, the boundaries of the rows.

    Example:
        >>> x = torch.tensor([[1, 2, 0], [0, 3, 4]])
        >>> unpad(x, x != 0)[:3]
        (tensor([1, 2, 3, 4]), tensor([0, 1, 4, 5]), tensor([0, 2, 4]))

    Reference:
        Dao-AILab/flash-attention, `unpad_input` in `bert_padding.py`.
    """
    indices = mask.flatten().nonzero()[:, 0]
    lengths = mask.sum(dim=1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Unpadded(x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()))


def pad(
    x: Shaped[Tensor, "N *rest"], indices: Int[Tensor, " N"], *, batch: int, length: int
) -> Shaped[Tensor, "B T *rest"]:
    r"""Put kept positions back into rows, with zeros elsewhere.

    Args:
        x: Of `unpad`, or what a model made of it.
        indices: Of `unpad`.
        batch: B.
        length: T.

    Returns:
        Padded rows.

    Example:
        >>> pad(torch.tensor([7, 8]), torch.tensor([0, 3]), batch=2, length=2)
        tensor([[7, 0],
                [0, 8]])
    """
    rows = x.new_zeros(batch * length, *x.shape[1:])
    rows[indices] = x
    return rows.reshape(batch, length, *x.shape[1:])


def document_mask(documents: Int[Tensor, " N"]) -> Bool[Tensor, "N N"]:
    r"""Say which positions of a packed row each may read: those of its own text up to itself.

    $$
    M_{ij} = [\, d_i = d_j \,]\,[\, i \ge j \,]
    $$

    Args:
        documents: Number of the text at each position.

    Returns:
        True where a query i may read a key j.

    Example:
        >>> document_mask(torch.tensor([0, 0, 1])).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 0, 1]], dtype=torch.int32)
    """
    same = documents[:, None] == documents
    return same.tril()  # (eq:packing-mask)


def varlen_attention(cu_seqlens: Int[Tensor, " J"]) -> Callable[..., Tensor]:
    r"""Return attention for one packed row, to stand in for `grouped_query_attention`.

    Args:
        cu_seqlens: Boundaries of the texts.

    Returns:
        A function of q, k, v of shape [1, N, heads, width] and `causal`.

    Example:
        >>> attend = varlen_attention(torch.tensor([0, 1, 2]))
        >>> q = torch.zeros(1, 2, 1, 4)
        >>> attend(q, q, torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1), causal=True).flatten()
        tensor([1., 5.])
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v = (rearrange(x, "1 N H Dh -> N H Dh") for x in (q, k, v))
        return flash_attention_varlen(q, k, v, cu_seqlens, causal=causal)[None]

    return attend


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    r"""Replace an attribute for the length of a `with` block, whatever happens in it.

    Args:
        owner: A module, class or object.
        name: Of an attribute it has.
        value: What stands there meanwhile.

    Raises:
        AttributeError: If there is no such attribute: a patch under a wrong name does nothing.

    Example:
        >>> import math
        >>> with patched(math, "pi", 3):
        ...     math.pi
        3
        >>> round(math.pi, 2)
        3.14
    """
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _check_lengths(lengths: Sequence[int], capacity: int) -> None:
    for i, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"Text {i} has length {length}: 1 <= length <= {capacity}, the capacity."
            )
