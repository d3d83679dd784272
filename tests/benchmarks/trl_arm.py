"""TRL's DPOTrainer as the peer: with its defaults, and tuned as far as its options and columns go.

Both are given token ids, rows in order and the seed, so that they compute what our trials compute. *default* keeps
gradient checkpointing and the reference's forward at every step. *tuned* turns checkpointing off and reads reference
log-probs from columns. TRL's own code is not changed; `datasets` and `trl` are imported on use.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils import logging

from prefopt_ray.pairs.tokens import PairTokens
from prefopt_ray.trial import TrialConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOTrainer

DEFAULT, TUNED = "trl default", "trl tuned"
LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo_mean": "ipo"}  # our card -> TRL's name
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class TrlSettings:
    """What differs between TRL runs beside the trial."""

    tuned: bool
    folder: str
    logged_every: int = 10  # TRL's own default
    evaluation_batch: int = 8  # TRL's own default
    bfloat16: bool = False
    on_cpu: bool = True


def quiet() -> None:
    """No progress bars, and no warnings about names that its releases exchange."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ["TQDM_DISABLE"] = "1"
    logging.set_verbosity_error()
    if available():
        import datasets

        datasets.disable_progress_bars()


def available() -> bool:
    """Whether trl and datasets are installed."""
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError:
        return False
    return True


def dataset(pairs: PairTokens, *, order: Sequence[int] | None = None) -> "Dataset":
    """The pairs as TRL's token id columns, in order."""
    from datasets import Dataset

    return Dataset.from_list([
        {f"{name}_ids": getattr(pairs, name)[int(i)].tolist() for name in ("prompt", "chosen", "rejected")}
        for i in (range(len(pairs)) if order is None else order)
    ])


def with_reference(rows: "Dataset", logps: np.ndarray) -> "Dataset":
    """The rows with the columns that TRL's collator passes on. (N, 2) chosen, rejected, in the rows' order."""
    for number, name in enumerate(REFERENCE_COLUMNS):
        rows = rows.add_column(name, logps[:, number].astype(np.float64).tolist())
    return rows


def open_trainer(
    model: PreTrainedModel, trial: TrialConfig, *, rows: "Dataset", settings: TrlSettings,
    evaluated: "dict[str, Dataset] | None" = None, callbacks: Sequence[TrainerCallback] = (),
) -> "DPOTrainer":
    """A trainer that takes `rows` one batch after the other for `trial.training.stop_step` steps.

    `model` becomes its own: it is wrapped and patched. A tuned trainer's rows must hold the reference columns.
    """
    from peft import LoraConfig

    lora = LoraConfig(
        r=trial.adapter.rank, lora_alpha=trial.adapter.alpha, target_modules=trial.adapter.target,
        lora_dropout=0.0, task_type="CAUSAL_LM",
    )
    trainer = _trainer_class()(
        model=model, args=_arguments(trial, settings), train_dataset=rows, eval_dataset=evaluated,
        processing_class=_no_text(model), peft_config=lora, callbacks=list(callbacks),
    )
    # Its option would compute the columns again, for every seed and rank; it reads them when this is set.
    trainer.precompute_ref_logps = settings.tuned
    trainer.remove_callback(PrinterCallback)
    return trainer


def reference_logps(model: PreTrainedModel, trial: TrialConfig, rows: "Dataset", *, settings: TrlSettings) -> np.ndarray:
    """(N, 2) by TRL's own precomputation, longest rows first so that little is padding."""
    lengths = np.array([len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows])
    order = np.argsort(-lengths, kind="stable")
    arguments = _arguments(trial, settings)
    arguments.precompute_ref_log_probs = True
    done = _trainer_class()(
        model=model, args=arguments, train_dataset=rows.select(order), processing_class=_no_text(model),
        peft_config=_smallest_adapter(),
    ).train_dataset
    out = np.empty((len(rows), 2))
    out[order] = np.column_stack([done[name] for name in REFERENCE_COLUMNS])
    return out


def _arguments(trial: TrialConfig, settings: TrlSettings) -> Any:
    from trl import DPOConfig

    training = trial.training
    optimizer = training.optimizer
    tuned = {"activation_checkpointing": False} if settings.tuned else {}
    return DPOConfig(
        output_dir=settings.folder, loss_type=LOSSES[trial.loss], beta=trial.loss_params["beta"],
        learning_rate=trial.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
        max_steps=training.stop_step, per_device_train_batch_size=training.batch_pairs,
        per_device_eval_batch_size=settings.evaluation_batch, gradient_accumulation_steps=1,
        optim="adamw_torch", adam_beta1=optimizer.betas[0], adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps, weight_decay=optimizer.weight_decay, max_grad_norm=training.max_grad_norm,
        train_sampling_strategy="sequential", max_length=None, seed=trial.seed, bf16=settings.bfloat16,
        use_cpu=settings.on_cpu, logging_steps=settings.logged_every, logging_nan_inf_filter=False,
        save_strategy="no", report_to="none", disable_tqdm=True, **tuned,
    )


def _trainer_class() -> type:
    from trl import DPOTrainer

    class TokenisedTrainer(DPOTrainer):
        """Rows already hold token ids: nothing to tokenise, in any trial."""

        def _prepare_dataset(self, dataset: "Dataset", *args: object, **kwargs: object) -> "Dataset":
            return dataset

    return TokenisedTrainer


def _no_text(model: PreTrainedModel) -> Any:
    """A tokenizer that only says which id pads; TRL asks for one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pad, end = model.config.pad_token_id or 0, model.config.eos_token_id
    words = Tokenizer(models.WordLevel({"<pad>": pad, "<end>": end}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def _smallest_adapter() -> Any:
    """The reference is the base with its adapter off, whatever the adapter."""
    from peft import LoraConfig

    return LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
