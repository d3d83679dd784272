"""The launcher files: by Ray's own schema, by Amazon's own request shapes, by KubeRay's fields. Nothing is launched."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from prefopt_ray.cli import _parser
from prefopt_ray.cluster.rayjob import SECRETS, print_rayjob
from prefopt_ray.errors import SpecError
from prefopt_ray.spec import load_spec

ROOT = Path(__file__).parents[2]
AWS = ROOT / "cluster.yaml"
ON_PREMISES = ROOT / "sweeps" / "clusters" / "on-premises.yaml"
RAYJOB = ROOT / "sweeps" / "clusters" / "rayjob.yaml"
SCHEMA = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text())


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


# -- Ray's launcher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [AWS, ON_PREMISES], ids=lambda path: path.stem)
def test_ray_s_own_schema_takes_the_file(path: Path) -> None:
    validate_config(prepare_config(read(path)))


@pytest.mark.parametrize("path", [AWS, ON_PREMISES], ids=lambda path: path.stem)
def test_ray_s_own_schema_refuses_what_it_does_not_know(path: Path) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(read(path) | {"idle_minutes": 3}))


@pytest.mark.parametrize("path", [AWS, ON_PREMISES], ids=lambda path: path.stem)
def test_only_who_has_the_token_may_run_code_and_the_dashboard_is_on_loopback(path: Path) -> None:
    config = prepare_config(read(path))  # with the defaults that Ray fills in
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    started = [command for command in starts if "ray start" in command]
    assert len(started) == 2 and all("RAY_AUTH_MODE=token" in command for command in started)
    assert all("chmod 600 ~/.ray/auth_token" in command for command in started)
    assert "--dashboard-host=127.0.0.1" in started[0] and "0.0.0.0" not in path.read_text()
    assert any(target.endswith(".ray/auth_token") for target in config["file_mounts"])


@pytest.mark.parametrize("path", [AWS, ON_PREMISES, RAYJOB], ids=lambda path: path.stem)
def test_versions_are_those_that_are_tested(path: Path) -> None:
    tested = re.search(r"^ray==(.*)$", (ROOT / "docs" / "tested-versions.txt").read_text(), re.MULTILINE)[1]
    named = set(re.findall(r"(?:ray:|==|rayVersion: )(2\.\d+\.\d+)", path.read_text()))
    assert named == {tested} == {ray.__version__}


def test_the_head_trains_nothing_and_spot_machines_come_first() -> None:
    types = read(AWS)["available_node_types"]
    head = types.pop(read(AWS)["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    spot, demand = (types[name] for name in ("gpu-spot", "gpu-on-demand"))
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in demand["node_config"] and spot["priority"] > demand["priority"]
    # Equal to what a trial of the example asks for, so that a waiting trial makes a machine come.
    wanted = load_spec(ROOT / "sweeps" / "qwen05b.yaml").resources
    for workers in (spot, demand):
        assert workers["resources"]["GPU"] >= wanted.gpus_per_trial
        assert workers["resources"]["CPU"] >= wanted.cpus_per_trial


def test_an_on_premises_cluster_is_the_machines_it_names() -> None:
    config = read(ON_PREMISES)
    count = len(config["provider"]["worker_ips"])
    assert config["min_workers"] == config["max_workers"] == count


# -- Amazon ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_instances():  # noqa: ANN201 - botocore has no types
    pytest.importorskip("botocore", reason="a test-only dependency: pip install -e '.[test]'")
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def request(node: dict[str, Any]) -> dict[str, Any]:
    """What Ray's node provider sends for a node configuration: one of the subnets, counts and tags added."""
    node = deepcopy(node)
    subnets = node.pop("SubnetIds")
    return node | {"SubnetId": subnets[0], "MinCount": 1, "MaxCount": 1}


@pytest.mark.parametrize("name", ["head", "gpu-spot", "gpu-on-demand"])
def test_amazon_s_request_shape_takes_every_machine(name: str, run_instances) -> None:  # noqa: ANN001
    from botocore.validate import ParamValidator

    node = read(AWS)["available_node_types"][name]["node_config"]
    report = ParamValidator().validate(request(node), run_instances)
    assert not report.has_errors(), report.generate_report()
    assert node["InstanceType"] in run_instances.members["InstanceType"].enum
    assert node["SecurityGroupIds"]  # else Ray opens port 22 to everybody
    wrong = ParamValidator().validate(request(node | {"InstanceTyp": "m6i.xlarge"}), run_instances)
    assert wrong.has_errors()


# -- Kubernetes --------------------------------------------------------------------------------------


def test_the_manifest_has_kuberay_s_fields_only() -> None:
    jsonschema.validate(read(RAYJOB), SCHEMA)


@pytest.mark.parametrize("change", [
    {"spec": {"entrypont": "x"}}, {"spec": {"entrypoint": "x", "backoffLimit": "3"}}, {"kind": "RayJobs"},
])
def test_a_manifest_that_kuberay_would_refuse_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read(RAYJOB) | change, SCHEMA)


def test_the_manifest_s_command_is_one_of_ours_and_goes_on_after_a_lost_cluster() -> None:
    spec = read(RAYJOB)["spec"]
    program, *arguments = spec["entrypoint"].split()
    options = _parser().parse_args(arguments)
    assert program == "prefopt" and options.resume and spec["backoffLimit"] > 0
    cluster = spec["rayClusterSpec"]
    mounted = [
        {mount["mountPath"] for mount in container["volumeMounts"]}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    ]
    assert all({options.storage, str(Path(options.spec).parent)} <= paths for paths in mounted)
    assert cluster["authOptions"] == {"mode": "token"} and cluster["enableInTreeAutoscaling"]


def test_the_printed_manifest_is_one_that_kuberay_takes(tmp_path: Path) -> None:
    spec = load_spec(ROOT / "sweeps" / "qwen05b.yaml", overrides=["secrets=[HF_TOKEN]"], storage="/mnt/prefopt")
    spec_map, job = yaml.safe_load_all(print_rayjob(spec))
    jsonschema.validate(job, SCHEMA)
    (tmp_path / "spec.yaml").write_text(spec_map["data"]["spec.yaml"])
    assert load_spec(tmp_path / "spec.yaml") == spec
    options = _parser().parse_args(job["spec"]["entrypoint"].split()[1:])
    assert options.resume and options.storage == "/mnt/prefopt"
    (worker,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert worker["resources"]["requests"]["nvidia.com/gpu"] == "1" and worker["resources"]["requests"]["cpu"] == "4"
    assert worker["env"] == [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": SECRETS, "key": "HF_TOKEN"}}}]


def test_a_manifest_for_files_of_this_machine_is_refused(tmp_path: Path) -> None:
    overrides = [f"model.policy={tmp_path}"]
    spec = load_spec(ROOT / "sweeps" / "qwen05b.yaml", overrides=overrides, storage="/mnt/prefopt")
    with pytest.raises(SpecError, match="a pod does not have files of this machine"):
        print_rayjob(spec)


# -- all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [AWS, ON_PREMISES, RAYJOB], ids=lambda path: path.stem)
def test_what_nobody_has_launched_says_so_and_what_must_be_edited_is_marked(path: Path) -> None:
    text = path.read_text()
    assert "not launched" in text
    made_up = ("0123456789abcdef0", "10.0.0.", "example.org")
    for line in text.splitlines():
        if any(mark in line for mark in made_up):
            above = text[: text.index(line)].splitlines()[-3:]
            assert "EDIT" in line or any("EDIT" in earlier for earlier in above), line
