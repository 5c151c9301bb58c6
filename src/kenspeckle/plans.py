"""What a run meant to do, tried and chose, as plain values; a score is always one by validation."""

from dataclasses import dataclass

__all__ = ["Attempt", "Choice", "Option", "Plan"]


@dataclass(frozen=True)
class Option:
    """One of the answers to a question.

    Attributes:
        name: in words, such as ``160x160`` or ``crop``.
        score: what it came to, 0 to 1; None when it was not tried.
        chosen: whether it was taken.
    """

    name: str
    score: float | None
    chosen: bool


@dataclass(frozen=True)
class Choice:
    """A question that validation answered.

    Attributes:
        what: was chosen, such as ``input size``.
        options: what there was to choose from.
        reason: why, in words.
    """

    what: str
    options: tuple[Option, ...]
    reason: str


@dataclass(frozen=True)
class Attempt:
    """A step of the ladder: a model that was trained, or could have been.

    Attributes:
        name: of the step, such as ``full fine-tuning``.
        settings: what was trained and how, in words.
        outcome: ``kept``, ``no better``, or why it did not run or ended early, in words.
        planned_seconds: what it was expected to take; None when it was not planned.
        seconds: what it took; 0 when it did not run.
        num_epochs: passes over the training pictures; 0 for a head on frozen features.
        score: by validation, 0 to 1; None when it did not run.
        train_score: accuracy on the training pictures, 0 to 1, in the epoch that was kept.
        gain: of the score over the best before, -1 to 1; None for the first.
        finished: seconds from the start of the run to its end; None when it did not run.
    """

    name: str
    settings: str
    outcome: str
    planned_seconds: float | None
    seconds: float
    num_epochs: int
    score: float | None
    train_score: float | None
    gain: float | None
    finished: float | None

    @property
    def ran(self) -> bool:
        """Whether it was started and gave a model."""
        return self.score is not None


@dataclass(frozen=True)
class Plan:
    """How a run used its time.

    Attributes:
        seconds: that it was to take at most.
        asked: whether the user named the time, or the default was taken.
        metric: what the scores are: ``accuracy`` or ``balanced accuracy``.
        promise: what was planned at the start, a line each.
        choices: what validation chose.
        attempts: the steps, in the order of the ladder.
        regularisation: what was done against overfitting and what it brought, a sentence each.
        ended_because: why the run ended when it did, in words.
    """

    seconds: float
    asked: bool
    metric: str
    promise: tuple[str, ...]
    choices: tuple[Choice, ...]
    attempts: tuple[Attempt, ...]
    regularisation: tuple[str, ...]
    ended_because: str
