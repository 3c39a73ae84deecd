"""A SuperNode whose link ends, for a time or for good."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from client.superlink.link import Link
from client.watch.link_state import LinkState


def test_call_that_a_stopping_superlink_cancels_is_tried_again() -> None:
    class Cancelled(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.CANCELLED

        def details(self) -> str:
            return "CANCELLED"

    assert Link("127.0.0.1:1", None, None, 0.0, LinkState("127.0.0.1:1")).judge(Cancelled()) is False


def test_loop_that_ends_by_an_error_ends_the_program_though_its_runtime_api_still_serves(tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    code = "import sys, threading, time; from client.superlink import link; from deploy.cli import main; "
    code += "link.flower_supernode = lambda: threading.Thread(target=time.sleep, args=(600,)).start(); sys.exit(main())"
    options = ["--socket", str(tmp_path / "s"), "--superlink", address, "--insecure"]
    command = [sys.executable, "-c", code, "site", "supernode", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    server.stop(None)
    assert done.returncode == 1
    assert f"error: the link to {address} ended" in done.stderr
