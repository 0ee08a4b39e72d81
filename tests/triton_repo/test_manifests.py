"""The manifests are what Kubernetes and KEDA take, and say what a server with long jobs needs."""

import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from triton_repo.manifests import MINIMUM_RELEASE, shared_memory_gib
from triton_repo.repository import RepositoryOptions, write_repository
from wan22.errors import UserError
from wan_trt.cli import app

VERSIONS = ("1.31", "1.37")
TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
# The fields of KEDA's reference that are in use; its own definition is no part of the Kubernetes schemas.
SCALED_OBJECT = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {"type": "object", "required": ["name"], "additionalProperties": False,
                           "properties": {"name": TEXT, "kind": TEXT, "apiVersion": TEXT}},
        **dict.fromkeys(("pollingInterval", "cooldownPeriod", "minReplicaCount", "maxReplicaCount"), COUNT),
        "advanced": {"type": "object", "additionalProperties": False, "properties": {
            "horizontalPodAutoscalerConfig": {"type": "object", "additionalProperties": False,
                                              "properties": {"behavior": {"type": "object"}}}}},
        "triggers": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["type", "metadata"], "additionalProperties": False,
            "properties": {
                "type": {"const": "prometheus"},
                "metricType": {"enum": ["AverageValue", "Value"]},
                "metadata": {"type": "object", "required": ["serverAddress", "query", "threshold"],
                             "additionalProperties": False,
                             "properties": dict.fromkeys(("serverAddress", "query", "threshold"), TEXT)},
            },
        }},
    },
}  # fmt: skip


def rendered(engines, folder, *options):
    """What the command writes, by kind."""
    with pytest.raises(SystemExit) as left:
        app(["triton", str(engines), str(folder / "repository"), "--kubernetes", str(folder / "manifests"), *options])
    assert left.value.code == 0
    found = [yaml.safe_load(path.read_text()) for path in (folder / "manifests").glob("*.yaml")]
    return {manifest["kind"]: manifest for manifest in found}


@pytest.fixture
def gpu(compiled, tmp_path):
    return rendered(compiled(), tmp_path)


@pytest.fixture
def pod(gpu):
    return gpu["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    return pod["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("topology", ["owner", "bls"])
def test_kubernetes_takes_every_object(compiled, tmp_path, topology, version):
    made = rendered(compiled(), tmp_path, "--topology", topology)
    assert set(made) == {"Deployment", "Service", "ScaledObject", "PodDisruptionBudget"}
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        assert kubernetes_validate.validate(made[kind], version, strict=True) == version


def test_the_validator_would_see_a_wrong_field(gpu):
    gpu["Deployment"]["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(gpu["Deployment"], VERSIONS[-1], strict=True)


def test_keda_takes_the_scaled_object_and_kubernetes_the_autoscaler_made_of_it(gpu):
    spec = gpu["ScaledObject"]["spec"]
    jsonschema.validate(spec, SCALED_OBJECT)
    autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": gpu["ScaledObject"]["metadata"],
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", **spec["scaleTargetRef"]},
            "minReplicas": spec["minReplicaCount"],
            "maxReplicas": spec["maxReplicaCount"],
            **spec["advanced"]["horizontalPodAutoscalerConfig"],
        },
    }
    kubernetes_validate.validate(autoscaler, VERSIONS[-1], strict=True)


