"""From the words of a command line to values: data, costs, caches, and what is to be run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kenspeckle.core import InvalidValueError, MissingPathError
from kenspeckle.progress import say

if TYPE_CHECKING:
    from kenspeckle.config import Recipe
    from kenspeckle.costs import Costs
    from kenspeckle.pixels import Cache
    from kenspeckle.planning import Planned
    from kenspeckle.sources import Dataset

__all__ = ["cache_of", "costs_of", "one_of", "opened", "wanted"]

Word = TypeVar("Word", bound=str)


def one_of(option: str, word: str, known: tuple[Word, ...]) -> Word:
    """Return `word`, which must be one of those that an option knows.

    Raises:
        InvalidValueError: it is another.
    """
    for allowed in known:
        if word == allowed:
            return allowed
    raise InvalidValueError(f"{option} must be one of {', '.join(known)}; got '{word}'")


def opened(
    data: str,
    label_column: str | None,
    data_folder: Path | None,
    offline: bool,
    *,
    min_classes: int = 2,
    group: str | None = None,
) -> "Dataset":
    """Open DATA as the options say.

    Args:
        data: what the user named.
        label_column: a manifest's column of classes, if it has another name.
        data_folder: where standard sets are, or are put.
        offline: never use the network.
        min_classes: how many there must be.
        group: how pictures that belong together are told by their names.
    """
    from kenspeckle.sources import open_dataset
    from kenspeckle.splits import with_groups

    dataset = open_dataset(
        data,
        label_column=label_column,
        data_dir=data_folder,
        offline=offline,
        notify=say,
        min_classes=min_classes,
    )
    return dataset if group is None else with_groups(dataset, group)


def cache_of(folder: Path | None, limit_gb: float) -> "Cache":
    """Return where decoded pictures are kept, and at most how many gigabytes of them."""
    from kenspeckle.pixels import Cache, default_cache_folder

    return Cache(folder or default_cache_folder(), int(limit_gb * 1e9))


def wanted(
    name: str | None, assignments: list[str], plan: dict[str, str | None]
) -> "Recipe | Planned":
    """Return the recipe of that name with its changes or, without a name, a run to be planned.

    Args:
        name: of a recipe, or the path of one as JSON.
        assignments: settings, each written ``name=value``.
        plan: the options that only a planned run takes, by name.

    Raises:
        InvalidValueError: a name or setting is wrong, or has no effect.
        MissingPathError: there is no such recipe.json.
    """
    from kenspeckle.planning import planned
    from kenspeckle.recipes import named
    from kenspeckle.settings import from_dict, with_settings

    if name is None:
        return planned(assignments, **plan)
    for option, value in plan.items():
        if value is not None:
            raise InvalidValueError(
                f"--{option} has no effect with --recipe, which is run as it stands; leave one "
                "out, or change the recipe with --set"
            )
    if name.endswith(".json"):
        if not Path(name).exists():
            raise MissingPathError(f"{name}: no such file")
        try:
            plain = json.loads(Path(name).read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            raise InvalidValueError(f"{name}: not a recipe: {error}") from error
        if not isinstance(plain, dict):
            raise InvalidValueError(f"{name}: not a recipe: it must hold a table")
        recipe = from_dict(plain)
    else:
        recipe = named(name)
    return with_settings(recipe, assignments)


def costs_of(path: Path | None, model: Path) -> "Costs | None":
    """Return the costs that a user gave for the classes of a model."""
    from kenspeckle.costs import read_costs
    from kenspeckle.modelfile import read

    return None if path is None else read_costs(path, read(model, ()).manifest.classes)
