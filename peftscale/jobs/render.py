"""Render: a run file turned into the text that a cluster takes. Nothing is submitted and no network is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftscale.errors import ConfigError
from peftscale.jobs import job as jobs
from peftscale.jobs import kuberay, launcher, shell, skypilot

Target = Literal["kuberay", "slurm", "skypilot", "ray-aws", "ray-gcp", "torchrun"]
_SUFFIXES = {"slurm": ".sbatch", "torchrun": ".torchrun.sh"}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A manifest or script, and what its file is called."""

    file_name: str
    text: str


def render(run_file: Path, overrides: Sequence[str], target: Target) -> Rendered:
    """The manifest or script of a run.

    Raises:
        ConfigError: the run file is wrong, or lacks or contradicts what the target needs.
    """
    job = jobs.of(run_file, overrides, target)
    match target:
        case "kuberay":
            text = kuberay.render(job)
        case "slurm":
            text = shell.render_slurm(job)
        case "skypilot":
            text = skypilot.render(job)
        case "ray-aws" | "ray-gcp":
            text = launcher.render(job)
        case "torchrun":
            text = shell.render_torchrun(job)
    return Rendered(job.name + _SUFFIXES.get(target, f".{target}.yaml"), text)


def save(rendered: Rendered, directory: Path) -> Path:
    """Write a file, in place of an older one of the same run and target.

    Raises:
        ConfigError: the directory cannot be written.
    """
    path = directory / rendered.file_name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(rendered.text)
    except OSError as error:
        raise ConfigError(f"--out {directory}: cannot be written: {error.strerror}. Choose another one.") from error
    return path
