"""A real Ray head with a token: submit, follow, ask, stop, submit again, from a process that knows address and token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from journeys.journey import Outcome, command, environment, write_pairs
from tiny import save_chat_model

from prefopt_ray.results.ledger import read_events, read_sweep
from prefopt_ray.trial import EndState

TOKEN = "0f" * 16  # noqa: S105 - of a head that lives as long as this test
PLANTED = "a-value-nobody-may-read"
SPEC = """
name: far
model: {policy: ./model, dtype: float32}
data: {train: {source: pairs.jsonl}, max_tokens: 64}
training: {steps: 20, batch_pairs: 8}
search: {trials_per_loss: 1, losses: {sigmoid: {}, ipo_sum: {}}}
samples: {at: never}
resources: {gpus_per_trial: 0}
secrets: [PREFOPT_PLANTED]
"""


@dataclass(frozen=True)
class Head:
    """A cluster of one machine, and a person beside it."""

    address: str
    home: Path  # of the person: spec, model, pairs
    storage: Path

    def prefopt(self, *arguments: str, token: str | None = TOKEN, timeout_s: float = 300) -> Outcome:
        """A command that knows the address and a token, and nothing else of the head."""
        known = {k: v for k, v in environment().items() if not k.startswith("RAY_")}
        known |= {"HOME": str(self.home), **({"RAY_AUTH_TOKEN": token} if token else {})}
        done = subprocess.run(
            command(*arguments, "--address", self.address), cwd=self.home, env=known, capture_output=True, text=True,
            timeout=timeout_s,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def submit(self, *arguments: str, **options: object) -> Outcome:
        return self.prefopt("submit", "sweep.yaml", "--storage", str(self.storage), *arguments, **options)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Started as `ray start` does, in a session of its own; ended by its process group alone."""
    # Short: Ray's sockets lie under it, and their paths are limited.
    place, home = tmp_path_factory.mktemp("ray"), tmp_path_factory.mktemp("person")
    save_chat_model(home / "model")
    write_pairs(home / "pairs.jsonl", count=200)
    (home / "sweep.yaml").write_text(SPEC)
    ports = free_ports(4)
    started = {
        **environment(), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PREFOPT_PLANTED": PLANTED,
        "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    arguments = [
        "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", f"--port={ports[0]}", f"--dashboard-port={ports[1]}",
        "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={ports[2]}", f"--metrics-export-port={ports[3]}",
        f"--temp-dir={short(place)}", "--disable-usage-stats",
    ]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), *arguments], env=started, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_open(ports[1], process, log=place / "log")
        yield Head(f"http://127.0.0.1:{ports[1]}", home, place / "results")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        end_all(short(place))


@pytest.fixture(scope="module")
def followed(head: Head) -> Outcome:
    return head.submit("--follow")


@pytest.mark.parametrize(("token", "said"), [("wrong", "does not accept this token"), (None, "wants a token")])
def test_who_has_no_token_is_told_so(head: Head, token: str | None, said: str) -> None:
    outcome = head.submit(token=token)
    assert outcome.code == 2 and said in outcome.err and "~/.ray/auth_token" in outcome.err


def test_an_address_that_does_not_answer_is_said_to_be_one(head: Head) -> None:
    unknown = Head("http://127.0.0.1:9", head.home, head.storage).submit()
    assert unknown.code == 2 and "does not answer" in unknown.err


def test_what_the_cluster_cannot_do_is_refused_all_at_once_and_soon(head: Head) -> None:
    began = time.monotonic()
    outcome = head.submit("--set", "resources.cpus_per_trial=3", "--set", "secrets=[NOT_THERE]")
    assert outcome.code == 2 and time.monotonic() - began < 60
    assert "the largest node has 2 CPUs" in outcome.err and "NOT_THERE; has no value on" in outcome.err
    assert not list(head.storage.glob("far-*"))


def test_a_sweep_is_followed_to_its_answer(head: Head, followed: Outcome) -> None:
    assert followed.code == 0, followed.err
    assert "began; results in" in followed.out and "Gain on test, which selected nothing" in followed.out
    (folder,) = head.storage.glob("far-*")
    sweep = read_sweep(folder)
    assert sweep.finished and len(sweep.trials) == 3
    assert "\x1e" not in followed.out  # what is told to programs is not shown


