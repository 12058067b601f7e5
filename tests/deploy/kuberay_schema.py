# ruff: noqa: N815
"""The fields of KubeRay's RayCluster and RayJob (ray.io/v1) and of their pods that the manifests may use.

Written from the operator's public API types; unknown fields are errors here as they are for a strict API server. It is
a part of the definitions, enough for what is shipped: a field that a manifest is to use is added here first.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTP]i?)?$")]
Number = Annotated[int, Field(ge=0, lt=2**31)]


class Part(BaseModel):
    """Strict: what is not named here is refused, and YAML's numbers do not pass for strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SecretKey(Part):
    name: Name
    key: str
    optional: bool = False


class Source(Part):
    secretKeyRef: SecretKey


class Variable(Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str | None = None
    valueFrom: Source | None = None


class Port(Part):
    name: Annotated[Name, Field(max_length=15)]
    containerPort: Annotated[int, Field(ge=1, le=65535)]


class Mount(Part):
    name: Name
    mountPath: Annotated[str, Field(pattern=r"^/")]


class Amounts(Part):
    limits: dict[str, Quantity]
    requests: dict[str, Quantity]


class Container(Part):
    name: Name
    image: str
    ports: list[Port] = []
    env: list[Variable] = []
    resources: Amounts
    volumeMounts: list[Mount] = []


class Claim(Part):
    claimName: Name


class EmptyDir(Part):
    medium: Literal["", "Memory"] = ""


class Volume(Part):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class User(Part):
    runAsNonRoot: bool
    runAsUser: int
    fsGroup: int


class PodSpec(Part):
    securityContext: User
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []


class Template(Part):
    spec: PodSpec


class Head(Part):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    rayStartParams: dict[str, str]
    template: Template


class Workers(Part):
    groupName: Name
    replicas: Number = 0
    minReplicas: Number = 0
    maxReplicas: Number
    rayStartParams: dict[str, str]
    template: Template


class AuthOptions(Part):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Part):
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: Number


class ClusterSpec(Part):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: Head
    workerGroupSpecs: list[Workers]


class Metadata(Part):
    name: Name | None = None
    generateName: str | None = None


class RayCluster(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class SubmitterConfig(Part):
    backoffLimit: Number


class JobSpec(Part):
    clusterSelector: dict[str, str]
    entrypoint: str
    submitterConfig: SubmitterConfig | None = None
    activeDeadlineSeconds: Annotated[int, Field(gt=0, lt=2**31)] | None = None


class RayJob(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def manifest(data: dict[str, Any]) -> RayCluster | RayJob:
    """A parsed manifest, validated."""
    kinds: dict[str, type[RayCluster | RayJob]] = {"RayCluster": RayCluster, "RayJob": RayJob}
    return kinds[data["kind"]].model_validate(data)
