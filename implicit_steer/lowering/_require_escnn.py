"""Imported first by modules that import escnn: where it is missing, this one says what to install."""

from .._check import load_extra

load_extra("escnn", "escnn")
