"One step, one epoch, and the loop around them."
import warnings
from collections import Counter
from dataclasses import replace

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_cifar import training
from resnet_cifar.config import OPTIMIZERS, SCHEDULERS, TrainConfig
from resnet_cifar.data import BatchLoader
from resnet_cifar.evaluation import Metrics
from resnet_cifar.optimizers import EMA
from resnet_cifar.history import plot_history
from resnet_cifar.training import (
    Callback, Progress, TrainState, fit, new_state, train_epoch, train_step)

matplotlib.use('Agg')
CONFIG = TrainConfig(num_epochs=2, lr=0.01, precision='fp32')


def linear(): # a model that is no ResNet
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def batches(num=3): # in no loader, and of another number of classes
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 4, generator=rng), torch.randint(0, 3, (5,), generator=rng))
            for _ in range(num)]


def weights(model): return [v.clone() for v in model.state_dict().values()]
def are_equal(a, b): return len(a)==len(b) and all(map(torch.equal, a, b))


# ---------------------------------------------------------------- one step, one epoch

class Steep(torch.autograd.Function): # a finite loss, a gradient that is not
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, grad): return grad*float('inf')


@pytest.mark.parametrize('fault', ['gradient', 'loss'])
def test_no_step_is_taken_that_is_not_finite(fault):
    model = linear()
    before, (images, targets) = weights(model), batches(1)[0]
    def forward(x): return Steep.apply(model(x)) if fault=='gradient' else model(x*float('nan'))
    with pytest.raises(FloatingPointError, match='the loss or a gradient is not finite'):
        train_step(forward, images, targets, torch.optim.SGD(model.parameters(), lr=1.))
    assert are_equal(weights(model), before)


@pytest.mark.parametrize('kind', [torch.uint8, torch.int16, torch.int32])
def test_a_step_takes_labels_of_any_whole_numbers(kind):
    images, targets = batches(1)[0]
    steps = []
    for labels in (targets, targets.to(kind)):
        model = linear()
        steps.append(train_step(model, images, labels, torch.optim.SGD(model.parameters(), lr=1.)))
    assert steps[0]==steps[1]


def test_bf16_follows_fp32():
    losses = [fit(linear(), batches(), None, replace(CONFIG, precision=p)).history[-1]['train_loss']
              for p in ('fp32', 'bf16')]
    assert losses[0]!=losses[1] and abs(losses[0] - losses[1]) < 0.02


def test_an_epoch_without_batches():
    model = linear()
    with pytest.raises(ValueError, match='there are no training batches'):
        train_epoch(model, [], torch.optim.SGD(model.parameters()))


def test_progress_by_hand():
    progress = Progress(0.1, losses=[torch.tensor(2.), torch.tensor(4.)],
                        num_correct=[torch.tensor(3), torch.tensor(0)], counts=[3, 1])
    assert progress.metrics()==(2.5, 0.75, None) # (3*2 + 1*4)/4 and 3/4


def test_the_clock_of_a_resumed_epoch_starts_with_it(monkeypatch):
    "Ten seconds before the interruption; the hour until `fit` is called does not count."
    now = [1000.]
    monkeypatch.setattr(training.time, 'monotonic', lambda: now[0])
    model = linear()
    state = new_state(model, CONFIG, 3)
    state.progress = Progress(0.01, [torch.tensor(1.)], [torch.tensor(1)], [5], earlier=10.)
    now[0] += 3600
    class Wait(Callback):
        def before_fit(self, state): now[0] += 600 # as a plan, or a compiler
        def after_step(self, state): now[0] += 1
    fit(model, batches(), None, CONFIG, [Wait()], state)
    assert [row['seconds'] for row in state.history]==[12, 3] # 10 + 2 steps; 3 steps


# ---------------------------------------------------------------- fit

@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_any_model_any_batches(optimizer):
    for scheduler in SCHEDULERS:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            config = replace(CONFIG, optimizer=optimizer, lr_scheduler=scheduler)
            state = fit(linear(), batches(), None, config)
        assert [row['valid_accuracy'] for row in state.history]==[None, None] and state.best_epoch is None


def test_best_epoch_is_the_first_of_equal_ones():
    history = [dict(valid_accuracy=a) for a in (0.1, 0.5, 0.5, 0.4)]
    assert TrainState(None, None, None, history=history).best_epoch==1
    assert TrainState(None, None, None).best_epoch is None


