"Whole runs: what is said before, what comes out, and that it is a function of the settings alone."
import csv
import dataclasses
import io
import itertools
import json
import re
import shlex
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from faulty import history, make_sample_run, outcome, small  # noqa: F401
from resnet_cifar.history import TensorBoard
from resnet_cifar import distributed, forecast, preparation, trainer
from resnet_cifar.checkpoint import load_checkpoint, state_digest
from resnet_cifar.config import TrainConfig
from resnet_cifar.cost import training_flops
from resnet_cifar.data import load_cifar10, sample_cifar10
from resnet_cifar.distributed import Stopped
from resnet_cifar.evaluation import evaluate
from resnet_cifar.models import create_model
from resnet_cifar.optimizers import lr_plan
from resnet_cifar.training import Callback
from resnet_cifar.weights import load_model

SPECIFICATION = '''resnet_cifar.trainer --batch_size 32 --num_workers 1 --num_epochs 20 --lr 0.001 --optimizer AdamW --lr_scheduler CosineAnnealingLR --t_max 10
  --model_name {model} --random_seed 0 --ckpt_dir ./checkpoints --compile --pin_memory --transform --root {root} --limit_train {train} --limit_test 500 --valid_size 500 --num_epochs 2'''


def loaders_of(config): return preparation.make_loaders(config, sample_cifar10())


def state_of(config): return preparation.build(config, loaders_of(config)[0])[0]


# ---------------------------------------------------------------- settle

def test_what_the_machine_decides_is_settled_once(capsys):
    config = preparation.resolve(TrainConfig(device='cpu', model_name='resnet20'))
    assert (config.device, config.precision in ('fp32', 'bf16'), config.width)==('cpu', True, 16)
    assert preparation.resolve(config)==config and capsys.readouterr().out==''


def test_a_request_of_no_use_is_reported_truly(capsys):
    "On a machine with a GPU, too, a run on the CPU does not use pinned memory."
    preparation.resolve(TrainConfig(device='cpu', pin_memory=True))
    assert capsys.readouterr().out=='--pin_memory: not used, as all data stay on one device (cpu)\n'


@pytest.mark.parametrize('settings, world_size, text', [
    (dict(model_name='resnet20', stem='patch'), 1, '--model_name resnet20 --shortcut auto --stem patch: .*option A'),
    (dict(batch_size=61), 2, '--batch_size 61: must be a multiple of 2, the number of processes')])
def test_what_cannot_be_settled(settings, world_size, text):
    with pytest.raises(ValueError, match=text): preparation.resolve(TrainConfig(device='cpu', **settings), world_size)


@pytest.mark.parametrize('name', ['resnet10', 'resnet20', 'plain20'])
def test_what_is_accepted_can_be_run(name):
    "Or else it is an error before anything is loaded: stems and shortcuts that do not fit, images that are too small."
    refused = []
    for shortcut, stem, size in itertools.product(('auto', 'C') if name!='plain20' else ('auto',), ('cifar', 'imagenet', 'patch'), (8, 9, 12, 13)):
        try: config = preparation.resolve(TrainConfig(device='cpu', model_name=name, shortcut=shortcut, stem=stem, image_sizes=(size, 32)))
        except ValueError as error: refused.append((shortcut, stem, size, str(error).split()[0]))
        else:
            given = dict(shortcut=shortcut) if shortcut!='auto' else {}
            with torch.device('meta'): assert create_model(name, stem=stem, width=config.width, **given).eval()(torch.empty(1, 3, size, size)).shape==(1, 10)
    small_images = [(shortcut, stem, size, '--image_sizes') for shortcut in ('auto', 'C') for stem, size in (('imagenet', 8), ('imagenet', 9), ('imagenet', 12), ('patch', 8))]
    no_shortcut = [('auto', 'patch', size, '--model_name') for size in (8, 9, 12, 13)] # 24 channels cannot become 16 by adding zeros
    assert refused==dict(resnet10=small_images, resnet20=no_shortcut, plain20=[])[name]


# ---------------------------------------------------------------- three sets

def test_sets_do_not_overlap_and_limits_come_after_the_split():
    sample, config = sample_cifar10(), small('x', limit_test=150)
    train, valid, test = loaders_of(config)
    assert [len(loader.dataset.labels) for loader in (train, valid, test)]==[200, 100, 150]
    assert torch.equal(train.dataset.images, sample.train_images[:200]) # the first of what the split left
    assert torch.equal(valid.dataset.images, sample.train_images[-100:]) # the sample's last 10 of each class
    assert loaders_of(small('x', valid_size=0))[1] is None


