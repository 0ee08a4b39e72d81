"""The manifests are what Kubernetes and KEDA take, and say what a server with long jobs needs."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from triton_repo.manifests import MINIMUM_RELEASE, ClusterOptions
from triton_repo.pod import shared_memory_gib
from triton_repo.probe import SECOND_LOOK_S
from triton_repo.repository import RepositoryOptions, write_repository
from wan22.errors import UserError
from wan_trt.cli import app

WAN_TRT = str(Path(sys.executable).with_name("wan-trt"))
VERSIONS = ("1.31", "1.37")
KINDS = ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount")
CHECKOV = Path(__file__).parents[2] / ".venv-checkov" / "bin" / "checkov"
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
    """What the command writes, by kind; the kinds of the gateway's objects begin with "Gateway"."""
    with pytest.raises(SystemExit) as left:
        app(["triton", str(engines), str(folder / "repository"), "--kubernetes", str(folder / "manifests"), *options])
    assert left.value.code == 0
    found = [yaml.safe_load(path.read_text()) for path in (folder / "manifests").glob("*.yaml")]
    return {("Gateway" if is_front(manifest) else "") + manifest["kind"]: manifest for manifest in found}


def is_front(manifest):
    return manifest["metadata"]["labels"].get("app.kubernetes.io/component") == "gateway"


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
@pytest.mark.parametrize("options", [(), ("--topology", "bls", "--database-secret", "wan22-database")])
def test_kubernetes_takes_every_object(compiled, tmp_path, options, version):
    made = rendered(compiled(), tmp_path, *options)
    assert set(made) == {*KINDS, "ScaledObject", *(f"Gateway{kind}" for kind in KINDS)}
    for kind in made.keys() - {"ScaledObject"}:
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
        gpu["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert gpu["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == name
    ports = {port["name"] for port in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in gpu["Service"]["spec"]["ports"]} <= ports
    open_ports = {port["port"] for rule in gpu["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    assert open_ports == ports - {"http"}  # which only the kubelet's probes need
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == gpu["ServiceAccount"]["metadata"]["name"]
    assert {manifest["metadata"]["namespace"] for manifest in gpu.values()} == {"wan22"}


def test_a_pod_has_one_gpu_shared_memory_and_nothing_that_it_may_write_but_tmp(pod, container):
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1, "memory": "19Gi", "ephemeral-storage": "3Gi"}
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "11Gi", "ephemeral-storage": "3Gi"}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert volumes["temporary"]["emptyDir"] == {"sizeLimit": "2Gi"}
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/models": True, "/engines": True, "/dev/shm": False, "/tmp": False}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 10_000
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_pods_go_to_nodes_with_the_gpu_that_the_engines_are_for(pod, compiled, tiny_engines, tmp_path):
    assert pod["nodeSelector"] == {"nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    on_cpu = rendered(tiny_engines, tmp_path / "cpu")["Deployment"]["spec"]["template"]["spec"]
    assert {"nodeSelector", "tolerations"}.isdisjoint(on_cpu)


def test_the_gateway_alone_sends_jobs_and_prometheus_alone_reads_metrics(gpu):
    policy = gpu["NetworkPolicy"]["spec"]
    assert (set(policy["policyTypes"]), policy["egress"]) == ({"Ingress", "Egress"}, [])
    sources = {port["port"]: rule["from"] for rule in policy["ingress"] for port in rule["ports"]}
    gateway = [{"podSelector": {"matchLabels": gpu["GatewayDeployment"]["spec"]["template"]["metadata"]["labels"]}}]
    prometheus = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert sources == {"grpc": gateway, "metrics": prometheus}
    front = gpu["GatewayNetworkPolicy"]["spec"]
    to_pods = [rule for rule in front["egress"] if "podSelector" in rule.get("to", [{}])[0]]
    labels = gpu["Deployment"]["spec"]["template"]["metadata"]["labels"]
    (rule,) = to_pods
    assert rule["to"][0]["podSelector"]["matchLabels"].items() <= labels.items()
    assert [port["port"] for port in rule["ports"]] == ["grpc"]
    assert 5432 not in [port["port"] for rule in front["egress"] for port in rule["ports"]]


def test_a_pod_that_liveness_gives_up_is_not_waited_for(container):
    assert container["livenessProbe"]["terminationGracePeriodSeconds"] == 30
    assert container["livenessProbe"]["timeoutSeconds"] > SECOND_LOOK_S


@pytest.mark.parametrize("topology", ["owner", "bls"])
def test_checkov_finds_nothing(compiled, tmp_path, topology):
    if not CHECKOV.is_file():
        pytest.skip("no checkov, run make checkov")
    digest = f"@sha256:{'0' * 64}"
    images = ["--image", f"registry.example/wan-trt{digest}", "--gateway-image", f"registry.example/gateway{digest}"]
    secret = "wan22-database" if topology == "bls" else ""
    rendered(compiled(), tmp_path, "--topology", topology, *images, "--database-secret", secret)
    command = [CHECKOV, "-d", tmp_path / "manifests", "--framework", "kubernetes", "--skip-download", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert [check["check_id"] for check in found["results"]["failed_checks"]] == []
    assert [check["check_id"] for check in found["results"]["skipped_checks"]] == ["CKV_K8S_11"] * 2
    assert found["summary"]["passed"] > 160


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
    with pytest.raises(UserError, match=r"engines at here \| expected an absolute path"):
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


def test_administration_is_closed_without_a_key_that_anybody_could_read(gpu, container):
    """The lock is a header with line feeds, which no request can have."""
    assert "env" not in container
    assert all("Secret" not in yaml.safe_dump(manifest) for manifest in gpu.values())
    for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
        (word,) = (word for word in container["command"] if word.startswith(option))
        name, _, value = word.partition(":")[2].rpartition("=")
        assert "\n" in name
        assert "\n" in value
        assert "model-repository" in word


def test_the_probes_are_programs_that_there_are(container):
    commands = [container["lifecycle"]["preStop"]["exec"]["command"], container["livenessProbe"]["exec"]["command"]]
    for _, *words in commands:
        done = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, check=True)
        assert all(word in done.stdout for word in words if word.startswith("--"))


def test_pods_are_counted_by_the_queue_once_however_many_gateways_tell_its_length(gpu):
    (trigger,) = gpu["ScaledObject"]["spec"]["triggers"]
    labels = '{namespace="wan22", model="wan2.2-t2v-a14b-tiny", status=~"queued|in_progress"}'
    assert trigger["metadata"]["query"] == f"sum(max by (status) (wan_gateway_jobs{labels}))"


@pytest.mark.parametrize("secret", ["", "wan22-database"])
def test_a_gateway_finds_every_pod_and_may_write_its_volume_alone(compiled, tmp_path, secret):
    made = rendered(compiled(), tmp_path, "--database-secret", secret, "--name", "wan_video")
    deployment, service = made["GatewayDeployment"]["spec"], made["Service"]
    (container,) = deployment["template"]["spec"]["containers"]
    command = container["command"]
    assert service["spec"]["clusterIP"] == "None"  # so that its name is the address of every pod
    assert command[command.index("--server") + 1] == f"dns:{service['metadata']['name']}:8001"
    assert command[command.index("--name") + 1] == "wan_video"
    assert "--require-keys" in command
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert {path for path, read_only in mounts.items() if not read_only} == {"/data", "/tmp"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert deployment["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (
        (2, "RollingUpdate") if secret else (1, "Recreate")
    )
    assert ("--database" in command) == bool(secret)
    if secret:
        folder, _, file = command[command.index("--database") + 1].removeprefix("@").rpartition("/")
        volume = next(v["secret"] for v in deployment["template"]["spec"]["volumes"] if "secret" in v)
        assert (mounts[folder], volume["secretName"], volume["items"][0]["path"]) == (True, secret, file)
    help_of = subprocess.run([WAN_TRT, "gateway", "run", "--help"], capture_output=True, text=True, check=True)
    assert all(word in help_of.stdout for word in command if word.startswith("--"))


def test_a_namespace_is_a_name_and_is_counted_apart(compiled, tmp_path):
    made = rendered(compiled(), tmp_path, "--namespace", "staging")
    assert {manifest["metadata"]["namespace"] for manifest in made.values()} == {"staging"}
    assert 'namespace="staging"' in made["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]
    with pytest.raises(UserError, match="namespace 'A\"'"):
        ClusterOptions(namespace='A"')


def test_a_model_on_the_cpu_asks_for_no_gpu(tiny_engines, tmp_path):
    made = rendered(tiny_engines, tmp_path, "--topology", "bls")
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "--model-config-name=cpu" in container["command"]


def test_a_pod_has_the_gpus_of_a_group(compiled, tmp_path):
    made = rendered(compiled(), tmp_path, "--gpus", "0,1", "--parallel", "cfg2")
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    config = (tmp_path / "repository" / "wan22" / "config.pbtxt").read_text()
    assert "kind: KIND_MODEL" in config
    assert "gpus:" not in config


def test_shared_memory_grows_with_the_calls_of_topology_bls(compiled, tmp_path):
    engines, sizes = compiled(), {}
    for topology in ("owner", "bls"):
        options = RepositoryOptions(topology=topology, limits={"max_pixels": 4096**2})
        sizes[topology] = shared_memory_gib(write_repository(engines, tmp_path / topology, options), options)
    assert sizes["owner"] == 2
    assert sizes["bls"] > 2
