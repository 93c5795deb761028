"Fast by default: how often a GPU is waited for, compiling, the gradients of small maps, and the clock."
import contextlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_cifar import speed, training
from resnet_cifar.blocks import BasicBlock
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import BatchLoader
from resnet_cifar.models import ResNet, create_model
from resnet_cifar.optimizers import EMA
from resnet_cifar.speed import PatchGradients, with_patch_gradients
from resnet_cifar.training import Callback, Metrics, Progress, fit, train_step


# ---------------------------------------------------------------- waiting for a GPU

class Transfers(TorchDispatchMode):
    "Counts copies between devices: each of them waits for a GPU."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, out) if isinstance(value, torch.Tensor)]
        if 'copy' in str(function) and len({tensor.device for tensor in tensors}) > 1: self.count += 1
        return out


class Watch(Callback):
    "Counts copies between devices from the first step of an epoch to its last."
    def __init__(self, transfers): self.transfers, self.before, self.within = transfers, None, []

    def after_step(self, state):
        if self.before is not None: self.within.append(self.transfers.count - self.before)
        self.before = self.transfers.count

    def after_epoch(self, state): self.before = None


def test_training_waits_for_a_gpu_every_50_steps(monkeypatch):
    "The meta device stands in for a GPU: there, reading any number is an error."
    looks = Counter()
    monkeypatch.setattr(training, '_require_finite', lambda losses: looks.update([len(losses)]))
    monkeypatch.setattr(Progress, 'metrics', lambda self: Metrics(0., 0.))
    with torch.device('meta'):
        images, labels = torch.empty(1100, 3, 32, 32, dtype=torch.uint8), torch.empty(1100, dtype=torch.int64)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 10))
    config = TrainConfig(num_epochs=1, batch_size=10, precision='fp32', optimizer='SGD', lr_scheduler='OneCycleLR')
    with Transfers() as transfers:
        loader = BatchLoader(images, labels, 10, train=True, augment=True, device='meta', sizes=(16,))
        before, watch = transfers.count, Watch(transfers)
        state = fit(model, loader, None, config, [EMA(model, 0.9), watch])
    assert state.epoch==1 and looks==Counter({50: 3}) # 110 steps: after 50, after 100, and the last 50 at the end
    assert watch.within==[0]*109
    assert transfers.count - before <= 4 # an epoch's plan: order, rows, columns, flips


def test_batches_are_made_on_the_gpu():
    "With PyTorch's pretended GPU, on which forward operations work: after the first batch nothing is copied."
    with FakeTensorMode(allow_non_fake_inputs=True), Transfers() as transfers:
        images, labels = torch.empty(640, 3, 32, 32, dtype=torch.uint8, device='cuda'), torch.zeros(640, dtype=torch.int64, device='cuda')
        batches = iter(BatchLoader(images, labels, 64, train=True, augment=True, device='cuda', sizes=(16,)))
        first, before = next(batches), transfers.count
        rest = list(batches)
    assert before > 0 and transfers.count==before and len(rest)==9
    assert {(x.device.type, x.shape, y.device.type) for x, y in [first, *rest]}=={('cuda', (64, 3, 16, 16), 'cuda')}


def test_the_clock_waits_for_a_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: waits.append(1))
    speed.benchmark(dict(a=lambda: None, b=lambda: None), warmup=2, repeats=3, device='cuda')
    assert len(waits)==2*(2 + 3)
    speed.benchmark(dict(a=lambda: None), device='cpu')
    assert len(waits)==10


# ---------------------------------------------------------------- the machine

def test_kernels_are_chosen_and_given_back(monkeypatch):
    def now(): return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    before = now()
    with speed.kernels(deterministic=False): assert now()==(False, True, before[2]) # the fastest by trial
    with speed.kernels(deterministic=True):
        assert now()==(True, False, before[2])
        with speed.kernels(deterministic=False): assert now()==(True, False, before[2]) # what the caller asked for stays
    monkeypatch.setattr(speed, '_cpu_quota', lambda: 1) # as in a container
    with pytest.raises(KeyError), speed.kernels(deterministic=True):
        assert now()[2]==1
        raise KeyError
    assert now()==before


@pytest.mark.parametrize('text, processors', [('200000 100000', 2), ('150000 100000', 2), ('50000 100000', 1), ('max 100000', None), ('', None), (None, None)])
def test_processors_of_a_container(tmp_path, text, processors):
    if text is not None: (tmp_path/'cpu.max').write_text(text + '\n')
    assert speed._cpu_quota(tmp_path/'cpu.max')==processors


def test_the_machine_beside_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'NVIDIA H100')
    monkeypatch.setattr(speed, '_capabilities', lambda: dict(cpu_name='AMD EPYC', avx2=True, amx=False, l2_cache_size=512))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    assert speed.machine_text('cpu')=='AMD EPYC CPU, 1 thread'
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    assert speed.machine_text(torch.device('cuda'), world_size=2)=='NVIDIA H100, 8 threads in each of 2 processes'
    assert speed.processor_kind()=='avx2 cpu_name=AMD EPYC l2_cache_size=512'
    monkeypatch.setattr(speed, '_capabilities', dict) # an older PyTorch
    assert speed.processor_kind()=='' and speed.machine_name('cpu').endswith(' CPU')
    assert {'python', 'resnet_cifar', 'torch', 'torchvision', 'numpy'}==set(speed.package_versions())


