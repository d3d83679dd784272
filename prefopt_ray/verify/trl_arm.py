"""The same steps by TRL's own DPOTrainer, given our token ids in our order. TRL is imported here, on use, and nowhere
else: it is never needed to train.

What TRL computes in another way is refused with a reason instead of compared.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from copy import copy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prefopt_ray.engine.loading import load_model
from prefopt_ray.losses.cards import find_card
from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.prepare import Prepared
from prefopt_ray.trial import TrialConfig
from prefopt_ray.verify.arms import Arm, VerifiedStep, free_memory, trained_rows

TRL = "trl"
VERSION = "1.16"  # whose loss names and settings are used here
MOST_PAIRS = 8  # per forward of a loss that looks at pairs one by one
# Our losses that TRL has under another name; with the divergences that it has too.
LOSSES = {
    "sigmoid": "sigmoid", "hinge": "hinge", "ipo_mean": "ipo", "robust": "robust", "sigmoid_norm": "sigmoid_norm",
    "exo": "exo_pair", "nca": "nca_pair", "sppo": "sppo_hard", "aot": "aot", "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero", "apo_down": "apo_down", "discopop": "discopop",
}
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}
# Loss parameters as TRL calls them; a loss with any other is not compared.
PARAMETERS = {
    "beta": "beta", "label_smoothing": "label_smoothing", "tau": "discopop_tau",
    "divergence_alpha": "f_alpha_divergence_coef",
}


def obstacle(config: TrialConfig) -> str:
    """Why TRL cannot be asked; empty when it can."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        return "TRL is not installed (pip install trl==1.16.0)"
    if not found.startswith(f"{VERSION}."):
        return f"TRL {found} is installed; the comparison is written for {VERSION}"
    if _loss_name(config.loss) is None:
        return f"TRL {VERSION} has no loss that equals {config.loss}"
    if not set(config.loss_params) <= set(PARAMETERS):
        return f"TRL {VERSION} has no setting for {', '.join(sorted(set(config.loss_params) - set(PARAMETERS)))}"
    if config.adapter.kind == "qlora":
        return f"TRL {VERSION} rounds the adapters of a 4-bit base to bfloat16, here they are float32"
    if config.training.optimizer.kind != "adamw":
        return f"its {config.training.optimizer.kind} is set up in another way"
    return ""


def trl_arm(prepared: Prepared, config: TrialConfig) -> Arm:
    """The steps of `config` by TRL. Raises what TRL raises."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = _trainer(prepared, config, folder=folder)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    del trainer
    free_memory()
    steps = tuple(
        VerifiedStep(e["loss"], e["grad_norm"], np.array([[e["logps/chosen"], e["logps/rejected"]]])) for e in logged
    )
    return Arm(TRL, steps)


def _trainer(prepared: Prepared, config: TrialConfig, *, folder: str) -> Any:
    from trl import DPOTrainer

    class TokenisedTrainer(DPOTrainer):
        """Rows already hold token ids."""

        def _prepare_dataset(self, dataset: Any, *args: object, **kwargs: object) -> Any:
            return dataset

    train = prepared.loaded.data.train
    rows = _dataset(train.take(trained_rows(train, config)))
    trainer = TokenisedTrainer(
        model=_model(prepared), ref_model=_reference(prepared), args=_arguments(prepared, config, folder=folder),
        train_dataset=rows, processing_class=_tokenizer(prepared), peft_config=_lora(config),
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _model(prepared: Prepared, *, reference: bool = False) -> PreTrainedModel:
    blueprint = prepared.blueprint
    source = blueprint.reference if reference and blueprint.reference else blueprint.model
    dtype = "float32" if blueprint.full_finetuning else source.dtype
    return load_model(source, device=torch.device(blueprint.device), weights_dtype=dtype)


def _reference(prepared: Prepared) -> PreTrainedModel | None:
    """None: the policy with its adapter off."""
    blueprint = prepared.blueprint
    own = blueprint.reference is None and not blueprint.full_finetuning
    return None if own else _model(prepared, reference=True)


def _lora(config: TrialConfig) -> Any:
    from peft import LoraConfig

    adapter = config.adapter
    if adapter.kind == "none":
        return None
    target = adapter.target if isinstance(adapter.target, str) else list(adapter.target)
    return LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=target, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def _arguments(prepared: Prepared, config: TrialConfig, *, folder: str) -> Any:
    from trl import DPOConfig

    blueprint, training, optimizer = prepared.blueprint, config.training, config.training.optimizer
    size = _micro_batch(config)
    return DPOConfig(
        output_dir=folder, **_loss_settings(config), learning_rate=config.learning_rate, seed=config.seed,
        lr_scheduler_type="constant", warmup_steps=0, max_steps=training.stop_step,
        per_device_train_batch_size=size, gradient_accumulation_steps=training.batch_pairs // size,
        optim="adamw_torch", adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=training.max_grad_norm,
        train_sampling_strategy="sequential", max_length=None, activation_checkpointing=False,
        bf16=blueprint.full_finetuning and blueprint.model.dtype == "bfloat16", use_cpu=blueprint.device == "cpu",
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )


def _loss_settings(config: TrialConfig) -> dict[str, object]:
    divergence = config.loss.partition(":")[2]
    settings: dict[str, object] = {PARAMETERS[name]: value for name, value in config.loss_params.items()}
    settings["loss_type"] = _loss_name(config.loss)
    return settings | ({"f_divergence_type": DIVERGENCES[divergence]} if divergence else {})


def _loss_name(loss: str) -> str | None:
    name, _, divergence = loss.partition(":")
    return LOSSES.get(name) if not divergence or divergence in DIVERGENCES else None


def _micro_batch(config: TrialConfig) -> int:
    """Pairs per forward: they must divide the step's, and a loss of the whole batch must see it whole."""
    pairs = config.training.batch_pairs
    if find_card(config.loss).scope == "batch":
        return pairs
    return max(size for size in range(1, MOST_PAIRS + 1) if pairs % size == 0)


def _dataset(pairs: PairTokens) -> Any:
    from datasets import Dataset

    columns = ("prompt", "chosen", "rejected")
    return Dataset.from_dict({
        f"{name}_ids": [getattr(pairs, name)[i].tolist() for i in range(len(pairs))] for name in columns
    })


def _tokenizer(prepared: Prepared) -> Any:
    """TRL asks it only which id pads."""
    tokenizer = copy(prepared.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TRL talks on stdout and about what its next release renames."""
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings()
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
