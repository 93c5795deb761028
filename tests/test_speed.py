"Fast by default: what a GPU would be asked, compiling, the small maps' gradients, and the command that measures."
import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_cifar import plain_loop, speed, trainer, training
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import BatchLoader, sample_cifar10
from resnet_cifar.models import create_model
from resnet_cifar.training import EMA, Callback, Metrics, PatchGradients, Progress, evaluate, fit, predict, train_step


# ---------------------------------------------------------------- what a GPU is asked

class Transfers(TorchDispatchMode):
    "Counts what a GPU would be waited for: copies between devices."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)] + ([out] if isinstance(out, torch.Tensor) else [])
        if 'copy' in str(function) and len({t.device for t in tensors}) > 1: self.count += 1
        return out


@pytest.fixture
def far_away(monkeypatch):
    "Images, labels and network on the meta device, where reading any number is an error, as a stand-in for a GPU; how often the host looked at a loss."
    looks = Counter()
    monkeypatch.setattr(training, '_require_finite', lambda losses: looks.update([len(losses)]))
    monkeypatch.setattr(Progress, 'metrics', lambda self: Metrics(0., 0.))
    with torch.device('meta'): yield torch.empty(1300, 3, 32, 32, dtype=torch.uint8), torch.empty(1300, dtype=torch.int64), create_model('resnet18', width=8), looks


@pytest.mark.parametrize('settings', [dict(optimizer='SGD', lr_scheduler='OneCycleLR', ema_decay=0.9), dict(optimizer='AdamW', label_smoothing=0.1, image_sizes=(16,))], ids=['sgd-ema', 'adamw-small'])
def test_a_gpu_is_waited_for_every_50_steps_and_no_more(far_away, settings):
    images, labels, model, looks = far_away
    config = TrainConfig(num_epochs=2, batch_size=10, precision='fp32', transform=True, **settings)
    class Watch(Callback):
        "Copies between devices from the first step of an epoch to its last."
        def __init__(self): self.at_step, self.within = None, []
        def after_step(self, state):
            if self.at_step is not None: self.within.append(transfers.count - self.at_step)
            self.at_step = transfers.count
        def after_epoch(self, state): self.at_step = None
    watch = Watch()
    with Transfers() as transfers:
        loader = BatchLoader(images, labels, 10, train=True, augment=True, device='meta', sizes=config.image_sizes)
        before = transfers.count
        state = fit(model, loader, None, config, [EMA(0.9), watch] if config.ema_decay else [watch])
    assert state.epoch==2 and looks==Counter({50: 3*2}) # 130 steps: after 50, after 100, and the last 50 at the end
    assert watch.within==[0]*(2*129)
    assert transfers.count - before <= 2*4 # an epoch's plan: order, rows, columns, flips


def test_batches_are_made_on_the_gpu():
    "With PyTorch's pretended GPU, on which forward operations work: after an epoch's first batch nothing is copied to it or from it."
    with FakeTensorMode(allow_non_fake_inputs=True), Transfers() as transfers:
        images, labels = torch.empty(640, 3, 32, 32, dtype=torch.uint8, device='cuda'), torch.zeros(640, dtype=torch.int64, device='cuda')
        batches = iter(BatchLoader(images, labels, 64, train=True, augment=True, device='cuda', sizes=(16,)))
        first, before = next(batches), transfers.count
        rest = list(batches)
    assert before > 0 and transfers.count==before and len(rest)==9
    assert {(x.device.type, x.shape, y.device.type) for x, y in [first, *rest]}=={('cuda', (64, 3, 16, 16), 'cuda')}


def test_evaluation_waits_for_a_gpu_once():
    "As many copies to the host for three batches as for one."
    def copies(num_batches):
        count = Counter()
        class Far(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function is torch.Tensor.cpu: count['cpu'] += 1
                return super().__torch_function__(function, types, args, kwargs or {})
        batches = [(torch.randn(4, 3, 8, 8).as_subclass(Far), torch.arange(4).as_subclass(Far)) for _ in range(num_batches)]
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        evaluate(model, batches)
        predict(model, batches)
        return count['cpu']
    assert copies(1)==copies(3)==3 # log-probabilities and targets; probabilities


def test_settings_for_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: not including_emulation)
    found = trainer.resolve(TrainConfig(num_workers=2, pin_memory=True))
    assert (found.device, found.precision, found.width)==('cuda', 'bf16', 64)
    assert capsys.readouterr().out.splitlines()==['--pin_memory: the data are on the GPU, so it is not used',
                                                  '--num_workers 2: the data are on the GPU, so background processes are not used']
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation) # an old one
    assert trainer.resolve(TrainConfig()).precision=='fp32'


