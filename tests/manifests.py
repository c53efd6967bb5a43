"""Checks of rendered manifests without a cluster: what a Kubernetes, KubeRay, SkyPilot or Ray would refuse.

Fields of RayJob and RayCluster are those of KubeRay's API reference (ray.io/v1, 1.7), fields of SkyPilot's tasks those
of its page on the task YAML (0.14). Unknown keys are refused, which a real API server only warns of. Pods, and
everything that is Kubernetes' own, go through the schemas of `kubernetes-validate`.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import ray.autoscaler
import yaml

KUBERNETES = "1.34"
_TEXT, _COUNT, _FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_ANY = {"type": "object"}  # checked as a pod, or not written by us


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_GROUP: dict[str, Any] = {"rayStartParams": _TEXTS, "template": _ANY, "resources": _TEXTS, "labels": _TEXTS}
_RAY_CLUSTER = _object(
    ["headGroupSpec", "rayVersion"],
    upgradeStrategy=_ANY,
    authOptions=_object(["mode"], mode={"enum": ["disabled", "token"]}, secretName=_TEXT),
    suspend=_FLAG,
    managedBy=_TEXT,
    autoscalerOptions=_ANY,
    headServiceAnnotations=_TEXTS,
    enableInTreeAutoscaling=_FLAG,
    gcsFaultToleranceOptions=_ANY,
    networkPolicy=_ANY,
    tlsOptions=_ANY,
    rayVersion=_TEXT,
    headGroupSpec=_object(["template"], **_GROUP, headService=_ANY, enableIngress=_FLAG, serviceType=_TEXT),
    workerGroupSpecs={
        "type": "array",
        "maxItems": 7,  # Kueue takes eight sets of pods, the head among them
        "items": _object(
            ["groupName", "template", "maxReplicas", "minReplicas"],
            **_GROUP,
            groupName=_TEXT,
            suspend=_FLAG,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            idleTimeoutSeconds=_COUNT,
            numOfHosts=_COUNT,
            scaleStrategy=_ANY,
        ),
    },
)
_RAY_JOB = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object(
        ["name"], name={"type": "string", "pattern": "^[a-z]([a-z0-9-]*[a-z0-9])?$", "maxLength": 47}, labels=_TEXTS
    ),
    spec=_object(
        ["entrypoint", "rayClusterSpec"],
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=_COUNT,
        rayClusterSpec=_RAY_CLUSTER,
        submitterPodTemplate=_ANY,
        metadata=_TEXTS,
        clusterSelector=_TEXTS,
        submitterConfig=_ANY,
        managedBy=_TEXT,
        deletionStrategy=_ANY,
        entrypoint=_TEXT,
        runtimeEnvYAML=_TEXT,
        jobId=_TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        entrypointResources=_TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        ttlSecondsAfterFinished=_COUNT,
        preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes=_FLAG,
        suspend=_FLAG,
    ),
)
_QUEUED = {  # what Kueue asks of a RayJob that it is to start
    "properties": {
        "spec": {
            "required": ["suspend", "shutdownAfterJobFinishes"],
            "not": {"required": ["clusterSelector"]},
            "properties": {
                "suspend": {"const": True},
                "shutdownAfterJobFinishes": {"const": True},
                "rayClusterSpec": {"properties": {"enableInTreeAutoscaling": {"const": False}}},
            },
        }
    }
}
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_SKY_RESOURCES = [
    *("infra", "cloud", "region", "zone", "accelerators", "accelerator_args", "cpus", "memory", "instance_type"),
    *("use_spot", "disk_size", "disk_tier", "network_tier", "local_disk", "max_hourly_cost", "image_id", "ports"),
    *("labels", "autostop", "any_of", "ordered", "job_recovery", "priority"),
]
_AT_LEAST = {"type": "string", "pattern": r"^[0-9]+\+?$"}
_SKY_TASK = _object(
    ["run", "resources"],
    name=_TEXT,
    workdir=_TEXT,
    num_nodes={"type": "integer", "minimum": 1},
    resources={
        "type": "object",
        "propertyNames": {"enum": _SKY_RESOURCES},
        "properties": {
            "accelerators": {"type": "string", "pattern": "^[A-Za-z0-9-]+:[1-9][0-9]*$"},
            "cpus": _AT_LEAST,
            "memory": _AT_LEAST,
            "image_id": {"type": "string", "pattern": "^docker:"},
        },
    },
    envs=_TEXTS,
    secrets={"type": "object", "additionalProperties": {"type": "null"}},  # a value has no place in a file
    volumes=_TEXTS,
    file_mounts=_ANY,
    setup=_TEXT,
    run=_TEXT,
    config=_ANY,
)


def check_kuberay(text: str, crd: Path | None = None) -> None:
    """Raise jsonschema's or kubernetes-validate's ValidationError where a cluster would refuse the file.

    Args:
        text: all documents.
        crd: KubeRay's own definition of RayJob, ray.io_rayjobs.yaml, to be asked too.
    """
    for document in yaml.safe_load_all(text):
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        jsonschema.validate(document, _RAY_JOB)
        if _QUEUE_LABEL in document["metadata"]["labels"]:
            jsonschema.validate(document, _QUEUED)
        if crd is not None:
            jsonschema.validate(document, _closed(_published(crd)))
        for template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            _check_volumes(template["spec"])


def pod_templates(ray_job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Templates of the submitter, the head and every group of workers."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    yield ray_job["spec"]["submitterPodTemplate"]
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])


def check_skypilot(text: str) -> None:
    """Raise jsonschema's ValidationError where SkyPilot would refuse the task."""
    jsonschema.validate(yaml.safe_load(text), _SKY_TASK)


def check_launcher(text: str) -> None:
    """Raise where `ray up` would refuse the file: Ray's own schema and Ray's own rules."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load(text)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(cluster))  # with Ray's defaults for the provider


def check_shell(script: str) -> None:
    """Raise CalledProcessError, with the findings as its output, where shellcheck has any."""
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "--shell=bash", "-"], input=script, text=True, capture_output=True, check=True)


def _check_volumes(spec: dict[str, Any]) -> None:
    """A mount must name a volume of its pod, which no schema knows."""
    have = {volume["name"] for volume in spec.get("volumes", ())}
    wanted = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", ())}
    if wanted != have:
        raise jsonschema.ValidationError(f"mounts {sorted(wanted)} of volumes {sorted(have)}")


def _published(crd: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(crd.read_text(), Loader=loader)["spec"]["versions"]  # noqa: S506
    schema: dict[str, Any] = next(one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return schema


def _closed(schema: Any) -> Any:
    """The same schema with unknown keys refused wherever it lists keys, and texts or numbers where it says either."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and "type" in schema and not is_open:
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("pattern", None)
    return closed
