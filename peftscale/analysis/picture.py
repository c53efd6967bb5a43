"""Picture: a prompt among its neighbours on a plane, as a PNG.

Directions are drawn, not lengths, because neighbours are found by their cosine. matplotlib is an extra and is imported
when a picture is asked for.

Source: van der Maaten and Hinton 2008, "Visualizing data using t-SNE"; of few points principal components.

Shapes:  N points   H hidden size
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from peftscale.analysis.reading import PrefixReading, Reading
from peftscale.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SEED = 0
_NUM_TEXTS = 60
_NUM_FOR_TSNE = 30
"""With fewer points t-SNE draws what is one direction at several places."""
_INCHES, _DOTS_PER_INCH = 9, 150


def plane(rows_NH: Tensor) -> Tensor:
    """(N, 2) float32, N >= 3: t-SNE of directions, of few points their principal components.

    The same rows give the same plane on one machine.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit_NH = normalize(rows_NH, dim=1).numpy()
    if len(unit_NH) < _NUM_FOR_TSNE:
        return torch.from_numpy(PCA(2, random_state=_SEED).fit_transform(unit_NH))
    perplexity = min(30.0, (len(unit_NH) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=_SEED)
    return torch.from_numpy(model.fit_transform(unit_NH))


def save(reading: Reading | PrefixReading, path: Path, *, title: str) -> None:
    """Draw the virtual tokens, each with a line to its nearest word and to where it started, and all their neighbours.

    Raises:
        ConfigError: the adapter is a prefix, matplotlib is not installed, or the file cannot be written.
    """
    if isinstance(reading, PrefixReading):
        raise ConfigError("--png: a prefix has no neighbours in the vocabulary to be drawn among. Name a prompt.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png: needs matplotlib. Install it with: pip install 'peftscale[plots]'.") from error
    figure = Figure(figsize=(_INCHES, _INCHES), dpi=_DOTS_PER_INCH, layout="constrained")
    draw(reading, figure.subplots(), title=title)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # a box stands for it
            figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"--png {path}: cannot be written ({error.strerror}). Choose another place.") from error


def draw(reading: Reading, axes: "Axes", *, title: str) -> None:
    """The same on axes of matplotlib.

    Named are the nearest word of each virtual token and the nearest of the others, 60 in all where there are so many.
    """
    prompt, vocabulary = reading.prompt, reading.vocabulary
    ids = torch.unique(prompt.ids_PK)
    parts = [prompt.rows_PH, vocabulary.table_VH[ids].float()]
    if reading.start_PH is not None:
        parts.append(reading.start_PH)
    rows, words, *starts = plane(torch.cat(parts)).split([len(part) for part in parts])
    axes.scatter(words[:, 0], words[:, 1], s=8, color="0.6", label=f"{len(ids)} neighbours in the vocabulary")
    for points in starts:
        axes.scatter(points[:, 0], points[:, 1], s=24, facecolors="none", edgecolors="tab:blue", label="start")
    axes.scatter(rows[:, 0], rows[:, 1], s=24, color="tab:red", label="virtual token")
    places = {int(number): words[i] for i, number in enumerate(ids)}
    for at, point in enumerate(rows):
        axes.annotate(str(at), point.tolist(), xytext=(3, 3), textcoords="offset points", color="tab:red", fontsize=7)
        _line(axes, point, places[int(prompt.ids_PK[at, 0])], color="tab:red")
        for points in starts:
            _line(axes, point, points[at], color="tab:blue")
    nearest = dict(zip(prompt.ids_PK.flatten().tolist(), prompt.cosines_PK.flatten().tolist(), strict=True))
    named = set(prompt.ids_PK[:, 0].tolist())
    shown = sorted(nearest, key=lambda number: (number not in named, -nearest[number]))
    shown = shown[: max(len(named), _NUM_TEXTS)]
    for number, text in zip(shown, vocabulary.words(shown), strict=True):
        label = text.strip().replace("$", r"\$") or repr(text)
        axes.annotate(label, places[number].tolist(), xytext=(3, -6), textcoords="offset points", fontsize=7)
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(fontsize=8)


def _line(axes: "Axes", start: Tensor, end: Tensor, *, color: str) -> None:
    both = torch.stack([start, end])
    axes.plot(both[:, 0], both[:, 1], color=color, alpha=0.25, linewidth=0.8, zorder=0)