def test_validation_images_are_found_again(sample_run, tmp_path):
    sample_run(tmp_path/'run', num_epochs=1)
    images, labels = preparation.validation_images(tmp_path/'run', sample_cifar10())
    assert torch.equal(images, sample_cifar10().train_images[-100:]) and torch.bincount(labels).tolist()==[10]*10
    assert preparation.validation_images('DEFAULT', sample_cifar10()) is None


# ---------------------------------------------------------------- the plan

def test_plan(monkeypatch):
    monkeypatch.setattr(forecast, 'busy_cores', lambda: 0.0)
    config = preparation.resolve(small('checkpoints/try', num_epochs=20, lr_scheduler='CosineAnnealingLR', t_max=10, stem='cifar'))
    state, loaders = state_of(config), loaders_of(config)
    digest, random = state_digest(state.model), torch.get_rng_state()
    rows = dict(forecast.plan(state, config, loaders))
    assert state_digest(state.model)==digest and state.optimizer.state_dict()['state']=={} # measuring has changed nothing
    assert torch.equal(torch.get_rng_state(), random)
    assert list(rows)==['model', 'device', 'data', 'rate', 'warning', 'run folder', 'expected']
    assert rows['model'].startswith('resnet10, width 8, stem cifar: ') and 'fp32, channels_last' in rows['device']
    assert rows['data']=='200 training, 100 validation and 50 test images; 4 batches of 50 an epoch'
    assert rows['rate']=='AdamW, CosineAnnealingLR: 0.01 in epoch 0, 0 in epoch 10, 0.00976 in epoch 19' # (1 + cos(9*pi/10 + pi))/2
    assert rows['warning'].startswith('--t_max 10 is less than --num_epochs 20: the rate reaches 0 in epoch 10 and climbs again')
    assert re.fullmatch(r'about \d+ s; \S+ PFLOP in all epochs', rows['expected']) and rows['run folder']=='checkpoints/try'
    rows = dict(forecast.plan(state, dataclasses.replace(config, t_max=None, lr_scheduler='OneCycleLR'), loaders))
    assert 'warning' not in rows


def test_forecast_of_sizes(tmp_path, monkeypatch):
    "A step of 16 pixels takes 1,000 s here and one of 32 pixels 4,000; one of 24 is (24² - 16²)/(32² - 16²) of the way."
    config = preparation.resolve(small(tmp_path, num_epochs=5, valid_size=0, limit_test=10, image_sizes=(16, 24, 32)))
    monkeypatch.setattr(forecast, '_step_seconds', lambda model, optimizer, total, size, config: {16: 1000.0, 32: 4000.0}[size])
    expected = forecast.expected_seconds(state_of(config), config, loaders_of(config))
    assert round(expected/1000)==4*(1 + 2.25 + 3*4) # four steps an epoch; 1 + 3*320/768 = 2.25


def test_forecast_of_what_is_left(tmp_path, monkeypatch):
    "Of four epochs of four steps, all as long as the next: the second one is half done."
    config = preparation.resolve(small(tmp_path, num_epochs=4, valid_size=0, limit_test=10))
    state, loaders = state_of(config), loaders_of(config)
    monkeypatch.setattr(forecast, '_step_seconds', lambda *arguments: 1000.0)
    assert round(forecast.expected_seconds(state, config, loaders)/1000)==16
    state.epoch, state.progress = 1, SimpleNamespace(losses=[0, 0])
    assert round(forecast.expected_seconds(state, config, loaders)/1000)==10


def test_seconds_without_the_plan(sample_run, tmp_path, monkeypatch):
    "Neither the epoch that was interrupted nor the run counts the time in which a resumed run plans."
    def slow_plan(*arguments):
        time.sleep(2)
        return []
    monkeypatch.setattr(trainer, 'plan', slow_plan)
    monkeypatch.setattr(trainer.Checkpointer, 'after_step', trainer.Checkpointer.save)
    sample_run(tmp_path/'run', num_epochs=1, after=3)
    earlier = load_checkpoint(tmp_path/'run'/'last.ckpt')['progress']['seconds']
    begun = time.monotonic()
    result = sample_run(tmp_path/'run', num_epochs=1, resume='auto')
    took = time.monotonic() - begun - 2
    row, = load_checkpoint(tmp_path/'run'/'last.ckpt')['history']
    assert earlier < row['seconds'] < result.seconds < earlier + took


