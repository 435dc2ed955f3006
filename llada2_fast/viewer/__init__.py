"""How an answer was written, step by step: the trace document, and the page that shows it."""

from .document import ALTERNATIVES, trace_document
from .pages import page

__all__ = ["ALTERNATIVES", "page", "trace_document"]
