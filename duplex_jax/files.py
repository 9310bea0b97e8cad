"""Atomic files and folders, written aside and then renamed; locks, checks of target paths, and compressed input."""

import contextlib
import ctypes
import errno
import fcntl
import gzip
import io
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from duplex_jax.errors import UserError


def local_path(text: str) -> str:
    """Expands `~` in a path given by the user, and rejects URLs before any work is done.

    Raises:
        UserError: the path is a URL, or names the home of an unknown user.
    """
    if scheme := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", text):
        if scheme[1].lower() == "file":
            raise UserError(f"{text}: is a URL; give the path alone, without file://")
        raise UserError(
            f"{text}: {scheme[1]}: URLs cannot be read or written; give a local path: copy the files, or "
            "mount the bucket (gcsfuse, mountpoint-s3) and give its folder"
        )
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UserError(f"{text}: no such user; give the whole path, or ./{text} for a file of that name")
    return path


def check_writable(path: str | Path) -> Path:
    """Creates the parent folder of `path` and checks, before any work is done, that it can be written.

    Raises:
        UserError: the folder cannot be made or written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    _check_place(path.parent, path)
    return path


def _check_place(folder: Path, path: str | Path) -> None:
    """Creates `folder`, in which `path` will be written, and tests that it is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"{path}: cannot write there ({e.strerror}); give a writable place") from e


_CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(out: str | Path, beside: bool = False) -> Iterator[None]:
    """Prevents concurrent runs from writing to the folder `out`, by a file `.lock` in it that the process locks.

    The file is removed at the end. On a file system without locks nothing is prevented.

    Args:
        out: the output.
        beside: put the lock file next to `out`, if that is a file, or a folder that appears only once complete.

    Raises:
        UserError: another run is writing to `out`, or the place cannot be written.
    """
    path = Path(os.path.abspath(out))
    if beside and not path.name:
        raise UserError(f"{out}: cannot be written; give a name below it")
    lock = path.parent / f".{path.name}.lock" if beside else path / ".lock"
    _check_place(lock.parent, out)
    with open(lock, "a+", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.seek(0)
            who = f" ({holder})" if (holder := f.read(200).strip()) else ""
            raise UserError(f"{out}: another run is writing there{who}; wait for it, or give another place") from e
        except OSError as e:
            if e.errno not in _CANNOT_LOCK:
                raise UserError(f"{lock}: cannot lock it ({e.strerror}); give another place") from e
        if not os.fstat(f.fileno()).st_nlink:  # its holder removed it after we opened it
            raise UserError(f"{out}: another run has just finished there; start again")
        f.truncate(0)
        f.write(f"process {os.getpid()} on {socket.gethostname()}")
        f.flush()
        try:
            yield
        finally:
            # Removed while locked, so that a process that has already opened it finds it locked.
            with contextlib.suppress(OSError):
                lock.unlink()


def set_default_mode(path: Path) -> None:
    """Gives a private file or folder the permissions that the user's umask implies."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


_ASIDE = ".partial"


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file or folder; returns False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def temporary(path: Path, folder: bool) -> Iterator[Path]:
    """An empty file or folder next to `path`, locked by this process and removed at the end.

    First removes what killed processes left there, recognised by the missing lock.
    """
    for old in path.parent.glob(f".*{_ASIDE}"):
        with contextlib.suppress(OSError):
            held = os.open(old, os.O_RDONLY)
            try:
                if _lock(held):
                    _remove(old)
            finally:
                os.close(held)
    names: dict[str, Any] = {"dir": path.parent, "prefix": f".{path.name}.", "suffix": _ASIDE}
    while True:
        name = Path(tempfile.mkdtemp(**names) if folder else _closed(*tempfile.mkstemp(**names)))
        with contextlib.suppress(FileNotFoundError):
            held = os.open(name, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(held, wait=True)
            if name.exists():
                break
            os.close(held)  # another process mistook it for a leftover
    try:
        set_default_mode(name)  # created private
        yield name
    finally:
        _remove(name)
        os.close(held)


def _closed(descriptor: int, name: str) -> str:
    os.close(descriptor)
    return name


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields an empty file next to `path` and renames it to `path` if the block succeeds; otherwise leaves nothing.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    path = check_writable(path)
    try:
        with temporary(path, folder=False) as aside:
            yield aside
            _sync(aside)
            os.replace(aside, path)
            _sync(path.parent)
    except OSError as e:
        raise UserError(f"{path}: cannot write ({e.strerror or e}); nothing was left behind") from e


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w", compress: bool = True) -> Iterator[IO[Any]]:
    """Opens a file next to `path` and renames it to `path` if the block succeeds; otherwise leaves nothing.

    Text is UTF-8 with Unix line ends. Names that end in `.gz` or `.zst` are compressed, unless `compress` is False
    because the data already is.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    path = Path(path)
    with atomic_path(path) as aside, open(aside, "wb") as raw:
        stream: Any = raw
        if compress and path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0)
        elif compress and path.suffix == ".zst":
            stream = zstandard.ZstdCompressor(level=6).stream_writer(raw, closefd=False)
        file = stream if "b" in mode else io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
        yield file
        file.flush()
        if file is not raw:
            file.close()
        if not raw.closed:
            raw.flush()
            os.fsync(raw.fileno())


