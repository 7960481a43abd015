"""Everedit: lifelong model editing."""

from everedit._version import __version__

__all__ = ["__version__"]
