"""``python -m benchmarks.envs``: list and create the environments of peers."""

from __future__ import annotations

import subprocess

import typer

from benchmarks import envs
from benchmarks.harness.spec import Unavailable

app = typer.Typer(help="Environments of peers that need packages of their own.")


@app.command("list")
def list_() -> None:
    """List the peers and whether their environment is there."""
    for env in envs.known():
        try:
            envs.python_of(env)
            state = "ready"
        except Unavailable:
            state = "not created"
        typer.echo(f"{env}: {state}")


@app.command()
def create(peers: list[str]) -> None:
    """Build the environments of the named peers."""
    for peer in peers:
        try:
            envs.create(peer)
        except (KeyError, subprocess.CalledProcessError) as error:
            typer.echo(str(error.args[0]) if isinstance(error, KeyError) else str(error), err=True)
            raise typer.Exit(1) from error
        typer.echo(f"{peer}: ready")


if __name__ == "__main__":
    app()
