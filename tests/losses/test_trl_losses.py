"""Every loss that TRL 1.16 has, against TRL's own loss code on the same log-probs; known differences switched off.

TRL's loss lives inside its trainers' `_compute_loss`, so a stand-in trainer and a stand-in model that answers
with given token log-probs are handed to it. TRL is an oracle here and nowhere else.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pair_stats import random_stats
from torch import Tensor

from prefopt_ray.losses.cards import find_card
from prefopt_ray.losses.formulas import loss_function
from prefopt_ray.losses.stats import PairStats
from prefopt_ray.verify.trl_arm import DIVERGENCES, LOSSES

trl = pytest.importorskip("trl", reason="TRL is a test-only dependency: pip install -e '.[test]'")

# ours -> TRL's loss_type. Batch-scope losses agree because here the micro-batch is the batch.
# `prefopt verify` relies on it; beside its own, one whose running mean TRL keeps otherwise over several steps.
SAME = {**LOSSES, "bco": "bco_pair"}
LINKS = DIVERGENCES
LINKED = ("sigmoid", "sigmoid_norm", "hinge", "ipo_mean", "exo", "robust", "discopop")


def near_stats(*, dtype: torch.dtype = torch.float64) -> PairStats:
    """Policies within a few nats of the reference, where no clamp of either side is met."""
    stats = random_stats(pairs=12, seed=3, dtype=dtype)
    draw = torch.Generator().manual_seed(4)
    drifts = 4 * torch.rand(2, 12, generator=draw, dtype=dtype) - 2
    return replace(
        stats,
        policy_chosen=(stats.reference_chosen + drifts[0]).clamp(max=-0.1),
        policy_rejected=(stats.reference_rejected + drifts[1]).clamp(max=-0.1),
    )


@pytest.mark.parametrize("name", SAME)
def test_losses_and_gradients_are_trls(name: str):
    params = find_card(name).defaults
    assert_same(name, near_stats(), params, **trl_settings(params), loss_types=[SAME[name]])


@pytest.mark.parametrize("divergence", LINKS)
@pytest.mark.parametrize("name", LINKED)
def test_divergences_are_trls(name: str, divergence: str):
    # TRL's alpha-divergence knows no float64.
    stats = near_stats(dtype=torch.float32 if divergence == "alpha" else torch.float64)
    params = find_card(f"{name}:{divergence}").defaults
    settings = trl_settings(params) | {"f_divergence_type": LINKS[divergence]}
    assert_same(f"{name}:{divergence}", stats, params, **settings, loss_types=[SAME[name]])


def test_mixtures_are_trls_where_every_completion_is_equally_long():
    """TRL's sft is a token mean over the micro-batch, ours a mean over pairs: the same for equal lengths."""
    stats = near_stats()
    stats = replace(stats, chosen_tokens=torch.full((12,), 7))
    for name in ("rpo", "mpo"):
        card = find_card(name)
        parts = card.name.split("+")
        params = card.defaults | {"nll_weight": 0.3}
        assert_same(
            name, stats, params, **trl_settings(params),
            loss_types=[{"nll": "sft", "bco": "bco_pair"}.get(part, part) for part in parts],
            loss_weights=[params[f"{part}_weight"] for part in parts],
        )  # fmt: skip


def test_wpo_is_trls_where_no_weight_exceeds_one():
    stats = near_stats()
    stats = replace(stats, policy_chosen=stats.policy_chosen - 3, policy_rejected=stats.policy_rejected - 3)
    weight = (stats.policy_chosen - stats.chosen_token_sq) / stats.chosen_tokens
    weight = weight + (stats.policy_rejected - stats.rejected_token_sq) / stats.rejected_tokens
    stats = stats.map(lambda values: values[weight < 0])
    assert len(stats) >= 4
    assert_same("wpo", stats, {"beta": 0.1}, beta=0.1, use_weighting=True, loss_types=["sigmoid"])


def test_ld_dpo_is_trls_once_its_reference_is_left_whole():
    """1.16 weighs the tail of the reference as well; handed precomputed sums, it leaves them as they are."""
    stats = near_stats()
    shared = torch.minimum(stats.chosen_tokens, stats.rejected_tokens)
    stats = replace(  # token log-probs are even below: a prefix is its share of the sum
        stats,
        policy_chosen_prefix=stats.policy_chosen * shared / stats.chosen_tokens,
        policy_rejected_prefix=stats.policy_rejected * shared / stats.rejected_tokens,
    )
    params = {"beta": 0.1, "alpha": 0.3}
    theirs = trl_loss(stats, beta=0.1, ld_alpha=0.3, loss_types=["sigmoid"])
    assert float(loss_function("ld_dpo")(stats, params, None)[0].mean()) == pytest.approx(float(theirs), abs=1e-9)


def test_kto_is_twice_trls_mean_over_completions():
    stats = near_stats()
    params = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    ours = loss_function("kto")(stats, params, None)[0].mean()
    assert float(ours) == pytest.approx(2 * float(trl_kto_loss(stats, params)), abs=1e-9)


