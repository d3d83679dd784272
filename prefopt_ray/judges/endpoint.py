"""A chat model behind an OpenAI-compatible address as a pairwise judge: retries, cache, cost cap.

The key is read from the environment when a request is made, and is cut out of everything that comes back: it is in
no spec, file, log or error. Template and verdict marks are MT-bench's (Zheng et al. 2023, arXiv:2306.05685).
"""

import json
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import requests

from prefopt_ray.errors import JudgeError, Problem
from prefopt_ray.judges.base import Advance, Preferences, Prompt, Tally
from prefopt_ray.judges.cache import Answer, AnswerCache
from prefopt_ray.spec.sections import EndpointSpec
from prefopt_ray.train.scorers import Completion

TEMPLATE = """\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the user \
question displayed below. You should choose the assistant that follows the user's instructions and answers the user's \
question better. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, depth, \
creativity, and level of detail of their responses. Begin your evaluation by comparing the two responses and provide \
a short explanation. Avoid any position biases and ensure that the order in which the responses were presented does \
not influence your decision. Do not allow the length of the responses to influence your evaluation. Do not favor \
certain names of the assistants. Be as objective as possible. After providing your explanation, output your final \
verdict by strictly following this format: "[[A]]" if assistant A is better, "[[B]]" if assistant B is better, and \
"[[C]]" for a tie.

[User Question]
{prompt}

[The Start of Assistant A's Answer]
{a}
[The End of Assistant A's Answer]

[The Start of Assistant B's Answer]
{b}
[The End of Assistant B's Answer]
"""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
GIVE_UP_AFTER = 5  # questions in a row without an answer: the server is gone, and each has cost minutes
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_SHARES = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class Question:
    prompt: Prompt
    a: Completion
    b: Completion


class Missing(Enum):
    """Why a question has no answer."""

    UNANSWERED = "no answer after every retry"
    CAPPED = "the cost cap was reached"


class Endpoint:
    """A pairwise judge. Raises JudgeError when the template or the key is missing."""

    def __init__(self, spec: EndpointSpec, *, cache: Path | None) -> None:
        self.name = spec.model
        self._spec = spec
        self._cache = AnswerCache(cache)
        self._template = _read_template(spec.template)
        self._local = threading.local()  # a requests.Session serves one thread
        self._key()

    def check(self) -> None:
        """One short question: address, key, model and `request` are accepted. Raises JudgeError."""
        meter = _Meter(self._spec)
        body = self._body("Answer with [[A]] and nothing else.")
        answer = self._ask(body, meter, stopped=threading.Event())
        if isinstance(answer, Missing):
            fix = "start the server, or correct the url"
            raise JudgeError(self._problem(meter.last_trouble, "does not answer", fix))
        if self._spec.max_usd is not None and not answer.input_tokens:
            raise JudgeError(self._problem("", "reports no token usage, so max_usd cannot be kept", "use max_calls"))

    def prefer(
        self, prompts: Sequence[Prompt], first: Sequence[Completion], second: Sequence[Completion], *, advance: Advance
    ) -> Preferences:
        questions = [Question(*row) for row in zip(prompts, first, second, strict=True)]
        meter, stopped = _Meter(self._spec), threading.Event()
        answers = self._answer_all(questions, meter, stopped=stopped, advance=advance)
        shares = np.array([np.nan if isinstance(a, Missing) else _share(a.text) for a in answers])
        told = [a for a in answers if isinstance(a, Answer)]
        unparsable = [a.text for a in told if np.isnan(_share(a.text))]
        return Preferences(shares, Tally(
            asked=meter.calls, cached=meter.cached, unparsable=len(unparsable),
            unanswered=answers.count(Missing.UNANSWERED), not_asked=answers.count(Missing.CAPPED),
            usd=meter.usd, example=_example(unparsable),
        ))

    # -- many questions ----------------------------------------------------------------------------

    def _answer_all(
        self, questions: Sequence[Question], meter: "_Meter", *, stopped: threading.Event, advance: Advance
    ) -> list[Answer | Missing]:
        """In the order of the questions, several at once. An error of one, or of `advance`, stops them all."""
        answers: list[Answer | Missing] = [Missing.CAPPED] * len(questions)
        todo = iter(enumerate(questions))
        running: dict[Any, int] = {}
        done = 0
        pool = ThreadPoolExecutor(self._spec.concurrency, thread_name_prefix="judge")
        try:
            while True:
                # Handed out only as threads come free: what the cap leaves out is then the end of the list.
                for number, question in todo if len(running) < self._spec.concurrency else ():
                    running[pool.submit(self._answer, question, meter, stopped)] = number
                    if len(running) == self._spec.concurrency:
                        break
                if not running:
                    return answers
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    answers[running.pop(future)] = future.result()
                done += len(finished)
                advance(done)
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, question: Question, meter: "_Meter", stopped: threading.Event) -> Answer | Missing:
        body = self._body(_filled(self._template, question))
        key = [self._spec.url, body]
        known = self._cache.get(key)
        if known is not None:
            meter.hit()
            return known
        answer = self._ask(body, meter, stopped=stopped)
        if isinstance(answer, Answer) and not np.isnan(_share(answer.text)):
            self._cache.put(key, answer)  # what has no verdict is asked again next time
        if meter.unanswered_in_a_row >= GIVE_UP_AFTER:
            fix = "`prefopt judge SWEEP` goes on from the answers that are kept"
            raise JudgeError(self._problem(meter.last_trouble, "does not answer any more", fix))
        return answer

    def _body(self, content: str) -> dict[str, Any]:
        return {**self._spec.request, "model": self._spec.model, "messages": [{"role": "user", "content": content}]}

    # -- one question ------------------------------------------------------------------------------

    def _ask(self, body: dict[str, Any], meter: "_Meter", *, stopped: threading.Event) -> Answer | Missing:
        """An answer, with as many tries as allowed. Raises JudgeError for what no retry mends."""
        for attempt in range(self._spec.retries + 1):
            if stopped.is_set() or not meter.may_ask():
                return Missing.CAPPED
            pause: float | None = None
            try:
                status, pause, text = self._send(body)
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                meter.trouble(_cause(error))
            else:
                if status == 200:
                    return meter.count(_parsed(text))
                meter.trouble(f"status {status}")
                if status != 429 and status < 500 and status != 408:
                    raise JudgeError(self._refusal(status, text))
            if pause is not None and pause > LONGEST_WAIT_S:
                meter.trouble(f"it asks to wait {pause:.0f} s")
                break
            if attempt < self._spec.retries:
                stopped.wait(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) if pause is None else pause)
        meter.unanswered()
        return Missing.UNANSWERED

    def _send(self, body: dict[str, Any]) -> tuple[int, float | None, str]:
        """(status, seconds the server asks to wait, body without the key)."""
        key = self._key()
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        response = self._local.session.post(
            f"{self._spec.url}/chat/completions", json=body, timeout=self._spec.timeout_s, allow_redirects=False,
            auth=_Bearer(key),  # not a header: requests would replace that by what ~/.netrc says
        )
        text = response.text.replace(key, "[key]") if key else response.text
        return response.status_code, _seconds(response.headers.get("Retry-After")), text

    def _key(self) -> str:
        """"" where no key is wanted. Raises JudgeError when the variable is not set."""
        name = self._spec.key_env
        if name is None:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise JudgeError(Problem(
                "environment", name, "not set", f"the judge at {self._spec.url} needs a key (judge.endpoint.key_env)",
                f"export {name}=... before `prefopt`; remove key_env for a server without keys",
            ))
        return key

    def _refusal(self, status: int, text: str) -> Problem:
        fixes = {401: f"is {self._spec.key_env or 'key_env'} the right key?", 403: "may this key use this model?",
                 404: "is the url right (up to /v1), and the model's name?"}
        shown = " ".join(text.split())[:200]
        fix = fixes.get(status, "see judge.endpoint.request")
        return self._problem(f"status {status}: {shown}", "refuses the question", fix)

    def _problem(self, found: str, rule: str, fix: str) -> Problem:
        return Problem(self._spec.url, "judge.endpoint", found, f"the judge {self._spec.model} {rule}", fix)


