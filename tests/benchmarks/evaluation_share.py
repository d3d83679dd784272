"""What part of a trial's time is spent evaluating, with everything left at its default.

    python tests/benchmarks/evaluation_share.py [--pairs 6000] [--hidden 256] [--layers 4] [--vocabulary 400] [--adapter lora|none]

A random Llama, pairs of 40 to 200 made-up words, one epoch. Prints seconds and the share that counting tokens predicts.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import save_chat_model  # noqa: E402

from prefopt_ray.prepare import open_worker  # noqa: E402
from prefopt_ray.spec import SweepSpec  # noqa: E402
from prefopt_ray.spec.evaluation_plan import share  # noqa: E402
from prefopt_ray.train import train  # noqa: E402

WORDS = "time year people way day man thing woman life child world school state family student group".split()


def main() -> None:
    options = sizes(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        spec = SweepSpec.from_dict(random_spec(Path(home), options))
        worker, prepared = open_worker(spec)
        config = prepared.trial_config("sigmoid", {"beta": 0.1, "learning_rate": 1e-5})
        stepping = _timed(worker.engine)
        began = time.monotonic()
        for report in train(config, worker):
            print(report.step, f"{report.seconds:.1f} s", flush=True)
        whole = time.monotonic() - began
    plan = config.evaluation
    print(json.dumps({
        "pairs": prepared.train_pairs, "select": len(prepared.loaded.data.select), "steps": plan.steps,
        "probe": plan.probe_pairs, "sample_steps": plan.sample_steps, "prompts": plan.sample_prompts,
        "trial_s": round(whole, 1), "training_s": round(stepping[0], 1),
        "evaluating": round(1 - stepping[0] / whole, 3), "predicted": round(share(prepared.workload, plan), 3),
    }))


def _timed(engine) -> list[float]:
    """Seconds spent in the engine's steps, counted from now on."""
    seconds, step = [0.0], engine.step

    def timed(trials) -> None:
        began = time.monotonic()
        step(trials)
        seconds[0] += time.monotonic() - began

    engine.step = timed
    return seconds


def random_spec(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A random Llama and made-up pairs of the options' sizes, and a spec with everything else at its default."""
    model = save_chat_model(home / "model")
    config = LlamaConfig.from_pretrained(
        model, vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=2 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(model)
    pairs = home / "pairs.jsonl"
    rng = np.random.default_rng(0)
    with pairs.open("w") as file:
        for number in range(options.pairs):
            prompt, chosen, rejected = (" ".join(rng.choice(WORDS, rng.integers(5, 25))) for _ in range(3))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "chosen": chosen, "rejected": rejected}) + "\n")
    return {
        "name": "share", "model": {"policy": str(model), "dtype": "float32", "adapter": {"kind": options.adapter}},
        "data": {"train": {"source": str(pairs)}}, "training": {"epochs": 1},
        "search": {"trials_per_loss": 1, "losses": {"sigmoid": {}}}, "storage": str(home / "results"),
    }


def sizes(description: str) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=400)
    parser.add_argument("--adapter", choices=("lora", "none"), default="lora")
    return parser.parse_args()


if __name__ == "__main__":
    main()
