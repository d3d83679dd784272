"""An endpoint as a judge, against a real server that answers well, late, wrongly, or not at all."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judges.judge_server import Reply, judge_server, prefers_longer, says, shown

from prefopt_ray.errors import JudgeError
from prefopt_ray.judges.base import Preferences, Prompt, silent
from prefopt_ray.judges.endpoint import Endpoint
from prefopt_ray.judges.tournament import compare
from prefopt_ray.spec.sections import EndpointSpec
from prefopt_ray.train.scorers import Completion

PROMPTS = [Prompt(f"question {number}") for number in range(4)]
LONG = [Completion("long answer", 2, finished=True)] * 4
SHORT = [Completion("short", 1, finished=True)] * 4
KEY = "sk-judge-0123456789abcdef"


def endpoint(url: str, *, cache: Path | None = None, **settings: Any) -> Endpoint:
    given = {"retries": 2, "concurrency": 2, "timeout_s": 5.0} | settings
    return Endpoint(EndpointSpec(url=url, model="played", **given), cache=cache)


def asked(judge: Endpoint) -> Preferences:
    return judge.prefer(PROMPTS, LONG, SHORT, advance=silent)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt_ray.judges.endpoint.FIRST_WAIT_S", 0.02)


def test_the_last_mark_is_the_verdict() -> None:
    with judge_server(prefers_longer) as server:
        judge = endpoint(server.url)
        assert asked(judge).shares.tolist() == [1, 1, 1, 1]
        assert judge.prefer(PROMPTS, SHORT, LONG, advance=silent).shares.tolist() == [0, 0, 0, 0]
        assert judge.prefer(PROMPTS, LONG, LONG, advance=silent).shares.tolist() == [0.5] * 4


def test_both_orders_are_asked_and_a_flipped_verdict_is_a_tie() -> None:
    def biased(number: int, body: dict[str, Any]) -> Reply:
        return says("[[A]]")  # whatever stands first

    with judge_server(biased) as server:
        outcomes = compare(endpoint(server.url), PROMPTS, [(LONG, SHORT)])
        orders = {shown(body) for body in server.bodies}
    assert orders == {("long answer", "short"), ("short", "long answer")}
    assert outcomes.values.tolist() == [[0.5] * 4] and outcomes.flipped == 4


def test_a_fair_verdict_does_not_depend_on_the_order() -> None:
    with judge_server(prefers_longer) as server:
        judge = endpoint(server.url)
        forth = compare(judge, PROMPTS, [(LONG, SHORT)]).values
        back = compare(judge, PROMPTS, [(SHORT, LONG)]).values
    assert forth.tolist() == [[1] * 4] and (back == 1 - forth).all()


def test_a_busy_server_is_asked_again_after_the_time_it_names() -> None:
    def busy_at_first(number: int, body: dict[str, Any]) -> Reply:
        return (429, {"Retry-After": "0.4"}, "slow down") if number == 0 else prefers_longer(number, body)

    with judge_server(busy_at_first) as server:
        given = asked(endpoint(server.url, concurrency=1))
    assert given.shares.tolist() == [1, 1, 1, 1] and given.tally.asked == 5
    assert server.times[1] - server.times[0] >= 0.4


def test_waits_between_tries_double() -> None:
    with judge_server(lambda number, body: (500, {}, "")) as server:
        given = endpoint(server.url, retries=3).prefer(PROMPTS[:1], LONG[:1], SHORT[:1], advance=silent)
    gaps = np.diff(server.times)
    assert len(gaps) == 3 and all(gap >= low for gap, low in zip(gaps, (0.02, 0.04, 0.08), strict=True))
    assert np.isnan(given.shares).all() and given.tally.unanswered == 1


def test_a_slow_answer_is_given_up_and_asked_again() -> None:
    def slow_at_first(number: int, body: dict[str, Any]) -> Reply:
        if number == 0:
            time.sleep(1.0)
        return prefers_longer(number, body)

    with judge_server(slow_at_first) as server:
        started = time.monotonic()
        given = asked(endpoint(server.url, timeout_s=0.3, concurrency=1))
    assert given.shares.tolist() == [1, 1, 1, 1] and time.monotonic() - started < 1.0


@pytest.mark.parametrize("garbage", [
    says("they are both lovely"), says(""), (200, {}, "<html>[[A]]</html>"), (200, {}, '{"choices": []}'),
    (200, {}, '["[[A]]"]'), (200, {}, '{"choices": [{"message": {"content": null}}]}'),
])
def test_an_answer_without_a_verdict_is_counted_and_judges_nothing(garbage: Reply) -> None:
    with judge_server(lambda number, body: garbage if number % 2 else prefers_longer(number, body)) as server:
        given = asked(endpoint(server.url, concurrency=1))
    assert np.isnan(given.shares).tolist() == [False, True, False, True]
    assert given.tally.unparsable == 2 and given.tally.example


def test_a_server_that_is_gone_ends_the_judging() -> None:
    with judge_server(lambda number, body: (503, {}, "")) as server:
        judge = endpoint(server.url, retries=0, concurrency=1)
        with pytest.raises(JudgeError, match="does not answer any more"):
            judge.prefer(PROMPTS * 4, LONG * 4, SHORT * 4, advance=silent)
    assert len(server.bodies) == 5


def test_known_answers_are_not_asked_for_again(tmp_path: Path) -> None:
    with judge_server(prefers_longer) as server:
        first = asked(endpoint(server.url, cache=tmp_path))
        again = asked(endpoint(server.url, cache=tmp_path))
        assert len(server.bodies) == first.tally.asked == 4
        assert again.shares.tolist() == first.shares.tolist()
        assert (again.tally.asked, again.tally.cached) == (0, 4)
        for other in ({"request": {"temperature": 0.5}}, {"template": str(_template(tmp_path))}):
            assert asked(endpoint(server.url, cache=tmp_path, **other)).tally.asked == 4


def test_answers_without_a_verdict_are_not_remembered(tmp_path: Path) -> None:
    with judge_server(lambda number, body: says("hm")) as server:
        asked(endpoint(server.url, cache=tmp_path))
        server.reply = prefers_longer
        assert asked(endpoint(server.url, cache=tmp_path)).shares.tolist() == [1, 1, 1, 1]


def test_a_cap_on_calls_is_never_exceeded_and_leaves_whole_prompts() -> None:
    with judge_server(prefers_longer) as server:
        outcomes = compare(endpoint(server.url, max_calls=5, concurrency=3), PROMPTS, [(LONG, SHORT)])
        assert len(server.bodies) == 5
    assert outcomes.values[0, :2].tolist() == [1, 1] and np.isnan(outcomes.values[0, 2:]).all()
    assert outcomes.tally.not_asked == 3


def test_a_cap_on_dollars_stops_after_the_calls_that_are_out() -> None:
    prices = {"input": 10_000.0, "output": 100_000.0}  # 100 and 10 tokens: 2 dollars an answer
    with judge_server(prefers_longer) as server:
        given = asked(endpoint(server.url, max_usd=3.0, usd_per_million_tokens=prices, concurrency=1))
        assert len(server.bodies) == 2
    assert given.tally.usd == pytest.approx(4.0) and given.tally.not_asked == 2


def test_what_watches_can_end_the_judging_at_once() -> None:
    def enough(done: int) -> None:
        raise TimeoutError

    with judge_server(prefers_longer) as server:
        with pytest.raises(TimeoutError):
            endpoint(server.url, concurrency=1).prefer(PROMPTS * 20, LONG * 20, SHORT * 20, advance=enough)
        assert len(server.bodies) <= 2


def test_the_key_is_sent_and_nothing_else_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge_server(lambda number, body: says(f"your key is {KEY} [[A]]")) as server:
        judge = endpoint(server.url, cache=tmp_path, key_env="JUDGE_KEY")
        given = asked(judge)
        assert server.keys[0] == f"Bearer {KEY}" and given.shares.tolist() == [1, 1, 1, 1]
        server.reply = lambda number, body: (401, {}, f"bad key {KEY}")
        with pytest.raises(JudgeError) as error:
            judge.prefer(PROMPTS, SHORT, LONG, advance=silent)
    assert "JUDGE_KEY" in str(error.value)
    assert KEY not in f"{error.value}{error.value.__cause__}{caplog.text}{judge.__dict__}"
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*.json"))


def test_a_missing_key_is_named_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(JudgeError, match="JUDGE_KEY.*not set.*export JUDGE_KEY"):
        endpoint("http://127.0.0.1:9/v1", key_env="JUDGE_KEY")


def test_a_netrc_entry_does_not_replace_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge_server(prefers_longer) as server:
        asked(endpoint(server.url, key_env="JUDGE_KEY"))
        asked(endpoint(server.url))
    assert server.keys == [f"Bearer {KEY}"] * 4 + [None] * 4


def test_an_unreachable_endpoint_is_refused_by_the_check() -> None:
    with pytest.raises(JudgeError, match="127.0.0.1:9/v1.*refused.*start the server"):
        endpoint("http://127.0.0.1:9/v1", retries=0).check()


def test_the_check_names_a_wrong_address_and_missing_usage() -> None:
    with judge_server(lambda number, body: (404, {}, "no such page")) as server:
        with pytest.raises(JudgeError, match="404.*no such page.*is the url right"):
            endpoint(server.url).check()
        server.reply = lambda number, body: (200, {}, '{"choices": [{"message": {"content": "[[A]]"}}]}')
        endpoint(server.url).check()
        with pytest.raises(JudgeError, match="max_calls"):
            endpoint(server.url, max_usd=1.0, usd_per_million_tokens={"input": 1.0, "output": 1.0}).check()


def test_a_template_must_ask_for_a_verdict(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("{prompt} {a}")
    with pytest.raises(JudgeError, match=r"\{b\}"):
        endpoint("http://127.0.0.1:9/v1", template=str(tmp_path / "bad.txt"))


def test_an_answer_that_names_a_placeholder_stays_as_it_is() -> None:
    said = [Completion("{b} and {prompt}", 3, finished=True)] * 4
    with judge_server(prefers_longer) as server:
        endpoint(server.url).prefer(PROMPTS, said, SHORT, advance=silent)
        assert {shown(body) for body in server.bodies} == {("{b} and {prompt}", "short")}


def _template(folder: Path) -> Path:
    path = folder / "template.txt"
    path.write_text("{prompt}: [Assistant A's Answer]\n{a}\n[The End Assistant B's Answer]\n{b}\n[The End] [[A]]?")
    return path
