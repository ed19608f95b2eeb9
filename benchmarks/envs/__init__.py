"""Environments of peers that need packages we do not depend on.

``benchmarks/envs/<peer>.txt`` lists exact versions; ``python -m benchmarks.envs create <peer>``
builds the virtual environment ``benchmarks/envs/<peer>``, which git ignores.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.harness.spec import Unavailable

__all__ = ["create", "known", "python_of"]

_HERE = Path(__file__).resolve().parent


def known() -> list[str]:
    """Return the peers that have a requirements file.

    Example:
        >>> "neural_tangents" in known()
        True
    """
    return sorted(path.stem for path in _HERE.glob("*.txt"))


def python_of(env: str | None) -> str:
    """Return the interpreter of an environment; the current one for None.

    Raises:
        Unavailable: The environment has not been created.
    """
    if env is None:
        return sys.executable
    python = _HERE / env / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        raise Unavailable(f"environment missing: python -m benchmarks.envs create {env}")
    return str(python)


def create(env: str) -> None:
    """Build the environment of one peer from its requirements file.

    Raises:
        KeyError: There is no requirements file of that name.
        subprocess.CalledProcessError: pip could not install it.
    """
    if env not in known():
        raise KeyError(f"no environment is called {env!r}; there are: {', '.join(known())}")
    venv.create(_HERE / env, with_pip=True, clear=True)
    pip = [python_of(env), "-m", "pip", "install", "--quiet", "-r", str(_HERE / f"{env}.txt")]
    subprocess.run(pip, check=True)
