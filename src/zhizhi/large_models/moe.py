"""Mixture of experts: who computes a token, how many may come, and how the load stays even."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Routing(NamedTuple):
    """The K experts of each token, and the weight of each in the sum."""

    experts: Int[Tensor, "N K"]
    gates: Float[Tensor, "N K"]


def softmax_top_k(logits: Float[Tensor, "N E"], *, k: int) -> Routing:
    r"""Choose the k most probable experts; the gates are their probabilities among all E.

    $$
    g_i = p_i = \frac{e^{z_i}}{\sum_j e^{z_j}}, \qquad i \in \operatorname{TopK}(z)
    $$

    With k = 1 this is the Switch router.

    Args:
        logits: Scores z of the router.
        k: Experts of each token.

    Raises:
        ValueError: If k is not between 1 and E.

    Example:
        >>> softmax_top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2)
        Routing(experts=tensor([[1, 2]]), gates=tensor([[0.6652, 0.2447]]))

    Reference:
        Fedus et al. (2021), arXiv:2101.03961, Eqs. (1), (2).
    """
    _check_k(k, logits.shape[-1])
    gates, experts = logits.softmax(dim=-1).topk(k, dim=-1)
    return Routing(experts, gates)  # (eq:moe-softmax)


def normalized(routing: Routing) -> Routing:
    r"""Divide the gates of each token by their sum.

    After `softmax_top_k` this is the softmax over the chosen logits alone, as in Mixtral.

    Args:
        routing: Experts and positive gates.

    Example:
        >>> normalized(softmax_top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2)).gates
        tensor([[0.7311, 0.2689]])
    """
    return Routing(routing.experts, routing.gates / routing.gates.sum(dim=-1, keepdim=True))


def in_best_groups(
    scores: Float[Tensor, "N E"], *, n_groups: int, k_groups: int, best: int = 2
) -> Bool[Tensor, "N E"]:
    r"""Tell which experts stand in the k groups whose `best` highest scores sum to most.

    Group j holds the E/n neighbouring experts from jE/n on: the experts of one node.

    Args:
        scores: Scores by which experts will be chosen.
        n_groups: Number of groups.
        k_groups: Groups that each token may use.
        best: How many scores of a group count.

    Raises:
        ValueError: If the groups are not equal, or too small, or fewer than asked for.

    Example:
        >>> scores = torch.tensor([[0.9, 0.0, 0.5, 0.5]])
        >>> in_best_groups(scores, n_groups=2, k_groups=1)
        tensor([[False, False,  True,  True]])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, section 2.1.2: node-limited routing.
    """
    E = scores.shape[-1]
    if E % n_groups:
        raise ValueError(f"{E} experts in {n_groups} groups: n_groups must divide E.")
    if not 1 <= k_groups <= n_groups:
        raise ValueError(f"k_groups is {k_groups} of {n_groups}: 1 <= k_groups <= n_groups.")
    if not 1 <= best <= E // n_groups:
        raise ValueError(f"best is {best} in groups of {E // n_groups}: 1 <= best <= E / n_groups.")
    grouped = rearrange(scores, "N (J P) -> N J P", J=n_groups)
    chosen = grouped.topk(best, dim=-1).values.sum(dim=-1).topk(k_groups, dim=-1).indices
    allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(1, chosen, value=True)
    return allowed.repeat_interleave(E // n_groups, dim=1)  # (eq:moe-groups)


def sigmoid_top_k(
    logits: Float[Tensor, "N E"],
    bias: Float[Tensor, " E"],
    *,
    k: int,
    scale: float = 1.0,
    n_groups: int = 1,
    k_groups: int = 1,
) -> Routing:
    r"""Choose by affinity plus bias; weigh by affinity alone: the router of DeepSeek-V3.

    $$
    s_i = \sigma(z_i), \qquad S = \operatorname{TopK}(s + b), \qquad
    g_i = \lambda\, \frac{s_i}{\sum_{j \in S} s_j}, \quad i \in S
    $$

    Args:
        logits: Scores z of the router.
        bias: One number b an expert; it decides who is chosen and has no gradient.
        k: Experts of each token.
        scale: The factor $\lambda$ on the normalised gates.
        n_groups: Equal groups of neighbouring experts.
        k_groups: Groups that the experts of one token may come from.

    Raises:
        ValueError: If k is more than the experts of k_groups groups, or the groups make no sense.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
        >>> sigmoid_top_k(logits, torch.tensor([1.0, 0.0, 0.0]), k=2)
        Routing(experts=tensor([[0, 1]]), gates=tensor([[0.3621, 0.6379]]))

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Eqs. (13)-(16).
    """
    E = logits.shape[-1]
    s = logits.sigmoid()
    choice = s + bias
    if n_groups > 1:
        allowed = in_best_groups(choice, n_groups=n_groups, k_groups=k_groups)
        choice = choice.masked_fill(~allowed, -torch.inf)
        E = E // n_groups * k_groups
    _check_k(k, E)
    experts = choice.topk(k, dim=-1).indices
    gates = s.gather(1, experts)
    return Routing(experts, scale * gates / gates.sum(dim=-1, keepdim=True))  # (eq:moe-sigmoid)


def _check_k(k: int, E: int) -> None:
    if not 1 <= k <= E:
        raise ValueError(f"k is {k} of {E} experts to choose from: 1 <= k <= {E}.")


def expert_counts(experts: Int[Tensor, "*shape"], *, n_experts: int) -> Int[Tensor, " E"]:
    r"""Count how often each expert was chosen.

    Args:
        experts: Indices of the chosen.
        n_experts: The number E; one that nobody chose counts zero.

    Example:
        >>> expert_counts(torch.tensor([[0, 2], [2, 3]]), n_experts=5)
        tensor([1, 0, 2, 1, 0])
    """
    return experts.flatten().bincount(minlength=n_experts)


def max_violation(counts: Int[Tensor, " E"]) -> float:
    r"""Return by how much the busiest expert exceeds the mean load: $\max_i c_i / \bar c - 1$.

    Args:
        counts: Tokens of each expert.

    Example:
        >>> max_violation(torch.tensor([6, 1, 1]))
        1.25

    Reference:
        Wang et al. (2024), arXiv:2408.15664: MaxVio.
    """
    return (counts.max() * len(counts) / counts.sum()).item() - 1


def within_capacity(
    experts: Int[Tensor, "N K"], *, n_experts: int, capacity: int
) -> Bool[Tensor, "N K"]:
    r"""Tell which choices an expert with room for `capacity` tokens can take.

    All first choices come before all second ones; among equals the earlier token wins.

    Args:
        experts: Choices, the best first.
        n_experts: The number E.
        capacity: Places at each expert.

    Raises:
        ValueError: If there is no place.

    Example:
        >>> within_capacity(torch.tensor([[0], [0], [1], [0]]), n_experts=2, capacity=2).T
        tensor([[ True,  True,  True, False]])

    Reference:
        Lepikhin et al. (2020), arXiv:2006.16668, Algorithm 1; Fedus et al. (2021),
        arXiv:2101.03961, Eq. (3).
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}: capacity >= 1.")
    queue = rearrange(experts, "N K -> (K N)")
    arrived = F.one_hot(queue, n_experts).cumsum(dim=0)
    place = arrived.gather(1, queue[:, None]).squeeze(1)
    return rearrange(place <= capacity, "(K N) -> N K", N=len(experts))  # (eq:moe-capacity)


