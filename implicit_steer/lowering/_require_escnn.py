"""Modules that import escnn import this one first: where escnn is missing, it says what to install."""

from .._check import load_extra

load_extra("escnn", "escnn")
