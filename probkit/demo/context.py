"""What a view is given to work with: where its pictures, tables and words go."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from probkit.errors import DataError
from probkit.progress import track

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["DemoContext", "Download", "Note", "Picture", "Table", "Text", "slug"]

T = TypeVar("T")


def slug(text: str) -> str:
    """Turn a title into a name for files and anchors.

    Example:
        >>> slug("Eight schools, as a Pyro program")
        'eight-schools-as-a-pyro-program'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "view"


@dataclass(frozen=True)
class Text:
    """A piece of Markdown."""

    source: str


@dataclass(frozen=True)
class Picture:
    """A PNG file and the sentence below it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Table:
    """A data frame and the sentence above it."""

    frame: pd.DataFrame
    caption: str
    digits: int


@dataclass(frozen=True)
class Download:
    """A file beside the report."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Note:
    """A short remark, set apart from the text."""

    message: str


Block = Text | Picture | Table | Download | Note


@dataclass
class DemoContext:
    """The hand of a view on its part of the report.

    Attributes:
        out: Folder of the report.
        prefix: Start of the names of the view's files.
        full: Whether the long form was asked for; the short one takes at most 20 seconds.
        rng_seed: Seed for everything random in the view.
        blocks: What the view has shown so far, in order.
    """

    out: Path
    prefix: str
    full: bool = False
    rng_seed: int = 0
    blocks: list[Block] = field(default_factory=list)

    def text(self, markdown: str) -> None:
        """Add text: paragraphs, lists, ``code`` and emphasis in Markdown; HTML is shown as is."""
        from textwrap import dedent

        self.blocks.append(Text(dedent(markdown).strip()))

    def note(self, message: str) -> None:
        """Add a short remark, such as why something was left out."""
        self.blocks.append(Note(message))

    def table(self, frame: pd.DataFrame, caption: str, *, digits: int = 4) -> None:
        """Add a table.

        Args:
            frame: Rows and columns; the index is shown when it has a name or holds strings.
            caption: Sentence above the table.
            digits: Significant digits of the numbers.
        """
        self.blocks.append(Table(frame.copy(), caption, digits))

    def figure(self, fig: Figure, name: str, caption: str) -> Path:
        """Save a figure as PNG, add it, and close it if pyplot holds it.

        Args:
            fig: The figure, best from :func:`probkit.plots.figure`.
            name: Name of the picture, unique within the view.
            caption: Sentence below the picture; also its description for screen readers.

        Returns:
            Where the picture lies.

        Raises:
            DataError: The view has a file of this name already.
        """
        path = self._path(name, ".png")
        fig.savefig(path, dpi=150, facecolor="white")
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None and fig.canvas.manager is not None:
            pyplot.close(fig)
        self.blocks.append(Picture(path, caption))
        return path

    def arviz(self, idata: Any, name: str = "posterior") -> Path:
        """Save an ArviZ ``InferenceData`` or xarray ``DataTree`` as netCDF beside the report.

        Args:
            idata: What ``Posterior.to_arviz()`` or ``Posterior.to_datatree()`` returned.
            name: Name of the file, unique within the view.

        Returns:
            Where the file lies; ``arviz.from_netcdf`` reads it.

        Raises:
            DataError: The view has a file of this name already.
        """
        path = self._path(name, ".nc")
        idata.to_netcdf(path, engine="h5netcdf")
        self.blocks.append(Download(path, "ArviZ file: arviz.from_netcdf reads it"))
        return path

    def track(self, items: Iterable[T], description: str = "working") -> Iterator[T]:
        """Iterate with a progress bar; off a terminal, iterate only."""
        return track(items, description)

    def _path(self, name: str, ending: str) -> Path:
        path = self.out / f"{self.prefix}-{slug(name)}{ending}"
        if any(path == getattr(block, "path", None) for block in self.blocks):
            raise DataError(
                f"expected a name of its own for each file of a view, got {name!r} twice"
            )
        return path
