"""What a person types about a sweep on a cluster: call and print. `options` are the command line's."""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

from prefopt_ray.cluster.checks import versions
from prefopt_ray.cluster.client import Cluster
from prefopt_ray.cluster.following import Follower
from prefopt_ray.cluster.messages import heard
from prefopt_ray.cluster.rayjob import print_rayjob
from prefopt_ray.errors import ClusterError, Problem, printable
from prefopt_ray.report.lines import summary_lines
from prefopt_ray.report.terminal import make_console
from prefopt_ray.spec import SweepSpec


def submit(spec: SweepSpec, options: argparse.Namespace) -> int:
    if options.print_rayjob:
        print(print_rayjob(spec), end="")
        return 0
    cluster = Cluster(_address(options))
    taken = cluster.submit(spec, fresh=options.new, versions=versions())
    if options.json:
        print(json.dumps(vars(taken)))
    else:
        doing = "is finished (--new begins afresh)" if taken.finished else "goes on" if taken.resumed else "began"
        print(f"job    {taken.job}\nsweep  {Path(taken.folder).name} {doing}; results in {taken.folder} on the cluster\n"
              f"prefopt status|logs|stop {taken.sweep} --address {cluster.address}")
    return _follow(cluster, taken.job, spec) if options.follow else 0


def status(options: argparse.Namespace) -> int:
    cluster = Cluster(_address(options))
    job, accepted = cluster.find(options.sweep)
    summary = {"job": job.job, "job_state": job.state, **cluster.status(accepted["folder"])}
    print(json.dumps(summary) if options.json else "\n".join(summary_lines(summary)))
    return 0


def logs(options: argparse.Namespace) -> int:
    cluster = Cluster(_address(options))
    job, _ = cluster.find(options.sweep)

    def told(line: str) -> None:
        if heard(line) is None and line and (options.trial is None or f"trial {options.trial} " in line):
            print(printable(line), flush=True)

    if options.follow:
        cluster.follow(job.job, told)
    else:
        for line in cluster.log(job.job).split("\n"):
            told(line)
    return 0


def stop(options: argparse.Namespace) -> int:
    cluster = Cluster(_address(options))
    job, accepted = cluster.find(options.sweep)
    end = cluster.kill if options.now else cluster.stop
    end(job.job)
    print(f"{job.job}: {str(cluster.state(job.job)).lower()}; submit the same spec again to go on with {accepted['sweep']}")
    return 0


def list_jobs(options: argparse.Namespace) -> int:
    jobs = Cluster(_address(options)).jobs()
    if options.json:
        print(json.dumps([{"job": job.job, "name": job.name, "state": job.state, "started": job.started,
                           "ended": job.ended, "storage": job.metadata.get("storage")} for job in jobs]))
        return 0
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else ""
        print(f"{job.job:<40} {job.state:<10} {began:<17} {job.metadata.get('storage', '')}")
    if not jobs:
        print(f"no sweeps on {options.address}")
    return 0


def _follow(cluster: Cluster, job: str, spec: SweepSpec) -> int:
    """The live table of a sweep elsewhere; Ctrl-C leaves the sweep running."""
    with Follower(make_console(), spec) as follower:
        try:
            ended = cluster.follow(job, follower.told)
        except KeyboardInterrupt:
            print(f"not followed any more; the sweep goes on: prefopt logs {job} --follow", file=sys.stderr)
            return 130
    return 0 if str(ended) == "SUCCEEDED" else 1


def _address(options: argparse.Namespace) -> str:
    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not re.fullmatch(r"https?://[^\s/]+/?", address):
        raise ClusterError(Problem(
            "command line", "--address", repr(address[:200]) if address else "", "must be the cluster's dashboard",
            "write --address http://127.0.0.1:8265, or set RAY_API_SERVER_ADDRESS",
        ))
    return address