def switch_balance_loss(
    logits: Float[Tensor, "N E"], experts: Int[Tensor, "N K"]
) -> Float[Tensor, ""]:
    r"""Return the load-balancing loss of Switch, without its factor $\alpha$.

    $$
    L = E \sum_{i=1}^{E} f_i P_i, \qquad f_i = \frac{c_i}{K N}, \qquad
    P_i = \frac{1}{N} \sum_n p_{n,i}
    $$

    Only P has a gradient. Even loads give 1.

    Args:
        logits: Scores of a softmax router.
        experts: What each token chose.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
        >>> round(switch_balance_loss(logits, torch.tensor([[0], [0]])).item(), 3)
        2.0

    Reference:
        Fedus et al. (2021), arXiv:2101.03961, Eqs. (4)-(6).
    """
    E = logits.shape[-1]
    P = logits.softmax(dim=-1).mean(dim=0)
    f = expert_counts(experts, n_experts=E).to(P.dtype) / experts.numel()
    return E * (f * P).sum()  # (eq:moe-balance)


def router_z_loss(logits: Float[Tensor, "N E"]) -> Float[Tensor, ""]:
    r"""Return the mean square of the log-partition functions of the router.

    $$
    L_z = \frac{1}{N} \sum_n \Big( \log \sum_{i} e^{z_{n,i}} \Big)^2
    $$

    Args:
        logits: Scores z of the router.

    Example:
        >>> router_z_loss(torch.tensor([[0.0, 0.0]]))
        tensor(0.4805)

    Reference:
        Zoph et al. (2022), arXiv:2202.08906, Eq. (5).
    """
    return logits.logsumexp(dim=-1).square().mean()  # (eq:moe-z)


