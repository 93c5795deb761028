"One measurement: every image counts once, and nothing changes."
from collections import Counter

import pytest
import torch
from torch import nn

from resnet_cifar.evaluation import (
    evaluate, evaluating, log_probabilities, pick_device, pick_precision, predict)


def weights(model): return [v.clone() for v in model.state_dict().values()]
def are_equal(a, b): return len(a)==len(b) and all(map(torch.equal, a, b))


# ---------------------------------------------------------------- devices and precision

def test_settings_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert pick_device('auto')==torch.device('cuda')
    for is_real in (True, False):
        def is_supported(including_emulation=True, is_real=is_real): return is_real or including_emulation
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_supported)
        assert pick_precision('auto', torch.device('cuda'))==('bf16' if is_real else 'fp32')


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('cuda', 'tpu'):
        with pytest.raises(ValueError, match=f'^--device {name}: .*--device auto'): pick_device(name)


@pytest.mark.parametrize('feature, precision', [('amx_bf16', 'bf16'), ('avx512_bf16', 'bf16'), ('avx2', 'fp32')])
def test_a_cpu_takes_bf16_where_it_multiplies_it(monkeypatch, feature, precision):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {feature: True}, raising=False)
    assert pick_precision('auto', torch.device('cpu'))==precision


# ---------------------------------------------------------------- evaluation

class FirstPixel(nn.Module):
    "The class is written in the first pixel."
    def forward(self, images):
        classes = (images*255)[:, 0, 0, 0].round().long()
        return 9.*nn.functional.one_hot(classes, 20)


@pytest.mark.parametrize('kind', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_whole_numbers(kind):
    "Of 20 classes, true class times 20 plus prediction does not fit into 8 bits."
    labels = torch.arange(200)%20
    images = torch.zeros(200, 3, 8, 8)
    images[:, 0, 0, 0] = labels/255
    metrics = evaluate(FirstPixel(), list(zip(images.split(150), labels.to(kind).split(150))))
    assert metrics.accuracy==1 and metrics.confusion.equal(10*torch.eye(20, dtype=torch.int64))


def test_images_alone_and_modes():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model[1].eval() # one module in another mode than the rest
    before = weights(model)
    images = torch.randn(7, 4)
    log_p, targets = log_probabilities(model, images.split(3))
    assert targets is None and log_p.shape==(7, 3) and are_equal(weights(model), before)
    assert [module.training for module in model]==[True, False, True]
    assert predict(model, [(images, torch.zeros(7))]).equal(log_p.exp())
    with pytest.raises(KeyError):
        with evaluating(model): raise KeyError
    assert model.training


def test_two_views_of_an_image_and_its_mirror_image():
    "Of a model that looks at the left column alone: p = (x, 1 - x) there, the mean for both sides."
    class Left(nn.Module):
        def forward(self, images): return images[:, :2, 0, 0].log()
    left, right = torch.tensor([0.9, 0.1]), torch.tensor([0.3, 0.7])
    images = torch.stack([left, right], 1)[None, :, None] # (1, 2, 1, 2)
    assert torch.allclose(predict(Left(), [images], views=2), torch.tensor([[0.6, 0.4]]))
    for views in (0, 3, True + 3):
        with pytest.raises(ValueError, match='views must be 1, 2 or 6'): predict(Left(), [images], views=views)


def test_six_views_by_hand():
    "Of a model that looks at the left pixel of the middle row alone; at the border the image is reflected."
    class Left(nn.Module):
        def forward(self, images): return torch.stack([images[:, 0, 1, 0], 1 - images[:, 0, 1, 0]], 1).log()
    images = torch.tensor([[0.2, 0.5, 0.6], [0.1, 0.3, 0.7], [0.4, 0.8, 0.9]])[None, None]
    unmoved, down_right, up_left = (0.1, 0.7), (0.5, 0.5), (0.8, 0.8) # as it is, and mirrored
    expected = sum(unmoved)/4 + sum(down_right + up_left)/8
    assert torch.allclose(predict(Left(), [images], views=6), torch.tensor([[expected, 1 - expected]]))


def test_evaluation_waits_for_a_gpu_once():
    "As many copies to the host for three batches as for one."
    def copies(num_batches):
        count = Counter()
        class Far(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function is torch.Tensor.cpu: count['cpu'] += 1
                return super().__torch_function__(function, types, args, kwargs or {})
        loaded = [(torch.randn(4, 3, 8, 8).as_subclass(Far), torch.arange(4).as_subclass(Far))
                  for _ in range(num_batches)]
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), loaded)
        return count['cpu']
    assert copies(1)==copies(3)==2 # log-probabilities and targets
