"""Tiny runs on the sample for the tests, and programs that are killed.
`python tests/faulty.py kill ROUNDS SEED` prints its counts as JSON; `python tests/faulty.py train …`
is the command on the sample, and FAULTY_SIGNAL='RANK STEP NUMBER' gives it a signal."""
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

SMALL = dict(model_name='resnet10', width=8, batch_size=50, num_epochs=2, valid_size=100, limit_train=200, limit_test=50,
             num_workers=0, precision='fp32', device='cpu', lr=0.01, lr_scheduler='none')


def small(folder, **settings):
    "The settings of a run of four steps an epoch; there are 1,000 images in the sample."
    from resnet_cifar.config import TrainConfig
    return TrainConfig(**SMALL | dict(ckpt_dir=str(folder)) | settings)


def words(folder, **settings):
    "The same as words of a command."
    flags = SMALL | dict(ckpt_dir=str(folder)) | settings
    return [word for name, value in flags.items() for word in ((f'--{name}',) if value is True else (f'--{name}', str(value)))]


def use_sample():
    "Every run of this process trains on the sample."
    from resnet_cifar import preparation
    from resnet_cifar.data import sample_cifar10
    sample = sample_cifar10()
    preparation.load_cifar10 = lambda root, skip_checksum: sample


def history(folder):
    "The rows of `history.csv`, without the seconds."
    with open(Path(folder)/'history.csv') as file:
        return [{name: value for name, value in row.items() if name!='seconds'} for row in csv.DictReader(file)]


def outcome(folder):
    "What must be the same however often a run was interrupted."
    return history(folder), json.loads((Path(folder)/'result.json').read_text())['state_digest']


class Interrupt:
    "A callback that ends the run after so many steps, before anything can be saved, as a kill does."
    def __init__(self, after): self.left = after
    def state_dict(self): return {}
    def load_state_dict(self, saved): pass
    def after_step(self, state):
        self.left -= 1
        if self.left==0: raise KeyboardInterrupt


@pytest.fixture(name='sample_run')
def make_sample_run(monkeypatch):
    "`trainer.run` on the sample; `after` so many steps it is interrupted."
    from resnet_cifar import preparation, trainer
    from resnet_cifar.data import sample_cifar10
    monkeypatch.setattr(preparation, 'load_cifar10', lambda root, skip_checksum: sample_cifar10())

    def run(folder, *, after=None, resume=None, overwrite=False, callbacks=(), **settings):
        config = small(folder, **settings)
        if after is None: return trainer.run(config, resume=resume, overwrite=overwrite, callbacks=callbacks)
        with pytest.raises(KeyboardInterrupt):
            trainer.run(config, resume=resume, overwrite=overwrite, callbacks=[*callbacks, Interrupt(after)])
    return run


def signal_at(rank, step, number):
    "The process of this rank and its workers get a signal before this step of its run; evaluations count too."
    from resnet_cifar.distributed import SignalWatch, rank_and_world_size
    check, steps = SignalWatch.check, iter(range(10**6))

    def check_and_signal(watch):
        if next(steps)==step and rank_and_world_size()[0]==rank: os.killpg(os.getpgrp(), number)
        check(watch)
    SignalWatch.check = check_and_signal


# ---------------------------------------------------------------- killed at random instants

def unfinished(folder):
    "(name, time) of the checkpoints that were being written."
    files = [folder/f'.{name}.resnet_cifar-tmp.ckpt' for name in ('last', 'previous', 'best')]
    return {(path.name, path.stat().st_mtime_ns) for path in files if path.exists() and path.stat().st_size}


def start(run, config):
    "A child that runs or resumes, with its output thrown away."
    child = os.fork()
    if child: return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        run(config, resume='auto')
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)


def end(child):
    "Whether a child has come to its own end."
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f'the run ended with {code}'
    return code==0


def has_ended(child): return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_a_save(folder, child, before):
    "Until the child writes a checkpoint."
    while not has_ended(child):
        try:
            if unfinished(folder) - before: return
        except FileNotFoundError: return # it has just got its name
        time.sleep(0.0002)


def stop_while_saving(folder, child, before, rng):
    "Halt the child at a random moment of a save; where a machine was quicker than that, of the next one."
    while not has_ended(child):
        wait_for_a_save(folder, child, before)
        time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGSTOP)
        os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if unfinished(folder) - before: return
        os.kill(child, signal.SIGCONT)


def kill_rounds(rounds, seed):
    "Kill runs at random instants, `rounds` times in all; those that reach their end are compared with runs that nobody killed."
    import matplotlib.backends.backend_agg  # noqa: F401  in the parent, so that no child spends its life on imports
    import matplotlib.style  # noqa: F401
    import torch
    from resnet_cifar import checkpoint, trainer
    from resnet_cifar.history import Curves
    torch.set_num_threads(1)
    use_sample()
    Curves.before_fit = lambda self, state: None # drawing once before the first epoch takes longer than many saves
    checkpoint.SAVE_SECONDS = 0 # a save after every step
    rng, top = random.Random(seed), Path(tempfile.mkdtemp())
    counts = dict(kills=0, while_saving=0, runs=0, equal=0)
    settings = dict(batch_size=25, num_epochs=4, image_sizes=(9,), optimizer='SGD', lr=0.05, lr_scheduler='OneCycleLR', ema_decay=0.9,
                    transform=True)

    while counts['kills'] < rounds:
        number = counts['runs']
        whole, killed = (top/f'{name}{number}' for name in ('whole', 'killed'))
        assert end(start(trainer.run, small(whole, random_seed=number, **settings)))
        is_finished = False
        while not is_finished:
            before = unfinished(killed)
            child = start(trainer.run, small(killed, random_seed=number, **settings))
            if counts['kills'] < rounds:
                time.sleep(rng.uniform(0.05, 0.8))
                if counts['kills']%2: # every other time a random moment after a save has begun
                    stop_while_saving(killed, child, before, rng)
                os.kill(child, signal.SIGKILL)
            is_finished = end(child)
            if not is_finished:
                counts['kills'] += 1
                counts['while_saving'] += bool(unfinished(killed) - before)
        counts['runs'] += 1
        counts['equal'] += outcome(killed)==outcome(whole)
        left = sorted(path.name for path in killed.iterdir())
        assert left==sorted(path.name for path in whole.iterdir()), left
    shutil.rmtree(top)
    print(json.dumps(counts))


if __name__=='__main__':
    if sys.argv[1]=='kill': kill_rounds(int(sys.argv[2]), int(sys.argv[3]))
    else:
        from resnet_cifar.cli import main
        use_sample()
        if 'FAULTY_SIGNAL' in os.environ: signal_at(*map(int, os.environ['FAULTY_SIGNAL'].split()))
        sys.exit(main(sys.argv[1:]))
