"Weights from anywhere, and from nowhere good; networks out and in again; ONNX."
import io
import json
import pickle
import runpy
import shutil
import sys
import warnings
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn

from conftest import ROOT
from resnet_cifar import export, weights
from resnet_cifar.blocks import BasicBlock, Bottleneck, PoolBlock
from resnet_cifar.checkpoint import load_checkpoint, save_checkpoint, state_digest
from resnet_cifar.data import BatchLoader, load_cifar10, sample_cifar10
from resnet_cifar.evaluation import evaluate
from resnet_cifar.facts import Facts, facts_of
from resnet_cifar.models import Architecture, ResNet, create_model, list_models
from resnet_cifar.weights import (
    export_onnx, from_pretrained, load_model, load_weights, notes_of, read_file, save_pretrained, save_weights, shipped_weights, state_dict_of,
)

FAMILIES = ['resnet18', 'resnet50', 'resnet20', 'plain18', 'resnet10'] # of each kind one; the others are long
ALL = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.long) for name in list_models()]


def as_if_trained(net):
    "Running statistics as after training: those of a new network hide a batch norm that is left out."
    rng = torch.Generator().manual_seed(1)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=rng)
            m.running_var.uniform_(0.5, 1.5, generator=rng)
            m.num_batches_tracked.fill_(7)
    return net.eval()


def thin(name, num_classes=10, **options):
    torch.manual_seed(0)
    return as_if_trained(create_model(name, num_classes, width=2, **options))


def difference(net, other, size=32):
    "Largest difference of the logits, relative to the largest one."
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = net(images), other(images)
    return ((a - b).abs().max()/b.abs().max()).item()


# ---------------------------------------------------------------- other people's files

@pytest.mark.parametrize('name', ['resnet18', *(pytest.param(f'resnet{depth}', marks=pytest.mark.long) for depth in (34, 50, 101, 152))])
@pytest.mark.parametrize('library', ['torchvision', 'timm'])
def test_file_of_a_library(library, name, tmp_path):
    "With the stem for CIFAR, and as it comes: the file alone is enough."
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=10) if library=='torchvision' else timm.create_model(name, num_classes=10)
    for stem in ('imagenet', 'cifar'):
        if stem=='cifar': net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        torch.save(as_if_trained(net).state_dict(), tmp_path/'theirs.pth')
        ours = load_model(tmp_path/'theirs.pth')
        assert str(ours.architecture).startswith(f'{name} with 10 classes') and ours.architecture.stem==stem
        assert difference(ours, net, size=64 if stem=='imagenet' else 32) < 1e-5


