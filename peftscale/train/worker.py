"""One training process's whole life: base, cohort, steps, evaluations, checkpoints, summary.

Runs alike in this process, under torchrun, and in a Ray worker. What it learns it writes to the run's directory;
`report` is the driver's barrier. Every rank takes the same path through this file.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from peftscale import adapters, configio, records
from peftscale.adapters import Cohort, files, peft_format
from peftscale.adapters.manifest import AdapterCard, BaseCard, StartCard, TaskTemplate
from peftscale.base import load as base_load
from peftscale.base.load import Base
from peftscale.config import RunConfig
from peftscale.data.batches import Cursor, Item, checksum, training_items
from peftscale.data.mixtures import Mixture
from peftscale.data.tasks import TaskData
from peftscale.plan import Plan, Work
from peftscale.task_config import Split
from peftscale.train import checkpoint, comm, departures, evaluate, memory, setup, step, summary, workload
from peftscale.train.checkpoint import AdapterProgress, Identity, State
from peftscale.train.journal import Journal, Leaving, Watch, never, nobody
from peftscale.train.optim import AdapterOptimizer
from peftscale.train.step import StepResult

Report = Callable[[int], None]
"""Called by every rank after each checkpoint with the step."""
Wanted = tuple[str, str, Split]
"""An evaluation: adapter, whose tasks, split."""


@dataclass
class Job:
    """What the functions of this file share."""

    cfg: RunConfig
    base: Base
    tasks: dict[str, Mixture]
    """Of each adapter; adapters with the same task share its data."""
    state: State
    plan: Plan
    identity: Identity
    memory: memory.PeakMemory
    report: Report
    starts: dict[str, StartCard]
    journal: Journal
    saved_at: dict[tuple[str, str], int] = field(default_factory=dict)
    """Step of what this process has written last, of each adapter's best and last."""


@dataclass(frozen=True)
class Scores:
    """One adapter on one split of all its tasks."""

    metrics: dict[str, float]
    """As `Mixture.scores` names them."""
    seconds: float
    """Of all that was evaluated together."""


def main(
    cfg: RunConfig, report: Report = lambda step: None, watch: Watch = nobody, is_leaving: Leaving = never
) -> records.RunSummary:
    """Train the cohort of a run file from its start or its last checkpoint. The same summary on every rank."""
    device = setup.pick_device(cfg)
    with comm.session(backend=comm.backend_for(device), timeout_s=cfg.cluster.collective_timeout_s):
        if comm.world_size() > 1:
            base_load.sharder(device)  # DeepSpeed's own hundred megabytes are not the base's
        with memory.measured(device) as peak:
            return train(open_job(cfg, device, peak, report, watch, is_leaving))


def open_job(
    cfg: RunConfig,
    device: torch.device,
    peak: memory.PeakMemory,
    report: Report,
    watch: Watch = nobody,
    is_leaving: Leaving = never,
) -> Job:
    """Load everything and take over the newest checkpoint, if there is one.

    Raises:
        ConfigError: the run does not fit this world.
        PeftscaleError: the base, the data, an adapter's start or a checkpoint cannot be used.
    """
    planned = setup.make_plan(cfg, device)
    # Before the base: a wrong label is known in seconds, packing may take an hour.
    data = comm.together(lambda: setup.load_tasks(cfg))
    unverified = comm.together(lambda: setup.verify_starts(cfg.adapters))
    peak.restart()  # data and its libraries are not the base's
    base = setup.load_base(cfg.base, planned, device)
    chosen = setup.choose_packing(cfg, base)
    cohort = adapters.build(cfg, base)
    starts = {
        name: StartCard.of(cfg.adapters[name], seed=cfg.adapter_seed(name), values=_values(adapter))
        for name, adapter in cohort.items()
    }
    state = State(
        cohort=cohort,
        optimizers={name: AdapterOptimizer.of(a, cfg.adapter_train(name)) for name, a in cohort.items()},
        best_rows={},
        progress={name: AdapterProgress(Cursor(cfg.adapter_seed(name))) for name in cohort},
    )
    identity = Identity(
        base.digest, configio.fingerprint(cfg), comm.world_size(), torch.get_num_threads(), configio.dump(cfg)
    )
    planned = setup.make_plan(cfg, device, placed=planned, work=_work(cfg, base, cohort, data))
    job = Job(cfg, base, data, state, planned, identity, peak, report, starts, Journal(cfg, watch, is_leaving))
    _begin(job)
    for text in (*base.notes, chosen, *unverified):
        if text:
            _note(job, text)
    return job


