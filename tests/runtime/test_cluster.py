"""Pool sizes from resources, and resources from a cluster's YAML, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from factory.recipe import Recipe, load
from factory.runtime import cluster
from factory.runtime.cluster import Pools, Resources, described, pools, resources_of_yaml


def recipe(*overrides: str) -> Recipe:
    return load(None, overrides)


def written(folder: Path, config: object) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# ------------------------------------------------------------------------------------------------------ pools


def test_a_machine_of_two_cores_draws_with_two_actors_of_one_thread() -> None:
    assert pools(Resources(cpus=2), recipe()) == Pools(2, 1, 2, 1, 0.0)


def test_actors_without_a_gpu_share_the_cores_by_their_threads() -> None:
    assert pools(Resources(cpus=7), recipe("synthesize.num_threads=3")).synthesize == 2
    assert pools(Resources(cpus=2), recipe("synthesize.num_threads=3")).synthesize == 1  # one there must be


def test_eight_gpus_are_eight_actors_with_a_gpu_each_and_one_gate() -> None:
    assert pools(Resources(cpus=96, gpus=8), recipe()) == Pools(8, 1, 96, 1, 1.0)


def test_a_hundred_nodes_of_eight_gpus_have_a_gate_for_every_eight_actors() -> None:
    found = pools(Resources(cpus=96, gpus=8) * 100, recipe())
    assert (found.synthesize, found.gate_replicas, found.tasks) == (800, 100, 9600)


def test_the_recipe_may_say_how_many_actors_there_are() -> None:
    found = pools(Resources(cpus=96, gpus=8), recipe("synthesize.num_actors=9"))
    assert (found.synthesize, found.gate_replicas, found.gpus_per_actor) == (9, 2, 1.0)


# ------------------------------------------------------------------------------------------------------ `ray up`


def cloud(**changes: Any) -> dict[str, Any]:
    kinds = {
        "head": {"resources": {"CPU": 4, "memory": 1000}, "node_config": {}},
        "gpu": {"resources": {"CPU": 12, "GPU": 2, "memory": 5000}, "node_config": {}, "max_workers": 10},
        "cpu": {"resources": {"CPU": 32}, "node_config": {}, "max_workers": 3},
    }
    return {"head_node_type": "head", "max_workers": 13, "available_node_types": kinds, **changes}


def test_a_launcher_yaml_counts_its_head_once_and_every_type_at_its_most(tmp_path: Path) -> None:
    found = resources_of_yaml(written(tmp_path, cloud()))
    assert found == Resources(cpus=4 + 10 * 12 + 3 * 32, gpus=20, memory=1000 + 10 * 5000)


def test_a_head_type_that_also_works_counts_as_both(tmp_path: Path) -> None:
    one = {"both": {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}, "max_workers": 4}}
    config = {"head_node_type": "both", "max_workers": 4, "available_node_types": one}
    assert resources_of_yaml(written(tmp_path, config)) == Resources(cpus=40, gpus=5)


def test_a_single_type_is_held_to_the_clusters_own_limit(tmp_path: Path) -> None:
    kinds = cloud()["available_node_types"]
    del kinds["cpu"]
    found = resources_of_yaml(written(tmp_path, cloud(max_workers=3, available_node_types=kinds)))
    assert (found.cpus, found.gpus) == (4 + 3 * 12, 6)


def test_machines_of_ones_own_are_as_large_as_their_start_commands_state(tmp_path: Path) -> None:
    config = {
        "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]},
        "head_start_ray_commands": ["ray stop", "ray start --head --num-cpus=16 --num-gpus 1 --memory=2000"],
        "worker_start_ray_commands": ["ray start --address=$RAY_HEAD_IP:6379 --num-cpus 8 --num-gpus=4"],
    }
    assert resources_of_yaml(written(tmp_path, config)) == Resources(cpus=32, gpus=9, memory=2000)


# ------------------------------------------------------------------------------------------------------ KubeRay


def group(name: str | None = None, cpu: str = "4", memory: str = "8Gi", **more: Any) -> dict[str, Any]:
    limits = {"cpu": cpu, "memory": memory, **more.pop("limits", {})}
    found = {"template": {"spec": {"containers": [{"name": "ray", "resources": {"limits": limits}}]}}, **more}
    return found if name is None else {"groupName": name, "minReplicas": 0, **found}


def job(*groups: dict[str, Any], **head: Any) -> dict[str, Any]:
    return {
        "kind": "RayJob",
        "spec": {"rayClusterSpec": {"headGroupSpec": group(**head), "workerGroupSpecs": [*groups]}},
    }


def test_a_rayjob_counts_its_head_once_and_every_group_at_its_largest(tmp_path: Path) -> None:
    gpu = group("gpu", cpu="7500m", memory="16Gi", limits={"nvidia.com/gpu": "1"}, maxReplicas=8)
    found = resources_of_yaml(written(tmp_path, job(gpu, rayStartParams={"num-cpus": "0"})))
    assert found == Resources(cpus=0 + 8 * 8, gpus=8, memory=(8 + 8 * 16) * 2**30)


def test_a_groups_own_resources_win_over_its_start_parameters_and_its_pods(tmp_path: Path) -> None:
    start = {"num-cpus": "2", "num-gpus": "2"}
    said = group("a", maxReplicas=1, rayStartParams=start, resources={"CPU": "3", "GPU": "3", "memory": "1k"})
    started = group("b", maxReplicas=1, rayStartParams=start | {"memory": "500"})
    found = resources_of_yaml(written(tmp_path, job(said, started, cpu="1", memory="0")))
    assert found == Resources(cpus=1 + 3 + 2, gpus=5, memory=1500)


def test_replicas_of_several_hosts_count_each_host(tmp_path: Path) -> None:
    assert resources_of_yaml(written(tmp_path, job(group("a", maxReplicas=3, numOfHosts=2)))).cpus == 4 + 6 * 4


@pytest.mark.parametrize(("kind", "key"), [("RayCluster", None), ("RayService", "rayClusterConfig")])
def test_clusters_and_services_are_read_as_jobs_are(tmp_path: Path, kind: str, key: str | None) -> None:
    spec = job(group("a", maxReplicas=2))["spec"]["rayClusterSpec"]
    assert resources_of_yaml(written(tmp_path, {"kind": kind, "spec": {key: spec} if key else spec})).cpus == 12


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1, 2], "must be a YAML mapping"),
        ({"kind": "Deployment"}, "available_node_types, a local provider or a KubeRay kind"),
        (cloud(max_workers=5), r"must be the sum of its types' \(8\), got 5"),
        (cloud(available_node_types={"head": {"resources": {}}}), r"head\.resources\.CPU must be stated"),
        ({"provider": {"type": "local"}}, "--num-cpus in head_start_ray_commands must be stated"),
        (job(group("a")), r"a\.maxReplicas must be stated"),
        (job(group("a", cpu="many", maxReplicas=1)), "must be Kubernetes quantities.*'many'"),
    ],
)
def test_what_a_yaml_leaves_open_is_refused_and_not_guessed(tmp_path: Path, config: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resources_of_yaml(written(tmp_path, config))


def test_a_file_that_is_not_there_or_not_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a readable YAML file"):
        resources_of_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="must be a readable YAML file"):
        resources_of_yaml(tmp_path / "bad.yaml")


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_a_line_for_each_pool(tmp_path: Path, factory_command: Any) -> None:
    said = factory_command("size", "--cluster", written(tmp_path, cloud()), "--set", "synthesize.num_actors=16")
    assert said.status == 0
    assert said.out.splitlines() == [
        "cluster     220 CPUs, 20 GPUs, 0 GiB of memory, at its largest",
        "synthesize  16 actor(s), a GPU each",
        "gate        2 replica(s)",
        "curate      220 actor(s), the same for captions",
    ]


def test_a_cluster_without_gpus_is_said_to_have_none() -> None:
    resources = Resources(cpus=6)
    lines = described(resources, pools(resources, recipe("synthesize.num_threads=2")))
    assert lines[0] == "cluster     6 CPUs, 0 GPUs, at its largest"
    assert lines[1] == "synthesize  3 actor(s), 2 thread(s) each, no GPU"


def test_a_start_that_ray_gave_up_is_tried_again_and_any_other_failure_is_not() -> None:
    tried: list[str] = []

    def failing(message: str, times: int) -> Any:
        def init() -> None:
            tried.append(message)
            if len(tried) <= times:
                raise Exception(message)

        return init

    late = "The current node timed out during startup. This could happen because ..."
    cluster._start(failing(late, 2))
    assert len(tried) == 3
    tried.clear()
    with pytest.raises(Exception, match="timed out during startup"):
        cluster._start(failing(late, 9))
    assert len(tried) == cluster.STARTS
    tried.clear()
    with pytest.raises(Exception, match="no such address"):
        cluster._start(failing("no such address", 9))
    assert len(tried) == 1
