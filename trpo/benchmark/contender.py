"""The process of one contender: `python -m trpo.benchmark.contender NAME --threads N`.

A line of JSON in, {"call": method, …keywords}; a line of JSON out, {"numbers": …} or {"error": …}. Whatever libraries
print goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import warnings
from collections.abc import Callable
from typing import Any

from trpo.benchmark.work import versions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    contender: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if contender is None:
                contender = make(args.name, args.threads)
            call = request.pop("call")
            method = GENERAL[call] if call in GENERAL else getattr(contender, call)
            answer = {"numbers": method(**request)}
        except Exception as error:  # one measurement that cannot be made must not end the others
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def make(name: str, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    if name == "trpo":
        from trpo.benchmark.ours import Ours

        return Ours()
    from trpo.benchmark.peers import make_peer

    return make_peer(name)


def memory() -> dict[str, float]:
    """Largest resident set so far, in MiB.

    Linux's own mark where there is one: the one of `getrusage` starts at that of the process that started this one.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return {"peak_mib": int(line.split()[1]) / 1024}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_mib": peak / 2**20 if sys.platform == "darwin" else peak / 1024}


GENERAL: dict[str, Callable[[], dict[str, Any]]] = {"versions": versions, "memory": memory}


if __name__ == "__main__":
    main()
