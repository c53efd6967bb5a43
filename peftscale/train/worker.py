"""One training process's whole life: base, cohort, steps, evaluations, checkpoints, summary.

Runs alike in this process, under torchrun, and in a Ray worker. What it learns it writes to the run's directory;
`report` is the driver's barrier. Every rank takes the same path through this file.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peftscale import adapters, configio, facts, plan, records
from peftscale.adapters import Cohort, files
from peftscale.adapters.manifest import AdapterCard, BaseCard, TaskTemplate
from peftscale.base import exactness
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data import tasks
from peftscale.data.batches import Cursor, Item, pass_tokens, plan_passes, training_items
from peftscale.data.rows import Split
from peftscale.data.tasks import TaskData
from peftscale.errors import CheckpointError, ConfigError, TrainingError
from peftscale.plan import Plan
from peftscale.train import checkpoint, comm, evaluate, memory, step
from peftscale.train.checkpoint import AdapterProgress, Identity, State
from peftscale.train.optim import AdapterOptimizer
from peftscale.train.step import StepResult

CHECKPOINTS, METRICS, ADAPTERS, SUMMARY = "checkpoints", "metrics.jsonl", "adapters", "summary.json"
COLLECTIVE_TIMEOUT_S = 1800.0

Report = Callable[[int], None]
"""Called by every rank after each checkpoint with the step."""


@dataclass
class Job:
    """What the functions of this file share."""

    cfg: RunConfig
    base: Base
    task: TaskData
    state: State
    plan: Plan
    identity: Identity
    memory: memory.PeakMemory
    report: Report
    results: list[StepResult] = field(default_factory=list)
    unwritten: OSError | None = None
    """Why a row of the metrics could not be written."""

    @property
    def run_dir(self) -> Path:
        return self.cfg.run_dir

    @property
    def reported_split(self) -> Split:
        """What the summary's before and after are measured on."""
        return "test" if self.task.test else "validation"


def main(cfg: RunConfig, report: Report = lambda step: None) -> records.RunSummary:
    """Train the cohort of a run file from its start or its last checkpoint. The same summary on every rank."""
    device = pick_device(cfg)
    with comm.session(backend=comm.backend_for(device), timeout_s=COLLECTIVE_TIMEOUT_S):
        if comm.world_size() > 1:
            from peftscale.base import shard  # noqa: F401 - DeepSpeed's own hundred megabytes are not the base's
        with memory.measured(device) as peak:
            return train(open_job(cfg, device, peak, report))


def open_job(cfg: RunConfig, device: torch.device, peak: memory.PeakMemory, report: Report) -> Job:
    """Load everything and take over the newest checkpoint, if there is one.

    Raises:
        ConfigError: the run does not fit this world.
        PeftscaleError: the base, the data, an adapter's start or a checkpoint cannot be used.
    """
    planned = make_plan(cfg, device)
    task = _load_task(cfg)  # before the base: a wrong label is known in seconds, packing may take an hour
    peak.restart()  # data and its libraries are not the base's
    base = base_load.load(
        cfg.base, sharding=planned.sharding, device=device, prefetch_elements=planned.prefetch_elements
    )
    why_padded = choose_packing(cfg, base)
    cohort = adapters.build(cfg, base)
    state = State(
        cohort=cohort,
        optimizers={name: AdapterOptimizer(a.parameters(), cfg.train) for name, a in cohort.items()},
        best_rows={},
        progress={name: AdapterProgress(Cursor(cfg.adapter_seed(name))) for name in cohort},
    )
    identity = Identity(
        base.digest, configio.fingerprint(cfg), comm.world_size(), torch.get_num_threads(), configio.dump(cfg)
    )
    passes, tokens = _typical_passes(cfg, cohort, task, is_packed=base.is_packed)
    planned = make_plan(cfg, device, passes_per_step=passes, tokens_per_pass=tokens)
    job = Job(cfg, base, task, state, planned, identity, peak, report)
    _begin(job)
    if why_padded:
        _note(job, f"passes are padded: {why_padded}")
    return job


