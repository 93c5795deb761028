"Files of runs: whole, verified, and enough to resume with the same bits."
import dataclasses
import errno
import hashlib
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resnet_cifar import checkpoint
from resnet_cifar.checkpoint import FORMAT, Checkpointer, checkpoint_of, load_checkpoint, restore, save_checkpoint, state_digest
from resnet_cifar.config import OPTIMIZERS, SCHEDULERS, TrainConfig
from resnet_cifar.data import BatchLoader, sample_cifar10
from resnet_cifar.facts import Facts
from resnet_cifar.models import create_model, list_models
from resnet_cifar.optimizers import EMA
from resnet_cifar.training import Callback, fit, new_state
from resnet_cifar.weights import load_model, load_weights

CONFIG = TrainConfig(num_epochs=3, lr=0.05, optimizer='SGD', lr_scheduler='OneCycleLR', precision='fp32', width=8)
STEPS = 4 # in an epoch


@pytest.fixture(scope='module')
def batches():
    "A loader of training batches, anew at each call, and one for validation."
    sample = sample_cifar10()
    images, labels = sample.train_images[:64, :, ::2, ::2].contiguous(), sample.train_labels[:64]
    return lambda: (BatchLoader(images, labels, 16, train=True, augment=True), BatchLoader(images[:32], labels[:32], 32))


def network(seed=0):
    torch.manual_seed(seed)
    return create_model('resnet10', width=8)


class Stop(Callback):
    "Save after so many steps, and stop as a signal would."
    def __init__(self, steps, saving): self.steps, self.saving = steps, saving
    def after_step(self, state):
        self.steps -= 1
        if self.steps==0:
            self.saving.save(state)
            raise KeyboardInterrupt


class Counter(Callback):
    "Something to remember."
    def __init__(self): self.steps = 0
    def after_step(self, state): self.steps += 1
    def state_dict(self): return dict(steps=self.steps)
    def load_state_dict(self, saved): self.steps = saved['steps']


class Watcher:
    "Nothing to remember, and not even the methods for it."
    def after_epoch(self, state): pass


def start(config, folder, batches, stop=None, seed=0, resume=False):
    "A run in new objects; returns its state and its callbacks."
    model = network(seed)
    callbacks = [Counter(), *([EMA(model, config.ema_decay)] if config.ema_decay else []), Counter(), Watcher()]
    saving = Checkpointer(folder, config, callbacks)
    state = new_state(model, config, STEPS)
    if resume: restore(state, load_checkpoint(folder/'last.ckpt'), callbacks)
    train, valid = batches()
    try: fit(model, train, valid, config, [*callbacks, saving, *([Stop(stop, saving)] if stop else [])], state)
    except KeyboardInterrupt: pass
    return state, callbacks


def outcome(state):
    return state_digest(state.model), state_digest(state.eval_model), [row | dict(seconds=None) for row in state.history], state.best_epoch


def resumed_equals_whole(config, tmp_path, batches, stops):
    whole, _ = start(config, tmp_path/'whole', batches)
    start(config, tmp_path/'run', batches, stops[0])
    for before, stop in zip(stops, [*stops[1:], None]): start(config, tmp_path/'run', batches, stop and stop - before, seed=1, resume=True)
    state, callbacks = start(config, tmp_path/'run', batches, seed=2, resume=True) # a finished run stays as it is
    assert outcome(state)==outcome(whole)
    assert callbacks[0].steps==callbacks[-2].steps==config.num_epochs*STEPS
    return state


@pytest.mark.parametrize('stops', [(1,), (4,), (5, 6, 7), (4, 8, 11), (12,)], ids=str)
def test_stopped_anywhere(stops, tmp_path, batches):
    "After the first step, at the end of an epoch, several times in one epoch, after the last step."
    resumed_equals_whole(dataclasses.replace(CONFIG, ema_decay=0.9), tmp_path, batches, stops)


@pytest.mark.long
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('scheduler', SCHEDULERS)
def test_each_pair_of_optimizer_and_schedule(optimizer, scheduler, tmp_path, batches):
    for ema_decay, stop in ((0, 5), (0.9, 7)):
        config = dataclasses.replace(CONFIG, optimizer=optimizer, lr_scheduler=scheduler, lr=0.01, step_size=2, ema_decay=ema_decay)
        state = resumed_equals_whole(config, tmp_path/str(ema_decay), batches, (stop, 9))
        assert state_digest(load_model(tmp_path/str(ema_decay)/'run'/'last.ckpt'))==state_digest(state.eval_model)


def test_muon_in_bf16(tmp_path, batches):
    "What the recipes do besides."
    resumed_equals_whole(dataclasses.replace(CONFIG, precision='bf16', optimizer='Muon', label_smoothing=0.1), tmp_path, batches, (6,))


