"""``fedspan VERB``: all commands, and where each of them lives.

The table is everything: a verb of one or two words, the module whose command it is, and what it does. The command is
the module's ``Command`` named as the verb's last word in capitals. A module is imported when its verb is called, so
that help is quick, and so that an image without ``server/`` has all other verbs.
"""

import importlib
import itertools
import sys

from common.errors import ConfigError
from common.system.command import WRONG, Command, Parser, execute, nearest
from common.text import installed

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "operator": {
        "run": ("deploy.run", "run a federation, all of its sites on this machine"),
        "serve": ("server.operate.serve", "run a federation whose sites are elsewhere"),
        "server start": ("server.operate.standing", "keep a server up, to which sites come and runs are handed"),
        "status": ("server.operate.status", "show all runs, or one of them"),
        "watch": ("server.operate.watch", "watch a run as it goes on, as a page in the browser"),
        "stop": ("server.operate.stop", "stop a run; it can go on later"),
        "flower": ("server.operate.flower", "use Flower's own commands on the SuperLink of a run"),
        "report": ("server.operate.report", "write a run's page, report.html"),
        "readmit": ("server.operate.readmit", "let a site take part again that was left out for its updates"),
        "server invite": ("deploy.invitation.invite", "pack all that a site needs to take part into one archive"),
        "sites add": ("server.superlink.registry", "let a site connect with a key"),
        "sites revoke": ("server.superlink.registry", "let a site connect no more"),
        "sites list": ("server.superlink.registry", "list all sites that could ever connect"),
        "keys ca": ("deploy.keys.certs", "make the federation's certificate authority"),
        "keys server": ("deploy.keys.certs", "make or renew the server's certificate"),
        "keys site": ("deploy.keys.certs", "make a site's pair of keys"),
        "keys show": ("deploy.keys.certs", "say what certificates and keys are, for whom, and until when"),
        "code key": ("deploy.keys.bundle", "make a pair of keys for signing code"),
        "code digest": ("deploy.keys.bundle", "say which code the server ships, by its digest"),
        "code sign": ("deploy.keys.bundle", "sign the code that the server ships"),
        "code verify": ("deploy.keys.bundle", "check a signature of the code that the server ships"),
    },
    "hospital": {
        "site accept": ("deploy.invitation.accept", "check and lay out the archive that the operator has sent"),
        "site check": ("client.preflight.check", "say whether a site is ready to join, and what is missing"),
        "site agree": ("client.connect.agree", "show what a federation would ask of a site, and agree to it"),
        "site join": ("client.connect.join", "take part in federations"),
        "site status": ("client.watch.status", "say whether a site is connected, what it does, and its losses"),
        "site watch": ("client.watch.page", "show a site what it does and what has left, as a page in the browser"),
        "ledger verify": ("client.privacy.ledger_summary", "check every line of a site's ledger"),
        "ledger summary": ("client.privacy.ledger_summary", "say what left a site, by its ledger"),
    },
    "everybody": {
        "model ask": ("deploy.model.ask", "ask a finished model a question"),
        "model score": ("deploy.model.score", "score a finished model on rows of your own"),
        "model merge": ("deploy.model.merge", "merge a finished adapter into its base model"),
        "model card": ("deploy.model.card", "show what a finished model is, and check its files"),
    },
    "research": {
        "experiment": ("deploy.experiment.run", "compare strategies over a grid of settings"),
        "compare": ("deploy.experiment.run", "write an experiment's page and tables"),
        "data recipe": ("deploy.data.recipe", "make rows of a public data set"),
        "data partition": ("deploy.data.partition", "split a data set among sites"),
        "demo": ("deploy.demo.prepare", "prepare the demo's model and data"),
    },
    "machines": {
        "health superlink": ("deploy.health", "say whether a SuperLink answers over TLS, for a health check"),
        "health site": ("deploy.health", "say whether a site's processes live, for a health check"),
        "site worker": ("client.connect.worker", "do a site's work, by Flower's own way"),
        "site supernode": ("client.connect.supernode", "hold a site's link to the server, by Flower's own way"),
        "completion": ("deploy.completion", "print a script for tab completion"),
        "schemas": ("deploy.schemas", "write what is made from the code: JSON schemas, reference, what leaves a site"),
    },
}
VERBS = {verb: row for group in GROUPS.values() for verb, row in group.items()}
_ROOMS = ("client", "common", "deploy", "server", "strategies")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return execute(lambda: _main(given))


def _main(given: list[str]) -> int | None:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), given))
    verb = next((known for known in (" ".join(words[:2]), *words[:1]) if known in VERBS), None)
    if verb is not None:
        try:
            command = load(verb)
            return command.run(parser(verb, command).read(given[len(verb.split()) :]))
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _ROOMS:
                raise
            raise ConfigError(f"fedspan {verb} is not part of this image, which has no {error.name}") from None
    return _about(given, words)


def load(verb: str) -> Command:
    """The command of a verb.

    Raises:
        ModuleNotFoundError: its module, or one that it needs, is not in this image.
    """
    command = getattr(importlib.import_module(VERBS[verb][0]), verb.split()[-1].upper())
    assert isinstance(command, Command)  # noqa: S101 - the table is wrong
    return command


def parser(verb: str, command: Command) -> Parser:
    """The parser of a verb's command."""
    return Parser(f"fedspan {verb}", VERBS[verb][1], command)


def _about(given: list[str], words: list[str]) -> int:
    """Answer what names no command: ``--help``, ``--version``, the first word of several verbs; or a slip."""
    start = f"{words[0]} " if words and any(verb.startswith(f"{words[0]} ") for verb in VERBS) else ""
    rest = given[1:] if start else given
    if not rest or rest[0] in ("-h", "--help"):
        print(overview(start))  # noqa: T201
        return 0 if rest else WRONG
    if given == ["--version"]:
        print(f"fedspan {installed('fedspan')}")  # noqa: T201
        return 0
    known = {verb.split()[-1]: verb for verb in VERBS} | {verb.split()[0]: verb.split()[0] for verb in VERBS}
    known |= {word: word for word in (*VERBS, "--help", "--version")}
    hint = nearest(" ".join(words[:2]), known, 0.8) or nearest(rest[0], known)
    raise ConfigError(f"fedspan {start}has no {rest[0]}{hint} (see fedspan {start}--help)")


def overview(start: str = "") -> str:
    """All verbs that begin so, by group, with what they do."""
    lines = [f"usage: fedspan {start}VERB ...", "", f"fedspan {start}VERB --help explains a verb, with an example."]
    width = max(map(len, VERBS))
    for group, verbs in GROUPS.items():
        shown = [f"  {verb:{width}}  {about}" for verb, (_, about) in verbs.items() if verb.startswith(start)]
        lines += ["", f"{group}:", *shown] if shown else []
    return "\n".join(lines)
