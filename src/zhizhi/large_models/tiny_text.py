"""A text of 34 kB that ships with the project, enough for a small language model."""

from importlib.resources import files

import torch
from jaxtyping import Int
from torch import Tensor


def tiny_text() -> str:
    r"""Return the first eleven chapters of Genesis, a verse a line, a blank line between chapters.

    Returns:
        ASCII text.

    Example:
        >>> text = tiny_text()
        >>> len(text), len(set(text))
        (34849, 59)
        >>> text[:28]
        'In the beginning God created'

    Reference:
        The King James Version (1611), Genesis 1-11; in the public domain.
    """
    return files("zhizhi.large_models").joinpath("genesis.txt").read_text(encoding="utf-8")


def char_ids(text: str, alphabet: str) -> Int[Tensor, " N"]:
    r"""Number the characters of a text by their place in an alphabet.

    Args:
        text: What is numbered.
        alphabet: Every character once; its index is the id.

    Returns:
        Int64 ids.

    Raises:
        ValueError: If the text has a character that the alphabet lacks.

    Example:
        >>> char_ids("abba", "ab")
        tensor([0, 1, 1, 0])
    """
    number = {character: i for i, character in enumerate(alphabet)}
    missing = sorted(set(text) - set(number))
    if missing:
        raise ValueError(f"The alphabet lacks {missing}: every character of the text needs an id.")
    return torch.tensor([number[character] for character in text])


def text_batch(
    ids: Int[Tensor, " N"], *, batch: int, length: int, generator: torch.Generator | None = None
) -> Int[Tensor, "batch window"]:
    r"""Cut windows out of a text at random; the last column is only ever a target.

    Args:
        ids: The text.
        batch: Number of windows.
        length: Positions that predict; a window has one id more.
        generator: Draws the starts.

    Returns:
        Windows; inputs are all but the last column, targets all but the first.

    Raises:
        ValueError: If the text is no longer than `length`.

    Example:
        >>> text_batch(torch.arange(4), batch=2, length=3).tolist()
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    if len(ids) <= length:
        raise ValueError(f"The text has {len(ids)} ids: a window needs length + 1 = {length + 1}.")
    starts = torch.randint(len(ids) - length, (batch, 1), generator=generator)
    return ids[starts + torch.arange(length + 1)]
