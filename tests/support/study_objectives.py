"""Objectives of studies, importable by worker processes."""

from __future__ import annotations

import math
import os
import time


def branin(params):
    """Branin's function on [-5, 10] x [0, 15]; its minimum is 0.397887."""
    x, y = params["x"], params["y"]
    bent = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return bent**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def wave(params):
    """A function of one number."""
    return math.sin(7 * params["x"]) + params["x"]


class HangsOnce:
    """Branin's function, but the first call anywhere writes its process id and does not return."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __call__(self, params):
        try:
            file = os.open(self.marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return branin(params)
        os.write(file, f"{os.getpid()}\n".encode())
        os.close(file)
        time.sleep(600)
        raise AssertionError("this worker was to be killed")
