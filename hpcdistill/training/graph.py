"""`train.graph`: the whole iteration, all phases and optimizers, as one CUDA graph that is replayed at each step.

The first steps of a segment are made one operation after the other, from the tensors that the graph will read; two of
them are compared (`trace`). What a step takes from the host (batches, the step's number, learning rates) is written
into these tensors, and the seed is set. A step that cannot be captured goes on as it was, with a line that says why.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hpcdistill.console import say
from hpcdistill.default_generator import seed_step
from hpcdistill.errors import UserError
from hpcdistill.methods.base import Progress
from hpcdistill.training.batches import Cut
from hpcdistill.training.config import TrainConfig
from hpcdistill.training.metrics_log import RunningMeans
from hpcdistill.training.trace import StepTrace

Action = Callable[[], None]
Capture = Callable[[Action], Action]  # what a step does -> what does it again; it is not done by this
WARM_UP: Final = 3  # steps: the first makes what is made once (moments, kernels' choice), the others are compared


def cuda_capture(step: Action) -> Action:
    """`step` as a CUDA graph, on the current device; whatever goes wrong, PyTorch can go on without it."""
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads (pinning of batches, a checkpoint being written) may ask CUDA for memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except Exception:
        _end_failed_capture(stream, pool)
        raise
    return graph.replay


def _end_failed_capture(stream: torch.cuda.Stream, pool: Any) -> None:
    """PyTorch 2.13's capture_end leaves its stream current, its pool open and the generator capturing when it fails."""
    torch.cuda.set_stream(stream)
    device = torch.cuda.current_device()
    with contextlib.suppress(Exception):
        torch._C._cuda_endAllocateToPool(device, pool)
    with contextlib.suppress(Exception):
        fresh = torch.Generator(torch.device("cuda", device)).graphsafe_get_state()
        torch.cuda.default_generators[device].graphsafe_set_state(fresh)


CAPTURES: Final[dict[str, Capture]] = {"cuda": cuda_capture}  # by the type of device; tests have one for a CPU


def step_graph(
    config: TrainConfig, accelerator: Accelerator, means: RunningMeans, trained: Iterable[nn.Parameter]
) -> StepGraph | None:
    """The graph of a run's steps; None, with a line, where its configuration allows none, UserError where it demands
    one."""
    if config.graph == "off":
        return None
    graph = StepGraph(accelerator.device, means, trained, demanded=config.graph == "on")
    if reason := reason_against(config, accelerator):
        graph.turn_off(reason)
        return None
    return graph


def reason_against(config: TrainConfig, accelerator: Accelerator) -> str | None:
    """Why a run of this configuration is not captured, known before its first step."""
    if accelerator.device.type not in CAPTURES:
        return f"the device is a {accelerator.device.type.upper()}; graphs are CUDA's"
    if accelerator.num_processes > 1:
        return f"{accelerator.num_processes} processes exchange gradients within a step"
    if config.deepspeed:
        return "DeepSpeed's engines decide on the host"
    if accelerator.scaler is not None:
        return "fp16's loss scaler decides on the host which steps are skipped; use train.precision=bf16"
    return None


class _Watched(Progress):
    """Notes when it is asked for a number of the host: a graph would keep the one that it was captured with."""

    asked = False

    def __getattribute__(self, name: str) -> Any:
        if name == "number":
            object.__setattr__(self, "asked", True)
        return super().__getattribute__(name)


class _Inputs:
    """The tensors that the steps of a segment read, at one place in memory."""

    def __init__(self, cut: Cut, progress: Progress) -> None:
        self.cut: Cut = [[{key: torch.empty_like(x) for key, x in piece.items()} for piece in one] for one in cut]
        self.progress = _Watched(progress.step.clone(), progress.steps.clone(), progress.seed, progress.number)

    def fit(self, cut: Cut) -> bool:
        """Whether batches like these have room in them."""
        return _shapes(cut) == _shapes(self.cut)

    def take(self, cut: Cut, progress: Progress) -> None:
        """Copy a step's inputs in."""
        for own, given in zip(_tensors(self.cut), _tensors(cut), strict=True):
            own.copy_(given, non_blocking=True)
        self.progress.step.copy_(progress.step)
        object.__setattr__(self.progress, "number", progress.number)


