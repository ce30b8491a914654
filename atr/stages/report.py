"""Stage report: the JSON files of the other stages into the pages, figures and headline numbers."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atr import config
from atr.core.files import whole_folder, write_bytes, write_json, write_text
from atr.stages import (
    COMPONENTS,
    EVALUATE,
    EVALUATE_IMAGES,
    INTRINSIC,
    LATENCY,
    PRETRAIN,
    PRETRAIN_FEATURES,
    REPORT,
    ROBUSTNESS,
    entry,
)

if TYPE_CHECKING:
    from atr.core.tracking import Run
    from atr.reporting.report import Report


def main(params: config.Params) -> None:
    """Write the pages, the numbers and figures/ at once: all of them are new, or none is."""
    from atr.core import tracking

    with tracking.run("report", params) as run:
        from atr.datasets import PreparedImages
        from atr.reporting import results
        from atr.reporting.intrinsic import load_intrinsic, load_latency
        from atr.reporting.report import build
        from atr.reporting.robustness import load_robustness

        evaluated = results.load(EVALUATE, PRETRAIN / "metrics.json", params.evaluate.names)
        measure, cost = load_intrinsic(INTRINSIC / "metrics.json"), load_latency(LATENCY / "metrics.json")
        robust = load_robustness(ROBUSTNESS / "metrics.json")
        images, components = PreparedImages(EVALUATE_IMAGES), (PRETRAIN_FEATURES / COMPONENTS).read_bytes()
        report = build(evaluated, images.image, asdict(params.report), components, measure, cost, robust)
        with whole_folder(REPORT) as folder:
            _write(folder, report)
        _log(run, report.numbers)
        run.artifact(REPORT)


def _write(folder: Path, report: "Report") -> None:
    from atr.reporting import html, markdown

    write_text(folder / "report.md", markdown.render(report))
    write_text(folder / "report.html", html.render(report))
    write_json(folder / "numbers.json", report.numbers)
    for group, scores in report.metrics.items():
        write_json(folder / f"{group}.json", scores)
    for picture in report.pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)


def _log(run: "Run", numbers: dict[str, Any]) -> None:
    """What there is by kept fraction as curves over the percentage kept, the rest as single numbers."""
    single = dict(numbers)
    for section in ("differences", "measure"):
        for keep, found in single.pop(section, {}).items():
            run.metrics(_flat(found, f"{section}/"), round(100 * float(keep)))
    run.metrics(_flat(single))


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """One flat dict; MLflow takes no @ in the name of a metric."""
    flat: dict[str, float] = {}
    for key, value in nested.items():
        name = prefix + key.replace("@", " at ")
        flat |= _flat(value, f"{name}/") if isinstance(value, dict) else {name: value}
    return flat


if __name__ == "__main__":
    entry("report", main)