class _Bearer(requests.auth.AuthBase):
    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class _Meter:
    """Counts calls and dollars over threads. Calls are exact; dollars are known when an answer is there, so the calls
    in flight when the cap is reached are still paid."""

    def __init__(self, spec: EndpointSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self.calls = self.cached = self.unanswered_in_a_row = 0
        self.usd: float | None = None if spec.usd_per_million_tokens is None else 0.0
        self.last_trouble = ""

    def may_ask(self) -> bool:
        """Whether one more request is within the cap; it is counted."""
        with self._lock:
            spent = self.usd is not None and self._spec.max_usd is not None and self.usd >= self._spec.max_usd
            if spent or self.calls >= self._spec.max_calls:
                return False
            self.calls += 1
            return True

    def count(self, answer: Answer) -> Answer:
        price = self._spec.usd_per_million_tokens
        with self._lock:
            self.unanswered_in_a_row = 0
            if price is not None:
                self.usd += (answer.input_tokens * price.input + answer.output_tokens * price.output) / 1e6
        return answer

    def hit(self) -> None:
        with self._lock:
            self.cached += 1

    def trouble(self, what: str) -> None:
        with self._lock:
            self.last_trouble = what

    def unanswered(self) -> None:
        with self._lock:
            self.unanswered_in_a_row += 1


def _example(unparsable: Sequence[str]) -> str:
    """One of them, for the person who must mend the template or the model."""
    if not unparsable:
        return ""
    return next((text[:200] for text in unparsable if text), "no chat completion")


def _filled(template: str, question: Question) -> str:
    """In one pass, so that an answer which says {b} stays what it is."""
    values = {"{prompt}": question.prompt.text, "{a}": question.a.text, "{b}": question.b.text}
    return re.sub(r"\{(?:prompt|a|b)\}", lambda found: values[found.group()], template)


def _share(text: str) -> float:
    """The last mark, since explanations come first and may name both; NaN when there is none."""
    marks = _VERDICT.findall(text)
    return _SHARES[marks[-1]] if marks else np.nan


def _read_template(place: str | None) -> str:
    if place is None:
        return TEMPLATE
    try:
        text = Path(place).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(Problem(place, "judge.endpoint.template", "", f"cannot be read: {error}",
                                 "a path is relative to the folder of the spec")) from error
    missing = [mark for mark in ("{prompt}", "{a}", "{b}") if mark not in text]
    if missing or "[[A]]" not in text:
        rule = f"must hold {', '.join(missing)}" if missing else "must ask for [[A]], [[B]] or [[C]] (a tie)"
        raise JudgeError(Problem(place, "judge.endpoint.template", "", rule, "the guide on judges shows the usual one"))
    return text


def _parsed(text: str) -> Answer:
    """The answer in a response's body; one of another shape than an OpenAI server's holds no verdict."""
    try:
        data = json.loads(text)
        content = data["choices"][0]["message"]["content"]
        usage = data.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer("", 0, 0)
    return Answer(content if isinstance(content, str) else "", *tokens)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3); None for neither."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def _cause(error: requests.RequestException) -> str:
    """Without the request, whose text fills a screen."""
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    text = str(error)
    return "the connection was refused" if "refused" in text else f"{type(error).__name__}: {text[:120]}"
