"The main job on the real CIFAR-10, as whole programs."
import csv
import json
import shlex
import tarfile

import pytest

from conftest import pack_batches
from resnet_cifar.fetch import DIGESTS, _check, _read_archive, download_cifar10, read_cifar10, verify_cifar10

SPECIFICATION = '''resnet_cifar.trainer --batch_size 32 --num_workers 1 --num_epochs 20 --lr 0.001 --optimizer AdamW --lr_scheduler CosineAnnealingLR --t_max 10
  --model_name {model} --random_seed 0 --ckpt_dir ./checkpoints --compile --pin_memory --transform --root {root} --limit_train {train} --limit_test 500 --valid_size 500 --num_epochs 2'''


def test_real_pixels(cifar10_root):
    assert verify_cifar10(cifar10_root)==DIGESTS


def test_nothing_is_written_or_fetched_when_the_data_are_there(cifar10_root, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in cifar10_root.iterdir()}
    monkeypatch.setattr('urllib.request.OpenerDirector.open', None)
    monkeypatch.setattr('subprocess.run', None)
    assert download_cifar10(cifar10_root)==cifar10_root
    assert {p: p.stat().st_mtime_ns for p in cifar10_root.iterdir()}==before


def test_official_archive_and_torchvision_folder(cifar10_root, tmp_path):
    "The real pixels in the official form, made here: both ways of reading it must give the published checksums."
    arrays, archive = read_cifar10(cifar10_root), tmp_path/'cifar-10-python.tar.gz'
    pack_batches(arrays, archive, 'w:gz', compresslevel=1)
    with pytest.raises(ValueError, match='the official archive'): download_cifar10(tmp_path/'from_archive', archive=archive) # not the published bytes
    _check(_read_archive(archive, skip_checksum=True), archive)
    (tmp_path/'folder').mkdir()
    with tarfile.open(archive) as tar: tar.extractall(tmp_path/'folder', filter='data')
    assert verify_cifar10(tmp_path/'folder')==DIGESTS
    assert sorted(p.name for p in (tmp_path/'folder').iterdir())==['cifar-10-batches-py', 'cifar10.npz']


@pytest.mark.parametrize('model, extra', [('ResNet18', ''), *((f'ResNet{n}', '--width 8') for n in (34, 50, 101, 152))])
def test_specification_command(command, cifar10_root, tmp_path, model, extra):
    "The specification's command with limits; ResNet-18 at full width, the others thin to save minutes, and only one of each kind of block compiled."
    compiled = model in ('ResNet18', 'ResNet152')
    done = command(*shlex.split(SPECIFICATION.format(model=model, root=cifar10_root, train=1280 if model=='ResNet18' else 128) + ' ' + extra + ' --no_compile'*(not compiled)))
    run = tmp_path/'checkpoints'
    assert sorted(p.name for p in run.iterdir())==['best.ckpt', 'config.json', 'curves.png', 'history.csv', 'last.ckpt', 'previous.ckpt', 'result.json']
    assert [row['epoch'] for row in csv.DictReader(open(run/'history.csv'))]==['0', '1']
    result, config = json.loads((run/'result.json').read_text()), json.loads((run/'config.json').read_text())
    assert 0 <= result['test_accuracy'] <= 1 and len(result['state_digest'])==64
    assert (config['model_name'], config['compile'], config['transform'], config['t_max'])==(model.lower(), compiled, True, 10)
    assert ('compiled     for 32 x 32 pixels: the first step took ' in done.stdout)==compiled and 'this machine cannot' not in done.stdout
    assert done.stderr=='' and len(done.stdout.splitlines()) < 20  # no bars, no warnings where there is no terminal
    evaluated = command('resnet_cifar', 'evaluate', '--ckpt', run, '--root', cifar10_root, '--limit_test', 500)
    assert f'test accuracy {result["test_accuracy"]:.4f}' in evaluated.stdout


def thin_run(command, root, folder, **settings):
    words = dict(root=root, ckpt_dir=folder, width=8, batch_size=64, num_epochs=2, limit_train=640, limit_test=500, valid_size=500, num_workers=0) | settings
    command('resnet_cifar', 'train', '--transform', *[w for name, value in words.items() for w in (f'--{name}', value)], OMP_NUM_THREADS='2') # a sum in two parts is what may vary
    history = [{k: v for k, v in row.items() if k!='seconds'} for row in csv.DictReader(open(folder/'history.csv'))]
    return history, json.loads((folder/'result.json').read_text())['state_digest']


def test_a_run_is_a_function_of_its_settings(command, cifar10_root, tmp_path):
    "Same command twice, and with 2 background processes: the same history and the same bits. Another seed: others."
    first = thin_run(command, cifar10_root, tmp_path/'first')
    assert thin_run(command, cifar10_root, tmp_path/'second')==first
    assert thin_run(command, cifar10_root, tmp_path/'workers', num_workers=2)==first
    assert thin_run(command, cifar10_root, tmp_path/'seed', random_seed=1)[1]!=first[1]


def test_compiled_and_averaged_runs_repeat(command, cifar10_root, tmp_path):
    settings = dict(ema_decay=0.9, width=4, num_epochs=1)
    runs = [thin_run(lambda *words, **environment: command(*words, '--compile', **environment), cifar10_root, tmp_path/name, **settings) for name in ('a', 'b')]
    assert runs[0]==runs[1]



def test_workers_under_spawn(command, tmp_path):
    "Where processes are not forked (macOS, Windows) workers give the same batches."
    (tmp_path/'program.py').write_text("""
import torch
from resnet_cifar.data import BatchLoader, sample_cifar10
if __name__=='__main__':
    torch.multiprocessing.set_start_method('spawn')
    s = sample_cifar10()
    batches = [list(BatchLoader(s.train_images, s.train_labels, 250, train=True, augment=True, num_workers=n)) for n in (0, 1)]
    print(len(batches[0]), all(torch.equal(a, b) for one, other in zip(*batches) for a, b in zip(one, other)))
""")
    assert command('program', PYTHONPATH=str(tmp_path)).stdout=='4 True\n'


def test_a_program_ends_while_workers_run(command, tmp_path):
    "They heed no signal, so somebody must tell them."
    (tmp_path/'program.py').write_text("""
from resnet_cifar.data import BatchLoader, sample_cifar10
s = sample_cifar10()
batches = iter(BatchLoader(s.train_images, s.train_labels, 32, train=True, num_workers=2))
print(next(batches)[0].shape[0])
""")
    assert command('program', PYTHONPATH=str(tmp_path), timeout=120).stdout=='32\n'
