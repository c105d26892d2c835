"""Optimization: the trained groups, their learning rates, freezing all but one, and averaged weights (EMA)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from hpcdistill.methods.base import Group, OptimizerSettings

# Where Adam's fused kernel takes the rate as a tensor, and of which type; a captured step finds it there.
RATES: Final = {"cuda": torch.float32, "cpu": torch.float64}


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Adam's step size for 0-based `step` of `steps`.

    cosine: lr_n + (lr_0 - lr_n) (1 + cos(pi t)) / 2 with t = step / steps; linear: lr_0 up to `decay_from`, then
    straight to lr_n, reached one step after the last.
    """
    first, last = settings.learning_rate, settings.final_learning_rate
    done = min(step / steps, 1.0)
    if settings.schedule == "cosine":
        return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "linear":
        return first + (last - first) * max(0.0, (done - settings.decay_from) / (1 - settings.decay_from))
    return first


class TrainedGroup:
    """A method's group as the loop trains it."""

    collective = False  # whether what reads weights and moments must be called by every rank

    def __init__(self, name: str, group: Group, accelerator: Accelerator) -> None:
        self.name = name
        self.settings = group.optimizer
        self.module = group.module
        self.accelerator = accelerator
        adam = torch.optim.Adam(
            group.module.parameters(),
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            eps=self.settings.eps,
            fused=True,  # besides its speed, only the fused form takes `found_inf`, which masks an update
        )
        self.wrapped, self.optimizer = accelerator.prepare(group.module, adam)
        if (device := accelerator.device).type in RATES:
            for parameters in adam.param_groups:
                parameters["lr"] = torch.full((), self.settings.learning_rate, dtype=RATES[device.type], device=device)
                parameters["capturable"] = device.type == "cuda"
        if accelerator.mixed_precision != "no":
            # Accelerate has patched `forward` to autocast by itself. The loop's own autocast is enough, and a
            # generator that is its group's module would be evaluated in half precision, others in full.
            for patched in ("forward", "_original_forward"):
                vars(group.module).pop(patched, None)
            group.module.register_forward_hook(outputs_to_fp32)
        self.adam = adam
        self.parameters = list(group.module.parameters())
        self.rate = self.settings.learning_rate

    def schedule(self, step: int, steps: int) -> None:
        """Set the learning rate of 0-based `step` of `steps`."""
        self.rate = learning_rate(self.settings, step, steps)
        for parameters in self.adam.param_groups:
            if isinstance(parameters["lr"], Tensor):
                parameters["lr"].fill_(self.rate)
            else:
                parameters["lr"] = self.rate

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-batch; the gradients are reduced with the last one."""
        no_sync: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped)
        return contextlib.nullcontext() if last else no_sync

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts the module's weights are whole on every rank, to be read."""
        return contextlib.nullcontext()

    def replaced(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts the module's weights are whole and may be replaced, alike on every rank."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Let go of what the engine holds."""

    def update(self, halted: Tensor) -> Tensor:
        """Step the optimizer unless `halted` (0-dim bool, updated in place) and return the gradient's norm.

        Without a loss scaler a non-finite gradient sets `halted`: from then on no weight moves, and the loop stops
        at its next log point. With one (fp16) the scaler skips such steps and lowers its scale.
        """
        scaled = self.accelerator.scaler is not None
        if scaled:
            self.accelerator.unscale_gradients(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.settings.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip_norm, norm)
        if not scaled:
            halted |= ~torch.isfinite(norm)
            self.adam.found_inf = halted.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Adam's state by parameter name: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`."""
        return {
            f"{name}.{key}": value.contiguous()
            for name, parameter in self.module.named_parameters()
            for key, value in self.adam.state.get(parameter, {}).items()
        }

    @torch.no_grad()
    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `optimizer_tensors` gave."""
        for name, parameter in self.module.named_parameters():
            if f"{name}.step" not in tensors:
                continue  # it has not been stepped yet
            # The fused kernel walks memory in one order: the moments must lie as their parameter does.
            moments = {
                key: torch.empty_like(parameter).copy_(tensors[f"{name}.{key}"]) for key in ("exp_avg", "exp_avg_sq")
            }
            self.adam.state[parameter] = {"step": tensors[f"{name}.step"].to(parameter.device), **moments}


def outputs_to_fp32(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """What a group returns to a method's losses is float32, also where the group is frozen."""
    return convert_to_fp32(outputs)


class TermGradients:
    """The norm of each term's own gradient with respect to `parameters`: of its mean over micro-batches and ranks.

    So it is that of the global batch, however it is cut. A term that does not depend on the parameters has norm 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], pieces: int, accelerator: Accelerator) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._pieces, self._left = pieces, pieces
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """Take in terms of one of the `pieces` micro-batches: the norms after the last one, nothing before it.

        The graph is kept for the update. With several ranks a collective call. The backward pass is scaled by `scale`,
        the loss scaler's: else fp16 would lose what the update does not.
        """
        norms = {}
        for name, term in terms.items():
            gradient = self._gradient(term * scale) / scale
            if name in self._sums:
                gradient = gradient + self._sums.pop(name)
            if self._left > 1:
                self._sums[name] = gradient
                continue
            # One term at a time, so that one flattened gradient lives, not one a term.
            if self._accelerator.num_processes > 1:
                gradient = self._accelerator.reduce(gradient, "mean")
            norms[name] = torch.linalg.vector_norm(gradient) / self._pieces
        return norms

    def next_piece(self) -> None:
        """All terms of a micro-batch have been taken in."""
        self._left -= 1

    def _gradient(self, term: Tensor) -> Tensor:
        """Flattened, with zeros for the parameters that the term does not depend on."""
        found: tuple[Tensor | None, ...] = (None,) * len(self.parameters)
        if self.parameters and term.requires_grad:
            found = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
        pairs = zip(self.parameters, found, strict=True)
        flat = [(torch.zeros_like(p) if gradient is None else gradient).flatten() for p, gradient in pairs]
        return torch.cat(flat) if flat else torch.zeros_like(term)[None]


class Freezer:
    """Switches between groups. A frozen module still normalises as in training, but remembers nothing of it.

    What a method itself has frozen inside a group stays frozen.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._groups = {name: _Switch(module) for name, module in modules.items()}
        self._active: str | None = None
        self._marked: list[tuple[Tensor, Tensor]] = []  # vectors of the power iterations, and what they were

    def only(self, group: str) -> None:
        """Let `group` train and freeze the others; free of work when `group` was active already."""
        if group == self._active:
            return
        for name, other in self._groups.items():
            if name != group:
                other.turn(False)
        self._groups[group].turn(True)  # last: a parameter that two groups share must end up trainable
        self._active = group

    @torch.no_grad()
    def mark(self) -> None:
        """Remember where the power iterations of the active group stand, for `rewind`."""
        assert self._active is not None
        vectors = [vector for part in self._groups[self._active].spectral for vector in part.buffers(recurse=False)]
        self._marked = [(vector, vector.clone()) for vector in vectors]

    @torch.no_grad()
    def rewind(self) -> None:
        """Put the power iterations back to the mark. No weight moves between the micro-batches of a phase, so that
        each repeats the iterations of the first: it sees the same weights, and they end where one batch ends."""
        for vector, marked in self._marked:
            vector.copy_(marked)

    def release(self) -> None:
        """Undo every freeze, for evaluation and saving."""
        for group in self._groups.values():
            group.turn(True)
        self._active = None


class _Switch:
    """What is switched off in a frozen group: its gradients, BatchNorm's statistics, the power iterations."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.norms = [part for part in parts if isinstance(part, _NormBase) and part.track_running_stats]
        self.spectral = [part for part in parts if isinstance(part, _SpectralNorm)]

    def turn(self, on: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(on)
        for norm in self.norms:
            norm.track_running_stats = on
        for spectral in self.spectral:
            spectral.training = on


class Averages:
    """Averaged copies of `generators`: a <- decay * a + (1 - decay) * weight after each step; buffers are copied."""

    def __init__(self, generators: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.generators: dict[str, nn.Module] = {
            name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in generators.items()
        }
        self._pairs = [(self.generators[name], module) for name, module in generators.items()]

    @torch.no_grad()
    def update(self, halted: Tensor) -> None:
        """Take in the weights of a step; with `halted` (0-dim bool) everything stays as it is."""
        for average, module in self._pairs:
            averaged: list[Tensor] = list(average.parameters())
            if averaged:
                share = (~halted).to(averaged[0].dtype) * (1 - self.decay)
                differences: list[Tensor] = list(torch._foreach_sub(list(module.parameters()), averaged))
                torch._foreach_mul_(differences, share)
                torch._foreach_add_(averaged, differences)
            for kept, buffer in zip(average.buffers(), module.buffers(), strict=True):
                kept.copy_(torch.where(halted, kept, buffer))
