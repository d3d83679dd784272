"""The notebook as a reader meets it: clean as committed, and true when run from an empty folder.

Executing it takes 60 to 90 s on two idle cores: it builds the gold base model, trains, and searches on Ray.
"""

import ast
import base64
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from nbclient import NotebookClient

from prefopt_ray.report import trial_figure as figures

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "sweeps" / "notebooks" / "trial_in_a_notebook.ipynb"
CELL_TIMEOUT_S = 600  # a busy machine is not a bug
TELL = """
import json
print(json.dumps({"loop": [report.best_so_far, report.best_step], "table": table.to_dict("records")}))
"""


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nbformat.NotebookNode]:
    """The notebook after a run in an empty folder, with one more cell that tells what it computed."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(TELL))
    with pytest.MonkeyPatch.context() as patch:
        _use_own_jupyter(patch, folder / "jupyter")
        work = folder / "work"
        work.mkdir()
        NotebookClient(
            notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(work)}}
        ).execute()
        assert [path.name for path in work.iterdir()] == ["prefopt-results"]
        yield notebook


@pytest.fixture(scope="module")
def told(executed: nbformat.NotebookNode) -> dict:
    return json.loads(executed.cells[-1].outputs[-1].text)


def test_no_outputs_are_committed(committed: nbformat.NotebookNode) -> None:
    for cell in _code_cells(committed):
        assert cell.outputs == [] and cell.execution_count is None


def test_the_notebook_imports_and_defines_nothing(committed: nbformat.NotebookNode) -> None:
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in _code_cells(committed):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, defining)]


def test_the_table_has_every_point_of_the_grid_with_a_gain(told: dict) -> None:
    rows = told["table"]
    points = {(row["beta"], row["learning rate"]) for row in rows}
    assert len(rows) == 4 and points == set(itertools.product([0.1, 1.0], [1e-4, 1e-3]))
    assert all(0 < row["best gain"] < 1 and 0 < row["at step"] <= 100 for row in rows)
    assert all(np.isfinite([row["gold reward at the end"], row["KL per token at the end"]]).all() for row in rows)
    gains = [row["best gain"] for row in rows]
    assert gains == sorted(gains, reverse=True)


def test_the_loop_and_the_search_agree_to_the_last_bit(told: dict) -> None:
    (row,) = (row for row in told["table"] if (row["beta"], row["learning rate"]) == (0.1, 1e-3))
    assert told["loop"] == [row["best gain"], row["at step"]]


def test_the_text_is_right_that_this_trial_goes_wrong(told: dict) -> None:
    (row,) = (row for row in told["table"] if (row["beta"], row["learning rate"]) == (0.1, 1e-3))
    assert row["verdict at the end"] in ("broken", "overfit", "over_optimised", "collapsed_rejected")
    assert row["at step"] < 100
    assert row["gold reward at the end"] < 0.5  # it begins at .9; one mean over 128 samples is good to .13


def test_the_plot_ends_as_one_picture_with_both_accuracies(executed: nbformat.NotebookNode) -> None:
    (png,) = (
        output.data["image/png"]
        for cell in _code_cells(executed)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    )
    picture = imread(io.BytesIO(base64.b64decode(png)))[..., :3]  # (H, W, 3)
    height, width = (round(inches * figures.DRAWN_DPI) for inches in reversed(figures.SIZE_INCHES))
    assert picture.shape == (height, width, 3)
    for colour in (figures.BLUE, figures.ORANGE):
        near = np.abs(picture - np.array(to_rgb(colour))).max(axis=-1) < 0.02
        assert near.sum() > 500


def _code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _use_own_jupyter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A kernel that is the running interpreter and sees this checkout; nothing of the user's Jupyter is touched."""
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.joinpath("kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    )
    assert not [name for name in os.environ if name.startswith("TUNE_")]  # a sweep run earlier leaves Tune as it was
    patch.setenv("JUPYTER_PATH", str(folder))
    patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
    patch.setenv("IPYTHONDIR", str(folder / "ipython"))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
