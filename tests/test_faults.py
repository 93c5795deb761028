"Nothing is lost: killed, stopped, out of room, out of memory, with damaged files and two at once. `FAULT_ROUNDS=100` (make faults) is the long version."
import csv
import dataclasses
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import ROOT, pack_batches
from resnet_cifar import trainer, training
from resnet_cifar.checkpoint import _sealed, load_checkpoint, load_model, save_checkpoint, save_pretrained
from resnet_cifar.cli import main
from resnet_cifar.config import RECIPES, TrainConfig
from resnet_cifar.data import sample_cifar10
from resnet_cifar.fetch import Stopped, read_cifar10, verify_cifar10
from resnet_cifar.models import create_model
from resnet_cifar.training import Callback

FAULTY = [sys.executable, str(ROOT/'tests'/'faulty.py')]
ENV = os.environ | dict(OMP_NUM_THREADS='1')


# ---------------------------------------------------------------- killed and stopped

def test_kill_9_at_any_instant():
    "Every round goes on; at the end the bits are those of the run that was never stopped. At least 3 in 10 kills hit a checkpoint that is being written."
    rounds = int(os.environ.get('FAULT_ROUNDS', 15))
    done = subprocess.run([*FAULTY, 'kill', str(rounds), '0'], capture_output=True, text=True, env=ENV)
    assert done.returncode==0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts['kills']==rounds and counts['runs']==counts['equal'] >= 1 and counts['while_saving'] >= 0.3*rounds, counts


def words(root, folder, **settings):
    settings = dict(root=root, ckpt_dir=folder, width=8, batch_size=64, num_epochs=3, limit_train=2560, limit_test=500, valid_size=500, num_workers=0, lr=0.01) | settings
    return ['train', '--transform', *[w for name, value in settings.items() for w in ((f'--{name}', str(value)) if value is not True else (f'--{name}',))]]


def outcome(folder):
    history = [{k: v for k, v in row.items() if k!='seconds'} for row in csv.DictReader(open(folder/'history.csv'))]
    return history, json.loads((folder/'result.json').read_text())['state_digest']


def program(*argv, code=0, **kwargs):
    done = subprocess.run([sys.executable, '-m', 'resnet_cifar', *argv], capture_output=True, text=True, env=ENV, **kwargs)
    assert done.returncode==code, f'{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'
    return done


def start(argv, until):
    "A program that has printed a line which begins so."
    process = subprocess.Popen([sys.executable, '-m', 'resnet_cifar', *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True)
    for line in process.stdout:
        if line.startswith(until): return process
    raise AssertionError(process.stderr.read())


def session_is_empty(session):
    "Whether every process that the program started is gone."
    listed = subprocess.run(['ps', '-o', 'stat=', '--sid', str(session)], capture_output=True, text=True).stdout.split()
    return not [state for state in listed if not state.startswith('Z')]


@pytest.mark.parametrize('number, until, wait, settings', [
    (signal.SIGTERM, 'epoch   0', 0.4, dict(num_workers=2)),
    (signal.SIGINT, 'epoch   0', 0.5, dict(ema_decay=0.9, optimizer='SGD', lr_scheduler='OneCycleLR')),
    (signal.SIGTERM, 'expected', 2, dict(compile=True, width=4)),     # while compiling
    (signal.SIGINT, 'epoch   1', 0, dict(num_workers=2)), # just after an epoch
], ids=['term-workers', 'int-ema', 'term-compiling', 'int-between'])
def test_signal_saves_and_the_run_goes_on(cifar10_root, tmp_path, number, until, wait, settings):
    program(*words(cifar10_root, tmp_path/'whole', **settings))
    process = start(words(cifar10_root, tmp_path/'stopped', **settings), until)
    time.sleep(wait)
    os.killpg(process.pid, number) # as a terminal or a batch system does: workers and compilers get it too
    out, err = process.communicate(timeout=300)
    assert process.returncode==128 + number, (process.returncode, err)
    assert 'Traceback' not in err and re.search(r'^stopped; \S+ holds \d finished epochs', err, re.M), err
    assert session_is_empty(process.pid)
    assert load_checkpoint(tmp_path/'stopped'/'last.ckpt')['epoch'] < 3
    again = program(*words(cifar10_root, tmp_path/'stopped', **settings), '--resume', 'auto')
    assert outcome(tmp_path/'stopped')==outcome(tmp_path/'whole')
    if 'OneCycleLR' in settings.values(): assert re.search(r'going on after \d finished epochs and \d+ steps', again.stdout) # within an epoch
    assert sorted(p.name for p in (tmp_path/'stopped').iterdir())==sorted(p.name for p in (tmp_path/'whole').iterdir())


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipe_goes_on_within_an_epoch(cifar10_root, tmp_path, recipe):
    "A recipe in small: a thin network, few images, three epochs at three sizes, half of them narrow if the recipe begins so."
    narrow = 1.5 if RECIPES[recipe].narrow_epochs else 0
    def argv(folder):
        return ['train', '--recipe', recipe, *map(str, ('--root', cifar10_root, '--ckpt_dir', folder, '--width', 8, '--batch_size', 32, '--limit_train', 2560, '--limit_test', 500,
                                                       '--num_epochs', 3, '--narrow_epochs', narrow, '--image_sizes', 16, 24, 32, '--precision', 'fp32', '--device', 'cpu', '--no_compile'))]
    said = program(*argv(tmp_path/'whole')).stdout
    assert re.search('^device .* fp32', said, re.M) and re.search(r'^expected +about \d+', said, re.M) # what a processor without bf16 gets
    process = start(argv(tmp_path/'stopped'), 'epoch   0')
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=300) and process.returncode==143
    again = program(*argv(tmp_path/'stopped'), '--resume', 'auto').stdout
    assert re.search(r'going on after \d finished epochs and \d+ steps', again)
    assert outcome(tmp_path/'stopped')==outcome(tmp_path/'whole')


