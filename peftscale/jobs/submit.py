"""Submit: a run as a job of Ray on a cluster that is up, with its state, its log and its end.

The job brings the whole run file along, and goes on where a run of its name was: what it does there is `driver`.
The files and figures of a run are `status` and `logs`; here it is about the job alone.

Source: Ray's Jobs API, `ray.job_submission.JobSubmissionClient` and `ray/dashboard/modules/job`.
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peftscale import __version__, auth, configio, records, redaction
from peftscale.errors import ClusterError, ConfigError
from peftscale.jobs import job as jobs

PASSED = ("HF_HOME", "HF_HUB_OFFLINE", "NCCL_DEBUG", "PEFTSCALE_CACHE")
"""What the job is told of this environment, where it is set. Everything else is the nodes' own business."""
_RUN_FILE, _SECRETS = "run.yaml", "secrets.env"
_STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""To end a job is Ctrl-C on its run, which then lets its workers go; after these seconds Ray kills it."""
_STOP_S = 90.0
_GIVE_IT = "Give it in RAY_AUTH_TOKEN, in the file of RAY_AUTH_TOKEN_PATH or in ~/.ray/auth_token."
_POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class Package:
    """A run as it is handed to a cluster."""

    name: str
    digest: str
    """`configio.fingerprint`: runs with the same one have the same result."""
    files: dict[str, str] = dataclasses.field(repr=False)
    """Name -> text. On whatever disk they come to lie, their owner alone can read them."""
    variables: dict[str, str]
    """Of the environment, for the job and its workers. Ray writes them into its logs, so no secret is among them."""
    metadata: dict[str, str]

    @property
    def entrypoint(self) -> str:
        """What the job runs, where its files are."""
        secrets = f"set -a; . ./{_SECRETS}; set +a; " if _SECRETS in self.files else ""
        return f"{secrets}exec peftscale train {_RUN_FILE} --finish"


@dataclasses.dataclass(frozen=True)
class Submitted:
    """How a job stands."""

    id: str
    """The run's name; ~2, ~3 behind it where the run was submitted again."""
    state: str
    """pending, running, succeeded, failed or stopped."""
    message: str | None
    exit_code: int | None
    started: str | None
    """UTC, ISO 8601, like `ended`."""
    ended: str | None
    metadata: dict[str, str]

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.state not in ("pending", "running")


def package(run_file: Path, overrides: Sequence[str]) -> Package:
    """A run file with everything that the job needs to be given.

    Raises:
        ConfigError: the run file is wrong, starts no workers, names paths that the nodes do not see, or secrets that
            are not set here.
    """
    cfg = configio.load(run_file, overrides)
    if cfg.cluster.max_workers == 0:
        raise ConfigError("cluster.workers: a job starts workers on its cluster, got 0; say how many.")
    deploy = cfg.cluster.deploy
    shared = deploy.shared if deploy else None
    place = jobs.Place(shared, "submit") if shared else jobs.here
    names = list(deploy.secret_references) if deploy else []
    unset = [name for name in names if name not in os.environ]
    if unset:
        raise ConfigError(
            f"cluster.deploy.secrets: {', '.join(unset)} must be set in this environment, and is not. Set it, or take "
            f"it out of cluster.deploy.secrets."
        )
    files = {_RUN_FILE: jobs.as_yaml(jobs.standing_alone(run_file, overrides, place))}
    if names:
        files[_SECRETS] = "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in names)
    variables = {name: os.environ[name] for name in PASSED if name in os.environ and name not in names}
    digest = configio.fingerprint(cfg)
    revision = records.revision(run_file)
    return Package(
        name=cfg.name,
        digest=digest,
        files=files,
        variables={
            **_STOPPING,
            **variables,
            **(shared.cache_env if shared else {}),
            **({redaction.NAMES: ",".join(names)} if names else {}),
        },
        metadata={
            "config_digest": digest,
            "peftscale_version": __version__,
            **({"git_revision": revision} if revision else {}),
        },
    )


