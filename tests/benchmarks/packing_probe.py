"""Several LoRA trials in one forward: launches and time against stepping them one after the other.

    python tests/benchmarks/packing_probe.py [--model small-8k] [--shape hh] [--pairs 2 8] [--trials 1 2 4 8]
    python tests/benchmarks/packing_probe.py --device cuda --model qwen2.5-0.5b --shape hh --pairs 2 8

K trials of one sweep take the same rows at the same step, so their tokens are K copies of one flat batch: frozen
linears see (K S, d), adapters are stacked (K, r, d) and added by baddbmm, one AdamW works on a buffer (K, P) with a
rate and a clip per row. Parity with the flat engine's own steps comes first, and that a trial whose adapter is NaN
changes no bit of its neighbours; if either fails, nothing is timed and the exit code is 1.
"""

import argparse
import copy
import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not be asked to be deterministic
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import linear, logsigmoid  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from benchmarks.model_shapes import MODELS, ModelShape, random_model  # noqa: E402
from benchmarks.pair_lengths import SHAPES, random_pairs  # noqa: E402
from benchmarks.parity import largest_relative  # noqa: E402
from benchmarks.step_arms import open_engine, step_trial  # noqa: E402
from benchmarks.timing import machine, now  # noqa: E402
from prefopt_ray.engine.base import ReferencedPairs, StepOutcome  # noqa: E402
from prefopt_ray.engine.batches import shared_lengths  # noqa: E402
from prefopt_ray.engine.flat.attention import flat_attention_in  # noqa: E402
from prefopt_ray.engine.flat.head import FrozenHeadLogps  # noqa: E402
from prefopt_ray.engine.flat.layout import flat_pairs  # noqa: E402
from prefopt_ray.engine.head import row_sums  # noqa: E402
from prefopt_ray.losses.cards import find_card  # noqa: E402
from prefopt_ray.losses.stats import PairStats  # noqa: E402
from prefopt_ray.pairs.tokens import PairTokens  # noqa: E402
from prefopt_ray.trial import TrialConfig  # noqa: E402

SCALING = 2.0  # of the adapters: alpha / rank
STEPS = 4  # of parity; as many are timed per round
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, of losses and gradient norms
BETAS, EPS, CLIP = (0.9, 0.999), 1e-8, 1.0


