"""Groups of tensors under one set of names."""

import pytest
import torch
from hypothesis import given, strategies as st

from common.protocol.tensors import flatten, unflatten

GROUPS = st.text(st.characters(exclude_characters="|"))


@given(st.dictionaries(GROUPS, st.sets(st.text(), min_size=1), max_size=4))
def test_groups_come_back_whatever_their_tensors_are_called(groups: dict[str, set[str]]) -> None:
    tensors = {group: {name: torch.tensor(len(name)) for name in names} for group, names in groups.items()}
    back = unflatten(flatten(tensors))
    assert back.keys() == tensors.keys()
    assert all(back[group][name] is tensors[group][name] for group in tensors for name in tensors[group])


@pytest.mark.parametrize(
    ("key", "group", "name"), [("2|W/left", "2", "W/left"), ("exp_avg|a|b", "exp_avg", "a|b"), ("head", "head", "")]
)
def test_names_in_files_of_before_read_as_they_were_meant(key: str, group: str, name: str) -> None:
    tensor = torch.ones(1)
    assert unflatten({key: tensor}) == {group: {name: tensor}}
