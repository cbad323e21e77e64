"""Instruction tuning: make instructions, keep the new ones, ask the loss only for the answers."""

import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
UNFIT = ("image", "graph", "picture", "file", "map", "draw", "plot", "video", "audio", "music")
IGNORE = -100


class Example(NamedTuple):
    """Tokens of a prompt and its answer, and the labels: IGNORE on the prompt."""

    ids: Int[Tensor, " T"]
    labels: Int[Tensor, " T"]


class Batch(NamedTuple):
    """Examples filled up to one length; the mask is true where there are tokens."""

    ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]


def prompt_of(instruction: str, *, context: str = "") -> str:
    r"""Put an instruction, and an input if there is one, into Alpaca's template.

    Args:
        instruction: What is asked.
        context: The input of about 40 % of the examples.

    Returns:
        Text that ends where the answer begins.

    Example:
        >>> prompt_of("Add.", context="1 2").splitlines()[-4:]
        ['### Input:', '1 2', '', '### Response:']

    Reference:
        tatsu-lab/stanford_alpaca, `PROMPT_DICT` in `train.py`.
    """
    if context:
        return WITH_INPUT.format(instruction=instruction, input=context)
    return WITHOUT_INPUT.format(instruction=instruction)


def encode_example(
    prompt: str, answer: str, *, encode: Callable[[str], Sequence[int]], eos: int
) -> Example:
    r"""Encode prompt and answer each by itself, end the answer, and mask the prompt.

    When a model answers, the prompt has been encoded without the answer; so it is here, and the
    mask is exact. Encoding both at once may join the last token of the one with the first of the
    other.

    Args:
        prompt: Of `prompt_of`.
        answer: What is to be learnt.
        encode: Of a tokenizer.
        eos: Token that ends an answer; it is learnt, or the model never stops.

    Returns:
        Ids and labels.

    Raises:
        ValueError: If the prompt has no token.

    Example:
        >>> encode_example("ab", "c", encode=lambda text: [ord(x) - 97 for x in text], eos=9)
        Example(ids=tensor([0, 1, 2, 9]), labels=tensor([-100, -100,    2,    9]))

    Reference:
        tatsu-lab/stanford_alpaca, `preprocess` in `train.py`, which encodes both at once.
    """
    asked, answered = list(encode(prompt)), [*encode(answer), eos]
    if not asked:
        raise ValueError("The prompt has no token: the first token of the answer needs one before.")
    return Example(torch.tensor(asked + answered), torch.tensor([IGNORE] * len(asked) + answered))


def pad_examples(examples: Sequence[Example], *, pad: int) -> Batch:
    r"""Fill examples up on the right; the filling is masked by place, not by its id.

    Args:
        examples: Of any lengths.
        pad: Id of the filling; it may be that of the end, whose labels stay.

    Returns:
        Ids, labels and mask.

    Raises:
        ValueError: If there is no example.

    Example:
        >>> one = Example(torch.tensor([5, 2]), torch.tensor([-100, 2]))
        >>> two = Example(torch.tensor([5, 6, 2]), torch.tensor([-100, 6, 2]))
        >>> pad_examples([one, two], pad=2).labels.tolist()
        [[-100, 2, -100], [-100, 6, 2]]
    """
    if not examples:
        raise ValueError("There is no example.")
    lengths = torch.tensor([len(example.ids) for example in examples])
    ids = torch.nn.utils.rnn.pad_sequence(
        [e.ids for e in examples], batch_first=True, padding_value=pad
    )
    labels = torch.nn.utils.rnn.pad_sequence(
        [e.labels for e in examples], batch_first=True, padding_value=IGNORE
    )
    return Batch(ids, labels, torch.arange(ids.shape[1]) < lengths[:, None])