class StackedLora(torch.autograd.Function):
    """x W^T + bias + scaling (x A_k^T) B_k^T, the rows of x lying trial after trial; gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, base: nn.Linear, a: Tensor, b: Tensor
    ) -> Tensor:
        """x (1, K S, d), a (K, r, d), b (K, o, r) float32 -> (1, K S, o)."""
        trials = len(a)
        rows = x.reshape(trials, -1, x.shape[-1])  # (K, S, d)
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        down = torch.bmm(rows, a_cast.mT)  # (K, S, r)
        out = linear(rows, base.weight, base.bias).baddbmm_(down, b_cast.mT, alpha=SCALING)
        ctx.save_for_backward(rows, base.weight, a_cast, b_cast, down)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, down = ctx.saved_tensors
        pull = grad.reshape(len(a), -1, grad.shape[-1])  # (K, S, o)
        pull_down = torch.bmm(pull, b).mul_(SCALING)  # (K, S, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (pull @ weight).baddbmm_(pull_down, a).view(*grad.shape[:-1], -1)
        return grad_x, None, torch.bmm(pull_down.mT, rows).float(), torch.bmm(pull.mT, down).mul_(SCALING).float()


class PackedTrials:
    """K trials on one frozen model. Weights, gradients and moments are (K, P): a trial's row is its own."""

    def __init__(self, model: PreTrainedModel, starts: list[Mapping[str, Tensor]], configs: list[TrialConfig]) -> None:
        """`starts`: each trial's adapter weights by peft's parameter names."""
        self.model, self._count = model, len(starts)
        flat = [torch.cat([t.flatten() for t in start.values()]) for start in starts]
        self.weights = torch.stack(flat).to(model.device)  # (K, P)
        self._grads, self._first, self._second = (torch.zeros_like(self.weights) for _ in range(3))
        self._made = torch.zeros(self._count, 1, device=model.device)  # steps
        self._rates, self._betas = (
            torch.tensor(values, device=model.device)[:, None]
            for values in ([c.learning_rate for c in configs], [c.loss_params["beta"] for c in configs])
        )
        self._leaves = self._stacked(starts[0])
        for name in {name.rpartition(".lora_")[0] for name in self._leaves}:
            base = model.get_submodule(name)
            a, b = (self._leaves[f"{name}.lora_{side}.weight"] for side in "AB")
            base.forward = lambda x, base=base, a=a, b=b: StackedLora.apply(x, base, a, b)

    def step(self, pairs: ReferencedPairs) -> tuple[Tensor, Tensor]:
        """One step of every trial on the same rows: (K,) mean losses and gradient norms before clipping."""
        self._grads.zero_()
        losses = self._losses(pairs)  # (K,)
        losses.sum().backward()
        norms = torch.linalg.vector_norm(self._grads, dim=1, keepdim=True)  # (K, 1)
        self._adamw(norms, applied=(torch.isfinite(norms) & torch.isfinite(losses.detach()[:, None])))
        return losses.detach(), norms[:, 0]

    def _losses(self, pairs: ReferencedPairs) -> Tensor:
        copies = pairs.take(np.tile(np.arange(len(pairs)), self._count))
        batch = flat_pairs(copies.tokens, device=self.model.device)
        with flat_attention_in(self.model):
            hidden = self.model.get_decoder()(
                input_ids=batch.input_ids, use_cache=False, **batch.model_inputs
            ).last_hidden_state
        head = self.model.get_output_embeddings()
        states = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
        sums = row_sums(FrozenHeadLogps.apply(states, head.weight, head.bias, batch.targets), batch)  # (2 K B,)
        reference = torch.as_tensor(copies.reference, device=sums.device).T.reshape(2, self._count, -1)
        ratios = sums.view(2, self._count, -1) - reference  # (2, K, B) chosen first
        return -logsigmoid(self._betas * (ratios[0] - ratios[1])).mean(1)

    def _adamw(self, norms: Tensor, *, applied: Tensor) -> None:
        """AdamW without weight decay, row by row; a row that is not `applied` (K, 1) keeps everything."""
        grads = torch.where(applied, self._grads * (CLIP / (norms + 1e-6)).clamp(max=1.0), 0.0)
        made = self._made + applied
        first = torch.where(applied, self._first.lerp(grads, 1 - BETAS[0]), self._first)
        second = torch.where(applied, self._second.lerp(grads * grads, 1 - BETAS[1]), self._second)
        scale = (second / (1 - BETAS[1] ** made)).sqrt_().add_(EPS)
        move = self._rates * first / (1 - BETAS[0] ** made) / scale
        self.weights.sub_(torch.where(applied, move, 0.0))
        self._made, self._first, self._second = made, first, second

    def _stacked(self, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each adapter matrix (K, rows, columns) as a leaf on its columns of the buffer, its gradient likewise."""
        leaves, end = {}, 0
        for name, tensor in start.items():
            span, end = slice(end, end + tensor.numel()), end + tensor.numel()
            leaf = self.weights[:, span].view(-1, *tensor.shape).detach().requires_grad_()
            leaf.grad = self._grads[:, span].view(-1, *tensor.shape)
            leaves[name] = leaf
        return leaves


@dataclass
class OneTrial:
    """SteppedTrial (see engine.base) that does what the packed step does and no more."""

    slot: int
    config: TrialConfig
    pairs: ReferencedPairs

    def __post_init__(self) -> None:
        self.card, self.losses, self.norms = find_card("sigmoid"), [], []

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate

    @property
    def measures_update(self) -> bool:
        return False

    def next_batch(self) -> ReferencedPairs:
        return self.pairs

    def loss(self, stats: PairStats) -> Tensor:
        chosen = stats.policy_chosen - stats.reference_chosen
        rejected = stats.policy_rejected - stats.reference_rejected
        return -logsigmoid(self.config.loss_params["beta"] * (chosen - rejected))

    def finish_step(self, outcome: StepOutcome) -> None:
        self.losses.append(float(outcome.losses.mean()))
        self.norms.append(outcome.grad_norm)


class Bench:
    """K trials twice: in slots of the flat engine, and packed, from the same start."""

    def __init__(self, model: PreTrainedModel, tokens: PairTokens, *, trials: int) -> None:
        config = step_trial(steps=STEPS, batch_pairs=len(tokens))
        self.configs = [
            replace(config, learning_rate=1e-3 / (k + 1), loss_params={"beta": 0.1 * (k + 1)}, seed=k)
            for k in range(trials)
        ]
        self._model = model
        self.engine = open_engine("auto", copy.deepcopy(model), trial=config)
        self.pairs = ReferencedPairs(tokens, self.engine.score(-1, tokens))
        self.packed = self.fresh()

    def fresh(self, *, broken: int | None = None) -> PackedTrials:
        """The packed trials at their start, also in the engine's slots; one's adapter NaN."""
        starts = []
        for slot, config in enumerate(self.configs):
            self.engine.open(slot, config)
            weights = self.engine.state(slot)
            starts.append({_plain(name): t for name, t in weights.items() if name.startswith("weights/")})
        if broken is not None:
            starts[broken] = {name: torch.full_like(t, torch.nan) for name, t in starts[broken].items()}
        self.alone = [OneTrial(k, config, self.pairs) for k, config in enumerate(self.configs)]
        return PackedTrials(copy.deepcopy(self._model), starts, self.configs)


def main() -> int:
    options = _options()
    # Gradients are summed into columns of one buffer on purpose; torch would rather lay them out anew.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = MODELS[options.model]
    model = random_model(shape, device=device, dtype=dtype)
    rows, void = [], False
    for pairs in options.pairs:
        tokens = _typical_pairs(options.shape, shape, pairs)
        for trials in options.trials:
            rows.append(_measure(model, tokens, trials=trials, rounds=options.rounds))
            print(_row(rows[-1]), flush=True)
            void |= not rows[-1]["agrees"]
    line = json.dumps({"benchmark": "packing", "void": void, "model": shape.name, "shape": options.shape,
                       "machine": machine(device), "rows": rows})
    if options.json:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 1 if void else 0


def _measure(model: PreTrainedModel, tokens: PairTokens, *, trials: int, rounds: int) -> dict[str, object]:
    bench = Bench(model, tokens, trials=trials)
    found = difference(bench)
    agrees = found <= MOST_DIFFERENCE[model.dtype] and (trials == 1 or isolates(bench))
    facts = {"pairs": len(tokens), "trials": trials, "tokens": trials * int(shared_lengths(tokens).sum()),
             "difference": found, "agrees": agrees}
    if not agrees:
        return facts
    # One after the other as in a sweep: each trial has an engine, so no adapter is switched, and every step's loss and
    # norm are read.
    one = [bench.alone[0]] * trials
    arms = {
        "packed": lambda: [read.tolist() for read in bench.packed.step(bench.pairs)],
        "alone": lambda: bench.engine.step(one),
    }
    on_gpu = model.device.type == "cuda"
    return facts | {
        f"{name}_launches": (_kernels if on_gpu else _operations)(step) for name, step in arms.items()
    } | _times(arms, model.device, rounds=rounds)


def difference(bench: Bench) -> float:
    """Largest relative difference of any trial's losses and gradient norms over some steps."""
    packed = [bench.packed.step(bench.pairs) for _ in range(STEPS)]
    for _ in range(STEPS):
        bench.engine.step(bench.alone)
    worst = 0.0
    for k, trial in enumerate(bench.alone):
        losses, norms = ([float(step[part][k]) for step in packed] for part in (0, 1))
        worst = max(worst, largest_relative(losses, trial.losses), largest_relative(norms, trial.norms))
    return worst


def isolates(bench: Bench) -> bool:
    """Whether a trial that is NaN from the start leaves every bit of the others, over some steps."""
    whole, broken = bench.fresh(), bench.fresh(broken=1)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)  # a GPU's attention adds up in any order otherwise
    for _ in range(2):
        whole.step(bench.pairs)
        losses, _ = broken.step(bench.pairs)
    torch.use_deterministic_algorithms(mode=False)
    others = [k for k in range(len(bench.configs)) if k != 1]
    return bool(torch.isnan(losses[1])) and torch.equal(whole.weights[others], broken.weights[others])


