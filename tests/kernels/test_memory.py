import torch

from batchnorm.kernels.memory import is_same_view, may_overlap


def test_the_same_values_at_the_same_places():
    x = torch.randn(4, 6)
    assert is_same_view(x, x)
    assert is_same_view(x, x.view(4, 6))
    for other in (x.clone(), x[:3], x.view(6, 4), x[:, :4].T, x.view(torch.int32)):
        assert not is_same_view(x, other)


def test_spans_that_overlap():
    x = torch.randn(4, 6)
    for other in (x, x[3], x.view(torch.int32), x[:, 5], x[:, ::2]):
        assert may_overlap(x, other)
        assert may_overlap(other, x)
    for one, other in ((x[:2], x[2:]), (x, x.clone()), (x[:0], x), (x, x[1:1])):
        assert not may_overlap(one, other)
