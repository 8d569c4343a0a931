import subprocess
import sys

import numpy as np
import pytest

from batchnorm import reference

ACTIVATIONS = (None, *reference.ACTIVATIONS)


def test_worked_example_of_six_values_comes_out_exactly():
    x = np.array([[3.0], [5], [8], [9], [11], [24]])
    found = reference.moments(x)
    assert found.mean == 10
    assert found.var() == 46
    expected = [-1.03, -0.74, -0.29, -0.15, 0.15, 2.06]
    assert reference.forward(x).ravel().round(2).tolist() == expected


@pytest.mark.parametrize("factor", [1, 100])
def test_worked_example_of_two_scales_comes_out_the_same(factor):
    gamma, beta = np.array([0.7]), np.array([-0.3])
    x = factor * np.array([[2.0], [0], [2], [4]])
    expected = [-0.3, -0.3 - np.sqrt(2) * 0.7, -0.3, -0.3 + np.sqrt(2) * 0.7]
    y = reference.forward(x, gamma, beta, eps=0)
    np.testing.assert_allclose(y.ravel(), expected, rtol=1e-15)


def test_gamma_and_beta_can_make_the_layer_the_identity():
    x = np.random.default_rng(0).normal(3, 2, (50, 4))
    found = reference.moments(x)
    y = reference.forward(x, np.sqrt(found.var() + 1e-5), found.mean)
    np.testing.assert_allclose(y, x, rtol=1e-13)


def test_convolutional_is_dense_with_pixels_for_examples():
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 6))
    rows = x.transpose(0, 2, 3, 1).reshape(-1, 4)
    y = reference.forward(rows).reshape(3, 5, 6, 4).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(reference.forward(x), y)
    np.testing.assert_array_equal(reference.forward(x.transpose(1, 0, 2, 3), axis=0)[0], y[:, 0])


def test_the_two_places_of_eps_differ_as_written():
    x = np.array([[1.0], [3.0]])  # mean 2, deviation 1
    assert reference.forward(x, eps=0.21)[1, 0] == pytest.approx(1 / 1.1)
    assert reference.forward(x, eps=0.21, eps_placement="deviation")[1, 0] == pytest.approx(
        1 / 1.21
    )
    with pytest.raises(ValueError, match="expected 'variance' or 'deviation'"):
        reference.forward(x, eps_placement="nowhere")


def test_correction_divides_by_one_less():
    x = np.array([[1.0], [3.0]])
    assert reference.moments(x).var(correction=1) == 2
    assert reference.forward(x, eps=0, correction=1)[1, 0] == pytest.approx(1 / np.sqrt(2))


def test_weights_are_repetitions_and_zeros_are_absent():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(6, 3)), np.array([0, 1, 2, 3, 0, 1])
    found, repeated = (
        reference.moments(x, weights=weights),
        reference.moments(x.repeat(weights, axis=0)),
    )
    assert found.count == repeated.count
    np.testing.assert_allclose(found.mean, repeated.mean, rtol=1e-14)
    np.testing.assert_allclose(found.m2, repeated.m2, rtol=1e-14)
    x[0], x[4] = np.nan, np.inf
    np.testing.assert_array_equal(reference.moments(x, weights=weights).mean, found.mean)
    assert np.isfinite(reference.forward(x, weights=weights)).all()


def test_merge_equals_the_moments_of_the_whole():
    x = np.random.default_rng(0).normal(1e6, 1, (40, 3))
    whole = reference.moments(x)
    for split in (0, 1, 17, 40):
        merged = reference.merge(reference.moments(x[:split]), reference.moments(x[split:]))
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-15)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)


def test_running_update_in_both_conventions():
    found = reference.moments(np.array([[1.0], [3.0]]))
    torch_like = reference.update((np.array([1.0]), np.array([1.0])), found, 0.1)
    assert torch_like == (pytest.approx([1.1]), pytest.approx([1.1]))
    keras_like = reference.update((np.array([1.0]), np.array([1.0])), found, 0.9, "keras")
    np.testing.assert_allclose(torch_like, keras_like)