def test_second_signal_stops_at_once(cifar10_root, tmp_path):
    process = start(words(cifar10_root, tmp_path/'run', model_name='resnet110', width=32, batch_size=512, num_workers=2), 'expected')
    time.sleep(2)
    process.send_signal(signal.SIGTERM) # within a step of several seconds
    while not (line := process.stderr.readline()).startswith('stopping'): assert line
    process.send_signal(signal.SIGTERM) # within the same step
    _, err = process.communicate(timeout=60)
    assert process.returncode==143 and err.count('\n')==1 and 'by a second signal' in err, (process.returncode, err)
    for _ in range(100): # a background process looks after its parent every five seconds
        if session_is_empty(process.pid): break
        time.sleep(0.1)
    assert session_is_empty(process.pid)


def test_lock_one_run_a_folder(cifar10_root, tmp_path):
    argv = words(cifar10_root, tmp_path/'run', num_workers=2, num_epochs=50)
    first = start(argv, 'epoch   0')
    try:
        second = program(*argv, '--resume', 'auto', code=2)
        assert f'process {first.pid} is training there' in second.stderr and second.stderr.count('\n')==1
        assert first.poll() is None
    finally: first.kill()
    first.communicate()
    third = start([*argv, '--resume', 'auto'], 'epoch') # at once, although the killed run's background processes may still live
    third.send_signal(signal.SIGINT)
    third.communicate()
    assert third.returncode==130


# ---------------------------------------------------------------- no room, no memory, no number

