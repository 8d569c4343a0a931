"""Tables that fit: 80 columns, one line a shape and layout."""

import io

from bench.small import made_up, rows_of, small_case
from rich.console import Console

from batchnorm.bench.cases import FUSIONS, MODES, RELU, SHAPES, Wanted, plan
from batchnorm.bench.tables import markdown, terminal

PEERS = {"eager": "eager", "compile": "compile", "jax": "jax"}


def everything(wanted=Wanted(), cores=16, seconds=1.234):  # noqa: B008
    """Rows of the whole plan, with all the peers, and long numbers."""
    return rows_of(
        *(
            made_up(
                case,
                torch=seconds,
                native=seconds / 123.4,
                **dict.fromkeys(case.peers, seconds * 12.3),
            )
            for case in plan(wanted, cores)
        )
    )


def shown(rows, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(terminal(rows))
    return console.file.getvalue().splitlines()


def test_it_fits_80_columns_with_one_line_a_shape_and_layout():
    lines = shown(everything())
    assert max(map(len, lines)) <= 80
    for shape in SHAPES:
        of_shape = [line for line in lines if line.strip().startswith("x".join(map(str, shape)))]
        per_table = 2 if len(shape) == 4 else 1
        assert len(of_shape) % per_table == 0
        assert len(of_shape) >= per_table * len(MODES) * 2  # types
    assert "…" not in "".join(lines)
    first = next(line for line in lines if "32x64x112x112 NHWC" in line and "0.08" in line)
    assert first.split() == [
        *("32x64x112x112", "NHWC", "103", "1234", "123", "123", "123", "0.08", "0.08", "0.08"),
        "822%",
    ]


def test_a_wider_terminal_shows_the_same():
    lines = {line.strip() for line in shown(everything(), 80) if " NHWC " in line}
    assert lines == {line.strip() for line in shown(everything(), 200) if " NHWC " in line}


def test_columns_without_values_are_left_out():
    lines = shown(everything(Wanted.parse("8x4", "bfloat16", "inference", "1")))
    assert lines[0].strip() == "inference, bfloat16, 1 thread"
    assert lines[2].split() == ["shape", "layout", "MB", "ms", "plain", "relu", "res.", "floor"]
    only = rows_of(made_up(small_case(fusion=FUSIONS[0]), torch=1.0))
    assert shown(only)[2].split() == ["shape", "layout", "MB", "ms"]


def test_markdown_has_the_main_cases_on_all_threads_and_the_figures():
    text = markdown(everything())
    table, figures = text.split("\n\n")
    header, rule, *lines = table.splitlines()
    assert header == (
        "| shape | layout | MB | `torch.nn`, ms | `native` | `eager` | `torch.compile` | `jax` "
        "| of the floor |"
    )
    assert rule.count("|") == header.count("|")
    assert len(lines) == 16
    assert lines[0] == (
        "| 32x64x112x112 | NCHW | 103 | 1234 | 123x | 0.08x | 0.08x | 0.08x | 514% |"
    )
    assert (
        "| times the speed of `torch.nn`, over 16 MB | 123.4x | 5x | 8x |" in figures.splitlines()
    )
    assert {line.count("|") for line in figures.splitlines()} == {5}


def test_markdown_of_something_else_has_the_figures_alone():
    text = markdown(rows_of(made_up(small_case(mode="forward", fusion=RELU), torch=1, native=2)))
    assert "slowest of all 1 cases" in text
