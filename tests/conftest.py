import os

import pytest

# Before any test imports what reads them. A stray call to the hub retries for minutes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(autouse=True)
def own_mlflow_file(monkeypatch):
    """Lightning's MLflow logger leaves its URI in the environment, and with it the file of another test."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
