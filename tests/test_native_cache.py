"""Compiled code comes out of the cache only if nobody else can have put it there, and whole."""

import os
import stat
from pathlib import Path

import pytest

from duplex_jax import native
from duplex_jax.native import _is_whole, private_folder


def test_a_folder_that_others_can_write_to_is_closed_and_cleared(tmp_path: Path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "mine.so").write_bytes(b"x")
    (folder / "theirs.so").write_bytes(b"x")
    if os.getuid() == 0:
        os.chown(folder / "theirs.so", 12345, 12345)
    assert private_folder(folder) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "mine.so").exists()
    assert (folder / "theirs.so").exists() == (os.getuid() != 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's folder")
def test_another_user_s_folder_is_not_used(tmp_path: Path):
    os.chown(tmp_path, 12345, 12345)
    assert private_folder(tmp_path) is None
    os.chown(tmp_path, 0, 0)


def test_a_place_where_no_folder_can_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert private_folder(tmp_path / "file" / "cache") is None


def test_only_the_bytes_that_were_compiled_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(library: Path) -> None:
        (tmp_path / "lib.cc").write_text('extern "C" int answer() { return 42; }')
        monkeypatch.setattr(native, "_SOURCES", [tmp_path / "lib.cc"])
        native._compile("g++", library)

    library = tmp_path / "native-1.so"
    assert not _is_whole(library)
    make(library)
    good = library.read_bytes()
    assert _is_whole(library)
    for bad in (b"", good[: len(good) // 2], good[:-1] + b"?"):
        library.write_bytes(bad)
        assert not _is_whole(library)
        make(library)
        assert _is_whole(library)
    library.chmod(0o666)
    assert not _is_whole(library)
    library.chmod(0o600)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert not _is_whole(library)
