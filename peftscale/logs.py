"""Log files of a run: what every rank had to say, as JSON lines with time, host, rank and step, and what failed first.

Figures are not here: they are `records`. Where a rank ends with an error, its last line is that error with the
traceback. Loads without torch.
"""

import contextlib
import datetime
import logging
import re
import socket
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from peftscale.records import Redacted, Row

log = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")
_POLL_S = 0.2
_BEGINS = re.compile(r"begins(, one of \d+)?")
_START_S = 600.0
"""Ranks of one group begin within it."""
_ABOUT_OTHERS = re.compile(
    r": rank \d+: |gloo/|NCCL|Connection (closed|reset) by peer|DistBackendError|CollectiveTimeoutError"
    r"|process group|DeepSpeed backend not set"
)
"""In the error of a rank that another one has left, that was told of another one's error, or whose group Ray has taken
down while it was still at work, because another one had left."""


class LogLine(Row):
    """One line of one rank."""

    time: str
    """UTC, ISO 8601 with microseconds, so that text sorts as time does."""
    level: str
    """One of LEVELS."""
    host: str
    rank: int
    step: int
    """Steps taken by then."""
    logger: str
    message: Redacted
    traceback: Redacted | None = None

    def words(self) -> str:
        """Who said what."""
        return f"rank {self.rank} on {self.host} at step {self.step}: {self.message}"

    def text(self) -> str:
        """As one line for a terminal, the traceback below it."""
        first = f"{self.time}  {self.host}  rank {self.rank}  step {self.step}  {self.level}  {self.message}"
        return f"{first}\n{self.traceback.rstrip()}" if self.traceback else first


class Book(logging.Handler):
    """The file of one rank. Python's own logging ends here, from `info` for this package and `warning` for others."""

    def __init__(self, directory: Path, rank: int) -> None:
        super().__init__()
        directory.mkdir(parents=True, exist_ok=True)
        self._path, self._rank, self._host = directory / f"rank-{rank}.jsonl", rank, socket.gethostname()
        self.step = 0
        """Kept up by whoever takes the steps."""

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line. A disk that is full must not end a run here: checkpoints say it."""
        if record.levelno < logging.WARNING and not record.name.startswith("peftscale"):
            return
        try:
            self._write(record.levelno, record.name, record.getMessage(), record.exc_info and record.exc_info[1])
        except Exception:
            self.handleError(record)

    def failed(self, error: BaseException) -> None:
        """The last line of a rank that ends with an error."""
        with contextlib.suppress(OSError):  # the error itself is raised on
            self._write(logging.ERROR, "peftscale", f"{type(error).__name__}: {error}", error)

    def _write(self, level: int, logger: str, message: str, error: BaseException | None) -> None:
        line = LogLine(
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
            level=LEVELS[min(max(level // 10, 1), len(LEVELS)) - 1],
            host=self._host,
            rank=self._rank,
            step=self.step,
            logger=logger,
            message=message,
            traceback=None if error is None else "".join(traceback.format_exception(error)),
        )
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")


@contextmanager
def kept(directory: Path, rank: int, world: int | None = None) -> Iterator[Book]:
    """Keep what is logged in this block, and the error that ends it.

    Args:
        directory: of the log files.
        rank: of this process.
        world: ranks that begin with it, where that is known.
    """
    book, ours = Book(directory, rank), logging.getLogger("peftscale")
    level = ours.level
    ours.setLevel(min(level or logging.INFO, logging.INFO))
    logging.getLogger().addHandler(book)
    log.info("begins%s", "" if world is None else f", one of {world}")
    try:
        yield book
    except BaseException as error:
        book.failed(error)
        raise
    finally:
        logging.getLogger().removeHandler(book)
        ours.setLevel(level)


def read(directory: Path, ranks: Sequence[int] = (), level: str = "info") -> list[LogLine]:
    """Lines of all ranks, or of some, in the order of time. One that a kill cut is left out."""
    return sorted(
        (line for path in _files(directory, ranks) for line in _lines(path.read_bytes(), level)), key=lambda x: x.time
    )


def follow(directory: Path, ranks: Sequence[int], level: str, until: Callable[[], bool] | None) -> Iterator[LogLine]:
    """Lines from the first one on, also those that are written meanwhile until `until` holds. None: no waiting."""
    read_bytes: dict[Path, int] = {}
    while True:
        is_last = until is None or until()
        fresh: list[LogLine] = []
        for path in _files(directory, ranks):
            with path.open("rb") as file:
                file.seek(read_bytes.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            read_bytes[path] = read_bytes.get(path, 0) + len(whole) + len(newline)
            fresh += _lines(whole + newline, level)
        yield from sorted(fresh, key=lambda line: line.time)
        if is_last:
            return
        time.sleep(_POLL_S)


def cause(directory: Path, gone: Collection[int] = ()) -> str | None:
    """What ended the ranks that began the last time, in one line: which rank, on which host, which error.

    The first error that is not about another rank. Where there is none, a rank that wrote nothing was killed, or hangs.
    The clocks of hosts are taken to agree.

    Args:
        directory: of the log files.
        gone: ranks that are known to have died.

    Returns:
        None where no rank wrote an error and none is known to be gone.
    """
    lines = read(directory)
    begun = {line.rank: line for line in lines if _BEGINS.fullmatch(line.message)}
    last = max(begun.values(), key=lambda line: line.time, default=None)
    # What has another number of ranks, or began long before, is of an earlier start.
    of_last = [
        line
        for line in begun.values()
        if last and line.message == last.message and _seconds(line.time, last.time) < _START_S
    ]
    since = min((line.time for line in of_last), default="")
    failed = [line for line in lines if line.level == "error" and line.time >= since]
    own = [line for line in failed if not _ABOUT_OTHERS.search(line.message)]
    wrote = {line.rank for line in failed}
    silent = [line for line in of_last if line.rank not in wrote and (failed or line.rank in gone)]
    if own or not silent:
        return next((line.words() for line in (*own, *failed)), None)
    named = " and ".join(f"rank {line.rank} on {line.host}" for line in silent)
    missed = f"; it was missed by {failed[0].words()}" if failed else ""
    return f"{named} was killed or hangs, without a word{missed}"


def _seconds(start: str, end: str) -> float:
    return (datetime.datetime.fromisoformat(end) - datetime.datetime.fromisoformat(start)).total_seconds()


def _files(directory: Path, ranks: Sequence[int]) -> list[Path]:
    if ranks:
        return [path for rank in ranks if (path := directory / f"rank-{rank}.jsonl").exists()]
    return sorted(directory.glob("rank-*.jsonl"))


def _lines(content: bytes, level: str) -> Iterator[LogLine]:
    for text in content.splitlines(keepends=True):
        if not text.endswith(b"\n"):
            return
        try:
            line = LogLine.model_validate_json(text)
        except ValidationError:
            continue  # not ours
        if LEVELS.index(line.level) >= LEVELS.index(level):
            yield line
