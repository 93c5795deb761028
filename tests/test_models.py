"Networks against other people's, and one property for every architecture."
import copy
import inspect
import json
import runpy

import pytest
import timm
import torch
import torchvision
from torch import nn

from conftest import ROOT
from resnet_cifar import models
from resnet_cifar.blocks import BasicBlock, PoolBlock
from resnet_cifar.config import MODELS
from resnet_cifar.cost import summary
from resnet_cifar.models import (
    Architecture, create_model, list_models, register, ResNet, whiten_stem,
)

BIG = ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152']
SMALL = ['resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110']
DEEP = ('101', '152', '110') # more of the same blocks
NETWORKS = [pytest.param(name, marks=pytest.mark.long) if name.endswith(DEEP) else name for name in list_models()]
OPTIONS = [('resnet18', 'A'), ('resnet18', 'C'), ('resnet50', 'A'), ('resnet50', 'C'), ('resnet20', 'B'), ('resnet20', 'C')]
TOLERANCE = {'resnet': dict(channels_last=1e-5, export=1e-5, compile=1e-5, bf16=0.1), # of the largest logit; bf16 keeps 8 bits of each layer's result
             'plain': dict(channels_last=1e-4, export=1e-5, compile=1e-4, bf16=0.2)}   # without shortcuts every layer magnifies the rounding before it


def theirs(library, name):
    "torchvision's or timm's network with the stem for CIFAR."
    net = getattr(torchvision.models, name)(num_classes=10) if library=='torchvision' else timm.create_model(name, num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def normal_statistics(net):
    "Running statistics as after training: at initialisation they hide a batch norm that is left out."
    generator = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 1.5, generator=generator)
    return net


def thin(name, seed=0, **options):
    "A network of full depth and little width, in evaluation mode, as if it had been trained: logits of a size that is worth comparing."
    torch.manual_seed(seed)
    net = create_model(name, width=8, **options)
    net(torch.randn(16, 3, 32, 32)) # running statistics begin to follow the data
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = None
    for _ in range(2): net(torch.randn(16, 3, 32, 32))
    return net.eval()


def difference(ours, theirs):
    "Largest difference, relative to the largest logit."
    return ((ours.float() - theirs.float()).abs().max()/theirs.abs().max()).item()


def num_parameters(net): return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize('name', [name for name in NETWORKS if getattr(name, 'values', [name])[0] in BIG])
def test_same_logits(library, name):
    "Weights go from there to here, and from here to there."
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for source, target in ((create_model(name), theirs(library, name)), (theirs(library, name), create_model(name))):
        target.load_state_dict(normal_statistics(source).state_dict())
        with torch.no_grad(): assert difference(source.eval()(x), target.eval()(x)) < 1e-5


def test_parameter_counts():
    "ResNet-18 … 152 as torchvision counts them, less what stem and classifier differ by; 20 … 110 by the paper's table 6."
    for name, imagenet in zip(BIG, (11_689_512, 21_797_672, 25_557_032, 44_549_160, 60_192_808)): # torchvision's documentation
        features = 512 if name in ('resnet18', 'resnet34') else 2048
        with torch.device('meta'): assert num_parameters(create_model(name))==imagenet - 3*64*(7*7 - 3*3) - (features + 1)*(1000 - 10)
    for name, counted in zip(SMALL, (269_722, 464_154, 658_586, 853_018, 1_727_962)):
        with torch.device('meta'): nets = [create_model(n) for n in (name, name.replace('resnet', 'plain'))]
        assert [num_parameters(net) for net in nets]==[counted]*2
        assert nets[0].state_dict().keys()==nets[1].state_dict().keys()


@pytest.mark.parametrize('name', NETWORKS)
def test_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    net = create_model(name, width=8)
    nn.functional.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max()==0]==[]


@pytest.mark.parametrize('name', NETWORKS)
def test_modes_differ_only_in_batch_norm(name):
    net, x = thin(name), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        evaluated, trained = net(x), copy.deepcopy(net).train()(x)
        for m in net.train().modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
        assert torch.equal(net(x), evaluated) and not torch.equal(trained, evaluated)


