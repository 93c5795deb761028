"Blocks against torchvision's, shortcuts by hand, and how blocks start."
import pytest
import torch
import torchvision
from torch import nn

from resnet_cifar.blocks import BasicBlock, Bottleneck, PadShortcut, PoolBlock, conv1x1, conv3x3, init_weights, make_shortcut

BLOCKS = (BasicBlock, Bottleneck, PoolBlock)


def trained(block):
    "Batch norms with scales, shifts and statistics of their own: at initialisation one that is left out goes unnoticed."
    torch.manual_seed(1)
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight.data, m.running_var): tensor.uniform_(0.5, 1.5)
            for tensor in (m.bias.data, m.running_mean): tensor.normal_(0, 0.1)
    return block.eval()


@pytest.mark.parametrize('ours, theirs', [(BasicBlock, torchvision.models.resnet.BasicBlock), (Bottleneck, torchvision.models.resnet.Bottleneck)])
@pytest.mark.parametrize('stride, channels', [(1, 16), (2, 32)])
def test_same_as_torchvision(ours, theirs, stride, channels):
    torch.manual_seed(0)
    block = trained(ours(16*ours.expansion, channels, stride))
    twin = theirs(16*ours.expansion, channels, stride, block.downsample if stride==2 else None)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 16*ours.expansion, 9, 9)
    with torch.no_grad(): assert torch.equal(block(x), twin.eval()(x))


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('kind', ['A', 'B', 'C', None])
@pytest.mark.parametrize('stride', [1, 2])
def test_shape_and_gradients(block, kind, stride):
    torch.manual_seed(0)
    net = block(16, 16, stride, kind)
    out = net(torch.randn(2, 16, 9, 9))
    size = 9//stride if block is PoolBlock else -(-9//stride) # pooling rounds down, convolutions up
    assert out.shape==(2, 16*block.expansion, size, size)
    out.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max()==0]==[]


def test_a_plain_block_is_the_block_less_its_shortcut():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    residual = trained(BasicBlock(16, 16, shortcut='B'))
    plain = BasicBlock(16, 16, shortcut=None).eval()
    plain.load_state_dict(residual.state_dict())
    residual.relu = plain.relu = nn.Identity() # so that the sum can be taken apart
    with torch.no_grad(): assert torch.equal(residual(x), plain(x) + x)


def test_pad_shortcut_by_hand():
    x = torch.arange(2*3*5*5.).view(2, 3, 5, 5)
    y = PadShortcut(3, 7, stride=2)(x)
    assert y.shape==(2, 7, 3, 3) and y[1, 2].tolist()==[[125, 127, 129], [135, 137, 139], [145, 147, 149]] and y[:, 3:].abs().max()==0
    with pytest.raises(ValueError, match='7 -> 3'): PadShortcut(7, 3)


def test_shortcuts():
    kinds = {(kind, shape): type(make_shortcut(kind, *shape)) for kind in ('A', 'B', 'C') for shape in ((8, 8, 1), (8, 16, 2), (8, 8, 2))}
    assert kinds=={('A', (8, 8, 1)): nn.Identity, ('A', (8, 16, 2)): PadShortcut, ('A', (8, 8, 2)): PadShortcut,
                   ('B', (8, 8, 1)): nn.Identity, ('B', (8, 16, 2)): nn.Sequential, ('B', (8, 8, 2)): nn.Sequential,
                   ('C', (8, 8, 1)): nn.Sequential, ('C', (8, 16, 2)): nn.Sequential, ('C', (8, 8, 2)): nn.Sequential}
    assert make_shortcut(None, 8, 16, 2) is None
    for wrong in ('D', 'a', '', 1):
        with pytest.raises(ValueError, match='shortcut must be'): make_shortcut(wrong, 8, 8)


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('stride', [0, 3, 1.5])
def test_other_strides_are_errors(block, stride):
    for kind in ('B', None):
        with pytest.raises(ValueError, match=f'stride must be 1 or 2, got {stride}'): block(8, 8, stride, kind)


@pytest.mark.parametrize('conv, size', [(conv3x3, 3), (conv1x1, 1)])
def test_convolutions(conv, size):
    for stride in (1, 2):
        layer = conv(8, 12, stride)
        assert layer.weight.shape==(12, 8, size, size) and layer.bias is None
        assert layer(torch.randn(1, 8, 7, 7)).shape==(1, 12, -(-7//stride), -(-7//stride))


@pytest.mark.parametrize('block', [BasicBlock, Bottleneck])
def test_blocks_start_as_their_shortcut(block):
    torch.manual_seed(0)
    net = nn.Sequential(block(8*block.expansion, 8), block(8*block.expansion, 8))
    x = torch.randn(2, 8*block.expansion, 5, 5)
    init_weights(net, zero_init_residual=True)
    assert torch.equal(net(x), x.relu())
    init_weights(net)
    assert not torch.equal(net(x), x.relu())


def test_a_new_block_starts_as_it_says():
    "No list of classes has to be changed for it."
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def zero_init_last(self): nn.init.zeros_(self.scale)

    net = nn.Sequential(Scaled(), PoolBlock(4, 4))
    init_weights(net, zero_init_residual=True)
    assert net[0].scale.item()==0 and net[1].bn2.weight.tolist()==[1]*4 # behind a ReLU a scale of 0 would learn nothing


def test_initial_weights():
    torch.manual_seed(0)
    net = BasicBlock(32, 64, stride=2)
    with torch.no_grad():
        for p in net.parameters(): p.fill_(7)
    init_weights(net)
    for conv, fan_out in ((net.conv1, 64*9), (net.conv2, 64*9), (net.downsample[0], 64)):
        assert abs(conv.weight.std()*(fan_out/2)**0.5 - 1) < 0.05 and abs(conv.weight.mean()) < 0.01
    assert {(p.min().item(), p.max().item()) for n, p in net.named_parameters() if n in ('bn1.weight', 'downsample.1.weight')}=={(1, 1)}
    assert {(p.min().item(), p.max().item()) for n, p in net.named_parameters() if n.endswith('bias')}=={(0, 0)}
