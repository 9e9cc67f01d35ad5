import pytest
from retrieval_data import small_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return small_encoder(tmp_path_factory.mktemp("encoder"))
