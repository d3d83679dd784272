"""A person's own loss, as the guide tells it: swept from a script, unknown elsewhere, known once installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from journeys.journey import environment, prefopt, spec_text

from prefopt_ray.cli import main
from prefopt_ray.results.ledger import SweepRecord, read_sweep

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "your-own-loss.md").read_text()
DEFINITION, SWEEP = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def home(chat_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's two cells were run as one script."""
    folder = tmp_path_factory.mktemp("own-loss")
    search = ("{method: grid, losses: {sigmoid: {}}, shared: {learning_rate: 1e-2},"
              " baseline: {loss: sigmoid+nll, beta: 0.5, nll_weight: 0.25, learning_rate: 1e-3}}")
    (folder / "sweep.yaml").write_text(spec_text(
        chat_model, pairs_file, training="{steps: 12, batch_pairs: 8, warmup: 0}", search=search, samples="{at: never}"
    ))
    (folder / "cells.py").write_text(DEFINITION + SWEEP)
    done = subprocess.run([sys.executable, "cells.py"], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's package, as pip would leave it."""
    module = DEFINITION.replace("register_loss(CARD, quartic)\n", "QUARTIC = (CARD, quartic)\n")
    assert module != DEFINITION
    (tmp_path / "my_losses.py").write_text(module)
    info = tmp_path / "my_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-losses\nVersion: 1.0\n")
    group, line = re.search(r'\[project\.entry-points\."(.*?)"\]\n(.*?)\n', GUIDE).groups()
    (info / "entry_points.txt").write_text(f"[{group}]\n{line.replace(chr(34), '')}\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def swept(home: Path) -> SweepRecord:
    (ledger,) = (home / "prefopt-results").glob("*/ledger.jsonl")
    return read_sweep(ledger.parent)


def test_the_guide_s_cells_sweep_the_loss_in_ray_s_workers(home: Path) -> None:
    sweep = swept(home)
    own = [trial for trial in sweep.trials.values() if trial.config.loss == "quartic"]
    assert [trial.config.loss_params for trial in own] == [{"beta": 0.1}, {"beta": 0.3}]
    assert {trial.state for trial in sweep.trials.values()} == {"completed"} and sweep.finished
    assert all(trial.score > 0 for trial in own)
    assert "Trials: 3 completed" in (home / "said.txt").read_text()


def test_mlflow_finds_a_mixture_by_its_name_and_its_weight(home: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'prefopt-results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prefopt/journey").experiment_id
    (run,) = client.search_runs([experiment], "params.loss = 'sigmoid+nll' and metrics.nll_weight = 0.25")
    assert run.info.run_name == "sigmoid+nll β=0.5 sigmoid_weight=1 nll_weight=0.25 lr=0.001 #0"
    assert run.data.params["nll_weight"] == "0.25" and run.data.tags["end_state"] == "completed"
    assert [r.data.metrics["beta"] for r in client.search_runs([experiment], "params.loss = 'quartic'")] != []


@pytest.mark.parametrize("command", ["best", "show", "resume", "explain"])
def test_a_process_that_does_not_know_the_loss_says_how_to_provide_it(
    home: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    trial = ["0001"] if command == "explain" else []
    code, said = main([command, "journey", *trial]), capsys.readouterr()
    assert code == 2 and said.out == ""
    assert "'quartic'" in said.err and "entry point `prefopt_ray.losses`" in said.err
    assert "Traceback" not in said.err


@pytest.mark.usefixtures("installed")
def test_once_installed_every_command_knows_it(home: Path) -> None:
    page = prefopt("losses", "quartic", cwd=home)
    assert page.code == 0 and page.out.startswith("quartic: quartic IPO") and "(u - 1)^4" in page.out
    best = prefopt("best", "journey", cwd=home)
    assert best.code == 0, best.err
    mixed = "search.losses={quartic+nll: {nll_weight: [0.1, 1]}}"
    checked = prefopt("validate", "sweep.yaml", "--set", mixed, cwd=home)
    assert checked.code == 0 and "quartic+nll" in checked.out, checked.err
    trained = prefopt("train", "sweep.yaml", "--set", "search.losses={quartic: {beta: 0.2}}", "--set",
                      "search.baseline={loss: quartic, beta: 0.2, learning_rate: 1e-2}", cwd=home)
    assert trained.code == 0 and "best gain" in trained.out, trained.err


def test_an_entry_point_that_cannot_be_imported_is_named(home: Path, installed: None, tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text("import no_such_module")
    outcome = prefopt("losses", "quartic", cwd=home)
    assert outcome.code in (1, 2) and outcome.out == "" and "Traceback" not in outcome.err
    assert "quartic = my_losses:QUARTIC" in outcome.err and "No module named 'no_such_module'" in outcome.err