# ---------------------------------------------------------------- build

def test_weights_depend_on_the_seed_alone():
    first, second = state_of(small('x')), state_of(small('x', batch_size=25))
    torch.rand(3)
    assert state_digest(first.model)==state_digest(second.model)!=state_digest(state_of(small('x', random_seed=1)).model)


@pytest.mark.parametrize('scheduler, position', [('OneCycleLR', 6), ('CosineAnnealingLR', 1)])
def test_a_new_schedule_stands_where_the_run_is(sample_run, tmp_path, monkeypatch, scheduler, position):
    "Two of four steps of the second epoch are done; then other rates hold."
    monkeypatch.setattr(trainer.Checkpointer, 'after_step', trainer.Checkpointer.save)
    settings = dict(num_epochs=4, lr_scheduler=scheduler)
    sample_run(tmp_path/'run', after=7, **settings)
    config = preparation.resolve(small(tmp_path/'run', lr=0.02, **settings))
    found = trainer.find_run(trainer.RunFolder(tmp_path/'run'), config, 'auto', False)
    state, _ = preparation.build(config, loaders_of(config)[0], resumed=found)
    assert state.scheduler.last_epoch==position and len(state.progress.losses)==2
    fresh = state_of(config)
    for _ in range(position):
        fresh.optimizer.step()
        fresh.scheduler.step()
    assert state.optimizer.param_groups[0]['lr']==fresh.optimizer.param_groups[0]['lr']
    if scheduler=='CosineAnnealingLR': assert state.optimizer.param_groups[0]['lr']==pytest.approx(lr_plan(config, 4)[1])


# ---------------------------------------------------------------- runs

def test_result_of_a_run(sample_run, tmp_path, capsys, monkeypatch):
    "With everything that evaluates: averages, two views, no validation, other sizes; the answers are those of the file."
    monkeypatch.setattr(forecast, 'busy_cores', lambda: 1.5)
    settings = dict(ema_decay=0.9, valid_size=0, tta=True, deterministic=True, image_sizes=(16, 32), channels_last=False)
    result = sample_run(tmp_path/'run', **settings)
    assert (result.tested, result.tested_epoch, (tmp_path/'run'/'best.ckpt').exists())==('last', 1, False)
    assert [row['valid_loss'] for row in history(tmp_path/'run')]==['', ''] and not torch.are_deterministic_algorithms_enabled()
    model, test = load_model(tmp_path/'run'), loaders_of(small('x', **settings))[2]
    views = [evaluate(model, test, views=n).accuracy for n in (1, 2, 6)]
    assert views==[result.test_accuracy, result.test_accuracy_mirror, result.test_accuracy_tta]
    assert result.pflop==pytest.approx(200*(training_flops(model, 16) + training_flops(model, 32))/1e15)
    assert state_digest(model)==result.state_digest
    saved = load_checkpoint(tmp_path/'run'/'last.ckpt')['history']
    assert result.images_per_second==pytest.approx(400/sum(row['seconds'] for row in saved))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed]==['model', 'device', 'data', 'rate', 'busy', 'run', 'expected', 'epoch', 'epoch']
    lines = trainer.result_lines(small(tmp_path/'run'), result)
    assert lines[0].startswith(f'test accuracy {result.test_accuracy:.4f}, {result.test_accuracy_mirror:.4f} with mirror images, '
                               f'{result.test_accuracy_tta:.4f} with six views (epoch 1, the last)')


def test_a_class_without_test_images(sample_run, tmp_path):
    result = sample_run(tmp_path/'run', num_epochs=1, limit_test=1)
    assert sorted(result.per_class_accuracy.values(), key=str)[1:]==[None]*9


def test_a_run_is_a_function_of_its_settings(sample_run, tmp_path):
    "The same settings twice, and with 2 background processes: the same history and the same bits. Another seed: others."
    settings = dict(transform=True, optimizer='Muon', whiten=True, alternating_flips=True, image_sizes=(16, 24), lr_scheduler='OneCycleLR', lr=0.1)
    def run(name, **more):
        sample_run(tmp_path/name, **settings, **more)
        return outcome(tmp_path/name)
    first = run('first')
    assert run('second')==first
    assert run('workers', num_workers=2)==first
    assert run('seed', random_seed=1)[1]!=first[1]


