"""What a command prints: tables on standard error, one JSON object on standard output. Numbers are made elsewhere.

Of the ranks that torchrun starts only the first prints.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from peftscale.records import RunSummary


def show(content: RenderableType) -> None:
    """Print on standard error."""
    if _is_first_rank():
        Console(stderr=True).print(content)


def show_json(value: Mapping[str, Any]) -> None:
    """Print as the one JSON object of a command, on standard output."""
    if _is_first_rank():
        print(json.dumps(value, indent=1))


def note(line: str) -> None:
    """Print one line of text on standard error as it is: no markup, no breaks."""
    if _is_first_rank():
        print(line, file=sys.stderr)


def summary_table(summary: RunSummary) -> Table:
    """What a run did: a row an adapter, then measured figures beside predicted ones."""
    table = Table(title=f"{summary.name}: {summary.steps} steps, {summary.world_size} rank(s), {summary.sharding}")
    for column in ("", "measured", "predicted"):
        table.add_column(column, overflow="fold")
    for name, adapter in summary.adapters.items():
        for metric, after in adapter.after.items():
            before = adapter.before.get(metric)
            words = "" if before is None else f"{before:.4f} -> "
            table.add_row(f"{name}: {metric}, base alone -> tuned", f"{words}{after:.4f}", "")
        if adapter.stopped or adapter.steps < summary.steps:
            why = f" ({adapter.stopped})" if adapter.stopped else ""
            table.add_row(f"{name}: left after", f"{adapter.steps} steps{why}", "")
        table.add_row(f"{name}: tuned parameters", f"{adapter.trainable_parameters:,}", "")
        table.add_row(f"{name}: file bytes", f"{adapter.file_bytes:,}", "")
        table.add_row(f"{name}: directory", adapter.dir, "")
    for key in ("reduced_bytes_per_step", "gathered_bytes_per_step", "control_bytes_per_step", "peak_rank_bytes"):
        table.add_row(key.replace("_", " "), f"{getattr(summary, key):,}", f"{getattr(summary.predicted, key):,}")
    table.add_row("seconds", f"{summary.seconds:.1f}", "")
    table.add_row("tokens per second", f"{summary.tokens_per_s:,.0f}", "")
    return table


def scores_table(result: Mapping[str, Any]) -> Table:
    """`evaluate`: the base alone, then each adapter."""
    metrics = list(result["base"])
    table = Table(title=f"{result['split']} split, {result['examples']} examples")
    table.add_column("adapter", overflow="fold")
    for metric in metrics:
        table.add_column(metric)
    table.add_row("(base alone)", *(f"{result['base'][metric]:.4f}" for metric in metrics))
    for name, scored in result["adapters"].items():
        table.add_row(name, *(f"{scored['metrics'][metric]:.4f}" for metric in metrics))
    return table


def answers_table(rows: Sequence[Mapping[str, str]], result: Mapping[str, Any]) -> Table:
    """`generate`: a row an input, a column an adapter."""
    table = Table(show_lines=True)
    table.add_column("input")
    for name in result["adapters"]:
        table.add_column(name.rsplit("/", 2)[-2] if name.endswith(("/best", "/last")) else name)
    for i, row in enumerate(rows):
        table.add_row("\n".join(row.values()), *(answers[i] for answers in result["adapters"].values()))
    return table


def facts_table(title: str, values: Mapping[str, Any]) -> Table:
    """Keys and values."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    return table


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
