"""Width of the 95 % intervals of random selection by its number of seeds, beside those of the selector.

Reads what `make reproduce` leaves in experiments/; prints points of the score at each kept fraction, for the
mean of random under its first seeds and for the lead of `report.best` over it.
"""

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from atr.benchmarks.summary import summarise
from atr.reporting.paired import paired_differences
from atr.reporting.result_files import load_results
from atr.reporting.results import Results

Widths = dict[float, float]
"""Width of the interval in points, by kept fraction."""


def random_widths(results: Results, seeds: int) -> dict[str, Widths]:
    """Widths of random's own intervals under its first `seeds` seeds, by group and benchmark."""
    random = results.evaluations["random"]
    rows = [row for row in random.rows if (row.seed or 0) < seeds]
    widths: dict[str, Widths] = {}
    for entry in summarise(rows, random.resamples, random.seed):
        name = entry.get("group") or entry["benchmark"]
        widths.setdefault(name, {})[entry["keep"]] = 100 * (entry["high"] - entry["low"])
    return widths


def lead_widths(results: Results, best: str, seeds: int) -> dict[str, Widths]:
    """Widths of the paired intervals of `best` minus random under its first `seeds` seeds."""
    random = results.evaluations["random"]
    drawn = replace(random, rows=[row for row in random.rows if (row.seed or 0) < seeds])
    shortened = replace(results, evaluations=results.evaluations | {"random": drawn})
    return {
        line.comparison.name: {
            keep: 100 * (difference.high - difference.low)
            for keep, difference in line.others["random"].items()
        }
        for line in paired_differences(shortened, best)
    }


def lines(results: Results, best: str) -> Iterator[tuple[str, str, Widths]]:
    """Group or benchmark, what the interval is of, and its widths."""
    seeds = 1 + max(row.seed or 0 for row in results.evaluations["random"].rows)
    own = {count: random_widths(results, count) for count in range(1, seeds + 1)}
    lead = {count: lead_widths(results, best, count) for count in range(1, seeds + 1)}
    for comparison in (*results.groups, *results.benchmarks):
        name = comparison.name
        for reducer in ("selector", best):
            points = comparison.curves[reducer]
            yield name, reducer, {point.keep: 100 * (point.high - point.low) for point in points}
        for count in own:
            yield name, f"random, {count} seed(s)", own[count][name]
        for count in lead:
            yield name, f"{best} - random, {count} seed(s)", lead[count][name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each group or benchmark, and each reducer or number of seeds."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=Path, default=Path("experiments"), help="folder of the results")
    parser.add_argument("--best", default="distilled", help="the reducer that is compared with random")
    chosen = parser.parse_args(arguments)
    folder, names = chosen.experiments, {"full", "selector", "random", chosen.best}
    results = load_results(folder / "evaluate", folder / "pretrain" / "metrics.json", names)
    keeps = results.shared
    print(f"{'':10}{'kept fraction':32}" + "".join(f"{keep:>7}" for keep in keeps) + " widest")
    for name, what, widths in lines(results, chosen.best):
        values = [widths[keep] for keep in keeps]
        print(f"{name:10}{what:32}" + "".join(f"{value:7.1f}" for value in (*values, max(values))))


if __name__ == "__main__":
    main()
