"""A job: what all targets have in common, worked out once from a run file: counts, places, and the file itself.

What a target makes of it is `kuberay`, `skypilot`, `launcher` and `shell`.
"""

import math
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml

from peftscale import __version__, configio, redaction
from peftscale.config import is_url
from peftscale.deploy_config import DeployConfig, SharedDir
from peftscale.errors import ConfigError

RAY_VERSION = version("ray")
OBJECT_STORE_BYTES = 200_000_000  # nothing of ours goes through it; Ray would take 30% of the memory
TORCHRUN = "torchrun"
ON_THIS_FILE_SYSTEM = ("slurm", TORCHRUN)
"""Targets whose nodes see the paths of this machine."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run on nodes that are all alike."""

    name: str
    target: str
    deploy: DeployConfig | None
    num_nodes: int
    least_nodes: int
    """Of an elastic run, those that it starts with; all of another one."""
    workers_per_node: int
    cpus: int
    """Of a node, for its workers. `gpus` and `memory_gb` likewise."""
    gpus: int
    memory_gb: int | None
    retries: int
    run_file: str
    """The run file as YAML that stands alone, with the paths that the nodes have."""
    storage: str
    """cluster.storage as the nodes have it."""
    fingerprint: str

    @property
    def header(self) -> str:
        """Where the text comes from: a line of its own, as a comment in YAML and shell."""
        return (
            f"# {self.name} for {self.target}, rendered by peftscale {__version__}; settings {self.fingerprint[:12]}."
        )

    @property
    def dns_name(self) -> str:
        """The name as KubeRay and Google Cloud take it: a letter first, then letters, digits and hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.lettered_name.lower()).strip("-")

    @property
    def lettered_name(self) -> str:
        """The name with a letter in front, as SkyPilot takes it."""
        return self.name if self.name[0].isalpha() else f"run-{self.name}"

    @property
    def limit_s(self) -> int | None:
        """cluster.deploy.hours in whole seconds, after which the job is ended; None where it has no limit."""
        return math.ceil(self.deploy.hours * 3600) if self.deploy and self.deploy.hours else None

    @property
    def within_hours(self) -> str:
        """What stands in front of a command of the shell that is to be ended after `limit_s`. Ctrl-C first, on which a
        run lets its workers go."""
        return f"timeout --foreground --signal=INT --kill-after=60 {self.limit_s} " if self.limit_s else ""

    @property
    def summary_path(self) -> str:
        """Written when the run has ended well."""
        return posixpath.join(self.storage, self.name, "summary.json")

    @property
    def secrets(self) -> dict[str, tuple[str, str]]:
        """Environment variable -> name and key of its Kubernetes secret."""
        return {} if self.deploy is None else self.deploy.secret_references

    @property
    def secret_env(self) -> dict[str, str]:
        """What tells the job which variables are secrets, so that their values are never logged."""
        return {redaction.NAMES: ",".join(self.secrets)} if self.secrets else {}

    @property
    def image(self) -> str:
        """The container image."""
        return self.deploy.image if self.deploy and self.deploy.image else self.misses("image")

    @property
    def shared(self) -> SharedDir:
        """The directory that all nodes mount."""
        return self.deploy.shared if self.deploy and self.deploy.shared else self.misses("shared")

    def misses(self, key: str) -> NoReturn:
        """Say that the target needs a key of `cluster.deploy`."""
        _refuse_missing(key, self.target)


def of(path: Path, overrides: Sequence[str], target: str) -> Job:
    """The job of a run file.

    Raises:
        ConfigError: the run file is wrong, or lacks or contradicts what the target needs.
    """
    cfg = configio.load(path, overrides)
    cluster, deploy = cfg.cluster, cfg.cluster.deploy
    most = cluster.max_workers
    if most == 0:
        raise ConfigError(f"cluster.workers: --target {target} starts workers, got 0; say how many.")
    if deploy is None and target != TORCHRUN:
        _refuse_missing("workers_per_node", target)
    each = deploy.workers_per_node if deploy else most  # torchrun: all on this machine
    each = min(each, most)
    if most % each:
        raise ConfigError(
            f"cluster.workers={most} is no multiple of cluster.deploy.workers_per_node={each}, so that "
            f"GPUs of the last node would be paid for and idle. Take {most // each * each} or "
            f"{(most // each + 1) * each} workers, or other nodes."
        )
    if is_url(cluster.storage) and target in ON_THIS_FILE_SYSTEM:
        raise ConfigError(
            f"cluster.storage={cluster.storage}: --target {target} keeps the run file there, where every node "
            f"reads it; give a directory that all nodes see."
        )
    place = here if target in ON_THIS_FILE_SYSTEM else Place(deploy.shared if deploy else None, target)
    raw = standing_alone(path, overrides, place)
    if target == TORCHRUN:
        raw["cluster"]["workers"] = 0  # its ranks are torchrun's
    return Job(
        name=cfg.name,
        target=target,
        deploy=deploy,
        num_nodes=most // each,
        least_nodes=math.ceil(cluster.min_workers / each),
        workers_per_node=each,
        cpus=math.ceil(each * cluster.cpus_per_worker),
        gpus=math.ceil(each * cluster.gpus_per_worker),
        memory_gb=each * deploy.memory_gb_per_worker if deploy else None,
        retries=cluster.retries,
        run_file=as_yaml(raw),
        storage=raw["cluster"]["storage"],
        fingerprint=configio.fingerprint(cfg),
    )


def standing_alone(path: Path, overrides: Sequence[str], place: Callable[[str, str], str]) -> dict[str, Any]:
    """The run file, overrides in it, with the paths that the nodes have. `cluster.deploy` has been heard by then."""
    raw = configio.placed(path, overrides, place)
    raw["cluster"].pop("deploy", None)
    return raw


def as_yaml(raw: dict[str, Any]) -> str:
    """A run file's text, which reads back to the same."""
    return dumped(_literal(raw))


def dumped(*documents: Any) -> str:
    """YAML as this project writes it: keys in their order, texts of several lines as blocks."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


_LIKE_A_NUMBER = re.compile(r"[-+.]?[0-9][0-9_.]*([eE][-+]?[0-9]+)?")


def _literal(node: Any) -> Any:
    """The same data, in which a dollar sign begins no interpolation."""
    if isinstance(node, dict):
        return {key: _literal(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_literal(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


class _Dumper(yaml.SafeDumper):
    """Quotes what other readers of YAML take for a number: 1e5 is text to PyYAML and a number to OmegaConf."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if _LIKE_A_NUMBER.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def here(key: str, path: str) -> str:
    """Nodes that see what this machine sees."""
    return path


@dataclass(frozen=True, slots=True)
class Place:
    """Where the nodes find what this machine has."""

    shared: SharedDir | None
    target: str

    def __call__(self, key: str, path: str) -> str:
        if self.shared is None:
            _refuse_missing("shared", self.target)
        local = Path(self.shared.local or self.shared.path)
        if not Path(path).is_relative_to(local):
            raise ConfigError(
                f"{key}: the nodes do not see {path}. Put it under {local}, which they mount as {self.shared.path} "
                f"(cluster.deploy.shared)."
            )
        return str(Path(self.shared.path) / Path(path).relative_to(local))


def _refuse_missing(key: str, target: str) -> NoReturn:
    what = " ".join((DeployConfig.model_fields[key].description or "").split())
    raise ConfigError(f"cluster.deploy.{key}: missing; --target {target} needs it. {what}")