def _begin(job: Job) -> None:
    """Take over the newest checkpoint, and say what should be known before the first step."""
    whole = checkpoint.newest_of_rank_0(job.cfg.checkpoints_dir, note=lambda text: _note(job, text))
    if whole is not None:
        found, content = whole
        before = comm.together(lambda: checkpoint.take_over_(job.state, found, job.identity, content))
        now = comm.world_size()
        _note(job, f"goes on from {found.name}" + (f", on {now} rank(s) where there were {before}" * (now != before)))
        return
    for name, mixture in job.tasks.items():
        if len(mixture.tasks) > 1:
            _note(job, f"{name} is trained on several tasks; an epoch has {mixture.described()}")
    different = {id(task): task for mixture in job.tasks.values() for task in mixture.tasks}
    for task in different.values():
        of_task = f" (task {task.name})" if len(different) > 1 else ""
        if task.num_cut:
            _note(job, f"{task.num_cut} inputs were cut to task.max_text_tokens{of_task}")
        if task.num_seams:
            _note(job, f"{task.num_seams} targets do not join their input: does task.input end in a blank?{of_task}")


def _note(job: Job, text: str) -> None:
    job.journal.note(job.state.step, text)


def train(job: Job) -> records.RunSummary:
    """The loop."""
    cfg, state = job.cfg, job.state
    start = time.perf_counter() - state.seconds
    stands = comm.from_rank_0(records.read_summary(cfg.summary_path) if comm.rank() == 0 else None)
    if stands:  # a run that had ended is resumed: its figures stand
        return stands
    if state.step == 0:
        _evaluate_before(job)
        _evaluate(job, state.training)
    if not state.training:  # cut behind the last checkpoint: the adapters may not have been written after it
        job.journal.write(lambda: _save_adapters(job))
    while training := state.training:
        items = _take_items(cfg, state, job.tasks)
        result = step.run(
            job.base,
            Cohort({name: state.cohort[name] for name in training}),
            state.optimizers,
            items,
            step=state.step,
            microbatch_tokens=cfg.train.microbatch_tokens,
        )
        state.step += 1
        _book(job, items, result)
        have_left = _let_go(job, training)
        if job.journal.is_due(state.step, cfg.train.checkpoint_every) or have_left:
            state.seconds = time.perf_counter() - start
            save(job)
    return _finish(job, time.perf_counter() - start)


def save(job: Job) -> None:
    """Write a checkpoint and the adapters; every rank learns whether rank 0 could."""

    def write() -> None:
        checkpoint.save_(job.state, job.cfg.checkpoints_dir, job.identity, keep=job.cfg.train.keep_checkpoints)
        _save_adapters(job)

    job.journal.write(write)
    job.report(job.state.step)


def _take_items(cfg: RunConfig, state: State, data: Mapping[str, Mixture]) -> list[Item]:
    """The items of the next step, of all adapters that train; moves their cursors."""
    items: list[Item] = []
    for name in state.training:
        progress, train = state.progress[name], cfg.adapter_train(name)
        examples, progress.cursor = data[name].take(progress.cursor, train.examples_per_step)
        length, num = state.cohort[name].length, state.cohort[name].num_positions
        items += training_items(name, num, examples, loss=train.loss, decoder_length=num - length)
    return items


def _work(cfg: RunConfig, base: Base, cohort: Cohort, data: Mapping[str, Mixture]) -> Work:
    """What the first steps and the evaluations compute: for the plan."""
    trial = State(cohort, {}, {}, {name: AdapterProgress(Cursor(cfg.adapter_seed(name))) for name in cohort})
    most, reported = cfg.train.microbatch_tokens, {name: reported_split(*data[name].tasks) for name in cohort}
    wanted: tuple[list[Wanted], ...] = (
        [(evaluate.BASE_ALONE, name, split) for name, split in reported.items()],
        [(name, name, split) for name, split in reported.items()],
        [(name, name, "validation") for name in cohort],
    )
    cells = [list(_cells(cfg, data, of_one).values()) for of_one in wanted]
    return workload.counted(
        (_take_items(cfg, trial, data) for _ in range(min(cfg.num_steps, workload.COUNTED_STEPS))),
        [evaluate.pass_sizes(base, cohort, of_one, microbatch_tokens=most) for of_one in cells],
        world=comm.world_size(),
        microbatch_tokens=most,
        is_packed=base.is_packed,
    )


