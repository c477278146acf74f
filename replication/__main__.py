"""The command line: ``python -m replication resnet-50 --dataset imagenet`` trains a run, also by torchrun.

``python -m replication verify <run id>`` trains the beginning of a finished run again and compares it with its record.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from replication import Run, trainers, verify
from replication.engine import files
from replication.engine.machine import tune_malloc
from replication.engine.workers import says_all
from replication.runs import records

PROGRAM = "python -m replication"


def main():
    try:
        verify_record(sys.argv[2:]) if sys.argv[1:2] == ["verify"] else train()
    except Exception as error:
        if not says_all(error):
            raise
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(1)


def verify_record(arguments):
    """The subcommand ``verify``; its exit status is 0 for a record that is confirmed, 1 for any other."""
    parser = argparse.ArgumentParser(
        f"{PROGRAM} verify", description="Train the beginning of a finished run again and compare it with its record."
    )
    parser.add_argument("run", help="its id: the name of its folder in results/runs or results/published/runs")
    parser.add_argument("--rows", type=int, default=1, help="of the history, each a hundredth of the run; left out: 1")
    values = vars(_parse_with_folders(parser, arguments))
    results, data = (_folder(name, values[name]) for name in ("results", "data"))
    found = verify.verify(records.by_id(values["run"], results), data, values["rows"])
    print(found)
    sys.exit(1 if found.differences else 0)


def train():
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Train one run, or go on with it, and leave its record in <results>/runs/<run id>/.",
        epilog="By torchrun, all of its processes share every batch: torchrun --nproc-per-node 8 -m replication ... "
        f"{PROGRAM} verify <run id> trains the beginning of a finished run again and compares.",
    )
    parser.add_argument("net", help='such as "plain-34" or "resnet-34-B"; or <module>:<function>')
    kinds = {"seed": int, "schedule": float, "holdout": int, "bn_batch": int, "weights": json.loads}
    parser.add_argument("--no-warmup", dest="warmup", action="store_false", help="start at the full rate")
    for field in fields(Run)[1:]:
        if field.name != "warmup":
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=kinds.get(field.name, str), default=field.default
            )
    values = vars(_parse_with_folders(parser))
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
    if record.diverged is not None:
        print(f"{record.folder}: diverged")
    elif run.detects:
        coco = run.dataset.startswith("coco")
        name, words = ("map_50_95", "mAP@[.5, .95] {}") if coco else ("map_voc07", "mAP@.5 {} by VOC's 11 points")
        value = record.summary[name]
        print(f"{record.folder}: {words.format('not measured' if value is None else f'{value:.2f} %')}")
    else:
        print(f"{record.folder}: test error {record.summary['test_error']:.2f} %")


def _parse_with_folders(parser, arguments=None):
    parser.add_argument("--results", help="folder of the records, seen by all machines; left out: results")
    parser.add_argument("--data", help="folder of the data sets; left out: data")
    return parser.parse_args(arguments)


def _folder(name, value):
    """As in any shell, relative paths start from the current folder; what is left out is the repository's."""
    return name if value is None else files.folder(name, Path.cwd() / files.expanded(name, value))


if __name__ == "__main__":
    main()
