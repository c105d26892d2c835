"""Eight random kills of random ranks (`make torture` has fifty): the end is the undisturbed run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from torture import Torture

SEED = 20261122
KILLS = 8


@pytest.mark.distributed
def test_random_kills_change_nothing(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    torture = Torture(SEED, tmp_path)
    torture.run(KILLS)
    figures = torture.figures
    assert figures.kills == KILLS
    assert figures.in_a_save >= 2
    assert len(figures.methods) >= 3
    assert figures.runs_compared_bit_by_bit
    assert figures.runs_compared_to_1e_5
    assert figures.steps_repeated > 0
    assert (figures.lines_missing, figures.lines_doubled, figures.bytes_lost) == (0, 0, 0)
