"""The train command on two ranks: what one of them alone sees or meets must not part it from the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranked_commands import Ranks
from tiny_runs import tiny_variant

from hpcdistill import train, trainer
from hpcdistill.data.read.staging import StagingStopped
from hpcdistill.errors import EXIT_STOPPED
from hpcdistill.training.run_folder import RunFolder

pytestmark = pytest.mark.distributed
CLONE = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Two steps on noise."""
    variant = tiny_variant(tmp_path, timeout=20)
    return [str(CLONE / "configs/fsrcnn/x2.yaml"), variant, f"runs={tmp_path / 'runs'}"]


def trained(command: list[str], folder: Path, change: Callable[[int], None]) -> tuple[list[int | None], str]:
    def main(rank: int, ranks: int) -> int:
        change(rank)
        return train.main(command)

    with Ranks(2, main, folder) as started:
        return started.codes(60), started.said(0)


@pytest.mark.parametrize("stopped", [0, 1])
def test_staging_that_stops_on_one_rank_stops_both(
    stopped: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_reader = trainer.open_reader

    def staged(rank: int) -> None:
        def opened(*arguments: Any) -> Any:
            if rank == stopped:
                raise StagingStopped
            return open_reader(*arguments)

        monkeypatch.setattr(trainer, "open_reader", opened)

    codes, said = trained(command, tmp_path / "first", staged)
    assert codes == [EXIT_STOPPED] * 2
    assert "stopped while staging; the same command goes on from here" in said
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/metrics.jsonl"))


@pytest.mark.parametrize("blind", [0, 1])
def test_rank_0_says_whether_a_run_has_finished(
    blind: int, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, _ = trained(command, tmp_path / "first", lambda rank: None)
    assert codes == [0, 0]
    result = RunFolder.result

    def looked(rank: int) -> None:
        monkeypatch.setattr(RunFolder, "result", lambda folder: None if rank == blind else result(folder))

    codes, said = trained(command, tmp_path / "second", looked)
    assert codes == [0, 0]
    assert ("has finished already" in said) == (blind == 1)
