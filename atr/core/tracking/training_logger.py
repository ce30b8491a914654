"""The Lightning logger that writes to a stage's run."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from atr.core.tracking.store import EXPERIMENT


class TrainingLogger(Logger):
    """Forwards metrics to a stage's run; unlike Lightning's MLFlowLogger it survives a failing log."""

    def __init__(self, run_id: str, log: Callable[[Mapping[str, float], int], None]) -> None:
        super().__init__()
        self._run_id = run_id
        self._log = log

    @property
    def name(self) -> str:
        """Name of the MLflow experiment."""
        return EXPERIMENT

    @property
    def version(self) -> str:
        """Id of the MLflow run."""
        return self._run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics at a step."""
        self._log(metrics, step or 0)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing, as the stage's parameters are logged when its run starts."""