def test_a_state_of_another_model():
    with pytest.raises(ValueError, match='of another model'):
        fit(linear(), batches(), None, CONFIG, state=new_state(linear(), CONFIG, 3))


class Misspelt(Callback):
    def after_batch(self, state): pass

class Near:
    def aftersteps(self, state): pass

class Foreign:
    def on_epoch_end(self, state): pass


@pytest.mark.parametrize('kind, name', [(Misspelt, 'after_batch'), (Near, 'aftersteps'), (Foreign, 'on_epoch_end')])
def test_a_misspelt_hook_is_an_error_before_the_first_step(kind, name):
    model = linear()
    before = weights(model)
    hooks = 'before_fit, after_step, after_epoch, state_dict, load_state_dict'
    with pytest.raises(TypeError, match=f'^{kind.__name__}.{name} would never be called; a callback has {hooks}$'):
        fit(model, batches(), None, CONFIG, [kind()])
    assert are_equal(weights(model), before)


def test_hooks_are_called_in_order_and_what_lacks_is_skipped():
    calls = []
    class Counting: # no `Callback`, with a method of its own
        def __init__(self, name): self.name = name
        def after_step(self, state): calls.append((self.name, len(state.progress.losses)))
        def save(self, path): raise AssertionError('not called')
    class Ends:
        def before_fit(self, state): calls.append('begin')
        def after_epoch(self, state): calls.append((state.epoch, len(state.history), state.progress))
    fit(linear(), batches(2), None, replace(CONFIG, num_epochs=1), [Counting('a'), Ends(), Counting('b')])
    assert calls==['begin', ('a', 1), ('b', 1), ('a', 2), ('b', 2), (1, 1, None)]


def test_a_callback_may_replace_the_numbers_of_a_step():
    "As with several processes: history is made of what the callbacks leave."
    class Doubled:
        def after_step(self, state):
            progress = state.progress
            progress.losses[-1] = torch.tensor(3.)
            progress.num_correct[-1] = progress.num_correct[-1]*0 + 5
            progress.counts[-1] *= 2
    row = fit(linear(), batches(), None, replace(CONFIG, num_epochs=1), [Doubled()]).history[0]
    assert (row['train_loss'], row['train_accuracy'])==(3., 0.5)


def test_what_a_step_calls_and_how_is_evaluated():
    model, calls = linear(), Counter()
    def forward(images):
        calls['forward'] += 1
        assert model.training
        return model(images)
    def evaluation(model, batches, precision):
        calls['evaluation'] += 1
        return Metrics(1., 0.25)
    state = fit(model, batches(), batches(), CONFIG, forward=forward, evaluate=evaluation)
    assert calls==dict(forward=6, evaluation=2) and state.history[0]['valid_accuracy']==0.25
    plain = fit(linear(), batches(), None, CONFIG)
    assert are_equal(weights(model), weights(plain.model))


class Stop(Exception): pass


@pytest.mark.parametrize('lr_scheduler', ['OneCycleLR', 'CosineAnnealingLR'])
@pytest.mark.parametrize('step', [1, 3])
def test_a_run_resumed_within_an_epoch_is_the_same_run(lr_scheduler, step):
    "Even after the last step of an epoch, with its evaluation to come, and in another process, without a warning."
    class StopAt:
        def after_step(self, state):
            if state.epoch==0 and len(state.progress.losses)==step: raise Stop
    config = replace(CONFIG, num_epochs=3, lr_scheduler=lr_scheduler)
    once = fit(linear(), batches(), batches(), config)
    model = linear()
    half = new_state(model, config, 3)
    with pytest.raises(Stop): fit(model, batches(), batches(), config, [StopAt()], half)
    fresh = new_state(model, config, 3) # as after a restart: the optimizer has taken no step
    fresh.optimizer.load_state_dict(half.optimizer.state_dict())
    fresh.scheduler.load_state_dict(half.scheduler.state_dict())
    fresh.epoch, fresh.history, fresh.progress = half.epoch, half.history, half.progress
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        state = fit(model, batches(), batches(), config, state=fresh)
    assert are_equal(weights(model), weights(once.model))
    for row in (*state.history, *once.history): del row['seconds']
    assert state.history==once.history


def test_a_run_that_diverges_names_its_step():
    images, targets = batches(1)[0]
    data = [*batches(2), (images*float('inf'), targets)]
    with pytest.raises(FloatingPointError, match='^the loss or a gradient is not finite in epoch 0, step 2: '
                                                 'try less than --lr 0.01, or --precision fp32$'):
        fit(linear(), data, None, CONFIG)


