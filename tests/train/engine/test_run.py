"""What a run checks before its first step, beyond what test_pretrain.py does from the command line."""

from __future__ import annotations

from pathlib import Path

from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import write_photo_folder
from tests.helpers.sessions import two_ranks
from tests.helpers.toy_runs import TINY

# Each rank's own machine has another dataset under the same name.
EACH_ITS_OWN = """
import os, sys
sys.argv = [arg.replace("RANK", os.environ["RANK"]) for arg in sys.argv]
from pipeline.common.errors import exit_on_user_error
from train.pretrain import main
exit_on_user_error(main)
"""


def test_machines_with_different_copies_are_refused(tmp_path: Path) -> None:
    folder = write_photo_folder(tmp_path / "photos")
    for rank, seed in ((0, 0), (1, 1)):
        options = ShardingOptions(samples_per_shard=10, seed=seed)
        make_dataset(str(folder), tmp_path / f"data{rank}", options, quiet=True, in_process=True)
    places = ["--data", tmp_path / "dataRANK", "--run-dir", tmp_path / "run"]
    done = two_ranks(EACH_ITS_OWN, tmp_path, *places, *TINY, "--device", "cpu", "--global-batch", "12")
    assert f"error: --data {tmp_path}/data1 is another dataset here than on rank 0" in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
