"""Small valid specs that the tests of this folder start from."""

from typing import Any

from prefopt_ray.spec import SweepSpec


def plain_spec(**sections: Any) -> dict[str, Any]:
    """A valid spec as a dict; named sections replace the default ones."""
    spec = {
        "name": "example",
        "model": {"policy": "org/model"},
        "data": {"train": {"source": "org/pairs"}},
        "training": {"steps": 100},
        "search": {"trials_per_loss": 4, "losses": {"sigmoid": {}}},
    }
    return spec | sections


def example(**sections: Any) -> SweepSpec:
    return SweepSpec.from_dict(plain_spec(**sections))
