"""One trained group: its module, wrapper, optimizer, and an update that a non-finite loss cannot spoil."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn

from hpcdistill.methods.base import Group
from hpcdistill.training.schedule import learning_rate


class TrainedGroup:
    """A method's group as the loop trains it."""

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
        if accelerator.mixed_precision != "no":
            # Accelerate has patched `forward` to autocast by itself. The loop's own autocast is enough, and a
            # generator that is its group's module would be evaluated in half precision, others in full.
            for patched in ("forward", "_original_forward"):
                vars(group.module).pop(patched, None)
            group.module.register_forward_hook(_outputs_to_fp32)
        self.adam = adam
        self.parameters = list(group.module.parameters())
        self.rate = self.settings.learning_rate

    def schedule(self, step: int, steps: int) -> None:
        """Set the learning rate of 0-based `step` of `steps`."""
        self.rate = learning_rate(self.settings, step, steps)
        for parameters in self.adam.param_groups:
            parameters["lr"] = self.rate

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


def _outputs_to_fp32(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """What a group returns to a method's losses is float32, also where the group is frozen."""
    return convert_to_fp32(outputs)


def gradient_norms(terms: dict[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """The norm of each term's own gradient with respect to `parameters`; the graph is kept for the update.

    A term that does not depend on them has norm 0.
    """
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    norms = {}
    for name, term in terms.items():
        gradients: list[Tensor] = []
        if chosen and term.requires_grad:
            found = torch.autograd.grad(term, chosen, retain_graph=True, allow_unused=True)
            gradients = [gradient for gradient in found if gradient is not None]
        norms[name] = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(term)
    return norms
