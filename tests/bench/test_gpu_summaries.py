"""What the rows of a GPU come to: the figures, the tables, the picture."""

import pytest
from bench.small_gpu import MODELS, ROWS, case_of, made_up

from benchmarks.gpu.cases import COUNTS
from benchmarks.gpu.figures import figures
from benchmarks.gpu.picture import png
from benchmarks.gpu.rows import CALL, GRAPH
from benchmarks.gpu.tables import markdown


class TestSummaries:
    def test_every_figure(self):
        found = {figure.name: figure.values for figure in figures(ROWS, MODELS)}
        counted = COUNTS[256, 14, 14], COUNTS[64, 112, 112]
        mean = (4 ** counted[0] * 2 ** counted[1]) ** (1 / sum(counted))
        assert found == {
            "share of the speed of a large copy, BN + add + ReLU": {
                "NCHW": "2.00 (1 of 53 layers)"
            },
            "times the speed of `torch.nn`, BN + ReLU": {
                "NHWC": f"{mean:.2f}x ({sum(counted)} of 53 layers)"
            },
            "times the speed of `torch.compile`, BN + ReLU": {
                "NHWC": f"2.00x ({counted[0]} of 53 layers)"
            },
            "training step of ResNet-50, accelerated, times the speed of the model as it is": {
                "NHWC": "1.30x"
            },
            "peak memory of that with `save_memory`, of the model's as it is": {"NHWC": "0.65"},
        }

    def test_whole_means_do_not_say_of_how_many(self):
        times = {("torch.nn", CALL): 3.0, ("batchnorm", CALL): 1.0}
        whole = [row for shape in COUNTS for row in made_up(times, case_of(shape=(2, *shape)))]
        (figure,) = figures(whole, [])
        assert figure[1:] == ("2x", "3x", {"NHWC": "3.00x"})

    def test_a_row_counts_passes_and_compares_with_the_same_launch(self):
        stock, own, other, graph = made_up(
            {
                ("torch.nn", CALL): 4.0,
                ("batchnorm", CALL): 2.0,
                ("torch.nn", GRAPH): 1.5,
                ("batchnorm", GRAPH): 0.5,
            }
        )
        assert (own.ratio, graph.ratio, stock.ratio, other.ratio) == (2, 3, 1, 1)
        assert own.layers == 11
        assert own.of_floor == pytest.approx(8 * own.mb * 1e6 / 1e9 / 2, rel=1e-3)
        assert own.of_once == pytest.approx(5 * own.mb * 1e6 / 1e9 / 2, rel=1e-3)
        (alone,) = made_up({("batchnorm", GRAPH): 1.0})
        assert alone.ratio is None

    def test_the_tables_and_the_picture(self):
        made_on = {"gpu": "A GPU", "cuda": "13.0", "torch": "2", "triton": "3", "jax": "none"}
        lines = markdown(made_on, ROWS, MODELS, "a.png").splitlines()
        assert lines[0].startswith("**A GPU**, driver unknown, CUDA 13.0")
        assert "| 2x64x112x112 | 1 | NHWC | 2000000 | 2.00x |  | 3% | 5% |  |  |" in lines
        assert "| accelerate | 100.0 | 1.30x | 20.0 | 1.00 | 2e-03 |" in lines
        assert png(ROWS).startswith(b"\x89PNG")
        assert markdown(made_on, [], MODELS, "").count("ResNet-50, NHWC, 256 images") == 1
