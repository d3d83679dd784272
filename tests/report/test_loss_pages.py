"""`prefopt losses`: every loss in one line, one loss on a page whose example works, nothing heavy imported."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt_ray.cli import main
from prefopt_ray.report.loss_pages import loss_list, loss_page
from prefopt_ray.losses.cards import CARDS, find_card
from prefopt_ray.spec import load_spec, parse_spec

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "ray", "mlflow", "transformers", "datasets", "optuna", "pandas")
PAGES = (*CARDS, "ipo", "sigmoid:alpha", "rpo", "mpo", "ipo_sum:js+nll")
SPEC = """
name: x
model: {{policy: org/m}}
training: {{steps: 100}}
data:
  train: {{source: org/p}}
{data}search:
{search}"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["losses", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_list_has_every_loss_once_the_widely_used_first() -> None:
    head, _, rest = loss_list().partition("\nexperimental\n")
    experimental = rest.split("\n\n")[0]
    listed = {True: head.splitlines()[1:], False: experimental.splitlines()}
    for widely_used, lines in listed.items():
        names = [re.split(r"[ ,]", line)[0] for line in lines if line]
        assert names == [card.name for card in CARDS.values() if card.experimental != widely_used]
    assert "sigmoid, dpo" in head and "ipo_mean, ipo" in head


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_the_card_says(name: str) -> None:
    page, card = loss_page(name), find_card(name)
    words = " ".join(page.split())
    for text in (card.formula, card.source, card.note, card.trl, card.clamp, *card.aliases):
        assert " ".join(text.split()) in words
    assert page.startswith(f"{card.name}: {card.title}")
    for param in card.params:
        line = next(line for line in page.splitlines() if line.endswith(f"; {param.rule}"))
        assert f"default {param.default:g}, usual {param.usual.low:g} to {param.usual.high:g}" in line
        assert param.meaning in words
    assert ("the whole optimizer batch" in words) == (card.scope == "batch")
    assert ("remembers numbers" in words) == card.stateful
    assert ("not bounded below" in words) != card.bounded_below
    assert len(page.split("try it")[0]) > 400 and max(map(len, page.split("try it")[0].splitlines())) < 140


@pytest.mark.parametrize("name", PAGES)
def test_both_examples_of_a_page_are_valid_specs(name: str) -> None:
    command, snippet = loss_page(name).split("try it\n")[1].split("or in a spec of your own\n")
    *start, override = shlex.split(command)
    assert start == ["prefopt", "run", "sweeps/quickstart.yaml", "--set"]
    losses = [find_card(name).name]
    assert list(load_spec(ROOT / "sweeps" / "quickstart.yaml", overrides=[override]).loss_spaces()) == losses
    data, search = re.fullmatch(r"(?:  data:\n(.*))?  search:\n(.*)", snippet, flags=re.DOTALL).groups()
    spec = parse_spec(SPEC.format(data=(data or "").replace("    ", "  "), search=search))
    assert list(spec.loss_spaces()) == losses


def test_a_page_shows_the_loss_where_training_starts() -> None:
    assert "0.6931 where the policy is the reference, at beta 0.1" in loss_page("sigmoid")
    assert "2500 where the policy is the reference, at beta 0.01" in loss_page("ipo_sum")
    assert "measured" in loss_page("simpo")


@pytest.mark.parametrize("arguments", [[], ["mpo"], ["orpo"]])
def test_json_is_one_document_with_what_the_text_says(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = run(capsys, *arguments, "--json")
    found = json.loads(out)
    cards = found if isinstance(found, list) else [found]
    assert (code, err) == (0, "")
    assert [card["name"] for card in cards] == ([find_card(*arguments).name] if arguments else list(CARDS))
    for card in cards:
        assert {p["name"]: p["default"] for p in card["parameters"]} == find_card(card["name"]).defaults


@pytest.mark.parametrize(("name", "says"), [
    ("sigmiod", "did you mean sigmoid?"), ("IPO_SUM", "did you mean ipo_sum?"), ("", "`prefopt losses` lists all"),
    ("sigmoid:kl", "a divergence is one of forward_kl, js, alpha"), ("nll", "a part of mixtures only"),
    ("rpo+nll", "rpo is sigmoid+nll (write sigmoid+nll)"), ("mpo+rebel", "(write sigmoid+bco+nll+rebel)"),
    ("rpo+nothing", "an alias cannot be mixed"), ("sigmoid+", "unknown loss"), ("\x1b[31m", "'\\x1b[31m'"),
])
def test_an_unknown_loss_is_refused_with_a_guess(capsys: pytest.CaptureFixture[str], name: str, says: str) -> None:
    code, out, err = run(capsys, name)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize("arguments", [[], ["sigmoid+nll"], ["tdpo", "--json"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom prefopt_ray.cli import main\nmain(['losses', *sys.argv[1:]])\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
