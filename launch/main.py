"""`duplex-jax JOB --flags`: the same as `python -m launch.JOB --flags`."""

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys

from launch.app import reader_may_go

JOBS = {
    "chat": "talk with a model slice by slice, or replay a timeline",
    "generate": "make Duplex-UltraChat timelines from turn-based dialogues; check and describe a dataset",
    "pack": "encode timelines once into packed fixed-length rows",
    "train": "sharded training on packed rows",
    "adapt": "make any chat model duplex with dialogues that it writes itself",
    "compile": "compile the training step for absent hardware, and check whether it fits",
    "convert": "read any supported checkpoint and write it for transformers, Orbax or llama.cpp",
    "evaluate": "behaviour, benchmarks, judged dialogue, user study, report",
    "serve": "the real-time server",
    "doctor": "check this machine: devices, rates, a sharded step, a save, one slice",
    "bench": "run a benchmark: decode, batch, train, data, generate, evaluate, serve, speech",
}


def main() -> None:
    """Runs the job named by the first argument with the rest."""
    with reader_may_go():
        _run()


def _run() -> None:
    jobs = {job: text for job, text in JOBS.items() if importlib.util.find_spec(f"launch.{job}")}
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h", "help"):
        print("usage: duplex-jax JOB [--flags]\n")
        for job, text in jobs.items():
            print(f"  {job:10}{text}")
        print("\nduplex-jax JOB --help lists a job's flags, duplex-jax --version the version.")
        raise SystemExit(0)
    job = sys.argv[1]
    if job in ("--version", "version"):
        print(f"duplex-jax {importlib.metadata.version('duplex-jax')}")
        raise SystemExit(0)
    if job not in jobs:
        near = difflib.get_close_matches(job, jobs, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the jobs are {', '.join(jobs)}"
        print(f"duplex-jax: no job {job!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"duplex-jax {job}", *sys.argv[2:]]
    try:
        importlib.import_module(f"launch.{job}").start()
    except KeyboardInterrupt:  # during the import
        print("duplex-jax: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
