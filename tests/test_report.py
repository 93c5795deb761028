"The report: its numbers, its page in a browser, and the command that writes it."
import base64
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHROMIUM, CHROMIUM_FLAGS
from matplotlib.figure import Figure
from PIL import Image

from resnet_cifar.blocks import BasicBlock
from resnet_cifar.cli import main
from resnet_cifar.data import CLASSES, sample_cifar10
from resnet_cifar.facts import inputs_for
from resnet_cifar.models import ResNet
from resnet_cifar.report import examine, plot_corruptions, write_report
from resnet_cifar.evaluation import predict
from resnet_cifar.weights import save_pretrained


def thin(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ResNet(BasicBlock, (1, 1, 1), width=8, **kwargs)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    sample, model = sample_cifar10(), thin()
    valid = sample.train_images[:100], sample.train_labels[:100]
    exam = examine(model, sample.test_images[:100], sample.test_labels[:100], valid=valid, tta=True, num_corrupted=50)
    return write_report(tmp_path_factory.mktemp('report'), model, exam)


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here')
@pytest.mark.parametrize('width', [390, 1200])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_report_in_a_browser(report, scheme, width):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme)
        asked, messages = [], []
        page.on('request', lambda request: asked.append(request.url))
        page.on('console', lambda message: messages.append(message.text))
        page.on('pageerror', lambda error: messages.append(str(error)))
        page.goto(report.as_uri())
        page.wait_for_load_state('networkidle')
        assert [url for url in asked if not url.startswith('data:')]==[report.as_uri()] and messages==[]
        images = page.evaluate('[...document.images].map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().right, i.currentSrc.length])')
        assert len(images) > 20 and all(alt.strip() and natural > 0 and right <= width for alt, natural, right, _ in images)
        assert page.evaluate('document.documentElement.scrollWidth')==width # nothing to scroll sideways
        assert page.evaluate('Math.min(...[...document.querySelectorAll("p, td, th, figcaption, h2")].map(e => parseFloat(getComputedStyle(e).fontSize)))') >= 12
        backdrop = Image.open(io.BytesIO(page.screenshot())).convert('L').getpixel((2, 2))
        assert backdrop > 200 if scheme=='light' else backdrop < 60
        browser.close()


def test_report_figures_differ_by_theme(report):
    "Each plot is there for light and for dark; dark ones have light lines on a clear ground."
    both = re.findall(r'srcset="data:image/png;base64,([^"]+)">\s*<img src="data:image/png;base64,([^"]+)"', report.read_text())
    assert len(both)==3
    for dark, light in both:
        shades = []
        for code in (dark, light):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert('RGBA'))
            assert pixels[0, 0, 3]==0 # clear
            title = pixels[next(row for row in range(len(pixels)) if (pixels[row, :, 3] > 200).any())] # the upper edge of its letters
            shades.append(np.median(title[title[:, 3] > 200][:, :3]))
        assert shades[0] > 200 and shades[1] < 60


def test_numbers_of_the_report(report):
    numbers = json.loads((report.parent/'metrics.json').read_text())
    confusion = np.array(numbers['confusion'])
    assert confusion.sum()==numbers['num_images']==100 and np.trace(confusion)/100==pytest.approx(numbers['accuracy'])
    assert numbers['corruptions']['num_images']==50 and {k: len(v) for k, v in numbers['corruptions']['accuracy'].items()}==dict.fromkeys(('noise', 'blur', 'contrast', 'jpeg'), 6)
    assert numbers['tta_accuracy'] is not None and f"{numbers['tta_accuracy']:.4f}" in report.read_text()


def test_corruption_plot_is_labelled():
    ax = plot_corruptions({kind: [0.9, 0.8, 0.7, 0.6, 0.5, cost] for kind, cost in zip('abcd', (0.4, 0.3, 0.2, 0.1))}, Figure().subplots())
    assert ax.get_title()=='d costs most: 0.54 on average, 0.90 without' # (0.8 + 0.7 + 0.6 + 0.5 + 0.1)/5
    assert ax.get_xlabel() and ax.get_ylabel()
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.get_lines()})==4


def test_a_perfect_network_and_a_single_image(tmp_path):
    "No mistake, or nothing but one, and nine classes without images: the report is written all the same."
    model, image = thin(), sample_cifar10().test_images[:1]
    predicted = predict(model, [inputs_for(model, image)]).argmax(1)
    headings = 'The most confident correct predictions', 'The most confident mistakes'
    for target, heading in zip((predicted, (predicted + 1)%10), headings):
        exam = examine(model, image, target)
        assert exam.metrics.accuracy==(target==predicted).item()
        page = write_report(tmp_path, model, exam).read_text()
        assert [h for h in headings if h in page]==[heading]
        assert not re.search(r'\bnan\b', re.sub(r'data:[^"]*', '', page), re.I)


def test_names_are_escaped(tmp_path):
    "Whatever a class is called, the page holds its name and nothing else."
    model, sample = thin(), sample_cifar10()
    model.pretrained_cfg = dict(classes=['<b>cat</b>', *CLASSES[1:]], mean=[0.5]*3, std=[0.25]*3, image_size=32)
    page = write_report(tmp_path, model, examine(model, sample.test_images[:20], sample.test_labels[:20]), about='<script>').read_text()
    assert '<b>cat' not in page and '&lt;b&gt;cat&lt;/b&gt;' in page and '<script>' not in page


def test_the_command_reports_what_the_network_answers(tmp_path, capsys, monkeypatch):
    "Mean and standard deviation are the network's; ten classes of another kind are not CIFAR-10's."
    sample, model = sample_cifar10(), thin()
    monkeypatch.setattr('resnet_cifar.data.load_cifar10', lambda root, skip_checksum=False: sample)
    facts = dict(classes=list(CLASSES), mean=[0.3, 0.4, 0.5], std=[0.1, 0.2, 0.3], image_size=32)
    model.pretrained_cfg = facts
    save_pretrained(model, tmp_path/'own')
    x = (sample.test_images[:100]/255 - torch.tensor(facts['mean']).view(3, 1, 1))/torch.tensor(facts['std']).view(3, 1, 1)
    with torch.no_grad(): loss = F.cross_entropy(model.eval()(x), sample.test_labels[:100]).item()
    words = ['evaluate', '--limit_test', '100', '--precision', 'fp32', '--device', 'cpu', '--tta', '--ckpt']
    assert main([*words, str(tmp_path/'own')])==0
    plain = capsys.readouterr().out
    assert f', loss {loss:.4f} ' in plain
    assert main([*words, str(tmp_path/'own'), '--report', str(tmp_path/'report')])==0
    assert plain.strip() in capsys.readouterr().out # the same with and without a report
    page = (tmp_path/'report'/'report.html').read_text()
    assert 'No temperature was fitted' in page # nobody knows what it was trained on
    model.pretrained_cfg = facts | dict(classes=[f'kind{i}' for i in range(10)])
    save_pretrained(model, tmp_path/'other')
    assert main([*words, str(tmp_path/'other')])==2
    assert 'its classes are not CIFAR-10' in capsys.readouterr().err
