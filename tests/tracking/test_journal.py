"""The journal and its shipper against a sink that can be down, slow or refuse: no MLflow here."""

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from prefopt_ray.tracking import journal as journal_module
from prefopt_ray.tracking import operations
from prefopt_ray.tracking.journal import Entry, Journal, Refused, Shipper
from prefopt_ray.tracking.operations import (
    DatasetInfo,
    LogBatch,
    LogDatasets,
    LogFolder,
    LogText,
    OpenRun,
    Operation,
    SetExperimentTag,
    SetStatus,
)

EVERY_KIND = [
    OpenRun("t1", "ipo_sum β=0.1 #1", run_id="r1"),
    OpenRun("t1", "no run id yet"),
    LogBatch("t1", points=((0, {"rank": 1.0}), (5, {"a": 0.0})), params={"p": "1"}, tags={"t": "é"}, dropped=2),
    LogBatch("sweep", run_tags={"best_run_id": "t1"}),
    LogDatasets("t1", (DatasetInfo("gold", "gold", "abc", "train", revision="main"),)),
    SetStatus("t1", "FINISHED"),
    LogText("sweep", "spec.yaml", "a: 1\n"),
    LogText("sweep", "empty.txt", ""),
    LogFolder("t1", "/x/y", "adapter"),
    SetExperimentTag("view", "{}"),
]


class Sink:
    """A place to deliver to, which keeps what it was given."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.up = True
        self.calls = 0

    def deliver(self, entry: Entry) -> None:
        self.calls += 1
        if not self.up:
            raise ConnectionError("closed port")
        self.entries.append(entry)

    def answers(self) -> bool:
        return self.up

    @property
    def names(self) -> list[str]:
        return [entry.operation.file for entry in self.entries]


def text(name: str) -> LogText:
    return LogText("sweep", name, "x")


def test_every_operation_survives_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for operation in EVERY_KIND:
        journal.append(operation)
    assert [entry.operation for entry in Journal(tmp_path).entries()] == EVERY_KIND


def test_delivery_is_in_order_and_resumes_after_the_last_delivered(tmp_path: Path) -> None:
    journal, first, second = Journal(tmp_path), Sink(), Sink()
    for name in "abc":
        journal.append(text(name))
    assert Shipper(journal, first.deliver, server_answers=first.answers).close(10)
    journal.close()

    journal = Journal(tmp_path)
    assert journal.undelivered == 0
    journal.append(text("d"))
    assert Shipper(journal, second.deliver, server_answers=second.answers).close(10)
    assert (first.names, second.names, journal.undelivered) == (["a", "b", "c"], ["d"], 0)


def test_a_sink_that_is_down_for_a_while_gets_everything_once(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path), Sink()
    sink.up = False
    shipper = Shipper(journal, sink.deliver, server_answers=sink.answers)
    for name in "abc":
        journal.append(text(name))
        shipper.wake()
    time.sleep(1.0)
    assert sink.calls >= 2 and sink.entries == []
    sink.up = True
    assert shipper.close(10)
    assert sink.names == ["a", "b", "c"]
    assert not journal.refused_path.exists()


def test_what_a_dead_sink_never_took_is_counted_and_kept(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path), Sink()
    sink.up = False
    for name in "abc":
        journal.append(text(name))
    shipper = Shipper(journal, sink.deliver, server_answers=sink.answers)
    started = time.monotonic()
    assert shipper.close(1.0)
    assert time.monotonic() - started < 2.0
    assert journal.undelivered == Journal(tmp_path).undelivered == 3


def test_a_refused_operation_becomes_a_dead_letter_and_blocks_nothing(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path), Sink()

    def deliver(entry: Entry) -> None:
        if entry.operation == text("bad"):
            raise Refused(entry.operation, "400: no such key")
        sink.deliver(entry)

    for name in ("a", "bad", "b"):
        journal.append(text(name))
    Shipper(journal, deliver, server_answers=sink.answers).close(10)
    assert sink.names == ["a", "b"]
    letter = json.loads(journal.refused_path.read_text())
    assert letter.pop("why") == "400: no such key"
    assert operations.from_dict(letter) == text("bad")


def test_an_operation_that_fails_while_the_server_answers_others_does_not_block_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "FIRST_WAIT_S", 0.01)
    journal, sink = Journal(tmp_path), Sink()

    def deliver(entry: Entry) -> None:
        if entry.operation == text("bad"):
            raise OSError("500: the object store refuses this one")
        sink.deliver(entry)

    for name in ("a", "bad", "b"):
        journal.append(text(name))
    Shipper(journal, deliver, server_answers=sink.answers).close(20)
    assert sink.names == ["a", "b"]
    assert "object store" in json.loads(journal.refused_path.read_text())["why"]


def test_half_a_line_left_by_a_killed_driver_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(text("a"))
    journal.close()
    with (tmp_path / "operations.jsonl").open("a") as file:
        file.write('{"t": 17, "op": "LogTe')
    journal, sink = Journal(tmp_path), Sink()
    journal.append(text("b"))
    Shipper(journal, sink.deliver, server_answers=sink.answers).close(10)
    assert sink.names == ["a", "b"]


@pytest.mark.parametrize("line", ["not json", "[]", '{"t": 1, "op": "Unheard"}', '{"t": 1, "op": "SetStatus"}', "{}"])
def test_a_line_that_is_no_operation_is_a_dead_letter(tmp_path: Path, line: str) -> None:
    (tmp_path / "operations.jsonl").write_text(line + "\n")
    journal, sink = Journal(tmp_path), Sink()
    journal.append(text("a"))
    Shipper(journal, sink.deliver, server_answers=sink.answers).close(10)
    assert sink.names == ["a"]
    assert json.loads(journal.refused_path.read_text())["line"] == line + "\n"


def test_times_increase_even_when_the_clock_was_set_back(tmp_path: Path) -> None:
    ahead_ms = (time.time_ns() // 1_000_000) + 3_600_000
    line = {"t": ahead_ms, **operations.to_dict(text("a"))}
    (tmp_path / "operations.jsonl").write_text(json.dumps(line) + "\n")
    journal = Journal(tmp_path)
    for name in "bcd":
        journal.append(text(name))
    assert [entry.at_ms for entry in journal.entries()] == [ahead_ms, ahead_ms + 1, ahead_ms + 2, ahead_ms + 3]


def test_a_value_that_is_not_finite_cannot_enter_the_journal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Journal(tmp_path).append(LogBatch("t1", points=((0, {"a": float("nan")}),)))


def test_closing_does_not_wait_for_a_hanging_request(tmp_path: Path) -> None:
    journal, release = Journal(tmp_path), threading.Event()
    journal.append(text("a"))
    shipper = Shipper(journal, lambda entry: release.wait(30) and None, server_answers=lambda: True)
    started = time.monotonic()
    assert not shipper.close(0.5)
    assert time.monotonic() - started < 2.0
    assert journal.undelivered == 1
    release.set()


def test_the_driver_imports_tracking_without_mlflow() -> None:
    code = "import sys; from prefopt_ray.tracking import runs, server, views; "
    code += "print([m for m in ('mlflow', 'pandas', 'torch', 'ray') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_appending_a_report_takes_the_caller_under_two_milliseconds(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    points = tuple((step, {f"train/m{k}": step / (k + 3) for k in range(8)}) for step in range(20))
    batch: Operation = LogBatch("t1", points=(*points, (20, {f"eval/m{k}": k / 7 for k in range(60)})))
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        journal.append(batch)
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 2e-3
