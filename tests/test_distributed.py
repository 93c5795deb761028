"Several processes under torchrun: that they compute what one would, and that nothing is lost when one or all of them end."
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from faulty import outcome, small, use_sample, words
from resnet_cifar import preparation, trainer
from resnet_cifar.checkpoint import load_checkpoint
from resnet_cifar.distributed import join, rank_and_world_size, Ranks, SignalWatch, Stopped

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
FAULTY = str(Path(__file__).with_name('faulty.py'))
ENV = os.environ | dict(OMP_NUM_THREADS='1')


def test_alone():
    "Without torchrun there is one process, and nothing to wait for."
    with join('cpu') as ranks:
        assert (ranks, rank_and_world_size(), ranks.share)==(Ranks(0, 1), (0, 1), (0, 1))
        with ranks.in_turn(): ranks.barrier()
        assert ranks.from_first('x')=='x' and ranks.highest(3)==3


def test_a_signal_waits_for_the_next_step():
    done = []
    with SignalWatch() as watch, pytest.raises(Stopped) as stopped:
        for batch in watch.batches(range(5)):
            if batch==2: signal.raise_signal(signal.SIGTERM)
            done.append(batch)
    assert (done, watch.is_between_steps, stopped.value.code)==([0, 1, 2], True, 143)
    assert signal.getsignal(signal.SIGTERM)==signal.SIG_DFL


def test_a_signal_while_the_processes_ask_each_other_is_not_lost():
    class Asking(Ranks):
        def highest(self, number):
            if number==0: signal.raise_signal(signal.SIGTERM) # after the number was read
            return number
    with SignalWatch(Asking()) as watch:
        watch.check()
        with pytest.raises(Stopped): watch.check()


# ---------------------------------------------------------------- the numbers