class PytorchCifarBlock(nn.Module):
    "A basic block under pytorch-cifar's names, written for this test."
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        same = stride==1 and c_in==c_out
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x): return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class PytorchCifarResNet18(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        for i in range(4):
            c, stride = width*2**i, 2 if i else 1
            setattr(self, f'layer{i + 1}', nn.Sequential(PytorchCifarBlock(c//stride, c, stride), PytorchCifarBlock(c, c, 1)))
        self.linear = nn.Linear(8*width, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for i in range(4): x = getattr(self, f'layer{i + 1}')(x)
        return self.linear(nn.functional.avg_pool2d(x, 4).flatten(1))


def test_file_of_pytorch_cifar(tmp_path):
    torch.manual_seed(0)
    net = as_if_trained(PytorchCifarResNet18())
    assert 'layer2.0.shortcut.0.weight' in net.state_dict() and 'linear.bias' in net.state_dict()
    torch.save({'net': nn.DataParallel(net).state_dict(), 'acc': 95.0, 'epoch': 199}, tmp_path/'ckpt.pth')
    assert difference(load_model(tmp_path/'ckpt.pth'), net) < 1e-5
    assert difference(create_model('resnet18', width=8, weights=tmp_path/'ckpt.pth').eval(), net) < 1e-5


@given(st.lists(st.sampled_from(['_orig_mod', 'module']), max_size=4), st.booleans())
@settings(deadline=None, max_examples=30)
def test_wrappers_in_any_order(wrappers, is_averaged):
    net = thin('resnet20')
    wrapped = {'.'.join([*wrappers, key]): value for key, value in net.state_dict().items()}
    if is_averaged: wrapped['.'.join([*wrappers, 'n_averaged'])] = torch.tensor(3)
    assert state_digest(load_weights(create_model('resnet20', width=2), wrapped))==state_digest(net)


def test_wrapped_models():
    net, averaged = thin('resnet20'), torch.optim.swa_utils.AveragedModel
    compiled, parallel = torch.compile(net), nn.DataParallel(net)
    for wrapped in (compiled, parallel, torch.compile(parallel), averaged(compiled), nn.DataParallel(averaged(net))):
        assert state_dict_of(wrapped.state_dict()).keys()==net.state_dict().keys()
    for wrapped in (compiled, parallel, torch.compile(parallel)): # and the other way round
        fresh = create_model('resnet20', width=2)
        assert load_weights(wrapped, fresh.state_dict()) is wrapped
        assert net.fc.weight.equal(fresh.fc.weight)


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('options', [{}, dict(shortcut='C', num_classes=3), dict(stem='imagenet', shortcut='A')])
def test_shapes_tell_the_network(name, options):
    if name=='resnet10': options = {key: value for key, value in options.items() if key!='stem'} # its blocks are told by its own stem
    net = thin(name, **options)
    found = weights._likely(state_dict_of(dict(state_dict=net.state_dict(), epoch=3)))
    if name=='resnet10' and options.get('shortcut')=='A': net = thin(name) # in its blocks A and B are the same
    assert net.architecture in found and len(found)==(1 if net.architecture.shortcut=='C' or net.architecture.shortcut=='B' and net.num_stages==4 else 2)


def test_shapes_tell_widths_of_each_stage():
    "A bare state dict of resnet10 at full width, whose stages do not double."
    net = create_model('resnet10')
    assert weights._likely(state_dict_of(net.state_dict()))[0]==net.architecture
    for shape in ((), (3,)): # what a file may also hold
        state = net.state_dict() | {'layer2.0.conv1.weight': torch.zeros(shape)}
        assert weights._likely(state_dict_of(state))==[]


def test_what_a_file_may_also_hold(tmp_path):
    "Old files do not count batches; half precision, parameters, order and company do not matter."
    net = thin('resnet18')
    state = net.state_dict()
    uncounted = {key: value for key, value in state.items() if 'num_batches' not in key}
    loaded = load_weights(thin('resnet18', num_classes=10), uncounted)
    assert loaded.bn1.num_batches_tracked.item()==0 and loaded.fc.weight.equal(net.fc.weight)
    parameters = OrderedDict(reversed([*state.items(), *net.named_parameters()]))
    for content in (parameters, dict(state_dict=state, epoch=torch.tensor(3), args=dict(lr=0.1)), dict(model=None, net=state, model_state_dict='x')):
        torch.save(content, tmp_path/'x.pth')
        assert state_digest(load_model(tmp_path/'x.pth'))==state_digest(net)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        safetensors.torch.save_file(cast, tmp_path/'x.safetensors')
        loaded = load_model(tmp_path/'x.safetensors')
        assert loaded.fc.weight.dtype==torch.float32 and loaded.fc.weight.equal(cast['fc.weight'].float())


def test_averaged_weights_come_first(tmp_path):
    plain, averaged = thin('resnet18'), as_if_trained(create_model('resnet18', width=2))
    for name in ('averaged', 'state_dict_ema'):
        for other in ('model', 'state_dict'):
            torch.save({other: plain.state_dict(), name: averaged.state_dict()}, tmp_path/'x.pth')
            assert state_digest(load_model(tmp_path/'x.pth'))==state_digest(averaged)


@pytest.mark.parametrize('theirs', [dict(block='x'), dict(name='ResNet18', depth=18), 'resnet18', 18, [1], dict(architecture=None), {1: torch.zeros(2)}])
def test_somebody_elses_architecture_is_ignored(theirs, tmp_path):
    net = thin('resnet18', num_classes=4)
    torch.save(dict(model=net.state_dict(), architecture=theirs, classes=['a']), tmp_path/'x.pth')
    loaded = load_model(tmp_path/'x.pth')
    assert loaded.architecture==net.architecture and facts_of(loaded).classes==('0', '1', '2', '3')
    assert state_digest(load_weights(create_model('resnet18', 4, width=2), tmp_path/'x.pth'))==state_digest(net)


def test_a_noted_network_is_believed_before_its_shapes():
    "A plain network's weights fit into a residual one, and would give nonsense there."
    plain = thin('plain20')
    content = dict(model=plain.state_dict()) | notes_of(plain)
    assert weights.model_from(content).architecture==plain.architecture
    with pytest.raises(ValueError, match=r'it was saved from plain20 with 10 classes, width 2 \(1 in all\)'): load_weights(thin('resnet20'), content)
    with pytest.raises(ValueError, match='is of resnet20 with 10 classes, width 2 or plain20 with 10 classes, width 2'): weights.model_from(plain.state_dict())


# ---------------------------------------------------------------- files that are no good

class Bomb:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (self.mark, 'w')


def raw_of(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def odd_values():
    "What a pickle may hold without being code, and what is no state dict all the same."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # PyTorch calls nested and sparse tensors a prototype
        square, net = torch.ones(2, 2), thin('resnet20')
        nested = torch.nested.nested_tensor([square, square])
    inside = dict(model=square, net=3, averaged=None, state_dict=[net.state_dict()])
    loop = {}
    loop['model'] = loop
    key = 'fc.weight'
    needed = [f'{name}.weight' for name in ('conv1', 'fc', 'layer1.0.conv1')] # to tell a network by
    return dict(
        tensor=square, parameter=nn.Parameter(square), number=3, nothing=None, text='model.pt', bytes=b'x', size=torch.Size([3]), dtype=torch.float32,
        list=[net.state_dict()], tuple=(square,), set={1}, empty={}, loop=loop, inside=inside, keys={1: square, None: square, ('fc', 'weight'): square},
        sparse={key: square.to_sparse()}, meta={key: square.to('meta')}, nested={key: nested}, complex={key: square.to(torch.complex64)},
        bool={key: square > 0}, scalar=dict.fromkeys(needed, torch.tensor(1.)),
        hostile=dict.fromkeys([*needed, *(f'layer1.{i}.x' for i in range(2000))], square))


def bad_files(folder):
    "name -> bytes. Every one of them is given to every reader."
    good, mark = dict(format=3, model=thin('resnet20').state_dict()), str(folder/'exploded')
    save_checkpoint(folder/'good', good)
    sealed, unsealed, safe = (folder/'good').read_bytes(), raw_of(good), safetensors.torch.save(good['model'])
    save_checkpoint(folder/'good', dict(format=99, model={'fc.weight': torch.ones(2)}))
    future = (folder/'good').read_bytes()
    (folder/'good').unlink()
    layers = dict(block='BasicBlock', layers=[10**9]*3, num_classes=10, width=16, shortcut='A', stem='cifar')
    notes = json.dumps(dict(architecture=layers) | Facts().to_dict())
    header = json.dumps({'__metadata__': {'resnet_cifar': notes}, 'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}}).encode()
    lists = json.dumps({'__metadata__': {'resnet_cifar': '[1]'}}).encode()
    photo = b'\xff\xd8\xff\xe0\x00\x10JFIF' + bytes(999)
    flipped = bytearray(sealed)
    flipped[len(flipped)//3] ^= 16
    damaged = {
        'empty.ckpt': b'', 'text.ckpt': b'these are no weights', 'photo.ckpt': photo, 'zip.ckpt': b'PK\x05\x06' + bytes(18), 'head.ckpt': sealed[:100],
        'half.ckpt': sealed[:len(sealed)//2], 'flipped.ckpt': bytes(flipped), 'halfweights.pth': unsealed[:-100],
        'future.ckpt': future, 'list.ckpt': raw_of([good])}
    bombs = {
        'bomb_top.ckpt': raw_of(Bomb(mark)), 'bomb_nested.ckpt': raw_of(dict(good, x=[dict(y=Bomb(mark))])), 'bomb_pickle.ckpt': pickle.dumps(Bomb(mark)),
        'bomb_old.ckpt': raw_of(Bomb(mark), _use_new_zipfile_serialization=False), 'bomb_model.pt': raw_of(dict(model=nn.Linear(2, 2)))}
    others = {
        'empty': b'', 'photo': photo, 'half': safe[:len(safe)//2], 'header': b'\xff'*8 + b'{' + bytes(99),
        'brace': (50).to_bytes(8, 'little') + b'{' + bytes(49),
        'text': b'these are no weights', 'hostile': len(header).to_bytes(8, 'little') + header + bytes(4), 'list': len(lists).to_bytes(8, 'little') + lists}
    odd = {f'odd_{name}.pt': raw_of(value) for name, value in odd_values().items()}
    return damaged | bombs | {f'{name}.safetensors': raw for name, raw in others.items()} | odd


READERS = dict(load_model=load_model, load_weights=lambda path: load_weights(create_model('resnet20', width=3), path),
               create_model=lambda path: create_model('resnet18', width=2, weights=str(path)), load_checkpoint=load_checkpoint)


def test_bombs_and_odd_files(tmp_path):
    "One line that names the file, from every reader; nothing is run, nothing is written, and no other file is read in its place."
    files = bad_files(tmp_path)
    for name, raw in files.items():
        (tmp_path/name).write_bytes(raw)
        for reader, read in READERS.items():
            with pytest.raises(ValueError) as caught: read(tmp_path/name)
            said = str(caught.value)
            assert said.startswith(str(tmp_path/name)) and '\n' not in said and len(said) < 500, f'{reader}: {said}'
        if name.startswith('bomb'):
            with pytest.raises(ValueError, match='holds more than weights, and nothing in it was run|is damaged'): read_file(tmp_path/name)
    assert sorted(path.name for path in tmp_path.iterdir())==sorted(files)


@pytest.mark.parametrize('value', odd_values().values(), ids=odd_values())
def test_odd_values_without_a_file(value):
    net = thin('resnet20')
    digest = state_digest(net)
    if not isinstance(value, str): # a text is the name of a file
        with pytest.raises(ValueError, match='the state dict (holds no state dict, only a|does not fit resnet20)'): load_weights(net, value)
    with pytest.raises(ValueError, match='the source (holds no state dict|is of no network)'): weights.model_from(value)
    assert state_digest(net)==digest


def test_a_wrong_bit_is_noticed_by_every_reader(tmp_path):
    net = thin('resnet18')
    save_checkpoint(tmp_path/'best.ckpt', dict(format=3, model=net.state_dict()) | notes_of(net))
    for read in READERS.values():
        if read is not READERS['load_weights']: read(tmp_path/'best.ckpt')
    raw = bytearray((tmp_path/'best.ckpt').read_bytes())
    raw[len(raw)//2] ^= 1
    (tmp_path/'best.ckpt').write_bytes(raw)
    for path in (tmp_path/'best.ckpt', tmp_path):
        for read in READERS.values():
            with pytest.raises(ValueError, match='best.ckpt is damaged: its SHA-256'): read(path)


def test_a_damaged_last_file_of_a_run(tmp_path, capsys):
    nets = {name: as_if_trained(create_model('resnet18', width=2)) for name in ('best', 'last', 'previous')}
    for name in ('previous', 'last', 'best'):
        save_checkpoint(tmp_path/f'{name}.ckpt', dict(format=3, model=nets[name].state_dict()) | notes_of(nets[name]))
    def loaded(path): return next((name for name, net in nets.items() if state_digest(net)==state_digest(load_model(path))), None)
    assert [loaded(tmp_path), *(loaded(tmp_path/f'{name}.ckpt') for name in nets)]==['best', 'best', 'last', 'previous'] and capsys.readouterr().out==''
    (tmp_path/'last.ckpt').write_bytes((tmp_path/'last.ckpt').read_bytes()[:-100])
    (tmp_path/'best.ckpt').unlink()
    capsys.readouterr()
    load_model(tmp_path)
    assert capsys.readouterr().out.count('\n')==1
    assert loaded(tmp_path)==loaded(tmp_path/'last.ckpt')=='previous' and (tmp_path/'last.ckpt').exists()
    (tmp_path/'previous.ckpt').write_bytes(b'')
    with pytest.raises(ValueError, match='previous.ckpt is damaged'): load_model(tmp_path)


def test_nothing_large_is_built_for_a_description(tmp_path):
    "A network of 400 GB costs no memory: its weights do not fit."
    huge = Architecture('Bottleneck', (3, 3, 3, 3), 10**6, 4096, 'C', 'imagenet')
    with pytest.raises(ValueError, match=r'x does not fit .* is missing'):
        weights.model_from(dict(model={'fc.weight': torch.zeros(2)}, architecture=huge.to_dict()) | Facts(classes=tuple(map(str, range(10**6)))).to_dict(), 'x')


# ---------------------------------------------------------------- out and in again

@pytest.mark.parametrize('name', ALL)
def test_pretrained_round_trip(name, tmp_path):
    net = thin(name, num_classes=3)
    net.pretrained_cfg = Facts(('cat', 'dog', 'yak'), mean=(0.1, 0.2, 0.3), image_size=48).to_dict()
    save_pretrained(net.to(memory_format=torch.channels_last), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir())==['config.json', 'model.safetensors']
    for back in (from_pretrained(tmp_path), load_model(tmp_path/'model.safetensors'), create_model(name, 3, width=2, weights=tmp_path)):
        assert state_digest(back)==state_digest(net) and back.architecture==net.architecture
    assert notes_of(net)==dict(architecture=net.architecture.to_dict()) | net.pretrained_cfg
    assert json.loads((tmp_path/'config.json').read_text())==dict(library='resnet_cifar') | notes_of(net)
    assert facts_of(from_pretrained(tmp_path))==facts_of(net) and not from_pretrained(tmp_path).training
    save_pretrained(from_pretrained(tmp_path), tmp_path/'again')
    for file in ('config.json', 'model.safetensors'): assert (tmp_path/'again'/file).read_bytes()==(tmp_path/file).read_bytes()
    save_weights(torch.compile(net), tmp_path/'compiled.safetensors')
    assert (tmp_path/'compiled.safetensors').read_bytes()==(tmp_path/'model.safetensors').read_bytes()


def test_a_model_that_was_changed_is_not_saved(tmp_path):
    head, block = thin('resnet20'), ResNet(type('OwnBlock', (BasicBlock,), {}), (1, 1, 1), width=2)
    head.fc = nn.Linear(8, 3)
    for net in (head, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f'{type(net).__name__} is no ResNet as it was built'): save_weights(net, tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match='OwnBlock'): save_weights(block, tmp_path/'x.safetensors')
    assert list(tmp_path.iterdir())==[]


def test_a_written_file_may_be_read_by_whom_the_folder_says(tmp_path):
    "As any other new file: the web server, or a colleague in the same group, reads weights too."
    (tmp_path/'plain').write_text('as the umask says')
    save_pretrained(thin('resnet20'), tmp_path)
    save_checkpoint(tmp_path/'a.ckpt', dict(format=3))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()})==1


# ---------------------------------------------------------------- ONNX

@pytest.mark.parametrize('block, options', [(Bottleneck, dict(shortcut='A', stem='imagenet')), (PoolBlock, dict(stem='patch'))]) # the chapter has basic blocks
def test_onnx(block, options, tmp_path):
    "The file against the model for batches of other sizes, by a session of our own; it names no folder of this machine."
    import onnxruntime
    torch.manual_seed(0)
    net = as_if_trained(ResNet(block, (1, 1, 1), width=8, **options)).train()
    digest = state_digest(net)
    assert 0 <= export_onnx(net, tmp_path/'net.onnx') < 1e-5
    assert net.training and state_digest(net)==digest
    session = onnxruntime.InferenceSession(tmp_path/'net.onnx')
    for n in (1, 3, 8):
        images = torch.rand(n, 3, 32, 32)
        with torch.no_grad(): expected = net.eval()(images)
        logits = torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])
        assert ((logits - expected).abs().max()/expected.abs().max()).item() < 1e-5
    assert json.loads(session.get_modelmeta().custom_metadata_map['resnet_cifar'])==notes_of(net)
    assert b'site-packages' not in (tmp_path/'net.onnx').read_bytes() and b'resnet_cifar/' not in (tmp_path/'net.onnx').read_bytes()


def test_onnx_that_differs_is_not_written(tmp_path, monkeypatch):
    class Program:
        def __call__(self, images): return [torch.zeros(len(images), 10)]
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: Program())
    net = thin('resnet20')
    with pytest.raises(RuntimeError, match='net.onnx was not written: it differs by 1.0e'): export_onnx(net, tmp_path/'net.onnx')
    net.fc.bias.data.fill_(float('nan'))
    with pytest.raises(RuntimeError, match='it differs by nan'): export_onnx(net, tmp_path/'net.onnx')
    monkeypatch.setattr(export.importlib.util, 'find_spec', lambda name: None if name=='onnxscript' else name)
    with pytest.raises(ImportError, match=r"ONNX needs onnxscript: pip install 'resnet_cifar\[export\]'"): export_onnx(net, tmp_path/'net.onnx')
    assert list(tmp_path.iterdir())==[]


# ---------------------------------------------------------------- what ships

def test_shipped_weights_on_the_sample():
    "The network in the README: 500 test images, of which the recorded run's accuracy leaves about 40 wrong."
    data, model = sample_cifar10(), create_model('resnet20', weights='DEFAULT')
    assert evaluate(model, BatchLoader(data.test_images, data.test_labels, 500)).accuracy > 0.88
    assert state_digest(load_model('DEFAULT'))==state_digest(model)==state_digest(load_model(shipped_weights('resnet20')))
    with pytest.raises(ValueError, match="weights='DEFAULT': none of resnet18 ship with the package"): create_model('ResNet18', weights='DEFAULT')


@pytest.mark.long
def test_shipped_weights_on_all_test_images(cifar10_root):
    "They are half as precise as those of the recorded run, and classify as many test images correctly, but for five in ten thousand."
    data, model = load_cifar10(cifar10_root), create_model('resnet20', weights='DEFAULT')
    num_correct = evaluate(model, BatchLoader(data.test_images, data.test_labels, 500)).accuracy*10_000
    record = json.loads((ROOT/'nbs'/'runs'/'resnet20.json').read_text())
    assert abs(num_correct - record['result']['test_accuracy']*10_000) <= 5


def test_shipping_a_run(tmp_path, monkeypatch):
    "From a run folder with those weights comes the file that is there, byte for byte."
    net = create_model('resnet20', weights='DEFAULT')
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'config.json').write_text('{"model_name": "ResNet20"}')
    save_checkpoint(tmp_path/'run'/'best.ckpt', dict(format=3, model=net.state_dict()) | notes_of(net))
    for folder in ('tests', 'resnet_cifar'): (tmp_path/folder).mkdir()
    shutil.copy(ROOT/'tests'/'ship_weights.py', tmp_path/'tests')
    monkeypatch.setattr(sys, 'argv', ['ship_weights.py', str(tmp_path/'run')])
    runpy.run_path(str(tmp_path/'tests'/'ship_weights.py'))
    file = 'resnet_cifar/weights/resnet20.safetensors'
    assert (tmp_path/file).read_bytes()==(ROOT/file).read_bytes()
