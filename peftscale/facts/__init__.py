"""Facts of a base: names and shapes of its weights from config.json, and where they lie in its safetensors files.

Reads no weight and, for the families of `families`, imports no torch. Making the real model is `base.skeleton`,
quantising is `base.pack`, what the bytes mean for a GPU is `plan`.
"""

import json
from pathlib import Path
from typing import Any

from peftscale.errors import ModelError
from peftscale.facts import families, skeleton
from peftscale.facts.units import (
    NF4_GROUP,
    NF4_NESTED,
    BaseFacts,
    LinearFacts,
    TensorFacts,
    UnitFacts,
    blob_bytes,
    dtype_bytes,
)
from peftscale.facts.weights import Header, headers, source_files, source_key

__all__ = [
    "NF4_GROUP",
    "NF4_NESTED",
    "BaseFacts",
    "Header",
    "LinearFacts",
    "TensorFacts",
    "UnitFacts",
    "blob_bytes",
    "dtype_bytes",
    "headers",
    "load",
    "source_files",
    "source_key",
]


def load(model: str | Path) -> BaseFacts:
    """Read the facts of a model directory.

    Raises:
        ModelError: no directory, no or broken config.json, weights stored quantised already, an architecture that
            transformers does not know, or one with weights that we can neither shard nor quantise.
    """
    raw = _read_config(Path(model))
    model_type = raw["model_type"]
    if model_type == "mixtral" and families.has(raw, "hidden_size", "intermediate_size", "num_hidden_layers"):
        skeleton.refuse(str(model), model_type, families.mixtral_experts(raw))
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "an unknown method")
        raise ModelError(
            f"base.model={model}: its weights are quantised already ({method}; config.json has a quantization_config). "
            f"Give the original bfloat16 or float32 weights: quantising is done here."
        )
    skeleton.refuse_own_code(str(model), raw)
    return families.read(str(model), raw) or skeleton.read(Path(model))


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise ModelError(
            f"base.model={model_dir}: no such directory (looked for {path}). Give a directory with config.json, "
            f"tokenizer and safetensors files."
        )
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in model_dir.iterdir())[:8]) or "nothing"
        raise ModelError(f"base.model={model_dir}: has no config.json (it holds: {there}). Give a model's directory.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error}). Fetch the file again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type, so it describes no transformers model. Give a model's directory.")
    return raw