def test_kernels_are_chosen_for_a_run_and_given_back(monkeypatch, tmp_path):
    def now(): return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.get_num_threads()
    before = now()
    with trainer._kernels(False): assert now()==(False, True, before[2])  # the fastest by trial
    with trainer._kernels(True): assert now()==(True, False, before[2])
    monkeypatch.setattr(trainer, '_cpu_quota', lambda: 1) # as in a container
    with trainer._kernels(False): assert now()[2]==1
    assert now()==before


@pytest.mark.parametrize('text, processors', [('200000 100000', 2), ('150000 100000', 2), ('50000 100000', 1), ('max 100000', None), ('', None), (None, None)])
def test_processors_of_a_container(tmp_path, text, processors):
    if text is not None: (tmp_path/'cpu.max').write_text(text + '\n')
    assert trainer._cpu_quota(tmp_path/'cpu.max')==processors


def test_a_gpu_is_waited_for_where_time_is_taken(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: waits.append(1))
    speed.benchmark(dict(a=lambda: None, b=lambda: None), warmup=2, repeats=3, device='cuda')
    assert len(waits)==2*(2 + 3)
    speed.benchmark(dict(a=lambda: None), device='cpu')
    assert len(waits)==10


# ---------------------------------------------------------------- compiling

def compiled_with(backend, model): return training._Compiled(torch.compile(model, dynamic=False, backend=backend))


def test_each_image_size_is_compiled_once(capsys):
    graphs = []
    def backend(graph, inputs):
        graphs.append(inputs[0].shape)
        return graph
    torch.compiler.reset()
    forward = compiled_with(backend, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.AdaptiveAvgPool1d(10)))
    sizes = range(8, 20) # PyTorch by itself stops at eight
    for _ in range(2):
        for size in sizes:
            forward(torch.randn(2, 3, size, size))
            forward.after_step(None)
    assert len(graphs)==len(sizes)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in lines]==[f'compiled     for {size} x {size} pixels' for size in sizes]
    assert all(line.endswith(' s') for line in lines)


def test_without_a_compiler_one_line_and_no_more(command, tmp_path):
    "A run asks for it, the machine has none: it trains all the same."
    (tmp_path/'program.py').write_text("""
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import BatchLoader, sample_cifar10
from resnet_cifar.models import create_model
from resnet_cifar.training import fit
s = sample_cifar10()
state = fit(create_model('resnet18', width=4), BatchLoader(s.train_images, s.train_labels, 500, train=True), None, TrainConfig(num_epochs=1, compile=True))
print('epochs', state.epoch)
""")
    done = command('program', PYTHONPATH=str(tmp_path), CXX='/no/compiler', TORCHINDUCTOR_CACHE_DIR=str(tmp_path/'cache'))
    lines = done.stdout.splitlines()
    assert len(lines)==2 and lines[0].startswith('--compile: this machine cannot (') and lines[1]=='epochs 1', done.stdout


def test_small_maps_gradients_are_compiled_too():
    "One graph without a break; its backward pass has a matrix product more for each of the eight 3x3 convolutions on at most 4x4 outputs; the losses are the eager ones."
    images, targets, products, losses = torch.randn(8, 3, 16, 16), torch.arange(8), [], []
    def count(graph, inputs):
        products[-1] += sum(node.target==torch.ops.aten.mm.default for node in graph.graph.nodes)
        return make_boxed_func(graph)
    backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph), bw_compiler=count)
    def trained(precision, wrap):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = create_model('resnet18', width=8).train()
        optimizer, forward = torch.optim.SGD(model.parameters(), lr=0.05), wrap(model)
        products.append(0)
        return [train_step(forward, images, targets, optimizer, precision=precision)[0].item() for _ in range(3)]
    traced = lambda model: torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
    trained('fp32', traced)
    losses = [trained('bf16', wrap) for wrap in (traced, lambda model: model)]
    assert products[1] - products[0]==8
    assert losses[0]==pytest.approx(losses[1], rel=0.02) and losses[0][0] > losses[0][2]