def choose_packing(cfg: RunConfig, base: Base) -> str | None:
    """Make the base packed where the run file allows it and every rank found it exact; else say why not."""
    if cfg.train.packing == "off":
        return None
    reasons = [reason for reason in comm.gather_objects(exactness.differs(base)) if reason]
    if reasons:
        return str(reasons[0])
    exactness.make_packed(base)
    return None


def _load_task(cfg: RunConfig) -> TaskData:
    model_dir = base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False)
    base_load.make_skeleton(cfg.base, model_dir)  # a base that cannot be trained is said first
    positions = facts.load(model_dir).max_positions
    longest = max(adapter.length for adapter in cfg.adapters.values())
    room = None if positions is None else positions - longest
    return tasks.load(cfg.task, base_load.load_tokenizer(model_dir), max_tokens=room)


def _begin(job: Job) -> None:
    """Take over the newest checkpoint, and say what should be known before the first step."""
    if comm.rank() == 0:
        records.mend(job.run_dir / METRICS)
    found = checkpoint.restore(job.state, job.run_dir / CHECKPOINTS, job.identity, note=lambda text: _note(job, text))
    if found is not None:
        _note(job, f"goes on from {found.name}")
        return
    if job.task.num_cut:
        _note(job, f"{job.task.num_cut} inputs lost their first tokens to task.max_text_tokens")
    if job.task.num_seams:
        _note(job, f"{job.task.num_seams} targets do not join their input: does task.input end in a blank?")


def _note(job: Job, text: str) -> None:
    _record(job, records.NoteRecord(step=job.state.step, text=text))


def _record(job: Job, row: records.Record) -> None:
    """Append a row to the metrics, on rank 0. A disk that is full is told at the next checkpoint, to every rank."""
    if comm.rank() == 0:
        try:
            records.append(job.run_dir / METRICS, row)
        except OSError as error:
            job.unwritten = job.unwritten or error


def train(job: Job) -> records.RunSummary:
    """The loop."""
    cfg, state, start = job.cfg, job.state, time.perf_counter()
    ended = job.run_dir / SUMMARY
    if ended.exists():  # a run that had ended is resumed: its figures stand
        return records.RunSummary.model_validate_json(ended.read_text())
    if state.step == 0:
        _evaluate_before(job)
        _evaluate(job)
    while state.step < cfg.train.steps and not _is_over(job):
        result = step.run(
            job.base,
            state.cohort,
            state.optimizers,
            _take_items(cfg, state, job.task),
            step=state.step,
            microbatch_tokens=cfg.train.microbatch_tokens,
        )
        state.step += 1
        _book(job, result)
        is_last = state.step == cfg.train.steps
        if is_last or state.step % cfg.train.evaluate_every == 0:
            _evaluate(job)
        if is_last or state.step % cfg.train.checkpoint_every == 0 or _is_over(job):
            save(job)
    return _finish(job, time.perf_counter() - start)


def save(job: Job) -> None:
    """Write a checkpoint and the best adapters; every rank learns whether rank 0 could."""

    def write() -> None:
        checkpoint.save_(job.state, job.run_dir / CHECKPOINTS, job.identity, keep=job.cfg.train.keep_checkpoints)
        for name, adapter in job.state.cohort.items():
            _save_adapter(job, name, "last", adapter.rows_PH, job.state.step)
            _save_adapter(job, name, "best", job.state.best_rows[name], job.state.progress[name].best_step)

    _write_on_rank_0(job, write)
    job.report(job.state.step)


def _write_on_rank_0(job: Job, write: Callable[[], object]) -> None:
    """Call `write` on rank 0. What it raises every rank raises: one that leaves alone lets the others wait."""
    failure: Exception | None = None
    if comm.rank() == 0:
        try:
            write()
            if job.unwritten is not None:
                raise job.unwritten
        except OSError as error:
            failure = CheckpointError(
                f"{job.run_dir} cannot be written: {error.strerror or error}. The last checkpoint is kept; make room "
                f"and go on with --resume {job.cfg.name}."
            )
        except Exception as error:
            failure = error
    failure = comm.gather_objects(failure)[0]
    if failure is not None:
        raise failure