def sft_loss(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    r"""Return the mean of -log p over the tokens that count.

    $$
    -\frac{1}{\sum_t m_t} \sum_{t \ge 1} m_t \log p(y_t \mid y_{<t}, x)
    $$

    The shift is made here.

    Args:
        logits: Scores at every position.
        labels: Tokens, IGNORE where none is asked for.

    Returns:
        A scalar: every counted token of the batch has the same weight.

    Raises:
        ValueError: If no token counts.

    Example:
        >>> sft_loss(torch.zeros(1, 3, 8), torch.tensor([[-100, -100, 5]]))  # ln 8
        tensor(2.0794)
    """
    if not (labels[:, 1:] != IGNORE).any():
        raise ValueError("No label counts: all of them are IGNORE.")
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return F.cross_entropy(scores, targets, ignore_index=IGNORE)  # (eq:alpaca-loss)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    r"""Return how many words two texts have in common, in order but not side by side.

    $$
    c_{i,j} = \begin{cases} c_{i-1,j-1} + 1 & a_i = b_j \\ \max(c_{i-1,j}, c_{i,j-1}) & \text{else}
    \end{cases}
    $$

    Args:
        a: Words.
        b: Words.

    Returns:
        A length.

    Example:
        >>> longest_common_subsequence("a b c d".split(), "b x d".split())
        2
    """
    row = [0] * (len(b) + 1)
    for x in a:
        above = row[:]
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
    return row[-1]


def rouge_l(candidate: str, reference: str) -> float:
    r"""Return the F-measure of the longest common subsequence of words.

    $$
    P = \frac{\mathrm{LCS}}{|c|}, \quad R = \frac{\mathrm{LCS}}{|r|}, \quad F = \frac{2PR}{P + R}
    $$

    Args:
        candidate: A text.
        reference: Another; the measure is symmetric.

    Returns:
        From 0 to 1; 0 if one has no word.

    Example:
        >>> a, b = "write a poem about the sea", "write a short poem about a lake"
        >>> round(rouge_l(a, b), 5)
        0.61538

    Reference:
        Lin (2004), ROUGE; words are lower-cased runs of letters and digits, as in rouge_score.
    """
    a, b = _words(candidate), _words(reference)
    common = longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0  # (eq:alpaca-rouge)


def refusal(instruction: str) -> str | None:
    r"""Say why an instruction is thrown away before it is compared with any other.

    Args:
        instruction: Made by a model.

    Returns:
        A reason, or None if it may stay.

    Example:
        >>> refusal("Draw a map of France.")
        'needs what text cannot show: draw, map'
        >>> refusal("Name three rivers of Europe.") is None
        True

    Reference:
        tatsu-lab/stanford_alpaca, `post_process_gpt3_response` in `generate_instruction.py`.
    """
    words = instruction.split()
    if not 3 < len(words) <= 150:
        return f"{len(words)} words"
    found = sorted(set(_words(instruction)) & set(UNFIT))
    if found:
        return f"needs what text cannot show: {', '.join(found)}"
    if instruction.startswith("Write a program"):
        return "a program"
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return f"begins with {instruction[0]!r}"
    return None


def keep_new(
    candidates: Sequence[str], pool: Sequence[str], *, threshold: float = 0.7
) -> list[str]:
    r"""Keep, in order, the candidates that are fit and unlike all that are there already.

    $$
    \max_{p \in \text{pool}} F(c, p) \le 0.7
    $$

    Args:
        candidates: New instructions; each that stays joins the pool.
        pool: Old ones.
        threshold: Above it two instructions are the same.

    Returns:
        What stayed.

    Example:
        >>> new = ["Name three rivers of Asia.", "Explain how bread is made."]
        >>> keep_new(new, ["Name three rivers."])
        ['Explain how bread is made.']

    Reference:
        Wang et al. (2022), arXiv:2212.10560, Sec. 2.2: ROUGE-L below 0.7.
    """
    kept: list[str] = []
    for candidate in candidates:
        if refusal(candidate) is None and all(
            rouge_l(candidate, other) <= threshold for other in (*pool, *kept)
        ):
            kept.append(candidate)
    return kept


def _words(text: str) -> list[str]:
    lowered = "".join(x if x.isalnum() and x.isascii() else " " for x in text.lower())
    return lowered.split()
