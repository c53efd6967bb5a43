"""Training of a baseline: steps, evaluations, best state, checkpoints, summary.

One task, one learner: what moves, and how, is `baselines.lora` and `baselines.full`. The order of examples, the passes'
plan, the records and the evaluation are those of adapters; their own loop is `train.worker`. Every rank takes the same
path through this file.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from peftscale import configio, records
from peftscale.base import host_memory, pack
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.base.padded import Row
from peftscale.baselines import budget, lora, model
from peftscale.baselines import task as baseline_task
from peftscale.baselines.full import Full
from peftscale.config import RunConfig, TrainConfig
from peftscale.data.batches import Cursor, Item, checksum, plan_passes, training_items
from peftscale.data.tasks import TaskData
from peftscale.errors import TrainingError
from peftscale.plan import Plan, Work
from peftscale.records import AdapterSummary, EvaluationRecord, RunSummary, StepRecord
from peftscale.task_config import Split
from peftscale.train import checkpoint, comm, departures, evaluate, memory, optim, step, summary, worker, workload
from peftscale.train.checkpoint import AdapterProgress, Identity
from peftscale.train.journal import Journal, Leaving, Watch, never


class Learner(Protocol):
    """What is trained inside a transformers model. Every rank calls every method, but for `save`."""

    base: Base
    through: nn.Module
    """What passes call: the model, or what stands for it."""
    named: dict[str, nn.Parameter]
    """What is trained."""
    directory: Path
    """Of the best state, once it is saved."""

    def backward(self, loss: Tensor, *, is_last: bool) -> None: ...
    def update(self, step: int, *, is_finite: bool) -> float | None: ...
    def keep(self) -> None: ...
    def restore(self) -> None: ...
    def save(self) -> None: ...
    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None: ...
    def take_over_(self, tensors: dict[str, Tensor], moments: dict[str, Tensor]) -> None: ...
    def close(self) -> None: ...


@dataclass
class Job:
    """What the functions of this file share."""

    cfg: RunConfig
    train: TrainConfig
    learner: Learner
    task: TaskData
    journal: Journal
    identity: Identity
    progress: AdapterProgress
    report: Callable[[int], None]
    memory: memory.PeakMemory
    num_skipped: int = 0
    seconds: float = 0.0

    @property
    def base(self) -> Base:
        return self.learner.base


def run(
    cfg: RunConfig,
    device: torch.device,
    peak: memory.PeakMemory,
    report: Callable[[int], None],
    watch: Watch,
    is_leaving: Leaving,
) -> RunSummary:
    """Train the run file's baseline from its start, or from its last checkpoint. The same summary on every rank.

    Raises:
        ConfigError: it does not fit, or PEFT is missing.
        TrainingError: too many steps in a row were not finite.
    """
    if cfg.method == "lora":
        comm.together(lora.library)
    task = comm.together(lambda: baseline_task.load(cfg))
    comm.together(lambda: budget.of_training(cfg, device, world=comm.world_size()))
    peak.restart()  # data and its libraries are not the base's
    base = comm.together(lambda: model.load(cfg.base, device))
    # Full fine-tuning keeps no checkpoint: a notice helps it nothing.
    journal = Journal(cfg, watch, is_leaving if cfg.method == "lora" else never)
    learner: Learner = (lora.Lora if cfg.method == "lora" else Full)(base, cfg, journal)
    with closing(learner):
        identity = Identity(
            f"config {pack.config_sha256(base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False))}",
            configio.fingerprint(cfg),
            comm.world_size(),
            torch.get_num_threads(),
            configio.dump(cfg),
        )
        progress = AdapterProgress(Cursor(cfg.seed))
        job = Job(cfg, cfg.baseline_train, learner, task, journal, identity, progress, report, peak)
        planned = comm.together(
            lambda: budget.of_training(
                cfg,
                device,
                world=comm.world_size(),
                num_trained=sum(p.numel() for p in learner.named.values()),
                work=_work(job),
            )
        )
        return _train(job, planned)


def _work(job: Job) -> Work:
    """What the first steps and the evaluations compute: for the prediction."""
    most, steps, cursor = job.train.microbatch_tokens, [], job.progress.cursor
    for _ in range(min(job.train.steps, workload.COUNTED_STEPS)):
        items, cursor = _take(job, cursor)
        steps.append(items)
    cells = [[_cell(job, split)] for split in {worker.reported_split(job.task), "validation"}]
    return workload.counted(
        steps,
        [evaluate.pass_sizes(job.base, {}, of_one, microbatch_tokens=most) for of_one in cells],
        world=comm.world_size(),
        microbatch_tokens=most,
        is_packed=False,
    )


def _take(job: Job, cursor: Cursor) -> tuple[list[Item], Cursor]:
    """The items of the next step."""
    at, cursor = cursor.take(job.train.examples_per_step, num_examples=len(job.task.train))
    return training_items(job.cfg.method, 0, [job.task.train[i] for i in at], loss=job.train.loss), cursor


def _train(job: Job, planned: Plan) -> RunSummary:
    cfg, split, start = job.cfg, worker.reported_split(job.task), time.perf_counter()
    stands = comm.from_rank_0(records.read_summary(cfg.summary_path) if comm.rank() == 0 else None)
    if stands:  # a run that had ended is resumed: its figures stand
        return stands
    if not _take_over(job):
        _note_start(job)
        job.journal.write(lambda: _set_aside(job.learner.directory))
        job.progress.before = _evaluated(job, split, f"{split} without training")
        _evaluate(job)
    progress = job.progress
    start -= job.seconds
    while progress.outcome is None:
        _step(job)
        row, is_last = progress.nonfinite_steps, progress.steps == job.train.steps
        if row >= job.train.max_nonfinite_steps or (is_last and departures.ends_badly(progress)):
            raise TrainingError(
                f"{cfg.method}: the loss or gradient was not finite in {row} step{'s' * (row > 1)} in a row, the "
                f"last one step {progress.steps}. Lower its learning_rate={job.train.learning_rate:g} or set its "
                f"clip_norm; what was saved is kept in {job.learner.directory.parent}."
            )
        if is_last:
            progress.outcome = "finished"
        if progress.outcome or progress.steps % job.train.evaluate_every == 0:
            _evaluate(job)
        if job.journal.is_due(progress.steps, job.train.checkpoint_every) or progress.outcome:
            job.seconds = time.perf_counter() - start
            _save(job)
    job.learner.restore()
    after = _evaluated(job, split, split)
    return _finish(job, planned, after, time.perf_counter() - start)


def _step(job: Job) -> None:
    """One step of the global batch, written down."""
    cfg, train, progress, learner = job.cfg, job.train, job.progress, job.learner
    items, progress.cursor = _take(job, progress.cursor)
    start, before = time.perf_counter(), comm.traffic()
    loss = gradient(learner, items, microbatch_tokens=train.microbatch_tokens)
    rate = learner.update(progress.steps, is_finite=bool(torch.isfinite(loss)))
    host_memory.trim(job.base.device)
    seconds = time.perf_counter() - start
    traffic = comm.traffic().since(before) if comm.world_size() > 1 else comm.Traffic()  # DeepSpeed talks to itself
    progress.steps += 1
    progress.last_loss = float(loss)
    progress.nonfinite_steps = progress.nonfinite_steps + 1 if rate is None else 0
    job.num_skipped += rate is None
    num_tokens = sum(item.num_tokens for item in items)
    job.journal.record(
        StepRecord(
            step=progress.steps,
            adapters={cfg.method: float(loss)},
            learning_rate=rate or 0.0,
            examples={cfg.method: progress.cursor.position},
            texts_crc32=checksum(items),
            tokens=num_tokens,
            seconds=seconds,
            tokens_per_s=num_tokens / seconds,
            reduced_bytes=traffic.reduced,
            gathered_bytes=traffic.gathered,
            control_bytes=traffic.control,
            checks_bytes=traffic.checks,
            gathered_between_nodes_bytes=traffic.gathered_between,
            skipped=rate is None,
            skipped_adapters=(cfg.method,) if rate is None else (),
            peak_rank_bytes=job.memory.peak_bytes(),
        )
    )


def gradient(learner: Learner, items: Sequence[Item], *, microbatch_tokens: int) -> Tensor:
    """Leave the gradient of the global batch with the learner and return the global loss.

    Returns:
        A float64 scalar on the CPU, in nats a target token, the same on every rank.
    """
    num_targets = sum(len(item.target_ids) for item in items)
    passes = plan_passes(items, world=comm.world_size(), microbatch_tokens=microbatch_tokens)[comm.rank()]
    total = torch.zeros(1, dtype=torch.float64)
    for number, of_pass in enumerate(passes):
        # A rank without a row takes an empty one: gradients are summed in the order in which backward makes them.
        rows = step.rows_of(of_pass, {}) or [Row(None, (0, 0), 1)]
        nll = model.target_losses(learner.base, rows, through=learner.through).sum() * bool(of_pass)
        learner.backward(nll / num_targets, is_last=number == len(passes) - 1)
        total += nll.detach().double().cpu() / num_targets
    return comm.sum_(total.to(learner.base.device)).cpu()[0]


def _evaluated(job: Job, split: Split, title: str) -> dict[str, float]:
    """Score the model as it stands on a split, and write it down."""
    (result,) = evaluate.run_cells(job.base, {}, [_cell(job, split)], microbatch_tokens=job.train.microbatch_tokens)
    row = EvaluationRecord(
        step=job.progress.steps, adapter=job.cfg.method, split=title, metrics=result.metrics, seconds=result.seconds
    )
    job.journal.record(row)
    return result.metrics


def _cell(job: Job, split: Split) -> evaluate.Cell:
    return evaluate.Cell(evaluate.BASE_ALONE, job.task, job.task.split(split), job.cfg.task.metrics)


def _evaluate(job: Job) -> None:
    """Score on the validation split; keep a state that is better than ever, end a run that gets no better."""
    progress, metric, patience = job.progress, job.cfg.task.metrics[0], job.train.early_stop
    found = _evaluated(job, "validation", "validation")
    is_better = not progress.best or found[metric] > progress.best[metric]
    if is_better and all(optim.are_finite([list(job.learner.named.values())])):  # NaN may guess well
        progress.best, progress.best_step, progress.stale_evaluations = found, progress.steps, 0
        job.learner.keep()
        return
    if progress.nonfinite_steps:  # nothing has moved: this is no evaluation without progress, but no training
        return
    progress.stale_evaluations += 1
    if progress.outcome is None and patience is not None and progress.stale_evaluations >= patience:
        progress.outcome = "stopped early"
        progress.reason = f"early stop: {patience} evaluation(s) in a row without a better {metric}"


def _save(job: Job) -> None:
    """Write what the user takes away, and a checkpoint where the learner can be resumed."""

    def write() -> None:
        job.learner.save()
        parts = job.learner.state()
        if parts is None:
            return
        content = {
            "step": job.progress.steps,
            "seconds": job.seconds,
            "num_skipped": job.num_skipped,
            "progress": {job.cfg.method: asdict(job.progress)},
        }
        keep = job.train.keep_checkpoints
        checkpoint.write_(job.cfg.checkpoints_dir, content, *parts, job.identity, keep=keep)

    job.journal.write(write)
    job.report(job.progress.steps)


def _take_over(job: Job) -> bool:
    """Go on from the newest checkpoint, if there is one. Rank 0 looks for all."""
    journal = job.journal
    whole = checkpoint.newest_of_rank_0(job.cfg.checkpoints_dir, note=lambda text: journal.note(0, text))
    if whole is None:
        return False
    found, files = whole
    content, tensors, moments = comm.together(lambda: checkpoint.read(found, job.identity, files))
    saved = content["progress"][job.cfg.method]
    job.progress = AdapterProgress(cursor=Cursor(**saved.pop("cursor")), **saved)
    job.seconds, job.num_skipped = content["seconds"], content["num_skipped"]
    job.learner.take_over_(tensors, moments)
    journal.note(job.progress.steps, f"goes on from {found.name}")
    return True


def _note_start(job: Job) -> None:
    """What should be known before the first step."""
    if job.learner.state() is None and job.cfg.metrics_path.exists():
        job.journal.note(0, f"starts from its first step, as it did before: {job.cfg.method} keeps no checkpoint")
    for text in job.base.notes:
        job.journal.note(0, text)
    own = job.cfg.baseline_changes
    if own is None or own.learning_rate is None:
        job.journal.note(
            0,
            f"trains with the run's learning_rate={job.train.learning_rate:g}, as no other is given in "
            f"{job.cfg.method}.train: prompts take far higher ones than weights",
        )
    if job.task.num_cut:
        job.journal.note(0, f"{job.task.num_cut} inputs were cut to task.max_text_tokens")
    if job.cfg.base.sharding not in ("auto", "replicated") and comm.world_size() > 1:
        job.journal.note(
            0, f"method={job.cfg.method} holds the base whole on every rank: base.sharding is for adapters"
        )


def _set_aside(best: Path) -> None:
    """Keep what an earlier attempt had reached until this one has ended: it was trained, and this one's is not yet."""
    kept = _aside(best)
    if best.exists() and not kept.exists():
        best.rename(kept)


def _aside(best: Path) -> Path:
    return best.with_name(f"{best.name}-before")


def _finish(job: Job, planned: Plan, after: dict[str, float], seconds: float) -> RunSummary:
    cfg, progress, folder = job.cfg, job.progress, job.learner.directory
    result = AdapterSummary(
        dir=str(folder),
        file_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        trainable_parameters=sum(p.numel() for p in job.learner.named.values()),
        train_loss=progress.last_loss or 0.0,
        steps=progress.steps,
        stopped=progress.reason,
        before=progress.before,
        after=after,
    )
    ended = summary.make(
        summary.steps_of_rank_0(cfg, job.journal, step=progress.steps),
        planned,
        name=cfg.name,
        is_packed=False,
        seconds=seconds,
        peak_rank_bytes=max(comm.gather_objects(job.memory.peak_bytes())),
        adapters={cfg.method: result},
    )
    job.journal.write(lambda: records.write_summary(cfg.summary_path, ended))
    job.journal.write(lambda: shutil.rmtree(_aside(folder), ignore_errors=True))
    return ended
