"""The table of trials in a terminal of 80 columns: losses whole, numbers whole."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sweep_folder import write_sweep

from prefopt_ray.report.terminal import trial_table


@pytest.mark.parametrize(("loss", "params", "beta"), [
    ("sigmoid:forward_kl", {"beta": 0.25}, "0.25"),
    ("sigmoid+bco+nll", {"beta": 0.125, "nll_weight": 1.0}, "0.125"),
    ("orpo", {"lambda": 0.25}, "-"),
])
def test_a_long_name_stays_whole_and_a_loss_without_beta_has_a_dash(
    tmp_path: Path, loss: str, params: dict[str, float], beta: str
) -> None:
    (trial,) = write_sweep(tmp_path, {"0000": 0.5}).trials.values()
    trial.config = replace(trial.config, loss=loss, loss_params=params)
    out = io.StringIO()
    Console(file=out, width=80).print(trial_table([trial]))
    header, *lines = out.getvalue().splitlines()
    start = header.index("loss")
    end = start + max(len("loss"), len(loss))
    assert [line[start:end].strip() for line in lines] == [loss]
    assert lines[0][end:].split()[0] == beta
    assert max(map(len, out.getvalue().splitlines())) <= 80


def drawn(folder: Path, settings: list[tuple[str, dict[str, float]]], *, width: int) -> list[str]:
    """The table's lines below its header, for trials of these losses."""
    sweep = write_sweep(folder, {f"{number:04d}": 0.1 * number + 0.1 for number in range(len(settings))})
    trials = list(sweep.trials.values())
    for trial, (loss, params) in zip(trials, settings, strict=True):
        trial.config = replace(trial.config, loss=loss, loss_params=params, learning_rate=3.5e-4)
    out = io.StringIO()
    Console(file=out, width=width).print(trial_table(trials))
    assert max(map(len, out.getvalue().splitlines())) <= width
    return out.getvalue().splitlines()[1:]


MIXED = [
    ("sigmoid+bco+nll", {"beta": 0.0325, "bco_weight": 0.2, "nll_weight": 0.5}),
    ("sigmoid+bco+nll", {"beta": 0.1, "bco_weight": 0.2, "nll_weight": 1.0}),
    ("rebel", {"eta": 0.5}), ("rebel", {"eta": 1.0}), ("orpo", {"lambda": 0.25}),
]


def test_what_differs_between_the_trials_of_a_loss_is_told_behind_it(tmp_path: Path) -> None:
    lines = drawn(tmp_path, MIXED, width=100)
    assert [" ".join(line.split()[1:3]) for line in lines] == [
        "sigmoid+bco+nll nll_weight=0.5", "sigmoid+bco+nll nll_weight=1", "rebel eta=0.5", "rebel eta=1", "orpo -",
    ]


def test_in_a_narrow_terminal_the_loss_gives_way_and_no_number_does(tmp_path: Path) -> None:
    lines = drawn(tmp_path, MIXED, width=72)
    text = " ".join(lines)
    assert all(whole in text for whole in ("0.0325", "3.5e-4", "healthy", "completed", "eta=0.5"))
    assert len(lines) > len(MIXED)
