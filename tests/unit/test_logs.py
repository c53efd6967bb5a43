"""What ranks say is kept with their rank and step, in the order of time, and the first failure is found."""

import json
import logging
import socket
import threading
from pathlib import Path

import pytest

from peftscale import logs

ours, theirs = logging.getLogger("peftscale.base.load"), logging.getLogger("other")


def _failed(directory: Path, rank: int, error: Exception, *, step: int = 3, world: int | None = None) -> None:
    def fail() -> None:
        with logs.kept(directory, rank, world) as book:
            book.step = step
            raise error

    with pytest.raises(type(error)):
        fail()


def test_a_line_has_rank_step_and_level_and_others_are_heard_from_warnings_on(tmp_path: Path) -> None:
    with logs.kept(tmp_path, 2) as book:
        ours.info("packs %s", "the base")
        theirs.info("chatter")
        book.step = 7
        theirs.warning("is slow")
    ours.error("after the run")  # the file is closed
    found = [(line.rank, line.step, line.level, line.message) for line in logs.read(tmp_path)]
    assert found == [(2, 0, "info", "begins"), (2, 0, "info", "packs the base"), (2, 7, "warning", "is slow")]
    assert [line.message for line in logs.read(tmp_path, level="warning")] == ["is slow"]
    for text in (tmp_path / "rank-2.jsonl").read_text().splitlines():
        assert set(json.loads(text)) == {"time", "level", "host", "rank", "step", "logger", "message", "traceback"}


def test_the_first_error_of_the_last_start_is_the_cause(tmp_path: Path) -> None:
    _failed(tmp_path, 0, ValueError("of an earlier start"))
    with logs.kept(tmp_path, 0), logs.kept(tmp_path, 1):
        assert logs.cause(tmp_path) is None  # the one before is no news
    _failed(tmp_path, 0, RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"), step=12)
    _failed(tmp_path, 1, MemoryError("no room"), step=12)  # its clock, or its disk, was slower
    host = socket.gethostname()
    assert logs.cause(tmp_path) == f"rank 1 on {host} at step 12: MemoryError: no room"
    line = logs.read(tmp_path, ranks=[1])[-1]
    assert line.traceback is not None and "raise error\nMemoryError: no room" in line.traceback


def test_a_rank_of_a_larger_start_is_not_asked_by_a_smaller_one(tmp_path: Path) -> None:
    """Of three ranks one is lost, and the run goes on with two, all within minutes."""
    for rank in (1, 2):
        with logs.kept(tmp_path, rank, 3):
            pass  # killed: no more words
    _failed(tmp_path, 0, RuntimeError("Connection closed by peer"), world=3)
    assert "rank 1 on" in str(logs.cause(tmp_path)) and "and rank 2 on" in str(logs.cause(tmp_path))
    with logs.kept(tmp_path, 0, 2):  # the other one has not come so far
        assert logs.cause(tmp_path) is None
    _failed(tmp_path, 1, MemoryError("no room"), world=2)
    assert logs.cause(tmp_path) == f"rank 1 on {socket.gethostname()} at step 3: MemoryError: no room"


def test_of_ranks_that_only_miss_another_one_the_one_without_a_word_is_the_cause(tmp_path: Path) -> None:
    waited = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 9000ms for recv")
    with logs.kept(tmp_path, 1):
        _failed(tmp_path, 0, waited, step=7)
        _failed(tmp_path, 2, ValueError("Default process group has not been initialized"), step=7)  # Ray took it down
        host = socket.gethostname()
        assert logs.cause(tmp_path) == (
            f"rank 1 on {host} was killed or hangs, without a word; it was missed by rank 0 on {host} at step 7: "
            f"RuntimeError: {waited}"
        )
    _failed(tmp_path, 1, waited, step=7)
    assert logs.cause(tmp_path) == f"rank 0 on {host} at step 7: RuntimeError: {waited}"


def test_a_rank_that_is_known_to_be_gone_is_the_cause_where_nobody_had_the_time_to_miss_it(tmp_path: Path) -> None:
    with logs.kept(tmp_path, 0), logs.kept(tmp_path, 1), logs.kept(tmp_path, 2):
        assert logs.cause(tmp_path) is None
        found = logs.cause(tmp_path, gone=[2])
    assert found == f"rank 2 on {socket.gethostname()} was killed or hangs, without a word"


def test_a_line_that_a_kill_cut_is_left_out_and_the_rest_is_read(tmp_path: Path) -> None:
    with logs.kept(tmp_path, 0):
        ours.warning("whole")
    with (tmp_path / "rank-0.jsonl").open("a") as file:
        file.write("not ours\n" + '{"time": "2026')
    assert [line.message for line in logs.read(tmp_path)] == ["begins", "whole"]


def test_following_gives_every_line_once_in_the_order_of_time(tmp_path: Path) -> None:
    has_ended = threading.Event()
    found: list[str] = []

    def follow() -> None:
        found.extend(line.message for line in logs.follow(tmp_path, [0, 1], "warning", has_ended.is_set))

    with logs.kept(tmp_path, 0), logs.kept(tmp_path, 1), logs.kept(tmp_path, 2):
        theirs.warning("early")
        thread = threading.Thread(target=follow)
        thread.start()
        for number in range(20):
            theirs.warning("%d", number)
        has_ended.set()
        thread.join()
    once = ["early", *map(str, range(20))]
    assert found == [message for message in once for _ in (0, 1)]
