"""The one writer: the old file or the new one, never through a link, never two runs at once."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core.files import atomic
from comfyui_l2p.l2p_core.files.atomic import (
    AlreadyRunning,
    WriteError,
    append,
    atomic_write,
    locked,
)
from comfyui_l2p.l2p_core.files.save import save_tensors
from safetensors import safe_open
from safetensors.torch import load_file

posix = pytest.mark.skipif(
    os.name != "posix", reason="links, FIFOs and permissions as POSIX has them"
)


def names(folder):
    return sorted(os.listdir(folder))


def start(program, *arguments):
    """A Python program in a process of its own, once it has said that it is under way."""
    beginning = (
        "import sys, time\nfrom comfyui_l2p.l2p_core.files.atomic import atomic_write, locked\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", beginning + program, *map(str, arguments)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"under way\n"
    return process


WRITING = """
with atomic_write(sys.argv[1]) as stream:
    stream.write(b"half")
    print("under way", flush=True)
    time.sleep(600)
"""

HOLDING = """
with locked(sys.argv[1], "busy", folder=len(sys.argv) > 2):
    print("under way", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def running():
    """running(program, *arguments) → the process, which is killed when the test ends."""
    processes = []

    def starter(*arguments):
        processes.append(start(*arguments))
        return processes[-1]

    yield starter
    for process in processes:
        process.kill()
        process.wait()


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with atomic_write(path) as stream:
        stream.write(b"new")
        stream.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as stream:
        stream.write(b"new")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["out"]


@posix
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "out") as stream:
            stream.write(b"new")
        with append(tmp_path / "log") as stream:
            stream.write(b"new")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "log")] == [mode] * 2


@posix
@pytest.mark.parametrize(
    "name", ["out", ".out.part", ".out.l2p-part", ".other.l2p-part", ".run.l2p-part", ".x.l2p-lock"]
)
def test_a_link_is_never_written_through(tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_bytes(b"the only copy")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).symlink_to(secret)
    with atomic_write(folder / "out") as stream:
        stream.write(b"new")
    assert secret.read_bytes() == b"the only copy"
    assert (folder / "out").read_bytes() == b"new" and not (folder / "out").is_symlink()


