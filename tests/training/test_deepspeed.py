"""Every method under DeepSpeed's ZeRO 1, 2 and 3 learns what one process learns, and goes on under any engine.

A rank goes through the stages one after the other, each a whole run: starting processes costs more than the runs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from processes import launch
from safetensors.torch import load
from small_methods import CROP, METHODS, SCALE, Ramp
from torch import Tensor, nn
from toy import SEED, ToyReader, newest_tensors, rows, run, saved, uniform
from translation import small

from hpcdistill.errors import UserError
from hpcdistill.methods.base import Method, OptimizerSettings
from hpcdistill.methods.distilled_gan import DistilledGAN
from hpcdistill.ranks import signals
from hpcdistill.training.evaluation import Evaluation

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'",
    ),
]
TORTURE = pytest.mark.torture  # `make test-deepspeed`
BATCH = 4
STEPS = 20
STAGES = (1, 2, 3)
Files = dict[str, dict[str, Tensor]]

# A GAN in float32 multiplies rounding errors. At the papers' rate of 2e-4 (eps 1e-8) and on ONE process, one image
# changed by one unit in the last place moved FESD-CycleGAN's teacher by 1.4e-2 of its size within these 20 steps,
# and its gradients' means by 0.8; two processes under plain DDP moved it by the same 1.4e-2. No engine can be told
# from another there. At 2e-6 with eps 1e-2 four processes under DDP end 1.5e-6 from one, and weights move by 5e-4.
CALM = {"eps": 1e-2, "learning_rate": 2e-6, "betas": (0.5, 0.999)}


def noise(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """a and b [B, 3, CROP, CROP] in [-1, 1]; smooth images have spectra that are zero but for rounding."""
    size = 3 * CROP * CROP
    drawn = torch.from_numpy(2 * uniform(numbers, 2 * size) - 1).float()
    return {name: part.reshape(-1, 3, CROP, CROP) for name, part in zip("ab", drawn.split(size, 1), strict=True)}


def patches(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """hr [B, 1, 16, 16] in [0, 1] and its averages; float32."""
    hr = torch.from_numpy(uniform(numbers, 25)).view(-1, 1, 5, 5).float()
    hr = nn.functional.interpolate(hr, (16, 16), mode="bilinear")
    return {"hr": hr, f"lr{SCALE}": nn.functional.avg_pool2d(hr, SCALE)}


def spoilt(numbers: NDArray[np.int64]) -> dict[str, Tensor]:
    """`patches`, of which the eleventh step's first is not a number."""
    found = patches(numbers)
    found["hr"][numbers == 10 * BATCH] = torch.nan
    return found


def _fesd(vgg: Path, **values: Any) -> Method:
    """Without VGG16: it would be most of the time, and no engine touches it."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"ndf": 4, "discriminator_strides": 1, "crop": CROP, "pool": 3, "layers": ("down2",)}
    given |= {"teacher": small({"blocks": 1}, 6), "student": small({"blocks": 1}, 4), "optimizer": CALM}
    given |= {"weight_style": 0, "weight_feature": 0} | values
    if values.get("family") == "pix2pix":
        del given["pool"]
    method = DistilledGAN(DistilledGAN.Config(**given))
    method.prepare(CROP)
    return method


METHOD_OF: dict[str, Callable[[Path], Method]] = {
    "teacher": METHODS["privileged_teacher"],
    "student": METHODS["privileged_student"],
    "fesd-cyclegan": _fesd,
    "fesd-pix2pix": partial(
        _fesd, family="pix2pix", teacher=small({}, 24), student=small({}, 16), layers=("down2", "up2")
    ),
    "dcd": partial(_fesd, weight_spectral=0, projection="trained", schedule="blocks", block_steps=3, blocks=2),
    "clipped": partial(METHODS["privileged_student"], optimizer=OptimizerSettings(clip_norm=0.01)),
}


class Size:
    """Measures the weights themselves, the whole of them: sum |w| of each generator."""

    selects: str | None = "student/toy/size"
    larger_is_better = True

    def __init__(self, selects: str) -> None:
        self.selects = f"{selects}/toy/size"

    def __call__(self, generators: Mapping[str, nn.Module], accelerator: Accelerator, *_: Any) -> Evaluation:
        return Evaluation(
            {
                f"{name}/toy/size": float(sum(p.double().abs().sum() for p in module.parameters()))
                for name, module in generators.items()
            }
        )

    def protocol(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What the first engine imports, torch._inductor too, for seconds: once here, not in each forked rank."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def settings_file(folder: Path, stage: int, **zero: Any) -> str:
    """DeepSpeed's file for tests: ZeRO 3 also cuts the small tensors that it would otherwise keep whole."""
    file = folder / f"zero{stage}.json"
    more = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **more, **zero}}))
    return str(file)


