"""Session: adapters that are trained from Python, step by step, on texts that the caller brings.

The functions are those that a run file goes through, so the numbers are its numbers too; what to train on, when to look
and when to stop is the caller's. Loading the base is `session.opening`. Checkpoints, early stop and restarts are
`train.worker`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch

from peftscale.adapters import Cohort, build_cohort, files
from peftscale.adapters.manifest import AdapterCard, BaseCard, StartCard, TaskTemplate
from peftscale.base.load import Base
from peftscale.config import AdapterConfig, Optimizer, Schedule
from peftscale.data import pairs
from peftscale.data.batches import training_items
from peftscale.data.pairs import Pair
from peftscale.data.tasks import Example, TaskData
from peftscale.data.tokens import Ids, TextEncoder
from peftscale.errors import AdapterError, ConfigError, DataError, PeftscaleError
from peftscale.session.opening import load_base, ranks
from peftscale.session.settings import ENDLESS, Settings, checked
from peftscale.train import comm, evaluate, setup, step
from peftscale.train.optim import AdapterOptimizer
from peftscale.train.step import StepResult

log = logging.getLogger(__name__)

__all__ = ["Base", "Batch", "Session", "StepResult", "load_base", "ranks"]

Batch = Mapping[str, Sequence[Pair]]
"""For each adapter (input, target) pairs; a target stands directly behind its input, its blank included."""
T = TypeVar("T")


class Session:
    """A cohort of adapters over one base. Under several ranks each of them makes the same calls with the same texts."""

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, AdapterConfig],
        *,
        optimizer: Optimizer,
        learning_rate: float,
        weight_decay: float = 0.0,
        adam_epsilon: float | None = None,
        schedule: Schedule = "constant",
        steps: int | None = None,
        warmup_steps: int = 0,
        clip_norm: float | None = None,
        network_learning_rate: float | None = None,
        seed: int = 0,
        microbatch_tokens: int = 2048,
    ) -> None:
        """Make the adapters at their starting values.

        Args:
            base: of `load_base`.
            adapters: name -> config, as `adapters` in a run file. `train` may change what an optimizer uses for one of
                them; the template of `task` is kept with the adapter that is saved, its data are not read.
            optimizer, learning_rate, weight_decay, adam_epsilon, schedule, warmup_steps, clip_norm,
                network_learning_rate: as `train` in a run file.
            steps: after which no more can be taken; needed by the schedules that end. None: no end.
            seed: of the starts of adapters that have none of their own.
            microbatch_tokens: as `train` has it in a run file; the result is the same.

        Raises:
            ConfigError: an argument is wrong; the message names it.
            DataError: ranks were given different ones.
            AdapterError: an adapter cannot start as asked for, or is a prefix and the base takes none.
        """
        given = {
            "adapters": dict(adapters),
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "adam_epsilon": adam_epsilon,
            "schedule": schedule,
            "steps": ENDLESS if steps is None else steps,
            "warmup_steps": warmup_steps,
            "clip_norm": clip_norm,
            "network_learning_rate": network_learning_rate,
            "seed": seed,
            "microbatch_tokens": microbatch_tokens,
        }
        self._cfg = _same_on_every_rank(lambda: checked(Settings, "peftscale.Session", given))
        unverified = comm.together(lambda: setup.verify_starts(self._cfg.adapters))
        if comm.rank() == 0:
            for text in unverified:
                log.warning(text)
        self.base = base
        self.cohort = build_cohort(self._cfg.adapters, base, seed=self._cfg.seed)
        """The adapters, by name."""
        self.num_steps = 0
        """Steps taken: the place in every schedule."""
        self._starts = {name: self._start(name) for name in self.cohort}
        self._steps_of = dict.fromkeys(self.cohort, 0)
        self._optimizers = {name: AdapterOptimizer.of(a, self._cfg.of(name)) for name, a in self.cohort.items()}
        self._encoder = TextEncoder(base.tokenizer, is_encoder_decoder=base.is_encoder_decoder)
        self._end_ids: Ids = (base.tokenizer.eos_token_id,) if base.is_encoder_decoder else ()

    @property
    def end(self) -> str:
        """What ends a text of this base, to be put behind targets that `generate` is to write: it learns to stop.

        Empty for an encoder-decoder base, where every target ends by itself.

        Raises:
            DataError: the base's tokenizer has no such token.
        """
        if self.base.is_encoder_decoder:
            return ""
        if self.base.tokenizer.eos_token is None:
            raise DataError("session.end: this base's tokenizer has no end-of-sequence token.")
        return str(self.base.tokenizer.eos_token)

    def step(self, batch: Batch) -> StepResult:
        """Train one step on a global batch: ranks share it among them.

        An adapter that is not in the batch stands still. One whose loss or gradient is not finite stays as it is and is
        named in `skipped`.

        Args:
            batch: for each adapter its examples, any number.

        Returns:
            `losses` by adapter, in nats a target token, before the update; `rates`, `skipped`, tokens, bytes.

        Raises:
            DataError: the batch cannot be used, or ranks were given different ones. Nothing has changed.
            ConfigError: an adapter has taken its `steps`.
        """
        for optimizer in self._optimizers.values():
            optimizer.clear()  # what a step that was interrupted has left, in a notebook
        of_step = _same_on_every_rank(lambda: self._examples(batch))
        over = [name for name in of_step if self.num_steps >= self._cfg.of(name).steps]
        if over:
            raise ConfigError(
                f"session.step: {', '.join(over)}: all {self._cfg.of(over[0]).steps} steps are taken. Raise steps, or "
                f"leave it out."
            )
        result = step.run(
            self.base,
            Cohort({name: self.cohort[name] for name in of_step}),
            self._optimizers,
            [
                item
                for name, examples in of_step.items()
                for item in training_items(
                    name,
                    self.cohort[name].num_positions,
                    examples,
                    decoder_length=self.cohort[name].num_positions - self.cohort[name].length,
                )
            ],
            step=self.num_steps,
            microbatch_tokens=self._cfg.microbatch_tokens,
        )
        self.num_steps += 1
        for name in of_step:
            self._steps_of[name] += 1
        return result

    def score(self, batch: Batch) -> dict[str, list[float]]:
        """Log-likelihood of each target behind its input and its adapter, in nats; nothing is trained.

        Raises:
            DataError: as `step`.
        """
        given = _same_on_every_rank(lambda: self._examples(batch))
        cells = [evaluate.Cell(name, pairs.to_score(examples), examples, ()) for name, examples in given.items()]
        results = evaluate.run_cells(self.base, self.cohort, cells, microbatch_tokens=self._cfg.microbatch_tokens)
        return {
            name: [of_target for (of_target,) in result.likelihoods]
            for name, result in zip(given, results, strict=True)
        }

    def choose(self, adapter: str | None, texts: Sequence[str], words: Sequence[str]) -> list[str]:
        """For each text the likeliest of `words` behind it, as `peftscale evaluate` scores labels.

        Args:
            adapter: its name; None: the base without any.
            texts: what the base reads.
            words: at least two, each with the blank that stands in front of it.

        Raises:
            DataError: as `step`; a word that begins with the tokens of another.
        """
        return self._answers(
            adapter, lambda: pairs.to_choose(texts, words, self._encoder, max_tokens=self._room(adapter))
        )

    def generate(self, adapter: str | None, texts: Sequence[str], *, max_new_tokens: int = 64) -> list[str]:
        """For each text a greedy continuation, up to the token that ends a text or `max_new_tokens`.

        Args:
            adapter: its name; None: the base without any.

        Raises:
            DataError: as `step`.
        """
        return self._answers(
            adapter,
            lambda: pairs.to_continue(
                texts, self._encoder, max_tokens=self._room(adapter), max_new_tokens=max_new_tokens
            ),
        )

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write each adapter, as it is now, to `directory`/NAME; rank 0 writes. What stands there is replaced.

        Every adapter that can be written is, also where another cannot.

        Returns:
            The directory of each adapter, for `peftscale evaluate` and `inspect`, and for PEFT.

        Raises:
            AdapterError: values that are not finite, or a place that cannot be written.
        """
        places = {name: Path(directory) / name for name in self.cohort}

        def write() -> None:
            failures = []
            for name, place in places.items() if comm.rank() == 0 else ():
                try:
                    files.save(self.cohort[name], place, card=self._card(name))
                except AdapterError as error:
                    failures.append(str(error))
            if failures:
                raise AdapterError("\n".join(failures))

        comm.together(write)
        return places

    def _start(self, name: str) -> StartCard:
        cfg = self._cfg.adapters[name]
        with torch.no_grad():
            values = self.cohort[name].folded().values.detach()
        return StartCard.of(cfg, seed=cfg.seed_in(self._cfg.seed), values=values)

    def _card(self, name: str) -> AdapterCard:
        cfg = self._cfg.adapters[name]
        return AdapterCard(
            base=BaseCard.of(self.base.cfg, self.base.digest, self.base.model.config),
            task=None if cfg.task is None else TaskTemplate.of(cfg.task),
            run=None,
            fingerprint=None,
            init=cfg.init,
            start=self._starts[name],
            step=self._steps_of[name],
        )

    def _room(self, adapter: str | None) -> int | None:
        """Positions that an adapter leaves for a text and what stands behind it."""
        if adapter is not None and adapter not in self.cohort:
            known = ", ".join(map(repr, self.cohort))
            raise DataError(f"{adapter!r} is no adapter of this session; it has {known}.")
        return self.base.room(0 if adapter is None else self.cohort[adapter].length)

    def _examples(self, batch: Batch) -> dict[str, tuple[Example, ...]]:
        """The examples of each adapter of the batch, in the order of the cohort."""
        if not batch:
            raise DataError("batch: must name at least one adapter, got none.")
        room = {name: self._room(name) for name in batch}
        return {
            name: pairs.examples(
                batch[name], self._encoder, where=f"batch[{name!r}]", max_tokens=room[name], end_ids=self._end_ids
            )
            for name in self.cohort
            if name in batch
        }

    def _answers(self, adapter: str | None, ask: Callable[[], TaskData]) -> list[str]:
        name = evaluate.BASE_ALONE if adapter is None else adapter
        _, task = _same_on_every_rank(lambda: (name, ask()))
        (result,) = evaluate.run_cells(
            self.base,
            self.cohort,
            [evaluate.Cell(name, task, task.test, ())],
            microbatch_tokens=self._cfg.microbatch_tokens,
        )
        return [task.words[answer] if isinstance(answer, int) else answer for answer in result.predictions]


def _same_on_every_rank(work: Callable[[], T]) -> T:
    """What this rank makes of its arguments, if all ranks make the same of theirs.

    With other texts they would make another number of passes, and wait for each other until the time-out; with another
    seed they would train other prompts, each by the gradients of all.
    """
    made: T | None = None
    failure: PeftscaleError | None = None
    try:
        made = work()
    except PeftscaleError as error:
        failure = error
    is_same = comm.is_same(repr(made).encode())  # also where it failed: the others wait here
    if failure is not None:
        raise failure
    if not is_same:
        raise DataError(
            f"rank {comm.rank()} was given something else than another rank. Every rank makes the same calls with the "
            f"same arguments and the whole batch; sharing it among them is done here."
        )
    return cast(T, made)
