import errno
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replication.engine import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    files.write(path, "old")

    def fail(file):
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match=r"summary.json cannot be written \(no space left\); what was there is untouched"):
        files.write(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_can_be_kept(tmp_path):
    path, before = tmp_path / "new", tmp_path / "old"
    for content in (b"1", b"2", b"3"):
        files.write(path, content, before)
    assert (path.read_bytes(), before.read_bytes()) == (b"3", b"2")


FULL = """
import resource, signal, sys
from pathlib import Path
from replication.engine import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
files.write(Path(sys.argv[1]), bytes(5000))
"""


def test_a_write_that_the_system_refuses_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True, check=False)
    assert f"{path} cannot be written (File too large); what was there is untouched. Free some space" in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_parts_of_killed_writes_are_removed_by_age(tmp_path):
    old, new, other = (tmp_path / name for name in ("a.1.part", "a.2.part", "b.1.part"))
    for path in (old, new, other):
        path.touch()
    os.utime(old, (time.time() - 100,) * 2)
    files.remove_parts(tmp_path, "a", age=50)
    assert sorted(tmp_path.iterdir()) == [new, other]
    files.remove_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path, content = tmp_path / "sealed", b"some bytes"
    files.write_sealed(path, content)
    stored = path.read_bytes()
    assert files.read_sealed(path) == content
    damaged = [stored[:length] for length in range(len(stored))]
    for bit in range(8 * len(stored)):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for each in damaged:
        path.write_bytes(each)
        with pytest.raises(files.DamagedError, match="sealed is damaged: its checksum is wrong"):
            files.read_sealed(path)


