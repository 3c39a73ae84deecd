"""Every guarantee is named with a test that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tests_of_the_guarantees_exist() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    rows = re.findall(r"^\| \d+ \|.*\|.*\|$", page, re.MULTILINE)
    assert len(rows) > 20
    tests = {str(file.relative_to(ROOT)): file.read_text() for file in (ROOT / "tests").rglob("test_*.py")}
    wrong = []
    for row in rows:
        named = [
            cell for cell in re.findall(r"`([^`]*)`", row.rsplit(" | ", 1)[1]) if re.search("test_|^\\.\\.\\.", cell)
        ]
        if not named and "every test" not in row:
            wrong.append(row)
        found: list[str] = []
        for cell in named:
            path, _, test = cell.partition("::") if "test_" in cell else ("", "", cell)
            found = [text for file, text in tests.items() if file.endswith(path)] if path else found
            name = r"\w*".join(re.escape(part) for part in test.split("..."))
            if not any(re.search(rf"def {name}", text) for text in found):
                wrong.append(cell)
    assert wrong == []
