"""The values that cross borders, and the family of errors with its exit codes."""

import dataclasses
import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kenspeckle import core
from kenspeckle.core import Geometry, ImageError, KenError, MissingExtraError, nearest, printable

WORDS = ["adam", "adamw", "sgd"]


def errors():
    """Return every error class of the module."""
    classes = (value for value in vars(core).values() if inspect.isclass(value))
    return [kind for kind in classes if issubclass(kind, KenError)]


def test_nearest_names_what_is_near_best_first():
    assert nearest("adamm", WORDS) == "did you mean 'adam' or 'adamw'?"
    assert nearest("sdg", WORDS) == "did you mean 'sgd'?"


def test_nearest_names_all_when_none_is_near():
    assert nearest("xyz", WORDS) == "known: 'adam', 'adamw', 'sgd'"
    assert nearest("xyz", iter(WORDS)) == "known: 'adam', 'adamw', 'sgd'"


def test_nearest_stays_short():
    words = [f"class-{index:04d}" for index in range(1000)]
    remedy = nearest("xyz", words)
    assert remedy.endswith(" more")
    assert remedy.count("class-") + int(remedy.split()[-2]) == 1000
    assert len(remedy) < 400


@given(st.text(), st.lists(st.text(), max_size=8))
def test_nearest_only_ever_names_known_words(word, known):
    remedy = nearest(word, known)
    assert remedy.startswith(("did you mean ", "known: "))
    if word in known:
        assert repr(word) in remedy


def test_the_tree_in_the_docstring_is_the_family():
    """Name, parent and exit code of every error are those that the module states."""
    stated, parents = {}, {}
    for line in (core.__doc__ or "").splitlines():
        entry = re.match(r"    ([│ ]*(?:├── |└── )?)(\w+Error)\b(.*)", line)
        if not entry:
            continue
        depth = len(entry[1]) // 4
        parents[depth] = entry[2]
        code = re.search(r"\(exit code (\d)\)", line)
        stated[entry[2]] = (parents.get(depth - 1), int(code[1]) if code else None)
    assert stated.pop("KenError") == (None, None)
    found = {
        kind.__name__: (kind.__mro__[1].__name__, kind.exit_code)
        for kind in errors()
        if kind is not KenError
    }
    # ImageError states its parent's code by standing below it.
    expected = {n: (p, stated[p or n][1] if c is None else c) for n, (p, c) in stated.items()}
    assert found == expected


@pytest.mark.parametrize("kind", errors())
def test_an_error_is_documented_and_exported(kind):
    assert kind.__doc__
    assert kind.__name__ in core.__all__
    assert kind.exit_code in {1, 2}


def test_wrong_values_are_value_errors_too():
    assert issubclass(core.InvalidValueError, ValueError)


def test_a_missing_extra_says_how_to_install_it():
    assert str(MissingExtraError("training", "train")) == (
        "training needs the extra 'train', which is not installed; "
        "run: pip install 'kenspeckle[train]'"
    )


def test_an_image_error_keeps_name_and_reason():
    error = ImageError("two\nlines.png", "cut short")
    assert (error.name, error.reason) == ("two\nlines.png", "cut short")
    assert str(error) == r"two\nlines.png: cut short"


@given(st.text())
def test_printable_text_is_one_harmless_line(text):
    shown = printable(text)
    assert len(f"{shown}|".splitlines()) == 1
    assert all(c.isprintable() or c in "\u200c\u200d" for c in shown)
    if text.isprintable():
        assert shown == text


def test_values_are_frozen():
    geometry = Geometry((8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        geometry.size = (9, 9)  # type: ignore[misc]  # that is the point
