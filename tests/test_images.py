"Odd files, many files, and what `resnet-cifar predict` prints about them."
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_cifar import images as images_module
from resnet_cifar.cli import main
from resnet_cifar.data import CLASSES, sample_cifar10
from resnet_cifar.answers import answer_json, answer_text
from resnet_cifar.flags import printable
from resnet_cifar.images import Answer, list_images, load_image, predict_files, write_explanation
from resnet_cifar.models import create_model
from resnet_cifar.weights import save_pretrained

RED, WHITE, BLACK = (200, 30, 40), (255, 255, 255), (0, 0, 0)


def thin():
    torch.manual_seed(0)
    return create_model('resnet20', width=8).eval()


# ---------------------------------------------------------------- odd files

def png(width, height, rows=b''):
    "A PNG of 8-bit grey whose head says what we like."
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def solid(mode, colour, size=(40, 50)): return Image.new(mode, size, colour)


def odd_files(folder):
    "name -> (colour that all 32x32 pixels should have, tolerance), or `None` where the file must be refused."
    wanted = {}
    def add(name, image, colour, tolerance=0, **options):
        image.save(folder/name, **options)
        wanted[name] = colour, tolerance
    def raw(name, content):
        (folder/name).write_bytes(content)
        wanted[name] = None
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
    raw('text.png', b'not an image at all')
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


def test_a_photo_in_every_form(tmp_path):
    "Noise of 384 x 256 pixels: the forms give the same 32x32, up to what the form loses."
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).resize((384, 256), Image.Resampling.BICUBIC)
    middle = photo.crop((64, 0, 320, 256))
    def pixels(image): return torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BICUBIC, reducing_gap=3))).float()
    def off(name, image, want, **options):
        image.save(tmp_path/name, **options)
        return (load_image(tmp_path/name).permute(1, 2, 0).float() - want).abs().mean().item()
    colour, grey = pixels(middle), pixels(middle.convert('L')).unsqueeze(2)
    deep = np.asarray(photo.convert('L')).astype(np.uint16)*257
    for name, image, options, most in (('a.png', photo, {}, 0), ('a.tiff', photo, {}, 0), ('a.webp', photo, dict(lossless=True), 0), ('a.jpg', photo, dict(quality=95), 2), ('c.tiff', photo.convert('CMYK'), {}, 0)):
        assert off(name, image, colour, **options) <= most, name
    for name, image in (('g.png', photo.convert('L')), ('la.png', photo.convert('LA')), ('i16.png', Image.fromarray(deep)), ('f.tiff', Image.fromarray(deep.astype(np.float32)/65535))):
        assert off(name, image, grey) <= 1, name


# ---------------------------------------------------------------- many files

@pytest.fixture
def photos(tmp_path, monkeypatch):
    "The current folder has a network and a folder of images, one of them not named like one and one hidden."
    monkeypatch.chdir(tmp_path)
    save_pretrained(thin(), 'net')
    Path('photos', 'deeper').mkdir(parents=True)
    pixels = sample_cifar10().test_images
    for i, name in enumerate(('a.png', 'b.png', 'deeper/c.png', '.hidden.png', 'notes')): Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(f'photos/{name}', format='PNG')
    return pixels


def predict(capfd, *words, code=0):
    "The command: what it printed on stdout and stderr, line by line."
    assert main(['predict', '--ckpt', 'net', '--device', 'cpu', '--precision', 'fp32', *map(str, words)])==code
    done = capfd.readouterr()
    return done.out.splitlines(), done.err.splitlines()


def test_list_images(photos):
    assert list(map(str, list_images(['photos/notes', 'photos', 'photos/b.png'])))==['photos/notes', 'photos/a.png', 'photos/b.png', 'photos/deeper/c.png', 'photos/b.png']
    Path('empty').mkdir()
    for path, said in (('empty', 'no images'), ('nowhere', 'no such file')):
        with pytest.raises(FileNotFoundError, match=said): list_images([path])