def pick_device(cfg: RunConfig) -> torch.device:
    """This rank's GPU where the run asks for GPUs and there are any, else the CPU."""
    if cfg.cluster.gpus_per_worker == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _take_items(cfg: RunConfig, state: State, task: TaskData) -> list[Item]:
    """The items of the next step, of all adapters; moves their cursors."""
    items: list[Item] = []
    for name, adapter in state.cohort.items():
        progress = state.progress[name]
        at, progress.cursor = progress.cursor.take(cfg.train.examples_per_step, num_examples=len(task.train))
        items += training_items(name, adapter.length, [task.train[i] for i in at])
    return items


def make_plan(cfg: RunConfig, device: torch.device, **known: int) -> Plan:
    """The plan for the world that this process finds itself in.

    Raises:
        ConfigError: it does not fit, with what would help.
    """
    base_facts = facts.load(base_load.resolve(cfg.base.model, cfg.base.revision, with_weights=False))
    hardware = plan.detect(cuda=device.type == "cuda")
    planned = plan.make(cfg, base_facts, hardware, world=comm.world_size(), **known)
    if not planned.fits:
        raise ConfigError("\n".join(planned.problems))
    return planned


def _typical_passes(cfg: RunConfig, cohort: Cohort, task: TaskData, *, is_packed: bool) -> tuple[int, int]:
    """Passes a step (median of the first steps) and tokens of the largest pass, padding included: for the plan."""
    trial = State(cohort, {}, {}, {name: AdapterProgress(Cursor(cfg.adapter_seed(name))) for name in cohort})
    counts, tokens = [], 0
    for _ in range(min(cfg.train.steps, 20)):
        items = _take_items(cfg, trial, task)
        ranks = plan_passes(
            items, world=comm.world_size(), microbatch_tokens=cfg.train.microbatch_tokens, is_packed=is_packed
        )
        counts.append(len(ranks[0]))
        tokens = max(tokens, *(pass_tokens(rows, is_packed=is_packed) for passes in ranks for rows in passes))
    return round(statistics.median(counts)), tokens


def _book(job: Job, result: StepResult) -> None:
    """Write the step down, count what was not finite, and end the run when it is too much."""
    job.results.append(result)
    state = job.state
    for name, progress in state.progress.items():
        progress.last_loss = result.losses[name]
        progress.nonfinite_steps = progress.nonfinite_steps + 1 if name in result.skipped else 0
    state.num_skipped += bool(result.skipped)
    row = records.StepRecord(
        step=state.step,
        adapters=result.losses,
        learning_rate=result.learning_rate,
        tokens=result.num_tokens,
        seconds=result.seconds,
        tokens_per_s=result.num_tokens / result.seconds,
        reduced_bytes=result.traffic.reduced,
        gathered_bytes=result.traffic.gathered,
        control_bytes=result.traffic.control,
        skipped=bool(result.skipped),
    )
    _record(job, row)
    limit = job.cfg.train.max_nonfinite_steps
    stuck = [name for name, progress in state.progress.items() if progress.nonfinite_steps >= limit]
    if stuck:
        raise TrainingError(
            f"adapter {', '.join(stuck)}: the loss or gradient was not finite in {limit} steps in a row, the last one "
            f"step {state.step}. Lower train.learning_rate={job.cfg.train.learning_rate:g} or set train.clip_norm; "
            f"the last checkpoint is kept."
        )


def _is_over(job: Job) -> bool:
    patience = job.cfg.train.early_stop
    return patience is not None and all(p.stale_evaluations >= patience for p in job.state.progress.values())


def _evaluate_before(job: Job) -> None:
    """The base without any prompt, on the split that the summary reports."""
    split = job.reported_split
    result = evaluate.run(
        job.base,
        {},
        job.task,
        job.task.split(split),
        metrics=job.cfg.task.metrics,
        microbatch_tokens=job.cfg.train.microbatch_tokens,
        with_base_alone=True,
    )[evaluate.BASE_ALONE]
    for name, progress in job.state.progress.items():
        progress.before = result.metrics
        _record_evaluation(job, name, f"{split} without prompt", result)


