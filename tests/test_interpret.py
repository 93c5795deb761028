"Scores, calibration and Grad-CAM against independent implementations, and what plots say."
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from resnet_cifar.interpret import (
    calibration, class_scores, fit_temperature, grad_cam, plot_calibration, plot_confusion,
)
from resnet_cifar.models import create_model


@pytest.mark.parametrize('name', ['resnet18', 'resnet20', 'resnet50'])
def test_grad_cam_is_captums(name):
    captum = pytest.importorskip('captum.attr')
    torch.manual_seed(0)
    model, x, classes = create_model(name, width=8).eval(), torch.randn(3, 3, 32, 32), torch.tensor([3, 1, 8])
    for layer in (model.conv1, model.layer1, model.layer2[0], model.layer3[-1].conv2):
        theirs = captum.LayerGradCam(model, layer).attribute(x.clone().requires_grad_(), classes, relu_attributions=True).detach()
        theirs = F.interpolate(theirs, (32, 32), mode='bilinear')[:, 0]
        peak = theirs.amax((1, 2), keepdim=True)
        assert (peak > 0).any()
        torch.testing.assert_close(grad_cam(model, x, layer, classes), theirs/peak.clamp(min=1e-12), atol=1e-4, rtol=1e-4)


def test_calibration_by_a_loop():
    rng = torch.Generator().manual_seed(0)
    p, t = torch.randn(1000, 10, generator=rng).mul(2).softmax(1), torch.randint(0, 10, (1000,), generator=rng)
    bins = [[] for _ in range(15)]
    for row, true in zip(p.tolist(), t.tolist()):
        confidence = max(row)
        k = next(k for k in range(15) if confidence <= (k + 1)/15)
        bins[k].append((confidence, row.index(confidence)==true))
    error = sum(abs(sum(s for s, _ in b) - sum(r for _, r in b)) for b in bins)/1000
    found = calibration(p, t)
    assert found.counts.tolist()==[len(b) for b in bins]
    assert found.error==pytest.approx(error, abs=1e-9)


def test_temperature_by_a_grid():
    rng = torch.Generator().manual_seed(0)
    for scale in (0.3, 1, 4):
        truth = 2*torch.randn(2000, 5, generator=rng)
        t = torch.multinomial(truth.softmax(1), 1, generator=rng)[:, 0]
        grid = torch.logspace(-1.3, 1.3, 2001, dtype=torch.float64)
        best = grid[torch.stack([F.cross_entropy(scale*truth.double()/T, t) for T in grid]).argmin()].item()
        assert fit_temperature(scale*truth, t)==pytest.approx(best, rel=4e-3)
        assert best==pytest.approx(scale, rel=0.1) # what the labels were drawn with


def test_scores_by_counting():
    rng = torch.Generator().manual_seed(0)
    predicted, true = torch.randint(0, 4, (2, 300), generator=rng)
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    confusion.index_put_((true, predicted), torch.ones(300, dtype=torch.int64), accumulate=True)
    for c, score in enumerate(class_scores(confusion)):
        both = sum(s==c and t==c for s, t in zip(predicted.tolist(), true.tolist()))
        assert score==(both/predicted.tolist().count(c), both/true.tolist().count(c), true.tolist().count(c))


def test_plots_have_labels_and_say_what_they_show():
    "Axes with labels, a title that states a finding, and lines that differ in more than colour."
    confusion = torch.tensor([[5, 2, 0], [3, 4, 1], [0, 2, 9]])
    p, t = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).softmax(1), torch.arange(300)%3
    ax = plot_confusion(confusion, ('cat', 'dog', 'bird'), Figure().subplots())
    assert ax.get_title()=='dog is most often taken for cat: 3 of 8'
    assert (ax.get_xlabel(), ax.get_ylabel())==('predicted class', 'true class')
    assert plot_confusion(torch.eye(3).long(), 'abc', Figure().subplots()).get_title()=='No mistake among 3 images'
    ax = plot_calibration({'one': calibration(p, t), 'two': calibration(p.sqrt(), t)}, Figure().subplots())
    assert 'confident by' in ax.get_title() and ax.get_xlabel() and ax.get_ylabel()
    curves = [container.lines[0] for container in ax.containers]
    assert len({(line.get_linestyle(), line.get_marker()) for line in curves})==2
