"""Recipes as JSON and as words: reading, writing, and changing single settings by name."""

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from kenspeckle.config import (
    MODEL_CONFIGS,
    OPTIMIZER_OPTIONS,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    require,
)
from kenspeckle.core import InvalidValueError, nearest

__all__ = ["from_dict", "full_name", "recipe_hash", "settings", "to_dict", "with_settings"]


def recipe_hash(recipe: Recipe) -> str:
    """Return 16 hexadecimal digits that change whenever a setting does."""
    plain = to_dict(recipe)
    del plain["promise"]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values; the model's family stands beside its settings."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    plain["model"] = {"family": recipe.model.family, **plain["model"]}
    return plain


def from_dict(plain: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `to_dict` wrote.

    Raises:
        InvalidValueError: a key is unknown, or a value has the wrong type or range.
    """
    sections: dict[str, Any] = {}
    annotations = typing.get_type_hints(Recipe)
    for key, value in plain.items():
        if key not in annotations:
            raise InvalidValueError(f"no recipe setting named '{key}'; {nearest(key, annotations)}")
        if key == "model":
            sections[key] = _section(*_model_section(value))
        elif dataclasses.is_dataclass(annotations[key]):
            sections[key] = _section(key, annotations[key], value)
        else:
            sections[key] = _decode(annotations[key], value, key)
    return Recipe(**sections)


def _model_section(value: object) -> tuple[str, type, dict[str, Any]]:
    require(isinstance(value, Mapping), "model", "a table of settings", value)
    table = dict(typing.cast("Mapping[str, Any]", value))
    family = table.pop("family", None)
    require(isinstance(family, str), "model.family", "the name of a model family", family)
    return "model", _family(str(family)), table


def _family(name: str) -> type[ModelConfig]:
    if name not in MODEL_CONFIGS:
        raise InvalidValueError(f"no model named '{name}'; {nearest(name, MODEL_CONFIGS)}")
    return MODEL_CONFIGS[name]


def _section(where: str, kind: Any, value: object) -> Any:  # noqa: ANN401 - any section of a recipe
    require(isinstance(value, Mapping), where, "a table of settings", value)
    known = _fields(kind)
    filled = {}
    for key, entry in typing.cast("Mapping[str, Any]", value).items():
        if key not in known:
            raise InvalidValueError(f"no setting named '{where}.{key}'; {nearest(key, known)}")
        filled[key] = _decode(known[key], entry, f"{where}.{key}")
    return kind(**filled)


def _fields(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def settings(recipe: Recipe) -> dict[str, object]:
    """Return every setting of a recipe by its dotted name, such as ``optimizer.lr``.

    Example:
        >>> settings(Recipe())["optimizer.lr"]
        0.01
    """
    found: dict[str, object] = {}
    for key, value in vars(recipe).items():
        if dataclasses.is_dataclass(value):
            found |= {f"{key}.{name}": entry for name, entry in vars(value).items()}
        elif key not in {"name", "promise"}:
            found[key] = value
    return found


def with_settings(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return the recipe with settings replaced, each written ``name=value``.

    A name is dotted (``optimizer.lr``) or, since leaf names are unique, bare (``lr``). The name
    of a section stands for the thing that it names: ``optimizer=adam``, ``model=resnet``. Naming
    another optimizer, loss or model drops the settings that belonged to the old one only.

    Raises:
        InvalidValueError: the setting is unknown, or the value has the wrong type or range.

    Example:
        >>> with_settings(Recipe(), ["optimizer=adam", "lr=1e-3"]).optimizer.lr
        0.001
    """
    pairs = [_pair(assignment) for assignment in assignments]
    named = [pair for pair in pairs if pair[0] in {"model", "optimizer", "loss", "schedule"}]
    rest = [pair for pair in pairs if pair not in named]
    for key, word in named:
        recipe = dataclasses.replace(recipe, **{key: _renamed(recipe, key, word)})
    changes: dict[str, dict[str, Any]] = {}
    for name, word in rest:
        section, leaf = _locate(recipe, name)
        owner = recipe if section == "" else getattr(recipe, section)
        changes.setdefault(section, {})[leaf] = _decode(_fields(type(owner))[leaf], word, name)
    top: dict[str, Any] = changes.pop("", {})
    for section, values in changes.items():
        top[section] = dataclasses.replace(getattr(recipe, section), **values)
    return dataclasses.replace(recipe, **top)


def full_name(recipe: Recipe, assignment: str) -> str:
    """Return the dotted name of the setting that ``name=value`` changes, such as ``optimizer.lr``.

    Raises:
        InvalidValueError: the recipe has no such setting.
    """
    name, _ = _pair(assignment)
    if name in {"model", "optimizer", "loss", "schedule"}:
        return name
    section, leaf = _locate(recipe, name)
    return f"{section}.{leaf}" if section else leaf


def _pair(assignment: str) -> tuple[str, str]:
    name, equals, word = assignment.partition("=")
    if not equals or not name.strip():
        raise InvalidValueError(
            f"a setting must be written name=value; got '{assignment}'; for example lr=0.01"
        )
    return name.strip().removesuffix(".name").removesuffix(".family"), word.strip()


def _renamed(recipe: Recipe, key: str, word: str) -> Any:  # noqa: ANN401 - any section of a recipe
    if key == "model":
        kind = _family(word)
        return recipe.model if isinstance(recipe.model, kind) else kind()
    old = getattr(recipe, key)
    kind = type(old)
    name = _decode(_fields(kind)["name"], word, key)
    if name == old.name:
        return old
    if key == "schedule":
        return dataclasses.replace(old, name=name)
    if key == "loss":
        return LossConfig(name=name)
    keep = {k: getattr(old, k) for k in OPTIMIZER_OPTIONS[name]}
    return OptimizerConfig(name=name, lr=old.lr, weight_decay=old.weight_decay, **keep)


def _locate(recipe: Recipe, name: str) -> tuple[str, str]:
    known = settings(recipe)
    matches = [full for full in known if full == name or full.split(".")[-1] == name]
    if not matches:
        leaves = [full.split(".")[-1] for full in known]
        raise InvalidValueError(f"no setting named '{name}'; {nearest(name, [*known, *leaves])}")
    section, _, leaf = matches[0].rpartition(".")
    return section, leaf


def _decode(annotation: Any, value: object, where: str) -> Any:  # noqa: ANN401 - any annotation
    """Return `value`, a JSON value or a word from a command line, as the annotated type."""
    origin = typing.get_origin(annotation)
    if origin is types.UnionType:
        if value is None or value == "none":
            return None
        (annotation,) = (a for a in typing.get_args(annotation) if a is not type(None))
        origin = typing.get_origin(annotation)
    if origin is Literal:
        return _decode_choice(typing.get_args(annotation), value, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(annotation), value, where)
    return _decode_scalar(annotation, value, where)


def _decode_choice(choices: tuple[str, ...], value: object, where: str) -> str:
    if value not in choices:
        raise InvalidValueError(
            f"{where} must be one of {', '.join(choices)}; got {value!r}; "
            f"{nearest(str(value), choices)}"
        )
    return str(value)


def _decode_tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
    require(isinstance(parts, list | tuple), where, "numbers with commas between them", value)
    entries = list(typing.cast("Iterable[object]", parts))
    if entries == [""]:
        entries = []
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(entries)
    if len(entries) == 1 and len(kinds) > 1:
        entries = entries * len(kinds)  # one number stands for a square, or for all channels
    require(len(entries) == len(kinds), where, f"{len(kinds)} numbers", value)
    return tuple(_decode_scalar(k, entry, where) for k, entry in zip(kinds, entries, strict=True))


def _decode_scalar(kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - int, float, bool, str
    words: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    if kind is bool:
        switch = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        found = value if isinstance(value, bool) else switch.get(str(value).strip().lower())
        require(found is not None, where, words[bool], value)
        return found
    if kind is str:
        require(isinstance(value, str), where, "text", value)
        return value
    try:
        number = kind(value.strip()) if isinstance(value, str) else value
    except ValueError:
        number = None
    fits = isinstance(number, int | float) and not isinstance(number, bool)
    whole = fits and float(typing.cast("float", number)).is_integer()
    require(fits and (kind is float or whole), where, words[kind], value)
    number = kind(number)
    require(abs(number) < float("inf"), where, "finite", value)
    return number
