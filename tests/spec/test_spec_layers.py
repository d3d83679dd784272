"""extends, --set, null and paths: what wins, what goes, and where an error points."""

from pathlib import Path

import pytest
from spec.spec_examples import example, plain_spec

from prefopt_ray.errors import SpecError
from prefopt_ray.spec import Choices, LogUniform, dump_spec, load_spec, parse_spec
from prefopt_ray.spec.sections import OtherModel

BASE = """
name: base
model: {policy: org/model, adapter: {kind: lora, rank: 8, alpha: 12}, reference: {model: org/other, adapter: org/a}}
data:
  train: {source: org/pairs, split: train_prefs}
  select: {split: test_prefs, pairs: 200}
  test: {from: train, pairs: 100}
training: {epochs: 1, batch_pairs: 32}
search:
  trials_per_loss: 4
  losses: {sigmoid: {}, simpo: {}}
  shared: {learning_rate: {log: [3e-6, 5e-5]}}
  baseline: {loss: sigmoid, beta: 0.2}
scheduler: {first_rung: 10%, keep_one_in: 2}
"""


@pytest.fixture
def extend(tmp_path):
    """Load a child of BASE."""

    def load(child: str, *overrides: str):
        (tmp_path / "base.yaml").write_text(BASE)
        (tmp_path / "child.yaml").write_text(f"extends: base.yaml\n{child}")
        return load_spec(tmp_path / "child.yaml", overrides=overrides)

    return load


def test_mappings_merge_key_by_key(extend):
    spec = extend("training: {batch_pairs: 16}\nmodel: {adapter: {rank: 4}}")
    assert (spec.training.epochs, spec.training.batch_pairs) == (1, 16)
    assert (spec.model.adapter.rank, spec.model.adapter.alpha) == (4, 12)


def test_losses_of_the_child_are_all_losses(extend):
    assert list(extend("search: {losses: {hinge: {}}}").loss_spaces()) == ["hinge"]


def test_the_childs_length_wins_over_the_bases(extend):
    training = extend("training: {pairs: 6400}").training
    assert (training.epochs, training.pairs) == (None, 6400)


def test_a_part_with_another_origin_replaces_the_whole_part(extend):
    data = extend("data: {train: {source: org/new}, test: {split: test, pairs: 7}}").data
    assert (data.train.split, data.test.from_, data.test.pairs) == (None, None, 7)
    assert data.part("test").source == "org/new"


def test_a_part_can_change_its_size_alone(extend):
    select = extend("data: {select: {pairs: 9}}").data.select
    assert (select.split, select.pairs) == ("test_prefs", 9)


def test_another_kind_takes_along_the_old_kinds_settings(extend):
    spec = extend("model: {adapter: {kind: none}}\nscheduler: {kind: none}\nsearch: {method: grid, shared: null}")
    assert spec.model.adapter.kind == "none"
    assert spec.rung_steps(100) == ()
    assert spec.search.trials_per_loss is None


def test_a_preset_replaces_explicit_rungs(extend):
    assert extend("scheduler: {preset: aggressive}").rung_steps(160) == (10, 40)


def test_a_baseline_of_another_loss_forgets_the_old_beta(extend):
    assert extend("search: {baseline: {loss: hinge}}").baseline_values()[1]["beta"] == 0.05
    assert extend("search: {baseline: {beta: 0.3}}").baseline_values() == (
        "sigmoid",
        {"beta": 0.3, "learning_rate": 1.2e-5},
    )


def test_a_shared_domain_is_replaced_not_mixed(extend):
    shared = extend("search: {shared: {learning_rate: {uniform: [1e-6, 1e-5]}}}").search.shared
    assert shared["learning_rate"].low == 1e-6


def test_null_removes_what_the_base_says(extend):
    spec = extend("model: {reference: null, adapter: null}\nscheduler: null")
    assert spec.model.reference == "start"
    assert spec.model.adapter.rank == 16
    assert spec.rung_steps(90) == (10, 30)


def test_extends_is_relative_to_the_file_and_chains(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "deep" / "a.yaml").write_text("extends: ../base.yaml\nname: a")
    (tmp_path / "b.yaml").write_text("extends: deep/a.yaml\ntraining: {seed: 5}")
    spec = load_spec(tmp_path / "b.yaml")
    assert (spec.name, spec.training.seed) == ("a", 5)


def test_a_circle_of_two_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(SpecError, match=r"b\.yaml:1 extends: .*in a circle"):
        load_spec(tmp_path / "a.yaml")


def test_an_error_points_at_the_file_that_holds_it(extend, tmp_path):
    with pytest.raises(SpecError) as caught:
        extend("search: {shared: {gamma: 1}}\nmodel: {dtype: half}", "training.warmup=-1")
    assert [problem.place for problem in caught.value.problems] == [
        "--set training.warmup=-1",
        f"{tmp_path / 'child.yaml'}:2",
        f"{tmp_path / 'child.yaml'}:3",
    ]
    (tmp_path / "base.yaml").write_text(BASE.replace("rank: 8", "rank: 0"))
    with pytest.raises(SpecError, match=r"base\.yaml:3 model\.adapter\.rank: got 0"):
        load_spec(tmp_path / "child.yaml", overrides=["search.shared=null", "model.dtype=float32"])