PROGRAM = """
import copy, json, math, sys, torch, torch.distributed as dist, torch.nn.functional as F
from faulty import small, use_sample
from resnet_cifar import trainer
from types import SimpleNamespace
from torch import nn
from resnet_cifar.blocks import BasicBlock
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import BatchLoader, sample_cifar10
from resnet_cifar.distributed import AcrossRanks, Ranks, join
from resnet_cifar.models import ResNet
from resnet_cifar.training import Callback, Progress, fit, new_state, train_step

torch.use_deterministic_algorithms(True)
sample, found = sample_cifar10(), {}
images, labels = sample.train_images[:400], sample.train_labels[:400]
def batches(share=(0, 1)): return BatchLoader(images, labels, 80, train=True, augment=True, share=share)

with join('cpu') as ranks:
    # steps, batch norms in evaluation mode: our step on shares against PyTorch's own on the whole batch
    for name in ('SGD', 'AdamW'):
        torch.manual_seed(0)
        ours = ResNet(BasicBlock, (1, 1, 1), width=8).double()
        with torch.no_grad():
            for part, _ in batches(): ours(part.double()) # statistics that suit the network
        ours.eval()
        alone = copy.deepcopy(ours)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4) if name=='SGD' else torch.optim.AdamW(net.parameters(), lr=1e-3) for net in (ours, alone)]
        parallel, before, worst = ranks.wrap(ours, next(iter(batches(ranks.share)))[0][:2].double()), copy.deepcopy(alone), []
        for (part, targets), (all_images, all_targets) in zip(batches(ranks.share), batches()):
            loss, correct = train_step(parallel, part.double(), targets, optimizers[0])
            progress = Progress(0.1, [loss], [correct], [len(targets)])
            AcrossRanks().after_step(SimpleNamespace(progress=progress))
            logits = alone(all_images.double())
            expected = F.cross_entropy(logits.float(), all_targets)
            optimizers[1].zero_grad(); expected.backward(); optimizers[1].step()
            assert progress.num_correct[0].item()==(logits.argmax(1)==all_targets).sum().item() and progress.counts==[80]
            assert math.isclose(progress.losses[0].item(), expected.item(), rel_tol=1e-5), (progress, expected)
            worst.append(max((a - b).abs().max().item() for a, b in zip(ours.parameters(), alone.parameters())))
        found[name] = dict(worst=max(worst), steps=len(worst), moved=min((a - b).abs().max().item() for a, b in zip(alone.parameters(), before.parameters())))

    # whole runs of a network without batch norm: history and weights, from the start and resumed in the middle of an epoch by another number of processes
    config = TrainConfig(num_epochs=3, lr=0.01, optimizer='SGD', lr_scheduler='OneCycleLR', precision='fp32')
    class Stop(Callback):
        def after_step(self, state):
            if (state.epoch, len(state.progress.losses))==(1, 2): raise KeyboardInterrupt
    def trained(first, then):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        state = new_state(net, config, 5)
        for together, callbacks in ((first, [Stop()]), (then, [])):
            some = ranks if together else Ranks()
            train = batches(some.share)
            valid = BatchLoader(sample.test_images[:301], sample.test_labels[:301], 100, share=some.share) # of the last batch's single image one process has nothing
            forward = some.wrap(net, next(iter(train))[0][:2])
            if together: callbacks = [AcrossRanks(), *callbacks]
            try: fit(net, train, valid, config, callbacks, state, forward=forward, evaluate=some.evaluate)
            except KeyboardInterrupt: pass
        return net[1].weight.detach(), state.history
    reference, rows = trained(False, False)
    for first, then in ((True, True), (False, True), (True, False)):
        weights, history = trained(first, then)
        assert torch.allclose(weights, reference, atol=1e-6), (first, then)
        for row, expected in zip(history, rows, strict=True):
            for key in ('train_accuracy', 'valid_accuracy'): assert row[key]==expected[key], (first, then, key, row, expected)
            for key in ('lr', 'train_loss', 'valid_loss'): assert math.isclose(row[key], expected[key], rel_tol=1e-5), (first, then, key)

    # an image for two processes: one of them evaluates nothing
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    single = ranks.evaluate(net, BatchLoader(sample.test_images[:1], sample.test_labels[:1], 100, share=ranks.share))
    assert single.confusion.sum()==1 and single.accuracy in (0, 1)

    # one process meets a number that is none: all stop, at the same step
    data = [(torch.ones(4, 3072)*(math.inf if ranks.rank==1 and step==2 else 1), torch.arange(4)) for step in range(4)]
    net = nn.Linear(3072, 10)
    try: fit(net, data, None, config, [AcrossRanks()], forward=ranks.wrap(net, data[0][0][:2]))
    except FloatingPointError as error: text = str(error)
    everybody = [None]*2
    torch.distributed.all_gather_object(everybody, text)
    assert everybody[0]==everybody[1] and 'in epoch 0, step 2' in text, everybody
    assert (ranks.highest(ranks.rank), ranks.from_first(ranks.rank))==(1, 0)
    print(json.dumps(found)) # rank 1 prints nothing

# and a whole run, in the same program
use_sample()
trainer.run(small(sys.argv[1], **json.loads(sys.argv[2])))
"""
SETTINGS = dict(num_epochs=3, ema_decay=0.9, lr_scheduler='CosineAnnealingLR') # four steps an epoch, and one look at the validation images
LONG = SETTINGS | dict(num_epochs=60, limit_train=400, num_workers=1)


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    "What the program of two processes prints, and the folder of its run, which nothing interrupts."
    folder = tmp_path_factory.mktemp('program')
    (folder/'program.py').write_text(PROGRAM)
    done = subprocess.run([*TORCHRUN, '--standalone', '--nproc_per_node', '2', folder/'program.py', folder/'whole', json.dumps(SETTINGS)], capture_output=True, text=True,
                          env=ENV | dict(PYTHONPATH=str(Path(FAULTY).parent)))
    assert done.returncode==0, done.stderr[-3000:]
    return done.stdout, folder/'whole'


@pytest.fixture(scope='module')
def whole(program): return program[1]


def test_two_processes_compute_what_one_does(program):
    found = json.loads(program[0].splitlines()[0])
    print(found)
    for name in ('SGD', 'AdamW'): assert found[name]['steps']==5 and found[name]['worst'] < 1e-9 < found[name]['moved'], found


def test_one_process_prints_and_writes(program):
    printed, folder = program
    assert printed.count('epoch   2 (3/3)')==printed.count('expected')==1 and re.search('^device .* 1 thread in each of 2 processes', printed, re.M), printed
    assert json.loads((folder/'config.json').read_text())['processes']==2


