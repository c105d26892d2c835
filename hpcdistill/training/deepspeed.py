"""Training under DeepSpeed's ZeRO 1, 2 and 3: one engine for each trained group, frozen networks outside.

The rest of the loop sees a group as under DDP. Weights and Adam's moments are float32 in every precision, autocast
does the rest; checkpoints hold whole tensors by parameter name, so that a run goes on under any engine and number of
ranks. DeepSpeed is an extra: nothing here imports it before a run asks for it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from hpcdistill.console import say
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Group
from hpcdistill.storage import json_object, parse_json, user_path
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.optimization import TrainedGroup, outputs_to_fp32

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
# What the run's own configuration decides; DeepSpeed's file may leave it out or say "auto".
_OURS: Final = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "the method's optimizer.clip_norm",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "amp": "train.precision",
    "optimizer": "the method's optimizer",
    "scheduler": "the method's optimizer.schedule",
}
_LAUNCHED: Final = "HPCDISTILL_DEEPSPEED"  # the file that `accelerate launch` named
# Accelerate's launcher asks for these by an environment variable; they cut weights in ways no checkpoint here knows.
_REFUSED: Final = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def requested_settings(config: TrainConfig) -> dict[str, Any] | None:
    """DeepSpeed's configuration that `train.deepspeed` or `accelerate launch` names; None: the run uses DDP.

    Raises UserError for what is not supported, and when the extra is not installed.
    """
    for variable, engine in _REFUSED.items():
        if _is_set(variable):
            raise UserError(
                f"accelerate launch asks for {engine}, which hpcdistill does not support; use DDP (leave it out) or "
                "DeepSpeed: train.deepspeed=configs/deepspeed/zero2.json"
            )
    # Accelerate would make one engine of its own; here each group has one, and Accelerate only joins the processes.
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        os.environ[_LAUNCHED] = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    file = config.deepspeed
    if file is None and _LAUNCHED in os.environ:
        file = os.environ[_LAUNCHED]
        if file == "none":
            raise UserError(
                "accelerate launch asks for DeepSpeed without a deepspeed_config_file; "
                "name one, as configs/accelerate/deepspeed-zero2.yaml does, or set train.deepspeed"
            )
    if file is None:
        return None
    settings = _read(user_path(file, "train.deepspeed"))
    if config.precision == "fp16":
        raise UserError("train.precision: fp16 is not supported under DeepSpeed; use bf16 or fp32")
    if importlib.util.find_spec("deepspeed") is None:
        remedy = "`pip install -e '.[deepspeed]'` in the clone, or use DDP"
        raise UserError(f"train.deepspeed: DeepSpeed is not installed; {remedy}")
    return settings


def make_groups(
    groups: Mapping[str, Group], accelerator: Accelerator, config: TrainConfig, settings: dict[str, Any] | None
) -> dict[str, TrainedGroup]:
    """The trained groups of a method under DeepSpeed with its `settings`; None: under DDP, or alone."""
    if settings is None:
        return {name: TrainedGroup(name, group, accelerator) for name, group in groups.items()}
    if config.gradient_norms_every:
        say("under DeepSpeed the gradient norm of each group is logged, those of single loss terms are not")
    share = config.batch_size // accelerator.num_processes // config.accumulation
    return {name: ShardedGroup(name, group, accelerator, settings, share) for name, group in groups.items()}


class ShardedGroup(TrainedGroup):
    """A group behind a DeepSpeed engine of ZeRO stage 1, 2 or 3.

    Every rank must call its methods, also those that only read.
    """

    collective = True

    def __init__(
        self, name: str, group: Group, accelerator: Accelerator, settings: dict[str, Any], micro_batch: int
    ) -> None:
        """`settings`: DeepSpeed's configuration; `micro_batch`: samples of a rank's micro-batch."""
        deepspeed = _import_deepspeed(accelerator.device)
        if not dist.is_initialized():  # one process: offloading helps there too
            backend = "gloo" if accelerator.device.type == "cpu" else "nccl"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
        self.name = name
        self.settings = group.optimizer
        self.module = group.module
        self.accelerator = accelerator
        self.rate = self.settings.learning_rate
        self.parameters = list(group.module.parameters())
        self._trained = {name: p for name, p in group.module.named_parameters() if p.requires_grad}
        self.stage: int = settings["zero_optimization"]["stage"]
        self.adam = torch.optim.Adam(
            self._trained.values(),
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            eps=self.settings.eps,
            fused=True,  # takes `found_inf`, which masks an update
        )
        for parameter in self.parameters:
            # It cuts flat memory. A copy: `contiguous` keeps the strides that channels-last gave a 1x1 kernel.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        weights = min(500_000_000, sum(parameter.numel() for parameter in self.parameters))
        half = accelerator.mixed_precision != "no"
        if half:
            group.module.register_forward_hook(outputs_to_fp32)
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=_Autocast(group.module, accelerator) if half else group.module,
            optimizer=self.adam,
            config=copy.deepcopy(settings)
            | {
                # Its own default is 2 GB of float32, allocated by each engine, however small the group.
                "zero_optimization": {"reduce_bucket_size": weights, **settings["zero_optimization"]},
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": 1,  # the loop divides the loss and says which micro-batch is the last
                "gradient_clipping": self.settings.clip_norm,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused Adam runs on CPUs and needs no compiler
                "steps_per_print": 10**12,
            },
            dist_init_required=False,
        )

    # --- training --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    def update(self, halted: Tensor) -> Tensor:
        """As under DDP; DeepSpeed itself skips a step whose gradient is not finite, on every rank, and says so."""
        self.adam.found_inf = halted.float().to(self._device())  # type: ignore[attr-defined]
        self.wrapped.step()
        if self.optimizer.overflow:
            halted.fill_(True)
            return torch.full((), torch.nan, device=halted.device)
        norm = self.wrapped.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=halted.device).detach()

    # --- gathered weights ------------------------------------------------------------------------------------------

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        """While it lasts the module's weights are whole on every rank, to be read."""
        return self._gathered(None)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """While it lasts the module's weights are whole and may be replaced, alike on every rank."""
        with self._gathered(0):
            yield
        self.optimizer.refresh_fp32_params()  # training goes on from its own copy of them

    def _gathered(self, modifier: int | None) -> contextlib.AbstractContextManager[Any]:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        # A network that rests for a segment is run, frozen, but its engine never steps: nothing else lets go of those
        # of its layers that the backward pass does not come out of again.
        self.optimizer.parameter_offload.partition_all_parameters()
        gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            self.parameters, modifier_rank=modifier
        )
        return gathered

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Adam's state by parameter name: on rank 0 whole, and copied to the CPU; the others only help to gather it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self.adam.state[flat] for flat in self._flat() if flat in self.adam.state]
        if not states:
            return {}  # it has not been stepped yet
        step = states[0]["step"].to("cpu", copy=True)
        tensors = {}
        with self._unfrozen():
            for name, parameter in self._trained.items():
                for key in _MOMENTS:  # one at a time: whole moments are what does not fit
                    moment = safe_get_full_optimizer_state(parameter, key)
                    if self.accelerator.is_main_process:
                        moment = moment.to("cpu", copy=True).view(self._shape(parameter)).contiguous()
                        tensors[f"{name}.{key}"] = moment
                if self.accelerator.is_main_process:
                    tensors[f"{name}.step"] = step.clone()
        return tensors

    @torch.no_grad()
    def load_optimizer_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what any engine's `optimizer_tensors` gave."""
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = {float(tensors[f"{name}.step"]) for name in self._trained if f"{name}.step" in tensors}
        if not steps:
            return
        if len(steps) > 1:
            raise UserError(
                f"checkpoint: the parameters of {self.name} have taken {sorted(steps)} steps, DeepSpeed keeps one "
                "count for all; go on with DDP"
            )
        for flat in self._flat():
            # As Adam itself would at its first step.
            self.adam.state[flat] = {
                "step": torch.full((), max(steps), device=flat.device),
                **{key: torch.zeros_like(flat) for key in _MOMENTS},
            }
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()  # otherwise it finds them after the next step
        with self._unfrozen():
            for name, parameter in self._trained.items():
                for key in _MOMENTS:
                    value = tensors.get(f"{name}.{key}", torch.zeros(self._shape(parameter)))
                    safe_set_full_optimizer_state(parameter, value.to(self._device()), key)

    def close(self) -> None:
        self.wrapped.destroy()

    def _flat(self) -> list[Tensor]:
        """This rank's share of the float32 weights, flattened: what Adam steps."""
        if self.stage < 3:
            return [flat for group in self.adam.param_groups for flat in group["params"]]
        shares: list[Tensor] = self.optimizer.fp32_partitioned_groups_flat
        return shares

    def _device(self) -> torch.device:
        """Where Adam's state is: the CPU with offloading."""
        return next(iter(self._flat())).device

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    @contextlib.contextmanager
    def _unfrozen(self) -> Iterator[None]:
        """DeepSpeed passes over a parameter while another group's phase keeps it frozen."""
        before = {name: parameter.requires_grad for name, parameter in self._trained.items()}
        for parameter in self._trained.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for name, parameter in self._trained.items():
                parameter.requires_grad_(before[name])


