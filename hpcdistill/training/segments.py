"""The segments of a run: where each begins and ends, the weights it takes, and what it puts back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate.utils import broadcast
from torch import Tensor, nn

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Group, Segment
from hpcdistill.models.registry import load_generator
from hpcdistill.training.deepspeed import replaced
from hpcdistill.training.networks import Networks
from hpcdistill.training.position import best_of
from hpcdistill.training.run_folder import RunFolder

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stretch:
    """A segment's steps: from `start` to before `end`, both counted from the run's beginning."""

    segment: Segment
    start: int
    end: int

    @property
    def takes_best(self) -> bool:
        """Whether it begins with the best weights so far."""
        return any(which == "best" for _, which in self.segment.load)


def place_segments(segments: tuple[Segment, ...], steps: int, evaluated: bool) -> list[Stretch]:
    """The segments one after the other; the one without a length takes what the others leave of `steps`.

    UserError when they do not fill the run, or when one takes the best weights and none is chosen before it
    (`evaluated`: whether the run has an evaluator).
    """
    lengths = [segment.steps if segment.share is None else max(1, round(segment.share * steps)) for segment in segments]
    fixed = sum(length or 0 for length in lengths)
    stretches, start = [], 0
    for segment, length in zip(segments, lengths, strict=True):
        end = start + (length if length is not None else max(0, steps - fixed))
        stretches.append(Stretch(segment, start, end))
        start = end
    if start != steps:
        raise UserError(f"train.steps: the method's segments take {start} steps, the run has {steps}; make them equal")
    for stretch in stretches:
        name = stretch.segment.name
        if stretch.takes_best and not evaluated:
            raise UserError(
                f"data.eval: is empty, but the segment {name} goes on from the best weights, which nothing "
                "chooses; name a test set"
            )
        assert stretch.start > 0 or not stretch.takes_best, f"{name}: no weights are the best before the first step"
    return stretches


def batches_a_step(segments: Sequence[Segment]) -> int:
    """How many batches an iteration takes, the same in the whole run: one more than the highest number of a phase."""
    return 1 + max(phase.batch for segment in segments for phase in segment.phases)


class Courses:
    """How far each group is on its way, which its learning rate follows."""

    def __init__(self, stretches: Sequence[Stretch], groups: Mapping[str, Group]) -> None:
        self._of_groups: dict[str, list[tuple[int, int]]] = {}
        for name, group in groups.items():
            trained = (any(phase.group == name for phase in stretch.segment.phases) for stretch in stretches)
            own = [(stretch.start, stretch.end) for stretch, has in zip(stretches, trained, strict=True) if has]
            self._of_groups[name] = own if group.course == "own" and own else [(0, stretches[-1].end)]

    def at(self, group: str, step: int) -> tuple[int, int]:
        """Of the steps that count for `group`, the number of those before 0-based `step`, and of all."""
        own = self._of_groups[group]
        done = sum(min(max(step - start, 0), end - start) for start, end in own)
        return done, sum(end - start for start, end in own)


class PutBack:
    """The weights that a segment puts back when it ends; part of the checkpoints made while it lasts."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}  # "put_back/<generator>", and "put_back_averages/<generator>" with EMA on

    def take(self, names: Sequence[str], networks: Networks) -> None:
        """Copies of the weights of the generators `names`, and of their averages where there are some."""
        modules = self._modules(networks)
        wanted = [f"{kind}/{name}" for kind in ("put_back", "put_back_averages") for name in names]
        self.states = {key: cloned(modules[key].state_dict()) for key in wanted if key in modules}

    def give(self, networks: Networks) -> None:
        """Write the copies back and forget them."""
        modules = self._modules(networks)
        for key, state in self.states.items():
            modules[key].load_state_dict(state)
        self.states = {}

    @staticmethod
    def _modules(networks: Networks) -> dict[str, nn.Module]:
        named = {f"put_back/{name}": module for name, module in networks.method.generators.items()}
        return named | {f"put_back_averages/{name}": module for name, module in networks.averaged.items()}


def enter(segment: Segment, networks: Networks, put_back: PutBack, folder: RunFolder) -> None:
    """Begin a segment: keep what it puts back, take the weights it asks for, let the method prepare itself."""
    evaluated = networks.evaluated()
    with replaced(networks.groups.values()):
        put_back.take(segment.put_back, networks)
        _load_weights(segment, networks, evaluated, folder)
        if segment.on_enter:
            segment.on_enter()


def leave(networks: Networks, put_back: PutBack) -> None:
    """End a segment: the weights that it promised to put back, before they are evaluated or saved."""
    if put_back.states:
        with replaced(networks.groups.values()):
            put_back.give(networks)


def _load_weights(segment: Segment, networks: Networks, evaluated: Mapping[str, nn.Module], folder: RunFolder) -> None:
    """Give the generators, and what is evaluated in their place, the weights that the segment begins with."""
    for name, which in segment.load:
        # The last weights are saved at the run's end only; here they are those that would be evaluated now.
        state = evaluated[name].state_dict()
        if which == "best":
            # From rank 0: a shared file system may still show the others an older file.
            state = cloned(state)
            if networks.accelerator.is_main_process:
                best = load_generator(folder.generator(best_of(segment.judged), name))[0].state_dict()
                state = {key: best[key].to(value) for key, value in state.items()}
            state = broadcast(state)
        networks.method.generators[name].load_state_dict(state)
        evaluated[name].load_state_dict(state)


def cloned(state: Mapping[str, Tensor]) -> State:
    """Copies that no later update changes."""
    return {key: value.clone() for key, value in state.items()}
