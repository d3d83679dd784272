"""The corpus of malformed files: each is refused with file, line, what was found and a fix, without a traceback."""

import re
from dataclasses import replace
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
    "git_lfs_pointer.parquet": (":", "got a Git LFS pointer; its name says .parquet (fetch the data itself: git lfs"),
    "web_page.jsonl": (":", "got a web page"),
    "packed.jsonl": (":", "got gzip data; its name says .jsonl (add .gz to its name)"),
    "zip.json": (":", "got a zip archive"),
    "utf16_without_mark.json": (":1", "save the file as UTF-8"),
    "nested_too_deeply.json": (":1", "nested too deeply"),
    "number_of_5000_digits.jsonl": (":1", "is not readable JSON"),
    "role_is_null.jsonl": (":1 chosen[0].role", "got null"),
    "all_identical.jsonl": (":", "1 identical completions; no usable pair remains (are these the right columns?"),
    "spaces_in_header.csv": (" chosen:", "columns: {chosen: ' chosen'}"),
    "semicolons.csv": (" chosen:", "'prompt;chosen;rejected'"),
    "arrays.jsonl": (":1", "got a list of 3; a row must be an object"),
    "single_object.json": (":1", "put the rows into a list"),
    "forms_differ.jsonl": (":1 rejected", "must have the same form"),
    "image_in_content.jsonl": (":1 prompt[0].content", "the content of a message must be text"),
    "junk_behind_gzip.jsonl.gz": (":", "is not a whole gzip file"),
    "column_twice.parquet": (":", "a column appears twice (rename or remove one of the two)"),
    "no_rows.parquet": (":", "the file holds no rows"),
    "bytes.parquet": (" row 0 chosen", "got bytes"),
    "cut_off.parquet": (":", "is not a whole parquet file"),
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


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("https://example.org/pairs.jsonl", "download it and name the file"),
        ("s3://bucket/pairs.jsonl", "download it and name the file"),
        ("nowhere/", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_a_link_or_a_path_to_nothing_is_not_taken_for_a_hub_id(make_tokenizer, source, fragment):
    with pytest.raises(DataError, match=fragment):
        load_sweep_data(config(source), make_tokenizer(), cache=None)


def test_a_damaged_file_in_a_folder_is_named_by_its_own_cause(make_tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match="JSON parse error"):
        load_sweep_data(config(str(tmp_path)), make_tokenizer(), cache=None)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ '{a}'.format() }}", "KeyError: 'a'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% if %}", "FILE.jinja:1 data.text: is not jinja"),
        ("{{ messages[0]['content'] }}", "does not write the assistant's text"),
        ("", "does not write the assistant's text"),
    ],
)
def test_a_template_that_fails_is_named_with_its_cause(make_tokenizer, tmp_path, template, cause):
    path = tmp_path / "FILE.jinja"
    path.write_text(template)
    pairs = replace(config(str(CORPUS / "arrays.jsonl")), text=str(path))
    with pytest.raises(DataError) as refused:
        load_sweep_data(pairs, make_tokenizer(), cache=None)
    assert cause in str(refused.value)
    assert str(path) in str(refused.value)
