"""Every loss once more, in plain floats: one pair's token log-probs in, the equation as its source prints it.

Written from the papers, with loops and `math` only, so that it shares no code with what it checks. An oracle
takes the whole batch; `held` is the batch at which quantities without gradient are taken.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Params = Mapping[str, float]


@dataclass(frozen=True)
class TokenPair:
    """One preference pair, token by token; log-probs in nats."""

    policy_chosen: list[float]
    policy_rejected: list[float]
    reference_chosen: list[float]
    reference_rejected: list[float]
    token_sq_chosen: list[float]  # log sum_v pi(v)^2 at each position
    token_sq_rejected: list[float]
    kl_chosen: list[float]  # KL(pi_ref || pi) at each position
    kl_rejected: list[float]
    mismatched_drift: float
    score_chosen: float
    score_rejected: float
    row: int

    @property
    def chosen(self) -> float:
        """Summed log-ratio of the chosen completion."""
        return log_ratio(self.policy_chosen, self.reference_chosen)

    @property
    def rejected(self) -> float:
        return log_ratio(self.policy_rejected, self.reference_rejected)

    @property
    def h(self) -> float:
        return self.chosen - self.rejected


Oracle = Callable[[Sequence[TokenPair], Params, Sequence[TokenPair]], list[float]]


def log_ratio(policy: list[float], reference: list[float]) -> float:
    return sum(policy[t] - reference[t] for t in range(len(policy)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def softplus(x: float) -> float:
    """-log sigma(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigma(x: float) -> float:
    return math.exp(-softplus(-x))


def each(loss: Callable[[TokenPair, Params], float]) -> Oracle:
    """An oracle for a loss that sees one pair at a time and holds nothing."""
    return lambda pairs, params, held: [loss(pair, params) for pair in pairs]


def averaged(pair: TokenPair) -> float:
    return pair.chosen / len(pair.policy_chosen) - pair.rejected / len(pair.policy_rejected)


def flipped_cross_entropy(u: float, share: float) -> float:
    return (1 - share) * softplus(-u) + share * softplus(u)


def robust(u: float, share: float) -> float:
    return ((1 - share) * softplus(-u) - share * softplus(u)) / (1 - 2 * share)


def exo(u: float, share: float) -> float:
    return sigma(u) * (-softplus(-u) - math.log(1 - share)) + sigma(-u) * (-softplus(u) - math.log(share))


def discopop(u: float, tau: float) -> float:
    m = sigma(u / tau)
    return (1 - m) * softplus(-u) + (m * math.exp(-u) if u > -30 else math.exp(-softplus(-u / tau) - u))


def orpo(pair: TokenPair, params: Params) -> float:
    def odds(tokens: list[float]) -> float:
        p = mean(tokens)
        return p - math.log(-math.expm1(p))

    ratio = odds(pair.policy_chosen) - odds(pair.policy_rejected)
    return -mean(pair.policy_chosen) + params["lambda"] * softplus(-ratio)


def chipo(pair: TokenPair, params: Params) -> float:
    ratios = math.exp(min(pair.chosen, 30.0)) - math.exp(min(pair.rejected, 30.0))  # the clamp the card states
    margin = params["beta"] * (ratios + pair.h)
    return softplus(-min(max(margin, -2 * params["r_max"]), 2 * params["r_max"]))


def wpo(pairs: Sequence[TokenPair], params: Params, held: Sequence[TokenPair]) -> list[float]:
    losses = []
    for pair, still in zip(pairs, held, strict=True):
        chosen = mean([p - q for p, q in zip(still.policy_chosen, still.token_sq_chosen, strict=True)])
        rejected = mean([p - q for p, q in zip(still.policy_rejected, still.token_sq_rejected, strict=True)])
        losses.append(min(1.0, math.exp(chosen) * math.exp(rejected)) * softplus(-params["beta"] * pair.h))
    return losses


def ld_dpo(pair: TokenPair, params: Params) -> float:
    shared = min(len(pair.policy_chosen), len(pair.policy_rejected))

    def weighed(tokens: list[float]) -> float:
        return sum(tokens[:shared]) + params["alpha"] * sum(tokens[shared:])

    chosen = weighed(pair.policy_chosen) - sum(pair.reference_chosen)
    rejected = weighed(pair.policy_rejected) - sum(pair.reference_rejected)
    return softplus(-params["beta"] * (chosen - rejected))


def kto(pairs: Sequence[TokenPair], params: Params, held: Sequence[TokenPair]) -> list[float]:
    z0 = max(0.0, mean([pair.mismatched_drift for pair in pairs]))
    return [
        params["desirable_weight"] * (1 - sigma(params["beta"] * (pair.chosen - z0)))
        + params["undesirable_weight"] * (1 - sigma(params["beta"] * (z0 - pair.rejected)))
        for pair in pairs
    ]


def aot(pairs: Sequence[TokenPair], params: Params, held: Sequence[TokenPair]) -> list[float]:
    policy = [sum(pair.policy_chosen) - sum(pair.policy_rejected) for pair in pairs]
    reference = [sum(pair.reference_chosen) - sum(pair.reference_rejected) for pair in pairs]
    return by_rank(policy, reference, params)


def aot_unpaired(pairs: Sequence[TokenPair], params: Params, held: Sequence[TokenPair]) -> list[float]:
    return by_rank([pair.chosen for pair in pairs], [pair.rejected for pair in pairs], params)


def by_rank(values: list[float], others: list[float], params: Params) -> list[float]:
    losses = [0.0] * len(values)
    for row, other in zip(sorted(range(len(values)), key=values.__getitem__), sorted(others), strict=True):
        losses[row] = flipped_cross_entropy(params["beta"] * (values[row] - other), params["label_smoothing"])
    return losses


def beta_dpo(pairs: Sequence[TokenPair], params: Params, held: Sequence[TokenPair]) -> list[float]:
    """The first step: M0 and its deviation are a tenth of the batch's."""
    margins = [pair.h for pair in held]
    centre = mean(margins)
    usual = 0.1 * centre
    spread = max(0.1 * math.sqrt(sum((m - centre) ** 2 for m in margins) / (len(margins) - 1)), 1e-6)
    noise = {pair.row: random.Random(f"1:{pair.row}").expovariate(1.0) for pair in held}
    # An exponential race with rates exp(-z^2/2): the first to arrive are a weighted draw without replacement.
    arrival = [math.log(noise[held[i].row]) + ((margins[i] - usual) / spread) ** 2 / 2 for i in range(len(held))]
    kept = sorted(range(len(held)), key=arrival.__getitem__)[: int(len(held) * (1 - params["rho"]) + 1e-9)]
    beta = max(1e-3, params["beta"] * (1 + params["a"] * (mean([margins[i] for i in kept]) - usual)))
    return [len(pairs) / len(kept) * softplus(-beta * pair.h) if i in kept else 0.0 for i, pair in enumerate(pairs)]


ORACLES: dict[str, Oracle] = {
    "sigmoid": each(lambda t, p: softplus(-p["beta"] * t.h)),
    "cdpo": each(lambda t, p: flipped_cross_entropy(p["beta"] * t.h, p["label_smoothing"])),
    "ipo_mean": each(lambda t, p: (averaged(t) - 0.5 / p["beta"]) ** 2),
    "ipo_sum": each(lambda t, p: (t.h - 0.5 / p["beta"]) ** 2),
    "hinge": each(lambda t, p: max(0.0, 1 - p["beta"] * t.h)),
    "robust": each(lambda t, p: robust(p["beta"] * t.h, p["label_smoothing"])),
    "simpo": each(
        lambda t, p: softplus(p["beta"] * (p["gamma_ratio"] - mean(t.policy_chosen) + mean(t.policy_rejected)))
    ),
    "sigmoid_norm": each(lambda t, p: softplus(-p["beta"] * averaged(t))),
    "kto": kto,
    "orpo": each(orpo),
    "nca": each(
        lambda t, p: softplus(-p["beta"] * t.chosen)
        + 0.5 * softplus(p["beta"] * t.chosen)
        + 0.5 * softplus(p["beta"] * t.rejected)
    ),
    "bco": each(lambda t, p: softplus(-p["beta"] * t.chosen) + softplus(p["beta"] * t.rejected)),  # shift 0 at first
    "sppo": each(lambda t, p: (t.chosen - 0.5 / p["beta"]) ** 2 + (t.rejected + 0.5 / p["beta"]) ** 2),
    "apo_zero": each(lambda t, p: 1 - sigma(p["beta"] * t.chosen) + sigma(p["beta"] * t.rejected)),
    "apo_down": each(lambda t, p: sigma(p["beta"] * t.chosen) + 1 - sigma(p["beta"] * t.h)),
    "exo": each(lambda t, p: exo(p["beta"] * t.h, p["label_smoothing"])),
    "discopop": each(lambda t, p: discopop(p["beta"] * t.h, p["tau"])),
    "dpop": each(lambda t, p: softplus(-p["beta"] * (t.h - p["lambda"] * max(0.0, -t.chosen)))),
    "rdpo": each(
        lambda t, p: softplus(-p["beta"] * t.h - p["alpha"] * (len(t.policy_chosen) - len(t.policy_rejected)))
    ),
    "chipo": each(chipo),
    "tdpo": each(lambda t, p: softplus(-p["beta"] * (t.h - p["alpha"] * (sum(t.kl_rejected) - sum(t.kl_chosen))))),
    "wpo": wpo,
    "ld_dpo": each(ld_dpo),
    "rebel": each(lambda t, p: (t.h - p["eta"] * (t.score_chosen - t.score_rejected)) ** 2),
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "beta_dpo": beta_dpo,
    "cpo": each(
        lambda t, p: softplus(p["beta"] * (sum(t.policy_rejected) - sum(t.policy_chosen)))
        - p["alpha"] * mean(t.policy_chosen)
    ),
    "slic": each(
        lambda t, p: max(0.0, p["delta"] - sum(t.policy_chosen) + sum(t.policy_rejected))
        - p["lambda"] * sum(t.policy_chosen)
    ),
}


# f'(e^D), with the constants TRL keeps and the clamp the cards state.
def forward_kl(d: float, params: Params) -> float:
    return 1 - math.exp(min(-d, 30.0))


def js(d: float, params: Params) -> float:
    return math.log(2) - softplus(-d)


def alpha(d: float, params: Params) -> float:
    power = params["divergence_alpha"] - 1
    return (math.exp(min(power * d, 30.0)) - 1) / power


def linked_margin(t: TokenPair, p: Params, link: Callable[[float, Params], float], *, per_token: bool) -> float:
    chosen, rejected = link(t.chosen, p), link(t.rejected, p)
    return chosen / len(t.policy_chosen) - rejected / len(t.policy_rejected) if per_token else chosen - rejected


def of_margin(
    loss: Callable[[float, Params], float], link: Callable[[float, Params], float], *, per_token: bool = False
) -> Oracle:
    return each(lambda t, p: loss(linked_margin(t, p, link, per_token=per_token), p))


def weighted(*parts: tuple[str, Oracle]) -> Oracle:
    def total(pairs: Sequence[TokenPair], params: Params, held: Sequence[TokenPair]) -> list[float]:
        losses = [0.0] * len(pairs)
        for name, oracle in parts:
            for i, loss in enumerate(oracle(pairs, params, held)):
                losses[i] += params[f"{name}_weight"] * loss
        return losses

    return total


NLL = each(lambda t, p: -mean(t.policy_chosen))
COMPOSITIONS: dict[str, Oracle] = {
    "sigmoid:forward_kl": of_margin(lambda m, p: softplus(-p["beta"] * m), forward_kl),
    "sigmoid:js": of_margin(lambda m, p: softplus(-p["beta"] * m), js),
    "sigmoid:alpha": of_margin(lambda m, p: softplus(-p["beta"] * m), alpha),
    "sigmoid_norm:alpha": of_margin(lambda m, p: softplus(-p["beta"] * m), alpha, per_token=True),
    "ipo_mean:forward_kl": of_margin(lambda m, p: (m - 0.5 / p["beta"]) ** 2, forward_kl, per_token=True),
    "ipo_sum:js": of_margin(lambda m, p: (m - 0.5 / p["beta"]) ** 2, js),
    "hinge:js": of_margin(lambda m, p: max(0.0, 1 - p["beta"] * m), js),
    "robust:alpha": of_margin(lambda m, p: robust(p["beta"] * m, p["label_smoothing"]), alpha),
    "cdpo:js": of_margin(lambda m, p: flipped_cross_entropy(p["beta"] * m, p["label_smoothing"]), js),
    "exo:js": of_margin(lambda m, p: exo(p["beta"] * m, p["label_smoothing"]), js),
    "discopop:forward_kl": of_margin(lambda m, p: discopop(p["beta"] * m, p["tau"]), forward_kl),
    "sigmoid+nll": weighted(("sigmoid", ORACLES["sigmoid"]), ("nll", NLL)),
    "sigmoid+bco+nll": weighted(("sigmoid", ORACLES["sigmoid"]), ("bco", ORACLES["bco"]), ("nll", NLL)),
    "aot+ipo_sum:js": weighted(
        ("aot", aot), ("ipo_sum", of_margin(lambda m, p: (m - 0.5 / p["beta"]) ** 2, js))
    ),
}
