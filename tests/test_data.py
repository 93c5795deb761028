"Batches are a pure function of (seed, epoch, number), whoever computes them."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

from resnet_cifar.data import CIFAR10_MEAN, CIFAR10_STD, CLASSES, BatchLoader, load_cifar10, normalize, plan_epoch, sample_cifar10, show_images, split_train_valid
from resnet_cifar.facts import Facts, facts_of, inputs_for, loader_for
from resnet_cifar.models import create_model


@pytest.fixture(scope='module')
def sample(): return sample_cifar10()


def test_sample_is_of_the_real_data(sample, cifar10_root):
    "The first hundred (fifty) of each class; and the split of the real labels is that of the book."
    full = load_cifar10(cifar10_root)
    for part, each in (('train', 100), ('test', 50)):
        images, labels = getattr(full, f'{part}_images'), getattr(full, f'{part}_labels')
        first = torch.stack([torch.nonzero(labels==c).flatten()[:each] for c in range(10)], dim=1).flatten()
        assert torch.equal(images[first], getattr(sample, f'{part}_images')) and torch.equal(labels[first], getattr(sample, f'{part}_labels'))
    train, valid = split_train_valid(full.train_labels)
    assert len(train)==45_000 and full.train_labels[valid].bincount().tolist()==[500]*10
    for c in range(10): assert valid[full.train_labels[valid]==c].min() > train[full.train_labels[train]==c].max() # the last of each class
    pixels = full.train_images[::50].double()/255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(CIFAR10_MEAN, dtype=torch.double), atol=0.02, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(CIFAR10_STD, dtype=torch.double), atol=0.02, rtol=0)


