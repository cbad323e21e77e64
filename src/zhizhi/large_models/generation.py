"""From scores to text: the next token's distribution, sampling with a cache, and beam search."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from zhizhi.large_models.transformer_decoder import KVCache


@runtime_checkable
class LanguageModel(Protocol):
    """What can be generated from: a `Decoder`, a `Llama`."""

    def __call__(
        self, ids: Int[Tensor, "B N"], *, cache: KVCache | None = None
    ) -> Float[Tensor, "B N V"]:
        """Return scores of the token after each position."""
        ...

    def new_cache(self, *, batch: int, max_length: int | None = None) -> KVCache:
        """Return an empty cache."""
        ...


class Hypothesis(NamedTuple):
    """A continuation that beam search ended with, and its score."""

    ids: list[int]
    score: float


def next_token_distribution(
    logits: Float[Tensor, "*batch V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*batch V"]:
    r"""Sharpen the softmax, cut its tail off, and let what is left sum to one.

    $$
    q_i \propto [\, i \in S \,]\, p_i^{1/\tau}
    $$

    S holds the k likeliest tokens, then of these the fewest whose mass reaches top_p.

    Args:
        logits: Scores.
        temperature: Tau; 0 puts everything on the best token (the first of equals).
        top_k: How many tokens stay; equals of the k-th stay too. None keeps all.
        top_p: Mass that the kept tokens reach, after temperature and top_k. None keeps all.

    Returns:
        Probabilities in float32 at least.

    Raises:
        ValueError: If temperature < 0, top_k < 1, or top_p is not in (0, 1].

    Example:
        >>> logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
        >>> next_token_distribution(logits, top_p=0.7)  # 0.5 does not reach it, so 0.25 stays
        tensor([0.6667, 0.3333, 0.0000, 0.0000])
        >>> next_token_distribution(logits, temperature=0.0)
        tensor([1., 0., 0., 0.])

    Reference:
        Fan et al. (2018), arXiv:1805.04833, for top-k; Holtzman et al. (2020), arXiv:1904.09751,
        Eq. (2), for top-p.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: it must be at least 0.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: at least one token must stay.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: 0 < top_p <= 1.")
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        best = scores.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, best, 1.0)
    scores = scores / temperature  # (eq:decoder-temperature)
    if top_k is not None and top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if top_p is not None:
        ranked, order = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked  # mass of the likelier tokens
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        scores = scores.masked_fill(cut, -torch.inf)  # (eq:decoder-nucleus)
    return scores.softmax(dim=-1)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "B S"]:
    r"""Draw one token after the other, each from the distribution that the model gives it.

    Args:
        model: The model, in evaluation mode.
        prompt: Tokens to go on from; rows of one length.
        max_new_tokens: How many are drawn at most.
        temperature: 0 always takes the best.
        top_k: As in `next_token_distribution`.
        top_p: As in `next_token_distribution`.
        eos: Ends a row, which is filled up with it; generation stops when all rows have ended.
        use_cache: Whether earlier positions are kept, or read again for each token.
        generator: Draws the tokens.

    Returns:
        The prompt and what follows it.

    Raises:
        ValueError: If the prompt is empty or no token is asked for.

    Example:
        >>> from zhizhi.large_models.transformer_decoder import Decoder
        >>> model = Decoder(vocab_size=7, width=8, n_layers=1, n_heads=1, max_length=16)
        >>> generate(model, torch.tensor([[1, 2]]), max_new_tokens=3).shape
        torch.Size([1, 5])
    """
    B, T = prompt.shape
    if T < 1 or max_new_tokens < 1:
        raise ValueError(f"T is {T} and max_new_tokens {max_new_tokens}: both must be at least 1.")
    cache = model.new_cache(batch=B, max_length=T + max_new_tokens) if use_cache else None
    ids, unread = prompt, prompt
    ended = torch.zeros(B, dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        logits = model(unread if use_cache else ids, cache=cache)[:, -1]
        p = next_token_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        drawn = p.argmax(-1) if temperature == 0 else torch.multinomial(p, 1, generator=generator)
        unread = drawn.reshape(B, 1)
        if eos is not None:
            unread = unread.masked_fill(ended[:, None], eos)
            ended = ended | (unread[:, 0] == eos)
        ids = torch.cat([ids, unread], dim=1)
        if eos is not None and ended.all():
            break
    return ids


@torch.no_grad()
def beam_search(
    model: LanguageModel,
    prompt: Int[Tensor, " T"],
    *,
    n_beams: int,
    max_new_tokens: int,
    eos: int | None = None,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    r"""Keep the likeliest beginnings at every length; return what they ended as, best first.

    $$
    \operatorname{score}(y) = \frac{1}{|y|^{\lambda}} \sum_{t} \log p(y_t \mid x, y_{<t})
    $$

    Args:
        model: The model, in evaluation mode.
        prompt: Tokens to go on from.
        n_beams: Beginnings kept at each length.
        max_new_tokens: Length at which unfinished continuations are taken as they are.
        eos: Ends a continuation and counts as one of its tokens.
        length_penalty: Lambda; 0 compares plain log-probabilities, which favours short ones.

    Returns:
        At most n_beams continuations without the prompt.

    Raises:
        ValueError: If the prompt is empty, or a number is below 1.

    Example:
        >>> from zhizhi.large_models.transformer_decoder import Decoder
        >>> model = Decoder(vocab_size=7, width=8, n_layers=1, n_heads=1, max_length=16)
        >>> found = beam_search(model, torch.tensor([1, 2]), n_beams=3, max_new_tokens=2)
        >>> len(found), len(found[0].ids), found[0].score >= found[1].score
        (3, 2, True)

    Reference:
        Wu et al. (2016), arXiv:1609.08144, Sec. 7, for why length must be normalised; the plain
        power is the rule of Hugging Face transformers.
    """
    if min(len(prompt), n_beams, max_new_tokens) < 1:
        raise ValueError(
            f"T is {len(prompt)}, n_beams {n_beams} and max_new_tokens {max_new_tokens}: "
            "all must be at least 1."
        )
    cache = model.new_cache(batch=n_beams, max_length=len(prompt) + max_new_tokens)
    beams: list[list[int]] = [[]]
    totals = torch.zeros(1, dtype=torch.float64)
    unread, ended = prompt.expand(n_beams, -1), []
    for length in range(1, max_new_tokens + 1):
        log_p = model(unread, cache=cache)[: len(beams), -1].double().log_softmax(dim=-1)
        V = log_p.shape[-1]
        candidates = (totals[:, None] + log_p).flatten()  # (eq:decoder-beam)
        best = candidates.topk(min(len(candidates), n_beams * (1 if eos is None else 2)))
        kept: list[tuple[int, int, float]] = []
        for rank, (total, index) in enumerate(
            zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            beam, token = divmod(index, V)
            if token == eos:
                if rank < n_beams:
                    score = total / length**length_penalty
                    ended.append(Hypothesis([*beams[beam], token], score))
            elif len(kept) < n_beams:
                kept.append((beam, token, total))
        beams = [[*beams[beam], token] for beam, token, _ in kept]
        totals = torch.tensor([total for _, _, total in kept], dtype=torch.float64)
        ended = sorted(ended, key=lambda found: -found.score)[:n_beams]
        if not kept:
            break
        # A total can only fall; the most it can be worth is at the length that flatters it most.
        kindest = max_new_tokens if length_penalty > 0 else length + 1
        bound = totals.max().item() / kindest**length_penalty
        if len(ended) == n_beams and ended[-1].score >= bound:
            return ended
        rows = [beam for beam, _, _ in kept] + [0] * (n_beams - len(kept))
        cache.select(torch.tensor(rows, device=prompt.device))
        tokens = [token for _, token, _ in kept] + [0] * (n_beams - len(kept))
        unread = torch.tensor(tokens, device=prompt.device)[:, None]
    scores = (totals / max_new_tokens**length_penalty).tolist()
    ended += [Hypothesis(ids, score) for ids, score in zip(beams, scores, strict=True)]
    return sorted(ended, key=lambda found: -found.score)[:n_beams]