def test_what_is_written_when(tmp_path, batches, monkeypatch):
    "Before the first step, after each epoch, and every SAVE_SECONDS; the best epoch's file before the last."
    written, save = [], checkpoint.save_checkpoint
    def watched(path, content, keep=None):
        progress = content['progress']
        written.append((path.name, content['epoch'], len(progress['counts']) if progress else 0, keep))
        save(path, content, keep)
    monkeypatch.setattr(checkpoint, 'save_checkpoint', watched)
    config = dataclasses.replace(CONFIG, num_epochs=2)
    state, _ = start(config, tmp_path/'run', batches)
    best = [('best.ckpt', row['epoch'] + 1, 0, None) for row in state.history if row['epoch']==0 or row['valid_accuracy'] > state.history[0]['valid_accuracy']]
    last = [('last.ckpt', epoch, 0, 'previous.ckpt') for epoch in (0, 1, 2)]
    assert written==[last[0], best[0], last[1], *best[1:], last[2]]
    content = load_checkpoint(tmp_path/'run'/'best.ckpt')
    assert (content['optimizer'], content['scheduler'], content['callbacks'])==(None, None, {})
    assert load_checkpoint(tmp_path/'run')['epoch']==state.best_epoch + 1 and load_checkpoint(tmp_path/'run'/'previous.ckpt')['epoch']==1
    written.clear()
    monkeypatch.setattr(checkpoint, 'SAVE_SECONDS', 0)
    start(dataclasses.replace(CONFIG, num_epochs=1), tmp_path/'steps', batches)
    assert [steps for name, epoch, steps, _ in written if name=='last.ckpt']==[0, 1, 2, 3, 4, 0]


def test_content(batches, tmp_path):
    "Tensors and plain values, with what one needs to use the network, and what is of no network of this package."
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    state, callbacks = start(config, tmp_path/'run', batches, stop=6)
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    keys = 'format config epoch history best_epoch progress model averaged optimizer scheduler callbacks architecture classes mean std image_size'
    assert content.keys()==checkpoint_of(state, config, callbacks).keys()==set(keys.split())
    assert (content['format'], content['epoch'], content['config'])==(3, 1, dataclasses.asdict(config))
    assert content['architecture']==state.model.architecture.to_dict()
    assert Facts.from_dict(content)==Facts() and list(content['callbacks'])==['Counter 1', 'EMA 1', 'Counter 2']
    progress = content['progress']
    assert progress['counts']==[16, 16] and progress['losses'].tolist()==[loss.item() for loss in state.progress.losses]
    assert progress['num_correct'].dtype==torch.int64
    tiny = new_state(nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 10)), TrainConfig(), STEPS)
    save_checkpoint(tmp_path/'tiny.ckpt', checkpoint_of(tiny, TrainConfig()))
    assert load_checkpoint(tmp_path/'tiny.ckpt')['architecture'] is None
    with pytest.raises(ValueError, match='tiny.ckpt is of no network of this package: give it to load_weights'): load_model(tmp_path/'tiny.ckpt')
    load_weights(nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 10)), tmp_path/'tiny.ckpt')


def test_a_run_without_the_saved_callbacks_says_so(batches, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, ema_decay=0.9)
    start(config, tmp_path/'run', batches, stop=6)
    content = load_checkpoint(tmp_path/'run'/'last.ckpt')
    first, second = (new_state(network(1), config, STEPS) for _ in range(2))
    restore(first, content, [Counter()])
    assert capsys.readouterr().out.splitlines()==['the saved state of EMA 1 is not used', 'the saved state of Counter 2 is not used']
    fit(first.model, *batches(), config, state=first)
    restore(second, content) # what was read is as it was
    assert (len(second.history), len(second.progress.losses))==(1, 2)


@pytest.mark.parametrize('name', [n if n in ('resnet18', 'resnet50', 'resnet10') else pytest.param(n, marks=pytest.mark.long) for n in list_models()])
def test_round_trip_of_networks(name, tmp_path):
    "The file of a compiled model is the file of the model."
    config = TrainConfig(model_name=name, width=8)
    net = create_model(name, width=8)
    for wrapped in (net, torch.compile(net)):
        save_checkpoint(tmp_path/'a.ckpt', checkpoint_of(new_state(wrapped, config, STEPS), config))
        loaded = load_model(tmp_path/'a.ckpt')
        save_checkpoint(tmp_path/'b.ckpt', checkpoint_of(new_state(loaded, config, STEPS), config))
        assert state_digest(loaded)==state_digest(load_model(tmp_path/'b.ckpt'))==state_digest(net)


