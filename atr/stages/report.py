"""Stage report: the JSON files of the other stages into the pages, figures and headline numbers."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from atr import config
from atr.files import whole_folder, write_bytes, write_json, write_text
from atr.stages import COMPONENTS, EVALUATE, EVALUATE_IMAGES, PRETRAIN, PRETRAIN_FEATURES, REPORT, entry

if TYPE_CHECKING:
    from atr.reporting.report import Report


def main(params: config.Params) -> None:
    """Write report.md, report.html, metrics.json and figures/ at once: all of them are new, or none is."""
    from atr import tracking

    with tracking.run("report", params) as run:
        from atr.datasets import PreparedImages
        from atr.reporting import headlines, results
        from atr.reporting.report import build

        measured = results.load(EVALUATE, PRETRAIN / "metrics.json")
        images, components = PreparedImages(EVALUATE_IMAGES), (PRETRAIN_FEATURES / COMPONENTS).read_bytes()
        report = build(measured, images.image, asdict(params.report), components)
        numbers = headlines.metrics(measured)
        with whole_folder(REPORT) as folder:
            _write(folder, report, numbers)
        run.metrics(_named_for_mlflow(numbers))
        run.artifact(REPORT)


def _write(folder: Path, report: "Report", numbers: dict[str, dict[str, float]]) -> None:
    from atr.reporting import html, markdown

    write_text(folder / "report.md", markdown.render(report))
    write_text(folder / "report.html", html.render(report))
    write_json(folder / "metrics.json", numbers)
    for picture in report.pictures:
        write_bytes(folder / "figures" / f"{picture.name}.png", picture.png)


def _named_for_mlflow(numbers: dict[str, dict[str, float]]) -> dict[str, float]:
    """One flat dict; MLflow takes no @ in the name of a metric."""
    scores = ((group, name, value) for group, named in numbers.items() for name, value in named.items())
    return {f"{group}/{name.replace('@', ' at ')}": value for group, name, value in scores}


if __name__ == "__main__":
    entry("report", main)
