"""Recipes: the plans that ship, and `run_plan` to run any plan from Python."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
