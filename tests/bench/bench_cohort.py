"""Sixteen adapters trained together beside sixteen trained alone: bytes gathered and time, both sides in one run.

    python tests/bench/bench_cohort.py [--full] [bench.jsonl]

Two sharded gloo ranks over a random nf4 Llama computed in float32; every adapter has 4 examples a step, 2 a rank.
Bytes: 4 lengths x 4 seeds, gathered bytes a step and adapter from the byte tap. Time: 16 adapters of length 20, the two
sides take turns, medians. Each over loopback and over a link of 1 Gbit/s: two network namespaces joined by a shaped
pair of interfaces where this process may make them (root), else a token bucket in the byte tap stands for the link,
and the first line says which. At last each adapter's way in the cohort after 20 steps beside its way alone. The small
setting has a hidden size of 256; `--full` 1024, 8 blocks. Prints a table and appends one BenchRecord a link.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_base import llama, save_config, save_weights

from peftscale import records
from peftscale.adapters import Cohort, SoftPrompt, initialisation
from peftscale.base import load
from peftscale.base.load import Base
from peftscale.config import BaseConfig, TrainConfig
from peftscale.data.batches import Item, training_items
from peftscale.data.tasks import Example
from peftscale.train import comm, setup, step
from peftscale.train.optim import AdapterOptimizer

SMALL = {"hidden": 256, "feed": 704, "layers": 4, "heads": 4, "key_value_heads": 2, "vocab": 4096}
FULL = {"hidden": 1024, "feed": 2816, "layers": 8, "heads": 16, "key_value_heads": 8, "vocab": 4096}
WORLD, LENGTHS, NUM_SEEDS, TIMED_LENGTH = 2, (1, 5, 20, 100), 4, 20
ROWS, TOKENS = 4, 25  # of one adapter's step, over both ranks; SST-2's mean with its template
NUM_WARM, NUM_COMPARED = 2, 20
BITS_PER_S = 1e9
TRAIN = TrainConfig(
    steps=100,
    examples_per_step=ROWS,
    microbatch_tokens=10**6,
    optimizer="adamw",
    learning_rate=0.01,
    # AdamW's first move is the sign of each gradient, and rounding decides that of a number next to zero: with torch's
    # epsilon of 1e-8 one of 102,400, its gradient 3e-8 where others have 7e-3, was 1.0e-5 of a distance of 1.2e-5; at
    # 1e-6 one of a prompt's 1,024 was still 1.07e-5 of 1.09e-5.
    warmup_steps=20,
    adam_epsilon=1e-5,
    evaluate_every=100,
    checkpoint_every=100,
)
Side = dict[str, tuple[int, int]]
"""Adapters that take a step together: name -> length, seed."""


class Bucket:
    """A link of so many bits a second in each direction, as time that a collective has to wait before it begins."""

    def __init__(self, bits_per_s: float, *, burst_bytes: int = 65536) -> None:
        self._bytes_per_s, self._burst = bits_per_s / 8, burst_bytes
        self._tokens, self._at = float(burst_bytes), time.perf_counter()

    def take(self, call: comm.Call) -> None:
        """Wait until what this rank sends has passed: half of a gather between two, all of a reduction."""
        now = time.perf_counter()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._bytes_per_s)
        self._at = now
        self._tokens -= call.num_bytes * (1 if "reduce" in call.op else (WORLD - 1) / WORLD)
        if self._tokens < 0:
            time.sleep(-self._tokens / self._bytes_per_s)


def _items(name: str, length: int, seed: int, at: int, vocab: int) -> list[Item]:
    """The rows of one adapter's step: random ids by its seed and the step."""
    draw = torch.Generator().manual_seed(1000 * seed + at)
    ids = torch.randint(3, vocab, (ROWS, TOKENS), generator=draw).tolist()
    return training_items(
        name, length, [Example(i, tuple(row[:-1]), (row[-1],), None, "") for i, row in enumerate(ids)]
    )


class Run:
    """Adapters at their start, and their steps."""

    def __init__(self, base: Base, side: Side) -> None:
        self._base, self._side, self._num = base, side, 0
        rows = {n: initialisation.random_rows(p, base.hidden_size, seed=seed) for n, (p, seed) in side.items()}
        self.cohort = Cohort({name: SoftPrompt(rows_PH) for name, rows_PH in rows.items()})
        self._optimizers = {n: AdapterOptimizer(adapter.parameters(), TRAIN) for n, adapter in self.cohort.items()}

    def step(self) -> step.StepResult:
        """The next step of all of them."""
        of_all = [
            item
            for name, (length, seed) in self._side.items()
            for item in _items(name, length, seed, self._num, self._base.vocab_size)
        ]
        self._num += 1
        tokens = TRAIN.microbatch_tokens
        result = step.run(
            self._base, self.cohort, self._optimizers, of_all, step=self._num - 1, microbatch_tokens=tokens
        )
        assert not result.skipped
        return result

    def rows(self) -> dict[str, torch.Tensor]:
        """A copy of every adapter."""
        return {name: next(iter(a.parameters())).detach().clone() for name, a in self.cohort.items()}


