"""Prompt design: solved examples in front of each input, nothing trained; calibrated on inputs that say nothing.

The demonstrations are a soft prompt whose rows are the embeddings of their tokens. So they go through our own base,
quantised and sharded as adapters do, and are computed once a pass instead of once an input.

Source: Brown et al. 2020, arXiv:2005.14165, section 2.4 (k examples, a blank line between them; likelihoods of
labels are compared whole, not a token of them);
Zhao et al. 2021, arXiv:2102.09690, section 5 (contextual calibration: N/A, [MASK] and nothing for an input, the mean of
what the labels get behind them, divided by).
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peftscale import records
from peftscale.adapters import SoftPrompt
from peftscale.base.load import Base
from peftscale.baseline_config import FewShotConfig
from peftscale.baselines import budget
from peftscale.baselines import task as baseline_task
from peftscale.config import Metric, RunConfig
from peftscale.data import batches, tasks
from peftscale.data.tasks import Example, TaskData
from peftscale.data.template import Template
from peftscale.data.tokens import Ids, TextEncoder
from peftscale.errors import ConfigError, DataError
from peftscale.records import AdapterSummary, EvaluationRecord, RunSummary
from peftscale.train import comm, evaluate, memory, setup, summary, worker, workload
from peftscale.train.evaluate import BASE_ALONE, Cell, Evaluation
from peftscale.train.journal import Journal, Watch

CONTENT_FREE = ("N/A", "[MASK]", "")
_NAME = "few_shot"


@dataclass(frozen=True)
class Demonstrations:
    """What stands in front of every input."""

    rows: tuple[int, ...]
    """Of the train split, in the order in which they are shown."""
    ids: Ids
    """With what the tokenizer opens a text with; () where there is none."""
    num_start: int
    """Tokens that open a text, which an input behind them has no more."""

    def cell(
        self, cfg: RunConfig, base: Base, task: TaskData, examples: Sequence[Example], metrics: Sequence[Metric]
    ) -> Cell:
        """Examples as they stand behind them, to be evaluated.

        Raises:
            ConfigError: one does not fit.
        """
        room = base.room(len(self.ids))
        if not self.ids:
            return Cell(BASE_ALONE, task, examples, metrics)
        behind = [dataclasses.replace(one, input_ids=one.input_ids[self.num_start :]) for one in examples]
        longest = max(len(one.input_ids) + max(map(len, one.choices_ids), default=1) for one in behind)
        if room is not None and longest > room:
            raise ConfigError(
                f"few_shot.examples={len(self.rows)}: the demonstrations take {len(self.ids)} tokens and the longest "
                f"input with its answer {longest}, the base has {base.max_positions} positions (with longrope, "
                f"those of short texts). Lower it, or set task.max_text_tokens, which shortens both."
            )
        return Cell(_NAME, task, behind, metrics)


def run(cfg: RunConfig, device: torch.device, peak: memory.PeakMemory, watch: Watch) -> RunSummary:
    """Score the base with and without demonstrations. The same summary on every rank.

    Raises:
        ConfigError: more demonstrations than there are examples, or than fit.
        DataError: calibration where the template takes no text that says nothing.
    """
    assert cfg.few_shot is not None  # checked with the run file
    start = time.perf_counter()
    placed = setup.place(cfg.base, device)
    task = comm.together(lambda: baseline_task.load(cfg))
    peak.restart()  # data and its libraries are not the base's
    base = setup.load_base(cfg.base, placed, device)
    chosen, journal = setup.choose_packing(cfg, base), Journal(cfg, watch)
    shown = demonstrations(cfg, task, base)
    split = worker.reported_split(task)
    examples, metrics = task.split(split), cfg.task.metrics
    cells = [Cell(BASE_ALONE, task, examples, metrics), shown.cell(cfg, base, task, examples, metrics)]
    if cfg.few_shot.calibrated:
        free = content_free(cfg, base)
        cells.append(shown.cell(cfg, base, free, free.test, ()))
    adapters = {_NAME: SoftPrompt(base.embedding_rows(torch.tensor(shown.ids)))} if shown.ids else {}
    most = cfg.train.microbatch_tokens
    before, *found = evaluate.run_cells(base, adapters, cells, microbatch_tokens=most)
    after = finished(cfg.few_shot, cells[1], *found)
    again = "scores again what an earlier attempt did not finish" if cfg.metrics_path.exists() else None
    drawn = f"{len(shown.rows)} demonstrations, {len(shown.ids)} tokens, rows {list(shown.rows)} of train"
    for text in filter(None, (again, chosen, drawn)):
        journal.note(0, text)
    for title, scores in ((f"{split} without prompt", before.metrics), (split, after)):
        journal.record(EvaluationRecord(step=0, adapter=_NAME, split=title, metrics=scores, seconds=before.seconds))
    sizes = evaluate.pass_sizes(base, adapters, cells, microbatch_tokens=most)
    world = comm.world_size()
    work = workload.counted((), [sizes], world=world, microbatch_tokens=most, is_packed=base.is_packed)
    ended = summary.make(
        (),
        budget.of_evaluation(cfg, device, placed, world=world, work=work),
        name=cfg.name,
        is_packed=base.is_packed,
        seconds=time.perf_counter() - start,
        peak_rank_bytes=max(comm.gather_objects(peak.peak_bytes())),
        adapters={_NAME: _untrained(before.metrics, after)},
    )
    journal.write(lambda: records.write_summary(cfg.summary_path, ended))
    return ended


def demonstrations(cfg: RunConfig, task: TaskData, base: Base) -> Demonstrations:
    """Draw them from the train split: each as it is trained on, and the separator behind it.

    Raises:
        ConfigError: the split has too few, or the separator is no token.
    """
    assert cfg.few_shot is not None
    section = cfg.few_shot
    encoder = TextEncoder(base.tokenizer, is_encoder_decoder=base.is_encoder_decoder)
    num_start, num_end = len(encoder.start_ids), len(encoder.end_ids)
    if section.examples == 0:
        return Demonstrations((), (), num_start)
    (separator,) = encoder.inputs([section.separator])
    separator = separator[num_start : len(separator) - num_end]
    if section.examples > len(task.train):
        raise ConfigError(
            f"few_shot.examples={section.examples}: the train split of {task.name} has {len(task.train)}. Lower it."
        )
    if not separator:
        raise ConfigError(
            f"few_shot.separator={section.separator!r} is no token for this base's tokenizer; choose another text."
        )
    seed = cfg.seed if section.seed is None else section.seed
    rows = draw(task.train, section.examples, seed=seed)
    ids: list[int] = [*encoder.start_ids]
    for example in (task.train[row] for row in rows):
        target = example.target_ids
        if target[-1] == base.tokenizer.eos_token_id:
            target = target[:-1]
        ids += [*example.input_ids[num_start : len(example.input_ids) - num_end], *target, *separator]
    return Demonstrations(rows, tuple(ids), num_start)


def draw(examples: Sequence[Example], num: int, *, seed: int) -> tuple[int, ...]:
    """Rows to show, as many of each label as can be, in a random order. A function of the seed alone.

    Args:
        num: at most as many as there are examples.
    """
    order = batches.indices(seed, 0, len(examples), num_examples=len(examples))
    by_label: dict[int | None, list[int]] = {}
    for place in range(len(order)):
        by_label.setdefault(examples[order[place]].label, []).append(place)
    # In rounds over the labels: the first of each, the second of each, ...
    rounds = sorted((turn, places[turn]) for places in by_label.values() for turn in range(len(places)))
    return tuple(order[place] for place in sorted(place for _, place in rounds[:num]))


def content_free(cfg: RunConfig, base: Base) -> TaskData:
    """The task's template, filled with texts that say nothing: the test split of the result.

    Raises:
        DataError: the template cannot be filled with them.
    """
    columns = sorted(Template("task.input", cfg.task.input).names)
    try:
        return tasks.from_rows(
            cfg.task,
            base.tokenizer,
            [dict.fromkeys(columns, text) for text in CONTENT_FREE],
            max_tokens=base.max_positions,
            is_encoder_decoder=base.is_encoder_decoder,
        )
    except DataError as error:
        raise DataError(
            f"few_shot.calibrated: task.input cannot be filled with {', '.join(map(repr, CONTENT_FREE))} in every "
            f"column: {error} Set it to false for this task."
        ) from error


def calibrated(likelihoods: Sequence[Sequence[float]], free: Sequence[Sequence[float]]) -> list[int]:
    """The label of each example after calibration.

    Args:
        likelihoods: log-likelihoods of the labels' words, for each example.
        free: the same for inputs that say nothing.
    """
    prior_C = torch.tensor(free, dtype=torch.float64).softmax(-1).mean(0)
    return (torch.tensor(likelihoods, dtype=torch.float64) - prior_C.log()).argmax(-1).tolist()


def finished(
    section: FewShotConfig, cell: Cell, result: Evaluation, free: Evaluation | None = None
) -> dict[str, float]:
    """Scores after calibration, or of texts up to the separator."""
    if free is not None:
        return evaluate.score(cell, calibrated(result.likelihoods, free.likelihoods))
    if cell.task.labels or not section.examples:
        return result.metrics
    return evaluate.score(cell, [str(text).split(section.separator)[0] for text in result.predictions])


def _untrained(before: dict[str, float], after: dict[str, float]) -> AdapterSummary:
    return AdapterSummary(
        dir="", file_bytes=0, trainable_parameters=0, train_loss=0.0, steps=0, stopped=None, before=before, after=after
    )
