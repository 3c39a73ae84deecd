"""One page of errors: each has a code of its own, one of two exit codes, and a line in the tree."""

import inspect

from common import errors
from common.errors import ConfigError, FedSpanError, LinkError, RunFolderError, StaleStateError, WorkerDied

FAMILY = [one for one in vars(errors).values() if inspect.isclass(one) and issubclass(one, FedSpanError)]


def test_every_class_has_a_code_of_its_own_above_flowers() -> None:
    codes = [vars(one).get("code") for one in FAMILY]
    assert None not in codes
    assert len({*codes}) == len(codes)
    assert min(map(int, codes)) == 1000  # type: ignore[arg-type]
    assert (StaleStateError.code, WorkerDied.code) == (1001, 1002)  # known to sites of before


def test_two_means_that_a_file_or_an_argument_is_wrong() -> None:
    assert {one.exit_code for one in FAMILY} == {1, 2}
    assert ConfigError.exit_code == RunFolderError.exit_code == 2
    assert FedSpanError.exit_code == LinkError.exit_code == 1


def test_the_tree_at_the_top_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn, above = {}, list[str]()
    for line in errors.__doc__.splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()
        if not words or words[0] not in {one.__name__ for one in FAMILY} or not line.startswith("    "):
            continue
        depth = line.index(words[0]) // 4 - 1
        drawn[words[0]], above = ([*above[:depth]] or [None])[-1], [*above[:depth], words[0]]
    assert drawn == {one.__name__: one.__base__.__name__ if one is not FedSpanError else None for one in FAMILY}
