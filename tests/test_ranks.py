"Several processes under torchrun: that they compute what one would, and that nothing is lost when one or all of them end."
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_cifar.checkpoint import load_checkpoint

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
ENV = os.environ | dict(OMP_NUM_THREADS='1')


# ---------------------------------------------------------------- the numbers

PROGRAM = """
import copy, json, math, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from resnet_cifar.blocks import BasicBlock
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import BatchLoader, sample_cifar10
from resnet_cifar.models import ResNet
from resnet_cifar.training import Callback, _averaging, fit, new_state, train_step

dist.init_process_group('gloo')
place, found = (dist.get_rank(), dist.get_world_size()), {}
sample = sample_cifar10()
def batches(share=(0, 1)): return BatchLoader(sample.train_images, sample.train_labels, 100, train=True, augment=True, share=share)

# steps, batch norms in evaluation mode: our step on shares against PyTorch's own on the whole batch
for name in ('SGD', 'AdamW'):
    torch.manual_seed(0)
    ours = ResNet(BasicBlock, (1, 1, 1), width=8).double()
    with torch.no_grad():
        for images, _ in batches(): ours(images.double()) # statistics that suit the network
    ours.eval()
    alone = copy.deepcopy(ours)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4) if name=='SGD' else torch.optim.AdamW(net.parameters(), lr=1e-3) for net in (ours, alone)]
    parallel, before, worst = _averaging(ours, next(iter(batches(place)))[0][:2].double()), copy.deepcopy(alone), []
    for (images, targets), (all_images, all_targets) in zip(batches(place), batches()):
        loss, right = train_step(parallel, images.double(), targets, optimizers[0], ranks=place[1])
        logits = alone(all_images.double())
        expected = F.cross_entropy(logits.float(), all_targets)
        optimizers[1].zero_grad(); expected.backward(); optimizers[1].step()
        assert right.item()==(logits.argmax(1)==all_targets).sum().item()
        assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5), (loss, expected)
        worst.append(max((a - b).abs().max().item() for a, b in zip(ours.parameters(), alone.parameters())))
    found[name] = dict(worst=max(worst), steps=len(worst), moved=min((a - b).abs().max().item() for a, b in zip(alone.parameters(), before.parameters())))

# whole runs of a network without batch norm: history and weights, from the start and gone on with in the middle of an epoch by another number of processes
config = TrainConfig(num_epochs=3, lr=0.01, optimizer='SGD', lr_scheduler='OneCycleLR', precision='fp32')
class Stop(Callback):
    def after_step(self, state):
        if (state.epoch, len(state.progress.losses))==(1, 4): raise KeyboardInterrupt
def trained(first, then):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    state = new_state(net, config, 10)
    for ranks, callbacks in ((first, [Stop()]), (then, [])):
        share = place if ranks > 1 else (0, 1)
        valid = BatchLoader(sample.test_images[:301], sample.test_labels[:301], 100, share=share) # of the last batch's single image one process has nothing
        try: fit(net, batches(share), valid, config, callbacks, state, ranks)
        except KeyboardInterrupt: pass
    return net[1].weight.detach(), state.history
reference, rows = trained(1, 1)
for first, then in ((2, 2), (1, 2), (2, 1)):
    weights, history = trained(first, then)
    assert torch.allclose(weights, reference, atol=1e-6), (first, then)
    for row, expected in zip(history, rows, strict=True):
        for key in ('train_accuracy', 'valid_accuracy'): assert row[key]==expected[key], (first, then, key, row, expected)
        for key in ('lr', 'train_loss', 'valid_loss'): assert math.isclose(row[key], expected[key], rel_tol=1e-5), (first, then, key)

# one process meets a number that is none: all stop, at the same step
data = [(torch.ones(4, 3072)*(math.inf if place[0]==1 and step==2 else 1), torch.arange(4)) for step in range(4)]
try: fit(nn.Linear(3072, 10), data, None, config, ranks=2)
except FloatingPointError as e: said = str(e)
everybody = [None]*2
dist.all_gather_object(everybody, said)
assert everybody[0]==everybody[1] and 'in epoch 0, step 2' in said, everybody
if place[0]==0: print(json.dumps(found))
del parallel
import gc; gc.collect()
dist.destroy_process_group()
"""


