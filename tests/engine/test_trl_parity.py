"""Eight optimizer steps against TRL's own DPOTrainer, the same weights, pairs and order.

TRL is the oracle here and nowhere else: loss 1e-5 relative, gradient norm 1e-4, summed log-probs 1e-3 nats.
"""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import PLAN, random_data, referenced, tiny_engine, tiny_llama, trial_config

from prefopt_ray.engine.base import Engine
from prefopt_ray.engine.flat.engine import FlatEngine
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.train.schedule import batch_indices
from prefopt_ray.train.state import TrialState
from prefopt_ray.train.worker import make_worker
from prefopt_ray.trial import TrialConfig

trl = pytest.importorskip("trl", reason="TRL is a test-only dependency: pip install -e '.[test]'")

STEPS, BATCH = 8, 8
CASES = {
    "sigmoid": (dict(loss_type="sigmoid"), {"beta": 0.1}),
    "ipo_mean": (dict(loss_type="ipo"), {"beta": 0.5}),
    "hinge": (dict(loss_type="hinge"), {"beta": 0.3}),
    "robust": (dict(loss_type="robust", label_smoothing=0.1), {"beta": 0.1, "label_smoothing": 0.1}),
    # One for each thing that an engine does differently: lengths, both completions apart, the whole batch sorted (here
    # in two micro-batches, which TRL cannot), another divergence. (Its WPO does not clamp the weight as the paper's code.)
    "sigmoid_norm": (dict(loss_type="sigmoid_norm"), {"beta": 2.0}),
    "nca": (dict(loss_type="nca_pair"), {"beta": 0.1}),
    "aot": (dict(loss_type="aot"), {"beta": 0.2, "label_smoothing": 0.0}),
    "sigmoid:js": (dict(loss_type="sigmoid", f_divergence_type="js_divergence"), {"beta": 0.1}),
}
BOTH = ("sigmoid", "ipo_mean", "hinge", "robust")  # with full fine-tuning too


@pytest.mark.parametrize(
    ("loss", "adapter"), [(loss, "lora") for loss in CASES] + [(loss, "none") for loss in BOTH]
)
def test_eight_steps_agree_with_trl(loss: str, adapter: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    seed = 7
    config = trial_config(
        loss, adapter=adapter, params=CASES[loss][1], learning_rate=3e-3 if adapter == "lora" else 1e-3,
        steps=STEPS, micro_batch_pairs=4, seed=seed,
    )
    theirs = trl_steps(config, CASES[loss][0], folder=tmp_path)
    assert len(theirs) == STEPS
    for engine in (tiny_engine(), FlatEngine(tiny_llama(), plan=PLAN, pad_id=0, eos_ids=(2,))):
        for mine, other in zip(our_steps(engine, config), theirs, strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
            for side in ("chosen", "rejected"):
                assert mine[f"logps/{side}"] == pytest.approx(other[f"logps/{side}"], abs=1e-3)


def our_steps(engine: Engine, config: TrialConfig) -> list[dict[str, float]]:
    parts = referenced(engine, random_data())
    worker = make_worker(engine, parts, decode=str, probe_pairs=8, sample_prompts=2)
    trial = TrialState.open(config, worker)
    for _ in range(STEPS):
        engine.step([trial])
    points = trial.state()["points"]
    return [{name.removeprefix("train/"): value for name, value in metrics.items()} for _, metrics in points]


def trl_steps(config: TrialConfig, loss: dict[str, object], *, folder: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: object, **kwargs: object) -> Dataset:
            return dataset  # rows already hold token ids

    train = random_data().train
    order = np.concatenate([
        batch_indices(step, pairs=len(train), batch=BATCH, seed=config.seed) for step in range(STEPS)
    ])
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    base = tiny_llama()
    lora = config.adapter.kind == "lora"
    peft = LoraConfig(
        r=config.adapter.rank, lora_alpha=config.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    arguments = DPOConfig(
        output_dir=str(folder), beta=config.loss_params["beta"], learning_rate=config.learning_rate, **loss,
        lr_scheduler_type="constant", warmup_steps=0, max_steps=STEPS, per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1, bf16=False, activation_checkpointing=False, optim="adamw_torch",
        train_sampling_strategy="sequential", logging_steps=1, logging_nan_inf_filter=False, report_to="none",
        use_cpu=True, max_grad_norm=1.0, seed=config.seed, save_strategy="no", disable_tqdm=True, max_length=None,
    )
    trainer = TokenisedDPOTrainer(
        model=base, ref_model=None if lora else deepcopy(base), args=arguments,
        train_dataset=Dataset.from_list(rows(train, order)), processing_class=tokenizer,
        peft_config=peft if lora else None,
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def rows(pairs: PairTokens, order: np.ndarray) -> list[dict[str, list[int]]]:
    return [
        {"prompt_ids": pairs.prompt[i].tolist(), "chosen_ids": pairs.chosen[i].tolist(),
         "rejected_ids": pairs.rejected[i].tolist()}
        for i in map(int, order)
    ]
