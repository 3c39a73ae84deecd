"""A command of ``fedspan``: its arguments, what it does, and how it ends.

The one place that turns errors into exit codes, the same ones for every command:

    0     it went well; also when a command that runs until it is stopped (a site, a display) is stopped
    1     it failed
    2     a file or an argument is wrong
    130   it was interrupted before it was done
"""

import argparse
import contextlib
import difflib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from common.errors import ConfigError, FedSpanError
from common.system import logs

FAILED, WRONG, INTERRUPTED = 1, 2, 130  # exit codes
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Command:
    """A command of ``fedspan``, defined by the module that does the work.

    ``fedspan --help`` imports all these modules, so their import must stay light: no PyTorch, Flower or transformers.

    Attributes:
        arguments: adds the command's arguments to a parser, each with its help.
        run: does the work; returns the exit code, None for 0. A user's mistake raises a ``FedSpanError``.
        example: example arguments, as they are typed.
        then: the next step: a command, or a sentence.
        notes: further text for the help, printed as it is.
        passes_on: unknown options are left in ``options.rest``, for another program.
    """

    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    example: str
    then: str
    notes: str = ""
    passes_on: bool = False


class Parser(argparse.ArgumentParser):
    """The parser of a command.

    Args:
        name: the command's full name, such as "fedspan sites add".
        about: one line about the command.
        command: the command itself.
    """

    def __init__(self, name: str, about: str, command: Command) -> None:
        head = f"{about[0].upper()}{about[1:]}."
        super().__init__(
            prog=name,
            description=f"{head}\n\n{command.notes}" if command.notes else head,
            epilog=f"example:\n  {f'{name} {command.example}'.strip()}\n\nnext:\n  {command.then}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._passes_on = command.passes_on
        command.arguments(self)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command line.

        Raises:
            ConfigError: an argument is wrong; the text names the nearest option.
        """
        if self._passes_on:
            options, rest = self.parse_known_args(arguments)
            options.rest = rest
            return options
        known = {name: name for name in self._option_string_actions}
        for word in itertools.takewhile(lambda word: word != "--", arguments):
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                self.error(f"there is no option {option}{nearest(option, known)}")
        return self.parse_intermixed_args(arguments)  # `model ask FOLDER --base DIR QUESTION`, too

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError instead of ending the process."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def number(kind: type[Number], least: Number, most: Number | None = None, unit: str = "") -> Callable[[str], Number]:
    """A ``type`` for ``add_argument``: a finite number in a range, both ends included.

    Args:
        kind: int or float.
        least: the smallest that is allowed.
        most: the largest; None: there is none.
        unit: for the error, such as "seconds".
    """

    def read(text: str) -> Number:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if least <= value <= (sys.float_info.max if most is None else most):
                return value
        units = f" {unit}" if unit else ""
        ends = f"{least:g}{units} and more" if most is None else f"{least:g} to {most:g}{units}"
        what = "whole numbers, " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {what}{ends}")

    return read


def add_tries(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    """The argument of every command that starts something again when it dies; ``what`` is counted, for the help."""
    parser.add_argument(
        "--tries", type=number(int, 0), default=default, metavar="N", help=f"{what} (default: {default})"
    )


def address(text: str) -> str:
    """A ``type`` for ``add_argument``: HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: HOST:PORT")
    return text


def address_or_socket(text: str) -> str:
    """A ``type`` for ``add_argument``: HOST:PORT, or ``unix:`` and the path of a socket of this machine."""
    if text.startswith("unix:/"):
        return text
    try:
        return address(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: HOST:PORT, unix:/PATH") from None


def nearest(word: str, known: Mapping[str, str], closeness: float = 0.5) -> str:
    """A question that names what was most likely meant; empty when nothing is near.

    Args:
        word: the word as typed.
        known: the words that could be typed, each with the text to show for it.
        closeness: least similarity, from 0 to 1 (the same word).
    """
    found = difflib.get_close_matches(word, sorted(known), n=1, cutoff=closeness)
    return f"; did you mean {known[found[0]]}?" if found else ""


def execute(work: Callable[[], int | None]) -> int:
    """Do a command's work; return its exit code. An error that a user can fix becomes one line on standard error."""
    try:
        try:
            code = work() or 0
        finally:
            sys.stdout.flush()
    except FedSpanError as error:
        return _end(f"error: {error}", error.exit_code)
    except KeyboardInterrupt as interruption:
        return _end(str(interruption) or "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has ended, as `head` does; drop the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _end(f"error: {where}{error.strerror or error}", FAILED)
    return code


def program(name: str, about: str, command: Command) -> int:
    """Run a command by another name than ``fedspan``'s; the exit code. For files that are started by their path."""
    return execute(lambda: command.run(Parser(name, about, command).read(sys.argv[1:])))


def start_log(component: str) -> None:
    """Set up the log of this process, see ``common.system.logs``.

    Raises:
        ConfigError: the environment asks for a log that does not exist.
    """
    try:
        logs.configure(component)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def set_aside(file: Path) -> None:
    """Write what this process's libraries print or log to a file, see ``common.system.logs``.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        logs.set_aside(file)
    except OSError as error:
        raise ConfigError(f"--log {file} cannot be written ({error.strerror})") from None


def _end(line: str, code: int) -> int:
    print(line, file=logs.own(), flush=True)
    return code
