import pytest
from meshes import write_archive


@pytest.fixture
def archive(tmp_path):
    """A tiny ModelNet."""
    return write_archive(tmp_path / "ModelNet10.zip")
