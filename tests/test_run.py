"""What a run checks before its first step, beyond what test_pretrain.py does from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from photos import write_photo_folder
from sessions import ROOT
from toy_runs import TINY

from pipeline.options import ShardingOptions
from pipeline.writer import make_dataset

# Each rank's own machine has another dataset under the same name.
EACH_ITS_OWN = """
import os, sys
sys.argv = [arg.replace("RANK", os.environ["RANK"]) for arg in sys.argv]
from pipeline.errors import exit_on_user_error
from train.pretrain import main
exit_on_user_error(main)
"""


def test_machines_with_different_copies_are_refused(tmp_path: Path) -> None:
    folder = write_photo_folder(tmp_path / "photos")
    for rank, seed in ((0, 0), (1, 1)):
        options = ShardingOptions(samples_per_shard=10, seed=seed)
        make_dataset(str(folder), tmp_path / f"data{rank}", options, quiet=True, in_process=True)
    script = tmp_path / "script.py"
    script.write_text(EACH_ITS_OWN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["--data", str(tmp_path / "dataRANK"), "--run-dir", str(tmp_path / "run"), *TINY, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert f"error: --data {tmp_path}/data1 is another dataset here than on rank 0" in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