class Cluster:
    """The job server of a Ray cluster."""

    def __init__(self, address: str) -> None:
        """Find the token and try it.

        Raises:
            ConfigError: the address is none, or not loopback and there is no token.
            ClusterError: nobody answers there, not as a Ray, or does not let us in.
        """
        self.address = address.rstrip("/")
        self._is_here = _is_loopback(_parts(address)[1])
        self._token = auth.find()
        if self._token is None and not self._is_here:
            disabled = " RAY_AUTH_MODE=disabled must go, too." if auth.is_disabled() else ""
            raise ConfigError(
                f"--address {address}: is not on this machine, and there is no token for it; a Ray without one runs "
                f"anybody's code. Start it with RAY_AUTH_MODE=token. {_GIVE_IT}{disabled}"
            )
        with self._asked():
            from ray.job_submission import JobSubmissionClient

            for handler in logging.getLogger("ray").handlers:
                handler.setLevel(logging.WARNING)
            # An empty one, too: without it Ray's client would look for a token itself, where we found none to send.
            headers = {"Authorization": f"Bearer {self._token.value}" if self._token else ""}
            self._client = JobSubmissionClient(self.address, headers=headers)

    def newest(self, name: str) -> Submitted | None:
        """The job of a run that was submitted last."""
        mine = re.compile(re.escape(name) + r"(~\d+)?")
        with self._asked():
            found = [job for job in self._client.list_jobs() if mine.fullmatch(job.submission_id or "")]
        return max((_submitted(job) for job in found), key=lambda job: _number(job.id), default=None)

    def submit(self, run: Package) -> Submitted:
        """Start a job. One of an ended job's name gets a number behind it, since Ray takes an id once.

        Raises:
            ClusterError: a job of this run is not at its end, or somebody was faster.
        """
        last = self.newest(run.name)
        if last is not None and not last.has_ended:
            raise ClusterError(
                f"{self.address}: the job {last.id} of this run is {last.state} and must end first. --follow shows "
                f"its log, --stop ends it; another name=... is another run."
            )
        new = run.name if last is None else f"{run.name}~{_number(last.id) + 1}"
        with tempfile.TemporaryDirectory() as directory, self._asked():
            for file, text in run.files.items():
                path = Path(directory) / file
                path.touch(mode=0o600)  # which Ray keeps, there too
                path.write_text(text)
            self._client.submit_job(
                entrypoint=run.entrypoint,
                submission_id=new,
                runtime_env={"working_dir": directory, "env_vars": run.variables},
                metadata=dict(run.metadata),
            )
        return self._job(new)

    def follow(self, job: Submitted, show: Callable[[str], None]) -> Submitted:
        """Hand a job's log to `show`, from its beginning and piece by piece, until the job has ended.

        Raises:
            ClusterError: the connection broke. The job goes on.
        """

        async def stream() -> None:
            async for text in self._client.tail_job_logs(job.id):
                show(redaction.redacted(text))

        with self._asked():
            asyncio.run(stream())
        ended = self._job(job.id)
        if not ended.has_ended:
            raise ClusterError(
                f"{self.address}: the log of {job.id} broke off, and the job is {ended.state}. Follow it again."
            )
        return ended

    def stop(self, job: Submitted) -> Submitted:
        """End a job, and wait until it has.

        Raises:
            ClusterError: it does not end.
        """
        with self._asked():
            self._client.stop_job(job.id)
        deadline = time.monotonic() + _STOP_S
        while not (found := self._job(job.id)).has_ended:
            if time.monotonic() > deadline:
                raise ClusterError(f"{self.address}: {job.id} was told to stop {_STOP_S:.0f} s ago and has not.")
            time.sleep(_POLL_S)
        return found

    def _job(self, submission_id: str) -> Submitted:
        with self._asked():
            return _submitted(self._client.get_job_info(submission_id))

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Ask the server, and this one: Ray's client prefers addresses of the environment to what it is given, and a
        proxy would be sent the token of a Ray on this machine."""
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        only = {"RAY_API_SERVER_ADDRESS": self.address}
        if self._is_here:
            only |= {"no_proxy": "*", "NO_PROXY": "*"}
        try:
            with _environment(only):
                yield
        except AuthenticationError as error:
            raise ClusterError(f"{self.address}: {self._shut_out()}") from error
        except (OSError, ClientError) as error:
            raise ClusterError(
                f"{self.address}: no Ray answers there ({_first_line(error)}). The address is that of the cluster's "
                f"dashboard, which listens on the head's own port 8265: reach it by `ssh -L 8265:127.0.0.1:8265 HEAD`."
            ) from error
        except (RuntimeError, ValueError, KeyError) as error:
            if "already exists" in str(error):
                raise ClusterError(f"{self.address}: somebody has just submitted this run; see --status.") from error
            if "No available agent" in str(error):
                raise ClusterError(f"{self.address}: the cluster takes no jobs yet. Try again in a minute.") from error
            raise ClusterError(
                f"{self.address}: what answers there is no job server of Ray, or it failed ({_first_line(error)}). The "
                f"address is that of the cluster's dashboard, without a path behind it."
            ) from error

    def _shut_out(self) -> str:
        if self._token is None:
            if auth.is_disabled():
                return "the cluster asks for its token, and RAY_AUTH_MODE=disabled says that there is none."
            return f"the cluster asks for its token, and none was found here. {_GIVE_IT}"
        return f"the token of {self._token.source} is not the cluster's."


def is_open_to_listeners(address: str) -> bool:
    """Whether token, run file and secrets cross a network as they are.

    Raises:
        ConfigError: it is no address.
    """
    scheme, host = _parts(address)
    return scheme == "http" and not _is_loopback(host)


def _parts(address: str) -> tuple[str, str]:
    """Scheme and host."""
    try:
        url = urlsplit(address)
        port = url.port  # may be no number
    except ValueError:
        url, port = urlsplit(""), None
    if url.scheme not in ("http", "https") or not url.hostname or (port is None and url.scheme == "http"):
        raise ConfigError(
            f"--address {address}: must be that of the cluster's dashboard, http://HOST:8265 or https://HOST."
        )
    if url.username or url.password:
        raise ConfigError("--address: must hold no user and no password; Ray asks for a token (RAY_AUTH_TOKEN).")
    return url.scheme, url.hostname


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _number(submission_id: str) -> int:
    return int(submission_id.partition("~")[2] or 1)


def _submitted(job: Any) -> Submitted:
    return Submitted(
        id=job.submission_id,
        state=job.status.value.lower(),
        message=redaction.redacted(job.message) if job.message else None,
        exit_code=job.driver_exit_code,
        started=_time(job.start_time),
        ended=_time(job.end_time),
        metadata=dict(job.metadata or {}),
    )


def _time(milliseconds: int | None) -> str | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables, as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
