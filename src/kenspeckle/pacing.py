"""Where a training stands in its schedule when the clock has a say."""

import math

__all__ = ["Pace"]

NUM_MEASURED = 5  # steps before their time is believed
MEMORY = 0.95  # share of the estimate that a further step leaves


class Pace:
    """The position in a schedule, from 0 to the number of its steps.

    Without a deadline a step moves it by one. With one, when the steps that are left would take too
    long, a step moves it by more, so that the schedule comes to its end with the last step that
    there is time for. A schedule that ends beats a longer one that is cut off.
    Source: budgeted training, Li, Yumer and Ramanan 2020, arXiv 1905.04753.

    Args:
        num_steps: of the whole schedule, at least 1.
        steps_per_epoch: after so many the validation pictures are answered, at least 1.
        deadline: when the last validation must be done, in seconds of the clock that `start` and
            `step_done` are told; None where there is no hurry.
        validation_seconds: what answering the validation pictures is expected to take.
    """

    def __init__(
        self,
        num_steps: int,
        steps_per_epoch: int,
        deadline: float | None = None,
        validation_seconds: float = 0.0,
    ) -> None:
        self.num_steps = num_steps
        self.steps_per_epoch = steps_per_epoch
        self.deadline = deadline
        self.validation_seconds = validation_seconds
        self.position = 0.0
        self._now = 0.0
        self._num_timed = 0
        self._seconds_per_step = 0.0

    @property
    def over(self) -> bool:
        """Whether the schedule has come to its end."""
        return self.position >= self.num_steps

    @property
    def num_epochs_left(self) -> int:
        """Epochs that are still to come, the last perhaps not a whole one."""
        left = self.num_steps - self.position
        if self._num_timed:
            left = min(left, self._affordable())
        return math.ceil(left / self.steps_per_epoch)

    def start(self, now: float) -> None:
        """Note that an epoch begins."""
        self._now = now

    def step_done(self, now: float) -> None:
        """Note that a step was made, and move on."""
        self._num_timed += 1
        share = max(1 / self._num_timed, 1 - MEMORY)
        self._seconds_per_step += share * (now - self._now - self._seconds_per_step)
        self._now = now
        left = self.num_steps - self.position
        if self._num_timed < NUM_MEASURED or left <= (fitting := self._affordable()):
            self.position += 1
        else:
            self.position += left / max(1.0, fitting + 1)

    def _affordable(self) -> float:
        """Return how many steps fit before the deadline, with the validations between them."""
        if self.deadline is None:
            return math.inf
        seconds = self.deadline - self._now - self.validation_seconds
        per_step = self._seconds_per_step + self.validation_seconds / self.steps_per_epoch
        return max(0.0, seconds) / max(per_step, 1e-9)
