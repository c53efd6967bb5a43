"""SkyPilot: a task for any cloud or Kubernetes, with a Ray cluster of ours beside the one that SkyPilot has.

Source: SkyPilot's page on the task YAML (0.14) and its template for Ray clusters.
"""

from typing import Any

from peftscale.jobs import shell
from peftscale.jobs.job import Job, dumped

_START_RAY = "~/sky_templates/ray/start_cluster"  # SkyPilot's own Ray has other ports; a plain `ray stop` would end it


def render(job: Job) -> str:
    """One task.

    Raises:
        ConfigError: a key is missing.
    """
    assert job.deploy is not None
    secrets = ["RAY_AUTH_TOKEN", *job.secrets]
    accelerators = {"accelerators": f"{job.deploy.gpu or job.misses('gpu')}:{job.gpus}"} if job.gpus else {}
    claim, nfs = job.shared.claim, job.shared.nfs
    task: dict[str, Any] = {
        "name": job.lettered_name,
        "num_nodes": job.num_nodes,
        "resources": {
            "image_id": f"docker:{job.image}",
            **accelerators,
            "cpus": f"{job.cpus}+",
            "memory": f"{job.memory_gb}+",
        },
        "envs": job.shared.cache_env | job.secret_env,
        "secrets": dict.fromkeys(secrets),  # null: SkyPilot asks for them
        **({"volumes": {job.shared.path: claim}} if claim else {}),
        **(
            {"setup": "\n".join(["set -e", *shell.nfs_mount(nfs, job.shared.path)]) + "\n"} if nfs and not claim else {}
        ),
        "run": _script(job),
    }
    given = " ".join(f"--secret {secret}" for secret in secrets)
    start = f"export RAY_AUTH_TOKEN=$(openssl rand -hex 32); sky launch -c {job.lettered_name} {given} FILE"
    return f"{job.header}\n#   {start}\n" + dumped(task)


def _script(job: Job) -> str:
    lines = [
        "set -euo pipefail",
        "export RAY_AUTH_MODE=token",  # here, and not among `envs`: SkyPilot's own Ray has no token
        _START_RAY,
        'if [ "$SKYPILOT_NODE_RANK" -ne 0 ]; then exit; fi',
        *shell.here_document('"$HOME/run.yaml"', job.run_file),
        f'RAY_ADDRESS=127.0.0.1:6379 {job.within_hours}peftscale train "$HOME/run.yaml" --finish',
    ]
    return "\n".join(lines) + "\n"
