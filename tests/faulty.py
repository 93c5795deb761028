"Programs that the fault tests run and kill. `python tests/faulty.py kill ROUNDS SEED` prints its counts as JSON; `train …` is the command with a save after every step."
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path


def save_after_every_step():
    from resnet_cifar import checkpoint
    checkpoint.SAVE_SECONDS = 0


def kill_rounds(rounds, seed):
    "Kill a run at random instants, `rounds` times in all, each time by SIGKILL; runs that reach their end are compared with one that was never stopped."
    import matplotlib.figure  # noqa: F401  in the parent, so that no child spends its life on imports
    import torch
    from resnet_cifar import trainer
    from resnet_cifar.config import TrainConfig
    from resnet_cifar.data import sample_cifar10
    torch.set_num_threads(1)
    sample, rng, folder = sample_cifar10(), random.Random(seed), Path(tempfile.mkdtemp())
    trainer.load_cifar10 = lambda root, skip_checksum: sample
    save_after_every_step()
    counts = dict(kills=0, while_saving=0, runs=0, equal=0)

    def config(name, number):
        return TrainConfig(ckpt_dir=str(folder/name), random_seed=number, width=24, batch_size=25, num_epochs=4, image_sizes=(8,), limit_train=200, limit_test=50, valid_size=100,
                           optimizer='SGD', lr=0.05, lr_scheduler='OneCycleLR', ema_decay=0.9, transform=True, num_workers=0, precision='fp32')

    def start(name, number):
        "A child that runs or goes on, with its output thrown away."
        child = os.fork()
        if child: return child
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            trainer.run(config(name, number), resume='auto')
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)

    def end(child):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), f'round {counts}: the run ended with {code}'
        return code==0

    def outcome(name):
        history = [line.rpartition(',')[0] for line in (folder/name/'history.csv').read_text().splitlines()] # without the seconds
        return history, json.loads((folder/name/'result.json').read_text())['state_digest']

    while counts['kills'] < rounds:
        number, finished = counts['runs'], False
        assert end(start(f'whole{number}', number))
        while not finished:
            child = start(f'killed{number}', number)
            if counts['kills'] < rounds:
                time.sleep(rng.uniform(0.05, 0.8))
                if counts['kills']%2: # every other time wait for the next save to begin, and a random moment more
                    while not any((folder/f'killed{number}').glob(f'.*.{child}.tmp.ckpt')) and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT): time.sleep(0.0002)
                    time.sleep(rng.uniform(0, 0.015))
                os.kill(child, signal.SIGKILL)
            finished = end(child)
            if finished: break
            counts['kills'] += 1
            files = [p for p in (folder/f'killed{number}').glob('.*.tmp*') if p.stat().st_size]
            counts['while_saving'] += any(f'.{child}.tmp.ckpt' in p.name for p in files) # a checkpoint's temporary file had its first byte, and not yet its name
        counts['runs'] += 1
        counts['equal'] += outcome(f'killed{number}')==outcome(f'whole{number}')
        left = sorted(p.name for p in (folder/f'killed{number}').iterdir())
        assert left==sorted(p.name for p in (folder/f'whole{number}').iterdir()), left
    shutil.rmtree(folder)
    print(json.dumps(counts))


if __name__=='__main__':
    if sys.argv[1]=='kill': kill_rounds(int(sys.argv[2]), int(sys.argv[3]))
    else:
        from resnet_cifar.cli import main
        save_after_every_step()
        sys.exit(main(sys.argv[1:]))
