"""Answers of an endpoint on disk, one small file each, named by the content of the whole question.

So a judging that was cut short, or is repeated with more finalists, pays only for what is new. Knows no keys.
"""

import hashlib
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What an endpoint said, and what it counted."""

    text: str
    input_tokens: int
    output_tokens: int


class AnswerCache:
    """A folder; safe for many threads and processes. `None` as the folder remembers nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, question: Any) -> Answer | None:
        if self._folder is None:
            return None
        path = self._path(question)
        try:
            return Answer(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s is not whole (%s); it is asked again", path, error)
            return None

    def put(self, question: Any, answer: Answer) -> None:
        if self._folder is None:
            return
        path = self._path(question)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
        partial.write_text(json.dumps(asdict(answer), ensure_ascii=False), encoding="utf-8")
        os.replace(partial, path)

    def _path(self, question: Any) -> Path:
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:]}.json"
