"Nothing is lost: whole programs, killed and stopped at any instant, and disks without room."
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from faulty import outcome, small, use_sample, words
from resnet_cifar import preparation, trainer
from resnet_cifar.checkpoint import load_checkpoint

FAULTY = [sys.executable, str(Path(__file__).with_name('faulty.py'))]
ENV = os.environ | dict(OMP_NUM_THREADS='1')


@pytest.fixture(scope='module', autouse=True)
def sample():
    "Runs of this process, too, train on the sample, with one thread."
    threads, load = torch.get_num_threads(), preparation.load_cifar10
    torch.set_num_threads(1)
    use_sample()
    yield
    torch.set_num_threads(threads)
    preparation.load_cifar10 = load


def start(argv, until, **options):
    "A program, after it has printed a line that begins so."
    process = subprocess.Popen([*FAULTY, 'train', *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True, **options)
    for line in process.stdout:
        if line.startswith(until): return process
    raise AssertionError(process.stderr.read())


def session_is_empty(session):
    "Whether every process that the program started is gone."
    listed = subprocess.run(['ps', '-o', 'stat=', '--sid', str(session)], capture_output=True, text=True).stdout.split()
    return all(state.startswith('Z') for state in listed)


@pytest.mark.parametrize('rounds', [4, pytest.param(100, marks=pytest.mark.long)])
def test_kill_9_at_any_instant(rounds):
    "Every round continues; at the end the bits are those of the run that was never killed. Of many kills at least 3 in 10 hit a checkpoint that is being written."
    done = subprocess.run([*FAULTY, 'kill', str(rounds), '0'], capture_output=True, text=True, env=ENV)
    assert done.returncode==0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts['kills']==rounds and counts['runs']==counts['equal'] >= 1 and (rounds < 100 or counts['while_saving'] >= 0.3*rounds), counts


@pytest.mark.parametrize('number, step, settings', [
    (signal.SIGTERM, 7, dict(num_workers=2)), # four steps an epoch, each validation counts as two
    pytest.param(signal.SIGINT, 6, dict(num_workers=2, ema_decay=0.9, optimizer='SGD', lr_scheduler='OneCycleLR'), marks=pytest.mark.long), # between two epochs
], ids=['within', 'between'])
def test_signal_to_the_whole_group(tmp_path, number, step, settings):
    "As a terminal or a batch system sends it: workers get it too. All of them end, and the run continues."
    argv = [*FAULTY, 'train', *words(tmp_path/'run', **settings)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENV | dict(FAULTY_SIGNAL=f'0 {step} {int(number)}'))
    _, err = process.communicate(timeout=300)
    assert_stopped(process, err, number, tmp_path, settings)


@pytest.mark.long
def test_signal_while_compiling(tmp_path):
    process = start(words(tmp_path/'run', compile=True), 'compiling')
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert_stopped(process, err, signal.SIGTERM, tmp_path, dict(compile=True))


def assert_stopped(process, err, number, folder, settings):
    "Ended in order, and with the bits of a run that was not interrupted when it is resumed."
    assert process.returncode==128 + number, (process.returncode, err)
    assert 'Traceback' not in err and re.search(r'^stopped; \S+ holds \d finished epochs', err, re.M), err
    assert session_is_empty(process.pid) and load_checkpoint(folder/'run'/'last.ckpt')['epoch'] < 2
    trainer.run(small(folder/'whole', **settings))
    trainer.run(small(folder/'run', **settings), resume='auto')
    assert outcome(folder/'run')==outcome(folder/'whole')
    assert sorted(path.name for path in (folder/'run').iterdir())==sorted(path.name for path in (folder/'whole').iterdir())


def test_killed_with_workers_and_resumed_at_once(tmp_path):
    "The killed run's background processes may still live; the folder is free all the same, as it was not while the run lived."
    settings = dict(num_workers=2, num_epochs=500)
    first = start(words(tmp_path/'run', **settings), 'epoch   0')
    with pytest.raises(FileExistsError, match='another process is training there'): trainer.run(small(tmp_path/'run', **settings), resume='auto')
    assert first.poll() is None
    first.kill()
    first.communicate()
    class Stop:
        def after_step(self, state): signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped: trainer.run(small(tmp_path/'run', **settings), resume='auto', callbacks=[Stop()])
    assert stopped.value.code==130
    for _ in range(100): # a background process looks after its parent every five seconds
        if session_is_empty(first.pid): break
        time.sleep(0.1)
    assert session_is_empty(first.pid)


# ---------------------------------------------------------------- no room

def limited(size):
    "For `preexec_fn`: no file may become larger."
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk_while_saving(tmp_path):
    "The first file fits, the later ones, with the optimizer's memory, do not: the first one stays as it was, and the run can continue when there is room."
    trainer.run(small(tmp_path/'whole'))
    size = (tmp_path/'whole'/'last.ckpt').stat().st_size
    done = subprocess.run([*FAULTY, 'train', *words(tmp_path/'run')], capture_output=True, text=True, env=ENV, preexec_fn=limited(size//2))
    assert done.returncode==1 and re.fullmatch(r'error: \S+ \(0\.\d MB\) could not be saved: File too large; the files that were there are as before\n', done.stderr), done.stderr
    assert load_checkpoint(tmp_path/'run'/'last.ckpt')['epoch']==0 and not list((tmp_path/'run').glob('.*tmp*'))
    trainer.run(small(tmp_path/'run'), resume='auto')
    assert outcome(tmp_path/'run')==outcome(tmp_path/'whole')


def test_full_small_disk(tmp_path):
    "A disk of half a megabyte, where this machine lets us mount one: not even the first file fits."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=500k', 'tmpfs', disk], capture_output=True).returncode: return # the test above limits the size of files instead
    try:
        with pytest.raises(OSError, match=r'\(7\.\d MB\) could not be saved: No space left on device'): trainer.run(small(disk/'run', width=64))
    finally: subprocess.run(['umount', disk], check=True)
