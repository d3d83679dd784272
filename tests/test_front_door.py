"""The README tells the truth: its commands, its spec, and what CI runs."""

import re
import tomllib
from pathlib import Path

import pytest

from prefopt_ray.spec import parse_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)


def test_the_two_commands_install_the_tested_set() -> None:
    run, test = COMMANDS
    assert run.endswith("prefopt run sweeps/quickstart.yaml") and test.endswith("pytest")
    assert all("-c docs/tested-versions.txt" in command for command in COMMANDS)


def test_the_readmes_spec_is_valid_and_short() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    spec = parse_spec(text)
    assert len(text.splitlines()) <= 12 and spec.trial_count == 25


def test_every_dependency_is_pinned_inside_its_range_and_has_a_reason() -> None:
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==") for line in (ROOT / "docs/tested-versions.txt").read_text().splitlines() if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["test"], *extras["qlora"]]
    for line in needed:
        requirement = Requirement(line)
        if requirement.name == "prefopt-ray":
            continue
        assert requirement.specifier.contains(pins[requirement.name.lower()]), line
    for line in project["dependencies"]:
        assert re.search(re.escape(f'"{line}",') + r"\s+# \S", text), f"{line} has no reason"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