def test_the_objects_find_each_other(gpu):
    deployment, name = gpu["Deployment"], gpu["Deployment"]["metadata"]["name"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        gpu["Service"]["spec"]["selector"],
        gpu["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert gpu["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == name
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in gpu["Service"]["spec"]["ports"]} <= ports


def test_a_pod_has_one_gpu_shared_memory_and_nothing_that_it_may_write_but_tmp(pod, container):
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/models": True, "/engines": True, "/dev/shm": False, "/tmp": False}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_pod_is_given_the_time_that_its_jobs_may_take(compiled, tmp_path):
    made = rendered(compiled(), tmp_path, "--longest-job", "900")
    pod = made["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = container["lifecycle"]["preStop"]["exec"]["command"]
    within_s = int(drain[drain.index("--within-s") + 1])
    exit_s = next(int(word.partition("=")[2]) for word in container["command"] if word.startswith("--exit-timeout"))
    assert within_s >= 900
    assert exit_s >= 900
    assert pod["terminationGracePeriodSeconds"] > within_s + exit_s
    assert made["Deployment"]["spec"]["progressDeadlineSeconds"] > pod["terminationGracePeriodSeconds"]


def test_the_flag_that_drains_is_the_one_that_the_model_looks_at(container, tmp_path):
    drain = container["lifecycle"]["preStop"]["exec"]["command"]
    flag = drain[drain.index("--flag") + 1]
    assert f'string_value: "{flag}"' in (tmp_path / "repository" / "wan22" / "config.pbtxt").read_text()


def test_the_model_is_told_where_the_pod_has_its_engines(container, tmp_path):
    assert 'string_value: "/engines"' in (tmp_path / "repository" / "wan22" / "config.pbtxt").read_text()
    assert "--model-repository=/models" in container["command"]


def test_engines_in_a_pod_are_named_from_its_root(compiled, tmp_path):
    with pytest.raises(UserError, match=r"engines at here \| expected a path from the root"):
        write_repository(compiled(), tmp_path / "repository", RepositoryOptions(engines_at="here"))
    assert not (tmp_path / "repository").exists()


def test_the_image_says_why_it_must_be_new(gpu, container, compiled, tmp_path, capsys):
    assert container["image"].endswith(MINIMUM_RELEASE)
    reason = gpu["Deployment"]["spec"]["template"]["metadata"]["annotations"]["wan-trt/image"]
    assert "26.07 or later" in reason
    assert "CVE-2026-47625" in reason
    with pytest.raises(SystemExit) as left:
        app(["triton", str(tmp_path / "engines"), str(tmp_path / "r"), "--kubernetes", str(tmp_path / "m"),
             "--image", "nvcr.io/nvidia/tritonserver:26.06-py3"])  # fmt: skip
    assert left.value.code == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_administration_needs_the_secret(container):
    (variable,) = container["env"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "wan22-admin", "key": "key"}
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        (word,) = (word for word in container["command"] if word.startswith(option))
        assert word.endswith(f"wan22-admin=$({variable['name']})")
        assert "model-repository" in word


def test_the_probes_are_programs_that_there_are(container):
    commands = [container["lifecycle"]["preStop"]["exec"]["command"], container["livenessProbe"]["exec"]["command"]]
    for _, *words in commands:
        done = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, check=True)
        assert all(word in done.stdout for word in words if word.startswith("--"))


def test_pods_are_counted_by_metrics_that_move_while_a_job_runs(gpu):
    (trigger,) = gpu["ScaledObject"]["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert query == 'sum(wan22_in_flight{model="wan22"}) + sum(nv_inference_pending_request_count{model="wan22"})'


def test_a_model_on_the_cpu_asks_for_no_gpu(tiny_engines, tmp_path):
    made = rendered(tiny_engines, tmp_path, "--topology", "bls")
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "limits" not in container["resources"]
    assert "--model-config-name=cpu" in container["command"]


def test_shared_memory_grows_with_the_calls_of_topology_bls(compiled, tmp_path):
    engines, sizes = compiled(), {}
    for topology in ("owner", "bls"):
        options = RepositoryOptions(topology=topology, limits={"max_pixels": 4096**2})
        sizes[topology] = shared_memory_gib(write_repository(engines, tmp_path / topology, options), options)
    assert sizes["owner"] == 2
    assert sizes["bls"] > 2


def test_a_started_container_clears_the_memory_of_the_one_before(tmp_path):
    prefix = f"wan22_test_{tmp_path.name}_"
    left = Path("/dev/shm", f"{prefix}1")
    left.touch()
    command = [sys.executable, "-m", "triton_repo.start", prefix, "echo", "the server"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, left.exists()) == ("the server\n", False)
