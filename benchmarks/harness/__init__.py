"""The parts of the benchmark harness, one idea a file."""
