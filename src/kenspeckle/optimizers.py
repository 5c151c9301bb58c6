"""Optimizers, learning-rate schedules, updates and averaged weights.

An *update* is what happens between a batch and the moved weights: it takes the optimizer, a
closure that returns the batch's mean loss, and the batch's size, and returns the loss, detached.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from kenspeckle.config import OptimizerConfig, ScheduleConfig
from kenspeckle.core import InvalidValueError

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Ema",
    "Muon",
    "Update",
    "accumulate",
    "clip",
    "optimizer",
    "orthogonalise",
    "plain",
    "schedule",
]

Update = Callable[[Optimizer, Callable[[], Tensor], int], Tensor]
Parameters = Sequence[nn.Parameter]


def optimizer(
    config: OptimizerConfig, model: nn.Module, stages: Sequence[nn.Module] = (), decay: float = 1.0
) -> Optimizer:
    """Return the optimizer that `config` describes, for the trainable parameters of `model`.

    Parameters with one axis (biases, norms) get no weight decay. Each group's ``initial_lr`` is
    the rate that a schedule's factor acts on.

    Args:
        config: which optimizer, with its settings.
        model: the network, already on the device where it will be trained.
        stages: the parts of the model from its inputs to its outputs, where the rate decays.
        decay: factor on the rate from each stage to the one before it, above 0; 1 is none.
            Source: Howard and Ruder 2018, section 3.2, arXiv 1801.06146.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    built = OPTIMIZERS[config.name](config, parameters)
    if decay != 1:
        factors = {
            parameter: decay ** (len(stages) - 1 - depth)
            for depth, stage in enumerate(stages)
            for parameter in stage.parameters()
        }
        built.param_groups = [
            part for group in built.param_groups for part in _by_factor(group, factors)
        ]
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return built


