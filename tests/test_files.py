"Files that are whole at every moment, a lock that ends with its process, errors before the work."
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from resnet_cifar.files import check_seal, locked, read_json, replacing, require_output_file, require_writable_folder, seal, write_json


def names(folder): return sorted(path.name for path in folder.iterdir())


def save(path, text, **options):
    with replacing(path, **options) as temporary: temporary.write_text(text)


def test_the_old_file_stays_as_previous(tmp_path):
    path = tmp_path/'last.ckpt'
    for number in range(4): save(path, str(number), keep='previous.ckpt')
    assert (path.read_text(), (tmp_path/'previous.ckpt').read_text())==('3', '2') and names(tmp_path)==['last.ckpt', 'previous.ckpt']


@pytest.mark.parametrize('step', ['write', 'fsync', 'link and copyfile', 'replace'])
def test_a_failure_before_the_renaming_leaves_the_old_files(tmp_path, monkeypatch, step):
    path = tmp_path/'last.ckpt'
    for number in range(2): save(path, str(number), keep='previous.ckpt')
    def fail(*_): raise OSError(28, 'No space left on device')
    if step=='fsync': monkeypatch.setattr(os, 'fsync', fail)
    if step=='replace': monkeypatch.setattr(os, 'replace', fail)
    if step.startswith('link'):
        monkeypatch.setattr(os, 'link', fail)
        monkeypatch.setattr('shutil.copyfile', fail)
    with pytest.raises(OSError, match='No space left'), replacing(path, keep='previous.ckpt') as temporary:
        temporary.write_text('2')
        if step=='write': fail()
    assert (path.read_text(), (tmp_path/'previous.ckpt').read_text())==('1', '0') and names(tmp_path)==['last.ckpt', 'previous.ckpt']


def test_after_the_renaming_nothing_fails(tmp_path, monkeypatch):
    "Some file systems cannot sync a folder: the new file is there all the same."
    real = os.fsync
    def only_files(number):
        if stat.S_ISDIR(os.fstat(number).st_mode): raise OSError(22, 'Invalid argument')
        real(number)
    monkeypatch.setattr(os, 'fsync', only_files)
    save(tmp_path/'a.json', 'new')
    assert (tmp_path/'a.json').read_text()=='new' and names(tmp_path)==['a.json']


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_link(*_): raise OSError(1, 'Operation not permitted')
    monkeypatch.setattr(os, 'link', no_link)
    for number in range(3): save(tmp_path/'last.ckpt', str(number), keep='previous.ckpt')
    assert [(tmp_path/name).read_text() for name in names(tmp_path)]==['2', '1']


def test_at_every_renaming_both_names_have_whole_files(tmp_path, monkeypatch):
    path, seen, real = tmp_path/'last.ckpt', [], os.replace
    for number in range(2): save(path, str(number), keep='previous.ckpt')
    def watched(source, target):
        seen.append((path.read_text(), (tmp_path/'previous.ckpt').read_text()))
        real(source, target)
        seen.append((path.read_text(), (tmp_path/'previous.ckpt').read_text()))
    monkeypatch.setattr(os, 'replace', watched)
    save(path, '2', keep='previous.ckpt')
    assert seen==[('1', '0'), ('1', '1'), ('1', '1'), ('2', '1')]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path/'.last.resnet_cifar-tmp.ckpt').write_text('half of epo')
    (tmp_path/'.previous.resnet_cifar-tmp.ckpt').write_text('half')
    for number in range(2): save(tmp_path/'last.ckpt', str(number), keep='previous.ckpt')
    assert names(tmp_path)==['last.ckpt', 'previous.ckpt'] and (tmp_path/'last.ckpt').read_text()=='1'


def test_json(tmp_path):
    path = tmp_path/'a.json'
    write_json(path, dict(lr=0.1, name='é', sizes=(16, 32), none=None))
    assert read_json(path)==dict(lr=0.1, name='é', sizes=[16, 32], none=None) and path.read_text().endswith('}\n')
    with pytest.raises(TypeError): write_json(path, dict(lr=object()))
    assert read_json(path)['lr']==0.1 # as before
    for raw in (b'', b'{"lr": 0.', b'[1]', b'3', b'null', b'\xff\xfe', b'['*100_000):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match='a.json is damaged') as error: read_json(path)
        assert '\n' not in str(error.value)
    with pytest.raises(FileNotFoundError, match='b.json: no such file'): read_json(tmp_path/'b.json')
    with pytest.raises(ValueError, match='damaged'): read_json(tmp_path)


