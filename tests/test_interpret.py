"What the chapter on interpretation cannot show: independent implementations, odd files, whole commands, the report in a browser."
import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import CHROMIUM, CHROMIUM_FLAGS
import torch
import torch.nn.functional as F
from PIL import Image

from resnet_cifar import interpret
from resnet_cifar.blocks import BasicBlock
from resnet_cifar.checkpoint import FORMAT, facts_of, save_checkpoint, save_pretrained
from resnet_cifar.data import CLASSES, load_cifar10, load_image, sample_cifar10
from resnet_cifar.interpret import calibration, class_scores, examine, fit_temperature, grad_cam, predict_files, write_report
from resnet_cifar.models import ResNet, create_model

RED, WHITE, BLACK = (200, 30, 60), (255, 255, 255), (0, 0, 0)


def thin(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ResNet(BasicBlock, (1, 1, 1), width=8, **kwargs)


# --- compute functions against independent implementations ---

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
        sure = max(row)
        k = next(k for k in range(15) if sure <= (k + 1)/15)
        bins[k].append((sure, row.index(sure)==true))
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
    said, true = torch.randint(0, 4, (2, 300), generator=rng)
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    confusion.index_put_((true, said), torch.ones(300, dtype=torch.int64), accumulate=True)
    for c, score in enumerate(class_scores(confusion)):
        both = sum(s==c and t==c for s, t in zip(said.tolist(), true.tolist()))
        assert score==(both/said.tolist().count(c), both/true.tolist().count(c), true.tolist().count(c))


# --- plots ---

def test_every_plot_says_what_it_shows():
    "Axes with labels, a title, and lines that differ in more than colour."
    import inspect
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib.figure import Figure
    from resnet_cifar.training import TrainState, plot_history
    sample, model = sample_cifar10(), thin()
    images, targets = sample.test_images[:40], sample.test_labels[:40]
    exam = examine(model, images, targets, valid=(images, targets), num_corrupted=20)
    confusion = exam.metrics.confusion
    history = [dict(epoch=e, lr=0.1/(e + 1), train_loss=2 - e/4, valid_loss=2 - e/5, train_accuracy=e/5, valid_accuracy=e/6) for e in range(4)]
    draws = dict(
        plot_confusion=lambda ax: interpret.plot_confusion(confusion, ax=ax), plot_class_scores=lambda ax: interpret.plot_class_scores(class_scores(confusion), ax=ax),
        plot_answers=lambda ax: interpret.plot_answers(images, exam.probabilities, targets, ax=ax), plot_calibration=lambda ax: interpret.plot_calibration(exam.calibrations, ax=ax),
        plot_cams=lambda ax: interpret.plot_cams(images[:4], torch.rand(4, 32, 32), ax=ax), plot_filters=lambda ax: interpret.plot_filters(model.conv1.weight, ax=ax),
        plot_activations=lambda ax: interpret.plot_activations(interpret.activations(model, torch.randn(1, 3, 32, 32)), ax=ax), plot_corruptions=lambda ax: interpret.plot_corruptions(exam.corruptions, ax=ax))
    assert set(draws)=={name for name, f in vars(interpret).items() if name.startswith('plot_') and inspect.isfunction(f)}
    def check(ax, name):
        assert len(ax.get_title()) > 10, name
        if ax.axison: assert ax.get_xlabel() and ax.get_ylabel(), name
        lines = [line for line in ax.get_lines() if line.get_label()[0]!='_' or len(line.get_xdata()) > 2]
        styles = [(line.get_linestyle(), line.get_marker(), line.get_fillstyle()) for line in lines]
        assert len(set(styles))==len(styles), f'{name}: {styles}'
    for name, draw in draws.items():
        ax = Figure(figsize=(4, 3)).subplots()
        assert draw(ax) is ax
        check(ax, name)
    for ax in plot_history(history, Figure().subplots(1, 3)): check(ax, 'plot_history')
    equal = [row | dict(valid_accuracy=0.5) for row in history]
    assert plot_history(equal, Figure().subplots(1, 3))[1].get_title().endswith(f'epoch {TrainState(None, None, None, history=equal).best_epoch}')


def test_a_perfect_network_and_a_single_picture(tmp_path):
    "No mistake, or nothing but one, and nine classes without pictures: the report is written all the same."
    model, image = thin(), sample_cifar10().test_images[:1]
    said = interpret.predict(model, [interpret._ready(model, image)]).argmax(1)
    for target, heading in ((said, 'The surest right answers'), ((said + 1)%10, 'The surest mistakes')):
        exam = examine(model, image, target)
        assert exam.metrics.accuracy==(target==said).item()
        page = write_report(tmp_path, model, exam).read_text()
        assert [h for h in ('The surest right answers', 'The surest mistakes') if h in page]==[heading]
        assert not re.search(r'\bnan\b', re.sub(r'data:[^"]*', '', page), re.I)


# --- odd files ---

def png(width, height, rows=b''):
    "A PNG of 8-bit grey whose head says what we like."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def solid(mode, colour, size=(40, 50)): return Image.new(mode, size, colour)


def odd_files(folder):
    "name -> (colour that all 32x32 pixels should have, tolerance), or `None` where the file must be refused."
    wanted = {}
    def add(name, image, colour, tolerance=0, **options):
        image.save(folder/name, **options)
        wanted[name] = colour, tolerance
    def raw(name, content): (folder/name).write_bytes(content); wanted[name] = None
    rgb = solid('RGB', RED)
    add('plain.png', rgb, RED)
    add('plain.jpg', rgb, RED, 3, quality=95)
    add('plain.bmp', rgb, RED)
    add('plain.gif', rgb, RED)
    add('plain.tiff', rgb, RED)
    add('plain.webp', rgb, RED, lossless=True)
    add('plain.ppm', rgb, RED)
    add('plain.tga', rgb, RED)
    add('plain.jp2', rgb, RED, 1)
    add('wrong_name.txt', rgb, RED, format='PNG')
    add('no_ending', rgb, RED, format='PNG')
    add('progressive.jpg', rgb, RED, 3, progressive=True, quality=95)
    add('grey.png', solid('L', 77), (77,)*3)
    add('grey.jpg', solid('L', 77), (77,)*3, 1)
    add('one_bit.png', solid('1', 1), WHITE)
    add('grey_alpha.png', solid('LA', (0, 51)), (204,)*3)
    add('rgba.png', solid('RGBA', (*RED, 255)), RED)
    add('half_clear.png', solid('RGBA', (0, 0, 0, 51)), (204,)*3)
    add('all_clear.png', solid('RGBA', (*RED, 0)), WHITE)
    palette = solid('P', 1)
    palette.putpalette([0, 0, 0, *RED])
    add('palette.png', palette, RED)
    add('palette_clear.png', palette, WHITE, transparency=1)
    add('palette_clear.gif', palette, WHITE, transparency=1)
    add('cmyk.jpg', solid('CMYK', (0, 255, 255, 0)), (255, 0, 0), 3, quality=95)
    add('cmyk.tiff', solid('CMYK', (0, 0, 0, 255)), BLACK)
    add('deep.png', Image.fromarray(np.full((50, 40), 0x8012, np.uint16)), (0x80,)*3)
    add('deep.tiff', Image.fromarray(np.full((50, 40), 0x8012, np.uint16)), (0x80,)*3)
    add('int32.tiff', Image.fromarray(np.full((50, 40), 0x8012, np.int32)), (0x80,)*3)
    add('float.tiff', Image.fromarray(np.full((50, 40), 0.5, np.float32)), (128,)*3)
    add('not_a_number.tiff', Image.fromarray(np.full((50, 40), np.nan, np.float32)), BLACK)
    add('lab.tiff', solid('LAB', (0, 128, 128)), BLACK, 2)
    add('ycbcr.jpg', solid('YCbCr', (128, 128, 128)), (128,)*3, 1)
    add('animated.gif', rgb, RED, save_all=True, append_images=[solid('RGB', BLACK)]*3)
    add('animated.webp', rgb, RED, save_all=True, append_images=[solid('RGB', BLACK)]*3, lossless=True)
    add('pages.tiff', rgb, RED, save_all=True, append_images=[solid('RGB', BLACK)])
    add('icon.ico', solid('RGB', RED, (48, 48)), RED, 1)
    add('dot.png', solid('RGB', RED, (1, 1)), RED)
    wide = solid('RGB', BLACK, (10000, 1))
    wide.putpixel((4999, 0), RED)
    add('one_by_10000.png', wide, RED)
    add('10000_by_one.png', wide.transpose(Image.Transpose.ROTATE_90).transpose(Image.Transpose.FLIP_TOP_BOTTOM), RED)
    add('huge.png', solid('L', 77, (12000, 9000)), (77,)*3) # 108 million pixels: a telephone's
    upright = solid('RGB', BLACK, (300, 100)) # a band of red through the middle third, whichever way it is turned
    upright.paste(RED, (100, 0, 200, 100))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f'turned{orientation}.png', upright, RED, exif=exif)
    rgb.save(folder/'bad_exif.jpg', quality=95, exif=b'Exif\0\0nothing that is an EXIF')
    wanted['bad_exif.jpg'] = RED, 3
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    noisy.save(folder/'cut.tiff', compression='tiff_lzw')
    content = (folder/'cut.tiff').read_bytes()
    raw('cut.tiff', content[:200] + bytes(1000) + content[1200:]) # libtiff complains of it on its own
    raw('empty.png', b'')
    raw('text.png', b'not a picture at all')
    raw('cut.png', (folder/'plain.bmp').read_bytes()[:60])
    raw('cut.jpg', (folder/'plain.jpg').read_bytes()[:300])
    raw('wrong_sum.png', (folder/'plain.png').read_bytes().replace(b'IDAT', b'IDAX'))
    raw('bomb.png', png(50000, 50000))
    raw('bomb_wide.png', png(2**31 - 1, 1))
    raw('no_pixels.png', png(0, 10))
    raw('program.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n')
    raw('page.svg', b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>')
    return wanted


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    folder = tmp_path_factory.mktemp('odd')
    return folder, odd_files(folder)


def test_odd_files_one_by_one(odd):
    folder, wanted = odd
    assert len(wanted) >= 30
    for name, want in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if want is None:
                with pytest.raises(ValueError, match=name) as e: load_image(folder/name)
                assert '\n' not in str(e.value) and len(str(e.value)) < 300
                continue
            pixels = load_image(folder/name)
        assert (pixels.shape, pixels.dtype)==((3, 32, 32), torch.uint8)
        off = (pixels.flatten(1).int() - torch.tensor(want[0]).unsqueeze(1)).abs().max().item()
        assert off <= want[1], f'{name}: off by {off}'


def test_odd_files_by_the_command(odd, command, tmp_path):
    "Every file that can be read is answered, in order; every other costs a line on stderr and the exit code."
    folder, wanted = odd
    save_pretrained(thin(), tmp_path/'net')
    done = command('resnet_cifar', 'predict', '--ckpt', 'net', '--json', *[folder/name for name in wanted], code=1)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(a['file']).name for a in lines]==list(wanted)
    assert ['error' in a for a in lines]==[not want for want in wanted.values()]
    answers = [a for a in lines if 'error' not in a]
    refused = [name for name, want in wanted.items() if not want]
    lines = done.stderr.splitlines()
    assert len(lines)==len(refused) and all(line.startswith('error: ') and name in line for line, name in zip(lines, refused))
    assert all(len(a['probabilities'])==3 and a['class']==next(iter(a['probabilities'])) and a['probability']==max(a['probabilities'].values()) for a in answers)


