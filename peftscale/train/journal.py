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


def nobody(row: Record) -> None:
    """Watches nothing."""


class Journal:
    """Writes on rank 0 and nowhere else."""

    def __init__(self, cfg: RunConfig, watch: Watch = nobody) -> None:
        """Cut off what a killed run left half written."""
        self._cfg = cfg
        self._watch = watch
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
                    f"make room and start the run again (with --resume {self._cfg.name} where it has a checkpoint)."
                ) from error

        comm.together(local)
