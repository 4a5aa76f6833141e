"""Check training commands, one a line on standard input, without running them.

bash run_all.sh --list | python tools/check_commands.py      prints runs, GPUs, processors
... | grep -v best-of-grid | python tools/check_commands.py --unfinished      runs to train
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Parser, cpu_count, read_runs

import torch

import engine
import evaluate
import finetune
import train_scratch

SCRIPTS = {"train_scratch.py": train_scratch, "finetune.py": finetune}


def count_unfinished(arguments):
    """How many runs of one command are not in its folder of results."""
    stored = read_runs(arguments.output).values()
    finished = [engine.settings(run["config"]) for run in stored]
    return sum(engine.settings(vars(run)) not in finished for run in engine.combinations(arguments))


def refuse_another_study(commands):
    """Exit with one line if evaluate.py would take other runs than those of `commands`.

    Of several groups of runs of a network that differ in more than a grid varies it takes the
    largest for the study: better to hear it before days of training.
    """

    def network(config):
        return tuple(config.get(flag) for flag in engine.PREFIX_FLAGS)

    networks = {}
    for arguments in commands:
        for run in engine.combinations(arguments):
            if not run.train_photos:
                networks.setdefault(network(vars(run)), []).append({"config": vars(run)})
    for output in {arguments.output for arguments in commands}:
        for run in read_runs(output).values():
            if network(run["config"]) in networks and not run["config"]["train_photos"]:
                networks[network(run["config"])].append(run)
    for planned, *others in networks.values():
        config = planned["config"]
        vary = evaluate.CASE_FLAGS if "backbone" in config else engine.PLURAL_FLAGS
        largest = evaluate.largest_group([planned, *others], vary)
        other = engine.differing_flags(config, largest[0]["config"], vary)
        if other:
            raise SystemExit(
                f"{config['output']} holds {len(largest)} runs with other {', '.join(other)}: a "
                "study of its own, so give another OUT."
            )


def main():
    parser = Parser(__doc__)
    parser.add_argument("--unfinished", action="store_true", help="count runs that are to train")
    only_unfinished, commands = parser.parse_args().unfinished, []
    for line in filter(str.strip, sys.stdin):
        _python, script, *flags = shlex.split(line)
        sys.argv[0] = script  # what argparse calls the program
        commands.append(SCRIPTS[script].build_parser().parse_args(flags))
    if only_unfinished:
        print(sum(count_unfinished(arguments) for arguments in commands))
    else:
        refuse_another_study(commands)
        runs = sum(len(engine.combinations(arguments)) for arguments in commands)
        print(runs, torch.cuda.device_count(), cpu_count())


if __name__ == "__main__":
    main()
