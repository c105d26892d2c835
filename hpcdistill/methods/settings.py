"""What a method's configuration has, and what it tells of a run before any network is built. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from hpcdistill.data.index import Kind
from hpcdistill.errors import UserError, is_out_of_memory, nearest
from hpcdistill.methods import METHODS
from hpcdistill.registry import imported
from hpcdistill.settings import LARGEST_WEIGHT, Section

if TYPE_CHECKING:
    from torch import nn

Beta = Annotated[float, Field(ge=0, lt=1)]
LARGEST_RATE = 1000.0  # Adam moves each weight by about as much at a step

Teachers = Mapping[str, "nn.Module"]  # role -> a network that another run has trained
NO_TEACHERS: Teachers = MappingProxyType({})


def role_key(role: str) -> str:
    """The key of a configuration that says who fills the role `role`."""
    return role if role == "teacher" else f"teachers.{role}"


@dataclass(frozen=True)
class Role:
    """What a method asks of a network that another run has trained. None and () leave a property open."""

    needed: bool = True  # False: this configuration of the method does without; whoever names one may
    takes: tuple[str, ...] = ()  # what it may read: "lr", "hr" or "image"
    scale: int | None = None
    channels: int | None = None
    maps: tuple[str, ...] = ()  # feature maps that it must be able to give

    def filled(self, role: str, teachers: Teachers) -> nn.Module:
        """The network in the role `role`, checked and frozen; UserError when there is none or it does not fit."""
        if role not in teachers:
            key = role_key(role)
            raise UserError(
                f"{key}: the method needs a teacher; name its config under `{key}.config`, a finished run's folder "
                f"under `{key}.run`, or a file under `{key}.weights`"
            )
        self.check(role, teachers[role])
        return teachers[role].requires_grad_(False).eval()

    def check(self, role: str, network: nn.Module) -> None:
        """UserError when `network` cannot fill the role `role`: what differs, and what to set."""
        name, key = type(network).__name__, role_key(role)
        takes = getattr(network, "takes", None)
        if self.takes and takes not in self.takes:
            raise UserError(f"{key}: a {name} reads {takes}, wanted is a network of {' or '.join(self.takes)}")
        for what, wanted in (("scale", self.scale), ("channels", self.channels)):
            its = getattr(network, what, None)
            if wanted is not None and its != wanted:
                raise UserError(
                    f"{key}: its {what} is {its}, the student's is {wanted}; "
                    f"set method.{what} alike in both configs, e.g. {key}.overrides.method.{what}={wanted}"
                )
        for layer in self.maps:
            valid = getattr(network, "map_channels", {})
            if layer not in valid:
                raise UserError(f"{key}: a {name} has no feature map '{layer}'; {nearest(layer, valid)}")


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


class MethodConfig(Section):
    """What every method's configuration has; each method adds its own hyper-parameters, the paper's symbol in words.

    It also answers what is known of a run before its networks are built; plans and identities ask nothing else.
    """

    METHOD: ClassVar[str] = ""  # import path of the `Method`; set by it where the configuration stands in its class
    VERSION: ClassVar[int] = 1  # raise it when the method's mathematics changes: it is part of a run's identity
    GENERATORS: ClassVar[tuple[str, ...]] = ("student",)  # what is evaluated, translation a to b where there are both
    REAL_TARGETS: ClassVar[bool] = True  # False: a teacher made the images b that are trained on; FID leaves them out

    name: str

    @property
    def version(self) -> int:
        """VERSION for a run of these values; a method may raise it where only some of its runs compute otherwise."""
        return self.VERSION

    def build(self, teachers: Teachers = NO_TEACHERS) -> Any:
        """The `Method` with its networks, untrained; `teachers` by role.

        UserError for what does not fit together, and for networks that do not fit into memory.
        """
        try:
            return imported(self.METHOD, METHODS.kind)(self, teachers)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"method: the networks of {self.name} do not fit into memory ({error or 'none is left'}); "
                "make them smaller in the configuration, or use a machine that has more"
            ) from error

    def roles(self) -> dict[str, Role]:
        """The networks of other runs that a run of this configuration learns from, by role.

        Any finished run, or a weights file, can fill one: `teacher` of the configuration, or `teachers.<role>`.
        """
        return {}

    def learns(self) -> bool:
        """Whether a run needs a network of another run."""
        return any(role.needed for role in self.roles().values())

    def kind(self) -> Kind:
        """The kind of data set that a run trains on; `Method.needs` says the rest."""
        return "lr-hr"

    def weights(self) -> tuple[str, ...]:
        """The published weights (keys of `data.fetch.weights.WEIGHTS`) that a run uses."""
        return ()


def config_class(name: str) -> type[MethodConfig]:
    """The configuration class of the method `name`, or of an import path; UserError for what is none."""
    entry: Any = METHODS[name]
    found = entry if isinstance(entry, type) and issubclass(entry, MethodConfig) else getattr(entry, "Config", None)
    if not (isinstance(found, type) and issubclass(found, MethodConfig)):
        raise UserError(
            f"method.name: '{name}' is no method; it needs a class Config(MethodConfig), see docs/add-a-method.md"
        )
    return found
