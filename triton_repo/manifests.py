"""Kubernetes manifests of a served model: Deployment, Service, KEDA ScaledObject, PodDisruptionBudget.

One pod is one GPU and one job at a time, so pods are counted in jobs that run or wait. A job takes minutes, so nothing
here ends a pod that has work: it says that it is not ready, finishes, and is given the time for that.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_repo.bls_repository import CPU, largest_call_bytes
from triton_repo.probe import DRAIN_FLAG, IN_FLIGHT, MAX_SILENCE_S, PENDING
from triton_repo.repository import MARK, RepositoryOptions, Written, is_for_gpu
from triton_repo.server import EXIT_MARGIN_S, LOAD_S, ServeOptions, arguments
from wan22.bundle import Bundle
from wan22.errors import UserError
from wan22.files import whole_folder

MINIMUM_RELEASE = "26.07"
REASON = (
    f"tritonserver {MINIMUM_RELEASE} or later: the first release with the fixes of all security bulletins up to "
    "September 2026 (among them CVE-2026-16497 and CVE-2026-47625) and of deadlocks between decoupled and called "
    "models; it also asks the model for its readiness and notices its death"
)
REPOSITORY_AT, ENGINES_AT = "/models", "/engines"
USER = 1000
PROBE_S, STARTUP_PROBE_S = 20, 10
ADMIN_KEY = "WAN22_ADMIN_KEY"
GIBIBYTE = 2**30
HOST_GIB = 8  # of memory beside engines and /dev/shm: server, CUDA, a decoded video
Manifest = dict[str, Any]


@dataclass(frozen=True)
class ClusterOptions:
    """What the cluster calls things."""

    image: str = f"wan-trt:{MINIMUM_RELEASE}"  # made FROM that tritonserver, with wan-trt installed
    max_pods: int = 4
    prometheus: str = "http://prometheus-server.monitoring.svc"


def check_image(image: str) -> None:
    """Refuses NVIDIA's releases before the oldest that is safe; what another image was made from, nobody can tell here.

    Raises:
        UserError: an older tritonserver, or what cannot be the name of an image.
    """
    if not re.fullmatch(r"[\w.:/@-]+", image):
        raise UserError(f"image {image!r}", "a name such as registry.example/wan-trt:26.07", "name one with --image")
    release = re.search(r"tritonserver:(\d\d\.\d\d)", image)
    if release and release[1] < MINIMUM_RELEASE:
        raise UserError(f"image {image}", REASON, "name a newer --image")


def write_manifests(folder: Path, written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> None:
    """A YAML file for each object into ``folder``, which is new, or made so before and to be overwritten."""
    import yaml

    with whole_folder(folder, MARK if options.overwrite else "") as temporary:
        (temporary / MARK).touch()
        for manifest in manifests(written, options, cluster):
            text = yaml.safe_dump(manifest, sort_keys=False, width=120)
            (temporary / f"{manifest['kind'].lower()}.yaml").write_text(text)


def manifests(written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> list[Manifest]:
    name = options.name.replace("_", "-")
    return [
        _object("apps/v1", "Deployment", name, _deployment(name, written, options, cluster)),
        _object("v1", "Service", name, _service(name)),
        _object("keda.sh/v1alpha1", "ScaledObject", name, _scaled_object(name, options.name, cluster)),
        _object("policy/v1", "PodDisruptionBudget", name, {"maxUnavailable": 1, "selector": _selector(name)}),
    ]


def _object(version: str, kind: str, name: str, spec: Manifest) -> Manifest:
    metadata = {"name": name, "labels": _labels(name)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "wan-trt"}


def _selector(name: str) -> Manifest:
    return {"matchLabels": {"app.kubernetes.io/name": name}}


def _service(name: str) -> Manifest:
    """Metrics are not in it: they are scraped from every pod, not through a balancer."""
    ports = [{"name": "grpc", "port": 8001, "targetPort": "grpc"}, {"name": "http", "port": 8000, "targetPort": "http"}]
    return {"selector": _selector(name)["matchLabels"], "ports": ports}


def _scaled_object(name: str, model: str, cluster: ClusterOptions) -> Manifest:
    """A pod for every job that runs or waits. Triton's other metrics stand still until a job ends."""
    query = f'sum({IN_FLIGHT}{{model="{model}"}}) + sum({PENDING}{{model="{model}"}})'
    trigger = {"serverAddress": cluster.prometheus, "query": query, "threshold": "1"}
    one_by_one = {
        "stabilizationWindowSeconds": 600,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}],
    }
    return {
        "scaleTargetRef": {"name": name},
        "pollingInterval": 15,
        "minReplicaCount": 1,
        "maxReplicaCount": cluster.max_pods,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": one_by_one}}},
        "triggers": [{"type": "prometheus", "metricType": "AverageValue", "metadata": trigger}],
    }


