import helpers
import pytest


@pytest.fixture(scope="session", autouse=True)
def server():
    """Its imports take seconds: so they begin with the first test of this folder, beside it."""
    helpers.serve()
