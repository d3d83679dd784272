"""A sweep elsewhere, shown from its log: in a terminal as a table, in a file as the job's own words."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from sweep_folder import write_sweep

from prefopt_ray.cluster.following import Follower
from prefopt_ray.cluster.messages import EVENT, MARK
from prefopt_ray.spec import SweepSpec

SPEC = SweepSpec.from_dict({
    "name": "mine", "model": {"policy": "org/model"}, "data": {"train": {"source": "org/pairs"}},
    "training": {"steps": 10}, "search": {"trials_per_loss": 2, "losses": {"sigmoid": {}}},
})


@pytest.fixture
def log(tmp_path: Path) -> list[str]:
    """Words of the job among the events of its ledger."""
    write_sweep(tmp_path, {"0000": 0.2, "0001": 0.8, "0002": 0.5})
    events = (tmp_path / "ledger.jsonl").read_text().splitlines()
    told = [f"{MARK}{json.dumps({'kind': EVENT, 'value': json.loads(event)})}" for event in events]
    return ["reference pass: 8/8", *told, "\x1b[31mthe answer\u202e", ""]


def shown(log: list[str], *, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, height=24, color_system=None)
    with Follower(console, SPEC) as follower:
        for line in log:
            follower.told(line)
        follower.draw()
    return out.getvalue()


def test_in_a_file_it_is_the_jobs_own_words(log: list[str]) -> None:
    assert shown(log, terminal=False).splitlines() == ["reference pass: 8/8", "\\x1b[31mthe answer\u202e"]


def test_in_a_terminal_there_is_a_table_of_every_trial(log: list[str]) -> None:
    text = shown(log, terminal=True)
    assert "3 of 3 trials ended (3 completed)" in text and "sigmoid" in text
    assert "reference pass: 8/8" in text and "\x1b[31m" not in text and MARK not in text
