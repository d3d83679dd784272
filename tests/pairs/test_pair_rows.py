"""One set of rows through every file format. Oracle: the rows themselves."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from prefopt_ray.errors import DataError
from prefopt_ray.pairs.config import SourceConfig
from prefopt_ray.pairs.rows import open_source

ROWS = [
    {"prompt": "What\u2028is, \"this\"?", "chosen": "a\nb", "rejected": "你好"},
    {"prompt": "two", "chosen": "x" * 200_000, "rejected": "y"},
]


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if name.endswith(".csv"):
        text_path = path.with_name("text.csv")
        with open(text_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        data = text_path.read_bytes()
    elif name.endswith("l"):
        data = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    else:
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def values(config: SourceConfig) -> list[dict]:
    return [dict(row.values) for row in open_source(config).read()]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "a.csv", "a.json.gz", "a.jsonl.gz", "a.csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    assert values(SourceConfig(str(write(tmp_path / name)))) == ROWS


def test_a_json_file_with_one_object_per_line_and_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in ROWS).encode())
    assert values(SourceConfig(str(path))) == ROWS


def test_messages_in_a_csv_cell_are_read_and_other_json_stays_text(tmp_path):
    turn = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "a.csv", [{"prompt": json.dumps(turn), "chosen": '{"answer": 4}', "rejected": "x"}])
    assert values(SourceConfig(str(path))) == [{"prompt": turn, "chosen": '{"answer": 4}', "rejected": "x"}]


def test_rows_are_counted_from_zero_over_files_and_placed_in_their_file(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.json")
    rows = open_source(SourceConfig(str(tmp_path), files=("a.jsonl", "b.json"))).read()
    assert [row.number for row in rows] == [0, 1, 2, 3]
    places = [row.place.removeprefix(f"{tmp_path}/") for row in rows]
    assert places == ["a.jsonl:1", "a.jsonl:3", "b.json row 0", "b.json row 1"]


def test_a_folder_of_a_hub_clone_is_read_by_split_and_data_dir(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for folder in ("helpful", "harmless"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"chosen": f"{folder} {split}", "rejected": "no"}]
            write(tmp_path / "set" / folder / f"{split}.jsonl", rows)
    config = SourceConfig(str(tmp_path / "set"), split="test", data_dir=("harmless", "helpful"))
    assert [row["chosen"] for row in values(config)] == ["harmless test", "helpful test"]


def test_the_fingerprint_is_of_the_content_not_the_path(tmp_path):
    (tmp_path / "other").mkdir()
    one, same = write(tmp_path / "a.json"), write(tmp_path / "other" / "b.json")
    changed = write(tmp_path / "c.json", ROWS[:1])
    marks = [open_source(SourceConfig(str(path))).fingerprint for path in (one, same, changed)]
    assert marks[0] == marks[1] != marks[2]


def test_a_saved_dataset_has_a_fingerprint_of_its_content(tmp_path):
    import datasets

    for name in ("a", "b"):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    datasets.Dataset.from_list(ROWS[::-1]).save_to_disk(tmp_path / "c")
    sources = [open_source(SourceConfig(str(tmp_path / name))) for name in "abc"]
    assert sources[0].fingerprint == sources[1].fingerprint != sources[2].fingerprint
    assert [dict(row.values) for row in sources[2].read()] == ROWS[::-1]


def test_a_hub_id_without_network_gives_the_cause(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/no-such-set\[train\]: got \w+: .+ the data set cannot be loaded"):
        open_source(SourceConfig("nobody/no-such-set"))


@pytest.mark.parametrize("given", [{"split": "test"}, {"data_dir": ("x",)}, {"revision": "main"}])
def test_a_key_that_means_nothing_for_a_file_is_refused(tmp_path, given):
    with pytest.raises(DataError, match="a single file has no such thing"):
        open_source(SourceConfig(str(write(tmp_path / "a.json")), **given))
