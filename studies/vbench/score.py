"""Runs in VBench's environment, where nothing of this project is installed: scores of videos by VBench's own code.

    python score.py JOB.json

The job names VBench's entries with their videos, the dimensions, a device and a folder for results. VBench would
download what is missing, so its networks are checked before. ``TORCH_HOME`` is where DINO's code looks for its weights.
"""

import json
import os
import sys
from pathlib import Path

import vbench


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    weights = Path(job["models"], "dino_model", "dino_vitbase16_pretrain.pth").absolute()
    cached = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", weights.name)
    cached.parent.mkdir(parents=True)
    cached.symlink_to(weights)
    bench = vbench.VBench(job["device"], job["full_info"], job["folder"])
    scores = {}
    for dimension in job["dimensions"]:
        name = f"of_{dimension}"
        bench.evaluate(job["videos"], name, dimension_list=[dimension], local=True)
        found = json.loads(Path(job["folder"], f"{name}_eval_results.json").read_text(encoding="utf-8"))
        scores[dimension] = float(found[dimension][0])
        print(f"scored {dimension} {scores[dimension]}", flush=True)
    Path(job["folder"], "scores.json").write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main()
