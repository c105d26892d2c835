"""The contract between a method and the training loop.

A method is an `nn.Module` that owns its networks and says what one iteration is; the loop does the rest, the same
for every method. Read this file, then `methods/plain_sr.py` for the smallest one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from hpcdistill.data.index import Kind
from hpcdistill.data.needs import Needs
from hpcdistill.settings import LARGEST_WEIGHT, Section

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST_RATE = 1000.0  # Adam moves each weight by about as much at a step


class Carry(MutableMapping[str, Tensor]):
    """Tensors that one phase leaves to the next; a tensor that still carries gradients is refused."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            raise ValueError(f"carry['{name}'] still has gradients; detach it: a phase trains its own group only")
        self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class OptimizerSettings(Section):
    """Adam, as both papers use it."""

    learning_rate: float = Field(
        1e-3, gt=0, le=LARGEST_RATE, description="Adam's step size at the start of the schedule"
    )
    final_learning_rate: float = Field(1e-5, ge=0, le=LARGEST_RATE, description="the schedule's last value")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "cosine", description="by step: constant; half a cosine; constant, then a straight line (see decay_from)"
    )
    decay_from: float = Field(0.5, ge=0, lt=1, description="linear only: share of the steps before the decay begins")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's decay rates of the first and second moment")
    eps: float = Field(1e-8, gt=0, le=1, description="Adam's epsilon; gradients far below it train nothing")
    clip_norm: float = Field(
        0.0, ge=0, le=LARGEST_WEIGHT, description="largest gradient norm of the group; 0 = no clipping"
    )


@dataclass(frozen=True)
class Group:
    """Networks trained together: one optimizer, one DDP wrapper (or DeepSpeed engine)."""

    module: nn.Module
    optimizer: OptimizerSettings


@dataclass(frozen=True)
class Phase:
    """One update of one group: `loss(batch, carry)` returns 0-dim tensors by name, already weighted, to be summed.

    With `train.accumulation` it is called for each micro-batch. `before(batches, carries)` runs once before that, with
    all micro-batches of this rank's share in order: for what must see the step as a whole.
    """

    name: str
    group: str
    loss: Callable[[Batch, Carry], Terms]
    before: Callable[[Sequence[Batch], Sequence[Carry]], None] | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of the run with its own phases.

    `load` names generators that go on from their best save so far, or from the last weights as they are evaluated
    (with EMA on, the averages). Best is what the run's selected metric says or, with `judged`, the same metric of the
    generator named there; before such a segment there is always an evaluation. `on_enter` runs once, before the first
    step: a run that resumes later does not run it again, so what it changes must be tensors of the groups or of
    `Method.memory`.
    """

    name: str
    phases: tuple[Phase, ...]
    steps: int | None = None  # None: what is left of the run
    load: tuple[tuple[str, Literal["best", "last"]], ...] = ()
    judged: str | None = None
    on_enter: Callable[[], None] | None = None


class MethodConfig(Section):
    """What every method's configuration has; each method adds its own hyper-parameters."""

    name: str


class Method(nn.Module):
    """Base class of all methods. A subclass builds its networks in `__init__` and fills `groups` and `generators`."""

    Config: ClassVar[type[MethodConfig]]
    version: ClassVar[int] = 1  # raise it when the method's mathematics changes: it is part of a run's identity

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, Group] = {}
        self.generators: dict[str, nn.Module] = {}  # evaluated, exported and saved alone
        self.memory: dict[str, nn.Module] = {}  # not trained, but part of a checkpoint (replay pools)
        self.origins: dict[str, str] = {}  # published weights in use -> where they are from, for result.json
        self._wrapped: dict[str, Callable[..., Any]] = {}

    def train(self, mode: bool = True) -> Self:
        """Put the groups' networks into training mode; frozen ones stay in eval mode whatever `mode` is."""
        super().train(False)
        self.training = mode
        for group in self.groups.values():
            group.module.train(mode)
        return self

    @classmethod
    def uses_teacher(cls, config: Any) -> bool:
        """Whether a run of this configuration needs the teacher it names to be trained."""
        return False

    @classmethod
    def kind(cls, config: Any) -> Kind:
        """The kind of data set that a run of this configuration trains on; `needs` says the rest."""
        return "lr-hr"

    @classmethod
    def weights(cls, config: Any) -> tuple[str, ...]:
        """The published weights (keys of `data.fetch.weights.WEIGHTS`) that a run of this configuration uses."""
        return ()

    @property
    def measured(self) -> dict[str, nn.Module]:
        """The networks whose cost the `benchmark` command counts, in the order of its table: the generators.

        A GAN's method adds "discriminator", and what its paper compares with ("original"), built only when asked.
        Each has `takes`: "lr" or "hr" with `scale` and `channels`, or "image" with `channels_in`.
        """
        return self.generators

    def prepare(self, crop: int) -> None:
        """Called once before training: check that images of `crop` x `crop` pixels (`data.crop`) fit, load published
        weights. Raises UserError for what cannot be trained."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of one iteration, in order."""
        raise NotImplementedError

    @property
    def needs(self) -> Needs:
        """What the data must deliver."""
        raise NotImplementedError

    def segments(self) -> tuple[Segment, ...]:
        """The run's segments; by default one that is as long as the run."""
        return (Segment("main", self.phases),)

    def call(self, group: str, *inputs: Any, **options: Any) -> Any:
        """Run the group's module through its wrapper (DDP, DeepSpeed). Use it in the group's own phase; elsewhere
        the module is frozen and called directly."""
        return self._wrapped.get(group, self.groups[group].module)(*inputs, **options)

    def bind(self, group: str, wrapped: Callable[..., Any]) -> None:
        """The loop's side of `call`."""
        self._wrapped[group] = wrapped


def weigh(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value` in float32: loss terms stay out of half precision."""
    return weight * value.float()


def constant(value: float) -> Tensor:
    """A loss weight as a 0-dim float32 tensor, so that captured graphs and stacked runs can change it."""
    return torch.tensor(value, dtype=torch.float32)
