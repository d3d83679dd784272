"""What all arms of the sweep benchmark are given: a random model with a tokenizer, rows, a spec, trials, token ids.

`hh`: sentences of made-up words, one token each, as long as hh-rlhf's. `sharegpt`: 300 real chat pairs, named by
PREFOPT_TEST_DATA, cut at 1024 tokens.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tiny import CHATML
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.model_shapes import MODELS, model_config
from benchmarks.pair_lengths import SHAPES
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.trial import TrialConfig

STEPS = {"hh": 60, "sharegpt": 36}  # of the longest trial; chat pairs take several times as long
# Of 8 trials, as ASHA keeps one in three: all are there at a ninth of the steps, three at a third, one at the end.
PARTS_OF_STEPS = {1: 9, 2: 3, 3: 9, 4: 3, 5: 9, 6: 9, 7: 9}
SELECT_PAIRS = {"hh": 32, "sharegpt": 16}
PROBE_PAIRS, TEST_PAIRS = 16, 16
BATCH_PAIRS = {"hh": 8, "sharegpt": 4}
VOCABULARY = 8192
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAREGPT = "sharegpt_en.json"

SPEC, TASK, PAIRS = "spec.yaml", "task.json", "pairs.safetensors"


@dataclass(frozen=True)
class Task:
    """The sweep without our code: what a person who assembles it otherwise needs to know."""

    model: str  # folder
    trials: tuple[TrialConfig, ...]  # in order; each ends at its own stop_step
    parts: dict[str, PairTokens]  # train, select, probe

    @classmethod
    def read(cls, folder: Path) -> "Task":
        written = json.loads((folder / TASK).read_text(encoding="utf-8"))
        arrays = load_file(folder / PAIRS)
        parts = {
            name: PairTokens.from_arrays({
                key.removeprefix(f"{name}/"): array for key, array in arrays.items() if key.startswith(f"{name}/")
            })
            for name in ("train", "select", "probe")
        }
        return cls(written["model"], tuple(TrialConfig.from_dict(trial) for trial in written["trials"]), parts)

    def write(self, folder: Path) -> None:
        arrays = {f"{name}/{key}": array for name, part in self.parts.items() for key, array in part.arrays().items()}
        save_file(arrays, folder / PAIRS)
        written = {"model": self.model, "trials": [trial.to_dict() for trial in self.trials]}
        (folder / TASK).write_text(json.dumps(written), encoding="utf-8")


def make_material(data: str, folder: Path, *, steps: int) -> None:
    """Everything into `folder`: the spec for our command line, the task for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(_sharegpt_texts()) if data == "sharegpt" else _words()
    tokenizer = _trained_tokenizer(texts) if data == "sharegpt" else _word_tokenizer(texts)
    model = _save_model(folder / "model", tokenizer)
    train = _sharegpt_file() if data == "sharegpt" else _hh_rows(folder, texts, steps * BATCH_PAIRS[data])
    spec = _spec(data, model, train, steps=steps)
    (folder / SPEC).write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in spec.items()), encoding="utf-8")
    _task(folder / SPEC, storage=folder / "prepared").write(folder)


def _spec(data: str, model: Path, train: Path, *, steps: int) -> dict[str, object]:
    """8 trials of three losses that TRL has too. Nothing but the given steps stops one."""
    return {
        "name": f"sweep-{data}",
        "model": {"policy": str(model), "dtype": "float32", "adapter": {"kind": "lora", "rank": 8, "alpha": 16}},
        "data": {
            "train": {"source": str(train)}, "select": {"from": "train", "pairs": SELECT_PAIRS[data]},
            "test": {"from": "train", "pairs": TEST_PAIRS}, "max_tokens": 1024,
            "text": "template" if data == "sharegpt" else "plain",
        },
        "training": {"steps": steps, "batch_pairs": BATCH_PAIRS[data], "warmup": 0},
        "search": {
            "method": "grid",
            "losses": {"sigmoid": {"beta": [0.1, 0.3]}, "hinge": {"beta": 0.1}, "ipo_mean": {"beta": 0.5}},
            "shared": {"learning_rate": [1e-4, 3e-4]},
            "baseline": {"loss": "sigmoid", "beta": 0.1, "learning_rate": 1e-4},
        },
        "scheduler": {"kind": "fixed", "stop_steps": {n: -(-steps // part) for n, part in PARTS_OF_STEPS.items()}},
        "eval": {"at": [0, "rungs"], "train_probe": PROBE_PAIRS},
        "samples": {"at": "never"},
        "guards": {"diverged": "flag", "overfit": "flag"},
        "resources": {"gpus_per_trial": 0, "cpus_per_trial": 1},
    }


def _task(spec_file: Path, *, storage: Path) -> Task:
    """The spec's trials with their stop steps, and its token ids."""
    from prefopt_ray.prepare import prepare
    from prefopt_ray.spec import load_spec
    from prefopt_ray.tuning.search import Point, listed_points

    spec = load_spec(spec_file, storage=str(storage))
    prepared = prepare(spec, stage=lambda name: lambda done, total: None, device="cpu", threads=1)
    loss, values = spec.baseline_values()
    points = listed_points(
        spec.loss_spaces(), method="grid", trials_per_loss=0, seed=spec.search.seed,
        baseline=Point(loss, values, baseline=True),
    )
    trials = []
    for number, point in enumerate(points):
        config = prepared.trial_config(point.loss, point.values)
        stop = spec.scheduler.stop_steps.get(number, config.training.stop_step)
        trials.append(replace(config, training=replace(config.training, stop_step=stop)))
    train, select = prepared.loaded.data.train, prepared.loaded.data.select
    probe = train.take(np.sort(np.random.default_rng(0).permutation(len(train))[:PROBE_PAIRS]))  # as our workers do
    return Task(prepared.blueprint.model.model, tuple(trials), {"train": train, "select": select, "probe": probe})


# -- model and rows --------------------------------------------------------------------------------


def _save_model(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    config = model_config(replace(MODELS["small-8k"], vocabulary=len(tokenizer)))
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _words() -> list[str]:
    return [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def _word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])


def _trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=CHATML
    )


def _hh_rows(folder: Path, words: list[str], train_pairs: int) -> Path:
    """One epoch of pairs, and those that select and test take out of it."""
    shape = SHAPES["hh"]
    batches = -(-(train_pairs + SELECT_PAIRS["hh"] + TEST_PAIRS) // shape.batch_pairs)
    lengths = shape.draw_typical(batches)
    rng = np.random.default_rng(0)
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for prompt, chosen, rejected in lengths:
            # Completions get an end token each.
            row = {"prompt": _text(rng, words, prompt), "chosen": " " + _text(rng, words, max(1, chosen - 1)),
                   "rejected": " " + _text(rng, words, max(1, rejected - 1))}
            file.write(json.dumps(row) + "\n")
    return path


def _text(rng: np.random.Generator, words: list[str], length: int) -> str:
    return " ".join(words[i] for i in rng.integers(0, len(words), length))


def _sharegpt_file() -> Path:
    place = os.environ.get("PREFOPT_TEST_DATA")
    if not place:
        raise SystemExit(f"--data sharegpt: set PREFOPT_TEST_DATA to the folder that holds {SHAREGPT}")
    return Path(place).absolute() / SHAREGPT


def _sharegpt_texts() -> Iterator[str]:
    for row in json.loads(_sharegpt_file().read_text(encoding="utf-8")):
        yield from (turn["value"] for turn in (*row["conversations"], row["chosen"], row["rejected"]))