# --- predict ---

@pytest.fixture
def pictures(tmp_path):
    "A network, and a folder of six pictures, one of them not named like one and one hidden."
    save_pretrained(thin(), tmp_path/'net')
    (tmp_path/'photos'/'deeper').mkdir(parents=True)
    images = sample_cifar10().test_images
    for i, name in enumerate(('a.png', 'b.png', 'deeper/c.png', '.hidden.png', 'notes')): Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(tmp_path/'photos'/name, format='PNG')
    return images


def test_predict_says_what_the_network_says(pictures, command, tmp_path):
    done = command('resnet_cifar', 'predict', '--ckpt', 'net', 'photos/b.png', 'photos', 'photos/notes', '--top_k', '10', '--json', '--precision', 'fp32', '--device', 'cpu')
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a['file'] for a in answers]==['photos/b.png', 'photos/a.png', 'photos/b.png', 'photos/deeper/c.png', 'photos/notes'] and done.stderr==''
    model, cifar = thin().eval(), [torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]
    for answer, i in zip(answers, (1, 0, 1, 2, 4)):
        with torch.no_grad(): p = model(((pictures[i]/255 - cifar[0])/cifar[1]).unsqueeze(0)).softmax(1)[0]
        assert list(answer['probabilities'].values())==pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-5)
    text = command('resnet_cifar', 'predict', 'photos/a.png', '--ckpt', 'net', '--top_k', '2', PYTHONIOENCODING='ascii').stdout.splitlines()
    assert text[0]=='photos/a.png' and len(text)==3 and '#' in text[1]


