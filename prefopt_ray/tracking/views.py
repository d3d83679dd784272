"""What a person sees first in MLflow's UI: a saved view of the trials by rank, and a link that opens it.

The view's format is the UI's own and undocumented (read from mlflow 3.17.2, also valid on 3.18.0), so it is
optional: a server that refuses it costs a dead letter, and one that ignores it shows plain columns.
"""

import json
import time
from collections.abc import Mapping
from urllib.parse import quote

VIEW_KEY = "prefopt-best"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"

_COLUMNS = {  # in this order, with widths in pixels
    "metrics.`rank`": 70,
    "attributes.`Run Name`": 260,
    "metrics.`score`": 90,
    "metrics.`best_gain`": 100,
    "metrics.`best_step`": 100,
    "metrics.`best_accuracy`": 120,
    "tags.`verdict`": 140,
    "tags.`verdict_at_best`": 140,
    "tags.`end_state`": 140,
    "params.`loss`": 110,
    "metrics.`beta`": 90,
    "metrics.`learning_rate`": 110,
    "metrics.`final_drift`": 100,
    "metrics.`final_kl`": 100,
    "tags.`stop_reason`": 260,
}
_ALWAYS_SHOWN = {"attributes.`Run Name`"}


def trials_filter(sweep_id: str) -> str:
    """Children only: the UI folds them under their parent, and the parent has no rank."""
    return f"tags.kind = 'trial' and tags.sweep_id = '{sweep_id}'"


def best_view(sweep_id: str) -> tuple[str, str]:
    """The experiment tag, name and value, of the view `prefopt-best` on this sweep (the newest one wins)."""
    now_ms = time.time_ns() // 1_000_000
    state = {
        "searchFilter": trials_filter(sweep_id),
        "orderByKey": "metrics.`rank`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [column for column in _COLUMNS if column not in _ALWAYS_SHOWN],
        "columnOrder": ["1", *_COLUMNS],
        "columnWidths": _COLUMNS,
        "runsHiddenMode": "SHOW_ALL",
    }
    view = {"name": "prefopt: best first", "createdAt": now_ms, "updatedAt": now_ms, "state": json.dumps(state)}
    return VIEW_TAG, json.dumps(view)


def best_view_url(base_url: str, experiment_id: str, sweep_id: str) -> str:
    """The runs table of this sweep's trials, best first, with the UI's own columns.

    Of the `/runs?` form, because the UI drops every parameter of shorter links; `workflowType`, because it
    opens on a page about traces otherwise.
    """
    parameters = {
        "searchFilter": trials_filter(sweep_id),
        "orderByKey": "metrics.`rank`",
        "orderByAsc": "true",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "compareRunsMode": "TABLE",
        "workflowType": "machine_learning",
    }
    return _runs_url(base_url, experiment_id, parameters)


def saved_view_url(base_url: str, experiment_id: str) -> str:
    """The same through the saved view, with its columns: any filter in a link makes the UI ignore the view's
    columns. An experiment without the view shows the page about traces, so ask `view_is_of` first."""
    parameters = {"compareRunsMode": "TABLE", "workflowType": "machine_learning", "viewStateShareKey": VIEW_KEY}
    return _runs_url(base_url, experiment_id, parameters)


def view_is_of(experiment_tags: Mapping[str, str], sweep_id: str) -> bool:
    """Whether the experiment's saved view shows this sweep; people may override or delete it in the UI."""
    try:
        state = json.loads(json.loads(experiment_tags[VIEW_TAG])["state"])
        return state["searchFilter"] == trials_filter(sweep_id)
    except (KeyError, TypeError, ValueError):  # none, or rewritten by the UI in its compressed form
        return False


def _runs_url(base_url: str, experiment_id: str, parameters: Mapping[str, str]) -> str:
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"
