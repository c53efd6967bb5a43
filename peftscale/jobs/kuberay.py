"""Kubernetes: a RayJob of KubeRay, with the run file in a ConfigMap and a policy that shuts its pods off.

Source: KubeRay's API reference for ray.io/v1 (1.5.1 or newer, for `authOptions`); Kueue's page on RayJobs.
"""

from typing import Any

from peftscale.errors import ConfigError
from peftscale.jobs.job import OBJECT_STORE_BYTES, RAY_VERSION, Job, dumped

_MAX_NAME = 47  # KubeRay's limit, because names of pods grow out of it
_RUN_FILE_DIR = "/etc/peftscale"
_SHM_GB = 8  # NCCL and Ray's objects; counts as memory of the pod
_HEAD = {"cpu": "2", "memory": "8Gi"}  # runs the driver, and no worker
_SUBMITTER = {"cpu": "1", "memory": "1Gi"}
_DASHBOARD_PORT, _METRICS_PORT = 8265, 8080
_USER_ID = 1000  # cluster/docker/Dockerfile


def render(job: Job) -> str:
    """A NetworkPolicy, a ConfigMap and a RayJob, as one YAML file.

    Raises:
        ConfigError: the name is too long for Kubernetes, or a key is missing.
    """
    name = job.dns_name
    if len(name) > _MAX_NAME:
        raise ConfigError(f"name: KubeRay takes up to {_MAX_NAME} characters, got {len(name)} in {name!r}.")
    comment = f"{job.header}\n#   kubectl apply -f FILE; kubectl get rayjob {name}\n"
    return comment + dumped(_network_policy(name), _config_map(name, job), _ray_job(name, job))


def _labels(name: str) -> dict[str, str]:
    """Of every pod of the run. KubeRay has labels of its own beside them."""
    return {"peftscale/run": name}


def _config_map(name: str, job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": _labels(name)},
        "data": {"run.yaml": job.run_file},
    }


def _network_policy(name: str) -> dict[str, Any]:
    """Pods of the run talk to each other. From outside, KubeRay's operator reaches the dashboard and Prometheus the
    metrics; nobody else, and no other port."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "podSelector": {"matchLabels": _labels(name)},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": _labels(name)}}]},
                # By what it is: its name, "kuberay", is that of every pod of every Ray cluster too.
                _let_in("component", "kuberay-operator", _DASHBOARD_PORT),
                _let_in("name", "prometheus", _METRICS_PORT),
            ],
        },
    }


def _let_in(key: str, value: str, port: int) -> dict[str, Any]:
    """Pods with this label, of any namespace, to one port."""
    labels = {f"app.kubernetes.io/{key}": value}
    return {
        "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": labels}}],
        "ports": [{"protocol": "TCP", "port": port}],
    }


def _ray_job(name: str, job: Job) -> dict[str, Any]:
    assert job.deploy is not None
    queue = job.deploy.queue
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "labels": {**_labels(name), **({"kueue.x-k8s.io/queue-name": queue} if queue else {})},
        },
        "spec": {
            **({"suspend": True} if queue else {}),  # Kueue lets it go when there is room for all pods
            "entrypoint": f"peftscale train {_RUN_FILE_DIR}/run.yaml --finish",
            "backoffLimit": job.retries,
            **({"activeDeadlineSeconds": job.limit_s} if job.limit_s else {}),
            "shutdownAfterJobFinishes": True,
            "submitterPodTemplate": _pod(name, job, "submitter", _SUBMITTER, is_ray=False),
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "object-store-memory": str(OBJECT_STORE_BYTES)},
                    "template": _pod(name, job, "head", _HEAD),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": job.num_nodes,
                        "minReplicas": job.least_nodes,
                        "maxReplicas": job.num_nodes,
                        "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)},
                        "template": _pod(name, job, "worker", _worker_resources(job)),
                    }
                ],
            },
        },
    }


def _worker_resources(job: Job) -> dict[str, str]:
    gpus = {"nvidia.com/gpu": str(job.gpus)} if job.gpus else {}
    return {"cpu": str(job.cpus), "memory": f"{job.memory_gb}Gi", **gpus}


def _pod(name: str, job: Job, role: str, resources: dict[str, str], *, is_ray: bool = True) -> dict[str, Any]:
    """A pod template. The submitter's holds nothing but the command that KubeRay puts in."""
    assert job.deploy is not None
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": job.image,
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER_ID, "fsGroup": _USER_ID},
        "containers": [container],
    }
    if not is_ray:
        spec["restartPolicy"] = "Never"
        return {"metadata": {"labels": _labels(name)}, "spec": spec}
    by_reference = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
        for variable, (secret, key) in job.secrets.items()
    ]
    plain = job.shared.cache_env | job.secret_env
    container["env"] = [{"name": key, "value": value} for key, value in plain.items()] + by_reference
    volumes = {
        "shared": (job.shared.path, _shared_volume(job)),
        "shm": ("/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": f"{_SHM_GB}Gi"}}),
    }
    if role == "head":  # the driver reads it, and hands it to the workers
        volumes["run-file"] = (_RUN_FILE_DIR, {"configMap": {"name": name}})
    elif job.deploy.node_selector:
        spec["nodeSelector"] = dict(job.deploy.node_selector)
    if "nvidia.com/gpu" in resources:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    container["volumeMounts"] = [{"name": volume, "mountPath": path} for volume, (path, _) in volumes.items()]
    spec["volumes"] = [{"name": volume, **source} for volume, (_, source) in volumes.items()]
    return {"metadata": {"labels": _labels(name)}, "spec": spec}


def _shared_volume(job: Job) -> dict[str, Any]:
    if job.shared.claim is not None:
        return {"persistentVolumeClaim": {"claimName": job.shared.claim}}
    server, _, directory = (job.shared.nfs or "").partition(":")
    return {"nfs": {"server": server, "path": directory}}