def test_explanations(pictures, command, tmp_path):
    done = command('resnet_cifar', 'predict', '--ckpt', 'net', 'photos', '--explain', 'why/deep', '--json')
    assert [json.loads(line)['explanation'] for line in done.stdout.splitlines()]==['why/deep/0001-a.png', 'why/deep/0002-b.png', 'why/deep/0003-c.png']
    assert 'lies in the folder photos' in command('resnet_cifar', 'predict', '--ckpt', 'net', 'photos', '--explain', 'photos/why', code=2).stderr
    assert sorted(p.name for p in (tmp_path/'why'/'deep').iterdir())==['0001-a.png', '0002-b.png', '0003-c.png']


def test_strange_names(pictures, command, tmp_path):
    "Names that no terminal can show are answered in one line each, broken or not."
    names = ['new\nline.png', 'esc\x1b[31m.png', os.fsdecode(b'not-utf8-\xff.png')]
    for name in names:
        try: shutil.copy(tmp_path/'photos'/'a.png', tmp_path/name)
        except OSError: pytest.skip(f'this file system has no {name!r}')
    (tmp_path/'bro\nken.png').write_text('no')
    done = command('resnet_cifar', 'predict', '--ckpt', 'net', '--top_k', '1', '--explain', 'why', *names, 'bro\nken.png', code=1)
    assert len(done.stdout.splitlines())==9 and '\x1b' not in done.stdout and done.stderr.count('\n')==1
    assert len([json.loads(line) for line in command('resnet_cifar', 'predict', '--ckpt', 'net', '--json', *names).stdout.splitlines()])==3
    assert len(list((tmp_path/'why').iterdir()))==3


