"""Shell scripts: a batch script for Slurm, a script for torchrun, and the pieces that other targets use too.

Source: sbatch(1); `ray symmetric-run --help`; torchrun's documentation.
"""

import math
import shlex
from collections.abc import Iterable, Mapping
from string import Template

from peftscale.jobs.job import OBJECT_STORE_BYTES, Job

_END = "END_OF_RUN_FILE"

_SLURM = Template("""\
#!/bin/bash
$header
#   sbatch FILE
$directives
set -euo pipefail
$secrets
run_file=$run_file
mkdir -p "$${run_file%/*}"
$document

# One token for each job, which nobody else can read, and which goes with it.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$${run_file%.yaml}-$$SLURM_JOB_ID.token"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$$RAY_AUTH_TOKEN_PATH"' EXIT

head=$$(scontrol show hostnames "$$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK="$$SLURM_CPUS_PER_TASK"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600
srun ray symmetric-run --address "$$head:6379" --min-nodes $num_nodes \\
  --num-cpus=$cpus --num-gpus=$gpus --object-store-memory=$object_store_bytes \\
  --include-dashboard=false --disable-usage-stats -- \\
  env RAY_ADDRESS="$$head:6379" peftscale train "$$run_file" --finish

# symmetric-run ends well where Ray cannot be started, too.
test -s $summary
""")

_TORCHRUN = Template("""\
#!/bin/bash
$header
#   bash FILE, with options of `peftscale train` behind it$on_every_node
set -euo pipefail
$secrets
run_file=$$(mktemp -d)/$name.yaml
trap 'rm -rf "$${run_file%/*}"' EXIT
$document

${within_hours}torchrun $rendezvous --nproc-per-node $workers_per_node --no-python peftscale train "$$run_file" "$$@"
""")


def render_slurm(job: Job) -> str:
    """A batch script. Ray needs its nodes for itself."""
    assert job.deploy is not None
    options = {
        "job-name": job.name,
        "output": f"{job.name}-%j.out",
        "nodes": job.num_nodes,
        "ntasks-per-node": 1,
        "exclusive": None,
        "cpus-per-task": job.cpus,
        "mem": f"{job.memory_gb}G",
        **({"gpus-per-node": f"{job.deploy.gpu}:{job.gpus}" if job.deploy.gpu else job.gpus} if job.gpus else {}),
        **({"partition": job.deploy.queue} if job.deploy.queue else {}),
        **({"time": math.ceil(job.limit_s / 60)} if job.limit_s else {}),
        "requeue": None,
        "open-mode": "append",
    }
    return _SLURM.substitute(
        header=job.header,
        directives="\n".join(
            f"#SBATCH --{option}" + ("" if value is None else f"={value}") for option, value in options.items()
        ),
        secrets=_required(job.secrets) + _exported(job.secret_env),
        run_file=shlex.quote(f"{job.storage}/.rendered/{job.name}.yaml"),
        document="\n".join(here_document('"$run_file"', job.run_file)),
        num_nodes=job.num_nodes,
        cpus=job.cpus,
        gpus=job.gpus,
        object_store_bytes=OBJECT_STORE_BYTES,
        summary=shlex.quote(job.summary_path),
    )


def render_torchrun(job: Job) -> str:
    """A script for one node, or to be started on each of several."""
    alone = job.num_nodes == 1
    return _TORCHRUN.substitute(
        header=job.header,
        on_every_node="" if alone else f"; HEAD=HOST:PORT bash FILE on each of {job.num_nodes} nodes",
        secrets=_required([*job.secrets, *([] if alone else ["HEAD"])]) + _exported(job.secret_env),
        name=job.name,
        document="\n".join(here_document('"$run_file"', job.run_file)),
        rendezvous="--standalone"
        if alone
        else f'--nnodes {job.num_nodes} --rdzv-id {job.name} --rdzv-backend c10d --rdzv-endpoint "$HEAD"',
        workers_per_node=job.workers_per_node,
        within_hours=job.within_hours,
    )


def here_document(file: str, text: str) -> list[str]:
    """Lines that write `text`, as it is, to a file that is named as the shell takes it."""
    return [f"cat >{file} <<'{_END}'", text.rstrip("\n"), _END]


def nfs_mount(export: str, path: str) -> list[str]:
    """Commands that mount an NFS export on a machine of a cloud, also when they are run again."""
    return [
        "command -v mount.nfs4 >/dev/null || (sudo apt-get update && sudo apt-get install -y nfs-common)",
        f"mountpoint -q {path} || (sudo mkdir -p {path} && sudo mount -t nfs4 {export} {path})",
    ]


def _exported(variables: Mapping[str, str]) -> str:
    """Lines that set variables for what is started."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def _required(variables: Iterable[str]) -> str:
    """Lines that end a script where a variable is not set."""
    return "".join(f': "${{{variable}:?set it before}}"\n' for variable in variables)
