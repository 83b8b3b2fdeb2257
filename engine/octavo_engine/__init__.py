"""Octavo's serving engine: schedule -> prepare -> forward -> sample -> emit, behind an OpenAI-compatible API."""

from importlib.metadata import version

__version__ = version("octavo")
