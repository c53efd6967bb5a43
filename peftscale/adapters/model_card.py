"""The README.md of an adapter directory: a model card for people and for the hub. Nothing reads it back."""

import json

from peftscale.adapters.cohort import Folded
from peftscale.adapters.manifest import AdapterCard, TaskTemplate
from peftscale.adapters.prefix import Prefix


def text(card: AdapterCard, adapter: Folded, *, num_file_bytes: int) -> str:
    """The card of a soft prompt or a prefix, with the metadata that PEFT's own cards carry.

    Args:
        card: what the run knows.
        adapter: for its kind and sizes.
        num_file_bytes: of the weights.
    """
    model, is_prefix = card.base.model, isinstance(adapter, Prefix)
    at_revision = f" at revision `{card.base.revision}`" if card.base.revision else ""
    lines = [
        "---",
        f"base_model: {json.dumps(model)}",  # JSON strings are YAML strings, whatever is in them
        f"library_name: {'peft' if _is_peft(adapter) else 'peftscale'}",
        *([] if card.base.is_encoder_decoder else ["pipeline_tag: text-generation"]),
        "tags:",
        f"- {json.dumps(f'base_model:adapter:{model}')}",
        "- prefix-tuning" if is_prefix else "- prompt-tuning",
        "- peftscale",
        "---",
        "",
        f"# {'Prefix' if is_prefix else 'Soft prompt'} of {adapter.length} tokens"
        + (f" for {card.task_names}" if card.task else ""),
        "",
        *_what(adapter, is_encoder_decoder=card.base.is_encoder_decoder),
        "",
        "| | |",
        "|---|---|",
        f"| base | `{model}`{at_revision} |",
        f"| base digest | `{card.base.digest}` |",
        *_origin_lines(card),
        f"| file | {num_file_bytes:,} bytes |",
        *_task_lines(card),
        *_metric_lines(card.metrics),
        "",
        "## Use",
        "",
        *_use(model, "AutoModelForSeq2SeqLM" if card.base.is_encoder_decoder else "AutoModelForCausalLM", adapter),
        "",
        "`peftscale inspect <this directory>` checks the files and prints what is known about them.",
    ]
    return "\n".join(lines) + "\n"


def _origin_lines(card: AdapterCard) -> list[str]:
    if card.init == "imported":
        return [f"| imported | from another program, with run file `{card.fingerprint}` of {card.run} |"]
    return [
        f"| trained through | {card.base.quantization} weights, {card.base.compute_dtype} |",
        f"| started from | {card.init} |",
        f"| run | {_run(card)} |",
    ]


def _run(card: AdapterCard) -> str:
    if card.run is None:
        return f"none: {card.step} steps of a Python session"
    return f"{card.run}, step {card.step}, run file `{card.fingerprint}`"


def _is_peft(adapter: Folded) -> bool:
    """Whether PEFT can express it."""
    return not (adapter.parts if isinstance(adapter, Prefix) else adapter.decoder_length)


def _what(adapter: Folded, *, is_encoder_decoder: bool) -> tuple[str, str]:
    if isinstance(adapter, Prefix):
        kinds = ": the encoder's, the decoder's and its cross attention's" if adapter.parts else ""
        return (
            f"{adapter.length} trained keys and values, {adapter.shape.width} numbers each over all layers, in front "
            f"of those of every attention layer{kinds}.",
            "The language model itself is unchanged (Li and Liang 2021, arXiv:2101.00190).",
        )
    inputs = "the encoder's input embeddings" if is_encoder_decoder else "the input embeddings"
    more = f", and {adapter.decoder_length} in front of the decoder's" if adapter.decoder_length else ""
    return (
        f"{adapter.length} trained vectors of {adapter.hidden_size} numbers in front of {inputs}{more}.",
        "The language model itself is unchanged (Lester et al. 2021, arXiv:2104.08691).",
    )


def _use(model: str, auto_class: str, adapter: Folded) -> list[str]:
    if not _is_peft(adapter):
        return ["PEFT has no such adapter. Use it through peftscale."]
    return [
        "    from peft import PeftModel",
        f"    from transformers import {auto_class}",
        "",
        f"    model = {auto_class}.from_pretrained({model!r})",
        '    model = PeftModel.from_pretrained(model, "<this directory>")',
    ]


def _task_lines(card: AdapterCard) -> list[str]:
    if card.task is None:
        return []
    tasks = (card.task, *card.more_tasks)
    lines = [] if len(tasks) == 1 else ["", "It was trained on several tasks at once."]
    for task in tasks:
        share = f" ({card.mixture[task.name]:,} examples an epoch)" if task.name in card.mixture else ""
        title = "Task" if len(tasks) == 1 else f"Task {task.name}{share}"
        lines += ["", f"## {title}", "", *_template_lines(task, is_encoder_decoder=card.base.is_encoder_decoder)]
    return lines


def _template_lines(task: TaskTemplate, *, is_encoder_decoder: bool) -> list[str]:
    words = [f"    {key} -> {word!r}" for key, word in (task.labels or {}).items()]
    return [
        "The base reads:",
        "",
        *_indented(task.input + ("" if is_encoder_decoder else task.cue)),
        "",
        "and writes:",
        "",
        *(words or _indented(task.target)),
    ]


def _metric_lines(metrics: dict[str, float | None]) -> list[str]:
    if not metrics:
        return []
    rows = [f"| {name} | {'not finite' if value is None else f'{value:.4f}'} |" for name, value in metrics.items()]
    return ["", "## Validation", "", "| metric | value |", "|---|---|", *rows]


def _indented(block: str) -> list[str]:
    return [f"    {line}" for line in block.splitlines()]
