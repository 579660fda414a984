"""Thousands of damaged ONNX files: no crash, no hang, no unclear error, no wrong success.

    python -m benchmarks.fuzz [--count 10000] [--first 0] [--jobs 2]
    python -m benchmarks.fuzz --show 4711        # that mutant alone, its file written

Every mutant is judged in a subprocess, which a mutant may kill and whose processor time per mutant
is limited: 10 s. The exit code is 1 if there is a defect.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from .fuzz_judge import Verdict, judge
from .fuzz_mutants import mutant

#: Processor time for one mutant.
CPU_SECONDS = 10
#: Time on the clock: a process that waits for something uses no processor time.
WALL_SECONDS = 200
#: Address space of a subprocess: what needs more is a bomb.
MEMORY_BYTES = 6 << 30


def verdicts(numbers: Sequence[int], jobs: int = 1) -> Iterator[tuple[int, str, Verdict]]:
    """Number, description and verdict of mutants, in the order of completion."""
    done: SimpleQueue[tuple[int, str, Verdict] | None] = SimpleQueue()
    shares = [numbers[i::jobs] for i in range(jobs)]
    threads = [threading.Thread(target=_supervise, args=(s, done)) for s in shares]
    for t in threads:
        t.start()
    running = len(threads)
    while running:
        item = done.get()
        if item is None:
            running -= 1
        else:
            yield item


def _supervise(numbers: Sequence[int], done: SimpleQueue[tuple[int, str, Verdict] | None]) -> None:
    """Judge mutants in a subprocess, and in a new one behind a mutant that ended it."""
    rest = list(numbers)
    context = multiprocessing.get_context("spawn")
    while rest:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(rest, theirs), daemon=True)
        process.start()
        theirs.close()
        stage = "start"
        try:
            while rest:
                if not ours.poll(WALL_SECONDS):
                    process.kill()
                    raise EOFError
                message = ours.recv()
                if isinstance(message, str):
                    stage = message
                else:
                    done.put((rest.pop(0), *message))
                    stage = "next"
        except EOFError:
            process.join()
            number = rest.pop(0)
            done.put((number, mutant(number)[0], _ended(process.exitcode, stage)))
        process.join()
    done.put(None)


def _ended(code: int | None, stage: str) -> Verdict:
    if stage == "oracle":
        return Verdict("unjudged", "the oracle ends the process")
    return Verdict("defect", f"the process ends with exit code {code} at stage {stage}")


def _work(numbers: Sequence[int], results: Connection) -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for number in numbers:
            what, data = mutant(number)
            path.write_bytes(data)
            _limit_processor_time()
            results.send((what, judge(path, results.send)))


def _limit_processor_time() -> None:
    """The signal that ends the process comes so much processor time from now."""
    if sys.platform == "linux":
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        used = int(usage.ru_utime + usage.ru_stime)
        resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS + 1, resource.RLIM_INFINITY))


def main() -> None:
    """Judge many mutants and print what became of them, or show one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", type=int, metavar="NUMBER")
    options = parser.parse_args()
    if options.show is not None:
        what, data = mutant(options.show)
        path = Path(tempfile.gettempdir()) / f"mutant{options.show}.onnx"
        path.write_bytes(data)
        print(what, path, judge(path, print), sep="\n")
        return
    kinds: Counter[str] = Counter()
    numbers = range(options.first, options.first + options.count)
    for number, what, verdict in verdicts(numbers, options.jobs):
        kinds[verdict.kind if verdict.kind == "refused" else f"{verdict.kind}: {verdict.text}"] += 1
        if verdict.kind == "defect":
            print(f"{number} ({what}): {verdict.text}", flush=True)
    defects = sum(n for kind, n in kinds.items() if kind.startswith("defect"))
    for kind, n in kinds.most_common():
        if not kind.startswith("defect"):
            print(f"{n:7,} {kind}")
    print(f"{defects:7,} defects of {options.count:,} mutants")
    sys.exit(defects > 0)


if __name__ == "__main__":
    main()
