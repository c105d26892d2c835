"""Samples packed ahead of the writer, in order, by threads of this process or by processes of their own.

PNG and the resize release Python's lock, so threads do for a small set. Threads share one heap and one lock, though,
and lose about a fifth to them on two cores, more on many: a large set has processes.

concurrent.futures.ProcessPoolExecutor does not do. All its processes hold the pipe of the results open, so it waits
for ever when one is killed while it hands over a result (five of eight kills, tried with 600 MB; for want of memory a
kernel kills just then, and so do we at Ctrl-C), and its processes stay when this one is killed. Here each process has
a thread that feeds it through a pipe that no other process holds: the end of either side ends the other.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from hpcdistill.data.images import MAX_PIXELS, count_pixels
from hpcdistill.data.index import Kind
from hpcdistill.data.pack.packed_image import NEWEST, Form, PackedImage, pack_image
from hpcdistill.data.pack.sources import Source
from hpcdistill.errors import UserError

Made = PackedImage | UserError  # the error of an image that cannot be used

_PIXELS_PER_SECOND: dict[Kind, int] = {  # what one core packs, roughly
    "lr-hr": 4_000_000,
    "paired": 100_000_000,
    "unpaired": 100_000_000,
}
_BATCH_SECONDS = 0.03  # handed over at once: small beside the whole, long beside what the handing over takes
_POOL_SECONDS = 8.0  # a set that one core packs in this time is not worth the start of processes (0.5 s of each core)
_ESTIMATED_BY = 16  # images by which the size of a set is estimated
_SMALL_SET_THREADS = 4
_PIXELS_IN_FLIGHT = 16_000_000  # decoded, resized and encoded side by side: about 20 bytes a pixel
_PIXELS_PER_PROCESS = 8_000_000  # where there are so many that the limit above would leave some idle


def available_cores() -> int:
    """The cores that this process may use: under SLURM and taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packed_ahead(
    sources: Sequence[Source],
    kind: Kind,
    max_pixels: int = MAX_PIXELS,
    processes: int | None = None,
    form: Form = NEWEST,
) -> Generator[Made]:
    """Each of `sources`, packed in that form, in their order.

    `processes` = 1 works in this process with one thread, more start that many; None takes all cores, for a small set
    as threads. Raises UserError when a process was killed. Closing the generator ends all that it started.
    """
    if processes is None:
        processes = available_cores()
        own = processes > 1 and _is_large(sources, kind)
        processes = processes if own else min(processes, _SMALL_SET_THREADS)
    else:
        own = processes > 1
    limit = max(_PIXELS_IN_FLIGHT, processes * _PIXELS_PER_PROCESS)
    coming, in_flight = _batches(sources, kind, max_pixels), 0
    following = next(coming, None)
    waiting: deque[tuple[int, Future[list[Made]]]] = deque()
    with _Workers(processes, own) as workers:
        while following or waiting:
            while following and len(waiting) < 2 * processes:
                batch, pixels = following
                if waiting and in_flight + pixels > limit:
                    break
                waiting.append((pixels, workers.submit(batch, kind, max_pixels, form)))
                in_flight += pixels
                following = next(coming, None)
            pixels, future = waiting.popleft()
            yield from future.result()
            in_flight -= pixels


def pack_batch(sources: Sequence[Source], kind: Kind, max_pixels: int, form: Form) -> list[Made]:
    """Pack one after another; an image that cannot be used does not stop those behind it."""
    made: list[Made] = []
    for source in sources:
        try:
            made.append(pack_image(source, kind, max_pixels, form))
        except UserError as error:
            made.append(error)
        except MemoryError:
            made.append(UserError(f"{source.path}: not enough memory to pack it; use fewer --processes"))
    return made


class _Workers:
    """Threads that pack here, or each in a process of its own."""

    def __init__(self, count: int, own_processes: bool) -> None:
        self._own = own_processes
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="pack")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._processes: list[BaseProcess] = []
        self._closed = False

    def __enter__(self) -> _Workers:
        if self._own:
            resource_tracker.ensure_running()  # or the first start would do it, and unblock the signal again
        return self

    def __exit__(self, *_: object) -> None:
        """End everything at once: there is nothing left to do, or nobody to do it for."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.join()
            process.close()

    def submit(self, batch: list[Source], kind: Kind, max_pixels: int, form: Form) -> Future[list[Made]]:
        return self._threads.submit(self._remote if self._own else pack_batch, batch, kind, max_pixels, form)

    def _remote(self, batch: list[Source], kind: Kind, max_pixels: int, form: Form) -> list[Made]:
        """What `pack_batch` gives, from the process of this thread."""
        try:
            if not hasattr(self._local, "connection"):
                self._local.connection = self._start()
            self._local.connection.send((batch, kind, max_pixels, form))
            answer: list[Made] | str = self._local.connection.recv()
        except (EOFError, OSError):
            raise UserError(
                "a process that packs images ended, most likely killed for want of memory; run the same command again, "
                "with fewer --processes (finished shards are kept)"
            ) from None
        if isinstance(answer, str):
            raise RuntimeError(f"in a process that packs images:\n{answer}")
        return answer

    def _start(self) -> Connection:
        # Ctrl-C reaches every process of the terminal; only the one that ends the others is to notice. The mask of
        # this thread is inherited, from the first instruction on.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        context = get_context("spawn")  # a fork would copy the locks of other threads in whatever state they are
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), name="pack", daemon=True)
        with self._lock:
            if self._closed:
                raise EOFError
            try:
                process.start()
            except OSError as error:
                raise UserError(
                    f"another process that packs images cannot be started ({error.strerror}); use fewer --processes"
                ) from None
            self._processes.append(process)
        theirs.close()
        return ours


def _serve(connection: Connection) -> None:
    """The life of a process: batches in, packed samples out, until the other end is closed."""
    try:
        while True:
            task = connection.recv()
            try:
                answer: list[Made] | str = pack_batch(*task)
            except Exception:  # a fault of ours: shown where the user sees it
                answer = traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError):
        return


def _batches(sources: Sequence[Source], kind: Kind, max_pixels: int) -> Iterator[tuple[list[Source], int]]:
    """Consecutive sources that take `_BATCH_SECONDS` or so together, with their number of pixels."""
    enough = _BATCH_SECONDS * _PIXELS_PER_SECOND[kind]
    batch, total = [], 0
    for source in sources:
        batch.append(source)
        total += sum(pixels for pixels in _pixels(source) if pixels <= max_pixels)  # larger images are not decoded
        if total >= enough:
            yield batch, total
            batch, total = [], 0
    if batch:
        yield batch, total


def _is_large(sources: Sequence[Source], kind: Kind) -> bool:
    """True when one core would take more than `_POOL_SECONDS`, estimated by the first images."""
    first = sources[:_ESTIMATED_BY]
    pixels = sum(sum(_pixels(source)) for source in first) * len(sources) / max(1, len(first))
    return pixels > _POOL_SECONDS * _PIXELS_PER_SECOND[kind]


def _pixels(source: Source) -> Iterator[int]:
    return (count_pixels(path) for _, path in source.files)