def _deployment(name: str, written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> Manifest:
    """Without a count of replicas, which is the autoscaler's."""
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "8002",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "wan-trt/image": REASON,
    }
    pod = {"metadata": {"labels": _labels(name), "annotations": annotations}}
    return {
        "selector": _selector(name),
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "progressDeadlineSeconds": LOAD_S + termination_s(written) + 600,
        "template": {**pod, "spec": _pod(name, written, options, cluster)},
    }


def _pod(name: str, written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> Manifest:
    shared_memory = f"{shared_memory_gib(written, options)}Gi"
    return {
        "terminationGracePeriodSeconds": termination_s(written),
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(name, written, options, cluster)],
        "volumes": [
            {"name": "repository", "persistentVolumeClaim": {"claimName": f"{name}-repository", "readOnly": True}},
            {"name": "engines", "persistentVolumeClaim": {"claimName": f"{name}-engines", "readOnly": True}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
            {"name": "temporary", "emptyDir": {}},
        ],
    }


def _container(name: str, written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> Manifest:
    flag = ["--flag", str(DRAIN_FLAG), "--within-s", str(drain_s(written))]
    model_ready = {"path": f"/v2/models/{options.name}/ready", "port": "http"}
    return {
        "name": "tritonserver",
        "image": cluster.image,
        "command": _command(written, options),
        "env": [{"name": ADMIN_KEY, "valueFrom": {"secretKeyRef": {"name": f"{name}-admin", "key": "key"}}}],
        "ports": [{"name": n, "containerPort": p} for n, p in (("http", 8000), ("grpc", 8001), ("metrics", 8002))],
        "startupProbe": {
            "httpGet": {"path": "/v2/health/ready", "port": "http"},
            "periodSeconds": STARTUP_PROBE_S,
            "failureThreshold": LOAD_S // STARTUP_PROBE_S,
        },
        "readinessProbe": {"httpGet": model_ready, "periodSeconds": 5, "timeoutSeconds": 6},
        "livenessProbe": {
            "exec": {"command": _probe("alive", "--max-silence-s", str(MAX_SILENCE_S))},
            "periodSeconds": PROBE_S,
            "timeoutSeconds": PROBE_S // 2,
            "failureThreshold": 3,
        },
        "lifecycle": {"preStop": {"exec": {"command": _probe("drain", *flag)}}},
        "resources": _resources(written, options),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "repository", "mountPath": REPOSITORY_AT, "readOnly": True},
            {"name": "engines", "mountPath": options.engines_at or ENGINES_AT, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "temporary", "mountPath": "/tmp"},
        ],
    }


def _probe(*words: str) -> list[str]:
    return ["python3", "-m", "triton_repo.probe", *words]


def _command(written: Written, options: RepositoryOptions) -> list[str]:
    """Kubernetes puts the secret in the place of ``$(...)``."""
    variant = CPU if options.topology == "bls" and not is_for_gpu(written.bundle) else ""
    serve = ServeOptions("0.0.0.0", config_name=variant, region_prefix="wan22_")
    server = ["tritonserver", *arguments(Path(REPOSITORY_AT), written.limits, serve, f"$({ADMIN_KEY})")]
    return ["python3", "-m", "triton_repo.start", serve.region_prefix, *server]


def _resources(written: Written, options: RepositoryOptions) -> Manifest:
    """An engine is read into memory of the host on its way to the GPU. No limit on it: to exceed one loses the job."""
    memory_gib = _largest_engine_gib(written.bundle) + shared_memory_gib(written, options) + HOST_GIB
    resources: Manifest = {"requests": {"cpu": "4", "memory": f"{memory_gib}Gi"}}
    if is_for_gpu(written.bundle):
        resources["limits"] = {"nvidia.com/gpu": 1}
    return resources


def _largest_engine_gib(bundle: Bundle) -> int:
    return -(-max(file.size_bytes for file in bundle.manifest.files().values()) // GIBIBYTE)


def shared_memory_gib(written: Written, options: RepositoryOptions) -> int:
    """Requests and answers; in topology bls also the tensors of engine calls, of which three are alive at most."""
    answers = 2 * (written.limits.max_image_bytes + written.limits.max_raw_bytes)
    calls = 3 * largest_call_bytes(written.bundle, written.limits) if options.topology == "bls" else 0
    return max(2, -(-(answers + calls) // GIBIBYTE))


def drain_s(written: Written) -> int:
    """Until the last job that waits has begun, and has ended."""
    return written.limits.queue_timeout_s + written.limits.longest_job_s


def termination_s(written: Written) -> int:
    """The drain, then what the server itself waits for."""
    return drain_s(written) + written.limits.longest_job_s + 2 * EXIT_MARGIN_S
