"""``python -m benchmarks``: list, run and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks.harness import report as reporting
from benchmarks.harness.client import ContenderFailed
from benchmarks.harness.machine import find_gpu
from benchmarks.harness.registry import entries, load, select
from benchmarks.harness.results import RESULTS, Result, TimingResult, load_all, save_result
from benchmarks.harness.runner import run_entry
from benchmarks.harness.spec import Unavailable

_ROOT = Path(__file__).resolve().parents[1]
app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, highlight=False)


def _say(line: str, style: str = "") -> None:
    console.print(escape(line), style=style or None)


@app.command("list")
def list_() -> None:
    """List the benchmarks with the question each answers."""
    for name in entries():
        _say(f"{name}: {load(name).question}")


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help="families or family/name")] = None,
    quick: Annotated[bool, typer.Option(help="smallest workload, few rounds, not stored")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="on the GPU, wall time")] = False,
    allow_missing: Annotated[bool, typer.Option(help="exit 0 where there is no GPU")] = False,
    results: Annotated[Path | None, typer.Option(help="folder of the result files")] = None,
) -> None:
    """Run benchmarks one after another and store their results.

    The exit status is 1 where results disagree or a contender failed; a missed goal is only shown.
    """
    try:
        chosen = select(names or [])
    except KeyError as error:
        raise typer.BadParameter(error.args[0]) from error
    card = find_gpu() if gpu else None
    if gpu and card is None:
        _say("no GPU: PyTorch finds no CUDA device here, so nothing was run")
        raise typer.Exit(0 if allow_missing else 2)
    folder = results or (None if quick else RESULTS)
    failed = False
    for name in chosen:
        try:
            result = run_entry(
                name, device="cuda" if gpu else "cpu", quick=quick, gpu=card, say=_say
            )
        except Unavailable as reason:
            _say(f"{name}: skipped, {reason}", "yellow")
            continue
        except ContenderFailed as reason:
            _say(f"{name}: failed, {reason}", "red")
            failed = True
            continue
        failed |= _show(result)
        if folder is not None:
            save_result(result, folder)
    raise typer.Exit(int(failed))


def _show(result: Result) -> bool:
    """Print one result; return whether something in it went wrong."""
    wrong = False
    if isinstance(result, TimingResult):
        for pair in result.pairs:
            wrong |= bool(pair.problem) and "environment missing" not in pair.problem
            found = pair.problem or f"{pair.median:.3g} [{pair.q25:.3g}, {pair.q75:.3g}]"
            goal = f", goal {pair.bound:g}: " if pair.bound is not None else ""
            goal += reporting.verdict(pair.met, pair.decisive) if goal else ""
            size = ", ".join(f"{key} = {value}" for key, value in pair.workload.items())
            _say(f"  {size} {pair.ours} / {pair.peer}: {found}{goal}")
        return wrong
    for value in result.values:
        beside = "" if value.reference is None else f", reference {value.reference:.4g}"
        _say(f"  {value.name}: {value.value:.4g}{beside}: {reporting.verdict(value.met)}")
    return False


@app.command()
def report(
    check: Annotated[bool, typer.Option(help="change nothing; exit 1 where files differ")] = False,
    results: Annotated[Path, typer.Option(help="folder of the result files")] = RESULTS,
    page: Annotated[Path, typer.Option(help="page to write")] = _ROOT / "docs/benchmarks.md",
    readme: Annotated[Path, typer.Option(help="file with the markers")] = _ROOT / "README.md",
) -> None:
    """Write docs/benchmarks.md and the README table from the stored results."""
    found = load_all(results)
    try:
        texts = {
            page: reporting.page(found),
            readme: reporting.put_table(
                readme.read_text(encoding="utf-8"), reporting.readme_table(found)
            ),
        }
    except (OSError, ValueError) as error:
        _say(f"{readme.name}: {error}", "red")
        raise typer.Exit(1) from error
    stale = [
        path
        for path, text in texts.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if check:
            _say(f"{path.name} is not what the result files generate: python -m benchmarks report")
        else:
            path.write_text(texts[path], encoding="utf-8")
            _say(f"wrote {path.name}")
    raise typer.Exit(int(check and bool(stale)))


if __name__ == "__main__":
    app()
