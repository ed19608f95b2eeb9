"""A llama.cpp server in a process of its own, for as long as its standard input stays open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class LlamaServer:
    """The server of the prebuilt binding, on loopback, at a free port."""

    def __init__(self, model: Path, context: int = 2048, slots: int = 2) -> None:
        command = [sys.executable, __file__, str(model), str(context), str(slots)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.url = ""

    def __enter__(self) -> LlamaServer:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("listening "):
                self.url = line.split()[1]
                return self
        raise RuntimeError("the server of llama.cpp did not start")

    def __exit__(self, *_: object) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(model: str, context: str, slots: str) -> None:
    import os

    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = model
    options.n_ctx = int(context)
    options.n_parallel = int(slots)
    options.warmup = False
    options.port = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(options)
    sys.stdout.write(f"listening {server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # its threads need no farewell


if __name__ == "__main__":
    main(*sys.argv[1:])
