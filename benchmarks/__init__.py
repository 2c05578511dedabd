"""Measurements of aep_ext: see ``conftest.py`` for the command lines. Not installed with the package."""
