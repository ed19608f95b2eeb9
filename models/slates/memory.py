"""How much memory a fit takes, computed from the sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probkit.models.slates.guide import SlateMeanField

if TYPE_CHECKING:
    from probkit.models.slates.model import SlateGRU

__all__ = ["fit_bytes"]

_TENSORS = 2 * 3  # mean and log scale, and the two moments of Adam for each


def fit_bytes(
    model: SlateGRU, guide: Any = None, *, users: int, rows: int, world: int = 1
) -> dict[str, int]:
    """Return the bytes that a fit holds on each process, by table.

    Args:
        model: The model.
        guide: Its guide; None for the model's own.
        users: Number of users U.
        rows: Distinct items that one step touches.
        world: Processes among which the rows of tables are spread.

    Returns:
        "items" and "users": means, log scales, Adam's two moments of both, and step counts;
        "step": the rows of a step with their noise, vectors, gradients and updates. While a chunk
        of steps runs, the tables as they were before it are held as well ("copy"), and a fit that
        is shared holds each whole table once, mean and scale, when it ends ("whole").

    Example:
        >>> from probkit.models.slates import SlateGRU
        >>> fit_bytes(SlateGRU(1_311_775, dim=25), users=2_277_645, rows=50_000)["items"]
        792312100
    """
    guide = SlateMeanField() if guide is None else guide
    size = model.dtype.itemsize
    items = model.n_items * (model.dim * _TENSORS * size + 4)
    table = guide.users == "table" and model.user_init == "normal"
    own = users * (model.memory * _TENSORS * size + 4) if table else 0
    whole = 2 * size * (model.n_items * model.dim + (users * model.memory if table else 0))
    per_process = -(-items // world) + -(-own // world)
    return {
        "items": -(-items // world),
        "users": -(-own // world),
        "step": rows * model.dim * size * 12 + 9 * model.n_items,
        "copy": per_process,
        "whole": whole if world > 1 else 0,
    }