def test_two_processes_compute_what_one_does(tmp_path):
    (tmp_path/'program.py').write_text(PROGRAM)
    done = subprocess.run([*TORCHRUN, '--standalone', '--nproc_per_node', '2', tmp_path/'program.py'], capture_output=True, text=True, env=ENV)
    assert done.returncode==0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(found)
    for name in ('SGD', 'AdamW'): assert found[name]['steps']==10 and found[name]['worst'] < 1e-9 < found[name]['moved'], found


# ---------------------------------------------------------------- whole programs

def words(root, folder, **settings):
    settings = dict(root=root, ckpt_dir=folder, width=8, batch_size=60, num_epochs=14, limit_train=1280, limit_test=500, valid_size=500, num_workers=1, lr=0.01, ema_decay=0.9) | settings
    return ['--transform', *[str(w) for name, value in settings.items() for w in (f'--{name}', value)]]


@pytest.fixture(autouse=True)
def nobody_stays():
    "A test that fails leaves no process behind."
    yield
    while started:
        process = started.pop()
        for group in [process.pid, *ranks_of(process).values()] if process.poll() is None else []: os.killpg(group, signal.SIGKILL)


started = []
def launch(argv, *flags, ranks=2):
    started.append(subprocess.Popen([*TORCHRUN, *(flags or ['--standalone']), '--nproc_per_node', str(ranks), '-m', 'resnet_cifar.trainer', *argv],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV, start_new_session=True))
    return started[-1]


def ended(process, code):
    "(stdout, what our processes said on stderr): the launcher's own report begins otherwise."
    out, err = process.communicate(timeout=300)
    assert process.returncode==code, (process.returncode, out, err)
    return out, [line for line in err.splitlines() if line.startswith(('error', 'stopp'))], re.findall(r'exitcode +: (-?\d+)', err)


def ranks_of(process):
    "Rank -> number of the process."
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {child: re.search(rb'\0RANK=(\d+)', Path(f'/proc/{child}/environ').read_bytes()) for child in children}
    return {int(found[1]): int(child) for child, found in ranks.items() if found}


def wait_for(process, line):
    for said in process.stdout:
        if said.startswith(line): return
    raise AssertionError(process.stderr.read())


def outcome(folder):
    history = [{k: v for k, v in row.items() if k!='seconds'} for row in csv.DictReader(open(folder/'history.csv'))]
    return history, json.loads((folder/'result.json').read_text())['state_digest']


@pytest.fixture(scope='module')
def whole(cifar10_root, tmp_path_factory):
    "The run of two processes that nothing interrupts."
    folder = tmp_path_factory.mktemp('whole')
    out, said, _ = ended(launch(words(cifar10_root, folder)), 0)
    assert said==[] and out.count('test accuracy')==out.count('expected')==1 and re.search('^device .* 1 thread in each of 2 processes$', out, re.M), (out, said)
    assert json.loads((folder/'config.json').read_text())['processes']==2
    return folder


def kill_all(process):
    for child in ranks_of(process).values(): os.killpg(child, signal.SIGKILL) # with its background process
    process.kill()


def stop_twice(process):
    for child in ranks_of(process).values(): os.kill(child, signal.SIGTERM) # as batch systems do
    process.terminate()