HOLDER = """
import sys, time
from pathlib import Path
from replication.engine import files
with files.locked(Path(sys.argv[1]), "the run is being trained"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_waited_for_and_frees_itself_when_its_holder_dies(tmp_path, capsys):
    lock = tmp_path / "locks" / "run.lock"
    with files.locked(lock, "nobody waits"):
        assert files.acquire(lock) is None
    assert capsys.readouterr().out == ""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    started = time.monotonic()
    with files.locked(lock, "the run is being trained"):
        assert time.monotonic() - started > 0.3
    killer.wait()
    holder.wait()
    holder.stdout.close()
    assert f"the run is being trained by process {holder.pid} on " in capsys.readouterr().out


NO_FLOCK = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


def without_flock(folder, error=errno.ENOSYS):
    """The environment of a process whose file systems have no ``flock``: it fails with that error."""
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler, or no LD_PRELOAD")
    library = folder / "flock.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-"]
    subprocess.run(command, input=NO_FLOCK, text=True, check=True)
    return os.environ | {"LD_PRELOAD": str(library), "FLOCK_ERRNO": str(error)}


def held_by(lock, environment):
    """A process that holds a lock."""
    command = [sys.executable, "-W", "error", "-c", HOLDER, lock]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout.readline() == "held\n"
    return holder


def killed(process):
    with process:
        process.kill()


@pytest.mark.parametrize(
    "error",
    [errno.ENOSYS, *(pytest.param(each, marks=pytest.mark.long) for each in (errno.ENOLCK, errno.EOPNOTSUPP))],
    ids=errno.errorcode.get,
)
def test_a_file_system_without_locks_has_the_same_ones(tmp_path, error):
    lock, environment = tmp_path / "run.lock", without_flock(tmp_path, error)
    first = held_by(lock, environment)
    command = [sys.executable, "-W", "error", "-u", "-c", HOLDER, lock]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    line = f"the run is being trained by process {first.pid} on {socket.gethostname()}: waiting for it. "
    assert second.stdout.readline() == f"{line}If it is gone, remove {lock}.held.\n"
    killed(first)  # killed, and what it left is no hindrance
    assert second.stdout.readline() == "held\n"
    killed(second)


def test_a_lock_of_another_machine_is_held_until_its_file_is_removed(tmp_path):
    """Nobody here can know whether that process lives."""
    lock, marker = tmp_path / "run.lock", tmp_path / "run.lock.held"
    marker.write_text("1\nanother-machine\n")
    command = [sys.executable, "-u", "-c", HOLDER, lock]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=without_flock(tmp_path))
    assert f"If it is gone, remove {marker}." in waiting.stdout.readline()
    marker.unlink()
    assert waiting.stdout.readline() == "held\n"
    killed(waiting)


def test_only_a_full_disk_is_told_to_free_space(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"a.lock cannot be written \(.*\); .* Choose a folder that can be written to"
    ) as error:
        files.acquire(tmp_path / "file" / "a.lock")
    assert "Free some space" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, TypeError),
        (3, TypeError),
        (b"results", TypeError),
        ("", ValueError),
        ("  ", ValueError),
        ("a\0b", ValueError),
        ("a\nb", ValueError),
        ("\ud800", ValueError),
        ("x" * 300, ValueError),
        ("a/" * 3000, ValueError),
        (__file__, ValueError),
        (f"{__file__}/results", ValueError),
    ],
)
def test_what_cannot_be_a_folder_is_refused(value, error):
    with pytest.raises(error, match=r"^results "):
        files.folder("results", value)


def test_folders_may_be_anywhere_and_need_not_be_there(tmp_path):
    for value in ("results", "../results", tmp_path / "not yet", "Résultats 結果"):
        assert files.folder("results", value).name == os.path.basename(value)


@pytest.fixture
def homes(tmp_path, monkeypatch):
    """A home and variables of the environment, one of them empty and one with a "~"."""
    for name, value in {"HOME": tmp_path, "PLACE": tmp_path / "a b", "AT_HOME": "~", "EMPTY": ""}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("~", ""),
        ("~/x", "x"),
        (Path("~/x"), "x"),
        ("$HOME", ""),
        ("$HOME/x", "x"),
        (Path("$HOME", "x"), "x"),
        ("${PLACE}/x", "a b/x"),
        ("${PLACE}/../x", "a b/../x"),
        ("${PLACE}_2", "a b_2"),
        ("$AT_HOME/x", "x"),
    ],
)
def test_home_and_variables_are_replaced(value, expected, homes):
    assert files.folder("results", value) == homes / expected


@pytest.mark.parametrize("name", ["./~", "x~", "a/~/b"])
def test_a_tilde_elsewhere_is_part_of_a_name(name):
    assert files.folder("results", name) == files.root() / name


def test_an_absolute_path_may_hold_a_dollar_sign(homes):
    assert files.folder("results", homes / "a$NOWHERE") == homes / "a$NOWHERE"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("$NOWHERE/x", "the environment has no variable NOWHERE"),
        ("x/${NOWHERE}", "the environment has no variable NOWHERE"),
        (Path("$NOWHERE"), "the environment has no variable NOWHERE"),
        ("$EMPTY/x", "the environment has no variable EMPTY"),
        ("$HOMES", "the environment has no variable HOMES"),
        ("${HOME", "the environment has no name after \\$"),
        ("x$", "the environment has no name after \\$"),
        ("$1/x", "the environment has no name after \\$"),
        ("~nobody-of-this-name/x", "there is no such user"),
        ("~~", "there is no such user"),
    ],
)
def test_variables_and_users_that_there_are_not_are_refused(value, message, homes):
    with pytest.raises(ValueError, match=rf"^results .*: {message}"):
        files.folder("results", value)
    assert list(homes.iterdir()) == []


@pytest.fixture
def checkout(tmp_path):
    """A repository, as far as it is needed to be recognized."""
    folder = tmp_path / "above" / "réseau 1"
    (folder / "results" / "mine").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "replication").mkdir()
    (folder / "replication" / "models.py").touch()
    return folder


def installed(site, url=None):
    """``engine.files`` as it is imported where pip copied the package to; ``url``: what pip was given."""
    path = site / "replication" / "engine" / "files.py"
    path.parent.mkdir(parents=True)
    shutil.copy(files.__file__, path)
    if url is not None:
        (site / "replication-0.1.0.dist-info").mkdir()
        (site / "replication-0.1.0.dist-info" / "direct_url.json").write_text(json.dumps({"url": url}))
    spec = importlib.util.spec_from_file_location("installed_files", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", [".", "notebooks", "results", "results/mine"])
def test_an_installed_package_finds_the_repository_above(place, checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout / place)
    module = installed(tmp_path / "site")
    assert module.SOURCE == module.root() == checkout
    monkeypatch.chdir(tmp_path)  # once found, it stays
    assert module.folder("results", "results") == checkout / "results"


def test_an_installed_package_finds_the_repository_that_it_was_installed_from(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout.parent)
    assert installed(tmp_path / "site", checkout.as_uri()).root() == checkout


@pytest.mark.parametrize("url", [None, "file:///nowhere/replication-0.1.0.whl", "https://example.org/replication.git"])
def test_without_a_repository_the_current_folder_is_the_root(url, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()  # of somebody else
    (tmp_path / "course").mkdir()
    monkeypatch.chdir(tmp_path / "course")
    module = installed(tmp_path / "site", url)
    assert (module.SOURCE, module.root()) == (tmp_path / "site", tmp_path / "course")
    monkeypatch.chdir(tmp_path)
    assert module.folder("results", "results") == tmp_path / "results"
