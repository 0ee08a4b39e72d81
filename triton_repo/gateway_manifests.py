"""Kubernetes manifests of the gateway before served models: the only one that reaches them, and what clients reach.

With SQLite there is one gateway, which owns the volume of its queue. With PostgreSQL there are two, on one volume for
the videos that both may write.
"""

import re
from dataclasses import dataclass
from typing import Any

from triton_repo.pod import CONTAINER_SECURITY, POD_SECURITY, PORTS
from wan22.errors import UserError

COMPONENT = "app.kubernetes.io/component"
DATA_AT, SECRET_AT, URL_FILE = "/data", "/run/secrets/database", "url"
PORT = 8080
FINISH_S = 600  # for running jobs at the end of a pod: they go back to the queue afterwards, and start again
SECRET = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
Manifest = dict[str, Any]


@dataclass(frozen=True)
class GatewayPods:
    """The gateway in the cluster."""

    image: str = "wan-trt-gateway:0.1.0"
    database_secret: str = ""  # whose key ``url`` is postgresql://...; empty for SQLite

    def __post_init__(self) -> None:
        if self.database_secret and not SECRET.fullmatch(self.database_secret):
            found = f"secret {self.database_secret!r}"
            raise UserError(found, "a name of lower-case letters, digits, - and .", "choose another --database-secret")

    @property
    def count(self) -> int:
        return 2 if self.database_secret else 1


def labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": f"{name}-gateway", COMPONENT: "gateway", "app.kubernetes.io/part-of": "wan-trt"}


def gateway_objects(name: str, model: str, pods: GatewayPods) -> list[tuple[str, str, Manifest]]:
    """API version, kind and content of each object.

    Args:
        name: of the Triton servers' Service.
        model: name of the served model.
        pods: see :class:`GatewayPods`.
    """
    selector = {"matchLabels": labels(name)}
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    return [
        ("v1", "ServiceAccount", {"automountServiceAccountToken": False}),
        ("apps/v1", "Deployment", {"spec": _deployment(name, model, pods)}),
        ("v1", "Service", {"spec": {"selector": selector["matchLabels"], "ports": ports}}),
        ("networking.k8s.io/v1", "NetworkPolicy", {"spec": _network_policy(name, pods)}),
        ("policy/v1", "PodDisruptionBudget", {"spec": {"maxUnavailable": 1, "selector": selector}}),
    ]


def _network_policy(name: str, pods: GatewayPods) -> Manifest:
    """Everybody may ask, for which there are keys. It reaches names, Triton, and with a database PostgreSQL."""

    def port(protocol: str, number: int | str) -> Manifest:
        return {"protocol": protocol, "port": number}

    triton = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": name}}}
    egress: list[Manifest] = [
        {"to": [{"namespaceSelector": {}}], "ports": [port("UDP", 53), port("TCP", 53)]},
        {"to": [triton], "ports": [port("TCP", "grpc")]},
    ]
    if pods.database_secret:
        egress.append({"ports": [port("TCP", 5432)]})  # wherever it is
    return {
        "podSelector": {"matchLabels": labels(name)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [port("TCP", "http")]}],
        "egress": egress,
    }


def _deployment(name: str, model: str, pods: GatewayPods) -> Manifest:
    annotations = {"prometheus.io/scrape": "true", "prometheus.io/port": str(PORT)}
    # One that owns its volume has to end before the next one starts.
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    return {
        "replicas": pods.count,
        "selector": {"matchLabels": labels(name)},
        "strategy": rolling if pods.count > 1 else {"type": "Recreate"},
        "template": {
            "metadata": {"labels": labels(name), "annotations": annotations},
            "spec": _pod(name, model, pods),
        },
    }


def _pod(name: str, model: str, pods: GatewayPods) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": f"{name}-gateway"}},
        {"name": "temporary", "emptyDir": {"sizeLimit": "1Gi"}},
    ]
    if pods.database_secret:
        items = [{"key": URL_FILE, "path": URL_FILE}]
        volumes.append({"name": "database", "secret": {"secretName": pods.database_secret, "items": items}})
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels(name)},
    }
    return {
        "terminationGracePeriodSeconds": FINISH_S + 60,
        "serviceAccountName": f"{name}-gateway",
        "automountServiceAccountToken": False,
        "securityContext": POD_SECURITY,
        "topologySpreadConstraints": [spread],
        "containers": [_container(name, model, pods)],
        "volumes": volumes,
    }


def _container(name: str, model: str, pods: GatewayPods) -> Manifest:
    command = [
        "wan-trt", "gateway", "--server", f"dns:{name}:{PORTS['grpc']}", "--name", model, "--address", "0.0.0.0",
        "--port", str(PORT), "--require-keys", "--data", DATA_AT, "--finish-within", str(FINISH_S),
    ]  # fmt: skip
    mounts: list[Manifest] = [
        {"name": "data", "mountPath": DATA_AT},
        {"name": "temporary", "mountPath": "/tmp"},
    ]
    if pods.database_secret:
        command += ["--database", f"@{SECRET_AT}/{URL_FILE}", "--videos", f"{DATA_AT}/videos"]
        mounts.append({"name": "database", "mountPath": SECRET_AT, "readOnly": True})
    alive = {"httpGet": {"path": "/health", "port": "http"}}
    return {
        "name": "gateway",
        "image": pods.image,
        "imagePullPolicy": "Always",
        "command": command,
        "ports": [{"name": "http", "containerPort": PORT}],
        "startupProbe": {**alive, "periodSeconds": 2, "failureThreshold": 60},
        "readinessProbe": {**alive, "periodSeconds": 5, "timeoutSeconds": 5},  # it takes jobs while servers start
        "livenessProbe": {**alive, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 3},
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"},
            "limits": {"memory": "2Gi", "ephemeral-storage": "2Gi"},
        },
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": mounts,
    }
