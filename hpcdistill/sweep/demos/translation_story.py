"""What the demo of image translation has found: its rows, its pictures, and whether the task is solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hpcdistill.methods.distillation_settings import DistilledGANConfig
from hpcdistill.sweep.demos.base import Measured, Stage

CONFIG = "configs/fesd/edges2shoes.yaml"
TEST_SET = "shapes"  # its name under data.eval
# Title and colour of each row all over the page; the first two learn nothing.
ROWS = {
    "flat": ("One flat colour", 0),
    "drawing": ("The drawing as it is", 1),
    "teacher": ("Teacher", 3),
    "student": ("Student", 2),
}
TRAINED = ("teacher", "student")
SOLVED = 2.0  # dB above one flat colour, in the distance from the painting and from the teacher's picture

Pictures = Mapping[str, Tensor]  # name of the pair -> uint8 [3, SIDE, SIDE]


@dataclass(frozen=True)
class GANStory:
    """Everything the page is made of."""

    rows: Sequence[Measured]  # as ROWS
    to_teacher: Mapping[str, Mapping[str, float]]  # row -> "psnr" and "l1" to the teacher's pictures
    stage: Stage  # the run
    pictures: Mapping[str, Mapping[str, Pictures]]  # split -> teacher, student -> what they made
    counts: Mapping[str, int]  # pairs by split
    command: str  # that made the page

    @property
    def method(self) -> DistilledGANConfig:
        method = self.stage.config.method
        assert isinstance(method, DistilledGANConfig)
        return method


def solved(story: GANStory) -> bool:
    """Whether the student paints, and as its teacher does: by SOLVED above one flat colour in both."""
    flat, student = (row for row in story.rows if row.name in ("flat", "student"))
    nearer = story.to_teacher["student"]["psnr"] - story.to_teacher["flat"]["psnr"]
    return student.psnr - flat.psnr >= SOLVED and nearer >= SOLVED
