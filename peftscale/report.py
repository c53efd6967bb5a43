"""What a command prints: tables on standard error, one JSON object on standard output. Numbers are made elsewhere.

Of the ranks that torchrun starts only the first prints.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from peftscale.plan import pace
from peftscale.records import RunSummary
from peftscale.redaction import redacted

_NUM_WORDS = 12


def show(content: RenderableType) -> None:
    """Print on standard error."""
    if _is_first_rank():
        Console(stderr=True).print(content)


def show_json(value: Mapping[str, Any]) -> None:
    """Print as the one JSON object of a command, on standard output."""
    if _is_first_rank():
        print(redacted(json.dumps(value, indent=1)))


def note(line: str) -> None:
    """Print one line of text on standard error as it is: no markup, no breaks."""
    if _is_first_rank():
        print(redacted(line), file=sys.stderr)


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
        if adapter.dir:
            table.add_row(f"{name}: file bytes", f"{adapter.file_bytes:,}", "")
            table.add_row(f"{name}: directory", adapter.dir, "")
    keys = ["reduced_bytes_per_step", "gathered_bytes_per_step", "control_bytes_per_step", "peak_rank_bytes"]
    if summary.sharding == "node" or summary.gathered_between_nodes_bytes_per_step:
        keys.insert(2, "gathered_between_nodes_bytes_per_step")
    for key in keys:
        table.add_row(key.replace("_", " "), f"{getattr(summary, key):,}", f"{getattr(summary.predicted, key):,}")
    if summary.step_s is not None:
        step_s = summary.predicted.step_s
        table.add_row("seconds per step", f"{summary.step_s:.3g}", "" if step_s is None else f"{step_s:.3g}")
        table.caption = None if step_s is None else f"seconds are predicted at {pace.ASSUMED}"
    table.add_row("seconds", f"{summary.seconds:.1f}", "")
    table.add_row("tokens per second", f"{summary.tokens_per_s:,.0f}", "")
    return table


def scores_table(result: Mapping[str, Any]) -> Table:
    """`evaluate`: the base alone, each adapter, and those of them together, on every metric of every task."""
    tasks = result["tasks"]
    sizes = ", ".join(f"{name} {of_task['examples']} ({of_task['split']})" for name, of_task in tasks.items())
    table = Table(title=f"examples: {sizes}")
    table.add_column("adapter", overflow="fold")
    for name, of_task in tasks.items():
        for metric in next(iter(of_task["adapters"].values()))["metrics"]:
            table.add_column(f"{name}\n{metric}" if len(tasks) > 1 else metric)
    rows: dict[str, list[Mapping[str, float | None]]] = {}
    for of_task in tasks.values():
        if "base" in of_task:
            rows.setdefault("(base alone)", []).append(of_task["base"])
        for name, scored in of_task["adapters"].items():
            rows.setdefault(name, []).append(scored["metrics"])
        for way in ("average", "best", "vote", "likelihood"):
            if any(way in one.get("ensemble", {}) for one in tasks.values()):
                nothing = dict.fromkeys(of_task["base"])
                rows.setdefault(f"({way})", []).append(of_task.get("ensemble", {}).get(way, nothing))
    for name, of_tasks in rows.items():
        values = (value for metrics in of_tasks for value in metrics.values())
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in values))
    return table


def scores_json(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `evaluate --json` prints: where there is one task, its keys stand in the place of `tasks`."""
    if len(result["tasks"]) > 1:
        return result
    (name, of_task) = next(iter(result["tasks"].items()))
    return {"task": name, **of_task, "notes": result["notes"]}


def transfer_table(result: Mapping[str, Any]) -> Table:
    """`transfer`: a row a method, a column a task; of tasks that were not trained on the difference too. The base
    alone stands in each cell, as methods may have different bases."""
    percent = f"{result['confidence']:.0%}"
    table = Table(title=f"mean, deviation and {percent} interval over seeds", show_lines=True)
    table.add_column("method")
    tasks = {task: on["split"] for of_method in result["methods"].values() for task, on in of_method["tasks"].items()}
    for task, split in tasks.items():
        table.add_column(f"{task}\n{split} split")
    for name, of_method in result["methods"].items():
        cells = []
        for task in tasks:
            found = of_method["tasks"].get(task)
            if found is None:
                cells.append("")
                continue
            where = "trained on" if task == of_method["task"] else "difference not known: no metric of both"
            shift = f"difference {_band(found['shift'], '+')}" if found["shift"] else where
            alone = "" if found["untuned"] is None else f"\nbase alone {found['untuned']:.4f}"
            cells.append(f"{found['metric']} {_band(found)}\n{shift}{alone}")
        table.add_row(f"{name}\n{len(of_method['seeds'])} seed(s)", *cells)
    return table


def _band(values: Mapping[str, Any], sign: str = "") -> str:
    mean = f"{values['mean']:{sign}.4f}"
    if values["deviation"] is None:
        return mean
    return f"{mean} +- {values['deviation']:.4f} ({values['low']:{sign}.4f} to {values['high']:{sign}.4f})"