@pytest.mark.parametrize('settings', [dict(), dict(padding=2), dict(padding=0), dict(alternating_flips=True), dict(augment=False), dict(seed=7, share=(1, 3))], ids=str)
def test_batches_against_torchvision_one_by_one(sample, settings):
    "Epoch 1, batch 2, by the plan: crop, flip, normalise, each image on its own."
    options = dict(augment=True, padding=4, alternating_flips=False, seed=0, share=(0, 1)) | settings
    loader = BatchLoader(sample.train_images[:200], sample.train_labels[:200], 50, train=True, **options)
    loader.set_epoch(1)
    images, targets = list(loader)[2]
    plan = plan_epoch(200, options['seed'], 1, options['padding'], options['alternating_flips'])
    rank, world_size = options['share']
    indices = plan.order[100:150][50*rank//world_size:50*(rank + 1)//world_size]
    assert torch.equal(targets, sample.train_labels[indices])
    for image, i in zip(images, indices):
        expected = sample.train_images[i]
        if options['augment']:
            expected = TF.crop(TF.pad(expected, options['padding']), plan.rows[i], plan.columns[i], 32, 32)
            if plan.flips[i]: expected = TF.hflip(expected)
        assert torch.equal(image, normalize(expected[None])[0])


def test_plan_is_numpys_generator():
    "The draws in this order and no other: old runs stay what they are."
    rng = np.random.default_rng((3, 5))
    offsets, order, coins = rng.integers(0, 9, (2, 100)), rng.permutation(100), rng.random(100)
    plan = plan_epoch(100, 3, 5)
    assert plan.rows.tolist()==offsets[0].tolist() and plan.columns.tolist()==offsets[1].tolist()
    assert plan.order.tolist()==order.tolist() and plan.flips.tolist()==(coins < 0.5).tolist()


@pytest.mark.parametrize('world_size', [2, 3, 7])
@pytest.mark.parametrize('count', [500, 302]) # of the second the last batch has two images, so that some shares are empty
def test_shares_are_the_batch(sample, world_size, count):
    def of(share): return list(BatchLoader(sample.test_images[:count], sample.test_labels[:count], 300, share=share))
    parts = [of((rank, world_size)) for rank in range(world_size)]
    for i, (images, targets) in enumerate(of((0, 1))):
        assert torch.equal(torch.cat([part[i][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[i][1] for part in parts]), targets)


def test_a_loader_moves_on_by_itself(sample):
    "As often as it is used up; an interrupted pass does not count, and `set_epoch` chooses."
    def targets(loader): return torch.cat([t for _, t in loader]).tolist()
    def expected(epoch): return sample.train_labels[plan_epoch(1000, 0, epoch).order].tolist()
    for num_workers in (0, 1):
        loader = BatchLoader(sample.train_images, sample.train_labels, 250, train=True, num_workers=num_workers)
        assert [targets(loader) for _ in range(3)]==[expected(epoch) for epoch in range(3)]
        next(iter(loader))
        assert loader.epoch==3 and targets(loader)==expected(3)
        loader.set_epoch(1)
        assert targets(loader)==expected(1) and loader.epoch==2
    sizes = BatchLoader(sample.train_images, sample.train_labels, 250, train=True, sizes=(16, 24))
    assert [list(sizes)[0][0].shape[-1] for _ in range(3)]==[16, 24, 24]


def test_sizes_and_formats(sample):
    small = next(iter(BatchLoader(sample.test_images, sample.test_labels, 100, sizes=(16,))))[0]
    whole = normalize(sample.test_images[:100])
    torch.testing.assert_close(small, F.interpolate(whole, (16, 16), mode='bilinear', antialias=True))
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert next(iter(BatchLoader(sample.test_images, sample.test_labels, 100, channels_last=False)))[0].is_contiguous()
    half = next(iter(BatchLoader(sample.test_images, sample.test_labels, 100, mean=(0.5,)*3, std=(1, 1, 1))))[0]
    torch.testing.assert_close(half, sample.test_images[:100]/255 - 0.5)


def test_labels_become_int64(sample):
    for dtype in (torch.uint8, torch.int32):
        loader = BatchLoader(sample.test_images, sample.test_labels.to(dtype), 100)
        assert next(iter(loader))[1].dtype==torch.int64


def test_what_is_refused(sample):
    images, labels = sample.test_images, sample.test_labels
    for wrong in (images/255, images.permute(0, 2, 3, 1), images[:, :1], images.numpy(), None):
        with pytest.raises(ValueError, match='uint8'): BatchLoader(wrong, labels, 100)
    for wrong in (labels[:-1], labels.float(), labels.tolist(), labels.numpy(), labels[:, None]):
        with pytest.raises(ValueError, match='500 integers'): BatchLoader(images, wrong, 100)
    with pytest.raises(ValueError, match='--batch_size 501'): BatchLoader(images, labels, 501, train=True)
    with pytest.raises(ValueError, match='--valid_size 5:'): split_train_valid(labels, 5)
    with pytest.raises(ValueError, match='--valid_size 500:'): split_train_valid(labels, 500)
    with pytest.raises(ValueError, match='no images'): show_images(images[:0])


def test_show_images(sample):
    "Each image at its place, its title on it, the gaps transparent."
    ax = show_images(sample.test_images[:5], ['a', 2, 'c', 'd', 'e'], columns=3)
    drawn = torch.from_numpy(ax.get_images()[0].get_array().data)
    assert drawn.shape==(2*34 + 2, 3*34 + 2, 4)
    for i, (y, x) in enumerate([(2, 2), (2, 36), (2, 70), (36, 2), (36, 36)]):
        tile = drawn[y:y + 32, x:x + 32]
        assert torch.equal(tile[:, :, :3].permute(2, 0, 1), sample.test_images[i]) and (tile[:, :, 3]==255).all()
    assert (drawn[:2, :, 3]==0).all() and (drawn[36:68, 70:, 3]==0).all()
    assert [t.get_text() for t in ax.texts]==['a', '2', 'c', 'd', 'e'] and ax.texts[4].get_position()==(37, 37)


# ---------------------------------------------------------------- background processes

@pytest.mark.long
def test_workers_under_spawn(command, tmp_path):
    "Where processes are not forked (macOS, Windows) workers give the same batches."
    (tmp_path/'program.py').write_text("""
import torch
from resnet_cifar.data import BatchLoader, sample_cifar10
if __name__=='__main__':
    torch.multiprocessing.set_start_method('spawn')
    s = sample_cifar10()
    batches = [list(BatchLoader(s.train_images, s.train_labels, 250, train=True, augment=True, num_workers=n)) for n in (0, 1)]
    print(len(batches[0]), all(torch.equal(a, b) for one, other in zip(*batches) for a, b in zip(one, other)))
""")
    assert command('program', PYTHONPATH=str(tmp_path)).stdout=='4 True\n'


def test_a_program_ends_while_workers_run(tmp_path):
    "They ignore the signals that stop a run, so that the main process must end them; and a signal to all does not end them."
    code = """
import sys, time
from resnet_cifar.data import BatchLoader, sample_cifar10
s = sample_cifar10()
batches = iter(BatchLoader(s.train_images, s.train_labels, 32, train=True, num_workers=2))
try:
    print(next(batches)[0].shape[0] + next(batches)[0].shape[0], flush=True) # both workers are there
    time.sleep(60)
except KeyboardInterrupt: print(len(list(batches)))
"""
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline()=='64\n'
    os.killpg(process.pid, signal.SIGINT) # as Ctrl-C does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err)==(0, '29\n', '') # all other batches came
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try: os.killpg(process.pid, 0)
        except ProcessLookupError: break
        time.sleep(0.1)
    else: raise AssertionError('a background process is left')


def test_the_global_generator_is_not_touched(sample):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in BatchLoader(sample.train_images, sample.train_labels, 500, train=True, augment=True, num_workers=1): pass
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- facts

def test_facts_check_themselves():
    good = Facts().to_dict()
    assert good==dict(classes=list(CLASSES), mean=list(CIFAR10_MEAN), std=list(CIFAR10_STD), image_size=32)
    assert Facts.from_dict(good | dict(architecture=None))==Facts()
    wrong = dict(classes=[None, 'abc', [], ['a', 'a'], ['a', 1], [['a'], 'b'], {'a': 1}], mean=[None, 0.5, [0.5]*2, [0.5, 0.5, float('nan')], ['0']*3, [True]*3, [1e9]*3, [[0.5]]*3],
                 std=[[1, 1, 0], [1, 1, -1], [1, 1, float('nan')], [1, float('inf'), 1]], image_size=[None, 0, -1, 5000, 32.0, True, '32', [32]])
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f'^{name} must be') as e: Facts.from_dict(good | {name: value})
            assert '\n' not in str(e.value)
        with pytest.raises(ValueError, match=f'^{name} must be'): Facts.from_dict({k: v for k, v in good.items() if k!=name})
    with pytest.raises(ValueError) as e: Facts(classes=('long\nname',)*10_000)
    assert len(str(e.value)) < 200 and '\n' not in str(e.value)


def test_facts_of_models():
    model = create_model('resnet20')
    assert facts_of(model)==Facts()
    with pytest.warns(UserWarning, match="Linear has no pretrained_cfg: classes, mean, std and size are CIFAR-10's"): assert facts_of(torch.nn.Linear(1, 1))==Facts()
    assert facts_of(create_model('resnet20', num_classes=3)).classes==('0', '1', '2')
    other = Facts(('a', 'b'), (0.1, 0.2, 0.3), (1, 2, 3), 64)
    model.pretrained_cfg = other.to_dict()
    assert facts_of(model)==other
    model.pretrained_cfg = dict(url='', num_classes=10, mean=(0.485, 0.456, 0.406)) # another library's
    assert facts_of(model)==Facts(mean=(0.485, 0.456, 0.406)) # what it says is believed


@pytest.mark.long
def test_facts_behind_compile():
    model = create_model('resnet20', num_classes=3)
    assert facts_of(torch.compile(model)).classes==('0', '1', '2')


def test_images_as_a_model_wants_them(sample):
    model = create_model('resnet20')
    model.pretrained_cfg = Facts(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).to_dict()
    expected = TF.normalize(sample.test_images[:7]/255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    torch.testing.assert_close(inputs_for(model, sample.test_images[:7]), expected, atol=1e-5, rtol=1e-5)
    batches = list(loader_for(model, sample.test_images, sample.test_labels, 7))
    assert torch.equal(batches[0][0], inputs_for(model, sample.test_images[:7]))
    assert torch.cat([t for _, t in batches]).tolist()==sample.test_labels.tolist()