def test_simpo_cpo_and_orpo_are_trls_but_for_the_likelihood_term():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    stats = near_stats()
    sums = (stats.policy_chosen, stats.policy_rejected)
    means = (stats.policy_chosen / stats.chosen_tokens, stats.policy_rejected / stats.rejected_tokens)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), alpha=0.0, beta=2.0, simpo_gamma=1.0, label_smoothing=0.0
    )
    simpo = CPOTrainer.cpo_loss(SimpleNamespace(**vars(trainer), loss_type="simpo"), *means)[0]
    close("simpo", stats, {"beta": 2.0, "gamma_ratio": 0.5}, simpo)
    cpo = CPOTrainer.cpo_loss(SimpleNamespace(**vars(trainer), loss_type="sigmoid"), *sums)[0]
    close("cpo", stats, {"beta": 2.0, "alpha": 0.7}, cpo - 0.7 * means[0])
    orpo = ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    close("orpo", stats, {"lambda": 2.0}, -means[0] - orpo, atol=1e-6)  # in float32 there


def close(name: str, stats: PairStats, params: dict[str, float], expected: Tensor, *, atol: float = 1e-9) -> None:
    losses, _ = loss_function(name)(stats, params, None)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=atol, check_dtype=False)


def trl_settings(params: dict[str, float]) -> dict[str, float]:
    return {
        "beta": params["beta"], "label_smoothing": params.get("label_smoothing", 0.0),
        "f_alpha_divergence_coef": params.get("divergence_alpha", 0.5),
        "args": SimpleNamespace(discopop_tau=params.get("tau", 0.05)),
    }  # fmt: skip


def assert_same(name: str, stats: PairStats, params: dict[str, float], **settings: object) -> None:
    """The batch's mean loss and its gradient in every summed log-prob, 1e-6 relative (float32: 1e-5)."""
    single = stats.policy_chosen.dtype == torch.float32
    results = []
    for loss in (
        lambda free: loss_function(name)(free, params, None)[0].mean(), lambda free: trl_loss(free, **settings),
    ):  # fmt: skip
        sides = [side.clone().requires_grad_() for side in (stats.policy_chosen, stats.policy_rejected)]
        value = loss(replace(stats, policy_chosen=sides[0], policy_rejected=sides[1]))
        results.append((value.detach(), *torch.autograd.grad(value, sides, materialize_grads=True)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if single else 1e-6, atol=1e-6)


def trl_loss(stats: PairStats, *, loss_types: list[str], **settings: object) -> Tensor:
    """DPOTrainer._compute_loss on completions whose token log-probs are even shares of the sums."""
    from trl import DPOTrainer

    defaults = {
        "ld_alpha": None, "f_divergence_type": "reverse_kl", "label_smoothing": 0.0, "use_weighting": False,
        "loss_weights": [1.0] * len(loss_types), "args": SimpleNamespace(discopop_tau=0.05),
    }  # fmt: skip
    trainer = stand_in(loss_types=loss_types, **(defaults | settings))
    tokens = torch.cat([stats.chosen_tokens, stats.rejected_tokens])
    inputs = padded(tokens) | {
        "ref_chosen_logps": stats.reference_chosen, "ref_rejected_logps": stats.reference_rejected,
    }  # fmt: skip
    policy = torch.cat([stats.policy_chosen, stats.policy_rejected])
    token_sq = torch.cat([stats.chosen_token_sq, stats.rejected_token_sq])
    model = answering(policy, tokens, token_sq=token_sq)
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_kto_loss(stats: PairStats, params: dict[str, float]) -> Tensor:
    from trl import KTOTrainer

    tokens = torch.cat([stats.chosen_tokens, stats.rejected_tokens])
    trainer = stand_in(
        loss_type="kto", calculate_KL=True, **params,
        _compute_kl_logps=lambda model, batch: torch.cat([stats.mismatched_drift, stats.mismatched_drift]),
    )  # fmt: skip
    inputs = padded(tokens) | {
        "label": torch.arange(len(tokens)) < len(stats),
        "ref_logps": torch.cat([stats.reference_chosen, stats.reference_rejected]),
        "ref_KL_logps": torch.zeros(len(tokens), dtype=torch.float64),
    }
    model = answering(torch.cat([stats.policy_chosen, stats.policy_rejected]), tokens, token_sq=0 * tokens)
    return KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


def stand_in(**settings: object) -> SimpleNamespace:
    """What `_compute_loss` asks of its trainer, with precomputed reference log-probs."""
    everything = SimpleNamespace(device="cpu", gather_for_metrics=lambda values: values, gather=lambda values: values)
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=everything, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **settings,
    )  # fmt: skip


def padded(tokens: Tensor) -> dict[str, Tensor]:
    """One prompt token, then each completion, padded on the right."""
    position = torch.arange(int(tokens.max()) + 1)
    mask = ((position > 0) & (position <= tokens[:, None])).long()
    return {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}


def answering(logps: Tensor, tokens: Tensor, *, token_sq: Tensor):
    """A model whose every completion token has its share of the sum; (2B, T)."""
    inside = torch.arange(1, int(tokens.max()) + 1) <= tokens[:, None]
    spread = [torch.where(inside, (sums / tokens)[:, None], 0.0) for sums in (logps, token_sq)]
    nothing = torch.zeros_like(spread[0]).detach()
    outputs = SimpleNamespace(
        log_probs=spread[0], log_sum_sq_probs=spread[1], entropy=nothing, mean_logits=nothing, is_top1=inside
    )
    return lambda **kwargs: outputs
