"""Image classification whose numbers can be trusted: pictures in, one model file out.

    import kenspeckle as ken
    finished = ken.train("flowers/", out="flowers.ken")
    ken.load("flowers.ken").predict("daisy.jpg").label

The names below load their modules when they are first used, so that importing the package, and
answering from a model file, never import torch.
"""

import importlib
from typing import Any

__all__ = ["KenError", "Model", "Recipe", "load", "open_dataset", "train", "verify"]

_HOMES = {
    "KenError": "core",
    "Model": "prediction",
    "Recipe": "config",
    "load": "prediction",
    "open_dataset": "sources",
    "train": "fit",
    "verify": "prediction",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    if name not in _HOMES:
        raise AttributeError(f"module 'kenspeckle' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kenspeckle.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
