"""load_sweep_data as a whole: cache, progress, warnings, and real preference files where they are at hand."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from prefopt_ray.errors import DataError
from prefopt_ray.pairs.config import PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.load import load_sweep_data, smallest_accuracy_difference
from prefopt_ray.pairs.shapes import DropReason


def write_rows(path: Path, count: int = 60) -> Path:
    rows = [{"prompt": f"p{i} ?", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(count)]
    rows[3]["rejected"] = rows[3]["chosen"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config(path: Path, **options) -> PairsConfig:
    values = {"text": "plain", "max_tokens": 64, **options}
    return PairsConfig(PartConfig(SourceConfig(str(path))), PartConfig(None, 10), PartConfig(None, 10), **values)


def same(one, other) -> bool:
    arrays = [(a, b) for part in ("train", "select", "test")
              for a, b in zip(one.data.parts[part].arrays().values(), other.data.parts[part].arrays().values())]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_a_second_load_reads_everything_back_and_tokenises_nothing(make_tokenizer, tmp_path):
    chosen, cache = config(write_rows(tmp_path / "a.jsonl")), tmp_path / "cache"
    first = load_sweep_data(chosen, make_tokenizer(), cache=cache)
    steps: list[tuple[int, int]] = []
    second = load_sweep_data(chosen, make_tokenizer(), cache=cache, progress=lambda *step: steps.append(step))
    assert (first.cached, second.cached, steps) == (False, True, [])
    assert same(first, second)
    for name in ("drops", "truncation", "origins", "warnings", "max_token_id"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("pad_id", "eos_ids", "digest"):
        assert getattr(first.data, name) == getattr(second.data, name)
    assert [(d.part, d.row, d.reason) for d in second.drops] == [("train", 3, DropReason.IDENTICAL)]


def test_the_same_content_elsewhere_is_the_same_entry_and_any_other_input_another(make_tokenizer, tmp_path):
    cache = tmp_path / "cache"
    base = config(write_rows(tmp_path / "a.jsonl"))
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    larger = make_tokenizer()
    larger.add_tokens(["one more word"])
    load_sweep_data(base, make_tokenizer(), cache=cache)
    load_sweep_data(config(write_rows(tmp_path / "b.jsonl")), make_tokenizer(), cache=cache)
    assert len(entries(cache)) == 1
    others = [
        (config(write_rows(tmp_path / "c.jsonl", 61)), make_tokenizer()),
        (dataclasses.replace(base, max_tokens=65), make_tokenizer()),
        (dataclasses.replace(base, seed=1), make_tokenizer()),
        (dataclasses.replace(base, test=PartConfig(None, 11)), make_tokenizer()),
        (dataclasses.replace(base, text=str(template)), make_tokenizer()),
        (base, make_tokenizer(adds_bos=True)),
        (base, larger),
        (base, make_tokenizer(eos="<|im_end|>")),
    ]
    for number, (other, tokenizer) in enumerate(others, start=2):
        assert not load_sweep_data(other, tokenizer, cache=cache).cached
        assert len(entries(cache)) == number
    template.write_text("{% for m in messages %}{{ m['content'] + ' ' + eos_token }}{% endfor %}")
    assert not load_sweep_data(dataclasses.replace(base, text=str(template)), make_tokenizer(), cache=cache).cached


def test_a_tokenizer_used_with_padding_before_is_the_same_tokenizer(make_tokenizer, tmp_path):
    chosen, cache = config(write_rows(tmp_path / "a.jsonl")), tmp_path / "cache"
    load_sweep_data(chosen, make_tokenizer(), cache=cache)
    used = make_tokenizer()
    used("a long text", max_length=2, truncation=True)
    assert load_sweep_data(chosen, used, cache=cache).cached


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "not json"])
def test_a_damaged_entry_is_made_again(make_tokenizer, tmp_path, damage):
    chosen, cache = config(write_rows(tmp_path / "a.jsonl")), tmp_path / "cache"
    first = load_sweep_data(chosen, make_tokenizer(), cache=cache)
    (folder,) = cache.iterdir()
    arrays = folder / "pairs.safetensors"
    data = arrays.read_bytes()
    if damage == "flip":
        arrays.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        arrays.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        arrays.unlink()
    else:
        (folder / "pairs.json").write_text("{")
    again = load_sweep_data(chosen, make_tokenizer(), cache=cache)
    assert not again.cached and same(first, again)
    assert load_sweep_data(chosen, make_tokenizer(), cache=cache).cached
    assert entries(cache) == [folder.name]


def test_progress_rises_to_the_number_of_pairs(make_tokenizer, tmp_path):
    steps: list[tuple[int, int]] = []
    chosen = config(write_rows(tmp_path / "a.jsonl"))
    load_sweep_data(chosen, make_tokenizer(), cache=None, progress=lambda *step: steps.append(step))
    assert steps == sorted(steps) and steps[-1] == (59, 59)


def test_few_pairs_warn_with_the_difference_they_resolve_and_are_not_refused(make_tokenizer, tmp_path):
    loaded = load_sweep_data(config(write_rows(tmp_path / "a.jsonl")), make_tokenizer(), cache=None)
    assert "select: 10 pairs cannot resolve accuracy differences below 0.438 (95 %)" in loaded.warnings


def test_the_resolvable_difference_is_the_95_percent_interval_of_two_accuracies():
    """Oracle: the difference of two binomial means at p = .5, simulated."""
    rng = np.random.default_rng(0)
    means = rng.binomial(300, 0.5, size=(2, 200_000)) / 300
    simulated = np.quantile(np.abs(means[0] - means[1]), 0.95)
    assert smallest_accuracy_difference(300) == pytest.approx(simulated, abs=0.004)


def test_pad_falls_back_to_eos_and_eos_ids_hold_both_ends(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("chatml")
    loaded = load_sweep_data(config(write_rows(tmp_path / "a.jsonl"), text="template"), tokenizer, cache=None)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert loaded.data.eos_ids == (end, tokenizer.eos_token_id)
    assert loaded.data.pad_id == tokenizer.eos_token_id
    bare = load_sweep_data(config(tmp_path / "a.jsonl"), make_tokenizer(eos=None), cache=None)
    assert (bare.data.pad_id, bare.data.eos_ids) == (0, ())


def test_the_largest_token_id_is_reported(make_tokenizer, tmp_path):
    loaded = load_sweep_data(config(write_rows(tmp_path / "a.jsonl")), make_tokenizer(), cache=None)
    ids = [i for p in loaded.data.parts.values() for r in (p.prompt, p.chosen, p.rejected) for i in r.values.tolist()]
    assert loaded.max_token_id == max(ids)


def test_a_template_that_refuses_most_rows_is_an_error_in_the_templates_words(make_tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    path.write_text("\n".join(json.dumps({"prompt": turns, "chosen": f"a{i}", "rejected": "b"}) for i in range(30)))
    with pytest.raises(DataError, match="the turns user, user; the chat template refuses it: .*must alternate"):
        load_sweep_data(config(path, text="template"), make_tokenizer("gemma"), cache=None)


@pytest.mark.parametrize("template", ["chatml", "gemma"])
@pytest.mark.parametrize("name", ["sharegpt_en.json", "sharegpt_zh.json"])
def test_real_pairs_are_all_used_and_read_as_the_template_writes_them(make_tokenizer, name, template):
    folder = os.environ.get("PREFOPT_TEST_DATA")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"PREFOPT_TEST_DATA names no folder with {name}")
    raw = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    tokenizer = make_tokenizer(template)
    loaded = load_sweep_data(config(Path(folder) / name, text="template", max_tokens=1_000_000), tokenizer, cache=None)
    used = {row for part in loaded.data.parts.values() for row in part.row_ids.tolist()}
    assert used | {d.row for d in loaded.drops} == set(range(300))
    assert all(d.reason in (DropReason.ALSO_IN_SELECT, DropReason.ALSO_IN_TEST) for d in loaded.drops)
    test = loaded.data.test
    for index, row in enumerate(test.row_ids.tolist()):
        assert tokenizer.decode([*test.prompt[index], *test.chosen[index]]) == _template_text(tokenizer, raw[row])


def _template_text(tokenizer, row: dict) -> str:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [{"role": roles[t["from"]], "content": t["value"]} for t in [*row["conversations"], row["chosen"]]]
    if turns[0]["role"] == "system" and "raise_exception('System" in tokenizer.chat_template:
        turns[1]["content"] = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        turns = turns[1:]
    return tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
