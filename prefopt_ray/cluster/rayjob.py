"""A sweep as Kubernetes objects: its spec in a ConfigMap, and a RayJob of KubeRay that runs it.

For KubeRay 1.5.1 or newer. The fields are checked by the tests against a trimmed schema; nobody has launched one.
"""

import re
from typing import Any

import ray
import yaml

from prefopt_ray import __version__
from prefopt_ray.cluster.upload import local_files
from prefopt_ray.errors import Problem, SpecError
from prefopt_ray.spec import SweepSpec, dump_spec

IMAGE = f"registry.example.org/prefopt:{__version__}"
CLAIM = "prefopt"  # a PersistentVolumeClaim, ReadWriteMany
SECRETS = "prefopt-secrets"  # a Secret with a key for every name in `secrets`
_HINT = """\
# kubectl apply -f this file, for KubeRay 1.5.1 or newer. Before: an image with this package in place of
# {image}, and a ReadWriteMany PersistentVolumeClaim named {claim}. Results stay on the volume.
"""
_RETRIES = 3  # new clusters after a lost one; each goes on where the ledger ends
_IDLE_S = 600
_MOST_WORKERS = 8
_GIB_PER_TRIAL = 32


def print_rayjob(spec: SweepSpec, *, image: str = IMAGE, claim: str = CLAIM) -> str:
    """Both objects as YAML. Raises SpecError for a spec that names files of this machine: pods do not have them."""
    local = dict(local_files(spec))
    if local:
        raise SpecError(*(
            Problem("spec", key, str(path), "a pod does not have files of this machine",
                    "copy it to the volume and name it by its path there, or use a hub id")
            for key, path in local.items()
        ))
    documents = yaml.safe_dump_all(_objects(spec, image=image, claim=claim), sort_keys=False, allow_unicode=True)
    return _HINT.format(image=image, claim=claim) + documents


def _objects(spec: SweepSpec, *, image: str, claim: str) -> list[dict[str, Any]]:
    name = "prefopt-" + re.sub(r"[^a-z0-9-]+", "-", spec.name.lower()).strip("-")[:40]
    spec_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"spec.yaml": dump_spec(spec)}}
    gpus = -(-spec.resources.gpu_share(gpus_present=True) // 1) if spec.resources.gpus_per_trial != 0 else 0
    worker = {"cpu": str(max(2, spec.resources.cpus_per_trial)), "memory": f"{_GIB_PER_TRIAL}Gi"}
    gpu = {"nvidia.com/gpu": str(int(gpus))} if gpus else {}

    def pod(requests: dict[str, str], limits: dict[str, str]) -> dict[str, Any]:
        container = {
            "name": "ray", "image": image, "resources": {"requests": requests, "limits": limits},
            "volumeMounts": [
                {"name": "results", "mountPath": str(spec.storage)}, {"name": "spec", "mountPath": "/spec"},
            ],
        }
        if spec.secrets:
            container["env"] = [
                {"name": key, "valueFrom": {"secretKeyRef": {"name": SECRETS, "key": key}}} for key in spec.secrets
            ]
        volumes = [
            {"name": "results", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "spec", "configMap": {"name": name}},
        ]
        return {"spec": {"containers": [container], "volumes": volumes}}

    job = {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name},
        "spec": {
            "entrypoint": f"prefopt run /spec/spec.yaml --storage {spec.storage} --resume",
            "backoffLimit": _RETRIES, "shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": _IDLE_S,
            "rayClusterSpec": {
                "rayVersion": ray.__version__, "authOptions": {"mode": "token"}, "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"idleTimeoutSeconds": _IDLE_S},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},  # no trials on the head
                    "template": pod({"cpu": "2", "memory": "8Gi"}, {"memory": "8Gi"}),
                },
                "workerGroupSpecs": [{
                    "groupName": "trials", "replicas": 0, "minReplicas": 0, "maxReplicas": _MOST_WORKERS,
                    "rayStartParams": {}, "template": pod(worker | gpu, {"memory": worker["memory"]} | gpu),
                }],
            },
        },
    }
    return [spec_map, job]
