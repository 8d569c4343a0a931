import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LAYOUTS, as_numpy, assert_close, make, weights_of

from batchnorm import Moments, reference
from batchnorm.positions import Groups

batches = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.randn(
        24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
)


def assert_same(a, b, rtol=1e-11):
    assert float(a.count) == float(b.count)
    torch.testing.assert_close(a.mean, b.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(a.m2, b.m2, rtol=rtol, atol=rtol)


@settings(deadline=None, max_examples=50)
@given(x=batches, cuts=st.lists(st.integers(0, 24), max_size=6), offset=st.floats(-1e6, 1e6))
def test_any_split_of_a_data_set_has_the_same_moments(x, cuts, offset):
    x = x + offset
    edges = [0, *sorted(cuts), 24]
    parts = [Moments.of(x[a:b]) for a, b in itertools.pairwise(edges)]
    whole = Moments.of(x)
    merged = Moments.sum(parts)
    assert merged.count == 24
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-14, atol=1e-13)
    # The rounding of the data around its offset is all that may differ.
    torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-9, atol=1e-9 + 1e-15 * offset**2)


@settings(deadline=None, max_examples=30)
@given(a=batches, b=batches, c=batches, cut=st.integers(0, 24))
def test_merge_is_associative_and_commutative(a, b, c, cut):
    a, b, c = Moments.of(a), Moments.of(b[:cut]), Moments.of(c)
    assert_same((a + b) + c, a + (b + c))
    assert_same(a + b, b + a)


def test_none_is_the_identity_bit_for_bit():
    x = Moments.of(torch.randn(5, 3) * 1e30)
    for merged in (x + Moments.none(3), Moments.none(3) + x):
        assert merged.count == x.count
        assert torch.equal(merged.mean, x.mean)
        assert torch.equal(merged.m2, x.m2)


def test_one_data_set_split_into_growing_batches_has_one_answer():
    data = torch.randn(127, 4) * 3 + 100
    parts = data.split([1, 2, 4, 8, 16, 32, 64])
    expected = reference.moments(data.numpy())
    merged = Moments.sum(map(Moments.of, parts))
    assert_close(merged.mean, expected.mean, torch.float32)
    assert_close(merged.m2, expected.m2, torch.float32)


