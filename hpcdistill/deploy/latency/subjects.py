"""What `benchmark latency` measures: trained networks, exported files, or what a configuration will build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from hpcdistill.deploy.description import Description, describe
from hpcdistill.deploy.formats import FORMATS, format_of
from hpcdistill.deploy.session import Batch
from hpcdistill.deploy.shipped import model_path
from hpcdistill.errors import UserError, nearest
from hpcdistill.metrics.config import BACKWARDS
from hpcdistill.metrics.cost import IMAGE_SIZE, OUTPUT_SIZE
from hpcdistill.models.registry import load_generator
from hpcdistill.models.weights_file import generator_file
from hpcdistill.run import load_run
from hpcdistill.training.records import run_values

CONFIGS = (".yaml", ".yml")
Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True)
class Subject:
    """A network that is measured."""

    label: str  # as the user called it
    about: Description
    network: nn.Module | None = None  # as it is trained; None of an exported file
    exported: Path | None = None  # the exported file
    format: str = ""  # that it is in
    run: Path | None = None  # the run folder that it lies in
    name: str = ""  # of the network in its run
    trained: bool = True
    values: Mapping[str, Any] = field(default_factory=dict)  # `data` and `eval` of its configuration

    @property
    def backwards(self) -> bool:
        """Whether it translates b to a."""
        return self.name.endswith(BACKWARDS)

    def inference_form(self) -> nn.Module:
        """A copy in eval mode and in plain layers, on the CPU."""
        return cast(nn.Module, cast(Any, self.network).deploy())

    def as_published(self) -> nn.Module:
        """In eval mode, in the layers that its paper has: collapsed where it is trained wide, nothing rearranged."""
        assert self.network is not None
        collapsed = getattr(self.network, "collapsed", None)
        return (self.network if collapsed is None else cast(nn.Module, collapsed())).eval()

    def size(self) -> Size:
        """The literature's input: what 1280x720 pixels are made of (rounded up), or 256x256."""
        if self.about.task == "translation":
            return IMAGE_SIZE
        return -(-OUTPUT_SIZE[0] // self.about.scale), -(-OUTPUT_SIZE[1] // self.about.scale)

    def example(self, size: Size) -> Batch:
        """Noise `[1, C, H, W]` in the network's range, the same each time: what a pass takes does not depend on it."""
        noise = np.random.default_rng(0).random((1, self.about.channels, *size), dtype=np.float32)
        return cast(Batch, noise * np.float32(self.about.high - self.about.low) + np.float32(self.about.low))

    def check_size(self, size: Size) -> None:
        """UserError for an input that the network cannot take."""
        about = self.about
        if any(side % about.multiple or side < about.smallest for side in size):
            least = f" of at least {about.smallest}" if about.smallest > 1 else ""
            raise UserError(
                f"--size {size[0]}x{size[1]}: {self.label} takes heights and widths that are multiples of "
                f"{about.multiple}{least}"
            )


def find_subject(
    word: str, generator: str | None = None, which: str | None = None, overrides: Sequence[str] = ()
) -> Subject:
    """What `word` names: a run folder, a generator's file, an exported file, `pretrained:x4` or a configuration.

    Of a run or a configuration, `generator` or else the student, or the only network that makes pictures. UserError
    for what is none of these, or makes no picture of a picture.
    """
    path = model_path(word)
    if path.suffix.lower() in CONFIGS:
        return _of_configuration(word, generator, overrides)
    if path.is_file() and (kind := format_of(path)) is not None:
        if generator is not None or which is not None:
            raise UserError(f"{word}: is one exported network; leave --generator and --which out")
        return Subject(word, FORMATS[kind]().open(path).about, exported=path, format=kind)
    if which is None:
        which = "best" if not path.is_dir() or any((path / "generators" / "best").glob("*.safetensors")) else "last"
    file = generator_file(path, which, generator)
    network, notes = load_generator(file)
    about = describe(network, notes, file)
    run = path if path.is_dir() else None
    return Subject(word, about, network, run=run, name=file.stem if run else "", values=run_values(file))


def _of_configuration(word: str, generator: str | None, overrides: Sequence[str]) -> Subject:
    """A network as it is before training: what it takes does not depend on its weights."""
    run = load_run([word, *overrides])
    found: dict[str, tuple[nn.Module, Description]] = {}
    for name, network in run.untrained().measured.items():
        try:
            found[name] = network, describe(network, {}, Path(word))
        except UserError:  # a discriminator, a teacher that sees the HR image
            continue
    if not found:
        raise UserError(f"{word}: its method has no network that makes a picture of a picture; name a student's")
    name = generator or next(iter(found))
    if generator is None and len(found) > 1:
        name = "student"
    if name not in found:
        asked = f"--generator {generator}: not in {word}" if generator else f"{word}: choose one with --generator"
        raise UserError(f"{asked}; {nearest(name, found)}")
    values = run.config.model_dump(mode="json", include={"data", "eval"})
    network, about = found[name]
    return Subject(word, about, network, name=name, trained=False, values=values)
