"""Similarity: which adapters of a library are like another one, as a sign of which tasks are.

What is found may start the prompt of a new task (`init: adapter`).

Source: Vu et al. 2022 (SPoT), arXiv:2110.07904, section 4: prompts as task embeddings, compared by the cosine of their
mean tokens, or by the mean cosine of all pairs of tokens.

Shapes:  P, Q virtual tokens of two adapters   W width of a virtual token (adapters.peft_format)
"""

from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from peftscale.adapters import files, peft_format
from peftscale.adapters.files import Contents
from peftscale.errors import AdapterError, ConfigError


def of_mean_tokens(one_PW: Tensor, other_QW: Tensor) -> float:
    """The cosine of the two means over virtual tokens."""
    return float(cosine_similarity(one_PW.mean(dim=0), other_QW.mean(dim=0), dim=0))


def of_token_pairs(one_PW: Tensor, other_QW: Tensor) -> float:
    """The mean cosine over all P * Q pairs of virtual tokens."""
    return float(normalize(one_PW, dim=1).mean(dim=0) @ normalize(other_QW, dim=1).mean(dim=0))


def rank(directory: Path, library: Path) -> dict[str, Any]:
    """Compare an adapter with all of its kind and base under a directory.

    Of a run that is found there the best adapters count, not the last ones.

    Returns:
        {"adapter", "library": [{"directory", "task", "length", "mean_tokens", "token_pairs"}], "notes"}, the most
        similar by its mean tokens first; notes name what was passed over.

    Raises:
        AdapterError: the adapter cannot be read, or nothing in the library can be compared with it.
        ConfigError: the library is no directory.
    """
    if not library.is_dir():
        raise ConfigError(f"{library}: no such directory. Name one that has adapters somewhere below it.")
    own = files.read(directory)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for path in _adapters_in(library):
        if path.resolve() == directory.resolve():
            continue
        try:
            other = files.read(path)
        except AdapterError as error:
            notes.append(str(error))
            continue
        if why := _cannot_be_compared(own, other):
            notes.append(f"{path}: passed over, {why}")
            continue
        if other.manifest is None:
            notes.append(f"{path}: base not verified")
        one, another = (peft_format.flat(contents.adapter.values.detach()) for contents in (own, other))
        rows.append(
            {
                "directory": str(path),
                "task": other.manifest.task_names if other.manifest else None,
                "length": other.adapter.length,
                "mean_tokens": of_mean_tokens(one, another),
                "token_pairs": of_token_pairs(one, another),
            }
        )
    if not rows:
        found = f"{len(notes)} adapter(s), none of which can be compared: {notes[0]}" if notes else "no other adapter"
        raise AdapterError(f"{library}: holds {found}. Name a directory with adapters of {directory}'s base and kind.")
    return {
        "adapter": str(directory),
        "library": sorted(rows, key=itemgetter("mean_tokens"), reverse=True),
        "notes": notes,
    }


def _adapters_in(library: Path) -> list[Path]:
    found = sorted(path.parent for path in library.rglob(peft_format.CONFIG_FILE))
    return [path for path in found if not (path.name == "last" and path.with_name("best") in found)]


def _cannot_be_compared(own: Contents, other: Contents) -> str:
    """Why two adapters have nothing in common, or ''."""
    digests = {contents.manifest.base.digest for contents in (own, other) if contents.manifest}
    if len(digests) > 1:
        return "it belongs to another base"
    widths = [peft_format.flat(contents.adapter.values).shape[1] for contents in (own, other)]
    if type(own.adapter) is not type(other.adapter) or widths[0] != widths[1]:
        return f"it is {files.named(other.adapter)} of width {widths[1]}, not {files.named(own.adapter)} of {widths[0]}"
    return ""