def test_a_wrong_bit_is_noticed(tmp_path):
    path, rng = tmp_path/'a.ckpt', random.Random(0)
    save_checkpoint(path, dict(format=FORMAT, model=dict(weight=torch.arange(500.)), history=[dict(epoch=0)]))
    raw = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='a.ckpt is damaged'): load_checkpoint(path)
    for short in (raw[:-1], raw[:-84], raw[:len(raw)//2], raw + b'x', b''):
        path.write_bytes(short)
        with pytest.raises(ValueError, match='a.ckpt is damaged or no checkpoint'): load_checkpoint(path)


def test_what_is_no_checkpoint(tmp_path):
    net = network()
    torch.save(dict(format=FORMAT, model=net.state_dict()), tmp_path/'unsealed.ckpt') # what anybody could write
    with pytest.raises(ValueError, match='unsealed.ckpt is damaged or no checkpoint of resnet_cifar'): load_checkpoint(tmp_path/'unsealed.ckpt')
    for content, number in ((dict(format=2, model=net.state_dict()), 2), (dict(x=1), None), ([1], None), (torch.zeros(2), None)):
        save_checkpoint(tmp_path/'a.ckpt', content)
        with pytest.raises(ValueError, match=f'a.ckpt is a checkpoint of format {number}, not 3'): load_checkpoint(tmp_path/'a.ckpt')
    for path in (tmp_path/'nowhere.ckpt', tmp_path):
        with pytest.raises(FileNotFoundError, match='(nowhere|last).ckpt: no such file'): load_checkpoint(path)


def test_the_file_before(tmp_path, capsys):
    path = tmp_path/'last.ckpt'
    for epoch in (1, 2): save_checkpoint(path, dict(format=FORMAT, epoch=epoch), keep='previous.ckpt')
    damaged = path.read_bytes()[:-100]
    path.write_bytes(damaged)
    for source in (tmp_path, path):
        assert load_checkpoint(source)['epoch']==1
        problem = f'{path} is damaged or no checkpoint of resnet_cifar: there is no checksum at its end'
        assert capsys.readouterr().out==f'{problem}; reading {tmp_path/"previous.ckpt"} instead\n'
    assert load_checkpoint(tmp_path, set_aside=True)['epoch']==1 and (tmp_path/'last.ckpt.damaged').read_bytes()==damaged
    assert load_checkpoint(tmp_path, set_aside=True)['epoch']==1 and not path.exists()
    (tmp_path/'previous.ckpt').write_bytes(b'')
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match='previous.ckpt is damaged'): load_checkpoint(tmp_path, set_aside=True)
    assert path.read_bytes()==damaged


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    path = tmp_path/'last.ckpt'
    save_checkpoint(path, dict(format=FORMAT, epoch=1))
    for bad in ({1, 2}, np.float64(1), Path('x'), b'x', 1j, network()):
        problem = f'last.ckpt was not written: a.1.b is no plain value but {type(bad).__name__}'
        with pytest.raises(TypeError, match=problem): save_checkpoint(path, dict(a=[1, dict(b=bad)]))
    for bad in (torch.tensor([1, float('nan')]), torch.tensor(float('-inf')), torch.tensor([float('inf')], dtype=torch.bfloat16)):
        problem = 'last.ckpt was not written: a.1.b is not finite; try a lower --lr'
        with pytest.raises(FloatingPointError, match=problem): save_checkpoint(path, dict(a=(1, dict(b=bad))))
    good = dict(format=FORMAT, values=[None, True, 1, 0.5, 'x', float('inf')], tensors=(torch.tensor(True), torch.arange(3), torch.zeros(0)))
    save_checkpoint(tmp_path/'b.ckpt', good)
    assert load_checkpoint(path)['epoch']==1 and load_checkpoint(tmp_path/'b.ckpt')['values']==good['values']
    assert sorted(p.name for p in tmp_path.iterdir())==['b.ckpt', 'last.ckpt']


@pytest.mark.parametrize('number, kind', [(errno.ENOSPC, OSError), (errno.EACCES, PermissionError)])
def test_full_disk_while_saving(number, kind, tmp_path, monkeypatch):
    for epoch in (1, 2): save_checkpoint(tmp_path/'last.ckpt', dict(format=FORMAT, epoch=epoch), keep='previous.ckpt')
    def fail(file): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match=rf'last.ckpt \(1.0 MB\) could not be saved: {os.strerror(number)}; the files that were there are as before') as caught:
        save_checkpoint(tmp_path/'last.ckpt', dict(format=FORMAT, x=torch.zeros(250_000)), keep='previous.ckpt')
    assert type(caught.value) is kind
    assert [load_checkpoint(tmp_path/name)['epoch'] for name in ('last.ckpt', 'previous.ckpt')]==[2, 1]
    assert len(list(tmp_path.iterdir()))==2


def test_not_finite_is_never_saved(tmp_path, batches):
    class Spoil(Callback):
        def after_step(self, state):
            if state.epoch==1: state.model.fc.bias.data.fill_(float('nan'))
    model, (train, valid) = network(), batches()
    with pytest.raises(FloatingPointError, match='not finite in epoch 1, step 1'): fit(model, train, valid, CONFIG, [Checkpointer(tmp_path, CONFIG), Spoil()])
    assert load_checkpoint(tmp_path/'last.ckpt')['epoch']==1


def test_digest_by_hand():
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight[:] = torch.tensor([[1.5], [-2.]])
        net.bias[:] = torch.tensor([0.25, 3.])
    text = b'bias torch.float32 (2,)\n' + struct.pack('<2f', 0.25, 3) + b'weight torch.float32 (2, 1)\n' + struct.pack('<2f', 1.5, -2)
    assert state_digest(net)==hashlib.sha256(text).hexdigest()
    assert state_digest(net.half())!=hashlib.sha256(text).hexdigest()
