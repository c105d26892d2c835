"""The networks of a run: groups behind their optimizers, and what is evaluated and saved in the generators' place."""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor, nn

from hpcdistill.methods.base import Method
from hpcdistill.models.registry import save_generator
from hpcdistill.training.batch_norm import synchronise
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.deepspeed import Copies, cuts_weights, gathered, make_groups, requested_settings
from hpcdistill.training.layout import FORMATS, Layout
from hpcdistill.training.optimization import Averages, Freezer, TrainedGroup
from hpcdistill.training.run_folder import RunFolder


class Networks:
    """A method's networks on the device, each group wrapped with its optimizer (DDP, DeepSpeed)."""

    def __init__(
        self, method: Method, accelerator: Accelerator, config: TrainConfig, layout: Layout = "contiguous"
    ) -> None:
        self.method, self.accelerator, self.layout = method, accelerator, layout
        method.to(accelerator.device, memory_format=FORMATS[layout]).train()  # type: ignore[call-overload]
        if config.batch_norm == "sync" and accelerator.num_processes > 1:
            for untrained in method.groups.values():
                synchronise(untrained.module)
        self.averages = Averages(method.generators, config.ema) if config.ema else None
        deepspeed = requested_settings(config)
        self._copies = Copies(method.generators) if not self.averages and cuts_weights(deepspeed) else None
        self.groups = make_groups(method.groups, accelerator, config, deepspeed)
        for group in self.groups.values():
            method.bind(group.name, group.wrapped)
        self.freezer = Freezer({name: group.module for name, group in self.groups.items()})
        self._of_generators = {p for module in method.generators.values() for p in module.parameters()}
        self._generating = [g for g in self.groups.values() if not self._of_generators.isdisjoint(g.parameters)]

    @property
    def averaged(self) -> Mapping[str, nn.Module]:
        """The generators' averages by name; none without EMA."""
        return self.averages.generators if self.averages else {}

    def update_averages(self, halted: Tensor) -> None:
        """Take a step's weights into the averages, unless `halted` (0-dim bool); every rank must call it."""
        if self.averages:
            with gathered(self._generating):
                self.averages.update(halted)

    def evaluated(self) -> Mapping[str, nn.Module]:
        """The generators as they are evaluated and saved; every rank must ask."""
        if self._copies:
            self._copies.refresh(self._generating)
            return self._copies.generators
        return self.averages.generators if self.averages else self.method.generators

    def generator_parameters(self, group: TrainedGroup) -> list[nn.Parameter]:
        """The parameters of the generators in a group; all of a group that has none."""
        return [p for p in group.parameters if p in self._of_generators] or group.parameters

    def save(self, which: str, folder: RunFolder, step: int) -> None:
        """The generators as they are evaluated, and the networks saved beside them, each as a file of its own.

        `which` is best, last or best-<generator>. Every rank must call it.
        """
        generators, saved = self.evaluated(), self.method.saved
        with gathered(self.groups.values() if saved else ()):
            if self.accelerator.is_main_process:
                folder.confirm()
                files = {folder.generator(which, name): module for name, module in generators.items()}
                files |= {folder.saved(which, name): module for name, module in saved.items()}
                for file, module in files.items():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_generator(module, file, {"step": step, "run": folder.path.name})
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Let go of what the engines hold."""
        for group in self.groups.values():
            group.close()
