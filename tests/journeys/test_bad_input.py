"""Bad input as a person meets it: exit code 2, a line per problem with place, cause and fix, nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import trial_config

from prefopt_ray.cli import main
from prefopt_ray.results.ledger import LEDGER_FILE, Ledger

SPEC = """name: mine
model: {{policy: {policy}, dtype: float32}}
data: {{train: {{source: pairs.jsonl}}, select: {{from: train, pairs: 2}}, test: {{from: train, pairs: 2}}{data}}}
training: {{steps: 4, batch_pairs: 4}}
search: {{trials_per_loss: 2, losses: {{sigmoid: {{}}}}}}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_model: Path) -> Path:
    """Where a person works: a spec, its pairs, a model folder to damage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chat_model, tmp_path / "model")
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(SPEC.format(policy="./model", data=""))
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said; a refusal has code 2, no traceback and nothing on stdout."""
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse
        code = left.code
    said = capsys.readouterr()
    assert code == 2, said.err
    assert "Traceback" not in said.err and "run again with --debug" not in said.err
    assert not Path("prefopt-results").exists()
    return said.err


# -- the command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((), ("COMMAND",)),
        (("vlidate", "mine.yaml"), ("invalid choice: 'vlidate'", "'validate'")),
        (("validate",), ("SPEC",)),
        (("validate", "mime.yaml"), ("mime.yaml: no such file", "specs in that folder: mine.yaml")),
        (("validate", "."), (".: cannot be read: Is a directory",)),
        (("validate", "mine.yaml/x"), ("Not a directory",)),
        (("validate", "pairs.jsonl"), ("pairs.jsonl:",)),
        (("validate", "mine.yaml", "--set", "training.steps"), ("--set training.steps", "must be key=value")),
        (("validate", "mine.yaml", "--set", "=3"), ("--set =3", "must be key=value")),
        (("validate", "mine.yaml", "--set", "training.stepz=3"), ("unknown key of training", "did you mean steps?")),
        (("validate", "mine.yaml", "--set", "training.stepz=null"), ("unknown key", "did you mean steps?")),
        (("validate", "mine.yaml", "--set", "data.train.source.0=x"), ("it has no keys", "set it as a whole")),
        (("validate", "mine.yaml", "--set", "search.losses.0={}"), ("search.losses.0: unknown loss",)),
        (("validate", "mine.yaml", "--set", "training.steps=["), ("--set training.steps=[", "not valid YAML")),
        (("validate", "mine.yaml", "--set", "a", "--set", "b.c"), ("--set a:", "--set b.c:")),
        (("validate", "mine.yaml", "--storage", "s3://bucket/x"), ("--storage storage", "not supported yet")),
        (("pairs", "mine.yaml", "--show", "-1"), ("--show", "'-1' is not a whole number from 0")),
        (("pairs", "mine.yaml", "--show", "all"), ("--show", "'all' is not a whole number")),
        (("ui", "mine", "--port", "99999"), ("--port", "from 0 to 65535")),
        (("train", "mine.yaml"), ("mine.yaml search: got 3 configurations", "prefopt run")),
        (("run", "mine.yaml", "--storage", "pairs.jsonl"), ("storage", "pairs.jsonl is a file", "name a folder")),
        (("run", "mine.yaml", "--storage", "pairs.jsonl/x"), ("storage", "pairs.jsonl", "name a folder")),
        (("pairs", "mine.yaml", "--storage", "x" * 300), ("storage", "File name too long")),
        (("pairs", "mine.yaml", "--set", "storage=pairs.jsonl"), ("mine.yaml storage", "is a file")),
        (("replay", "curves.csv"), ("TABLE: got 'curves.csv'; no such file", "a table of curves, or a sweep")),
        (("replay", "mine.yaml"), ("mine.yaml: got mine.yaml; a table of curves is a .csv or .jsonl file",)),
        (("plan", "mine.yaml", "--set", "data.train.source=none.jsonl"), ("none.jsonl",)),
        (("verify", "mine.yaml", "--set", "resources.gpus_per_trial=1"), ("gpus_per_trial", "torch sees no GPU here")),
    ],
)  # fmt: skip
def test_a_misused_command_says_what_is_wrong(home, capsys, arguments, fragments):
    said = refusal(capsys, *arguments)
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("command", ["best", "show", "ui", "resume"])
@pytest.mark.parametrize("name", ["nothing", "", "..", "mine.yaml", "x" * 300])
def test_a_sweep_that_is_not_there_is_named_with_those_that_are(home, capsys, command, name):
    said = refusal(capsys, command, name)
    assert said.startswith("prefopt: command line SWEEP: ")
    assert "sweeps there: none" in said or "prefopt list" in said


@pytest.mark.parametrize("command", ["run", "pairs", "train", "plan", "verify"])
def test_a_wrong_spec_is_refused_before_anything_heavy_is_imported(tmp_path, command):
    (tmp_path / "bad.yaml").write_text("name: [")
    program = (
        "import sys; from prefopt_ray.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code if not {'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules) else 99)"
    )
    arguments = [sys.executable, "-c", program, command, str(tmp_path / "bad.yaml")]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert done.returncode == 2, done.stderr


def test_escape_codes_of_a_spec_do_not_reach_the_terminal(home, capsys):
    (home / "bad.yaml").write_text('"\\x1b[31mname": 1\nsearch: {losses: {sigmoid: {"\\x1b[2J": 1}}}\n')
    assert "\x1b" not in refusal(capsys, "validate", "bad.yaml")


# -- a sweep's folder ----------------------------------------------------------------------------------


