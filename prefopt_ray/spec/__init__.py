"""The sweep spec: one YAML file -> checked values, search spaces, trial configs.

Reads top down: `yaml_source` (text -> located values), `layers` (extends, --set, paths), `sections` (keys and
defaults), `space` (domains), `steps` (lengths), `rules` (between keys), `problems` (messages), `model` (SweepSpec),
`load`. Imports neither torch, ray, mlflow, transformers nor datasets.
"""

from prefopt_ray.spec.load import dump_spec, load_spec, parse_spec
from prefopt_ray.spec.model import SweepSpec, confirmed_spec, one_point_spec
from prefopt_ray.spec.sections import Baseline, OtherModel, PartSpec
from prefopt_ray.spec.space import Choices, Domain, Integer, LogUniform, Uniform, grid_points

__all__ = [
    "Baseline",
    "Choices",
    "Domain",
    "Integer",
    "LogUniform",
    "OtherModel",
    "PartSpec",
    "SweepSpec",
    "Uniform",
    "dump_spec",
    "grid_points",
    "load_spec",
    "confirmed_spec",
    "one_point_spec",
    "parse_spec",
]
