"""Train one run from the command line: ``python -m replication resnet-50 --dataset imagenet``, or by torchrun."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from replication import Run, trainers
from replication.engine import files
from replication.engine.machine import tune_malloc
from replication.engine.workers import says_all


def main():
    parser = argparse.ArgumentParser(
        "python -m replication",
        description="Train one run, or go on with it, and leave its record in <results>/runs/<run id>/.",
        epilog="By torchrun, all of its processes share every batch: torchrun --nproc-per-node 8 -m replication ...",
    )
    parser.add_argument("net", help='such as "plain-34", "resnet-34-B" or "resnet-50"')
    kinds = {"seed": int, "schedule": float, "holdout": int, "bn_batch": int}
    parser.add_argument("--no-warmup", dest="warmup", action="store_false", help="start at the full rate")
    for field in fields(Run)[1:]:
        if field.name != "warmup":
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=kinds.get(field.name, str), default=field.default
            )
    parser.add_argument("--results", help="folder of the records, seen by all machines; left out: results")
    parser.add_argument("--data", help="folder of the data sets; left out: data")
    values = vars(parser.parse_args())
    try:
        results, data = (_folder(name, values.pop(name)) for name in ("results", "data"))
        run = Run(**values)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    tune_malloc()  # as the workers of run_all do
    try:
        record = trainers.train(run, results, data, progress=True)
    except KeyboardInterrupt as interrupt:
        print(interrupt if interrupt.args else "Interrupted: the same command continues with what there is.")
        sys.exit(130)
    except Exception as error:
        if not says_all(error):
            raise
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if record.diverged is None:
        print(f"{record.folder}: test error {record.summary['test_error']:.2f} %")
    else:
        print(f"{record.folder}: diverged")


def _folder(name, value):
    """As in any shell, relative paths start from the current folder; what is left out is the repository's."""
    return name if value is None else files.folder(name, Path.cwd() / files.expanded(name, value))


if __name__ == "__main__":
    main()
