"""What a client sends touches the average only when it is what was asked for."""

import pytest
import torch

from common.errors import RefusedUpdate
from strategies.admission.well_formed import admit
from strategies.rule import Tensors

A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "head.weight"


def factors(rank: int = 2, in_: int = 5, out: int = 6) -> Tensors:
    return {A: torch.ones(rank, in_), B: torch.ones(out, rank), HEAD: torch.ones(3, 3)}


def attempt(tensors: Tensors, active: tuple[str, ...] = (A, B, HEAD), **options: object) -> Tensors:
    return admit("site-b", tensors, factors(), list(active), **options)  # type: ignore[arg-type]


def test_what_was_asked_for_is_admitted() -> None:
    sent = factors()
    assert attempt(sent) == sent
    assert set(attempt(sent, active=(B,))) == {B}  # frozen tensors may come along unchanged


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({A: None}, f"site-b: 1 missing tensor\\(s\\): {A}"),
        ({"x.weight": torch.ones(1)}, r"site-b: 1 unexpected tensor\(s\): x\.weight"),
        ({HEAD: torch.ones(1)}, rf"site-b: {HEAD} has shape \(1,\), expected \(3, 3\)"),
        ({A: torch.ones(3, 5)}, rf"site-b: {A} has shape \(3, 5\), expected \(2, 5\)"),
        ({B: torch.ones(6, 2).double()}, rf"site-b: {B} is torch\.float64, expected torch\.float32"),
        ({B: torch.full((6, 2), 1e12)}, rf"site-b: {B}: a norm of 3\.46e\+12; allowed: up to 1e\+12"),
        ({B: torch.full((6, 2), 1e38)}, rf"site-b: {B}: a norm of inf; allowed: up to 1e\+12"),
        ({B: torch.full((6, 2), float("nan"))}, rf"site-b: {B}: 12 non-finite values"),
        ({HEAD: torch.tensor([[1.0, 1, 1], [1, 1, 1], [1, float("inf"), 1]])}, rf"site-b: {HEAD}: 1 non-finite values"),
    ],
)
def test_other_tensors_are_refused_by_client_and_name(change: dict[str, torch.Tensor | None], says: str) -> None:
    sent = {name: tensor for name, tensor in {**factors(), **change}.items() if tensor is not None}
    with pytest.raises(RefusedUpdate, match=says):
        attempt(sent)


def test_frozen_tensor_that_comes_back_changed_is_refused() -> None:
    sent = factors()
    sent[A][0, 0] = -0.0 if sent[A][0, 0] == 0 else 1 + 1e-7
    with pytest.raises(RefusedUpdate, match=f"site-b: {A} is frozen in this round but came back changed"):
        attempt(sent, active=(B, HEAD))


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_any_rank_that_the_layer_allows_is_admitted_where_ranks_are_mixed(rank: int) -> None:
    sent = factors(rank)
    assert attempt(sent, any_rank=True) == sent
    with pytest.raises(RefusedUpdate, match="has shape"):
        attempt(factors(3), any_rank=False)


def test_client_has_one_rank_in_all_layers_but_where_the_state_holds_less() -> None:
    other = {name.replace("q.", "v."): tensor for name, tensor in factors(3).items()}
    expected = factors(2) | other  # of rank 2 and 3
    for ranks in ((2, 3), (1, 1), (2, 2), (3, 3), (1, 3), (3, 2)):
        sent = factors(ranks[0]) | {name.replace("q.", "v."): t for name, t in factors(ranks[1]).items()}
        if ranks not in ((1, 3), (3, 2)):
            assert admit("site-b", sent, expected, list(expected), any_rank=True) == sent
            continue
        with pytest.raises(RefusedUpdate, match=r"site-b: .*lora_A.weight has rank \d, others 3; allowed: one for all"):
            admit("site-b", sent, expected, list(expected), any_rank=True)


@pytest.mark.parametrize(
    ("change", "limit", "says"),
    [
        (factors(6), None, rf"{A} has rank 6; allowed: 1 to 5"),
        (factors(4), 3, rf"{A} has rank 4; allowed: 1 to 3"),
        ({A: torch.ones(0, 5), B: torch.ones(6, 0)}, None, rf"{A} has rank 0; allowed: 1 to 5"),
        ({A: torch.ones(3, 5)}, None, rf"{B} has shape \(6, 2\), expected \(6, 3\)"),
        ({A: torch.ones(2, 4)}, None, rf"{A} has shape \(2, 4\), expected \(2, 5\)"),
        ({A: torch.ones(())}, None, rf"{A} has shape \(\), expected"),
        ({B: torch.ones(2)}, None, rf"{B} has shape \(2,\), expected \(6, 2\)"),
    ],
)
def test_ranks_outside_the_layer_or_unequal_in_a_pair_are_refused(
    change: Tensors, limit: int | None, says: str
) -> None:
    with pytest.raises(RefusedUpdate, match=says):
        attempt({**factors(), **change}, any_rank=True, max_rank=limit)
