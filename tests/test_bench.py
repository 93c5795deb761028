"The plain loop is what it says, and what is measured against it adds up."
import json
import os

import pytest
import torch
from torchvision.datasets import CIFAR10

from resnet_cifar import bench as bench_module
from resnet_cifar.bench import PlainImages, bench, bench_lines, plain_epoch, plain_model
from resnet_cifar.data import sample_cifar10


@pytest.fixture(scope='module')
def sample(): return sample_cifar10()


def test_plain_images_are_those_of_torchvision(sample):
    ours = PlainImages(sample.train_images.permute(0, 2, 3, 1).numpy(), sample.train_labels.tolist())
    theirs = object.__new__(CIFAR10) # its constructor wants the archive
    theirs.data, theirs.targets, theirs.transform, theirs.target_transform = ours.images, ours.targets, ours.transform, None
    for i in (0, 7, 999):
        torch.manual_seed(i)
        image, target = ours[i]
        torch.manual_seed(i)
        other, other_target = theirs[i]
        assert torch.equal(image, other) and target==other_target
    assert len(ours)==1000


def test_the_plain_loop_by_hand():
    "One weight per class, one step: loss and accuracy are those before it, averaged over images."
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        def forward(self, images): return images.sum((1, 2, 3))[:, None]*self.weight
    model = Sum()
    batches = [(torch.ones(1, 1, 1, 1), torch.tensor([0])), (torch.ones(3, 1, 1, 1), torch.tensor([1, 1, 1]))]
    loss, accuracy = plain_epoch(model, batches, torch.optim.SGD(model.parameters(), lr=0.0), 'cpu')
    e = 2.718281828
    assert accuracy==0.25 and loss==pytest.approx((0.3132617 + 3*1.3132617)/4) # -log(e/(e + 1)), -log(1/(e + 1))
    assert torch.tensor(e/(e + 1)).log().item()==pytest.approx(-0.3132617)


def test_bf16_is_for_the_tuned_loop_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 8), torch.nn.Flatten())
    batches, kinds = [(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))], []
    model[0].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    for precision in ('fp32', 'bf16'): plain_epoch(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), 'cpu', precision)
    assert kinds==[torch.float32, torch.bfloat16]


def test_the_plain_model_is_for_small_images():
    with torch.device('meta'): model, images = plain_model('resnet18'), torch.empty(1, 3, 32, 32)
    assert model.layer1(model.maxpool(model.conv1(images))).shape==(1, 64, 32, 32) and model(images).shape==(1, 10)
    assert sum(p.numel() for p in model.parameters())==11_173_962 # as ours


def check_sums(found, batch_size):
    "What is derived follows from what was measured."
    assert {'step_ratio', 'tuned_step_ratio', 'epoch_ratio', 'data_ratio', 'images_per_second', 'roof_share'} <= found.keys()
    steps = {name: timing['median'] for name, timing in found['steps'].items()}
    ours = steps[found['fastest']]
    assert found['step_ratio']==pytest.approx(steps['plain loop']/ours)
    assert found['tuned_step_ratio']==pytest.approx(steps['plain loop, tuned']/ours)
    assert found['images_per_second']==pytest.approx(batch_size/ours)
    assert found['roof_share']==pytest.approx(batch_size/ours*found['image_flops']/found['roof_flops'])
    assert found['epoch_images']%batch_size==0 and all(len(timing['seconds']) >= 3 for timing in found['steps'].values())
    plain, ours = (sorted(pair[side] for pair in found['epochs']) for side in (0, 1))
    middle = len(plain)//2
    assert found['epoch_ratio']==pytest.approx(plain[middle]/ours[middle])
    assert not [word for word in ('/root', '/home', os.uname().nodename) if word in json.dumps(found)]


def test_bench_in_small(sample, monkeypatch):
    "Both sides really train; only the roof is made up."
    monkeypatch.setattr(bench_module, 'matmul_roof', lambda device, precision: 1e11)
    found = bench('resnet18', 2, dataset=sample, device='cpu', precision='fp32', compile=False, seconds=1)
    check_sums(found, 2)
    assert set(found['steps'])=={'plain loop', 'plain loop, tuned', 'ours'} and found['fastest']=='ours'
    assert set(found['plain_choice'])=={0, 1, 2} and found['plain_workers']==min((0, 1, 2), key=found['plain_choice'].get)
    assert json.loads(json.dumps(found))['step_ratio']==found['step_ratio'] # plain values
    assert f'{found["tuned_step_ratio"]:.2f}' in '\n'.join(bench_lines(found))


def test_too_few_images(sample):
    with pytest.raises(ValueError, match='--batch_size 501: at most 500 here'): bench('resnet18', 501, dataset=sample)


@pytest.mark.long
def test_the_command(command, cifar10_root, tmp_path):
    "The table and the JSON, with a network that is compiled."
    done = command('resnet_cifar', 'bench', '--batch_size', 2, '--root', cifar10_root, '--json', tmp_path/'b.json')
    found = json.loads((tmp_path/'b.json').read_text())
    check_sums(found, 2)
    assert set(found['steps'])=={'plain loop', 'plain loop, tuned', 'ours', 'ours, compiled'}
    assert done.stderr=='' and f'{found["step_ratio"]:.2f}' in done.stdout
