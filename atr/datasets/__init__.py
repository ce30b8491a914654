"""Images and questions: where they come from, and how they lie on disk once prepared."""

from atr.datasets.prepared import PreparedImages
from atr.datasets.questions import load_questions

__all__ = ["PreparedImages", "load_questions"]