def _by_factor(group: dict[str, Any], factors: dict[nn.Parameter, float]) -> list[dict[str, Any]]:
    """Split a group into one for each factor on its learning rate."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(factors[parameter], []).append(parameter)
    return [{**group, "params": some, "lr": group["lr"] * f} for f, some in parts.items()]


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split into the parameters that decay and those that do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# torch's fused kernels, one pass over the weights, take a half to a quarter of the time of its
# loops on a CPU; RMSprop has none.


def _sgd(config: OptimizerConfig, parameters: Parameters) -> Optimizer:
    default = 0.9 if config.name in {"momentum", "nesterov"} else 0.0
    momentum = default if config.momentum is None else config.momentum
    return torch.optim.SGD(
        _groups(parameters, config.weight_decay),
        lr=config.lr,
        momentum=momentum,
        nesterov=config.name == "nesterov" and momentum > 0,
        fused=True if momentum else None,  # without momentum the loop is the faster one
    )


def _rmsprop(config: OptimizerConfig, parameters: Parameters) -> Optimizer:
    return torch.optim.RMSprop(
        _groups(parameters, config.weight_decay),
        lr=config.lr,
        alpha=0.99 if config.alpha is None else config.alpha,
        eps=config.eps or 1e-8,
        momentum=config.momentum or 0.0,
    )


def _adam(config: OptimizerConfig, parameters: Parameters) -> Optimizer:
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        _groups(parameters, config.weight_decay),
        lr=config.lr,
        betas=config.betas or (0.9, 0.999),
        eps=config.eps or 1e-8,
        fused=True,
    )


def _muon(config: OptimizerConfig, parameters: Parameters) -> Optimizer:
    # Parameters come in the order of the layers: the last matrix is the layer that classifies.
    *hidden, last = (p for p in parameters if p.ndim > 1)
    rest = [last, *(p for p in parameters if p.ndim <= 1)]
    momentum = 0.6 if config.momentum is None else config.momentum
    return Muon(hidden, rest, lr=config.lr, momentum=momentum, weight_decay=config.weight_decay)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Parameters], Optimizer]] = {
    "gd": _sgd,  # the whole training set per step is the work of the update `accumulate`
    "sgd": _sgd,
    "momentum": _sgd,
    "nesterov": _sgd,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adam,
    "muon": _muon,
}


def orthogonalise(
    matrix: Float[Tensor, "rows columns"], num_steps: int = 3
) -> Float[Tensor, "rows columns"]:
    """Return about the nearest matrix whose singular values are all one.

    A quintic Newton-Schulz iteration that is steep at zero: in a few steps all but the smallest
    singular values land near one (0.6 to 1.3), which serves as well as exactly one.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/

    Args:
        matrix: any matrix; in float32, since CPUs without bfloat16 take 30 times as long in it.
        num_steps: iterations; 3 train as well as 5.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (wide.norm() + 1e-7)  # puts every singular value at or below one
    for _ in range(num_steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(Optimizer):
    """Momentum whose step is orthogonalised, in float32; AdamW for all but the hidden matrices.

    Every singular direction of a hidden matrix moves equally far. Hidden matrices (filters are
    flattened to one row per output channel) are kept at rows of length one on average, so that the
    learning rate is about the relative size of a step; weight decay would have no effect on them.
    Source: airbench94_muon, https://github.com/KellerJordan/cifar10-airbench

    Args:
        hidden: the matrices and filters from the first layer to the last but one.
        rest: all other parameters.
        lr: rate of the hidden matrices, usually 0.05 to 0.3; the rest take `REST_SHARE` of it.
        momentum: share of the gathered gradients that is kept, in Nesterov's form; 0 to below 1.
        weight_decay: pull of the rest's matrices towards zero, apart from their gradient.
    """

    REST_SHARE = 0.1
    """Of 0.015 to 0.4, the middle of those that trained best at rates of 0.12 and 0.24."""

    def __init__(
        self,
        hidden: Parameters,
        rest: Parameters,
        *,
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": list(hidden), "momentum": momentum}]
        groups += [
            {"lr": lr * self.REST_SHARE, "betas": (0.9, 0.95), "eps": 1e-10, **group}
            for group in _groups(rest, weight_decay)
        ]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Move every parameter that has a gradient; return the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            move = _muon_step if "momentum" in group else _adamw_step
            for parameter in group["params"]:
                if parameter.grad is not None:
                    move(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _muon_step(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    if not state:
        state["gathered"] = torch.zeros_like(weight)
    gathered = state["gathered"].mul_(group["momentum"]).add_(gradient)
    ahead = gradient.add(gathered, alpha=group["momentum"])
    weight.mul_(math.sqrt(len(weight)) / (weight.norm() + 1e-7))
    weight.sub_(orthogonalise(ahead.flatten(1)).view(weight.shape), alpha=group["lr"])


def _adamw_step(
    weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    """Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2."""
    if not state:
        state["step"] = torch.zeros(())
        state["mean"] = torch.zeros_like(weight)
        state["square"] = torch.zeros_like(weight)
    state["step"] += 1
    step = state["step"].item()
    first, second = group["betas"]
    mean = state["mean"].lerp_(gradient, 1 - first)
    square = state["square"].lerp_(gradient.square(), 1 - second)
    root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.addcdiv_(mean, root, value=-group["lr"] / (1 - first**step))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "steps": lambda share: 1.0 if share < 0.5 else 0.1 if share < 0.75 else 0.01,
}
"""From the share of the run that is over, 0 to 1, to the factor on the learning rate."""


def schedule(config: ScheduleConfig, num_steps: int) -> Callable[[float], float]:
    """Return the factor on the learning rate as a function of the step's number, from 0.

    The number need not be whole: a run in a hurry passes over parts of its schedule.

    The rate rises in equal steps over the warm-up, is whole at the first step after it, and then
    follows the named shape; ``linear`` and ``cosine`` would be zero at step `num_steps`.

    Args:
        config: shape and warm-up.
        num_steps: steps of the whole run; later ones keep the last factor.

    Example:
        >>> factor = schedule(ScheduleConfig("linear"), 4)
        >>> [factor(step) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    shape = SCHEDULES[config.name]
    num_warmup = round(config.warmup * num_steps)
    # The drops of `steps` are at shares of the run; what falls smoothly falls after the warm-up.
    start = 0 if config.name == "steps" else num_warmup

    def factor(step: int | float) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        return shape(min(1.0, (step - start) / max(1, num_steps - start)))

    return factor


def plain(optimizer: Optimizer, loss_of_batch: Callable[[], Tensor], num_items: int) -> Tensor:
    """Step along the gradient of one batch; an `Update`."""
    return _step(optimizer, loss_of_batch, math.inf)


def clip(max_norm: float) -> Update:
    """Return an update that shortens gradients longer than `max_norm` to it.

    Source: Pascanu et al. 2013, arXiv 1211.5063.

    Args:
        max_norm: largest Euclidean length of all gradients together, above 0.
    """

    def update(optimizer: Optimizer, loss_of_batch: Callable[[], Tensor], num_items: int) -> Tensor:
        return _step(optimizer, loss_of_batch, max_norm)

    return update


def accumulate(num_items: int, max_norm: float = math.inf) -> Update:
    """Return an update that steps once `num_items` pictures have been seen.

    Each batch counts by its share of them, so that the step follows the gradient of their mean
    loss: with the size of the training set this is gradient descent in the textbook's sense.

    Args:
        num_items: pictures per step, at least 1; batches must add up to it exactly.
        max_norm: largest Euclidean length of the step's gradient, above 0.

    Raises:
        InvalidValueError: from the update, when a batch goes beyond `num_items`.
    """
    num_seen = 0

    def update(optimizer: Optimizer, loss_of_batch: Callable[[], Tensor], size: int) -> Tensor:
        nonlocal num_seen
        if num_seen == 0:
            optimizer.zero_grad()
        num_seen += size
        if num_seen > num_items:
            raise InvalidValueError(
                f"batches must add up to the {num_items} items of a step; got {num_seen}; "
                "end a batch where the step ends"
            )
        loss = loss_of_batch()
        (loss * (size / num_items)).backward()
        if num_seen == num_items:
            _move(optimizer, max_norm)
            num_seen = 0
        return loss.detach()

    return update


def _step(optimizer: Optimizer, loss_of_batch: Callable[[], Tensor], max_norm: float) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of_batch()
    loss.backward()
    _move(optimizer, max_norm)
    return loss.detach()


def _move(optimizer: Optimizer, max_norm: float) -> None:
    if max_norm < math.inf:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()


class Ema:
    """An exponential moving average of a network's weights.

    The decay of the n-th update is at most ``(1 + n) / (10 + n)``, n from 0, so that the first
    weights are soon forgotten. Running statistics of norms are averaged like weights, since they
    belong to them; whole numbers (counters) are copied.
    Source: Polyak and Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.

    Args:
        model: the network, whose present weights are where the average starts.
        decay: share of the average that an update keeps, 0 to below 1.

    Attributes:
        average: the averaged state, by name.
        num_updates: updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: t.detach().clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the network's weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, now in model.state_dict().items():
            if now.is_floating_point():
                self.average[name].lerp_(now, 1 - decay)
            else:
                self.average[name].copy_(now)

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged state, for ``load_state_dict``; it does not follow later updates."""
        return {name: tensor.clone() for name, tensor in self.average.items()}
