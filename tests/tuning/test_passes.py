"""A pass whose process is lost is begun again, on a local Ray in a process of its own."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from functools import partial
import ray
from prefopt_ray.tuning.passes import _first_of_each, _retried

def work(died):
    for trial in ("0001", "0002"):
        yield trial, ""
    if not os.path.exists(died):
        open(died, "w").close()
        os.kill(os.getpid(), 9)
    yield "0003", ""

def broken():
    yield "0001", ""
    raise ValueError("on purpose")

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
once = dict(num_returns="streaming", max_retries=0)
print([trial for trial, _ in _first_of_each(_retried(partial(ray.remote(work).options(**once).remote, sys.argv[1])))])
try:
    list(_retried(ray.remote(broken).options(**once).remote))
except ValueError as error:
    print(type(error).__name__)
"""


def test_every_trial_is_told_once_though_the_process_died_and_an_error_of_the_work_is_not_tried_again(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "died")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "['0001', '0002', '0003']" in done.stdout and "ValueError" in done.stdout
    assert (tmp_path / "died").exists()
