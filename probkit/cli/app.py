"""Commands and their options; what they do lives elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probkit._version import __version__
from probkit.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from probkit.demo import DemoView, Outcome, Registry

__all__ = ["app", "main"]

app = typer.Typer(
    name="probkit",
    help="Bayesian-first modelling on PyTorch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="probkit")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _version(asked: bool) -> None:
    if asked:
        _console().print(f"probkit {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def families(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """List the families and their demo views."""
    if context.invoked_subcommand is None:
        _list(_registry())


@app.command()
def info() -> None:
    """Print versions and devices, for a bug report."""
    from rich.table import Table

    from probkit.info import environment

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in environment().items():
        table.add_row(name, value)
    _console().print(table)


@app.command()
def demo(
    family: Annotated[
        list[str] | None, typer.Argument(help="Families to run; all of them by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The long form of each view.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("demo"),
    list_: Annotated[bool, typer.Option("--list", help="List the views and stop.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed for everything random.")] = 0,
) -> None:
    """Run families on real data and write one report with pictures."""
    registry = _registry()
    try:
        views = registry.select(family or [])
    except DataError as error:
        raise typer.BadParameter(str(error), param_hint="FAMILY") from None
    if list_:
        _list(registry, views)
        return
    if not views:
        _console().print("There is no view yet: families add them in a module named <family>_demo.")
        raise typer.Exit(1)
    raise typer.Exit(_run(views, out, full=full, seed=seed))


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="What to install: smollm2.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Install the weights of a language model, and check them."""
    from probkit.cli.fetch import FETCHED, install, installed, promise

    if name not in FETCHED:
        expected = ", ".join(FETCHED)
        raise typer.BadParameter(f"expected one of {expected}, got {name!r}", param_hint="NAME")
    weights = FETCHED[name]()
    console = _console()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    path = installed(weights)
    if path is not None:
        say(f"{weights.title} is installed and intact: {path}")
        return
    say(promise(weights))
    if not yes and not typer.confirm("Install it?"):
        raise typer.Exit(1)
    try:
        say(f"{weights.title} is installed, its sha256 is right: {install(weights)}")
    except DataError as error:
        say(str(error))
        raise typer.Exit(1) from None


def _registry() -> Registry:
    from probkit.demo import discover

    return discover()


def _list(registry: Registry, views: list[DemoView] | None = None) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("family", "view", "run with"):
        table.add_column(column)
    last = None
    for view in registry if views is None else views:
        first = view.family != last
        command = f"probkit demo {view.family}" if first else ""
        table.add_row(view.family if first else "", view.title, command)
        last = view.family
    console = _console()
    if table.row_count:
        console.print(table)
    else:
        console.print("No family has a demo view.")


def _run(views: list[DemoView], out: Path, *, full: bool, seed: int) -> int:
    """Run the views, say how each went, write the report; return the exit status.

    An interruption ends the run, and the report holds the views that were through by then.
    """
    from rich.markup import escape

    from probkit.demo import run_views, write_report

    console = _console()
    outcomes: list[Outcome] = []
    status = 0

    def start(view: DemoView) -> None:
        console.print(f"[bold]{escape(view.family)}[/bold]  {escape(view.title)} ...", end="")

    def end(outcome: Outcome) -> None:
        nonlocal status
        outcomes.append(outcome)
        remark = ""
        if outcome.over_budget:
            remark += f"  [yellow]over its budget of {outcome.budget:.0f} s[/yellow]"
        if outcome.error is not None:
            status = 1
            remark += f"  [red]failed: {escape(outcome.error.splitlines()[-1])}[/red]"
        console.print(f" {outcome.seconds:.1f} s{remark}", soft_wrap=True)

    try:
        run_views(views, out, full=full, rng_seed=seed, on_start=start, on_end=end)
    except KeyboardInterrupt:
        console.print("  interrupted")
        status = 130
    page = write_report(outcomes, out, full=full, rng_seed=seed)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)
    return status