def test_small_maps_gradients_are_the_librarys():
    "A whole network in bf16: every gradient is that of the library, to bf16's rounding, with and without."
    torch.manual_seed(0)
    model, images = create_model('resnet50', width=8).train(), torch.randn(16, 3, 32, 32)
    grads = []
    for quick in (contextlib.nullcontext(), PatchGradients()):
        model.zero_grad()
        with quick, torch.autocast('cpu', torch.bfloat16): logits = model(images)
        kinds = {type(node).__name__ for node in graph(logits.grad_fn)}
        F.cross_entropy(logits.float(), torch.arange(16)%10).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert ('_PatchConvBackward' in kinds)==isinstance(quick, PatchGradients)
    for name, g in grads[0].items(): assert (g - grads[1][name]).norm() <= 0.02*g.norm() + 1e-6, name


def graph(node, seen=None):
    "Every node of an autograd graph."
    seen = set() if seen is None else seen
    if node is None or node in seen: return seen
    seen.add(node)
    for following, _ in node.next_functions: graph(following, seen)
    return seen


# ---------------------------------------------------------------- measuring

def test_the_first_line_comes_before_pytorch(command, tmp_path):
    "Loading PyTorch takes seconds; with one that cannot be loaded the line is there all the same."
    (tmp_path/'torch.py').write_text("raise ImportError('not now')")
    done = command('resnet_cifar', 'train', code=2)
    assert done.stdout.startswith('resnet-cifar ') and done.stdout.endswith(' trains resnet18; loading PyTorch\n') and done.stderr=='error: not now\n'


def test_the_plain_loop_is_what_it_says():
    "At most 40 lines, torchvision's pictures, and nothing of ours in it."
    text = Path(plain_loop.__file__).read_text()
    assert len(text.splitlines()) <= 40 and 'import resnet_cifar' not in text and 'from .' not in text
    from torchvision.datasets import CIFAR10
    s = sample_cifar10()
    ours = plain_loop.Pictures(s.train_images.permute(0, 2, 3, 1).numpy(), s.train_labels.tolist())
    theirs = object.__new__(CIFAR10) # its constructor wants the archive
    theirs.data, theirs.targets, theirs.transform, theirs.target_transform = ours.data, ours.targets, ours.transform, None
    for i in (0, 7, 999):
        torch.manual_seed(i)
        a = ours[i]
        torch.manual_seed(i)
        b = theirs[i]
        assert torch.equal(a[0], b[0]) and a[1]==b[1]


def test_bench(command, cifar10_root, tmp_path):
    "The command: the table, the JSON with what is promised, the figure; and the sums in it."
    done = command('resnet_cifar', 'bench', '--batch_size', 2, '--root', cifar10_root, '--json', tmp_path/'b.json', '--figure', tmp_path/'b.png')
    found = json.loads((tmp_path/'b.json').read_text())
    assert {'step_ratio', 'epoch_ratio', 'data_ratio', 'images_per_second', 'roof_share'} <= found.keys()
    assert set(found['steps'])=={'plain loop', 'ours', 'ours, compiled'} and all(len(t['seconds']) >= 3 for t in found['steps'].values())
    step = found['steps'][found['fastest']]['median']
    assert found['images_per_second']==pytest.approx(2/step) and found['step_ratio']==pytest.approx(found['steps']['plain loop']['median']/step)
    assert found['roof_share']==pytest.approx(2/step*found['image_flops']/found['roof_flops'])
    choice = found['plain_choice'] # JSON's keys are words
    assert set(choice)=={'0', '1', '2'} and found['plain_workers']==int(min(choice, key=choice.get)) and found['epoch_images']%2==0
    plain, ours = (sorted(pair[side] for pair in found['epochs'])[1] for side in (0, 1)) # the middle one of three
    assert len(found['epochs'])==3 and found['epoch_ratio']==pytest.approx(plain/ours)
    assert found['memory']['ours'] > 11_173_962*4*2 # gradients and momentum at the least
    assert done.stderr=='' and f'{found["step_ratio"]:.2f}' in done.stdout and (tmp_path/'b.png').read_bytes()[:4]==b'\x89PNG'
    assert not [word for word in ('/root', '/home', os.uname().nodename) if word in json.dumps(found)]


def test_memory_that_cannot_be_measured():
    with pytest.raises(RuntimeError, match='no memory was measured: '): speed.peak_memory('ours', 'resnet21')
