"""What a job tells whoever follows it: lines of its log that begin with a mark, one JSON object each.

Other lines are for people. The log is all that a Ray cluster keeps of a job for someone outside.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MARK = "\x1eprefopt "  # the record separator: no text that a person reads begins with it
ACCEPTED, REFUSED, EVENT, SUMMARY = "accepted", "refused", "event", "summary"


@dataclass(frozen=True)
class Message:
    """`kind`: ACCEPTED {sweep, folder, resumed}, REFUSED {problems}, EVENT (a line of the ledger), SUMMARY."""

    kind: str
    value: Mapping[str, Any]


def tell(kind: str, value: Mapping[str, Any]) -> None:
    print(f"{MARK}{json.dumps({'kind': kind, 'value': value}, ensure_ascii=True)}", flush=True)


def heard(line: str) -> Message | None:
    """The message of a log's line; None for a line that is for people, or that was cut."""
    if not line.startswith(MARK):
        return None
    try:
        read = json.loads(line.removeprefix(MARK))
        return Message(read["kind"], read["value"])
    except (ValueError, KeyError, TypeError):
        return None
