"""Images and questions: their sources, and the prepared files that all later stages read."""

from atr.datasets.annotations import load_prompts, load_text_centres
from atr.datasets.prepared import PreparedImages
from atr.datasets.questions import load_questions

__all__ = ["PreparedImages", "load_prompts", "load_questions", "load_text_centres"]