# ---------------------------------------------------------------- whole programs

started = []


@pytest.fixture(autouse=True)
def no_process_stays():
    "Neither of a test that fails, nor of one that kills the launcher."
    yield
    while started:
        for process in started.pop():
            try: os.killpg(process, signal.SIGKILL)
            except ProcessLookupError: pass


def launch(argv, *flags, ranks=2, **environment):
    "The command under torchrun, on the sample; torchrun makes a group of each process."
    process = subprocess.Popen([*TORCHRUN, *(flags or ['--standalone']), '--nproc_per_node', str(ranks), FAULTY, 'train', *argv],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV | environment, start_new_session=True)
    started.append([process.pid])
    return process


def ended(process, code):
    out, err = process.communicate(timeout=300)
    assert process.returncode==code, (process.returncode, out, err)
    return out, err


def ranks_of(process):
    "Rank -> number of the process."
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    ranks = {child: re.search(rb'\0RANK=(\d+)', Path(f'/proc/{child}/environ').read_bytes()) for child in children}
    found = {int(rank[1]): int(child) for child, rank in ranks.items() if rank}
    started[-1] += found.values()
    return found


def wait_for(process, line):
    for printed in process.stdout:
        if printed.startswith(line): return
    raise AssertionError(process.stderr.read())


def kill_all(process):
    for child in ranks_of(process).values(): os.killpg(child, signal.SIGKILL) # with its background process
    process.kill()


def stop_twice(process):
    for child in ranks_of(process).values(): os.kill(child, signal.SIGTERM) # as batch systems do
    process.terminate()


ENDS = { # name -> what to do to the launcher, its exit code, whether the run is saved and says so
    'rank 1 is stopped': (lambda p: os.kill(ranks_of(p)[1], signal.SIGTERM), 1, True),
    'rank 1 is killed': (lambda p: os.kill(ranks_of(p)[1], signal.SIGKILL), 1, False),
    'rank 0 is killed': (lambda p: os.kill(ranks_of(p)[0], signal.SIGKILL), 1, False),
    'the launcher is stopped': (lambda p: p.send_signal(signal.SIGTERM), 1, True),
    'all are stopped, twice': (stop_twice, 1, True),
    'Ctrl-C': (lambda p: p.send_signal(signal.SIGINT), 1, True),
    'all are killed': (kill_all, -signal.SIGKILL, False)}


STOPPED = r'^stopped; \S+ holds \d+ finished epochs( and \d+ steps of the next)?: the same command with --resume auto continues it$'


def unchanged(folder):
    "Whether nothing that the bits depend on was noted as changed; sources somebody may edit while the tests run."
    return [line for line in json.loads((folder/'config.json').read_text()).get('changed', []) if not line.startswith('sources')]==[]


def test_a_signal_to_one_stops_all(tmp_path, whole):
    "Rank 1 gets it before the second step of the second epoch; rank 0 saves, and the run continues with the bits of the one that was not stopped."
    folder = tmp_path/'cut'
    _, err = ended(launch(words(folder, **SETTINGS), FAULTY_SIGNAL=f'1 9 {int(signal.SIGTERM)}'), 1)
    assert len(re.findall(STOPPED, err, re.M))==1 and '143' in re.findall(r'exitcode +: (-?\d+)', err), err # torchrun may end one of them while it leaves
    content = load_checkpoint(folder/'last.ckpt')
    assert content['epoch']==1 and 0 < len(content['progress']['counts']) < 4 and content['progress']['counts'][0]==50
    ended(launch([*words(folder, **SETTINGS), '--resume', 'auto']), 0)
    assert outcome(folder)==outcome(whole) and unchanged(folder)


@pytest.mark.long
def test_nothing_is_lost(tmp_path):
    "One run, ended in several ways one after the other, always resumed: the bits of the run that was not."
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    ended(launch(words(whole, **LONG)), 0)
    argv = [*words(cut, **LONG), '--resume', 'auto']
    for name, (act, code, is_saved) in ENDS.items():
        process = launch(argv)
        wait_for(process, 'epoch')
        act(process)
        _, err = ended(process, code)
        lines = list(re.finditer(STOPPED, err, re.M)) # torchrun stops the others where one is killed
        assert len(lines)==1 if is_saved else len(lines) <= 1 and not any(line[1] for line in lines), (name, err)
        load_checkpoint(cut/'last.ckpt') # whole
        assert not (cut/'result.json').exists(), f'{name}: too late to be a test'
    ended(launch(argv), 0)
    assert outcome(cut)==outcome(whole) and unchanged(cut)


