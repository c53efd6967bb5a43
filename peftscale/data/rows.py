"""Rows of one split, as columns by name: a local file or a data set of the hub, through HF `datasets`.

What a row becomes is `tasks`. Here every way in which a file can be unreadable turns into a DataError that
names it, and three habits of the readers that change data without a word are switched off:

- a csv has no types, so every cell stays the text that stands in the file: "007" is not 7, "true" not True,
  and the word "null" not a missing value;
- a csv row that is longer than the header would shift all columns by one: it is refused;
- the json reader turns "2020-01-01" into a point in time: such a column is refused where it is used.

The cache of `datasets` is keyed on names and times of files. For local files it is a temporary directory, so
that a file that was changed is read again and nothing stays in the user's home.
"""

import contextlib
import csv
import glob
import gzip
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscale.config import DataFiles, HubData, TaskConfig
from peftscale.errors import DataError
from peftscale.task_config import Split

if TYPE_CHECKING:
    from datasets import Dataset, Features

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_CONVERSIONS = "refs/convert/parquet"


class Rows:
    """One split. The columns are known at once, the cells are decoded only for the columns that are asked for."""

    def __init__(self, where: str, dataset: "Dataset", unusable: frozenset[str]) -> None:
        self.where = where
        """What the user called it: the key of the run file and the file, for messages."""
        self.columns: tuple[str, ...] = tuple(dataset.column_names)
        self._dataset = dataset
        self._unusable = unusable

    def __len__(self) -> int:
        return len(self._dataset)

    def only(self, columns: set[str]) -> list[dict[str, Any]]:
        """The rows with these columns, in the order of the file.

        Raises:
            DataError: a column was turned into points in time by the reader, its text is lost.
        """
        lost = sorted(columns & self._unusable)
        if lost:
            raise DataError(
                f"{self.where}: every value of column {lost[0]!r} looks like a date, and the json reader of "
                f"HF datasets returns dates instead of the text. Write the file as csv or parquet, which keep the text."
            )
        if not columns:
            return [{} for _ in range(len(self))]  # a template may be a constant
        return list(self._dataset.select_columns(sorted(columns)).to_list())


def load(task: TaskConfig, split: Split) -> Rows | None:
    """The rows of a split; None where the task has no such split (only `test` may be missing).

    Raises:
        DataError: missing, unreadable, broken or empty file; unknown suffix, hub id, subset or split.
    """
    source = task.files if task.files is not None else task.hub
    assert source is not None  # TaskConfig.one_source
    name = getattr(source, split)
    if name is None:
        return None
    match source:
        case DataFiles():
            where, rows = f"task.files.{split} ({name})", _from_file(split, Path(name))
        case HubData():
            where, rows = f"task.hub.{split} ({source.path}, split {name!r})", _from_hub(source, split, name)
    if len(rows) == 0:
        raise DataError(f"{where}: no rows. At least one is needed.")
    unusable: frozenset[str] = frozenset()
    if isinstance(source, DataFiles) and _format(Path(name)) == "jsonl":
        unusable = frozenset(
            column
            for column, feature in rows.features.items()
            if str(getattr(feature, "dtype", "")).startswith(("timestamp", "date"))
        )
    return Rows(where, rows, unusable)


def _from_file(split: Split, path: Path) -> "Dataset":
    where = f"task.files.{split} ({path})"
    kind = _format(path)
    readers = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
    if kind not in readers:
        raise DataError(
            f"{where}: unknown suffix {path.suffix!r}; expected .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet."
        )
    if not path.is_file():
        raise DataError(f"{where}: {'is a directory' if path.is_dir() else 'no such file'}; expected a {kind} file.")
    with _wrapped(where, f"cannot be read as {kind}"):
        if not _has_bytes(path):
            raise DataError(f"{where}: the file is empty. At least one row is needed.")
        with tempfile.TemporaryDirectory(prefix="peftscale-rows-") as cache:
            return readers[kind](path, cache)


def _from_hub(hub: HubData, split: Split, name: str) -> "Dataset":
    import datasets

    where = f"task.hub.{split} ({hub.path}, subset {hub.subset!r}, split {name!r}, revision {hub.revision!r})"
    with _wrapped(where, "cannot be loaded"):
        # The hub's conversions have no card that names subsets: each is a directory.
        subset = {"data_dir" if hub.revision == _CONVERSIONS else "name": hub.subset}
        rows = datasets.load_dataset(hub.path, **subset, split=name, revision=hub.revision)
    assert isinstance(rows, datasets.Dataset)  # what load_dataset returns for one split, not streamed
    return rows


def _read_jsonl(path: Path, cache: str) -> "Dataset":
    from datasets import Dataset

    # not load_dataset("json"): it asks the hub to count the load, which costs a second, or three without network
    return Dataset.from_json(_literal(path), cache_dir=cache, keep_in_memory=True)


def _read_csv(path: Path, cache: str) -> "Dataset":
    from datasets import Dataset

    with warnings.catch_warnings():
        # a row longer than the header: with index_col=False pandas warns and cuts it, without it shifts the columns
        warnings.filterwarnings("error", message="Length of header or names does not match")
        return Dataset.from_csv(
            _literal(path),
            features=_text_features(path),
            keep_default_na=False,
            index_col=False,
            cache_dir=cache,
            keep_in_memory=True,
        )


def _read_parquet(path: Path, cache: str) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_parquet(_literal(path), cache_dir=cache, keep_in_memory=True)


def _text_features(path: Path) -> "Features":
    """Every column of the csv's header as text."""
    from datasets import Features, Value

    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next(reader)
        if next(reader, None) is None:
            raise ValueError("there is a header and no row")
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise ValueError(f"the header has {', '.join(map(repr, twice))} twice")
    return Features({column: Value("string") for column in header})


def _format(path: Path) -> str:
    """jsonl, csv, parquet, or whatever else the suffix says; .gz is taken off the two text formats."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".gz"]:
        return suffixes[0][1:] if suffixes[0] in (".jsonl", ".csv") else "gz"
    return suffixes[-1][1:] if suffixes else ""


def _has_bytes(path: Path) -> bool:
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        return bool(file.read(1))


def _literal(path: Path) -> str:
    """`datasets` takes every path for a pattern: brackets in a directory's name would find nothing."""
    return glob.escape(str(path.resolve()))


@contextlib.contextmanager
def _wrapped(where: str, what: str) -> Iterator[None]:
    """Turns whatever the readers raise into a DataError, and keeps their log and progress bars off the terminal."""
    import datasets

    had_bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas, fsspec and the hub client each have a tree of their own
        cause = error.__cause__ or error
        text = " ".join(str(cause).split()) or type(cause).__name__
        if "corresponds to no data" in text:  # what `datasets` says of a parquet file without rows
            raise DataError(f"{where}: no rows. At least one is needed.") from error
        raise DataError(f"{where}: {what}: {text}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if had_bars:
            datasets.enable_progress_bars()