def train(
    case: str, vgg: Path, folder: Path, ranks: int, stages: tuple[int, ...] = (0,), steps: int = STEPS, **options: Any
) -> list[Path]:
    """A run for each stage, 0 being DDP or one process, in processes of their own; the run folders."""
    before, zero, samples = options.pop("before", None), options.pop("zero", {}), options.pop("samples", None)
    data = samples or (noise if case.startswith(("fesd", "dcd")) else patches)
    folder.mkdir(exist_ok=True, parents=True)
    files = {stage: settings_file(folder, stage, **zero) if stage else None for stage in stages}
    options = {"checkpoint_every": 7, "evaluate_every": 10, **options}

    def work(rank: int, of: int) -> None:
        for stage in stages:
            torch.manual_seed(SEED)
            method = METHOD_OF[case](vgg)
            evaluator: Any = Ramp() if case == "dcd" else Size(next(iter(method.generators)))
            reader = ToyReader(BATCH, data, rank, of, before)
            run(method, reader, folder / str(stage), steps, evaluator, deepspeed=files[stage], **options)

    assert launch(ranks, work, 500) == [0] * ranks
    return [folder / str(stage) for stage in stages]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, vgg: Path) -> Callable[..., Path]:
    """The run in one process, by case and options; made once."""
    made: dict[str, Path] = {}

    def get(case: str, **options: Any) -> Path:
        key = f"{case}-{sorted(options.items())}"
        if key not in made:
            [made[key]] = train(case, vgg, tmp_path_factory.mktemp("one"), 1, **options)
        return made[key]

    return get


def files_of(folder: Path, kind: str) -> Files:
    return {name: load(content) for name, content in newest_tensors(folder).items() if name.startswith(kind)}


def distance(first: Path, second: Path, kind: str) -> float:
    """The largest |a - b| / |a| of the files `kind`/... of both runs' newest checkpoints, each file as one vector.

    Of Adam's state the two moments are told apart: their sizes differ by orders of magnitude.
    """
    left, right = files_of(first, kind), files_of(second, kind)
    assert left.keys() == right.keys()
    found = []
    for name in left:
        a, b = left[name], right[name]
        assert {key: value.shape for key, value in a.items()} == {key: value.shape for key, value in b.items()}
        for end in ("exp_avg", "exp_avg_sq", "step") if kind == "optimizers" else ("",):
            keys = sorted(key for key in a if key.endswith(end) and a[key].is_floating_point())
            x, y = (torch.cat([part[key].double().flatten() for key in keys]) for part in (a, b))
            found.append(float((x - y).norm() / x.norm()))
    assert found
    return max(found)