@pytest.mark.long
def test_compiled_and_averaged_runs_repeat(sample_run, tmp_path):
    for name in ('first', 'second'): sample_run(tmp_path/name, compile=True, ema_decay=0.9)
    assert outcome(tmp_path/'first')==outcome(tmp_path/'second')


class CountSteps(Callback):
    def __init__(self): self.steps = 0
    def after_step(self, state): self.steps += 1
    def state_dict(self): return dict(steps=self.steps)
    def load_state_dict(self, saved): self.steps = saved['steps']


def test_callbacks_of_your_own(sample_run, tmp_path, monkeypatch):
    "Their state is saved with the run and comes back; a hook that does not exist is an error before anything is trained."
    monkeypatch.setattr(trainer.Checkpointer, 'after_step', trainer.Checkpointer.save)
    sample_run(tmp_path/'run', callbacks=[CountSteps()], after=5)
    counter = CountSteps()
    sample_run(tmp_path/'run', callbacks=[counter], resume='auto')
    assert counter.steps==8
    class Misspelt(Callback):
        def after_batch(self, state): pass
    with pytest.raises(TypeError, match='Misspelt.after_batch would never be called'): sample_run(tmp_path/'other', callbacks=[Misspelt()])


def test_tensorboard(sample_run, tmp_path):
    "A resumed run, or a new one in the same folder, has neither gaps nor doubled points; what lay in the folder stays."
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    def points():
        events = accumulator.EventAccumulator(str(tmp_path/'run'/'tensorboard'))
        events.Reload()
        assert set(events.Tags()['scalars'])=={'lr', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'seconds'}
        return [event.step for event in events.Scalars('valid_loss')], [event.value for event in events.Scalars('valid_loss')]
    (tmp_path/'run'/'tensorboard').mkdir(parents=True)
    (tmp_path/'run'/'tensorboard'/'mine').write_text('')
    sample_run(tmp_path/'run', callbacks=[TensorBoard(tmp_path/'run')], num_epochs=3, after=9)
    assert points()[0]==[0, 1]
    sample_run(tmp_path/'run', callbacks=[TensorBoard(tmp_path/'run')], num_epochs=3, resume='auto')
    steps, values = points()
    assert steps==[0, 1, 2] and values==pytest.approx([float(row['valid_loss']) for row in history(tmp_path/'run')], rel=1e-6)
    assert (tmp_path/'run'/'tensorboard'/'mine').exists()


# ---------------------------------------------------------------- stopped

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "What a run with averaged weights comes to that nothing interrupts."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, 'load_cifar10', lambda root, skip_checksum: sample_cifar10())
        folder = tmp_path_factory.mktemp('whole')
        trainer.run(small(folder, ema_decay=0.9))
    return outcome(folder)


@pytest.mark.parametrize('where, number', [('validation', signal.SIGINT), ('test', signal.SIGTERM)])
def test_signal_while_evaluating(sample_run, whole, tmp_path, monkeypatch, where, number):
    "In the middle of the second epoch's validation, or of the test at the end: the epoch's training is not lost."
    calls = []
    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls)==dict(validation=2, test=3)[where]: signal.raise_signal(number)
        return evaluate(*arguments, **options)
    monkeypatch.setattr(distributed, 'evaluate', signalled)
    with pytest.raises(Stopped, match=r'stopped; .* holds \d finished epochs.*: the same command with --resume auto continues it') as stopped:
        sample_run(tmp_path/'run', ema_decay=0.9)
    assert stopped.value.code==128 + number
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    assert (content['epoch'], len(content['progress']['counts']) if content['progress'] else None)==dict(validation=(1, 4), test=(2, None))[where]
    sample_run(tmp_path/'run', ema_decay=0.9, resume='auto')
    assert outcome(tmp_path/'run')==whole


