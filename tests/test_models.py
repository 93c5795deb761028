"Networks against other people's, one property for every architecture, and weights in and out."
import copy
import json
import shutil
import subprocess
import sys
from hashlib import sha256

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import ROOT
from resnet_cifar import models
from resnet_cifar.checkpoint import checkpoint_of, export_onnx, from_pretrained, load_model, save_checkpoint, save_pretrained, state_digest
from resnet_cifar.config import TrainConfig
from resnet_cifar.models import ResNet, create_model, list_models, load_weights, state_dict_of, summary
from resnet_cifar.training import new_state

BIG = ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152']
OPTIONS = [('resnet18', kind) for kind in ('A', 'C')] + [('resnet50', kind) for kind in ('A', 'C')] + [('resnet20', kind) for kind in ('B', 'C')]
TOLERANCE = {'resnet': dict(channels_last=1e-5, export=1e-5, compile=1e-5, bf16=0.1), # of the largest logit; bf16 keeps 8 bits of each layer's result
             'plain': dict(channels_last=1e-4, export=1e-5, compile=1e-4, bf16=0.2)}   # without shortcuts every layer makes the rounding of those before it larger


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


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize('name', BIG)
def test_same_logits(library, name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for source, target in ((create_model(name), theirs(library, name)), (theirs(library, name), create_model(name))):
        state = normal_statistics(source).state_dict()
        load_weights(target, state) if isinstance(target, ResNet) else target.load_state_dict(state)
        with torch.no_grad(): assert difference(source.eval()(x), target.eval()(x)) < 1e-5


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
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
        for i, c in enumerate((64, 128, 256, 512)):
            setattr(self, f'layer{i + 1}', nn.Sequential(PytorchCifarBlock(c if i==0 else c//2, c, 1 if i==0 else 2), PytorchCifarBlock(c, c, 1)))
        self.linear = nn.Linear(512, 10)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for i in range(4): x = getattr(self, f'layer{i + 1}')(x)
        return self.linear(nn.functional.avg_pool2d(x, 4).flatten(1))


def test_pytorch_cifar_file_loads(tmp_path):
    torch.manual_seed(0)
    net, x = normal_statistics(PytorchCifarResNet18()), torch.randn(2, 3, 32, 32)
    assert 'layer2.0.shortcut.0.weight' in net.state_dict() and 'linear.bias' in net.state_dict()
    torch.save({'net': nn.DataParallel(net).state_dict(), 'acc': 95.0, 'epoch': 199}, tmp_path/'ckpt.pth')
    ours = models.resnet18(weights=tmp_path/'ckpt.pth').eval()
    with torch.no_grad(): assert difference(ours(x), net.eval()(x)) < 1e-5


def test_parameter_counts():
    "ResNet-18 … 152 as torchvision counts them, less what stem and classifier differ by; 20 … 110 by the paper's table 6."
    for name, imagenet in zip(BIG, (11_689_512, 21_797_672, 25_557_032, 44_549_160, 60_192_808)): # torchvision's documentation
        features = 512 if name in ('resnet18', 'resnet34') else 2048
        with torch.device('meta'): parameters = sum(p.numel() for p in create_model(name).parameters())
        assert parameters==imagenet - 3*64*(7*7 - 3*3) - (features + 1)*(1000 - 10)
    for name, counted in (('resnet20', 269_722), ('resnet32', 464_154), ('resnet44', 658_586), ('resnet56', 853_018), ('resnet110', 1_727_962)):
        with torch.device('meta'): nets = [create_model(n) for n in (name, name.replace('resnet', 'plain'))]
        assert [sum(p.numel() for p in net.parameters()) for net in nets]==[counted]*2


@pytest.mark.parametrize('name', list_models())
def test_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    net = create_model(name, width=8)
    nn.functional.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max()==0]==[]


@pytest.mark.parametrize('name', list_models())
def test_modes_differ_only_in_batch_norm(name):
    net, x = thin(name), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        evaluated, trained = net(x), copy.deepcopy(net).train()(x)
        for m in net.train().modules():
            if isinstance(m, nn.BatchNorm2d): m.eval()
        assert torch.equal(net(x), evaluated) and not torch.equal(trained, evaluated)


@pytest.mark.parametrize('name', list_models())
def test_sizes_and_classes(name):
    net = thin(name, num_classes=7)
    for size in (32, 33, 64):
        with torch.no_grad(): logits = net(torch.randn(2, 3, size, size))
        assert logits.shape==(2, 7) and logits.isfinite().all()
        last = summary(net, size)[-4].output_shape # before avgpool, fc and the total
        if name=='resnet8': assert last[1]==(size - 1)//8           # a pixel less after the stem, then halved by each stage, rounded down
        else: assert last[1]==-(-size//2**(net.num_stages - 1))     # halved once a stage after the first, rounded up


@pytest.mark.parametrize('name', list_models())
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
        found['compile'] = torch.compile(net, backend='inductor' if family=='resnet' else 'aot_eager')(x) # the twins' layers are the same: no code is generated for them again
    differences = {way: difference(value, logits) for way, value in found.items()}
    assert all(differences[way] <= limit for way, limit in TOLERANCE[family].items()), differences


@pytest.mark.parametrize('name', list_models())
def test_built_on_meta(name):
    with torch.device('meta'): net = create_model(name)
    assert {p.device.type for p in (*net.parameters(), *net.buffers())}=={'meta'}
    real = create_model(name)
    assert {k: v.shape for k, v in real.state_dict().items()}=={k: v.shape for k, v in net.state_dict().items()}


@pytest.mark.parametrize('name, kind', OPTIONS)
def test_other_shortcuts(name, kind):
    net = thin(name, shortcut=kind)
    net.train()(torch.randn(4, 3, 33, 33)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max()==0]==[]


@pytest.mark.parametrize('name, width', [('resnet18', 64), ('resnet50', 64), ('resnet20', 16), ('plain20', 16), ('resnet152', 8)])
def test_activation_memory_by_hand(name, width):
    "Maps that a block must keep: the outputs of its convolutions and of its ReLUs, which the next convolution needs too; a projection's output for its batch norm."
    with torch.device('meta'): net = create_model(name, width=width)
    numbers, size = 3*32*32 + 2*width*32*32, 32 # the picture; the stem's convolution and ReLU
    for i, count in enumerate(net.architecture['layers']):
        channels = width*2**i
        for block in range(count):
            before, size = size, size//2 if i and not block else size
            if net.architecture['block']=='BasicBlock':
                numbers += 4*channels*size**2
                projected = channels if net.architecture['shortcut']=='B' and i and not block else 0
            else:
                numbers += 2*channels*before**2 + 2*channels*size**2 + 2*4*channels*size**2 # 1x1, 3x3, 1x1: the stride is in the middle
                projected = 4*channels if not block else 0
            numbers += projected*size**2
    assert summary(net)[-1].activation_bytes==4*(numbers + net.num_features) # the classifier keeps its input


@given(st.lists(st.sampled_from(['_orig_mod', 'module']), max_size=4), st.booleans())
@settings(deadline=None, max_examples=30)
def test_wrappers_in_any_order(wrappers, averaged):
    net = create_model('resnet20', width=2)
    wrapped = {'.'.join([*wrappers, key]): value for key, value in net.state_dict().items()} | ({'n_averaged': torch.tensor(3)} if averaged else {})
    assert state_digest(load_weights(create_model('resnet20', width=2), wrapped))==state_digest(net)


@pytest.mark.parametrize('name', list_models())
def test_pretrained_round_trip(name, tmp_path):
    net = thin(name, num_classes=3)
    save_pretrained(net, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())==['config.json', 'model.safetensors']
    for back in (from_pretrained(tmp_path), load_model(tmp_path/'model.safetensors'), create_model(name, 3, width=8, weights=tmp_path/'model.safetensors')):
        assert state_digest(back)==state_digest(net) and back.architecture==net.architecture
    assert json.loads((tmp_path/'config.json').read_text())['classes']==['0', '1', '2']
    save_pretrained(from_pretrained(tmp_path), tmp_path/'again')
    for file in ('config.json', 'model.safetensors'): assert sha256((tmp_path/'again'/file).read_bytes()).digest()==sha256((tmp_path/file).read_bytes()).digest()


@pytest.mark.parametrize('name', list_models())
def test_checkpoint_round_trip(name, tmp_path):
    config = TrainConfig(model_name=name, width=8)
    net = thin(name)
    for wrapped in (net, torch.compile(net)): # the file of a compiled model is the file of the model
        save_checkpoint(tmp_path/'a.ckpt', checkpoint_of(new_state(wrapped, config, 4), config))
        loaded = load_model(tmp_path/'a.ckpt')
        save_checkpoint(tmp_path/'b.ckpt', checkpoint_of(new_state(loaded, config, 4), config))
        assert state_digest(loaded)==state_digest(load_model(tmp_path/'b.ckpt'))==state_digest(net)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnet20', 'plain34'])
@pytest.mark.parametrize('around', [{}, dict(normalize=True, softmax=True)])
def test_onnx(name, around, tmp_path):
    "The file against the model for batches of 1, 2 and 7, by a session of our own; the file names no folder of this machine."
    import onnxruntime
    net = thin(name).eval()
    assert export_onnx(net, tmp_path/'net.onnx', **around) < 1e-5
    session, mean, std = onnxruntime.InferenceSession(tmp_path/'net.onnx'), torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1), torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
    for n in (1, 2, 7):
        images = torch.rand(n, 3, 32, 32)
        with torch.no_grad(): expected = net((images - mean)/std).softmax(1) if around else net(images)
        assert difference(torch.from_numpy(session.run(None, {'images': images.numpy()})[0]), expected) < 1e-5
    assert b'site-packages' not in (tmp_path/'net.onnx').read_bytes() and b'resnet_cifar/' not in (tmp_path/'net.onnx').read_bytes()


def test_hub():
    for name in list_models():
        with torch.device('meta'): net = torch.hub.load(str(ROOT), name, source='local', num_classes=7)
        assert net.architecture==dict(create_model(name).architecture, num_classes=7)


def test_half_precision_file_loads(tmp_path):
    net = create_model('resnet20')
    save_file({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, tmp_path/'half.safetensors')
    loaded = load_weights(create_model('resnet20'), tmp_path/'half.safetensors')
    assert loaded.fc.weight.dtype==torch.float32 and torch.equal(loaded.fc.weight, net.fc.weight.half().float())
    assert load_file(tmp_path/'half.safetensors')['fc.weight'].dtype==torch.float16


def test_old_file_without_batch_counts():
    net = create_model('resnet20')
    old = {k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert state_digest(load_weights(create_model('resnet20'), old))==state_digest(net)
    assert state_dict_of(dict(state_dict=old)).keys()==old.keys()


def test_weights_of_the_package(cifar10_root):
    "They are half as precise as those of the recorded run, and answer as many test images rightly, but for five in ten thousand."
    from resnet_cifar.config import read_record
    from resnet_cifar.data import BatchLoader, load_cifar10
    from resnet_cifar.training import evaluate
    data, model = load_cifar10(cifar10_root), create_model('resnet20', weights='DEFAULT')
    right = evaluate(model, BatchLoader(data.test_images, data.test_labels, 500)).accuracy*10_000
    assert abs(right - read_record(ROOT/'nbs'/'runs'/'resnet20.json')['result']['test_accuracy']*10_000) <= 5
    with pytest.raises(ValueError, match="brings weights for resnet20, not for resnet18"): create_model('resnet18', weights='DEFAULT')


def test_weights_are_put_into_the_package_from_a_run(tmp_path):
    "From a run folder with those weights comes the file that is there, byte for byte."
    config = TrainConfig(model_name='resnet20')
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'config.json').write_text('{"model_name": "resnet20"}')
    save_checkpoint(tmp_path/'run'/'best.ckpt', checkpoint_of(new_state(create_model('resnet20', weights='DEFAULT'), config, 4), config))
    for folder in ('tests', 'resnet_cifar'): (tmp_path/folder).mkdir()
    shutil.copy(ROOT/'tests'/'ship_weights.py', tmp_path/'tests')
    subprocess.run([sys.executable, tmp_path/'tests'/'ship_weights.py', tmp_path/'run'], cwd=ROOT, check=True, capture_output=True)
    file = 'resnet_cifar/weights/resnet20.safetensors'
    assert (tmp_path/file).read_bytes()==(ROOT/file).read_bytes()


def test_a_written_file_may_be_read_by_whom_the_folder_says(tmp_path):
    "As any other new file: the web server, or a colleague in the same group, reads weights too."
    (tmp_path/'plain').write_text('as the umask says')
    save_pretrained(create_model('resnet20'), tmp_path)
    save_checkpoint(tmp_path/'a.ckpt', checkpoint_of(new_state(create_model('resnet20'), TrainConfig(), 1), TrainConfig()))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()})==1