@pytest.mark.parametrize('name', NETWORKS)
def test_sizes_and_classes(name):
    net = thin(name, num_classes=7)
    for size in (32, 33, 64):
        with torch.no_grad(): logits, maps = net(torch.randn(2, 3, size, size)), net.forward_features(torch.randn(1, 3, size, size))
        assert logits.shape==(2, 7) and logits.isfinite().all()
        if name=='resnet10': assert maps.shape[2]==(size - 1)//8             # a pixel less after the stem, then halved by each stage, rounded down
        else: assert maps.shape[2]==-(-size//2**(net.num_stages - 1))       # halved once a stage after the first, rounded up
        assert summary(net, size)[-4].output_shape==maps.shape[1:]          # before pooling, fc and the total


EXAMPLES = ('resnet10', 'resnet18', 'resnet20', 'plain20', 'resnet50')

@pytest.mark.parametrize('name', [n if n in EXAMPLES else pytest.param(n, marks=pytest.mark.long) for n in list_models()])
def test_other_ways_to_run(name):
    "Deep copy, memory format, autocast, `torch.export` and `torch.compile` keep the logits."
    net, x, family = thin(name), torch.randn(2, 3, 32, 32), name.rstrip('0123456789')
    torch._dynamo.reset()
    with torch.no_grad():
        logits = net(x)
        assert torch.equal(copy.deepcopy(net)(x), logits)
        found = dict(channels_last=copy.deepcopy(net).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)),
                     export=torch.export.export(net, (x,), dynamic_shapes=[{0: torch.export.Dim('batch')}]).module()(x))
        with torch.autocast('cpu', torch.bfloat16): found['bf16'] = net(x)
        found['compile'] = torch.compile(net, backend='aot_eager')(x) # generating code takes long, see below
    differences = {way: difference(value, logits) for way, value in found.items()}
    assert all(differences[way] <= limit for way, limit in TOLERANCE[family].items()), differences


@pytest.mark.long
@pytest.mark.parametrize('name', ['resnet10', *BIG, *SMALL])
def test_generated_code_keeps_the_logits(name):
    net, x = thin(name), torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    with torch.no_grad(): assert difference(torch.compile(net)(x), net(x)) <= 1e-5


@pytest.mark.parametrize('name', NETWORKS)
def test_built_on_meta(name):
    with torch.device('meta'): net = create_model(name)
    assert {p.device.type for p in (*net.parameters(), *net.buffers())}=={'meta'}
    real = create_model(name, width=8)
    with torch.device('meta'): twin = create_model(name, width=8)
    assert {k: v.shape for k, v in real.state_dict().items()}=={k: v.shape for k, v in twin.state_dict().items()}


@pytest.mark.parametrize('name, kind', OPTIONS)
def test_other_shortcuts(name, kind):
    net = thin(name, shortcut=kind)
    net.train()(torch.randn(4, 3, 33, 33)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max()==0]==[]


@pytest.mark.parametrize('name, width', [('resnet18', 64), ('resnet50', 64), ('resnet20', 16), ('plain20', 16), ('resnet152', 8)])
def test_activation_memory_by_hand(name, width):
    "A block must keep the outputs of its convolutions and of its ReLUs, which the next convolution needs too, and a projection's output for its batch norm."
    with torch.device('meta'): net = create_model(name, width=width)
    numbers, size = 3*32*32 + 2*width*32*32, 32 # the image; the stem's convolution and ReLU
    for i, count in enumerate(net.architecture.layers):
        channels = width*2**i
        for block in range(count):
            before, size = size, size//2 if i and not block else size
            if net.architecture.block=='BasicBlock':
                numbers += 4*channels*size**2
                projected = channels if net.architecture.shortcut=='B' and i and not block else 0
            else:
                numbers += 2*channels*before**2 + 2*channels*size**2 + 2*4*channels*size**2 # 1x1, 3x3, 1x1: the stride is in the middle
                projected = 4*channels if not block else 0
            numbers += projected*size**2
    assert summary(net)[-1].activation_bytes==4*(numbers + net.num_features) # the classifier keeps its input


def test_summary_of_another_module():
    "A small network worked out by hand; the model, its mode and its hooks are left alone."
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8*16, 5)).train()
    rows = summary(net, image_size=4)
    assert [row.name for row in rows]==['0', '1', '2', 'total']
    assert [row.output_shape for row in rows]==[(8, 4, 4), (128,), (5,), (5,)]
    assert [row.parameters for row in rows]==[8*27 + 8, 0, 5*128 + 5, 224 + 645]
    assert [row.macs for row in rows]==[27*8*16, 0, 128*5, 27*8*16 + 640]
    assert [row.activation_bytes for row in rows]==[4*48, 0, 4*128, 4*(48 + 128)]
    assert net.training and not net[0]._forward_hooks and net[0].weight.device.type=='cpu'
    with torch.no_grad(): assert summary(net, image_size=4)==rows # counted all the same


@pytest.mark.parametrize('name', NETWORKS)
def test_descriptions(name):
    "Each network is built again from what a file may hold of it."
    with torch.device('meta'): net = create_model(name, num_classes=7)
    values = json.loads(json.dumps(net.architecture.to_dict()))
    assert list(values)==['block', 'layers', 'num_classes', 'width', 'shortcut', 'stem'] # the bytes of saved files depend on this order
    with torch.device('meta'): twin = Architecture.from_dict(values).build()
    assert twin.architecture==net.architecture and hash(twin.architecture)==hash(net.architecture) and str(twin.architecture)==f'{name} with 7 classes'
    assert {k: v.shape for k, v in twin.state_dict().items()}=={k: v.shape for k, v in net.state_dict().items()}


def test_descriptions_in_words():
    unusual = Architecture('Bottleneck', (3, 4, 6, 3), num_classes=100, width=8, shortcut='C')
    assert str(unusual)=='resnet50 with 100 classes, width 8, shortcut C'
    assert str(Architecture('BasicBlock', (2, 2, 2, 2), stem='imagenet'))=='resnet18 with 10 classes, stem imagenet'


