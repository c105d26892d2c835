"""Saving a network so that it can be rebuilt without a configuration, and rebuilding it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.overrides import TorchFunctionMode

from hpcdistill.errors import UserError, nearest
from hpcdistill.models import GENERATORS
from hpcdistill.models.weights_file import chosen_file, refuse_other_kinds
from hpcdistill.storage import write_bytes

METADATA_KEY = "hpcdistill"


def save_generator(generator: nn.Module, path: Path, notes: dict[str, Any] | None = None) -> None:
    """Write `generator` as safetensors with its class, arguments and `notes` (JSON values) in the metadata."""
    write_bytes(path, generator_bytes(generator, notes))


def generator_bytes(generator: nn.Module, notes: dict[str, Any] | None = None) -> bytes:
    """What `save_generator` writes: the same for the same generator and notes."""
    name = type(generator).__name__
    if name not in GENERATORS:
        raise UserError(f"{name}: such a network could not be loaded again; add it: GENERATORS['{name}'] = {name}")
    description = {"class": name, "arguments": generator.arguments, "notes": notes or {}}
    # One key: safetensors writes several in random order, and the same generator should give the same bytes.
    metadata = {METADATA_KEY: json.dumps(description)}
    return save(unique_state(generator), metadata)


def load_generator(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the network saved at `path`, in eval mode on the CPU, and return it with its notes.

    Of a run folder its student is meant, or its only network: the best weights or, where nothing was evaluated, the
    last. Raises UserError for a file that is missing, damaged, another kind of checkpoint, of an unknown class, or
    whose tensors do not fit.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; give a generator's .safetensors file or a run folder")
    path = chosen_file(path)
    refuse_other_kinds(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or train it again") from None
    if METADATA_KEY not in metadata:
        raise UserError(f"{path}: holds weights but does not say of which network; give a file that hpcdistill saved")
    try:
        description = json.loads(metadata[METADATA_KEY])
        name, arguments, notes = description["class"], description["arguments"], description["notes"]
        if not isinstance(notes, dict):
            raise UserError("the notes are no JSON object")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unreadable(error, str(path)) from None
    return rebuild(name, arguments, weights, str(path)), notes


def rebuild(name: str, arguments: Any, weights: dict[str, torch.Tensor], origin: str) -> nn.Module:
    """The network of the class `name` that `arguments` make, with `weights`, in eval mode on the CPU.

    Both may come from a foreign file. UserError, naming `origin`, for an unknown class and for what does not fit.
    """
    try:
        if name not in GENERATORS:
            raise UserError(f"no network is named '{name}', {nearest(name, GENERATORS)}")
        generator = _rebuilt(GENERATORS[name], arguments, weights, origin)
    except _NoFit:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, MemoryError) as error:
        raise _unreadable(error, origin) from None
    load_weights(generator, weights, origin)
    return generator.eval()


def _unreadable(error: Exception, origin: str) -> UserError:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return UserError(
        f"{origin}: its metadata does not rebuild a network ({reason}); "
        "it was edited or saved by another version: copy or train it again"
    )


def _rebuilt(
    kind: type[nn.Module], arguments: dict[str, Any], weights: dict[str, torch.Tensor], origin: str
) -> nn.Module:
    """The network of a file that holds `weights`, untrained.

    Damaged arguments may ask for any amount of memory: so it is built without any first, and its shapes are compared.
    """
    most = max(1024, sum(tensor.numel() for tensor in weights.values()))
    for key, value in _numbers(arguments):
        if not abs(value) <= most:
            raise ValueError(f"{key} is larger than the file has numbers")
    with torch.device("meta"), _Undrawn():
        expected = kind(**arguments).state_dict()
    _refuse(kind.__name__, _other_shapes(expected, weights), origin)
    return kind(**arguments)


class _Undrawn(TorchFunctionMode):
    """Leaves first weights as they are: drawing them on the meta device would import torch's compiler, for 0.5 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _numbers(arguments: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among the arguments by their keys, those of nested ones (`collapse`, `widths`) as well."""
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, list):
            yield from _numbers({f"{key}[{number}]": item for number, item in enumerate(value)})
        elif isinstance(value, int | float):
            yield key, value


class _NoFit(UserError):
    """Weights of another network."""


def _other_shapes(expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> list[str]:
    """What has another shape in `weights` than in the network."""
    return [
        f"{name} is {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ]


def _refuse(network: str, faults: Sequence[str], origin: str) -> None:
    """_NoFit, with the first of `faults` where there are any."""
    if faults:
        raise _NoFit(
            f"{origin}: not the weights of this {network}: {faults[0]} ({len(faults)} tensors differ); "
            "use a checkpoint of the same architecture, channels and scale"
        )


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], origin: str) -> None:
    """Load `weights` strictly; what does not fit is one UserError that names `origin` and the first mismatch."""
    expected = module.state_dict()
    # safetensors keeps one copy of a tensor that two names share (tie_sdm): its other names may be absent.
    shared = {tensor.data_ptr() for name, tensor in expected.items() if name in weights and tensor.numel()}
    missing = [name for name, tensor in expected.items() if name not in weights and tensor.data_ptr() not in shared]
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} is not part of it" for name in weights if name not in expected]
    _refuse(type(module).__name__, faults + _other_shapes(expected, weights), origin)
    module.load_state_dict(weights, strict=False)


def unique_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """`module.state_dict()`, contiguous, with a tensor that several names share (tie_sdm) under its first name only."""
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        state[name] = tensor.contiguous()
    return state
