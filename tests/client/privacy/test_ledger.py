"""The ledger finds whatever was done to it, survives crashes, and writes all or nothing."""

import hashlib
import json
import multiprocessing
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from client.privacy.ledger import FIRST, Entry, Ledger, verify
from common.errors import LedgerError
from deploy.cli import main
from tests.harness.full_disk import no_space


def write(path: Path, count: int) -> Ledger:
    ledger = Ledger(path)
    for number in range(count):
        with ledger.opened():
            ledger.append({"event": "failed", "reason": f"nr {number}"})
    return ledger


def forged(line: bytes, **changes: object) -> bytes:
    """A line with other content and the hash that belongs to it."""
    entry = {**json.loads(line), **changes}
    entry.pop("hash")
    body = json.dumps(entry, separators=(",", ":")).encode()
    return body[:-1] + f',"hash":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    path = tmp_path_factory.mktemp("ledger") / "l.jsonl"
    write(path, 4)
    return path.read_bytes(), path.with_name("l.jsonl.head").read_bytes()


def put(folder: Path, content: bytes, head: bytes | None) -> Path:
    path = folder / "l.jsonl"
    path.write_bytes(content)
    if head is not None:
        (folder / "l.jsonl.head").write_bytes(head)
    return path


def test_entries_are_chained_numbered_and_readable_by_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = write(path, 3)
    before = FIRST
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        entry = json.loads(line)
        assert (entry["line"], entry["before"]) == (number, before)
        before = entry["hash"]
        bare = line[: line.index(b',"hash"')] + b"}"
        assert hashlib.sha256(bare).hexdigest() == before
    assert ledger.head == verify(path).head == before
    for file in (path, path.with_name("l.jsonl.head")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.jsonl", "l.jsonl.head"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_edit_insertion_or_removal_of_a_byte_is_found(
    whole: tuple[bytes, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    content, head = whole
    place, byte = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
    kind = data.draw(st.sampled_from(["edit", "insert", "remove"]))
    middle = {"edit": bytes([byte]), "insert": bytes([byte, content[place]]), "remove": b""}[kind]
    changed = content[:place] + middle + content[place + 1 :]
    path = put(tmp_path, changed, head)
    if changed == content:
        verify(path)
        return
    with pytest.raises(LedgerError, match=r"l\.jsonl"):
        verify(path)
    with pytest.raises(LedgerError), Ledger(path).opened():  # nor does the site go on with it
        pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a, b, c, d: [a, b.replace(b"nr 1", b"nr 7"), c, d], "line 2: it was changed"),
        (lambda a, b, c, d: [a, forged(b, reason="x"), c, d], "line 3: it does not follow the line before"),
        (lambda a, b, c, d: [a, c, d], "line 2: it was written as line 3; lines were removed"),
        (lambda a, b, c, d: [a, b, b, c, d], "line 3: it was written as line 2; lines were removed, inserted"),
        (lambda a, b, c, d: [a, c, b, d], "line 2: it was written as line 3"),
        (lambda a, b, c, d: [a, b, c], "ends with line 3, l.jsonl.head tells of 4: cut off"),
        (lambda a, b, c, d: [a, b, c, forged(d, reason="x")], "line 4: l.jsonl.head tells of another line"),
        (lambda a, b, c, d: [a, b, c, d, b'{"line":5}\n'], "line 5: it is no entry"),
        (lambda a, b, c, d: [a, b, c, d, b'{"line":5,"ti'], "line 5: it has no end"),
        (lambda a, b, c, d: [], "ends with line 0, l.jsonl.head tells of 4: cut off"),
    ],
    ids=["edited", "forged", "removed", "inserted", "moved", "cut", "last forged", "added", "torn", "emptied"],
)
def test_damage_is_named_with_its_line(
    whole: tuple[bytes, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, reason: str
) -> None:
    lines = change(*whole[0].splitlines(keepends=True))  # type: ignore[operator]
    path = put(tmp_path, b"".join(lines), whole[1])
    assert main(["ledger", "verify", str(path)]) == 1
    assert reason in capsys.readouterr().err


def test_missing_head_file_and_missing_ledger_are_damage(whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = put(tmp_path, whole[0], None)
    with pytest.raises(LedgerError, match=r"it has 4 lines, but l\.jsonl\.head is missing"):
        verify(path)
    (tmp_path / "l.jsonl.head").write_bytes(whole[1])
    path.unlink()
    with pytest.raises(LedgerError, match="it is gone"), Ledger(path).opened():
        pass
    assert not path.exists()


def test_ledger_made_anew_is_found_by_a_head_noted_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "l.jsonl"
    noted = write(path, 2).head
    ledger = Ledger(path)
    with ledger.opened():
        ledger.append({"event": "failed", "reason": "later"})
    assert main(["ledger", "verify", str(path), "--head", noted]) == 0
    assert ledger.head in capsys.readouterr().out
    for file in list(tmp_path.iterdir()):
        file.unlink()
    write(path, 5)
    assert main(["ledger", "verify", str(path)]) == 0
    assert main(["ledger", "verify", str(path), "--head", noted]) == 1
    assert "made anew" in capsys.readouterr().err


def test_torn_last_line_is_mended_and_the_mending_recorded(whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    torn = b'{"line":5,"time":"20'
    path = put(tmp_path, whole[0] + torn, whole[1])
    told: list[Entry] = []
    ledger = Ledger(path, told.append)
    with ledger.opened():
        ledger.append({"event": "failed", "reason": "next"})
    assert [entry["event"] for entry in told] == [*["failed"] * 4, "mended", "failed"]
    assert told[4]["bytes"] == len(torn)
    assert told[4]["sha256"] == hashlib.sha256(torn).hexdigest()
    assert verify(path).lines == 6


def test_crash_between_line_and_head_file_is_no_damage(whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    lines = whole[0].splitlines(keepends=True)
    before = json.loads(lines[2])["hash"]
    path = put(tmp_path, whole[0], f"3 {before}\n".encode())
    ledger = Ledger(path)
    with ledger.opened():
        ledger.append({"event": "failed", "reason": "next"})
    assert verify(path).lines == 5


def test_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    ledger = write(path, 2)
    size = path.stat().st_size
    with no_space(size + 30), pytest.raises(LedgerError, match=r"cannot be written: File too large"), ledger.opened():
        ledger.append({"event": "failed", "reason": "x"})
    assert path.stat().st_size == size
    with ledger.opened():
        ledger.append({"event": "failed", "reason": "there is room again"})
    assert verify(path).lines == 3


def test_folder_that_takes_no_file_is_a_named_reason(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"x/l\.jsonl: the ledger cannot be written: No such"):
        write(tmp_path / "x" / "l.jsonl", 1)


def _append(path: Path, count: int) -> None:
    write(path, count)


def test_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, 20)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
        assert process.exitcode == 0
    assert verify(path).lines == 60
    assert len(list(tmp_path.iterdir())) == 2
