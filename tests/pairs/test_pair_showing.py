"""What `prefopt pairs` prints: the very tokens, and nothing that a hostile text could do to a terminal."""

import io

from rich.console import Console

from prefopt_ray.pairs.config import PairsConfig, PartConfig, SourceConfig
from prefopt_ray.pairs.load import LoadedPairs, load_sweep_data
from prefopt_ray.pairs.show import render_pairs, show_pairs


def load(tokenizer, rows: list[dict]) -> LoadedPairs:
    config = PairsConfig(PartConfig(SourceConfig("rows", rows=tuple(rows))), PartConfig(None, 1), PartConfig(None, 1),
                         text="template", max_tokens=200)
    return load_sweep_data(config, tokenizer, cache=None)


def rows(count: int = 8, **changes: str) -> list[dict]:
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No.", **changes} for i in range(count)]


def printed(loaded: LoadedPairs, tokenizer, *, color: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=color, color_system="standard" if color else None)
    console.print(render_pairs(show_pairs(loaded, tokenizer, 5), loaded))
    return out.getvalue()


def test_views_show_the_decoded_tokens_and_how_completions_end(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    loaded = load(tokenizer, rows())
    views = show_pairs(loaded, tokenizer, 5)
    assert len(views) == 5
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for view in views:
        assert view.prompt == f"<|im_start|>user\nWhat is {view.row}?<|im_end|>\n<|im_start|>assistant\n"
        assert view.chosen == f"It is {view.row}.<|im_end|>"
        assert view.chosen_end[-1] == view.rejected_end[-1] == (end, "<|im_end|>")
    assert len(show_pairs(loaded, tokenizer, 50)) == 6


def test_the_prompt_is_dimmed_and_completions_are_coloured(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    text = printed(load(tokenizer, rows()), tokenizer, color=True)
    assert "\x1b[2m<|im_start|>user" in text
    assert "\x1b[32mIt is" in text and "\x1b[31mNo." in text


def test_drops_are_listed_by_reason_with_row_numbers_and_lengths_by_part(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    values = rows(12)
    values[2]["chosen"] = values[5]["chosen"] = "No."
    text = printed(load(tokenizer, values), tokenizer)
    assert "identical completions" in text and "2, 5" in text
    assert "prompts cut" in text and "0 (0.0%)" in text


def test_terminal_escapes_and_markup_in_texts_are_shown_not_obeyed(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    hostile = "\x1b[2J\x1b]0;title\x07 [bold red]x[/] [/nothing] \u202egnp\r\x9b1m"
    text = printed(load(tokenizer, rows(chosen=hostile)), tokenizer)
    assert not {"\x1b", "\x07", "\u202e", "\r", "\x9b"} & set(text)
    assert "\\x1b[2J" in text and "[bold red]x[/] [/nothing]" in text and "\\u202e" in text
