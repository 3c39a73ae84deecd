"""Who may import whom, what the two apps reach, and which files talk to Flower."""

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "common": {"server", "client", "strategies", "deploy", "benchmarks"},
    "strategies": {"server", "client", "deploy", "benchmarks"},
    "client": {"server", "deploy", "benchmarks"},
    "server": {"client", "deploy", "benchmarks"},
    "deploy": {"benchmarks"},
}
PRODUCT = tuple(FORBIDDEN)
#: Arrows between rooms: what a folder of server and client may import of its own side. They point one way.
ROOMS = {
    "server": {"server/loop", "server/buffered", "server/run"},
    "server/buffered": {"server/loop", "server/run"},
    "server/loop": {"server/run"},
    "server/run": {"server/tracking"},
    "server/tracking": set(),
    "server/superlink": {"server/run"},
    "server/report": {"server/run"},
    "server/operate": {"server/superlink", "server/report", "server/run", "server/tracking"},
    "client": {"client/kept", "client/privacy", "client/training"},
    "client/kept": set(),
    "client/privacy": set(),
    "client/training": set(),
    "client/watch": {"client/privacy"},
    "client/superlink": {"client/watch"},
    "client/connect": {"client/privacy", "client/superlink", "client/watch"},
    "client/preflight": {"client", "client/connect", "client/superlink", "client/privacy", "client/training"},
}
#: Rooms of which nothing is ever shipped: what checks, watches or starts the shipped code.
AT_HOME = (
    "client/connect/",
    "client/superlink/",
    "client/preflight/",
    "client/watch/",
    "common/web/",
    "server/operate/",
    "server/report/",
    "server/superlink/",
    "deploy/",
)
MOST_FILES, MOST_LINES = 13, 300
# Files and folders that talk to Flower; training code and strategy maths do not.
FLOWER = {
    "client/app.py",
    "client/received.py",
    "client/delivery.py",
    "client/site.py",
    "client/connect/worker_handle.py",
    "client/connect/worker_process.py",
    "client/preflight/superlink.py",
    "client/superlink/link.py",
    "client/superlink/turns.py",
    "client/connect/worker_supervisor.py",
    "common/protocol/fields.py",
    "common/protocol/messages.py",
    "common/protocol/records.py",
    "common/protocol/wire.py",
    "common/system/flower_socket.py",
    "strategies/flower/strategy.py",
    "strategies/flower/messages.py",
    "strategies/flower/streaming.py",
    "server/app.py",
    "server/buffered/round.py",
    "server/loop",
    "server/superlink",
    "deploy",
}