def _book(job: Job, items: Sequence[Item], result: StepResult) -> None:
    """Write the step down, and count the steps of each adapter and those that were not finite."""
    state = job.state
    for name, loss in result.losses.items():
        progress = state.progress[name]
        progress.steps += 1
        progress.last_loss = loss
        progress.nonfinite_steps = progress.nonfinite_steps + 1 if name in result.skipped else 0
    state.num_skipped += bool(result.skipped)
    row = records.StepRecord(
        step=state.step,
        adapters=result.losses,
        learning_rate=max(result.rates.values(), default=0.0),
        learning_rates=result.rates if len(set(result.rates.values())) > 1 else {},
        examples={name: state.progress[name].cursor.position for name in result.losses},
        texts_crc32=checksum(items),
        tokens=result.num_tokens,
        seconds=result.seconds,
        tokens_per_s=result.num_tokens / result.seconds,
        reduced_bytes=result.traffic.reduced,
        gathered_bytes=result.traffic.gathered,
        control_bytes=result.traffic.control,
        checks_bytes=result.traffic.checks,
        gathered_between_nodes_bytes=result.traffic.gathered_between,
        skipped=bool(result.skipped),
        skipped_adapters=result.skipped,
        peak_rank_bytes=job.memory.peak_bytes(),
    )
    job.journal.record(row)


def _let_go(job: Job, training: Sequence[str]) -> bool:
    """Evaluate the adapters that are due, and let those that are done leave. Returns whether any left."""
    cfg, state = job.cfg, job.state
    departures.mark_done_(cfg, state, training)
    _evaluate(job, departures.due(cfg, state, training))
    departures.mark_stale_(cfg, state, training)
    for text in departures.notes(cfg, state, training):
        _note(job, text)
    return len(state.training) < len(training)


def _evaluate_before(job: Job) -> None:
    """The base without any prompt, on the split that the summary reports."""
    splits = {name: reported_split(*job.tasks[name].tasks) for name in job.state.cohort}
    results = _evaluated(job, {}, [(evaluate.BASE_ALONE, name, split) for name, split in splits.items()])
    for (name, split), result in zip(splits.items(), results, strict=True):
        job.state.progress[name].before = result.metrics
        _record_evaluation(job, name, f"{split} without prompt", result)


def _cells(
    cfg: RunConfig, data: Mapping[str, Mixture], wanted: Sequence[Wanted]
) -> dict[tuple[str, int, Split], evaluate.Cell]:
    return {
        (name, id(task), split): evaluate.Cell(name, task, task.split(split), of_task.metrics)
        for name, of, split in wanted
        for task, of_task in zip(data[of].tasks, cfg.adapter_tasks(of), strict=True)
    }


def _evaluated(job: Job, by_name: Mapping[str, adapters.Adapter], wanted: Sequence[Wanted]) -> list[Scores]:
    """Evaluate in the same passes, whatever the tasks are; what is wanted twice, once."""
    cells = _cells(job.cfg, job.tasks, wanted)
    results = evaluate.run_cells(
        job.base, by_name, list(cells.values()), microbatch_tokens=job.cfg.train.microbatch_tokens
    )
    found = dict(zip(cells, results, strict=True))
    scored = []
    for name, of, split in wanted:
        of_tasks = [found[name, id(task), split] for task in job.tasks[of].tasks]
        metrics = job.tasks[of].scores([result.metrics for result in of_tasks])
        scored.append(Scores(metrics, of_tasks[0].seconds))
    return scored


def reported_split(*tasks: TaskData) -> Split:
    """What the summary's before and after are measured on: the test split, where every task has one."""
    return "test" if all(task.test for task in tasks) else "validation"


