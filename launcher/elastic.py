"""torchrun, ending with the exit code of the rank that failed first.

torchrun itself ends with 1, whatever its ranks said; Kubernetes needs to know whether the state was
saved (75), the input was wrong (2) or a signal ended it (128 and the signal's number). The words
are torchrun's own:

    python -m launcher.elastic --nnodes 2 --nproc-per-node 8 ... -m launcher RECIPE
"""

import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Run torchrun and return the exit code; the failed ranks have said why by themselves."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
        sys.stderr.write(f"launcher: rank {rank} was the first to fail, with exit code {code}\n")
        return code
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