class StepGraph:
    """Makes the steps of one segment after the other, by a graph where it can; see the module's text."""

    def __init__(
        self, device: torch.device, means: RunningMeans, trained: Iterable[nn.Parameter], *, demanded: bool
    ) -> None:
        self.device, self.demanded = device, demanded
        self._means, self._trained = means, list(trained)
        self._said: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Capture anew: another segment begins."""
        self.replay: Action | None = None
        self._off = False
        self._inputs: _Inputs | None = None
        self._warm = 0
        self._trace: StepTrace | None = None
        self._counts: Counter[str] = Counter()

    def run(self, work: Callable[[Cut, Progress], None], cut: Cut, progress: Progress, seed: int) -> None:
        """Make one step: `work`, or what was captured of it, seeded with `seed`."""
        inputs = self._inputs = self._inputs or _Inputs(cut, progress)
        if self._off or not inputs.fit(cut):
            seed_step(seed)
            work(cut, progress)
            return
        inputs.take(cut, progress)
        step = partial(work, inputs.cut, inputs.progress)
        seed_step(seed)
        if self._warm < WARM_UP:
            self._warm_up(step)
            return
        if self.replay is None:
            self._capture(step)
            seed_step(seed)
        if self.replay is None:
            step()
            return
        self.replay()
        self._means.counts.update(self._counts)

    def turn_off(self, reason: str) -> None:
        """Go on without a graph, with a line that says why, once; UserError when one was demanded."""
        self._off = True
        if self.demanded:
            raise UserError(f"train.graph: on, but {reason}; use train.graph=auto, or off")
        if reason not in self._said:
            say(f"train.graph: off: {reason}")
        self._said.add(reason)

    def _warm_up(self, step: Action) -> None:
        """One step as without a graph, compared with the one before."""
        self._warm += 1
        if self._warm == 1:
            with _beside(self.device):
                step()
            return
        assert self._inputs is not None
        trace, earlier = StepTrace(self.device), self._trace
        with _beside(self.device), trace:
            step()
        if self._inputs.progress.asked:
            trace.refuse("a phase asks for progress.number or progress.generator(), which are the host's")
        self._trace = trace
        if reason := trace.reason or (earlier.difference(trace) if earlier else None):
            self.turn_off(reason)

    def _capture(self, step: Action) -> None:
        """Capture the step, which moves nothing yet; where that fails, the run goes on without."""
        before = Counter(self._means.counts)
        reason = None
        try:
            self.replay = CAPTURES[self.device.type](step)
        except Exception as error:  # CUDA's and PyTorch's have no class of their own for it
            reason = f"the capture failed: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
        self._counts, self._means.counts = self._means.counts - before, before
        operations = len(self._trace.operations) if self._trace else 0
        self._trace = None
        if reason:
            for parameter in self._trained:  # half a step's, in memory that is given back
                parameter.grad = None
            self.turn_off(reason)
        elif "on" not in self._said:
            self._said.add("on")
            say(f"train.graph: a step's {operations} operations are one CUDA graph from now on")


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """On a stream of its own, where CUDA wants the steps before a capture to be made."""
    if device.type != "cuda":
        yield
        return
    computing, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(computing)
    with torch.cuda.stream(side):
        yield
    computing.wait_stream(side)


def _shapes(cut: Cut) -> list[Any]:
    return [
        [{key: (x.shape, x.stride(), x.dtype, x.device) for key, x in piece.items()} for piece in one] for one in cut
    ]


def _tensors(cut: Cut) -> list[Tensor]:
    return [x for one in cut for piece in one for x in piece.values()]