NO_ANSWER = r'^error: rank {} of 2 \(counted from 0\) does not answer any more; --resume auto goes on from the last checkpoint in \S+$'
STOPPED = r'^stopped; \S+ holds \d+ finished epochs( and \d+ steps of the next)?: the same command with --resume auto goes on$'
ENDS = { # name -> what to do to the launcher, its exit code, what our processes say, in one line
    'rank 1 is killed': (lambda p: os.kill(ranks_of(p)[1], signal.SIGKILL), 1, NO_ANSWER.format(1)),
    'rank 0 is killed': (lambda p: os.kill(ranks_of(p)[0], signal.SIGKILL), 1, NO_ANSWER.format(0)),
    'rank 1 is stopped': (lambda p: os.kill(ranks_of(p)[1], signal.SIGTERM), 1, STOPPED),
    'the launcher is stopped': (lambda p: p.send_signal(signal.SIGTERM), 1, STOPPED),
    'all are stopped, twice': (stop_twice, 1, STOPPED),
    'the launcher is killed': (lambda p: p.kill(), -signal.SIGKILL, STOPPED),
    'Ctrl-C': (lambda p: p.send_signal(signal.SIGINT), 1, STOPPED),
    'all are killed': (kill_all, -signal.SIGKILL, None)}


def test_nothing_is_lost(cifar10_root, tmp_path, whole):
    "One run, ended in eight ways one after the other, always gone on with: the bits of the run that was not."
    folder = tmp_path/'cut'
    argv = [*words(cifar10_root, folder), '--resume', 'auto']
    for name, (act, code, expected) in ENDS.items():
        process = launch(argv)
        wait_for(process, 'epoch')
        if name=='rank 1 is killed': # while it runs nobody else may
            os.kill(ranks_of(process)[0], signal.SIGSTOP)
            other = subprocess.run([sys.executable, '-m', 'resnet_cifar', 'train', *argv], capture_output=True, text=True)
            os.kill(ranks_of(process)[0], signal.SIGCONT)
            assert other.returncode==2 and f'process {ranks_of(process)[0]} is training there' in other.stderr, other.stderr
        act(process)
        _, said, codes = ended(process, code)
        if expected is None: assert said==[], name
        else: assert len(said)==1 and re.search(expected, said[0]), (name, said)
        if name=='rank 1 is stopped': assert codes==['143', '143']
        load_checkpoint(folder/'last.ckpt') # whole
        assert not (folder/'result.json').exists(), f'{name}: too late to be a test'
    assert ended(launch(argv), 0)[1]==[]
    assert outcome(folder)==outcome(whole)
    assert 'changed' not in json.loads((folder/'config.json').read_text())


def test_four_processes_are_started_again(cifar10_root, tmp_path):
    "`--max-restarts` goes on although the command says --overwrite. (From three on, sums depend on how messages are laid out; from four on, not everybody talks to everybody.)"
    ended(launch(words(cifar10_root, tmp_path/'whole', num_epochs=3), ranks=4), 0)
    process = launch([*words(cifar10_root, tmp_path/'cut', num_epochs=3), '--overwrite'], '--standalone', '--max-restarts', '1', ranks=4)
    wait_for(process, 'epoch   0')
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    out, said, _ = ended(process, 0)
    assert len(said)==1 and 'rank 2 of 4' in said[0] and 'going on after' in out, (said, out)
    assert outcome(tmp_path/'cut')==outcome(tmp_path/'whole')


