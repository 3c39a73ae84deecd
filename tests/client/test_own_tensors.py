"""What a site keeps for itself: from which round's tensors a round goes on."""

from pathlib import Path

import torch

from client.kept.own_tensors import OwnTensors


def test_repeated_round_goes_on_from_the_round_before_it(tmp_path: Path) -> None:
    own = OwnTensors(tmp_path, "run")
    for number in (1, 2, 5):  # a site that was not asked in between
        own.keep(number, {"moment": torch.tensor([float(number)])})
    assert [own.after(number) for number in (1,)] == [{}]
    assert [float(own.after(number)["moment"]) for number in (2, 4, 5, 9)] == [2, 2, 5, 5]


def test_tensors_of_the_best_round_stay_when_the_site_did_not_train_in_it(tmp_path: Path) -> None:
    own = OwnTensors(tmp_path, "run")
    for number, best in ((1, None), (2, 1), (5, 3), (6, 3), (7, 3), (8, 3)):
        own.keep(number, {"factor": torch.tensor([float(number)])}, best)
    assert float(own.after(3)["factor"]) == 2
    assert float(own.after(8)["factor"]) == 8
    own.keep(9, {"factor": torch.tensor([9.0])}, 8)
    assert own.after(3) == {}
