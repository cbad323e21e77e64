"""Byte-pair encoding: start from bytes, join the commonest neighbours, again and again."""

import codecs
import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

WORDS = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
WORDS_AND_DIGITS = WORDS.replace(r" ?\d+", r"\d")

Pair = tuple[int, int]


def _byte_order() -> list[int]:
    """List the 256 bytes as GPT-2 numbers them: those with a visible Latin-1 character first."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return visible + [b for b in range(256) if b not in set(visible)]


BYTES = _byte_order()
BYTE_ID = {b: i for i, b in enumerate(BYTES)}


def merge_pair(ids: Sequence[int], pair: Pair, new: int) -> list[int]:
    r"""Replace a pair of neighbours by one id, from left to right and without overlap.

    Args:
        ids: A word.
        pair: Two ids.
        new: Their new id.

    Returns:
        The shorter word.

    Example:
        >>> merge_pair([1, 1, 1, 2], (1, 1), 9)
        [9, 1, 2]
    """
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, pattern: str = WORDS, min_count: int = 2
) -> list[Pair]:
    r"""Learn merges: at each step the pair that occurs most often inside words, ties to low ids.

    $$
    (a, b)^\star = \arg\max_{(a,b)} \sum_{w} n_w \cdot \#\{\text{neighbours } a, b \text{ in } w\}
    $$

    Args:
        texts: What is counted.
        vocab_size: 256 bytes and one token a merge; fewer if no pair is left.
        pattern: Regular expression that cuts words; no merge crosses a cut.
        min_count: Occurrences that a pair must have.

    Returns:
        Pairs of ids in the order they were learnt; pair i makes token 256 + i.

    Raises:
        ValueError: If the vocabulary has no room for the bytes.

    Example:
        >>> merges = train_bpe(["hug hug hugs pug"], vocab_size=258)
        >>> [tuple(chr(BYTES[x]) if x < 256 else x for x in pair) for pair in merges]
        [('u', 'g'), ('h', 256)]

    Reference:
        Sennrich et al. (2016), arXiv:1508.07909, Algorithm 1; on bytes: Radford et al. (2019),
        Sec. 2.2.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size is {vocab_size}: the bytes alone need 256.")
    counts = Counter(word for text in texts for word in re.findall(pattern, text))
    words = [[BYTE_ID[b] for b in word.encode()] for word in counts]
    weight = list(counts.values())
    occurs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            occurs[pair] += weight[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in occurs.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and 256 + len(merges) < vocab_size:
        n, pair = heapq.heappop(heap)
        if -n != occurs[pair]:  # counted anew since; the right entry is further down
            continue
        if -n < max(min_count, 1):
            break
        new = 256 + len(merges)
        merges.append(pair)  # (eq:bpe-merge)
        changed: set[Pair] = set()
        for i in where.pop(pair):
            for old in pairwise(words[i]):
                occurs[old] -= weight[i]
                changed.add(old)
            words[i] = merge_pair(words[i], pair, new)
            for fresh in pairwise(words[i]):
                occurs[fresh] += weight[i]
                where[fresh].add(i)
                changed.add(fresh)
        for other in changed:
            if occurs[other] > 0:
                heapq.heappush(heap, (-occurs[other], other))
    return merges


class BPETokenizer:
    r"""Text to ids and back, for every text: what no merge covers stays bytes.

    Args:
        merges: Of `train_bpe`.
        pattern: The one they were trained with.
        special: Tokens that stand for no text, such as an end of text; they come last.

    Raises:
        ValueError: If a merge names an id that is not made yet, or a special token is empty or
            named twice.

    Example:
        >>> tokenizer = BPETokenizer(train_bpe(["hug hug hugs"], vocab_size=300), special=["<end>"])
        >>> ids = tokenizer.encode("hugs, 你好")
        >>> tokenizer.decode(ids)
        'hugs, 你好'
        >>> tokenizer.encode("<end>", allow_special=True) == [tokenizer.vocab_size - 1]
        True

    Reference:
        Radford et al. (2019), Language Models are Unsupervised Multitask Learners, Sec. 2.2.
    """

    def __init__(
        self, merges: Sequence[Pair], *, pattern: str = WORDS, special: Sequence[str] = ()
    ) -> None:
        self.merges, self.pattern = [(int(a), int(b)) for a, b in merges], pattern
        self._tokens = [bytes([b]) for b in BYTES]
        for i, (a, b) in enumerate(self.merges):
            if not 0 <= min(a, b) <= max(a, b) < 256 + i:
                raise ValueError(
                    f"Merge {i} joins {a} and {b}: only ids below {256 + i} exist yet."
                )
            self._tokens.append(self._tokens[a] + self._tokens[b])
        if len(set(special)) < len(special) or not all(special):
            raise ValueError(f"special is {list(special)}: each needs a name of its own.")
        self.special = {name: len(self._tokens) + i for i, name in enumerate(special)}
        self._names = {i: name for name, i in self.special.items()}
        self._rank = {pair: i for i, pair in enumerate(self.merges)}
        self._words: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Bytes, merges and special tokens."""
        return len(self._tokens) + len(self.special)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id stands for; a special token's are those of its name.

        Args:
            token: An id.

        Raises:
            ValueError: If there is no such id.
        """
        if token in self._names:
            return self._names[token].encode()
        if not 0 <= token < len(self._tokens):
            raise ValueError(f"Token {token}: ids go from 0 to {self.vocab_size - 1}.")
        return self._tokens[token]

    def _encode_word(self, word: str) -> list[int]:
        """Join, as long as a learnt pair is left, the one that was learnt first."""
        if word not in self._words:
            ids = [BYTE_ID[b] for b in word.encode()]
            while len(ids) > 1:
                pair = min(pairwise(ids), key=lambda p: self._rank.get(p, math.inf))
                if pair not in self._rank:
                    break
                ids = merge_pair(ids, pair, 256 + self._rank[pair])  # (eq:bpe-encode)
            self._words[word] = ids
        return self._words[word]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: Any text without lone surrogates.
            allow_special: Whether names of special tokens in the text mean the tokens. Off for what
                users write: their text must not end the text.
        """
        if allow_special and self.special:
            names = sorted(self.special, key=len, reverse=True)
            parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        else:
            parts = [text]
        ids: list[int] = []
        for part in parts:
            if allow_special and part in self.special:
                ids.append(self.special[part])
            else:
                for word in re.findall(self.pattern, part):
                    ids += self._encode_word(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become the replacement character.

        Args:
            ids: Tokens.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode(errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Give text as tokens come, and hold back a character until its last byte is there.

        Args:
            ids: Tokens, one after the other.

        Yields:
            A piece of text for each token, often empty; at the end what was left over.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.token_bytes(i))
        yield decoder.decode(b"", final=True)

    def save(self, path: str | Path) -> None:
        """Write merges, pattern and special tokens as JSON.

        Args:
            path: Of the file.
        """
        state = {"pattern": self.pattern, "special": list(self.special), "merges": self.merges}
        Path(path).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read what `save` wrote.

        Args:
            path: Of the file.

        Raises:
            ValueError: If it is not such a file.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            merges = [(a, b) for a, b in state["merges"]]
            pattern, special = state["pattern"], state["special"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no tokenizer written by save: {error}.") from error
        return cls(merges, pattern=pattern, special=special)


def bits_per_byte(nats_per_token: float, *, n_tokens: int, n_bytes: int) -> float:
    r"""Make losses of different tokenizers comparable.

    $$
    \text{bits a byte} = \frac{\text{nats a token}}{\ln 2} \cdot
        \frac{\text{tokens}}{\text{bytes}}
    $$

    Args:
        nats_per_token: Mean loss.
        n_tokens: Tokens of the text.
        n_bytes: Bytes of the same text in UTF-8.

    Returns:
        Bits.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> bits_per_byte(math.log(2) * 4, n_tokens=100, n_bytes=400)
        1.0
    """
    if n_tokens < 1 or n_bytes < 1:
        raise ValueError(f"n_tokens is {n_tokens} and n_bytes {n_bytes}: both at least 1.")
    return nats_per_token / math.log(2) * n_tokens / n_bytes  # (eq:bpe-bits)