def test_its_status_is_what_the_ledger_says(head: Head, followed: Outcome) -> None:
    outcome = head.prefopt("status", "far", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    (folder,) = head.storage.glob("far-*")
    assert found["finished"] and found["folder"] == str(folder) and found["job_state"] == "succeeded"
    assert sum(found["states"].values()) == found["expected"] == 3
    listed = json.loads(head.prefopt("list", "--json").out)
    assert [job["name"] for job in listed if job["job"] == found["job"]] == ["far"]
    words = head.prefopt("status", found["sweep"]).out
    assert f"far {found['sweep']}: finished" in words


def test_its_log_is_there_also_for_one_trial(head: Head, followed: Outcome) -> None:
    whole, one = head.prefopt("logs", "far"), head.prefopt("logs", "far", "--trial", "0001")
    assert "reference pass: " in whole.out and "reference pass: " not in one.out
    assert [line for line in whole.out.splitlines() if "trial 0001 " in line] == one.out.splitlines() != []


def test_a_finished_sweep_that_is_submitted_again_is_not_run_again(head: Head, followed: Outcome) -> None:
    outcome = head.submit("--follow")
    assert outcome.code == 0 and "is finished" in outcome.out and "Gain on test" in outcome.out
    assert len(list(head.storage.glob("far-*"))) == 1


def test_what_is_stopped_or_killed_goes_on_when_it_is_submitted_again(head: Head, followed: Outcome) -> None:
    """Stopped cleanly, then ended at once, then to its end: one sweep, one run of every trial, every step once."""
    spec = (head.home / "sweep.yaml").read_text().replace("name: far", "name: long").replace("steps: 20", "steps: 300")
    (head.home / "sweep.yaml").write_text(spec)
    try:
        assert head.submit().code == 0
        (folder,) = wait_for_a_report(head.storage)
        stopped = head.prefopt("stop", "long")
        assert stopped.code == 0 and "stopped" in stopped.out, stopped.err
        assert any(trial.paused for trial in read_sweep(folder).trials.values())
        events = len(list(read_events(folder / "ledger.jsonl")))
        assert "goes on" in head.submit().out
        wait_for_events(folder, more_than=events)
        assert head.prefopt("stop", "long", "--now").code == 0
        followed_again = head.submit("--follow")
        assert followed_again.code == 0 and "goes on" in followed_again.out, followed_again.err
    finally:
        (head.home / "sweep.yaml").write_text(SPEC)
    assert list(head.storage.glob("long-*")) == [folder]
    ended = read_sweep(folder)
    assert ended.finished and len(ended.trials) == 3
    assert {trial.end_state for trial in ended.trials.values()} <= {EndState.COMPLETED, EndState.STOPPED_EARLY}
    assert len({trial.run_id for trial in ended.trials.values()} - {None}) == 3


def test_a_secret_s_value_is_nowhere(head: Head, followed: Outcome) -> None:
    texts = [followed.out, followed.err, head.prefopt("logs", "far").out]
    texts += [path.read_bytes().decode(errors="replace") for path in head.storage.rglob("*") if path.is_file()]
    assert not any(PLANTED in text or TOKEN in text for text in texts)


# -- the head ----------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Below those that Ray gives to its workers."""
    found, port = [], 6380 + os.getpid() % 1000
    while len(found) < count:
        port += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
    return found


def short(place: Path) -> Path:
    link = Path("/tmp") / f"pr{os.getpid()}"  # noqa: S108 - sockets' paths are limited to 107 characters
    link.mkdir(exist_ok=True)
    return link


def wait_until_open(port: int, process: subprocess.Popen, *, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def wait_for_a_report(storage: Path) -> list[Path]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        folders = [p.parent for p in storage.glob("long-*/ledger.jsonl")]
        if folders and any(trial.reports for trial in read_sweep(folders[0]).trials.values()):
            return folders
        time.sleep(0.1)
    raise AssertionError("no trial reported")


def wait_for_events(folder: Path, *, more_than: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(read_events(folder / "ledger.jsonl"))) > more_than + 2:
            return
        time.sleep(0.1)
    raise AssertionError("nothing went on")


def end_all(session: Path) -> None:
    """Processes that this head started and that are still there, by their command line; then its files."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(session).encode() in (process / "cmdline").read_bytes() and process.name != str(os.getpid()):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended meanwhile
    shutil.rmtree(session, ignore_errors=True)
