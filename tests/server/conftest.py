import pytest


@pytest.fixture
def directory(tmp_path):
    """Give a directory that is not there yet."""
    return tmp_path / "state"
