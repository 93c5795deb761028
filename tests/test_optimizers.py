"Muon, weight decay, schedules and the averaged weights."
import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from resnet_cifar.config import TrainConfig
from resnet_cifar.optimizers import (
    BY_BATCH, EMA, Muon, lr_plan, make_optimizer, make_scheduler, orthogonalize)
from resnet_cifar.training import fit, new_state

CONFIG = TrainConfig(num_epochs=2, lr=0.1, precision='fp32')


def filters_and_scale():
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.ones(8))])


def take_steps(model, optimizer, num_steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for p in model.parameters(): p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()


@pytest.mark.parametrize('shape', [(6, 20), (20, 6), (5, 5)])
def test_orthogonalize_by_singular_values(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, lengths, v = torch.linalg.svd(matrix, full_matrices=False)
    lengths = lengths/lengths.norm()
    for _ in range(3): lengths = 3.4445*lengths - 4.775*lengths**3 + 2.0315*lengths**5
    assert torch.allclose(orthogonalize(matrix, torch.float64), u @ lengths.diag() @ v, atol=1e-6)
    assert orthogonalize(matrix).dtype==torch.bfloat16


def test_muon_is_pytorchs_on_filters_and_sgd_on_the_rest():
    model = filters_and_scale()
    model[0].data *= 8**0.5/model[0].data.norm()
    matrix, scale = nn.Parameter(model[0].detach().flatten(1).clone()), nn.Parameter(torch.ones(8))
    grads = torch.randn(8, 3, 3, 3), torch.randn(8)
    model[0].grad, model[1].grad, matrix.grad, scale.grad = *grads, grads[0].flatten(1), grads[1]
    Muon(model, lr=0.1, momentum=0.6, weight_decay=0.01).step()
    torch.optim.Muon([matrix], lr=0.1, momentum=0.6, weight_decay=0, ns_steps=3).step()
    torch.optim.SGD([scale], lr=0.01, momentum=0.6, weight_decay=0.01, nesterov=True).step()
    assert torch.allclose(model[0].flatten(1), matrix, atol=2e-3) and torch.allclose(model[1], scale)


def test_muon_keeps_the_length_of_filters():
    model = filters_and_scale()
    take_steps(model, Muon(model, lr=0.1), 5)
    assert 2.5 < model[0].norm() < 3.2 # sqrt(8) = 2.83, and one step


@pytest.mark.parametrize('name', ['Muon', 'SGD', 'Adam', 'AdamW'])
def test_the_whole_state_is_in_the_state_dict(name):
    model = filters_and_scale()
    optimizer = make_optimizer(model, replace(CONFIG, optimizer=name))
    take_steps(model, optimizer, 2)
    twin = copy.deepcopy(model)
    again = make_optimizer(twin, replace(CONFIG, optimizer=name))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, 1, seed=1)
    take_steps(twin, again, 1, seed=1)
    assert all(map(torch.equal, model, twin))
    before = [p.clone() for p in model]
    for p in model: p.grad = None
    optimizer.step() # no gradient, no step
    assert all(map(torch.equal, model, before))


@pytest.mark.parametrize('settings, left', [
    (dict(optimizer='SGD', nesterov=False), [0.95, 0.95]), # 1 - 0.1*0.5
    (dict(optimizer='SGD'), [0.905, 0.905]),               # the look ahead takes 0.9 of it once more
    (dict(optimizer='SGD', momentum=0.), [0.95, 0.95]),    # nothing to look ahead with
    (dict(optimizer='SGD', norm_weight_decay=False), [0.905, 1.]),
    (dict(optimizer='AdamW', norm_weight_decay=False), [0.95, 1.]),
    (dict(optimizer='Muon', norm_weight_decay=False), [None, 1.])])
def test_weight_decay_by_hand(settings, left):
    "A step without a gradient: what is left of a filter and of a batch norm's scale."
    model = filters_and_scale()
    before = [p.detach().clone() for p in model]
    for p in model: p.grad = torch.zeros_like(p)
    make_optimizer(model, TrainConfig(**dict(lr=0.1, weight_decay=0.5, momentum=0.9) | settings)).step()
    for p, old, share in zip(model, before, left):
        if share is not None: assert torch.allclose(p, share*old, atol=1e-6)


@pytest.mark.parametrize('precision, dtype', [('fp32', torch.float32), ('bf16', torch.bfloat16), ('auto', torch.float32)])
def test_muon_multiplies_in_the_runs_precision(monkeypatch, precision, dtype):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict, raising=False) # a CPU without bf16
    config = replace(CONFIG, optimizer='Muon', precision=precision)
    assert new_state(nn.Linear(3, 2), config, 5).optimizer.dtype==dtype


