"""Train many runs: reads training commands, one a line, and runs them `--jobs` at a time.

    bash run_all.sh --list | python -m tools.run_queue --jobs 2

Each job is one process that imports torch once and takes command after command, because a run can
be shorter than that import. A command with --best-of-grid waits for all that stand before it.
Finished runs are skipped by the scripts themselves. The first failure stops the queue; the runs in
progress then are still finished, and what is finished is kept.
"""

import itertools
import os
import shlex
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process

import runs

SCRIPTS = ("train_scratch.py", "finetune.py")


def prepare_job(counter, jobs):
    """Give this process its share of the processors, and one GPU where there are several."""
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(max(1, runs.cpu_count() // jobs))
    gpus = torch.cuda.device_count()
    if gpus > 1:
        torch.cuda.set_device(number % gpus)


def end_with_parent():
    """End this process when the queue's is gone, killed perhaps: nobody would read its results."""
    parent_process().join()
    os._exit(1)


def run_command(command):
    """Run one training command in this process; raises what the script raises."""
    script, *arguments = command
    if script == "train_scratch.py":
        import train_scratch as module
    else:
        import finetune as module
    sys.argv = [script]  # what argparse calls the program
    module.main(arguments)


def parse(line):
    """`python train_scratch.py --flags` -> ["train_scratch.py", "--flags"]."""
    try:
        words = shlex.split(line)
    except ValueError:  # an unbalanced quote
        words = [line]
    if words and words[0].startswith("python"):
        words = words[1:]
    if words and words[0] not in SCRIPTS:
        raise SystemExit(f"not a training command: {line.strip()}")
    return words


def failure(command, reason):
    return SystemExit(f"failed: python {shlex.join(command)}\n{reason}")


def main(argv=None):
    parser = runs.Parser(__doc__)
    # A run alone fills neither two processors nor a GPU.
    default = min(4, runs.cpu_count())
    parser.add_argument("--jobs", type=runs.number(int, 1), default=default, help="runs at a time")
    jobs = parser.parse_args(argv).jobs
    stages = [[]]
    for command in filter(None, map(parse, sys.stdin)):
        if "--best-of-grid" in command and stages[-1] and "--best-of-grid" not in stages[-1][-1]:
            stages.append([])
        stages[-1].append(command)
    if jobs == 1:
        for command in itertools.chain(*stages):
            try:
                run_command(command)
            except SystemExit as error:
                raise failure(command, error) from None
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, runs.cpu_count() // jobs))
    context = get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, context, prepare_job, (counter, jobs)) as pool:
        try:
            for stage in stages:
                futures = {pool.submit(run_command, command): command for command in stage}
                finished, waiting = wait(futures, return_when=FIRST_EXCEPTION)
                for future in finished:
                    if error := future.exception():
                        for other in waiting:
                            other.cancel()
                        if isinstance(error, BrokenProcessPool):
                            error = "a training process was killed (out of memory?)"
                        elif not isinstance(error, SystemExit):
                            raise error
                        raise failure(futures[future], error)
        except BaseException:  # Ctrl-C too: start nothing more
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    start = time.perf_counter()
    runs.run_main(main)
    print(f"training: {time.perf_counter() - start:.0f} s")
