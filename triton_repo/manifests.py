"""Kubernetes manifests of a served model and of its gateway, from Deployments to network policies.

One pod has one GPU, or a group of them, and runs one job at a time, so the autoscaler counts running and waiting jobs
of the gateway's queue. A job takes minutes, so a pod with work is never ended early: it reports that it is not ready,
and gets the time to finish.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from triton_repo import gateway_manifests
from triton_repo.gateway_manifests import GatewayPods, gateway_objects
from triton_repo.pod import PORTS, pod_spec, termination_s
from triton_repo.repository import MARK, RepositoryOptions, Written
from triton_repo.server import LOAD_S
from triton_repo.settings import public_name
from wan22.errors import UserError
from wan22.files import whole_folder

MINIMUM_RELEASE = "26.07"
REASON = (
    f"tritonserver {MINIMUM_RELEASE} or later: the first release with the fixes of all security bulletins up to "
    "September 2026 (among them CVE-2026-16497 and CVE-2026-47625) and of deadlocks between decoupled and called "
    "models; it also asks the model for its readiness and notices its death"
)
NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
Manifest = dict[str, Any]


@dataclass(frozen=True)
class ClusterOptions:
    """Names and limits in the cluster."""

    image: str = f"wan-trt:{MINIMUM_RELEASE}"  # based on that tritonserver, with wan-trt installed
    namespace: str = "wan22"  # for all objects, and as label in the autoscaler's query
    max_pods: int = 4
    prometheus: str = "http://prometheus-server.monitoring.svc"
    gateway: GatewayPods = field(default_factory=GatewayPods)

    def __post_init__(self) -> None:
        check_image(self.image)
        check_image(self.gateway.image)
        if not NAMESPACE.fullmatch(self.namespace):
            expected = "lower-case letters, digits and -"
            raise UserError(f"namespace {self.namespace!r}", expected, "choose another --namespace")


def check_image(image: str) -> None:
    """Refuse NVIDIA's images older than the oldest safe release; other images cannot be checked here.

    Raises:
        UserError: the tritonserver is older, or the name is invalid.
    """
    if not re.fullmatch(r"[\w.:/@-]+", image):
        raise UserError(f"image {image!r}", "a name such as registry.example/wan-trt:26.07", "name one with --image")
    release = re.search(r"tritonserver:(\d\d\.\d\d)", image)
    if release and release[1] < MINIMUM_RELEASE:
        raise UserError(f"image {image}", REASON, "name a newer --image")


def write_manifests(folder: Path, written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> None:
    """Write a YAML file for each object to ``folder``, which must be new or an earlier result to overwrite."""
    import yaml

    with whole_folder(folder, MARK if options.overwrite else "") as temporary:
        (temporary / MARK).touch()
        for manifest in manifests(written, options, cluster):
            text = yaml.safe_dump(manifest, sort_keys=False, width=120)
            part = "gateway-" if manifest["metadata"]["name"].endswith("-gateway") else ""
            (temporary / f"{part}{manifest['kind'].lower()}.yaml").write_text(text)


def manifests(written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> list[Manifest]:
    name = options.name.replace("_", "-")
    # Without metrics, which Prometheus scrapes from every pod and not through a balancer.
    ports = [{"name": port, "port": PORTS[port], "targetPort": port} for port in ("grpc", "http")]
    # Headless: its name has the address of every pod that is ready, for the gateway to give each a job at a time.
    service = {"clusterIP": "None", "selector": _selector(name)["matchLabels"], "ports": ports}
    made: list[tuple[str, str, Manifest]] = [
        ("v1", "ServiceAccount", {"automountServiceAccountToken": False}),
        ("apps/v1", "Deployment", {"spec": _deployment(name, written, options, cluster)}),
        ("v1", "Service", {"spec": service}),
        ("networking.k8s.io/v1", "NetworkPolicy", {"spec": _network_policy(name, cluster)}),
        (
            "keda.sh/v1alpha1",
            "ScaledObject",
            {"spec": _scaled_object(name, public_name(written.bundle.manifest.spec), cluster)},
        ),
        ("policy/v1", "PodDisruptionBudget", {"spec": {"maxUnavailable": 1, "selector": _selector(name)}}),
    ]
    metadata = {"name": name, "namespace": cluster.namespace, "labels": _labels(name)}
    skipped = {"annotations": {"checkov.io/skip1": "CKV_K8S_11=a limit of processors slows jobs down on an idle node"}}
    of_kind = {"Deployment": metadata | skipped}
    front = metadata | {"name": f"{name}-gateway", "labels": gateway_manifests.labels(name)}
    of_gateway = {"Deployment": front | skipped}
    return [
        *({"apiVersion": version, "kind": kind, "metadata": of_kind.get(kind, metadata), **content}
          for version, kind, content in made),
        *({"apiVersion": version, "kind": kind, "metadata": of_gateway.get(kind, front), **content}
          for version, kind, content in gateway_objects(name, options.name, cluster.gateway)),
    ]  # fmt: skip


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "wan-trt"}


def _selector(name: str) -> Manifest:
    return {"matchLabels": {"app.kubernetes.io/name": name}}


def _network_policy(name: str, cluster: ClusterOptions) -> Manifest:
    """Allow jobs from the gateway and scraping by Prometheus; allow no outgoing connections.

    The kubelet's probes come from the pod's node, which policies never block.
    """
    # The namespace is part of a service's address: ``monitoring`` of ``http://prometheus.monitoring.svc:80``.
    parts = (urlsplit(cluster.prometheus).hostname or "").split(".")
    namespace = parts[1] if len(parts) > 1 else cluster.namespace
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}

    def rule(source: Manifest, *ports: str) -> Manifest:
        return {"from": [source], "ports": [{"protocol": "TCP", "port": port} for port in ports]}

    return {
        "podSelector": _selector(name),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            rule({"podSelector": {"matchLabels": gateway_manifests.labels(name)}}, "grpc"),
            rule(prometheus, "metrics"),
        ],
        "egress": [],
    }


def _scaled_object(name: str, model: str, cluster: ClusterOptions) -> Manifest:
    """Scale to one pod per running or waiting job of the queue, of which every gateway tells the whole."""
    labels = f'namespace="{cluster.namespace}", model="{model}"'  # excludes jobs of other namespaces
    query = f'sum(max by (status) (wan_gateway_jobs{{{labels}, status=~"queued|in_progress"}}))'
    trigger = {"serverAddress": cluster.prometheus, "query": query, "threshold": "1"}
    one_by_one = {"stabilizationWindowSeconds": 600, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 300}]}
    return {
        "scaleTargetRef": {"name": name},
        "pollingInterval": 15,
        "minReplicaCount": 1,
        "maxReplicaCount": cluster.max_pods,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": one_by_one}}},
        "triggers": [{"type": "prometheus", "metricType": "AverageValue", "metadata": trigger}],
    }


def _deployment(name: str, written: Written, options: RepositoryOptions, cluster: ClusterOptions) -> Manifest:
    """The Deployment, without a number of replicas, which the autoscaler sets."""
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(PORTS["metrics"]),
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "wan-trt/image": REASON,
    }
    pod = {"metadata": {"labels": _labels(name), "annotations": annotations}}
    return {
        "selector": _selector(name),
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "progressDeadlineSeconds": LOAD_S + termination_s(written) + 600,
        "template": {**pod, "spec": pod_spec(name, written, options, cluster.image)},
    }
