"""Records: the typed rows that a run, an evaluation and a benchmark leave behind, and their JSONL file.

Computes nothing: what is measured is handed in. Loads without torch, so that a laptop can read a run's file.
"""

import datetime
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from peftscale import __version__, machine
from peftscale.config import Frozen
from peftscale.errors import DataError
from peftscale.redaction import redacted

# What a number depends on. The pins of everything are constraints.txt.
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "bitsandbytes", "datasets", "ray", "peft")

Redacted = Annotated[str, AfterValidator(redacted)]
"""The text of a row: whoever makes one cannot forget it."""


class Row(Frozen):
    """A frozen model whose JSON is valid, and reads back, also where a figure is not finite: "NaN" as text."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class StepRecord(Row):
    """One training step of the whole run. Byte figures are those of one rank."""

    kind: Literal["step"] = "step"
    step: int
    """1 for the first."""
    adapters: dict[str, float]
    """Training loss of each adapter that still trained: mean over the target tokens of its global batch. Unit: nats."""
    learning_rate: float
    """The highest of the adapters that were updated; 0 where none was."""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """Of each adapter that was updated, where they are not all the same."""
    examples: dict[str, int] = Field(default_factory=dict)
    """Of each adapter that still trained, its examples up to the end of this step, over all ranks and epochs: the
    position in the order that its seed gives."""
    texts_crc32: int = 0
    """Checksum of the global batch, in its order: the same where the same examples were trained on."""
    tokens: int
    """Input and target tokens of the global batch, without padding and without virtual tokens."""
    seconds: float
    tokens_per_s: float
    reduced_bytes: int
    gathered_bytes: int
    control_bytes: int
    checks_bytes: int = 0
    """DeepSpeed's comparison of module traces between ranks, after the kind of pass changed."""
    gathered_between_nodes_bytes: int = 0
    """Of those gathered: slices that lie on other nodes."""
    skipped: bool
    """The loss or a gradient of an adapter was not finite, and that adapter was not changed."""
    skipped_adapters: tuple[str, ...] = ()
    """Which ones."""
    peak_rank_bytes: int = 0
    """Highest memory so far, of the rank that made the row; rank 0's are kept."""


class EvaluationRecord(Row):
    """One adapter on one split."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    """Steps taken before it; 0 for the evaluation before the first one."""
    adapter: str
    split: str
    metrics: dict[str, float]
    """Of an adapter of several tasks: `mean_of_tasks`, the mean of each one's first, then all as `task/metric`."""
    seconds: float


class Environment(Row):
    """Where a number was measured: enough to measure it again."""

    date: str
    """UTC, ISO 8601."""
    commit: str | None
    """Of the package's own checkout, with `-dirty` where files differ from it. None without git."""
    versions: dict[str, str]
    """Of peftscale, Python and the packages that compute. What is not installed is left out."""
    platform: str
    processor: str
    num_cpus: int
    """That this process may use."""
    memory_bytes: int
    devices: tuple[str, ...]
    """Names of the accelerators."""
    num_threads: str | None
    """OMP_NUM_THREADS as it is set."""


class NoteRecord(Row):
    """What a person who watches the run should know: a checkpoint that was taken over or passed over, texts cut."""

    kind: Literal["note"] = "note"
    step: int
    text: Redacted


class BenchRecord(Row):
    """One benchmark: what was measured, beside what was predicted before it ran."""

    kind: Literal["bench"] = "bench"
    name: str
    config_fingerprint: str | None
    """`configio.fingerprint` of the resolved run file; None for a benchmark without one."""
    step_s_quartiles: tuple[float, float, float] | None = None
    measured: dict[str, int | float]
    """Figures by name, the unit at the end of the name: peak_rank_bytes, tokens_per_s."""
    planned: dict[str, int | float] = Field(default_factory=dict)
    """The same names as far as they were predicted."""
    environment: Environment

    def line(self) -> str:
        """The record as one line for a terminal, each prediction behind its measurement."""
        parts = [self.name]
        if self.step_s_quartiles is not None:
            low, middle, high = self.step_s_quartiles
            parts.append(f"step_s {middle:.4g} ({low:.4g}..{high:.4g})")
        for name, value in self.measured.items():
            plan = f" (plan {_figure(self.planned[name])})" if name in self.planned else ""
            parts.append(f"{name} {_figure(value)}{plan}")
        return "  ".join(parts)


