"""The journal of a run: its metrics file, and what rank 0 writes for all ranks. Every rank's rows can be watched.

What is written down is decided elsewhere; the rows are `records`. A disk that is full is told to every rank at the next
file that has to be whole.
"""

from collections.abc import Callable

from peftscale import records
from peftscale.config import RunConfig
from peftscale.errors import CheckpointError
from peftscale.records import NoteRecord, Record
from peftscale.train import comm

Watch = Callable[[Record], None]
"""Called on every rank with each of its rows."""


Leaving = Callable[[], bool]
"""Whether a node of the run is about to be taken away, the same on every rank. All ask together, after each step."""


def nobody(row: Record) -> None:
    """Watches nothing."""


def never() -> bool:
    """Nothing is taken away."""
    return False


class Journal:
    """Writes on rank 0 and nowhere else."""

    def __init__(self, cfg: RunConfig, watch: Watch = nobody, is_leaving: Leaving = never) -> None:
        """Cut off what a killed run left half written."""
        self._cfg = cfg
        self._watch = watch
        self._is_leaving, self._has_said_so = is_leaving, False
        self._unwritten: OSError | None = None
        if comm.rank() == 0:
            records.mend(cfg.metrics_path)

    def record(self, row: Record) -> None:
        """Append a row to the metrics."""
        self._watch(row)
        if comm.rank() == 0:
            try:
                records.append(self._cfg.metrics_path, row)
            except OSError as error:
                self._unwritten = self._unwritten or error

    def note(self, step: int, text: str) -> None:
        """Append a line for the person who watches."""
        self.record(NoteRecord(step=step, text=text))

    def is_due(self, step: int, every: int) -> bool:
        """Whether to save after this step: it is its turn, or a node of the run is about to be taken away. From that
        notice on every step is saved, for the last one before the end is not known. Every rank asks after each step."""
        if not self._is_leaving():
            return step % every == 0
        if not self._has_said_so:
            self._has_said_so = True
            self.note(step, "a node of this run is about to be taken away; every step is saved until then")
        return True

    def write(self, work: Callable[[], object]) -> None:
        """Do what writes files on rank 0. What it raises every rank raises.

        Raises:
            CheckpointError: the disk is full or cannot be written, now or when a row was.
        """

        def local() -> None:
            if comm.rank() != 0:
                return
            try:
                work()
                if self._unwritten is not None:
                    raise self._unwritten
            except OSError as error:
                raise CheckpointError(
                    f"{self._cfg.run_dir} cannot be written: {error.strerror or error}. What was saved before is kept; "
                    f"make room and start the run again (with {self._cfg.going_on} where it has taken a step)."
                ) from error

        comm.together(local)
