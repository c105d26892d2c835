"""How a run is evaluated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpcdistill.settings import Section, operational


class EvalConfig(Section):
    every: int = Field(5000, gt=0, description="steps between evaluations; the last step is always evaluated")
    select: str | None = Field(None, description="the data.eval set whose PSNR chooses the best weights; unset = first")
    rule: Literal["pisr", "matlab"] = Field(
        "pisr", description="pisr: the output is rounded to 8 bits, the reference is not; matlab: both are"
    )
    samples: int = operational(4, "images of the selected set shown in samples/*.png", ge=0)
