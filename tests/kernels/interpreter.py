"""Triton's interpreter for tests: see benchmarks/interpreter.py."""

from benchmarks.interpreter import interpreted as interpreted
from benchmarks.interpreter import products_in_order as products_in_order