def test_predict_says_what_the_network_says(photos, capfd):
    out, err = predict(capfd, 'photos/b.png', 'photos', 'photos/notes', '--top_k', '10', '--json')
    answers = [json.loads(line) for line in out]
    assert [a['file'] for a in answers]==['photos/b.png', 'photos/a.png', 'photos/b.png', 'photos/deeper/c.png', 'photos/notes'] and err==[]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    for answer, i in zip(answers, (1, 0, 1, 2, 4)):
        with torch.no_grad(): p = thin()(((photos[i]/255 - mean)/std).unsqueeze(0)).softmax(1)[0]
        assert list(answer['probabilities'].values())==pytest.approx(p.sort(descending=True).values.tolist(), abs=1e-5)
        assert list(answer['probabilities'])==[CLASSES[c] for c in p.sort(descending=True).indices]
        assert answer['class']==CLASSES[p.argmax()] and answer['probability']==answer['probabilities'][answer['class']]


def test_odd_files_by_the_command(odd, photos, capfd):
    "Every file that can be read is answered, in order; every other costs a line on stderr and the exit code, and libtiff says nothing."
    folder, wanted = odd
    out, err = predict(capfd, '--json', *(folder/name for name in wanted), code=1)
    lines = [json.loads(line) for line in out]
    assert [Path(a['file']).name for a in lines]==list(wanted)
    assert ['error' in a for a in lines]==[not want for want in wanted.values()]
    refused = [name for name, want in wanted.items() if not want]
    assert len(err)==len(refused) and all(line.startswith('error: ') and name in line for line, name in zip(err, refused))


def test_explanations(photos, capfd):
    out, _ = predict(capfd, 'photos', '--explain', 'why/deep', '--json')
    names = ['0001-a.png', '0002-b.png', '0003-c.png']
    assert [json.loads(line)['explanation'] for line in out]==[f'why/deep/{name}' for name in names]
    assert sorted(p.name for p in Path('why', 'deep').iterdir())==names
    drawn = Image.open('why/deep/0001-a.png')
    assert drawn.size==(772, 288)
    small = torch.from_numpy(np.array(drawn.crop((2, 2, 770, 258)).resize((96, 32), Image.Resampling.NEAREST))).permute(2, 0, 1)
    assert torch.equal(small[:, :, :32], photos[0])       # on the left what it saw
    assert (small[:, :, 32:64] <= photos[0]).all()        # beside it the same with less light
    assert small[:, :, 64:].max()==255                    # and the map, with its peak


def test_an_explanation_is_whole_or_not_there(photos, monkeypatch):
    answer = next(predict_files(thin(), ['photos/a.png']))
    monkeypatch.setattr(Image.Image, 'save', lambda self, path, *rest, **options: Path(path).write_bytes(b'half') and 1/0)
    with pytest.raises(ZeroDivisionError): write_explanation('why.png', thin(), answer)
    assert [p.name for p in Path().iterdir() if p.is_file()]==[]


def test_strange_names(photos, capfd):
    "Names that no terminal can show are answered in one line each, broken or not."
    names = ['new\nline.png', 'esc\x1b[31m.png', os.fsdecode(b'not-utf8-\xff.png')]
    for name in names:
        try: shutil.copy('photos/a.png', name)
        except OSError: pytest.skip(f'this file system has no {name!r}')
    Path('bro\nken.png').write_text('no')
    out, err = predict(capfd, '--top_k', '1', '--explain', 'why', *names, 'bro\nken.png', code=1)
    assert len(out)==9 and '\x1b' not in ''.join(out) and len(err)==1
    assert len(predict(capfd, '--json', *names)[0])==3
    assert len(list(Path('why').iterdir()))==3


