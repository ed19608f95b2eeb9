"""Requirements, version, licence and the commands that the pages name."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from probkit._version import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    matches = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", x) for x in lines if x[:1] != "#"
    ]
    assert all(matches), "expected lines of the form name==version"
    return {normal(m[1]): m[2] for m in matches}


def requirements() -> list[Requirement]:
    every = [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]
    return [Requirement(text) for text in every]


def test_every_requirement_is_pinned_inside_its_range():
    pinned = pins()
    for requirement in requirements():
        assert normal(requirement.name) in pinned, requirement
        assert requirement.specifier.contains(pinned[normal(requirement.name)]), requirement


def test_torch_is_pinned_to_one_release():
    assert pins()["torch"] == "2.13.0"


def test_extras_are_the_promised_ones():
    optional = {"bo", "ax", "postgres", "training", "onnx", "llm", "dist", "cuda12", "cuda13"}
    assert set(EXTRAS) == optional | {"demo", "test", "docs"}


def test_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__


def test_licence_is_the_whole_text():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(f"\n   {k}. " in text for k in range(1, 10))


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def make_knows(target: str) -> bool:
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False)
    return dry.returncode == 0


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md"])
def test_commands_on_the_pages_exist(page):
    named = commands(page)
    assert named
    for words in named:
        if words[0] == "make":
            assert all(make_knows(word) for word in words[1:] if "=" not in word), words
        elif words[0].startswith(".ci/"):
            assert (ROOT / words[0]).stat().st_mode & 0o111, words
        for word in words[1:]:
            if word.startswith(("tests/", "notebooks/", "docs/")) or word.endswith(".txt"):
                assert (ROOT / word).exists(), words


def test_make_refuses_an_unknown_target():
    assert not make_knows("no-such-target")


def test_workflow_and_hooks_call_make_targets():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    lines = [hook["entry"] for hook in hooks] + [run for run in runs if "\n" not in run]
    assert ".ci/run" in lines
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert len(targets) >= 4 and all(make_knows(target) for target in targets)
    steps = re.findall(r"^step \w+ +make (\w+)", (ROOT / ".ci/run").read_text(), re.M)
    assert {"test", "lint", "types", "demo"} <= set(steps) and all(map(make_knows, steps))
