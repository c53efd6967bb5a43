"""Reading of an adapter: what its virtual tokens are near to in words, and how far they came from their start.

Puts `analysis.neighbours` to work on an adapter directory and the vocabulary of its base.

Shapes:  P virtual tokens   H hidden size   K neighbours   L layers
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import cosine_similarity

from peftscale import adapters
from peftscale.adapters import Prefix, files
from peftscale.adapters.manifest import Manifest, TaskTemplate
from peftscale.analysis import neighbours
from peftscale.analysis import vocabulary as vocabularies
from peftscale.analysis.vocabulary import Vocabulary
from peftscale.config import AdapterConfig, BaseConfig, RunConfig, SoftPromptConfig
from peftscale.errors import PeftscaleError

CONTROL_SEED = 210_408_691
"""One that no run has by chance: a control drawn with a run's seed could be its start."""
_SAME_START = 1e-4
"""Largest relative difference of norms: what rounding leaves, where another draw of rows differs by a hundredth."""


@dataclass(frozen=True)
class Rows:
    """Rows beside a vocabulary."""

    rows_PH: Tensor
    ids_PK: Tensor
    cosines_PK: Tensor
    texts_PK: list[list[str]]
    families_P: list[list[str]]
    """Of each row the largest group of forms of one word among its neighbours; of one text where there is none."""
    summary: dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A prompt, its start and its control beside the vocabulary of their base."""

    vocabulary: Vocabulary
    prompt: Rows
    control: Rows
    start_PH: Tensor | None
    start_words: tuple[Tensor, Tensor] | None
    """The token nearest to each row of the start, and its cosine with it, (P, 1) each."""
    labels: dict[str, str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """{"tokens": one entry a virtual token, "prompt" and "control": what `summary` says, "notes"}.

        A token's `start` is the word nearest to where it started, `start_cosine` the cosine of the two.
        """
        tokens = []
        for row, texts in enumerate(self.prompt.texts_PK):
            values_H = self.prompt.rows_PH[row]
            token: dict[str, Any] = {
                "token": row,
                "norm": float(values_H.norm()),
                "neighbours": [
                    {"id": int(number), "text": text, "cosine": round(float(cosine), 6)}
                    for number, text, cosine in zip(
                        self.prompt.ids_PK[row], texts, self.prompt.cosines_PK[row], strict=True
                    )
                ],
                "family": self.prompt.families_P[row],
            }
            if self.start_PH is not None and self.start_words is not None:
                (number,), (cosine,) = (found_P1[row].tolist() for found_P1 in self.start_words)
                token |= {"start": self.vocabulary.words([number])[0], "start_cosine": round(cosine, 6)}
                token["moved"] = float((values_H - self.start_PH[row]).norm())
            tokens.append(token)
        return {
            "tokens": tokens,
            "prompt": self.prompt.summary,
            "control": self.control.summary,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class PrefixReading:
    """What can be said of a prefix: its keys and values stand behind the layers, where no token has a name."""

    prefix: Prefix

    def to_json(self) -> dict[str, Any]:
        """{"layers": norms of each, "notes"}."""
        note = "keys and values of a prefix stand behind the layers: they have no neighbours in the vocabulary"
        return {"layers": norms_of_layers(self.prefix), "notes": [note]}


def base_of(directory: Path, model: str) -> BaseConfig:
    """The base of an adapter as its peftscale.json says it was loaded, with the weights of `model`."""
    manifest = files.read(directory).manifest
    card = manifest.base if manifest else None
    settings = {
        "model": model,
        "revision": (card.revision if card else None) or "main",
        "quantization": card.quantization if card else "none",
        "compute_dtype": card.compute_dtype if card else "float32",
        "sharding": "auto",
        "checkpoint_activations": False,
    }
    return BaseConfig.model_validate(settings)


def read(directory: Path, base: BaseConfig, *, k: int, run: RunConfig | None = None) -> Reading | PrefixReading:
    """Read an adapter beside the vocabulary of its base.

    Args:
        directory: the adapter's.
        base: of which the input embedding is read, no other tensor.
        k: neighbours of each virtual token, 2 at least.
        run: whose task says the labels where the adapter has none with it.

    Raises:
        AdapterError: the adapter cannot be used, or belongs to another base.
        ModelError: the base cannot be read.
    """
    contents = files.read(directory)
    if isinstance(contents.adapter, Prefix):
        return PrefixReading(contents.adapter)
    vocabulary = vocabularies.load(base)
    manifest = contents.manifest
    adapter, info = files.load(
        directory,
        base_digest=vocabulary.digest or (manifest.base.digest if manifest else ""),
        hidden_size=vocabulary.hidden_size,
        prefix_shape=vocabulary.prefix_shape,
    )
    notes = list(info.notes)
    if manifest and vocabulary.digest is None:
        notes.append("base not verified (it was never packed here)")
    start_PH, why_not = None, "not known (peftscale.json does not say it)"
    if manifest is not None and manifest.start is not None:
        start_PH, why_not = start_of(manifest, vocabulary)
    if start_PH is None:
        notes.append(f"start: {why_not}")
    template = manifest.task if manifest else None
    if template is None and run is not None:
        template = TaskTemplate.of(run.task)
    labels = (template.labels if template else None) or {}
    return beside(vocabulary, adapter.values.detach(), start_PH, labels=labels, k=k, notes=notes)


def beside(
    vocabulary: Vocabulary,
    rows_PH: Tensor,
    start_PH: Tensor | None,
    *,
    labels: dict[str, str],
    k: int,
    notes: list[str],
) -> Reading:
    """Rows, and random ones of equal norms, beside a vocabulary."""
    start_words = None if start_PH is None else neighbours.nearest(start_PH, vocabulary.table_VH, k=1)

    def rows(values_PH: Tensor) -> Rows:
        ids_PK, cosines_PK = neighbours.nearest(values_PH, vocabulary.table_VH, k=k)
        texts_PK = [vocabulary.words(ids) for ids in ids_PK.tolist()]
        families_P = [neighbours.family(texts) for texts in texts_PK]
        found: dict[str, Any] = {
            "norm": float(values_PH.norm(dim=1).mean()),
            "nearest_cosine": float(cosines_PK[:, 0].mean()),
            "tightness": float(neighbours.tightness(ids_PK, vocabulary.table_VH).mean()),
            "families": _share([len(family) > 1 for family in families_P]),
            "recurring": neighbours.recurring(texts_PK),
        }
        if labels:
            near = {name: neighbours.rows_near(_words_of(text, vocabulary), texts_PK) for name, text in labels.items()}
            found |= {"labels": near, "labels_found": _share([bool(places) for places in near.values()])}
        if start_PH is not None and start_words is not None:
            found["start_kept"] = float((ids_PK == start_words[0]).any(dim=1).float().mean())
            found["moved"] = float((values_PH - start_PH).norm(dim=1).mean())
            found["start_cosine"] = float(cosine_similarity(values_PH, start_PH).mean())
        return Rows(values_PH, ids_PK, cosines_PK, texts_PK, families_P, found)

    control_PH = neighbours.random_rows_like(rows_PH, seed=CONTROL_SEED)
    return Reading(vocabulary, rows(rows_PH), rows(control_PH), start_PH, start_words, labels, notes)


def start_of(manifest: Manifest, vocabulary: Vocabulary) -> tuple[Tensor | None, str]:
    """The rows that a prompt started from, made again.

    Returns:
        (P, H) float32 and '', or None and why it cannot be had.
    """
    assert manifest.start is not None
    try:
        kind: TypeAdapter[Any] = TypeAdapter(AdapterConfig)
        cfg = kind.validate_json(json.dumps(manifest.start.settings), strict=True)
    except ValidationError:
        return None, f"its settings are those of another version of peftscale ({manifest.versions.get('peftscale')})"
    assert isinstance(cfg, SoftPromptConfig) and cfg.seed is not None
    try:
        source = files.read(cfg.init_adapter).adapter if cfg.init_adapter is not None else None
        with torch.no_grad():
            start = adapters.starting_prompt(cfg, vocabulary, source, seed=cfg.seed, where="start").folded()
    except PeftscaleError as error:
        return None, f"cannot be made again: {error}"
    start_PH, norm = start.values.detach(), manifest.start.norm
    if start_PH.shape[0] != manifest.length + manifest.decoder_length or (
        abs(float(start_PH.norm()) - norm) > _SAME_START * norm
    ):
        return None, (
            f"cannot be made again: its norm was {norm:.6g} and comes out as {float(start_PH.norm()):.6g} "
            f"(it was made with torch {manifest.versions.get('torch')}, this is {torch.__version__})"
        )
    return start_PH, ""


def norms_of_layers(prefix: Prefix) -> list[dict[str, float]]:
    """Mean L2 norm of the keys and of the values of a virtual token and head, layer by layer."""
    norms_L2 = prefix.keys_values_L2PKD.detach().norm(dim=4).mean(dim=(2, 3))
    return [{"layer": at, "keys": float(keys), "values": float(values)} for at, (keys, values) in enumerate(norms_L2)]


def _words_of(label: str, vocabulary: Vocabulary) -> list[str]:
    """A label's text, and those of its tokens where it has several."""
    ids: list[int] = vocabulary.tokenizer(label, add_special_tokens=False)["input_ids"]
    return [label, *vocabulary.words(ids)]


def _share(are: list[bool]) -> float:
    return sum(are) / len(are)
