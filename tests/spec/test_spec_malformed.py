"""Every malformed spec of the corpus is refused at the right line and key, in words that name the rule or the fix."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt_ray.errors import SpecError
from prefopt_ray.spec import dump_spec, load_spec, parse_spec

FOLDER = Path(__file__).parent / "malformed"
SWEEPS = Path(__file__).parents[2] / "sweeps"

# file -> all its problems: (line, key, part of the message); a file name before the line where it is another file
EXPECTED = {
    "alias_bomb": [(1, "", "aliases")],
    "alias_to_itself": [(10, "", "aliases")],
    "anchor_twice": [(10, "", "an anchor (&name) is given twice")],
    "bad_name": [(1, "name", "letters, digits")],
    "bad_percent": [(5, "training.warmup", "'300%'; must be a share"), (10, "eval.at", "the word rungs")],
    "bad_rung": [(10, "scheduler.first_rung", "above 0%"), (10, "scheduler.keep_one_in", "must be >= 2")],
    "baseline_with_range": [(10, "search.baseline", "beta of a baseline is one finite number")],
    "baseline_without_loss": [(10, "search.baseline", "every sweep has a baseline")],
    "beta_out_of_bounds": [(9, "search.losses.sigmoid.beta", "beta must be > 0 (0.003 to 0.5 is usual")],
    "blank_values": [(2, "model.policy", "must not be empty"), (10, "tracking.experiment", "must not be empty")],
    "colon_in_value": [(1, "", "needs quotes")],
    "comma_in_number": [(5, "training.000", "unknown key of training")],
    "control_character": [(2, "", "remove the control character")],
    "digits_of_another_script": [(5, "training.steps", "write 100"), (5, "training.warmup", "must be a share")],
    "duplicate_key": [(10, "training", "already on line 5")],
    "empty": [(1, "", "the spec is empty")],
    "epochs_slip": [(5, "training.epochs", "epochs must be <= 10000")],
    "escape_code_in_key": [(10, r"'\x1b[31m'", "unknown key")],
    "experiment_too_long": [(10, "tracking.experiment", "at most 250 characters")],
    "extends_broken_base": [
        (3, "training.steps", "steps must be >= 1"),
        ("unknown_loss", 9, "search.losses.sigmiod", "did you mean sigmoid?"),
    ],
    "extends_itself": [(10, "extends", "in a circle")],
    "extends_missing_file": [(10, "extends", "no such file")],
    "extends_no_path": [(10, "extends", "cannot be a path")],
    "fixed_without_steps": [(10, "scheduler", "add stop_steps")],
    "full_width_colon": [(1, "", "(U+FF1A) only looks like a sign of YAML")],
    "gold_with_other_pairs": [(4, "data.train.source", "policy and every source are gold")],
    "gpu_shared_by_nobody": [(10, "resources.trials_per_gpu", "only if each asks for one, not 0")],
    "grid_over_a_range": [(9, "search.losses.sigmoid.beta", "write [0.01, 0.1, 1], or method: random")],
    "grid_point_twice": [(9, "search.losses.sigmoid.beta", "0.1 is listed twice")],
    "huge_integer": [(5, "training.steps", "whole numbers go up to")],
    "key_of_another_section": [(10, "max_tokens", "did you mean data.max_tokens?")],
    "key_with_nothing_behind": [
        (6, "schedular", "did you mean scheduler?"),
        (11, "eval.train_prob", "did you mean train_probe?"),
    ],
    "log_from_zero": [
        (9, "search.losses.sigmoid.beta", "must start above 0"),
        (9, "search.losses.sigmoid.learning_rate", "below the high end"),
    ],
    "loss_in_capitals": [(9, "search.losses.SIGMOID", "did you mean sigmoid?")],
    "losses_as_list": [(8, "search.losses", "must be a mapping")],
    "merge_key": [(5, "data.train.<<", "use `extends")],
    "missing_sections": [(1, "model", "is required"), (5, "search.losses", "is required")],
    "more_trials_than_points": [(9, "search.losses.sigmoid", "only 2 configurations for 4 trials")],
    "name_too_long_for_a_path": [(2, "model.policy", "File name too long")],
    "no_break_space": [(1, "", "(U+00A0) only looks like a sign of YAML")],
    "no_length": [(5, "training", "exactly one of epochs, pairs, steps")],
    "no_such_user": [(2, "model.policy", "no user of this name"), (10, "storage", "no user of this name")],
    "no_text": [
        (2, "model.policy", "a control character"),
        (2, "model.start_adapter", "half a character"),
        (10, "storage", "a line break"),
    ],
    "not_finite": [(5, "training.max_grad_norm", "finite"), (9, "search.losses.sigmoid.beta", "nan is not a finite")],
    "not_supported_yet": [
        (10, "checkpoints", "known, but not supported yet"),
        (11, "budget.wall_clock", "write 20h, 90m or 45s"),
        (12, "objective.drift_limit", "stop is known, but not supported yet"),
        (13, "resources.gpus", "CUDA_VISIBLE_DEVICES"),
    ],
    "not_utf8": [(1, "", "byte 0xe9")],
    "number_in_other_notation": [
        (5, "training.pairs", "write 16"),
        (5, "training.steps", "write 1000"),
        (5, "training.seed", "write 100, without a point or an exponent"),
    ],
    "open_bracket": [(4, "", "a bracket or brace is not closed")],
    "open_quote": [(10, "", "a quote is not closed")],
    "parameter_of_another_loss": [
        (9, "search.losses.sigmoid.gamma_ratio", "it reads beta, learning_rate"),
        (9, "search.losses.sigmoid.tau", "did you mean beta?"),
    ],
    "preset_and_rung": [(10, "scheduler.first_rung", "already set by preset: standard")],
    "python_tag": [(5, "", "tags (!...) are not read")],
    "quoted_number": [
        (5, "training.steps", "remove the quotes"),
        (9, "search.losses.sigmoid.beta", "remove the quotes"),
    ],
    "random_without_number": [(6, "search", "add trials_per_loss")],
    "reference_is_a_number": [(2, "model.reference", "must be start")],
    "same_loss_twice": [(10, "search.losses.dpo", "dpo and sigmoid are the same loss")],
    "scalar_for_a_section": [
        (2, "model.adapter", "such as adapter: {kind: lora"),
        (10, "scheduler", "such as scheduler: {kind"),
    ],
    "section_is_a_word": [(2, "model", "such as model: {policy:")],
    "select_is_train": [(5, "data.select", "{from: train, pairs: 100}"), (6, "data.test", "add pairs")],
    "setting_nobody_reads": [(2, "model.adapter.rank", "not read with kind: none")],
    "shared_that_nobody_reads": [(10, "search.shared.gamma_ratio", "no loss of this sweep reads gamma_ratio")],
    "stop_beyond_the_end": [(5, "training.stop_step", "at most the full length, 100 steps")],
    "stop_step_of_no_trial": [(10, "scheduler.stop_steps", "no trial 99: numbers go from 0 to 4")],
    "stop_step_twice": [(10, "scheduler.stop_steps", "trial 1 has two stop steps")],
    "tab_indent": [(7, "", "not indented with tabs")],
    "too_deep": [(10, "", "nested deeper")],
    "too_many_trials": [(7, "search.trials_per_loss", "at most 100,000 trials")],
    "too_many_values": [(10, "", "more than 20,000 values")],
    "top_level_list": [(1, "", "mapping of keys at the top level")],
    "tracking_typing_error": [(10, "tracking.mlflow", "did you mean https?")],
    "two_documents": [(10, "", "one file is one spec")],
    "two_documents_with_dots": [(11, "", "one file is one spec")],
    "two_lengths": [(5, "training.steps", "already given by epochs")],
    "unknown_loss": [(9, "search.losses.sigmiod", "widely used are sigmoid, cdpo")],
    "unknown_nested_key": [(5, "training.batch_size", "did you mean batch_pairs?")],
    "unknown_top_key": [(5, "trainning", "did you mean training?")],
    "wrong_word": [(2, "model.dtype", "did you mean bfloat16?"), (10, "tracking.mlflow", "'http//host'; must be")],
}


def test_the_table_lists_every_file_of_the_corpus():
    assert sorted(EXPECTED) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_malformed_spec_says_place_key_and_cause(name):
    path = FOLDER / f"{name}.yaml"
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    problems = caught.value.problems
    expected = [entry if len(entry) == 4 else (name, *entry) for entry in EXPECTED[name]]
    places = [(f"{FOLDER / file}.yaml:{line}", key) for file, line, key, _ in expected]
    assert [(problem.place, problem.key) for problem in problems] == places
    for problem, (_, _, _, fragment) in zip(problems, expected, strict=True):
        assert fragment in str(problem)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_no_message_shows_the_machinery(name):
    with pytest.raises(SpecError) as caught:
        load_spec(FOLDER / f"{name}.yaml")
    for line in str(caught.value).splitlines():
        assert len(line) < 420
        for word in ("Traceback", "pydantic", "Input should", "validation error", "NoneType", "dict_type"):
            assert word not in line


def test_all_problems_of_a_file_are_reported_at_once_in_reading_order():
    text = """
