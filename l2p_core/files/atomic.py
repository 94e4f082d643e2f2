"""Write files atomically, and lock what one run at a time may write.

`atomic_write` writes a temporary file beside the target and renames it when it is complete and on
the disk. A run that is killed at any moment leaves the old file. `locked` keeps a second run out.

Both create hidden files, `.NAME.RANDOM.l2p-part` and `.NAME.l2p-lock`. The folder may be shared
with other users, or come from a stranger's archive. So names of temporary files can't be
predicted, they are created anew (O_EXCL), and links, FIFOs and other special files are never
opened. Windows has no O_NOFOLLOW: there a file counts as regular only if its entry in the folder
and the opened file are the same. A run that is killed leaves its temporary file; the next write
in that folder removes it. A live run holds an operating-system lock on its temporary file, which
tells the two apart.
"""

import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

try:
    import fcntl
except ImportError:  # Windows, where an open file can't be removed or renamed
    fcntl = None  # type: ignore[assignment]  # the name of a module has no optional type
    import msvcrt

TEMPORARY, LOCK = ".l2p-part", ".l2p-lock"
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems without locks
# Seconds that a second run waits for the first, which may be shutting down or about to finish.
WAIT = 60.0
POLL = 0.2  # seconds between two tries to take a lock
MOMENT = 0.1  # seconds for which another run's `remove_leftovers` may hold a lock
SAFE = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class WriteError(OSError):
    """A file that can't be written: what was found, and what to do about it."""

    def __init__(self, number: int | None, message: str):
        super().__init__(number or errno.EIO, message)

    def __str__(self) -> str:
        return str(self.strerror)


class AlreadyRunning(WriteError):
    """Another run holds the lock."""

    def __init__(self, message: str):
        super().__init__(errno.EAGAIN, message)