def test_a_checkpoint_does_not_know_how_many_wrote_it(cifar10_root, tmp_path):
    "One process, then two, then one, each going on where the other was stopped."
    alone, folder = tmp_path/'alone', tmp_path/'mixed'
    def train(*argv): return subprocess.Popen([sys.executable, '-m', 'resnet_cifar', 'train', *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    assert ended(train(*words(cifar10_root, alone)), 0)[1]==[]
    for start, code in ((train, 143), (lambda *argv: launch(argv), 1), (train, 0)):
        process = start(*words(cifar10_root, folder), '--resume', 'auto')
        if code:
            wait_for(process, 'epoch')
            process.send_signal(signal.SIGTERM)
        _, said, _ = ended(process, code)
        if code: assert re.search(STOPPED, said[-1]), said
    (history, digest), (expected, other) = outcome(folder), outcome(alone)
    assert history[0]==expected[0] and [row['epoch'] for row in history]==[str(epoch) for epoch in range(14)] and digest!=other
    assert json.loads((folder/'config.json').read_text())['changed']==['2 processes: were 1', '1 processes: were 2']
    done = subprocess.run([sys.executable, '-m', 'resnet_cifar', 'train', *words(cifar10_root, folder), '--resume', 'auto'], capture_output=True, text=True, env=ENV)
    assert done.returncode==0 and 'is finished' in done.stdout


@pytest.mark.parametrize('wrong, said', [
    (['--batch_size', '61'], 'error: --batch_size 61: must be a multiple of 2, the number of processes'),
    (['--batch_sise', '61'], 'error: .*--batch_size'),                           # before PyTorch is loaded
    (['--resume', 'nowhere'], 'error: --resume nowhere: nowhere: no such file'),  # only the first process looks
    (['--limit_train', '50'], 'error: --batch_size 60: there are only 50 training images'), # all find it wrong
    (['--lr', '1e30', '--optimizer', 'SGD', '--lr_scheduler', 'none'], 'error: FloatingPointError: the loss or a gradient is not finite in epoch 0, step [12], ')])
def test_what_is_wrong_is_told_once(cifar10_root, tmp_path, wrong, said):
    out, lines, codes = ended(launch([*words(cifar10_root, tmp_path/'run'), *wrong]), 1)
    assert len(lines)==1 and re.match(said, lines[0]), (lines, out)
    assert codes[-1]==('1' if '1e30' in wrong else '2') and out.count('expected') <= 1 # the launcher's last line is the first failure


def test_a_program_trains_twice(cifar10_root, tmp_path):
    argv = words(cifar10_root, 'FOLDER', num_epochs=1, limit_train=120, num_workers=0)
    (tmp_path/'program.py').write_text(f"""
import os
from resnet_cifar.config import parse_args
from resnet_cifar.trainer import run
for folder in ('first', 'second', 'first'):
    config = parse_args([folder if word=='FOLDER' else word for word in {argv!r}])[0]
    digest = run(config, resume='auto').state_digest
    if os.environ['RANK']=='1': print('RESULT', digest)
""")
    done = subprocess.run([*TORCHRUN, '--standalone', '--nproc_per_node', '2', 'program.py'], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert done.returncode==0, done.stderr[-3000:]
    digests = re.findall('RESULT (.*)', done.stdout)
    assert len(digests)==3 and len(set(digests))==1 and done.stdout.count('is finished')==1


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def test_two_machines(cifar10_root, tmp_path, whole):
    "Two launchers that share the data and nothing else: only the first process writes. Then the second one has other settings, or no data."
    def both(second, *flags):
        argv = [*words(cifar10_root, tmp_path/'first'), '--overwrite']
        processes = [launch(argv, '--nnodes', '2', *flags, *([str(number)] if flags[-1]=='--node_rank' else []), ranks=1) for number, argv in enumerate((argv, second))]
        return [process.communicate(timeout=300) for process in processes], [process.returncode for process in processes]
    said, codes = both([*words(cifar10_root, tmp_path/'second'), '--overwrite'], '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'localhost:{free_port()}', '--rdzv_id', 'test')
    assert codes==[0, 0] and sorted('test accuracy' in out for out, _ in said)==[False, True], said
    folder = next(path for path in (tmp_path/'first', tmp_path/'second') if path.exists()) # who is the first they settle themselves
    assert outcome(folder)==outcome(whole) and [path.name for path in tmp_path.iterdir()]==[folder.name]
    for second, expected in ((words(cifar10_root, tmp_path/'second', lr=0.5), 'error: rank 1: --lr 0.5: rank 0 has 0.01'), (words(tmp_path/'nowhere', tmp_path/'second'), 'error: rank 1: no CIFAR-10 in .*: run `resnet-cifar download --root ')):
        said, codes = both(second, '--rdzv_endpoint', f'localhost:{free_port()}', '--node_rank')
        lines = [line for _, err in said for line in err.splitlines() if line.startswith(('error', 'stopp'))]
        assert codes==[1, 1] and len(lines)==1 and re.match(expected, lines[0]), said