class Predicted(Row):
    """What `plan` said before the run, under the names of the measured figures."""

    reduced_bytes_per_step: int
    gathered_bytes_per_step: int
    control_bytes_per_step: int
    peak_rank_bytes: int
    gathered_between_nodes_bytes_per_step: int = 0
    step_s: float | None = None
    """None where the rates of the device are not known."""


class AdapterSummary(Row):
    """One adapter at the end of a run, or what `method` has in its place."""

    dir: str
    """Empty where nothing was trained, or where there was never an adapter that could be kept."""
    file_bytes: int
    """Of adapter_model.safetensors."""
    trainable_parameters: int
    train_loss: float
    """Of its last step."""
    steps: int
    """That it took; the run goes on for as long as any adapter trains."""
    stopped: Redacted | None
    """Why it left before its last step (early stop, or steps that were not finite); None where it took them all."""
    before: dict[str, float]
    """Metrics on the test split (validation where there is none, or one of its tasks has none) before the first step.
    Of several tasks as in an evaluation's record."""
    after: dict[str, float]
    """The same with the adapter that was kept as the best; empty where none was."""


class RunSummary(Row):
    """The one object of `train --json`. Bytes are those of one rank: medians over the training steps."""

    name: str
    world_size: int
    sharding: str
    packing: str
    steps: int
    seconds: float
    tokens_per_s: float
    reduced_bytes_per_step: int
    gathered_bytes_per_step: int
    control_bytes_per_step: int
    peak_rank_bytes: int
    gathered_between_nodes_bytes_per_step: int = 0
    """Of those gathered: slices that lie on other nodes."""
    step_s: float | None = None
    """Median over the training steps; None without one, and in summaries that were written without it."""
    predicted: Predicted
    adapters: dict[str, AdapterSummary]


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all.

    Raises:
        OSError: the disk is full. What stood there still stands.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_summary(path: Path, summary: RunSummary) -> None:
    """As `write_whole`: a run whose summary stands has ended."""
    write_whole(path, summary.model_dump_json(indent=1))


def read_summary(path: Path) -> RunSummary | None:
    """None where there is none, or one that is damaged: the run has to end once more."""
    try:
        return RunSummary.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


Record = StepRecord | EvaluationRecord | NoteRecord | BenchRecord
_ROW: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def append(path: str | Path, record: Record) -> None:
    """Add the record as one line of JSON and flush it, so that a killed run leaves whole lines.

    Raises:
        OSError: the disk is full or the folder is not there. Nothing of the record is left then.
    """
    with Path(path).open("ab") as file:
        start = file.tell()
        try:
            file.write(f"{record.model_dump_json()}\n".encode())
            file.flush()
        except OSError:
            os.truncate(path, start)
            raise


def mend(path: str | Path) -> None:
    """Cut off a last line without its end, which a kill or a full disk left, so that rows can be added again."""
    path = Path(path)
    if path.is_file():
        content = path.read_bytes()
        num_whole = content.rfind(b"\n") + 1
        if num_whole < len(content):
            os.truncate(path, num_whole)


def read(path: str | Path, *, passed_over: Callable[[str], None] | None = None) -> Iterator[Record]:
    """The records of a file in their order. A last line without its end was cut by a kill and is left out.

    Args:
        path: of the file.
        passed_over: told of a line that is no record, which is then left out: for those who have to come to an end.

    Raises:
        DataError: a line is no record and nobody is told; the message has its number.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            row = parse(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            text = f"{path}: line {number} is no record: {where}: {first['msg']}".replace(": :", ":")
            if passed_over is None:
                raise DataError(text) from None
            passed_over(text)
        else:
            yield row


def parse(line: str | bytes) -> Record:
    """One line of a records file.

    Raises:
        pydantic.ValidationError: it is no record.
    """
    return _ROW.validate_json(line)


def environment() -> Environment:
    """This process's environment, by value. Imports no torch: the driver's files name the devices."""
    versions = {"peftscale": __version__, "python": platform.python_version()}
    versions |= {name: version for name in _PACKAGES if (version := version_of(name))}
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=revision(Path(__file__)),
        versions=versions,
        platform=platform.platform(),
        processor=machine.processor(),
        num_cpus=machine.num_cpus(),
        memory_bytes=machine.memory_bytes(),
        devices=machine.accelerators(),
        num_threads=os.environ.get("OMP_NUM_THREADS"),
    )


def version_of(package: str) -> str | None:
    """Version of an installed package without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def revision(file: Path) -> str | None:
    """The commit of the checkout that a file belongs to, with `-dirty` where files differ from it; None where git does
    not know the file, or is not there."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.absolute().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # It may lie inside somebody else's repository, whose commit says nothing about it.
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
