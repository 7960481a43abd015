"""Models: loading, layouts, tokens, hooks."""

from everedit.models.load import load_model
from everedit.models.model import LanguageModel

__all__ = ["LanguageModel", "load_model"]
