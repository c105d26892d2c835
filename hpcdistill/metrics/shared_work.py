"""Work that ranks share without talking to each other, and the one agreement at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object, reduce

from hpcdistill.errors import UserError
from hpcdistill.training.evaluation import EvaluationStopped


@contextmanager
def shared_work(ranks: int, device: torch.device | str) -> Iterator[None]:
    """A rank's own part of an evaluation, without collectives inside; leaving it is a collective call.

    What ends one rank's part ends it on every rank, once all have left theirs: so no rank waits in a gathering that
    another will never join. A failure (UserError, or OSError of a disk) is raised on every rank, with several that of
    the first of them; EvaluationStopped when there is none and any rank was stopped.
    """
    ended: Exception | None = None
    try:
        yield
    except (UserError, OSError, EvaluationStopped) as error:
        if ranks == 1:
            raise
        ended = error
    if ranks == 1:
        return
    flag = torch.tensor(int(ended is not None), device=device)
    # Not with the watch's patience: a rank that waits here while another one goes on is in order, with patience a
    # rank that waits for a hanging one would be, too.
    if not bool(reduce(flag, "sum").item()):
        return
    # Only now is anything but one number sent.
    everything: list[Exception | None] = gather_object([ended])
    endings = [error for error in everything if error is not None]
    raise next((error for error in endings if not isinstance(error, EvaluationStopped)), endings[0])