@posix
@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "FIFO", "folder"])
def test_what_is_no_regular_file_is_rejected_as_lock_and_for_appending(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_bytes(b"the only copy")
    for place in (tmp_path / ".run.l2p-lock", tmp_path / "log.csv"):
        match kind:
            case "link to a file":
                place.symlink_to(secret)
            case "link to nothing":
                place.symlink_to(tmp_path / "nothing")
            case "FIFO":
                os.mkfifo(place)
            case "folder":
                place.mkdir()
    with (
        pytest.raises(WriteError, match="can't be used as a lock file.*Remove it"),
        locked(tmp_path, "busy", folder=True),
    ):
        pass
    with (
        pytest.raises(WriteError, match="log.csv can't be written"),
        append(tmp_path / "log.csv") as stream,
    ):
        stream.write(b"more")
    assert secret.read_bytes() == b"the only copy" and not (tmp_path / "nothing").exists()


@posix
@pytest.mark.parametrize("suffix", [".l2p-part", ".l2p-lock"])
def test_fifos_and_folders_with_a_temporary_files_name_are_left_alone(tmp_path, suffix):
    os.mkfifo(tmp_path / f".a{suffix}")
    (tmp_path / f".b{suffix}").mkdir()
    with atomic_write(tmp_path / "out") as stream:
        stream.write(b"new")
    assert names(tmp_path) == [f".a{suffix}", f".b{suffix}", "out"]


@posix
def test_a_leftover_that_cannot_be_removed_blocks_nothing(tmp_path, monkeypatch):
    (tmp_path / ".theirs.l2p-part").write_bytes(b"half")
    unlink = Path.unlink

    def not_ours(path, missing_ok=False):
        if path.name == ".theirs.l2p-part":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", not_ours)
    with atomic_write(tmp_path / "out") as stream:
        stream.write(b"new")
    assert names(tmp_path) == [".theirs.l2p-part", "out"]


def test_what_killed_runs_left_is_removed_by_the_next_write_and_what_live_runs_hold_stays(
    tmp_path, running
):
    killed = running(WRITING, tmp_path / "killed"), running(HOLDING, tmp_path / "killed")
    for process in killed:
        process.kill()
        process.wait()
    assert len(names(tmp_path)) == 2
    running(WRITING, tmp_path / "live")
    running(HOLDING, tmp_path / "live")
    left = [name for name in names(tmp_path) if "killed" in name]
    assert left == [], "the live run removed them"
    with atomic_write(tmp_path / "out") as stream:
        stream.write(b"new")
    assert sum("live" in name for name in names(tmp_path)) == 2 and "out" in names(tmp_path)


def test_two_processes_may_write_one_path_and_both_succeed(tmp_path):
    first, second = atomic_write(tmp_path / "out"), atomic_write(tmp_path / "out")
    one, other = first.__enter__(), second.__enter__()
    one.write(b"one")
    other.write(b"other")
    assert not second.__exit__(None, None, None) and not first.__exit__(None, None, None)
    assert (tmp_path / "out").read_bytes() == b"one" and names(tmp_path) == ["out"]


def test_a_killed_write_leaves_the_old_file(tmp_path, running):
    (tmp_path / "out").write_bytes(b"old")
    process = running(WRITING, tmp_path / "out")
    process.kill()
    process.wait()
    assert (tmp_path / "out").read_bytes() == b"old"


@pytest.mark.parametrize(
    "number, said",
    [
        (errno.ENOSPC, "is full, so out was not written.*Free some space"),
        (errno.EDQUOT, "is full"),
        (errno.EFBIG, r"can't be written \(File too large\)"),
        (errno.EIO, r"can't be written \(Input/output error\)"),
    ],
)
def test_a_failing_disk_is_a_sentence_also_where_a_library_hides_it(
    tmp_path, monkeypatch, number, said
):
    def fails(self, content):
        self.failed = OSError(number, os.strerror(number))
        raise self.failed

    monkeypatch.setattr(atomic._Output, "write", fails)
    with pytest.raises(WriteError, match=said) as found, atomic_write(tmp_path / "out") as stream:
        torch.save({"a": torch.zeros(100_000)}, stream)
    assert found.value.errno == number and names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_device_is_noticed_when_the_last_bytes_are_flushed(tmp_path, monkeypatch):
    create = atomic._create_temporary

    def on_full(path):
        raw, temporary = create(path)
        os.dup2(os.open("/dev/full", os.O_WRONLY), raw.fileno())
        return raw, temporary

    monkeypatch.setattr(atomic, "_create_temporary", on_full)
    with (
        pytest.raises(WriteError, match="is full, so out was not written"),
        atomic_write(tmp_path / "out") as stream,
    ):
        stream.write(b"few")
    assert names(tmp_path) == []


def test_no_place_to_write_is_named(tmp_path):
    with (
        pytest.raises(WriteError, match="nowhere does not exist.*mkdir -p"),
        atomic_write(tmp_path / "nowhere" / "out"),
    ):
        pass
    (tmp_path / "taken").mkdir()
    with (
        pytest.raises(WriteError, match="there is a folder of that name"),
        atomic_write(tmp_path / "taken"),
    ):
        pass
    with (
        pytest.raises(WriteError, match=r"out takes 1000000000.00 GB, but .* has .* GB free"),
        atomic_write(tmp_path / "out", 10**18),
    ):
        pass
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(WriteError, match="file.* can't be written"),
        locked(tmp_path / "file", "busy", folder=True),
    ):
        pass
    assert names(tmp_path) == ["file", "taken"]


def test_very_long_names_leave_room_for_a_suffix(tmp_path):
    path = tmp_path / ("ü" * 125 + ".png")  # 254 bytes of the 255 that file systems take
    with locked(path, "busy"), atomic_write(path) as stream:
        stream.write(b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == [path.name]


@pytest.mark.parametrize("folder", [True, False])
def test_the_second_run_is_rejected_while_the_first_lives(tmp_path, running, folder):
    arguments = ["folder"] if folder else []
    process = running(HOLDING, tmp_path / "out", *arguments)
    with (
        pytest.raises(AlreadyRunning, match="^another run"),
        locked(tmp_path / "out", "another run", folder=folder),
    ):
        pass
    with locked(tmp_path / "other", "another run", folder=folder):
        pass
    process.kill()
    process.wait()
    with locked(tmp_path / "out", "another run", folder=folder):
        pass
    assert names(tmp_path) == (["out"] if folder else [])  # the killed run had made it


def test_a_run_that_waits_goes_on_when_the_first_ends(tmp_path):
    order, inside = [], threading.Event()

    def first():
        with locked(tmp_path / "out", "busy", folder=True):
            inside.set()
            time.sleep(0.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with pytest.warns(UserWarning, match="another run writes there; waiting up to 60 s"):
        with locked(tmp_path / "out", "another run writes there. Wait", 60, folder=True):
            order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_only_one_of_many_holds_a_lock_at_a_time(tmp_path):
    """Locks are removed when they are released, which must not let two in at once."""
    inside, seen = [], []

    def contend():
        for _ in range(30):
            with locked(tmp_path / "a" / "b", "busy", 60, folder=True):
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=contend) for _ in range(4)]
    poll = atomic.POLL
    atomic.POLL = 0.001
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        atomic.POLL = poll
    assert seen == [1] * 120


def test_folders_that_a_lock_made_stay_if_something_was_written(tmp_path):
    with locked(tmp_path / "a" / "b", "busy", folder=True):
        pass
    assert names(tmp_path) == []
    with locked(tmp_path / "a" / "b", "busy", folder=True):
        (tmp_path / "a" / "b" / "file").write_bytes(b"")
    assert names(tmp_path / "a" / "b") == ["file"]


