"Muon, weight decay, schedules and the averaged weights."
import copy
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from resnet_cifar.config import RECIPES, TrainConfig
from resnet_cifar.data import BatchLoader, sample_cifar10
from resnet_cifar.models import create_model
from resnet_cifar.optimizers import (
    BY_BATCH, EMA, Muon, lr_plan, make_optimizer, make_scheduler, orthogonalize, parameter_groups)
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
    Muon(model, lr=0.1, momentum=0.6, weight_decay=0.5).step()
    torch.optim.Muon([matrix], lr=0.1, momentum=0.6, weight_decay=0, ns_steps=3).step()
    scale.data *= 0.95 # what a rate of 0.1 and a decay of 0.5 leave
    torch.optim.SGD([scale], lr=0.1, momentum=0.6, nesterov=True).step()
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


@pytest.mark.parametrize('name', list(RECIPES))
def test_each_kind_of_parameter_moves(name):
    """In two epochs on the sample with a recipe's rates: filters and head by a good part of their length, biases by
    tenths of a standard deviation. (Once the biases had a tenth of the filters' rate, and moved by a thousandth.)"""
    recipe, sample = RECIPES[name], sample_cifar10()
    config = dataclasses.replace(recipe, batch_size=100, num_epochs=2, precision='fp32')
    torch.manual_seed(0)
    net = create_model(recipe.model_name, width=8)
    before = copy.deepcopy(parameter_groups(net))
    fit(net, BatchLoader(sample.train_images, sample.train_labels, 100, train=True), None, config)
    moved = {}
    for kind, group in parameter_groups(net).items():
        new, old = (torch.cat([p.detach().flatten() for p in params]) for params in (group, before[kind]))
        moved[kind] = ((new - old).norm()/(len(new)**0.5 if kind=='biases' else old.norm())).item()
    assert moved['filters'] > 0.1 and moved['head'] > 0.03 and 0.05 < moved['biases'] < 3 and moved['scales']==0, moved


def test_groups_by_what_they_do():
    "A convolution with a bias, a batch norm, a classifier, a frozen filter, and a module of one's own."
    class Own(nn.Module):
        def __init__(self): super().__init__(); self.weight, self.gain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    frozen = nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), frozen, Own())
    names = {id(p): name for name, p in net.named_parameters()}
    assert {kind: [names[id(p)] for p in group] for kind, group in parameter_groups(net).items()}==dict(
        filters=['0.weight'], scales=['1.weight', '4.weight'], biases=['0.bias', '1.bias', '4.gain'], head=['2.weight', '2.bias'])


@pytest.mark.parametrize('settings, rates', [
    (dict(), dict(filters=0.1, biases=5.3, head=0.01)),
    (dict(bias_lr=2.0, scale_lr=3.0, head_lr=0.5), dict(filters=0.1, scales=3.0, biases=2.0, head=0.5))])
def test_rates_and_decays_of_the_groups(settings, rates):
    "Of batches of 100; a step at the peak takes away the same share of all but the filters."
    net = create_model('resnet10', width=8)
    config = TrainConfig(optimizer='Muon', lr=0.1, batch_size=100, weight_decay=0.02, precision='fp32', **settings)
    groups, kinds = make_optimizer(net, config).param_groups, parameter_groups(net)
    assert [group['lr'] for group in groups]==pytest.approx(list(rates.values()))
    assert [group['params'] for group in groups]==[kinds[kind] for kind in rates]
    assert [group['lr']*group['weight_decay'] for group in groups]==pytest.approx([0.0] + [0.02]*(len(rates) - 1))
    without = make_optimizer(net, dataclasses.replace(config, norm_weight_decay=False)).param_groups
    assert [group['weight_decay'] > 0 for group in without]==[kind=='head' for kind in rates]
    scheduler = make_scheduler(make_optimizer(net, config), dataclasses.replace(config, lr_scheduler='OneCycleLR', num_epochs=1), 10)
    for _ in range(3): scheduler.optimizer.step(), scheduler.step()
    assert [group['lr'] for group in scheduler.optimizer.param_groups]==pytest.approx([rate*scheduler.get_last_lr()[0]/0.1 for rate in rates.values()])
