"""Made-up results of a check, one finding of every kind."""

import dataclasses
from typing import Any

import numpy as np

from kenspeckle.findings import Case, Check, Exhibit, Finding, Health
from kenspeckle.forecast import ClassForecast, Forecast

FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")
SPLITS = ("train", "validation", "test")
WHY = "Why it matters, in a sentence that is about as long as those that the checks really write."


def exhibit(index: int, classes: tuple[str, ...], split: str | None = "train") -> Exhibit:
    label = classes[index % len(classes)]
    return Exhibit(index, f"{label}/{9_000_017 * (index + 3) % 10**9:09d}_n.jpg", label, split)


def finding(kind: str, severity: Any, title: str, *cases: Case) -> Finding:
    num = sum(len(case.pictures) for case in cases)
    return Finding(kind, severity, title, WHY, "Do this.", "Training does that.", num, cases)


def make_forecast(classes: tuple[str, ...] = FLOWERS) -> Forecast:
    gains = np.linspace(0.041, -0.012, len(classes))
    return Forecast(
        (160, 321, 642, 1284, 2569),
        (0.712, 0.794, 0.842, 0.871, 0.8931),
        (0.021, 0.013, 0.008, 0.006, 0.004),
        0.9105,
        0.9012,
        0.9188,
        tuple(
            ClassForecast(name, 0.8 + 0.02 * (i % 7), gain, gain - 0.02, gain + 0.025)
            for i, (name, gain) in enumerate(zip(classes, gains.tolist(), strict=True))
        ),
    )


def make_findings(classes: tuple[str, ...] = FLOWERS) -> tuple[Finding, ...]:
    """Return one finding of every kind, of pictures 0 to 109."""

    def of(index: int, split: str | None = "train") -> Exhibit:
        return exhibit(index, classes, split)

    first, last = classes[0], classes[-1]
    broken = [
        Case((dataclasses.replace(of(i), index=None),), "truncated after 12,345 bytes")
        for i in range(3)
    ]
    twins = [Case((of(2 * i), dataclasses.replace(of(2 * i + 1), label=first))) for i in range(6)]
    both = [
        Case((dataclasses.replace(of(i), label=first), dataclasses.replace(of(i), label=last)))
        for i in range(20, 24)
    ]
    near = [
        Case(tuple(of(j) for j in range(24 + i, 26 + 2 * i)), "half the size") for i in range(6)
    ]
    leaks = [Case((of(40 + i), of(50 + i, "test")), "distance 2 of 64") for i in range(5)]
    odd = [Case((of(60 + i, SPLITS[i % 3]),), score=0.9 - i / 100) for i in range(9)]
    suspects = [
        Case((of(70 + i, SPLITS[i % 3]),), "", 0.98 - i / 100, classes[(i + 2) % len(classes)])
        for i in range(30)
    ]
    corner = Case(tuple(of(100 + i) for i in range(10)), f"alone, the top-left corner says {last}")
    return (
        finding("broken-files", "error", "3 files cannot be decoded.", *broken),
        finding("conflicting-labels", "error", "4 pictures stand in two classes.", *both),
        finding("exact-duplicates", "warning", "6 pictures are copies of another.", *twins),
        finding("leaks", "warning", "5 test pictures have a twin in training.", *leaks),
        finding("label-suspects", "warning", "30 labels are probably wrong.", *suspects),
        finding("shortcut", "warning", f"A corner alone tells '{last}'.", corner),
        finding(
            "class-shares",
            "warning",
            "Class shares differ between training and test.",
            Case((), f"{first}: 26 % of training, 63 % of test"),
            Case((), f"{last}: 74 % of training, 37 % of test"),
        ),
        finding("near-duplicates", "note", "21 pictures are nearly the same as another.", *near),
        finding("outliers", "note", "9 pictures are unlike all others.", *odd),
        finding("imbalance", "note", "The largest class has 14 times the pictures."),
        finding("crop-loss", "note", "A centre crop would remove 31 % of the median picture."),
    )


def make_health(classes: tuple[str, ...] = FLOWERS, **changes: Any) -> Health:
    numbers = tuple(629 - 29 * (i % 20) for i in range(len(classes)))
    counts = {
        "train": numbers,
        "validation": tuple(n // 5 for n in numbers),
        "test": tuple(n // 5 for n in numbers[::-1]),
    }
    health = Health(
        name="flowers",
        location="/data/flowers.zip",
        created="2026-11-24T04:17:09+00:00",
        num_pictures=3670,
        classes=classes,
        counts=counts,
        shape={
            "sizes": "240 by 159 to 442 by 500, the median 240 by 320 (height by width)",
            "formats": "JPEG 3,670",
            "colour": "3,655 in colour, 15 in grey",
        },
        notices=("1 hidden file was ignored: <.DS_Store>.",),
        findings=make_findings(classes),
        checks=(
            Check("broken files", "3 of 3,670 cannot be decoded", 6.21),
            Check("exact duplicates", "6 copies", 0.4),
            Check("wrong labels", "30 suspects", 83.0),
            Check("drift", "needs two splits", 0.0, ran=False),
        ),
        forecast=make_forecast(classes),
        seconds=97.3,
    )
    return dataclasses.replace(health, **changes)
