"""Recipes: a Python file each, with the result that was measured with it on top.

To add one, write a module with a `RECIPE` and name it in `RECIPES`.
"""

from kenspeckle.config import Recipe
from kenspeckle.core import InvalidValueError, nearest
from kenspeckle.recipes import fine_tune, linear_probe, seed_cnn, small_cnn, speed, tail

__all__ = ["RECIPES", "named"]

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (seed_cnn, small_cnn, speed, linear_probe, tail, fine_tune)
}


def named(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        InvalidValueError: there is none; the text names the nearest.
    """
    if name not in RECIPES:
        raise InvalidValueError(f"no recipe named '{name}'; {nearest(name, RECIPES)}")
    return RECIPES[name]