@contextmanager
def atomic_write(path: str | Path, size: int = 0, clean: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends.

    If the block raises, the file is removed and `path` stays as it was. The file gets the
    permissions that a new file gets (umask). A link at `path` is replaced, not followed. Several
    processes may write the same path: the last one to finish wins. size: bytes it will take, if
    known; checked against the free space first. clean: remove what killed runs left in the folder
    first. Raises WriteError if the folder can't be written to or the disk is full."""
    path = Path(path)
    folder = path.parent
    try:
        if clean:
            remove_leftovers(folder)
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(errno.EISDIR, "there is a folder of that name")
        raw, temporary = _create_temporary(path)
    except OSError as error:
        raise _explained(error, path, size) from None
    stream = io.BufferedWriter(raw, 1 << 16)
    try:
        if size and (free := shutil.disk_usage(folder).free) < size:
            raise WriteError(
                errno.ENOSPC,
                f"{path.name} takes {readable_bytes(size)}, but {folder} has "
                f"{readable_bytes(free)} free. Free {readable_bytes(size - free)} there, or write "
                "to another folder",
            )
        yield stream
        stream.flush()
        os.fsync(raw.fileno())
        if not fcntl:
            stream.close()
        os.replace(temporary, path)
        stream.close()
        _sync_folder(folder)
    except BaseException as error:
        _abandon(stream, temporary)
        failed = _write_error(error, raw, temporary)
        if failed is None:
            raise
        raise _explained(failed, path, size) from None


@contextmanager
def append(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file to append to it; create it if it does not exist. Raises WriteError."""
    path = Path(path)
    try:
        raw = _Output(_open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
    except OSError as error:
        raise _explained(error, path) from None
    stream = io.BufferedWriter(raw)
    try:
        yield stream
        stream.flush()
    except OSError as error:
        if raw.failed is None:
            raise
        raise _explained(error, path) from None
    finally:
        with suppress(OSError):
            stream.close()


@contextmanager
def locked(path: str | Path, busy: str, wait: float = 0, folder: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder, which one run at a time can hold.

    path: what the run writes. folder: it is a folder. Missing folders are created, and removed at
    the end if nothing was written. busy: the sentence for AlreadyRunning, which is raised if
    another run still holds the lock after `wait` seconds. On a file system without locks nothing
    is locked. Raises WriteError if the lock file can't be created."""
    path = Path(path)
    lock = path / f".run{LOCK}" if folder else path.with_name(f".{_short(path.name)}{LOCK}")
    created = [parent for parent in (lock.parent, *lock.parent.parents) if not parent.exists()]
    try:
        descriptor = _take(lock, busy, wait)
        try:
            remove_leftovers(lock.parent)
            yield
        finally:
            _release(lock, descriptor)
    finally:
        for parent in created:
            with suppress(OSError):
                parent.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and locks of killed runs from a folder. What other runs hold,
    other users own or is no regular file stays."""
    with suppress(OSError):
        names = [
            name
            for name in os.listdir(folder)
            if name.startswith(".") and name.endswith((TEMPORARY, LOCK))
        ]
        for name in names:
            with suppress(OSError):
                _remove_leftover(folder / name)


def process_rank() -> int:
    """Number of this process among those that a launcher started: torchrun, accelerate or MPI. 0
    for a single one."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def readable_bytes(count: int) -> str:
    """A size as text: "2.50 GB", or "1,234 bytes" below 10 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count:,} bytes"


class _Output(io.FileIO):
    """A file that remembers the error of a write: libraries that write to it may hide it behind
    their own."""

    failed: OSError | None = None

    def write(self, content: "ReadableBuffer") -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.failed = self.failed or error
            raise


def _short(name: str) -> str:
    """The name, or a hash of one that leaves no room for a suffix: file systems take 255 bytes."""
    return name if len(os.fsencode(name)) < 200 else hashlib.sha256(os.fsencode(name)).hexdigest()


def _create_temporary(path: Path) -> tuple[_Output, Path]:
    while True:
        temporary = path.with_name(f".{_short(path.name)}.{secrets.token_hex(8)}{TEMPORARY}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | SAFE, 0o666)
        try:
            if _lock(descriptor) is not False and _is_same(temporary, descriptor):
                return _Output(descriptor, "wb"), temporary
        except BaseException:
            os.close(descriptor)
            with suppress(OSError):
                temporary.unlink()
            raise
        os.close(
            descriptor
        )  # another run's remove_leftovers came between creating and locking it, and removes it


def _write_error(error: BaseException, raw: _Output, temporary: Path) -> OSError | None:
    """The error of the disk behind an error in the block; None if the block itself failed."""
    if not isinstance(error, Exception) or isinstance(error, WriteError):
        return None
    if raw.failed:
        return raw.failed
    if isinstance(error, OSError) and error.filename in (None, str(temporary)):
        return error
    return None


def _abandon(stream: BinaryIO, temporary: Path) -> None:
    """Remove the temporary file. Windows must close it first; elsewhere it stays locked until it
    is gone."""
    if fcntl:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError, ValueError):
        stream.close()
    if not fcntl:
        with suppress(OSError):
            temporary.unlink()


def _take(lock: Path, busy: str, wait: float) -> int:
    """Return the file descriptor of the lock file, locked."""
    began, told = time.monotonic(), False
    while True:
        descriptor = _open_lock(lock)
        try:
            free = _lock(descriptor)
            if free is not False and _is_same(lock, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if free is not False:  # it was removed between opening and locking it
            continue
        waited = time.monotonic() - began
        if waited >= max(wait, MOMENT):
            raise AlreadyRunning(busy)
        if waited >= MOMENT and not told:
            note = f"{busy.partition('. ')[0]}; waiting up to {wait:g} s for it to finish"
            warnings.warn(note, stacklevel=4)
            told = True
        time.sleep(POLL if told else MOMENT / 4)


def _open_lock(lock: Path) -> int:
    for _ in range(100):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                return _open_regular(lock, os.O_RDWR | os.O_CREAT)
            except PermissionError:  # another user's; it can still be locked
                return _open_regular(lock, os.O_RDONLY)
        except (FileNotFoundError, FileExistsError) as error:
            failed = error  # the run before removes, or removed, the folder that it had created
        except OSError as error:
            if not os.path.lexists(lock):
                raise _explained(error, lock.parent) from None
            raise WriteError(
                error.errno,
                f"{lock} can't be used as a lock file ({error.strerror}). Remove it if no other "
                "run is writing there, or give another output",
            ) from None
    raise _explained(failed, lock.parent)


def _release(lock: Path, descriptor: int) -> None:
    if fcntl:
        _remove_if_same(lock, descriptor)
    os.close(descriptor)
    if not fcntl:
        with suppress(OSError):
            lock.unlink()


def _lock(descriptor: int) -> bool | None:
    """Lock the open file until it is closed. False if another run has locked it, None on a file
    system without locks."""
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def _remove_leftover(file: Path) -> None:
    if not stat.S_ISREG(file.lstat().st_mode):
        return
    if not fcntl:
        file.unlink()  # refused while another run has it open
        return
    descriptor = _open_regular(file, os.O_RDWR)
    try:
        if _lock(descriptor):
            _remove_if_same(file, descriptor)
    finally:
        os.close(descriptor)


def _open_regular(path: Path, flags: int) -> int:
    """A file descriptor of a regular file. Raises OSError for a link, a FIFO, a device or a
    folder, without waiting."""
    try:
        descriptor = os.open(path, flags | SAFE, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(error.errno, "it is a link") from None
        if error.errno == errno.ENXIO:
            raise OSError(error.errno, "it is no regular file") from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and (
        hasattr(os, "O_NOFOLLOW") or _is_same(path, descriptor)
    ):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is a link, or no regular file")


def _is_same(path: Path, descriptor: int) -> bool:
    """Whether the folder's entry, not followed, is the opened file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_same(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_same(path, descriptor):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut. Windows keeps no handle on folders, some file
    systems can't do it."""
    if os.name == "posix":
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _explained(error: OSError, path: Path, size: int = 0) -> WriteError:
    """The system's error as a sentence."""
    if error.errno in FULL:
        needs = f" {path.name} needs {readable_bytes(size)}." if size else ""
        return WriteError(
            error.errno,
            f"{path.parent} is full, so {path.name} was not written.{needs} Nothing was left "
            "behind. Free some space there, or write to another folder",
        )
    if error.errno == errno.ENOENT:
        return WriteError(
            error.errno,
            f"{path.parent} does not exist, so {path.name} can't be written there. Create it "
            f"first: mkdir -p {path.parent}",
        )
    return WriteError(
        error.errno,
        f"{path} can't be written ({error.strerror or error}). Nothing was left behind. Check "
        "the folder's permissions, or write to another folder",
    )
