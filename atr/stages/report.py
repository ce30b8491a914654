"""Stage report: makes the pages, figures and headline numbers from the results of the other stages."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atr import config, stages
from atr.core.files import whole_folder, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from atr.core.tracking import Run
    from atr.reporting.report import ReportContent


def main(params: config.Params) -> None:
    """Write the pages, numbers and figures together; on failure the former report stays."""
    from atr.core import tracking

    with tracking.run("report", params) as run:
        report = _build(params)
        with whole_folder(stages.REPORT) as folder:
            _write(folder, report)
        _log(run, report.numbers)
        # The page holds its pictures, which MLflow would otherwise store twice.
        for name in ("report.html", "numbers.json"):
            run.artifact(stages.REPORT / name)


def _build(params: config.Params) -> "ReportContent":
    from atr.datasets import PreparedImages
    from atr.reporting.intrinsic import load_intrinsic
    from atr.reporting.latency import load_latency
    from atr.reporting.report import Measurements, build_report
    from atr.reporting.result_files import load_results
    from atr.reporting.robustness import load_robustness

    reducers = params.evaluate.names
    results = load_results(stages.EVALUATE, stages.PRETRAIN / "metrics.json", reducers)
    measured = Measurements(
        load_intrinsic(stages.INTRINSIC, reducers),
        load_latency(stages.LATENCY, reducers),
        load_robustness(stages.ROBUSTNESS, reducers),
    )
    images = PreparedImages(stages.EVALUATE_IMAGES)
    components = (stages.PRETRAIN_FEATURES / stages.COMPONENTS).read_bytes()
    return build_report(results, images.image, asdict(params.report), components, measured)


def _write(folder: Path, report: "ReportContent") -> None:
    from atr.reporting.html import render_html
    from atr.reporting.markdown import render_markdown

    write_text(folder / "report.md", render_markdown(report))
    write_text(folder / "report.html", render_html(report))
    write_json(folder / "numbers.json", report.numbers)
    for group, scores in report.metrics.items():
        write_json(folder / f"{group}.json", scores)
    for picture in report.pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)


def _log(run: "Run", numbers: dict[str, Any]) -> None:
    """Log numbers per kept fraction as curves over the kept percentage, and all others as single numbers."""
    single = dict(numbers)
    for section in ("differences", "intrinsic"):
        for keep, values in single.pop(section, {}).items():
            run.metrics(_metrics(values, f"{section}/"), round(100 * float(keep)))
    run.metrics(_metrics(single))


def _metrics(nested: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flatten nested numbers to metric names; MLflow allows no @ in them."""
    from atr.reporting.cells import flatten

    return {name.replace("@", " at "): value for name, value in flatten(nested, prefix, "/").items()}


if __name__ == "__main__":
    stages.entry("report", main)
