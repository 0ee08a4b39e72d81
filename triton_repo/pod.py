"""The pod of a served model: one server on its GPU or GPUs, with its resources, volumes and permissions."""

from pathlib import Path
from typing import Any

from triton_repo.bls_repository import CPU, largest_call_bytes
from triton_repo.probe import DRAIN_FLAG, MAX_SILENCE_S
from triton_repo.repository import RepositoryOptions, Written, is_for_gpu
from triton_repo.server import EXIT_MARGIN_S, LOAD_S, ServeOptions, arguments

REPOSITORY_AT, ENGINES_AT = "/models", "/engines"
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
USER = 10_001  # does not exist on nodes
PROBE_S, STARTUP_PROBE_S = 20, 10
DEAD_S = 30  # after a failed liveness probe, when no job is left to wait for
GIBIBYTE = 2**30
HOST_GIB = 8  # memory besides engines and /dev/shm: server, CUDA, a decoded video
TEMPORARY_GIB = 2  # /tmp: the file of one video
LOG_GIB = 1
Manifest = dict[str, Any]
POD_SECURITY: Manifest = {
    "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
}  # fmt: skip


def pod_spec(name: str, written: Written, options: RepositoryOptions, image: str) -> Manifest:
    shared_memory = f"{shared_memory_gib(written, options)}Gi"
    return {
        "terminationGracePeriodSeconds": termination_s(written),
        "serviceAccountName": name,
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        **_nodes(written),
        "containers": [_container(written, options, image)],
        "volumes": [
            {"name": "repository", "persistentVolumeClaim": {"claimName": f"{name}-repository", "readOnly": True}},
            {"name": "engines", "persistentVolumeClaim": {"claimName": f"{name}-engines", "readOnly": True}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}},
            {"name": "temporary", "emptyDir": {"sizeLimit": f"{TEMPORARY_GIB}Gi"}},
        ],
    }


def _nodes(written: Written) -> Manifest:
    """Select nodes with the engines' GPU, by the labels of NVIDIA's GPU feature discovery."""
    build = written.bundle.manifest.build
    if build is None or not build.compute_capability:
        return {}
    major, _, minor = build.compute_capability.partition(".")
    return {
        "nodeSelector": {"nvidia.com/gpu.compute.major": major, "nvidia.com/gpu.compute.minor": minor},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }


def _container(written: Written, options: RepositoryOptions, image: str) -> Manifest:
    flag = ["--flag", str(DRAIN_FLAG), "--within-s", str(drain_s(written))]
    variant = CPU if options.topology == "bls" and not is_for_gpu(written.bundle) else ""
    serve = ServeOptions("0.0.0.0", config_name=variant, region_prefix="wan22_")
    server = ["tritonserver", *arguments(Path(REPOSITORY_AT), written.limits, serve)]
    model_ready = {"path": f"/v2/models/{options.name}/ready", "port": "http"}
    return {
        "name": "tritonserver",
        "image": image,
        "imagePullPolicy": "Always",
        "command": ["python3", "-m", "triton_repo.start", serve.region_prefix, *server],
        "ports": [{"name": port, "containerPort": number} for port, number in PORTS.items()],
        "startupProbe": {
            "httpGet": {"path": "/v2/health/ready", "port": "http"},
            "periodSeconds": STARTUP_PROBE_S,
            "failureThreshold": LOAD_S // STARTUP_PROBE_S,
        },
        "readinessProbe": {"httpGet": model_ready, "periodSeconds": 5, "timeoutSeconds": 6},
        "livenessProbe": {
            "exec": {"command": _probe("alive", "--max-silence-s", str(MAX_SILENCE_S))},
            "periodSeconds": PROBE_S,
            "timeoutSeconds": PROBE_S,
            "failureThreshold": 3,
            "terminationGracePeriodSeconds": DEAD_S,
        },
        "lifecycle": {"preStop": {"exec": {"command": _probe("drain", *flag)}}},
        "resources": _resources(written, options),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "repository", "mountPath": REPOSITORY_AT, "readOnly": True},
            {"name": "engines", "mountPath": options.engines_at or ENGINES_AT, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "temporary", "mountPath": "/tmp"},
        ],
    }


def _probe(*words: str) -> list[str]:
    return ["python3", "-m", "triton_repo.probe", *words]


def _resources(written: Written, options: RepositoryOptions) -> Manifest:
    """Requests and limits. Host memory holds one engine on its way to the GPU, or all engines without a GPU.

    The memory limit catches leaks and is well above the request, because exceeding it loses the job. There is no limit
    on processors, because it would slow jobs down on an idle node.
    """
    sizes = [file.size_bytes for file in written.bundle.manifest.files().values()]
    on_gpu = is_for_gpu(written.bundle)
    engines_gib = -(-(max(sizes) if on_gpu else sum(sizes)) // GIBIBYTE)
    memory_gib = engines_gib + shared_memory_gib(written, options) + HOST_GIB
    gpus = {"nvidia.com/gpu": written.devices} if on_gpu else {}
    disk = {"ephemeral-storage": f"{TEMPORARY_GIB + LOG_GIB}Gi"}
    return {
        "requests": {"cpu": "4", "memory": f"{memory_gib}Gi", **disk},
        "limits": {"memory": f"{memory_gib + HOST_GIB}Gi", **disk, **gpus},
    }


def shared_memory_gib(written: Written, options: RepositoryOptions) -> int:
    """GiB for requests and answers; in topology bls also for the tensors of up to three engine calls."""
    answers = 2 * (written.limits.max_image_bytes + written.limits.max_raw_bytes)
    calls = 3 * largest_call_bytes(written.bundle, written.limits) if options.topology == "bls" else 0
    return max(2, -(-(answers + calls) // GIBIBYTE))


def drain_s(written: Written) -> int:
    """The longest time until the last waiting job has ended."""
    return written.limits.queue_timeout_s + written.limits.longest_job_s


def termination_s(written: Written) -> int:
    """The drain plus the server's exit timeout."""
    return drain_s(written) + written.limits.longest_job_s + 2 * EXIT_MARGIN_S
