"""There is a picture, whatever was measured."""

import io

import pytest
from bench.small import made_up, rows_of, small_case

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

from batchnorm.bench.picture import png  # noqa: E402


@pytest.mark.parametrize("mode", ["forward+backward", "inference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture(mode, dtype):
    case = small_case(mode=mode, dtype=dtype)
    drawn = image.open(io.BytesIO(png(rows_of(made_up(case, torch=1.0, native=0.5, jax=0.7)))))
    assert drawn.format == "PNG"
    assert min(drawn.size) > 300


def test_torch_alone_can_be_drawn():
    assert png(rows_of(made_up(small_case(), torch=1.0)))
