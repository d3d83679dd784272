"""What a submission carries: the files of this machine, found again by content, and what a job's log says."""

import json
from pathlib import Path

import pytest
from journeys.journey import write_pairs
from sweep_folder import write_sweep
from tiny import save_chat_model

from prefopt_ray.cluster.checks import on_shared_filesystem
from prefopt_ray.cluster.messages import EVENT, MARK, Message, heard, tell
from prefopt_ray.cluster.upload import LIMIT, Order, local_files, pack, unpack
from prefopt_ray.errors import SpecError
from prefopt_ray.results.summary import sweep_summary
from prefopt_ray.spec import SweepSpec
from prefopt_ray.tuning.nodes import Look, blind_nodes, missing_secrets

VERSIONS = {"prefopt": "0", "ray": "0", "python": "0"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    save_chat_model(home / "model")
    write_pairs(home / "pairs.jsonl", count=40)
    return home


def spec_of(home: Path, **changes: object) -> SweepSpec:
    return SweepSpec.from_dict({
        "name": "mine", "model": {"policy": str(home / "model"), "dtype": "float32"},
        "data": {"train": {"source": str(home / "pairs.jsonl")}, "max_tokens": 64},
        "training": {"steps": 10, "batch_pairs": 4}, "search": {"trials_per_loss": 2, "losses": {"sigmoid": {}}},
        "storage": str(home.parent / "shared"), **changes,
    })


def carried(spec: SweepSpec, folder: Path) -> SweepSpec:
    """As it arrives on the other side."""
    folder.mkdir()
    pack(spec, folder, fresh=False, versions=VERSIONS)
    return unpack(folder, Order.read(folder))


# -- files -------------------------------------------------------------------------------------------


def test_files_of_this_machine_arrive_in_the_storage_and_nothing_else_of_the_spec_changes(home: Path) -> None:
    spec = spec_of(home)
    arrived = carried(spec, home.parent / "one")
    for name in ("model", "data"):
        assert str(home) not in json.dumps(arrived.to_dict()[name])
    train = Path(arrived.data.train.source)
    assert train.parent.parent == spec.storage / "uploads"
    assert train.read_bytes() == (home / "pairs.jsonl").read_bytes()
    model = Path(arrived.model.policy)
    assert {p.name for p in model.iterdir()} == {p.name for p in (home / "model").iterdir()}
    same = {**arrived.to_dict(), "model": spec.to_dict()["model"], "data": spec.to_dict()["data"]}
    assert SweepSpec.from_dict(same) == spec


def test_the_same_files_give_the_same_spec_and_other_files_another(home: Path) -> None:
    first = carried(spec_of(home), home.parent / "one")
    (home / "pairs.jsonl").touch()
    assert carried(spec_of(home), home.parent / "two").content_hash() == first.content_hash()
    write_pairs(home / "pairs.jsonl", count=41)
    assert carried(spec_of(home), home.parent / "three").content_hash() != first.content_hash()


def test_what_the_cluster_knows_is_left_alone(home: Path) -> None:
    spec = spec_of(
        home, model={"policy": "org/model", "reference": {"model": "/nfs/not-here"}},
        data={"train": {"source": "hf://datasets/org/pairs"}, "select": {"source": "org/pairs"}},
    )
    assert not dict(local_files(spec)) and carried(spec, home.parent / "one") == spec


def test_a_function_in_a_file_keeps_its_name(home: Path) -> None:
    (home / "judge.py").write_text("def score(prompts, completions):\n    return []\n")
    spec = spec_of(home, judge={"callable": f"{home / 'judge.py'}:score"})
    arrived = carried(spec, home.parent / "one")
    file, _, function = arrived.judge.callable.rpartition(":")
    assert function == "score" and Path(file).read_text() == (home / "judge.py").read_text()


def test_more_than_ray_takes_is_refused_with_the_file_and_what_to_do(home: Path) -> None:
    with (home / "model" / "large.safetensors").open("wb") as file:
        file.truncate(LIMIT)
    with pytest.raises(SpecError) as refused:
        carried(spec_of(home), home.parent / "one")
    (problem,) = refused.value.problems
    assert problem.key == "model.policy" and "100 MiB" in str(problem) and "shared storage" in problem.fix


# -- words -------------------------------------------------------------------------------------------


def test_a_message_is_heard_as_it_was_told_and_words_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"text": "<b>\x1b[31m\n\u202e", "number": 0.1}
    tell(EVENT, value)
    line = capsys.readouterr().out.removesuffix("\n")
    assert line.isascii() and heard(line) == Message(EVENT, value)
    for words in ("prefopt is fine", "", line[:-3], MARK, f"{MARK}[]", f"{MARK}{{}}"):
        assert heard(words) is None


def test_a_summary_counts_what_the_ledger_says(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path, {"0000": 0.2, "0001": 0.8, "0002": 0.5})
    found = json.loads(json.dumps(sweep_summary(sweep, expected=9)))
    assert found["begun"] == 3 and found["states"] == {"completed": 3} and not found["finished"]
    assert found["best"]["trial"] == "0001" and found["rest"]["trials"] == 6
    assert sweep_summary(sweep)["rest"] is None


def test_a_folder_is_shared_where_its_file_system_is_the_network_s(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    folder = tmp_path / "results" / "deep"
    lines = ["/dev/sda1 / ext4 rw 0 0", f"server:/x {tmp_path / 'results'} nfs4 rw 0 0"]
    mounts.write_text("\n".join(lines))
    assert on_shared_filesystem(folder, mounts) and not on_shared_filesystem(tmp_path, mounts)
    mounts.write_text("\n".join([*lines, f"tmpfs {folder} tmpfs rw 0 0"]))
    assert not on_shared_filesystem(folder, mounts)


def test_nodes_that_do_not_see_the_storage_or_a_secret_are_named() -> None:
    looks = [Look("10.0.0.1", (), True), Look("10.0.0.2", ("HF_TOKEN",), False)]
    (blind,) = blind_nodes(looks, Path("/results"))
    (secret,) = missing_secrets(looks, ("HF_TOKEN", "JUDGE_KEY"))
    assert "10.0.0.2" in blind.rule and "10.0.0.1" not in blind.rule
    assert secret.found == "HF_TOKEN" and "10.0.0.2" in secret.rule
    assert not list(blind_nodes(looks[:1], Path("/results")))
