"""The generic associative scan against a plain loop."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from probkit.errors import ShapeError
from probkit.inference.message_passing import associative_scan


def _loop(matrices: Tensor, reverse: bool) -> Tensor:
    """Products of [T, n, n] one after another, earlier factors on the left."""
    items = list(matrices)
    results = [items[-1] if reverse else items[0]]
    for item in reversed(items[:-1]) if reverse else items[1:]:
        results.append(item @ results[-1] if reverse else results[-1] @ item)
    return torch.stack(results[::-1] if reverse else results)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 8, 13, 64, 100])
def test_matrix_products_equal_the_loop(
    steps: int, reverse: bool, generator: torch.Generator
) -> None:
    matrices = torch.randn(steps, 2, 2, generator=generator, dtype=torch.float64) / 1.4
    result = associative_scan(torch.matmul, matrices, reverse=reverse)
    torch.testing.assert_close(result, _loop(matrices, reverse), rtol=1e-11, atol=1e-11)
    if steps > 2:  # the operation does not commute: swapped operands are seen
        swapped = associative_scan(lambda a, b: b @ a, matrices, reverse=reverse)
        assert not torch.allclose(swapped, result, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dim", [1, -3])
def test_any_dimension(dim: int, generator: torch.Generator) -> None:
    matrices = torch.randn(3, 6, 2, 2, generator=generator, dtype=torch.float64)
    result = associative_scan(torch.matmul, matrices, dim=dim)
    for b in range(3):
        torch.testing.assert_close(result[b], _loop(matrices[b], False))


def test_named_tuples_keep_their_type(generator: torch.Generator) -> None:
    class Affine(NamedTuple):
        slope: Tensor
        offset: Tensor

    def then(first: Affine, second: Affine) -> Affine:
        return Affine(second.slope * first.slope, second.slope * first.offset + second.offset)

    slope, offset = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    result = associative_scan(then, Affine(slope, offset))
    assert isinstance(result, Affine)
    x, values = torch.zeros((), dtype=torch.float64), []
    for a, b in zip(slope, offset, strict=True):
        x = a * x + b
        values.append(x)
    torch.testing.assert_close(result.offset, torch.stack(values))


def test_gradients(generator: torch.Generator) -> None:
    matrices = torch.randn(5, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: associative_scan(torch.matmul, m, reverse=True), matrices
    )


def test_input_is_not_changed(generator: torch.Generator) -> None:
    numbers = torch.randn(6, generator=generator)
    kept = numbers.clone()
    associative_scan(torch.add, numbers)
    assert torch.equal(numbers, kept)


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match="expected at least one step along dim 0, got none"):
        associative_scan(torch.add, torch.empty(0))
    with pytest.raises(ShapeError, match=r"same number of steps along dim 0 .* got \[2, 3\]"):
        associative_scan(lambda a, b: a, (torch.zeros(2), torch.zeros(3)))