def test_one_process_resumes_what_two_began(tmp_path, whole, monkeypatch):
    "A checkpoint does not know how many wrote it; that the number changed is noted, as the bits depend on it."
    monkeypatch.setattr(preparation, 'load_cifar10', None)
    use_sample()
    for name in ('last.ckpt', 'best.ckpt', 'config.json'): (tmp_path/name).write_bytes((whole/name).read_bytes())
    trainer.run(small(tmp_path, **SETTINGS | dict(num_epochs=4)), resume='auto')
    (history, _), (expected, _) = outcome(tmp_path), outcome(whole)
    assert history[:3]==expected and len(history)==4
    assert json.loads((tmp_path/'config.json').read_text())['changed'][-1]=='--num_epochs 4: was 3 for the first 3 epochs'
    assert any(line.startswith('processes: 2 before, 1 now') for line in json.loads((tmp_path/'config.json').read_text())['changed'])


@pytest.mark.long
@pytest.mark.parametrize('wrong, text', [(['--batch_size', '61'], '--batch_size 61: must be a multiple of 2, the number of processes'),
                                         (['--resume', 'nowhere'], '--resume nowhere: nowhere: no such file')]) # only the first process looks
def test_what_is_wrong_ends_all(tmp_path, wrong, text):
    out, err = ended(launch([*words(tmp_path/'run', **SETTINGS), *wrong]), 1)
    assert f'error: {text}' in err and 'epoch' not in out and not (tmp_path/'run').exists()


@pytest.mark.long
def test_four_processes_are_started_again(tmp_path):
    "`--max-restarts` resumes although the command says --overwrite. (From three on, sums depend on how messages are laid out; from four on, not everybody talks to everybody.)"
    settings = LONG | dict(batch_size=60, num_epochs=12)
    ended(launch(words(tmp_path/'whole', **settings), ranks=4), 0)
    process = launch([*words(tmp_path/'cut', **settings), '--overwrite'], '--standalone', '--max-restarts', '1', ranks=4)
    wait_for(process, 'epoch   0')
    os.kill(ranks_of(process)[2], signal.SIGKILL)
    out, _ = ended(process, 0)
    assert 'continued after' in out and outcome(tmp_path/'cut')==outcome(tmp_path/'whole')


@pytest.mark.long
def test_a_program_trains_twice(tmp_path):
    (tmp_path/'program.py').write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(FAULTY).parent)!r})
from faulty import small, use_sample
from resnet_cifar.trainer import run
use_sample()
for folder in ('first', 'second', 'first'):
    digest = run(small(folder, num_epochs=1), resume='auto').state_digest
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


@pytest.mark.long
def test_two_machines(tmp_path, whole):
    "Two launchers that share nothing but the data: only the first process writes. Then the second one has other settings."
    def both(second, *flags):
        argv = [*words(tmp_path/'first', **SETTINGS), '--overwrite']
        processes = [launch(argv, '--nnodes', '2', *flags, *([str(number)] if flags[-1]=='--node_rank' else []), ranks=1) for number, argv in enumerate((argv, second))]
        return [process.communicate(timeout=300) for process in processes], [process.returncode for process in processes]
    printed, codes = both([*words(tmp_path/'second', **SETTINGS), '--overwrite'], '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'localhost:{free_port()}', '--rdzv_id', 'test')
    assert codes==[0, 0] and sorted('test accuracy' in out for out, _ in printed)==[False, True], printed
    folder, = tmp_path.iterdir() # who is the first they settle themselves
    assert outcome(folder)==outcome(whole)
    printed, codes = both(words(tmp_path/'second', **SETTINGS | dict(lr=0.5)), '--rdzv_endpoint', f'localhost:{free_port()}', '--node_rank')
    assert codes==[1, 1] and 'error: --lr 0.5: rank 0 has 0.01' in printed[1][1], printed
