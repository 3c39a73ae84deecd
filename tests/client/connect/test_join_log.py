"""Flower's lines in a site's folder do not fill the disk."""

import subprocess
import sys
from pathlib import Path

from client.connect.join import trim
from tests.harness.processes import ROOT

WRITER = """
import sys
from pathlib import Path
from common.system.logs import set_aside
set_aside(Path(sys.argv[1]))
for line in sys.stdin:
    print(line, end="", flush=True)
    print("written", file=__import__("common.system.logs", fromlist=["own"]).own(), flush=True)
"""


def test_log_that_is_too_long_is_begun_anew_while_its_writer_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "flower.log"
    command = [sys.executable, "-P", "-c", WRITER, str(file)]
    with subprocess.Popen(
        command, env={"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as writer:
        assert writer.stdin is not None
        assert writer.stderr is not None
        for text in ("first", "second", "third"):
            writer.stdin.write(f"{text}\n")
            assert writer.stderr.readline() == "written\n"
            trim(file, most=10)
        writer.stdin.close()
    assert file.read_text() == "third\n"
    assert (tmp_path / "flower.log.1").read_text() == "first\nsecond\n"
    trim(tmp_path / "missing", most=1)
