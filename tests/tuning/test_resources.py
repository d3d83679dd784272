"""What a cluster can hold: counted from Ray's own tables, on a local Ray in a process of its own."""

import json
import subprocess
import sys
from typing import Any

from prefopt_ray.tuning.resources import NodeKind

# The autoscaler of a real cluster writes the same message under the same key.
PROGRAM = """
import json, sys
import ray
from ray._raylet import GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.experimental.internal_kv import _internal_kv_put
from prefopt_ray.errors import ResourceError
from prefopt_ray.spec import SweepSpec
from prefopt_ray.tuning.resources import slots, trial_resources, trials_run_here

def tell(groups):
    config = ClusterConfig()
    for name, (resources, count) in groups.items():
        group = config.node_group_configs.add(name=name, max_count=count)
        for key, value in resources.items():
            group.resources[key] = value
    _internal_kv_put(GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, config.SerializeToString(),
                     namespace=GCS_AUTOSCALER_STATE_NAMESPACE.encode())

def ask(wanted):
    spec = SweepSpec.from_dict({
        "name": "mine", "model": {"policy": "gold"}, "data": {"train": {"source": "gold", "pairs": 100}},
        "training": {"steps": 10, "batch_pairs": 4}, "search": {"trials_per_loss": 2, "losses": {"sigmoid": {}}},
        "resources": wanted,
    })
    try:
        reserved = trial_resources(spec)
    except ResourceError as error:
        return str(error)
    return [reserved, slots(reserved, limit=None), trials_run_here()]

ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
answers = []
for groups, wanted in json.loads(sys.argv[1]):
    if groups:
        tell(groups)
    answers.append(ask(wanted))
print(json.dumps(answers))
"""
SMALL = {"cpu nodes": ({"CPU": 4}, 3)}
GPUS = {"head": ({"CPU": 0}, 1), "spot": ({"CPU": 8, "GPU": 1}, 8), "on demand": ({"CPU": 8, "GPU": 1}, 4)}
UNEVEN = GPUS | {"big": ({"CPU": 64}, 1)}


def answered(*cases: tuple[dict[str, Any], dict[str, Any]]) -> Any:  # noqa: ANN401 - JSON
    """For each (what the autoscaler may add, what a trial wants): reservation, slots, here; or the refusal."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(cases)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_a_cluster_holds_now_and_with_what_its_autoscaler_may_add() -> None:
    alone, small, gpus, no_gpu, few_cpus, apart = answered(
        ({}, {"gpus_per_trial": 0}),
        (SMALL, {"gpus_per_trial": 0, "cpus_per_trial": 3}),
        (GPUS, {"gpus_per_trial": 1, "cpus_per_trial": 4}),
        (SMALL, {"gpus_per_trial": 1}),
        (GPUS, {"gpus_per_trial": 1, "cpus_per_trial": 16}),
        (UNEVEN, {"gpus_per_trial": 1, "cpus_per_trial": 16}),
    )
    assert alone == [{"cpu": 1.0, "gpu": 0.0}, 2, True]
    assert small == [{"cpu": 3.0, "gpu": 0.0}, 3, False]
    assert gpus == [{"cpu": 4.0, "gpu": 1.0}, 12, False]
    assert "the largest node has 0 GPUs" in no_gpu
    assert "the largest node has 8 CPUs" in few_cpus
    assert "no machine has both" in apart


def test_a_machine_holds_whole_trials_of_every_resource() -> None:
    kind = NodeKind({"CPU": 8.0, "GPU": 1.0}, 3)
    assert kind.fits({"cpu": 3.0, "gpu": 0.0}) == 2
    assert kind.fits({"cpu": 1.0, "gpu": 1 / 3}) == 3 and kind.fits({"cpu": 1.0, "gpu": 2.0}) == 0
