"""Kill a run again and again at random moments, resume it, and compare with a run left in peace.

    python benchmarks/chaos.py --kills 100

Each time one random process of the run is sent SIGKILL at a random moment after its beginning. In
the end the final weights must have the SHA-256 of the uninterrupted run's. `--ranks 2` trains on
two processes. The recipe is tests/support/resumable.py: dropout, augmentation,
CutMix, clipping, weight average.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.epoch import machine
from tests.support.processes import Run, fingerprint


def main() -> None:
    """Run, kill, resume, compare, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    words = parser.parse_args()
    with TemporaryDirectory() as folder:
        figures = torment(Path(folder), words.kills, words.ranks, random.Random(words.seed))
    command = f"python benchmarks/chaos.py --kills {words.kills} --ranks {words.ranks}"
    result = {
        "command": command,
        "seed": words.seed,
        "machine": machine(Accelerator(cpu=True)),
        **figures,
    }
    words.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))
    sys.exit(0 if figures["identical"] else 1)


def torment(folder: Path, kills: int, ranks: int, chance: random.Random) -> dict[str, object]:
    """The kills, and whether the weights are those of a run that was left in peace."""
    settings = (f"epochs={max(8, 6 * kills)}", "--checkpoint-every", "7")
    whole = Run(ranks, folder, "--name", "whole", *settings)
    assert whole.end() == 0, whole.text()
    done = 0
    while True:
        run = Run(ranks, folder, "--name", "cut", "--resume", *settings)
        if done == kills:
            assert run.end() == 0, run.text()
            break
        run.wait_for("run folder")
        time.sleep(chance.uniform(0, 1.5))
        chance.choice(run.processes).kill()
        run.end()
        done += 1
        print(f"kill {done} of {kills}", flush=True)
    whole_print, cut_print = (fingerprint(folder / "runs" / name) for name in ("whole", "cut"))
    return {"sha256": cut_print, "identical": whole_print == cut_print}


if __name__ == "__main__":
    main()
