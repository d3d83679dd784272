"""The table of trials in a terminal of 80 columns: losses whole, numbers whole."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from sweep_folder import write_sweep

from prefopt_ray.terminal import trial_table


@pytest.mark.parametrize(("loss", "params", "beta"), [
    ("sigmoid:forward_kl", {"beta": 0.25}, "0.25"),
    ("sigmoid+bco+nll", {"beta": 0.125, "nll_weight": 1.0}, "0.125"),
    ("orpo", {"lambda": 0.25}, "-"),
])
def test_a_long_name_takes_further_lines_and_a_loss_without_beta_has_a_dash(
    tmp_path: Path, loss: str, params: dict[str, float], beta: str
) -> None:
    (trial,) = write_sweep(tmp_path, {"0000": 0.5}).trials.values()
    trial.config = replace(trial.config, loss=loss, loss_params=params)
    out = io.StringIO()
    Console(file=out, width=80).print(trial_table([trial]))
    header, *lines = out.getvalue().splitlines()
    start = header.index("loss")
    end = start + min(8, len(loss))
    assert "".join(line[start:end].strip() for line in lines) == loss
    assert lines[0][end:].split()[0] == beta
    assert max(map(len, out.getvalue().splitlines())) <= 80
