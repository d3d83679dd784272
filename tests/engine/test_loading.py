"""Loading: what a person gives wrongly is named with its fix, and what is given rightly is loaded exactly."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.oracle import slow_logps
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCABULARY, random_pairs, save_model, tiny_llama
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from prefopt_ray.engine.loading import (
    ModelSource,
    check_length_fits,
    check_tokens_fit,
    decoder_and_head,
    load_model,
    load_tokenizer,
    source_digest,
)
from prefopt_ray.errors import ModelError

CPU = torch.device("cpu")


def load(folder: Path, *, adapters: tuple[Path, ...] = (), dtype: str = "float32") -> torch.nn.Module:
    return load_model(ModelSource(str(folder), adapters=tuple(map(str, adapters)), dtype=dtype), device=CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


def save_adapter(folder: Path, *, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
    base = tiny_llama(layers=layers, hidden=hidden)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(seed)
    model = get_peft_model(base, lora)
    model.save_pretrained(folder)
    return folder


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- what is right -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_exactly_and_without_dropout(folder: Path, dtype: str) -> None:
    model, original = load(folder, dtype=dtype), tiny_llama()
    assert not any(module.training for module in model.modules())
    for (name, loaded), (_, saved) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(loaded, saved.to(loaded.dtype)), name
        assert str(loaded.dtype) == f"torch.{dtype}"


def test_float32_weights_for_bfloat16_full_fine_tuning(folder: Path) -> None:
    source = ModelSource(str(folder), dtype="bfloat16")
    loaded = load_model(source, device=CPU, weights_dtype="float32")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("adapters", [0, 1])
def test_rotary_frequencies_stay_float32_in_a_bfloat16_model(folder: Path, adapter: Path, adapters: int) -> None:
    """Rounded to bfloat16 they are off by up to a radian after 500 tokens."""
    model = load(folder, adapters=(adapter,) * adapters, dtype="bfloat16")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for (name, mine), (_, theirs) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert mine.dtype == theirs.dtype == torch.float32, name
        assert torch.equal(mine, theirs)


def test_a_start_adapter_is_merged_in_float32_before_the_cast(folder: Path, adapter: Path) -> None:
    pairs = random_pairs(6)
    with_adapter = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    merged = load(folder, adapters=(adapter,))
    assert slow_logps(merged, pairs) == pytest.approx(slow_logps(with_adapter, pairs), abs=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    cast = load(folder, adapters=(adapter,), dtype="bfloat16")
    for (name, low), (_, high) in zip(cast.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.equal(low, high.bfloat16()), f"{name}: rounded before the merge"


def test_two_adapters_are_merged_in_order(folder: Path, adapter: Path, tmp_path: Path) -> None:
    second = save_adapter(tmp_path / "second", seed=1)
    pairs = random_pairs(4)
    by_hand = PeftModel.from_pretrained(tiny_llama(), adapter).merge_and_unload()
    by_hand = PeftModel.from_pretrained(by_hand, second).merge_and_unload()
    assert slow_logps(load(folder, adapters=(adapter, second)), pairs) == pytest.approx(slow_logps(by_hand, pairs))


def test_the_digest_names_weights_and_adapters(folder: Path, adapter: Path, tmp_path: Path) -> None:
    def digest(model: Path, *adapters: Path) -> str:
        return source_digest(ModelSource(str(model), adapters=tuple(map(str, adapters))))

    plain = digest(folder)
    other = save_model(tmp_path / "other", seed=1)
    assert plain == digest(shutil.copytree(folder, tmp_path / "copy"))
    assert len({plain, digest(other), digest(folder, adapter), digest(other, adapter)}) == 4


# -- what is wrong -----------------------------------------------------------------------------------


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_pickled_weights(folder: Path) -> None:
    without_weights(folder)
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")


def with_torn_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def with_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def with_an_unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="no-such-model")


def with_another_size(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=48)


def with_a_layer_too_many(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)


def of_a_decoder_without_head(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_llama().model.save_pretrained(folder)


def of_an_encoder_decoder(folder: Path) -> None:
    shutil.rmtree(folder)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "rule", "fix"),
    [
        (without_weights, "no file named model.safetensors", "needs \\*.safetensors"),
        (with_pickled_weights, "cannot be loaded", "pickled weights .* are never read"),
        (with_torn_weights, "cannot be loaded", "safetensors"),
        (with_broken_config, "not a valid JSON file", "config.json cannot be read"),
        (with_an_unknown_type, "no-such-model", "config.json cannot be read"),
        (with_another_size, "cannot be loaded", "config.json says 'llama'"),
        (with_a_layer_too_many, "9 weights missing, model.layers.2", "download the folder again"),
        (of_a_decoder_without_head, "1 weights missing, lm_head.weight", "causal language model"),
        (of_an_encoder_decoder, "T5Config", "config.json says 't5'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_cause_and_fix(
    folder: Path, damage: Callable[[Path], None], rule: str, fix: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=f"(?s){rule}.*{fix}") as caught:
        load(folder)
    (problem,) = caught.value.problems
    assert problem.place == str(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", [load_tokenizer, lambda source: load_model(source, device=CPU)])
def test_a_folder_that_does_not_exist_is_called_that(what: Callable[[ModelSource], object], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere model: no such folder"):
        what(ModelSource(str(tmp_path / "nowhere")))


def test_an_encoder_is_refused_though_transformers_would_load_it(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="depend on later tokens"):
        decoder_and_head(load(tmp_path / "bert"))


def test_an_adapter_given_as_the_model_is_refused(folder: Path, adapter: Path) -> None:
    """transformers would put it on its base silently, and `adapter off` would then not be the policy at step 0."""
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match="an adapter.*model.start_adapter"):
        load(adapter)


def adapter_without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def adapter_pickled(adapter: Path) -> None:
    adapter_without_weights(adapter)
    torch.save({}, adapter / "adapter_model.bin")


def adapter_without_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def adapter_torn(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def adapter_of_a_wider_model(adapter: Path) -> None:
    save_adapter(adapter, hidden=64)


def adapter_of_a_deeper_model(adapter: Path) -> None:
    save_adapter(adapter, layers=4)


def adapter_of_a_shallower_model(adapter: Path) -> None:
    save_adapter(adapter, layers=1)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (shutil.rmtree, "adapter_config.json"),
        (adapter_without_weights, "adapter_model.safetensors is missing in .*adapter_config.json"),
        (adapter_pickled, "adapter_model.safetensors is missing in .*adapter_model.bin"),
        (adapter_without_config, "adapter_config.json"),
        (adapter_torn, "header"),
        (adapter_of_a_wider_model, "state_dict"),
        (adapter_of_a_deeper_model, "holds 16 tensors and this model has places for 8"),
        (adapter_of_a_shallower_model, "holds 4 tensors and this model has places for 8"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_named_with_cause_and_fix(
    folder: Path, adapter: Path, damage: Callable[[Path], None], rule: str
) -> None:
    damage(adapter)
    with pytest.raises(ModelError, match=f"{rule}.*made for this base model") as caught:
        load(folder, adapters=(adapter,))
    assert caught.value.problems[0].key == "model.start_adapter"


def test_a_token_without_embedding_is_refused(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    model = load(folder)
    check_tokens_fit(model, tokenizer, largest_id=VOCABULARY - 1)
    with pytest.raises(ModelError, match="token id 64; the model has embeddings for 64 tokens, .*70 tokens"):
        check_tokens_fit(model, tokenizer, largest_id=VOCABULARY)


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded.*tokenizer files"):
        load_tokenizer(ModelSource(str(folder)))


def test_errors_cross_processes(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "nowhere")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_same_folder_loads_to_the_same_numbers(folder: Path) -> None:
    pairs = random_pairs(3)
    by_hand = AutoModelForCausalLM.from_pretrained(folder)
    assert np.array_equal(slow_logps(load(folder), pairs), slow_logps(by_hand, pairs))


def test_pairs_beyond_learned_positions_are_refused_and_beyond_rotary_ones_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    learned = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    check_length_fits(learned, longest=16)
    with pytest.raises(ModelError, match="set data.max_tokens to 16 or less"):
        check_length_fits(learned, longest=17)
    check_length_fits(tiny_llama(), longest=10_000)
    assert "10000 tokens" in caplog.text
