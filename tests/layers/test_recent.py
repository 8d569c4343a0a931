"""What a layer remembers for the checkpoints that compute its calls again."""

import copy
import pickle

import torch

from batchnorm.layers.recent import Recent


def filled(*signs):
    """Return a memory of calls with these signs, which are numbered."""
    recent = Recent()
    for at, sign in enumerate(signs):
        recent.add(sign, at)
    return recent


def test_a_call_is_found_by_its_sign_as_often_as_is_asked():
    signs = [*torch.randn(3, 4), torch.randn(4, 1), torch.randn(4).double()]
    recent = filled(*signs)
    for at in (1, 4, 0, 3, 2, 1, 1):
        assert recent.find(signs[at]) == at
    assert recent.find(torch.randn(4)) is None


def test_of_equal_calls_the_last_comes_first_and_round_again():
    one, other = torch.ones(4), torch.zeros(4)
    recent = filled(one, other, one, one)
    assert [recent.find(one) for _ in range(6)] == [3, 2, 0, 3, 2, 0]


def test_what_is_not_finite_is_equal_to_itself():
    sign = torch.tensor([torch.nan, torch.inf, 1.0])
    assert filled(sign, sign.nan_to_num()).find(sign) == 0


def test_a_sign_is_what_it_was():
    sign = torch.ones(4, requires_grad=True)
    recent = filled(sign)
    with torch.no_grad():
        sign.zero_()
    assert recent.find(torch.ones(4)) == 0


def test_only_so_many_are_kept():
    signs = torch.randn(Recent.size + 1, 4)
    recent = filled(*signs)
    assert len(recent) == Recent.size
    assert recent.find(signs[0]) is None
    assert recent.find(signs[1]) == 1


def test_a_copy_is_empty():
    recent = filled(torch.ones(4))
    for twin in (copy.copy(recent), copy.deepcopy(recent), pickle.loads(pickle.dumps(recent))):
        assert len(twin) == 0
    assert len(recent) == 1
