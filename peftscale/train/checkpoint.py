"""Checkpoints of a run: everything needed to go on as if nothing had happened, and nothing of the base.

A checkpoint knows no world size: adapters and their moments are whole tensors, the data is a cursor into a global
order. It is written by rank 0 into a directory that appears whole or not at all, with the sha256 of every file;
loading scans from the newest to the oldest and says what it passed over. safetensors and JSON only: nothing is
unpickled. What a user takes away is an adapter directory: `adapters.files`.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from peftscale.adapters import Cohort, directory
from peftscale.data.batches import Cursor
from peftscale.errors import CheckpointError
from peftscale.train import comm
from peftscale.train.optim import AdapterOptimizer

log = logging.getLogger(__name__)

FORMAT = 3
_MANIFEST, _STATE, _ADAPTERS, _MOMENTS = "manifest.json", "state.json", "adapters.safetensors", "optimizer.safetensors"


Whole = tuple[Path, dict[str, bytes]]
"""A checkpoint and the content of its files, which were compared with the manifest."""
Outcome = Literal["finished", "stopped early", "failed"]


@dataclass
class AdapterProgress:
    """Where one adapter stands, beside its tensors."""

    cursor: Cursor
    before: dict[str, float] = field(default_factory=dict)
    """Metrics of the base without a prompt, on the split that is reported at the end."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics on the validation split of the rows kept as the best."""
    best_step: int = -1
    stale_evaluations: int = 0
    """Evaluations in a row without a better first metric."""
    nonfinite_steps: int = 0
    """In a row."""
    last_loss: float | None = None
    steps: int = 0
    """Taken, also those that changed nothing."""
    outcome: Outcome | None = None
    """How it left the cohort; None while it trains."""
    reason: str | None = None
    """Why it left before its last step."""


@dataclass
class State:
    """All that changes during a run."""

    cohort: Cohort
    optimizers: Mapping[str, AdapterOptimizer]
    best_rows: dict[str, Tensor]
    """float32 copy of each adapter's values, folded, at its best evaluation."""
    progress: dict[str, AdapterProgress]
    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Of training and evaluation up to this step, also before restarts."""
    num_skipped: int = 0
    """Steps, over the whole run, in which an adapter was not updated."""

    @property
    def training(self) -> tuple[str, ...]:
        """The adapters that have not left, in the order of the cohort."""
        return tuple(name for name in self.cohort if self.progress[name].outcome is None)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree with to be continued, and what is only written down."""

    base_digest: str
    fingerprint: str
    """Of the run file's keys that change the result."""
    world_size: int
    num_threads: int
    config: dict[str, Any]


def save_(state: State, root: Path, identity: Identity, *, keep: int) -> Path:
    """Write a checkpoint of `state` under `root` and prune older ones. Rank 0 alone calls it.

    Returns:
        Its directory, root/step-N.

    Raises:
        CheckpointError: the disk is full or cannot be written. Older checkpoints are untouched.
    """
    tensors = {
        f"{name}/last/{tensor}": parameter.detach()
        for name, adapter in state.cohort.items()
        for tensor, parameter in adapter.named_parameters()
    }
    tensors |= {f"{name}/best": rows for name, rows in state.best_rows.items()}
    moments = {f"{name}/{k}": v for name, optimizer in state.optimizers.items() for k, v in optimizer.state().items()}
    content = {
        "step": state.step,
        "seconds": state.seconds,
        "num_skipped": state.num_skipped,
        "progress": {name: asdict(progress) for name, progress in state.progress.items()},
    }
    return write_(root, content, tensors, moments, identity, keep=keep)


