"All five sizes against torchvision's ResNet, in both directions."
import pytest
import torch
import torchvision
from torch import nn

from resnet_cifar.models import create_model, list_models


def torchvision_resnet(name):
    net = getattr(torchvision.models, name)(num_classes=10)
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


@pytest.mark.parametrize('name', list_models())
def test_same_logits_as_torchvision(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for source, target in ((create_model(name), torchvision_resnet(name)), (torchvision_resnet(name), create_model(name))):
        target.load_state_dict(normal_statistics(source).state_dict())
        with torch.no_grad(): ours, theirs = source.eval()(x), target.eval()(x)
        assert (ours - theirs).abs().max() < 1e-5*theirs.abs().max()


@pytest.mark.parametrize('name', list_models())
def test_gradient_reaches_every_parameter(name):
    torch.manual_seed(0)
    net = create_model(name, width=8)
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max()==0]==[]
