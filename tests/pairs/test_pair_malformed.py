"""The corpus of malformed files: each is refused with file, line, what was found and a fix, without a traceback."""

import re
from pathlib import Path

import pytest

from prefopt_ray.errors import DataError
from prefopt_ray.pairs.config import PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.load import load_sweep_data

CORPUS = Path(__file__).parent / "malformed"
# file -> (place after the file name, fragment of the message)
EXPECTED = {
    "truncated_list.json": (":2", "is the file cut off?"),
    "truncated_string.json": (":1", "is the file cut off?"),
    "not_json.json": (":1", "is not JSON"),
    "missing_comma.json": (":3", "Expecting ',' delimiter"),
    "object_of_splits.json": (":1", "one object with the keys 'train'; a .json file must be a list"),
    "list_of_strings.json": (" row 0", "got text ('good'); a row must be an object"),
    "empty_list.json": (":", "holds no rows"),
    "bad_line.jsonl": (":3", "is not JSON"),
    "number_line.jsonl": (":2", "got a number (42); a row must be an object"),
    "invalid_utf8.jsonl": (":2", "byte 0xff"),
    "utf16.jsonl": (":1", "save the file as UTF-8"),
    "empty.jsonl": (":", "the file is empty"),
    "blank.jsonl": (":", "the file is empty"),
    "unknown_columns.jsonl": (" chosen:", "'question', 'good', 'bad'"),
    "missing_key_in_row.jsonl": (":2 rejected", "the row has no 'rejected'"),
    "number_as_answer.jsonl": (":2 chosen", "got a number (5)"),
    "null_answer.jsonl": (":1 rejected", "got null"),
    "nested_prompt.jsonl": (":1 prompt[0]", "must be a message"),
    "unknown_role.jsonl": (":1 prompt[0].role", "did you mean 'user'?"),
    "last_turn_of_user.jsonl": (":1 chosen", "the last turn must be the assistant's"),
    "chosen_by_human.jsonl": (":1 chosen", "the last turn must be the assistant's"),
    "message_without_value.jsonl": (":1 conversations[0]", "`from` and `value`"),
    "half_character.jsonl": (":1 chosen", "U+D83D"),
    "texts_without_prompt.jsonl": (":1 chosen", "columns: {prompt: NAME}"),
    "nothing_left.jsonl": (":", "1 identical completions, 1 empty prompt or completion; no usable pair remains"),
    "no_header.csv": (" chosen:", "the first line of a csv must name the columns"),
    "unquoted_comma.csv": (":2", "4 fields; the header has 3 columns"),
    "open_quote.csv": (":3", "is not CSV: unexpected end of data"),
    "column_twice.csv": (":1", "a column appears twice"),
    "header_only.csv": (":1", "a header and no rows"),
    "junk.parquet": (":", "is not a whole parquet file"),
    "not_packed.jsonl.gz": (":", "is not a whole gzip file"),
    "cut_off.jsonl.gz": (":", "is not a whole gzip file"),
    "pairs.tsv": (":", "got .tsv; this kind of file is not supported (use one of .json"),
    "no_such_file.jsonl": (":", "does not exist"),
}


def config(source: str) -> PairsConfig:
    return PairsConfig(PartConfig(SourceConfig(source)), PartConfig(None, 1), PartConfig(None, 1), text="plain")


def test_the_corpus_and_the_table_name_the_same_files():
    assert {path.name for path in CORPUS.iterdir()} | {"no_such_file.jsonl"} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_malformed_file_is_refused_with_place_cause_and_fix(make_tokenizer, name):
    place, fragment = EXPECTED[name]
    with pytest.raises(DataError) as refused:
        load_sweep_data(config(str(CORPUS / name)), make_tokenizer(), cache=None)
    message = str(refused.value)
    assert f"{CORPUS / name}{place}" in message
    assert fragment in message
    assert refused.value.exit_code == 2
    assert all(problem.rule for problem in refused.value.problems)
    assert "Traceback" not in message


def test_an_empty_folder_is_refused(make_tokenizer, tmp_path):
    with pytest.raises(DataError, match="cannot be loaded") as refused:
        load_sweep_data(config(str(tmp_path)), make_tokenizer(), cache=None)
    assert re.search(r"name one file", str(refused.value))
