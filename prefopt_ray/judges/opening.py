"""From the spec's judge section to a judge, and the cheap check that comes before anything is trained."""

from pathlib import Path

from prefopt_ray.judges.base import Judge
from prefopt_ray.judges.endpoint import Endpoint
from prefopt_ray.judges.functions import GoldJudge, check_function, function_name, open_function
from prefopt_ray.judges.reward_model import RewardModel, check_reward_model
from prefopt_ray.spec.sections import JudgeSpec


def open_judge(spec: JudgeSpec | None, *, storage: Path, device: str) -> Judge:
    """None = the gold reward. Raises JudgeError."""
    if spec is None:
        return GoldJudge()
    if spec.reward_model is not None:
        return RewardModel(spec.reward_model, device=device)
    if spec.callable is not None:
        return open_function(spec.callable)
    return Endpoint(spec.endpoint, cache=storage / "cache" / "judge")


def check_judge(spec: JudgeSpec) -> None:
    """Raise JudgeError for what would fail hours later: a key, an address, a function, a model."""
    if spec.reward_model is not None:
        check_reward_model(spec.reward_model)
    elif spec.callable is not None:
        check_function(spec.callable)
    else:
        Endpoint(spec.endpoint, cache=None).check()


def judge_name(spec: JudgeSpec | None) -> str:
    """The judge as people call it; the same as the opened judge's."""
    if spec is None:
        return GoldJudge.name
    if spec.callable is not None:
        return function_name(spec.callable)
    return spec.reward_model or spec.endpoint.model