def _times(
    arms: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int
) -> dict[str, float]:
    """Median seconds of a step of all trials, and how many times as fast packing is; arms in random order."""
    rng, seconds = random.Random(0), {name: [] for name in arms}
    for _ in range(rounds):
        for name in rng.sample(sorted(arms), len(arms)):
            began = now(device)
            for _ in range(STEPS):
                arms[name]()
            spent = now(device) - began
            seconds[name].append((spent.wall_s if device.type == "cuda" else spent.cpu_s) / STEPS)
    ratios = [alone / packed for alone, packed in zip(seconds["alone"], seconds["packed"], strict=True)]
    return {f"{name}_s": median(values) for name, values in seconds.items()} | {
        "ratio": median(ratios), "ratio_least": min(ratios), "ratio_most": max(ratios)
    }


class _Counter(TorchDispatchMode):
    """Counts operations that compute something: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - torch's own signature
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            self.count += 1
        return func(*args, **(kwargs or {}))


def _operations(step: Callable[[], object]) -> int:
    with _Counter() as counter:
        step()
    return counter.count


def _kernels(step: Callable[[], object]) -> int:
    """Kernels that one step launches on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    return sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)


def _typical_pairs(shape: str, model: ModelShape, pairs: int) -> PairTokens:
    """One batch as long as the shape's usual ones."""
    lengths = replace(SHAPES[shape], batch_pairs=pairs, padding=1.0).draw_typical(1)
    return random_pairs(lengths, vocabulary=model.vocabulary)


def _plain(name: str) -> str:
    """peft's `weights/[base_model.model.]layers.0.q_proj.lora_A.weight` as the bare model names it."""
    return name.removeprefix("weights/").removeprefix("base_model.model.")


def _row(row: Mapping[str, object]) -> str:
    start = f"{row['pairs']} pairs, {row['trials']} trials, {row['tokens']} tokens: within {row['difference']:.0e}"
    if not row["agrees"]:
        return f"{start}: DIFFERS, or a NaN reached its neighbours; no times"
    return (f"{start}; launches {row['packed_launches']} against {row['alone_launches']}, "
            f"seconds {row['packed_s']:.3f} against {row['alone_s']:.3f}: {row['ratio']:.2f} times as fast "
            f"({row['ratio_least']:.2f}-{row['ratio_most']:.2f})")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small-8k")
    parser.add_argument("--shape", choices=SHAPES, default="hh")
    parser.add_argument("--pairs", type=int, nargs="+", default=[2, 8], help="per trial and step")
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the JSON line there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
