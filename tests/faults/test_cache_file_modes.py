"""Files that the library writes have the mode of the umask, and one that may not be read is not called damaged."""

import errno
import os
import stat
import threading

import numpy as np
import pytest
import torch

import implicit_steer as ist
from implicit_steer import _files
from implicit_steer.potentials import Potential
from implicit_steer.training import chunks, runs

ROWS = np.arange(3)


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder."""
    monkeypatch.setenv("IMPLICIT_STEER_CACHE", str(tmp_path))
    yield tmp_path
    _files.forget_tuning_cache()


WRITERS = {
    "chunk.npz": lambda path: chunks.save_chunk(path, {"row": ROWS}),
    "measured.json": lambda path: _files.add_to_tuning_cache("measured", {"a": 1}),
    "result.json": lambda path: runs.write_json(path, {"a": 1}),
    "net.safetensors": lambda path: ist.save(torch.nn.ReLU(), path),
    "potential.pt": lambda path: Potential([1], 2.0, channels=1, blocks=1).save(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_modes_follow_the_umask(name, umask, cache):
    for _ in range(2):  # anew, and in place of the one before
        WRITERS[name](cache / name)
        assert stat.S_IMODE((cache / name).stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in cache.iterdir()] == [name]


@pytest.mark.parametrize("name", ["chunk.npz", "measured.json", "result.json", "net.safetensors"])
def test_writers_at_once_do_not_meet(name, cache):
    """Threads of one process had one name for what they were writing."""
    errors = []

    def write():
        try:
            for _ in range(20):
                WRITERS[name](cache / name)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [path.name for path in cache.iterdir()] == [name]


@pytest.fixture
def forbidden(monkeypatch):
    """Opening a file fails as for another user; root may read everything."""

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def forbid():
        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr("io.open", refuse)
        monkeypatch.setattr(np, "load", refuse)
        monkeypatch.setattr(torch, "load", refuse)

    return forbid


def test_a_chunk_that_may_not_be_read(cache, forbidden):
    path = cache / "chunk.npz"
    chunks.save_chunk(path, {"row": ROWS})
    forbidden()
    with pytest.raises(PermissionError) as error:
        chunks.load_chunk(path, ROWS, "molecules")
    text = str(error.value)
    assert text.startswith(f"{path}: expected the processed molecules 0, ... (3), got no permission to read the file")
    assert "chmod a+r" in text
    assert "IMPLICIT_STEER_CACHE" in text
    assert "amaged" not in text
    assert "Delete" not in text


def test_what_was_measured_and_may_not_be_read(cache, forbidden):
    _files.add_to_tuning_cache("measured", {"a": 1})
    _files.forget_tuning_cache()
    forbidden()
    with pytest.warns(UserWarning, match=r"measured\.json: no permission .*IMPLICIT_STEER_CACHE") as caught:
        assert _files.tuning_cache("measured") == {}
    assert "delete" not in str(caught[0].message)


def test_a_checkpoint_that_may_not_be_read(cache, forbidden):
    options = runs.RunOptions(out=str(cache), resume=True)
    torch.save({"options": {}}, cache / "last.ckpt")
    forbidden()
    with pytest.raises(PermissionError, match=r"expected a checkpoint that may be read, got Permission .*chmod a\+r"):
        runs.check_folder(cache, options)


def test_a_checkpoint_that_is_none(cache):
    (cache / "last.ckpt").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"(?s)last\.ckpt: expected a checkpoint of a training run, .* is damaged"):
        runs.check_folder(cache, runs.RunOptions(out=str(cache), resume=True))


def test_a_chunk_that_is_damaged_is_called_so(cache):
    (cache / "chunk.npz").write_bytes(b"PK but no more")
    with pytest.raises(ValueError, match=r"got a damaged file .*Delete the file: it is made anew"):
        chunks.load_chunk(cache / "chunk.npz", ROWS, "molecules")