def plan(name, **settings): return lr_plan(TrainConfig(lr_scheduler=name, **settings), steps_per_epoch=10)


def test_schedules_by_hand():
    assert plan('CosineAnnealingLR')==pytest.approx([0.001*(1 + math.cos(math.pi*e/20))/2 for e in range(20)])
    trap = plan('CosineAnnealingLR', t_max=10)
    assert trap[10]==pytest.approx(0, abs=1e-12) and trap[19]==pytest.approx(9.76e-4, abs=1e-6)
    assert plan('StepLR', step_size=5)==pytest.approx([0.001*0.1**(e//5) for e in range(20)])
    assert plan('none')==[0.001]*20
    warmup = [0.001*(50*e/250 + 1/50) if e < 5 else 0.001 for e in range(6)] # 50 steps up
    assert plan('LinearWarmupCosine', pct_start=0.25)[:6]==pytest.approx(warmup)
    rise = [0.001/25, 0.001/25 + 0.001*(24/25)*10/49] # from 1/25, linear over steps 0 … 49
    assert plan('OneCycleLR', pct_start=0.25)[:2]==pytest.approx(rise)


@pytest.mark.parametrize('name', BY_BATCH)
@pytest.mark.parametrize('epochs, steps', [(1, 1), (1, 2), (2, 1), (3, 5), (4, 4)])
def test_short_runs_have_schedules_too(name, epochs, steps):
    for pct_start in (0.01, 0.25, 0.5, 0.99):
        rates = lr_plan(TrainConfig(lr_scheduler=name, num_epochs=epochs, pct_start=pct_start), steps)
        assert len(rates)==epochs and all(0 <= rate <= 0.001 + 1e-12 for rate in rates)


def test_a_schedules_state_holds_no_function():
    "Or no checkpoint could hold it."
    config = replace(CONFIG, lr_scheduler='LinearWarmupCosine')
    state = make_scheduler(make_optimizer(nn.Linear(2, 2), config), config, 5).state_dict()
    assert state['lr_lambdas']==[None] and not any(map(callable, state.values()))


class Recorder:
    def __init__(self): self.models = []
    def after_step(self, state): self.models.append(copy.deepcopy(state.model))


def with_counts(): # a batch norm counts its batches: no number to average
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def test_the_average_by_hand():
    rng = torch.Generator().manual_seed(0)
    data = [(torch.randn(5, 4, generator=rng), torch.randint(0, 3, (5,), generator=rng)) for _ in range(3)]
    model = with_counts()
    ema, recorder = EMA(model, 0.9), Recorder()
    state = fit(model, data, data, replace(CONFIG, optimizer='SGD'), [ema, recorder])
    assert state.eval_model is ema.average and ema.steps==6
    for key, value in ema.average.state_dict().items():
        steps = [m.state_dict()[key] for m in recorder.models]
        by_hand = steps[0] # the first step's weights start the average
        for step in steps[1:]: by_hand = 0.9*by_hand + 0.1*step if step.is_floating_point() else step
        assert torch.allclose(value, by_hand, atol=1e-6), key
    assert torch.equal(state.model[0].weight, recorder.models[-1][0].weight)


def test_an_average_is_saved_and_resumed():
    model = with_counts()
    ema = EMA(model, 0.5)
    data = [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))]
    fit(model, data, None, CONFIG, [ema])
    twin = EMA(with_counts(), 0.5)
    twin.load_state_dict(ema.state_dict())
    assert twin.steps==2 and all(map(torch.equal, twin.average.state_dict().values(), ema.average.state_dict().values()))