def _measure(base: Base, num_turns: int) -> dict[str, Any]:
    """What one rank finds over the link that it is on."""
    mixed = {f"p{p}-s{seed}": (p, seed) for p in LENGTHS for seed in range(NUM_SEEDS)}
    together = Run(base, mixed).step().traffic.gathered
    alone = [Run(base, {name: one}).step().traffic.gathered for name, one in mixed.items()]
    equal = {f"s{seed}": (TIMED_LENGTH, seed) for seed in range(len(mixed))}
    cohort, solo = Run(base, equal), Run(base, {"s0": equal["s0"]})
    seconds: dict[str, list[float]] = {"cohort": [], "solo": []}
    for turn in range(NUM_WARM + num_turns):
        for name, run in (("cohort", cohort), ("solo", solo)):
            torch.distributed.barrier()
            start = time.perf_counter()
            run.step()
            torch.distributed.barrier()
            if turn >= NUM_WARM:
                seconds[name].append(time.perf_counter() - start)
    return {"gathered_together": together, "gathered_alone": alone, "seconds": seconds, "num_adapters": len(mixed)}


def _moved_apart(base: Base) -> dict[int, float]:
    """Length -> largest distance of an end in the cohort from the end alone, over the distance that was moved."""
    mixed = {f"p{p}-s{seed}": (p, seed) for p in LENGTHS for seed in range(NUM_SEEDS)}
    cohort = Run(base, mixed)
    start = cohort.rows()
    for _ in range(NUM_COMPARED):
        cohort.step()
    ends = cohort.rows()
    errors: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for name, one in mixed.items():
        solo = Run(base, {name: one})
        for _ in range(NUM_COMPARED):
            solo.step()
        end = solo.rows()[name]
        apart = float((ends[name] - end).norm() / (end - start[name]).norm())
        errors[one[0]].append(apart)
    return {length: float(torch.tensor(of_length).max()) for length, of_length in errors.items()}  # NaN stays


def _rank(rank: int, directory: Path, task: str, num_turns: int, with_bucket: bool) -> None:
    torch.set_num_threads(1)
    with comm.session(backend="gloo", timeout_s=1800, rank=rank, world=WORLD, store=directory / f"store-{task}"):
        cfg = BaseConfig(
            model=str(directory / "base"),
            quantization="nf4",
            compute_dtype="float32",
            sharding="world",
            checkpoint_activations=False,
        )
        base = load.load(cfg, sharding="world", device=torch.device("cpu"))
        assert setup.pack_where_exact(base) is None
        watch = comm.watched(Bucket(BITS_PER_S).take) if with_bucket else contextlib.nullcontext()
        with watch:
            found = _moved_apart(base) if task == "compare" else _measure(base, num_turns)
        (directory / f"{task}-{rank}.json").write_text(json.dumps(found))
        comm.leave(0)


def _run_ranks(
    directory: Path, task: str, num_turns: int, places: Sequence[tuple[list[str], str]], bucket: bool
) -> Any:
    """Start the ranks, each in its place (a command in front, an interface); return what the first one found."""
    ranks = []
    for rank, (before, interface) in enumerate(places):
        arguments = ["--rank", str(rank), "--directory", str(directory), "--task", task, "--turns", str(num_turns)]
        ranks.append(
            subprocess.Popen(
                [*before, sys.executable, __file__, *arguments, *(["--bucket"] if bucket else [])],
                env={**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"},
            )
        )
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"bench_cohort: a rank of {task} left with {codes}")
    return json.loads((directory / f"{task}-0.json").read_text())


