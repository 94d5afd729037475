"""User CPU time of rollouts in two or more checkouts of this repository, in turns.

    python bench/compare_rollout.py before=TREE now=TREE [--rounds 8] [--out FILE]

Each tree answers bench_rollout.py's CPU cases with its native engine, in a process and one thread
of its own: the lab's rollout phase, and answers with a long tail. The processes take turns, and of
each turn the least time counts, so a busy machine disturbs little. The answers of all trees must
be the same bits.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

TURNS = (1, 2, 3)  # each of other random numbers
CASES = ("lab", "long tail")


def serve(tree: str) -> None:
    """Answer lines `[case, turn]` on standard input with the seconds and a digest of the answers.
    Only what the trees' engines have in common is called."""
    sys.path[:0] = [tree, f"{tree}/kernels", f"{tree}/bench"]
    import bench_rollout as bench
    import torch

    from sodfast.commands import build_model, pick_device
    from sodfast.config import load_config
    from sodfast.rollout.engine import SampleKey, Sampling
    from sodfast.rollout.native import NativeEngine
    from sodfast.tasks import build_task

    assert bench.__file__ is not None and bench.__file__.startswith(tree)
    config = load_config(None, ["device=cpu"])
    rollout, model = config.rollout, build_model(config, pick_device("cpu"))
    torch.set_num_threads(1)
    questions = build_task(config.task).train[: rollout.prompts_per_step]
    prompts = [
        torch.tensor(model.encode_question(question))
        for question in questions
        for _ in range(rollout.samples_per_prompt)
    ]
    shape = bench.LAB_SHAPE
    tail = bench.build(shape, torch.device("cpu"), torch.float32, 0.02)
    with torch.no_grad():
        tail.head.zero_()

    def answering(engine: Any, prompts: Any, tokens: int) -> Callable[[int], Any]:
        sampling = Sampling(1.0, 1.0, tokens)
        return lambda turn: engine.generate(
            prompts, range(len(prompts)), sampling, SampleKey(1, turn)
        )

    lab = NativeEngine(model, rollout.batch_size)
    ways = {
        "lab": answering(lab, prompts, rollout.max_new_tokens),
        "long tail": answering(
            NativeEngine(tail, 64), bench.random_prompts(64, 12, shape), 10 * shape.vocabulary
        ),
    }
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        case, turn = json.loads(line)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        samples = ways[case](turn)
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - start
        digest = hashlib.sha256()
        for sample in samples:
            for tensor in (sample.response, sample.logprob, sample.entropy):
                digest.update(tensor.numpy().tobytes())
        print(json.dumps([seconds, digest.hexdigest()]), flush=True)


def compare(trees: dict[str, str], rounds: int) -> dict[str, Any]:
    """By case and tree: user seconds of a turn, as the mean of the turns' minima, their ratio to
    the first tree's, and the median ratio of neighbouring turns."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    servers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", tree],
            stdin=pipe, stdout=pipe, text=True, env=environment, cwd=tree,
        )
        for name, tree in trees.items()
    }  # fmt: skip

    def said(name: str) -> str:
        output = servers[name].stdout
        assert output is not None
        return output.readline()

    versions = {said(name).strip() for name in trees}
    times: dict[tuple[str, str, int], list[float]] = {}
    digests: dict[tuple[str, int], set[str]] = {}
    names = list(trees)
    for number in range(rounds + 1):
        for case in CASES:
            for turn in TURNS:
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    pipe_in = servers[name].stdin
                    assert pipe_in is not None
                    print(json.dumps([case, turn]), file=pipe_in, flush=True)
                    seconds, digest = json.loads(said(name))
                    digests.setdefault((case, turn), set()).add(digest)
                    if number:  # the first round warms up
                        times.setdefault((case, name, turn), []).append(seconds)
    for server in servers.values():
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
    first = names[0]
    found: dict[str, Any] = {}
    for case in CASES:
        least = {n: sum(min(times[case, n, t]) for t in TURNS) / len(TURNS) for n in names}
        found[case] = {
            name: {
                "user_seconds": least[name],
                "ratio": least[name] / least[first],
                "median_ratio": median(
                    a / b
                    for turn in TURNS
                    for a, b in zip(times[case, name, turn], times[case, first, turn], strict=True)
                ),
            }
            for name in names
        }
    same = all(len(answers) == 1 for answers in digests.values())
    return {"cases": found, "same_bits": same, "torch": sorted(versions), "rounds": rounds}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trees", nargs="*", metavar="NAME=TREE")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", metavar="TREE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return 0
    trees = {
        name: str(Path(tree).resolve())
        for name, _, tree in (text.partition("=") for text in options.trees)
    }
    if len(trees) < 2:
        parser.error("give two trees or more: NAME=TREE")
    result = compare(trees, options.rounds)
    result["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    result["python"] = sys.version.split()[0]
    result["command"] = "bench/compare_rollout.py " + " ".join(f"{n}=…" for n in trees)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return 0 if result["same_bits"] else 1


if __name__ == "__main__":
    sys.exit(main())
