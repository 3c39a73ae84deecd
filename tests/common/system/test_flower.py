"""The environment of Flower's processes."""

import os
from pathlib import Path

import pytest

from common.system.flower import environment, program


def test_this_process_environment_outweighs_defaults_and_not_what_is_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = environment(tmp_path, hub=True, OMP_NUM_THREADS="2", OTHER="x")
    assert (found["OMP_NUM_THREADS"], found["OTHER"]) == ("7", "x")
    assert (found["FLWR_HOME"], found["FLWR_TELEMETRY_ENABLED"]) == (str(tmp_path), "0")
    assert "HF_HUB_OFFLINE" not in found
    assert environment(tmp_path, hub=False)["HF_HUB_OFFLINE"] == "1"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(program("flwr")).parent)
    assert os.access(program("flower-superlink"), os.X_OK)
