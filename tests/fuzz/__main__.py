"""The long run, by hand: `python -m tests.fuzz --cases 4000 --seed 0 --accepted FILE`."""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import drawn
from tests.fuzz.verdicts import judged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accepted", type=Path, help="a file for a line per accepted case")
    arguments = parser.parse_args()
    cases, counts, accepted = drawn(arguments.cases, arguments.seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        for case, (verdict, printed) in zip(cases, judged(cases, Path(folder)), strict=True):
            counts[verdict.partition(":")[0]] += 1
            if verdict == "accepted":
                accepted.append(f"{_shown(case)}\n")
            if verdict.startswith("fault"):
                sys.stdout.write(f"{verdict}: {_shown(case)}\n{_escaped(printed)}\n\n")
                sys.stdout.flush()
    sys.stdout.write("".join(f"{count:6} {word}\n" for word, count in counts.most_common()))
    if arguments.accepted:
        arguments.accepted.write_text("".join(sorted(accepted)))
    return int(counts["fault"] > 0)


def _shown(case: object) -> str:
    text = _escaped(str(case))
    return text if len(text) < 300 else f"{text[:250]} ... {text[-40:]}"


def _escaped(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
