"""A real HTTP server on this machine that plays an OpenAI-compatible endpoint, well or badly."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], str]  # status, headers, body
_ANSWERS = re.compile(r"Assistant A's Answer\]\n(.*?)\n\[The End.*?Assistant B's Answer\]\n(.*?)\n\[The End", re.S)


@dataclass
class Played:
    """What a server was asked, and how it answers: `reply(number, body)`, numbers from 0 in order of arrival."""

    reply: Callable[[int, dict[str, Any]], Reply]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@contextmanager
def judge_server(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Played]:
    played, lock = Played(reply), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(played.bodies)
                played.bodies.append(body)
                played.keys.append(self.headers.get("Authorization"))
                played.times.append(time.monotonic())
            status, headers, text = played.reply(number, body)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except (BrokenPipeError, ConnectionResetError):
                pass  # the judge stopped waiting, which is what a slow answer is for

        def log_message(self, *words: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    played.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield played
    finally:
        server.shutdown()
        server.server_close()


def says(text: str) -> Reply:
    """A chat completion."""
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers in the order in which the judge sees them."""
    return _ANSWERS.search(body["messages"][0]["content"]).groups()


def prefers_longer(number: int, body: dict[str, Any]) -> Reply:
    """A fair judge with a simple taste; it explains first and mentions both marks, as models do."""
    found = _ANSWERS.search(body["messages"][0]["content"])
    if found is None:
        return says("[[A]]")  # the check at the start
    a, b = found.groups()
    verdict = "C" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return says(f"[[A]] or [[B]]? I say [[{verdict}]]")
