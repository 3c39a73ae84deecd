"""The one door: every verb explains itself, stays light, and ends with the exit codes of all."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ConfigError, FedSpanError, LedgerError, RunFolderError
from common.system.command import Parser, execute
from deploy import cli
from deploy.completion import script
from tests.harness.processes import FEDSPAN, ROOT, environment
from tests.harness.programs import needs

PRODUCT = ("client", "common", "deploy", "server", "strategies")
HEAVY = {"torch", "flwr", "transformers", "numpy", "matplotlib", "datasets", "pandas", "grpc", "peft", "sklearn"}
#: Programs that other processes of ours start; everything else is a verb.
PROGRAMS = {"client/connect/supernode.py", "client/connect/worker.py", "client/connect/worker_process.py"}
PROGRAMS |= {"client/preflight/steps.py", "deploy/compose/setup.py", "deploy/lock.py", "deploy/experiment/trial.py"}
PROGRAMS |= {"common/system/flower_socket.py", "server/superlink/program.py"}


def parser(verb: str) -> Parser:
    return cli.parser(verb, cli.load(verb))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verb_explains_every_argument_and_its_example_is_understood(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = cli.load(verb)
    for action in parser(verb)._actions:
        assert action.help, f"{verb}: {action.dest} is not explained"
    parser(verb).read(shlex.split(command.example))
    with pytest.raises(SystemExit) as end:
        cli.main([*verb.split(), "--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: fedspan {verb} ")
    assert f"example:\n  fedspan {verb} {command.example}".rstrip() in told
    assert f"next:\n  {command.then}" in told
    if command.then.startswith("fedspan "):
        words = re.split(r"[,; ]+", command.then)[1:]
        assert " ".join(words[:2]) in cli.VERBS or words[0] in cli.VERBS, command.then


def test_help_of_all_verbs_together_imports_nothing_heavy() -> None:
    code = "import json, sys; from deploy import cli; print(cli.overview(), file=sys.stderr)\n"
    code += "for verb in cli.VERBS: cli.parser(verb, cli.load(verb)).format_help()\n"
    code += "print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert HEAVY & set(json.loads(done.stdout)) == set()
    assert all(verb in done.stderr for verb in cli.VERBS)


def test_overview_imports_no_command() -> None:
    code = "import sys; from deploy import cli; cli.overview(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert not {module for module, _ in cli.VERBS.values()} & set(done.stdout.split())
    assert not {"pydantic", "yaml", "rich"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stats"], "fedspan has no stats; did you mean status?"),
        (["check", "site.yaml"], "fedspan has no check; did you mean site check?"),
        (["site", "jion", "site.yaml"], "fedspan site has no jion; did you mean site join?"),
        (["site", "add", "x"], "fedspan site has no add; did you mean sites add?"),
        (["--hlep"], "fedspan has no --hlep; did you mean --help?"),
        (["xyzzy"], "fedspan has no xyzzy (see fedspan --help)"),
        (["run", "x.yaml", "--resum"], "there is no option --resum; did you mean --resume? (see fedspan run --help)"),
        (["run", "x.yaml", "--tries=x"], "argument --tries: 'x'; allowed: whole numbers, 0 and more (see fedspan run"),
        (["run"], "the following arguments are required: FEDERATION.yaml (see fedspan run --help)"),
        (["site", "join", "x", "--superlink", "fl.org"], "argument --superlink: 'fl.org'; allowed: HOST:PORT"),
        (["run", "/none/federation.yaml"], "/none/federation.yaml"),
        (["stop", "nothing", "--runs", "/none"], "/none/nothing holds no run"),
    ],
)
def test_slip_is_one_line_that_names_what_was_meant(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {says}")


@pytest.mark.parametrize(("given", "code"), [([], 2), (["--help"], 0), (["sites"], 2), (["sites", "-h"], 0)])
def test_first_word_alone_lists_its_verbs(given: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(given) == code
    told = capsys.readouterr().out
    listed = set(re.findall(r"(?m)^  (\w+(?: \w+)?)  +\w", told))
    assert listed == {verb for verb in cli.VERBS if not given or given[0].startswith("-") or verb.startswith("sites ")}


def _raise(error: BaseException) -> Callable[[], int | None]:
    def work() -> int | None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "says"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (_raise(FedSpanError("it broke")), 1, "error: it broke\n"),
        (_raise(LedgerError("x: damaged")), 1, "error: x: damaged\n"),
        (_raise(ConfigError("x.yaml: wrong")), 2, "error: x.yaml: wrong\n"),
        (_raise(RunFolderError("x holds no run")), 2, "error: x holds no run\n"),
        (_raise(PermissionError(13, "Permission denied", "/x/y")), 1, "error: /x/y: Permission denied\n"),
        (_raise(OSError(28, "No space left on device")), 1, "error: No space left on device\n"),
        (_raise(KeyboardInterrupt()), 130, "interrupted\n"),
        (_raise(KeyboardInterrupt("stopped; called again, it goes on")), 130, "stopped; called again, it goes on\n"),
    ],
)
def test_exit_code_has_one_meaning(
    work: Callable[[], int | None], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(work) == code
    assert capsys.readouterr().err == says


def test_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        execute(lambda: 1 // 0)


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"]])
def test_reader_that_went_away_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        command = [*FEDSPAN, *arguments]
        done = subprocess.run(command, env=environment(), stdout=gone, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@needs("bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fedspan st", "status stop"),
        ("fedspan site ", "accept check agree join status watch worker supernode"),
        ("fedspan site join x.yaml --conn", "--connect-deadline"),
        ("fedspan data partition x.csv --by ", "iid dirichlet label column quantity"),
        ("fedspan completion ", "bash zsh"),
        ("fedspan run ", ""),  # files, which bash offers itself
        ("fedspan xyzzy --", ""),
    ],
)
def test_tab_offers_verbs_options_and_choices(typed: str, offered: str, tmp_path: Path) -> None:
    words = typed.split(" ")
    program = f"{script('bash')}COMP_WORDS=({' '.join(map(shlex.quote, words))})\nCOMP_CWORD={len(words) - 1}\n"
    program += '_fedspan\necho "${COMPREPLY[*]}"\n'
    done = subprocess.run(["bash", "-u"], input=program, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (offered, "")


def test_every_command_is_in_the_table() -> None:
    known = {(module, verb.split()[-1].upper()) for verb, (module, _) in cli.VERBS.items()}
    found = set()
    for file in (file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                (target,), maker = node.targets, node.value.func
                if isinstance(target, ast.Name) and isinstance(maker, ast.Name) and maker.id == "Command":
                    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                    found.add((module, target.id))
    assert found <= known
    assert len(found) >= len(known) - 1  # the demo's is made by a function


def test_there_is_no_other_door() -> None:
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    mains = {str(file.relative_to(ROOT)) for file in files if 'if __name__ == "__main__"' in file.read_text()}
    assert mains == PROGRAMS


def test_nothing_speaks_of_a_door_that_is_gone() -> None:
    old = re.compile(r"python -m\s+(?:server|client|deploy)\.(?!compose\.setup|preflight\.steps|lock\b)")
    files = [file for folder in (*PRODUCT, "benchmarks", "docs", "tests") for file in (ROOT / folder).rglob("*.*")]
    files += [file for file in ROOT.iterdir() if file.name != "CHANGELOG.md"]
    texts = {".py", ".md", ".yaml", ".yml", ".txt", ".json", ".Dockerfile", ""}
    wrong = [f for f in files if f.is_file() and f.suffix in texts and old.search(f.read_text(errors="replace"))]
    assert wrong == []