def sequence_balance_loss(
    logits: Float[Tensor, "B T E"], experts: Int[Tensor, "B T K"]
) -> Float[Tensor, " B"]:
    r"""Return the balance loss of each sequence for a sigmoid router, without its factor.

    $$
    L = \sum_{i=1}^{E} f_i P_i, \qquad f_i = \frac{E}{K T}\, c_i, \qquad
    P_i = \frac{1}{T} \sum_t \frac{s_{t,i}}{\sum_j s_{t,j}}
    $$

    Args:
        logits: Scores of the router; $s = \sigma(z)$.
        experts: What each token chose.

    Returns:
        One loss a sequence, 1 where its load is even.

    Example:
        >>> experts = torch.tensor([[[0], [1]], [[0], [0]]])
        >>> logits = 20.0 * torch.nn.functional.one_hot(experts[..., 0], 2) - 10
        >>> sequence_balance_loss(logits, experts)
        tensor([1.0000, 1.9999])

    Reference:
        DeepSeek-AI (2024), arXiv:2412.19437, Eqs. (17)-(20).
    """
    E = logits.shape[-1]
    counts = F.one_hot(experts, E).sum(dim=(1, 2))
    s = logits.sigmoid()
    P = (s / s.sum(dim=-1, keepdim=True)).mean(dim=1)
    f = counts.to(P.dtype) * E / (experts.shape[1] * experts.shape[2])
    return (f * P).sum(dim=-1)  # (eq:moe-sequence)


def updated_bias(
    bias: Float[Tensor, " E"], counts: Int[Tensor, " E"], *, rate: float
) -> Float[Tensor, " E"]:
    r"""Raise the bias of experts that had too little to do, and lower that of the others.

    $$
    b_i \leftarrow b_i + \gamma \operatorname{sign}(\bar c - c_i)
    $$

    Args:
        bias: The numbers b.
        counts: Tokens of each expert in this step, over the whole batch.
        rate: The step $\gamma$.

    Example:
        >>> updated_bias(torch.zeros(3), torch.tensor([6, 3, 0]), rate=0.001)
        tensor([-0.0010,  0.0000,  0.0010])

    Reference:
        Wang et al. (2024), arXiv:2408.15664, Algorithm 1.
    """
    excess = counts * len(counts) - counts.sum()
    return bias - rate * excess.sign().to(bias.dtype)  # (eq:moe-bias)


class Experts(NamedTuple):
    """The weights of E SwiGLU networks."""

    w_gate: Float[Tensor, "E D F"]
    w_up: Float[Tensor, "E D F"]
    w_down: Float[Tensor, "E F D"]