@pytest.fixture
def sweep(home: Path) -> Path:
    folder = home / "results" / "mine-0a1b2c3d"
    ledger = Ledger(folder / LEDGER_FILE)
    ledger.append("sweep", format=1, sweep_id="0a1b2c3d", name="mine", spec_hash="x", facts={})
    ledger.append("trial", trial="0000", number=0, values={"beta": 0.1}, config=trial_config().to_dict(), baseline=True)
    ledger.close()
    return folder


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("not json", "must be JSON"),
        ("5", "cannot be read"),
        ("null", "cannot be read"),
        ("{}", "KeyError: 'event'"),
        ('{"event": "end", "trial": "0000", "end_state": "asleep", "reason": ""}', "'asleep' is not a valid EndState"),
        ('{"event": "report", "trial": "0000", "report": null}', "cannot be read"),
        ('{"event": "report", "trial": "9999", "report": {}}', "cannot be read"),
        ('{"event": "trial", "trial": "0001", "number": 1, "values": {}, "config": {}, "baseline": false}', "KeyError"),
        ('{"event": "sweep", "format": 1}', "KeyError: 'sweep_id'"),
        ('{"event": "sweep", "format": 99}', "format"),
        ("\x1b[31m", "must be JSON"),
    ],
)
@pytest.mark.parametrize("command", [("best", "mine"), ("list",)])
def test_a_damaged_ledger_is_named_with_its_line(sweep, capsys, command, line, cause):
    with (sweep / LEDGER_FILE).open("a") as ledger:
        ledger.write(f"{line}\n")
    said = refusal(capsys, *command, "--storage", "results")
    assert LEDGER_FILE in said and cause in said and "\x1b" not in said
    assert f"{LEDGER_FILE}:3: got " in said or "update prefopt" in said


def test_a_ledger_that_never_began_is_said_to_be_one(sweep, capsys):
    (sweep / LEDGER_FILE).write_text("")
    assert "ended before it began" in refusal(capsys, "show", "mine", "--storage", "results")


def test_a_sweep_without_its_spec_names_the_file(sweep, capsys):
    assert "spec.yaml: no such file" in refusal(capsys, "resume", "mine", "--storage", "results")


def test_one_damaged_sweep_does_not_hide_the_others_from_the_list(sweep, capsys):
    shutil.copytree(sweep, sweep.parent / "other-11111111")
    (sweep / LEDGER_FILE).write_text("5\n")
    assert main(["list", "--storage", "results"]) == 2
    said = capsys.readouterr()
    assert "other-11111111" in said.out
    assert "mine-0a1b2c3d" in said.err


# -- the model's folder --------------------------------------------------------------------------------


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def removed(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def configured(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


DAMAGES = {
    "missing folder": (shutil.rmtree, "no such folder"),
    "empty folder": (empty, "the folder needs config.json"),
    "no tokenizer": (removed("tokenizer.json", "tokenizer_config.json"), "it needs *.safetensors weights and token"),
    "tokenizer cut off": (written("tokenizer.json", '{"version": "1.0", "trunc'), "tokenizer cannot be loaded"),
    "tokenizer is a list": (written("tokenizer.json", "[]"), "tokenizer cannot be loaded"),
    "tokenizer without tokens": (written("tokenizer.json", "{}"), "tokenizer cannot be loaded"),
    "settings are a list": (written("tokenizer_config.json", "[]"), "tokenizer cannot be loaded"),
    "config is a list": (written("config.json", "[]"), "config.json cannot be read"),
    "config is binary": (written("config.json", b"\xff\xfe\x00"), "config.json cannot be read"),
    "config is impossible": (configured(hidden_size=-1), "The hidden size (-1)"),
    "config of other types": (configured(hidden_size="big"), "expected int, got str"),
    "no template": (removed("chat_template.jinja"), "data.text: got 'template'; this tokenizer has no chat template"),
    "template is no jinja": (written("chat_template.jinja", "{% for m in [] %}{{ m }"), "model:1 data.text: is not"),
    "template refuses": (written("chat_template.jinja", "{{ raise_exception('never') }}"), "never (correct the"),
    "template fails": (written("chat_template.jinja", "{{ 1 / 0 }}"), "ZeroDivisionError"),
    "template forgets": (written("chat_template.jinja", "hello"), "does not write the assistant's text"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_folder_is_named_with_cause_and_fix(home, capsys, damage):
    work, fragment = DAMAGES[damage]
    work(home / "model")
    said = refusal(capsys, "pairs", "mine.yaml", "--show", "0")
    problem = next(line for line in said.splitlines() if line.startswith("prefopt: "))
    assert str(home / "model") in problem and fragment in problem
    assert problem.endswith(")"), "no fix"


@pytest.mark.parametrize(
    ("policy", "data", "fragment"),
    [
        ("https://huggingface.co/org/model", "", "named by its id, such as org/model"),
        ("org/no-such-model", "", "a hub id needs the network once"),
        ("pairs.jsonl", "", "no such folder"),
        ("./model", ", text: nowhere.jinja", "nowhere.jinja data.text: got nothing there"),
        ("./model", ", text: model.jinja", "model.jinja data.text: got nothing there"),
        ("./model", ", columns: {prompt: qestion, chosen: chosne}", "did you mean 'chosen'?"),
    ],
)
def test_a_model_template_or_column_that_is_not_there_is_named(home, capsys, policy, data, fragment):
    (home / "mine.yaml").write_text(SPEC.format(policy=policy, data=data))
    assert fragment in refusal(capsys, "pairs", "mine.yaml", "--show", "0")