def test_a_seal_is_a_comment_of_the_archive():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive: archive.writestr('weights', bytes(range(256))*4)
    before = buffer.getvalue()
    seal(buffer)
    raw = buffer.getvalue()
    assert len(raw)==len(before) + 20 + 64 and zipfile.ZipFile(io.BytesIO(raw)).testzip() is None
    check_seal(raw, 'a.ckpt', required=True)
    for place in (0, len(raw)//2, len(raw) - 70, len(raw) - 1):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match='a.ckpt is damaged'): check_seal(damaged, 'a.ckpt', required=True)
    check_seal(before, 'theirs.pth') # somebody else's file has none
    with pytest.raises(ValueError, match='there is no checksum at its end'): check_seal(before, 'theirs.pth', required=True)


HOLDER = '''
import os, sys, time
from resnet_cifar.files import locked
with locked(sys.argv[1]):
    if len(sys.argv) > 2 and not os.fork(): time.sleep(60) # a background process, as of a DataLoader
    print('mine', flush=True)
    sys.stdin.read()
'''


def holder(path, *words):
    process = subprocess.Popen([sys.executable, '-c', HOLDER, path, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline()=='mine\n'
    return process


def close(process):
    process.stdin.close()
    process.stdout.close()
    process.wait()


def test_one_at_a_time(tmp_path):
    "A lock that is held is an error with the caller's words, and no process's number; one whose process has ended is free, though its file is there."
    path = tmp_path/'.lock'
    first = holder(path)
    with pytest.raises(FileExistsError) as error, locked(path, busy='--ckpt_dir x: another process is training there'): pass
    assert str(error.value)=='--ckpt_dir x: another process is training there'
    with pytest.raises(FileExistsError, match='another process is at work here'), locked(path): pass
    first.kill()
    first.wait()
    assert path.exists()
    with locked(path): assert path.exists()
    assert not path.exists()
    close(first)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no forked processes here')
def test_background_processes_do_not_keep_a_lock(tmp_path):
    process = holder(tmp_path/'.lock', 'fork')
    children = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True).stdout.split() if sys.platform=='linux' else []
    process.kill()
    process.wait()
    with locked(tmp_path/'.lock'): pass # at once
    for child in children: os.kill(int(child), signal.SIGKILL)
    close(process)


def test_waiting(tmp_path, capsys):
    process = holder(tmp_path/'.lock')
    threading.Timer(0.3, process.stdin.close).start()
    begin = time.monotonic()
    with locked(tmp_path/'.lock', wait='another process fetches, waiting'): assert time.monotonic() - begin > 0.25
    assert capsys.readouterr().out=='another process fetches, waiting\n'
    close(process)


def test_many_at_once(tmp_path):
    "No addition is lost, although each reads, waits and writes."
    program = '''
import sys, time
from pathlib import Path
from resnet_cifar.files import locked
count = Path(sys.argv[1])
for _ in range(20):
    with locked(count.with_name('.lock'), wait=''):
        number = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(number + 1))
'''
    (tmp_path/'count').write_text('0')
    processes = [subprocess.Popen([sys.executable, '-c', program, tmp_path/'count'], stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in processes]==[0, 0, 0]
    assert (tmp_path/'count').read_text()=='60' and names(tmp_path)==['count']


def test_an_error_inside_releases_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), locked(tmp_path/'.lock'): raise RuntimeError
    assert names(tmp_path)==[]


def test_folders_and_files_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path/'a_file').touch()
    require_writable_folder('root', tmp_path/'new'/'newer')
    for folder in (tmp_path/'a_file', tmp_path/'a_file'/'below'):
        with pytest.raises(NotADirectoryError, match=f'--root {folder}: {tmp_path}/a_file is a file'): require_writable_folder('root', folder)
    require_output_file('json', tmp_path/'numbers.json', ['.json'])
    require_output_file('json', None, ['.json'])
    for path, problem in (('numbers.txt', 'must end in .json or .toml'), (tmp_path, 'must end in'),
        (tmp_path/'nowhere'/'a.json', 'must be a file in a folder that exists')):
        with pytest.raises(ValueError, match=f'--json {path}: {problem}'): require_output_file('json', path, ['.json', '.toml'])
    (tmp_path/'b.json').mkdir()
    with pytest.raises(ValueError, match='must be a file'): require_output_file('json', tmp_path/'b.json', ['.json'])
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match=f'--root {tmp_path}/x: {tmp_path} cannot be written'): require_writable_folder('root', tmp_path/'x')
    with pytest.raises(PermissionError, match='--json'): require_output_file('json', tmp_path/'a.json', ['.json'])


def test_written_json_is_whole_while_others_read(tmp_path):
    path, end = tmp_path/'config.json', time.monotonic() + 1
    write_json(path, dict(values=[0]*1000))
    def write():
        while time.monotonic() < end: write_json(path, dict(values=[1]*1000))
    thread = threading.Thread(target=write)
    thread.start()
    while time.monotonic() < end: assert len(json.loads(path.read_text())['values'])==1000
    thread.join()
