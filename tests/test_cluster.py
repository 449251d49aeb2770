"""The cluster files: what Ray's launcher and KubeRay would refuse, or worse, drop without a word, is caught here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from factory.runtime.cluster import Resources, resources_of_yaml

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
Config = dict[str, Any]


def workstation() -> Config:
    return dict(yaml.safe_load((CLUSTER / "workstation.yaml").read_text()))


def launcher_check(config: Config) -> Config:
    """Ray's own preparation and check, as in `ray up`; no SDK and no machine is needed."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = dict(prepare_config(config))
    validate_config(prepared)
    return prepared


def test_the_launcher_takes_the_workstation_and_starts_no_worker_it_was_not_given() -> None:
    assert launcher_check(workstation())["max_workers"] == 0
    further = workstation()
    further["provider"]["worker_ips"] = ["192.168.1.11", "192.168.1.12"]
    assert launcher_check(further)["max_workers"] == 2


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("setup_command", ["true"], "setup_command"),
        ("auth", {"ssh_users": "ray"}, "ssh_users"),
        ("idle_timeout_minutes", "five", "five"),
    ],
)
def test_the_launcher_refuses_what_is_misspelt_or_of_another_type(field: str, value: object, said: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=said):
        launcher_check(workstation() | {field: value})


def test_every_file_and_script_that_the_workstation_needs_is_there() -> None:
    root = CLUSTER.parent
    assert workstation()["setup_commands"] == ["cd ~/dermafactory && cluster/setup.sh .venv"]
    assert (root / "cluster/setup.sh").stat().st_mode & 0o111
    assert (root / "requirements.txt").is_file()


# ------------------------------------------------------------------------------------------------------ KubeRay


def rayjob() -> Config:
    return dict(yaml.safe_load((CLUSTER / "rayjob.yaml").read_text()))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads((CLUSTER / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_rayjob_is_one_that_kuberay_takes(validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(rayjob())] == []


def _misspelt_shutdown(job: Config) -> None:
    job["spec"]["shutdownAfterJobFinish"] = job["spec"].pop("shutdownAfterJobFinishes")


def _misspelt_group(job: Config) -> None:
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    group["maxReplica"] = group.pop("maxReplicas")


def _number_for_text(job: Config) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _text_for_number(job: Config) -> None:
    job["spec"]["backoffLimit"] = "2"


def _unknown_mode(job: Config) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "password"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_misspelt_shutdown, "'shutdownAfterJobFinish' was unexpected"),
        (_misspelt_group, "'maxReplica' was unexpected"),
        (_number_for_text, "0 is not of type 'string'"),
        (_text_for_number, "'2' is not of type 'integer'"),
        (_unknown_mode, "'password' is not one of"),
    ],
)
def test_a_rayjob_that_is_misspelt_or_of_another_type_is_caught(
    validator: Any, spoil: Callable[[Config], None], said: str
) -> None:
    job = rayjob()
    spoil(job)
    assert any(said in error.message for error in validator.iter_errors(job))


def test_every_object_of_the_schema_is_closed_but_kubernetes_own(validator: Any) -> None:
    closed, open_ = [], []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                (closed if node.get("additionalProperties") is False else open_).append(sorted(node["properties"]))
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(validator.schema)
    assert len(closed) == 23
    assert open_ == [["metadata", "spec"], ["containers"], ["image", "name", "resources"]]


def test_the_rayjob_asks_for_a_token_runs_nothing_on_its_head_and_is_gone_when_it_is_done() -> None:
    spec = rayjob()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert (
        spec["rayClusterSpec"]["enableInTreeAutoscaling"],
        spec["rayClusterSpec"]["autoscalerOptions"]["version"],
    ) == (True, "v2")


def test_the_rayjob_runs_a_script_that_exists_and_the_ray_that_the_package_wants() -> None:
    spec = rayjob()["spec"]
    script = spec["entrypoint"].split()[1]
    assert (CLUSTER.parent / script.removeprefix("/opt/dermafactory/")).is_file()
    assert f"ray=={spec['rayClusterSpec']['rayVersion']} " in (CLUSTER.parent / "requirements.txt").read_text()


def test_the_two_files_are_sized_by_what_they_state() -> None:
    assert resources_of_yaml(CLUSTER / "workstation.yaml") == Resources(cpus=16, gpus=1)
    grown = Resources(cpus=0 + 4 * 8 + 8 * 8, gpus=8, memory=(8 + 4 * 32 + 8 * 64) * 2**30)
    assert resources_of_yaml(CLUSTER / "rayjob.yaml") == grown