@pytest.mark.parametrize("mean", [0.0, 1e1, 1e3, 1e5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_no_digits(mean, channels_last):
    x = torch.randn(16, 8, 40, 40) + mean
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found, expected = Moments.of(x), reference.moments(x.double().numpy())
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-11, atol=1e-7)
    np.testing.assert_allclose(found.var(), expected.var(), rtol=1e-6)


def test_known_moments_of_pairs_around_an_exact_mean():
    mean = torch.tensor([-3.0, 0.5, 1024.0])
    spread = torch.rand(500, 3).mul(256).round() / 256
    x = torch.cat([mean + spread, mean - spread])
    found = Moments.of(x[torch.randperm(1000)])
    assert torch.equal(found.mean, mean.double())
    torch.testing.assert_close(found.m2, 2 * spread.double().square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_a_wide_type(dtype):
    x = (torch.randn(70000, 2) + 3).to(dtype)  # more values than float16 can count
    expected = reference.moments(x.double().numpy())
    found = Moments.of(x)
    assert found.mean.dtype == torch.float64
    assert_close(found.mean, expected.mean, torch.float32)
    assert_close(found.m2, expected.m2, torch.float32)


def test_the_variance_is_never_negative():
    x = torch.full((1000, 1), 0.1) + torch.tensor([[1e4]])
    assert Moments.of(x).m2 == 0
    assert Moments.none(2).var().tolist() == [0, 0]
    assert Moments.of(torch.ones(1, 2)).var(correction=1).tolist() == [0, 0]


def test_weights_are_repetitions():
    x, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    found = Moments.of(x, weights=weights[:, None])
    repeated = Moments.of(x.repeat_interleave(weights, dim=0))
    assert_same(found, repeated, rtol=1e-6)
    x[0], x[4] = torch.nan, torch.inf
    assert_same(found, Moments.of(x, weights=weights[:, None]), rtol=1e-6)


def test_weights_all_zero_are_no_values():
    found = Moments.of(torch.full((3, 2), torch.nan), weights=torch.zeros(3, 1))
    assert_same(found + Moments.of(torch.ones(2, 2)), Moments.of(torch.ones(2, 2)))
    assert found.inverse_std(1e-5).tolist() == [0, 0]


def test_gradients_flow_through_a_merge():
    def loss(a, b):
        merged = Moments.of(a) + Moments.of(b)
        return merged.mean, merged.m2

    a, b = (torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(loss, (a, b))
    assert torch.autograd.gradgradcheck(loss, (a, b))


def test_moments_go_through_torch_func():
    x = torch.randn(5, 8, 3)
    found = torch.func.vmap(lambda part: Moments.of(part).var())(x)
    torch.testing.assert_close(found, x.double().var(dim=1, correction=0), rtol=1e-5, atol=1e-6)


def test_repr_says_what_it_is():
    assert repr(Moments.of(torch.ones(8, 3, 5))) == "Moments(count=40, channels=3)"


class TestGroups:
    """Moments of groups of consecutive examples, held to the reference group by group."""

    @given(
        shape=st.lists(st.integers(0, 9), min_size=2, max_size=4).map(tuple),
        channel_dim=st.integers(-4, 3),
        size=st.integers(1, 12),
    )
    def test_are_cut_as_in_the_reference(self, shape, channel_dim, size):
        channel_dim %= len(shape)
        groups = Groups.of(shape, channel_dim, size)
        lengths = groups.lengths()
        assert lengths == reference.groups(shape, channel_dim, size)
        examples = shape[0 if channel_dim else 1]
        assert (sum(lengths), min(lengths)) == (examples, groups.shortest)
        places = math.prod(shape) // max(1, examples * shape[channel_dim])
        # but for a batch of one value, and groups of one by request, none is without a variance
        assert min(lengths) * places != 1 or examples * places == 1 or size * places == 1

    def test_there_are_none_where_nothing_is_cut(self):
        assert Groups.of((8, 3), 1, None) is None
        assert Groups.of((8,), 0, 4) is None

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("size", [1, 2, 3, 100])
    def test_moments_equal_the_reference(self, layout, masked, size):
        shape, channel_dim, memory_format = LAYOUTS[layout]
        x, *_ = make(shape, channel_dim, memory_format, torch.float64)
        weights = weights_of(shape, channel_dim) if masked else None
        shaped = None if weights is None else weights.unsqueeze(channel_dim)
        found = Moments.of(x, channel_dim=channel_dim, weights=shaped, ghost_size=size)
        whole = reference.moments(as_numpy(x), channel_dim, weights)
        start, count = 0, 0.0
        for at, length in enumerate(reference.groups(shape, channel_dim, size)):
            part = x.narrow(0 if channel_dim else 1, start, length)
            share = None if weights is None else weights[start : start + length]
            expected = reference.moments(as_numpy(part), channel_dim, share)
            assert found.count[at].item() == expected.count
            assert_close(found.mean[at], expected.mean, torch.float64)
            assert_close(found.m2[at], expected.m2, torch.float64, "sum")
            start, count = start + length, count + expected.count
        merged = found.merged()
        assert (merged.mean.shape, merged.m2.shape) == (whole.mean.shape, whole.m2.shape)
        assert merged.count.item() == count == whole.count
        assert_close(merged.mean, whole.mean, torch.float64)
        assert_close(merged.m2, whole.m2, torch.float64, "sum")

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (1, 3), (4, 3, 0)])
    def test_a_batch_of_no_values_or_one_is_one_group(self, shape):
        found = Moments.of(torch.ones(shape), ghost_size=4)
        assert found.count.tolist() == [[shape[0] if len(shape) == 2 else 0]]
        merged = found.merged() + Moments.of(torch.full((2, 3), 5.0))
        assert merged.count == 2 + found.count
        assert merged.mean.isfinite().all()

    def test_merging_keeps_the_digits_of_a_large_mean(self):
        x = torch.randn(40, 3, 11) + 1e6
        merged, whole = Moments.of(x, ghost_size=7).merged(), Moments.of(x.double())
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(merged.m2, whole.m2, rtol=1e-6, atol=0)

    def test_one_group_is_merged_already(self):
        moments = Moments.of(torch.randn(8, 3))
        assert moments.merged() is moments
        rows = Moments(
            8, torch.randn(3, 2).double(), torch.rand(3, 2).double()
        )  # one count for all
        each = [Moments(8, mean, m2) for mean, m2 in zip(rows.mean, rows.m2, strict=True)]
        assert_same(rows.merged(), Moments.sum(each))

    def test_repr_says_how_many(self):
        found = Moments.of(torch.ones(9, 3), ghost_size=4)
        assert repr(found) == "Moments(count=9, channels=3, groups=2)"

    def test_gradients_flow_through_groups_and_their_merge(self):
        def loss(x, weights=None):
            found = Moments.of(x, weights=weights, ghost_size=3)
            merged = found.merged()
            return found.mean, found.inverse_std(0.1), merged.mean, merged.m2

        x = torch.randn(7, 2, 2, dtype=torch.float64, requires_grad=True)
        weights = torch.randint(0, 3, (7, 1, 2))
        for arguments in ((x,), (x, weights)):
            assert torch.autograd.gradcheck(loss, arguments, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(loss, arguments)

    def test_groups_go_through_torch_func(self):
        x = torch.randn(5, 8, 3)
        found = torch.func.vmap(lambda part: Moments.of(part, ghost_size=3).var())(x)
        expected = torch.stack([Moments.of(part, ghost_size=3).var() for part in x])
        torch.testing.assert_close(found, expected)


def test_a_group_of_no_values_is_not_there_whatever_it_holds():
    count = torch.tensor([[0.0], [5]], dtype=torch.float64)
    mean, m2 = (
        torch.tensor([[torch.nan], [2.0]]).double(),
        torch.tensor([[torch.inf], [3.0]]).double(),
    )
    merged = Moments(count, mean, m2).merged()
    assert (float(merged.count), merged.mean.item(), merged.m2.item()) == (5, 2, 3)