def swiglu(x: Float[Tensor, "N D"], w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    r"""Return $(\operatorname{silu}(x W_g) \odot x W_u)\, W_d$, one expert's answer.

    Args:
        x: Tokens.
        w_gate: Matrix from D to F, before the silu.
        w_up: Matrix from D to F.
        w_down: Matrix from F to D.

    Example:
        >>> swiglu(torch.ones(1, 1), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(2, 1))
        tensor([[0.]])
    """
    return (F.silu(x @ w_gate) * (x @ w_up)) @ w_down


def mixture(
    x: Float[Tensor, "N D"],
    routing: Routing,
    experts: Experts,
    *,
    kept: Bool[Tensor, "N K"] | None = None,
) -> Float[Tensor, "N D"]:
    r"""Sum the answers of each token's experts, each expert reading its tokens in one piece.

    $$
    y_n = \sum_{i \in S_n} g_{n,i}\, \mathrm{FFN}_i(x_n)
    $$

    Choices are sorted by expert, gathered, computed group by group and added where they came from.

    Args:
        x: Tokens.
        routing: Their experts and gates.
        experts: The weights.
        kept: Choices to compute; the others add nothing. All of them, if None.

    Example:
        >>> one = Experts(torch.ones(2, 1, 1), torch.ones(2, 1, 1), torch.ones(2, 1, 1))
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> mixture(x, softmax_top_k(torch.zeros(2, 2), k=2), one)
        tensor([[0.7311],
                [3.5232]])
    """
    K = routing.experts.shape[1]
    chosen, gates = routing.experts.flatten(), routing.gates.flatten()
    order = chosen.argsort(stable=True)
    if kept is not None:
        order = order[kept.flatten()[order]]
    token = order // K
    counts = expert_counts(chosen[order], n_experts=len(experts.w_gate))
    pieces = x[token].split(counts.tolist())
    answers = torch.cat([swiglu(*each) for each in zip(pieces, *experts, strict=True)])
    return torch.zeros_like(x).index_add(0, token, gates[order, None] * answers)  # (eq:moe-layer)


class DeepSeekMoE(nn.Module):
    r"""Fine-grained routed experts beside shared ones that every token passes through.

    $$
    y = \sum_{j=1}^{N_s} \mathrm{FFN}^{(s)}_j(x) + \sum_{i \in S} g_i\, \mathrm{FFN}^{(r)}_i(x)
    $$

    The N_s shared experts are one network of N_s times the width. The residual is left outside.

    Args:
        d_model: Width D.
        d_hidden: Hidden width F of one expert.
        n_experts: Routed experts.
        k: Routed experts of each token.
        n_shared: Shared experts.
        scale: Factor on the gates.
        n_groups: Groups of routed experts.
        k_groups: Groups that one token may use.
        generator: For the initial weights.

    Example:
        >>> layer = DeepSeekMoE(8, 4, n_experts=6, k=2)
        >>> y, routing = layer(torch.randn(3, 8))
        >>> y.shape, routing.experts.shape
        (torch.Size([3, 8]), torch.Size([3, 2]))

    Reference:
        Dai et al. (2024), arXiv:2401.06066, Eqs. (9)-(11); DeepSeek-AI (2024), arXiv:2412.19437,
        Eqs. (12)-(16).
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        n_experts: int,
        k: int,
        n_shared: int = 1,
        scale: float = 1.0,
        n_groups: int = 1,
        k_groups: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * shape[-2] ** -0.5)

        E, D, S = n_experts, d_model, n_shared * d_hidden
        self.router = weight(D, E)
        self.routed = nn.ParameterList([weight(E, D, d_hidden), weight(E, D, d_hidden)])
        self.routed.append(weight(E, d_hidden, D))
        self.shared = nn.ParameterList([weight(D, S), weight(D, S), weight(S, D)])
        self.bias = nn.Buffer(torch.zeros(E))
        self.k, self.scale, self.n_groups, self.k_groups = k, scale, n_groups, k_groups

    def forward(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N D"], Routing]:
        """Return the layer's output, and who computed it."""
        routing = sigmoid_top_k(
            x @ self.router,
            self.bias,
            k=self.k,
            scale=self.scale,
            n_groups=self.n_groups,
            k_groups=self.k_groups,
        )
        return swiglu(x, *self.shared) + mixture(x, routing, Experts(*self.routed)), routing


def moe_parameters(
    *, d_model: int, d_hidden: int, n_experts: int, n_shared: int, k: int
) -> tuple[int, int]:
    r"""Count the weights of one layer, all of them and those that one token meets.

    An expert has 3DF, the router DE; a token meets the router whole.

    Args:
        d_model: Width D.
        d_hidden: Hidden width F of one expert.
        n_experts: Routed experts E.
        n_shared: Shared experts.
        k: Routed experts of each token.

    Example:
        >>> moe_parameters(d_model=4, d_hidden=2, n_experts=8, n_shared=1, k=2)
        (248, 104)
    """
    one, router = 3 * d_model * d_hidden, d_model * n_experts
    return router + (n_shared + n_experts) * one, router + (n_shared + k) * one


def all_to_all_tokens(
    experts: Int[Tensor, "R N K"], *, n_experts: int, once_per_rank: bool
) -> Int[Tensor, "R R"]:
    r"""Count the vectors that go from rank to rank when the experts are spread over the ranks.

    Rank r owns the E/R experts from rE/R on. A token chosen by two experts of one rank goes there
    twice, or once if `once_per_rank`.

    Args:
        experts: Choices of the N tokens on each of R ranks.
        n_experts: The number E.
        once_per_rank: Send one copy to each rank, whatever experts there want it.

    Returns:
        Entry [r, q]: vectors sent by rank r to rank q. The diagonal crosses no wire.

    Raises:
        ValueError: If R does not divide E.

    Example:
        >>> experts = torch.tensor([[[0, 2]], [[2, 3]]])
        >>> all_to_all_tokens(experts, n_experts=4, once_per_rank=False).tolist()
        [[1, 1], [0, 2]]
        >>> all_to_all_tokens(experts, n_experts=4, once_per_rank=True).tolist()
        [[1, 1], [0, 1]]
    """
    R = len(experts)
    if n_experts % R:
        raise ValueError(f"{n_experts} experts on {R} ranks: the ranks must divide the experts.")
    copies = F.one_hot(experts // (n_experts // R), R).sum(dim=2)  # [R, N, R]
    return (copies.clamp(max=1) if once_per_rank else copies).sum(dim=1)


def expert_parallel_mixture(
    x: Float[Tensor, "R N D"], routing: Routing, experts: Experts
) -> tuple[Float[Tensor, "R N D"], int]:
    r"""Do what `mixture` does with R ranks' tokens, moving them between ranks; count the bytes.

    Each choice sends a vector to the rank of its expert, and the answer comes back: two
    all-to-all exchanges, here between the rows of one list in one process.

    Args:
        x: Tokens of each rank.
        routing: Experts and gates, [R, N, K] both.
        experts: All weights; rank r uses only its own E/R.

    Returns:
        The outputs, and the bytes that crossed from one rank to another.

    Raises:
        ValueError: If R does not divide E.

    Example:
        >>> one = Experts(torch.ones(2, 1, 1), torch.ones(2, 1, 1), torch.ones(2, 1, 1))
        >>> routing = Routing(torch.tensor([[[1]], [[1]]]), torch.ones(2, 1, 1))
        >>> y, n_bytes = expert_parallel_mixture(torch.ones(2, 1, 1), routing, one)
        >>> y.flatten(), n_bytes
        (tensor([0.7311, 0.7311]), 8)
    """
    R, K, E = len(x), routing.experts.shape[-1], len(experts.w_gate)
    if E % R:
        raise ValueError(f"{E} experts on {R} ranks: the ranks must divide the experts.")
    n_bytes, outputs = 0, torch.zeros_like(x)
    chosen, gates = routing.experts.flatten(1), routing.gates.flatten(1)
    orders = chosen.argsort(dim=1, stable=True)
    sent = chosen.gather(1, orders) // (E // R)  # the rank where each sorted choice goes
    for q in range(R):
        mine = Experts(*(w[q * (E // R) : (q + 1) * (E // R)] for w in experts))
        slots = [orders[r][sent[r] == q] for r in range(R)]
        inbox = torch.cat([x[r][slots[r] // K] for r in range(R)])
        asked = torch.cat([chosen[r][slots[r]] for r in range(R)]) - q * (E // R)
        answers = mixture(inbox, Routing(asked[:, None], torch.ones_like(inbox[:, :1])), mine)
        back = answers.split([len(slot) for slot in slots])
        for r in range(R):
            outputs[r].index_add_(0, slots[r] // K, gates[r][slots[r], None] * back[r])
            n_bytes += (r != q) * 2 * back[r].numel() * back[r].element_size()
    return outputs, n_bytes
