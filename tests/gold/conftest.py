"""One base model for all gold tests: built once per session, or kept in PREFOPT_TEST_CACHE between sessions."""

import os
from pathlib import Path

import pytest

from prefopt_ray.gold.base import ensure_gold_base


@pytest.fixture(scope="session")
def gold_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("PREFOPT_TEST_CACHE")
    return ensure_gold_base(Path(kept) if kept else tmp_path_factory.mktemp("gold-cache"))
