"""Fixtures shared with the tests of generation."""

from tests.generate.conftest import model_folder as model_folder