# ---------------------------------------------------------------- compiling

def test_each_image_size_is_compiled_once(capsys, monkeypatch):
    graphs, compile = [], torch.compile
    def backend(graph, inputs):
        graphs.append(inputs[0].shape)
        return graph
    monkeypatch.setattr(torch, 'compile', lambda *args, **options: compile(*args, backend=backend, **options))
    torch.compiler.reset()
    forward = speed.compile_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.AdaptiveAvgPool1d(10)))
    graphs.clear() # of the trial
    sizes = range(8, 20) # PyTorch by itself stops at eight
    for size in [*sizes, *sizes]: forward(torch.randn(2, 3, size, size))
    assert len(graphs)==len(sizes)
    assert capsys.readouterr().out.splitlines()==[f'compiling    for images of {size} x {size} pixels' for size in sizes]


def test_without_a_compiler_one_line_and_no_more(capsys, monkeypatch):
    def broken(*args, **options): raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', broken)
    model = create_model('resnet18', width=4)
    assert speed.compile_model(model) is model
    assert capsys.readouterr().out=='--compile: no compiler works here (RuntimeError), not used\n'


@pytest.mark.long
def test_a_machine_without_a_compiler(command, tmp_path):
    "What PyTorch raises there is what is caught."
    (tmp_path/'program.py').write_text("from resnet_cifar.models import create_model\n"
                                       "from resnet_cifar.speed import compile_model\n"
                                       "model = create_model('resnet18', width=4)\n"
                                       "print(compile_model(model) is model)\n")
    done = command('program', PYTHONPATH=str(tmp_path), CXX='/no/compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path/'cache'))
    lines = done.stdout.splitlines()
    assert len(lines)==2 and lines[0].startswith('--compile: no compiler works here (') and lines[1]=='True', done.stdout


# ---------------------------------------------------------------- small maps

def graph_of(node, seen=None):
    "Every node of an autograd graph."
    seen = set() if seen is None else seen
    if node is None or node in seen: return seen
    seen.add(node)
    for following, _ in node.next_functions: graph_of(following, seen)
    return seen


def test_gradients_of_small_maps_are_those_of_the_library():
    "A whole network in bf16: every gradient is that of the library, to bf16's rounding, with and without."
    torch.manual_seed(0)
    model, images = create_model('resnet50', width=8).train(), torch.randn(16, 3, 32, 32)
    grads = []
    for patches in (contextlib.nullcontext(), PatchGradients()):
        model.zero_grad()
        with patches, torch.autocast('cpu', torch.bfloat16): logits = model(images)
        kinds = {type(node).__name__ for node in graph_of(logits.grad_fn)}
        F.cross_entropy(logits.float(), torch.arange(16)%10).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert ('_PatchConvBackward' in kinds)==isinstance(patches, PatchGradients)
    for name, g in grads[0].items(): assert (g - grads[1][name]).norm() <= 0.02*g.norm() + 1e-6, name


def test_frozen_filters_and_other_calls_are_left_alone():
    conv, images = nn.Conv2d(4, 4, 3, padding=1, bias=False), torch.randn(2, 4, 4, 4, requires_grad=True)
    forward = with_patch_gradients(conv)
    with torch.autocast('cpu', torch.bfloat16):
        assert '_PatchConv' in forward(images).grad_fn.name()
        conv.weight.requires_grad_(False)
        assert '_PatchConv' not in forward(images).grad_fn.name()
    assert '_PatchConv' not in forward(images).grad_fn.name() # in 32 bits
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(forward(images), conv(images)) # forward is the library's


def test_gradients_of_small_maps_are_compiled_too():
    "One graph without a break; a matrix product more in its backward pass for each of the four small convolutions; the losses are the eager ones."
    images, targets, products = torch.randn(8, 3, 16, 16), torch.arange(8), []
    def count(graph, inputs):
        products[-1] += sum(node.target==torch.ops.aten.mm.default for node in graph.graph.nodes)
        return make_boxed_func(graph)
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=count)

    def trained(precision, wrap, num_steps=3):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = ResNet(BasicBlock, (1, 1, 1, 1), width=8).train()
        optimizer, forward = torch.optim.SGD(model.parameters(), lr=0.05), wrap(model)
        products.append(0)
        return [train_step(forward, images, targets, optimizer, precision=precision)[0].item() for _ in range(num_steps)]

    def traced(model): return with_patch_gradients(torch.compile(model, dynamic=False, fullgraph=True, backend=backend))
    trained('fp32', traced, num_steps=1)
    losses = [trained('bf16', wrap) for wrap in (traced, with_patch_gradients)]
    assert products[1] - products[0]==4
    assert losses[0]==pytest.approx(losses[1], rel=0.02) and losses[0][0] > losses[0][2]
