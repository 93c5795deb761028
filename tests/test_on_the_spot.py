"Faults that were mended on the spot, each with the test that would have told."
import os
import pty
import subprocess
import sys

import pytest
import torch
from torch import nn

from resnet_cifar.data import BatchLoader
from resnet_cifar.training import evaluate
from sample_data import write_sample_data

PROGRAM = [sys.executable, '-m', 'resnet_cifar']


def in_a_terminal(*words):
    "(exit code, what the user reads) of the command in a terminal of its own."
    here, there = pty.openpty()
    environment = os.environ | dict(TERM='xterm-256color')
    process = subprocess.Popen([*PROGRAM, *words], stdin=there, stdout=there, stderr=there, env=environment)
    os.close(there)
    said = b''
    try:
        while piece := os.read(here, 4096): said += piece
    except OSError: pass # nobody has the other side any more
    os.close(here)
    return process.wait(), said.decode().replace('\r\n', '\n')


@pytest.mark.parametrize('words, named', [
    (('train', '--batchsize', '3'), '--batchsize'),
    (('train', '--batch_size', 'many'), '--batch_size'),
    (('train', '--precision', 'fp16'), '--precision'),
    (('train', '--lr'), '--lr'),
    (('export',), '--ckpt'),
    (('info', '--run'), '--run'),
], ids=lambda v: ' '.join(v) if isinstance(v, tuple) else None)
def test_a_usage_error_reads_the_same_in_a_terminal_and_in_a_pipe(words, named):
    "One line that names the flag: colours are for eyes, not for what reads the message."
    piped = subprocess.run([*PROGRAM, *words], capture_output=True, text=True)
    assert (piped.returncode, piped.stdout, piped.stderr.count('\n'))==(2, '', 1), piped
    assert piped.stderr.startswith('error: ') and named in piped.stderr
    assert in_a_terminal(*words)==(2, piped.stderr)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A folder with the sample that comes with the package, in CIFAR-10's shapes."
    folder = tmp_path_factory.mktemp('data')
    write_sample_data(folder)
    return folder


def files(folder): return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


def put(folder, *names):
    "Files of somebody else's."
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_text('mine')
    return set(names)


def dead_process():
    "The number of a process that has ended."
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


def test_a_download_removes_nothing_of_the_users(tmp_path):
    "Only what the process wrote that was killed while it had the lock, by its number."
    mine = put(tmp_path, 'download-photos/1.jpg', 'download-list.txt', '.download-1/a', 'cifar10.npz.old.tmp', 'cifar10.npz.1.tmp', 'notes.tmp')
    killed = dead_process()
    put(tmp_path, f'cifar10.npz.{killed}.tmp', f'.download-{killed}/archive')
    (tmp_path/'.download.lock').write_text(str(killed))
    done = subprocess.run([*PROGRAM, 'download', '--root', tmp_path, '--source', 'https://127.0.0.1:9/cifar.tar.gz'], capture_output=True, text=True)
    assert done.returncode==1 and 'could not be fetched' in done.stderr, done
    assert files(tmp_path)==mine
    assert {path.name for path in tmp_path.iterdir()}=={name.split('/')[0] for name in mine} # nor is an empty folder left


def train(data, folder, *words):
    settings = dict(root=data, ckpt_dir=folder, model_name='resnet20', width=2, batch_size=50, num_epochs=1, valid_size=100, limit_train=100, limit_test=50,
                    num_workers=0, device='cpu', precision='fp32')
    flags = [word for name, value in settings.items() for word in (f'--{name}', str(value))]
    done = subprocess.run([*PROGRAM, 'train', '--skip_checksum', *flags, *words], capture_output=True, text=True)
    assert done.returncode==0, done


def test_a_run_removes_nothing_of_the_users(data, tmp_path):
    "A fresh run, one that goes on, and one that takes another's place; of the last one the curves go with it."
    mine = put(tmp_path, '.notes.tmp', '.last.draft.tmp.ckpt', '.last.1.tmp.ckpt', 'last.ckpt.bak', 'results/best.ckpt')
    curves = put(tmp_path, 'tensorboard/somebody/events')
    killed = dead_process()
    put(tmp_path, f'.last.{killed}.tmp.ckpt', f'.history.{killed}.tmp.csv')
    (tmp_path/'.lock').write_text(str(killed))
    train(data, tmp_path)
    run = {'config.json', 'history.csv', 'curves.png', 'result.json', 'last.ckpt', 'previous.ckpt', 'best.ckpt'}
    assert files(tmp_path)==mine | curves | run
    train(data, tmp_path, '--num_epochs', '2', '--resume', 'auto')
    assert files(tmp_path)==mine | curves | run
    train(data, tmp_path, '--overwrite')
    assert files(tmp_path)==mine | run # with the run that they lay beside


def test_tensorboard_writes_beside_what_is_there(data, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    mine = put(tmp_path, 'tensorboard/somebody/events')
    for epochs in (1, 2):
        train(data, tmp_path, '--tensorboard', '--resume', 'auto', '--num_epochs', str(epochs))
        assert mine <= files(tmp_path)
        events = accumulator.EventAccumulator(str(tmp_path/'tensorboard'))
        events.Reload()
        assert [point.step for point in events.Scalars('loss/train')]==list(range(epochs))


@pytest.mark.parametrize('kind', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_whole_numbers_count_right(kind):
    "A network that is always right: of 20 classes, true class times 20 plus answer does not fit into 8 bits."
    class Right(nn.Module):
        "The class is written in the first pixel."
        def forward(self, images):
            classes = (images*255)[:, 0, 0, 0].round().long()
            return 9.*nn.functional.one_hot(classes, 20)
    labels = torch.arange(200)%20
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    loader = BatchLoader(images, labels.to(kind), 100, mean=(0, 0, 0), std=(1, 1, 1))
    assert {targets.dtype for _, targets in loader}=={torch.int64}
    by_hand = [(images/255, targets.to(kind)) for images, targets in zip(images.split(100), labels.split(100))] # past the loader
    for batches in (loader, by_hand):
        metrics = evaluate(Right(), batches)
        assert metrics.accuracy==1 and metrics.confusion.equal(10*torch.eye(20, dtype=torch.int64))