def test_names_of_other_scripts(pictures, command, tmp_path):
    "A terminal that cannot show a name, and one that is too long once it is bytes."
    long = '猫'*82 # 246 bytes
    for name in ('猫', long): shutil.copy(tmp_path/'photos'/'a.png', tmp_path/f'{name}.png')
    done = command('resnet_cifar', 'predict', '--ckpt', 'net', '--top_k', '1', '--explain', 'why', '猫.png', f'{long}.png', 'photos/b.png', PYTHONIOENCODING='ascii')
    assert [line for line in done.stdout.splitlines() if 'png' in line and 'why' not in line]==['?.png', '?'*82 + '.png', 'photos/b.png']
    assert len(list((tmp_path/'why').iterdir()))==3


def test_help_describes_every_flag(command):
    said = ' '.join(command('resnet_cifar', 'predict', '--help').stdout.replace('│', ' ').split())
    assert 'files or folders, any number' in said and 'run folder (its best checkpoint' in said and 'so many classes for each picture' in said


def test_things_that_are_no_files(pictures, command, tmp_path):
    "A dangling link in a folder and a pipe cost a line; neither is passed over, and the pipe is not waited for."
    (tmp_path/'photos'/'gone.png').symlink_to('nowhere')
    os.mkfifo(tmp_path/'pipe.png')
    done = command('resnet_cifar', 'predict', '--ckpt', 'net', '--json', 'photos', 'pipe.png', code=1, timeout=120)
    assert len(done.stdout.splitlines())==5
    assert [line.split(':')[1].split()[0] for line in done.stderr.splitlines()]==['photos/gone.png', 'pipe.png']


def test_weights_that_are_no_numbers(command, tmp_path):
    model = thin()
    torch.nn.init.constant_(model.fc.bias, float('nan'))
    save_pretrained(model, tmp_path/'net')
    Image.new('RGB', (32, 32)).save(tmp_path/'a.png')
    assert command('resnet_cifar', 'predict', '--ckpt', 'net', 'a.png', code=2).stderr=='error: net: fc.bias is not finite\n'


def test_a_pipe_of_somebody_else(command, tmp_path):
    "Only our own output's reader may leave in silence."
    (tmp_path/'program.py').write_text("import sys; from resnet_cifar.fetch import one_line_errors\n@one_line_errors\ndef main(argv): raise BrokenPipeError(32, 'Broken pipe')\nsys.exit(main())")
    assert 'Broken pipe' in command('program', code=1, PYTHONPATH=str(tmp_path)).stderr


