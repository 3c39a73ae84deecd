"""A server does not grow with its rounds: light sites on a real supervised server."""

import os
from statistics import median

import pytest

from benchmarks.scale.rounds import MEASURED, over_rounds
from benchmarks.scale.run import SMALL, Done, federate
from benchmarks.scale.watch import Sample, Watch

ROUNDS = int(os.environ.get("FEDSPAN_ROUNDS", "120"))  # 400 takes twenty minutes
#: What may be added between the second quarter of the rounds and the last one. Each round moves 3 MB of messages.
MORE = {"MB": 40.0, "descriptors": 2.0, "threads": 4.0}


@pytest.mark.long
@pytest.mark.timeout(30 * ROUNDS)
def test_memory_descriptors_threads_and_database_are_flat() -> None:
    quarter = ROUNDS // 4
    _, before, _, last, *_ = over_rounds(federate(4, rounds=ROUNDS, sizes=SMALL), quarter)
    for part in ("supervisor", "SuperLink", "ServerApp"):
        for name, most in MORE.items():
            was, is_ = (float(str(row[f"{part} {name}"])) for row in (before, last))
            assert is_ <= was + most, (
                f"{part}: {name} {was:g} in rounds {before['rounds']}, {is_:g} in {last['rounds']}"
            )
    assert float(str(last["database MB"])) < 8.0


def test_parts_of_a_run_are_told_apart_by_its_events() -> None:
    watch = object.__new__(Watch)
    watch.samples = [
        Sample(100.0 + second, "SuperLink", memory * 10**6, descriptors=7, threads=5)
        for second, memory in enumerate([900, 10, 30, 20, 40, 50, 900])
    ]
    watch.database = [(100.5, 10**6), (103.0, 2 * 10**6), (106.0, 9 * 10**6)]
    events = [{"event": "round_started", "time": 101.0}]
    events += [{"event": "round_finished", "time": time} for time in (103.0, 105.0, 106.0)]
    one, two = over_rounds(Done(events, watch, 0.0, 0, []), 2)
    assert (one["rounds"], two["rounds"]) == ("1 to 2", "3 to 3")
    assert one["s"] == 2.0
    assert one["SuperLink MB"] == median([30, 40])
    assert (two["SuperLink MB"], two["s"], two["database MB"]) == (50, 1.0, 9)
    assert {f"SuperLink {name}" for name in MEASURED} < one.keys()
