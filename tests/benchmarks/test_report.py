from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.harness.report import BEGIN, END, page, put_table, readme_table, verdict
from benchmarks.harness.results import RESULTS, QualityResult, TimingResult, load_all, save_result
from tests.benchmarks.test_results import quality  # noqa: F401

_ROOT = Path(__file__).resolve().parents[2]


def _row(text: str, *words: str) -> list[str]:
    for line in text.splitlines():
        if line.startswith("|") and all(word in line for word in words):
            return [cell.strip() for cell in line.strip("|").split("|")]
    raise AssertionError(f"no row holds {words}")


def test_page_quotes_the_ratio_and_its_spread(sums: TimingResult) -> None:
    pair = next(p for p in sums.pairs if p.peer == "numpy")
    row = _row(page([sums]), "n = 2000 ", "numpy")
    assert row[3] == f"{pair.median:.3g} [{pair.q25:.3g}, {pair.q75:.3g}]"
    assert row[-1] == "yes"


def test_no_ratio_is_printed_where_results_disagree(sums: TimingResult) -> None:
    row = _row(page([sums]), "n = 2000 ", "wrong")
    assert row[3].startswith("results disagree: total[0]")
    assert row[1:3] == ["torch", "wrong"] and row[4] == row[-1] == "-"
    assert _row(readme_table([sums]), "wrong")[4].startswith("results disagree")


def test_quality_values_stand_beside_their_reference(quality: QualityResult) -> None:  # noqa: F811
    text = page([quality])
    assert _row(text, "NNGP") == ["yacht, NNGP, NLL", "0.31", "0.312 &plusmn; 0.02", "yes", "-"]
    assert _row(text, "largest error")[2:4] == ["&le; 1e-08", "yes"]
    assert _row(text, "effective")[2:4] == ["-", "-"]
    assert _row(text, "Burr")[3] == "no"
    assert r"| a \| b |" in text  # a bar in a cell does not end it
    assert _row(readme_table([quality]), "UCI")[3:] == ["2 of 3 values", "-", "within tolerance",
                                                        "no"]  # fmt: skip


def test_values_without_a_reference_stand_on_the_page_alone(quality: QualityResult) -> None:  # noqa: F811
    free = tuple(v for v in quality.values if v.met is None)
    assert free
    only = dataclasses.replace(quality, values=free)
    assert quality.title in page([only])
    assert quality.title not in readme_table([only])


def test_all_sizes_must_meet_the_goal_for_a_yes_in_the_readme(sums: TimingResult) -> None:
    assert _row(readme_table([sums]), "numpy")[-1] == "yes"
    pairs = [dataclasses.replace(p, met=p.workload != {"n": 2000}) for p in sums.pairs[:1]]
    pairs += [p for p in sums.pairs if p.peer == "numpy"][1:]
    assert _row(readme_table([dataclasses.replace(sums, pairs=pairs)]), "numpy")[-1] == "no"


def test_the_short_table_names_what_differs_between_the_sizes(sums: TimingResult) -> None:
    pairs = [p for p in sums.pairs if p.peer == "numpy"]
    named = [dataclasses.replace(p, workload={**p.workload, "dtype": "float64"}) for p in pairs]
    sizes = " / ".join(str(p.workload["n"]) for p in pairs)
    assert len(pairs) > 1
    row = _row(readme_table([dataclasses.replace(sums, pairs=named)]), "numpy")
    assert row[3] == f"n = {sizes}"
    row = _row(readme_table([dataclasses.replace(sums, pairs=named[:1])]), "numpy")
    assert row[3] == f"n = {pairs[0].workload['n']}, dtype = float64"


def test_a_quick_run_says_so(sums: TimingResult) -> None:
    assert "not for quoting" not in page([sums])
    assert "not for quoting" in page([dataclasses.replace(sums, quick=True)])


def test_put_table_is_idempotent_and_keeps_the_rest(sums: TimingResult) -> None:
    text = f"# Title\n\n{BEGIN}\nold\n{END}\n\nAfter.\n"
    once = put_table(text, readme_table([sums]))
    assert put_table(once, readme_table([sums])) == once
    assert once.startswith("# Title\n\n") and once.endswith("\n\nAfter.\n") and "old" not in once


@pytest.mark.parametrize("text", ["nothing", BEGIN, END, f"{END} {BEGIN}"])
def test_missing_markers_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        put_table(text, "table")


def test_verdicts() -> None:
    assert verdict(True, True) == "yes" and verdict(False, True) == "no"
    assert verdict(True, False) == "yes (quartiles cross the goal)"


def test_report_command_writes_once_then_agrees_and_notices_edits(
    sums: TimingResult, tmp_path: Path
) -> None:
    save_result(sums, tmp_path / "results")
    target, readme = tmp_path / "benchmarks.md", tmp_path / "README.md"
    readme.write_text(f"a\n{BEGIN}\n{END}\nb\n")
    options = ["report", "--results", str(tmp_path / "results")]
    options += ["--page", str(target), "--readme", str(readme)]
    run = CliRunner().invoke
    assert run(app, [*options, "--check"]).exit_code == 1
    assert not target.exists()
    assert run(app, options).exit_code == 0
    first = target.read_text(), readme.read_text()
    assert run(app, options).exit_code == 0
    assert (target.read_text(), readme.read_text()) == first
    assert run(app, [*options, "--check"]).exit_code == 0
    target.write_text(first[0].replace("Sum", "Product"))
    checked = run(app, [*options, "--check"])
    assert checked.exit_code == 1 and "benchmarks.md is not what" in checked.output


def test_report_command_without_markers_is_one_line(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    arguments = ["report", "--results", str(tmp_path), "--page", str(tmp_path / "p.md")]
    done = CliRunner().invoke(app, [*arguments, "--readme", str(readme)])
    assert done.exit_code == 1 and "expected the markers" in done.output


def test_run_command_refuses_an_unknown_name() -> None:
    done = CliRunner().invoke(app, ["run", "no_such_benchmark"])
    assert done.exit_code == 2 and "no benchmark is called" in done.output


def test_run_command_stores_the_result_and_fails_on_disagreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tests.benchmarks.sums"  # a benchmark outside the package, so not on the list
    monkeypatch.setattr("benchmarks.__main__.select", lambda words: [name])
    done = CliRunner().invoke(app, ["run", "--quick", "--results", str(tmp_path)])
    (result,) = load_all(tmp_path)
    assert done.exit_code == 1 and isinstance(result, TimingResult) and result.quick
    assert "torch / wrong: results disagree" in done.output
    assert any(f"torch / numpy: {p.median:.3g} [" in done.output for p in result.pairs[:1])


def test_committed_page_is_what_the_committed_results_generate() -> None:
    committed = (_ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert committed == page(load_all(RESULTS)), "run: python -m benchmarks report"


def test_readme_table_is_what_the_committed_results_generate() -> None:
    readme = (_ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == put_table(readme, readme_table(load_all(RESULTS)))
