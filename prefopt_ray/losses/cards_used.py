"""Cards of the widely used losses, and of `nll`, which only mixtures may hold. Plain data, no torch."""

from collections.abc import Mapping

from prefopt_ray.losses.card import LossCard, Param, Range
from prefopt_ray.losses.card_parts import (
    DPO_RATES,
    NO_BETA,
    PER_NAT,
    PER_NAT_PER_TOKEN,
    REFERENCE,
    REFERENCE_AND_LENGTHS,
    beta,
    fixed,
    ln2,
    one,
    rates,
    smoothing,
)


def _ipo_start(params: Mapping[str, float]) -> float:
    return 1.0 / (4.0 * params["beta"] ** 2)


def _kto_start(params: Mapping[str, float]) -> float:
    return (params["desirable_weight"] + params["undesirable_weight"]) / 2


WIDELY_USED: tuple[LossCard, ...] = (
    LossCard(
        name="sigmoid", title="DPO", formula="-log sigma(u)",
        source="Rafailov et al. 2023, arXiv:2305.18290, Eq. 7",
        params=(beta(0.1, 3e-3, 0.5,
                     meaning="strength of the KL anchor; at a finite budget smaller drifts further"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=True, aliases=("dpo",), trl="sigmoid",
        note="With deterministic preferences no minimiser exists: h grows without bound, whatever beta.",
    ),
    LossCard(
        name="cdpo", title="conservative DPO", formula="-(1-e) log sigma(u) - e log sigma(-u)",
        source="Mitchell 2023, 'A note on DPO with noisy preferences'",
        params=(beta(0.1, 3e-3, 0.5, meaning="as in sigmoid"),
                smoothing(0.1, meaning="assumed share of flipped labels; stops at u = logit(1-e)")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=True, trl="none: its `sigmoid` ignores label_smoothing; this is the loss it used to be",
    ),
    LossCard(
        name="ipo_mean", title="IPO, length-averaged", formula="(Dc/|yc| - Dr/|yr| - 1/(2 beta))^2",
        source="Azar et al. 2023, arXiv:2310.12036, Eq. 17, with log-ratios averaged over tokens as in TRL",
        params=(beta(0.5, 0.1, 10.0, meaning="target margin is 1/(2 beta) nats per token"),),
        needs=REFERENCE_AND_LENGTHS, reward="per_token", beta_unit=PER_NAT_PER_TOKEN,
        loss_at_start=_ipo_start, **DPO_RATES,
        bradley_terry=False, aliases=("ipo",), trl="ipo; the paper's equation sums, which is ipo_sum here",
        note="The same beta means another thing than in ipo_sum: 0.1 aims at 5 nats per token, no anchor at all.",
    ),
    LossCard(
        name="ipo_sum", title="IPO, summed (the paper's)", formula="(h - 1/(2 beta))^2",
        source="Azar et al. 2023, arXiv:2310.12036, Eq. 17 (beta is the paper's tau)",
        params=(beta(0.01, 7e-4, 0.1, meaning="target margin is 1/(2 beta) nats; training stops there"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=_ipo_start, **DPO_RATES,
        bradley_terry=False, trl="none: its `ipo` averages over tokens",
        note="Under SGD its first gradient is 2/beta^2 times DPO's: it blows up at learning rates DPO survives.",
    ),
    LossCard(
        name="hinge", title="hinge (RSO)", formula="max(0, 1 - u)",
        source="Liu et al. 2023, arXiv:2309.06657",
        params=(beta(0.05, 0.01, 0.5, meaning="margin reached at h = 1/beta"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=one, **rates(3e-7, 2e-6),
        bradley_terry=False, trl="hinge",
        note="SLiC's own hinge, without a reference, is `slic`.",
    ),
    LossCard(
        name="robust", title="robust DPO", formula="[-(1-e) log sigma(u) + e log sigma(-u)] / (1-2e)",
        source="Chowdhury et al. 2024, arXiv:2403.00409",
        params=(beta(0.1, 3e-3, 0.5, meaning="as in sigmoid"),
                smoothing(0.1, meaning="assumed share of flipped labels, subtracted out")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=True, bounded_below=False, trl="robust",
        note="Unbounded below when labels are cleaner than e: the loss then runs to minus infinity.",
    ),
    LossCard(
        name="simpo", title="SimPO", formula="-log sigma(beta (log pi_c/|yc| - log pi_r/|yr|) - gamma_ratio beta)",
        source="Meng et al. 2024, arXiv:2405.14734, Eq. 6 (gamma = gamma_ratio x beta)",
        params=(beta(2.0, 1.0, 20.0, meaning="scale of the length-normalised policy margin"),
                Param("gamma_ratio", 0.5, Range(0.0, 1.0, log=False), "target margin / beta, nats per token",
                      lower=0.0, lower_inclusive=True)),
        needs=frozenset({"lengths"}), reward="policy_per_token", beta_unit=PER_NAT_PER_TOKEN,
        loss_at_start=None, **rates(3e-7, 1e-6),
        bradley_terry=True, trl="CPOTrainer, loss_type simpo; simpo_gamma there is gamma_ratio x beta",
        note="Reference-free: nothing in the loss anchors the policy; drift is still measured and shown.",
    ),
    LossCard(
        name="sigmoid_norm", title="length-normalised DPO", formula="-log sigma(beta (Dc/|yc| - Dr/|yr|))",
        source="Lambert et al. 2024 (Tulu 3), arXiv:2411.15124",
        params=(beta(5.0, 0.5, 10.0, meaning="strength of the anchor, on the average log-ratio of a token"),),
        needs=REFERENCE_AND_LENGTHS, reward="per_token", beta_unit=PER_NAT_PER_TOKEN,
        loss_at_start=ln2, **rates(3e-7, 2e-6),
        bradley_terry=True, trl="sigmoid_norm",
        note="The same beta means another thing than in sigmoid: 5 here is about 0.05 there at 100 tokens.",
    ),
    LossCard(
        name="kto", title="KTO on pairs",
        formula="lD (1 - sigma(beta (Dc - z0))) + lU (1 - sigma(beta (z0 - Dr))), z0 = max(0, mean mismatched D)",
        source="Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7 (lD = desirable_weight, lU = undesirable_weight)",
        params=(beta(0.1, 0.01, 0.2, meaning="how fast the value of a log-ratio saturates"),
                fixed("desirable_weight", 1.0, Range(1.0, 1.5, log=False), meaning="weight of chosen completions"),
                fixed("undesirable_weight", 1.0, Range(1.0, 1.5, log=False), meaning="weight of rejected ones")),
        needs=frozenset({"reference", "mismatched"}), reward="sum", beta_unit=PER_NAT,
        loss_at_start=_kto_start, **rates(5e-7, 5e-6),
        bradley_terry=False, scope="batch",
        trl="KTOTrainer, whose mean is over completions: half of this sum, 0.5 at the start; z0 is the mean of a "
            "micro-batch there and of the whole optimizer batch here",
        note="Both halves are bounded and have no optimum: u runs off for every preference above one half.",
    ),
    LossCard(
        name="orpo", title="ORPO",
        formula="-log pi_c/|yc| - lambda log sigma(log odds_c - log odds_r), odds of p = e^(log pi/|y|)",
        source="Hong et al. 2024, arXiv:2403.07691, Eq. 4 and 7",
        params=(Param("lambda", 0.1, Range(0.05, 1.0), "weight of the odds ratio against the likelihood of chosen"),),
        needs=frozenset({"lengths"}), reward="log_odds", beta_unit=NO_BETA, loss_at_start=None, **rates(1e-6, 1e-5),
        bradley_terry=False,
        clamp="the mean token log-prob is held at -1e-6 at most: at probability 1 the odds are infinite",
        trl="ORPOTrainer (beta there is lambda); its NLL covers the prompt too and is a token mean of the micro-batch",
        note="Reference-free and one-stage: trains the likelihood of chosen completions at the same time.",
    ),
)  # fmt: skip

NLL = LossCard(
    name="nll", title="NLL of chosen", formula="-log pi_c/|yc|",
    source="the length-normalised likelihood term of Pang et al. 2024, arXiv:2404.19733",
    params=(), needs=frozenset({"lengths"}), reward="", beta_unit=NO_BETA, loss_at_start=None, **DPO_RATES,
    bradley_terry=False,
    trl="sft, which is a token mean over the micro-batch: long completions weigh more there, and it is not exact "
        "under accumulation",
)  # fmt: skip
