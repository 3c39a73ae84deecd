"""The estimate's benchmark with a small model: two cases, each near its estimate."""

from pathlib import Path

import pytest

from benchmarks import memory_peaks


@pytest.mark.long
def test_estimates_are_near_what_processes_take(tmp_path: Path) -> None:
    for name, shape in (("tiny", memory_peaks.TINY), ("model", (512, 2048, 4, 8, 2, 512))):
        memory_peaks.write_model(tmp_path / name, shape)
    whole, codes = (memory_peaks.case(tmp_path, "FedIT", base, mapped=True) for base in ("whole", "int8"))
    for key in ("weights, MB", "estimated, MB"):
        assert float(codes[key] or 0) < float(whole[key] or 0) - 20
    for row in (whole, codes):
        assert 0.6 < float(row["estimated / measured"] or 0) < 1.6
