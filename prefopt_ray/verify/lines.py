"""A verification in words, within 80 columns, and as one JSON document."""

import math
import textwrap
from typing import Any

from prefopt_ray.engine.choose import FLAT
from prefopt_ray.verify.differences import SPREAD, Comparison, Difference
from prefopt_ray.verify.steps import Verification

WIDTH = 80
_NAMES = {"loss": "loss", "grad_norm": "grad norm", "logps": "log-probs"}


def verification_lines(found: Verification, *, name: str) -> list[str]:
    config = found.config
    lines = [
        f"{name}: {config.training.stop_step} steps of {config.training.batch_pairs} pairs, {config.label}",
        f"{found.dtype} on {found.device}; your model, your pairs, their order, the adapter's start",
    ]
    lines += [f"{arm.name}: {arm.plan.reason}" for arm in found.arms if arm.plan and arm.name == FLAT]
    lines += [f"without {arm}: {reason}" for arm, reason in found.left_out.items()]
    lines = [wrapped for line in lines for wrapped in textwrap.wrap(line, WIDTH, break_long_words=False)]
    lines += ["", *_step_lines(found), "", *_difference_lines(found)]
    return [*lines, "", _verdict(found)]


def verification_json(found: Verification, *, name: str) -> dict[str, Any]:
    return {
        "name": name, "agree": found.agree, "configuration": found.config.label, "dtype": found.dtype,
        "device": found.device, "left_out": found.left_out,
        "arms": [
            {
                "arm": arm.name, "margin_at_start": _number(arm.margin_at_start),
                "plan": arm.plan.to_dict() if arm.plan else None,
                "steps": [
                    {"loss": _number(step.loss), "grad_norm": _number(step.grad_norm),
                     "logps/chosen": _number(step.means[0]), "logps/rejected": _number(step.means[1])}
                    for step in arm.steps
                ],
            }
            for arm in found.arms
        ],
        "differences": [_comparison_json(comparison) for comparison in found.comparisons],
        "spread": _comparison_json(found.spread) if found.spread else None,
        "limits": {quantity: vars(limit) for quantity, limit in found.limits.items()},
    }


def _step_lines(found: Verification) -> list[str]:
    lines = [f"{'step':>4}  {'engine':<7}{'loss':>12}{'grad norm':>13}{'chosen':>14}{'rejected':>14}"]
    for step in range(found.config.training.stop_step):
        for arm in found.arms:
            if step < len(arm.steps):
                made = arm.steps[step]
                numbers = f"{made.loss:>12.7f}{made.grad_norm:>13.6g}{made.means[0]:>14.5f}{made.means[1]:>14.5f}"
                lines.append(f"{step + 1:>4}  {arm.name:<7}{numbers}")
    return lines


def _difference_lines(found: Verification) -> list[str]:
    lines = [f"{'largest difference':<27}{'absolute':>10}{'relative':>10}{'of limit':>10}  verdict"]
    if found.spread:
        lines += [_line(found.spread, difference, verdict="") for difference in found.spread.differences]
    for comparison in found.comparisons:
        for difference in comparison.differences:
            verdict = "as expected" if difference.within else f"BEYOND at step {difference.worst_step}"
            lines.append(_line(comparison, difference, verdict=verdict))
    for arm in found.arms:
        if arm.margin_at_start is not None:
            lines.append(f"{arm.name + ' at the start, margin':<27}{arm.margin_at_start:>10.1e}")
    return [*lines, _expectation(found)]


def _line(comparison: Comparison, difference: Difference, *, verdict: str) -> str:
    name = f"{comparison.first} - {comparison.second} {_NAMES[difference.quantity]}"
    if not verdict:
        name = f"plain regrouped {_NAMES[difference.quantity]}"
    share = f"{difference.allowed:>10.0%}" if verdict and math.isfinite(difference.allowed) else f"{'':>10}"
    return f"{name:<27}{difference.absolute:>10.1e}{difference.relative:>10.1e}{share}  {verdict}".rstrip()


def _expectation(found: Verification) -> str:
    if found.spread:
        return f"limits in {found.dtype}: {SPREAD:g} x what plain differs from itself, regrouped"
    return "limits: loss 1e-5, grad norm 1e-4 relative, log-probs 1e-4 nats + 2e-6 relative"


def _verdict(found: Verification) -> str:
    names = ", ".join(arm.name for arm in found.arms)
    if found.agree:
        return f"{names} agree."
    if not found.complete:
        short = [arm.name for arm in found.arms if len(arm.steps) < found.config.training.stop_step]
        return f"{', '.join(short)} did not make every step: the baseline diverged; lower its learning rate."
    if not found.margins_within:
        return f"{names} do NOT agree: a policy at step 0 is not its reference."
    return f"{names} do NOT agree."


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "first": comparison.first, "second": comparison.second, "within": comparison.within,
        "quantities": {
            d.quantity: {"absolute": _number(d.absolute), "relative": _number(d.relative),
                         "of_limit": _number(d.allowed), "worst_step": d.worst_step}
            for d in comparison.differences
        },
    }


def _number(value: float | None) -> float | None:
    """JSON knows neither infinity nor NaN."""
    return float(value) if value is not None and math.isfinite(value) else None