def limited(size):
    "For `preexec_fn`: no file may become larger."
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_while_saving(cifar10_root, tmp_path):
    "The first file fits, the later ones, with the optimizer's memory, do not: the first one stays as it was, and the run can go on when there is room."
    settings = dict(optimizer='AdamW', num_epochs=2, ema_decay=0)
    program(*words(cifar10_root, tmp_path/'whole', **settings))
    size = (tmp_path/'whole'/'last.ckpt').stat().st_size
    done = program(*words(cifar10_root, tmp_path/'full', **settings), code=1, preexec_fn=limited(size//2))
    assert done.stderr.count('\n')==1 and re.search(r'could not be saved \(File too large\): \d+\.\d MB are needed, \d+\.\d MB are free; the files that were there are as before', done.stderr), done.stderr
    assert load_checkpoint(tmp_path/'full'/'last.ckpt')['epoch']==0
    assert not list((tmp_path/'full').glob('.*tmp*'))
    program(*words(cifar10_root, tmp_path/'full', **settings), '--resume', 'auto')
    assert outcome(tmp_path/'full')==outcome(tmp_path/'whole')
    done = program(*words(cifar10_root, tmp_path/'none', **settings), code=1, preexec_fn=limited(10_000)) # not even the first file
    assert done.stderr.count('\n')==1 and 'MB are needed' in done.stderr and 'epoch   0' not in done.stdout


def test_full_small_disk(cifar10_root, tmp_path):
    "A disk of two megabytes, where this machine lets us mount one: the lack of room is told before the first epoch."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', disk], capture_output=True).returncode: return # the test above limits the size of files instead
    try:
        done = program(*words(cifar10_root, disk/'run', width=16), code=1)
        assert done.stderr.count('\n')==1 and 'MB' in done.stderr and 'epoch   0' not in done.stdout, done.stderr
    finally: subprocess.run(['umount', disk], check=True)


def test_folder_that_cannot_be_made(cifar10_root):
    done = program(*words(cifar10_root, '/proc/run'), code=2)
    assert done.stderr.startswith('error: --ckpt_dir /proc/run: ') and done.stderr.count('\n')==1


def test_not_finite_stops_before_the_step(cifar10_root, tmp_path):
    done = program(*words(cifar10_root, tmp_path/'run', lr=1e30, optimizer='SGD', lr_scheduler='none'), code=1)
    assert done.stderr.count('\n')==1 and re.search(r'not finite in epoch 0, step \d+, at learning rate 1e\+30: try a lower --lr', done.stderr), done.stderr
    content = load_checkpoint(tmp_path/'run'/'last.ckpt') # from before the first step; loading refuses what is not finite
    assert content['epoch']==0 and content['progress'] is None


def small(folder, **settings):
    return TrainConfig(**dict(ckpt_dir=str(folder), width=4, batch_size=50, num_epochs=2, valid_size=100, limit_train=200, limit_test=50, num_workers=0, precision='fp32') | settings)


def test_out_of_memory(tmp_path, monkeypatch, capsys):
    class Greedy(Callback):
        def after_step(self, state): torch.empty(1 << 60, dtype=torch.uint8) # a real refusal of the allocator
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())
    with pytest.raises(MemoryError, match='out of memory with --batch_size 50: try --batch_size 25'): trainer.run(small(tmp_path/'run'), callbacks=[Greedy()])


@pytest.mark.parametrize('narrow, epoch, step', [(2, 0, 2), (2, 1, 2), (2, 1, 4), (2, 2, 2), (2.5, 2, 1), (2.5, 2, 2), (2.5, 2, 3), (2.999, 2, 3), (0.01, 0, 2)])
@pytest.mark.parametrize('settings', [dict(), dict(ema_decay=0.9, whiten=True, optimizer='Muon', alternating_flips=True, lr_scheduler='CosineAnnealingLR')], ids=['plain', 'all'])
def test_a_run_that_begins_narrow_goes_on(tmp_path, monkeypatch, narrow, epoch, step, settings):
    "Stopped before, just at and after the moment at which it becomes wide, which is between two epochs or within one; each has four steps, and the last of all is always wide."
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())
    settings = dict(model_name='resnet8', width=8, narrow_epochs=narrow, num_epochs=3, image_sizes=(16, 24, 32), transform=True) | settings
    whole = trainer.run(small(tmp_path/'whole', **settings))
    class Stop(Callback):
        def after_step(self, state):
            if (state.epoch, len(state.progress.losses))==(epoch, step): signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Stopped): trainer.run(small(tmp_path/'run', **settings), callbacks=[Stop()])
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    assert content['epoch']==epoch and (len(content['progress']['counts']) if content['progress'] else 0)==step
    assert content['architecture']['width']==(8 if epoch*4 + step >= min(round(narrow*4), 11) and step < 4 else 4)
    resumed = trainer.run(small(tmp_path/'run', **settings), resume='auto')
    assert resumed.state_digest==whole.state_digest and resumed.test_loss==whole.test_loss
    assert load_checkpoint(tmp_path/'run'/'last.ckpt')['architecture']['width']==8
    assert [{k: v for k, v in row.items() if k!='seconds'} for row in load_checkpoint(tmp_path/'run'/'last.ckpt')['history']]==[
        {k: v for k, v in row.items() if k!='seconds'} for row in load_checkpoint(tmp_path/'whole'/'last.ckpt')['history']]


def test_room_for_the_wide_network(tmp_path, monkeypatch):
    "Room for two wide checkpoints is refused, although it is more than a narrow network would ever need."
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())
    settings = dict(model_name='resnet8', width=32, narrow_epochs=1, optimizer='Muon')
    trainer.run(small(tmp_path/'whole', **settings))
    size = (tmp_path/'whole'/'last.ckpt').stat().st_size
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=2*size))
    with pytest.raises(OSError, match='the run needs up to'): trainer.run(small(tmp_path/'run', **settings))
    assert not (tmp_path/'run').exists()


