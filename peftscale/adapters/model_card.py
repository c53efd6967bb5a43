"""The README.md of an adapter directory: a model card for people and for the hub. Nothing reads it back."""

import json

from peftscale.adapters.manifest import AdapterCard, TaskTemplate

_WHAT = {
    False: (
        "{length} trained vectors of {width} numbers that are placed in front of the input embeddings of a",
        "frozen language model (Lester et al. 2021, arXiv:2104.08691). The model itself is unchanged.",
    ),
    True: (
        "{length} trained keys and values, {width} numbers each over all layers, in front of those of every attention",
        "layer of a frozen language model (Li and Liang 2021, arXiv:2101.00190). The model itself is unchanged.",
    ),
}


def text(card: AdapterCard, *, length: int, width: int, is_prefix: bool, num_file_bytes: int) -> str:
    """The card of a soft prompt or a prefix, with the metadata that PEFT's own cards carry.

    Args:
        card: what the run knows.
        length: virtual tokens.
        width: numbers of one of them.
        is_prefix: else a prompt.
        num_file_bytes: of the weights.
    """
    model = card.base.model
    at_revision = f" at revision `{card.base.revision}`" if card.base.revision else ""
    lines = [
        "---",
        f"base_model: {json.dumps(model)}",  # JSON strings are YAML strings, whatever is in them
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {json.dumps(f'base_model:adapter:{model}')}",
        "- prefix-tuning" if is_prefix else "- prompt-tuning",
        "- peftscale",
        "---",
        "",
        f"# {'Prefix' if is_prefix else 'Soft prompt'} of {length} tokens"
        + (f" for {card.task.name}" if card.task else ""),
        "",
        *(line.format(length=length, width=width) for line in _WHAT[is_prefix]),
        "",
        "| | |",
        "|---|---|",
        f"| base | `{model}`{at_revision} |",
        f"| base digest | `{card.base.digest}` |",
        f"| trained through | {card.base.quantization} weights, {card.base.compute_dtype} |",
        f"| started from | {card.init} |",
        f"| run | {card.run}, step {card.step}, run file `{card.fingerprint}` |",
        f"| file | {num_file_bytes:,} bytes |",
        *(_task_lines(card.task) if card.task else []),
        *_metric_lines(card.metrics),
        "",
        "## Use",
        "",
        "    from peft import PeftModel",
        "    from transformers import AutoModelForCausalLM",
        "",
        f"    model = AutoModelForCausalLM.from_pretrained({model!r})",
        '    model = PeftModel.from_pretrained(model, "<this directory>")',
        "",
        "`peftscale inspect <this directory>` checks the files and prints what is known about them.",
    ]
    return "\n".join(lines) + "\n"


def _task_lines(task: TaskTemplate) -> list[str]:
    words = [f"    {key} -> {word!r}" for key, word in (task.labels or {}).items()]
    return [
        "",
        "## Task",
        "",
        "The base reads:",
        "",
        *_indented(task.input),
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
