"""How a run is evaluated."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from hpcdistill.data.index import Kind
from hpcdistill.metrics.base import LPIPS_OF_PAIRS, PAIR_METRICS, SPECTRAL_ERROR, SR_METRICS
from hpcdistill.settings import MOST_PIXELS, MOST_STEPS, Section, UserPlace, operational

Bits = Literal["round", "floor"]
BACKWARDS = "_b2a"  # of the names of generators that translate b to a


class EvalConfig(Section):
    every: int = Field(
        5000, gt=0, le=MOST_STEPS, description="steps between evaluations; the last step is always evaluated"
    )
    select: str | None = Field(
        None,
        description="the set of data.eval whose PSNR (lr-hr) or FID chooses the best weights, or held_out; "
        "unset = held_out where data.held_out keeps images, else the first",
    )
    rule: Literal["pisr", "matlab"] = Field(
        "pisr",
        description="lr-hr: pisr: the output is rounded to 8 bits, the reference is not, gray images are made RGB; "
        "matlab: both are rounded, gray images are taken as they are",
    )
    size: int | None = Field(
        None,
        gt=0,
        le=MOST_PIXELS,
        description="paired, unpaired: side that test images are resized to, pixels; unset = data.crop",
    )
    real: Literal["train+test", "test"] | None = Field(
        None,
        description="paired, unpaired: target images that outputs are compared with as a set (FID, KID); "
        "unset = train+test without pairs, test with pairs",
    )
    real_stats: UserPlace | None = operational(  # by its content part of the identity
        None, "paired, unpaired: .npz with mu and sigma of the real images: FID compares with it; there is no KID then"
    )
    features: Literal["inception", "efficientnet-lite0"] = Field(
        "inception",
        description="paired, unpaired: inception = FID, KID; efficientnet-lite0 = distances of another name, offline",
    )
    bits: Bits = Field(
        "round",
        description="paired, unpaired: how outputs become 8 bits; floor: cut off, half a level darker, as the released "
        "GAN compression codes do",
    )
    kid: bool = operational(True, "paired, unpaired: compute the kernel distance (KID) too")
    lpips: bool = operational(True, "paired: compute LPIPS (AlexNet) where its weights are on this machine")
    spectral_error: bool = operational(
        False, "paired, unpaired: compare the high frequencies of outputs and target images (spectral_error)"
    )
    both_directions: bool = operational(False, "paired, unpaired: evaluate generators from b to a (*_b2a) as well")
    samples: int = operational(4, "images of the selected set shown in samples/*.png", ge=0, le=10_000)

    @model_validator(mode="after")
    def _one_real_side(self) -> Self:
        if self.real_stats is not None and (self.real or self.both_directions):
            other = "real" if self.real else "both_directions"
            why = "takes the place of the real images" if self.real else "is of one direction's images"
            raise ValueError(f"real_stats: {why}; leave eval.{other} out")
        return self

    def metrics(self, kind: Kind) -> list[str]:
        """The names of what is measured of each generator and test set; the selected metric is the first."""
        if kind == "lr-hr":
            return [metric.name for metric in SR_METRICS]
        inception = self.features == "inception"
        suffix = self.features.replace("-", "_")
        names = ["fid" if inception else f"frechet_{suffix}"]
        if self.kid and self.real_stats is None:
            names.append("kid" if inception else f"kernel_{suffix}")
        if kind == "paired":
            names += [metric.name for metric in PAIR_METRICS if metric is not LPIPS_OF_PAIRS or self.lpips]
        if self.spectral_error:
            names.append(SPECTRAL_ERROR.name)
        return names