def _evaluate(job: Job) -> None:
    """All adapters on the validation split; keep those rows that are better than ever."""
    results = evaluate.run(
        job.base,
        job.state.cohort,
        job.task,
        job.task.split("validation"),
        metrics=job.cfg.task.metrics,
        microbatch_tokens=job.cfg.train.microbatch_tokens,
    )
    first = job.cfg.task.metrics[0]
    for name, result in results.items():
        progress = job.state.progress[name]
        if not progress.best or result.metrics[first] > progress.best[first]:
            progress.best, progress.best_step, progress.stale_evaluations = result.metrics, job.state.step, 0
            job.state.best_rows[name] = job.state.cohort[name].rows_PH.detach().clone()
        else:
            progress.stale_evaluations += 1
        _record_evaluation(job, name, "validation", result)


def _record_evaluation(job: Job, name: str, split: str, result: evaluate.Evaluation) -> None:
    row = records.EvaluationRecord(
        step=job.state.step, adapter=name, split=split, metrics=result.metrics, seconds=result.seconds
    )
    _record(job, row)


def _save_adapter(job: Job, name: str, which: str, rows_PH: torch.Tensor, at_step: int) -> int:
    cfg, base = job.cfg, job.base
    config = base.model.config.get_text_config()
    card = AdapterCard(
        base=BaseCard(
            model=cfg.base.model,
            revision=None if Path(cfg.base.model).is_dir() else cfg.base.revision,
            digest=base.digest,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            quantization=cfg.base.quantization,
            compute_dtype=cfg.base.compute_dtype,
        ),
        task=TaskTemplate.of(cfg.task),
        run=cfg.name,
        fingerprint=job.identity.fingerprint,
        init=cfg.adapters[name].init,
        step=at_step,
        metrics=dict(job.state.progress[name].best) if which == "best" else {},
    )
    return files.save(adapters.SoftPrompt(rows_PH), job.run_dir / ADAPTERS / name / which, card=card)


def _finish(job: Job, seconds: float) -> records.RunSummary:
    """Score the best adapters on the reported split and sum the run up."""
    state, split = job.state, job.reported_split
    best = {name: adapters.SoftPrompt(rows) for name, rows in state.best_rows.items()}
    after = evaluate.run(
        job.base,
        best,
        job.task,
        job.task.split(split),
        metrics=job.cfg.task.metrics,
        microbatch_tokens=job.cfg.train.microbatch_tokens,
    )
    summary = _summary(job, {name: result.metrics for name, result in after.items()}, seconds)
    for name, result in after.items():
        _record_evaluation(job, name, split, result)
    text = json.dumps(summary.model_dump(mode="json"), indent=1)
    _write_on_rank_0(job, lambda: (job.run_dir / SUMMARY).write_text(text))
    return summary


def _summary(job: Job, after: dict[str, dict[str, float]], seconds: float) -> records.RunSummary:
    state, results = job.state, job.results

    def median(values: list[int]) -> int:
        return round(statistics.median(values)) if values else 0

    trained_s = sum(result.seconds for result in results)
    return records.RunSummary(
        name=job.cfg.name,
        world_size=comm.world_size(),
        sharding=job.plan.sharding,
        packing="packed" if job.base.is_packed else "off",
        steps=state.step,
        seconds=seconds,
        tokens_per_s=sum(result.num_tokens for result in results) / trained_s if trained_s else 0.0,
        reduced_bytes_per_step=median([result.traffic.reduced for result in results]),
        gathered_bytes_per_step=median([result.traffic.gathered for result in results]),
        control_bytes_per_step=median([result.traffic.control for result in results]),
        peak_rank_bytes=max(comm.gather_objects(job.memory.peak_bytes())),
        predicted=records.Predicted(
            reduced_bytes_per_step=job.plan.reduced_bytes_per_step,
            gathered_bytes_per_step=job.plan.gathered_bytes_per_step,
            control_bytes_per_step=job.plan.control_bytes_per_step,
            peak_rank_bytes=job.plan.peak_rank_bytes,
        ),
        adapters={
            name: records.AdapterSummary(
                dir=str(job.run_dir / ADAPTERS / name / "best"),
                file_bytes=files.expected_bytes(adapter.length, adapter.hidden_size),
                trainable_parameters=sum(p.numel() for p in adapter.parameters()),
                train_loss=state.progress[name].last_loss or 0.0,
                before=state.progress[name].before,
                after=after[name],
            )
            for name, adapter in state.cohort.items()
        },
    )