def test_reader_that_has_enough(pictures, tmp_path):
    "`predict … | head -1` ends without a traceback."
    process = subprocess.Popen([sys.executable, '-m', 'resnet_cifar', 'predict', '--ckpt', 'net', '--json', *['photos']*1000], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith('{')
    process.stdout.close()
    assert (process.wait(timeout=120), process.stderr.read())==(1, '')


def test_files_are_read_a_batch_at_a_time(monkeypatch, tmp_path):
    "So memory does not grow with their number."
    read = []
    monkeypatch.setattr(interpret, 'load_image', lambda path, size: read.append(path) or torch.zeros(3, size, size, dtype=torch.uint8))
    answers = predict_files(thin(), [tmp_path/str(i) for i in range(1000)], batch_size=10)
    assert next(answers).path.name=='0' and len(read)==10
    assert sum(1 for _ in answers)==999 and len(read)==1000


# --- the report ---

@pytest.fixture(scope='module')
def report(tmp_path_factory):
    sample = sample_cifar10()
    model = thin()
    exam = examine(model, sample.test_images[:100], sample.test_labels[:100], valid=(sample.train_images[:100], sample.train_labels[:100]), tta=True, num_corrupted=50)
    return write_report(tmp_path_factory.mktemp('report'), model, exam)


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here')
@pytest.mark.parametrize('width', [390, 1200])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_report_in_a_browser(report, scheme, width):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme)
        asked, said = [], []
        page.on('request', lambda request: asked.append(request.url))
        page.on('console', lambda message: said.append(message.text))
        page.on('pageerror', lambda error: said.append(str(error)))
        page.goto(report.as_uri())
        page.wait_for_load_state('networkidle')
        assert [url for url in asked if not url.startswith('data:')]==[report.as_uri()] and said==[]
        pictures = page.evaluate('[...document.images].map(i => [i.alt, i.naturalWidth, i.getBoundingClientRect().right, i.currentSrc.length])')
        assert len(pictures) > 40 and all(alt.strip() and natural > 0 and right <= width for alt, natural, right, _ in pictures)
        assert page.evaluate('document.documentElement.scrollWidth')==width # nothing to scroll sideways
        assert page.evaluate('Math.min(...[...document.querySelectorAll("p, td, th, figcaption, h2")].map(e => parseFloat(getComputedStyle(e).fontSize)))') >= 12
        backdrop = Image.open(io.BytesIO(page.screenshot())).convert('L').getpixel((2, 2))
        assert backdrop > 200 if scheme=='light' else backdrop < 60
        browser.close()


def test_report_figures_differ_by_theme(report):
    "Each plot is there for light and for dark; dark ones have light lines on a clear ground."
    both = re.findall(r'srcset="data:image/png;base64,([^"]+)"><img src="data:image/png;base64,([^"]+)"', report.read_text())
    assert len(both)==6
    for dark, light in both:
        shades = []
        for code in (dark, light):
            picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert('RGBA'))
            assert picture[0, 0, 3]==0 # clear
            title = picture[next(row for row in range(len(picture)) if (picture[row, :, 3] > 200).any())] # the upper edge of its letters
            shades.append(np.median(title[title[:, 3] > 200][:, :3]))
        assert shades[0] > 200 and shades[1] < 60


def test_numbers_of_the_report(report):
    numbers = json.loads((report.parent/'metrics.json').read_text())
    confusion = np.array(numbers['confusion'])
    assert confusion.sum()==numbers['num_images']==100 and np.trace(confusion)/100==pytest.approx(numbers['accuracy'])
    assert numbers['corruptions']['num_images']==50 and {k: len(v) for k, v in numbers['corruptions']['accuracy'].items()}==dict.fromkeys(('noise', 'blur', 'contrast', 'jpeg'), 6)
    assert numbers['tta_accuracy'] is not None and f"{numbers['tta_accuracy']:.4f}" in report.read_text()


def run_for(command, cifar10_root, valid_size, *more):
    small = '--root', cifar10_root, '--model_name', 'resnet20', '--width', '4', '--limit_train', '256', '--limit_test', '300', '--batch_size', '64', '--num_epochs', '1', '--num_workers', '0'
    return command('resnet_cifar', 'train', *small, '--valid_size', valid_size, '--ckpt_dir', f'run{valid_size}', *more)