name: two words
model: {policy: org/model, adaptor: {}}
data: {train: {source: org/pairs}, max_tokens: 2}
training: {steps: 10, seed: -1}
search: {losses: {sigmoid: {beta: 0}, nope: {}}}
scheduler: {kind: ashaa}
"""
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert [(p.place.rpartition(":")[2], p.key) for p in caught.value.problems] == [
        ("2", "name"),
        ("3", "model.adaptor"),
        ("4", "data.max_tokens"),
        ("5", "training.seed"),
        ("6", "search.losses.nope"),
        ("6", "search.losses.sigmoid.beta"),
        ("7", "scheduler.kind"),
    ]


def test_a_missing_file_names_the_specs_beside_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x")
    with pytest.raises(SpecError, match=r"no such file \(specs in that folder: mine.yaml\)"):
        load_spec(tmp_path / "mime.yaml")


def test_hostile_text_stays_on_one_escaped_line():
    with pytest.raises(SpecError) as caught:
        parse_spec({"name": "a\x1b[31m\nb" * 100})
    assert "\x1b" not in str(caught.value)
    assert len(caught.value.problems[0].found) <= 70


JUNK = [
    "",
    "null",
    "[]",
    "{}",
    "-1",
    "1e999",
    ".nan",
    "'x'",
    "!!x",
    "&a",
    "*a",
    "\t",
    "\n  ",
    "- ",
    "? x",
    ": ",
    "@",
    "\x85",
]
JUNK += [
    "{log: [0, 1]}",
    "[[1]]",
    "{null: 1}",
    "99" * 20,
    "gold",
    "rungs",
    "{from: train}",
    "---",
    "<<",
    "#",
    "|",
    '"',
    "%",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SWEEPS.glob("*.yaml"))), st.sampled_from(JUNK), st.floats(0, 1), st.integers(0, 12))
def test_a_damaged_spec_loads_or_is_refused_in_words(path, junk, where, removed):
    text = path.read_text()
    cut = int(where * len(text))
    try:
        spec = parse_spec(text[:cut] + junk + text[cut + removed :], folder=SWEEPS)
    except SpecError as error:
        assert all(problem.rule and problem.place for problem in error.problems)
    else:
        assert parse_spec(dump_spec(spec)) == spec