@posix
def test_another_users_lock_of_a_killed_run_does_not_block(tmp_path, monkeypatch, running):
    """Its file can be read but not written."""
    opened = os.open

    def not_ours(path, flags, *mode):
        if str(path).endswith(".l2p-lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *mode)

    (tmp_path / ".run.l2p-lock").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", not_ours)
        with locked(tmp_path, "busy", folder=True):
            pass
    running(HOLDING, tmp_path, "folder")
    monkeypatch.setattr(os, "open", not_ours)
    with pytest.raises(AlreadyRunning), locked(tmp_path, "busy", folder=True):
        pass


@posix
def test_a_file_system_without_locks_still_writes(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    (tmp_path / ".live.l2p-part").write_bytes(b"half")
    with locked(tmp_path, "busy", folder=True), atomic_write(tmp_path / "out") as stream:
        stream.write(b"new")
    assert names(tmp_path) == [
        ".live.l2p-part",
        "out",
    ], "a live run's file can't be told from a leftover there"


@posix
def test_windows_has_neither_fcntl_nor_o_nofollow(tmp_path, monkeypatch):
    """As there: locks by msvcrt, and an open file that can't be removed."""

    class Msvcrt:
        LK_NBLCK = 0
        held: dict[int, int] = {}  # inode by descriptor

        def locking(self, descriptor, mode, count):
            number = os.fstat(descriptor).st_ino
            if number in self.held.values():
                raise PermissionError(errno.EACCES, "Permission denied")
            self.held[descriptor] = number

    unlink, close, replace, locks = Path.unlink, os.close, os.replace, Msvcrt()

    def opened():
        return {
            os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
        }

    def of_windows(path, missing_ok=False):
        if not path.is_symlink() and str(path.resolve()) in opened():
            raise PermissionError(13, "in use")
        unlink(path, missing_ok)

    def replace_of_windows(source, target):
        assert str(Path(source).resolve()) not in opened()
        replace(source, target)

    def close_of_windows(descriptor):
        locks.held.pop(descriptor, None)
        close(descriptor)

    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(atomic, "msvcrt", locks, raising=False)
    monkeypatch.setattr(atomic, "SAFE", 0)
    monkeypatch.delattr(os, "O_NOFOLLOW")
    monkeypatch.setattr(Path, "unlink", of_windows)
    monkeypatch.setattr(os, "close", close_of_windows)
    monkeypatch.setattr(os, "replace", replace_of_windows)
    (tmp_path / ".killed.l2p-part").write_bytes(b"half")
    with (tmp_path / ".live.l2p-part").open("wb"), locked(tmp_path / "out", "busy"):
        with atomic_write(tmp_path / "out") as stream:
            stream.write(b"new")
        with pytest.raises(AlreadyRunning), locked(tmp_path / "out", "busy"):
            pass
    assert names(tmp_path) == [".live.l2p-part", "out"]
    (tmp_path / ".run.l2p-lock").symlink_to(tmp_path / "out")
    with pytest.raises(WriteError, match="it is a link"), locked(tmp_path, "busy", folder=True):
        pass
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "out") as stream:
        raise RuntimeError
    assert (tmp_path / "out").read_bytes() == b"new"


def test_tensors_are_read_back_by_safetensors(tmp_path):
    tensors = {
        "b": torch.arange(15.0).reshape(5, 3)[:, 1:],
        "a": torch.tensor([1, 2, 3], dtype=torch.int8),
        "ü": torch.tensor(2.5).double(),
        "e": torch.empty(0, 4),
        "h": torch.ones(7, dtype=torch.bfloat16),
        "t": torch.tensor([True, False]),
    }
    with atomic_write(tmp_path / "out.safetensors") as stream:
        save_tensors(stream, tensors, {"format": "pt", "l2p.step": "3"})
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "out.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "l2p.step": "3"}


@pytest.mark.slow
def test_killed_at_any_moment_a_file_is_old_or_new(tmp_path):
    """A program that writes one of two contents without pause, killed at twelve moments."""
    seen = set()
    for number in range(12):
        process = start(
            """
print("under way", flush=True)
while True:
    for content in (b"a", b"b"):
        with locked(sys.argv[1], "busy"), atomic_write(sys.argv[1]) as stream:
            for _ in range(50):
                stream.write(content * 1000)
""",
            tmp_path / "out",
        )
        time.sleep(0.003 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            content = (tmp_path / "out").read_bytes()
            assert content in (b"a" * 50_000, b"b" * 50_000)
            seen.add(content)
    assert seen, "it was never left to finish one"
    with atomic_write(tmp_path / "other") as stream:
        stream.write(b"new")
    assert names(tmp_path) == ["other", "out"]
