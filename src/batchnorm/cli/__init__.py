"""The command line: verbs, exit statuses, progress; what they do is done elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from batchnorm.bench.cases import DTYPES, MODES, PEERS, Wanted
from batchnorm.cli.ending import end_for_want_of, ended_in_one_line
from batchnorm.environment import describe
from batchnorm.kernels import backends


def _show_environment() -> None:
    for name, value in describe().items():
        print(f"{name:<12} {value}")
    for backend in backends():
        reason = backend.available()
        print(f"{'kernels':<12} {backend.name}: {'ready' if reason is None else reason}")


try:
    import typer
    from rich.console import Console

    from batchnorm.cli.check import check
    from batchnorm.cli.models import calibrate, fold, memory
    from batchnorm.cli.shift import adapt, shift
except ModuleNotFoundError as error:
    if sys.argv[1:] == ["env"]:  # which needs nothing but the package
        _show_environment()
        sys.exit()
    end_for_want_of(error)

app = typer.Typer(
    help="Batch normalization for PyTorch: what it does, how fast, and the models that have it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # in which the lines of a paragraph are one
)


study = typer.Typer(help="Measure what is claimed of batch normalization.", no_args_is_help=False)
app.add_typer(study, name="study")


@study.callback(invoke_without_command=True)
def conduct_study(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist:DIR, fashion-mnist:DIR, cifar10:DIR, cifar100:DIR, npz:FILE, "
            "csv:FILE, images:DIR, or a form of an extension's."
        ),
    ] = "digits",
    claims: Annotated[str, typer.Option(help="Numbers or names, as 3,7; by default all.")] = "",
    budget: Annotated[
        str, typer.Option(help="The time it may take: 90s, 3m, 30m, 2h, or full for all.")
    ] = "3m",
    paper: Annotated[
        bool,
        typer.Option(
            "--paper", help="Repeat figure 1 of the original paper instead, whatever the budget."
        ),
    ] = False,
    extend: Annotated[
        list[str] | None,
        typer.Option(help="A Python file or module with networks, data or claims of your own."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default one on each core.")
    ] = None,
    engine: Annotated[str, typer.Option(help="joblib, dask or ray.")] = "joblib",
    address: Annotated[
        str | None, typer.Option(help="Of Dask's scheduler or Ray's head, for a cluster.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files, to watch the runs.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder of outcomes and report.")] = Path("study"),
) -> None:
    """Train networks with and without batch normalization, and see what it does.

    Killed and started again, a study goes on where it was.
    """
    if context.invoked_subcommand:
        return
    kept = "what is finished is kept: run the same command again to go on"
    with ended_in_one_line("study", kept):
        from batchnorm.study.conduct import Wanted, conduct

        wanted = Wanted(
            data, claims, budget, paper, extend or (), jobs, engine, address, tensorboard
        )
        conduct(wanted, out, console=Console())


@study.command("compare")
def compare_studies(
    first: Annotated[Path, typer.Argument(help="The folder of a study.")],
    second: Annotated[Path, typer.Argument(help="The folder of another one.")],
    out: Annotated[
        Path, typer.Option(help="The page with the pictures of both, side by side.")
    ] = Path("compare.html"),
) -> None:
    """Show two studies side by side."""
    with ended_in_one_line("study", "nothing is written"):
        from batchnorm.study.compare import compare

        compare(first, second, out, console=Console())


@study.command("shifts")
def study_shifts(
    data: Annotated[
        str, typer.Option(help="As for batchnorm study: digits, cifar10:DIR, npz:FILE ...")
    ] = "digits",
    network: Annotated[str, typer.Option(help="A network of the study.")] = "conv",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default one on each core.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of outcomes, table and picture.")] = Path(
        "study"
    ),
) -> None:
    """Shift the inputs of trained networks: what flags it, and what adapting and retraining win.

    Six shifts in five severities, each with the score of the shift, the accuracy of the network as
    it is, adapted without labels, and trained anew on shifted examples. Killed and started again,
    it goes on where it was.
    """
    kept = "what is finished is kept: run the same command again to go on"
    with ended_in_one_line("study", kept):
        from batchnorm.study.retraining import conduct

        console = Console()
        table = conduct(data, network, out, jobs=jobs, console=console)
        console.print(table, markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="A first impression, within a minute.")
    ] = False,
    shapes: Annotated[
        str | None, typer.Option(help="Examples x channels x ..., as 32x64x112x112,256x1024.")
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.")] = None,
    modes: Annotated[str | None, typer.Option(help=f"{', '.join(MODES)}.")] = None,
    threads: Annotated[str | None, typer.Option(help="How many: numbers, or all.")] = None,
    peers: Annotated[
        str | None, typer.Option(help=f"{', '.join(PEERS)}; the first is always there.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="How long each case is timed, at least 5 rounds.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of table and picture.")] = Path("bench"),
) -> None:
    """Time the layer beside its peers, once all have given the right result.

    Lists are written with commas. What is not given is chosen so that a run takes minutes: the
    peers other than torch.nn are timed for BN + ReLU, forward and backward, unless both modes and
    peers are given.
    """
    with ended_in_one_line("bench", "nothing is written"):
        from batchnorm.bench.conduct import conduct

        wanted = Wanted.parse(shapes, dtypes, modes, threads, peers, quick)
        conduct(wanted, out, console=Console(), seconds=seconds)


app.command()(fold)
app.command()(calibrate)
app.command()(memory)
app.command()(check)
app.command()(shift)
app.command()(adapt)


@app.command()
def env() -> None:
    """Show the versions, the hardware, and the kernels that can serve here."""
    _show_environment()


def main() -> None:
    """Run the command line."""
    app()
