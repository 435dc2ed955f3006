"""Answers of a given form: regular expressions, JSON schemas and choices as automata over the tokens of a model, and
canvases with gaps. The packages that it needs are the extra `structured`."""

from .automaton import TokenAutomaton
from .canvas import parse_canvas
from .languages import automaton_of, known_as

__all__ = ["TokenAutomaton", "automaton_of", "known_as", "parse_canvas"]