GOOD = Architecture('BasicBlock', (1, 1, 1)).to_dict()


NOT_WHOLE = ['resnet20', 3, 2.5, None, True, b'x', {}, [], torch.zeros(3), torch.tensor(1), {1: 2}, GOOD | dict(more=1),
             {name: value for name, value in GOOD.items() if name!='stem'}]
WRONG = dict(
    block=('Conv2d', ['BasicBlock'], None, 3), layers=(3, 'abc', [1, 1], [1]*5, [0, 1, 1], [10**9]*3, [1, 1, True], [1, 1, None], {1: 1}),
    num_classes=(0, -1, 10**30, True, 1.5, '64', None), width=(0, -1, 10**30, True, 1.5, '64', None), shortcut=('D', ['A'], 3), stem=('tiny', {}, None))


NOT_VALID = [GOOD | {name: value} for name, values in WRONG.items() for value in values]


@pytest.mark.parametrize('wrong', [*NOT_WHOLE, *NOT_VALID], ids=lambda value: ascii(value)[:60])
def test_what_describes_no_network_is_an_error(wrong):
    with pytest.raises(ValueError) as error: Architecture.from_dict(wrong)
    assert '\n' not in str(error.value) and len(str(error.value)) < 200


def test_a_block_of_ones_own():
    class OwnBlock(BasicBlock): pass
    net = ResNet(OwnBlock, [1, 1, 1], width=8)
    assert net.architecture==Architecture('OwnBlock', (1, 1, 1), width=8) and net(torch.randn(1, 3, 16, 16)).shape==(1, 10)
    with pytest.raises(ValueError, match='OwnBlock is no block of ours'): net.architecture.build()
    with pytest.raises(ValueError, match='describes no ResNet'): Architecture.from_dict(net.architecture.to_dict())


def test_names():
    assert list_models()==list(MODELS) # the command line's list, which needs no PyTorch
    assert create_model('ResNet18', width=8, num_classes=3).fc.weight.shape==(3, 64)
    assert create_model('resnet20', width=None).architecture.width==16
    with pytest.raises(ValueError, match="model 'resnt50': must be one of resnet18, resnet34"): create_model('resnt50')
    with pytest.raises(ValueError, match='model None'): create_model(None)
    with pytest.raises(TypeError, match='depth'): create_model('resnet18', depth=3)


def test_every_resnet_is_a_function():
    for name in [*BIG, *SMALL, 'resnet10']:
        function = getattr(models, name)
        assert list(inspect.signature(function).parameters)==['num_classes', 'weights', 'kwargs']
        assert function.__name__==name and function.__doc__.startswith(name) and name in models.__all__
    net = models.resnet20(7, shortcut='C', width=8, zero_init_residual=True)
    assert net.architecture==Architecture('BasicBlock', (3, 3, 3), 7, 8, 'C') and net.layer1[0].bn2.weight.abs().max()==0


def test_weights_by_name():
    net = models.resnet20(weights='DEFAULT')
    assert torch.equal(create_model('resnet20', weights=net.state_dict()).fc.weight, net.fc.weight)
    for name in ('resnet18', 'plain20'):
        with pytest.raises(ValueError, match=f'none of {name}'): create_model(name, weights='DEFAULT')


def test_a_network_of_ones_own(monkeypatch):
    monkeypatch.setattr(models, '_REGISTRY', dict(models._REGISTRY))
    @register
    def resnet14(): return Architecture('BasicBlock', (2, 2, 2), width=16, shortcut='A')
    assert num_parameters(resnet14())==172_506 and 'resnet14' in list_models() and str(create_model('resnet14').architecture)=='resnet14 with 10 classes'


def test_whitened_stem_by_hand():
    "Pixels of three independent channels with variances 4, 1 and 1/4: a filter of each, divided by the standard deviation."
    torch.manual_seed(0)
    images = torch.randn(500, 3, 8, 8)*torch.tensor([2, 1, 0.5]).view(3, 1, 1)
    net = ResNet(PoolBlock, (1, 1, 1), width=8, stem='patch')
    whiten_stem(net, images)
    filters = net.conv1.weight
    assert torch.equal(filters[12:], -filters[:12]) and not filters.requires_grad
    for first, channel, std in ((0, 0, 2), (4, 1, 1), (8, 2, 0.5)): # four filters a channel, the largest variance first
        energy = filters[first:first + 4].square().sum((2, 3)).mean(0)*std**2
        assert torch.allclose(energy, torch.eye(3)[channel], atol=0.05)
    assert torch.allclose(net.conv1(images).var((0, 2, 3)), torch.ones(24), atol=0.05)


def test_hub():
    entries = runpy.run_path(str(ROOT/'hubconf.py'))
    assert all(callable(entries[name]) for name in list_models())
    for name in ('resnet20', 'plain20', 'resnet10'):
        with torch.device('meta'): net = torch.hub.load(str(ROOT), name, source='local', num_classes=7)
        assert str(net.architecture)==f'{name} with 7 classes'