# ---- --set ----


def override(*lines: str, **sections):
    return parse_spec(plain_spec(**sections), overrides=lines)


def test_set_reads_yaml_values():
    lines = ("search.losses.sigmoid.beta=[0.03, 1E-1]", "training.warmup=5%", "training.gradient_checkpointing=true")
    spec = override(*lines)
    assert spec.loss_spaces()["sigmoid"]["beta"] == Choices((0.03, 0.1))
    assert spec.training.warmup == "5%"
    assert spec.training.gradient_checkpointing is True


def test_set_keeps_the_other_losses():
    spec = override("search.losses.hinge.beta={log: [0.01, 0.5]}")
    assert list(spec.loss_spaces()) == ["sigmoid", "hinge"]
    assert spec.loss_spaces()["hinge"]["beta"] == LogUniform(0.01, 0.5)


def test_set_of_a_length_or_kind_displaces_as_extends_does():
    spec = override("training.epochs=2", "scheduler.kind=none", scheduler={"preset": "standard"})
    assert (spec.training.steps, spec.training.epochs) == (None, 2)
    assert spec.scheduler.preset is None


def test_sets_do_not_displace_each_other():
    spec = override("data.train.split=b", "data.train.source=org/b")
    assert (spec.data.train.source, spec.data.train.split) == ("org/b", "b")


def test_the_last_set_of_a_key_wins():
    assert override("training.seed=1", "training.seed=2").training.seed == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training.seed", "must be key=value"),
        ("=3", "must be key=value"),
        ("training..seed=3", "must be key=value"),
        ("training.seed=[1", "not closed"),
        ("training.steps.more=1", "training.steps is 100, it has no keys"),
        ("trainin.steps=1", "did you mean training?"),
        ("training.seed=!!int 3", "tags"),
    ],
)
def test_a_bad_set_is_refused_with_the_line_itself_as_the_place(line, message):
    with pytest.raises(SpecError) as caught:
        override(line)
    assert message in str(caught.value)
    assert caught.value.problems[0].place == f"--set {line}"


# ---- paths and storage ----


def test_paths_start_at_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "base" / "models" / "m").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    base = BASE.replace("org/model", "models/m").replace("org/pairs, split: train_prefs", "pairs.jsonl")
    base = base.replace("org/other", "./other").replace("{split: test_prefs, pairs: 200}", "{from: train, pairs: 9}")
    (tmp_path / "base" / "base.yaml").write_text(base)
    (tmp_path / "child.yaml").write_text("extends: base/base.yaml\ndata: {text: t.jinja}")
    spec = load_spec(tmp_path / "child.yaml", overrides=["model.start_adapter=./sft"])
    assert spec.model.policy == str(tmp_path / "base/models/m")
    assert spec.model.reference == OtherModel(str(tmp_path / "base/other"), "org/a")
    assert spec.data.train.source == str(tmp_path / "base/pairs.jsonl")
    assert spec.data.text == str(tmp_path / "t.jinja")
    assert spec.model.start_adapter == str(tmp_path / "elsewhere/sft")
    assert spec.storage == tmp_path / "elsewhere/prefopt-results"


def test_hub_ids_and_words_are_never_paths(tmp_path):
    for name in ("gold", "template", "plain"):
        (tmp_path / name).mkdir()
    gold = {"train": {"source": "gold", "pairs": 10}, "text": "plain"}
    spec = parse_spec(plain_spec(model={"policy": "gold"}, data=gold), folder=tmp_path)
    assert (spec.model.policy, spec.data.train.source, spec.data.text) == ("gold", "gold", "plain")
    spec = parse_spec(plain_spec(model={"policy": "Qwen/Qwen2.5-0.5B"}), folder=tmp_path)
    assert spec.model.policy == "Qwen/Qwen2.5-0.5B"


def test_the_storage_argument_wins(tmp_path):
    spec = parse_spec(plain_spec(storage="./here"), storage=str(tmp_path))
    assert spec.storage == tmp_path


def test_a_dumped_spec_no_longer_depends_on_where_it_lies(tmp_path, monkeypatch):
    spec = parse_spec(plain_spec(data={"train": {"source": "p.json"}}), folder=tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved.yaml").write_text(dump_spec(spec))
    assert load_spec(tmp_path / "moved.yaml") == spec
    assert Path(spec.data.train.source).is_absolute()


def test_an_extended_text_starts_at_the_given_folder(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    assert parse_spec("extends: base.yaml\nname: text", folder=tmp_path).name == "text"


def test_a_dict_of_python_objects_is_refused():
    with pytest.raises(SpecError, match="a Python object"):
        example(training={"steps": object()})