@pytest.mark.parametrize('step, settings', [
    (4, dict(ema_decay=0.9, optimizer='SGD', lr_scheduler='OneCycleLR')),
    (6, dict(optimizer='Muon', whiten=True, alternating_flips=True, transform=True, lr_scheduler='CosineAnnealingLR', image_sizes=(16, 24), num_workers=1)),
], ids=['average', 'recipe'])
def test_signal_between_two_steps(sample_run, tmp_path, settings, step):
    "After the last step of an epoch, and in the middle of one with the tricks of the recipes."
    class Signal(Callback):
        def after_step(self, state):
            if 4*state.epoch + len(state.progress.losses)==step: signal.raise_signal(signal.SIGTERM)
    sample_run(tmp_path/'whole', **settings)
    with pytest.raises(Stopped): sample_run(tmp_path/'run', callbacks=[Signal()], **settings)
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    assert 4*content['epoch'] + len(content['progress']['counts'])==step
    sample_run(tmp_path/'run', resume='auto', **settings)
    assert outcome(tmp_path/'run')==outcome(tmp_path/'whole')


def test_second_signal_stops_at_once(sample_run, tmp_path, capfd):
    class Twice(Callback):
        def after_step(self, state):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped, match='stopped at once, by a second signal') as stopped: sample_run(tmp_path/'run', callbacks=[Twice()])
    assert stopped.value.code==130 and load_checkpoint(tmp_path/'run'/'last.ckpt')['progress'] is None # the file of the beginning
    assert capfd.readouterr().err=='stopping at the next step (a second signal stops at once)\n'
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_out_of_memory(sample_run, tmp_path):
    class Greedy(Callback):
        def after_step(self, state): torch.empty(1 << 60, dtype=torch.uint8) # a real refusal of the allocator
    with pytest.raises(MemoryError, match='out of memory with --batch_size 50: try half of it'): sample_run(tmp_path/'run', callbacks=[Greedy()])


def test_not_finite_stops_before_the_step(sample_run, tmp_path):
    class Break(Callback):
        def after_step(self, state):
            if len(state.progress.losses)==2: state.model.fc.bias.data.fill_(float('inf'))
    with pytest.raises(FloatingPointError, match='not finite in epoch 0, step 2: '): sample_run(tmp_path/'run', callbacks=[Break()])
    content = load_checkpoint(tmp_path/'run'/'last.ckpt') # from before the first step; loading refuses what is not finite
    assert content['epoch']==0 and content['progress'] is None


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize('model, extra', [('ResNet18', '--width 8 --no_compile'), *(pytest.param(f'ResNet{n}', '--width 8 --no_compile', marks=pytest.mark.long) for n in (34, 50, 101)),
                                          pytest.param('ResNet152', '--width 8', marks=pytest.mark.long), pytest.param('ResNet18', '', marks=pytest.mark.long)])
def test_specification_command(command, cifar10_root, tmp_path, model, extra):
    "The specification's command with limits; thin, to save minutes, and only one network of each kind of block compiled."
    is_full, compiled = extra=='', '--no_compile' not in extra
    done = command(*shlex.split(SPECIFICATION.format(model=model, root=cifar10_root, train=1280 if is_full else 128) + ' ' + extra))
    run = tmp_path/'checkpoints'
    assert sorted(path.name for path in run.iterdir())==['best.ckpt', 'config.json', 'curves.png', 'history.csv', 'last.ckpt', 'previous.ckpt', 'result.json']
    assert [row['epoch'] for row in csv.DictReader(open(run/'history.csv'))]==['0', '1']
    result, config = json.loads((run/'result.json').read_text()), json.loads((run/'config.json').read_text())
    assert 0 <= result['test_accuracy'] <= 1 and len(result['state_digest'])==64
    assert (config['model_name'], config['compile'], config['transform'], config['t_max'])==(model.lower(), compiled, True, 10)
    assert ('compiling    for images of 32 x 32 pixels' in done.stdout)==compiled and 'cannot compile' not in done.stdout
    assert done.stderr=='' and len(done.stdout.splitlines()) < 20 # no bars, no warnings where there is no terminal
    assert f'test accuracy {result["test_accuracy"]:.4f} (epoch ' in done.stdout
    metrics = evaluate(load_model(run), preparation.make_loaders(dataclasses.replace(small('x'), limit_test=500), load_cifar10(cifar10_root))[2], precision=config['precision'])
    assert metrics.accuracy==result['test_accuracy']


def test_bar_on_a_terminal(sample_run, tmp_path, monkeypatch):
    "Somebody who watches sees a bar; what is printed stays readable."
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setattr(sys, 'stdout', Terminal())
    sample_run(tmp_path/'run', num_epochs=1)
    printed = sys.stdout.getvalue()
    assert '% [' in printed and re.search('^epoch   0 \\(1/1\\)', printed.replace('\r', '\n'), re.M), printed
