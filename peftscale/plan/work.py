"""Work of one rank: passes and tokens of a step, and the largest passes of steps and of evaluations.

Here as the run file alone tells it; a run counts it again when it has its data (`train.workload`). What it costs is
`memory` and `pace`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from peftscale.config import RunConfig, TaskConfig
from peftscale.facts import BaseFacts
from peftscale.plan.adapters import positions


@dataclass(frozen=True, slots=True)
class PassSize:
    """The most that one pass through the base has of each of these, virtual tokens and padding included."""

    tokens: int
    """With the room for what is written."""
    rows: int
    targets: int
    """Positions whose logits are made; none where texts are written."""
    row_tokens: int
    """Of the longest row, without its targets and what it writes."""
    new_tokens: int = 0
    """Room of each row for what it writes."""
    shared_tokens: int = 0
    """Of packed passes: virtual tokens that each row sees and that are computed once, counted for every row."""

    def within(self, tokens: int) -> Self:
        """The same work in passes of at most so many tokens."""
        if tokens >= self.tokens:
            return self
        counts = (self.rows, self.targets, self.shared_tokens)
        rows, targets, shared = (math.ceil(count * tokens / self.tokens) for count in counts)
        return replace(self, tokens=tokens, rows=rows, targets=targets, shared_tokens=shared)


@dataclass(frozen=True, slots=True)
class Work:
    """What the rank that has most has to compute."""

    passes_per_step: int
    """0 where nothing is trained."""
    tokens_per_step: int
    step: PassSize
    evaluated: tuple[PassSize, ...]
    """Of labels that are compared and of texts that are written, those that there are."""

    @property
    def most_tokens(self) -> int:
        """Of any pass."""
        return max(size.tokens for size in (self.step, *self.evaluated))

    def within(self, tokens: int) -> Self:
        """Memory's view of smaller passes: how many a step then has is left as it was."""
        return replace(
            self, step=self.step.within(tokens), evaluated=tuple(size.within(tokens) for size in self.evaluated)
        )


def expected(cfg: RunConfig, facts: BaseFacts, *, world: int) -> Work:
    """Of a run file: every text as long as task.max_text_tokens; where that is not given, a step of one full pass whose
    texts are of one length."""
    most, limit, rows = cfg.train.microbatch_tokens, max_text_tokens(cfg), step_rows(cfg, world)
    virtual, target = _virtual(cfg, facts), most_target_tokens(cfg)
    if limit is None:
        text = max(1, min(most, math.ceil(most / rows)) - max(virtual))
        tokens, passes, in_step = most, 1, most
    else:
        text, row = limit, longest_row(cfg, facts)
        tokens = min(most, rows * row)  # a row alone may be more: that is named as a problem
        passes = math.ceil(rows / max(1, most // row))
        in_step = min(passes * tokens, rows * (text + target) + _prompt_tokens(cfg, facts, world=world, passes=passes))
    # Rows as short as they can be, as many as there are.
    num = max(1, min(rows, tokens // (min(virtual) + 1 + target)))
    full = min(rows, math.ceil(tokens / (text + target)))
    shared = full * max(virtual) if _is_packed(cfg, facts) else 0
    step = PassSize(tokens, num, num * target, min(tokens, max(virtual) + text), shared_tokens=shared)
    if cfg.method == "few_shot":
        passes, in_step, step = 0, 0, PassSize(0, 0, 0, 0)
    return Work(passes, in_step, step, _evaluated(cfg, text=text, virtual=max(virtual)))


def _evaluated(cfg: RunConfig, *, text: int, virtual: int) -> tuple[PassSize, ...]:
    """A split has rows for full passes. They are most without a prompt: the base is scored alone too."""
    most, found = cfg.train.microbatch_tokens, []
    kinds: tuple[Callable[[TaskConfig], bool], ...] = (lambda t: t.labels is not None, lambda t: t.labels is None)
    for are_meant in kinds:
        targets = [target_tokens(task) for task in tasks(cfg) if are_meant(task)]
        if targets:
            rows, is_written = max(1, most // (text + max(targets))), are_meant is kinds[1]
            num = 0 if is_written else rows * max(targets)
            found.append(PassSize(most, rows, num, min(most, virtual + text), max(targets) if is_written else 0))
    return tuple(found)


def tasks(cfg: RunConfig) -> list[TaskConfig]:
    """All that the run trains on or scores."""
    if cfg.method != "adapters":
        return [cfg.task]
    return [task for name in cfg.adapters for task in cfg.adapter_tasks(name)]


def max_text_tokens(cfg: RunConfig) -> int | None:
    """Of all tasks; None where one has no limit."""
    limits = [task.max_text_tokens for task in tasks(cfg)]
    return None if None in limits else max(limit for limit in limits if limit is not None)


def target_tokens(task: TaskConfig) -> int:
    """Most target tokens of one example; a label word has no more tokens than UTF-8 bytes."""
    if task.labels is None:
        return task.max_target_tokens
    return max(len(word.encode()) for word in task.labels.values()) + 1


def most_target_tokens(cfg: RunConfig) -> int:
    """Of one example of any task."""
    return max(target_tokens(task) for task in tasks(cfg))


def longest_row(cfg: RunConfig, facts: BaseFacts) -> int:
    """Tokens; with texts of one token where they have no limit."""
    return max(_virtual(cfg, facts)) + (max_text_tokens(cfg) or 1) + most_target_tokens(cfg)


def step_rows(cfg: RunConfig, world: int) -> int:
    """Examples of one step, of all adapters, on the rank that has most."""
    if cfg.method != "adapters":
        return math.ceil(cfg.baseline_train.examples_per_step / world)
    return math.ceil(sum(cfg.adapter_train(name).examples_per_step for name in cfg.adapters) / world)


def decoder_tokens(cfg: RunConfig, size: PassSize) -> int:
    """Tokens of one pass that go through the decoder of an encoder-decoder: targets or what is written, the start of
    that, and what stands in front of them."""
    virtual = 0
    if cfg.method == "adapters":
        virtual = max(a.decoder_length if a.kind == "prompt" else a.length for a in cfg.adapters.values())
    starts = size.rows if size.new_tokens else 0  # a target has the start token in its first place
    return min(size.tokens, size.targets + size.rows * (virtual + size.new_tokens) + starts)


def _virtual(cfg: RunConfig, facts: BaseFacts) -> list[int]:
    """Virtual tokens of a row of each adapter."""
    return [positions(a, facts) for a in cfg.adapters.values()] if cfg.method == "adapters" else [0]


def _is_packed(cfg: RunConfig, facts: BaseFacts) -> bool:
    return cfg.method == "adapters" and cfg.train.packing == "auto" and not facts.is_encoder_decoder


def _prompt_tokens(cfg: RunConfig, facts: BaseFacts, *, world: int, passes: int) -> int:
    """Virtual tokens of a step. Packed passes, where they are not off, compute a prompt once each."""
    virtual = _virtual(cfg, facts)
    if _is_packed(cfg, facts):
        return max(passes * max(virtual), math.ceil(sum(virtual) / world))
    return step_rows(cfg, world) * max(virtual)
