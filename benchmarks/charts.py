"""What wrong answers to charts say: the value of another bar was read, but its label was not found.

Reads the results of a stage evaluate of the micro world's held-out questions, of all tokens by default:
`python benchmarks/charts.py [experiments/evaluate/full/results.jsonl] [--seed 0]`, the seed of params.yaml.
"""

import json
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from atr.datasets import micro


def outcomes(path: Path, seed: int) -> Counter[str]:
    """Number of answers that are right, the value of another bar, or neither."""
    found: Counter[str] = Counter()
    for row in map(json.loads, path.read_text().splitlines()):
        if row["benchmark"] == "charts":
            drawn = micro.sample("charts", "evaluate", int(row["image"].rpartition("/")[2]), seed)
            others = {value for label, value in drawn.turns if label != row["question"]}
            wrong = "the value of another bar" if row["prediction"] in others else "something else"
            found["right" if row["score"] == 1 else wrong] += 1
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the outcomes, the most frequent one first."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path("experiments/evaluate/full/results.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    for outcome, count in outcomes(asked.path, asked.seed).most_common():
        print(f"{count:5} {outcome}")


if __name__ == "__main__":
    main()
