"""The contract between a method and the training loop.

A method is an `nn.Module` that owns its networks and says what one iteration is; the loop does the rest, the same
for every method. Read this file, then `methods/sr.py` and `methods/output_distillation.py` for a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from hpcdistill.data.counter import shared_seed
from hpcdistill.data.needs import Needs
from hpcdistill.methods.settings import NO_TEACHERS, MethodConfig, OptimizerSettings, Role, Teachers

__all__ = ["NO_TEACHERS", "MethodConfig", "OptimizerSettings", "Role", "Teachers"]  # one import for a method's file

Batch = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Part = Callable[[], Terms]


@dataclass(frozen=True)
class Progress:
    """Where the run is when a loss is computed: for weights that follow a schedule, and for draws all ranks share."""

    step: Tensor  # 0-dim int64 on the training device: updates made before this one
    steps: Tensor  # likewise: updates of the whole run
    seed: int = 0  # the run's
    number: int = 0  # `step` on the host, for draws; a loss that branched on it would be captured with one value

    @classmethod
    def at(cls, step: int, steps: int, seed: int = 0, device: torch.device | str = "cpu") -> Progress:
        """Before the update number `step` (from 0) of a run of `steps` updates."""
        # Filled on the device: copying them there, as torch.tensor does, would wait for all that is computed there.
        counts = [torch.full((), count, dtype=torch.int64, device=device) for count in (step, steps)]
        return cls(counts[0], counts[1], seed, step)

    @property
    def share(self) -> Tensor:
        """The share of the run that is done, 0-dim float32 in [0, 1)."""
        return self.step / self.steps

    def generator(self) -> torch.Generator:
        """On the CPU, for a draw that every rank must share (a sub-network, a resolution); alike at each call.

        What a rank may draw alone comes from torch's default generator, which the loop seeds by step and rank.
        """
        return torch.Generator().manual_seed(shared_seed(self.seed, self.number))


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


@dataclass(frozen=True)
class Group:
    """Networks trained together: one optimizer, one DDP wrapper (or DeepSpeed engine).

    `course`: whether the learning rate follows the run's steps, or the group's own: those of segments that train it.
    """

    module: nn.Module
    optimizer: OptimizerSettings
    course: Literal["run", "own"] = "run"


@dataclass(frozen=True)
class Phase:
    """One update of one group: `loss(batch, carry, progress)` returns 0-dim tensors by name, weighted, to be summed.

    Or it returns functions that compute such terms, different ones, with nothing of their graphs in common: the loop
    runs the backward pass of each before it calls the next, so that one graph is in memory at a time. The last one
    must depend on all parameters of the group that train, as ranks add up their gradients in its backward pass.

    With `train.accumulation` it is called for each micro-batch. `before(batches, carries)` runs once before that, with
    all micro-batches of this rank's share in order: for what must see the step as a whole (replay pools).
    `after(progress)` runs once after the group's update (masks, proximal steps, projections). Both without gradients.

    `batch` says which of the iteration's batches it sees. One number more is one more batch of `train.batch_size`
    samples an iteration, in all segments of the run. Each batch has a carry of its own: phases of one batch pass on
    to each other, those of another know nothing of it. Phases of one name are logged as one, with their mean.
    """

    name: str
    group: str
    loss: Callable[[Batch, Carry, Progress], Terms | Sequence[Part]]
    before: Callable[[Sequence[Batch], Sequence[Carry]], None] | None = None
    after: Callable[[Progress], None] | None = None
    batch: int = 0


@dataclass(frozen=True)
class Segment:
    """A stretch of the run with its own phases.

    `load` names generators that go on from their best save so far, or from the last weights as they are evaluated
    (with EMA on, the averages). Best is what the run's selected metric says or, with `judged`, the same metric of the
    generator named there; before such a segment there is always an evaluation. `on_enter` runs once, before the first
    step: a run that resumes later does not run it again, so what it changes must be tensors of the groups or of
    `Method.memory`. `put_back` names generators that get back, when the segment ends, the weights they had before it
    loaded any: a student's block may use the best teacher while the latest one is what goes on training.
    """

    name: str
    phases: tuple[Phase, ...]
    steps: int | None = None  # None: what is left of the run
    share: float | None = None  # instead of `steps`: that share of the run's, rounded, one at least
    load: tuple[tuple[str, Literal["best", "last"]], ...] = ()
    judged: str | None = None
    put_back: tuple[str, ...] = ()
    on_enter: Callable[[], None] | None = None


class Method(nn.Module):
    """Base class of all methods. A subclass builds its networks in `__init__` and fills `groups` and `generators`.

    It is constructed with its `Config` and, by role, the trained networks that `roles` asks for.
    """

    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any, teachers: Teachers = NO_TEACHERS) -> None:
        super().__init__()
        self.config = config
        self.groups: dict[str, Group] = {}
        self.generators: dict[str, nn.Module] = {}  # evaluated, exported and saved alone
        self.saved: dict[str, nn.Module] = {}  # saved beside them, to serve another run (discriminators)
        self.memory: dict[str, nn.Module] = {}  # not trained, but part of a checkpoint (replay pools)
        self.origins: dict[str, str] = {}  # published weights in use -> where they are from, for result.json
        self._wrapped: dict[str, Callable[..., Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "Config" in vars(cls) and "METHOD" not in vars(cls.Config):
            cls.Config.METHOD = f"{cls.__module__}:{cls.__qualname__}"

    def train(self, mode: bool = True) -> Self:
        """Put the groups' networks into training mode; frozen ones stay in eval mode whatever `mode` is."""
        super().train(False)
        self.training = mode
        for group in self.groups.values():
            group.module.train(mode)
        return self

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


def whole(loss: Terms | Sequence[Part]) -> Terms:
    """All terms of what a phase's loss returned, in one graph."""
    if isinstance(loss, dict):
        return loss
    return {name: term for part in loss for name, term in part().items()}


def weigh(weight: Tensor, value: Tensor) -> Tensor:
    """`weight * value` in float32: loss terms stay out of half precision."""
    return weight * value.float()


def constant(value: float) -> Tensor:
    """A loss weight as a 0-dim float32 tensor, so that captured graphs and stacked runs can change it."""
    return torch.tensor(value, dtype=torch.float32)
