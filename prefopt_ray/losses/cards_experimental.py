"""Cards of the less used losses: pointwise ones first, then DPO's variants, then those without a reference.

Plain data, no torch. Experimental means that few have trained with them, not that the formula is in doubt.
"""

import math
from collections.abc import Mapping

from prefopt_ray.losses.card import LossCard, Param, Range
from prefopt_ray.losses.card_parts import (
    DPO_RATES,
    EXPONENT_LIMIT,
    LN2,
    NO_BETA,
    PER_NAT,
    REFERENCE,
    REFERENCE_AND_LENGTHS,
    beta,
    fixed,
    ln2,
    one,
    rates,
    smoothing,
    two_ln2,
)


def _sppo_start(params: Mapping[str, float]) -> float:
    return 1.0 / (2.0 * params["beta"] ** 2)


def _exo_start(params: Mapping[str, float]) -> float:
    flipped = params["label_smoothing"]
    return -LN2 - (math.log1p(-flipped) + math.log(flipped)) / 2


def _discopop_start(params: Mapping[str, float]) -> float:
    return (LN2 + 1) / 2


_CLOSED = {"lower_inclusive": True, "upper_inclusive": True}

_POINTWISE = (
    LossCard(
        name="nca", title="NCA", formula="-log sigma(beta Dc) - log sigma(-beta Dc)/2 - log sigma(-beta Dr)/2",
        source="Chen et al. 2024, arXiv:2402.05369",
        params=(beta(0.01, 1e-4, 0.05, meaning="scale of each completion's own log-ratio"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=two_ln2, **DPO_RATES,
        bradley_terry=False, experimental=True, trl="nca_pair",
        note="Anchors each likelihood by itself: chosen cannot fall along with rejected.",
    ),
    LossCard(
        name="bco", title="BCO", formula="-log sigma(beta Dc - s) - log sigma(-(beta Dr - s)), s = running mean reward",
        source="Jung et al. 2024, arXiv:2404.04656",
        params=(beta(0.05, 0.01, 0.1, meaning="scale of each completion's own log-ratio"),
                fixed("shift_decay", 0.9, Range(0.5, 0.99, log=False), upper=1.0, lower_inclusive=True,
                      meaning="how much of the shift is kept at a step; it starts at 0")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=two_ln2, **DPO_RATES,
        bradley_terry=False, stateful=True, experimental=True,
        trl="bco_pair, which has no shift; its former BCOTrainer used the plain mean over all micro-batches so far, "
            "this one included",
        note="The shift is that before this step, an exponential average over whole steps: exact under accumulation.",
    ),
    LossCard(
        name="sppo", title="SPPO, hard labels", formula="(Dc - 1/(2 beta))^2 + (Dr + 1/(2 beta))^2",
        source="Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 (beta = 1/eta, winning probability 1)",
        params=(beta(1e-3, 1e-3, 0.1, meaning="targets are +-1/(2 beta) nats"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=_sppo_start, **DPO_RATES,
        bradley_terry=False, experimental=True, trl="sppo_hard",
        note="First gradients are of size 1/beta: clipped at every step when beta is small.",
    ),
    LossCard(
        name="apo_zero", title="APO-zero", formula="1 - sigma(beta Dc) + sigma(beta Dr)",
        source="D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7",
        params=(beta(0.1, 1e-3, 0.1, meaning="how fast a log-ratio saturates"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=one, **rates(1e-7, 1e-6),
        bradley_terry=False, experimental=True, trl="apo_zero",
        note="For chosen completions better than the model's own. Has no optimum above preference one half.",
    ),
    LossCard(
        name="apo_down", title="APO-down", formula="sigma(beta Dc) + 1 - sigma(u)",
        source="D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8",
        params=(beta(0.1, 1e-3, 0.1, meaning="how fast a log-ratio saturates"),),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=one, **rates(1e-7, 1e-6),
        bradley_terry=False, experimental=True, trl="apo_down",
        note="For chosen completions worse than the model's own: lowers both, rejected more.",
    ),
)  # fmt: skip

_PAIRWISE = (
    LossCard(
        name="exo", title="EXO", source="Ji et al. 2024, arXiv:2402.00856, Eq. 16",
        formula="sigma(u) [log sigma(u) - log(1-e)] + sigma(-u) [log sigma(-u) - log e]",
        params=(beta(0.1, 0.01, 0.5, meaning="as in sigmoid"),
                fixed("label_smoothing", 1e-3, Range(1e-4, 0.1), upper=0.5,
                      meaning="assumed share of flipped labels; stops at u = logit(1-e)")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=_exo_start, **DPO_RATES,
        bradley_terry=False, experimental=True, trl="exo_pair",
    ),
    LossCard(
        name="discopop", title="DiscoPOP", formula="-(1-m) log sigma(u) + m e^-u, m = sigma(u/tau)",
        source="Lu et al. 2024, arXiv:2406.08414, Eq. 5",
        params=(beta(0.05, 0.01, 0.5, meaning="as in sigmoid"),
                fixed("tau", 0.05, Range(0.01, 0.5), upper=1.0, upper_inclusive=True,
                      meaning="width of the switch between the two parts")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=_discopop_start, **DPO_RATES,
        bradley_terry=False, experimental=True, trl="discopop",
        note="Not convex: from u = 0 it descends into a local minimum at u = -0.12 (tau 0.05), where pairs are ranked "
             "the wrong way round, and may stay there; only beyond u = 0.07 does it pull upwards. Look at "
             "probe/rewards/accuracy. From tau 0.11 on there is no such minimum.",
    ),
    LossCard(
        name="dpop", title="DPO-Positive", formula="-log sigma(beta (h - lambda max(0, -Dc)))",
        source="Pal et al. 2024 (Smaug), arXiv:2402.13228",
        params=(beta(0.3, 0.05, 1.0, meaning="as in sigmoid"),
                fixed("lambda", 50.0, Range(5.0, 500.0), lower_inclusive=True,
                      meaning="penalty on a chosen completion below its reference likelihood")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=False, start_is_scale=False, experimental=True, trl="none",
        note="train/loss_norm is not scale-free here: the loss grows by beta x lambda (15 at the defaults) for every "
             "nat that a chosen completion falls, so 0.07 nats double it. A large value alone is no divergence, and "
             "the verdict does not read it.",
    ),
    LossCard(
        name="rdpo", title="R-DPO, length-regularised", formula="-log sigma(u + alpha (|yc| - |yr|))",
        source="Park et al. 2024, arXiv:2403.19159",
        params=(beta(0.05, 0.01, 0.1, meaning="as in sigmoid"),
                fixed("alpha", 0.01, Range(0.005, 1.0), lower_inclusive=True,
                      meaning="reward that a token of length counts for, taken out of what is learned")),
        needs=REFERENCE_AND_LENGTHS, reward="sum", beta_unit=PER_NAT, loss_at_start=None, **DPO_RATES,
        bradley_terry=False, experimental=True, trl="none",
        note="Starts at ln 2 exactly only where both completions are equally long, so its start is measured.",
    ),
    LossCard(
        name="chipo", title="chi-PO", source="Huang et al. 2024, arXiv:2407.13399, Algorithm 1 (r_max is its R_max)",
        formula="-log sigma(clip(beta [phi(e^Dc) - phi(e^Dr)], -2 r_max, 2 r_max)), phi(z) = z + log z",
        params=(beta(0.05, 5e-3, 0.1, meaning="strength of the chi-squared and KL anchor"),
                fixed("r_max", 1.0, Range(1.0, 2.0, log=False), meaning="half the largest reward margin believed")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=False, experimental=True, trl="none",
        clamp=f"e^D is taken of {EXPONENT_LIMIT:g} at most, far beyond where the clip has set in",
        note="Pairs beyond the clip, on either side, do not pull.",
    ),
    LossCard(
        name="tdpo", title="TDPO2, token-level", formula="-log sigma(beta (h - alpha (K_r - stop_gradient K_c)))",
        source="Zeng et al. 2024, arXiv:2404.11999; K = sum over tokens of KL(pi_ref || pi)",
        params=(beta(0.1, 0.01, 0.5, meaning="as in sigmoid"),
                fixed("alpha", 0.5, Range(0.1, 2.0), lower_inclusive=True,
                      meaning="weight of the difference in token-wise KL")),
        needs=frozenset({"reference", "distribution"}), reward="sum", beta_unit=PER_NAT, loss_at_start=ln2,
        **DPO_RATES, bradley_terry=False, experimental=True, trl="none",
    ),
    LossCard(
        name="wpo", title="WPO", source="Zhou et al. 2024, arXiv:2406.11827, Eq. 2, sampled alignment",
        formula="-w log sigma(u), w = min(1, w_c w_r), w_y = e^(mean over tokens of [log pi - log sum_v pi(v)^2])",
        params=(beta(0.01, 3e-3, 0.1, meaning="as in sigmoid"),),
        needs=frozenset({"reference", "lengths", "token_sq"}), reward="sum", beta_unit=PER_NAT, loss_at_start=None,
        **DPO_RATES, bradley_terry=True, experimental=True,
        clamp="the pair's weight is held at 1 at most, as in the authors' code",
        trl="use_weighting=True, which no longer clamps the weight",
        note="The weight has no gradient: pairs the policy would not write itself count less.",
    ),
    LossCard(
        name="ld_dpo", title="LD-DPO, length-desensitised", source="Liu et al. 2024, arXiv:2409.06411",
        formula="-log sigma(beta [(P_c - ref_c) - (P_r - ref_r)]), P = log pi of the shared length + alpha x the rest",
        params=(beta(0.1, 0.01, 0.5, meaning="as in sigmoid"),
                Param("alpha", 0.5, Range(0.0, 1.0, log=False), upper=1.0, **_CLOSED,
                      meaning="weight of the longer completion's tokens beyond the shorter's length")),
        needs=frozenset({"reference", "per_token"}), reward="sum", beta_unit=PER_NAT, loss_at_start=None,
        **DPO_RATES, bradley_terry=False, experimental=True,
        trl="ld_alpha, which 1.16 applies to the reference as well; the paper, and TRL before, to the policy only",
        note="The margin is not zero where policy and reference agree, so its start is measured.",
    ),
    LossCard(
        name="rebel", title="REBEL", formula="(h - eta (score_c - score_r))^2",
        source="Gao et al. 2024, arXiv:2404.16767, as in the authors' code (times eta^2)",
        params=(Param("eta", 1.0, Range(0.1, 10.0), "nats of margin per unit of the score"),),
        needs=frozenset({"reference", "scores"}), reward="sum", beta_unit=NO_BETA, loss_at_start=None,
        **DPO_RATES, bradley_terry=False, experimental=True, trl="none",
        note="Regresses the margin on the difference in score: rows must carry scores.",
    ),
)  # fmt: skip

_BATCHWISE = (
    LossCard(
        name="aot", title="AOT, paired",
        formula="-(1-e) log sigma(beta x) - e log sigma(-beta x), x = sorted log pi_c/pi_r - sorted log ref_c/ref_r",
        source="Melnyk et al. 2024, arXiv:2406.05882",
        params=(beta(0.01, 3e-3, 0.1, meaning="as in sigmoid, on sorted differences"),
                smoothing(0.0, meaning="assumed share of flipped labels")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=False, scope="batch", experimental=True,
        trl="aot, which sorts each micro-batch by itself; the whole optimizer batch is sorted here",
        note="Compares distributions over the batch, not pairs: wants large batches.",
    ),
    LossCard(
        name="aot_unpaired", title="AOT, unpaired",
        formula="-(1-e) log sigma(beta x) - e log sigma(-beta x), x = sorted Dc - sorted Dr",
        source="Melnyk et al. 2024, arXiv:2406.05882",
        params=(beta(0.01, 3e-3, 0.1, meaning="as in sigmoid, on sorted log-ratios"),
                smoothing(0.0, meaning="assumed share of flipped labels")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=False, scope="batch", experimental=True,
        trl="aot_unpaired, which sorts each micro-batch by itself; the whole optimizer batch is sorted here",
        note="Never looks at which rejected completion belongs to which chosen one.",
    ),
    LossCard(
        name="beta_dpo", title="beta-DPO",
        formula="-log sigma(b h) over kept pairs, b = max(1e-3, beta (1 + a (mean kept h - M0))), M0 = running mean h",
        source="Wu et al. 2024, arXiv:2407.08639, and the authors' code",
        params=(beta(0.1, 0.01, 0.5, meaning="beta of a batch whose margin is as usual"),
                fixed("a", 0.6, Range(0.2, 1.0, log=False), lower_inclusive=True,
                      meaning="how strongly beta follows the batch's margin"),
                fixed("rho", 0.2, Range(0.0, 0.4, log=False), upper=1.0, lower_inclusive=True,
                      meaning="share of pairs left out of a batch, drawn by a Gaussian around M0")),
        needs=REFERENCE, reward="sum", beta_unit=PER_NAT, loss_at_start=ln2, **DPO_RATES,
        bradley_terry=False, scope="batch", stateful=True, experimental=True, trl="none",
        note="M0 and its deviation are averages over steps (decay 0.9, this step included). The draw follows from "
             "row ids and the step, so a resumed trial draws the same; pairs left out have loss 0.",
    ),
)  # fmt: skip

_REFERENCE_FREE = (
    LossCard(
        name="cpo", title="CPO", formula="-log sigma(beta (log pi_c - log pi_r)) - alpha log pi_c/|yc|",
        source="Xu et al. 2024, arXiv:2401.08417, Eq. 3, with the likelihood averaged over tokens as in the "
               "authors' code",
        params=(beta(0.1, 0.01, 0.5, meaning="scale of the policy's own margin"),
                fixed("alpha", 1.0, Range(0.05, 2.0), lower_inclusive=True,
                      meaning="weight of the likelihood of chosen completions")),
        needs=frozenset({"lengths"}), reward="policy_sum", beta_unit="1 / nat of summed log-prob",
        loss_at_start=None, **rates(1e-6, 1e-5, lora_high=1e-4), bradley_terry=False, experimental=True,
        trl="CPOTrainer (cpo_alpha); its NLL covers the prompt too and is a token mean of the micro-batch",
    ),
    LossCard(
        name="slic", title="SLiC-HF", formula="max(0, delta - log pi_c + log pi_r) - lambda log pi_c",
        source="Zhao et al. 2023, arXiv:2305.10425 (chosen as the completion that is also regularised to)",
        params=(Param("delta", 1.0, Range(0.5, 10.0), "margin in nats at which a pair drops out"),
                fixed("lambda", 0.1, Range(0.01, 1.0), lower_inclusive=True,
                      meaning="weight of the likelihood of chosen completions")),
        needs=frozenset(), reward="policy_sum", beta_unit=NO_BETA, loss_at_start=None, **rates(3e-7, 2e-6),
        bradley_terry=False, experimental=True, trl="none: its `hinge` is RSO's, with a reference",
    ),
)  # fmt: skip

EXPERIMENTAL: tuple[LossCard, ...] = (*_POINTWISE, *_PAIRWISE, *_BATCHWISE, *_REFERENCE_FREE)