def test_damaged_last_falls_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())
    whole = trainer.run(small(tmp_path/'whole', num_epochs=3))

    class Stop(Callback):
        def after_step(self, state):
            if state.epoch==2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): trainer.run(small(tmp_path/'run', num_epochs=3), callbacks=[Stop()])
    raw = bytearray((tmp_path/'run'/'last.ckpt').read_bytes())
    raw[len(raw)//2] ^= 1
    (tmp_path/'run'/'last.ckpt').write_bytes(raw)
    capsys.readouterr()
    resumed = trainer.run(small(tmp_path/'run', num_epochs=3), resume='auto')
    said = capsys.readouterr().out
    assert 'last.ckpt is damaged: its SHA-256' in said and 'going on with' in said and 'after 1 finished epochs' in said
    assert resumed.state_digest==whole.state_digest and (tmp_path/'run'/'last.ckpt.damaged').exists()


@pytest.fixture
def sample_run(monkeypatch):
    "`trainer.run` on the package's sample; `after` steps it is interrupted, as by a kill that nothing can be saved before."
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())

    class Interrupt(Callback):
        def __init__(self, after): self.left = after
        def after_step(self, state):
            self.left -= 1
            if not self.left: raise KeyboardInterrupt

    def run(folder, *, after=None, resume=None, overwrite=False, **settings):
        if after is None: return trainer.run(small(folder, **settings), resume=resume, overwrite=overwrite)
        with pytest.raises(KeyboardInterrupt): trainer.run(small(folder, **settings), resume=resume, overwrite=overwrite, callbacks=[Interrupt(after)])
    return run


def test_killed_right_after_resume_from_elsewhere(sample_run, tmp_path, capsys):
    whole = sample_run(tmp_path/'whole', num_epochs=4, lr_scheduler='none')
    sample_run(tmp_path/'first', num_epochs=2, lr_scheduler='none')
    sample_run(tmp_path/'second', num_epochs=4, lr_scheduler='none', resume=str(tmp_path/'first'), after=1)
    resumed = sample_run(tmp_path/'second', num_epochs=4, lr_scheduler='none', resume='auto')
    assert 'going on after 2 finished epochs' in capsys.readouterr().out and resumed.state_digest==whole.state_digest


def test_killed_right_after_resume_over_another_run(sample_run, tmp_path, capsys):
    "The folder holds a run of its own, which --overwrite gives up: what goes on later is the run that was resumed, not that one."
    whole = sample_run(tmp_path/'whole', num_epochs=3, lr_scheduler='none')
    sample_run(tmp_path/'first', num_epochs=2, lr_scheduler='none')
    sample_run(tmp_path/'second', num_epochs=2, lr_scheduler='none', random_seed=1)
    sample_run(tmp_path/'second', num_epochs=3, lr_scheduler='none', resume=str(tmp_path/'first'), overwrite=True, after=1)
    assert sample_run(tmp_path/'second', num_epochs=3, lr_scheduler='none', resume='auto').state_digest==whole.state_digest


@pytest.mark.parametrize('where', ['validation', 'test'])
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_while_evaluating(sample_run, tmp_path, monkeypatch, where, number):
    "In the middle of the second epoch's validation, or of the test at the end: the epoch's training is not lost."
    whole, evaluate, calls = sample_run(tmp_path/'whole', ema_decay=0.9), training.evaluate, []
    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls)==dict(validation=2, test=3)[where]: os.kill(os.getpid(), number)
        return evaluate(*args, **kwargs)
    monkeypatch.setattr(training, 'evaluate', signalled)
    monkeypatch.setattr(trainer, 'evaluate', signalled)
    with pytest.raises(Stopped) as stopped: sample_run(tmp_path/'run', ema_decay=0.9)
    assert stopped.value.code==128 + number
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    assert (content['epoch'], len(content['progress']['counts']) if content['progress'] else None)==dict(validation=(1, 4), test=(2, None))[where]
    assert sample_run(tmp_path/'run', ema_decay=0.9, resume='auto').state_digest==whole.state_digest
    assert outcome(tmp_path/'run')==outcome(tmp_path/'whole')