def modules(file: Path) -> Iterator[str]:
    """The modules imported anywhere in a file, also inside functions; of ``from a import b``, both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path: Path) -> set[str]:
    """Top-level packages imported anywhere in a file."""
    return {module.split(".")[0] for module in modules(path)}


def files(*folders: str) -> list[str]:
    return sorted(str(f.relative_to(ROOT)) for folder in folders for f in (ROOT / folder).rglob("*.py"))


def file_of(module: str) -> str | None:
    """The file of one of our modules; of a package, its __init__."""
    path = Path(*module.split("."))
    found = [p for p in (path / "__init__.py", path.with_suffix(".py")) if (ROOT / p).is_file()]
    return str(found[0]) if found and path.parts[0] in PRODUCT else None


@cache
def arrows(name: str) -> frozenset[str]:
    """Our files that a file imports by name."""
    return frozenset(file for module in modules(ROOT / name) if (file := file_of(module)) not in (None, name))  # type: ignore[misc]


def reached(*starts: str) -> set[str]:
    """Files that run when these are imported and used: by their imports, with the __init__ of every package."""
    found: set[str] = set()
    left = set(starts)
    while left:
        name = left.pop()
        found.add(name)
        left |= {*arrows(name), *(str(p / "__init__.py") for p in [*Path(name).parents][:-1])} - found
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_arrows_hold(folder: str) -> None:
    names = files(folder)
    assert names
    wrong = {name: bad for name in names if (bad := imported(ROOT / name) & FORBIDDEN[folder])}
    assert wrong == {}


def test_arrows_between_rooms_point_one_way() -> None:
    def room(name: str) -> str:
        return str(Path(name).parent)

    names = files("server", "client")
    assert {room(name) for name in names} == ROOMS.keys()
    for name in names:
        others = {room(other) for other in arrows(name) if Path(other).name != "__init__.py"} & ROOMS.keys()
        assert others <= {room(name), *ROOMS[room(name)]}, name
    done: set[str] = set()
    while ready := {room for room, others in ROOMS.items() if room not in done and others <= done}:
        done |= ready
    assert done == ROOMS.keys(), "the table itself goes round in a circle"


def test_no_file_imports_itself_over_others() -> None:
    names = set(files(*PRODUCT))
    while free := {name for name in names if not arrows(name) & names}:
        names -= free
    while unused := {name for name in names if not any(name in arrows(other) for other in names)}:
        names -= unused
    assert names == set(), "in a circle, or between two"


def test_rooms_and_files_have_a_readable_size() -> None:
    for folder in {Path(name).parent for name in files(*PRODUCT)}:
        within = [file.name for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"]
        assert len(within) <= MOST_FILES, f"{folder}: {len(within)} files"
    assert [name for name in files(*PRODUCT) if len((ROOT / name).read_text().splitlines()) > MOST_LINES] == []


def shipped() -> set[str]:
    """What Flower takes into the bundle by the patterns in pyproject.toml."""
    from flwr.cli.build import get_filtered_fab_paths

    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    candidates: dict[str, bytes | Path] = dict.fromkeys(("LICENSE", *files(*PRODUCT, "tests", "benchmarks")), b"")
    return set(get_filtered_fab_paths(candidates, config))


def test_bundle_holds_what_the_two_apps_reach_and_nothing_else() -> None:
    assert shipped() == {"LICENSE", *reached("server/app.py", "client/app.py")}


def test_bundle_is_short_enough_to_be_read() -> None:
    code = shipped() - {"LICENSE"}
    assert [name for name in code if name.startswith(AT_HOME)] == []
    # A site reads what hospitals have: readers of tables, folders and DICOM, and a look at what a model's files say.
    # A finished model tells what it is and how it is used: its card and its folder, the same at server and sites.
    # Trackers, six short files, are the only way of a number out of the federation: it can be read, too.
    # Masked sums are what a site hides its update with: nobody should have to take them on trust.
    # The delivery: a site writes the model that it holds, and keeps what is its own; the server judges the best round.
    # Calls to the SuperLink that fail are made again; norms of weights are computed once a round (decision 035). A Gram
    # matrix with half of the products is a file without scipy, which no site needs.
    # Several devices of a site train together: a process each, and what these exchange (decision 037).
    # A site's optimizer goes on between rounds, GaLore's as well as LoRA's.
    # Rounds that wait for no slow site: a loop of their own, and the changes of old updates (decision 040).
    # Keys of the next masked round go with this one's answers; a message is answered when it is complete.
    # A base in 4 or 8 bit: what is held in codes, and how files are read into them (decision 036).
    # Packed rows: what a site's model sees of its rows.
    # Norms that admission has computed are not computed again; GaLore's gradients come straight from a layer's inputs.
    # A model over several devices: where its blocks lie, and how inputs follow (decision 037).
    assert len(code) <= 170
    assert sum(len((ROOT / name).read_text().splitlines()) for name in code) <= 22_620


def test_only_named_files_know_flower() -> None:
    wrong = [
        name
        for name in files(*PRODUCT)
        if "flwr" in imported(ROOT / name) and not {name, *map(str, Path(name).parents)} & FLOWER
    ]
    assert wrong == []


@pytest.mark.parametrize("file", ["worker_process.py", "verify.py"])
def test_site_leaves_fedspans_code_to_the_bundle(file: str) -> None:
    """What it imported of an installed FedSpan would stand in for the bundle's own."""
    assert not imported(ROOT / "client" / "connect" / file) & set(PRODUCT)


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from server.app import app\n    import client.session\n")
    assert imported(file) == {"server", "client"}