@pytest.mark.parametrize("batch", [np.zeros((0, 2)), np.ones((1, 2)), np.full((3, 2), np.nan)])
def test_a_batch_without_finite_variance_updates_nothing(batch):
    before = (np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    np.testing.assert_array_equal(reference.update(before, reference.moments(batch)), before)


def test_a_fully_masked_batch_is_beta_with_zero_gradient():
    x, gamma, beta = np.ones((3, 2)), np.array([2.0, 3.0]), np.array([0.5, -0.5])
    weights = np.zeros(3)
    np.testing.assert_array_equal(
        reference.forward(x, gamma, beta, weights=weights), [[0.5, -0.5]] * 3
    )
    assert not reference.backward(np.ones((3, 2)), x, gamma, beta, weights=weights).x.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("eps_placement", ["variance", "deviation"])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("running", [False, True])
def test_backward_is_the_derivative_of_forward(
    activation, eps_placement, correction, weighted, running
):
    rng = np.random.default_rng(0)
    x, residual, dy = (rng.normal(size=(3, 2, 4)) for _ in range(3))
    gamma, beta = rng.normal(size=2), rng.normal(size=2)
    options = {
        "eps": 0.01,
        "eps_placement": eps_placement,
        "correction": correction,
        "activation": activation,
        "weights": rng.integers(0, 3, (3, 4)) if weighted else None,
        "running": (rng.normal(size=2), rng.uniform(size=2)) if running else None,
    }
    gradients = reference.backward(dy, x, gamma, beta, residual=residual, **options)
    inputs = [x, gamma, beta, residual]

    def loss(x, gamma, beta, residual):
        return (dy * reference.forward(x, gamma, beta, residual=residual, **options)).sum()

    for which, (values, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        for at in np.ndindex(values.shape):
            step = np.zeros_like(values)
            step[at] = 1e-6
            above, below = list(inputs), list(inputs)
            above[which], below[which] = values + step, values - step
            numeric = (loss(*above) - loss(*below)) / 2e-6
            assert gradient[at] == pytest.approx(numeric, rel=1e-6, abs=1e-7)


def test_the_reference_does_not_import_torch():
    code = (
        "import sys, importlib.util as u; "
        "s = u.spec_from_file_location('reference', sys.argv[1]); m = u.module_from_spec(s); "
        "sys.modules['reference'] = m; s.loader.exec_module(m); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, reference.__file__], check=True)


def test_large_padding_reaches_no_moment_and_no_gradient():
    x, dy = np.random.default_rng(0).normal(size=(2, 6, 3))
    weights = np.array([1, 1, 1, 1, 0, 0])
    expected = reference.backward(dy[:4], x[:4]).x
    x[4:], dy[4:] = 1e200, 0
    assert np.isfinite(reference.moments(x, weights=weights).m2).all()
    np.testing.assert_allclose(reference.backward(dy, x, weights=weights).x[:4], expected)


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="'pytorch': expected 'torch' or 'keras'"):
        reference.update(
            (np.zeros(1), np.ones(1)), reference.moments(np.ones((2, 1))), 0.1, "pytorch"
        )


class TestGhost:
    @pytest.mark.parametrize(
        ("examples", "places", "lengths"),
        [
            (0, 1, [0]),
            (1, 1, [1]),
            (3, 1, [3]),
            (4, 1, [4]),
            (5, 1, [5]),  # one value has no variance
            (5, 2, [4, 1]),
            (6, 1, [4, 2]),
            (9, 1, [4, 5]),
            (9, 0, [4, 4, 1]),
        ],
    )
    def test_groups(self, examples, places, lengths):
        assert reference.groups((examples, 3, places), 1, 4) == lengths
        assert reference.groups((3, examples, places), 0, 4) == lengths
        assert reference.groups((examples, places, 3), -1, 4) == lengths

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_each_group_is_a_batch_of_its_own(self, axis):
        rng = np.random.default_rng(0)
        shape = np.insert([7, 4], axis, 3)
        x, residual, dy = (rng.normal(size=shape) for _ in range(3))
        gamma, beta, weights = rng.normal(size=3), rng.normal(size=3), rng.integers(0, 3, (7, 4))
        options = {"axis": axis, "activation": "gelu", "correction": 1}
        y, dx, dgamma, dbeta, dresidual = (
            reference.forward(
                x, gamma, beta, residual=residual, weights=weights, ghost_size=3, **options
            ),
            *reference.backward(
                dy, x, gamma, beta, residual=residual, weights=weights, ghost_size=3, **options
            ),
        )
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            at = (slice(None), part) if axis == 0 else (part,)
            own = {**options, "residual": residual[at], "weights": weights[part]}
            np.testing.assert_array_equal(y[at], reference.forward(x[at], gamma, beta, **own))
            alone = reference.backward(dy[at], x[at], gamma, beta, **own)
            np.testing.assert_array_equal(dx[at], alone.x)
            np.testing.assert_array_equal(dresidual[at], alone.residual)
            dgamma, dbeta = dgamma - alone.gamma, dbeta - alone.beta
        np.testing.assert_allclose([dgamma, dbeta], 0, atol=1e-13)

    def test_running_moments_do_not_care(self):
        x, running = np.random.default_rng(0).normal(size=(7, 3)), (np.ones(3), np.full(3, 2.0))
        whole = reference.forward(x, running=running)
        np.testing.assert_array_equal(reference.forward(x, running=running, ghost_size=3), whole)


class TestRenorm:
    @pytest.mark.parametrize("limits", [(1, 0), (1.2, 0.1), (3, 5), (1e3, 1e3)])
    @pytest.mark.parametrize("eps_placement", ["variance", "deviation"])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_is_batch_normalization_with_another_scale_and_shift(
        self, limits, eps_placement, weighted
    ):
        rng = np.random.default_rng(0)
        x, dy = rng.normal(size=(2, 6, 3, 4))
        gamma, beta = rng.normal(size=(2, 3))
        options = {
            "weights": rng.integers(0, 3, (6, 4)) if weighted else None,
            "eps": 0.01, "eps_placement": eps_placement, "correction": 1, "activation": "gelu",
        }  # fmt: skip
        running = np.array([0.1, 2, -3]), np.array([0.9, 4, 0.1])
        found = reference.moments(x, weights=options["weights"])
        inverse = reference.Options(**options).inverse_std
        inverses = inverse(found.var(1)), inverse(running[1])
        r, d = reference.renorm(found.mean, inverses[0], (running[0], inverses[1]), limits)
        other = gamma * r, beta + gamma * d
        options |= {"running": running, "renorm": limits}
        y = reference.forward(x, gamma, beta, **options)
        of = reference.backward(dy, x, gamma, beta, **options)
        options |= {"running": None, "renorm": None}
        np.testing.assert_allclose(y, reference.forward(x, *other, **options), rtol=1e-12)
        same = reference.backward(dy, x, *other, **options)
        np.testing.assert_allclose(of.x, same.x, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(of.beta, same.beta, rtol=1e-12)
        np.testing.assert_allclose(of.gamma, r * same.gamma + d * same.beta, rtol=1e-12)

    def test_needs_something_to_correct_towards(self):
        with pytest.raises(ValueError, match="there are none"):
            reference.forward(np.ones((2, 1)), renorm=(3, 5))

    def test_a_batch_without_values_is_beta(self):
        running = np.ones(2), np.ones(2)
        y = reference.forward(
            np.ones((3, 2)), beta=[0.5, -0.5], weights=np.zeros(3), running=running, renorm=(3, 5)
        )
        np.testing.assert_array_equal(y, [[0.5, -0.5]] * 3)
