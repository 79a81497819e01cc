import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def docs_hooks():
    """scripts/docs_hooks.py, which mkdocs loads by its path."""
    path = Path(__file__).parents[1] / "scripts" / "docs_hooks.py"
    spec = importlib.util.spec_from_file_location("docs_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
