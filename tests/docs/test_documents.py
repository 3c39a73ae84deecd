"""Documents against the code: links lead somewhere, messages are said, words are explained."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = ("client", "common", "deploy", "server", "strategies")


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        if not file.exists() or (heading and heading not in headings(file)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_understood(document: Path) -> None:
    """Verb, options and their values; where a page leaves something out (...), the verb alone."""
    text = re.sub(r" *\\\n +", " ", document.read_text())
    blocks = re.findall(r"^(?:    |\$ )?(?:\.venv/bin/)?fedspan (.+)$", text, re.M)
    for line in [*blocks, *re.findall(r"`fedspan ([^`\n]+)`", text)]:
        words = shlex.split(re.split(r"  +#|[;|&]", line)[0], comments=True)
        verb = next((known for known in (" ".join(words[:2]), *words[:1]) if known in cli.VERBS), None)
        if verb is None:  # `fedspan site`, `fedspan VERB`, `fedspan --help`
            assert words[0] in {*(known.split()[0] for known in cli.VERBS), "VERB", "--help", "--version"}, line
        elif line in blocks and "..." not in line:
            cli.parser(verb, cli.load(verb)).read(words[len(verb.split()) :])


def test_messages_of_the_troubleshooting_page_are_said_by_the_code() -> None:
    said = "\n".join(texts(file) for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 15
    parts = {message: [part.strip(" ;,") for part in message.split("...")] for message in messages}
    assert [m for m, found in parts.items() if not all(part in said for part in found)] == []


def texts(file: Path) -> str:
    """All literal text of a file, the pieces of f-strings too."""
    nodes = ast.walk(ast.parse(file.read_text()))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(file: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


def test_site_of_pages_builds_strictly(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "mkdocs"), "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert "I am" in (tmp_path / "index.html").read_text()