@pytest.mark.parametrize('bad, num_batches', [(3, 60), (57, 60)])
def test_a_gpu_names_the_step_too(monkeypatch, bad, num_batches):
    "Losses of a GPU are looked at after 50 steps and at the end; the error names the first that is not finite."
    def step(model, images, targets, optimizer, **kwargs): # looks at nothing
        steps.append(1)
        return torch.tensor(float('nan') if len(steps) > bad else 1.), torch.tensor(1)
    steps = []
    monkeypatch.setattr(training, 'train_step', step)
    with pytest.raises(FloatingPointError, match=f'in epoch 0, step {bad}: '):
        fit(linear(), batches(num_batches), None, CONFIG)
    assert len(steps)==(50 if bad < 50 else 60)


# ---------------------------------------------------------------- waiting for a GPU

class Transfers(TorchDispatchMode):
    "Counts what a GPU would be waited for: copies between devices."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [a for a in (*args, out) if isinstance(a, torch.Tensor)]
        if 'copy' in str(function) and len({t.device for t in tensors}) > 1: self.count += 1
        return out


SETTINGS = dict(sgd_ema=dict(optimizer='SGD', lr_scheduler='OneCycleLR', ema_decay=0.9),
                adamw_small=dict(optimizer='AdamW', label_smoothing=0.1, image_sizes=(16,)))

@pytest.mark.parametrize('name', SETTINGS)
def test_a_gpu_is_waited_for_every_50_steps_and_no_more(monkeypatch, name):
    "On the meta device, where reading any number is an error, as a stand-in for a GPU."
    looks = Counter()
    monkeypatch.setattr(training, '_require_finite', lambda losses: looks.update([len(losses)]))
    monkeypatch.setattr(Progress, 'metrics', lambda self: Metrics(0., 0.))
    config = replace(CONFIG, num_epochs=1, **SETTINGS[name])
    class Watch:
        "Copies between devices from the first step of an epoch to its last."
        def __init__(self): self.at_step, self.within = None, []
        def after_step(self, state):
            if self.at_step is not None: self.within.append(transfers.count - self.at_step)
            self.at_step = transfers.count
        def after_epoch(self, state): self.at_step = None
    watch = Watch()
    with torch.device('meta'):
        images = torch.empty(240, 3, 32, 32, dtype=torch.uint8)
        labels = torch.empty(240, dtype=torch.int64)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        callbacks = [EMA(model, 0.9), watch] if config.ema_decay else [watch]
        with Transfers() as transfers:
            loader = BatchLoader(images, labels, 2, train=True, augment=True, device='meta', sizes=config.image_sizes)
            before = transfers.count
            state = fit(model, loader, None, config, callbacks)
    assert state.epoch==1 and looks==Counter({50: 3}) # 120 steps: after 50, after 100, the last 50
    assert watch.within==[0]*119
    assert transfers.count - before <= 4 # the epoch's plan: order, rows, columns, flips


# ---------------------------------------------------------------- curves

def rows(num_epochs, with_valid=True):
    return [dict(epoch=e, lr=0.1/(e + 1), train_loss=2 - e/4, train_accuracy=e/5,
                 valid_loss=2 - e/5 if with_valid else None, valid_accuracy=e/6 if with_valid else None)
            for e in range(num_epochs)]


def test_plot_history():
    axes = plot_history(rows(4), Figure().subplots(1, 3))
    assert [ax.get_xlabel() for ax in axes]==['epoch']*3
    assert [ax.get_ylabel() for ax in axes]==['cross-entropy (nats)', 'accuracy', 'learning rate']
    assert [ax.get_title() for ax in axes[:2]]==['valid: 1.400 in epoch 3', 'valid: 50.0% in epoch 3']
    assert [len(ax.get_lines()) for ax in axes]==[2, 2, 1]
    assert axes[1].yaxis.get_major_formatter()(0.25)=='25%'


def test_plot_history_without_validation_or_epochs():
    axes = plot_history(rows(3, with_valid=False))
    assert [len(ax.get_lines()) for ax in axes]==[1, 1, 1] and axes[0].get_title()=='train: 1.500 in epoch 2'
    assert len(plot_history([], Figure().subplots(1, 3)))==3
    equal = [row | dict(valid_accuracy=0.5) for row in rows(3)]
    assert plot_history(equal, Figure().subplots(1, 3))[1].get_title()=='valid: 50.0% in epoch 0' # as `best_epoch`
