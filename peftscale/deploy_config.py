"""The section `cluster.deploy` of a run file as types: what only a cluster needs to be told, to render a job for it.

Counts are not here: they follow from `cluster.workers` and what a worker takes. Rendering is `jobs`.
"""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from peftscale.train_config import Frozen

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_SECRET = re.compile(r"[A-Z_][A-Z0-9_]*=[a-z0-9][a-z0-9.-]*/[A-Za-z0-9._-]+")


class SharedDir(Frozen):
    """The directory that every node mounts. What the run file names must lie in it."""

    path: Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$")]
    """Where the nodes have it."""
    local: Path | None = None
    """The same directory as this machine has it, taken relative to the run file. Left out: as the nodes do."""
    claim: Word | None = None
    """A PersistentVolumeClaim (kuberay) or a volume of SkyPilot, that several nodes may write."""
    nfs: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:(/[A-Za-z0-9._-]*)+$")] | None = None
    """SERVER:/DIRECTORY of an NFS export (EFS, Filestore). Taken where there is no claim."""

    @model_validator(mode="after")
    def is_somewhere(self) -> Self:
        if self.claim is None and self.nfs is None:
            raise ValueError("claim, nfs: at least one must be given; nodes mount it at `path`")
        return self

    @property
    def cache_env(self) -> dict[str, str]:
        """Downloads and packs go here, so that a node that is new finds them."""
        cache = f"{self.path}/.cache"
        return {"PEFTSCALE_CACHE": f"{cache}/peftscale", "HF_HOME": f"{cache}/huggingface"}


class AwsConfig(Frozen):
    """Machines for the Ray cluster launcher on AWS."""

    region: Word
    worker_machine: Word
    """Instance type of a node, for example p5.48xlarge. Its GPUs and cores must hold `workers_per_node`."""
    head_machine: Word
    """Instance type of the head, which runs the driver alone."""
    image_id: Word | None = None
    """AMI with Docker and NVIDIA's driver. Left out: the one that Ray has for the region."""


class GcpConfig(Frozen):
    """Machines for the Ray cluster launcher on Google Cloud."""

    project: Word
    region: Word
    zone: Word
    worker_machine: Word
    """Machine type of a node that brings its GPUs, for example a3-highgpu-8g."""
    head_machine: Word
    """Machine type of the head, which runs the driver alone."""
    source_image: Annotated[str, Field(pattern=r"^[A-Za-z0-9./_-]+$")]
    """Boot image with Docker and NVIDIA's driver: projects/PROJECT/global/images/family/FAMILY."""
    disk_gb: PositiveInt = 200


class DeployConfig(Frozen):
    """What a cluster needs to be told. `peftscale render` says which key a target misses."""

    workers_per_node: PositiveInt
    """Nodes are cluster.workers divided by this, without a rest."""
    memory_gb_per_worker: PositiveInt
    """Asked for, of a node's main memory. Unit: 2^30 bytes."""
    image: str | None = None
    """Container image with its tag or digest; cluster/docker/Dockerfile makes one. Not used by slurm and torchrun."""
    shared: SharedDir | None = None
    """Not used by slurm and torchrun, whose nodes see the file system of this machine."""
    queue: Word | None = None
    """Kueue's LocalQueue, which then starts all pods or none; Slurm's partition."""
    gpu: Word | None = None
    """Kind of GPU as Slurm (gres type) or SkyPilot (accelerator) calls it."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that Kubernetes may choose."""
    hours: PositiveFloat | None = None
    """The job is ended then, and goes on where it was when it is submitted again; torchrun's with `bash FILE --finish`.
    Machines of a cloud stay until they are taken down. Not used by `peftscale submit`, whose job `--stop` ends."""
    secrets: tuple[str, ...] = ()
    """VARIABLE=SECRET/KEY: environment variable, and the Kubernetes secret that holds its value. slurm, skypilot,
    torchrun and `peftscale submit` take the value from the environment they are submitted from. No value is logged."""
    aws: AwsConfig | None = None
    """For ray-aws alone."""
    gcp: GcpConfig | None = None
    """For ray-gcp alone."""

    @field_validator("image")
    @classmethod
    def image_is_pinned(cls, image: str | None) -> str | None:
        if image is None:
            return None
        name, _, tag = image.rpartition("/")[2].partition(":")
        if not re.fullmatch(r"[A-Za-z0-9._/:@-]+", image) or not name:
            raise ValueError(f"must be REGISTRY/NAME:TAG or NAME@sha256:DIGEST, got {image!r}")
        if "@sha256:" not in image and tag in ("", "latest"):
            raise ValueError(f"must say which version: a tag other than latest, or a digest; got {image!r}")
        return image

    @field_validator("secrets")
    @classmethod
    def secrets_are_references(cls, secrets: tuple[str, ...]) -> tuple[str, ...]:
        # The value is not repeated: it may be the secret itself.
        if not all(_SECRET.fullmatch(entry) for entry in secrets):
            raise ValueError("each must be VARIABLE=SECRET/KEY, for example HF_TOKEN=hub/token, and never a value")
        return secrets

    @property
    def secret_references(self) -> dict[str, tuple[str, str]]:
        """Environment variable -> name and key of its Kubernetes secret."""
        pairs = (entry.partition("=") for entry in self.secrets)
        return {variable: (place.partition("/")[0], place.partition("/")[2]) for variable, _, place in pairs}