class _Autocast(nn.Module):
    """Runs a module under the run's autocast, which DeepSpeed's engine otherwise switches off for what it wraps."""

    def __init__(self, module: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self.module = module
        self._autocast: Callable[[], contextlib.AbstractContextManager[Any]] = accelerator.autocast

    def forward(self, *inputs: Any, **options: Any) -> Any:
        with self._autocast():
            return self.module(*inputs, **options)


@contextlib.contextmanager
def gathered(groups: Iterable[TrainedGroup]) -> Iterator[None]:
    """While it lasts the weights of these groups are whole on every rank, to be read."""
    with contextlib.ExitStack() as stack:
        for group in groups:
            stack.enter_context(group.gathered())
        yield


@contextlib.contextmanager
def replaced(groups: Iterable[TrainedGroup]) -> Iterator[None]:
    """While it lasts the weights of these groups are whole and may be replaced, alike on every rank."""
    with contextlib.ExitStack() as stack:
        for group in groups:
            stack.enter_context(group.replaced())
        yield


def cuts_weights(settings: dict[str, Any] | None) -> bool:
    """Whether the weights will lie cut over the ranks between two steps, so that a generator cannot run as it is."""
    return settings is not None and settings["zero_optimization"]["stage"] == 3


class Copies:
    """Whole copies of generators whose weights are cut over the ranks: evaluated and saved in their place.

    ZeRO 3 gathers at each layer, in step with the other ranks; an evaluation has not as many images on each.
    """

    def __init__(self, generators: Mapping[str, nn.Module]) -> None:
        """Before the engines are made, while the weights are whole."""
        self._cut = generators
        self.generators: dict[str, nn.Module] = {
            name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in generators.items()
        }

    @torch.no_grad()
    def refresh(self, groups: Iterable[TrainedGroup]) -> None:
        """Take over the weights as they are now from the generators' groups; every rank must call it."""
        with gathered(groups):
            for name, module in self._cut.items():
                self.generators[name].load_state_dict(module.state_dict())


def _read(file: Path) -> dict[str, Any]:
    """DeepSpeed's configuration; UserError for what cannot be used here."""
    try:
        settings = parse_json(file.read_bytes(), json_object)
        stage = settings["zero_optimization"]["stage"]
    except OSError as error:
        raise UserError(f"train.deepspeed: {file}: {error.strerror}; use configs/deepspeed/zero2.json") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"train.deepspeed: {file}: not a DeepSpeed configuration with zero_optimization.stage "
            f"({type(error).__name__}: {error}); start from configs/deepspeed/zero2.json"
        ) from None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        instead = "leave train.deepspeed out: DDP does the same" if stage == 0 else "use 1, 2 or 3"
        raise UserError(f"train.deepspeed: {file}: ZeRO stage {stage} is not supported; {instead}")
    for key, value in settings["zero_optimization"].items():
        device = value.get("device") if isinstance(value, dict) else value
        if key == "offload_param" or (key == "offload_optimizer" and device not in ("cpu", "none")):
            raise UserError(
                f"train.deepspeed: {file}: zero_optimization.{key} {json.dumps(value)} is not supported; of offloading "
                'only the optimizer to the CPU is: "offload_optimizer": {"device": "cpu"}'
            )
    for key, ours in _OURS.items():
        if settings.pop(key, "auto") != "auto":
            raise UserError(f"train.deepspeed: {file}: {key} is decided by {ours}; leave it out")
    return settings


def _import_deepspeed(device: torch.device) -> Any:
    """The package, quiet, and computing where the run does."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also on a machine that has GPUs
    import deepspeed

    # A minute's compilation at the first start, for an all_reduce that training does not use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Two of PyTorch's collectives that it uses have new names since PyTorch 2.13.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    return deepspeed


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