def test_report_of_a_run(command, cifar10_root, tmp_path):
    "The temperature is fitted on what the run set aside, and on nothing where it set nothing aside."
    for valid_size in (200, 0):
        run_for(command, cifar10_root, valid_size)
        words = 'resnet_cifar', 'evaluate', '--root', cifar10_root, '--ckpt', f'run{valid_size}', '--limit_test', '300', '--tta'
        said = command(*words, '--report', f'report{valid_size}').stdout
        assert said.splitlines()[1:-1]==command(*words).stdout.splitlines() # the same with and without a report
        numbers = json.loads((tmp_path/f'report{valid_size}'/'metrics.json').read_text())
        assert f"test accuracy {numbers['accuracy']:.4f}" in said and f"with mirror images averaged {numbers['tta_accuracy']:.4f}" in said
        assert numbers['accuracy']==pytest.approx(json.loads((tmp_path/f'run{valid_size}'/'result.json').read_text())['test_accuracy'], abs=0.011) # within three images: bf16 in other batches
        assert (numbers['temperature'] is None)==(valid_size==0)
        assert ('No temperature was fitted' in (tmp_path/f'report{valid_size}'/'report.html').read_text())==(valid_size==0)


def test_networks_of_their_own(command, cifar10_root, tmp_path):
    "Mean and standard deviation are the network's; ten classes of another kind are not CIFAR-10's."
    model = thin()
    model.pretrained_cfg = facts = dict(classes=list(CLASSES), mean=[0.3, 0.4, 0.5], std=[0.1, 0.2, 0.3], image_size=32)
    save_pretrained(model, tmp_path/'own')
    words = 'resnet_cifar', 'evaluate', '--root', cifar10_root, '--limit_test', '100', '--precision', 'fp32', '--device', 'cpu', '--ckpt'
    x = (load_cifar10(cifar10_root).test_images[:100]/255 - torch.tensor(facts['mean']).view(3, 1, 1))/torch.tensor(facts['std']).view(3, 1, 1)
    with torch.no_grad(): loss = F.cross_entropy(model.eval()(x), load_cifar10(cifar10_root).test_labels[:100]).item()
    for more in ((), ('--report', 'report')): assert f', loss {loss:.4f} ' in command(*words, 'own', *more).stdout
    model.pretrained_cfg = facts | dict(classes=[f'kind{i}' for i in range(10)])
    save_pretrained(model, tmp_path/'other')
    assert "its 10 classes (kind0, kind1, kind2, …) are not CIFAR-10's" in command(*words, 'other', code=2).stderr
    save_checkpoint(tmp_path/'bare.ckpt', dict(format=FORMAT, model=model.state_dict(), **facts_of(thin()))) # without settings
    assert 'report' in command(*words, 'bare.ckpt', '--report', 'report').stdout


# --- TensorBoard ---

def test_tensorboard_goes_on_without_gaps(command, cifar10_root, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    history = lambda: [line.split(',') for line in (tmp_path/'run200'/'history.csv').read_text().splitlines()]
    for epochs in ('2', '3'): # the second goes on
        run_for(command, cifar10_root, 200, '--tensorboard', '--resume', 'auto', '--num_epochs', epochs)
        events = accumulator.EventAccumulator(str(tmp_path/'run200'/'tensorboard'))
        events.Reload()
        header, *rows = history()
        for name, column in (('loss/train', 'train_loss'), ('accuracy/valid', 'valid_accuracy'), ('learning rate', 'lr')):
            points = events.Scalars(name)
            assert [p.step for p in points]==list(range(int(epochs)))
            assert [p.value for p in points]==pytest.approx([float(row[header.index(column)]) for row in rows], rel=1e-6)
    run_for(command, cifar10_root, 200, '--overwrite')
    assert not (tmp_path/'run200'/'tensorboard').exists() # those of the old run are gone


def test_tensorboard_without_the_extra(command, tmp_path):
    (tmp_path/'program.py').write_text("""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name=='tensorboard' else find(name, *rest)
from resnet_cifar.cli import main
sys.exit(main())
""")
    done = command('program', 'train', '--tensorboard', code=2, PYTHONPATH=str(tmp_path))
    assert done.stderr=="error: --tensorboard needs tensorboard: pip install 'resnet_cifar[tensorboard]'\n"
    assert {p.name for p in tmp_path.iterdir()} <= {'program.py', '__pycache__'}
