"""Optional packages: imported on first use, and named in one line where they are absent."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from probkit.errors import MissingExtraError

__all__ = ["available", "require"]


def available(module: str) -> bool:
    """Tell whether ``module`` can be imported, without importing it.

    Args:
        module: Dotted name, such as ``"cupy"``.

    Example:
        >>> available("json"), available("no_such_package")
        (True, False)
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is absent
        return False


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: Dotted name of the module to import, such as ``"cupy"``.
        extra: Name of the extra of probkit that installs it, such as ``"cuda12"``.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The package is not installed. A package that is installed but fails
            to import one of its own requirements raises that error unchanged.

    Example:
        >>> require("json", extra="demo").dumps([1])
        '[1]'
        >>> require("no_such_package", extra="cuda12")
        Traceback (most recent call last):
            ...
        probkit.errors.MissingExtraError: no_such_package is needed here and is not installed: \
pip install "probkit[cuda12]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        message = f'{top} is needed here and is not installed: pip install "probkit[{extra}]"'
        raise MissingExtraError(message, name=module) from None