def write_(
    root: Path,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    identity: Identity,
    *,
    keep: int,
) -> Path:
    """Write the parts of a checkpoint under `root` and prune older ones; `read` gives them back. Rank 0 alone calls it.

    Args:
        content: plain values; "step" among them.

    Raises:
        CheckpointError: as `save_`.
    """
    files = {
        _ADAPTERS: save({name: t.cpu().contiguous() for name, t in tensors.items()}),
        _MOMENTS: save({name: t.cpu().contiguous() for name, t in moments.items()}),
        _STATE: _json({**content, "torch_rng": torch.random.get_rng_state().tolist(), **asdict(identity)}),
    }
    files[_MANIFEST] = _json(
        {"format": FORMAT, "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}}
    )
    target = root / f"step-{content['step']}"
    try:
        directory.write(target, files)
    except OSError as error:
        last = next((path for path in newest_first(root) if path != target), None)
        raise CheckpointError(
            f"checkpoint {target} cannot be written: {error.strerror or error}. It needs "
            f"{sum(map(len, files.values()))} bytes. The last good one is {last or 'none'}. "
            f"Make room and go on with --resume{'' if last else ', from the first step'}."
        ) from error
    standing = newest_first(root)
    # One of a later step was passed over when the run went on, as it is damaged: it takes no good one's place.
    for old in standing[standing.index(target) :][keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(root: Path, *, note: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint under `root` that is whole, or None where there is none to go on from.

    In a run rank 0 alone looks: `newest_of_rank_0`.

    Args:
        root: the run's checkpoints.
        note: told of every checkpoint that is passed over, and why.

    Raises:
        CheckpointError: there are checkpoints and none of them can be used.
    """
    candidates = newest_first(root)
    reasons = []
    for path in candidates:
        try:
            _verified(path)
        except CheckpointError as error:
            reasons.append(str(error))
            note(f"{error}; trying the one before it")
            continue
        return path
    if candidates:
        raise CheckpointError(
            f"{root}: none of the {len(candidates)} checkpoint(s) can be used. {reasons[0]}. "
            f"Start a new run under another name."
        )
    return None


def newest_of_rank_0(root: Path, *, note: Callable[[str], None]) -> Whole | None:
    """What rank 0 finds as `newest`, read by it alone and given to every rank: others may see other files, or none.

    Raises:
        CheckpointError: as `newest`, on every rank.
    """

    def look() -> Whole | None:
        path = newest(root, note=note) if comm.rank() == 0 else None
        return None if path is None else (path, _verified(path))

    return comm.from_rank_0(comm.together(look))


def take_over_(state: State, path: Path, identity: Identity, files: dict[str, bytes] | None = None) -> int:
    """Change `state`, as the run began, into that of a checkpoint. Every rank calls it with the same one.

    Args:
        files: what it holds, where that was read already.

    Returns:
        The ranks that wrote it.

    Raises:
        CheckpointError: it is not whole, or belongs to another base or another run file.
    """
    content, tensors, moments = read(path, identity, files)
    _take_over(state, content, tensors, moments)
    return int(content["world_size"])


def read(
    path: Path, identity: Identity, files: dict[str, bytes] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Values, tensors and moments that `write_` was given; torch's random state is set to what it was.

    Raises:
        CheckpointError: it is not whole, or belongs to another base or another run file.
    """
    files = _verified(path) if files is None else files
    content = json.loads(files[_STATE])
    _refuse_other_run(path, content, identity)
    torch.random.set_rng_state(torch.tensor(content["torch_rng"], dtype=torch.uint8))
    return content, load(files[_ADAPTERS]), load(files[_MOMENTS])


def _take_over(
    state: State, content: dict[str, Any], tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    state.step, state.num_skipped, state.seconds = content["step"], content["num_skipped"], content["seconds"]
    for name, saved in content["progress"].items():
        cursor = Cursor(**saved.pop("cursor"))
        state.progress[name] = AdapterProgress(cursor=cursor, **saved)
        parameters = dict(state.cohort[name].named_parameters())
        device = next(iter(parameters.values())).device
        with torch.no_grad():
            for tensor, parameter in parameters.items():
                parameter.copy_(tensors[f"{name}/last/{tensor}"])
        if f"{name}/best" in tensors:
            state.best_rows[name] = tensors[f"{name}/best"].to(device)
        own = {k.removeprefix(f"{name}/"): v.to(device) for k, v in moments.items() if k.startswith(f"{name}/")}
        state.optimizers[name].restore(own)


def _refuse_other_run(path: Path, content: dict[str, Any], identity: Identity) -> None:
    if content["base_digest"] != identity.base_digest:
        raise CheckpointError(
            f"{path} was written on base {content['base_digest']}, this base is {identity.base_digest}. "
            f"Check base.model and base.revision."
        )
    if content["fingerprint"] != identity.fingerprint:
        changed = _differences(content["config"], identity.config)
        raise CheckpointError(
            f"{path} belongs to another run file; changed since: {'; '.join(changed) or 'other keys'}. "
            f"Undo the changes, or start a new run under another name."
        )


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if old and new and all(isinstance(of, list) and isinstance(of[0], dict) for of in (old, new)):  # tasks of a mixture
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted({*old, *new})
            for line in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where} was {old!r}, now {new!r}"]


def newest_first(root: Path) -> list[Path]:
    """All that are there, whole or not."""
    found = [(int(m[1]), p) for p in root.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _verified(path: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, read once and compared with the manifest."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        written, hashes = manifest["format"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {path} is not whole ({_MANIFEST}: {type(error).__name__}: {error})"
        ) from error
    if written != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {written!r} ({_MANIFEST}), this version reads {FORMAT}: another version "
            f"wrote it"
        )
    try:
        files = {name: (path / name).read_bytes() for name in (_STATE, _ADAPTERS, _MOMENTS)}
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} is not whole ({error.filename}: {error.strerror})") from error
    wrong = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != hashes.get(name)]
    if wrong:
        raise CheckpointError(f"checkpoint {path} is damaged ({', '.join(wrong)}: by {_MANIFEST} it was another)")
    step = json.loads(files[_STATE])["step"]
    if path.name != f"step-{step}":
        raise CheckpointError(f"checkpoint {path} is another one, renamed (it holds the state after step {step})")
    return files


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, default=str).encode()