def test_flipped_bit_is_noticed_by_every_reader(sample_run, tmp_path):
    "Weights alone are read from a checkpoint too; a wrong bit among them is no weight."
    sample_run(tmp_path/'run', num_epochs=1)
    raw = bytearray((tmp_path/'run'/'best.ckpt').read_bytes())
    raw[len(raw)//2] ^= 1
    (tmp_path/'flipped.ckpt').write_bytes(raw)
    for read in (load_checkpoint, load_model, lambda path: create_model('resnet18', width=4, weights=path)):
        with pytest.raises(ValueError, match='flipped.ckpt is damaged: its SHA-256'): read(tmp_path/'flipped.ckpt')
    (tmp_path/'run'/'last.ckpt').write_bytes(b'')
    assert load_model(tmp_path/'run'/'last.ckpt').fc.out_features==10 # the one before it


def test_validation_images_may_not_change(sample_run, tmp_path):
    sample_run(tmp_path/'run')
    for size in (0, 200):
        with pytest.raises(ValueError, match=f'--valid_size {size}: the run in .* has 100'): sample_run(tmp_path/'run', num_epochs=3, valid_size=size, resume='auto')


def test_fewer_epochs_than_there_are(sample_run, tmp_path, capsys):
    sample_run(tmp_path/'run', num_epochs=3, after=7) # four steps an epoch: within the second
    flags = 'train --width 4 --batch_size 50 --valid_size 100 --limit_train 200 --limit_test 50 --num_workers 0 --precision fp32 --resume auto --ckpt_dir'.split()
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    content['epoch'] = 2 # as if two were finished
    save_checkpoint(tmp_path/'run'/'last.ckpt', content)
    before = {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    assert main([*flags, str(tmp_path/'run'), '--num_epochs', '1'])==0
    said = capsys.readouterr()
    assert 'has 2 finished epochs, --num_epochs 1 asks for no more' in said.out and said.err==''
    assert {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}==before


def test_as_many_epochs_as_there_are_within_the_next(sample_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('resnet_cifar.checkpoint.SAVE_SECONDS', 0)
    sample_run(tmp_path/'run', num_epochs=3, after=7, lr_scheduler='OneCycleLR') # the sixth step's save is there: within the second epoch
    assert load_checkpoint(tmp_path/'run'/'last.ckpt')['progress'] is not None
    assert sample_run(tmp_path/'run', num_epochs=1, lr_scheduler='OneCycleLR', resume='auto') is None
    assert 'has 1 finished epochs, --num_epochs 1 asks for no more' in capsys.readouterr().out


def test_overwrite_keeps_the_old_run_until_the_new_one_can_begin(sample_run, tmp_path, monkeypatch):
    sample_run(tmp_path/'run')
    before = {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}
    def no_memory(*args): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(trainer, 'describe', no_memory)
    with pytest.raises(MemoryError, match='try --batch_size 25'): sample_run(tmp_path/'run', overwrite=True, random_seed=1)
    assert {p.name: p.read_bytes() for p in (tmp_path/'run').iterdir()}==before


def test_best_file_ahead_of_its_run(sample_run, tmp_path, capsys):
    "Killed between best.ckpt and last.ckpt: the same settings make that epoch again, others are refused before anything is computed."
    whole = sample_run(tmp_path/'whole', num_epochs=3)
    best = whole.tested_epoch
    assert best > 0 # else this test would test nothing
    sample_run(tmp_path/'run', num_epochs=3, after=4*best + 1)
    (tmp_path/'run'/'best.ckpt').write_bytes((tmp_path/'whole'/'best.ckpt').read_bytes())
    with pytest.raises(ValueError, match=f'best.ckpt is of epoch {best}, the best so far is'): sample_run(tmp_path/'run', num_epochs=3, lr=0.5, resume='auto')
    assert sample_run(tmp_path/'run', num_epochs=3, resume='auto').state_digest==whole.state_digest


def test_lock_between_threads(sample_run, tmp_path):
    inside, go_on, found = threading.Event(), threading.Event(), []

    class Wait(Callback):
        def after_step(self, state): inside.set(), go_on.wait(60)
    thread = threading.Thread(target=lambda: found.append(trainer.run(small(tmp_path/'run', num_epochs=1), callbacks=[Wait()])))
    thread.start()
    assert inside.wait(60)
    try:
        for _ in range(2): # the refused one does not take the lock away
            with pytest.raises(FileExistsError, match=f'process {os.getpid()} is training there'): sample_run(tmp_path/'run', num_epochs=1, resume='auto')
        assert (tmp_path/'run'/'.lock').exists()
    finally: go_on.set()
    thread.join()
    assert found and not (tmp_path/'run'/'.lock').exists()


def test_record_refuses_what_no_command_gives(sample_run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, '_git', lambda *words: str(ROOT) if words[0]=='rev-parse' else '')
    sample_run(tmp_path/'run', num_epochs=3, after=6)
    config = small(tmp_path/'run', num_epochs=3)
    assert trainer.clean_checkout(config, overwrite=False)['sources']==trainer._sources()
    with pytest.raises(ValueError, match='were changed on the way'): trainer.clean_checkout(dataclasses.replace(config, lr=0.5), overwrite=False)
    sample_run(tmp_path/'run', num_epochs=3, lr=0.5, resume='auto')
    with pytest.raises(ValueError, match='were changed on the way'): trainer.clean_checkout(dataclasses.replace(config, lr=0.5), overwrite=False)
    sample_run(tmp_path/'other', num_epochs=4, lr=0.5, resume=str(tmp_path/'run'))
    with pytest.raises(ValueError, match='were changed on the way'): trainer.clean_checkout(dataclasses.replace(config, ckpt_dir=str(tmp_path/'other'), num_epochs=4, lr=0.5), overwrite=False)


# ---------------------------------------------------------------- files

class Bomb:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (self.mark, 'w')


def bad_files(folder):
    "name -> what writes it. Every one of them is given to each command that reads a checkpoint."
    good, mark = dict(format=2, model=create_model('resnet20', width=2).state_dict()), str(folder/'exploded')
    def torch_save(content, **kwargs):
        buffer = io.BytesIO()
        torch.save(content, buffer, **kwargs)
        return buffer.getvalue()
    sealed, weights = _sealed(good).getvalue(), torch_save(good['model'])
    save_file(good['model'], folder/'good.safetensors')
    safe = (folder/'good.safetensors').read_bytes()
    (folder/'good.safetensors').unlink()
    huge = json.dumps(dict(architecture=dict(block='BasicBlock', layers=[10**9]*3, num_classes=10, width=16, shortcut='A', stem='cifar'), classes=list('abcdefghij'), mean=[0, 0, 0], std=[1, 1, 1], image_size=32))
    noted = len(h := json.dumps({'__metadata__': {'resnet_cifar': huge}, 'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()).to_bytes(8, 'little') + h + bytes(4)
    flipped = bytearray(sealed)
    flipped[len(flipped)//3] ^= 16
    return {
        'empty.ckpt': b'', 'text.ckpt': b'these are no weights', 'photo.ckpt': b'\xff\xd8\xff\xe0\x00\x10JFIF' + bytes(999), 'zip.ckpt': b'PK\x05\x06' + bytes(18),
        'half.ckpt': sealed[:len(sealed)//2], 'almost.ckpt': sealed[:-1], 'more.ckpt': sealed + b'x', 'flipped.ckpt': bytes(flipped), 'head.ckpt': sealed[:100], 'unsealed.ckpt': torch_save(good),
        'future.ckpt': _sealed(good | dict(format=99)).getvalue(), 'nan.ckpt': _sealed(dict(format=2, model=dict(w=torch.tensor(float('nan'))))).getvalue(),
        'list.ckpt': _sealed([good]).getvalue(), 'no_facts.ckpt': sealed, 'halfweights.pth': weights[:-100],
        'bomb_top.ckpt': torch_save(Bomb(mark)), 'bomb_nested.ckpt': torch_save(dict(good, x=[dict(y=Bomb(mark))])), 'bomb_old.ckpt': torch_save(Bomb(mark), _use_new_zipfile_serialization=False),
        'bomb_sealed.ckpt': _sealed(dict(good, x=Bomb(mark))).getvalue(), 'bomb_pickle.ckpt': pickle.dumps(Bomb(mark)),
        'empty.safetensors': b'', 'photo.safetensors': b'\xff\xd8\xff\xe0\x00\x10JFIF' + bytes(999), 'half.safetensors': safe[:len(safe)//2], 'header.safetensors': b'\xff'*8 + b'{' + bytes(99),
        'brace.safetensors': (50).to_bytes(8, 'little') + b'{' + bytes(49), 'hostile.safetensors': noted, 'text.safetensors': b'these are no weights'}


@pytest.mark.parametrize('reader', ['evaluate --ckpt', 'export --ckpt', 'train --ckpt_dir new --resume'])
def test_bad_files_and_bombs(tmp_path, monkeypatch, capsys, reader):
    files = bad_files(tmp_path)
    assert len(files) >= 20
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())
    for name, raw in files.items():
        (tmp_path/name).write_bytes(raw)
        code = main([*reader.split(), name])
        err = capsys.readouterr().err
        assert (code, err.count('\n'), err.startswith('error: '))==(2, 1, True) and name in err and len(err) < 600, f'{name}: {code}\n{err}'
    assert sorted(p.name for p in tmp_path.iterdir())==sorted(files) # nothing exploded, nothing was written


def test_resume_from_best_and_from_a_folder_without_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, 'load_cifar10', lambda root, skip: sample_cifar10())
    trainer.run(small('run'))
    save_pretrained(create_model('resnet20', width=2), 'pretrained')
    flags = 'train --width 4 --batch_size 50 --num_epochs 3 --valid_size 100 --limit_train 200 --limit_test 50 --num_workers 0 --precision fp32 --ckpt_dir new'.split()
    for path, said in (('run/best.ckpt', 'holds no optimizer'), ('pretrained', 'pretrained/last.ckpt: no such file'), ('nowhere', 'nowhere: no such file')):
        assert main([*flags, '--resume', path])==2
        assert said in capsys.readouterr().err
        assert not Path('new').exists()
    assert main([*flags, '--resume', 'run', '--overwrite'])==0
    assert 'going on after 2 finished epochs' in capsys.readouterr().out
    assert main([*flags[:-1], 'run', '--resume', 'run', '--overwrite'])==2
    assert '--overwrite would remove what it goes on from' in capsys.readouterr().err


def bad_data():
    "name -> bytes of a cifar10.npz that is not CIFAR-10."
    shapes = dict(train_images=(50000, 32, 32, 3), train_labels=(50000,), test_images=(10000, 32, 32, 3), test_labels=(10000,))
    black = {name: np.zeros(shape, np.uint8) for name, shape in shapes.items()}
    def npz(arrays):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()
    whole = npz(black)
    return {'black': whole, 'empty': b'', 'text': b'no pictures', 'half': whole[:len(whole)//2], 'missing': npz({k: v for k, v in black.items() if k!='test_labels'}),
            'shape': npz(black | dict(train_images=np.zeros((50000, 3072), np.uint8))), 'type': npz(black | dict(test_labels=np.zeros(10000, np.int64))),
            'label': npz(black | dict(train_labels=np.full(50000, 10, np.uint8))), 'swapped': npz(black | dict(train_labels=black['test_labels'], test_labels=black['train_labels'])),
            'object': npz(dict(train_images=np.array([{}], dtype=object)))}


def test_bad_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, raw in bad_data().items():
        (tmp_path/name).mkdir()
        (tmp_path/name/'cifar10.npz').write_bytes(raw)
        code = main(['train', '--root', name, '--ckpt_dir', 'new'])
        err = capsys.readouterr().err
        assert (code, err.count('\n'))==(2, 1) and f'{name}/cifar10.npz' in err and not Path('new').exists(), err


def hostile_archives():
    "name -> the member that stands where the first batch should be."
    member = lambda **fields: (lambda info: [setattr(info, k, v) for k, v in fields.items()] and info)(tarfile.TarInfo('cifar-10-batches-py/data_batch_1'))
    return dict(link=member(type=tarfile.SYMTYPE, linkname='/etc/passwd'), hardlink=member(type=tarfile.LNKTYPE, linkname='../../../etc/passwd'), device=member(type=tarfile.CHRTYPE, devmajor=1, devminor=5),
                fifo=member(type=tarfile.FIFOTYPE), folder=member(type=tarfile.DIRTYPE), bomb=member(size=10**12))


def test_hostile_archives(tmp_path, monkeypatch, capsys):
    "Links, devices and giants are refused, members that point outside are never looked at, and nothing is written."
    monkeypatch.chdir(tmp_path)
    for name, info in hostile_archives().items():
        outside, last = tarfile.TarInfo('../../outside'), tarfile.TarInfo('cifar-10-batches-py/test_batch')
        with tarfile.open(f'{name}.tar', 'w') as tar:
            for each in (outside, last, info): tar.fileobj.write(each.tobuf()) # headers alone
        code = main(['download', '--root', 'new', '--archive', f'{name}.tar', '--skip_checksum'])
        err = capsys.readouterr().err
        assert (code, err.count('\n'))==(2, 1) and f'{name}.tar' in err, err
    assert sorted(p.name for p in tmp_path.iterdir())==sorted(f'{name}.tar' for name in hostile_archives())


# ---------------------------------------------------------------- downloads

class Slow(http.server.BaseHTTPRequestHandler):
    "Serves `content`, in pieces with pauses; what was asked for is noted."
    content, asked, pause = b'', [], 0.0
    def do_GET(self):
        start = int(re.findall(r'\d+', self.headers.get('Range', '0'))[0])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(self.content) - 1}/{len(self.content)}')
        self.send_header('Content-Length', str(len(self.content) - start))
        self.end_headers()
        try:
            for i in range(start, len(self.content), 1 << 20):
                self.wfile.write(self.content[i:i + (1 << 20)])
                time.sleep(self.pause)
        except OSError: pass # the other side was killed
    def log_message(self, *args): pass


@pytest.fixture(scope='module')
def archive(cifar10_root, tmp_path_factory):
    "The real pictures in the official form, packed here and therefore with a checksum of its own."
    path = tmp_path_factory.mktemp('archive')/'cifar.tar'
    pack_batches(read_cifar10(cifar10_root), path, 'w')
    return path.read_bytes()


@pytest.fixture
def server(archive):
    Slow.content, Slow.asked, Slow.pause = archive, [], 0.02
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/cifar.tar'
    server.shutdown()
    server.server_close()


def download(url, archive, root, **kwargs):
    "The command, told that our archive is the official one."
    code = f'''
import sys
from resnet_cifar import fetch
fetch._ARCHIVES['https'] = ({len(archive)}, 'md5', '{hashlib.md5(archive).hexdigest()}')
fetch._fetch_url.__defaults__ = (False, 2)
sys.exit(fetch.main(['--source', {url!r}, '--root', {str(root)!r}]))'''
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def part_of(root): return root/'cifar-10-python.tar.gz.part'


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_download_goes_on(server, archive, tmp_path, number):
    process = download(server, archive, tmp_path)
    wait_for(lambda: part_of(tmp_path).exists() and part_of(tmp_path).stat().st_size > 20_000_000)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode==(-9 if number==signal.SIGKILL else 128 + number) and 'Traceback' not in err, err
    have = part_of(tmp_path).stat().st_size
    assert 20_000_000 < have < len(archive)
    Slow.pause = 0
    process = download(server, archive, tmp_path)
    out, err = process.communicate()
    assert process.returncode==0 and f'going on after {have/1e6:.0f} MB' in out, err
    assert Slow.asked==[0, have]
    verify_cifar10(tmp_path)
    assert [p.name for p in tmp_path.iterdir()]==['cifar10.npz']


def test_two_downloads_wait_for_each_other(server, archive, tmp_path):
    first = download(server, archive, tmp_path)
    wait_for(lambda: part_of(tmp_path).exists())
    second = download(server, archive, tmp_path)
    (_, err1), (out2, err2) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode)==(0, 0), err1 + err2
    assert f'process {first.pid} is fetching into' in out2 and Slow.asked==[0] # the second one found what the first had brought
    assert [p.name for p in tmp_path.iterdir()]==['cifar10.npz']


def test_killed_download_leaves_no_lock(server, archive, tmp_path):
    first = download(server, archive, tmp_path)
    wait_for(lambda: part_of(tmp_path).exists())
    second = download(server, archive, tmp_path)
    wait_for(lambda: 'is fetching' in second.stdout.readline())
    first.kill()
    first.communicate()
    Slow.pause = 0
    _, err = second.communicate()
    assert second.returncode==0, err
    verify_cifar10(tmp_path)


def test_full_disk_while_downloading(server, archive, tmp_path):
    Slow.pause = 0
    done = download(server, archive, tmp_path, preexec_fn=limited(30_000_000))
    _, err = done.communicate()
    assert done.returncode==1 and err.count('\n')==1 and 'File too large' in err, err
    assert part_of(tmp_path).stat().st_size==30_000_000 and not (tmp_path/'cifar10.npz').exists()
    done = download(server, archive, tmp_path)
    _, err = done.communicate()
    assert done.returncode==0 and Slow.asked==[0, 30_000_000], err


def test_stalling_server(server, archive, tmp_path):
    Slow.pause = 1000
    done = download(server, archive, tmp_path)
    _, err = done.communicate(timeout=60)
    assert done.returncode==1 and err.count('\n')==1 and 'timed out' in err, err


def test_read_only_folder_with_good_data(cifar10_root, tmp_path):
    (tmp_path/'cifar10.npz').symlink_to(cifar10_root/'cifar10.npz')
    tmp_path.chmod(0o555)
    before = sorted(p.name for p in tmp_path.iterdir())
    try: assert subprocess.run([sys.executable, '-m', 'resnet_cifar', 'download', '--root', tmp_path], capture_output=True).returncode==0
    finally: tmp_path.chmod(0o755)
    assert sorted(p.name for p in tmp_path.iterdir())==before