@contextlib.contextmanager
def _namespaces() -> Iterator[list[tuple[list[str], str]] | None]:
    """Two network namespaces with a shaped pair of interfaces between them; None where they are not allowed."""
    names = [f"peftscale-{os.getpid()}-{rank}" for rank in range(WORLD)]
    ends = [f"ps{os.getpid() % 10**6}{letter}" for letter in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {ends[0]} type veth peer name {ends[1]}"]
    for rank, (name, end) in enumerate(zip(names, ends, strict=True)):
        inside = f"ip netns exec {name}"
        commands += [
            f"ip link set {end} netns {name}",
            f"{inside} ip addr add 10.201.0.{rank + 1}/24 dev {end}",
            f"{inside} ip link set lo up",
            f"{inside} ip link set {end} up",
            f"{inside} tc qdisc add dev {end} root tbf rate {BITS_PER_S / 1e6:.0f}mbit burst 256kb latency 100ms",
        ]
    try:
        try:
            for command in commands:
                subprocess.run(command.split(), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            yield None
            return
        yield [(["ip", "netns", "exec", name], end) for name, end in zip(names, ends, strict=True)]
    finally:
        for name in names:  # their interfaces go with them
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _report(link: str, found: dict[str, Any], out: Path, setting: dict[str, int]) -> None:
    num = found["num_adapters"]
    alone = set(found["gathered_alone"])
    assert len(alone) == 1, "adapters alone gathered differently"
    each = found["gathered_together"] / num
    middle = {name: statistics.median(values) for name, values in found["seconds"].items()}
    cohort_s, ratio = middle["cohort"] / num, middle["solo"] * num / middle["cohort"]
    print(
        f"| {link} | {alone.pop():,} | {each:,.0f} | {found['gathered_alone'][0] / each:g} | "
        f"{middle['solo'] * 1e3:.1f} | {cohort_s * 1e3:.1f} | {ratio:.2f} |",
        flush=True,
    )
    measured: dict[str, int | float] = {
        "solo_gathered_bytes": found["gathered_alone"][0],
        "cohort_gathered_bytes_per_adapter": each,
        "solo_step_s": middle["solo"],
        "cohort_step_s_per_adapter": cohort_s,
        "ratio": ratio,
        "hidden_size": setting["hidden"],
        "num_adapters": num,
    }
    record = records.BenchRecord(
        name=f"cohort-{link.replace(' ', '-')}",
        config_fingerprint=None,
        measured=measured,
        environment=records.environment(),
    )
    records.append(out, record)


def main(
    out: Annotated[Path, typer.Argument(help="Records are appended to it.")] = Path("bench.jsonl"),
    full: Annotated[bool, typer.Option(help="Hidden size 1024, 8 blocks, 11 turns.")] = False,
    rank: Annotated[int | None, typer.Option(hidden=True)] = None,
    directory: Annotated[Path, typer.Option(hidden=True)] = Path(),
    task: Annotated[str, typer.Option(hidden=True)] = "",
    turns: Annotated[int, typer.Option(hidden=True)] = 0,
    bucket: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Both links, then the comparison with adapters alone."""
    if rank is not None:
        _rank(rank, directory, task, turns, bucket)
        return
    setting, num_turns = (FULL, 11) if full else (SMALL, 7)
    with tempfile.TemporaryDirectory(prefix="peftscale-bench-") as temporary, _namespaces() as places:
        os.environ["PEFTSCALE_CACHE"] = f"{temporary}/cache"
        os.environ["DS_ACCELERATOR"] = "cpu"
        save_config(Path(temporary) / "base", llama(**setting))
        save_weights(Path(temporary) / "base")
        local = [([], "lo")] * WORLD
        start: Callable[..., Any] = lambda *a: _run_ranks(Path(temporary), *a)  # noqa: E731
        print(f"hidden size {setting['hidden']}, {setting['layers']} blocks, {WORLD} ranks of one thread. ", end="")
        how = "two network namespaces, shaped by tc tbf" if places else "a token bucket in the byte tap stands for it"
        print(f"The link of 1 Gbit/s: {how}.")
        print("| link | gathered alone, B | in the cohort, B an adapter | ratio | alone, ms a step |", end="")
        print(" in the cohort, ms a step and adapter | ratio |\n|---|---|---|---|---|---|---|")
        _report("loopback", start("loopback", num_turns, local, False), out, setting)
        _report("1 Gbit/s", start("link", num_turns, places or local, places is None), out, setting)
        apart = start("compare", num_turns, local, False)
        how = f"AdamW at {TRAIN.learning_rate}, epsilon {TRAIN.epsilon:g}, warm-up {TRAIN.warmup_steps}"
        print(f"\nafter {NUM_COMPARED} steps of {how}: ", end="")
        worst = ", ".join(f"{error:.1e} at length {length}" for length, error in apart.items())
        print(f"the ends in the cohort are from the ends alone, in distances moved, at most {worst} (target: 1e-5)")


if __name__ == "__main__":
    typer.run(main)