def _evaluate(job: Job, due: Sequence[str]) -> None:
    """Adapters on the validation splits of their tasks; keep those rows that are better than ever."""
    by_name = {name: job.state.cohort[name] for name in due}
    results = _evaluated(job, by_name, [(name, name, "validation") for name in due])
    for name, result in zip(due, results, strict=True):
        metric = job.cfg.deciding_metric(name)
        progress = job.state.progress[name]
        is_better = not progress.best or result.metrics[metric] > progress.best[metric]
        is_usable = bool(step.usable({name: job.state.cohort[name]}))  # NaN may guess well
        if is_better and is_usable:
            progress.best, progress.best_step, progress.stale_evaluations = result.metrics, job.state.step, 0
            job.state.best_rows[name] = _values(job.state.cohort[name])
        elif is_usable and not progress.nonfinite_steps:  # while steps change nothing it may be failing
            progress.stale_evaluations += 1
        _record_evaluation(job, name, "validation", result)


def _record_evaluation(job: Job, name: str, split: str, result: Scores) -> None:
    row = records.EvaluationRecord(
        step=job.state.step, adapter=name, split=split, metrics=result.metrics, seconds=result.seconds
    )
    job.journal.record(row)


def _values(adapter: adapters.Adapter) -> torch.Tensor:
    """A copy of what passes see of the adapter."""
    with torch.no_grad():
        return adapter.folded().values.detach().clone()


def _save_adapters(job: Job) -> None:
    """What each adapter is now, and its best."""
    for name, adapter in job.state.cohort.items():
        progress = job.state.progress[name]
        kept = {"last": (_values(adapter), progress.steps)}
        if name in job.state.best_rows:
            kept["best"] = (job.state.best_rows[name], progress.best_step)
        for which, (values, at_step) in kept.items():
            if job.saved_at.get((name, which)) == at_step:
                continue
            if bool(torch.isfinite(values).all()):  # an adapter that failed is nobody's to load
                _save_adapter(job, name, which, values, at_step)
                job.saved_at[name, which] = at_step


def _save_adapter(job: Job, name: str, which: str, values: torch.Tensor, at_step: int) -> int:
    cfg, base = job.cfg, job.base
    card = AdapterCard(
        base=BaseCard.of(cfg.base, base.digest, base.model.config),
        task=TaskTemplate.of(cfg.adapter_task(name)),
        more_tasks=tuple(TaskTemplate.of(task) for task in cfg.adapters[name].more_tasks),
        mixture=job.tasks[name].shares if cfg.adapters[name].more_tasks else {},
        run=cfg.name,
        fingerprint=job.identity.fingerprint,
        init=cfg.adapters[name].init,
        start=job.starts[name],
        step=at_step,
        metrics=dict(job.state.progress[name].best) if which == "best" else {},
    )
    return files.save(job.state.cohort[name].with_values(values), job.cfg.adapters_dir / name / which, card=card)


def _finish(job: Job, seconds: float) -> records.RunSummary:
    """Score the best adapters on the reported split and sum the run up."""
    state = job.state
    best = {name: state.cohort[name].with_values(values) for name, values in state.best_rows.items()}
    splits = {name: reported_split(*job.tasks[name].tasks) for name in best}
    after: dict[str, dict[str, float]] = {}
    results = _evaluated(job, best, [(name, name, split) for name, split in splits.items()])
    for (name, split), result in zip(splits.items(), results, strict=True):
        after[name] = result.metrics
        _record_evaluation(job, name, split, result)
    ended = summary.make(
        summary.steps_of_rank_0(job.cfg, job.journal, step=state.step),
        job.plan,
        name=job.cfg.name,
        is_packed=job.base.is_packed,
        seconds=seconds,
        peak_rank_bytes=max(comm.gather_objects(job.memory.peak_bytes())),
        adapters={name: _adapter_summary(job, name, after.get(name, {})) for name in state.cohort},
    )
    job.journal.write(lambda: records.write_summary(job.cfg.summary_path, ended))
    return ended


def _adapter_summary(job: Job, name: str, after: dict[str, float]) -> records.AdapterSummary:
    adapter, progress = job.state.cohort[name], job.state.progress[name]
    is_kept = name in job.state.best_rows
    return records.AdapterSummary(
        dir=str(job.cfg.adapters_dir / name / "best") if is_kept else "",
        file_bytes=files.expected_bytes(*peft_format.flat(_values(adapter)).shape) if is_kept else 0,
        trainable_parameters=sum(p.numel() for p in adapter.parameters()),
        train_loss=progress.last_loss or 0.0,
        steps=progress.steps,
        stopped=progress.reason,
        before=progress.before,
        after=after,
    )
