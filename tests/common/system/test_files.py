"""Files and folders appear whole or not at all; one process holds a lock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.system.files import built, hold, is_held, write_atomically, write_new
from tests.harness.full_disk import no_space
from tests.harness.processes import ROOT

_KILLED = """
import os, signal, sys
from pathlib import Path
from common.system.files import built, write_atomically
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
path = Path(sys.argv[1])
"""
_BUILT = "with built(path) as new:\n    (new / 'a').write_text('new')\n"


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def killed(code: str, path: Path) -> None:
    """Run code in a process that kills itself in the middle of it."""
    done = subprocess.run([sys.executable, "-c", _KILLED + code, path], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("when", ["os.fsync", "Path.replace"])
def test_crash_in_the_middle_leaves_the_old_file_and_the_next_write_is_whole(tmp_path: Path, when: str) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    killed(f"{when} = die\nwrite_atomically(path, 'new')", file)
    assert file.read_text() == "old"
    write_atomically(file, "newer")
    assert file.read_text() == "newer"


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".run.json.{os.getpid()}").write_text("half of")
    write_atomically(tmp_path / "run.json", "new")
    assert content(tmp_path) == {"run.json": "new"}


@pytest.mark.parametrize("durable", [True, False])
def test_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path, durable: bool) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    with no_space(), pytest.raises(OSError, match=rf"File too large: '{file}'"):
        write_atomically(file, "x" * 5000, durable=durable)
    assert content(tmp_path) == {"run.json": "old"}


def test_text_that_is_no_unicode_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert content(tmp_path) == {"run.json": "old"}


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "none" / "run.json"
    with pytest.raises(FileNotFoundError, match=rf"No such file or directory: '{file}'"):
        write_atomically(file, "new")


def test_secrets_are_their_owners_also_where_they_replace_a_readable_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("old")
    file.chmod(0o644)
    write_atomically(file, b"\x00secret", 0o600)
    assert file.read_bytes() == b"\x00secret"
    assert file.stat().st_mode & 0o777 == 0o600


def test_new_file_replaces_none(tmp_path: Path) -> None:
    file = tmp_path / "key"
    write_new(file, "first", 0o600)
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_new(file, "second")
    with no_space(), pytest.raises(OSError, match=rf"too large: '{tmp_path}/other'"):
        write_new(tmp_path / "other", "x" * 5000)
    assert content(tmp_path) == {"key": "first"}


@pytest.mark.parametrize("there", [{}, {"a": "old", "b": "old"}])
def test_folder_takes_the_place_of_what_is_there(tmp_path: Path, there: dict[str, str]) -> None:
    folder = tmp_path / "parent" / "model"
    for name, text in there.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with built(folder) as new:
        (new / "c").mkdir()
        (new / "c" / "d").write_text("new")
        assert content(folder) == there
    assert content(tmp_path) == {"parent/model/c/d": "new"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_error_and_full_disk_leave_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError), built(folder) as new:
        (new / "b").write_text("new \ud800", encoding="utf-8")
    with no_space(), pytest.raises(OSError, match="too large"), built(folder) as new:
        (new / "b").write_text("x" * 5000)
    assert content(tmp_path) == {"model/a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("when", [_BUILT + "    die()", "os.fsync = die\n" + _BUILT])
def test_crash_in_the_middle_leaves_the_old_folder(tmp_path: Path, when: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    killed(when, folder)
    assert content(folder) == {"a": "old"}


def test_lock_is_held_by_one_and_freed_when_it_is_killed(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    assert not is_held(file)
    code = "import sys; from pathlib import Path; from common.system.files import hold\n"
    code += "assert hold(Path(sys.argv[1])) is not None; print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, file], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        assert is_held(file)
        assert hold(file, patience=0.1) is None
        holder.kill()
    assert not is_held(file)
    ours = hold(file)
    assert ours is not None
    os.close(ours)