def assert_same_run(first: Path, second: Path, gradients: float = 1e-3) -> None:
    """Losses and measured weights of every line and all weights to 1e-5; gradient norms and Adam's moments."""
    lines, others = rows(first), rows(second)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for left, right in zip(lines, others, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            close = pytest.approx(value, rel=gradients if name.startswith("gradient") else 1e-5, abs=1e-5)
            assert right[name] == close, (left["step"], name)
    assert distance(first, second, "networks") < 1e-5
    assert distance(first, second, "optimizers") < gradients
    if files_of(first, "averages"):
        assert distance(first, second, "averages") < 1e-5
    for file in (first / "generators" / "last").iterdir():
        for name, value in saved(first, name=file.stem).items():
            torch.testing.assert_close(saved(second, name=file.stem)[name], value, rtol=0, atol=1e-5)


# Gradients are not known better in float32: those of a mean |x| are signs, those of FESD's student come through the
# logarithm of a spectrum. Under plain DDP four ranks' first moments were 1e-2 from one process's.
GRADIENTS = {"fesd-cyclegan": 5e-2, "fesd-pix2pix": 5e-2, "dcd": 5e-2}


@pytest.mark.parametrize(
    ("case", "stages"),
    [
        ("teacher", STAGES),
        ("student", STAGES),
        pytest.param("fesd-cyclegan", STAGES, marks=TORTURE),  # `dcd` below trains the same networks under ZeRO 3
        pytest.param("fesd-pix2pix", STAGES, marks=TORTURE),
    ],
)
def test_two_ranks_equal_one_process(
    case: str, stages: tuple[int, ...], vgg: Path, one: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in train(case, vgg, tmp_path, 2, stages):
        assert_same_run(one(case), folder, GRADIENTS.get(case, 1e-3))


@pytest.mark.parametrize(
    ("case", "stages"),
    [
        ("student", (3,)),
        pytest.param("student", (1, 2), marks=TORTURE),
        pytest.param("teacher", STAGES, marks=TORTURE),
        pytest.param("fesd-cyclegan", STAGES, marks=TORTURE),
        pytest.param("fesd-pix2pix", STAGES, marks=TORTURE),
    ],
)
def test_four_ranks_equal_one_process(
    case: str, stages: tuple[int, ...], vgg: Path, one: Callable[..., Path], tmp_path: Path
) -> None:
    for folder in train(case, vgg, tmp_path, 4, stages):
        assert_same_run(one(case), folder, GRADIENTS.get(case, 1e-3))


def test_averages_micro_batches_and_clipping(vgg: Path, one: Callable[..., Path], tmp_path: Path) -> None:
    for folder in train("clipped", vgg, tmp_path, 2, STAGES, ema=0.9, accumulation=2):
        assert max(row["gradient_norm/student"] for row in rows(folder) if "images" in row) > 0.01
        assert_same_run(one("clipped", ema=0.9), folder)


def test_one_process_and_the_optimizer_on_the_cpu(vgg: Path, one: Callable[..., Path], tmp_path: Path) -> None:
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    for folder in train("student", vgg, tmp_path, 1, (2, 3), zero=offload):
        assert_same_run(one("student"), folder)


def test_bf16(vgg: Path, one: Callable[..., Path], tmp_path: Path) -> None:
    """Weights, moments and gradients are float32 also here; layers see a rank's share in bf16, as under DDP."""
    for folder in train("student", vgg, tmp_path, 2, (0, *STAGES), precision="bf16"):
        reference = one("student", precision="bf16")
        assert distance(reference, folder, "networks") < 1e-3
        assert all(
            tensor.dtype == torch.float32
            for kind in ("networks", "optimizers")
            for tensors in files_of(folder, kind).values()
            for tensor in tensors.values()
        )


def test_a_loss_that_is_not_finite_ends_the_run(vgg: Path, tmp_path: Path) -> None:
    """With the weights of the step before, whole, on every stage."""
    [good] = train("student", vgg, tmp_path / "good", 1, steps=STEPS, before=_leave_at(10), checkpoint_every=10)
    expected = load(newest_tensors(good)["networks/student.safetensors"])

    def work(rank: int, of: int) -> None:
        for stage in STAGES:
            torch.manual_seed(SEED)
            reader = ToyReader(BATCH, spoilt, rank, of)
            file = str(tmp_path / f"zero{stage}.json")
            with pytest.raises(UserError, match=r"became NaN or infinite by step 12; the last good weights are in"):
                run(METHOD_OF["student"](vgg), reader, tmp_path / str(stage), STEPS, deepspeed=file, log_every=12)

    for stage in STAGES:
        settings_file(tmp_path, stage)
    assert launch(2, work, 300) == [0, 0]
    for stage in STAGES:
        for name, value in saved(tmp_path / str(stage), name="student").items():
            [key] = [key for key in expected if key == name or key.endswith(f".{name}")]
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5)


def _leave_at(step: int) -> Callable[[int], None]:
    """A `before` that stops the run, as SLURM does before a job's time is up."""

    def before(current: int) -> None:
        if current == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return before


@pytest.mark.parametrize("case", ["student", pytest.param("fesd-pix2pix", marks=TORTURE)])
def test_goes_on_under_other_engines(
    case: str, vgg: Path, one: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO 3 on two ranks, stopped by a signal; one process without DeepSpeed, stopped too; ZeRO 2 on two ranks."""
    monkeypatch.setattr(signals, "PACE", 0.0)  # ranks ask one another after every step
    reference = one(case, ema=0.9)
    for ranks, stage, until in ((2, 3, 8), (1, 0, 14), (2, 2, None)):
        leave = _leave_at(until) if until else None
        [folder] = train(case, vgg, tmp_path, ranks, (stage,), before=leave, ema=0.9)
        if until:
            newest = max(path.name for path in (folder / "checkpoints").iterdir())
            assert f"step-{until:08d}" <= newest < f"step-{STEPS:08d}"  # ranks agree at some steps only
            next_stage = {3: 0, 0: 2}[stage]
            folder.rename(tmp_path / str(next_stage))
    assert_same_run(reference, tmp_path / "2", GRADIENTS.get(case, 1e-3))


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=TORTURE)])
def test_segments_that_take_back_weights(stage: int, vgg: Path, one: Callable[..., Path], tmp_path: Path) -> None:
    """DCD's blocks: groups rest for a segment, weights go back to the best ones, a segment prepares itself."""
    [folder] = train("dcd", vgg, tmp_path, 2, (stage,))
    assert_same_run(one("dcd"), folder, GRADIENTS["dcd"])


def test_the_gradient_norms_of_terms_are_left_out_aloud(
    vgg: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [folder] = train("student", vgg, tmp_path, 1, (2,), steps=4, gradient_norms_every=2)
    assert capfd.readouterr().err.count("those of single loss terms are not") == 1
    assert not any(key.startswith("gradient/") for row in rows(folder) for key in row)