def check_new_file(path: str | Path, overwrite: bool = False) -> Path:
    """`check_writable`; also rejects an existing file unless it may be overwritten.

    Raises:
        UserError: as for `check_writable`, or the file exists.
    """
    if Path(path).exists() and not overwrite and not Path(path).is_dir():
        raise UserError(f"{path}: already exists; give another name, or --overwrite")
    return check_writable(path)


def check_folder(path: str | Path, overwrite: bool = False) -> Path:
    """Creates the parent of the folder `path` and checks, before any work is done, that `atomic_folder` will succeed.

    Restores a folder that a killed run had moved away to replace it.

    Raises:
        UserError: `path` exists (unless it is an empty folder, or a folder and `overwrite` is set), or the place cannot
            be written.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UserError(f"{path}: already exists and is not a folder; give a new folder's name")
    _check_place(path.parent, path)
    try:
        _put_back(path)
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise UserError(f"{path}: already exists and is not empty; give a new folder, or --overwrite")
    except OSError as e:
        raise UserError(f"{path}: cannot write there ({e.strerror}); give a writable place") from e
    return path


def check_space(path: str | Path, size: int) -> None:
    """Checks that the disk has room for `size` bytes at `path`, a new file or a folder.

    Raises:
        UserError: there is too little free space.
    """
    path = Path(path)
    free = shutil.disk_usage(path if path.is_dir() else path.absolute().parent).free
    if free < size:
        raise UserError(
            f"{path}: needs {size / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; free some space or "
            "give another place"
        )


@contextlib.contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a new folder next to `path` and renames it to `path` if the block succeeds; otherwise leaves nothing.

    Raises:
        UserError: as for `check_folder`, or the disk is full.
    """
    path = check_folder(path, overwrite)
    try:
        with temporary(path, folder=True) as aside:
            yield aside
            for part in aside.rglob("*"):
                _sync(part)
            _sync(aside)
            if path.is_dir():
                _exchange(aside, path)  # the old folder is now the temporary one, and is removed
            else:
                os.replace(aside, path)
            _sync(path.parent)
    except OSError as e:
        raise UserError(f"{path}: cannot write ({e.strerror or e}); nothing was left behind") from e


def _exchange(new: Path, path: Path) -> None:
    """Exchanges a folder with the one at `path`, atomically if the system supports it.

    Otherwise the old one has another name for a moment; if the process is killed then, `_put_back` finds it.
    """
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is not None and swap(here, os.fsencode(new), here, os.fsencode(path), exchange) == 0:
        return
    old = _replaced(path)
    with _held(path):
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(old, path)
            raise
        _remove(old)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether this process could take the folder's lock; True on a file system without locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        mine = True
        with contextlib.suppress(OSError):
            mine = _lock(descriptor)
        yield mine
    finally:
        os.close(descriptor)


def _put_back(path: Path) -> None:
    """Completes an exchange that a killed run had begun in `_exchange`."""
    old = _replaced(path)
    if old.is_dir():
        with _held(old) as mine:
            if mine and path.exists():
                _remove(old)
            elif mine:
                os.replace(old, path)


# A compressed block of four bytes can expand to 128 KiB, so this many bytes expand to at most 16 MiB.
_ZSTD_CHUNK = 512
_LARGEST_WINDOW = 128 << 20


class _ZstdFrames(io.RawIOBase):
    """Decompresses all frames of a file; the library's own reader takes a truncated file for a complete one."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._zstd = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            unused = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            chunk = unused or self._raw.read(_ZSTD_CHUNK)
            if self._frame is None or self._frame.eof:
                if not chunk:
                    return 0
                self._frame = self._zstd.decompressobj()
            elif not chunk:
                raise EOFError("it is cut off")
            self._ready = memoryview(self._frame.decompress(chunk))
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


@contextlib.contextmanager
def open_lines(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file of lines as bytes, decompressing `.gz` and `.zst` by file name.

    Raises:
        UserError: the file does not exist or is not readable.
    """
    path = Path(path)
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed below; only the opening is guarded
    except OSError as e:
        raise UserError(f"{path}: cannot read ({e.strerror}); give an existing file") from e
    with raw:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdFrames(raw))
        else:
            yield raw