def test_names_of_other_scripts(photos, capfd, monkeypatch):
    "A terminal that cannot show a name, and one that is too long once it is bytes."
    long = '猫'*82 # 246 bytes
    for name in ('猫', long): shutil.copy('photos/a.png', f'{name}.png')
    out, _ = predict(capfd, '--top_k', '1', '--explain', 'why', '猫.png', f'{long}.png')
    assert len(list(Path('why').iterdir()))==2 and out[0]=='猫.png'
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='ascii'))
    answer = Answer(Path('猫.png'), None, torch.tensor([0.25, 0.75]), None)
    assert answer_text(answer, ('猫', 'dog')).splitlines()==['?.png', f'  dog          0.750  {"#"*22}', f'  ?            0.250  {"#"*8}']
    assert printable('a\nb\x1bc\ud800')=='a?b?c?'


def test_answers_in_words():
    answer = Answer(Path('a.png'), None, torch.tensor([0.2, 0.5, 0.1, 0.2]), None)
    assert [line.split()[0] for line in answer_text(answer, 'abcd').splitlines()]==['a.png', 'b', 'a', 'd'] # equal ones in the classes' order
    assert json.loads(answer_json(answer, 'abcd', 2, Path('why.png')))=={'file': 'a.png', 'class': 'b', 'probability': 0.5, 'probabilities': dict(b=0.5, a=0.2), 'explanation': 'why.png'}
    assert json.loads(answer_json(Answer(Path('a.png'), None, None, 'broken'), 'abcd'))==dict(file='a.png', error='broken')


def test_things_that_are_no_files(photos, capfd):
    "A dangling link in a folder and a pipe cost a line; neither is passed over, and the pipe is not waited for."
    Path('photos', 'gone.png').symlink_to('nowhere')
    os.mkfifo('pipe.png')
    out, err = predict(capfd, '--json', 'photos', 'pipe.png', code=1)
    assert len(out)==5
    assert [line.split(':')[1].split()[0] for line in err]==['photos/gone.png', 'pipe.png']


def test_reader_that_has_enough(photos):
    "`predict … | head -1` ends without a traceback."
    process = subprocess.Popen([sys.executable, '-m', 'resnet_cifar', 'predict', '--ckpt', 'net', '--json', *['photos']*1000], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith('{')
    process.stdout.close()
    assert (process.wait(timeout=120), process.stderr.read())==(1, '')


def test_files_are_read_a_batch_at_a_time(monkeypatch, tmp_path):
    "So memory does not grow with their number."
    read = []
    monkeypatch.setattr(images_module, 'load_image', lambda path, size: read.append(path) or torch.zeros(3, size, size, dtype=torch.uint8))
    answers = predict_files(thin(), [tmp_path/str(i) for i in range(100)], batch_size=10)
    assert next(answers).path.name=='0' and len(read)==10
    assert sum(1 for _ in answers)==99 and len(read)==100


def test_size_and_classes_of_the_network_are_used(photos, capfd):
    model = create_model('resnet20', num_classes=2, width=8)
    model.pretrained_cfg = dict(classes=['cat', 'dog'], mean=[0.5]*3, std=[0.25]*3, image_size=48)
    answer, = predict_files(model, ['photos/a.png'])
    assert answer.image.shape==(3, 48, 48)
    with torch.no_grad(): expected = model.eval()((answer.image/255 - 0.5).unsqueeze(0)/0.25).softmax(1)[0]
    torch.testing.assert_close(answer.probabilities, expected, atol=1e-5, rtol=1e-5)
    save_pretrained(model, 'pets')
    assert main(['predict', '--ckpt', 'pets', 'photos/a.png', '--json', '--device', 'cpu'])==0
    assert set(json.loads(capfd.readouterr().out)['probabilities'])=={'cat', 'dog'}


def test_what_is_refused(photos, capfd):
    for words, said in (((), 'images'), (('nowhere.png',), 'no such file'), (('photos', '--top_k', '0'), '--top_k 0'), (('photos', '--explain', 'photos/a.png'), 'is a file')):
        assert main(['predict', '--ckpt', 'net', *words])==2
        out, err = capfd.readouterr()
        assert out=='' and err.count('\n')==1 and said in err, err
