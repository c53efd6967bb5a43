"""The Ray cluster launcher: a file for `ray up` on AWS or Google Cloud, and the command that runs the job there.

Source: Ray's reference of cluster YAML files; `ray/autoscaler/ray-schema.json`.
"""

import json
import shlex
from typing import Any

import yaml

from peftscale.errors import ConfigError
from peftscale.jobs import shell
from peftscale.jobs.job import OBJECT_STORE_BYTES, Job, dumped

_PORT = 6379
_RUN = """\
set -euo pipefail
export RAY_ADDRESS=127.0.0.1:{port}
count='import ray; ray.init(logging_level="ERROR"); print(sum(node["Alive"] for node in ray.nodes()))'
until [ "$(python -c "$count")" -gt {num_nodes} ]; do sleep 10; done  # the head is one more
{within_hours}peftscale train ~/run.yaml --finish
"""


def render(job: Job) -> str:
    """A cluster of one head, which runs the driver, and nodes that are there from the start.

    Raises:
        ConfigError: a key is missing, or the run file names secrets.
    """
    if job.secrets:
        raise ConfigError(
            f"cluster.deploy.secrets: the cluster launcher has no place for {', '.join(job.secrets)} but its own file. "
            f"Render with cluster.deploy.secrets=[] and log in once on the head; HF_HOME is on the shared directory."
        )
    run = _RUN.format(port=_PORT, num_nodes=job.least_nodes, within_hours=job.within_hours)
    start = f"ulimit -n 65536; ray start --object-store-memory={OBJECT_STORE_BYTES} --disable-usage-stats"
    provider, machines = _aws(job) if job.target == "ray-aws" else _gcp(job)
    client = "boto3" if job.target == "ray-aws" else "google-api-python-client"
    cluster: dict[str, Any] = {
        "cluster_name": job.dns_name,
        "max_workers": job.num_nodes,
        "idle_timeout_minutes": 10,
        "provider": provider,
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": job.image,
            "container_name": "peftscale",
            "run_options": [
                "--ulimit nofile=65536:65536",
                f"-v {job.shared.path}:{job.shared.path}",
                "-e RAY_AUTH_MODE=token",
                *(f"-e {key}={value}" for key, value in job.shared.cache_env.items()),
            ],
        },
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": machines["head"]},
            "workers": {
                "min_workers": job.least_nodes,
                "max_workers": job.num_nodes,
                "resources": {"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})},
                "node_config": machines["workers"],
            },
        },
        "head_node_type": "head",
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "initialization_commands": shell.nfs_mount(job.shared.nfs or job.misses("shared"), job.shared.path),
        "setup_commands": ["chmod 600 ~/.ray/auth_token"],
        "head_setup_commands": [
            f"pip install --quiet {client}",  # with which the head starts the nodes
            f"printf '%s' {shlex.quote(_one_line(job.run_file))} >~/run.yaml",
            f"printf '%s' {shlex.quote(run)} >~/run.sh",
        ],
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port={_PORT} --dashboard-host=127.0.0.1 "
            f"--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:{_PORT}"],
    }
    comment = (
        f"{job.header}\n#   ray get-auth-token --generate; chmod 600 ~/.ray/auth_token\n#   ray up -y FILE\n"
        f"#   ray exec FILE 'bash ~/run.sh'\n#   ray down -y FILE\n"
    )
    return comment + dumped(cluster)


def _one_line(run_file: str) -> str:
    """JSON, which is YAML too. Without a tilde, which Ray would replace by the home directory in any text."""
    return json.dumps(yaml.safe_load(run_file)).replace("~", "\\u007e")


def _aws(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Provider, and node_config of head and workers."""
    aws = (job.deploy.aws if job.deploy else None) or job.misses("aws")
    image = {"ImageId": aws.image_id} if aws.image_id else {}
    machines = {"head": aws.head_machine, "workers": aws.worker_machine}
    provider = {"type": "aws", "region": aws.region, "cache_stopped_nodes": False}
    return provider, {role: {"InstanceType": machine, **image} for role, machine in machines.items()}


def _gcp(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Provider, and node_config of head and workers."""
    gcp = (job.deploy.gcp if job.deploy else None) or job.misses("gcp")
    disk = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {"diskSizeGb": gcp.disk_gb, "sourceImage": gcp.source_image},
    }
    provider = {"type": "gcp", "region": gcp.region, "availability_zone": gcp.zone, "project_id": gcp.project}
    machines = {"head": gcp.head_machine, "workers": gcp.worker_machine}
    made = {role: {"machineType": machine, "disks": [disk]} for role, machine in machines.items()}
    if job.gpus:
        made["workers"]["scheduling"] = [{"onHostMaintenance": "TERMINATE"}]  # GPUs cannot be moved while they run
    return provider, made
