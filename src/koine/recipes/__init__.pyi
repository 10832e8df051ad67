from .runner import PlanResult as PlanResult
from .runner import run_plan as run_plan
from .table import RECIPES as RECIPES
from .table import Recipe as Recipe
from .table import find_plan as find_plan