def library_table(result: Mapping[str, Any]) -> Table:
    """`similar`: the adapters of a library, the most similar first."""
    table = Table(title=f"cosine with {result['adapter']}")
    for column in ("mean tokens", "token pairs", "task", "length", "adapter"):
        table.add_column(column, overflow="fold")
    for row in result["library"]:
        figures = (f"{row['mean_tokens']:+.4f}", f"{row['token_pairs']:+.4f}")
        table.add_row(*figures, row["task"] or "", str(row["length"]), row["directory"])
    return table


def reading_tables(reading: Mapping[str, Any]) -> list[Table]:
    """`inspect` with a base: the layers of a prefix, or each virtual token and then all of them beside the control."""
    if "layers" in reading:
        layers = Table(title="mean norms of a virtual token and head")
        for column in ("layer", "keys", "values"):
            layers.add_column(column)
        for layer in reading["layers"]:
            layers.add_row(str(layer["layer"]), f"{layer['keys']:.4f}", f"{layer['values']:.4f}")
        return [layers]
    tokens = Table(title="virtual tokens and their nearest words by cosine")
    for column in ("", "norm", "start", "moved", "neighbours", "forms of one word"):
        tokens.add_column(column, overflow="fold")
    for token in reading["tokens"]:
        near = "  ".join(f"{one['text']!r} {one['cosine']:.2f}" for one in token["neighbours"])
        came = ("", "")
        if "start" in token:
            came = (f"{token['start']!r} {token['start_cosine']:.2f}", f"{token['moved']:.3f}")
        family = "  ".join(map(repr, token["family"])) if len(token["family"]) > 1 else ""
        tokens.add_row(str(token["token"]), f"{token['norm']:.3f}", *map(Text, (*came, near, family)))
    whole = Table(title="the prompt beside random rows of equal norms")
    for column in ("", "prompt", "random"):
        whole.add_column(column, overflow="fold")
    for key, value in reading["prompt"].items():
        whole.add_row(key.replace("_", " "), _in_words(value), _in_words(reading["control"][key]))
    return [tokens, whole]


def _in_words(value: Any) -> str:
    """A figure, or counts and places of the first few words."""
    if isinstance(value, Mapping):
        return "  ".join(f"{key} {places}" for key, places in list(value.items())[:_NUM_WORDS]) or "none"
    return f"{value:.4f}"


def answers_table(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Table:
    """`generate`: a row an input, a column an adapter."""
    table = Table(show_lines=True)
    table.add_column("input")
    for name in result["adapters"]:
        table.add_column(name.rsplit("/", 2)[-2] if name.endswith(("/best", "/last")) else name)
    for i, row in enumerate(rows):
        table.add_row("\n".join(map(str, row.values())), *(answers[i] for answers in result["adapters"].values()))
    return table


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """`tasks`: a row a task; local sizes where they were counted."""
    table = Table()
    is_local = any("local_sizes" in task for task in tasks.values())
    for column in ("task", "answers", "metrics", "hub", "train / validation / test", *(["local"] if is_local else [])):
        table.add_column(column, overflow="fold")
    for name, task in tasks.items():
        sizes = [task["sizes"], *([task["local_sizes"] or {}] if is_local else [])]
        counts = [" / ".join(f"{num:,}" for num in of_one.values()) or "-" for of_one in sizes]
        hub = " ".join(filter(None, (task["hub"] or {"": "(local files)"}).values()))
        table.add_row(name, task["kind"], ", ".join(task["metrics"]), hub, *counts)
    return table


def facts_table(title: str, values: Mapping[str, Any]) -> Table:
    """Keys and values, but those that there are none of."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in values.items():
        if _is_there(value):
            table.add_row(key.replace("_", " "), Text(_fact(value)))
    return table


def _is_there(value: Any) -> bool:
    return value is not None and value not in ([], {})


def _fact(value: Any) -> str:
    """A line a part of what has parts; words of parts in them are quoted, as their blanks count."""
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_part(part)}" for key, part in value.items() if _is_there(part))
    if isinstance(value, list):
        return ("\n\n" if isinstance(value[0], Mapping) else ", ").join(map(_fact, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _part(value: Any) -> str:
    return ", ".join(f"{key} {word!r}" for key, word in value.items()) if isinstance(value, Mapping) else _fact(value)


def status_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row a run."""
    table = Table()
    for column in ("run", "state", "step", "loss", "score, best", "tokens/s", "left", "last sign", "checkpoint"):
        table.add_column(column, overflow="fold")
    for run in runs:
        losses = [loss for loss in run["losses"].values() if isinstance(loss, float)]
        loss = "" if not losses else f"{min(losses):.4f}"
        scores = [next(iter(metrics.values())) for metrics in run["scores"].values() if metrics]
        table.add_row(
            run["name"],
            run["state"],
            f"{run['step']}/{run['num_steps']}",
            loss if len(losses) < 2 else f"{loss}..{max(losses):.4f}",
            f"{max(scores):.4f}" if scores else "",
            "" if run["tokens_per_s"] is None else f"{run['tokens_per_s']:,.0f}",
            "" if run["seconds_left"] is None else str(timedelta(seconds=round(run["seconds_left"]))),
            f"{timedelta(seconds=round(run['silent_seconds']))} ago",
            run["checkpoint"] or "",
        )
        if run["error"]:
            table.add_row("", Text(run["error"], style="bold"))
    return table


def _is_first_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
